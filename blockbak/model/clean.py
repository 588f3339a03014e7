"""Whether a file system was left clean: what it says is in use is complete only then.

After a crash a journal holds changes that are not in their place yet. What they brought into use, the file
system itself still calls free; partclone does not look at that for ext4 and XFS.
"""

from __future__ import annotations

import struct

from blockbak.model.filesystem import Read
from blockbak.units import KIB, SECTOR

_NOT_CLEAN = "it was not cleanly unmounted"
_NO_LOG = "its log cannot be read"


def unclean(kind: str, read: Read) -> str:
    """Why the map of a file system of ``kind`` (blkid's name) would not be complete, as a clause; empty if nothing
    speaks against it. Of XFS and btrfs it knows nothing.
    """
    if kind.startswith("ext"):
        return _ext(read)
    if kind == "ntfs":
        return _ntfs(read)
    return _fat(read) if kind == "vfat" else ""


def _ext(read: Read) -> str:
    """kernel, fs/ext4/ext4.h, ext4_super_block at 1024: state at 58, incompatible features at 96."""
    block = read(KIB, 256)
    if len(block) < 256:
        return "its superblock cannot be read"
    (state,) = struct.unpack_from("<H", block, 58)
    (incompatible,) = struct.unpack_from("<I", block, 96)
    if state & 0x2:
        return "it has errors that e2fsck is to mend"
    # EXT4_VALID_FS is cleared while a file system without a journal is mounted; RECOVER is set with one.
    return _NOT_CLEAN if not state & 0x1 or incompatible & 0x4 else ""


def _fat(read: Read) -> str:
    """kernel, fs/fat/inode.c, fat_set_state: bit 0 of a byte in the boot sector, at 65 (FAT32) or 37."""
    sector = read(0, SECTOR)
    if len(sector) < SECTOR:
        return "its boot sector cannot be read"
    return _NOT_CLEAN if sector[65 if sector[82:87] == b"FAT32" else 37] & 1 else ""


def _ntfs(read: Read) -> str:
    """ntfs-3g, libntfs-3g/logfile.c: a log that somebody has open, and that does not say that it is clean, was left
    by a crash or by a Windows that sleeps. One of 0xff bytes only was emptied.
    """
    log = _ntfs_log(read)
    if log is None:
        return _NO_LOG
    newest, clean = -1, False
    for place in (0, 4 * KIB):
        page = log[place : place + 4 * KIB]
        if page[:4] != b"RSTR":
            continue
        (area,) = struct.unpack_from("<H", page, 24)
        if not 30 <= area <= SECTOR - 18:
            return _NO_LOG
        lsn, _, _, in_use, flags = struct.unpack_from("<QHHHH", page, area)
        if lsn > newest:
            newest, clean = lsn, in_use == 0xFFFF or bool(flags & 0x2)
    if newest < 0:
        return "" if log and log.strip(b"\xff") == b"" else _NO_LOG
    return "" if clean else _NOT_CLEAN


def _ntfs_log(read: Read) -> bytes | None:
    """The first two pages of $LogFile, which is the third record of the master file table.

    ntfs-3g, include/ntfs-3g/layout.h: NTFS_BOOT_SECTOR, MFT_RECORD, ATTR_RECORD.
    """
    boot = read(0, SECTOR)
    if len(boot) < SECTOR:
        return None
    sector_bytes, per_cluster = struct.unpack_from("<HB", boot, 11)
    (table,) = struct.unpack_from("<Q", boot, 48)
    cluster = sector_bytes * (per_cluster if per_cluster <= 128 else 1 << (256 - per_cluster))
    (per_record,) = struct.unpack_from("<b", boot, 64)
    size = per_record * cluster if per_record > 0 else 1 << -per_record
    if not cluster or not SECTOR <= size <= 64 * KIB:
        return None
    record = bytearray(read(table * cluster + 2 * size, size))
    if len(record) < size or record[:4] != b"FILE":
        return None
    array, count, first = struct.unpack_from("<HH12xH", record, 4)
    if count != size // SECTOR + 1 or array + 2 * count > SECTOR or not 0 < first < size:
        return None
    for number in range(1, count):
        # The last two bytes of each sector lie in the update sequence array meanwhile.
        record[number * SECTOR - 2 : number * SECTOR] = record[array + 2 * number : array + 2 * number + 2]
    run = _first_run(bytes(record), first)
    return read(run * cluster, 8 * KIB) if run else None


def _first_run(record: bytes, at: int) -> int:
    """The first cluster of a record's unnamed data; 0 if it cannot be told."""
    while at + 24 <= len(record):
        kind, length, elsewhere, name = struct.unpack_from("<IIBB", record, at)
        if kind == 0xFFFFFFFF or length < 24 or at + length > len(record):
            return 0
        if kind == 0x80 and elsewhere and not name:
            (place,) = struct.unpack_from("<H", record, at + 32)
            pair = record[at + place : at + length]
            counts = pair[0] & 15 if pair else 0
            return int.from_bytes(pair[1 + counts : 1 + counts + (pair[0] >> 4)], "little") if counts else 0
        at += length
    return 0
