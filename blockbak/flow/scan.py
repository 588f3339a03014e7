"""Reads a whole source once and turns it into the pieces of an image.

Each worker takes a piece through everything while it is in its core's cache: read, zero test, digest,
compare with the parent's map, compress, append.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from blockbak.flow import workers
from blockbak.flow.context import Context
from blockbak.host.blockio import PIECE_BYTES, SourceReader, aligned
from blockbak.image import codec
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, DATA, ZERO, Extents, Kinds
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask, Rows

_SECTIONS_KEPT = 4
"""Parent sections in memory: workers are never further apart than a few pieces."""


@dataclass(frozen=True, slots=True)
class _Job:
    number: int
    first_block: int
    blocks: int
    hole: bool


class ParentMap:
    """The parent point's map, a few sections at a time. Safe from several threads."""

    def __init__(self, view: PointView) -> None:
        self._view = view
        self._kept: dict[int, SectionView] = {}
        self._guard = threading.Lock()

    def section(self, number: int) -> SectionView:
        """One section of the map. Raises DamagedImage or UnreadableStore."""
        with self._guard:
            if number not in self._kept:
                self._kept[number] = self._view.section(number)
                for old in sorted(self._kept)[:-_SECTIONS_KEPT]:
                    del self._kept[old]
            return self._kept[number]


def _jobs(geometry: Geometry, source: SourceReader) -> Iterator[_Job]:
    """Pieces in address order; a section that lies wholly in a hole of an image file is one piece."""
    number, data_at = 0, 0
    block, step = geometry.block_bytes, PIECE_BYTES // geometry.block_bytes
    for section in range(geometry.sections):
        start, end = geometry.section_range(section)
        blocks, first = geometry.section_blocks(section), section * BLOCKS_PER_SECTION
        if data_at < start or section == 0:
            data_at = source.next_data(start)
        if data_at >= end:
            yield _Job(number, first, blocks, hole=True)
            number += 1
            continue
        for low in range(0, blocks, step):
            begin, count = start + low * block, min(step, blocks - low)
            if data_at < begin:
                data_at = source.next_data(begin)
            yield _Job(number, first + low, count, hole=data_at >= min(begin + count * block, end))
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


class Scanner:
    """One worker's hands: its buffer and its compressor."""

    def __init__(
        self,
        source: SourceReader,
        writer: ImageWriter,
        parent: ParentMap | None,
        compress: str,
        account: Callable[[int, int, int], None],
    ) -> None:
        self._source, self._writer, self._parent = source, writer, parent
        self._geometry = writer.geometry
        self._encoder = codec.encoder(compress)
        self._buffer = aligned(PIECE_BYTES)
        self._account = account

    def __call__(self, job: _Job) -> None:
        """Take one piece from the source to the image."""
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
            bad = self._source.read(start, self._buffer, length)
            data = self._buffer[:length]
            nonzero = hashmap.nonzero_blocks(data, geometry.block_bytes)
            rows = hashmap.digest_blocks(data, geometry.block_bytes, nonzero)
            kinds = np.where(nonzero, np.uint8(DATA), np.uint8(ZERO))
        if self._parent is not None:
            kinds[~changes(rows, bad, self._parent.section(section), low, geometry)] = ABSENT
        frames = []
        if (kinds == DATA).any():
            frames = encode_windows(data, kinds, job.first_block, geometry, self._encoder, whole=self._parent is None)
        self._writer.add(Piece(job.number, job.first_block, kinds, bad, rows, frames))
        changed = int(np.count_nonzero(kinds)) * geometry.block_bytes
        self._account(0 if job.hole else length, length, changed)


def scan(source: SourceReader, writer: ImageWriter, parent: PointView | None, compress: str, context: Context) -> int:
    """Read the source into the writer; bytes that were read. ``parent`` makes it a delta.

    Raises SourceVanished, NoSpace, StoreFailed, DamagedImage (of the parent), Interrupted.
    """
    known = None if parent is None else ParentMap(parent)
    guard = threading.Lock()
    total = 0

    def account(read: int, done: int, changed: int) -> None:
        nonlocal total
        with guard:
            total += read
        context.progress.advance(done, changed)

    workers.run(
        _jobs(writer.geometry, source),
        lambda: Scanner(source, writer, known, compress, account),
        workers=context.workers,
        check=context.check,
        stop=writer.stop,
    )
    return total
