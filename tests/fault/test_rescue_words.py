"""rescue.py says it when what it leaves behind is neither the old nor the point."""

import pytest

from tests import children
from tests.scene import BLOCK, Scene

WARNING = "is not complete: do not use it"


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=1, size=75 * BLOCK + 3, noise=True)


@pytest.mark.parametrize("old", [True, False])
def test_a_target_that_had_no_room_is_said_to_be_of_no_use(scene, tmpfs, old):
    target = tmpfs("100k") / "target.img"
    if old:
        target.write_bytes(b"old")
    done = children.rescue(scene.place, "restore", scene.names[0], target, "--yes")
    assert done.code == 1, done
    assert "No space left" in done.err
    assert (WARNING in done.err) == old, "a new file is removed again"
    assert target.exists() == old
