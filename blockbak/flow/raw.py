"""Makes a raw image of a device: its bytes in a plain file, or in order on standard output, and a sidecar."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime

import numpy as np

from blockbak.errors import (
    BadTarget,
    ImageInRepository,
    NoSpace,
    SourceHoldsImage,
    StoreFailed,
    TargetExists,
    TargetFailed,
    TargetFull,
    TargetInUse,
)
from blockbak.flow import mapfile
from blockbak.flow.backup import both
from blockbak.flow.cold import planned, resting
from blockbak.flow.context import Context, iso
from blockbak.flow.rawcheck import peek
from blockbak.flow.rawmap import MapSum
from blockbak.flow.scan import Found, scan_into
from blockbak.flow.show import filesystems_in
from blockbak.flow.source import AtRest, Seen, Settled, Source, check_source, look_at, resolve_mode
from blockbak.flow.source import Request as SourceRequest
from blockbak.flow.target import new_file
from blockbak.host import device as devices
from blockbak.host import pipes, usage
from blockbak.host.blockio import (
    PIECE_BYTES,
    RETRIES,
    Bytes,
    DiskReader,
    PartialFile,
    TargetWriter,
    is_marked,
    sync_directory,
)
from blockbak.host.device import Device
from blockbak.image import sidecar
from blockbak.image.format import BLOCK_DEFAULT, window_for
from blockbak.image.sidecar import Range, Sidecar
from blockbak.image.writer import Stopped, Turns
from blockbak.model import extent, partition
from blockbak.model.extent import DATA
from blockbak.model.hashmap import Geometry
from blockbak.model.identity import plain
from blockbak.model.quiesce import RestOptions
from blockbak.repository.local import Repository, repository_above
from blockbak.units import SECTOR

STREAM = "-"
"""Standard output in place of a file's name, or standard input."""
_MAPFILE = ".mapfile"


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``file`` is ``-`` for standard output, for which ``sidecar`` may name where its
    sidecar goes; a file's lies beside it. ``overwrite`` stands for ``--yes``, ``limit`` is the most bytes to read
    a second. ``rest``, ``retries`` and ``strict`` are as those of ``flow.source.Request``.
    """

    source: str
    file: str
    overwrite: bool = False
    limit: int | None = None
    sidecar: str | None = None
    rest: RestOptions | None = None
    retries: int = RETRIES
    strict: bool = False

    @property
    def streams(self) -> bool:
        """Whether it goes to standard output."""
        return self.file == STREAM


@dataclass(frozen=True, slots=True)
class Rested:
    """A device whose users are gone, open: what was looked at, the source, and what was stopped, in order."""

    seen: Seen
    source: Source
    stopped: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """What would be made. Sizes are bytes; ``sidecar`` is empty where none is written. ``rest`` is what would be done
    to bring the device to rest.
    """

    source: str
    path: str
    sidecar: str
    device_bytes: int
    mode: str
    replaces: list[str]
    rest: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """A raw image that was made. Sizes are bytes: ``stored_bytes`` are those that the file takes of its disk, or
    that went to standard output. ``sidecar`` and ``mapfile`` are empty where there is none.
    """

    source: str
    path: str
    sidecar: str
    mapfile: str
    device_bytes: int
    read_bytes: int
    stored_bytes: int
    bad_bytes: int
    unreadable: list[Range]
    mode: str
    consistency: str
    root: str
    stopped: list[str]
    seconds: float
    notes: list[str]
    attention: bool


# --- what is refused -------------------------------------------------------------------------------


def look(request: Request, repository: Repository | None, context: Context) -> Seen:
    """The device, looked at and found free, or, where it may be brought to rest, whoever uses it. Raises every error
    of the source and refusal trees.
    """
    asked = SourceRequest(request.source, mode="cold")
    device = look_at(request.source)
    check_source(device, repository, asked, context)
    check_place(device, request)
    return Seen(device, devices.identity(device), resolve_mode(device, "cold", rest=request.rest is not None), "")


def check_place(device: Device, request: Request) -> None:
    """The image must not lie on its own device. Raises SourceHoldsImage."""
    path = pipes.place_of(1) if request.streams else os.path.realpath(request.file)
    for place in (path, request.sidecar or ""):
        if place and usage.carries(device, place):
            raise SourceHoldsImage(path=device.path, file=place)


def places(request: Request) -> list[str]:
    """All names that an image takes, whether they are there or not."""
    if request.streams:
        return [request.sidecar] if request.sidecar else []
    path = os.path.realpath(request.file)
    return [path, path + sidecar.ENDING, path + _MAPFILE]


def _shown(request: Request) -> str:
    """The image's name as it was given; where that is a link, the file that it leads to, beside which all else lies."""
    return os.path.realpath(request.file) if os.path.islink(request.file) else request.file


def check_file(request: Request, context: Context) -> list[str]:
    """What is there already, of what the image would take the names of. Raises TargetExists unless it may be
    replaced; BadTarget, TargetInUse and ImageInRepository in any case.
    """
    there = []
    for path in places(request):
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            raise BadTarget(path=path, reason=f"there is no directory {folder}")
        if (repository := repository_above(os.path.realpath(path))) is not None:
            raise ImageInRepository(path=path, repository=repository)
        for name in (path, f"{path}.partial"):
            if not os.path.lexists(name):
                continue
            if not os.path.isfile(name):
                raise BadTarget(path=name, reason="it is there, and is not a file")
            # A run that was killed left it, if it says so: that is no reason to ask.
            if not (name == f"{path}.partial" and is_marked(name)):
                there.append(name)
    if not request.streams and _is_node_folder(places(request)[0]):
        raise BadTarget(path=request.file, reason="device nodes live there, and there is no such one")
    if there and not request.overwrite:
        raise TargetExists(path=there[0])
    for name in there:
        if users := usage.users(devices.look(name)):
            raise TargetInUse(path=name, holders=", ".join(map(str, users)))
    context.check()
    return there


def _is_node_folder(path: str) -> bool:
    """/dev and what is below it on the same file system; /dev/shm is another place."""
    folder = os.path.dirname(path)
    return f"{folder}/".startswith("/dev/") and os.stat(folder).st_dev == os.stat("/dev").st_dev


@contextlib.contextmanager
def at_rest(request: Request, repository: Repository | None, context: Context) -> Iterator[Rested]:
    """A device that nothing uses, or whose users are brought to rest until it is left, open. Raises every error of the
    source and refusal trees, and of bringing it to rest.
    """
    seen = look(request, repository, context)
    asked = SourceRequest(request.source, mode="cold")
    if request.rest is None or not seen.device.is_block:
        with closing(AtRest(seen, asked, context)) as source:
            yield Rested(seen, source)
        return
    with resting(seen, asked, _kept(request, repository), context, request.rest) as brought:
        yield Rested(seen, brought, brought.stopped)


def _kept(request: Request, repository: Repository | None) -> dict[str, str]:
    """What must go on while the device is at rest."""
    own = {os.path.dirname(os.path.realpath(path)): "the image" for path in places(request)}
    return own | ({repository.path: "the repository"} if repository is not None else {})


# --- where it goes ---------------------------------------------------------------------------------


class _FileSink:
    """Into a file: blocks of zeros stay holes."""

    def __init__(self, target: TargetWriter, known: MapSum) -> None:
        self.geometry = known.geometry
        self._target, self._known = target, known

    def hand(self) -> Callable[[Found], None]:
        """Safe from several threads: each piece has its own place."""
        return self._take

    def _take(self, found: Found) -> None:
        block = self.geometry.block_bytes
        stored = found.kinds == DATA
        start = found.first_block * block
        for low, high in zip(*(edges.tolist() for edges in extent.true_runs(stored)), strict=True):
            self._target.write(start + low * block, found.data[low * block : high * block])
        self._known.add(found.first_block, found.rows, stored, found.bad)

    def stop(self) -> None:
        """Nobody waits for anybody."""


class _PipeSink:
    """Into a pipe: in order, zeros too."""

    def __init__(self, known: MapSum, fd: int, check: Callable[[], None]) -> None:
        self.geometry = known.geometry
        self._known, self._check = known, check
        self._turns, self._over = Turns(), threading.Event()
        self.pipe = pipes.PipeWriter(fd, self._look)

    def _look(self) -> None:
        """Asked while the other end is waited for."""
        if self._over.is_set():
            raise Stopped
        self._check()

    def hand(self) -> Callable[[Found], None]:
        """One piece waits for those before it."""
        return self._take

    def _take(self, found: Found) -> None:
        self._known.add(found.first_block, found.rows, found.kinds == DATA, found.bad)
        with self._turns.turn(found.number):
            if len(found.data):
                self.pipe.write(found.data)
                return
            start = found.first_block * self.geometry.block_bytes
            left = min(len(found.kinds) * self.geometry.block_bytes, self.geometry.device_bytes - start)
            zeros = np.zeros(min(PIECE_BYTES, left), np.uint8)
            while left:
                part: Bytes = zeros[: min(len(zeros), left)]
                self.pipe.write(part)
                left -= len(part)

    def stop(self) -> None:
        """Release who waits for a turn, or for the other end."""
        self._over.set()
        self._turns.stop()


# --- making it -------------------------------------------------------------------------------------


def plan(request: Request, repository: Repository | None, context: Context) -> Plan:
    """What would be done, without a byte written. Raises what ``make`` raises before the first one."""
    replaces = check_file(replace(request, overwrite=True), context)
    seen = look(request, repository, context)
    beside = (request.sidecar or "") if request.streams else _shown(request) + sidecar.ENDING
    steps = []
    if request.rest is not None and seen.device.is_block:
        steps = planned(seen.device, request.rest, list(_kept(request, repository).items()), context)
    return Plan(seen.device.label, _shown(request), beside, seen.device.size, seen.mode, replaces, steps)


def make(request: Request, context: Context, *, repository: Repository | None = None) -> Report:
    """Make a raw image. ``repository`` is one that must not lie on the device.

    Nothing half-made stays. Raises every error of the source and refusal trees, BadTarget, TargetFull,
    TargetFailed, PipeFailed, Interrupted.
    """
    clock = context.timer()
    check_file(request, context)
    with at_rest(request, repository, context) as rested:
        check_place(rested.seen.device, request)
        watched = replace(context, check=both(context.check, rested.source.check))
        job = _Job(request, rested, watched, clock, rested.source.moment or context.now())
        return _to_pipe(job) if request.streams else _to_file(job)


@dataclass(frozen=True, slots=True)
class _Job:
    """A raw image that is being made, since ``clock``; its content is that of ``moment``."""

    request: Request
    rested: Rested
    context: Context
    clock: float
    moment: datetime

    @property
    def reader(self) -> DiskReader:
        """The device's bytes."""
        return self.rested.source.reader

    def new_map(self) -> MapSum:
        """The map of the device, still empty. Raises SourceTooLarge."""
        size = self.reader.size
        return MapSum(Geometry(size, BLOCK_DEFAULT, window_for(size, BLOCK_DEFAULT)))

    def new_sidecar(self, known: MapSum, read_bytes: int) -> tuple[Sidecar, Settled]:
        """What is known of the image now that all is read. Raises SourceChangedSize, SourceVanished."""
        seen, source, reader, context = self.rested.seen, self.rested.source, self.reader, self.context
        table = partition.parse(lambda offset, length: peek(reader, offset, length), reader.logical, reader.size)
        found = filesystems_in(lambda offset, length: peek(reader, offset, length), table, reader.size)
        # The last that is asked: what was read for the table is covered by the counters too.
        settled = source.settle()
        kept, bad_bytes = source.circumstances, extent.total(known.bad)
        notes = [*settled.notes, *([f"{bad_bytes} bytes could not be read."] if bad_bytes else [])]
        said = Sidecar(
            blockbak_sidecar=sidecar.VERSION, program=context.program, host=plain(context.host),
            source=plain(seen.device.label), identity=seen.identity, device_bytes=reader.size,
            logical_sector=reader.logical, physical_sector=reader.physical,
            created=iso(self.moment), seconds=round(context.timer() - self.clock, 3),
            mode=seen.mode, consistency=settled.consistency, read_bytes=read_bytes,
            stopped=[plain(one) for one in self.rested.stopped], notes=[plain(one) for one in notes],
            partition_table=table, filesystems=found, lvm_metadata=kept.lvm_metadata, hooks=kept.hooks,
            block_bytes=known.geometry.block_bytes, bad=sidecar.ranges(known.bad), root=known.root,
            sections=[row.tobytes().hex() for row in known.digests],
        )  # fmt: skip
        return said, settled

    def report(self, said: Sidecar, settled: Settled, stored: int, beside: str, lost: str) -> Report:
        """What is told of it."""
        bad_bytes = sum(one.length for one in said.bad)
        return Report(
            source=said.source, path=_shown(self.request), sidecar=beside, mapfile=lost, device_bytes=said.device_bytes,
            read_bytes=said.read_bytes, stored_bytes=stored, bad_bytes=bad_bytes, unreadable=said.bad,
            mode=said.mode, consistency=said.consistency, root=said.root, stopped=said.stopped,
            seconds=round(self.context.timer() - self.clock, 3), notes=said.notes,
            attention=settled.attention or bad_bytes > 0,
        )  # fmt: skip


def _scan(job: _Job, sink: _FileSink | _PipeSink) -> int:
    """Read all of the device; bytes that were read."""
    context = job.context
    job.reader.retries, job.reader.strict = job.request.retries, job.request.strict
    context.progress.begin(f"{job.rested.seen.device.label} raw", job.reader.size)
    try:
        return scan_into(job.reader, sink, context, job.request.limit)
    finally:
        context.progress.end()


def _to_file(job: _Job) -> Report:
    context, kernel = job.context, job.context.kernel
    path, beside, map_path = places(job.request)
    known = job.new_map()
    done: list[tuple[Sidecar, Settled]] = []
    small: list[PartialFile] = []
    cleared = False
    with ExitStack() as stack:

        def ready() -> None:
            """The image is whole and flushed: make what lies beside it so, then clear the names."""
            nonlocal cleared
            (said, _) = done[0]
            if said.bad:
                text = mapfile.text(said.unread, said.device_bytes).encode()
                small.append(stack.enter_context(_hardened(map_path, text, context)))
            small.append(stack.enter_context(_hardened(beside, sidecar.encode(said), context)))
            context.check()
            kept = [one.path for one in small]
            # A sidecar must never lie beside another image than its own, so it is the first to go and the last to come.
            for old in (beside, map_path, f"{map_path}.partial", path):
                if os.path.lexists(old) and old not in kept:
                    kernel.unlink(old)
                    sync_directory(os.path.dirname(path), kernel)
            cleared = True

        try:
            with new_file(path, job.reader.size, context, overwrite=job.request.overwrite, ready=ready) as target:
                read_bytes = _scan(job, _FileSink(target, known))
                target.flush()
                done.append(job.new_sidecar(known, read_bytes))
            # The image must be durable under its name before the sidecar says that it is whole.
            for one in small:
                with _as_target(one.final):
                    one.seal()
        except BaseException:
            # What could not be made durable is void, under whatever name.
            for named in (path, *(one.final for one in small if not one.path)) if cleared else ():
                with contextlib.suppress(OSError):
                    kernel.unlink(named)
            raise
    said, settled = done[0]
    stored = os.stat(path).st_blocks * SECTOR
    shown = _shown(job.request)
    return job.report(said, settled, stored, shown + sidecar.ENDING, shown + _MAPFILE if said.bad else "")


def _to_pipe(job: _Job) -> Report:
    beside, known = job.request.sidecar, job.new_map()
    sink = _PipeSink(known, 1, job.context.check)
    with closing(sink.pipe) as pipe:
        read_bytes = _scan(job, sink)
        pipe.sync()
    said, settled = job.new_sidecar(known, read_bytes)
    if beside:
        with _hardened(os.path.realpath(beside), sidecar.encode(said), job.context) as small, _as_target(beside):
            if os.path.lexists(small.final):
                job.context.kernel.unlink(small.final)
            small.seal()
    return job.report(said, settled, said.device_bytes, beside or "", "")


@contextlib.contextmanager
def _as_target(path: str) -> Iterator[None]:
    """What goes wrong with a small file beside an image, in words that speak of no repository."""
    try:
        yield
    except NoSpace as error:
        raise TargetFull(path=path) from error
    except StoreFailed as error:
        raise TargetFailed(action="Writing", path=path, reason=error.fields["reason"]) from error
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error


@contextlib.contextmanager
def _hardened(path: str, data: bytes, context: Context) -> Iterator[PartialFile]:
    """A small file, flushed, which has its name but for the ending; it goes again unless it is sealed."""
    with _as_target(path):
        if os.path.lexists(f"{path}.partial"):
            # Of a run that was killed: it was told when the names were looked at.
            context.kernel.unlink(f"{path}.partial")
        partial = PartialFile(path, path, context.kernel)
    with partial:
        with _as_target(path):
            partial.write(0, [data])
            partial.harden()
        yield partial
