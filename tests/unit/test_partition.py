"""Partition tables and superblocks: real ones, made by the usual tools in files, and broken ones."""

from __future__ import annotations

import binascii
import random
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockbak.model.partition import filesystem, parse
from blockbak.model.partition_types import type_name

MIB = 1 << 20


def run(*argv, stdin=""):
    done = subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (argv, done.stderr)
    return done.stdout


def reader(data):
    return lambda offset, length: bytes(data[offset : offset + length])


def fixed(data, sector=512):
    """What ``data`` holds, and that nothing in it depends on reading more than exists."""
    return parse(reader(data), sector, len(data))


@pytest.fixture
def image(tmp_path):
    file = tmp_path / "disk.img"

    def make(size=16 * MIB):
        with file.open("wb") as made:
            made.truncate(size)
        return file

    return make


@pytest.fixture(scope="module")
def by_sgdisk(tmp_path_factory):
    """Made once: sgdisk waits a second for the kernel to take notice."""
    file = tmp_path_factory.mktemp("gpt") / "disk.img"
    with file.open("wb") as made:
        made.truncate(16 * MIB)
    run(
        *("sgdisk", "--disk-guid=11111111-2222-3333-4444-555555555555"),
        *("--new=1:2048:+4M", "--change-name=1:Grüße", "--typecode=1:ef00", "--attributes=1:set:2"),
        *("--partition-guid=1:AAAAAAAA-BBBB-CCCC-DDDD-EEEEEEEEEEEE", "--new=3:12288:0", file),
    )
    return file.read_bytes()


@pytest.fixture
def gpt(by_sgdisk):
    return bytearray(by_sgdisk)


def gpt_of_4096(size):
    """UEFI 2.10, 5.3, with one partition; a test on a real device has a tool's own."""
    data = bytearray(size)
    last = size // 4096 - 1
    struct.pack_into("<B3xB3xII", data, 446, 0, 0xEE, 1, last)
    data[510:512] = b"\x55\xaa"
    entries = struct.pack("<16s16sQQQ72s", b"t" * 16, b"u" * 16, 256, 1279, 0, "data".encode("utf-16-le"))
    entries = entries.ljust(128 * 128, b"\0")
    for own, other, place in ((1, last, 2), (last, 1, last - 4)):
        head = [b"EFI PART", 0x10000, 92, 0, 0, own, other, 6, last - 5, b"d" * 16, place, 128, 128]
        made = struct.pack("<8sIIIIQQQQ16sQII", *head) + struct.pack("<I", binascii.crc32(entries))
        made = made[:16] + struct.pack("<I", binascii.crc32(made)) + made[20:]
        data[own * 4096 : own * 4096 + len(made)] = made
        data[place * 4096 : place * 4096 + len(entries)] = entries
    return bytes(data)


class TestGpt:
    def test_it_is_read_as_sgdisk_wrote_it(self, gpt):
        table = fixed(gpt)
        assert (table.scheme, table.disk_id) == ("gpt", "11111111-2222-3333-4444-555555555555")
        assert (table.valid_primary, table.valid_backup, table.notes) == (True, True, ())
        first, third = table.partitions
        assert (first.number, first.start, first.length, first.name) == (1, MIB, 4 * MIB, "Grüße")
        assert first.uuid == "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
        assert first.type == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
        assert first.bootable
        assert (third.number, third.start, third.bootable) == (3, 6 * MIB, False)
        # The last usable block is followed by 32 blocks of entries and the header.
        assert third.end == 16 * MIB - 33 * 512

    def test_sectors_of_4096_bytes(self):
        data = gpt_of_4096(64 * MIB)
        table = fixed(data, 4096)
        assert (table.valid_primary, table.valid_backup, table.notes) == (True, True, ())
        assert [(one.start, one.length, one.name) for one in table.partitions] == [(MIB, 4 * MIB, "data")]
        wrong = fixed(data, 512)
        assert not wrong.valid_primary
        assert not wrong.valid_backup
        assert wrong.partitions == ()

    @pytest.mark.parametrize(
        ("damage", "why"),
        [
            (512, "there is none"),
            (512 + 60, "its header does not have its checksum"),
            (1024 + 10, "its entries do not have their checksum"),
            (1024 + 16000, "its entries do not have their checksum"),
        ],
    )
    def test_the_backup_serves_where_the_primary_is_damaged(self, gpt, damage, why):
        whole = fixed(gpt)
        gpt[damage] ^= 0x40
        table = fixed(gpt)
        assert (table.valid_primary, table.valid_backup) == (False, True)
        assert table.partitions == whole.partitions
        assert table.disk_id == whole.disk_id
        assert table.notes == (f"The primary table is damaged ({why}); the backup is used.",)

    def test_a_damaged_backup_is_told(self, gpt):
        gpt[-1024] ^= 1
        table = fixed(gpt)
        assert (table.valid_primary, table.valid_backup) == (True, False)
        (note,) = table.notes
        assert note.startswith("The backup table is damaged or missing")

    def test_both_damaged_is_a_table_without_partitions(self, gpt):
        gpt[520] ^= 1
        gpt[-500] ^= 1
        table = fixed(gpt)
        assert (table.scheme, table.partitions, table.disk_id) == ("gpt", (), "")
        assert not table.valid_primary
        assert not table.valid_backup

    def test_only_the_first_bytes_are_enough_for_the_primary(self, gpt):
        table = parse(bytes(gpt[: 34 * 512]), 512, len(gpt))
        assert (table.valid_primary, table.valid_backup) == (True, False)
        assert len(table.partitions) == 2

    def test_a_device_that_grew_keeps_its_backup_in_the_middle(self, gpt):
        table = fixed(gpt + bytes(MIB))
        assert table.valid_backup
        assert "not at the end" in table.notes[0]

    def test_a_device_that_shrank_has_its_partition_clipped(self, gpt):
        table = fixed(gpt[: 8 * MIB])
        assert not table.valid_backup
        assert table.partitions[1].end == 8 * MIB
        assert any("beyond the device's end" in note for note in table.notes)

    def test_without_a_protective_mbr_there_is_no_table(self, gpt):
        gpt[446 : 446 + 64] = bytes(64)
        assert fixed(gpt) is None

    def test_a_hybrid_mbr_is_noted(self, gpt):
        gpt[446 + 16 : 446 + 32] = struct.pack("<B3xB3xII", 0x80, 0x83, 2048, 8192)
        table = fixed(gpt)
        assert table.scheme == "gpt"
        assert "hybrid" in table.notes[0]

    @pytest.mark.parametrize(("count", "size"), [(2**32 - 1, 128), (128, 2**31), (0, 128), (128, 0), (128, 64)])
    def test_an_absurd_number_of_entries_is_damage_not_work(self, gpt, count, size):
        for place in (512, len(gpt) - 512):
            struct.pack_into("<II", gpt, place + 80, count, size)
            struct.pack_into("<I", gpt, place + 16, 0)
            struct.pack_into("<I", gpt, place + 16, binascii.crc32(bytes(gpt[place : place + 92])))
        assert not fixed(gpt).valid_primary
        assert not fixed(gpt).valid_backup


class TestMbr:
    def test_primary_and_logical_partitions(self, image):
        file = image(64 * MIB)
        lines = ["label: dos", "label-id: 0x1a2b3c4d", "1: size=8M, type=83, bootable", "2: size=40M, type=5"]
        lines += [f"{number}: size=4M, type=83" for number in range(5, 10)]
        run("sfdisk", file, stdin="\n".join(lines) + "\n")
        table = fixed(file.read_bytes())
        assert (table.scheme, table.disk_id, table.notes) == ("mbr", "1a2b3c4d", ())
        assert [one.number for one in table.partitions] == [1, 2, 5, 6, 7, 8, 9]
        first, extended, *logical = table.partitions
        assert (first.start, first.length, first.type, first.bootable) == (MIB, 8 * MIB, "0x83", True)
        assert first.uuid == "1a2b3c4d-01"
        assert extended.type == "0x05"
        assert logical[0].uuid == "1a2b3c4d-05"
        listed = run("sfdisk", "--dump", file)
        starts = [int(line.split("start=")[1].split(",")[0]) for line in listed.splitlines() if "start=" in line]
        assert [one.start // 512 for one in table.partitions] == starts
        assert all(one.length == 4 * MIB for one in logical)

    def test_without_the_rest_of_the_device_there_are_only_primary_ones(self, image):
        file = image(64 * MIB)
        run("sfdisk", file, stdin="label: dos\n1: size=40M, type=5\n5: size=4M\n")
        assert [one.number for one in parse(file.read_bytes()[:512], 512, 64 * MIB).partitions] == [1]

    def test_a_chain_that_bites_its_tail_ends(self):
        data = bytearray(4 * MIB)
        struct.pack_into("<B3xB3xII", data, 446, 0, 0x05, 2048, 4096)
        data[510:512] = b"\x55\xaa"
        place = 2048 * 512
        struct.pack_into("<B3xB3xII", data, place + 446, 0, 0x83, 8, 8)
        struct.pack_into("<B3xB3xII", data, place + 462, 0, 0x05, 0, 4096)
        data[place + 510 : place + 512] = b"\x55\xaa"
        table = fixed(data)
        assert [one.number for one in table.partitions] == [1, 5]
        assert "does not end" in table.notes[0]

    def test_a_partition_past_the_end_is_left_out(self):
        data = bytearray(MIB)
        struct.pack_into("<B3xB3xII", data, 446, 0, 0x83, 64, 128)
        struct.pack_into("<B3xB3xII", data, 462, 0, 0x83, 1 << 20, 128)
        struct.pack_into("<B3xB3xII", data, 478, 0, 0x83, 2000, 128)
        data[510:512] = b"\x55\xaa"
        table = fixed(data)
        assert [(one.number, one.length) for one in table.partitions] == [(1, 128 * 512), (3, 48 * 512)]
        assert len(table.notes) == 2

    @pytest.mark.parametrize(
        "entry",
        [
            pytest.param((0x12, 0x83, 64, 128), id="status"),
            pytest.param((0, 0, 64, 128), id="no type"),
            pytest.param((0, 0x83, 0, 128), id="at the table itself"),
            pytest.param((0, 0x83, 64, 0), id="empty"),
            pytest.param((0, 0x83, 1 << 30, 128), id="nowhere"),
        ],
    )
    def test_what_cannot_be_a_table_is_none(self, entry):
        data = bytearray(MIB)
        struct.pack_into("<B3xB3xII", data, 446, *entry)
        data[510:512] = b"\x55\xaa"
        assert fixed(data) is None


class TestNoTable:
    @pytest.mark.parametrize("data", [b"", bytes(511), bytes(MIB)])
    def test_nothing(self, data):
        assert fixed(data) is None

    def test_random_bytes_are_no_table(self, rng):
        for _ in range(2000):
            data = bytearray(rng.randbytes(512))
            data[510:512] = b"\x55\xaa"
            assert parse(bytes(data), 512, MIB) is None

    @given(st.integers(0, 2**32))
    @settings(max_examples=200, deadline=None)
    def test_damage_never_raises(self, seed):
        dice = random.Random(seed)
        data = bytearray(64 * 1024)
        struct.pack_into("<B3xB3xII", data, 446, 0, dice.choice([0xEE, 5, 15, 0x83]), 1, 127)
        data[510:512] = b"\x55\xaa"
        for _ in range(dice.randrange(64)):
            data[dice.randrange(446, 4096)] = dice.choice([0, 5, 0x55, 0xAA, 0x80, dice.randrange(256)])
        data[510:512] = b"\x55\xaa"
        data[512:520] = b"EFI PART"
        fixed(data)
        filesystem(reader(data), len(data))


# kind: (command, options, size in MiB, label, UUID as text)
MADE = {
    "ext2": ("mkfs.ext2", ["-q", "-F", "-L", "data", "-U", "11111111-2222-3333-4444-555555555555"], 8),
    "ext3": ("mkfs.ext3", ["-q", "-F", "-L", "data", "-U", "11111111-2222-3333-4444-555555555555"], 8),
    "ext4": ("mkfs.ext4", ["-q", "-F", "-L", "data", "-U", "11111111-2222-3333-4444-555555555555"], 8),
    "xfs": ("mkfs.xfs", ["-q", "-L", "data", "-m", "uuid=11111111-2222-3333-4444-555555555555"], 320),
    "btrfs": ("mkfs.btrfs", ["-q", "-L", "data", "-U", "11111111-2222-3333-4444-555555555555"], 128),
    "swap": ("mkswap", ["-L", "data", "-U", "11111111-2222-3333-4444-555555555555"], 8),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_file_system_is_known_and_is_no_partition_table(image, kind):
    program, options, size = MADE[kind]
    file = image(size * MIB)
    run(program, *options, file)
    with file.open("rb") as opened:
        data = opened.read(MIB)
    found = filesystem(reader(data), size * MIB)
    assert (found.type, found.label, found.uuid) == (kind, "data", "11111111-2222-3333-4444-555555555555")
    assert parse(data, 512, size * MIB) is None


@pytest.mark.parametrize("bits", ["12", "16", "32"])
def test_fat_has_the_signature_of_a_table_and_is_none(image, bits):
    file = image(8 * MIB if bits == "12" else 64 * MIB)
    run("mkfs.vfat", "-F", bits, "-n", "DATA", "-i", "1A2B3C4D", file)
    data = file.read_bytes()
    assert data[510:512] == b"\x55\xaa"
    found = filesystem(reader(data), len(data))
    assert (found.type, found.label, found.uuid) == ("vfat", "DATA", "1A2B-3C4D")
    assert fixed(data) is None


def test_ntfs_has_the_signature_of_a_table_and_is_none():
    sector = bytearray(512)
    sector[0:11] = b"\xeb\x52\x90NTFS    "
    struct.pack_into("<HB", sector, 11, 512, 8)
    sector[72:80] = bytes.fromhex("efcdab8967452301")
    # Its boot code may look like an entry.
    struct.pack_into("<B3xB3xII", sector, 446, 0, 0x83, 64, 128)
    sector[510:512] = b"\x55\xaa"
    found = filesystem(reader(sector), MIB)
    assert (found.type, found.uuid) == ("ntfs", "0123456789ABCDEF")
    assert parse(bytes(sector), 512, MIB) is None


@pytest.mark.parametrize(("version", "place"), [("1.0", -16 * 512), ("1.1", 0), ("1.2", 4096)])
def test_a_member_of_an_array_is_known_at_each_place(version, place):
    data = bytearray(MIB)
    place %= MIB
    struct.pack_into("<II8x", data, place, 0xA92B4EFC, 1)
    data[place + 16 : place + 32] = bytes(range(1, 17))
    data[place + 32 : place + 40] = b"host:md0"
    struct.pack_into("<Q", data, place + 144, place // 512)
    found = filesystem(reader(data), MIB)
    assert (found.type, found.label) == ("linux_raid_member", "host:md0")
    assert found.uuid == "01020304-0506-0708-090a-0b0c0d0e0f10"


def test_an_old_array_keeps_its_superblock_near_the_end():
    data = bytearray(MIB)
    struct.pack_into("<II", data, MIB - 65536, 0xA92B4EFC, 0)
    assert filesystem(reader(data), MIB).type == "linux_raid_member"


@pytest.mark.parametrize(("version", "label"), [(1, ""), (2, "vault")])
def test_luks_is_known(version, label):
    data = bytearray(MIB)
    struct.pack_into(">6sH", data, 0, b"LUKS\xba\xbe", version)
    # Version 1 names its cipher where version 2 has its label.
    data[24:29] = b"vault" if version == 2 else b"aes\0\0"
    data[168:204] = b"11111111-2222-3333-4444-555555555555"
    found = filesystem(reader(data), MIB)
    assert (found.type, found.label) == ("crypto_LUKS", label)
    assert found.uuid == "11111111-2222-3333-4444-555555555555"


def lvm(group):
    """A physical volume's label and, if it is in a group, the metadata that names it."""
    data = bytearray(MIB)
    label = data[512:1024]
    label[0:8], label[24:32] = b"LABELONE", b"LVM2 001"
    label[32:64] = b"abcdefghijklmnopqrstuvwxyz012345"
    struct.pack_into("<QQQQQQQQ", label, 72, MIB // 2, 0, 0, 0, 4096, 65536, 0, 0)
    data[512:1024] = label
    data[4096 + 4 : 4096 + 20] = b"\x20LVM2\x20x[5A%r0N*>"
    if group:
        text = f'{group} {{\nid = "x"\n'.encode()
        data[4096 + 512 : 4096 + 512 + len(text)] = text
        struct.pack_into("<QQQQ", data, 4096 + 24, 4096, 65536, 512, len(text))
    return data


@pytest.mark.parametrize("group", ["vg-data", ""])
def test_a_physical_volume_tells_its_group(group):
    found = filesystem(reader(lvm(group)), MIB)
    assert (found.type, found.label) == ("LVM2_member", group)
    assert found.uuid == "abcdef-ghij-klmn-opqr-stuv-wxyz-012345"


def lvm_without_text(*, areas, version, flags):
    """A physical volume of which no metadata area names a group: there is none, an empty one, or one with damage."""
    data = lvm("vg")
    locations = [MIB // 2, 0, 0, 0] + ([4096, 65536] if areas else []) + [0, 0]
    struct.pack_into(f"<{len(locations)}QII", data, 512 + 72, *locations, version, flags)
    if areas == "empty":
        struct.pack_into("<QQ", data, 4096 + 40, 0, 0)
    elif areas == "damaged":
        data[4096 : 4096 + 1024] = b"\xff" * 1024
    return data


@pytest.mark.parametrize("version", [0, 1, 2, 3])
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("areas", ["", "empty", "damaged"])
def test_a_physical_volume_is_free_only_where_that_is_certain(areas, used, version):
    """A group may keep its metadata on some of its disks only; since version 2 the header says whether it is used."""
    found = filesystem(reader(lvm_without_text(areas=areas, version=version, flags=int(used))), MIB)
    assert found.type == "LVM2_member"
    free = not used if version >= 2 else areas == "empty"
    assert (found.label == "") is free
    assert free or "another disk" in found.label


def test_squashfs_and_iso9660():
    data = bytearray(MIB)
    data[32768:32774] = b"\x01CD001"
    data[32808:32840] = b"DEBIAN 12".ljust(32)
    assert (filesystem(reader(data)).type, filesystem(reader(data)).label) == ("iso9660", "DEBIAN 12")
    data[0:4], data[28:30] = b"hsqs", b"\x04\x00"
    assert str(filesystem(reader(data))) == "squashfs"


def test_nothing_is_recognised_in_zeros_and_noise(rng):
    assert filesystem(reader(bytes(MIB)), MIB) is None
    assert filesystem(reader(b""), 0) is None
    assert filesystem(reader(rng.randbytes(MIB)), MIB) is None


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_types_are_called_as_sfdisk_calls_them(label):
    named = {}
    for line in run("sfdisk", "--list-types", "--label", label).splitlines()[2:]:
        kind, _, name = line.strip().partition(" ")
        named[kind.lower() if label == "gpt" else f"0x{int(kind, 16):02x}" if kind else ""] = name.strip()
    mine = {kind: type_name(kind) for kind in named if type_name(kind)}
    assert len(mine) > 30
    assert mine == {kind: named[kind] for kind in mine}
    assert type_name("0x99") == type_name("11111111-2222-3333-4444-555555555555") == ""
