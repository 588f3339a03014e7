"""Proves that a point can be restored: onto scratch, read back, checked, mounted, tried, booted, and timed.

Nothing is left behind, however it ends: the scratch file has no name, its loop devices last as long as their
descriptors, and what is mounted and run is in a place apart that ends with this process (``host.apart``). A device
that was named as target keeps the copy.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from blockbak.errors import (
    ATTENTION,
    BadTarget,
    BlockbakError,
    CommandFailed,
    MissingProgram,
    NoCheckCommand,
    NoDrillRoom,
    NoPermission,
    NoSuchPoint,
    TargetHolds,
)
from blockbak.flow import restore
from blockbak.flow.context import Context
from blockbak.flow.part import whole
from blockbak.flow.points import find, open_point
from blockbak.flow.recording import recorded
from blockbak.flow.status import job_of
from blockbak.flow.target import look_at_target
from blockbak.flow.writing import PointContent, Writing, read_back, write_all
from blockbak.host import emulator, loops, scanners
from blockbak.host.apart import Apart, apart
from blockbak.host.blockio import TargetWriter
from blockbak.host.marks import reading
from blockbak.host.runner import package_of, which
from blockbak.model import btrfsid, extent, partition
from blockbak.model import drill as plan
from blockbak.model.chain import Point
from blockbak.model.config import Drill as JobDrill
from blockbak.model.drill import Course, DrillOptions
from blockbak.model.facts import Opening
from blockbak.model.filesystem import Read, filesystem
from blockbak.model.partition import PartitionTable
from blockbak.repository.local import Catalog, Repository, Volume, repository_above
from blockbak.units import align_up

CHECKER_SECONDS = 24 * 3600.0
"""A file system of many TiB takes hours."""
OUTPUT = 4000
"""Characters of what a check command says that are kept."""
_CHECK_UMASK = 0o022
"""A check command may become another user, also where we are run with a closed umask."""
_BELONGS_ELSEWHERE = ("LVM2_member", "linux_raid_member", "btrfs")
"""On a device of its own, LVM, md or, where it is one of several, btrfs might take it for the original's."""


@dataclass(slots=True)
class Looked:
    """What became of one file system. ``checked`` is ``clean``, ``errors``, or why it was not checked; ``mounted``
    whether it could be mounted; ``replayed`` whether its journal had to be replayed first.
    """

    number: int
    type: str
    label: str
    uuid: str
    replayed: bool = False
    checked: str = ""
    mounted: bool = False


@dataclass(slots=True)
class Report:
    """What a drill did. ``seconds`` are those of each step, ``rto_seconds`` of all of them: from the first byte to the
    last proof. ``differences`` are sentences on what is not as it should be, ``unseen`` on what was not looked into.
    """

    point: str
    volume: str
    target: str
    device_bytes: int
    written_bytes: int = 0
    verified_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    filesystems: list[Looked] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    check_status: int | None = None
    check_output: str = ""
    booted: bool | None = None
    console: str = ""

    @property
    def rto_seconds(self) -> float:
        """All steps together."""
        return round(sum(self.seconds.values()), 3)

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be looked at."""
        return not self.differences


def options_of(job: JobDrill) -> DrillOptions:
    """What a job asks for. The configuration has named its target, which is what overwriting it takes."""
    return DrillOptions(
        target=job.target, overwrite=bool(job.target), checker=job.checker, check=job.check, boot=job.boot,
        boot_pattern=job.boot_pattern, boot_seconds=job.boot_seconds,
    )  # fmt: skip


def points_of(repository: Repository, job: str) -> list[str]:
    """The newest point of each volume of a job, as ``VOLUME@latest``. Raises NoSuchPoint where it has made none."""
    entries = repository.record.entries()
    found = [f"{name}@latest" for name in repository.volume_names() if job_of(entries, name) == job]
    if not found:
        raise NoSuchPoint(point=f"of job {job}")
    return found


def drill(repository: Repository, point_name: str, options: DrillOptions, context: Context) -> Report:
    """Restore a point to scratch, or to the device that ``options`` name, and prove it. What is not as it should be is
    in the report; the repository's record has a line of it, also of a drill that failed.

    Raises NoSuchPoint, Damage, NoDrillRoom, NoPermission, NoPlaceApart, LoopFailed, NoCheckCommand, MissingProgram,
    VerificationFailed, Interrupted; and for a target what ``restore.restore`` raises.
    """
    _, _, point = find(repository, point_name)
    if os.geteuid() != 0:
        raise NoPermission(action="mount what is restored of", path=f"{point.volume}@{point.id}")
    # Told now, and not after an hour of restoring.
    for command in options.check[:1]:
        if which(command) is None:
            raise NoCheckCommand(program=command)
    if options.boot and which(emulator.PROGRAM) is None:
        raise MissingProgram(program=emulator.PROGRAM, package=package_of(emulator.PROGRAM))
    about = _Drill(repository, point, options, context)
    report = about.report
    with recorded(repository, "drilled", context, volume=point.volume) as doing:
        doing.points, doing.facts["ok"] = [point.id], False
        try:
            about.carry_out()
            doing.facts["ok"], doing.exit = report.ok, 0 if report.ok else ATTENTION
        except BlockbakError as error:
            report.differences.append(str(error))
            raise
        finally:
            doing.facts |= {
                "seconds": dict(report.seconds), "rto_seconds": report.rto_seconds,
                "differences": list(report.differences),
            }  # fmt: skip
    return report


class _Drill:
    """One drill under way."""

    def __init__(self, repository: Repository, point: Point, options: DrillOptions, context: Context) -> None:
        self.repository, self.point, self.options, self.context = repository, point, options, context
        opening = point.images[0].opening
        self.report = Report(point.id, point.volume, options.target, opening.device_bytes)
        self.device = ""

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        """Its seconds go into the report, also where it fails."""
        self.context.check()
        began = self.context.timer()
        try:
            yield
        finally:
            self.report.seconds[name] = round(self.context.timer() - began, 3)

    def differs(self, sentence: str) -> None:
        """Something is not as it should be."""
        self.report.differences.append(sentence)

    # --- the copy --------------------------------------------------------------------------------------------

    def carry_out(self) -> None:
        """All of it."""
        scanners.ensure()
        with ExitStack() as stack:
            file = self._onto_device(stack) if self.options.target else self._into_scratch(stack)
            with reading(f"/proc/self/fd/{file}") as read:
                self._prove(file, read, stack)

    def _onto_device(self, stack: ExitStack) -> int:
        """Restore to the device; its descriptor."""
        options, report = self.options, self.report
        request = restore.Request(f"{report.volume}@{report.point}", options.target, overwrite=options.overwrite)
        looked = look_at_target(options.target)
        if looked is None or not looked.is_block:
            raise BadTarget(path=options.target, reason="a drill takes a device that is there, or makes its own file")
        with self._step("restore"):
            done = restore.restore(self.repository, request, self.context)
        assert isinstance(done, restore.Report)  # noqa: S101 - only a dry run gives a plan
        report.written_bytes, report.verified_bytes = done.written_bytes, done.verified_bytes
        self._name_unreadable(sum(one["length"] for one in done.unreadable))
        report.notes.append(f"{options.target} keeps the copy, as the drill left it: journals may have been replayed.")
        descriptor = os.open(looked.path, os.O_RDWR | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        self.device = looked.path
        return descriptor

    def _into_scratch(self, stack: ExitStack) -> int:
        """Restore to a file without a name; its descriptor."""
        context, report = self.context, self.report
        volume, _, _ = find(self.repository, f"{report.volume}@{report.point}")
        lock = volume.locked(exclusive=False, wait=context.wait, check=context.check, say=context.say)
        # The images stay open until the copy has been read back.
        with lock, ExitStack() as images:
            volume, catalog, point = find(self.repository, f"{report.volume}@{report.point}")
            return self._restored(volume, catalog, point, images, stack)

    def _restored(self, volume: Volume, catalog: Catalog, point: Point, images: ExitStack, stack: ExitStack) -> int:
        context, report = self.context, self.report
        with self._step("restore"):
            opened = open_point(volume, catalog, point, images)
            opening = opened.view.top.opening
            size = align_up(opening.device_bytes, opening.logical_sector)
            self._name_unreadable(extent.total(opened.summary.bad))
            directory = self._directory(plan.room(opened.summary.stored_bytes))
            try:
                file = stack.enter_context(loops.nameless(directory, size))
            except OSError as error:
                raise BadTarget(path=directory, reason=error.strerror) from error
            content = PointContent(opened.view, whole(opened.view), keep_going=False)
            target = images.enter_context(TargetWriter(f"/proc/self/fd/{file}", kernel=context.kernel))
            shared = Writing(content, target, "create", context, part=whole(opened.view))
            write_all(shared, context)
            target.flush()
        report.written_bytes = shared.written_bytes
        with self._step("read back"):
            # What was not written too: a hole must read as zeros.
            shared.touched[:] = True
            report.verified_bytes = read_back(content, shared, context)
        return file

    def _name_unreadable(self, lost: int) -> None:
        if lost:
            self.differs(f"{lost} bytes could not be read from the source when the point was made; they are zeros.")

    def _directory(self, needed: int) -> str:
        """The first directory with room. Raises NoDrillRoom, TargetHolds, BadTarget."""
        named = self.options.scratch
        most = -1
        candidates = [named] if named else [self.context.state_dir, tempfile.gettempdir()]
        for directory in candidates:
            if above := repository_above(os.path.join(os.path.realpath(directory), "scratch")):
                if named:
                    raise TargetHolds(path=named, what=f"a part of the repository {above}")
                continue
            try:
                if not named:
                    os.makedirs(directory, mode=0o700, exist_ok=True)
                about = os.statvfs(directory)
            except OSError as error:
                if named:
                    raise BadTarget(path=named, reason=error.strerror) from error
                continue
            free = about.f_bavail * about.f_frsize
            if free >= needed:
                self.report.target = f"a file in {directory}"
                return directory
            most = max(most, free)
        raise NoDrillRoom(path=" and ".join(candidates), free=max(most, 0), needed=needed, point=self.report.point)

    # --- the proof -------------------------------------------------------------------------------------------

    def _prove(self, file: int, read: Read, stack: ExitStack) -> None:
        report, options = self.report, self.options
        opening = self.point.images[0].opening
        with self._step("look"):
            table = partition.parse(read, opening.logical_sector, opening.device_bytes, guess=True)
            courses = list(_courses(read, table, opening))
            report.notes += table.notes if table is not None else ()
        report.unseen += [f"{one.place.name}: {one.unseen}." for one in courses if one.unseen]
        shown = all(self._may_be_shown(one, file) for one in courses if not one.place.number)
        if shown and not self.device:
            sector = opening.logical_sector if table is None else table.sector_bytes
            self.device = stack.enter_context(loops.attached(file, sector_bytes=sector))
        # The mounts go before the loop devices, which are held by them.
        with apart(self.context.run_dir) as place:
            if options.boot:
                # Before anything of the copy is changed: what boots is what was saved.
                self._boot(place, table, read)
            mounted = []
            for one in courses if shown else ():
                if one.fstype or one.checker is not None:
                    mounted += self._look_into(one, file, place, stack)
            if options.check:
                self._run_check(place, mounted)

    def _may_be_shown(self, one: Course, file: int) -> bool:
        """Whether a place may be a device of its own: there LVM, md or the kernel's btrfs might take it for the
        original. A btrfs gets an id of its own before.
        """
        kind = one.found.type if one.found is not None else ""
        if kind == "btrfs" and not one.unseen:
            return self._rename_btrfs(one, file)
        return kind not in _BELONGS_ELSEWHERE

    def _boot(self, place: Apart, table: PartitionTable | None, read: Read) -> None:
        report, options = self.report, self.options
        if not self.device:
            report.booted = False
            self.differs("It cannot be booted: it is not a disk with partitions, and is not shown as a device.")
            return
        with self._step("boot"):
            outcome = emulator.boot(
                place, self.device, pattern=options.boot_pattern, seconds=options.boot_seconds,
                firmware=plan.firmware(table, read), overlay_dir=self._overlay(), check=self.context.check,
            )  # fmt: skip
        report.booted, report.console = outcome.seen, outcome.console
        if not outcome.seen:
            last = plan.told("\n".join(outcome.console.splitlines()[-1:]))
            self.differs(
                f"The copy did not say {options.boot_pattern!r} on its serial console: {outcome.reason}"
                + (f"; the last line was: {last}" if last else "; nothing was said")
                + "."
            )

    def _overlay(self) -> str:
        """Where QEMU puts what the booted system writes."""
        named = self.options.scratch
        return named or (self.context.state_dir if os.path.isdir(self.context.state_dir) else tempfile.gettempdir())

    def _look_into(self, one: Course, file: int, place: Apart, stack: ExitStack) -> list[int]:
        """Replay, check and mount a file system; the number of its mount point, if it is mounted."""
        report, number = self.report, one.place.number
        assert one.found is not None  # noqa: S101 - only then it has a course
        looked = Looked(number, one.found.type, one.found.label, one.found.uuid)
        report.filesystems.append(looked)
        name = f"{one.place.name} ({one.found.type})"
        node = self.device
        if number:
            if not self._may_be_shown(one, file):
                return []
            sector = self.point.images[0].opening.logical_sector
            node = stack.enter_context(
                loops.attached(file, start=one.place.start, length=one.place.length, sector_bytes=sector)
            )
        if one.unmark is not None:
            offset, value = one.unmark
            _put(node, offset, bytes([value]))
            report.notes.append(f"{_capital(name)} was in use when the point was made; it has no journal to replay.")
        if one.replay:
            with self._step(f"replay {number}"):
                looked.replayed = self._replayed(one, node, place, name)
        if self.options.checker and one.checker is not None:
            with self._step(f"check {number}"):
                looked.checked = self._checked(one, node, place, name)
        with self._step(f"mount {number}"):
            try:
                options = ("ro", *one.options)
                place.mount(node, one.place.mount, one.fstype, options, self.context.check)
            except (CommandFailed, MissingProgram) as error:
                self.differs(f"{_capital(name)} could not be mounted: {plan.told(str(error))}")
                return []
        looked.mounted = True
        return [one.place.mount]

    def _rename_btrfs(self, one: Course, file: int) -> bool:
        """Give a btrfs an id of its own; whether that could be done."""
        place = one.place
        try:
            with reading(f"/proc/self/fd/{file}") as read:
                inside = partition.inside(read, place.start, place.length)
                blocks = list(btrfsid.renamed(inside, place.length, bytes.fromhex(self.context.hex_id(32))))
            for offset, block in blocks:
                # Renamed in part, it would be taken for the original after all.
                if os.pwrite(file, block, place.start + offset) != len(block):
                    raise OSError(errno.EIO, "its new id could not be written whole")  # noqa: TRY301 - told as one below
            os.fsync(file)
        except (ValueError, OSError) as error:
            name = _capital(f"{place.name} (btrfs)")
            self.differs(f"{name} was not looked into, for it would be taken for the original: {error}.")
            return False
        return True

    def _replayed(self, one: Course, node: str, place: Apart, name: str) -> bool:
        """Have the kernel replay its journal, as after a crash."""
        try:
            where = place.mount(node, one.place.mount, one.fstype, ("rw", *one.options), self.context.check)
            place.unmount(where, self.context.check)
        except CommandFailed as error:
            self.differs(f"The journal of {name} could not be replayed: {plan.told(str(error))}")
            return False
        return True

    def _checked(self, one: Course, node: str, place: Apart, name: str) -> str:
        """What its own checker says of it."""
        assert one.checker is not None  # noqa: S101 - else it is not asked
        program = one.checker.argv[0]
        try:
            done = place.run(
                [*one.checker.argv, node], deadline=CHECKER_SECONDS, check=self.context.check, accept=range(128)
            )
        except MissingProgram as error:
            self.differs(f"{_capital(name)} was not checked: {error} {error.hint}.")
            return f"{program} is not installed"
        except CommandFailed as error:
            self.differs(f"{_capital(name)} was not checked: {plan.told(str(error))}")
            return f"{program} failed"
        if done.status == 0:
            return "clean"
        said = plan.told(f"{done.stdout}\n{done.stderr}")
        if done.status in one.checker.flawed:
            self.differs(f"{program} found errors in {name} (exit status {done.status}): {said}")
            return "errors"
        self.differs(f"{program} could not check {name} (exit status {done.status}): {said}")
        return f"{program} failed"

    def _run_check(self, place: Apart, mounted: Sequence[int]) -> None:
        report, options = self.report, self.options
        argv = [_program(options.check[0]), *options.check[1:]]
        env = plan.environment(report.point, report.volume, self.device, place.base, list(mounted))
        with self._step("check command"):
            try:
                done = place.run(
                    argv, deadline=options.check_seconds, check=self.context.check, env=env, accept=range(256),
                    umask=_CHECK_UMASK,
                )  # fmt: skip
            except CommandFailed as error:
                report.check_output = str(error.fields["stderr"])
                self.differs(f"The check command failed: {plan.told(str(error))}")
                return
        report.check_status = done.status
        report.check_output = "\n".join(part for part in (done.stdout.strip(), done.stderr) if part)[-OUTPUT:]
        if done.status:
            told = plan.told(done.stderr or done.stdout)
            ended = f"The check command {options.check[0]} ended with {done.status}"
            self.differs(f"{ended}: {told}" if told else f"{ended}.")


def _courses(read: Read, table: PartitionTable | None, opening: Opening) -> Iterator[Course]:
    for place in plan.places(table, opening.device_bytes):
        inside = partition.inside(read, place.start, place.length)
        yield plan.course(place, filesystem(inside, place.length), inside)


def _put(node: str, offset: int, data: bytes) -> None:
    """Write something to the copy."""
    with open(node, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)
        os.fsync(file.fileno())


def _program(word: str) -> str:
    """A program's path: what is run apart starts in another directory."""
    return os.path.abspath(word) if "/" in word else word


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
