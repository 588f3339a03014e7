"""Reads a whole source once and turns it into the pieces of an image.

Each worker takes a piece through everything while it is in its core's cache: read, zero test, digest,
compare with the parent's map, compress, append.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from blockbak.errors import SourceVanished
from blockbak.flow import workers
from blockbak.flow.context import Context
from blockbak.host.blockio import PIECE_BYTES, Bytes, DiskReader, aligned
from blockbak.image import codec
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, DATA, HOLE, ZERO, Extents, Kinds
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask, Rows
from blockbak.units import format_size

_UNREAD_MAX = 32
"""Neighbouring pieces without one readable sector, after which it is asked whether the source is there at all."""
_PLACES_ASKED = 8
_NAP_SECONDS = 0.2
_SECTIONS_BESIDE = 2
"""Parent sections in memory beyond one a worker: a section that lies in a hole is one piece, so each worker may
be in another one.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive blocks of one section, the ``number``-th piece in address order. ``zero``: a hole of an image file,
    which reads as zeros. ``unused`` is a bool per block, None where every block is in use; ``turn`` counts the pieces
    of which anything is read.
    """

    number: int
    first_block: int
    blocks: int
    turn: int = 0
    zero: bool = False
    unused: Mask | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What a worker read of a job: ``kinds`` (uint8) and map ``rows`` of its blocks, ``bad`` extents in volume
    bytes, and the bytes themselves, in a buffer that is used again; none for a hole.
    """

    number: int
    first_block: int
    kinds: Kinds
    bad: Extents
    rows: Rows
    data: Bytes


class Sink(Protocol):
    """Where a scan goes."""

    @property
    def geometry(self) -> Geometry:
        """How the volume divides."""

    def hand(self) -> Callable[[Found], None]:
        """What one worker calls with each piece that it read."""

    def stop(self) -> None:
        """Release workers that wait for each other: another one failed."""


class _ImageSink:
    """Into an image."""

    def __init__(self, writer: ImageWriter, compress: str, *, whole: bool) -> None:
        self.geometry = writer.geometry
        self._writer, self._compress, self._whole = writer, compress, whole

    def hand(self) -> Callable[[Found], None]:
        """A worker with a compressor of its own."""
        encoder = codec.encoder(self._compress)

        def take(found: Found) -> None:
            frames = []
            if (found.kinds == DATA).any():
                frames = encode_windows(
                    found.data, found.kinds, found.first_block, self.geometry, encoder, whole=self._whole
                )
            self._writer.add(Piece(found.number, found.first_block, found.kinds, found.bad, found.rows, frames))

        return take

    def stop(self) -> None:
        """The image will not be finished."""
        self._writer.stop()


class ParentMap:
    """The parent point's map, ``most`` sections at a time. Safe from several threads."""

    def __init__(self, view: PointView, most: int) -> None:
        self._view, self._most = view, most
        self._kept: dict[int, SectionView] = {}
        self._guard = threading.Lock()

    def section(self, number: int) -> SectionView:
        """One section of the map. Raises DamagedImage or UnreadableStore."""
        with self._guard:
            found = self._kept.pop(number, None)
            if found is None:
                # The frames of the layers are not asked for here, and would be most of the memory.
                found = replace(self._view.section(number), layers=())
            self._kept[number] = found  # last in order: used last
            while len(self._kept) > self._most:
                del self._kept[next(iter(self._kept))]
            return found


def jobs(geometry: Geometry, source: DiskReader, unused: Extents | None = None) -> Iterator[Job]:
    """Pieces in address order; a section of which nothing is read is one piece."""
    number = turn = data_at = 0
    block, step = geometry.block_bytes, PIECE_BYTES // geometry.block_bytes
    unused = extent.empty() if unused is None else unused
    starts = extent.starts_of(unused)
    for section in range(geometry.sections):
        start, end = geometry.section_range(section)
        blocks, first = geometry.section_blocks(section), section * BLOCKS_PER_SECTION
        near = slice(max(int(np.searchsorted(starts, start, "right")) - 1, 0), int(np.searchsorted(starts, end)))
        mask = _unused_blocks(extent.clip(unused[near], start, end), geometry, section)
        if data_at < start or section == 0:
            data_at = source.next_data(start)
        if data_at >= end or (mask is not None and mask.all()):
            yield Job(number, first, blocks, turn, zero=data_at >= end, unused=mask)
            number += 1
            continue
        for low in range(0, blocks, step):
            begin, count = start + low * block, min(step, blocks - low)
            if data_at < begin:
                data_at = source.next_data(begin)
            part = None if mask is None or not mask[low : low + count].any() else mask[low : low + count]
            zero = data_at >= min(begin + count * block, end)
            yield Job(number, first + low, count, turn, zero, part)
            number += 1
            turn += not zero and (part is None or not part.all())


def _unused_blocks(unused: Extents, geometry: Geometry, section: int) -> Mask | None:
    """Which blocks of a section have not one byte in use; None where all have one."""
    if not len(unused):
        return None
    start, end = geometry.section_range(section)
    used = extent.subtract(extent.table([start], [end], DATA), unused)
    mask = ~extent.touched(used, start, geometry.block_bytes, geometry.section_blocks(section))
    return mask if mask.any() else None


def changes(new: Rows, bad: Extents, old: SectionView, low: int, geometry: Geometry, unused: Mask | None) -> Mask:
    """Which blocks of a piece a delta must hold: another digest than the parent's, a range that could not be read
    now or then (a BAD block equals nothing), or one whose content is claimed now and was not then, or the reverse.
    """
    count = len(new)
    mask = hashmap.changed_rows(new, old.rows[low : low + count])
    was_unused = old.kinds[low : low + count] == HOLE
    mask |= was_unused if unused is None else was_unused != unused
    if len(bad) or (old.extents["kind"] == BAD).any():
        first = (old.number * BLOCKS_PER_SECTION + low) * geometry.block_bytes
        for unreadable in (bad, extent.of_kind(old.extents, BAD)):
            mask |= extent.touched(unreadable, first, geometry.block_bytes, count)
    return mask


class Pace:
    """Keeps all workers together to a number of bytes a second; None lets them go. ``sleep`` takes seconds,
    ``check`` may raise while they wait.
    """

    def __init__(
        self,
        limit: int | None,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        check: Callable[[], None],
    ) -> None:
        self._limit, self._clock, self._sleep, self._check = limit, clock, sleep, check
        self._free_at = clock()
        self._guard = threading.Lock()

    def wait(self, length: int) -> None:
        """Return when ``length`` more bytes may be read."""
        if self._limit is None:
            return
        with self._guard:
            begin = max(self._clock(), self._free_at)
            self._free_at = begin + length / self._limit
        while (left := begin - self._clock()) > 0:
            self._check()
            self._sleep(min(left, _NAP_SECONDS))


class Scanner:
    """One worker's hands: its buffer, and where it puts what it read."""

    def __init__(
        self,
        source: DiskReader,
        sink: Sink,
        parent: ParentMap | None,
        account: Callable[[int, int, int], None],
        lost: Callable[[int], None],
        pace: Pace,
    ) -> None:
        self._pace = pace
        self._source, self._parent = source, parent
        self._geometry = sink.geometry
        self._take = sink.hand()
        self._buffer = aligned(PIECE_BYTES)
        self._account, self._lost = account, lost

    def __call__(self, job: Job) -> None:
        """Take one piece from the source to the sink."""
        geometry = self._geometry
        start = job.first_block * geometry.block_bytes
        length = min(job.blocks * geometry.block_bytes, geometry.device_bytes - start)
        section = job.first_block // BLOCKS_PER_SECTION
        low = job.first_block - section * BLOCKS_PER_SECTION
        data = self._buffer[:0]
        bad, read_bytes = extent.empty(), 0
        if job.zero or (job.unused is not None and job.unused.all()):
            rows = geometry.zero_rows(section)[low : low + job.blocks]
            kinds: Kinds = np.full(job.blocks, ZERO, np.uint8)
        else:
            data = self._buffer[:length]
            bad, read_bytes = self._read(job, start, data)
            if extent.total(bad) == read_bytes:
                self._lost(job.turn)
            nonzero = hashmap.nonzero_blocks(data, geometry.block_bytes)
            rows = hashmap.digest_blocks(data, geometry.block_bytes, nonzero)
            kinds = np.where(nonzero, np.uint8(DATA), np.uint8(ZERO))
        if job.unused is not None:
            kinds[job.unused] = HOLE
        if self._parent is not None:
            kinds[~changes(rows, bad, self._parent.section(section), low, geometry, job.unused)] = ABSENT
        self._take(Found(job.number, job.first_block, kinds, bad, rows, data))
        changed = int(np.count_nonzero(kinds)) * geometry.block_bytes
        self._account(read_bytes, length, changed)

    def _read(self, job: Job, start: int, data: Bytes) -> tuple[Extents, int]:
        """Fill ``data`` from ``start`` on, with zeros where nothing is in use; what could not be read, and the bytes
        that were asked for.
        """
        length, block = len(data), self._geometry.block_bytes
        if job.unused is None:
            self._pace.wait(length)
            return self._source.read(start, self._buffer, length), length
        data[:] = 0
        bad, asked = [extent.empty()], 0
        for first, last in zip(*(edges.tolist() for edges in extent.true_runs(~job.unused)), strict=True):
            low, high = first * block, min(last * block, length)
            self._pace.wait(high - low)
            bad.append(self._source.read(start + low, self._buffer[low:], high - low))
            asked += high - low
        return np.concatenate(bad), asked


def scan(
    source: DiskReader,
    writer: ImageWriter,
    parent: PointView | None,
    compress: str,
    context: Context,
    limit: int | None = None,
    unused: Extents | None = None,
) -> int:
    """Read the source into the writer; bytes that were read. ``parent`` makes it a delta, ``limit`` is the most
    bytes to read a second. Blocks that lie wholly in ``unused`` (sorted, disjoint, volume bytes) are not read, and
    become HOLE.

    Raises SourceVanished, SourceUnreadable, NoSpace, StoreFailed, DamagedImage (of the parent), Interrupted.
    """
    return scan_into(source, _ImageSink(writer, compress, whole=parent is None), context, limit, parent, unused)


def scan_into(
    source: DiskReader,
    sink: Sink,
    context: Context,
    limit: int | None = None,
    parent: PointView | None = None,
    unused: Extents | None = None,
) -> int:
    """Read the source into any sink; bytes that were read. Raises SourceVanished, SourceUnreadable, DamagedImage (of
    the parent), Interrupted, and what the sink raises.
    """
    known = None if parent is None else ParentMap(parent, context.workers + _SECTIONS_BESIDE)
    guard = threading.Lock()
    total = 0

    def account(read: int, done: int, changed: int) -> None:
        nonlocal total
        with guard:
            total += read
        context.progress.advance(done, changed)

    pace = Pace(limit, context.timer, time.sleep, context.check)
    unread: set[int] = set()
    places = np.linspace(0, sink.geometry.device_bytes - 1, _PLACES_ASKED).astype(int).tolist()

    def lost(turn: int) -> None:
        """A disk that fell off its bus answers every read with an error: it would be asked for each sector."""
        with guard:
            unread.add(turn)
            low = high = turn
            while low - 1 in unread:
                low -= 1
            while high + 1 in unread:
                high += 1
            many = high - low + 1
        if many < _UNREAD_MAX or source.is_alive(places):
            return
        reason = f"not one sector of {format_size(many * PIECE_BYTES)} could be read, nor one elsewhere"
        raise SourceVanished(path=source.path, reason=reason)

    workers.run(
        jobs(sink.geometry, source, unused),
        lambda: Scanner(source, sink, known, account, lost, pace),
        workers=context.workers,
        check=context.check,
        stop=sink.stop,
    )
    return total
