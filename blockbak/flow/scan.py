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
from blockbak.host.blockio import PIECE_BYTES, Bytes, SourceReader, aligned
from blockbak.image import codec
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, DATA, ZERO, Extents, Kinds
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask, Rows
from blockbak.units import format_size

_UNREAD_MAX = 32
"""Neighbouring pieces without one readable sector, after which a source is given up."""
_NAP_SECONDS = 0.2
_SECTIONS_BESIDE = 2
"""Parent sections in memory beyond one a worker: a section that lies in a hole is one piece, so each worker may
be in another one.
"""


@dataclass(frozen=True, slots=True)
class Job:
    """Consecutive blocks of one section, the ``number``-th piece in address order; ``hole``: zeros, unread."""

    number: int
    first_block: int
    blocks: int
    hole: bool


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


def jobs(geometry: Geometry, source: SourceReader) -> Iterator[Job]:
    """Pieces in address order; a section that lies wholly in a hole of an image file is one piece."""
    number, data_at = 0, 0
    block, step = geometry.block_bytes, PIECE_BYTES // geometry.block_bytes
    for section in range(geometry.sections):
        start, end = geometry.section_range(section)
        blocks, first = geometry.section_blocks(section), section * BLOCKS_PER_SECTION
        if data_at < start or section == 0:
            data_at = source.next_data(start)
        if data_at >= end:
            yield Job(number, first, blocks, hole=True)
            number += 1
            continue
        for low in range(0, blocks, step):
            begin, count = start + low * block, min(step, blocks - low)
            if data_at < begin:
                data_at = source.next_data(begin)
            yield Job(number, first + low, count, hole=data_at >= min(begin + count * block, end))
            number += 1


def changes(new: Rows, bad: Extents, old: SectionView, low: int, geometry: Geometry) -> Mask:
    """Which blocks of a piece a delta must hold: another digest than the parent's, or a range that could
    not be read now or then (a BAD block equals nothing).
    """
    count = len(new)
    mask = hashmap.changed_rows(new, old.rows[low : low + count])
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
        source: SourceReader,
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
        if job.hole:
            bad = extent.empty()
            rows = geometry.zero_rows(section)[low : low + job.blocks]
            kinds: Kinds = np.full(job.blocks, ZERO, np.uint8)
        else:
            self._pace.wait(length)
            bad = self._source.read(start, self._buffer, length)
            if extent.total(bad) == length:
                self._lost(job.number)
            data = self._buffer[:length]
            nonzero = hashmap.nonzero_blocks(data, geometry.block_bytes)
            rows = hashmap.digest_blocks(data, geometry.block_bytes, nonzero)
            kinds = np.where(nonzero, np.uint8(DATA), np.uint8(ZERO))
        if self._parent is not None:
            kinds[~changes(rows, bad, self._parent.section(section), low, geometry)] = ABSENT
        self._take(Found(job.number, job.first_block, kinds, bad, rows, data))
        changed = int(np.count_nonzero(kinds)) * geometry.block_bytes
        self._account(0 if job.hole else length, length, changed)


def scan(
    source: SourceReader,
    writer: ImageWriter,
    parent: PointView | None,
    compress: str,
    context: Context,
    limit: int | None = None,
) -> int:
    """Read the source into the writer; bytes that were read. ``parent`` makes it a delta, ``limit`` is the most
    bytes to read a second.

    Raises SourceVanished, NoSpace, StoreFailed, DamagedImage (of the parent), Interrupted.
    """
    return scan_into(source, _ImageSink(writer, compress, whole=parent is None), context, limit, parent)


def scan_into(
    source: SourceReader, sink: Sink, context: Context, limit: int | None = None, parent: PointView | None = None
) -> int:
    """Read the source into any sink; bytes that were read. Raises SourceVanished, DamagedImage (of the parent),
    Interrupted, and what the sink raises.
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

    def lost(number: int) -> None:
        """A disk that fell off its bus answers every read with an error: it would be asked for each sector."""
        with guard:
            unread.add(number)
            low = high = number
            while low - 1 in unread:
                low -= 1
            while high + 1 in unread:
                high += 1
        if high - low + 1 >= _UNREAD_MAX:
            size = format_size((high - low + 1) * PIECE_BYTES)
            raise SourceVanished(path=source.path, reason=f"not one sector of {size} could be read")

    workers.run(
        jobs(sink.geometry, source),
        lambda: Scanner(source, sink, known, account, lost, pace),
        workers=context.workers,
        check=context.check,
        stop=sink.stop,
    )
    return total
