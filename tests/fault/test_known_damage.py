"""What a verification found damaged is not relied on until a whole one finds it good: nothing new stands on it, what
else holds a point serves, and no sample and no new name makes it good.
"""

from __future__ import annotations

import random

import pytest

from blockbak.errors import DamagedImage, NoUsableParent
from blockbak.flow import jobs, prune, status, verify
from blockbak.model.facts import FULL, INCREMENTAL
from blockbak.model.health import Goals
from blockbak.model.retention import KEEP, Policy
from blockbak.units import MIB
from tests.scene import BLOCK, VOLUME, Scene, write_at


@pytest.fixture
def scene(memory):
    """A full and two incrementals."""
    return Scene.make(memory / "scene", seed=1, points=3, size=75 * BLOCK + 3)


@pytest.fixture
def base(scene):
    """The file of the full."""
    return f"{scene.names[0]}.full.zst"


def verified(scene, share=1.0, pick=1.0):
    """With a ``pick`` of 1 a sample looks at the last frames only."""
    return verify.verify(scene.repository(), [], scene.world(), share=share, pick=lambda: pick)


def judged(scene):
    (found,) = status.status(scene.repository(), scene.world(), lambda volume, job: Goals()).volumes
    return found


def test_a_sample_that_does_not_meet_the_damage_does_not_undo_it(scene):
    # So much that does not compress is looked at in more pieces than one.
    scene.source.write_bytes(random.Random(1).randbytes(MIB))
    scene.back_up("full")
    damaged = f"{scene.names[-1]}.full.zst"
    scene.flip_a_frame(damaged)
    assert not verified(scene).ok
    assert verified(scene, share=0.01).ok
    found = judged(scene)
    assert found.newest == scene.names[-2]
    assert [one.name for one in found.reasons] == ["VerifyFailed"]
    scene.flip_a_frame(damaged)
    assert verified(scene).ok
    assert judged(scene).newest == scene.names[-1]


def test_the_next_point_stands_on_no_image_that_was_found_damaged(scene, base):
    scene.flip_a_frame(base)
    assert not verified(scene).ok
    with pytest.raises(NoUsableParent, match="found when it was last verified"):
        scene.back_up("incremental")
    made = scene.back_up()
    assert made.kind == FULL
    assert "found when it was last verified" in made.notes[0]
    assert scene.restored(made.point) == scene.held[made.point]
    assert judged(scene).newest == made.point
    assert scene.back_up().kind == INCREMENTAL


def test_what_else_holds_the_parent_serves(scene, base):
    scene.synthesize()
    scene.flip_a_frame(base)
    assert not verified(scene).ok
    made = scene.back_up()
    assert made.kind == INCREMENTAL
    assert scene.restored(made.point) == scene.held[made.point]


def test_what_else_holds_the_point_is_restored(scene):
    newest = scene.synthesize().point
    scene.flip_a_frame(newest.file)
    with pytest.raises(DamagedImage):
        scene.restored(newest.point)
    assert not verified(scene).ok
    assert judged(scene).newest == newest.point
    assert scene.restored(newest.point) == scene.held[newest.point]
    # And so it is after what serves was merged into a second full, beside the damaged one.
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert [one.point for one in report.decisions if one.action == KEEP] == [newest.point]
    assert scene.restored(newest.point) == scene.held[newest.point]


def test_damage_gets_no_new_name(scene):
    """Frames are taken over as they are: a full composed of a damaged one would be taken for good."""
    scene.source.write_bytes(random.Random(1).randbytes(MIB))
    full = scene.back_up("full")
    write_at(scene.source, 0, b"changed")
    scene.back_up("incremental")
    scene.flip_a_frame(full.file, -1)
    assert not verified(scene).ok
    before = scene.files()
    with pytest.raises(DamagedImage, match="nothing is composed of it"):
        scene.synthesize()
    assert scene.files() == before
    assert judged(scene).newest == scene.names[2]


def test_a_full_that_was_found_damaged_is_composed_anew(scene):
    damaged = scene.synthesize().point
    scene.flip_a_frame(damaged.file)
    assert not verified(scene).ok
    made = scene.synthesize()
    assert made.written
    assert made.point.file != damaged.file


def test_an_rpo_is_kept_by_good_points_only(scene, base):
    repository = scene.repository()
    assert jobs.newest_good(repository, VOLUME) is not None
    scene.flip_a_frame(base)
    assert not verified(scene).ok
    assert jobs.newest_good(repository, VOLUME) is None
