"""The way of a GPT to a larger disk: what is written, in which order, and when nothing is."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockbak.model import gpt
from blockbak.model.partition import parse
from tests.unit.test_partition import reader

KIB, MIB = 1 << 10, 1 << 20


def sealed(header):
    """A header with its checksum."""
    return header[:16] + struct.pack("<I", zlib.crc32(header[:16] + bytes(4) + header[20:92])) + header[20:]


def disk_of(sectors, sector=512, partitions=(), number=128, protective=None):
    """A disk with both its tables, as UEFI 2.10, 5.3, has them; ``partitions`` are first and last blocks."""
    data = bytearray(sectors * sector)
    last = sectors - 1
    struct.pack_into("<B3xB3xII", data, 446, 0, 0xEE, 1, last if protective is None else protective)
    data[510:512] = b"\x55\xaa"
    rows = [
        struct.pack("<16s16sQQQ72s", b"t" * 16, bytes([at]) * 16, *pair, 0, b"") for at, pair in enumerate(partitions)
    ]
    entries = b"".join(rows).ljust(number * 128, b"\0")
    room = -(-max(len(entries), 16 * KIB) // sector)
    for own, other, place in ((1, last, 2), (last, 1, last - room)):
        fields = [b"EFI PART", 0x10000, 92, 0, 0, own, other, 2 + room, last - room - 1, b"d" * 16, place, number, 128]
        made = struct.pack("<8sIIIIQQQQ16sQII", *fields) + struct.pack("<I", zlib.crc32(entries))
        data[own * sector : own * sector + 92] = sealed(made)
        data[place * sector : place * sector + len(entries)] = entries
    return data


def growth_of(disk, sector, target_bytes):
    return gpt.grown(reader(disk), sector, len(disk), target_bytes)


def states(disk, size, growth):
    """The larger disk after each write, and with each one torn at every eighth byte that matters."""
    held = bytearray(disk).ljust(size, b"\0")
    yield bytes(held)
    for offset, data in growth.writes:
        for torn in (8, 16, 24, 48, 80, 88, len(data) // 2):
            half = bytearray(held)
            half[offset : offset + torn] = data[:torn]
            yield bytes(half)
        held[offset : offset + len(data)] = data
        yield bytes(held)


@st.composite
def disks(draw):
    sector = draw(st.sampled_from([512, 4096]))
    room = -(-16 * KIB // sector)
    free = draw(st.integers(8, 60))
    edges = sorted(draw(st.sets(st.integers(0, free), max_size=4)))
    parts = [(2 + room + low, 2 + room + high - 1) for low, high in zip(edges[::2], edges[1::2], strict=False)]
    sectors = 3 + 2 * room + free
    # A few sectors more, so that the new place lies over the old one; or many.
    more = draw(st.integers(1, 90)) * sector + draw(st.sampled_from([0, 1, 511]))
    return sectors, sector, parts, draw(st.sampled_from([4, 100, 128])), sectors * sector + more


@given(disks())
@settings(max_examples=60, deadline=None)
def test_at_every_moment_one_copy_is_whole_and_in_the_end_both_are(made):
    *told, size = made
    disk, sector = disk_of(*told), told[1]
    before = parse(reader(disk), sector, len(disk))
    assert before.notes == ()
    growth = growth_of(disk, sector, size)
    for state in states(disk, size, growth):
        now = parse(reader(state), sector, size)
        assert now is not None
        assert now.valid_primary or now.valid_backup
        assert (now.partitions, now.disk_id) == (before.partitions, before.disk_id)
    assert (now.valid_primary, now.valid_backup, now.notes) == (True, True, ())
    last = size // sector - 1
    own, alternate, first, last_usable = struct.unpack_from("<QQQQ", state, sector + 24)
    assert (own, alternate) == (1, last)
    # All of the disk can be used but for the backup and the 16 KiB of its entries.
    assert last_usable == last - 1 - -(-16 * KIB // sector)
    assert struct.unpack_from("<QQQQ", state, last * sector + 24) == (last, 1, first, last_usable)
    assert struct.unpack_from("<I", state, 458) == (last,)
    assert state.count(b"EFI PART") == 2
    # Nothing else was touched: the partitions, and what lies between them.
    room = 2 + -(-16 * KIB // sector)
    end = min(len(disk), size // sector * sector) - room * sector
    assert state[2 * sector : end] == disk[2 * sector : end]
    assert state[446 + 16 :][:50] == disk[446 + 16 :][:50]


def test_the_wrong_order_would_be_noticed():
    """The measure above, measured: with the primary copy first there is a moment without any."""
    disk = disk_of(200, partitions=[(40, 60)])
    growth = growth_of(disk, 512, 400 * 512)
    wrong = gpt.Growth((growth.writes[2], *growth.writes[:2]), hybrid=False)
    tables = [parse(reader(state), 512, 400 * 512) for state in states(disk, 400 * 512, wrong)]
    assert any(not (one.valid_primary or one.valid_backup) for one in tables)


def test_a_size_that_a_protective_entry_cannot_say_is_the_largest_it_can():
    disk = disk_of(200)
    growth = growth_of(disk, 512, 4 << 40)
    (mbr,) = [data for offset, data in growth.writes if offset == 0]
    assert struct.unpack_from("<B3sI", mbr, 450)[0] == 0xEE
    assert struct.unpack_from("<II", mbr, 454) == (1, 0xFFFFFFFF)
    # It says so already: then it is left alone.
    disk = disk_of(200, protective=0xFFFFFFFF)
    disk[451:454] = b"\xff\xff\xff"
    assert 0 not in [offset for offset, _ in growth_of(disk, 512, 4 << 40).writes]


def test_a_hybrid_mbr_is_left_as_it_is():
    disk = disk_of(200, partitions=[(40, 60)])
    disk[446 + 16 : 446 + 32] = struct.pack("<B3xB3xII", 0x80, 0x83, 40, 21)
    growth = growth_of(disk, 512, 400 * 512)
    assert growth.hybrid
    assert 0 not in [offset for offset, _ in growth.writes]


def test_a_damaged_backup_does_not_stand_in_the_way():
    disk = disk_of(200, partitions=[(40, 60)])
    disk[199 * 512 + 40] ^= 1
    growth = growth_of(disk, 512, 400 * 512)
    assert parse(reader(list(states(disk, 400 * 512, growth))[-1]), 512, 400 * 512).notes == ()
    # What is in its place may be something else: that stays.
    disk[199 * 512 : 200 * 512] = b"x" * 512
    assert 199 * 512 not in [offset for offset, _ in growth_of(disk, 512, 400 * 512).writes]


def _hurt_header(disk):
    disk[512 + 40] ^= 1


def _hurt_entries(disk):
    disk[1024 + 40] ^= 1


def _no_primary(disk):
    disk[512:520] = bytes(8)


def _backup_of_another(disk):
    place = 199 * 512
    disk[place + 56] ^= 1
    disk[place : place + 92] = sealed(bytes(disk[place : place + 92]))


@pytest.mark.parametrize(
    ("hurt", "words"),
    [
        (_hurt_header, "primary table is damaged: its header does not have its checksum"),
        (_hurt_entries, "primary table is damaged: its entries do not have their checksum"),
        (_no_primary, "primary table is damaged: there is none"),
        (_backup_of_another, "differs from the primary"),
    ],
)
def test_what_a_person_should_look_at_first_is_not_grown(hurt, words):
    disk = disk_of(200, partitions=[(40, 60)])
    hurt(disk)
    assert words in growth_of(disk, 512, 400 * 512)


def test_a_table_for_another_size_is_not_grown():
    disk = disk_of(200) + bytes(100 * 512)
    assert "made for another size" in growth_of(disk, 512, 400 * 512)
    assert "not larger" in growth_of(disk_of(200), 512, 200 * 512 + 511)


def test_partitions_where_the_backup_should_go_are_not_overwritten():
    disk = disk_of(200, partitions=[(40, 190)])
    assert "reach into the place" in growth_of(disk, 512, 201 * 512)
    assert isinstance(growth_of(disk, 512, 400 * 512), gpt.Growth)


@given(st.binary(max_size=200), st.integers(0, 1200))
@settings(max_examples=200, deadline=None)
def test_damage_never_raises(noise, at):
    disk = disk_of(200, partitions=[(40, 60)])
    disk[at : at + len(noise)] = noise
    growth_of(disk, 512, 400 * 512)
