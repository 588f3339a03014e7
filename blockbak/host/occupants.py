"""Who uses a device and all that is stacked on it: mounts in every namespace, processes, swap, loop devices, exports.

The kernel is asked by mount id, not by path: what was mounted over, moved or unlinked is found, and no file is
looked up, so that a network file system that does not answer holds nobody up.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blockbak.host import device as devices
from blockbak.host import usage
from blockbak.host.device import Device
from blockbak.host.proc import MountLine, parse_mountinfo, unescape
from blockbak.host.system import System, lv_uuid, lvm_names, without_deleted
from blockbak.model.mounting import parts
from blockbak.model.scene import Export, Layer, Loop, MountPoint, Occupant, Scene, SwapArea, Unit

_RUNNING = ("/", "/usr", "/etc", "/run", "/dev", "/proc", "/sys")
"""Without these no command runs that could put them back."""
_EXPORTS = "/var/lib/nfs/etab"
_LOCAL = frozenset({"devtmpfs", "tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "rootfs", "overlay"})
"""File systems on which a file can be asked what it is without waiting for another machine."""
_PATH_ONLY = 0o10000000
"""O_PATH in fdinfo's flags (asm-generic/fcntl.h)."""
_EXPORT = re.compile(r"(\S+)\s+(\S+?)\((\S*)\)")
_UNIX_PATH = re.compile(r"^\S+: \S+ \S+ \S+ \S+ \S+ +(\d+) (/.*)$")
_REASONS_MOST = 8
_UNLINKED = "//deleted"
"""What the kernel appends to a bind mount's root that has no name any more (fs/d_path.c)."""


def look(
    device: Device,
    kept: Mapping[str, str],
    *,
    units: Callable[[Iterable[str]], Mapping[str, Unit]] = lambda _: {},
    named: Sequence[str] = (),
    system: System | None = None,
) -> Scene:
    """All that uses a block device. ``kept`` says of paths what they hold that must go on; ``units`` tells of
    systemd units by name, and is asked for those of users and for those ``named``.
    """
    system = system or System()
    around = _around(device, system)
    found = _occupants(around)
    wanted = [*named, *(one.unit for one in found)]
    return Scene(
        device=device.label,
        name=device.kname,
        layers=tuple(_layer(name, system) for name in around.names if name != device.kname),
        mounts=tuple(around.point(line) for line in around.lines),
        swaps=tuple(_swaps(around, system)),
        loops=tuple(_loop(name, around, system) for name in around.loops),
        exports=tuple(_exports(around, system)),
        occupants=tuple(found),
        units=units([name for name in dict.fromkeys(wanted) if name]),
        kept=_kept(around, kept, system),
        system=frozenset(line.id for line in around.lines if line.target in _RUNNING),
        memory=_available(),
    )


def everybody(system: System | None = None) -> dict[str, tuple[str, ...]]:
    """Who uses each device, in short, by its kernel name: units, and processes of none. A disk's are those of all
    that is stacked on it. As far as we may look at other people's processes.
    """
    system = system or System()
    lines = [line for line in system.mounts if system.devices_of(line)]
    around = _Around(system, list(system.names), lines)
    at = {line.id: system.devices_of(line) for line in lines}
    found: dict[str, dict[str, int]] = {}
    for one in _occupants(around):
        if one.own:
            continue
        names = set(one.nodes).union(*(at.get(number, frozenset()) for number in one.mounts))
        who = one.unit or f"{one.name} ({one.pid})"
        for below in {lower for name in names for lower in system.below(name)}:
            counts = found.setdefault(below, {})
            counts[who] = counts.get(who, 0) + 1
    return {name: tuple(sorted(counts)) for name, counts in found.items()}


def find(identity: str) -> str:
    """The node of the present device with that identity, as ``MountPoint.identity`` has it; empty if none has."""
    system = System()
    for one in devices.devices(system):
        if str(devices.identity(one, system)) == identity:
            return one.path
    return ""


# --- what is stacked on it ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Around:
    """The device's family: kernel names, mounts, and loop devices over files of these mounts (name to mount id)."""

    system: System
    names: list[str]
    lines: list[MountLine] = field(default_factory=list)
    loops: dict[str, int] = field(default_factory=dict)

    def own(self, line: MountLine) -> str:
        """The device of the family that a mount lies on, or an empty string."""
        found = self.system.devices_of(line)
        return next((name for name in reversed(self.names) if name in found), "")

    def point(self, line: MountLine) -> MountPoint:
        name = self.own(line)
        identity = str(devices.identity(devices.block(name, self.system), self.system)) if name else ""
        return MountPoint(
            id=line.id, parent=line.parent, device=name, target=line.target, root=line.root, fstype=line.fstype,
            source=line.source, options=line.options, writable=line.writable, number=f"{line.major}:{line.minor}",
            identity=identity, propagation=" ".join(line.tags), again=self._again(line),
            layers=tuple(self.layers(line)),
        )  # fmt: skip

    def layers(self, line: MountLine) -> Iterator[int]:
        """The ids of the mounts that hold what a mount without a device of its own is made of."""
        for path in usage.layers(line.fstype, line.source, line.options):
            one = self.system.mount_of(path)
            if one is not None and one.id != line.id:
                yield one.id

    def _again(self, line: MountLine) -> bool:
        """Whether it can be mounted once more with what is in it: only what lies on a block device can."""
        return bool(self.system.devices_of(line)) and not line.root.endswith(_UNLINKED)

    @property
    def numbers(self) -> set[tuple[int, int]]:
        """Device numbers by which files of these file systems go, and nodes of these devices."""
        mounted = {(line.major, line.minor) for line in self.lines if self.own(line)}
        return mounted | {self.system.device_number(name) for name in self.names}


def _around(device: Device, system: System) -> _Around:
    around = _Around(system, system.above(device.kname))
    while True:
        ids = {line.id for line in around.lines}
        grown = [line for line in system.mounts if line.id in ids or _belongs(line, ids, around)]
        if len(grown) == len(around.lines):
            return around
        around.lines = grown
        for loop, file in system.loops.items():
            line = system.mount_of(file)
            if loop not in around.loops and line is not None and any(line.id == one.id for one in grown):
                around.loops[loop] = line.id
                around.names += [name for name in system.above(loop) if name not in around.names]


def _belongs(line: MountLine, ids: set[int], around: _Around) -> bool:
    if line.parent in ids or around.own(line):
        return True
    return any(one in ids for one in around.layers(line))


def _layer(name: str, system: System) -> Layer:
    uuid = system.attribute(name, "dm/uuid")
    kind = "partition" if system.is_partition(name) else "loop" if name.startswith("loop") else "raid"
    label, group = system.node(name), ""
    if uuid or (system.directory(name) / "dm").is_dir():
        kind = "crypt" if uuid.startswith("CRYPT-") else "mapping"
        label = f"/dev/mapper/{system.attribute(name, 'dm/name')}"
        if lv_uuid(uuid):
            group, volume = lvm_names(system.attribute(name, "dm/name"))
            kind, label = "volume", f"{group}/{volume}"
    return Layer(name, label, kind, group, tuple(system.bases.get(name, ())))


def _loop(name: str, around: _Around, system: System) -> Loop:
    return Loop(
        name=name, node=system.node(name), file=system.loops[name], mount=around.loops[name],
        offset=system.number(name, "loop/offset"), size_limit=system.number(name, "loop/sizelimit"),
        sector=system.number(name, "queue/logical_block_size", 512), read_only=system.attribute(name, "ro") == "1",
        direct=system.attribute(name, "loop/dio") == "1", partitions=system.attribute(name, "loop/partscan") == "1",
        again=_is_file_of(name, system),
    )  # fmt: skip


def _is_file_of(loop: str, system: System) -> bool:
    """Whether the name of a loop device's file still leads to that file."""
    file = without_deleted(system.loops[loop])
    return file is not None and usage.is_backing_file(loop, file, system)


def _kept(around: _Around, kept: Mapping[str, str], system: System) -> dict[int, str]:
    ids = {line.id for line in around.lines}
    found = {line.id: "the running system" for line in around.lines if line.target in _RUNNING}
    for path, what in kept.items():
        line = system.mount_of(path)
        if line is not None and line.id in ids:
            found.setdefault(line.id, what)
    return found


# --- swap, exports, memory ----------------------------------------------------------------------------------


def _swaps(around: _Around, system: System) -> Iterator[SwapArea]:
    lines = [line.split() for line in Path("/proc/swaps").read_text(encoding="utf-8").splitlines()[1:]]
    areas = [(unescape(one[0]), int(one[3]) << 10, int(one[4])) for one in lines if len(one) >= 5]
    ids = {line.id for line in around.lines}
    for path, used, priority in areas:
        name = system.name_at(path)
        line = None if name else system.mount_of(path)
        if name not in around.names and (line is None or line.id not in ids):
            continue
        identity = str(devices.identity(devices.block(name, system), system)) if name else ""
        below = tuple(other for other, _, its in areas if its < priority < 0)
        yield SwapArea(path, priority, used, identity, 0 if line is None else line.id, below)


def parse_exports(text: str) -> list[tuple[str, str, str]]:
    """Path, client and options of each line of exportfs's etab."""
    found = (_EXPORT.match(line) for line in text.splitlines())
    return [(unescape(one[1]), one[2], one[3]) for one in found if one is not None]


def _exports(around: _Around, system: System) -> Iterator[Export]:
    with contextlib.suppress(OSError):
        ids = {line.id for line in around.lines}
        for path, client, options in parse_exports(Path(_EXPORTS).read_text(encoding="utf-8")):
            line = system.mount_of(path)
            if line is not None and line.id in ids:
                yield Export(client, path, options, line.id)


def _available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


# --- processes ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Namespace:
    """The mounts of one mount namespace: all by id; which of ours those of the family are (0: none of them); and
    those of the family that do not follow when ours are taken off.
    """

    mounts: dict[int, MountLine]
    ours: dict[int, int]
    apart: list[MountLine]


@dataclass(slots=True)
class _Holding:
    """What one process holds, while it is looked at."""

    mounts: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    nodes: set[str] = field(default_factory=set)
    raw_writes: set[str] = field(default_factory=set)
    elsewhere: set[str] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def because(self, reason: str) -> None:
        if reason not in self.reasons and len(self.reasons) < _REASONS_MOST:
            self.reasons.append(reason)


def _occupants(around: _Around) -> list[Occupant]:
    import psutil

    found: list[Occupant] = []
    spaces: dict[str, _Namespace] = {}
    sockets = _sockets(around)
    family = {os.getpid(), *(one.pid for one in psutil.Process().parents())}
    for pid in psutil.pids():
        try:
            space = os.readlink(f"/proc/{pid}/ns/mnt")
            if space not in spaces:
                spaces[space] = _namespace(pid, around)
            held = _held(pid, spaces[space], around, sockets)
        except OSError:
            continue  # over meanwhile, or a thread of the kernel's
        if pid == os.getpid():
            # What is read here is none of its business; what it sits on, or says its words to, is.
            held.nodes.clear()
            held.raw_writes.clear()
        if held.mounts or held.nodes or held.elsewhere:
            with contextlib.suppress(OSError):
                found.append(_occupant(pid, held, family))
    return found


def _occupant(pid: int, held: _Holding, family: set[int]) -> Occupant:
    name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    protected = ""
    if pid == os.getpid():
        protected = "it is blockbak"
    elif pid == 1:
        protected = "it is the first process"
    elif pid in family:
        protected = "blockbak runs under it"
    elif os.getpgid(pid) == os.getpgrp():
        # What takes the image out of a pipe, or the script around it.
        protected = "it is of one job with blockbak"
    elif name in ("sshd", "sshd-session"):
        protected = "people log in by it"
    return Occupant(
        pid=pid, started=started(pid), name=name, unit=unit_of(pid), mounts=frozenset(held.mounts),
        writes=frozenset(held.writes), nodes=frozenset(held.nodes), raw_writes=frozenset(held.raw_writes),
        elsewhere=frozenset(held.elsewhere),
        reasons=tuple(held.reasons), protected=protected, own=pid == os.getpid(),
    )  # fmt: skip


def started(pid: int) -> int:
    """When a process began, in clock ticks since boot (proc(5), stat, field 22). Raises OSError."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return int(text.rpartition(")")[2].split()[19])


def unit_of(pid: int) -> str:
    """The service of the system's own manager that a process belongs to; empty for those of people's sessions."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if (number == "0" or controllers == "name=systemd") and not path.startswith("/user.slice/"):
                parts = [part for part in path.split("/") if part.endswith(".service")]
                if parts:
                    return parts[0]
    return ""


def _namespace(pid: int, around: _Around) -> _Namespace:
    text = Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    lines = parse_mountinfo(text)
    own = {line.id: line.id for line in around.lines}
    numbers = around.numbers
    ours = dict(own)
    for line in lines:
        if line.id not in own and (line.major, line.minor) in numbers:
            same = [one for one in around.lines if (one.major, one.minor) == (line.major, line.minor)]
            exact = [one for one in same if one.root == line.root]
            ours[line.id] = (exact or same)[0].id if same else 0
    theirs = {line.id: line for line in lines}
    apart = [line for line in lines if line.id in ours and line.id not in own and not _follows(line, theirs, around)]
    return _Namespace(theirs, ours, apart)


def _follows(line: MountLine, theirs: Mapping[int, MountLine], around: _Around) -> bool:
    """Whether a mount in another namespace goes and comes with ours of the same place, and is the same there: with
    our options, and nothing mounted on it but what is on ours.
    """
    here = {one.id: one for one in around.system.mounts}
    same = [one for one in around.lines if (one.target, one.root) == (line.target, line.root)]
    if not same or parts(same[-1].options)[0] != parts(line.options)[0]:
        return False
    # What an unmount reaches is decided by where it is mounted (mount_namespaces(7)).
    above, over = here.get(same[-1].parent), theirs.get(line.parent)
    groups = {tag.partition(":")[2] for tag in above.tags if tag.startswith("shared:")} if above is not None else set()
    reached = over is not None and any(
        tag.partition(":")[2] in groups for tag in over.tags if tag.startswith(("shared:", "master:"))
    )
    on_ours = {one.target for one in here.values() if one.parent == same[-1].id}
    return reached and all(one.target in on_ours for one in theirs.values() if one.parent == line.id)


def _sockets(around: _Around) -> dict[str, tuple[int, str]]:
    """Sockets bound to names on these mounts, by their inode: the mount's id and the name."""
    found: dict[str, tuple[int, str]] = {}
    ids = {line.id for line in around.lines}
    with contextlib.suppress(OSError):
        for text in Path("/proc/net/unix").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            one = _UNIX_PATH.match(text)
            if one is not None and any(one[2].startswith(line.target.rstrip("/") + "/") for line in around.lines):
                line = around.system.mount_of(one[2])
                if line is not None and line.id in ids:
                    found[one[1]] = line.id, one[2]
    return found


def _held(pid: int, space: _Namespace, around: _Around, sockets: Mapping[str, tuple[int, str]]) -> _Holding:
    """Everything a process holds of the family. Raises OSError where it is over."""
    held = _Holding()
    for what, words in (("cwd", "working directory"), ("root", "root directory"), ("exe", "program")):
        with contextlib.suppress(OSError):
            number = _mount_id_of(f"/proc/{pid}/{what}")
            if number in space.ours:
                held.mounts.add(space.ours[number])
                held.because(f"{words} {os.readlink(f'/proc/{pid}/{what}')}")
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            _descriptor(pid, entry, space, around, sockets, held)
    _mapped(pid, around, held)
    for line in space.apart:
        if space.ours[line.id]:
            held.mounts.add(space.ours[line.id])
            held.because(f"has {line.target} mounted in a mount namespace of its own")
        else:
            held.elsewhere.add(line.target)
    held.mounts.discard(0)
    held.writes.discard(0)
    return held


def _mount_id_of(path: str) -> int:
    """The id of the mount that a link of /proc leads to. Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return _info(f"/proc/self/fdinfo/{descriptor}")[0]
    finally:
        os.close(descriptor)


def _info(path: str) -> tuple[int, int]:
    """Mount id and flags of an open file. Raises OSError."""
    fields = dict(line.split(":", 1) for line in Path(path).read_text(encoding="ascii").splitlines() if ":" in line)
    return int(fields.get("mnt_id", "0")), int(fields.get("flags", "0").strip(), 8)


def _descriptor(
    pid: int, entry: str, space: _Namespace, around: _Around, sockets: Mapping[str, tuple[int, str]], held: _Holding
) -> None:
    path = f"/proc/{pid}/fd/{entry}"
    name = os.readlink(path)
    if name.startswith("socket:["):
        bound = sockets.get(name[len("socket:[") : -1])
        if bound is not None:
            held.mounts.add(bound[0])
            held.because(f"socket {bound[1]}")
        return
    number, flags = _info(f"/proc/{pid}/fdinfo/{entry}")
    writes = flags & os.O_ACCMODE != os.O_RDONLY and not flags & _PATH_ONLY
    mount = space.ours.get(number)
    line = space.mounts.get(number)
    if mount is None and (line is None or line.fstype not in _LOCAL or not name.startswith("/")):
        return
    info = os.stat(path)
    if mount is not None:
        held.mounts.add(mount)
        # A file without a name is still to be removed, and that is a write (kernel, sb_prepare_remount_readonly).
        if stat.S_ISREG(info.st_mode) and (writes or info.st_nlink == 0):
            held.writes.add(mount)
        held.because(f"{'writes' if writes else 'has open'} {name}")
    if stat.S_ISBLK(info.st_mode) and not flags & _PATH_ONLY:
        device = around.system.name_of(os.major(info.st_rdev), os.minor(info.st_rdev))
        if device in around.names:
            held.nodes.add(device)
            if writes:
                held.raw_writes.add(device)
            held.because(f"{'writes' if writes else 'reads'} {name}")


def _mapped(pid: int, around: _Around, held: _Holding) -> None:
    """Files that are mapped, though their descriptors may be closed."""
    numbers = {(line.major, line.minor): line.id for line in reversed(around.lines) if around.own(line)}
    if not numbers:
        return
    for text in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = text.split(None, 5)
        if len(fields) < 6 or fields[4] == "0":
            continue
        major, _, minor = fields[3].partition(":")
        mount = numbers.get((int(major, 16), int(minor, 16)))
        if mount is None:
            continue
        if mount not in held.mounts:
            held.because(f"has mapped {fields[5]}")
        held.mounts.add(mount)
        if fields[1].startswith("rw") and fields[1].endswith("s"):
            held.writes.add(mount)
