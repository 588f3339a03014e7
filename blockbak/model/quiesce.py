"""Bringing a device to rest: what is done about whoever uses it, in which order, and what stays on it.

Everything here is a function of values; ``host.quiesce`` acts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from blockbak.model import mounting
from blockbak.model.scene import Layer, Loop, MountPoint, Occupant, Scene

MEMORY_SPARE = 64 << 20
"""Bytes that must stay free when what is swapped out comes back."""
FREEZABLE = frozenset({"bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "gfs2", "jfs", "nilfs2", "ocfs2", "xfs"})
"""File systems that know FIFREEZE (fs/super.c asks for freeze_fs or a block device; vfat has neither)."""


# --- what may be done, and what is ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RestOptions:
    """What may be done to bring a device to rest. ``deadline`` (seconds) bounds how long a file system is frozen."""

    stop: tuple[str, ...] = ()
    stop_users: bool = False
    kill: bool = False
    freeze: bool = False
    deactivate: bool = False
    hooks: tuple[str, ...] = ()
    deadline: float = 600.0

    @property
    def given(self) -> list[str]:
        """The options that ask for something, as they are called on the command line."""
        asked = {
            "--stop": self.stop, "--stop-users": self.stop_users, "--kill": self.kill, "--freeze": self.freeze,
            "--deactivate": self.deactivate, "--cold-hook": self.hooks,
        }  # fmt: skip
        return [name for name, value in asked.items() if value]


@dataclass(frozen=True, slots=True)
class RunHook:
    """A program that prepares an application, and once more when all is back."""

    name: str
    path: str
    environment: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"run hook {self.name}"


@dataclass(frozen=True, slots=True)
class StopUnits:
    """Units that are stopped in one go, those asked for first; all of them ran."""

    units: tuple[str, ...]
    wanted: tuple[str, ...] = ()

    def __str__(self) -> str:
        others = [one for one in self.units if one not in self.wanted]
        beside = f" (and with it {', '.join(others)})" if others else ""
        return f"stop {', '.join(self.wanted)}{beside}"


@dataclass(frozen=True, slots=True)
class EndProcess:
    """A process that is asked to end, then killed. Nothing brings it back."""

    pid: int
    started: int
    name: str

    def __str__(self) -> str:
        return f"end process {self.pid} ({self.name}), which is not started again"


@dataclass(frozen=True, slots=True)
class Unexport:
    """An NFS export that is taken back."""

    client: str
    path: str
    options: str

    def __str__(self) -> str:
        return f"no longer export {self.path} to {self.client}"


@dataclass(frozen=True, slots=True)
class SwapOff:
    """Swap that is given up. ``below`` are the areas that come after it by the kernel's own counting."""

    path: str
    priority: int
    identity: str = ""
    below: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"swapoff {self.path}"


@dataclass(frozen=True, slots=True)
class Unmount:
    """A mount that is taken off, with what is needed to make it again; for a bind mount ``origin`` is the
    directory that is bound.
    """

    target: str
    source: str
    fstype: str
    options: tuple[str, ...]
    root: str = "/"
    origin: str = ""
    identity: str = ""
    propagation: str = ""

    def __str__(self) -> str:
        return f"unmount {self.target}"


@dataclass(frozen=True, slots=True)
class DetachLoop:
    """A loop device that is taken off its file."""

    node: str
    file: str
    offset: int = 0
    size_limit: int = 0
    sector: int = 512
    read_only: bool = False
    direct: bool = False
    partitions: bool = False

    def __str__(self) -> str:
        return f"detach {self.node} from {self.file}"


@dataclass(frozen=True, slots=True)
class ReadOnly:
    """A file system that stays mounted and takes no writes."""

    target: str
    source: str
    identity: str = ""

    def __str__(self) -> str:
        return f"remount {self.target} read-only"


@dataclass(frozen=True, slots=True)
class Freeze:
    """A file system that stays mounted and is frozen."""

    target: str
    source: str

    def __str__(self) -> str:
        return f"freeze {self.target}"


@dataclass(frozen=True, slots=True)
class Deactivate:
    """The active volumes of a group."""

    group: str
    volumes: tuple[str, ...]

    def __str__(self) -> str:
        return f"deactivate {', '.join(self.volumes)}"


Step: TypeAlias = (
    RunHook | StopUnits | EndProcess | Unexport | SwapOff | Unmount | DetachLoop | ReadOnly | Freeze | Deactivate
)
STEPS: tuple[type[Step], ...] = (
    RunHook, StopUnits, EndProcess, Unexport, SwapOff, Unmount, DetachLoop, ReadOnly, Freeze, Deactivate,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Blocked:
    """Something that keeps the device in use and that nothing may be done about, why, and what would help."""

    what: str
    why: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.why}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """The steps in their order; what stands against it; and what is left on the device at rest: mounts by target
    (``read-only`` or ``frozen``) and layers by kernel name.
    """

    steps: tuple[Step, ...]
    blocked: tuple[Blocked, ...] = ()
    staying: Mapping[str, str] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()

    @property
    def frozen(self) -> tuple[Freeze, ...]:
        """The file systems to be frozen."""
        return tuple(step for step in self.steps if isinstance(step, Freeze))

    def told(self) -> list[str]:
        """The plan for people, in the order in which it will happen."""
        return [str(step) for step in self.steps]


# --- the plan -----------------------------------------------------------------------------------------------


def plan(scene: Scene, options: RestOptions, hooks: Sequence[RunHook] = ()) -> Plan:
    """How the device comes to rest. ``blocked`` is empty where it can."""
    blocked: list[Blocked] = []
    stopped, units = _units(scene, options, blocked)
    left, ended = _processes(scene, options, stopped)
    stays = _staying(scene, left, blocked)
    still: list[ReadOnly | Freeze] = []
    staying: dict[str, str] = {}
    for one in _filesystems(scene, stays):
        _still(one, scene, left, options, still, staying, blocked)
    _nodes(left, blocked)
    swaps = _swaps(scene, blocked)
    exports = [Unexport(one.client, one.path, one.options) for one in scene.exports]
    off = _taken_off(scene, stays)
    gone_loops = {one.name for one in scene.loops if one.mount not in stays}
    layers = [one for one in scene.layers if not _is_gone(one, gone_loops, scene)]
    groups = _groups(layers, scene, staying, options, blocked)
    gone = {volume for one in groups for volume in one.volumes}
    steps: list[Step] = [*hooks, *units, *ended, *exports, *swaps, *off, *still, *groups]
    held = frozenset(one.name for one in layers if one.kind != "partition" and one.label not in gone)
    return Plan(tuple(steps), tuple(dict.fromkeys(blocked)), staying, held, tuple(_notes(left)))


def _units(scene: Scene, options: RestOptions, blocked: list[Blocked]) -> tuple[set[str], list[StopUnits]]:
    """The units that will not run, and the step that sees to it."""
    wanted = list(dict.fromkeys(options.stop))
    if options.stop_users:
        users = [one.unit for one in scene.occupants if one.unit]
        wanted += [unit for unit in dict.fromkeys(users) if unit not in wanted and not _protected(unit, scene)]
    names: list[str] = []
    asked = []
    for name in wanted:
        unit = scene.units.get(name)
        if unit is None or not unit.active:
            continue
        reason = next((found for one in (name, *unit.also) if (found := _protected(one, scene))), "")
        if reason:
            blocked.append(Blocked(f"unit {name}", f"it is never stopped: {reason}"))
            continue
        asked.append(name)
        names += [one for one in (name, *unit.also) if one not in names]
    return set(names), [StopUnits(tuple(names), tuple(asked))] if names else []


def _protected(name: str, scene: Scene) -> str:
    unit = scene.units.get(name)
    return unit.protected if unit is not None else ""


def _processes(scene: Scene, options: RestOptions, stopped: set[str]) -> tuple[list[Occupant], list[EndProcess]]:
    """The processes that will still be there, and the steps for those that will not."""
    left, ended = [], []
    for one in scene.occupants:
        if one.unit in stopped:
            continue
        if options.kill and not one.protected:
            ended.append(EndProcess(one.pid, one.started, one.name))
        else:
            left.append(one)
    return left, ended


def _staying(scene: Scene, left: Iterable[Occupant], blocked: list[Blocked]) -> set[int]:
    """The mounts that cannot be taken off, by id: busy, or holding what must go on; and those they stand on."""
    stays = {number for one in left for number in one.mounts}
    # Memory, other machines' files, a file without a name: once taken off, what is in there is gone.
    stays |= {one.id for one in scene.mounts if not one.again} | {one.mount for one in scene.loops if not one.again}
    for one in scene.mounts:
        if one.is_own and one.fstype.startswith("fuse"):
            why = "a program serves it, which could not be started again as it was"
            blocked.append(Blocked(one.target, why, "unmount it first"))
        if one.id in scene.kept:
            stays.add(one.id)
            blocked.append(Blocked(f"{one.target}", f"it holds {scene.kept[one.id]}", _kept_advice(one, scene)))
    known = {one.id: one for one in scene.mounts}
    loops = {one.name: one.mount for one in scene.loops}
    pending = [known[number] for number in stays if number in known]
    while pending:
        one = pending.pop()
        # What it is mounted on, and, where it lies on a loop device, the mount of that device's file.
        for lower in (
            one.parent,
            *one.layers,
            *(loops[name] for name in _loops_below(one.device, scene) if name in loops),
        ):
            if lower in known and lower not in stays:
                stays.add(lower)
                pending.append(known[lower])
    return stays


def _loops_below(name: str, scene: Scene) -> list[str]:
    """The loop devices among a layer and those it stands on."""
    layers = {one.name: one for one in scene.layers}
    found, pending = [], [name]
    while pending:
        one = pending.pop()
        if one in {loop.name for loop in scene.loops}:
            found.append(one)
        pending += layers[one].below if one in layers else ()
    return found


def _kept_advice(mount: MountPoint, scene: Scene) -> str:
    if mount.id in scene.system:
        return (
            "it cannot be taken off while the system runs: take it hot if it is a logical volume, or with "
            "'blockbak cold --at-next-boot'"
        )
    return "keep that on another disk"


def _filesystems(scene: Scene, stays: set[int]) -> list[MountPoint]:
    """One mount of each file system of the device that stays mounted; inner ones first."""
    found: dict[str, MountPoint] = {}
    for one in scene.mounts:
        if one.id in stays and one.is_own:
            found.setdefault(one.number, one)
    return list(reversed(found.values()))


def _still(
    mount: MountPoint, scene: Scene, left: Sequence[Occupant], options: RestOptions,
    still: list[ReadOnly | Freeze], staying: dict[str, str], blocked: list[Blocked],
) -> None:  # fmt: skip
    """What is done to a file system that stays mounted, so that nothing is written to it."""
    same = {one.id for one in scene.mounts if one.number == mount.number}
    if same & set(scene.kept):
        return  # told already
    for one in scene.mounts:
        if one.number == mount.number:
            staying[one.target] = "read-only"
    if not mount.writable:
        return
    if any(one.own and one.writes & same for one in left):
        # It would hang at its next word, and nobody would be there to thaw it.
        blocked.append(Blocked(mount.target, "blockbak itself writes there", "send its output elsewhere"))
        return
    writers = [str(one) for one in left if one.writes & same]
    writers += [f"{one.node} over {one.file}" for one in scene.loops if one.mount in same and not one.read_only]
    if not writers:
        still.append(ReadOnly(mount.target, mount.source, mount.identity))
        return
    if options.freeze and mount.fstype in FREEZABLE:
        still.append(Freeze(mount.target, mount.source))
        for one in scene.mounts:
            if one.number == mount.number:
                staying[one.target] = "frozen"
        return
    advice = "--stop-users or --stop the unit, --kill the process"
    advice += ", or --freeze the file system" if mount.fstype in FREEZABLE else ""
    blocked.append(Blocked(mount.target, f"written by {'; '.join(writers)}", advice))


def _nodes(left: Iterable[Occupant], blocked: list[Blocked]) -> None:
    for one in left:
        if one.raw_writes:
            nodes = ", ".join(sorted(one.raw_writes))
            blocked.append(Blocked(nodes, f"open for writing by {one}", "--stop-users, --stop or --kill"))
        for target in sorted(one.elsewhere):
            why = f"mounted in the mount namespace of {one}"
            blocked.append(Blocked(target, why, "--stop-users, --stop or --kill"))


def _swaps(scene: Scene, blocked: list[Blocked]) -> list[SwapOff]:
    needed = sum(one.used for one in scene.swaps)
    if scene.swaps and needed and needed + MEMORY_SPARE > scene.memory:
        what = ", ".join(one.path for one in scene.swaps)
        why = f"{needed} bytes are swapped out to it, and {scene.memory} bytes of memory are available"
        blocked.append(Blocked(what, why, "end what needs so much memory"))
    return [SwapOff(one.path, one.priority, one.identity, one.below) for one in scene.swaps]


def _taken_off(scene: Scene, stays: set[int]) -> list[Unmount | DetachLoop]:
    """Unmounts and loop devices, what lies on top first."""
    steps: list[Unmount | DetachLoop] = []
    loops = {one.name: one for one in scene.loops}
    done: set[str] = set()
    for one in reversed(scene.mounts):
        if one.id in stays:
            continue
        for loop in scene.loops:
            # A mount's loop devices go before it; what was mounted from them comes later in the list, so is gone.
            if loop.mount == one.id and loop.name not in done:
                done.add(loop.name)
                steps.append(_detach(loops[loop.name]))
        steps.append(
            Unmount(
                one.target, one.source, one.fstype, one.options, one.root, _origin(one, scene), one.identity,
                one.propagation,
            )
        )  # fmt: skip
    return steps


def _detach(loop: Loop) -> DetachLoop:
    return DetachLoop(
        loop.node, loop.file, loop.offset, loop.size_limit, loop.sector, loop.read_only, loop.direct, loop.partitions
    )


def _origin(mount: MountPoint, scene: Scene) -> str:
    """The directory that a bind mount shows: on an earlier mount of the same file system. Empty for an ordinary
    mount, also one of a btrfs subvolume, which names itself in the options.
    """
    if mounting.shows_all(mount.fstype, mount.root, mount.options):
        return ""
    for one in scene.mounts:
        if one.id == mount.id:
            break
        base = one.root.rstrip("/")
        if one.number == mount.number and (mount.root + "/").startswith(base + "/"):
            return one.target.rstrip("/") + mount.root[len(base) :]
    return ""


def _is_gone(layer: Layer, gone_loops: set[str], scene: Scene) -> bool:
    return any(name in gone_loops for name in _loops_below(layer.name, scene))


def _groups(
    layers: Sequence[Layer], scene: Scene, staying: Mapping[str, str], options: RestOptions, blocked: list[Blocked]
) -> list[Deactivate]:
    """Groups whose volumes are given up, if that was asked for."""
    if not options.deactivate:
        return []
    busy = {one.device for one in scene.mounts if one.target in staying}
    found: dict[str, list[str]] = {}
    for one in layers:
        if not one.group:
            continue
        if one.name in busy:
            blocked.append(Blocked(one.label, "it stays mounted, so its group cannot be deactivated"))
        found.setdefault(one.group, []).append(one.label)
    return [Deactivate(group, tuple(volumes)) for group, volumes in found.items()]


def _notes(left: Iterable[Occupant]) -> list[str]:
    return [f"{one} only reads {', '.join(sorted(one.nodes))}." for one in left if one.nodes and not one.raw_writes]


# --- whether it is so ---------------------------------------------------------------------------------------


def remaining(scene: Scene, made: Plan) -> list[Blocked]:
    """What uses the device though it should be at rest by ``made``; empty where it is."""
    found = []
    for one in scene.mounts:
        if not one.is_own:
            continue
        how = made.staying.get(one.target)
        if how is None:
            found.append(Blocked(one.target, "it is mounted"))
        elif how == "read-only" and one.writable:
            found.append(Blocked(one.target, "it takes writes"))
    found += [
        Blocked(target, f"mounted in the mount namespace of {one}")
        for one in scene.occupants
        for target in sorted(one.elsewhere)
    ]
    found += [Blocked(one.path, "it is swapped to") for one in scene.swaps]
    found += [Blocked(one.label, "it stands on the device") for one in scene.layers
              if one.kind != "partition" and one.name not in made.layers]  # fmt: skip
    found += [Blocked(", ".join(sorted(one.raw_writes)), f"open for writing by {one}") for one in scene.occupants
              if one.raw_writes]  # fmt: skip
    return found
