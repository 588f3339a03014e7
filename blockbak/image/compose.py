"""Composes one image from the layers of a point, without decoding what it can take over.

Frames whose content is what the result needs are cloned in runs: a padding frame brings the target
offset to the source offset modulo the file system's block, the aligned middle shares its blocks
(FICLONERANGE), head and tail are copied. Only windows that older and newer content share are decoded and
encoded again. A full is composed from a complete view; a delta from the deltas alone.

Workers decode and encode pieces in any order; where a piece lies is decided in the order of addresses, so
that the image does not depend on their number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from blockbak.errors import DamagedImage
from blockbak.image import format as fmt
from blockbak.image.codec import Encoder
from blockbak.image.reader import Section
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import Frame, ImageWriter, Turns, frame_records, make_frame, zero_frames
from blockbak.model import extent
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask
from blockbak.model.streams import Buffer, ByteSink
from blockbak.units import MIB

_CLONE_UNITS_MIN = 4
"""A run shorter than so many file-system blocks is copied: its seams would cost as much as it shares."""

_PIECE_COPIED, _PIECE_ENCODED = 8 * MIB, 2 * MIB
"""What one piece copies, and the content it encodes: enough to keep workers busy, little enough to hold."""
_HELD_BYTES = 16 * MIB
"""What is written between clones waits in memory up to so many bytes; see ``Composer.finish``."""

REENCODE = -1
"""In a window's plan: no one frame holds what the result needs."""
ZEROS = -2
"""In a window's plan: nothing is stored."""

Plan = npt.NDArray[np.int32]


@dataclass(slots=True)
class Tally:
    """Bytes of the result by how they came to be there."""

    cloned_bytes: int = 0
    copied_bytes: int = 0
    encoded_bytes: int = 0
    clones: int = 0


def plan_windows(view: SectionView, geometry: Geometry, *, whole_layers: list[bool], whole: bool) -> Plan:
    """For each window of a section: the layer whose frame can be taken over, REENCODE or ZEROS.

    Vectorised over the section. A frame can be taken over if it holds exactly the bytes the result's
    frame must hold: for a full the whole window as the point has it, for a delta its stored blocks.
    """
    per_window = geometry.window_bytes // geometry.block_bytes
    starts = np.arange(0, len(view.kinds), per_window)
    stored = view.stored
    held = np.logical_or.reduceat(stored, starts)
    plan = np.full(len(starts), REENCODE, np.int32)
    plan[~held] = ZEROS
    for index, part in enumerate(view.layers):
        if part is None:
            continue
        mine = stored & (view.owner == index)
        if whole_layers[index]:
            # Its frame holds the whole window: right if no newer layer says anything there.
            fits = np.logical_and.reduceat(view.owner == index, starts)
        else:
            same = (mine == stored) & (part.stored == stored)
            fits = np.logical_and.reduceat(same, starts)
            if whole:
                # A delta's frame is a whole window only where all its blocks are stored.
                fits &= np.logical_and.reduceat(mine, starts)
        plan[fits & held] = index
    return plan


@dataclass(frozen=True, slots=True)
class _Run:
    """Frames of one layer that follow each other in its file, from ``start`` to ``end``, and go to the target
    as they are.
    """

    layer: int
    frames: fmt.Frames
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Windows:
    """Windows ``[low, high)`` of a section: to be encoded again, or with ``zeros`` to become frames of zeros."""

    low: int
    high: int
    zeros: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one worker does at a time: a part of a section, and with ``last`` its record. Pieces are numbered
    in the order of the target.
    """

    number: int
    view: SectionView
    parts: Sequence[_Run | _Windows]
    last: bool


@dataclass(slots=True)
class _Steps:
    """How placed bytes come into the target: ``writes`` by offset, ``copies`` and ``clones`` by layer, offset
    in its file, offset in the target and length.
    """

    writes: list[tuple[int, list[Buffer]]] = field(default_factory=list)
    copies: list[tuple[int, int, int, int]] = field(default_factory=list)
    clones: list[tuple[int, int, int, int]] = field(default_factory=list)
    written_bytes: int = 0
    write_end: int = -1

    def write(self, offset: int, buffers: Sequence[Buffer], length: int) -> None:
        """Buffers that follow those before them go with them."""
        if self.writes and self.write_end == offset:
            self.writes[-1][1].extend(buffers)
        else:
            self.writes.append((offset, list(buffers)))
        self.write_end = offset + length
        self.written_bytes += length


class Composer:
    """Writes the result's sections one after the other into an ``ImageWriter``.

    Give each of ``pieces()`` to a worker made by ``worker``, from as many threads as there are, then call
    ``finish``. ``unit`` is the file system's block size where blocks can be shared, else 0.
    """

    def __init__(self, view: PointView, writer: ImageWriter, sink: ByteSink, unit: int) -> None:
        self._view, self._writer, self._sink, self._unit = view, writer, sink, unit
        self._whole = view.complete
        self._whole_layers = [layer.whole for layer in view.layers]
        self._claimed = view.claimed_digests()
        self._turns = Turns()
        self._records: list[fmt.Frames] = []
        self._held = _Steps()
        self._writing = threading.Lock()
        self.tally = Tally()

    # --- cutting -------------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """All work, in the order of the target. Raises DamagedImage, UnreadableStore."""
        number = 0
        for section in range(self._view.geometry.sections):
            view = self._view.section(section)
            if self._whole:
                self._view.check_section(view, self._claimed)
            parts: list[_Run | _Windows] = []
            copied = encoded = 0
            for part in self._parts(view) if self._whole or view.kinds.any() else ():
                parts.append(part)
                if isinstance(part, _Run):
                    copied += 0 if self._unit else part.end - part.start
                elif not part.zeros:
                    encoded += (part.high - part.low) * self._view.geometry.window_bytes
                if copied >= _PIECE_COPIED or encoded >= _PIECE_ENCODED:
                    yield Piece(number, view, parts, last=False)
                    number, parts, copied, encoded = number + 1, [], 0, 0
            yield Piece(number, view, parts, last=True)
            number += 1

    def _parts(self, view: SectionView) -> Iterator[_Run | _Windows]:
        """A section in the order of its windows; runs of windows with one plan are taken at once."""
        geometry = self._view.geometry
        plan = plan_windows(view, geometry, whole_layers=self._whole_layers, whole=self._whole)
        first = view.number * geometry.section_bytes // geometry.window_bytes
        step = max(1, _PIECE_ENCODED // geometry.window_bytes)
        for low, high in zip(*(edges.tolist() for edges in extent.runs(plan)), strict=True):
            kind = int(plan[low])
            if kind >= 0:
                yield from self._runs(view.layers[kind], kind, first + low, first + high)
            elif kind == REENCODE:
                for begin in range(low, high, step):
                    yield _Windows(begin, min(begin + step, high), zeros=False)
            elif self._whole:
                yield _Windows(low, high, zeros=True)

    def _runs(self, part: Section | None, layer: int, low: int, high: int) -> Iterator[_Run]:
        """The frames of windows ``[low, high)`` (of the volume) of one layer."""
        assert part is not None  # noqa: S101 - the plan names only layers with a section
        frames = part.frames[slice(*np.searchsorted(part.frames["window"], [low, high]).tolist())]
        offsets = frames["offset"].astype(np.int64)
        ends = offsets + frames["stored"]
        breaks = offsets[1:] != ends[:-1]
        if not self._unit:
            # Copies can be cut anywhere, so that workers share them; clones should be long.
            pieces = (offsets - offsets[0]) // _PIECE_COPIED
            breaks |= pieces[1:] != pieces[:-1]
        edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(frames)]
        for first, last in pairwise(edges):
            yield _Run(layer, frames[first:last], int(offsets[first]), int(ends[last - 1]))

    # --- working -------------------------------------------------------------------------------

    def worker(self, encoder: Encoder, advance: Callable[[int], None]) -> Callable[[Piece], None]:
        """What one thread calls with each of its pieces; ``advance`` is told the bytes of the volume done.

        It raises DamagedImage, UnreadableStore, NoSpace, StoreFailed, and Stopped after ``stop``.
        """

        def work(piece: Piece) -> None:
            frames = [self._encoded(piece.view, part, encoder) for part in piece.parts]
            steps = _Steps()
            with self._turns.turn(piece.number):
                if self._unit:
                    self._place(piece, frames, self._held)
                    if self._held.written_bytes >= _HELD_BYTES:
                        self.finish()
                else:
                    self._place(piece, frames, steps)
            # A file takes one write at a time: two that wait for each other in the kernel spin.
            with self._writing:
                self._carry_out(steps)
            if piece.last:
                start, end = self._view.geometry.section_range(piece.view.number)
                advance(end - start)

        return work

    def stop(self) -> None:
        """Release all waiting workers: the image will not be finished."""
        self._turns.stop()

    def finish(self) -> None:
        """Bring to the target what waits in memory. Raises NoSpace or StoreFailed.

        Clones come first: a file system that finds dirty pages next to the range it is to share flushes them
        before it shares, which takes several times longer than the sharing.
        """
        held, self._held = self._held, _Steps()
        self._carry_out(held)

    def _carry_out(self, steps: _Steps) -> None:
        for layer, start, at, length in steps.clones:
            if self._unit and self._sink.clone(self._view.layers[layer].source, start, at, length):
                self.tally.clones += 1
                self.tally.cloned_bytes += length
            else:
                self._unit = 0  # the file system has changed its mind: copy from here on
                self.tally.copied_bytes += length
                self._sink.copy(self._view.layers[layer].source, start, at, length)
        for layer, start, at, length in steps.copies:
            self._sink.copy(self._view.layers[layer].source, start, at, length)
        for offset, buffers in steps.writes:
            self._sink.write(offset, buffers)

    # --- placing -------------------------------------------------------------------------------

    def _place(self, piece: Piece, frames: Sequence[Sequence[Frame]], steps: _Steps) -> None:
        """Give every part of a piece, and the section's record after the last one, its place."""
        for part, encoded in zip(piece.parts, frames, strict=True):
            if isinstance(part, _Run):
                self._records.append(self._place_run(part, steps))
            elif part.zeros:
                self._records.append(self._place_zeros(piece.view, part, steps))
            else:
                self._records.append(self._place_frames(encoded, steps))
        if piece.last:
            records = np.concatenate(self._records) if self._records else np.empty(0, fmt.FRAME)
            self._records = []
            if self._whole or piece.view.kinds.any():
                self._place_record(piece.view, records, steps)

    def _append(self, steps: _Steps, buffers: Sequence[Buffer], length: int) -> None:
        steps.write(self._writer.offset, buffers, length)
        self._writer.offset += length

    def _place_run(self, run: _Run, steps: _Steps) -> fmt.Frames:
        if self._unit and run.end - run.start >= _CLONE_UNITS_MIN * self._unit:
            at = self._place_clone(run, steps)
        else:
            at, length = self._writer.offset, run.end - run.start
            if self._unit:
                self._append(steps, [self._view.layers[run.layer].source.read(run.start, length)], length)
            else:
                steps.copies.append((run.layer, run.start, at, length))
                self._writer.offset += length
            self.tally.copied_bytes += length
        records = run.frames.copy()
        records["offset"] = run.frames["offset"] - np.uint64(run.start) + np.uint64(at)
        return records

    def _place_clone(self, run: _Run, steps: _Steps) -> int:
        """Padding, head, shared middle and tail; the offset of the run's first byte."""
        source, unit, length = self._view.layers[run.layer].source, self._unit, run.end - run.start
        pad = (run.start - self._writer.offset) % unit
        if pad:
            pad += unit if pad < fmt.PADDING_MIN else 0
            self._append(steps, [fmt.padding(pad)], pad)
        at = self._writer.offset
        head = -run.start % unit
        middle = (length - head) // unit * unit
        tail = length - head - middle
        if head:
            self._append(steps, [source.read(run.start, head)], head)
        steps.clones.append((run.layer, run.start + head, self._writer.offset, middle))
        self._writer.offset += middle
        if tail:
            self._append(steps, [source.read(run.end - tail, tail)], tail)
        self.tally.copied_bytes += pad + head + tail
        return at

    def _place_zeros(self, view: SectionView, part: _Windows, steps: _Steps) -> fmt.Frames:
        geometry = self._view.geometry
        begin, end = geometry.section_range(view.number)
        start = begin + part.low * geometry.window_bytes
        length = min(begin + part.high * geometry.window_bytes, end) - start
        first = start // geometry.window_bytes
        records, data = zero_frames(first, length, geometry.window_bytes, self._writer.offset)
        self._append(steps, [data], len(data))
        self.tally.copied_bytes += len(data)
        return records

    def _place_frames(self, frames: Sequence[Frame], steps: _Steps) -> fmt.Frames:
        records = frame_records(frames, self._writer.offset)
        length = sum(frame.stored_bytes for frame in frames)
        self._append(steps, [part for frame in frames for part in frame.buffers], length)
        self.tally.encoded_bytes += length
        return records

    def _place_record(self, view: SectionView, frames: fmt.Frames, steps: _Steps) -> None:
        writer, number = self._writer, view.number
        writer.map_digests[number] = self._claimed[number]
        record = fmt.pack_section(number, view.rows[view.stored], view.extents, frames)
        steps.write(writer.offset, [record], len(record))
        writer.list_section(number, record, view.extents, len(frames))
        self.tally.copied_bytes += len(record)

    # --- encoding ------------------------------------------------------------------------------

    def _encoded(self, view: SectionView, part: _Run | _Windows, encoder: Encoder) -> list[Frame]:
        """The frames of windows that no layer holds as the result needs them."""
        if isinstance(part, _Run) or part.zeros:
            return []
        return [self._encode(view, window, encoder) for window in range(part.low, part.high)]

    def _encode(self, view: SectionView, window: int, encoder: Encoder) -> Frame:
        """Decode what the layers hold of one window, and encode what the result must hold."""
        geometry = self._view.geometry
        block, per_window = geometry.block_bytes, geometry.window_bytes // geometry.block_bytes
        low = window * per_window
        start = (view.number * BLOCKS_PER_SECTION + low) * block
        data = np.empty(min(geometry.window_bytes, geometry.device_bytes - start), np.uint8)
        flaws = self._view.read(view, low, data)
        if flaws:
            raise DamagedImage(file=flaws[0].file, reason=flaws[0])
        content = data if self._whole else _kept(data, view.stored[low : low + per_window], block)
        return make_frame(start // geometry.window_bytes, memoryview(content), encoder)


def _kept(data: npt.NDArray[np.uint8], stored: Mask, block: int) -> npt.NDArray[np.uint8]:
    """The stored blocks of a window, one after the other."""
    return data[np.repeat(stored, block)[: len(data)]]
