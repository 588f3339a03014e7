"""GPT's headers (UEFI specification 2.10, chapter 5.3): each of the two copies, and the way to a larger disk.

Everything here is bytes of the device, but for the fields of ``Header``, which are logical block addresses.
"""

from __future__ import annotations

import struct
import uuid as uuids
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from blockbak.units import KIB, MIB, count

Read = Callable[[int, int], bytes]
"""``read(offset, length)`` in bytes; fewer bytes past the end."""

PROTECTIVE = 0xEE
"""The type of the MBR's entry that keeps the disk for GPT."""
_PRIMARY = 1
_ENTRIES_BYTES_MAX = 4 * MIB
"""32768 entries of 128 bytes; the usual array has 128, and a longer one is damage."""
_ENTRIES_BYTES_MIN = 16 * KIB
"""What the specification reserves for them at least (5.3.1)."""
_SIZE_MAX = 0xFFFFFFFF
"""A protective entry's size where it does not fit into its field (table 5.4)."""


@dataclass(frozen=True, slots=True)
class Header:
    """UEFI 2.10, table 5.5, and the entries it points to. ``sector`` is the logical block it lies in."""

    disk_id: str
    alternate: int
    entries: bytes
    entry_bytes: int
    sector: bytes


def header(read: Read, address: int, sector_bytes: int, last: int) -> Header | str:
    """The header in logical block ``address`` with its entries; or a few words on why it is none."""
    if not _PRIMARY <= address <= last:
        return "there is none"
    sector = read(address * sector_bytes, sector_bytes)
    if len(sector) < sector_bytes or sector[:8] != b"EFI PART":
        return "there is none"
    size, crc = struct.unpack_from("<II", sector, 12)
    if not 92 <= size <= sector_bytes or _header_crc(sector, size) != crc:
        return "its header does not have its checksum"
    own, alternate = struct.unpack_from("<QQ", sector, 24)
    place, number, entry_bytes, entries_crc = struct.unpack_from("<QIII", sector, 72)
    sensible = entry_bytes >= 128 and entry_bytes % 8 == 0 and 0 < number * entry_bytes <= _ENTRIES_BYTES_MAX
    if own != address or not sensible or not 2 <= place <= last:
        return "its header makes no sense"
    entries = read(place * sector_bytes, number * entry_bytes)
    if len(entries) < number * entry_bytes or zlib.crc32(entries) != entries_crc:
        return "its entries do not have their checksum"
    return Header(str(uuids.UUID(bytes_le=sector[56:72])), alternate, entries, entry_bytes, sector)


def _header_crc(sector: bytes, size: int) -> int:
    return zlib.crc32(sector[:16] + bytes(4) + sector[20:size])


# --- the way to a larger disk ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Growth:
    """What moves a GPT's backup to the end of a larger disk: ``writes`` of whole sectors, each to be durable
    before the next begins. However many of them are done, one of the two copies is whole. ``hybrid``: the MBR
    says more than that the disk is GPT's, and is left as it is.
    """

    writes: tuple[tuple[int, bytes], ...]
    hybrid: bool


def grown(read: Read, sector_bytes: int, volume_bytes: int, target_bytes: int) -> Growth | str:
    """The way from the table of a volume to one for ``target_bytes``; or a few words on why there is none.

    ``read`` gives the volume's content. The specification wants both headers updated as soon as a disk grew, and
    the primary copy to be valid before (5.3.2): a table that is not is for a person to mend.
    """
    old_last, last = (size // sector_bytes - 1 for size in (volume_bytes, target_bytes))
    primary, backup = header(read, _PRIMARY, sector_bytes, old_last), header(read, old_last, sector_bytes, old_last)
    if isinstance(primary, str):
        return f"its primary table is damaged: {primary}"
    if primary.alternate != old_last:
        at = primary.alternate * sector_bytes
        return (
            f"its table was made for another size: the backup should be at byte {at}, the volume ends at {volume_bytes}"
        )
    if isinstance(backup, Header) and (backup.disk_id, backup.entries) != (primary.disk_id, primary.entries):
        return "its backup table differs from the primary one"
    reserved = count(max(len(primary.entries), _ENTRIES_BYTES_MIN), sector_bytes)
    place = last - reserved
    if last <= old_last:
        return "the target is not larger by a whole sector"
    if _end_of_partitions(primary) > place:
        return "its partitions reach into the place of the backup table"
    entries = primary.entries.ljust(count(len(primary.entries), sector_bytes) * sector_bytes, b"\0")
    own_place = struct.unpack_from("<Q", primary.sector, 72)[0]
    writes = [
        # The new backup first, while the primary copy is whole. Entries, then the header that vouches for them.
        (place * sector_bytes, entries),
        (last * sector_bytes, _moved(primary.sector, last, _PRIMARY, place - 1, place)),
        # Both are whole now; the primary header may name the new one.
        (_PRIMARY * sector_bytes, _moved(primary.sector, _PRIMARY, last, place - 1, own_place)),
    ]
    mbr = read(0, sector_bytes)
    kept = [number for number in range(4) if mbr[446 + 16 * number + 4]]
    hybrid = kept != [0] or mbr[450] != PROTECTIVE
    if not hybrid and (protective := _protective(mbr, last)) != mbr:
        writes.append((0, protective))
    overwritten = place <= old_last < place + len(entries) // sector_bytes
    if not overwritten and read(old_last * sector_bytes, 8) == b"EFI PART":
        # Last of all: a program that looks for lost tables would find it, and take it for the truth.
        writes.append((old_last * sector_bytes, bytes(sector_bytes)))
    return Growth(tuple(writes), hybrid)


def _end_of_partitions(table: Header) -> int:
    """The first logical block that no partition has any more."""
    ends = [0]
    for at in range(0, len(table.entries), table.entry_bytes):
        entry = table.entries[at : at + table.entry_bytes]
        if any(entry[:16]):
            ends.append(struct.unpack_from("<Q", entry, 40)[0] + 1)
    return max(ends)


def _moved(sector: bytes, own: int, alternate: int, last_usable: int, place: int) -> bytes:
    """A header for block ``own``, all that is not about places as it was."""
    made = bytearray(sector)
    struct.pack_into("<QQ", made, 24, own, alternate)
    struct.pack_into("<Q", made, 48, last_usable)
    struct.pack_into("<Q", made, 72, place)
    struct.pack_into("<I", made, 16, _header_crc(bytes(made), struct.unpack_from("<I", made, 12)[0]))
    return bytes(made)


def _protective(mbr: bytes, last: int) -> bytes:
    """The protective MBR of a disk that ends with block ``last``; its end in cylinders is beyond what those can say."""
    made = bytearray(mbr)
    made[451:454] = b"\xff\xff\xff"
    struct.pack_into("<I", made, 458, min(last, _SIZE_MAX))
    return bytes(made)
