"""What a drill does about each place of a copy, and the superblocks of a btrfs that gets an id of its own."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from blockbak.host.scanners import RULE_PATH
from blockbak.model import btrfsid, drill
from blockbak.model.drill import Place, course, environment, firmware, places, told
from blockbak.model.filesystem import Filesystem
from blockbak.model.partition import Partition, PartitionTable
from blockbak.units import KIB, MIB

PLACE = Place(2, MIB, 64 * MIB)


def reader(data: bytes):
    return lambda offset, length: data[offset : offset + length] if offset >= 0 else b""


def ext(*, state=1, incompatible=0x2, orphan=0, read_only=0) -> bytes:
    block = bytearray(1024)
    struct.pack_into("<H", block, 56, 0xEF53)
    struct.pack_into("<H", block, 58, state)
    struct.pack_into("<III", block, 92, 0x4, incompatible, read_only)
    struct.pack_into("<I", block, 232, orphan)
    return bytes(KIB) + bytes(block)


@pytest.mark.parametrize(
    ("content", "replay"),
    [
        (ext(), False),
        (ext(incompatible=0x2 | 0x4), True),
        (ext(state=0), True),
        (ext(orphan=12), True),
        (ext(read_only=0x10000), True),
    ],
    ids=["clean", "a journal", "in use", "an orphan", "an orphan in the file of orphans"],
)
def test_a_journal_is_replayed_where_the_next_mount_would(content, replay):
    found = course(PLACE, Filesystem("ext4"), reader(content))
    assert found.replay is replay
    assert found.checker.argv == ("e2fsck", "-f", "-n")
    # One that was told to panic at an error would take the machine with it.
    assert "errors=continue" in found.options


def test_an_ext2_has_no_journal_to_replay():
    assert not course(PLACE, Filesystem("ext2"), reader(ext(state=0))).replay


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (Filesystem("LVM2_member", "vg0"), "vg0"),
        (Filesystem("linux_raid_member", "host:0"), "array"),
        (Filesystem("crypto_LUKS"), "encrypted"),
        (Filesystem("zfs_member"), "knows how"),
    ],
)
def test_what_could_be_taken_for_the_original_is_named_and_nothing_is_done_about_it(found, word):
    one = course(PLACE, found, reader(b"x" * MIB))
    assert word in one.unseen
    assert (one.checker, one.fstype, one.replay) == (None, "", False)


def test_nothing_is_said_of_swap_and_of_zeros():
    assert course(PLACE, Filesystem("swap"), reader(b"x")).unseen == ""
    assert course(PLACE, None, reader(bytes(MIB))).unseen == ""
    assert course(PLACE, None, reader(bytes(MIB - 1) + b"x")).unseen != ""


def test_a_copy_of_xfs_has_the_uuid_of_its_original():
    assert "nouuid" in course(PLACE, Filesystem("xfs"), reader(bytes(MIB))).options


def test_one_device_of_a_btrfs_on_several_is_not_looked_into():
    assert "2 devices" in course(PLACE, Filesystem("btrfs"), reader(btrfs(devices=2))).unseen
    assert course(PLACE, Filesystem("btrfs"), reader(btrfs())).unseen == ""


def table(*kinds: str) -> PartitionTable:
    made = tuple(Partition(number, number * MIB, MIB, kind) for number, kind in enumerate(kinds, 1))
    return PartitionTable("gpt", "", 512, made)


def test_places_are_partitions_or_all():
    assert places(None, 5) == [Place(0, 0, 5)]
    assert [one.number for one in places(table("0x83", "0x05", "0x83"), 9 * MIB)] == [1, 3]
    assert Place(0, 0, 1).mount == 1
    assert Place(7, 0, 1).mount == 7


ESP = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"


@pytest.mark.parametrize(
    ("found", "head", "wanted"),
    [
        (None, b"\xfa", "bios"),
        (table("0x83"), bytes(512), "bios"),
        (table(ESP.upper()), bytes(512), "uefi"),
        (table("0xef"), bytes(512), "uefi"),
        (table(ESP), b"\xfa" * 440, "bios"),
        (table(ESP), bytes(440) + b"\x55\xaa" * 36, "uefi"),
    ],
)
def test_what_starts_a_disk(found, head, wanted):
    assert firmware(found, reader(head)) == wanted


def test_the_environment_names_every_mount():
    found = environment("p", "v", "/dev/loop7", "/run/m", [2, 5])
    assert found == {
        "BLOCKBAK_POINT": "p", "BLOCKBAK_VOLUME": "v", "BLOCKBAK_DEVICE": "/dev/loop7", "BLOCKBAK_MOUNTS": "/run/m",
        "BLOCKBAK_MOUNT": "/run/m/2", "BLOCKBAK_MOUNT_2": "/run/m/2", "BLOCKBAK_MOUNT_5": "/run/m/5",
    }  # fmt: skip
    assert not any(name.startswith("BLOCKBAK_MOUNT_") for name in environment("p", "v", "", "/run/m", []))


@given(st.text())
def test_what_a_program_said_becomes_a_clause(text):
    said = told(text)
    assert "\n" not in said
    assert len(said) <= 402
    assert bool(said) == any(line.strip() for line in text.splitlines())


def test_room_is_more_than_what_is_stored():
    assert drill.room(0) > 0
    assert drill.room(1 << 40) > 1 << 40


def test_udev_knows_a_scratch_file_by_its_name():
    from blockbak.host.loops import SCRATCH_PREFIX

    text = Path(RULE_PATH).read_text()
    (line,) = [one for one in text.splitlines() if one.startswith('KERNEL=="loop')]
    assert f'ATTR{{loop/backing_file}}=="*/{SCRATCH_PREFIX}*"' in line
    # A device that is not mapped must come to the line, and be let go behind it.
    assert text.index(line) < text.index('KERNEL!="dm-[0-9]*", GOTO="blockbak_end"')


# --- btrfs ---------------------------------------------------------------------------------------------------


def test_crc32c_is_that_of_the_standard():
    """RFC 3720, B.4."""
    assert btrfsid.crc32c(b"123456789") == 0xE3069283
    assert btrfsid.crc32c(bytes(32)) == 0x8A9136AA
    assert btrfsid.crc32c(b"\xff" * 32) == 0x62A8AB43


FSID, NEW = bytes(range(16)), bytes(range(100, 116))
DIGESTS = {
    0: lambda data: struct.pack("<I", btrfsid.crc32c(data)),
    1: lambda data: struct.pack("<Q", xxhash.xxh64_intdigest(data)),
    2: lambda data: hashlib.sha256(data).digest(),
    3: lambda data: hashlib.blake2b(data, digest_size=32).digest(),
}


def superblock(place: int, kind: int, devices: int, renamed: bool) -> bytes:
    block = bytearray(btrfsid.SUPER_BYTES)
    block[32:48] = FSID
    struct.pack_into("<Q", block, 48, place)
    block[64:72] = b"_BHRfS_M"
    struct.pack_into("<Q", block, 136, devices)
    struct.pack_into("<QH", block, 188, 0x400 if renamed else 0x1, kind)
    block[571:587] = b"m" * 16 if renamed else bytes(16)
    block[:32] = DIGESTS[kind](bytes(block[32:])).ljust(32, b"\0")
    return bytes(block)


def btrfs(kind=0, devices=1, renamed=False) -> bytes:
    data = bytearray(65 * MIB)
    for place in (64 * KIB, 64 * MIB):
        data[place : place + 4 * KIB] = superblock(place, kind, devices, renamed)
    return bytes(data)


@pytest.mark.parametrize("kind", DIGESTS)
@pytest.mark.parametrize("before", [False, True])
def test_every_superblock_gets_the_new_id_and_keeps_the_old_one_for_its_blocks(kind, before):
    data = btrfs(kind, renamed=before)
    found = dict(btrfsid.renamed(reader(data), len(data), NEW))
    assert list(found) == [64 * KIB, 64 * MIB]
    for place, block in found.items():
        assert block[32:48] == NEW
        assert block[571:587] == (b"m" * 16 if before else FSID)
        assert struct.unpack_from("<Q", block, 188)[0] & 0x400
        assert block[:32] == DIGESTS[kind](block[32:]).ljust(32, b"\0")
        old = data[place : place + 4 * KIB]
        assert [at for at in range(32, 4 * KIB) if block[at] != old[at] and not (32 <= at < 48 or 571 <= at < 587)] in (
            [], [189],
        )  # fmt: skip


def test_a_superblock_that_is_not_whole_is_not_touched():
    data = bytearray(btrfs())
    data[64 * KIB + 700] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        list(btrfsid.renamed(reader(bytes(data)), len(data), NEW))
    with pytest.raises(ValueError, match="whole"):
        list(btrfsid.renamed(reader(bytes(65 * MIB)), 65 * MIB, NEW))
    with pytest.raises(ValueError, match="unknown type 9"):
        btrfsid.checksum(9, b"")
