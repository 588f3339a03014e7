"""Snapshots of logical volumes: made, hidden, watched while they are read, removed, and swept by tag.

Whatever is made here carries our tags from its first moment.
"""

from __future__ import annotations

import contextlib
import threading

from blockbak.errors import (
    BlockbakError,
    CommandFailed,
    FrozenAlready,
    MapperFailed,
    NoPoolRoom,
    NoSnapshotRoom,
    NotSnapshotable,
    PoolFull,
    SnapshotError,
    SnapshotLost,
    SnapshotOverflowed,
    SnapshotSeen,
    SourceError,
)
from blockbak.host import scanners
from blockbak.host.blockio import SourceReader, aligned
from blockbak.host.device import Device
from blockbak.host.lvm import by_uuid, clear_texts, command, pool_bytes, refresh, remove, volumes
from blockbak.host.mapper import Mapper
from blockbak.host.runs import Run, dead_runs, known_runs, living_runs
from blockbak.host.system import System, lvm_names, of_group
from blockbak.model import snapshot as plan
from blockbak.model.snapshot import LogicalVolume

POLL_SECONDS = 0.25
_EXTEND_TRIES = 3


# --- snapshots --------------------------------------------------------------------------------------------


class Snapshot:
    """A read-only snapshot that is there, watched by a thread of its own.

    ``path`` is its node. ``check`` raises what went wrong: SnapshotOverflowed, PoolFull, SnapshotLost.
    """

    def __init__(self, origin: LogicalVolume, name: str, size: int, limit: int | None, pool: int) -> None:
        self.origin = origin
        self.label = f"{origin.group}/{name}"
        self.dm_name = plan.dm_name(origin.group, name)
        self.path = f"/dev/mapper/{self.dm_name}"
        self.size = size
        self.extended = 0
        self._limit, self._pool_bytes = limit, pool
        self._stuck = self._gone = False
        self._failures, self._total = 0, size
        self._error: SnapshotError | None = None
        self._guard = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watch-{name}", daemon=True)

    def watch(self) -> None:
        """Start looking after it."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking after it; harmless where that was never begun."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def release(self) -> str:
        """Remove it; what to tell a person where that cannot be done, else an empty string. Once is enough."""
        self.stop()
        if self._gone:
            return ""
        try:
            remove(self.label)
        except BlockbakError as error:
            return f"{self.label} could not be removed ({error}); 'blockbak recover' tries again."
        self._gone = True
        return ""

    def check(self) -> None:
        """Raise what went wrong so far, by the thread's last look."""
        if self._error is not None:
            raise self._error

    def look(self) -> None:
        """Look now, and raise what is wrong: asked at a read error, and before the image is sealed."""
        self._look()
        self.check()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS) and self._error is None:
            self._look()

    def _look(self) -> None:
        with self._guard:
            try:
                error = self._look_thin() if self.origin.is_thin else self._look_thick()
            except MapperFailed as failed:
                error = SnapshotLost(volume=self.origin.label, reason=str(failed.fields["reason"]))
            self._error = self._error or error

    def _look_thick(self) -> SnapshotError | None:
        with Mapper() as mapper:
            targets = mapper.status(self.dm_name)
        use = plan.parse_thick(targets[0].kind, targets[0].parameters) if targets else "lost"
        if isinstance(use, plan.ThickUse):
            self._total = use.total
            if use.percent >= plan.EXTEND_AT and not self._stuck:
                self._extend(use)
            return None
        if use == "overflowed" and self._disk_failed():
            return SnapshotLost(volume=self.origin.label, reason="a disk below it or its origin failed")
        if use == "overflowed":
            return SnapshotOverflowed(volume=self.origin.label, size=self.size)
        return SnapshotLost(volume=self.origin.label, reason="another device has its place")

    def _disk_failed(self) -> bool:
        """Whether it was given up though it was not full: the kernel does so where it cannot copy a chunk."""
        with contextlib.suppress(OSError, SourceError), SourceReader(f"{self.path}-cow", exclusive=False) as store:

            def read(offset: int, length: int) -> bytes:
                memory = aligned(length)
                # What cannot be read of the table is zeros, and ends it.
                store.read(offset, memory, length)
                return memory.tobytes()

            # It may have been extended since it was given up: that room it did not have then.
            return plan.surely_not_full(read, min(store.size, self._total))
        return False

    def _extend(self, use: plan.ThickUse) -> None:
        """Make it larger. Where that cannot be, it may last until the end all the same."""
        try:
            now = by_uuid(self.origin.uuid)
            free = now.free if now else 0
            more = plan.extension(use, self.origin.size, self.origin.lvm_extent, free, self._limit)
            if not more:
                # It is full size, or at its limit, or the group is empty: asking again would only cost.
                self._stuck = True
                return
            command("lvextend", "-q", "-q", "-y", "-L", f"+{more}b", self.label)
        except (BlockbakError, OSError):
            # Another snapshot may have taken what was free a moment ago: then less is asked for. Nothing may end this
            # thread, not even that no file can be opened.
            self._failures += 1
            self._stuck = self._failures >= _EXTEND_TRIES
            return
        self.extended += more
        self.size += more

    def _look_thin(self) -> SnapshotError | None:
        pool = plan.dm_name(self.origin.group, self.origin.pool)
        with Mapper() as mapper:
            mine = mapper.status(self.dm_name)
            targets = mapper.status(f"{pool}-tpool")
        if not mine or mine[0].kind != "thin" or mine[0].parameters.startswith(("Fail", "Error")):
            return SnapshotLost(volume=self.origin.label, reason="another device has its place")
        use = plan.parse_pool(targets[0].kind, targets[0].parameters) if targets else None
        label = f"{self.origin.group}/{self.origin.pool}"
        if use is None:
            return SnapshotLost(volume=self.origin.label, reason=f"thin pool {label} failed")
        short = plan.pool_gives_out(use, self._pool_bytes)
        if short:
            percent = use.metadata_percent if short == "metadata" else use.data_percent
            return PoolFull(pool=label, used=round(percent, 1), what=short, volume=self.origin.label)
        return None


def origin_of(device: Device) -> LogicalVolume:
    """The logical volume that a device is. Raises NotSnapshotable where none of it can be snapshotted."""
    if not device.is_lv:
        raise NotSnapshotable(volume=device.label, reason="it is not a logical volume")
    found = by_uuid(device.lv_uuid)
    if found is None:
        raise NotSnapshotable(volume=device.label, reason="LVM does not know it")
    reason = plan.unfit(found)
    if reason:
        raise NotSnapshotable(volume=found.label, reason=reason)
    return found


def planned_size(origin: LogicalVolume, asked: int | None, *, beside: int = 0) -> int:
    """How large its snapshot will be; for a thin one, how much room there must be in the pool.

    ``beside`` bytes of the group are for other snapshots of the same run. Raises NoSnapshotRoom, NoPoolRoom
    with the numbers.
    """
    if not origin.is_thin:
        size, needed = plan.thick_size(origin, asked, beside)
        if not size:
            raise NoSnapshotRoom(
                group=origin.group, free=max(0, origin.free - beside), volume=origin.label, needed=needed
            )
        return size
    needed = plan.thin_need(origin, asked)
    pool = pool_bytes(origin.group, origin.pool)
    label = f"{origin.group}/{origin.pool}"
    with Mapper() as mapper:
        targets = mapper.status(f"{plan.dm_name(origin.group, origin.pool)}-tpool")
    use = plan.parse_pool(targets[0].kind, targets[0].parameters) if targets else None
    short = plan.pool_short(use, pool, needed + beside) if use is not None else ""
    if use is not None and short:
        # One that is full takes no writes either, and room is what helps it.
        percent = use.metadata_percent if short == "metadata" else use.data_percent
        raise NoPoolRoom(pool=label, used=round(percent, 1), what=short, volume=origin.label)
    if use is None or not use.writable:
        raise NotSnapshotable(volume=origin.label, reason=f"thin pool {label} does not take writes")
    return needed


def take(origin: LogicalVolume, run_now: Run, name: str, size: int, *, limit: int | None = None) -> Snapshot:
    """Make a read-only snapshot of ``origin`` and watch it; ``release`` it in every case.

    LVM itself freezes a mounted file system for the moment. ``size`` is from ``planned_size``, ``limit`` the
    most bytes that a thick one is extended to. Raises CommandFailed, FrozenAlready, SnapshotSeen, SnapshotLost,
    with nothing left behind.
    """
    pool = pool_bytes(origin.group, origin.pool) if origin.is_thin else 0
    made = Snapshot(origin, name, size, limit, pool)
    try:
        _create(origin, run_now, name, size)
        _check_hidden(made)
    except BaseException as error:
        # A command that something killed leaves what it suspended; removing needs none of it, its writers do.
        resumed: list[str] = []
        with contextlib.suppress(MapperFailed):
            resumed = _resume(origin.dm_name, origin.dm_uuid, run_now.id)
        left = made.release()
        for line in (*resumed, left, *(refresh(origin.dm_name) if resumed else ())):
            if line:
                error.add_note(line)
        raise
    made.watch()
    return made


def _create(origin: LogicalVolume, run_now: Run, name: str, size: int) -> None:
    tags = [word for tag in run_now.tags for word in ("--addtag", tag)]
    common = ["lvcreate", "-q", "-q", "-y", "--snapshot", "--permission", "r", "--name", name, *tags]
    if origin.is_thin:
        # The skip flag stays: nothing but this command activates it, after a reboot neither.
        own = ["--setactivationskip", "y", "--ignoreactivationskip", "--activate", "y"]
    else:
        own = ["--size", f"{size}b"]
    try:
        command(*common, *own, origin.label)
    except CommandFailed as error:
        frozen = _mounted_at(origin) if plan.met_frozen(str(error.fields["stderr"])) else []
        if frozen:
            raise FrozenAlready(path=frozen[0]) from error
        raise


def _mounted_at(origin: LogicalVolume) -> list[str]:
    system = System()
    name = system.mapped.get(origin.dm_name, "")
    return [line.target for line in system.mounts if name in system.devices_of(line)]


def _check_hidden(made: Snapshot) -> None:
    system = System()
    name = system.mapped.get(made.dm_name, "")
    if not name:
        raise SnapshotLost(volume=made.origin.label, reason="its device did not appear")
    reason = scanners.seen(name, system) or scanners.seen_by_lvm(made.path)
    if reason:
        raise SnapshotSeen(volume=made.origin.label, reason=reason, device=made.label)


# --- what killed runs left --------------------------------------------------------------------------------


def remaining(run_dir: str, host: str, boot: str) -> list[str]:
    """The volumes that ``sweep`` would remove, or tell of, by their names; nothing is done. Raises as it does."""
    before = living_runs(run_dir)
    found = volumes()
    # Looked for after the volumes: a run that began meanwhile has its snapshot among them.
    living = before | living_runs(run_dir)
    return [one.label for one in (*plan.leftovers(found, host, boot, living), *plan.strangers(found, host))]


def sweep(run_dir: str, host: str, boot: str, *, restores: bool) -> list[str]:
    """Remove the snapshots, and resume the volumes, of this host's runs that are over; sentences about it.

    What an unfinished restore left is removed with ``restores`` only, and told else: a snapshot is a copy, but
    somebody may have put such a volume to use. What cannot be removed is only told, and so is what another host left.
    Raises MissingProgram, CommandFailed where LVM cannot be asked.
    """
    said = []
    clear_texts(run_dir)
    before = known_runs(run_dir)
    with dead_runs(run_dir) as dead:
        # Asking waits for LVM's own lock: an lvcreate that outlived its blockbak has come to its end then.
        found = volumes()
        half_way = []
        for run_id, note in dead.items():
            for name, uuid in note.origins:
                resumed = _resume(name, uuid, run_id)
                said += resumed
                half_way += [name] if resumed else []
        # Looked for after the volumes: a run that began meanwhile has its snapshot among them.
        living = (before | known_runs(run_dir)) - set(dead)
        for one in plan.leftovers(found, host, boot, living):
            what = "unfinished restore" if plan.RESTORE_TAG in one.tags else "snapshot"
            if plan.RESTORE_TAG in one.tags and not restores:
                words = " ".join(f"--deltag {tag}" for tag in one.tags if plan.is_of_ours(tag))
                said.append(
                    f"{one.label} is the unfinished restore of a run that did not end: 'blockbak recover' removes it,"
                    f" 'lvchange {words} {one.label}' makes it an ordinary volume."
                )
                continue
            try:
                remove(one.label)
                said.append(f"Removed {one.label}, the {what} of a run that did not end.")
            except CommandFailed as error:
                said.append(
                    f"{one.label}, the {what} of a run that did not end, cannot be removed: {error.fields['stderr']}"
                )
        for name in half_way:
            said += refresh(name)
        # It slows its volume for as long as it is there, and nobody else would ever say so.
        for one in plan.strangers(found, host):
            said.append(
                f"{one.label} is the snapshot of a run on host {one.host}; if that was this machine's name, or the host"
                f" is no more, remove it with 'lvremove {one.label}'."
            )
    return said


def _resume(name: str, uuid: str, run_id: str) -> list[str]:
    """Let a volume go on that a killed LVM command left suspended, with what it suspends below and beside it: of
    a thin one the pool too. Raises MapperFailed for the first that does not, when all were tried.
    """
    system = System()
    parts, said = _parts(name, uuid, system), []
    failed: MapperFailed | None = None
    with Mapper() as mapper:
        # What lies below first: the command may have loaded a table for the volume that leads to a device which
        # has none yet, and answers with errors.
        for one in sorted(mapper.devices(), key=lambda one: len(system.below(system.mapped.get(one.name, "")))):
            mine = _volume_part(one.uuid) in parts or _is_of_run(one.name, name, run_id)
            if mine and (one.suspended or one.unready):
                try:
                    mapper.resume(one.name)
                except MapperFailed as error:
                    failed = failed or error
                else:
                    said.append(f"Resumed {one.name}, which was left suspended while {name} was snapshotted.")
    if failed is not None:
        raise failed
    return said


def _parts(name: str, uuid: str, system: System) -> set[str]:
    """The volumes of its group that a volume consists of, itself too, as device-mapper's UUIDs begin."""
    below = system.below(system.mapped[name]) if name in system.mapped else set[str]()
    uuids = [uuid, *(system.attribute(one, "dm/uuid") for one in below)]
    # Another group that it lies on is none of its affair.
    return {_volume_part(one) for one in uuids if of_group(one) == of_group(uuid)}


def _volume_part(uuid: str) -> str:
    """``LVM-`` with the group and the volume, of a device-mapper UUID; what follows names a part of the volume."""
    return "-".join(uuid.split("-", 2)[:2])


def _is_of_run(name: str, origin: str, run_id: str) -> bool:
    """Whether it is a part of a run's own snapshot in the group of a volume."""
    return name.startswith(plan.dm_name(lvm_names(origin)[0], plan.PREFIX + run_id))
