"""A disk that fell off its bus answers every read with an error: that is no disk full of bad sectors."""

from dataclasses import replace

import pytest

from blockbak.errors import SourceVanished
from blockbak.flow import backup
from blockbak.host.blockio import PIECE_BYTES
from blockbak.units import KIB
from tests.faults import BadMedium
from tests.scene import Scene

SECTOR = 4 * KIB
"""Each is asked for by itself: large ones are fewer."""
MANY = 32
"""Neighbouring pieces without one readable sector are too many."""
SIZE = (MANY + 4) * PIECE_BYTES


@pytest.fixture
def disk(loop):
    return loop(SIZE, SECTOR)


@pytest.fixture
def scene(memory, seed):
    made = Scene(memory / "scene", seed)
    made.folder.mkdir()
    made.create()
    return made


def backed_up(scene, disk, kernel, workers):
    world = replace(scene.world(kernel), workers=workers)
    request = backup.Request(disk.path, name="disk", block_bytes=64 * KIB, retries=0)
    return backup.backup(scene.repository(kernel), request, world)


class FallsOff(BadMedium):
    """A disk that answers no more once it was read from the piece ``first`` on."""

    def __init__(self, path, first, **how):
        super().__init__(path, [], **how)
        self._first = first * PIECE_BYTES

    def preadv(self, fd, buffers, offset):
        if fd in self._direct and offset >= self._first:
            self.bad = [(0, SIZE)]
        return super().preadv(fd, buffers, offset)


@pytest.mark.parametrize(("first", "workers"), [(0, 5), (2, 1), (4, 5)])
def test_a_disk_of_which_nothing_can_be_read_any_more_makes_no_point(first, workers, scene, disk):
    kernel = FallsOff(disk.path, first, logical=SECTOR)
    with pytest.raises(SourceVanished, match=r"not one sector of .* could be read, nor one elsewhere") as raised:
        backed_up(scene, disk, kernel, workers)
    assert raised.value.exit_code == 1
    assert raised.value.fields["path"] == disk.path
    assert scene.listed() == []
    assert not list((scene.place / "disk").glob("*.zst*"))


@pytest.mark.parametrize("workers", [1, 5])
def test_a_disk_with_one_readable_sector_is_read_to_its_end(workers, scene, disk):
    """However much is bad in a row, it is there: what cannot be read is named."""
    kernel = BadMedium(disk.path, [(0, SIZE - SECTOR)], logical=SECTOR)
    made = backed_up(scene, disk, kernel, workers)
    assert (made.bad_bytes, made.attention) == (SIZE - SECTOR, True)
