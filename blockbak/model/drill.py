"""How a restored copy is proven: what lies on it, which program checks that, how it is mounted, what boots it.

What could be taken for the original is never started: volume groups, arrays and encrypted devices are named instead.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blockbak.model.btrfsid import devices as btrfs_devices
from blockbak.model.filesystem import Filesystem, Read
from blockbak.model.partition import PartitionTable
from blockbak.model.unmounted import unclean
from blockbak.units import KIB, MIB, SECTOR

CHECK_SECONDS = 3600.0
BOOT_SECONDS = 600.0
BOOT_PATTERN = "login:"
"""What getty says on a serial console."""

_EXTENDED = ("0x05", "0x0f", "0x85")
_BIOS_BOOT = "21686148-6449-6e6f-744e-656564454649"
_ESP = ("c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "0xef")
"""UEFI 2.10, table 5.7 and 5.2.2: the EFI system partition."""
_BOOT_CODE_BYTES = 440
"""Of an MBR, before the disk's signature (UEFI 2.10, table 5.1)."""


@dataclass(frozen=True, slots=True)
class DrillOptions:
    """What a person, or a job, asks of a drill. ``target`` is the path of a device to restore to, else a file in the
    directory ``scratch`` is made (empty: where blockbak finds room). ``check`` is a program with its words, run for
    at most ``check_seconds``. ``boot`` starts the copy in QEMU, which must print ``boot_pattern`` (a regular
    expression) on its serial console within ``boot_seconds``. Without ``checker`` no file system's own checker is run.
    """

    target: str = ""
    overwrite: bool = False
    scratch: str = ""
    checker: bool = True
    check: tuple[str, ...] = ()
    check_seconds: float = CHECK_SECONDS
    boot: bool = False
    boot_pattern: str = BOOT_PATTERN
    boot_seconds: float = BOOT_SECONDS


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file system may lie on the copy: ``number`` of the partition, 0 for the whole of it; bytes."""

    number: int
    start: int
    length: int

    @property
    def name(self) -> str:
        """For people."""
        return f"partition {self.number}" if self.number else "the volume"

    @property
    def mount(self) -> int:
        """The number that its mount point has."""
        return self.number or 1


@dataclass(frozen=True, slots=True)
class Checker:
    """A file system's own checker. ``argv`` goes before the device, ``flawed`` are the exit statuses that say that it
    found something; any other than these and 0 says that it could not check.
    """

    argv: tuple[str, ...]
    flawed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """What is done about one place. ``replay``: its journal wants to be replayed first. ``options`` are mount's,
    without the one that says whether it may be written. ``unmark`` is a byte to be written first, and its offset: it
    says that a vfat was in use, which its checker would complain of. ``unseen`` is why it is not looked into, a clause.
    """

    place: Place
    found: Filesystem | None
    checker: Checker | None = None
    replay: bool = False
    fstype: str = ""
    options: tuple[str, ...] = ()
    unmark: tuple[int, int] | None = None
    unseen: str = ""


_E2FSCK = Checker(("e2fsck", "-f", "-n"), (1, 4, 5, 12))
"""e2fsck(8): 4 is errors left, which 8 for an operational error may go with."""
# An ext that was told to panic at an error must not do so to the machine that drills.
_EXT_OPTIONS = ("errors=continue",)

_WAYS: dict[str, tuple[Checker | None, tuple[str, ...]]] = {
    "ext2": (_E2FSCK, _EXT_OPTIONS),
    "ext3": (_E2FSCK, _EXT_OPTIONS),
    "ext4": (_E2FSCK, _EXT_OPTIONS),
    # The original has the same UUID, and may be mounted.
    "xfs": (Checker(("xfs_repair", "-n"), (1,)), ("nouuid",)),
    "btrfs": (Checker(("btrfs", "check", "--readonly"), (1,)), ()),
    "vfat": (Checker(("fsck.vfat", "-n"), (1,)), ()),
    "exfat": (Checker(("fsck.exfat", "-n"), (1, 4)), ()),
    "ntfs": (Checker(("ntfsfix", "-n"), (1,)), ()),
    "squashfs": (None, ()),
    "iso9660": (None, ()),
}
"""Checker and mount options, by blkid's name. Exit statuses are those of each program's manual page."""

_UNSEEN = {
    "LVM2_member": "it belongs to volume group {label}, which is never activated: it could be taken for the original",
    "linux_raid_member": "it is part of an array, which is never assembled: it could be taken for the original",
    "crypto_LUKS": "it is encrypted",
    "jbd": "it is the journal of another file system",
}
_NOTHING_TO_SEE = ("swap",)


def places(table: PartitionTable | None, device_bytes: int) -> list[Place]:
    """Where file systems may lie on the copy."""
    if table is None:
        return [Place(0, 0, device_bytes)]
    kept = [one for one in table.partitions if one.type.lower() not in (*_EXTENDED, _BIOS_BOOT) and one.length]
    return [Place(one.number, one.start, one.length) for one in kept]


def course(place: Place, found: Filesystem | None, read: Read) -> Course:
    """What is done about a place, ``read`` being of that alone."""
    if found is None:
        return Course(place, None, unseen="no file system is recognised there" if _holds_something(read) else "")
    if found.type in _NOTHING_TO_SEE:
        return Course(place, found)
    if found.type not in _WAYS:
        unseen = _UNSEEN.get(found.type, "nothing here knows how").format(label=found.label or "(none)")
        return Course(place, found, unseen=unseen)
    if found.type == "btrfs" and (count := btrfs_devices(read)) != 1:
        return Course(place, found, unseen=f"it is one of {count} devices of a btrfs")
    checker, options = _WAYS[found.type]
    # ntfs has two drivers, of which mount(8) finds the one that is there.
    fstype = "" if found.type == "ntfs" else found.type
    unmark = _in_use(read) if found.type == "vfat" else None
    return Course(place, found, checker, _wants_replay(found.type, read, place.length), fstype, options, unmark)


def _holds_something(read: Read) -> bool:
    return any(read(0, MIB))


def _wants_replay(kind: str, read: Read, length: int) -> bool:
    """Whether the next mount would change it before anybody writes: then its checker would complain of what is none
    of its faults.
    """
    if kind in ("ext3", "ext4"):
        return bool(unclean(read, SECTOR, length)) or _has_orphans(read)
    return kind in ("xfs", "btrfs") and bool(unclean(read, SECTOR, length))


def _in_use(read: Read) -> tuple[int, int] | None:
    """kernel, fs/fat/inode.c, fat_set_state: bit 0 of a byte in the boot sector, at 65 (FAT32) or 37."""
    sector = read(0, SECTOR)
    if len(sector) < SECTOR:
        return None
    place = 65 if sector[82:87] == b"FAT32" else 37
    return (place, sector[place] & ~1) if sector[place] & 1 else None


def _has_orphans(read: Read) -> bool:
    """kernel, fs/ext4/ext4.h, ext4_super_block at 1024: s_last_orphan at 232; at 100 the feature ORPHAN_PRESENT.
    Files that were deleted while somebody had them open: a frozen file system may have some.
    """
    block = read(KIB, 256)
    if len(block) < 256:
        return False
    return bool(struct.unpack_from("<I", block, 232)[0] or struct.unpack_from("<I", block, 100)[0] & 0x10000)


def firmware(table: PartitionTable | None, read: Read) -> Literal["bios", "uefi"]:
    """What starts the disk: UEFI where there is a system partition for it and no boot code for a BIOS."""
    has_esp = table is not None and any(one.type.lower() in _ESP for one in table.partitions)
    return "uefi" if has_esp and not any(read(0, _BOOT_CODE_BYTES)) else "bios"


def room(stored_bytes: int) -> int:
    """Bytes that a sparse copy may take: what is stored, and what a file system writes when it is mounted."""
    return stored_bytes + stored_bytes // 64 + 64 * MIB


def told(text: str, lines: int = 3, characters: int = 400) -> str:
    """The first lines of what a program said, as a clause."""
    kept = [line.strip() for line in text.splitlines() if line.strip()]
    said = "; ".join(kept[:lines])
    return said[:characters] + (" …" if len(kept) > lines or len(said) > characters else "")


def environment(point: str, volume: str, device: str, mounts: str, numbers: Sequence[int]) -> dict[str, str]:
    """What the check command is told: the point and its volume, the copy's node, the directory with a mount point for
    each file system, each by its partition's number (1 where there is no partition table), and the first of them.
    """
    about = {"BLOCKBAK_POINT": point, "BLOCKBAK_VOLUME": volume, "BLOCKBAK_DEVICE": device, "BLOCKBAK_MOUNTS": mounts}
    if numbers:
        about["BLOCKBAK_MOUNT"] = f"{mounts}/{numbers[0]}"
    return about | {f"BLOCKBAK_MOUNT_{number}": f"{mounts}/{number}" for number in numbers}
