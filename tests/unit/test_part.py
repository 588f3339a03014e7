"""The part of a volume that is restored, against sets of single bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import extent
from blockbak.model.extent import BAD
from blockbak.model.part import Part

SIZE = 200
parts = st.builds(
    lambda low, high: Part(min(low, high), abs(high - low) + 1, 1), st.integers(0, 199), st.integers(0, 199)
)
ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(sorted)


def members(part):
    return set(range(part.start, min(part.end, SIZE)))


@given(parts, ranges)
def test_within_is_what_both_have(part, pair):
    low, high = part.within(*pair)
    assert low <= high
    assert part.start <= low <= high <= part.end
    assert set(range(low, min(high, SIZE))) == members(part) & set(range(*pair))


@given(parts, st.integers(1, 40), st.integers(0, 3))
def test_blocks_hold_a_byte_of_it(part, block, first):
    count = -(-SIZE // block)
    begin = first * block
    mask = part.blocks(begin, block, count)
    for number in range(count):
        inside = set(range(begin + number * block, begin + (number + 1) * block)) & set(range(part.start, part.end))
        assert mask[number] == bool(inside)


@given(parts, st.integers(1, 40))
def test_cut_blocks_have_bytes_inside_and_outside(part, block):
    part = Part(part.start, min(part.length, SIZE - part.start), 1)
    mine = members(part)
    blocks = [set(range(at, min(at + block, SIZE))) for at in range(0, SIZE, block)]
    assert part.cut(block, SIZE) == [min(one) for one in blocks if one & mine and one - mine]


@given(parts, st.lists(ranges, max_size=5))
def test_extents_are_counted_from_its_own_first_byte(part, pairs):
    table = extent.empty()
    for low, high in pairs:
        if low < high:
            table = extent.overlay(table, extent.table([low], [high], BAD))
    before = table.copy()
    own = part.own(table)
    found = {at for row in own for at in range(int(row["start"]), int(row["start"] + row["length"]))}
    all_of_them = {at for low, high in pairs for at in range(low, high)}
    assert found == {at - part.start for at in all_of_them if part.start <= at < part.end}
    assert np.array_equal(table, before)
