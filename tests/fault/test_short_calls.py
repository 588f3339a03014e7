"""Reads, writes and copies that do less than they were asked to: the rest is asked for, and all is as it should be."""

import errno

import pytest

from blockbak.errors import StoreFailed, TargetFailed
from blockbak.flow import backup
from blockbak.units import KIB, MIB
from tests.faults import QuickKernel, ShortKernel
from tests.scene import BLOCK, DEEDS, Scene

SMALL, ROOMY = 75 * BLOCK + 3, 3 * 256 * KIB + 3
FILES = [name for name in DEEDS if name != "restore-to-a-device"]


def short(deed, history, folder, kernel):
    """Do it with the kernel; all must be as if it had done all at once."""
    scene = history.copy(folder / "scene")
    deed.ready(scene)
    before = scene.files()
    deed.fresh(scene)
    deed.run(scene, scene.repository(kernel), scene.world(kernel))
    assert kernel.shortened > 0
    deed.done(scene)
    scene.check_points(also=deed.also(scene), gone=deed.gone(scene), before=before)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "no-direct"])
@pytest.mark.parametrize("name", FILES)
def test_short_calls_change_nothing(name, direct, memory, seed, rng):
    """With O_DIRECT the kernel gives whole sectors; where it is refused, any number of bytes."""
    history = Scene.make(memory / "history", seed, size=SMALL)
    short(DEEDS[name], history, memory, ShortKernel(rng, direct=direct))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "no-direct"])
def test_short_calls_change_nothing_on_a_device(direct, memory, loop, seed, rng):
    history = Scene.make(memory / "history", seed, size=ROOMY)
    for sector in (512, 4096):
        history.extra["target"] = loop(ROOMY + 8192 - ROOMY % 4096, sector).path
        (memory / str(sector)).mkdir()
        short(DEEDS["restore-to-a-device"], history, memory / str(sector), ShortKernel(rng, direct=direct))


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "no-direct"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_short_reads_of_a_device_change_nothing(sector, direct, memory, loop, seed, rng):
    """The source is a device; its kernel gives its own sectors."""
    scene = Scene(memory, seed)
    scene.create()
    device = loop(ROOMY - ROOMY % 4096, sector)
    content = rng.randbytes(64 * KIB) + bytes(300 * KIB) + rng.randbytes(device.size - 364 * KIB)
    with open(device.path, "wb") as file:
        file.write(content)
    scene.source.symlink_to(device.path)
    kernel = ShortKernel(rng, direct=direct, sector=sector)
    made = backup.backup(scene.repository(kernel), scene.request(), scene.world(kernel))
    assert kernel.shortened > 0
    assert (made.consistency, made.bad_bytes) == ("cold", 0)
    scene.source.unlink()  # a restore goes beside it, and that is /dev
    assert scene.restored(made.point) == content


@pytest.mark.parametrize("sort", ["xfs", "ext4"])
def test_short_copies_change_nothing(sort, request, loop, seed, rng):
    """A synthesis clones or copies long runs, and what is less than a block at their ends."""
    where = request.getfixturevalue(sort)(loop({"xfs": 300 * MIB, "ext4": 64 * MIB}[sort])).where
    history = Scene.make(where / "history", seed, size=5 * 256 * KIB + 700, noise=True)
    short(DEEDS["synthesize"], history, where, ShortKernel(rng))


# --- calls that do nothing at all ------------------------------------------------------------------------


class Idle(QuickKernel):
    """From the n-th on, writes take nothing and say so: a loop around them would never end."""

    def __init__(self, after):
        self.left = after

    def pwritev(self, fd, buffers, offset):
        self.left -= 1
        return super().pwritev(fd, buffers, offset) if self.left >= 0 else 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("name", ["backup-full", "synthesize", "restore-to-a-new-file", "restore-to-an-old-file"])
def test_writes_that_take_nothing_end_the_run(name, after, memory):
    deed = DEEDS[name]
    scene = Scene.make(memory / "history", seed=1, size=SMALL)
    deed.fresh(scene)
    kernel = Idle(after)
    with pytest.raises(TargetFailed if name.startswith("restore") else StoreFailed) as failed:
        deed.run(scene, scene.repository(kernel), scene.world(kernel))
    assert failed.value.exit_code == 1
    assert failed.value.__cause__.errno == errno.EIO
    scene.check_points()
    deed.repeat(scene)
    deed.done(scene)
