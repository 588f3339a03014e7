"""What the kernel tells of block devices: sysfs, mounts, swap, locks, and udev where it runs.

A ``System`` reads each table once, so that one question is answered from one view; for the next question
a new one is made. ``root`` is ``/``, or a directory that holds a recorded tree.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from blockbak.host.proc import LockLine, MountLine, parse_locks, parse_mountinfo, unescape
from blockbak.units import SECTOR

_LVM_NAME = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")
_LVM_UUID = re.compile(r"LVM-[0-9A-Za-z]{32}([0-9A-Za-z]{32})")
_DELETED = " (deleted)"
"""What the kernel appends to the name of a loop device's file that has none any more (fs/d_path.c)."""


def lvm_names(dm_name: str) -> tuple[str, str]:
    """Volume group and logical volume of a device-mapper name: hyphens inside a name are doubled."""
    found = _LVM_NAME.fullmatch(dm_name)
    if found is None:
        return "", ""
    return found[1].replace("--", "-"), found[2].replace("--", "-")


def lv_uuid(dm_uuid: str) -> str:
    """The UUID as ``lvs`` prints it; empty for what is no LV of its own (``…-cow``, ``…-real``)."""
    found = _LVM_UUID.fullmatch(dm_uuid)
    if found is None:
        return ""
    text, parts = found[1], []
    for length in (6, 4, 4, 4, 4, 4, 6):
        parts.append(text[:length])
        text = text[length:]
    return "-".join(parts)


_GROUP_UUID_END = len("LVM-") + 32
"""Where a volume's own UUID begins in that of device-mapper."""


def of_group(dm_uuid: str) -> str:
    """The beginning that the device-mapper UUIDs of all volumes of a group share; empty for what is none of LVM's."""
    return dm_uuid[:_GROUP_UUID_END] if dm_uuid.startswith("LVM-") else ""


_NOBODY_LOGGED_IN = 2**32 - 1
"""proc(5): the loginuid of what no login started."""


def user_name(root: Path = Path("/")) -> str:
    """Who runs this process: ``root``; ``root (alice)`` where alice logged in and became root, for the kernel keeps
    that (``loginuid``).
    """
    here, there = os.geteuid(), os.geteuid()
    with contextlib.suppress(OSError, ValueError):
        there = int((root / "proc/self/loginuid").read_text(encoding="ascii"))
    if there in (here, _NOBODY_LOGGED_IN):
        return _user(here)
    return f"{_user(here)} ({_user(there)})"


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


class System:
    """One view of a machine. Devices go by their kernel names (``sda1``, ``dm-3``); absent facts are ''."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self.has_nodes = root == Path("/")
        self._classes = root / "sys/class/block"

    def _text(self, path: Path) -> str:
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8", errors="surrogateescape").removesuffix("\n")
        return ""

    # --- the tree of devices ---------------------------------------------------------------------------

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All block devices, partitions included, in natural order."""
        try:
            found = [entry.name for entry in self._classes.iterdir()]
        except OSError:
            return ()
        return tuple(sorted(found, key=lambda name: [int(part) if part.isdigit() else part for part in _pieces(name)]))

    def directory(self, name: str) -> Path:
        """Where sysfs keeps a device."""
        return self._classes / name

    def attribute(self, name: str, path: str) -> str:
        """A sysfs attribute, stripped."""
        return self._text(self.directory(name) / path).strip()

    def raw(self, name: str, path: str) -> bytes:
        """A sysfs attribute that is not text."""
        with contextlib.suppress(OSError):
            return (self.directory(name) / path).read_bytes()
        return b""

    def number(self, name: str, path: str, default: int = 0) -> int:
        """A sysfs attribute that is a number."""
        text = self.attribute(name, path)
        return int(text) if text.lstrip("-").isdigit() else default

    def size(self, name: str) -> int:
        """Bytes of a device: sysfs counts in the kernel's own sectors, whatever the device's."""
        return self.number(name, "size") * SECTOR

    def uevent(self, name: str) -> dict[str, str]:
        """The kernel's own properties of a device."""
        lines = self._text(self.directory(name) / "uevent").splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def device_number(self, name: str) -> tuple[int, int]:
        """Major and minor; (0, 0) where there is none."""
        major, _, minor = self.attribute(name, "dev").partition(":")
        return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)

    @cached_property
    def _names_by_number(self) -> dict[tuple[int, int], str]:
        return {self.device_number(name): name for name in self.names}

    def name_of(self, major: int, minor: int) -> str:
        """The kernel name of a device number."""
        return self._names_by_number.get((major, minor), "")

    def node(self, name: str) -> str:
        """The device's node, by the kernel's own word; it need not exist where nothing manages /dev."""
        return "/dev/" + (self.uevent(name).get("DEVNAME") or name.replace("!", "/"))

    def name_at(self, path: str) -> str:
        """The block device that a path names, whether or not its node is there."""
        try:
            info = self._inside(path).stat()
        except (OSError, ValueError):
            return self._name_by_text(path)
        return self.name_of(os.major(info.st_rdev), os.minor(info.st_rdev)) if stat.S_ISBLK(info.st_mode) else ""

    def _inside(self, path: str) -> Path:
        return Path(path) if self.has_nodes else self.root / path.lstrip("/")

    def _name_by_text(self, path: str) -> str:
        if not path.startswith("/dev/"):
            return ""
        wanted = path.removeprefix("/dev/")
        if wanted.startswith("mapper/"):
            return self.mapped.get(wanted.removeprefix("mapper/"), "")
        direct = wanted.replace("/", "!")
        if direct in self.names:
            return direct
        group, _, volume = wanted.partition("/")
        return self.volume(group, volume)

    @cached_property
    def mapped(self) -> dict[str, str]:
        """Kernel names by device-mapper name."""
        return {self.attribute(name, "dm/name"): name for name in self.names if name.startswith("dm-")}

    def volume(self, group: str, volume: str) -> str:
        """The kernel name of an active logical volume."""
        if not group or not volume or "/" in volume:
            return ""
        return self.mapped.get(f"{group.replace('-', '--')}-{volume.replace('-', '--')}", "")

    def is_partition(self, name: str) -> bool:
        """Whether the kernel made it from a partition table."""
        return (self.directory(name) / "partition").exists()

    def whole(self, name: str) -> str:
        """The disk of a partition; anything else is its own."""
        return self.directory(name).resolve().parent.name if self.is_partition(name) else name

    @cached_property
    def _partitions(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            if self.is_partition(name):
                found.setdefault(self.whole(name), []).append(name)
        return found

    def partitions(self, name: str) -> list[str]:
        """The partitions of a disk, in order."""
        return self._partitions.get(name, [])

    def links(self, name: str, kind: str) -> list[str]:
        """``holders``: devices stacked on this one; ``slaves``: those this one is stacked on."""
        with contextlib.suppress(OSError):
            return sorted(entry.name for entry in (self.directory(name) / kind).iterdir())
        return []

    @cached_property
    def loops(self) -> dict[str, str]:
        """The file (or device) behind each loop device in use, as the kernel names it."""
        found = {}
        for name in self.names:
            if name.startswith("loop"):
                file = self._text(self.directory(name) / "loop/backing_file")
                if file:
                    found[name] = file
        return found

    def loop_file(self, name: str) -> tuple[int, int] | None:
        """st_dev and st_ino of a loop device's file, as far as its name can be followed."""
        try:
            info = self._inside(self.loops[name]).stat()
        except (KeyError, OSError, ValueError):
            return None
        return info.st_dev, info.st_ino

    @cached_property
    def bases(self) -> dict[str, tuple[str, ...]]:
        """What each device lies on directly: slaves, a partition's disk, a loop device's device."""
        return {name: tuple(self._bases(name)) for name in self.names}

    def _bases(self, name: str) -> Iterator[str]:
        yield from self.links(name, "slaves")
        if self.is_partition(name):
            yield self.whole(name)
        if name in self.loops:
            below = self.name_at(self.loops[name])
            if below:
                yield below

    @cached_property
    def _upward(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for upper, lowers in self.bases.items():
            for lower in lowers:
                found.setdefault(lower, []).append(upper)
        return found

    def below(self, name: str) -> set[str]:
        """The device and everything it is stacked on."""
        return set(_closure(name, lambda one: self.bases.get(one, ())))

    def above(self, name: str) -> list[str]:
        """The device, its partitions and everything stacked on any of them, the nearest first."""
        return _closure(name, lambda one: [*self._upward.get(one, ()), *self.links(one, "holders")])

    # --- mounts, swap, locks ---------------------------------------------------------------------------

    @cached_property
    def mounts(self) -> tuple[MountLine, ...]:
        """The mounts of this process's namespace."""
        return parse_mountinfo(self._text(self.root / "proc/self/mountinfo"))

    @cached_property
    def _mounted(self) -> dict[int, frozenset[str]]:
        return {line.id: frozenset(self._devices_of(line)) for line in self.mounts}

    def devices_of(self, line: MountLine) -> frozenset[str]:
        """The block devices that a mounted file system lies on; several with btrfs and external logs."""
        return self._mounted.get(line.id, frozenset())

    def _devices_of(self, line: MountLine) -> set[str]:
        found = {self.name_of(line.major, line.minor)} if line.major else set()
        if not line.major and line.source.startswith("/") and line.fstype not in ("tmpfs", "overlay"):
            # Anonymous numbers: btrfs and ntfs-3g name a device, bcachefs several.
            found |= {self.name_at(part) for part in line.source.split(":")}
        found |= {self.name_at(line.option(log)) for log in ("logdev", "rtdev") if line.option(log)}
        found.discard("")
        if line.fstype == "btrfs":
            found.update(*(members for members in self.btrfs if members & found))
        return found

    @cached_property
    def btrfs(self) -> list[set[str]]:
        """The devices of each mounted btrfs, in whatever namespace."""
        found = []
        for folder in self.root.glob("sys/fs/btrfs/*/devices"):
            with contextlib.suppress(OSError):  # unmounted meanwhile
                found.append({entry.name for entry in folder.iterdir()})
        return found

    def busy_filesystem(self, name: str) -> str:
        """The file system that the kernel itself keeps on a device, mounted here or elsewhere, or ''.

        ext4, xfs and f2fs have a directory for each of their devices while it is in use, even where another
        namespace mounted it or a lazy unmount is not over.
        """
        for fstype in ("ext4", "xfs", "f2fs"):
            if (self.root / "sys/fs" / fstype / name).is_dir():
                return fstype
        return "btrfs" if any(name in members for members in self.btrfs) else ""

    @cached_property
    def swaps(self) -> tuple[str, ...]:
        """Devices and files swapped to."""
        lines = self._text(self.root / "proc/swaps").splitlines()[1:]
        return tuple(unescape(line.split()[0]) for line in lines if line.strip())

    @cached_property
    def locks(self) -> tuple[LockLine, ...]:
        """Locks held by anybody."""
        return parse_locks(self._text(self.root / "proc/locks"))

    def locks_on(self, path: str, info: os.stat_result) -> list[LockLine]:
        """The locks held on a file or node, of which ``info`` is the stat."""
        numbers = {(os.major(info.st_dev), os.minor(info.st_dev))}
        line = self.mount_of(path)
        if line is not None:
            # The kernel names the file system's own number, which for btrfs is not the one stat gives.
            numbers.add((line.major, line.minor))
        return [lock for lock in self.locks if lock.inode == info.st_ino and (lock.major, lock.minor) in numbers]

    def mount_of(self, path: str) -> MountLine | None:
        """The mount that holds ``path``, or its nearest ancestor that exists."""
        place = os.path.realpath(path) if self.has_nodes else path
        number = _mount_id(place) if self.has_nodes else None
        for line in self.mounts:
            if line.id == number:
                return line
        below = [line for line in self.mounts if _is_below(place, line.target)]
        # The deepest, and of several on one directory the last: that is the one seen.
        return max(enumerate(below), key=lambda pair: (len(pair[1].target), pair[0]))[1] if below else None

    @cached_property
    def boot(self) -> str:
        """The id of this boot."""
        return self._text(self.root / "proc/sys/kernel/random/boot_id").strip()

    # --- udev ------------------------------------------------------------------------------------------

    def udev(self, name: str) -> dict[str, str]:
        """What udev found out about a device; empty where no udevd runs or libudev is missing."""
        if not (self.root / "run/udev/data").is_dir():
            return {}
        try:
            import pyudev
        except ImportError:
            return {}
        try:
            return dict(pyudev.Devices.from_name(self._udev_context, "block", name).properties)
        except (OSError, UnicodeError, pyudev.DeviceNotFoundError):
            return {}

    @cached_property
    def _udev_context(self) -> object:
        import pyudev

        return pyudev.Context()


def _pieces(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _closure(start: str, step: Callable[[str], Iterable[str]]) -> list[str]:
    found = {start: None}
    pending = [start]
    for one in pending:  # grows as it is walked
        for other in step(one):
            if other not in found:
                found[other] = None
                pending.append(other)
    return list(found)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _mount_id(path: str) -> int | None:
    """The id of the mount that holds a real path (proc(5), fdinfo): right for btrfs and binds as well."""
    place = Path(path)
    while True:
        try:
            descriptor = os.open(place, os.O_PATH | os.O_CLOEXEC)
            break
        except (OSError, ValueError) as error:
            if not isinstance(error, FileNotFoundError | NotADirectoryError) or place == place.parent:
                return None
            place = place.parent
    try:
        lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), None)


def without_deleted(file: str) -> str | None:
    """The name of a loop device's file, or None where the file has no name any more."""
    return None if file.endswith(_DELETED) and not os.path.exists(file) else file


def read_idly() -> None:
    """Ask for the disk only when nobody else does: for this thread, and those it starts from now on.

    Not every scheduler heeds it, and where it may not be asked nothing happens.
    """
    import psutil

    with contextlib.suppress(OSError, psutil.Error):
        psutil.Process().ionice(psutil.IOPRIO_CLASS_IDLE)


@contextlib.contextmanager
def reading_idly(wanted: bool = True) -> Iterator[None]:
    """``read_idly`` until the ``with`` is over, if it is wanted."""
    if not wanted:
        yield
        return
    import psutil

    before = None
    with contextlib.suppress(OSError, psutil.Error):
        before = psutil.Process().ionice()
    read_idly()
    try:
        yield
    finally:
        with contextlib.suppress(OSError, psutil.Error, ValueError):
            if before is not None:
                psutil.Process().ionice(before.ioclass, before.value or None)
