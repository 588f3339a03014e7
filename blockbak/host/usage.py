"""Who uses a device, what lies on it, and whether anything wrote to it.

Three questions stand between a person and a lost disk: is it in use, does it hold what must not be lost,
did it change while it was read. They are answered from the whole stack: partitions, device-mapper, md,
loop devices, file systems on several devices.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from blockbak.host.device import Device, table
from blockbak.host.marks import reading
from blockbak.host.proc import LockLine
from blockbak.host.system import System, lvm_names
from blockbak.model.partition import filesystem

What: TypeAlias = Literal["mounted", "swap", "held", "backing", "locked", "member"]

RUNNING_SYSTEM = ("/", "/usr", "/boot", "/boot/efi", "/efi", "/var", "/etc")
"""Directories without which the machine does not go on, or does not start again."""

_UDEV = ("systemd-udevd", "(udev-worker)")
"""It locks a disk for the moment in which it looks at it."""
_LOOP_GET_STATUS64 = 0x4C05
"""linux/loop.h; struct loop_info64 begins with u64 lo_device, lo_inode."""
_LOOP_INFO64_BYTES = 232


@dataclass(frozen=True, slots=True)
class Use:
    """One reason to leave a device alone: ``what`` for programs, ``detail`` for people ('mounted at /srv')."""

    what: What
    detail: str

    def __str__(self) -> str:
        return self.detail


# --- who uses it -----------------------------------------------------------------------------------------


def users(device: Device, system: System | None = None) -> list[Use]:
    """Everything that uses the device, its partitions, or anything stacked on them; empty if it is free.

    For a partition, what uses its whole disk counts too. For a file: loop devices, swap, locks of others.
    What a process does that only opened the device, without a lock, is not seen.
    """
    system = system or System()
    if not device.is_block:
        found = list(_file_users(device.path, system))
    else:
        found = [use for name in _concerned(device.kname, system) for use in _name_users(name, device, system)]
        found += _lock_uses(device.path, system, is_block=True)
        for loop in sorted(system.below(device.kname) & set(system.loops)):
            found += _sibling_users(loop, system)
    return list(dict.fromkeys(found))


def _concerned(name: str, system: System) -> list[str]:
    """The device with all above it; for a partition also its disk and all above but other partitions."""
    concerned = system.above(name)
    whole = system.whole(name)
    if whole != name:
        siblings = set(system.partitions(whole)) - {name}
        others = {one for sibling in siblings for one in system.above(sibling)} - set(concerned)
        concerned += [one for one in system.above(whole) if one not in others and one not in concerned]
    return concerned


def _name_users(name: str, device: Device, system: System) -> Iterator[Use]:
    where = "" if name == device.kname else f" ({system.attribute(name, 'dm/name') or name})"
    seen = False
    for line in system.mounts:
        if name in system.devices_of(line):
            seen = True
            yield Use("mounted", f"mounted at {line.target}{where}")
    fstype = system.busy_filesystem(name)
    if fstype and not seen:
        yield Use("mounted", f"mounted in another namespace or not yet let go ({fstype}){where}")
    if any(system.name_at(swap) == name for swap in system.swaps):
        yield Use("swap", f"swap{where}")
    for holder in system.links(name, "holders"):
        yield Use("held", _held(holder, system))
    for loop, file in system.loops.items():
        if system.name_at(file) == name:
            yield Use("backing", f"backing device of {system.node(loop)}{where}")


def _held(holder: str, system: System) -> str:
    if holder.startswith("md"):
        return f"part of {system.node(holder)}"
    mapped = system.attribute(holder, "dm/name")
    return f"held by {holder} ({mapped})" if mapped else f"held by {holder}"


def _file_users(path: str, system: System) -> Iterator[Use]:
    try:
        info = Path(path).stat()
    except OSError:
        return
    for loop in system.loops:
        if (info.st_dev, info.st_ino) in _loop_files(loop, system):
            yield Use("backing", f"backing file of {system.node(loop)}")
            for name in system.above(loop):
                yield from (
                    use for use in _name_users(name, _nobody, system) if use.what in ("mounted", "swap", "held")
                )
    for swap in system.swaps:
        with contextlib.suppress(OSError):
            if os.path.samestat(Path(swap).stat(), info):
                yield Use("swap", "swap")
    yield from _lock_uses(path, system, is_block=False)


def _sibling_users(loop: str, system: System) -> Iterator[Use]:
    """Who uses the same bytes by another way: locks on a loop device's file, and what stands on other loop
    devices over the same part of it. O_EXCL sees none of them, for they are other devices.
    """
    for other in _siblings(loop, system):
        for name in system.above(other) if _overlap(loop, other, system) else ():
            for use in _name_users(name, _nobody, system):
                yield Use(use.what, f"{use.detail}, over the same file")
    yield from _lock_uses(system.loops[loop], system, is_block=False)


def _siblings(loop: str, system: System) -> list[str]:
    """The other loop devices over its file."""
    files = _loop_files(loop, system)
    return [other for other in system.loops if other != loop and files & _loop_files(other, system)]


def _overlap(one: str, other: str, system: System) -> bool:
    """Whether two loop devices over one file show any byte of it in common."""
    first, second = ((start := system.number(name, "loop/offset"), start + system.size(name)) for name in (one, other))
    return first[0] < second[1] and second[0] < first[1]


_nobody = Device(path="", given="", is_block=False, size=0, kind="file")
"""No device: every name above it is worth saying."""


def _loop_files(loop: str, system: System) -> set[tuple[int, int]]:
    """st_dev and st_ino of the file behind a loop device, by its name and by the kernel's own word.

    The name fails where the file was deleted or lies in another namespace; the word needs permission.
    """
    found = {named} if (named := system.loop_file(loop)) else set()
    return found | _loop_word(loop, system)


def _loop_word(loop: str, system: System) -> set[tuple[int, int]]:
    """The kernel's own word of a loop device's file; empty where it may not be asked."""
    if not system.has_nodes:
        return set()
    try:
        descriptor = os.open(system.node(loop), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = fcntl.ioctl(descriptor, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
        finally:
            os.close(descriptor)
    except OSError:
        return set()
    return {struct.unpack_from("=QQ", status)}


def is_backing_file(loop: str, path: str, system: System) -> bool:
    """Whether a loop device shows the file that has this name now, and not one that had it before."""
    try:
        info = os.stat(path)
    except OSError:
        return False
    return (info.st_dev, info.st_ino) in (_loop_word(loop, system) or {(info.st_dev, info.st_ino)})


# --- locks -----------------------------------------------------------------------------------------------


def _lock_uses(path: str, system: System, *, is_block: bool) -> Iterator[Use]:
    """Locks that other processes hold on a file or a node; qemu locks both."""
    try:
        info = Path(path).stat()
    except OSError:
        return
    for lock in system.locks_on(path, info):
        if lock.pid != os.getpid():
            yield from _lock_use(lock, info, is_block=is_block)


def _lock_use(lock: LockLine, locked: os.stat_result, *, is_block: bool) -> Iterator[Use]:
    # The kernel names no process for a lock of an open file description: whoever has it open may be it.
    openers = [] if lock.pid else _openers(locked)
    holders = [lock.pid] if lock.pid else [pid for pid in openers if pid != os.getpid()]
    for pid in holders:
        name = _process_name(pid)
        if is_block and name in _UDEV:
            continue
        yield Use("locked", f"locked by process {pid}" + (f" ({name})" if name else ""))
    if not holders and os.getpid() not in openers:
        yield Use("locked", "locked by another process")


def _process_name(pid: int) -> str:
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def _openers(wanted: os.stat_result) -> list[int]:
    """Processes that have a file or node open, as far as they may be looked at."""
    import psutil

    found = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if any(_is_open_as(entry, wanted) for entry in Path(f"/proc/{pid}/fd").iterdir()):
                found.append(pid)
    return found


def _is_open_as(entry: Path, wanted: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(entry.stat(), wanted)
    return False


# --- what writing it would harm ---------------------------------------------------------------------------


def snapshots(device: Device, system: System | None = None) -> str:
    """Why a logical volume must not be overwritten though nothing uses it, in words; or an empty string.

    Its content before goes to the room of its thick snapshots, and when one of these is full, it is lost. A
    thick snapshot itself takes no more than its own room.
    """
    system = system or System()
    parts = system.links(device.kname, "slaves") if device.is_lv else []
    uuids = {below: system.attribute(below, "dm/uuid") for below in parts}
    if any(uuid.endswith("-cow") for uuid in uuids.values()):
        return "it is a snapshot, whose room may not do for all that is written"
    for below, uuid in uuids.items():
        if uuid.endswith("-real"):
            others = [one for one in system.links(below, "holders") if one != device.kname]
            names = ["/".join(lvm_names(system.attribute(one, "dm/name"))) for one in others]
            if names:
                return f"its snapshot {names[0]} would overflow and be lost"
    return ""


# --- what lies on it -------------------------------------------------------------------------------------


def memberships(device: Device, system: System | None = None) -> list[Use]:
    """Volume groups and arrays that own the device or a partition of it, active or not. Asked of targets.

    Read from the content, so a member is known where nothing has assembled it; partitions are looked for
    in the table as well as in the kernel. A physical volume in no group, and a file, belong to nothing; what
    a logical volume holds is a guest's, for LVM itself does not look into one (lvm.conf, scan_lvs).
    """
    if not device.is_block or device.is_lv:
        return []
    system = system or System()
    found = _member_uses(device.path, 0, device.size, "")
    known = system.partitions(device.kname)
    parts = table(device)
    for one in parts.partitions if parts and device.kind != "partition" else ():
        names = [name for name in known if system.number(name, "partition") == one.number]
        found += _member_uses(device.path, one.start, one.length, names[0] if names else f"partition {one.number}")
    return list(dict.fromkeys(found))


def _member_uses(path: str, start: int, length: int, where: str) -> list[Use]:
    with reading(path) as read:
        found = filesystem(
            lambda offset, count: read(start + offset, min(count, length - offset)) if offset < length else b"",
            length,
        )
    suffix = f" ({where})" if where else ""
    if found is None or (found.type == "LVM2_member" and not found.label):
        return []
    if found.type == "LVM2_member":
        return [Use("member", f"part of volume group {found.label}{suffix}")]
    if found.type == "linux_raid_member":
        return [Use("member", f"part of array {found.label or found.uuid}{suffix}")]
    return []


def files_below(device: Device, system: System | None = None) -> list[str]:
    """The files of the loop devices that a device is, or is stacked on."""
    system = system or System()
    if not device.kname:
        return []
    return [system.loops[loop] for loop in sorted(system.below(device.kname) & set(system.loops))]


def carries(device: Device, path: str, system: System | None = None) -> bool:
    """Whether ``path`` lies on the device, or in the image file, however many layers are in between.

    A path that does not exist yet lies where its nearest ancestor does. The node of a block device stands
    for the device; an image file carries itself.
    """
    system = system or System()
    names, files = _foundations(path, system)
    if device.is_block:
        loops = system.below(device.kname) & set(system.loops)
        # Another loop device over the same file leads to the same bytes.
        return device.kname in names or any(
            other in names and _overlap(loop, other, system) for loop in loops for other in _siblings(loop, system)
        )
    with contextlib.suppress(OSError):
        info = Path(device.path).stat()
        return (info.st_dev, info.st_ino) in files
    return False


def _foundations(path: str, system: System) -> tuple[set[str], set[tuple[int, int]]]:
    """All devices and image files (st_dev, st_ino) under ``path``."""
    names: set[str] = set()
    files: set[tuple[int, int]] = set()
    pending, seen = [path], set[str]()
    while pending:
        place = pending.pop()
        if place in seen:
            continue
        seen.add(place)
        starts = {direct} if (direct := system.name_at(place)) else set()
        if not starts:
            with contextlib.suppress(OSError, ValueError):
                info = Path(place).stat()
                if stat.S_ISREG(info.st_mode):
                    files.add((info.st_dev, info.st_ino))
            line = system.mount_of(place)
            if line is not None:
                starts = set(system.devices_of(line))
                pending += layers(line.fstype, line.source, line.options)
            else:
                starts = _by_number(place, system)
        for start in starts:
            names |= system.below(start)
        for loop in names & set(system.loops):
            files |= _loop_files(loop, system)
            pending.append(system.loops[loop])
    return names, files


def _by_number(place: str, system: System) -> set[str]:
    """The device that a path lies on, by its file system's number: after a chroot into a plain directory the
    mount that holds it is not in the list.
    """
    while place != os.path.dirname(place) and not os.path.exists(place):
        place = os.path.dirname(place)
    try:
        number = Path(place).stat().st_dev
    except (OSError, ValueError):
        return set()
    return {system.name_of(os.major(number), os.minor(number))} - {""}


def program_places() -> list[str]:
    """Where blockbak itself and its Python are."""
    return [str(Path(__file__).resolve().parent.parent), sys.prefix, sys.base_prefix, sys.executable]


def layers(fstype: str, source: str, options: tuple[str, ...]) -> list[str]:
    """The paths that a file system without a device of its own is made of: overlay's, and FUSE's source."""
    if fstype.startswith("fuse"):
        return [source] if source.startswith("/") else []
    if fstype != "overlay":
        return []
    wanted = ("lowerdir", "upperdir", "workdir", "lowerdir+")
    pairs = [option.partition("=") for option in options]
    return [part for key, _, value in pairs if key in wanted for part in value.split(":") if part.startswith("/")]


def holds_running_system(device: Device, system: System | None = None) -> str | None:
    """What of the running system the device carries ('/', '/boot', 'swap' …), or None."""
    system = system or System()
    for place in RUNNING_SYSTEM:
        if os.path.lexists(place) and carries(device, place, system):
            return place
    return "swap" if any(carries(device, swap, system) for swap in system.swaps) else None


# --- did it change ---------------------------------------------------------------------------------------


_COUNTED = (6, 11, 13)
"""Fields of ``stat`` (kernel, Documentation/block/stat.rst): sectors written, discards, sectors discarded. Not the
writes, of which a flush is one: anybody who closes the device may ask for it, and it changes nothing.
"""
_UNSETTLED = -1
"""Stands where the disk's partitions were too busy for a count of what went past them."""
_LOOKS = 20


def write_counters(device: Device, system: System | None = None) -> tuple[int, ...] | None:
    """The kernel's count of writes and discards done to the device and its partitions, for ``written``.

    For a partition also what was written through the whole disk's node, which counts on the disk alone; for a
    loop device that has its file to itself also the file's times. None for files, and where the kernel keeps no
    count (statistics switched off, or the device is gone). Writes still in the page cache are counted when they
    reach the device.
    """
    system = system or System()
    if not device.kname:
        return None
    whole = system.whole(device.kname)
    # Only drivers that queue requests heed the switch; others count always.
    if system.attribute(whole, "queue/iostats") == "0" and (system.directory(whole) / "mq").is_dir():
        return None
    counters: list[int] = []
    for name in (device.kname, *system.partitions(device.kname)):
        counts = _counts(name, system)
        if counts is None:
            return None
        counters += [*system.device_number(name), *counts]
    if whole != device.kname:
        counters += _past_partitions(whole, system)
    if device.kname in system.loops:
        counters += _past_loop(device.kname, system)
    return tuple(counters)


def _counts(name: str, system: System) -> tuple[int, ...] | None:
    fields = [int(field) for field in system.attribute(name, "stat").split()]
    if len(fields) < 7:
        return None
    return tuple(fields[at] if at < len(fields) else 0 for at in _COUNTED)


def _past_loop(loop: str, system: System) -> list[int]:
    """What tells of writes to a loop device's bytes by another way: the times of a file that it has to itself,
    else the counts of the other loop devices over the same part of it.
    """
    siblings = _siblings(loop, system)
    found: list[int] = []
    if not siblings:
        with contextlib.suppress(OSError):
            found += file_stamp(system.loops[loop])
    for other in siblings:
        if _overlap(loop, other, system):
            found += _counts(other, system) or ()
    return found


def _past_partitions(whole: str, system: System) -> list[int]:
    """What was done to a disk less what was done to its partitions. The counts are read one by one, so twice,
    until nothing moved in between.
    """
    names = (whole, *system.partitions(whole))
    before = [_counts(name, system) for name in names]
    for _ in range(_LOOKS):
        after = [_counts(name, system) for name in names]
        if before == after and None not in after:
            disk, *parts = (counts for counts in after if counts is not None)
            return [total - sum(part[at] for part in parts) for at, total in enumerate(disk)]
        before = after
    return [_UNSETTLED] * len(_COUNTED)


def written(before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> bool:
    """Whether anything was written between two ``write_counters``, or two ``file_stamp``s."""
    if before is None or after is None or len(before) != len(after):
        return before != after
    return any(one != other for one, other in zip(before, after, strict=True) if _UNSETTLED not in (one, other))


def file_stamp(path: str) -> tuple[int, int, int, int]:
    """Size, mtime and ctime in nanoseconds, and inode: differs if a file was written. Raises OSError."""
    info = Path(path).stat()
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


# --- what to do with it ----------------------------------------------------------------------------------


def decide_mode(device: Device, uses: list[Use]) -> tuple[str, str]:
    """How ``--mode auto`` takes a device of which these are the uses: ('cold', 'hot' or 'refused', and why)."""
    if not uses:
        return "cold", "not in use" if device.is_block else "image file"
    told = "in use: " + ", ".join(map(str, uses))
    if device.is_lv:
        return "hot", told
    return "refused", f"{told}; --mode cold brings it to rest, --mode live reads it as it is"
