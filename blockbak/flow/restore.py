"""Brings a point back onto a device or into a file, and reads it back."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from blockbak.errors import (
    BadTarget,
    BlockbakError,
    Damage,
    DamagedImage,
    Interrupted,
    NoSuchSource,
    NotABlockSource,
    SourceError,
    TargetExists,
    TargetHolds,
    TargetInUse,
    TargetSectorSize,
    TargetTooSmall,
    VerificationFailed,
)
from blockbak.flow import workers
from blockbak.flow.context import Context
from blockbak.flow.points import Opened, find, open_point, open_reader
from blockbak.host import device as devices
from blockbak.host import usage
from blockbak.host.blockio import PIECE_BYTES, TargetWriter, aligned, sync_directory
from blockbak.host.device import Device
from blockbak.image.reader import ImageReader
from blockbak.image.view import Flaw, PointView, SectionView, Summary
from blockbak.model import extent, hashmap, partition
from blockbak.model.chain import Image, Point
from blockbak.model.extent import BAD, Extents
from blockbak.repository.local import Catalog, Repository, Volume
from blockbak.units import KIB, MIB

_ZERO_RUN = 256 * KIB
"""On a device, shorter runs of zeros are written with their neighbours: one request instead of three."""
_SAMPLED_SECTIONS, _SAMPLED_BLOCKS = 8, 8
_MAPFILE_BEGINS = "# Mapfile."


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``overwrite`` stands for ``--yes``."""

    point: str
    target: str
    overwrite: bool = False
    verify: bool = True
    verify_first: bool = False
    keep_going: bool = False
    mapfile: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore will do. ``method`` is ``create`` (a new file), ``write`` (everything) or ``differ``
    (read the target, write what differs).
    """

    point: str
    volume: str
    images: list[str]
    target: str
    target_bytes: int
    device_bytes: int
    data_bytes: int
    bad_bytes: int
    method: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore did. ``flaws`` and ``unreadable`` are ranges that are zeros on the target instead of
    content: damaged in the repository, or never read from the source.
    """

    plan: Plan
    written_bytes: int
    verified_bytes: int
    flaws: list[Flaw]
    unreadable: list[dict[str, int]]
    mapfile: str
    seconds: float

    @property
    def attention(self) -> bool:
        """Something a person must look at."""
        return bool(self.flaws or self.unreadable)


# --- the target ------------------------------------------------------------------------------------


def look_at_target(path: str) -> Device | None:
    """The target as it is now; None for a file that does not exist. Raises BadTarget."""
    if not path:
        raise BadTarget(path="''", reason="an empty name names nothing")
    try:
        return devices.look(path)
    except NoSuchSource as error:
        directory = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(directory):
            raise BadTarget(path=path, reason=f"there is no directory {directory}") from error
        # Where device nodes live, a name that is not there is a slip of the pen; /dev/shm is another place.
        if f"{directory}/".startswith("/dev/") and os.stat(directory).st_dev == os.stat("/dev").st_dev:
            raise BadTarget(path=path, reason="there is no such device") from error
        return None
    except NotABlockSource as error:
        what = error.fields["what"]
        raise BadTarget(path=path, reason=f"it is {what}, not a block device or a file") from error
    except SourceError as error:
        raise BadTarget(path=path, reason=str(error).removesuffix(".")) from error


def check_target(
    path: str,
    target: Device | None,
    view: PointView,
    repository: Repository,
    context: Context,
    *,
    overwrite: bool,
) -> None:
    """Refuse every target that must not be written. Raises a Refused, naming the reason."""
    if _inside_repository(os.path.realpath(path)) or _is_stored(path, repository):
        raise TargetHolds(path=path, what="a part of a repository")
    if target is None:
        return
    for place, what in (
        (repository.path, "the repository"),
        (context.state_dir, "blockbak's state directory"),
    ):
        if usage.carries(target, place):
            raise TargetHolds(path=path, what=what)
    if system := usage.holds_running_system(target):
        raise TargetHolds(path=path, what=f"the running system ({system})")
    users = usage.users(target)
    if not devices.identity(target).surely_same_as(view.top.opening.identity):
        # A disk of an inactive volume group may be rolled back onto itself; any other may not be lost to it.
        users += usage.memberships(target)
    if users:
        raise TargetInUse(path=path, holders=", ".join(str(use) for use in users))
    if target.is_block:
        _check_device(path, target, view)
    if not overwrite:
        raise TargetExists(path=path)


def _check_device(path: str, target: Device, view: PointView) -> None:
    """Size and sectors of a device. Raises BadTarget, TargetTooSmall, TargetSectorSize."""
    if target.read_only:
        raise BadTarget(path=path, reason="it is read-only")
    need = view.geometry.device_bytes
    if target.size < need:
        raise TargetTooSmall(path=path, have=target.size, need=need)
    have, want = target.logical_sector, view.top.opening.logical_sector
    if have != want and partition_table(view) is not None:
        raise TargetSectorSize(path=path, have=have, need=want)


def _inside_repository(path: str) -> bool:
    """Whether a directory above ``path`` is a repository."""
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.path.isfile(os.path.join(path, "repository.json")) and os.path.isfile(os.path.join(path, "rescue.py")):
            return True
    return False


def _is_stored(path: str, repository: Repository) -> bool:
    """Whether ``path`` is another name (a hard link) of a file in the repository."""
    try:
        mine = os.stat(path)
    except OSError:
        return False
    if mine.st_nlink < 2:
        return False
    places = [repository.path, *(volume.path for volume in repository.volumes())]
    return any(os.path.samestat(mine, entry.stat()) for place in places for entry in os.scandir(place))


def reader(view: PointView) -> Callable[[int, int], bytes]:
    """``read(offset, length)`` of the point's content, for the parsers of partition tables; what is
    damaged reads as zeros.
    """

    def read(offset: int, length: int) -> bytes:
        geometry = view.geometry
        length = max(0, min(length, geometry.device_bytes - offset))
        out = bytearray()
        while length > 0:
            number = offset // geometry.section_bytes
            start, end = geometry.section_range(number)
            low = (offset - start) // geometry.window_bytes * geometry.window_bytes
            size = min(geometry.window_bytes, end - start - low)
            data = np.zeros(size, np.uint8)
            with contextlib.suppress(Damage):
                view.read(view.section(number), low // geometry.block_bytes, data)
            part = data[offset - start - low :][:length].tobytes()
            out += part
            offset, length = offset + len(part), length - len(part)
        return bytes(out)

    return read


def partition_table(view: PointView) -> partition.PartitionTable | None:
    """The partition table inside the point, if there is one."""
    return partition.parse(reader(view), view.top.opening.logical_sector, view.geometry.device_bytes)


def _mostly_equal(view: PointView, target: TargetWriter) -> bool:
    """Does a sample of the target already hold the point? Then reading it first is the quicker way."""
    geometry, equal, seen = view.geometry, 0, 0
    buffer = aligned(geometry.block_bytes)
    for number in np.unique(np.linspace(0, geometry.sections - 1, _SAMPLED_SECTIONS).astype(int)).tolist():
        try:
            section = view.section(number)
        except Damage:
            continue  # only where the restore goes on without it
        stored = np.flatnonzero(section.stored)
        if not len(stored):
            continue
        picks = np.unique(np.linspace(0, len(stored) - 1, _SAMPLED_BLOCKS).astype(int))
        for index in stored[picks].tolist():
            block = number * hashmap.BLOCKS_PER_SECTION + index
            length = geometry.block_length(block)
            start = block * geometry.block_bytes
            if start + length > target.size:
                return False
            target.read(start, buffer, length)
            row = np.frombuffer(hashmap.digest(buffer[:length]), "<u8")
            equal += bool((row == section.rows[index]).all())
            seen += 1
    return seen > 0 and equal * 2 > seen


# --- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    section: SectionView
    low: int
    blocks: int
    start: int
    length: int


class _Sections:
    """Cuts the point into pieces; a section whose index is damaged becomes a flaw with ``keep_going``."""

    def __init__(self, view: PointView, *, keep_going: bool) -> None:
        self._view, self._keep_going = view, keep_going
        self.flaws: list[Flaw] = []
        self.lost: list[tuple[int, int]] = []

    def pieces(self, wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[_Job]:
        """All pieces in address order, or those of which ``wanted`` (bool per piece) is set."""
        geometry, block = self._view.geometry, self._view.geometry.block_bytes
        step = PIECE_BYTES // block
        per_section = geometry.section_bytes // PIECE_BYTES
        for number in range(geometry.sections):
            begin, end = geometry.section_range(number)
            if wanted is not None and not wanted[number * per_section : (number + 1) * per_section].any():
                continue
            try:
                section = self._view.section(number)
            except Damage as error:
                if not self._keep_going:
                    raise
                self.flaws.append(Flaw(begin, end - begin, str(error), self._view.top.name))
                self.lost.append((begin, end - begin))
                continue
            if not self._view.complete and wanted is None:
                self._name_missing(section, begin)
            blocks = geometry.section_blocks(number)
            for low in range(0, blocks, step):
                start = begin + low * block
                if wanted is None or wanted[start // PIECE_BYTES]:
                    yield _Job(section, low, min(step, blocks - low), start, min(PIECE_BYTES, end - start))

    def _name_missing(self, section: SectionView, begin: int) -> None:
        """Without the base, blocks that no newer image holds become zeros; each run of them is a flaw."""
        block, size = self._view.geometry.block_bytes, self._view.geometry.device_bytes
        for low, high in _pairs(section.kinds == extent.ABSENT):
            start, end = begin + low * block, min(begin + high * block, size)
            reason = "the image that holds it is missing or damaged"
            self.flaws.append(Flaw(start, end - start, reason, self._view.layers[0].name))


class _Writing:
    """What the workers of one restore share."""

    def __init__(
        self, view: PointView, target: TargetWriter, method: str, context: Context, *, keep_going: bool
    ) -> None:
        self.view, self.target, self.method, self.context = view, target, method, context
        self.keep_going = keep_going
        self.flaws: list[Flaw] = []
        self.written_bytes = 0
        self.done = np.zeros(-(-view.geometry.device_bytes // PIECE_BYTES), bool)
        self.touched = np.zeros(len(self.done), bool)
        self._guard = threading.Lock()

    def account(self, job: _Job, written: int) -> None:
        """A piece is on the target."""
        index = job.start // PIECE_BYTES
        with self._guard:
            self.done[index] = True
            # What was not written into a new file is a hole; what did not differ was just read.
            self.touched[index] |= written > 0 or self.method == "write"
            self.written_bytes += written
        self.context.progress.advance(job.length, written)

    def damaged(self, flaws: list[Flaw]) -> None:
        """Content that is not good: noted with ``keep_going``, else the end."""
        if not flaws:
            return
        with self._guard:
            self.flaws += flaws
        if not self.keep_going:
            flaw = flaws[0]
            raise DamagedImage(
                file=flaw.file,
                reason=f"{flaw.reason}, at bytes {flaw.start} to {flaw.start + flaw.length} of the volume; "
                f"written so far: {self.written_ranges()}",
            )

    def written_ranges(self) -> str:
        """The ranges that are complete, for people."""
        starts, ends = extent.true_runs(self.done)
        size = self.view.geometry.device_bytes
        pairs = [
            f"{start * PIECE_BYTES} to {min(end * PIECE_BYTES, size)}"
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        ]
        return ", ".join(pairs) or "nothing"


class _Writer:
    """One worker of a restore."""

    def __init__(self, shared: _Writing) -> None:
        self._shared = shared
        self._buffer = aligned(PIECE_BYTES)
        self._block = shared.view.geometry.block_bytes

    def __call__(self, job: _Job) -> None:
        differ = self._shared.method == "differ"
        wanted = self._differing(job) if differ else np.ones(job.blocks, bool)
        self._shared.account(job, self._write(job, wanted) if wanted.any() else 0)

    def _differing(self, job: _Job) -> npt.NDArray[np.bool_]:
        """Blocks of the piece that the target does not hold already. BAD ranges hold no promise, but
        their row is that of the zeros a restore puts there.
        """
        data = self._buffer[: job.length]
        self._shared.target.read(job.start, self._buffer, job.length)
        nonzero = hashmap.nonzero_blocks(data, self._block)
        rows = hashmap.digest_blocks(data, self._block, nonzero)
        return hashmap.changed_rows(rows, job.section.rows[job.low : job.low + job.blocks])

    def _write(self, job: _Job, wanted: npt.NDArray[np.bool_]) -> int:
        """Write the wanted blocks; bytes that now hold the point because of it."""
        block, target = self._block, self._shared.target
        stored = job.section.stored[job.low : job.low + job.blocks]
        data = self._buffer[: job.length]
        if (stored & wanted).any():
            self._read(job, wanted & stored, data)
        zero = wanted & ~stored
        if target.is_block:
            # Short runs of zeros go with the data around them.
            for low, high in _pairs(zero):
                if (high - low) * block < min(_ZERO_RUN, job.length):
                    zero[low:high] = False
                    data[low * block : high * block] = 0
        written = 0
        for low, high in _pairs(wanted & ~zero):
            part = data[low * block : high * block]
            target.write(job.start + low * block, part)
            written += len(part)
        if self._shared.method != "create":
            for low, high in _pairs(zero):
                length = min(high * block, job.length) - low * block
                target.zero(job.start + low * block, length)
                written += length
        return written

    def _read(self, job: _Job, wanted: npt.NDArray[np.bool_], data: npt.NDArray[np.uint8]) -> None:
        """Fill the windows of ``data`` that hold wanted blocks."""
        view = self._shared.view
        per_window = view.geometry.window_bytes // self._block
        held = np.logical_or.reduceat(wanted, np.arange(0, len(wanted), per_window))
        for low, high in _pairs(held):
            part = data[low * per_window * self._block : high * per_window * self._block]
            self._shared.damaged(view.read(job.section, job.low + low * per_window, part))


def _pairs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    starts, ends = extent.true_runs(mask)
    return zip(starts.tolist(), ends.tolist(), strict=True)


def _write_all(shared: _Writing, context: Context) -> _Sections:
    sections = _Sections(shared.view, keep_going=shared.keep_going)
    workers.run(sections.pieces(), lambda: _Writer(shared), workers=context.workers, check=context.check)
    for start, length in sections.lost:
        shared.target.zero(start, length)
    return sections


def _read_back(shared: _Writing, context: Context) -> int:
    """Read what was written past the page cache and compare; bytes compared. Raises VerificationFailed."""
    view, target = shared.view, shared.target
    block = view.geometry.block_bytes
    damaged = extent.table([f.start for f in shared.flaws], [f.start + f.length for f in shared.flaws], BAD)
    differing: list[int] = []
    compared: list[int] = []

    def make() -> Callable[[_Job], None]:
        buffer = aligned(PIECE_BYTES)

        def compare(job: _Job) -> None:
            target.read(job.start, buffer, job.length)
            data = buffer[: job.length]
            rows = hashmap.digest_blocks(data, block, hashmap.nonzero_blocks(data, block))
            unequal = hashmap.changed_rows(rows, job.section.rows[job.low : job.low + job.blocks])
            unequal &= ~extent.touched(damaged, job.start, block, job.blocks)
            differing.extend((np.flatnonzero(unequal) * block + job.start).tolist())
            compared.append(job.length)
            context.progress.advance(job.length)

        return compare

    sections = _Sections(view, keep_going=shared.keep_going)
    context.progress.begin("reading back", int(shared.touched.sum()) * PIECE_BYTES)
    try:
        workers.run(sections.pieces(shared.touched), make, workers=context.workers, check=context.check)
    finally:
        context.progress.end()
    if differing:
        raise VerificationFailed(path=target.path, blocks=len(differing), first=min(differing))
    return sum(compared)


# --- the use-case ----------------------------------------------------------------------------------


def _surviving(view: PointView) -> Summary:
    """What a walk over a damaged point's index sees: sections that cannot be read are left out."""
    stored, bad = 0, [extent.empty()]
    for number in range(view.geometry.sections):
        with contextlib.suppress(Damage):
            section = view.section(number)
            stored += int(np.count_nonzero(section.stored)) * view.geometry.block_bytes
            bad.append(extent.of_kind(section.extents, BAD))
    return Summary(min(stored, view.geometry.device_bytes), extent.coalesce(np.concatenate(bad)))


def _method(view: PointView, target: Device | None, path: str, context: Context) -> str:
    """How the target will be written."""
    if target is None:
        return "create"
    if devices.identity(target).same_as(view.top.opening.identity):
        return "differ"
    with TargetWriter(path, kernel=context.kernel) as opened:
        return "differ" if _mostly_equal(view, opened) else "write"


def _plan(opened: Opened, request: Request, target: Device | None, method: str) -> Plan:
    opening, notes = opened.view.top.opening, []
    if target is not None and devices.identity(target).surely_same_as(opening.identity):
        notes.append("The target is the volume itself: it is rolled back.")
    if target is not None and target.is_block and target.size > opening.device_bytes:
        notes.append(f"The target is larger by {target.size - opening.device_bytes} bytes; they are left alone.")
    bad = extent.total(opened.summary.bad)
    if bad:
        notes.append(f"{bad} bytes could not be read from the source; they become zeros.")
    return Plan(
        point=opening.point, volume=opening.volume, images=[image.file for image in opened.chain],
        target=request.target, target_bytes=target.size if target else 0, device_bytes=opening.device_bytes,
        data_bytes=opened.summary.stored_bytes, bad_bytes=bad, method=method, notes=notes,
    )  # fmt: skip


def _open_damaged(volume: Volume, catalog: Catalog, point: Point, stack: ExitStack) -> Opened:
    """For ``--keep-going``: the point as whole as it can be had, from the images that open at all."""
    try:
        return open_point(volume, catalog, point, stack)
    except Damage:
        chain = _remains(point, catalog)
        layers: list[ImageReader] = []
        for image in reversed(chain):
            try:
                layers.insert(0, open_reader(volume, image, stack))
            except Damage:
                if not layers:
                    raise
                break  # below it nothing is certain: what the newer images do not hold is lost
        view = PointView(layers)
        return Opened(view, chain[-len(layers) :], _surviving(view))


def _remains(point: Point, catalog: Catalog) -> list[Image]:
    """The images from the nearest full, or the first gap, up to the point."""
    by_key = {image.key: image for image in catalog.images}
    at: Image | None = min(point.images, key=lambda image: image.opening.kind)
    chain: list[Image] = []
    while at is not None:
        chain.insert(0, at)
        at = by_key.get((at.opening.parent or "", at.opening.parent_root or ""))
    return chain


def restore(repository: Repository, request: Request, context: Context, *, dry_run: bool = False) -> Plan | Report:
    """Restore a point; with ``dry_run`` only say how. Raises Damage before the first byte is written for
    everything but a frame's content, Refused for a target that must not be written, TargetFailed,
    VerificationFailed, Interrupted.
    """
    from blockbak.flow.verify import check_frames

    clock = context.timer()
    volume, _, _ = find(repository, request.point)
    with ExitStack() as stack:
        stack.enter_context(volume.locked(exclusive=False, wait=context.wait, check=context.check))
        volume, catalog, point = find(repository, request.point)
        opener = _open_damaged if request.keep_going else open_point
        opened = opener(volume, catalog, point, stack)
        view = opened.view
        target = look_at_target(request.target)
        check_target(request.target, target, view, repository, context, overwrite=request.overwrite or dry_run)
        method = _method(view, target, request.target, context)
        planned = _plan(opened, request, target, method)
        if dry_run:
            return planned
        if request.verify_first:
            check_frames(view, context)
        return _carry_out(_Restoring(repository, request, opened, target, planned), context, clock)


@dataclass(frozen=True, slots=True)
class _Restoring:
    """A restore that was planned: the point, the target as it was looked at (None: a file to be made), where."""

    repository: Repository
    request: Request
    opened: Opened
    target: Device | None
    planned: Plan

    @property
    def path(self) -> str:
        """What is opened: links are followed once, when the target is looked at."""
        return self.target.path if self.target else os.path.realpath(self.request.target)

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        return self.opened.view.geometry.device_bytes


def _carry_out(job: _Restoring, context: Context, clock: float) -> Report:
    path, size, request, planned = job.path, job.size, job.request, job.planned
    view, bad, method = job.opened.view, job.opened.summary.bad, planned.method
    with ExitStack() as stack:
        mapfile = stack.enter_context(_mapfile(job)) if request.keep_going else None
        target = stack.enter_context(_target(job, method, context))
        shared = _Writing(view, target, method, context, keep_going=request.keep_going)
        try:
            verified = _fill(shared, request, size, context)
        except Interrupted as error:
            if method == "create":
                raise
            raise Interrupted(state=f"{path} is not to be used (written: {shared.written_ranges()})") from error
        except BlockbakError as error:
            if method != "create":
                error.add_note(f"{path} is not to be used as it is now (written: {shared.written_ranges()}).")
            raise
        flaws = sorted(shared.flaws, key=lambda flaw: flaw.start)
        if mapfile is not None and (flaws or len(bad)):
            mapfile.write(flaws, bad, size)
    return Report(
        planned, shared.written_bytes, verified, flaws,
        [{"start": int(row["start"]), "length": int(row["length"])} for row in bad],
        mapfile.path if mapfile is not None and mapfile.written else "", round(context.timer() - clock, 3),
    )  # fmt: skip


def _fill(shared: _Writing, request: Request, size: int, context: Context) -> int:
    """Write everything, flush it, read it back; bytes compared."""
    context.progress.begin("restoring", size)
    try:
        shared.flaws += _write_all(shared, context).flaws
    finally:
        context.progress.end()
    shared.target.flush()
    return _read_back(shared, context) if request.verify else 0


@contextlib.contextmanager
def _target(job: _Restoring, method: str, context: Context) -> Iterator[TargetWriter]:
    """The opened target. A new file is written under ``.partial`` and gets its name when all went well."""
    if method == "create":
        with _new_file(job.path, job.size, context, overwrite=job.request.overwrite) as target:
            yield target
        return
    with TargetWriter(job.path, kernel=context.kernel) as target:
        # Between the look at it and now a node may have been handed on, a link turned, a file been mounted.
        now = look_at_target(job.request.target)
        known = job.target
        same = now is not None and known is not None and _marks(now) == _marks(known)
        if now is None or not same or not target.is_of(job.path):
            raise BadTarget(path=job.request.target, reason="it is not what it was a moment ago")
        check_target(job.request.target, now, job.opened.view, job.repository, context, overwrite=True)
        if not target.is_block:
            target.resize(job.size)
        yield target


def _marks(device: Device) -> tuple[object, ...]:
    return device.path, device.size, device.diskseq, device.major, device.minor, devices.identity(device)


@contextlib.contextmanager
def _new_file(path: str, size: int, context: Context, *, overwrite: bool) -> Iterator[TargetWriter]:
    partial = path + ".partial"
    if os.path.lexists(partial):
        # Perhaps an interrupted restore left it, perhaps it is somebody's: it was not named.
        if not overwrite or not os.path.isfile(partial):
            raise TargetExists(path=partial)
        with TargetWriter(partial, kernel=context.kernel):  # held by nobody, or it is refused
            context.kernel.unlink(partial)
    with TargetWriter(partial, create=True, kernel=context.kernel) as target:
        try:
            target.resize(size)
            yield target
            if not target.is_of(partial):
                raise BadTarget(path=path, reason=f"{partial} was taken away meanwhile")
            context.kernel.rename(partial, path)
            sync_directory(os.path.dirname(path), context.kernel)
        except OSError as error:
            raise BadTarget(path=path, reason=error.strerror) from error
        finally:
            if target.is_of(partial):
                with contextlib.suppress(OSError):
                    context.kernel.unlink(partial)


class _Mapfile:
    """A file for what could not be restored, open before the first byte is."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self._fd = path, fd
        self.written = False

    def write(self, flaws: Sequence[Flaw], bad: Extents, size: int) -> None:
        """Put everything that was lost into it. Raises BadTarget."""
        lost = extent.empty()
        for flaw in flaws:
            lost = extent.overlay(lost, extent.table([flaw.start], [flaw.start + flaw.length], BAD))
        self.written = True
        try:
            os.ftruncate(self._fd, 0)
            with os.fdopen(os.dup(self._fd), "w", encoding="ascii") as file:
                file.write(mapfile_text(extent.overlay(lost, bad), size))
        except OSError as error:
            raise BadTarget(path=self.path, reason=error.strerror) from error


@contextlib.contextmanager
def _mapfile(job: _Restoring) -> Iterator[_Mapfile]:
    """The mapfile that was named; else one beside the target, under a name that nothing has. It goes again
    if nothing was lost. Raises BadTarget, TargetHolds, TargetExists.
    """
    named, path = job.request.mapfile, job.path
    beside = job.target is None or not job.target.is_block
    place = base = os.path.realpath(named or (f"{path}.mapfile" if beside else f"{job.planned.point}.mapfile"))
    number = 1
    while not named and os.path.lexists(place):
        number += 1
        place = f"{base}.{number}"
    known = os.path.lexists(place)
    _check_mapfile(place, job, known=known)
    try:
        fd = os.open(
            place, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if known else os.O_EXCL), 0o600
        )
    except OSError as error:
        raise BadTarget(path=place, reason=error.strerror) from error
    mapfile = _Mapfile(place, fd)
    try:
        yield mapfile
    finally:
        os.close(fd)
        if not known and not mapfile.written:
            os.unlink(place)


def _check_mapfile(place: str, job: _Restoring, *, known: bool) -> None:
    """It must not be the target, nor in a repository, nor any file but an older mapfile."""
    if place in (job.path, f"{job.path}.partial") or (
        known and os.path.lexists(job.path) and os.path.samefile(place, job.path)
    ):
        raise BadTarget(path=place, reason="it is the target of the restore")
    if _inside_repository(place) or _is_stored(place, job.repository):
        raise TargetHolds(path=place, what="a part of a repository")
    if not known:
        return
    try:
        with open(place, "rb") as file:
            is_one = file.read(len(_MAPFILE_BEGINS)) == _MAPFILE_BEGINS.encode()
    except OSError as error:
        raise BadTarget(path=place, reason=error.strerror) from error
    if not is_one or not os.path.isfile(place):
        raise BadTarget(path=place, reason="it exists, and is no mapfile")


def mapfile_text(lost: Extents, size: int) -> str:
    """A mapfile as GNU ddrescue reads it (its manual, "Mapfile structure"): ``-`` bad, ``+`` good."""
    lines = [f"{_MAPFILE_BEGINS} Created by blockbak", "# current_pos  current_status  current_pass", "0x0  +  1"]
    lines.append("#      pos        size  status")
    whole = extent.table([0], [size], extent.DATA)
    for row in extent.overlay(whole, lost):
        status = "-" if row["kind"] == BAD else "+"
        lines.append(f"0x{int(row['start']):08X}  0x{int(row['length']):08X}  {status}")
    return "\n".join(lines) + "\n"


assert PIECE_BYTES % MIB == 0  # noqa: S101 - a piece is whole windows, a section whole pieces
