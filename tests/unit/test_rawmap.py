"""The map of a raw image is the one that an image of the same bytes has, in whatever order its pieces come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.flow.rawmap import MapSum, all_jobs, ranges, survey, told
from blockbak.host.blockio import PIECE_BYTES
from blockbak.model import extent, hashmap
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry
from blockbak.units import KIB
from tests.doubles import context

BLOCK = 4 * KIB
SECTION = BLOCK * BLOCKS_PER_SECTION
SIZE = 2 * SECTION + 5 * BLOCK + 3


def volume(size: int = SIZE) -> np.ndarray:
    """Two sections of which the second is zeros, and a short one; a last block that is shorter still."""
    data = np.zeros(size, np.uint8)
    dice = np.random.default_rng(1)
    for start in (0, 7 * BLOCK, SECTION - BLOCK, 2 * SECTION + BLOCK, size - 2):
        part = data[start : start + 3 * BLOCK + 1]
        part[:] = dice.integers(1, 255, len(part), np.uint8)
    return data


def reference(data: np.ndarray, bad: extent.Extents) -> list[bytes]:
    """The section digests as docs/format.md tells them, block by block."""
    digests = []
    for start in range(0, len(data), SECTION):
        part = data[start : start + SECTION]
        rows = b"".join(hashmap.digest(part[at : at + BLOCK]) for at in range(0, len(part), BLOCK))
        pairs = extent.clip(bad, start, start + SECTION)
        digests.append(hashmap.section_digest(np.frombuffer(rows, "<u8").reshape(-1, 4), pairs))
    return digests


def add(known: MapSum, data: np.ndarray, first: int, blocks: int, bad: extent.Extents) -> None:
    start = first * BLOCK
    part = data[start : start + blocks * BLOCK]
    nonzero = hashmap.nonzero_blocks(part, BLOCK)
    rows = hashmap.digest_blocks(part, BLOCK, nonzero)
    known.add(first, rows, nonzero, extent.clip(bad, start, start + len(part)))


def pieces(size: int) -> list[tuple[int, int]]:
    return [(job.first_block, job.blocks) for job in all_jobs(Geometry(size, BLOCK, 256 * KIB))]


BAD = extent.table([512, SECTION - 512, 2 * SECTION], [1024, SECTION + 512, 2 * SECTION + 512], extent.BAD)


@given(st.randoms(use_true_random=False))
def test_pieces_come_in_any_order(dice: object) -> None:
    data, order = volume(), pieces(SIZE)
    dice.shuffle(order)
    told_of: list[int] = []
    known = MapSum(Geometry(SIZE, BLOCK, 256 * KIB), told_of.append)
    for first, blocks in order:
        add(known, data, first, blocks, BAD)
    assert [row.tobytes() for row in known.digests] == reference(data, BAD)
    assert sorted(told_of) == [0, 1, 2]
    assert extent.total(known.bad) == extent.total(BAD)
    assert known.bad.tolist() == extent.coalesce(BAD).tolist()


def test_an_unreadable_range_of_zeros_is_another_map_than_zeros() -> None:
    size = BLOCK
    maps = []
    for bad in (extent.empty(), extent.table([0], [512], extent.BAD)):
        known = MapSum(Geometry(size, BLOCK, 256 * KIB))
        add(known, np.zeros(size, np.uint8), 0, 1, bad)
        maps.append(known.root)
    assert maps[0] != maps[1]


def test_only_what_is_being_filled_is_held() -> None:
    data = volume()
    known = MapSum(Geometry(SIZE, BLOCK, 256 * KIB))
    for first, blocks in pieces(SIZE):
        add(known, data, first, blocks, extent.empty())
        assert len(known._filling) <= 1
    assert known._filling == {}


@pytest.mark.parametrize("size", [1, BLOCK, BLOCK + 1, SECTION - 1, SECTION, SECTION + 1, SIZE])
def test_an_end_that_was_not_known_gives_the_same_map(size: int) -> None:
    data = volume()[:size]
    if len(data) > 9:
        data[-1] = 1
    longer, right = MapSum(Geometry(1 << 40, BLOCK, 256 * KIB)), MapSum(Geometry(size, BLOCK, 256 * KIB))
    for known in (longer, right):
        for first, blocks in pieces(size):
            add(known, data, first, blocks, extent.empty())
    assert longer.cut(size).digests.tobytes() == right.digests.tobytes()
    assert longer.cut(size).root == right.root
    assert [row.tobytes() for row in right.digests] == reference(data, extent.empty())


@pytest.mark.parametrize("workers", [1, 3])
def test_a_survey_finds_the_section_that_is_another(workers: int, tmp_path: object) -> None:
    data = volume()
    geometry = Geometry(SIZE, BLOCK, 256 * KIB)

    def surveyed(held: np.ndarray) -> MapSum:
        known = MapSum(geometry)

        def read(offset: int, into: np.ndarray, length: int) -> None:
            into[:length] = held[offset : offset + length]

        read_bytes = survey(known, all_jobs(geometry), read, extent.empty(), context(tmp_path, workers=workers))
        assert read_bytes == SIZE
        return known

    right = surveyed(data)
    for section, place in ((0, 9 * BLOCK), (1, SECTION + 77), (2, SIZE - 1)):
        other = data.copy()
        other[place] ^= 4
        begin, end = geometry.section_range(section)
        assert surveyed(other).differing(right.digests) == [(begin, end)]
    assert right.differing(right.digests) == []


def test_pieces_that_were_not_touched_are_holes() -> None:
    geometry = Geometry(SIZE, BLOCK, 256 * KIB)
    touched = np.zeros(3, bool)
    touched[1] = True
    holes = [job.zero for job in all_jobs(geometry, touched)]
    assert holes == [number != 1 for number in range(-(-SIZE // PIECE_BYTES))]


def test_neighbouring_sections_are_one_range() -> None:
    geometry = Geometry(SIZE, BLOCK, 256 * KIB)
    assert ranges(geometry, np.array([True, True, False])) == [(0, 2 * SECTION)]
    assert ranges(geometry, np.array([True, False, True])) == [(0, SECTION), (2 * SECTION, SIZE)]
    assert told([(0, 5), (9, 12)]) == "0 to 5, 9 to 12"
