"""Whether the file systems on a disk were unmounted as they should be, told from its content alone.

Only what is surely at rest counts as such: a wrong "clean" would be believed at a restore, a wrong "not known" costs
a word.
"""

from __future__ import annotations

import struct

from blockbak.model.clean import unclean as clean_flaw
from blockbak.model.filesystem import Read, filesystem
from blockbak.model.partition import Partition, parse
from blockbak.units import KIB, SECTOR

_EXTENDED = ("0x05", "0x0f", "0x85")
"""The kernel shows its logical partitions, each by itself."""
_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
"""GRUB's partition on GPT disks: code, not a file system."""
_RESTING = ("swap", "squashfs", "iso9660")
"""What is never written to, or whose content nobody needs after a boot."""
_BY_THEMSELVES = ("ext2", "ext3", "ext4", "vfat", "ntfs")
"""What says so in its own head."""
_EMPTY_BYTES = 128 * KIB
"""So much of zeros at the start, and there is no file system."""


def unclean(read: Read, sector_bytes: int, device_bytes: int) -> list[str]:
    """What on a disk was not surely unmounted cleanly, in words (``partition 2 (ext4) was in use``); empty if all
    of it was.

    ext, XFS, btrfs, vfat and NTFS are looked into. What lies inside of volume groups, encryption and arrays is not
    known.
    """
    table = parse(read, sector_bytes, device_bytes)
    if table is None:
        found = _flaw(read, device_bytes)
        return [f"the file system on it{found}"] if found else []
    told = []
    for one in table.partitions:
        if one.type.lower() in (*_EXTENDED, _BIOS_BOOT):
            continue
        found = _flaw(_within(read, one), one.length)
        if found:
            told.append(f"partition {one.number}{found}")
    return told


def _within(read: Read, part: Partition) -> Read:
    def inside(offset: int, length: int) -> bytes:
        if not 0 <= offset < part.length:
            return b""
        return read(part.start + offset, min(length, part.length - offset))

    return inside


def _flaw(read: Read, device_bytes: int) -> str:
    """What is to be said of one file system; empty if it is at rest, or none is there."""
    found = filesystem(read, device_bytes)
    if found is None:
        return "" if not any(read(0, _EMPTY_BYTES)) else " holds something that is not known"
    if found.type in _RESTING:
        return ""
    if found.type in _BY_THEMSELVES:
        clean = not clean_flaw(found.type, read)
    elif found.type in ("xfs", "btrfs"):
        clean = _xfs(read) if found.type == "xfs" else _btrfs(read)
    else:
        return f" ({found.type}) cannot be looked into"
    return "" if clean else f" ({found}) was not unmounted cleanly"


def _btrfs(read: Read) -> bool:
    """uapi/linux/btrfs_tree.h, btrfs_super_block: the root of the log tree at 96 is 0 where nothing is to replay."""
    return not any(read(64 * KIB + 96, 8))


# --- XFS ----------------------------------------------------------------------------------------------------

_RECORD = 0xFEEDBABE
_UNMOUNT = 0x20
"""kernel, fs/xfs/libxfs/xfs_log_format.h: XLOG_HEADER_MAGIC_NUM, XLOG_UNMOUNT_TRANS."""
_RECORD_BLOCKS_MAX = 513 + 8
"""Of a record: 256 KiB of content, and its header (XLOG_MAX_RECORD_BSIZE, XLOG_HEADER_CYCLE_SIZE)."""


def _xfs(read: Read) -> bool:
    """Whether the newest record of the log is that of an unmount, as the kernel's own xlog_find_tail looks for it
    (fs/xfs/xfs_log_recover.c). A log on another device is not known.
    """
    head = read(0, 256)
    block_bytes, start, per_group, blocks = struct.unpack_from(">I40xQ28xI8xI", head, 4)
    group_bits = head[124]
    if not start or not blocks:
        return False
    group, within = start >> group_bits, start & ((1 << group_bits) - 1)
    first = (group * per_group + within) * block_bytes
    log = _Log(read, first, blocks * block_bytes // SECTOR)
    return log.ends_with_unmount()


class _Log:
    """A ring of basic blocks of 512 bytes, each with the number of its cycle at the start."""

    def __init__(self, read: Read, first: int, count: int) -> None:
        self._read, self._first, self._count = read, first, count

    def _block(self, number: int) -> bytes:
        return self._read(self._first + number % self._count * SECTOR, SECTOR).ljust(SECTOR, b"\0")

    def _cycle(self, number: int) -> int:
        magic, cycle = struct.unpack_from(">II", self._block(number))
        return cycle if magic == _RECORD else magic

    def _head(self) -> int:
        """The block after the newest one: where the cycle is no longer that of block 0."""
        newest = self._cycle(0)
        if self._cycle(self._count - 1) == newest:
            return self._count
        low, high = 0, self._count - 1
        while high - low > 1:
            middle = (low + high) // 2
            if self._cycle(middle) == newest:
                low = middle
            else:
                high = middle
        return high

    def ends_with_unmount(self) -> bool:
        head = self._head()
        for back in range(1, min(_RECORD_BLOCKS_MAX, self._count)):
            block = self._block(head - back)
            magic, _, version, length = struct.unpack_from(">IIII", block)
            if magic != _RECORD:
                continue
            size = struct.unpack_from(">I", block, 320)[0] if version & 2 else 0
            header = max(1, -(-size // (32 * KIB)))
            operations = struct.unpack_from(">I", block, 40)[0]
            if operations != 1 or header + -(-length // SECTOR) != back:
                return False
            # xlog_op_header: tid, length, client, flags.
            return bool(self._block(head - back + header)[9] & _UNMOUNT)
        return False
