"""Frames of zeros, padding, windows and the seek table: forms that are fixed, and limits that hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import SourceTooLarge
from blockbak.image import codec, seektable
from blockbak.image import format as fmt
from blockbak.image.writer import zero_frames
from blockbak.model.hashmap import Geometry
from blockbak.units import KIB, MIB, TIB

windows = st.sampled_from([256 * KIB, 512 * KIB, MIB])
block_sizes = st.sampled_from([1 << power for power in range(12, 21)])


@given(st.integers(0, 4200 * MIB), windows)
def test_a_run_of_zeros_is_cut_in_one_way(length, window):
    sizes = fmt.zero_frame_sizes(length, window)
    assert sum(sizes) == length
    whole = [size for size in sizes if size >= window]
    assert sizes[: len(whole)] == whole
    assert whole == sorted(whole, reverse=True)
    assert all(size & (size - 1) == 0 and size <= fmt.ZERO_FRAME_MAX for size in whole)
    # Powers of two, each but the largest at most once, are the fewest there can be.
    small = [size for size in whole if size < fmt.ZERO_FRAME_MAX]
    assert len(small) == len(set(small))
    assert len(sizes) - len(whole) == bool(length % window)


@pytest.mark.parametrize(
    "length", [1, 511, 4 * KIB, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1, 256 * KIB, 16 * MIB - 3, 16 * MIB]
)
def test_a_frame_of_zeros_decodes_to_zeros(length):
    frame = fmt.zero_frame(length)
    assert codec.decode(frame, length) == bytes(length)
    # zstd's floor: a header of ten bytes, and four for every 128 KiB.
    assert len(frame) == 10 + 4 * -(-length // (128 * KIB))


@given(st.integers(0, 1000), st.integers(1, 70 * MIB), windows, st.integers(0, 2**40))
def test_records_of_zero_frames_follow_each_other(first, length, window, offset):
    records, data = zero_frames(first, length, window, offset)
    at, covered = offset, first * window
    for record in records:
        assert (int(record["offset"]), int(record["window"]) * window) == (at, covered)
        stored = data[at - offset : at - offset + int(record["stored"])]
        assert stored == fmt.zero_frame(int(record["content"]))
        at, covered = at + int(record["stored"]), covered + int(record["content"])
    assert (at - offset, covered) == (len(data), first * window + length)


@given(st.integers(fmt.PADDING_MIN, 9000))
def test_padding_is_one_skippable_frame_of_zeros(length):
    frame = fmt.padding(length)
    assert len(frame) == length
    head = np.frombuffer(frame, fmt.SKIPPABLE, 1)[0]
    assert (int(head["magic"]), int(head["length"])) == (fmt.PADDING_MAGIC, length - 8)
    assert not any(frame[8:])


# --- windows and the seek table ---------------------------------------------------------------------


@given(st.integers(1, fmt.DEVICE_MAX), block_sizes)
def test_every_volume_fits_a_seek_table(size, block):
    window = fmt.window_for(size, block)
    assert fmt.WINDOW_MIN <= window <= fmt.WINDOW_MAX
    assert window % block == 0
    assert window & (window - 1) == 0
    geometry = Geometry(size, block, window)
    assert geometry.section_bytes % window == 0
    # The most there can be: no two windows share a frame.
    assert seektable.entry_count(-(-size // window), geometry.sections) <= fmt.SEEK_ENTRIES_MAX


@pytest.mark.parametrize(
    ("size", "window"),
    [
        (1, 256 * KIB), (16 * TIB, 256 * KIB), (16 * TIB + 1, 512 * KIB), (32 * TIB, 512 * KIB),
        (32 * TIB + 1, MIB), (fmt.DEVICE_MAX, MIB),
    ],
)  # fmt: skip
def test_the_window_grows_with_the_volume(size, window):
    assert fmt.window_for(size, 4 * KIB) == window
    assert fmt.window_for(size, MIB) == MIB
    geometry = Geometry(size, 4 * KIB, window)
    assert seektable.entry_count(-(-size // window), geometry.sections) <= fmt.SEEK_ENTRIES_MAX


def test_a_volume_that_no_window_would_do_for():
    with pytest.raises(SourceTooLarge):
        fmt.window_for(fmt.DEVICE_MAX + 1, MIB)


def test_a_seek_table_holds_so_many_entries_and_no_more():
    assert seektable.entry_count(fmt.SEEK_ENTRIES_MAX - 3, 1) == fmt.SEEK_ENTRIES_MAX
    with pytest.raises(fmt.FormatError):
        seektable.entry_count(fmt.SEEK_ENTRIES_MAX - 2, 1)


frames_of_sections = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 50), st.integers(9, 300), st.integers(1, 1 << 24)), max_size=6),
        st.integers(40, 500),
    ),
    max_size=5,
)


@given(frames_of_sections, st.integers(100, 900))
def test_the_seek_table_lists_what_lies_in_the_file(sections, closing):
    """``gap`` bytes of padding before a frame count into the entry before it."""
    at, expected, given_sections = fmt.HEADER_BYTES, [[0, 0]], []
    for frames, record in sections:
        table = np.zeros(len(frames), fmt.FRAME)
        for index, (gap, stored, content) in enumerate(frames):
            at += gap + 8 if gap else 0
            table[index]["offset"], table[index]["stored"], table[index]["content"] = at, stored, content
            expected.append([at, content])
            at += stored
        expected.append([at, 0])
        given_sections.append((table, at))
        at += record
    expected.append([at, 0])
    places = [offset for offset, _ in expected] + [at + closing]
    entries = [(b - a, content) for (_, content), a, b in zip(expected, places, places[1:], strict=False)]
    table = seektable.Generator()
    parts = [table.section(frames, record) for frames, record in given_sections]
    made = [entry for part in (*parts, table.closing(at, closing)) for entry in part.tolist()]
    assert made == entries
    assert len(made) == seektable.entry_count(sum(len(frames) for frames, _ in sections), len(sections))
    head, tail = fmt.seek_table_ends(len(made))
    assert len(head) + len(tail) + len(made) * fmt.SEEK_ENTRY.itemsize == fmt.seek_table_bytes(len(made))
    assert int.from_bytes(head[4:8], "little") == fmt.seek_table_bytes(len(made)) - 8


def test_frames_that_do_not_ascend_are_no_seek_table():
    table = np.zeros(2, fmt.FRAME)
    table["offset"], table["stored"] = [5000, 4990], 10
    with pytest.raises(fmt.FormatError):
        seektable.Generator().section(table, 6000)
    table["offset"] = [5000, 5000 + 2**32]
    with pytest.raises(fmt.FormatError):
        seektable.Generator().section(table, 6000 + 2**32)
    with pytest.raises(fmt.FormatError):
        seektable.Generator().closing(0, 100)
