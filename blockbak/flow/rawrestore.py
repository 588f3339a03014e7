"""Brings a raw image, or what comes through a pipe, onto a device or into a file, and reads it back."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field

import numpy as np

from blockbak.errors import (
    BlockbakError,
    DamagedStream,
    Interrupted,
    NotReadBack,
    StreamFailed,
    TargetFailed,
    TargetHolds,
)
from blockbak.flow.context import Context, never
from blockbak.flow.into_lvm import pool_of, twin_notes
from blockbak.flow.rawcheck import RawImage, beside, check_whole, damage, opened, read_sidecar
from blockbak.flow.rawmap import MapSum, all_jobs, survey, told
from blockbak.flow.target import Incoming, check_target, existing, look_at_target, new_file
from blockbak.flow.writing import Hand, Job, Writing, write_all
from blockbak.host import device as devices
from blockbak.host import pipes, usage, volumes
from blockbak.host.blockio import PIECE_BYTES, Bytes, TargetWriter, aligned
from blockbak.host.device import Device
from blockbak.host.volumes import PoolWatch
from blockbak.image import sidecar
from blockbak.image.format import BLOCK_DEFAULT, DEVICE_MAX, window_for
from blockbak.image.sidecar import Range, Sidecar
from blockbak.image.view import Flaw
from blockbak.image.writer import Stopped
from blockbak.model import extent, hashmap
from blockbak.model.extent import Extents
from blockbak.model.facts import FULL, Opening
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask, Rows
from blockbak.model.identity import PATH, Identity
from blockbak.repository.local import Repository

STREAM = "-"
"""Standard input in place of an image's name."""
_SAMPLED = 64
"""Blocks that are compared to tell whether a target mostly holds an image already."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``image`` is ``-`` for standard input, for which ``sidecar`` may name what tells
    whether it is whole. ``overwrite`` stands for ``--yes``.
    """

    image: str
    target: str
    overwrite: bool = False
    verify: bool = True
    sidecar: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore will do. ``method`` is ``create``, ``write`` or ``differ``, as for a point. ``device_bytes`` is
    0 where nothing tells it beforehand.
    """

    image: str
    sidecar: str
    target: str
    target_bytes: int
    device_bytes: int
    data_bytes: int
    bad_bytes: int
    method: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore did. ``device_bytes`` is what lies on the target now, ``unreadable`` ranges of it that are
    zeros because they could not be read from the device that the image is of. ``cut``: a stream without a sidecar
    ended before its target did, and nobody knows whether there was more.
    """

    plan: Plan
    device_bytes: int
    written_bytes: int
    verified_bytes: int
    root: str
    unreadable: list[Range]
    seconds: float
    cut: bool = False

    @property
    def attention(self) -> bool:
        """Something a person must look at."""
        return bool(self.unreadable) or self.cut


# --- what is written ---------------------------------------------------------------------------------


class _RawContent:
    """A raw image in pieces. Its map is computed once more on the way: that of the check may be an hour old."""

    keep_going = False

    def __init__(self, raw: RawImage) -> None:
        self._raw = raw
        self.geometry = raw.said.geometry
        self.known = MapSum(self.geometry)
        self.flaws: list[Flaw] = []

    def pieces(self) -> Iterator[Job]:
        """Whether a piece lies in a hole of the file is its ``part``."""
        size, block, data_at = self.geometry.device_bytes, self.geometry.block_bytes, 0
        for start in range(0, size, PIECE_BYTES):
            length = min(PIECE_BYTES, size - start)
            if data_at <= start:
                data_at = self._raw.source.next_data(start)
            yield Job(start, length, -(-length // block), data_at >= start + length)

    def hand(self) -> Hand:
        """With a buffer of its own."""
        return _RawHand(self._raw, self.known)

    def stop(self) -> None:
        """Nothing is waited for."""


class _RawHand:
    """Reads pieces of a raw image."""

    def __init__(self, raw: RawImage, known: MapSum) -> None:
        self._raw, self._known = raw, known
        self._buffer = aligned(PIECE_BYTES)

    def look(self, job: Job) -> tuple[Mask, Rows]:
        """Read the piece, unless it is a hole."""
        geometry = self._known.geometry
        first = job.start // geometry.block_bytes
        bad = extent.clip(self._raw.said.unread, job.start, job.start + job.length)
        if job.part:
            section = first // BLOCKS_PER_SECTION
            low = first - section * BLOCKS_PER_SECTION
            rows = geometry.zero_rows(section)[low : low + job.blocks]
            stored = np.zeros(job.blocks, bool)
        else:
            self._raw.read(job.start, self._buffer, job.length)
            stored, rows = _seen(self._buffer[: job.length], geometry.block_bytes)
        self._known.add(first, rows, stored, bad)
        return stored, rows

    def fetch(self, job: Job, wanted: Mask, data: Bytes) -> list[Flaw]:
        """It was read when it was looked at."""
        return _copied(self._buffer, job, wanted, data, self._known.geometry.block_bytes)


def _copied(held: Bytes, job: Job, wanted: Mask, data: Bytes, block: int) -> list[Flaw]:
    """Take the wanted blocks over from a buffer that has them; nothing is wrong with them."""
    for low, high in zip(*(edges.tolist() for edges in extent.true_runs(wanted)), strict=True):
        end = min(high * block, job.length)
        data[low * block : end] = held[low * block : end]
    return []


def _seen(data: Bytes, block: int) -> tuple[Mask, Rows]:
    nonzero = hashmap.nonzero_blocks(data, block)
    return nonzero, hashmap.digest_blocks(data, block, nonzero)


class _StreamContent:
    """What comes through a pipe, in pieces, up to ``limit`` bytes. With a sidecar each section is checked as soon as
    it is complete.
    """

    keep_going = False

    def __init__(self, said: Sidecar | None, name: str, limit: int, context: Context) -> None:
        self._said, self._name, self._limit, self._context = said, name, limit, context
        self.geometry = (
            said.geometry if said else Geometry(DEVICE_MAX, BLOCK_DEFAULT, window_for(DEVICE_MAX, BLOCK_DEFAULT))
        )
        self._expected = sidecar.packed(said.sections) if said else None
        self.known = MapSum(self.geometry, self._complete)
        self.unread: Extents = said.unread if said else extent.empty()
        self.flaws: list[Flaw] = []
        self.taken = 0
        self._over = threading.Event()
        # One for each hand, one that is being filled, and one more.
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for _ in range(context.workers + 2):
            self._free.put(aligned(PIECE_BYTES))

    def _complete(self, number: int) -> None:
        """Raises DamagedStream."""
        if self._expected is not None and (self.known.digests[number] != self._expected[number]).any():
            start, end = self.geometry.section_range(number)
            raise DamagedStream(file=self._name, reason=f"bytes {start} to {end} are others")

    def _look(self) -> None:
        """Asked while the other end is waited for."""
        if self._over.is_set():
            raise Stopped
        self._context.check()

    def pieces(self) -> Iterator[Job]:
        """As they come; the buffer is a piece's ``part``. Raises StreamFailed, DamagedStream."""
        pipe = pipes.PipeReader(0, self._look)
        while True:
            buffer = self._free.get()
            count = pipe.fill(buffer)
            if self.taken + count > self._limit:
                self._too_long()
            if count:
                start, self.taken = self.taken, self.taken + count
                yield Job(start, count, -(-count // self.geometry.block_bytes), buffer)
            if count < len(buffer):
                break
        if self._said is not None and self.taken < self._said.device_bytes:
            reason = f"it ended after {self.taken} bytes of {self._said.device_bytes}"
            raise DamagedStream(file=self._name, reason=reason)
        if not self.taken:
            raise StreamFailed(reason="it holds no bytes")

    def _too_long(self) -> None:
        if self._said is not None:
            raise DamagedStream(file=self._name, reason=f"it goes on after {self._limit} bytes")
        raise StreamFailed(reason=f"the target has {self._limit} bytes, and there are more to come")

    def hand(self) -> Hand:
        """For one more worker."""
        return _StreamHand(self, self._free)

    def stop(self) -> None:
        """Wait for the other end no more."""
        self._over.set()


class _StreamHand:
    """Takes pieces over with their buffers."""

    def __init__(self, content: _StreamContent, free: queue.SimpleQueue[Bytes]) -> None:
        self._content, self._free = content, free
        self._held: Bytes | None = None

    def look(self, job: Job) -> tuple[Mask, Rows]:
        """The piece before is done with, so its buffer is free."""
        if self._held is not None:
            self._free.put(self._held)
        self._held = job.part
        block = self._content.geometry.block_bytes
        stored, rows = _seen(job.part[: job.length], block)
        bad = extent.clip(self._content.unread, job.start, job.start + job.length)
        self._content.known.add(job.start // block, rows, stored, bad)
        return stored, rows

    def fetch(self, job: Job, wanted: Mask, data: Bytes) -> list[Flaw]:
        """It came with the piece."""
        return _copied(job.part, job, wanted, data, self._content.geometry.block_bytes)


# --- a raw image -------------------------------------------------------------------------------------


def restore(
    request: Request, context: Context, *, repository: Repository | None = None, dry_run: bool = False
) -> Plan | Report:
    """Restore a raw image, or with ``-`` standard input; with ``dry_run`` only say how. All of an image is checked
    against its sidecar before the first byte is written. Raises NoSuchImage, NoSidecar, Damage, a Refused for a
    target that must not be written, TargetFailed, NotReadBack, StreamFailed, Interrupted.
    """
    if request.image == STREAM:
        return _restore_stream(request, context, repository, dry_run=dry_run)
    clock = context.timer()
    with opened(request.image, context) as raw:
        said = raw.said
        incoming = Incoming(said.opening, raw.peek)
        target = look_at_target(request.target)
        _check_not_itself(request, target)
        check_target(request.target, target, incoming, repository, context, overwrite=request.overwrite or dry_run)
        found = check_whole(raw, context)
        pool = pool_of(target, lambda _: found.data_bytes, request.target, context) if target is not None else None
        planned = Plan(
            image=request.image, sidecar=beside(request.image), target=request.target,
            target_bytes=target.size if target else 0, device_bytes=said.device_bytes,
            data_bytes=min(found.data_bytes, said.device_bytes), bad_bytes=extent.total(said.unread),
            method=_method(raw, target, pool, context), notes=_notes(said, target, incoming, context),
        )  # fmt: skip
        if dry_run:
            return planned
        job = _Restoring(request, planned, target, incoming, repository, context, pool)
        content = _RawContent(raw)
        with ExitStack() as stack:
            writer = stack.enter_context(job.open(said.device_bytes))
            permit = pool.check if pool is not None else never
            shared = Writing(content, writer, planned.method, context, permit=permit)
            with _unusable(job, shared):
                write_all(shared, context)
                expected = sidecar.packed(said.sections)
                if changed := content.known.differing(expected):
                    flaws = [
                        Flaw(start, end - start, "it changed while it was read", raw.path) for start, end in changed
                    ]
                    raise damage(raw.path, flaws)
                writer.flush()
                verified = _read_back(job, shared, content.known, said.unread) if request.verify else 0
        return Report(
            planned, said.device_bytes, shared.written_bytes, verified, said.root, said.bad,
            round(context.timer() - clock, 3),
        )  # fmt: skip


def _check_not_itself(request: Request, target: Device | None) -> None:
    """Raises TargetHolds where the image, or its sidecar, lies on the target."""
    for place in (request.image, beside(request.image)):
        if target is not None and usage.carries(target, place):
            raise TargetHolds(path=request.target, what="the image that is restored, or its sidecar")


def _method(raw: RawImage, target: Device | None, pool: PoolWatch | None, context: Context) -> str:
    """How the target will be written: as for a point."""
    if target is None:
        return "create"
    if pool is not None or raw.said.opening.is_of(devices.identity(target), context.host):
        return "differ"
    with TargetWriter(target.path, kernel=context.kernel) as writer:
        return "differ" if _mostly_equal(raw, writer) else "write"


def _mostly_equal(raw: RawImage, target: TargetWriter) -> bool:
    """Does a sample of the target already hold the image? Then reading it first is the quicker way."""
    geometry, equal, seen = raw.said.geometry, 0, 0
    ours, theirs = aligned(geometry.block_bytes), aligned(geometry.block_bytes)
    for block in np.unique(np.linspace(0, geometry.blocks - 1, _SAMPLED).astype(np.int64)).tolist():
        start, length = block * geometry.block_bytes, geometry.block_length(block)
        if start + length > target.size:
            return False
        raw.read(start, ours, length)
        if not ours[:length].any():
            continue
        try:
            target.read(start, theirs, length)
        except TargetFailed:
            return False  # a sector that cannot be read may well be written
        equal += bool((ours[:length] == theirs[:length]).all())
        seen += 1
    return seen > 0 and equal * 2 > seen


def _notes(said: Sidecar, target: Device | None, incoming: Incoming, context: Context) -> list[str]:
    """What whoever restores should know."""
    notes = []
    if target is not None and said.opening.surely_of(devices.identity(target), context.host):
        notes.append("The target is the device itself: it is rolled back.")
    elif target is not None:
        notes += twin_notes(target, incoming)
    if target is not None and target.size > said.device_bytes:
        more, how = target.size - said.device_bytes, "left alone" if target.is_block else "cut off"
        notes.append(f"The target is longer by {more} bytes; they are {how}.")
    if said.hooks:
        notes.append("A hook left words with this image, in its sidecar: read them before its application is started.")
    if said.consistency == "none":
        notes.append("The device was written while it was read: the image may be torn.")
    if target is not None and target.is_block and target.logical_sector != said.logical_sector:
        notes.append(f"The image is of {said.logical_sector}-byte sectors, the target has {target.logical_sector}.")
    if bad := extent.total(said.unread):
        notes.append(f"{bad} bytes could not be read from the device; they become zeros.")
    return notes


@dataclass(frozen=True, slots=True)
class _Restoring:
    """A restore that was planned; ``target`` as it was looked at, None for a file to be made."""

    request: Request
    planned: Plan
    target: Device | None
    incoming: Incoming
    repository: Repository | None
    context: Context
    pool: PoolWatch | None = None

    @property
    def path(self) -> str:
        """What is opened: links are followed once, when the target is looked at."""
        return self.target.path if self.target else os.path.realpath(self.request.target)

    def open(self, size: int) -> AbstractContextManager[TargetWriter]:
        """The target, open: a new file of ``size`` bytes, or what was there."""
        if self.target is None:
            return new_file(self.path, size, self.context, overwrite=self.request.overwrite)
        if self.target.is_lv:
            # Whoever names what an unfinished restore left wants to keep it.
            volumes.adopt(self.target.lv_uuid)
        return existing(self.request.target, self.target, self.incoming, self.repository, self.context)


class _unusable:  # noqa: N801 - read as a word after ``with``
    """What goes wrong inside leaves a target that is not to be used, and says so; a new file goes by itself."""

    def __init__(self, job: _Restoring, shared: Writing) -> None:
        self._job, self._shared = job, shared

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self._job.planned.method == "create":
            return
        where, written = self._job.path, self._shared.written_ranges()
        if isinstance(error, Interrupted):
            raise Interrupted(state=f"{where} is not to be used (written: {written})") from error
        if isinstance(error, BlockbakError):
            error.add_note(f"{where} is not to be used as it is now (written: {written}).")


def _read_back(job: _Restoring, shared: Writing, known: MapSum, bad: Extents) -> int:
    """Read all of the target past the page cache, but for what is a hole of a new file; bytes that were read.
    Raises NotReadBack.
    """
    target, geometry = shared.target, known.geometry
    seen = MapSum(geometry)
    touched = shared.touched if job.planned.method == "create" else None
    job.context.progress.begin("reading back", geometry.device_bytes)
    try:
        total = survey(seen, all_jobs(geometry, touched), target.read, bad, job.context)
    finally:
        job.context.progress.end()
    if differing := seen.differing(known.digests):
        raise NotReadBack(path=job.path, ranges=told(differing))
    return total


# --- standard input ----------------------------------------------------------------------------------


def _restore_stream(
    request: Request, context: Context, repository: Repository | None, *, dry_run: bool
) -> Plan | Report:
    clock = context.timer()
    said = read_sidecar(request.sidecar, context) if request.sidecar else None
    if said is not None:
        incoming = Incoming(said.opening, _nothing, said.partition_table)
    else:
        incoming = Incoming(_unknown(), _nothing)
    target = look_at_target(request.target)
    check_target(request.target, target, incoming, repository, context, overwrite=request.overwrite or dry_run)
    pool = pool_of(target, lambda _: 0, request.target, context) if target is not None else None
    is_device = target is not None and target.is_block
    notes = _notes(said, target, incoming, context) if said else [
        "Without a sidecar nothing tells whether all of it came, and unchanged."
    ]  # fmt: skip
    planned = Plan(
        image=STREAM, sidecar=request.sidecar or "", target=request.target, target_bytes=target.size if target else 0,
        device_bytes=said.device_bytes if said else 0, data_bytes=0, bad_bytes=extent.total(said.unread) if said else 0,
        method="write" if is_device else "create", notes=notes,
    )  # fmt: skip
    if dry_run:
        return planned
    job = _Restoring(request, planned, target, incoming, repository, context, pool)
    limit = said.device_bytes if said else target.size if target is not None and is_device else DEVICE_MAX
    content = _StreamContent(said, request.sidecar or "", limit, context)
    with ExitStack() as stack:
        writer = stack.enter_context(job.open(0) if is_device else _anew(job))
        permit = pool.check if pool is not None else never
        shared = Writing(content, writer, planned.method, context, permit=permit, endless=said is None)
        with _unusable(job, shared):
            write_all(shared, context)
            if not is_device:
                writer.resize(content.taken)
            writer.flush()
            known = content.known.cut(content.taken)
            verified = _read_back(job, shared, known, content.unread) if request.verify else 0
    cut = target is not None and is_device and said is None and content.taken < target.size
    if cut:
        planned.notes.append(f"Only {content.taken} of the {planned.target_bytes} bytes of {request.target} came.")
    return Report(
        planned, content.taken, shared.written_bytes, verified, known.root, said.bad if said else [],
        round(context.timer() - clock, 3), cut,
    )  # fmt: skip


def _anew(job: _Restoring) -> AbstractContextManager[TargetWriter]:
    """A file that gets its name when it is whole; one that is there stays until then."""
    kernel = job.context.kernel

    def ready() -> None:
        if os.path.lexists(job.path):
            kernel.unlink(job.path)

    return new_file(job.path, 0, job.context, overwrite=job.request.overwrite, ready=ready)


def _nothing(_: int, __: int) -> bytes:
    """What can be read of a stream before it comes."""
    return b""


def _unknown() -> Opening:
    """Bytes of which nothing is known before they come."""
    return Opening(
        repository="", image="", volume="", point="", sequence=0, kind=FULL, synthetic=False, parent=None,
        parent_root=None, identity=Identity(PATH, ""), device_bytes=0, block_bytes=BLOCK_DEFAULT,
        window_bytes=window_for(0, BLOCK_DEFAULT), logical_sector=0, physical_sector=0, created="",
    )  # fmt: skip
