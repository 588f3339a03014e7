"""What partclone says is unused, and how much of it is believed: whatever is not said for sure is in use."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.flow.mapfile import text as mapfile
from blockbak.model import btrfs, extent, usedmap
from blockbak.model.clean import unclean
from blockbak.model.extent import HOLE
from blockbak.units import GIB, KIB, MIB

SIZE = 64 * MIB
HEAD = usedmap.HEAD_BYTES


def written(rows):
    """As partclone 0.3 writes it."""
    lines = ["# Domain logfile created by unset_name v0.3.23", "# Source: /dev/sdz1", "# Offset: 0x00000000"]
    lines += ["# current_pos  current_status", f"0x{SIZE:08X}     ?", "#      pos        size  status"]
    lines += [f"0x{start:08X}  0x{length:08X}  {status}" for start, length, status in rows]
    return ("\n".join(lines) + "\n").encode()


def pairs(holes):
    return list(zip(extent.starts_of(holes).tolist(), extent.ends_of(holes).tolist(), strict=True))


@st.composite
def maps(draw):
    """Rows that tile from 0 on, and as far as they like."""
    lengths = draw(st.lists(st.integers(1, 4 * MIB), min_size=1, max_size=12))
    rows, at = [], 0
    for length in lengths:
        rows.append((at, length, draw(st.sampled_from("+?"))))
        at += length
    return rows


@given(maps())
def test_a_byte_is_left_out_only_if_the_map_calls_it_unused(rows):
    holes = usedmap.unused(written(rows), SIZE)
    assert extent.flaw(holes, 0, SIZE, tiling=False) is None
    assert not len(holes) or set(holes["kind"].tolist()) == {HOLE}
    said = [(max(start, HEAD), start + length) for start, length, status in rows if status == "?"]
    said = [(start, end) for start, end in said if start < end]
    assert sum(end - start for start, end in pairs(holes)) == sum(end - start for start, end in said)
    for start, end in pairs(holes):
        covered = sum(min(end, high) - max(start, low) for low, high in said if max(start, low) < min(end, high))
        assert covered == end - start


@given(maps(), st.data())
def test_a_map_with_a_line_lost_is_not_believed_or_says_less(rows, data):
    whole = pairs(usedmap.unused(written(rows), SIZE))
    lost = data.draw(st.integers(0, len(rows) - 1))
    try:
        holes = pairs(usedmap.unused(written(rows[:lost] + rows[lost + 1 :]), SIZE))
    except usedmap.UnusableMap:
        return
    assert lost == len(rows) - 1, "only an end can be missing without a gap"
    assert all(any(low <= start and end <= high for low, high in whole) for start, end in holes)


@given(st.binary(max_size=200))
def test_no_bytes_make_anything_but_a_map_or_a_refusal(content):
    try:
        holes = usedmap.unused(content, SIZE)
    except usedmap.UnusableMap:
        return
    assert extent.flaw(holes, 0, SIZE, tiling=False) is None


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(0, SIZE + 1, "?")], "past the end"),
        ([(0, MIB, "+"), (2 * MIB, MIB, "?")], "a gap, or goes back, at byte 1048576"),
        ([(0, 2 * MIB, "+"), (MIB, MIB, "?")], "goes back"),
        ([(MIB, MIB, "?")], "at byte 0"),
        ([(0, MIB, "*")], "unknown status"),
        ([(0, MIB, "-")], "unknown status"),
        ([(0, MIB, "+?")], "unknown status"),
        ([(0, MIB, "? x")], "a line that is none"),
        ([(0, 0, "?")], "at byte 0"),
        ([], "empty"),
    ],
)
def test_a_map_that_contradicts_itself_or_the_device_is_refused(rows, reason):
    with pytest.raises(usedmap.UnusableMap, match=reason):
        usedmap.unused(written(rows), SIZE)


def test_what_lies_past_the_end_of_the_map_is_in_use():
    holes = usedmap.unused(written([(0, 2 * MIB, "+"), (2 * MIB, 3 * MIB, "?")]), SIZE)
    assert pairs(holes) == [(2 * MIB, 5 * MIB)]


def test_holes_of_a_partition_lie_where_the_partition_does():
    holes = usedmap.unused(written([(0, 2 * MIB, "+"), (2 * MIB, MIB, "?")]), SIZE)
    assert pairs(usedmap.within(holes, 5 * GIB)) == [(5 * GIB + 2 * MIB, 5 * GIB + 3 * MIB)]


@given(st.lists(st.tuples(st.integers(0, 63), st.integers(1, 8)), max_size=10))
def test_what_is_kept_twice_is_used_twice(used):
    """Chunks at 8 and 24 MiB, 8 MiB each, hold the same; so do those at 48 and 40, 4 MiB each."""
    copies = [(8 * MIB, 24 * MIB, 8 * MIB), (48 * MIB, 40 * MIB, 4 * MIB)]
    table = extent.table([0], [SIZE], HOLE)
    for start, length in used:
        end = min(start + length, 64) * MIB
        table = extent.subtract(table, extent.table([start * MIB], [end], HOLE))
    free = extent.touched(usedmap.with_copies(table, copies), 0, MIB, 64)
    before = extent.touched(table, 0, MIB, 64)
    expected = before.copy()
    for copy in copies:
        first, second, length = (edge // MIB for edge in copy)
        both = before[first : first + length] & before[second : second + length]
        expected[first : first + length] = expected[second : second + length] = both
    assert np.array_equal(free, expected)


def test_copies_of_a_btrfs_superblock_are_in_use():
    holes = usedmap.with_copies(extent.table([MIB], [300 * GIB], HOLE), [])
    assert pairs(holes) == [
        (MIB, 64 * MIB), (64 * MIB + 4 * KIB, 256 * GIB), (256 * GIB + 4 * KIB, 300 * GIB),
    ]  # fmt: skip


# --- btrfs ----------------------------------------------------------------------------------------


FSID = bytes(range(16))
NODE = 16 * KIB
SYSTEM_AT = 16 * MIB
"""Where the system chunk lies, and in it, at its logical byte, the chunk tree's root."""


def chunk(length, kind, *places):
    head = struct.pack("<QQQQIIIHH", length, 2, 64 * KIB, kind, 4096, 4096, 4096, len(places), 1)
    return head + b"".join(struct.pack("<QQ16s", 1, place, bytes(16)) for place in places)


def a_btrfs(chunks, *, devices=1, log=0, fsid=FSID, level=0):
    """A device with a superblock and a chunk tree of one leaf; ``chunks`` by logical byte."""
    block = bytearray(4 * KIB)
    block[32:48], block[64:72] = FSID, b"_BHRfS_M"
    struct.pack_into("<QQ", block, 88, SYSTEM_AT, log)
    struct.pack_into("<Q4xI", block, 136, devices, NODE)
    system = struct.pack("<QBQ", 256, 228, SYSTEM_AT) + chunk(MIB, 2, SYSTEM_AT)
    struct.pack_into("<I", block, 160, len(system))
    block[199] = level
    block[811 : 811 + len(system)] = system
    leaf = bytearray(NODE)
    leaf[32:48] = fsid
    struct.pack_into("<Q", leaf, 48, SYSTEM_AT)
    struct.pack_into("<IB", leaf, 96, len(chunks), 0)
    end = NODE - 101
    for number, (logical, item) in enumerate(chunks.items()):
        end -= len(item)
        struct.pack_into("<QBQII", leaf, 101 + number * 25, 256, 228, logical, end, len(item))
        leaf[101 + end : 101 + end + len(item)] = item
    pieces = {64 * KIB: bytes(block), SYSTEM_AT: bytes(leaf)}
    return lambda offset, length: pieces.get(offset, b"")[:length]


SYSTEM = {SYSTEM_AT: chunk(MIB, 2, SYSTEM_AT)}


def test_chunks_of_two_places_are_found():
    read = a_btrfs({**SYSTEM, 32 * MIB: chunk(8 * MIB, 4 | 32, 40 * MIB, 80 * MIB), 64 * MIB: chunk(GIB, 1, 99 * MIB)})
    assert btrfs.copies(read) == [(40 * MIB, 80 * MIB, 8 * MIB)]


@pytest.mark.parametrize(
    ("changed", "chunks", "reason"),
    [
        ({"devices": 2}, {}, "several devices"),
        ({"log": 30 * MIB}, {}, "log is still to be replayed"),
        ({"fsid": bytes(16)}, {}, "cannot be found"),
        ({"level": 1}, {}, "damaged"),
        ({}, {32 * MIB: chunk(8 * MIB, 1 | 8, 40 * MIB, 80 * MIB)}, "spreads its data"),
        ({}, {32 * MIB: chunk(8 * MIB, 1 | 512, 40 * MIB, 80 * MIB, 90 * MIB)}, "spreads its data"),
        ({}, {32 * MIB: chunk(8 * MIB, 1, 40 * MIB, 80 * MIB)[:20]}, "damaged|spreads"),
    ],
)
def test_a_btrfs_of_which_it_is_not_clear_is_not_asked(changed, chunks, reason):
    with pytest.raises(btrfs.Unclear, match=reason):
        btrfs.copies(a_btrfs({**SYSTEM, **chunks}, **changed))


@given(st.integers(0, 1 << 32), st.binary(max_size=80))
def test_no_superblock_makes_anything_but_copies_or_a_doubt(number, start):
    noise = hashlib.shake_256(f"{number}".encode()).digest(4 * KIB)
    block = bytearray(noise)
    block[811 : 811 + len(start)] = start
    block[64:72] = b"_BHRfS_M"
    struct.pack_into("<Q4xI", block, 136, 1, NODE)
    struct.pack_into("<Q", block, 96, 0)
    with pytest.raises(btrfs.Unclear):
        btrfs.copies(lambda offset, length: bytes(block)[:length] if offset == 64 * KIB else noise * 4)


# --- left clean -----------------------------------------------------------------------------------


def reader(pieces, size=SIZE):
    content = bytearray(size)
    for start, data in pieces.items():
        content[start : start + len(data)] = data
    return lambda offset, length: bytes(content[offset : offset + length])


def ext(state=1, incompatible=0x2C2):
    block = bytearray(256)
    struct.pack_into("<HH", block, 56, 0xEF53, state)
    struct.pack_into("<I", block, 96, incompatible)
    return reader({KIB: bytes(block)}, MIB)


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (ext(), ""),
        (ext(incompatible=0x2C2 | 4), "not cleanly unmounted"),
        (ext(state=0), "not cleanly unmounted"),
        (ext(state=3), "errors"),
        (lambda offset, length: b"", "cannot be read"),
    ],
)
@pytest.mark.parametrize("kind", ["ext2", "ext3", "ext4"])
def test_an_ext_file_system_says_whether_it_is_clean(kind, read, reason):
    found = unclean(kind, read)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(("mark", "at"), [(b"FAT32   ", 65), (b"", 37)])
def test_a_vfat_says_whether_it_is_clean(mark, at):
    sector = bytearray(512)
    sector[82 : 82 + len(mark)] = mark
    assert unclean("vfat", reader({0: bytes(sector)}, KIB)) == ""
    sector[at] = 1
    assert "not cleanly" in unclean("vfat", reader({0: bytes(sector)}, KIB))


CLUSTER = 4 * KIB
LOG_AT = 200


LOG_RUN = b"\x21\x10" + struct.pack("<H", LOG_AT)


def ntfs(log, *, runs=LOG_RUN, magic=b"FILE"):
    boot = bytearray(512)
    struct.pack_into("<HB", boot, 11, 512, 8)
    struct.pack_into("<Q", boot, 48, 4)
    struct.pack_into("<b", boot, 64, -10)
    record = bytearray(KIB)
    record[:4] = magic
    struct.pack_into("<HH12xH", record, 4, 48, 3, 56)
    struct.pack_into("<IIBB", record, 56, 0x10, 24, 0, 0)
    struct.pack_into("<IIBB", record, 80, 0x80, 80, 1, 0)
    struct.pack_into("<H", record, 80 + 32, 64)
    record[80 + 64 : 80 + 64 + len(runs)] = runs
    return reader({0: bytes(boot), 4 * CLUSTER + 2 * KIB: bytes(record), LOG_AT * CLUSTER: log})


def restart(lsn, in_use, flags):
    page = bytearray(4 * KIB)
    page[:4] = b"RSTR"
    struct.pack_into("<H", page, 24, 48)
    struct.pack_into("<QHHHH", page, 48, lsn, 1, 0xFFFF, in_use, flags)
    return bytes(page)


CLEAN, CLOSED, OPEN = (0, 2), (0xFFFF, 0), (0, 0)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (b"\xff" * 8 * KIB, ""),
        (restart(9, *CLEAN) + restart(5, *OPEN), ""),
        (restart(5, *CLOSED) + restart(5, *CLOSED), ""),
        (restart(5, *CLEAN) + restart(9, *OPEN), "not cleanly unmounted"),
        (restart(9, *OPEN) + bytes(4 * KIB), "not cleanly unmounted"),
        (bytes(8 * KIB), "log cannot be read"),
        (b"CHKD" + bytes(8 * KIB), "log cannot be read"),
    ],
)
def test_the_log_of_an_ntfs_says_whether_it_is_clean(log, reason):
    found = unclean("ntfs", ntfs(log))
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize("broken", [{"runs": b""}, {"runs": b"\x01\x10"}, {"magic": b"BAAD"}])
def test_an_ntfs_whose_log_is_not_found_is_not_taken_for_clean(broken):
    assert "log cannot be read" in unclean("ntfs", ntfs(b"\xff" * 8 * KIB, **broken))


@given(st.binary(min_size=KIB, max_size=KIB))
def test_no_record_of_the_log_makes_a_crash(noise):
    read = ntfs(restart(1, *CLEAN))
    record = b"FILE" + struct.pack("<HH12xH", 48, 3, 56) + noise[22:]
    unclean("ntfs", lambda at, size: record[:size] if at == 4 * CLUSTER + 2 * KIB else read(at, size))


# --- the other way --------------------------------------------------------------------------------


def test_a_mapfile_calls_what_was_left_out_not_tried():
    lost = extent.table([0, 4096, 8192], [4096, 4608, 12288], [extent.HOLE, extent.BAD, extent.HOLE])
    rows = [line.split() for line in mapfile(lost, 16384).splitlines() if not line.startswith("#")][1:]
    assert [(int(at, 16), int(size, 16), status) for at, size, status in rows] == [
        (0, 4096, "?"), (4096, 512, "-"), (4608, 3584, "+"), (8192, 4096, "?"), (12288, 4096, "+"),
    ]  # fmt: skip
