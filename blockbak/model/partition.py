"""Partition tables, read from bytes: GPT (UEFI specification 2.10, chapter 5.3) and MBR (5.2).

Everything here is bytes of the device; logical block addresses are converted as they are read.
"""

from __future__ import annotations

import struct
import uuid as uuids
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from blockbak.model import gpt
from blockbak.model.filesystem import Filesystem, Read, boot_sector, filesystem
from blockbak.units import KIB, SECTOR

__all__ = ["Filesystem", "Partition", "PartitionTable", "Read", "filesystem", "inside", "parse"]

_EXTENDED = (0x05, 0x0F, 0x85)
"""MBR types that hold a chain of logical partitions: DOS, Windows 95 (LBA), Linux."""
_LOGICAL_MAX = 255
"""The kernel's own limit of partitions (DISK_MAX_PARTS is 256): a longer chain is a loop."""


@dataclass(frozen=True, slots=True)
class Partition:
    """One partition: ``number`` as the kernel counts, ``start`` and ``length`` in bytes.

    ``type`` is a GUID (GPT) or '0x83' (MBR); ``uuid`` is what the kernel calls PARTUUID, in lower case,
    empty where the table gives none; ``name`` is GPT's.
    """

    number: int
    start: int
    length: int
    type: str
    uuid: str = ""
    name: str = ""
    bootable: bool = False

    @property
    def end(self) -> int:
        """The first byte after it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PartitionTable:
    """A table and its partitions by number.

    ``disk_id`` is GPT's disk GUID or MBR's signature (eight hex digits), empty where there is none.
    ``valid_primary`` and ``valid_backup`` say which copy passed its checks (an MBR has no backup). ``hybrid``:
    beside a GPT the MBR names partitions too, for systems that know no GPT. ``notes`` are sentences about what is
    not as it should be.
    """

    scheme: Literal["gpt", "mbr"]
    disk_id: str
    sector_bytes: int
    partitions: tuple[Partition, ...]
    notes: tuple[str, ...] = ()
    valid_primary: bool = True
    valid_backup: bool = False
    hybrid: bool = False


def inside(read: Read, start: int, length: int) -> Read:
    """``read`` for what lies in ``length`` bytes from ``start`` on, as if it were a device of its own."""
    return lambda offset, count: read(start + offset, min(count, length - offset)) if 0 <= offset < length else b""


def parse(source: bytes | Read, sector_bytes: int, device_bytes: int, *, guess: bool = False) -> PartitionTable | None:
    """The partition table of a device, or None where there is none.

    ``source`` is the device's first bytes, or ``read(offset, length)``; only with the latter can logical
    partitions and GPT's backup copy be seen. A file system's boot sector is not taken for a table, and as
    in the kernel, a GPT counts only under a protective MBR. ``guess``: where the content does not say whether its
    table was made for sectors of 512 bytes or of 4096, as in a file, ``sector_bytes`` is tried first. Never raises
    for content, however broken.
    """
    read = _reader(source) if isinstance(source, bytes | bytearray | memoryview) else source
    found = _parse(read, sector_bytes, device_bytes)
    if not guess or found is None or found.valid_primary or found.valid_backup:
        return found
    others = (_parse(read, other, device_bytes) for other in (SECTOR, 4 * KIB) if other != sector_bytes)
    return next((one for one in others if one is not None and (one.valid_primary or one.valid_backup)), found)


def _parse(read: Read, sector_bytes: int, device_bytes: int) -> PartitionTable | None:
    sector = read(0, SECTOR)
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa" or boot_sector(sector) is not None:
        return None
    entries = _mbr_entries(sector)
    if entries is None:
        return None
    if any(entry.type == gpt.PROTECTIVE for entry in entries):
        return _gpt(read, sector_bytes, device_bytes, hybrid=len(entries) > 1)
    return _mbr(read, sector, entries, sector_bytes, device_bytes)


def _reader(data: bytes | bytearray | memoryview) -> Read:
    held = bytes(data)
    return lambda offset, length: held[offset : offset + length]


# --- MBR -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Entry:
    """UEFI 2.10, table 5.2: status, type and two logical block addresses, as they stand."""

    number: int
    status: int
    type: int
    first: int
    count: int


def _mbr_entries(sector: bytes) -> list[_Entry] | None:
    """The entries in use of the four at byte 446; None where they cannot be a table's."""
    found = []
    for number in range(1, 5):
        status, kind, first, count = struct.unpack_from("<B3xB3xII", sector, 446 + 16 * (number - 1))
        if status not in (0x00, 0x80):
            return None
        if kind and count:
            found.append(_Entry(number, status, kind, first, count))
    return found or None


def _mbr(
    read: Read, sector: bytes, entries: list[_Entry], sector_bytes: int, device_bytes: int
) -> PartitionTable | None:
    signature = struct.unpack_from("<I", sector, 440)[0]
    disk_id = f"{signature:08x}" if signature else ""
    notes: list[str] = []
    partitions = []
    for entry in entries:
        made = _mbr_partition(entry, entry.number, 0, disk_id, sector_bytes)
        if entry.first == 0 or made.start >= device_bytes:
            notes.append(f"Partition {entry.number} does not lie on the device; it is left out.")
            continue
        partitions.append(made)
        if entry.type in _EXTENDED:
            partitions += _logical(read, made, disk_id, sector_bytes, notes)
    if not partitions:
        return None
    kept = tuple(sorted(_clipped(partitions, device_bytes, notes), key=lambda one: one.number))
    return PartitionTable("mbr", disk_id, sector_bytes, kept, tuple(notes))


def _mbr_partition(entry: _Entry, number: int, base: int, disk_id: str, sector_bytes: int) -> Partition:
    """``base`` is the byte that its addresses count from; its UUID as in kernel, block/partitions/msdos.c."""
    return Partition(
        number=number,
        start=base + entry.first * sector_bytes,
        length=entry.count * sector_bytes,
        type=f"0x{entry.type:02x}",
        uuid=f"{disk_id}-{number:02x}" if disk_id else "",
        bootable=entry.status == 0x80,
    )


def _logical(read: Read, extended: Partition, disk_id: str, sector_bytes: int, notes: list[str]) -> Iterator[Partition]:
    """The logical partitions inside ``extended``, from 5 on, as in kernel block/partitions/msdos.c.

    Each link holds a partition, counted from the link itself, and the next link, counted from the start
    of the extended partition.
    """
    link, seen, number = extended.start, set[int](), 5
    while link not in seen and len(seen) < _LOGICAL_MAX and extended.start <= link < extended.end:
        seen.add(link)
        sector = read(link, SECTOR)
        entries = _mbr_entries(sector) if len(sector) == SECTOR and sector[510:512] == b"\x55\xaa" else None
        if entries is None:
            if len(sector) < SECTOR or any(sector[446:]):
                notes.append(f"The chain of logical partitions breaks off at byte {link}.")
            return
        onward = None
        for entry in entries:
            if entry.type in _EXTENDED:
                onward = onward if onward is not None else extended.start + entry.first * sector_bytes
                continue
            made = _mbr_partition(entry, number, link, disk_id, sector_bytes)
            if entry.first == 0 or made.end > extended.end:
                notes.append(f"Logical partition {number} reaches beyond the extended one.")
            yield made
            number += 1
        if onward is None:
            return
        link = onward
    notes.append("The chain of logical partitions does not end as it should.")


# --- GPT -----------------------------------------------------------------------------------------------


def _gpt(read: Read, sector_bytes: int, device_bytes: int, *, hybrid: bool) -> PartitionTable:
    last = device_bytes // sector_bytes - 1
    notes = ["A hybrid MBR repeats some partitions."] if hybrid else []
    primary, backup = gpt.header(read, 1, sector_bytes, last), gpt.header(read, last, sector_bytes, last)
    if isinstance(primary, gpt.Header) and isinstance(backup, str) and 1 < primary.alternate < last:
        elsewhere = gpt.header(read, primary.alternate, sector_bytes, last)
        if isinstance(elsewhere, gpt.Header):
            backup = elsewhere
            notes.append("The backup table is not at the end of the device, which has grown since.")
    if isinstance(primary, str):
        instead = "the backup is used" if isinstance(backup, gpt.Header) else "its partitions are not known"
        notes.append(f"The primary table is damaged ({primary}); {instead}.")
    if isinstance(backup, str):
        notes.append(f"The backup table is damaged or missing ({backup}).")
    if isinstance(primary, gpt.Header) and isinstance(backup, gpt.Header):
        if (primary.disk_id, primary.entries) != (backup.disk_id, backup.entries):
            notes.append("The backup table differs from the primary one.")
        used: gpt.Header | None = primary
    else:
        used = next((one for one in (primary, backup) if isinstance(one, gpt.Header)), None)
    partitions = list(_gpt_partitions(used, sector_bytes, notes)) if used else []
    return PartitionTable(
        scheme="gpt",
        disk_id=used.disk_id if used else "",
        sector_bytes=sector_bytes,
        partitions=_clipped(partitions, device_bytes, notes),
        notes=tuple(notes),
        valid_primary=isinstance(primary, gpt.Header),
        valid_backup=isinstance(backup, gpt.Header),
        hybrid=hybrid,
    )


def _gpt_partitions(header: gpt.Header, sector_bytes: int, notes: list[str]) -> Iterator[Partition]:
    """UEFI 2.10, table 5.6; an entry whose type is all zeros is not in use."""
    for place in range(0, len(header.entries), header.entry_bytes):
        entry = header.entries[place : place + header.entry_bytes]
        if not any(entry[:16]):
            continue
        number = place // header.entry_bytes + 1
        first, last, attributes = struct.unpack_from("<QQQ", entry, 32)
        if first == 0 or last < first:
            notes.append(f"Partition {number} ends before it begins; it is left out.")
            continue
        name = entry[56:128].decode("utf-16-le", "replace").split("\0", 1)[0]
        yield Partition(
            number=number,
            start=first * sector_bytes,
            length=(last - first + 1) * sector_bytes,
            type=str(uuids.UUID(bytes_le=entry[:16])),
            uuid=str(uuids.UUID(bytes_le=entry[16:32])),
            name=name,
            bootable=bool(attributes & 4),
        )


def _clipped(partitions: list[Partition], device_bytes: int, notes: list[str]) -> tuple[Partition, ...]:
    """What of each lies on the device; what does not is left out. Both leave a note."""
    kept = []
    for one in partitions:
        if one.start >= device_bytes:
            notes.append(f"Partition {one.number} does not lie on the device; it is left out.")
        elif one.end > device_bytes:
            notes.append(f"Partition {one.number} reaches beyond the device's end.")
            kept.append(replace(one, length=device_bytes - one.start))
        else:
            kept.append(one)
    return tuple(kept)
