"""Digests, what changed between two maps, and the root."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import extent, hashmap
from blockbak.model.hashmap import BLOCKS_PER_SECTION, DIGEST_WORDS, Geometry
from blockbak.units import KIB, MIB, TIB

BLOCK = 4 * KIB


def words(*data):
    """The rows of some byte strings, by the library alone."""
    return np.frombuffer(b"".join(blake3(part).digest() for part in data), "<u8").reshape(-1, DIGEST_WORDS)


@pytest.mark.parametrize("bit", range(8))
def test_one_bit_anywhere_makes_a_block_data(bit):
    """Block n has its only bit in byte n: every byte of a block takes its turn."""
    data = np.zeros((BLOCK, BLOCK), np.uint8)
    np.fill_diagonal(data, 1 << bit)
    assert hashmap.nonzero_blocks(data.reshape(-1), BLOCK).all()


@pytest.mark.parametrize("short", [1, 2, 7, 8, 9, 511, 512, 4095])
def test_one_bit_anywhere_in_a_short_last_block(short):
    for byte in range(short):
        data = np.zeros(2 * BLOCK + short, np.uint8)
        assert hashmap.nonzero_blocks(data, BLOCK).tolist() == [False, False, False]
        data[2 * BLOCK + byte] = 0x80
        assert hashmap.nonzero_blocks(data, BLOCK).tolist() == [False, False, True]


@given(st.sets(st.integers(0, 5 * BLOCK + 100)), st.integers(0, 5 * BLOCK + 101))
def test_zero_test_against_a_loop(places, size):
    data = np.zeros(size, np.uint8)
    data[[place for place in places if place < size]] = 1
    expected = [bool(data[at : at + BLOCK].any()) for at in range(0, size, BLOCK)]
    assert hashmap.nonzero_blocks(data, BLOCK).tolist() == expected


@given(st.integers(1, 4 * BLOCK), st.lists(st.booleans(), min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_digests_are_those_of_the_bytes(size, wanted, dice):
    """Unwanted blocks are known to be zero, and have the row of zeros of their length."""
    count = -(-size // BLOCK)
    data = np.frombuffer(dice.randbytes(size), np.uint8).copy()
    for block in range(count):
        if not wanted[block]:
            data[block * BLOCK : (block + 1) * BLOCK] = 0
    raw = data.tobytes()
    expected = words(*(raw[at : at + BLOCK] for at in range(0, size, BLOCK)))
    found = hashmap.digest_blocks(data, BLOCK, np.array(wanted[:count]))
    assert found.tolist() == expected.tolist()


@given(st.integers(1, 200), st.sets(st.tuples(st.integers(0, 199), st.integers(0, 255))))
def test_changed_rows_notices_every_bit(count, flips):
    old = words(*(bytes([n]) for n in range(count)))
    new = old.copy()
    for row, bit in flips:
        if row < count:
            new[row, bit // 64] ^= np.uint64(1 << bit % 64)
    expected = [
        any(a != b for a, b in zip(one, two, strict=True)) for one, two in zip(new.tolist(), old.tolist(), strict=True)
    ]
    assert hashmap.changed_rows(new, old).tolist() == expected


def test_changed_rows_of_nothing():
    assert hashmap.changed_rows(hashmap.empty_rows(0), hashmap.empty_rows(0)).tolist() == []


# --- section digests and root -------------------------------------------------------------------

ROWS = words(b"a", b"b", b"c", b"d")


def of_kinds(*kinds):
    return extent.from_blocks(np.array(kinds, np.uint8), 0, BLOCK, 4 * BLOCK)


def test_a_section_digest_is_that_of_its_rows():
    tiled = of_kinds(extent.DATA, extent.DATA, extent.ZERO, extent.HOLE)
    assert hashmap.section_digest(ROWS, tiled) == blake3(ROWS.tobytes()).digest()


def test_zero_and_hole_are_one_to_the_digest_and_bad_is_not():
    plain = hashmap.section_digest(ROWS, of_kinds(1, 1, 1, extent.ZERO))
    assert hashmap.section_digest(ROWS, of_kinds(1, 1, 1, extent.HOLE)) == plain
    bad = hashmap.section_digest(ROWS, of_kinds(1, 1, 1, extent.BAD))
    assert bad != plain
    moved = hashmap.section_digest(ROWS, of_kinds(1, 1, extent.BAD, 1))
    longer = hashmap.section_digest(ROWS, of_kinds(1, 1, extent.BAD, extent.BAD))
    assert len({plain, bad, moved, longer}) == 4


def test_one_bad_sector_changes_the_digest():
    """BAD has the unit of a sector, not of a block."""
    whole = of_kinds(1, 1, 1, 1)
    seen = {hashmap.section_digest(ROWS, whole)}
    for start, end in ((0, 512), (512, 1024), (0, 1024)):
        seen.add(hashmap.section_digest(ROWS, extent.overlay(whole, extent.table([start], [end], extent.BAD))))
    assert len(seen) == 4


@given(st.integers(0, 3), st.integers(0, 255))
def test_every_bit_of_a_row_counts_in_the_section_digest(row, bit):
    other = ROWS.copy()
    other[row, bit // 64] ^= np.uint64(1 << bit % 64)
    tiled = of_kinds(1, 1, 1, 1)
    assert hashmap.section_digest(other, tiled) != hashmap.section_digest(ROWS, tiled)


def test_the_root_depends_on_the_geometry_and_on_each_section():
    digests = np.arange(96, dtype=np.uint8).reshape(3, 32)
    roots = {hashmap.root(10 * MIB, 4 * KIB, digests)}
    roots.add(hashmap.root(10 * MIB + 512, 4 * KIB, digests))
    roots.add(hashmap.root(10 * MIB, 8 * KIB, digests))
    roots.add(hashmap.root(10 * MIB, 4 * KIB, digests[:2]))
    roots.add(hashmap.root(10 * MIB, 4 * KIB, digests[[1, 0, 2]]))
    for section in range(3):
        other = digests.copy()
        other[section, 31] ^= 1
        roots.add(hashmap.root(10 * MIB, 4 * KIB, other))
    assert len(roots) == 8
    # A strided view has the same content, so it has the same root.
    wide = np.zeros((3, 64), np.uint8)
    wide[:, :32] = digests
    assert hashmap.root(10 * MIB, 4 * KIB, wide[:, :32]) in roots


# --- geometry ---------------------------------------------------------------------------------------

blocks = st.sampled_from([4 * KIB, 64 * KIB, MIB])


@given(st.integers(1, 40 * MIB), blocks)
def test_sections_tile_the_volume(size, block):
    geometry = Geometry(size, block, max(block, 256 * KIB))
    at = counted = 0
    for number in range(geometry.sections):
        start, end = geometry.section_range(number)
        assert start == at < end
        count = geometry.section_blocks(number)
        assert count == -(-(end - start) // block) <= BLOCKS_PER_SECTION
        at, counted = end, counted + count
    assert (at, counted) == (size, geometry.blocks)
    lengths = [geometry.block_length(n) for n in range(geometry.blocks)]
    assert sum(lengths) == size
    assert set(lengths[:-1]) <= {block}
    assert 0 < lengths[-1] <= block


@given(st.integers(1, 16 * TIB), blocks)
def test_zero_sections_have_the_digest_of_their_zero_rows(size, block):
    geometry = Geometry(size, block, max(block, 256 * KIB))
    for number in {0, geometry.sections - 1}:
        rows = geometry.zero_rows(number)
        assert len(rows) == geometry.section_blocks(number)
        last = geometry.block_length(number * BLOCKS_PER_SECTION + len(rows) - 1)
        assert rows[-1].tolist() == words(bytes(last))[0].tolist()
        if len(rows) > 1:
            assert (rows[:-1] == words(bytes(block))).all()
        assert geometry.zero_section_digest(number) == hashmap.section_digest(rows, extent.empty())
