"""The marks a disk is known by: serial, world-wide name, array UUID, the ids of its partition table."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from blockbak.host.system import System
from blockbak.model.partition import PartitionTable, Read, filesystem, parse
from blockbak.units import SECTOR


@contextlib.contextmanager
def reading(path: str) -> Iterator[Read]:
    """``read(offset, length)`` of a device or file; short where nothing can be read. Never raises."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        yield lambda _offset, _length: b""
        return

    def read(offset: int, length: int) -> bytes:
        try:
            return os.pread(descriptor, length, offset) if offset >= 0 else b""
        except (OSError, OverflowError):
            return b""

    try:
        yield read
    finally:
        os.close(descriptor)


def table_at(path: str, sector_bytes: int, device_bytes: int, *, guess: bool) -> PartitionTable | None:
    """The partition table on a device or in a file.

    ``guess``: a file does not say whether its table was made for sectors of 512 bytes or of 4096.
    """
    with reading(path) as read:
        return parse(read, sector_bytes, device_bytes, guess=guess)


def disk_id(path: str, sector_bytes: int, device_bytes: int, *, guess: bool = False) -> str:
    """The id of the partition table there, or ''."""
    found = table_at(path, sector_bytes, device_bytes, guess=guess)
    return found.disk_id if found else ""


def partuuid(name: str, number: int, start: int, system: System, udev: dict[str, str]) -> str:
    """The UUID of a partition that the kernel counts as ``number`` and that begins at byte ``start``."""
    told = udev.get("ID_PART_ENTRY_UUID") or system.uevent(name).get("PARTUUID")
    if told or not system.has_nodes:
        return (told or "").lower()
    whole = system.whole(name)
    sector_bytes = system.number(whole, "queue/logical_block_size", SECTOR)
    found = table_at(system.node(whole), sector_bytes, system.size(whole), guess=False)
    # A table that was changed since the kernel read it says nothing about the kernel's partitions.
    same = [one for one in found.partitions if (one.number, one.start) == (number, start)] if found else []
    return same[0].uuid if same else ""


def serial(name: str, system: System, udev: dict[str, str]) -> str:
    """The disk's own serial number: what the kernel knows first, so that udev's absence changes nothing."""
    page = system.raw(name, "device/vpd_pg80")
    for text in (
        system.attribute(name, "serial"),
        system.attribute(name, "device/serial"),
        # SPC-4, Unit Serial Number page: four bytes of header, then text.
        page[4:].decode("ascii", "replace"),
        udev.get("ID_SERIAL_SHORT", ""),
        udev.get("ID_SERIAL", ""),
    ):
        clean = " ".join(text.replace("\0", " ").split())
        if re.search("[1-9A-Za-z]", clean):
            return clean
    return ""


def wwn(name: str, system: System, udev: dict[str, str], dm_uuid: str) -> str:
    """The world-wide name in the kernel's form (``naa.…``, ``eui.…``, ``uuid.…``, ``nvme.…``), or ''.

    A ``t10.`` designator is only vendor and serial, so it is none. A multipath device has its paths'.
    """
    multipath = re.fullmatch(r"mpath-([23])([0-9a-f]{16,32})", dm_uuid)
    if multipath:
        # As scsi_id prints it: before the name its designator's type (SPC-4), 3 for NAA, 2 for EUI-64.
        return ("naa." if multipath[1] == "3" else "eui.") + multipath[2]
    told = udev.get("ID_WWN_WITH_EXTENSION") or udev.get("ID_WWN", "")
    for text in (system.attribute(name, "wwid"), system.attribute(name, "device/wwid"), told):
        clean = re.sub("^0x", "naa.", text.strip().lower())
        if re.match(r"(naa|eui|uuid|nvme)\.[0-9a-f-]*[1-9a-f]", clean):
            return clean
    return ""


def md_uuid(name: str, system: System, udev: dict[str, str]) -> str:
    """An array's UUID, 32 hex digits: from the kernel, from udev, or from a member's superblock."""
    told = system.attribute(name, "md/uuid") or udev.get("MD_UUID", "")
    for member in system.links(name, "slaves") if not told and system.has_nodes else ():
        with reading(system.node(member)) as read:
            found = filesystem(read, system.size(member))
        if found is not None and found.type == "linux_raid_member":
            told = found.uuid
            break
    return re.sub("[^0-9a-f]", "", told.lower())
