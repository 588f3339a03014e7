"""Block devices and image files as facts: what a path names, what it is called, what it must match.

Everything is read from sysfs and /proc, with udev's knowledge added where it runs. Nothing here changes
anything; devices are opened read-only, for their partition tables.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from blockbak.errors import NoPermission, NoSuchSource, NotABlockSource
from blockbak.host import marks
from blockbak.host.kernel import Kernel
from blockbak.host.system import System, lv_uuid, lvm_names, of_group, without_deleted
from blockbak.model.identity import PATH, Identity
from blockbak.model.partition import PartitionTable
from blockbak.units import KIB, SECTOR

Kind: TypeAlias = Literal["disk", "partition", "loop", "dm", "md", "rom", "file"]

_NODE_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a character device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}
_MEMORY = re.compile(r"(ram|zram)\d+")
_GUID_CHARS = 36


@dataclass(frozen=True, slots=True)
class Mount:
    """One place where a device's file system is seen."""

    target: str
    fstype: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A block device or an image file, as it was seen. Sizes are bytes; unknown words are empty.

    ``path`` is the canonical node (/dev/dm-3) or the file's real path, ``given`` what was asked for.
    ``kname`` is the kernel's name, empty for a file. ``disk_id`` is the id of the partition table *on* it;
    ``wwn`` and ``serial`` are those of the disk itself, so a partition has none. ``backing_file`` is a loop
    device's, ``mounts`` and ``holders`` (kernel names) are direct ones only: ``usage.users`` follows the
    whole stack. ``diskseq`` is the kernel's number of this instance; another one under the same name is
    another device. ``file_id`` is a file's st_dev and st_ino.
    """

    path: str
    given: str
    is_block: bool
    size: int
    kind: Kind
    kname: str = ""
    major: int = 0
    minor: int = 0
    logical_sector: int = SECTOR
    physical_sector: int = 4 * KIB
    read_only: bool = False
    model: str = ""
    serial: str = ""
    wwn: str = ""
    partuuid: str = ""
    partition_number: int = 0
    start: int = 0
    dm_name: str = ""
    dm_uuid: str = ""
    lv_uuid: str = ""
    vg: str = ""
    lv: str = ""
    md_uuid: str = ""
    disk_id: str = ""
    backing_file: str = ""
    backing_start: int = 0
    diskseq: int = 0
    file_id: tuple[int, int] = (0, 0)
    mounts: tuple[Mount, ...] = ()
    holders: tuple[str, ...] = ()

    @property
    def is_lv(self) -> bool:
        """Whether it is a logical volume that a person would name."""
        return bool(self.lv_uuid)

    @property
    def label(self) -> str:
        """The name for people: ``vg/lv``, ``/dev/mapper/name``, or the path."""
        if self.is_lv:
            return f"{self.vg}/{self.lv}"
        return f"/dev/mapper/{self.dm_name}" if self.dm_name else self.path


# --- from a name to a device ----------------------------------------------------------------------------


def look(path: str, system: System | None = None) -> Device:
    """The device or image file that ``path`` names: a node, a link to one, a file, or ``vg/lv``.

    A path that exists comes before a logical volume of that name. Raises NoSuchSource, NotABlockSource,
    NoPermission. A file or device may be looked at without being readable.
    """
    system = system or System()
    try:
        info = _stat(path)
    except PermissionError as error:
        raise NoPermission(action="look at", path=path) from error
    except (OSError, ValueError) as error:
        name = _volume_name(path, system)
        if not name:
            raise NoSuchSource(path=path) from error
        return block(name, system, given=path)
    kind = stat.S_IFMT(info.st_mode)
    if kind == stat.S_IFREG:
        return _file(path, info)
    if kind != stat.S_IFBLK:
        raise NotABlockSource(path=path, what=_NODE_KINDS.get(kind, "something else"))
    name = system.name_of(os.major(info.st_rdev), os.minor(info.st_rdev))
    return block(name, system, given=path) if name else _unknown(path, info.st_rdev)


def _stat(path: str) -> os.stat_result:
    # An empty Path is the current directory; an empty name is none.
    return Path(path or "/nonexistent/").stat()


def _volume_name(path: str, system: System) -> str:
    """The kernel name for ``vg/lv``, ``/dev/vg/lv`` or ``/dev/mapper/…`` whose link nobody made."""
    group, slash, volume = path.partition("/")
    return system.volume(group, volume) if group and slash else system.name_at(path)


def _file(path: str, info: os.stat_result) -> Device:
    size = info.st_size
    return Device(
        path=os.path.realpath(path),
        given=path,
        is_block=False,
        size=size,
        kind="file",
        read_only=not os.access(path, os.W_OK),
        disk_id=marks.disk_id(path, SECTOR, size, guess=True),
        file_id=(info.st_dev, info.st_ino),
    )


def _unknown(path: str, number: int) -> Device:
    """A node whose device sysfs does not show: what its descriptor tells has to do."""
    kernel = Kernel()
    try:
        descriptor = kernel.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError as error:
        raise NoPermission(action="read", path=path) from error
    except OSError as error:
        raise NoSuchSource(path=path) from error
    try:
        size = kernel.device_size(descriptor)
        logical, physical = kernel.sector_sizes(descriptor)
    finally:
        kernel.close(descriptor)
    real = os.path.realpath(path)
    return Device(
        path=real,
        given=path,
        is_block=True,
        size=size,
        kind="disk",
        major=os.major(number),
        minor=os.minor(number),
        logical_sector=logical,
        physical_sector=physical,
        disk_id=marks.disk_id(real, logical, size),
    )


def block(name: str, system: System, given: str = "") -> Device:
    """The block device of a kernel name. Its attributes are empty where it vanished meanwhile."""
    whole, node = system.whole(name), system.node(name)
    kind = _kind(name, system)
    major, minor = system.device_number(name)
    size = system.size(name)
    logical = system.number(whole, "queue/logical_block_size", SECTOR)
    start = system.number(name, "start") * SECTOR
    number = system.number(name, "partition")
    dm_name, dm_uuid = system.attribute(name, "dm/name"), system.attribute(name, "dm/uuid")
    volume_uuid = lv_uuid(dm_uuid)
    group, volume = lvm_names(dm_name) if volume_uuid else ("", "")
    own = kind != "partition"
    udev = system.udev(name)
    readable = system.number(name, "dm/suspended") == 0 and kind != "rom"
    path = _node_path(node, given, (major, minor))
    disk_id = marks.disk_id(path, logical, size) if own and readable and system.has_nodes else ""
    return Device(
        path=path,
        given=given or path,
        is_block=True,
        size=size,
        kind=kind,
        kname=name,
        major=major,
        minor=minor,
        logical_sector=logical,
        physical_sector=system.number(whole, "queue/physical_block_size", logical),
        read_only=system.attribute(name, "ro") == "1",
        model=" ".join(system.attribute(whole, "device/model").split()),
        serial=marks.serial(name, system, udev) if own else "",
        wwn=marks.wwn(name, system, udev, dm_uuid) if own else "",
        partuuid="" if own else marks.partuuid(name, number, start, system, udev),
        partition_number=number,
        start=start,
        dm_name=dm_name,
        dm_uuid=dm_uuid,
        lv_uuid=volume_uuid,
        vg=group,
        lv=volume,
        md_uuid=marks.md_uuid(name, system, udev) if kind == "md" else "",
        disk_id=disk_id or (udev.get("ID_PART_TABLE_UUID", "").lower() if own else ""),
        backing_file=system.loops.get(name, ""),
        backing_start=system.number(name, "loop/offset"),
        diskseq=system.number(whole, "diskseq"),
        mounts=tuple(
            Mount(line.target, line.fstype, line.options) for line in system.mounts if name in system.devices_of(line)
        ),
        holders=tuple(system.links(name, "holders")),
    )


def _node_path(node: str, given: str, number: tuple[int, int]) -> str:
    """The kernel's node if it is there and is this device, else the one that was asked for."""
    for path in (node, os.path.realpath(given)) if given else (node,):
        with contextlib.suppress(OSError, ValueError):
            found = Path(path).stat().st_rdev
            if (os.major(found), os.minor(found)) == number:
                return path
    return node


def _kind(name: str, system: System) -> Kind:
    folder = system.directory(name)
    if system.is_partition(name):
        return "partition"
    if name.startswith("loop"):
        return "loop"
    if (folder / "dm").is_dir():
        return "dm"
    if (folder / "md").is_dir():
        return "md"
    # SCSI type 5 (scsi/scsi_proto.h, TYPE_ROM).
    return "rom" if re.fullmatch(r"sr\d+", name) or system.attribute(name, "device/type") == "5" else "disk"


def devices(system: System | None = None) -> list[Device]:
    """Everything that can be backed up, in natural order of the kernel's names.

    Not memory disks, empty drives, loop devices without a file, extended partitions, and the inner parts
    of logical volumes.
    """
    system = system or System()
    return [block(name, system) for name in system.names if _is_offered(name, system)]


def _is_offered(name: str, system: System) -> bool:
    if _MEMORY.fullmatch(name) or system.attribute(name, "hidden") == "1":
        return False
    size = system.size(name)
    kind = _kind(name, system)
    if size == 0 or (kind == "loop" and name not in system.loops):
        return False
    if kind == "partition":
        # The kernel shows an extended partition as two sectors (block/partitions/msdos.c).
        return size > 2 * SECTOR
    if kind == "dm":
        return not is_inner(name, system)
    return kind != "rom" or _has_medium(system.node(name))


def is_inner(name: str, system: System) -> bool:
    """Whether it is a part of logical volumes that LVM made for itself: a thin pool, a snapshot's room, a leg of a
    mirror.
    """
    uuid = system.attribute(name, "dm/uuid")
    group = of_group(uuid)
    if not group:
        return False
    # Legs are named like any volume. No group lies on itself, so what its other volumes stand on is a part of them.
    held = any(of_group(system.attribute(holder, "dm/uuid")) == group for holder in system.links(name, "holders"))
    return held or not lv_uuid(uuid)


def _has_medium(node: str) -> bool:
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in (errno.ENOMEDIUM, errno.ENXIO, errno.ENODEV)
    return True


def disk_of(device: Device) -> Device | None:
    """The disk that a partition is on; None for anything else."""
    system = System()
    return block(system.whole(device.kname), system) if device.kind == "partition" else None


def table(device: Device) -> PartitionTable | None:
    """The partition table on a device or in an image file; None where there is none or it is not readable."""
    return marks.table_at(device.path, device.logical_sector, device.size, guess=not device.is_block)


# --- identity -------------------------------------------------------------------------------------------


def identity(device: Device, system: System | None = None) -> Identity:
    """What a device must match to be the same volume; the strongest name it has.

    LV UUID, WWN, serial, a partition's UUID with its disk's identity, device-mapper's or md's UUID, a loop
    device's file, a partition table's id, and at last the node. A loop device that shows a whole file is
    the volume the file is; one on a whole device is that device.
    """
    system = system or System()
    for kind, value in (("lv-uuid", device.lv_uuid), ("wwn", device.wwn), ("serial", device.serial)):
        if value:
            return Identity(kind, value)
    if device.kind == "file":
        return Identity("file", device.path)
    found = _partition_identity(device, system) if device.kind == "partition" else _loop_identity(device, system)
    if found is not None:
        return found
    if device.dm_uuid:
        return Identity("dm-uuid", device.dm_uuid)
    if device.md_uuid:
        return Identity("md-uuid", device.md_uuid)
    if device.disk_id:
        return Identity("gpt" if len(device.disk_id) == _GUID_CHARS else "mbr", device.disk_id)
    path = f"/dev/mapper/{device.dm_name}" if device.dm_name else device.path
    return Identity(PATH, path, device.diskseq, system.boot)


def _partition_identity(device: Device, system: System) -> Identity | None:
    disk = identity(block(system.whole(device.kname), system), system)
    if device.partuuid:
        return Identity("partuuid", f"{device.partuuid} on {disk}", disk.diskseq, disk.boot)
    if disk.kind == PATH:
        return None
    return Identity("partition", f"{device.partition_number} at {device.start} on {disk}")


def _loop_identity(device: Device, system: System) -> Identity | None:
    file = without_deleted(device.backing_file) if device.backing_file else None
    if file is None:
        return None
    limited = system.number(device.kname, "loop/sizelimit")
    part = f" from {device.backing_start}" if device.backing_start else ""
    part += f" length {limited}" if limited else ""
    below = system.name_at(file)
    if not below:
        return Identity("file", os.path.realpath(file) + part)
    found = identity(block(below, system), system)
    return Identity("file", f"{found}{part}") if part else found


def find_twin(device: Device, system: System | None = None) -> Device | None:
    """Another present device with the same identity, or None.

    Not what the device is stacked on or what is stacked on it, nor the other paths of one multipath device:
    those are the same volume seen again.
    """
    system = system or System()
    if not device.kname:
        return None
    mine = identity(device, system)
    family = system.below(device.kname) | set(system.above(device.kname))
    for name in list(family):
        if system.attribute(name, "dm/uuid").startswith("mpath-"):
            family |= system.below(name)
    for other in devices(system):
        if other.kname not in family and identity(other, system).same_as(mine):
            return other
    return None
