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


def backed_up(scene, disk, bad, workers):
    kernel = BadMedium(disk.path, bad, logical=SECTOR)
    world = replace(scene.world(kernel), workers=workers)
    request = backup.Request(disk.path, name="disk", block_bytes=64 * KIB)
    return backup.backup(scene.repository(kernel), request, world)


def pieces(first, count):
    return first * PIECE_BYTES, (first + count) * PIECE_BYTES


@pytest.mark.parametrize(("first", "workers"), [(0, 5), (2, 1), (4, 5)])
def test_a_disk_of_which_nothing_can_be_read_any_more_makes_no_point(first, workers, scene, disk):
    with pytest.raises(SourceVanished, match=r"not one sector of .* could be read") as raised:
        backed_up(scene, disk, [pieces(first, MANY)], workers)
    assert raised.value.exit_code == 1
    assert raised.value.fields["path"] == disk.path
    assert scene.listed() == []
    assert not list((scene.place / "disk").glob("*.zst*"))


def test_a_disk_with_a_readable_sector_now_and_then_is_read_to_its_end(scene, disk):
    """However many are bad: they are named."""
    good = (MANY - 1) * PIECE_BYTES + 9 * SECTOR
    made = backed_up(scene, disk, [(0, good), (good + SECTOR, SIZE)], 5)
    assert (made.bad_bytes, made.attention) == (SIZE - SECTOR, True)
