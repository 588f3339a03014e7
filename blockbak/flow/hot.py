"""Hot sources: logical volumes read from snapshots that last only as long as the reading."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from blockbak.errors import NotTogether, SetVoid, SnapshotError, SourceChangedSize
from blockbak.flow.context import Context
from blockbak.flow.leftovers import settle
from blockbak.flow.source import Circumstances, Seen, Settled, group_metadata
from blockbak.host import hooks, lvm, runner, runs, scanners, usage
from blockbak.host.blockio import SourceReader
from blockbak.host.device import Device
from blockbak.host.hooks import Rest
from blockbak.host.mapper import Mapper
from blockbak.host.runs import Run
from blockbak.host.snapshots import Snapshot, origin_of, planned_size, take
from blockbak.host.system import System
from blockbak.model import snapshot as plan
from blockbak.model.snapshot import LogicalVolume
from blockbak.units import format_size, parse_size

TOGETHER_SECONDS = 10.0
"""How long volumes are held back at most while the snapshots of a set are made."""
FREEZE_SECONDS = 60.0
"""How long hooks may keep applications at rest."""
HOOKS_FOLDER = "/etc/blockbak/hooks.d"
_LIVE_PLACES = ("/", "/usr", "/etc", "/var", "/tmp", "/etc/lvm", "/var/log", "/run")  # noqa: S108 - looked at, not used
"""Where the commands that make snapshots, and what they wait for, read and write."""
_LIVE_TREES = ("/usr/", "/etc/", "/var/log/", "/bin/", "/sbin/", "/lib")
_RUN_DIGITS = 8
_NOT_FROZEN = frozenset({"bcachefs", "btrfs"})
"""File systems that may have several devices: the kernel does not find them by one that it suspends."""


@dataclass(frozen=True, slots=True)
class HotOptions:
    """How snapshots are made. ``size`` and ``limit`` are those of a thick one's exception store: bytes as
    ``units.parse_size`` takes them, or a share of the origin (``20%``). Times are seconds.
    """

    size: str | None = None
    limit: str | None = None
    freeze_with: tuple[str, ...] = ()
    freeze_seconds: float = FREEZE_SECONDS
    hooks_folder: str = HOOKS_FOLDER
    together: bool = False
    together_seconds: float = TOGETHER_SECONDS

    def has_hooks(self) -> bool:
        """Whether applications are brought to rest. Raises NoSuchHook, UnsafeHook."""
        return bool(hooks.find(self.freeze_with, self.hooks_folder))


@dataclass(frozen=True, slots=True)
class Member:
    """A volume to snapshot, and the point that was its newest, or an empty string."""

    seen: Seen
    previous: str


class HotSource:
    """A snapshot that is read in place of its origin."""

    def __init__(
        self, device: Device, snapshot: Snapshot, moment: datetime, circumstances: Circumstances, settled: Settled
    ) -> None:
        self.circumstances = circumstances
        self.moment: datetime | None = moment
        self._snapshot, self._settled = snapshot, settled
        self.reader = SourceReader(snapshot.path, exclusive=True)
        self.reader.doubt = snapshot.look
        if self.reader.size != device.size:
            after = self.reader.size
            self.reader.close()
            raise SourceChangedSize(path=device.label, before=device.size, after=after)

    def check(self) -> None:
        """Raise SnapshotOverflowed, PoolFull or SnapshotLost once it is known."""
        self._snapshot.check()

    def settle(self) -> Settled:
        """Whether the snapshot held until now; a thin one is removed then. Raises as ``check``."""
        self._snapshot.look()
        if self._snapshot.origin.is_thin:
            # To make the image durable may take minutes, in which nobody would look whether its pool is filling up.
            # Where it stays, whoever releases it once more tells why.
            self.release()
        notes = list(self._settled.notes)
        if self._snapshot.extended:
            notes.append(f"The snapshot was extended by {format_size(self._snapshot.extended)} while it was read.")
        return replace(self._settled, notes=notes)

    def release(self) -> str:
        """Close and remove the snapshot; what to tell a person where that cannot be done. Once is enough."""
        self.reader.__exit__(None, None, None)
        return self._snapshot.release()


class Waiting:
    """Sources that are read one after the other, in their order. Safe from several threads."""

    def __init__(self, sources: Iterable[HotSource], say: Callable[[str], None]) -> None:
        self._sources, self._say = deque(sources), say
        self._given_up: set[int] = set()
        self._guard = threading.Lock()

    def next(self) -> HotSource:
        """The one whose turn it is. Its ``check`` raises where it was given up."""
        with self._guard:
            return self._sources.popleft()

    def look(self) -> None:
        """Remove the snapshots that are void already, now and not in their turn: a thin pool may be filling up."""
        with self._guard:
            for source in self._sources:
                if id(source) in self._given_up:
                    continue
                try:
                    source.check()
                except SnapshotError:
                    self._given_up.add(id(source))
                    if left := source.release():
                        self._say(left)


# --- decisions ------------------------------------------------------------------------------------------------


def sizes(origins: Sequence[LogicalVolume], options: HotOptions) -> list[int]:
    """The room of each snapshot, all at one time in their groups. Raises NoSnapshotRoom, NoPoolRoom,
    NotSnapshotable.
    """
    taken: dict[tuple[str, str], int] = {}
    found = []
    for origin in origins:
        place = (origin.group, origin.pool if origin.is_thin else "")
        asked = None if options.size is None else plan.parse_size(options.size, origin.size, parse_size)
        size = planned_size(origin, asked, beside=taken.get(place, 0))
        taken[place] = taken.get(place, 0) + size
        found.append(size)
    return found


def check_together(members: Sequence[Member], origins: Sequence[LogicalVolume], repository: str, state: str) -> None:
    """Raises NotTogether for a volume that must not be suspended while commands run: they would wait for it, and
    it for them.
    """
    system = System()
    own = [
        (place, place)
        for place in (*_LIVE_PLACES, *_mounted_below(system), *lvm.places(), *usage.program_places())
        if os.path.lexists(place)
    ]  # fmt: skip
    kept = [(repository, "the repository"), (state, "blockbak's state directory")]
    for member, origin in zip(members, origins, strict=True):
        if origin.is_thin:
            raise NotTogether(volume=origin.label, reason="it is thin, and its pool would not survive it")
        for path, what in (*kept, *own):
            if usage.carries(member.seen.device, path, system):
                raise NotTogether(volume=origin.label, reason=f"it carries {what}")
        if any(usage.carries(member.seen.device, swap, system) for swap in system.swaps):
            raise NotTogether(volume=origin.label, reason="it carries swap")


def _mounted_below(system: System) -> list[str]:
    """What is mounted somewhere in the trees that hold programs, settings and logs."""
    return [line.target for line in system.mounts if line.target.startswith(_LIVE_TREES)]


def suspend_order(devices: Sequence[Device], system: System) -> list[Device]:
    """Volumes that file systems are mounted from, before their logs: to be frozen they write to these."""
    frozen = {(line.major, line.minor) for line in system.mounts}
    return sorted(devices, key=lambda device: (device.major, device.minor) not in frozen)


def consistency(device: Device, *, hooked: bool) -> str:
    """What a snapshot of it is worth: LVM freezes a file system that is mounted from the volume itself, if it can."""
    if hooked:
        return "application"
    return "filesystem" if device.mounts and not _not_frozen(device) else "crash"


def _not_frozen(device: Device) -> list[str]:
    """Where file systems are mounted from it that are not frozen while it is suspended."""
    return [mount.target for mount in device.mounts if mount.fstype in _NOT_FROZEN]


def foreseen(members: Sequence[Member], options: HotOptions, repository: str, state: str) -> list[str]:
    """What would be made for each member, in a sentence. Raises what making them would, as far as it shows."""
    origins = [origin_of(member.seen.device) for member in members]
    if options.together:
        check_together(members, origins, repository, state)
    found = []
    for origin, room in zip(origins, sizes(origins, options), strict=True):
        if origin.is_thin:
            found.append(f"A thin snapshot of {origin.label} is made in pool {origin.group}/{origin.pool}.")
        else:
            found.append(f"A snapshot of {origin.label} is made, with {format_size(room)} of {origin.group} for it.")
    return found


# --- doing it ---------------------------------------------------------------------------------------------------


@contextmanager
def snapshots(
    members: Sequence[Member], options: HotOptions, repository: str, context: Context
) -> Iterator[list[HotSource]]:
    """Snapshots of all members, open for reading; removed at the latest when the ``with`` is over.

    With hooks or together they are all made within one rest, and the rest ends before the first is read.
    Raises SnapshotError, NotTogether, UnsafeHook, CommandFailed, MissingProgram, with nothing left behind.
    """
    boot = System().boot
    for line in settle(context).told:
        context.say(line)
    scanners.ensure()
    origins = [origin_of(member.seen.device) for member in members]
    if options.together:
        check_together(members, origins, repository, context.state_dir)
    rooms = sizes(origins, options)
    metadata = {origin.group: "" for origin in origins}
    for member in members:
        group = member.seen.device.vg
        metadata[group] = metadata[group] or group_metadata(member.seen.device, context)
    run_id = context.hex_id(_RUN_DIGITS)
    with runs.alive(run_id, context.host, boot, context.run_dir) as run, ExitStack() as stack:
        run.touches([(member.seen.device.dm_name, member.seen.device.dm_uuid) for member in members])
        made: list[Snapshot] = []

        def give_back() -> None:
            for one in reversed(made):
                left = one.release()
                if left:
                    context.say(left)

        stack.callback(give_back)
        moment, rest = _take(members, origins, rooms, options, run, made, context)
        set_id = run_id if options.together else ""
        sources = []
        for member, snapshot in zip(members, made, strict=True):
            device = member.seen.device
            hooked = rest is not None and rest.applied
            settled = Settled(consistency(device, hooked=hooked), list(rest.notes) if rest else [])
            outputs = dict(rest.outputs) if rest else {}
            circumstances = Circumstances(set_id, metadata[device.vg], outputs)
            sources.append(HotSource(device, snapshot, moment, circumstances, settled))
            stack.callback(sources[-1].reader.__exit__, None, None, None)
        yield sources


def _take(
    members: Sequence[Member],
    origins: Sequence[LogicalVolume],
    rooms: Sequence[int],
    options: HotOptions,
    run: Run,
    made: list[Snapshot],
    context: Context,
) -> tuple[datetime, Rest | None]:
    """Fill ``made``, within a rest where there is one; a moment whose every write is in them, and the rest.

    Raises SetVoid where the rest ended too soon.
    """
    wanted = hooks.find(options.freeze_with, options.hooks_folder)
    if not wanted and not options.together:
        moment = context.now()
        _sync(members)
        _make(origins, rooms, options, run, made, None, (), context)
        return moment, None
    devices = [(one.seen.device.dm_name, one.seen.device.dm_uuid) for one in members] if options.together else []
    deadline = options.together_seconds if options.together and not wanted else options.freeze_seconds
    with hooks.at_rest(
        wanted, _facts(members, options, run), deadline=deadline, run_dir=context.run_dir, boot=run.boot,
        devices=devices, say=context.say,
    ) as rest:  # fmt: skip
        moment = context.now()
        # While it still can: a volume that is suspended takes nothing.
        _sync(members)
        if devices:
            rest.within(options.together_seconds)
            with Mapper() as mapper:
                for device in suspend_order([one.seen.device for one in members], System()):
                    mapper.suspend(device.dm_name)
        _make(origins, rooms, options, run, made, rest, [name for name, _ in devices], context)
    if not rest.in_time:
        reasons = [one.removesuffix(".") for one in rest.reasons]
        raise SetVoid(reason="; ".join(reasons) or "the deadline passed")
    return moment, rest


def _sync(members: Sequence[Member]) -> None:
    """Have on the volumes what was written to file systems that are not frozen: else it may be half a minute old."""
    for member in members:
        for target in _not_frozen(member.seen.device)[:1]:
            runner.run(["sync", "--file-system", target], deadline=lvm.CHANGE_SECONDS)


def _make(
    origins: Sequence[LogicalVolume],
    rooms: Sequence[int],
    options: HotOptions,
    run: Run,
    made: list[Snapshot],
    rest: Rest | None,
    held: Sequence[str],
    context: Context,
) -> None:
    """``held`` are the device-mapper names of the origins, where they are suspended: lvcreate lets each go on."""
    for number, (origin, room) in enumerate(zip(origins, rooms, strict=True)):
        context.check()
        if rest is not None and rest.over():
            raise SetVoid(reason="the deadline passed")
        _check_held(held[number:])
        name = f"{plan.PREFIX}{run.id}" + (f"-{number}" if number else "")
        limit = None if options.limit is None else plan.parse_size(options.limit, origin.size, parse_size)
        made.append(take(origin, run, name, room, limit=limit))


def _check_held(names: Sequence[str]) -> None:
    """That nobody else has let volumes go on: LVM does so by itself where another snapshot of one is extended."""
    if names:
        with Mapper() as mapper:
            for name in names:
                info = mapper.info(name)
                if info is None or not info.suspended:
                    raise SetVoid(reason=f"{name} went on by another's hand")


def _facts(members: Sequence[Member], options: HotOptions, run: Run) -> Mapping[str, str]:
    """What hooks are told."""
    return {
        "BLOCKBAK_VOLUME": " ".join(one.seen.name for one in members),
        "BLOCKBAK_SOURCES": " ".join(one.seen.device.label for one in members),
        "BLOCKBAK_PREVIOUS_POINT": " ".join(one.previous or "-" for one in members),
        "BLOCKBAK_TOGETHER": "1" if options.together else "0",
        "BLOCKBAK_RUN": run.id,
    }
