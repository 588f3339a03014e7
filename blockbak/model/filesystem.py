"""What a device holds, told from the magic numbers of its content.

Names are blkid's (``ext4``, ``LVM2_member``, ``linux_raid_member``, ``crypto_LUKS`` …). Only what a backup
has a use for is recognised; a wrong guess costs a word in a table, never data.
"""

from __future__ import annotations

import itertools
import re
import struct
import uuid as uuids
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockbak.units import KIB, SECTOR

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` in bytes; fewer bytes past the end, none for what cannot be read."""


@dataclass(frozen=True, slots=True)
class Filesystem:
    """A file system, or what else lays claim to a device. ``label`` and ``uuid`` are empty if unknown.

    For ``LVM2_member`` the label is the volume group's name, empty for a physical volume in none.
    """

    type: str
    label: str = ""
    uuid: str = ""

    def __str__(self) -> str:
        return self.type


def filesystem(read: Read, device_bytes: int = 0) -> Filesystem | None:
    """What lies on a device, or None where nothing is recognised: the first of its ``signs``."""
    return next(signs(read, device_bytes), None)


def signs(read: Read, device_bytes: int = 0) -> Iterator[Filesystem]:
    """All that a device shows the marks of; what was there before may have left some.

    ``device_bytes`` finds arrays whose superblock is at the end. A member of an array or a volume group
    comes first: a mirror's content looks like the file system on it.
    """
    member = _md(read, device_bytes)
    if member is not None:
        yield member
    for probe in (_lvm, _luks, _xfs, _ext, _btrfs, _swap, _squashfs, _iso9660, _boot_sector):
        found = probe(read)
        if found is not None:
            yield found


def _text(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "replace").strip()


def _uuid(data: bytes) -> str:
    return str(uuids.UUID(bytes=data)) if len(data) == 16 and any(data) else ""


_MD_1 = struct.pack("<II", 0xA92B4EFC, 1)
_MD_090 = (struct.pack("<II", 0xA92B4EFC, 0), struct.pack(">II", 0xA92B4EFC, 0))
"""Magic and major version; 0.90 is in the byte order of the machine that wrote it."""


def _md(read: Read, device_bytes: int) -> Filesystem | None:
    """kernel, uapi/linux/raid/md_p.h. 1.x: 8 KiB before the end, at 0 or 4 KiB; 0.90: the last 64 KiB."""
    places = [0, 4 * KIB]
    if device_bytes > 16 * KIB:
        places.append((device_bytes // SECTOR - 16) // 8 * 8 * SECTOR)
    for place in places:
        block = read(place, 256)
        # `super_offset` (sectors, byte 144) says where it was written: a copy elsewhere is content.
        if block[:8] == _MD_1 and block[144:152] == struct.pack("<Q", place // SECTOR):
            return Filesystem("linux_raid_member", _text(block[32:64]), _uuid(block[16:32]))
    if device_bytes >= 128 * KIB:
        block = read(device_bytes // (64 * KIB) * 64 * KIB - 64 * KIB, 64)
        if block[:8] in _MD_090 and len(block) == 64:
            return Filesystem("linux_raid_member", "", _uuid(block[20:24] + block[52:64]))
    return None


_LVM_MDA_MAGIC = b"\x20\x4c\x56\x4d\x32\x20\x78\x5b\x35\x41\x25\x72\x30\x4e\x2a\x3e"
"""lvm2, lib/format_text/layout.h, FMTT_MAGIC."""


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """What a disk says of itself that belongs to LVM. ``group`` is empty where it is in none; ``group_uuid`` is
    empty where the disk does not tell.
    """

    uuid: str
    group: str
    group_uuid: str = ""

    @property
    def names_group(self) -> bool:
        """Whether the disk itself says which group it is in."""
        return self.group not in ("", _ELSEWHERE)


def _lvm(read: Read) -> Filesystem | None:
    found = physical_volume(read)
    return Filesystem("LVM2_member", found.group, found.uuid) if found else None


def physical_volume(read: Read) -> PhysicalVolume | None:
    """lvm2, lib/label/label.h: a label in one of the first four sectors."""
    head = read(0, 4 * SECTOR)
    for start in range(0, len(head) - 63, SECTOR):
        label = head[start : start + SECTOR]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            text = label[32:64].decode("ascii", "replace")
            parts = (6, 4, 4, 4, 4, 4, 6)
            ends = list(itertools.accumulate(parts))
            pv_uuid = "-".join(text[end - part : end] for part, end in zip(parts, ends, strict=True))
            return PhysicalVolume(pv_uuid, *_volume_group(read, label))
    return None


_PV_EXT_VERSION, _PV_EXT_USED = 2, 1
"""lvm2, lib/format_text/layout.h: the flag of a physical volume that belongs to a group, and since when it is set."""
_ELSEWHERE = "(named on another disk)"
_GROUP_ID = re.compile(rb'\s*id = "([0-9A-Za-z-]{38})"')


def _volume_group(read: Read, label: bytes) -> tuple[str, str]:
    """Name and UUID in the metadata a label points to; an empty name only where it is in no group for sure.

    lvm2, lib/format_text/layout.h: pv_header {uuid[32], size}, then {offset, size} pairs, first of data
    areas, then of metadata areas, each list ended by a pair of zeros; then pv_header_extension {version,
    flags}. mda_header {checksum, magic[16], version, start, size, {offset, size, checksum, flags}…}. The text
    begins with the group's name and UUID; a disk may leave the text to the group's other disks.
    """
    pairs = [struct.unpack_from("<QQ", label, place) for place in range(72, len(label) - 15, 16)]
    ends = [number for number, pair in enumerate(pairs) if pair == (0, 0)]
    if len(ends) < 2:
        return _ELSEWHERE, ""
    empty = False
    for area, _ in pairs[ends[0] + 1 : ends[1]]:
        header = read(area, SECTOR)
        if len(header) < SECTOR or header[4:20] != _LVM_MDA_MAGIC:
            continue
        place, length = struct.unpack_from("<QQ", header, 40)
        empty = empty or not length
        name, _, rest = (read(area + place, 256) if place and length else b"").partition(b" {")
        if 0 < len(name) <= 128 and b"\n" not in name:
            found = _GROUP_ID.match(rest)
            return name.decode("ascii", "replace"), found[1].decode() if found else ""
    place = 72 + 16 * (ends[1] + 1)
    version, flags = struct.unpack_from("<II", label, place) if place + 8 <= len(label) else (0, 0)
    if version >= _PV_EXT_VERSION:
        return (_ELSEWHERE if flags & _PV_EXT_USED else ""), ""
    return ("" if empty else _ELSEWHERE), ""


def _luks(read: Read) -> Filesystem | None:
    """LUKS1 and LUKS2 on-disk formats: magic, version; label (2 only) at 24, UUID text at 168."""
    head = read(0, 208)
    if head[:6] != b"LUKS\xba\xbe" or len(head) < 208:
        return None
    label = _text(head[24:72]) if head[6:8] == b"\0\2" else ""
    return Filesystem("crypto_LUKS", label, _text(head[168:208]))


def _xfs(read: Read) -> Filesystem | None:
    """kernel, fs/xfs/libxfs/xfs_format.h, xfs_dsb."""
    head = read(0, 128)
    if head[:4] != b"XFSB" or len(head) < 128:
        return None
    return Filesystem("xfs", _text(head[108:120]), _uuid(head[32:48]))


def _ext(read: Read) -> Filesystem | None:
    """kernel, fs/ext4/ext4.h, ext4_super_block at 1024: magic at 56, features at 92…, UUID 104, label 120."""
    block = read(KIB, 264)
    if len(block) < 264 or block[56:58] != b"\x53\xef":
        return None
    compatible, incompatible, read_only = struct.unpack_from("<III", block, 92)
    if incompatible & 0x8:
        kind = "jbd"
    elif incompatible & ~0x16 or read_only & ~0x7:
        # More than FILETYPE, RECOVER, META_BG and SPARSE_SUPER, LARGE_FILE, BTREE_DIR: ext3 knows no more.
        kind = "ext4"
    else:
        kind = "ext3" if compatible & 0x4 else "ext2"
    return Filesystem(kind, _text(block[120:136]), _uuid(block[104:120]))


def _btrfs(read: Read) -> Filesystem | None:
    """kernel, uapi/linux/btrfs_tree.h, btrfs_super_block at 64 KiB: fsid 32, magic 64, label 299."""
    block = read(64 * KIB, 1024)
    if len(block) < 1024 or block[64:72] != b"_BHRfS_M":
        return None
    return Filesystem("btrfs", _text(block[299:555]), _uuid(block[32:48]))


def _swap(read: Read) -> Filesystem | None:
    """kernel, include/linux/swap.h, union swap_header: magic in the last ten bytes of the first page."""
    for page in (4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB):
        if read(page - 10, 10) in (b"SWAPSPACE2", b"SWAP-SPACE"):
            info = read(KIB, 44)
            return Filesystem("swap", _text(info[28:44]), _uuid(info[12:28]))
    return None


def _squashfs(read: Read) -> Filesystem | None:
    """kernel, fs/squashfs/squashfs_fs.h: magic, and version 4 at 28."""
    head = read(0, 30)
    return Filesystem("squashfs") if head[:4] == b"hsqs" and head[28:30] == b"\x04\0" else None


def _iso9660(read: Read) -> Filesystem | None:
    """ECMA-119, 8.4: the primary volume descriptor in sector 16 of 2048 bytes."""
    block = read(32 * KIB, 72)
    return Filesystem("iso9660", _text(block[40:72])) if block[:6] == b"\x01CD001" else None


def _boot_sector(read: Read) -> Filesystem | None:
    return boot_sector(read(0, SECTOR))


def boot_sector(sector: bytes) -> Filesystem | None:
    """NTFS, exFAT or FAT, told from a first sector, which ends in 55 AA as a partition table does.

    Microsoft's FAT specification 1.03, "Boot Sector and BPB"; NTFS and exFAT keep its outline. A boot
    loader in a partition table's sector may begin like one, so the parameters must make sense too.
    """
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        return None
    if sector[3:11] == b"EXFAT   ":
        return Filesystem("exfat", "", _serial(sector[100:104]))
    sector_bytes, cluster, reserved, tables = struct.unpack_from("<HBHB", sector, 11)
    if sector_bytes not in (512, 1024, 2048, 4096):
        return None
    if sector[3:11] == b"NTFS    ":
        return Filesystem("ntfs", "", f"{struct.unpack_from('<Q', sector, 72)[0]:016X}")
    if cluster == 0 or cluster & (cluster - 1) or not reserved or tables not in (1, 2) or sector[21] < 0xF0:
        return None
    for name, place in ((b"FAT32   ", 82), (b"FAT1", 54), (b"FAT     ", 54)):
        if sector[place : place + len(name)] == name:
            label = _text(sector[place - 11 : place])
            return Filesystem("vfat", "" if label == "NO NAME" else label, _serial(sector[place - 15 : place - 11]))
    return None


def _serial(data: bytes) -> str:
    number = struct.unpack("<I", data)[0]
    return f"{number >> 16:04X}-{number & 0xFFFF:04X}"
