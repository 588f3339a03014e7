"""Logical volumes and their snapshots, through LVM's own commands; watched while they are read.

Whatever is made here carries our tags from its first moment, and each run holds a lock file that says it is
alive. So what a killed run left is known by its tag and its missing lock, and nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from blockbak.errors import (
    BlockbakError,
    CommandFailed,
    MapperFailed,
    NoPoolRoom,
    NoSnapshotRoom,
    NotSnapshotable,
    PoolFilling,
    PoolFull,
    SnapshotError,
    SnapshotLost,
    SnapshotOverflowed,
    SnapshotSeen,
    SourceError,
)
from blockbak.host import scanners
from blockbak.host.blockio import SourceReader, aligned
from blockbak.host.device import Device, devices
from blockbak.host.mapper import Mapper
from blockbak.host.marks import reading
from blockbak.host.runner import Completed, run
from blockbak.host.system import System, lvm_names
from blockbak.model import snapshot as plan
from blockbak.model.filesystem import PhysicalVolume, physical_volume
from blockbak.model.snapshot import LogicalVolume
from blockbak.units import SECTOR

CHANGE_SECONDS = 600.0
"""A command that changes a group is in the middle of suspended devices: it is not ended before it must hang."""
POLL_SECONDS = 0.25
_METADATA_MOST = 4 << 20
"""Bytes of a group's metadata text that a point keeps."""
_METADATA_PREFIX = ".metadata-"
_GROUP_UUID_END = len("LVM-") + 32
"""Where a volume's own UUID begins in that of device-mapper."""
_REMOVE_TRIES = 10
_EXTEND_TRIES = 3


def _lvm(*arguments: str, deadline: float = CHANGE_SECONDS) -> Completed:
    return run(list(arguments), deadline=deadline, env={"LVM_SUPPRESS_FD_WARNINGS": "1"})


def _report(*arguments: str) -> list[LogicalVolume]:
    """What ``lvs`` tells. A volume that is not there makes it fail, and yet print what it has."""
    done = run(
        ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", ",".join(plan.VOLUME_FIELDS), *arguments],
        deadline=CHANGE_SECONDS,
        env={"LVM_SUPPRESS_FD_WARNINGS": "1"},
        accept=(0, 5),
    )
    try:
        return plan.parse_volumes(done.stdout)
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailed(program="lvs", status=done.status, stderr=done.stderr or str(error)) from error


def volumes() -> list[LogicalVolume]:
    """Every logical volume that is not an inner part of another. Raises MissingProgram, CommandFailed."""
    # One that a killed command left suspended would be waited for, if LVM looks into logical volumes.
    return _report("--config", "devices/ignore_suspended_devices=1")


def by_uuid(uuid: str) -> LogicalVolume | None:
    """The volume of a UUID, or None."""
    found = _report("-a", "--select", f"lv_uuid={uuid}")
    return found[0] if found else None


def named(group: str, name: str) -> LogicalVolume | None:
    """The volume of that name, active or not; None where there is none, or no such group."""
    return next((one for one in _report("-a", group) if one.name == name), None)


def inactive(path: str) -> LogicalVolume | None:
    """The volume that ``vg/lv``, ``/dev/vg/lv`` or ``/dev/mapper/…`` would name if it were active; None also
    where LVM cannot be asked.
    """
    mapped = path.removeprefix("/dev/mapper/")
    group, name = lvm_names(mapped) if mapped != path else plan.as_label(path)
    if not group or not name:
        return None
    try:
        found = named(group, name)
    except BlockbakError:
        return None
    return found if found is not None and not found.active else None


def group(name: str) -> plan.Group | None:
    """A volume group; None where there is none of that name."""
    done = run(
        ["vgs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", ",".join(plan.GROUP_FIELDS), name],
        deadline=CHANGE_SECONDS,
        env={"LVM_SUPPRESS_FD_WARNINGS": "1"},
        accept=(0, 5),
    )
    try:
        return plan.parse_group(done.stdout)
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailed(program="vgs", status=done.status, stderr=done.stderr or str(error)) from error


def pool_blocks(group: str, pool: str) -> tuple[int, bool]:
    """How many bytes a thin pool gives at a time, and whether it zeroes them before they are used."""
    done = run(
        ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", "chunk_size,zero", f"{group}/{pool}"],
        deadline=CHANGE_SECONDS,
        env={"LVM_SUPPRESS_FD_WARNINGS": "1"},
    )
    return plan.parse_pool_blocks(done.stdout)


def pool_bytes(group: str, pool: str) -> int:
    """How much data a thin pool holds."""
    found = _report("-a", f"{group}/{pool}")
    return found[0].size if found else 0


def places() -> list[str]:
    """Where LVM's own commands write: its archive, its log. Empty where it does not tell."""
    try:
        return plan.parse_places(_lvm("lvmconfig", "-q", "-q", "--type", "full", *plan.PLACES).stdout)
    except BlockbakError:
        return []


def group_metadata(group: str, run_dir: str) -> str:
    """The group's metadata as ``vgcfgbackup`` writes it; empty where LVM does not tell."""
    path = os.path.join(run_dir, f"{_METADATA_PREFIX}{os.getpid()}-{threading.get_ident()}")
    try:
        _private(run_dir)
        _lvm("vgcfgbackup", "-q", "-q", "-f", path, group)
        return Path(path).read_text(encoding="utf-8", errors="replace")[:_METADATA_MOST]
    except (OSError, BlockbakError):
        return ""
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


# --- a run, for as long as it is alive --------------------------------------------------------------------


def _private(run_dir: str) -> None:
    os.makedirs(run_dir, mode=0o700, exist_ok=True)


def _lock_path(run_dir: str, run_id: str) -> str:
    return os.path.join(run_dir, f"run-{run_id}.lock")


class _Note(msgspec.Struct):
    """What a run's lock file says: the volumes whose snapshots it makes, by device-mapper name and UUID."""

    origins: list[tuple[str, str]] = msgspec.field(default_factory=list)


@dataclass(slots=True)
class Run:
    """A run that makes snapshots: who it is, and the lock that says it lives."""

    id: str
    host: str
    boot: str
    run_dir: str
    _fd: int = field(default=-1, repr=False)

    @property
    def tags(self) -> tuple[str, ...]:
        """For everything it makes."""
        return plan.tags(self.id, self.host, self.boot)

    def touches(self, origins: Sequence[tuple[str, str]]) -> None:
        """Note whose tables LVM is about to exchange: a command that is killed meanwhile leaves them suspended."""
        text = msgspec.json.encode(_Note(list(origins)))
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)


@contextmanager
def alive(run_id: str, host: str, boot: str, run_dir: str) -> Iterator[Run]:
    """Be a run, until the ``with`` is over. Raises SnapshotError where the directory cannot be used."""
    path = _lock_path(run_dir, run_id)
    try:
        _private(run_dir)
        fd = _held(path)
    except OSError as error:
        raise MapperFailed(action="lock", device=path, reason=error.strerror, errno=error.errno) from error
    try:
        yield Run(run_id, host, boot, run_dir, fd)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


def _held(path: str) -> int:
    """A new lock file, held. Who sweeps may meet it before it is, and remove it: then it is made once more."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def _known_runs(run_dir: str) -> set[str]:
    """The runs that have a lock file, alive or not."""
    return {path.name.removeprefix("run-").removesuffix(".lock") for path in Path(run_dir).glob("run-*.lock")}


@contextmanager
def _dead_runs(run_dir: str) -> Iterator[dict[str, _Note]]:
    """The runs that are over and what they noted; their files go when this ends without an error."""
    dead: dict[str, _Note] = {}
    with ExitStack() as stack:
        for run_id in sorted(_known_runs(run_dir)):
            path = Path(_lock_path(run_dir, run_id))
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            dead[run_id] = _Note()
            with contextlib.suppress(OSError, ValueError):
                dead[run_id] = msgspec.json.decode(os.pread(fd, 1 << 20, 0) or b"{}", type=_Note)
        yield dead
        # What could not be let go of is to be known to the next run as well.
        for run_id in dead:
            _unlink(Path(_lock_path(run_dir, run_id)))


def _clear(run_dir: str) -> None:
    """Remove the metadata texts of processes that are over."""
    for path in Path(run_dir).glob(f"{_METADATA_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(_METADATA_PREFIX).partition("-")[0]).exists():
            _unlink(path)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


# --- what killed runs left --------------------------------------------------------------------------------


def sweep(run_dir: str, host: str, boot: str, *, restores: bool) -> list[str]:
    """Remove the snapshots, and resume the volumes, of this host's runs that are over; sentences about it.

    What an unfinished restore left is removed with ``restores`` only, and told else: a snapshot is a copy, but
    somebody may have put such a volume to use. What cannot be removed is only told, and so is what another host left.
    Raises MissingProgram, CommandFailed where LVM cannot be asked.
    """
    said = []
    _clear(run_dir)
    before = _known_runs(run_dir)
    with _dead_runs(run_dir) as dead:
        # Asking waits for LVM's own lock: an lvcreate that outlived its blockbak has come to its end then.
        found = volumes()
        half_way = []
        for run_id, note in dead.items():
            for name, uuid in note.origins:
                resumed = _resume(name, uuid, run_id)
                said += resumed
                half_way += [name] if resumed else []
        # Looked for after the volumes: a run that began meanwhile has its snapshot among them.
        living = (before | _known_runs(run_dir)) - set(dead)
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
            said += _refresh(name)
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


def _refresh(name: str) -> list[str]:
    """Have LVM make a volume's mapping what its metadata says, after a command that came half-way."""
    label = "/".join(lvm_names(name))
    try:
        _lvm("lvchange", "-q", "-q", "--refresh", label)
    except CommandFailed as error:
        return [f"{label} works, but LVM could not refresh it: {error.fields['stderr']}"]
    return []


def _parts(name: str, uuid: str, system: System) -> set[str]:
    """The volumes of its group that a volume consists of, itself too, as device-mapper's UUIDs begin."""
    below = system.below(system.mapped[name]) if name in system.mapped else set[str]()
    uuids = [uuid, *(system.attribute(one, "dm/uuid") for one in below)]
    # Another group that it lies on is none of its affair.
    return {_volume_part(one) for one in uuids if one.startswith(uuid[:_GROUP_UUID_END])}


def _volume_part(uuid: str) -> str:
    """``LVM-`` with the group and the volume, of a device-mapper UUID; what follows names a part of the volume."""
    return "-".join(uuid.split("-", 2)[:2])


def _is_of_run(name: str, origin: str, run_id: str) -> bool:
    """Whether it is a part of a run's own snapshot in the group of a volume."""
    return name.startswith(plan.dm_name(lvm_names(origin)[0], plan.PREFIX + run_id))


def remove(label: str) -> None:
    """Remove a volume; tried again while something has it open for a moment. Raises CommandFailed."""
    for left in reversed(range(_REMOVE_TRIES)):
        try:
            _lvm("lvremove", "-q", "-q", "-y", label)
        except CommandFailed as error:
            text = str(error.fields["stderr"])
            if "Failed to find logical volume" in text or "not found" in text:
                return
            if left == 0 or ("in use" not in text and "is used by" not in text):
                raise
            threading.Event().wait(POLL_SECONDS)
        else:
            return


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
            _lvm("lvextend", "-q", "-q", "-y", "-L", f"+{more}b", self.label)
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
    if use is None or not use.writable:
        raise NotSnapshotable(volume=origin.label, reason=f"thin pool {label} does not take writes")
    short = plan.pool_short(use, pool, needed + beside)
    if short:
        percent = use.metadata_percent if short == "metadata" else use.data_percent
        raise NoPoolRoom(pool=label, used=round(percent, 1), what=short, volume=origin.label)
    return needed


def take(origin: LogicalVolume, run_now: Run, name: str, size: int, *, limit: int | None = None) -> Snapshot:
    """Make a read-only snapshot of ``origin`` and watch it; ``release`` it in every case.

    LVM itself freezes a mounted file system for the moment. ``size`` is from ``planned_size``, ``limit`` the
    most bytes that a thick one is extended to. Raises CommandFailed, SnapshotSeen, SnapshotLost, with nothing
    left behind.
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
        for line in (*resumed, left, *(_refresh(origin.dm_name) if resumed else ())):
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
    _lvm(*common, *own, origin.label)


def _check_hidden(made: Snapshot) -> None:
    system = System()
    name = system.mapped.get(made.dm_name, "")
    if not name:
        raise SnapshotLost(volume=made.origin.label, reason="its device did not appear")
    reason = scanners.seen(name, system) or scanners.seen_by_lvm(made.path)
    if reason:
        raise SnapshotSeen(volume=made.origin.label, reason=reason, device=made.label)


# --- volumes that are restored to -------------------------------------------------------------------------


@contextmanager
def new_volume(run_now: Run, group: str, name: str, size: int, pool: str = "") -> Iterator[str]:
    """Make a logical volume of ``size`` bytes (whole LVM extents); its node, for as long as the ``with`` lasts.

    It carries the tags of the run until the ``with`` ends well, and is removed where it does not. A volume of
    another's that has the name is never touched. Raises CommandFailed.
    """
    label = f"{group}/{name}"
    tags = (*run_now.tags, plan.RESTORE_TAG)
    added = [word for tag in tags for word in ("--addtag", tag)]
    # A thin volume reads as zeros; of a thick one only the old signatures go, which udev would act upon.
    own = ["--virtualsize", f"{size}b", "--thinpool", pool] if pool else ["--wipesignatures", "y", "--zero", "y"]
    if not pool:
        own += ["--size", f"{size}b"]
    try:
        _lvm("lvcreate", "-q", "-q", "-y", "--name", name, *added, *own, group)
        yield f"/dev/mapper/{plan.dm_name(group, name)}"
        _untag(label, tags)
    except BaseException as error:
        try:
            made = named(group, name)
            if made is not None and made.run == run_now.id:
                remove(label)
        except BlockbakError as failed:
            error.add_note(f"{label} could not be removed ({failed}); 'blockbak recover' tries again.")
        raise


def _untag(label: str, tags: Sequence[str]) -> None:
    _lvm("lvchange", "-q", "-q", *(word for tag in tags for word in ("--deltag", tag)), label)


def adopt(uuid: str) -> None:
    """Make an ordinary volume of one that an unfinished restore left: it would be removed at the next sweep.

    Any other stays as it is. Raises MissingProgram, CommandFailed.
    """
    found = by_uuid(uuid)
    if found is not None and plan.RESTORE_TAG in found.tags:
        _untag(found.label, [tag for tag in found.tags if plan.is_of_ours(tag)])


def thin_pool(device: Device, system: System | None = None) -> str:
    """The kernel name of the thin pool that a volume comes out of; empty for any other device."""
    system = system or System()
    below = system.links(device.kname, "slaves") if device.is_lv else []
    return next((name for name in below if system.attribute(name, "dm/uuid").endswith("-tpool")), "")


def thin_pool_label(device: Device, system: System | None = None) -> str:
    """``vg/pool`` of a thin volume; empty for any other device."""
    system = system or System()
    name = system.attribute(thin_pool(device, system), "dm/name") if device.is_lv else ""
    return "/".join(lvm_names(name.removesuffix("-tpool"))) if name else ""


class PoolWatch:
    """A thin pool, looked at while one of its volumes is written. ``beside`` bytes at most are on their way to it
    while somebody looks. Its methods raise MapperFailed.
    """

    def __init__(self, device: Device, beside: int) -> None:
        system = System()
        pool = thin_pool(device, system)
        self._device, self._beside = device, beside
        self._dm_name = system.attribute(pool, "dm/name")
        self._bytes = system.size(pool)
        self.label = thin_pool_label(device, system)

    @property
    def unit(self) -> int:
        """Bytes that the pool gives at a time."""
        use = self._use()
        return self._bytes // use.data_total if use and use.data_total else SECTOR

    def short(self, stored: int) -> tuple[int, int] | None:
        """Free bytes and those needed, if there is surely no room for ``stored`` bytes of content in the volume: it
        takes at least what it does not hold yet.
        """
        with Mapper() as mapper:
            targets = mapper.status(self._device.dm_name)
        held = plan.parse_thin(targets[0].kind, targets[0].parameters) if targets else 0
        use, needed = self._use(), max(0, stored - held) + self._beside
        return plan.surely_short(use, self._bytes, needed) if use else (0, needed)

    def check(self) -> None:
        """Raise PoolFilling before the pool is full, when writes of all its volumes would hang or fail."""
        use = self._use()
        what = plan.pool_gives_out(use, self._bytes, self._beside) if use else "data"
        if what:
            percent = 100.0 if use is None else use.metadata_percent if what == "metadata" else use.data_percent
            raise PoolFilling(pool=self.label, used=round(percent, 1), what=what, volume=self._device.label)

    def _use(self) -> plan.PoolUse | None:
        with Mapper() as mapper:
            targets = mapper.status(self._dm_name)
        return plan.parse_pool(targets[0].kind, targets[0].parameters) if targets else None


# --- physical volumes -------------------------------------------------------------------------------------


def physical_volumes(without: Collection[str], system: System | None = None) -> list[tuple[str, PhysicalVolume]]:
    """Every physical volume that can be seen, with its node, LVM installed or not; but not on the devices of
    these kernel names, nor inside logical volumes, where LVM does not look (lvm.conf, scan_lvs).
    """
    system = system or System()
    found = []
    for device in devices(system):
        if device.kname in without or device.is_lv:
            continue
        with reading(device.path) as read:
            one = physical_volume(read)
        if one is not None:
            found.append((device.path, one))
    return found
