"""The range algebra against an array that holds one kind per byte."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import extent
from blockbak.model.extent import ABSENT, BAD, DATA, HOLE, ZERO

SIZE = 96
KINDS = (DATA, ZERO, HOLE, BAD)


@st.composite
def pictures(draw, kinds=(ABSENT, *KINDS), size=SIZE):
    """One kind per byte, in runs."""
    runs = draw(st.lists(st.tuples(st.sampled_from(kinds), st.integers(1, 17)), max_size=24))
    bytes_ = np.array([kind for kind, length in runs for _ in range(length)], np.uint8)[:size]
    return np.concatenate((bytes_, np.full(size - len(bytes_), kinds[0], np.uint8)))


def rows(picture, base=0):
    """The table of a picture, made one byte after the other."""
    found = []
    for at, kind in enumerate(picture.tolist()):
        if kind and found and found[-1][1] == at and found[-1][2] == kind:
            found[-1][1] = at + 1
        elif kind:
            found.append([at, at + 1, kind])
    starts, ends, kinds = zip(*found, strict=True) if found else ((), (), ())
    return extent.table([base + at for at in starts], [base + at for at in ends], list(kinds))


def picture_of(table, base=0, size=SIZE):
    """One kind per byte of a table."""
    picture = np.zeros(size, np.uint8)
    for row in table:
        begin = int(row["start"]) - base
        assert begin >= 0
        assert not picture[begin : begin + int(row["length"])].any(), "two rows claim one byte"
        picture[begin : begin + int(row["length"])] = row["kind"]
    return picture


def same(table, picture, base=0):
    """The table is the one canonical table of the picture: sorted, disjoint, coalesced."""
    assert table.dtype == extent.EXTENT
    assert table.tolist() == rows(picture, base).tolist()


bases = st.sampled_from([0, 1, 4096, 2**32 - 5, 2**46])


@given(pictures(), pictures(), bases)
def test_overlay_lets_the_upper_win(below, above, base):
    expected = np.where(above != ABSENT, above, below)
    same(extent.overlay(rows(below, base), rows(above, base)), expected, base)


@given(pictures(), pictures(), pictures())
def test_overlay_is_associative(first, second, third):
    one, two, three = rows(first), rows(second), rows(third)
    left = extent.overlay(extent.overlay(one, two), three)
    assert left.tolist() == extent.overlay(one, extent.overlay(two, three)).tolist()


@given(pictures(), pictures(), bases)
def test_subtract_takes_every_kind_away(kept, gone, base):
    expected = np.where(gone != ABSENT, np.uint8(ABSENT), kept)
    same(extent.subtract(rows(kept, base), rows(gone, base)), expected, base)


@given(pictures(), pictures())
def test_what_is_subtracted_and_laid_over_again_is_as_before(below, above):
    one, two = rows(below), rows(above)
    assert extent.overlay(extent.subtract(one, two), two).tolist() == extent.overlay(one, two).tolist()


@given(pictures(), st.sets(st.integers(1, SIZE - 1)), bases)
def test_coalesce_undoes_any_cutting(picture, cuts, base):
    whole = rows(picture, base)
    pieces = [
        (max(start, int(row["start"])), min(end, int(row["start"] + row["length"])), int(row["kind"]))
        for row in whole
        for start, end in zip(
            [0, *(base + cut for cut in sorted(cuts))], [*(base + c for c in sorted(cuts)), 2**62], strict=True
        )
    ]
    kept = [piece for piece in pieces if piece[0] < piece[1]]
    starts, ends, kinds = zip(*kept, strict=True) if kept else ((), (), ())
    same(extent.coalesce(extent.table(list(starts), list(ends), list(kinds))), picture, base)


@given(pictures(), st.integers(-5, SIZE + 5), st.integers(-5, SIZE + 5))
def test_clip_keeps_what_lies_inside(picture, start, end):
    expected = picture.copy()
    expected[: max(start, 0)] = ABSENT
    expected[max(end, 0) :] = ABSENT
    same(extent.clip(rows(picture), start, end), expected)


@given(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 20)), max_size=12),
    st.sampled_from([1, 2, 8, 16, 32]),
    st.integers(0, 31),
)
def test_align_out_covers_every_unit_that_is_touched(ranges, unit, short):
    """The rows may overlap, as ranges from outside do; they are sorted by start."""
    limit = SIZE - short
    ranges = sorted((start, min(start + length, limit)) for start, length in ranges if start < limit)
    expected = np.zeros(SIZE, np.uint8)
    for start, end in ranges:
        expected[start // unit * unit : -(-end // unit) * unit] = DATA
    expected[limit:] = ABSENT
    given_rows = extent.table([start for start, _ in ranges], [end for _, end in ranges], DATA)
    same(extent.align_out(given_rows, unit, limit), expected)


@given(st.lists(st.sampled_from((ABSENT, *KINDS)), max_size=40), st.sampled_from([1, 3, 8]), st.integers(0, 7), bases)
def test_from_blocks_paints_each_block(kinds, block, short, base):
    first = base // block * block
    limit = first + max(len(kinds) * block - min(short, block - 1), 0)
    expected = np.repeat(np.array(kinds, np.uint8), block)[: limit - first]
    same(extent.from_blocks(np.array(kinds, np.uint8), first, block, limit), expected, first)


@given(pictures(), st.sampled_from([1, 4, 7, 16]), st.integers(0, 6), st.integers(0, 30), bases)
def test_touched_finds_blocks_that_hold_a_byte(picture, block, skipped, blocks, base):
    """Also where extents begin before the first block or go on after the last."""
    first = skipped * block
    expected = [bool(picture[first + n * block : first + (n + 1) * block].any()) for n in range(blocks)]
    assert extent.touched(rows(picture, base), base + first, block, blocks).tolist() == expected


@given(pictures(), st.sampled_from([1, 4, 7, 16]), st.integers(1, 30), bases)
def test_a_block_of_several_kinds_is_the_one_that_asks_for_most_care(picture, block, blocks, base):
    expected = []
    for n in range(blocks):
        there = set(picture[n * block : (n + 1) * block].tolist())
        expected.append(next((kind for kind in (DATA, BAD, HOLE, ZERO) if kind in there), ABSENT))
    assert extent.to_blocks(rows(picture, base), base, block, blocks).tolist() == expected


@given(st.lists(st.sampled_from((ABSENT, *KINDS)), min_size=1, max_size=40), st.integers(0, 7))
def test_blocks_to_extents_and_back(kinds, short):
    table = extent.from_blocks(np.array(kinds, np.uint8), 0, 8, len(kinds) * 8 - short)
    assert extent.to_blocks(table, 0, 8, len(kinds)).tolist() == kinds


numbers = st.one_of(st.integers(0, 24), st.sampled_from([2**32, 2**63 - 1, 2**63, 2**64 - 1]))
loose = st.lists(st.tuples(numbers, numbers, st.integers(0, 6)), max_size=6)


def sound(table, start, end, tiling):
    """What ``flaw`` promises to check, one row after the other, in whole numbers without limit."""
    if not table:
        return not tiling or end <= start
    at, before = start, None
    for begin, length, kind in table:
        if kind not in KINDS or not length or begin < at or begin + length > end:
            return False
        if (tiling and begin != at) or (begin == at and kind == before):
            return False
        at, before = begin + length, kind
    return not tiling or at == end


@given(loose, st.integers(0, 10), st.integers(0, 40), st.booleans())
def test_flaw_accepts_exactly_sound_tables(table, start, length, tiling):
    found = extent.flaw(np.array(table, extent.EXTENT), start, start + length, tiling=tiling)
    assert (found is None) == sound(table, start, start + length, tiling), found


@given(pictures(), st.booleans(), bases)
def test_flaw_accepts_what_the_algebra_makes(picture, tiling, base):
    whole = bool((picture != ABSENT).all())
    found = extent.flaw(rows(picture, base), base, base + SIZE, tiling=tiling)
    assert (found is None) == (whole or not tiling)


@pytest.mark.parametrize("change", ["kind", "empty", "order", "overlap", "below", "above", "split", "gap"])
def test_flaw_names_each_way_to_be_wrong(change):
    table = extent.table([8, 16, 32], [16, 32, 40], [DATA, ZERO, HOLE])
    assert extent.flaw(table, 8, 40, tiling=True) is None
    match change:
        case "kind":
            table["kind"][1] = 5
        case "empty":
            table["length"][1] = 0
        case "order":
            table = table[::-1]
        case "overlap":
            table["length"][0] = 9
        case "below":
            table["start"][0] = 7
        case "above":
            table["length"][2] = 9
        case "split":
            table["kind"][1] = DATA
        case "gap":
            table["length"][1] = 15
    assert extent.flaw(table, 8, 40, tiling=True)


@given(pictures())
def test_totals_and_kinds(picture):
    table = rows(picture)
    assert extent.total(table) == int((picture != ABSENT).sum())
    for kind in KINDS:
        assert extent.total(table, kind) == int((picture == kind).sum())
    chosen = np.where(np.isin(picture, (DATA, BAD)), picture, np.uint8(ABSENT))
    assert picture_of(extent.of_kind(table, DATA, BAD)).tolist() == chosen.tolist()


@given(st.lists(st.integers(0, 2), max_size=50))
def test_runs_are_maximal_and_tile(values):
    starts, ends = extent.runs(np.array(values, np.uint8))
    pieces = [values[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    assert [value for piece in pieces for value in piece] == values
    assert all(len(set(piece)) == 1 for piece in pieces)
    assert all(a[-1] != b[0] for a, b in itertools.pairwise(pieces))


@given(st.lists(st.booleans(), max_size=50))
def test_true_runs_are_the_true_ones_of_the_runs(values):
    mask = np.array(values, bool)
    starts, ends = extent.runs(mask)
    expected = [(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True) if values[a]]
    found = extent.true_runs(mask)
    assert list(zip(found[0].tolist(), found[1].tolist(), strict=True)) == expected
