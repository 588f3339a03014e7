"""Composes one image from the layers of a point, without decoding what it can take over.

Frames whose content is what the result needs are cloned in runs: a padding frame brings the target
offset to the source offset modulo the file system's block, the aligned middle shares its blocks
(FICLONERANGE), head and tail are copied. Only windows that older and newer content share are decoded and
encoded again. A full is composed from a complete view; a delta from the deltas alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockbak.errors import DamagedImage
from blockbak.image import format as fmt
from blockbak.image.codec import Encoder
from blockbak.image.reader import Section
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import ImageWriter, make_frame, zero_frames
from blockbak.model import extent
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Mask
from blockbak.model.streams import ByteSink

_CLONE_UNITS_MIN = 4
"""A run shorter than so many file-system blocks is copied: its seams would cost as much as it shares."""

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


class _Run:
    """Neighbouring bytes of one source that go to the target as they are."""

    __slots__ = ("end", "layer", "start")

    def __init__(self, layer: int, start: int, end: int) -> None:
        self.layer, self.start, self.end = layer, start, end


class Composer:
    """Writes the result's sections one after the other into an ``ImageWriter``.

    ``unit`` is the file system's block size where blocks can be shared, else 0.
    """

    def __init__(self, view: PointView, writer: ImageWriter, sink: ByteSink, encoder: Encoder, unit: int) -> None:
        self._view, self._writer, self._sink, self._encoder, self._unit = view, writer, sink, encoder, unit
        self._whole = view.complete
        self._whole_layers = [layer.whole for layer in view.layers]
        self._claimed = view.claimed_digests()
        self.tally = Tally()

    def run(self, advance: Callable[[int], None], check: Callable[[], None]) -> None:
        """Compose every section. Raises DamagedImage, UnreadableStore, NoSpace, StoreFailed."""
        geometry = self._view.geometry
        for number in range(geometry.sections):
            check()
            self._section(number)
            start, end = geometry.section_range(number)
            advance(end - start)

    def _section(self, number: int) -> None:
        view = self._view.section(number)
        if not self._whole and not view.kinds.any():
            return
        if self._view.complete:
            self._view.check_section(view, self._claimed)
        plan = plan_windows(view, self._view.geometry, whole_layers=self._whole_layers, whole=self._whole)
        records = self._frames(view, plan)
        self._record(view, records)

    def _record(self, view: SectionView, frames: fmt.Frames) -> None:
        writer, number = self._writer, view.number
        writer.map_digests[number] = self._claimed[number]
        record = fmt.pack_section(number, view.rows[view.stored], view.extents, frames)
        offset = writer.offset
        writer.list_section(number, record, view.extents, len(frames))
        self._sink.write(offset, [record])
        self.tally.copied_bytes += len(record)

    # --- frames --------------------------------------------------------------------------------

    def _frames(self, view: SectionView, plan: Plan) -> fmt.Frames:
        """Place the section's frames; their records. Runs of windows with one plan are taken at once."""
        tables: list[fmt.Frames] = []
        starts, ends = extent.runs(plan)
        geometry = self._view.geometry
        first_window = view.number * geometry.section_bytes // geometry.window_bytes
        for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
            kind = int(plan[low])
            if kind >= 0:
                tables += self._take_over(view.layers[kind], kind, first_window + low, first_window + high)
            elif kind == REENCODE:
                tables += [self._encode(view, window, first_window) for window in range(low, high)]
            elif self._whole:
                tables.append(self._zeros(view, first_window + low, first_window + high))
        return np.concatenate(tables) if tables else np.empty(0, fmt.FRAME)

    def _take_over(self, part: Section | None, layer: int, low: int, high: int) -> list[fmt.Frames]:
        """Clone the frames of windows ``[low, high)`` (of the volume) of one layer."""
        assert part is not None  # noqa: S101 - the plan names only layers with a section
        a, b = np.searchsorted(part.frames["window"], [low, high])
        frames = part.frames[a:b].copy()
        offsets = frames["offset"].astype(np.int64)
        ends = offsets + frames["stored"]
        breaks = np.flatnonzero(offsets[1:] != ends[:-1]) + 1
        for first, last in zip([0, *breaks.tolist()], [*breaks.tolist(), len(frames)], strict=True):
            at = self._place_run(_Run(layer, int(offsets[first]), int(ends[last - 1])))
            frames["offset"][first:last] = offsets[first:last] - offsets[first] + at
        return [frames]

    def _place_run(self, run: _Run) -> int:
        """Bring a run to the target; the offset of its first byte there."""
        source, unit, length = self._view.layers[run.layer].source, self._unit, run.end - run.start
        writer = self._writer
        if unit and length >= _CLONE_UNITS_MIN * unit:
            pad = (run.start - writer.offset) % unit
            if pad:
                pad += unit if pad < fmt.PADDING_MIN else 0
                self._sink.write(writer.offset, [fmt.padding(pad)])
                writer.offset += pad
                self.tally.copied_bytes += pad
            at = writer.offset
            head = -run.start % unit
            middle = (length - head) // unit * unit
            if self._sink.clone(source, run.start + head, at + head, middle):
                self._sink.copy(source, run.start, at, head)
                self._sink.copy(source, run.start + head + middle, at + head + middle, length - head - middle)
                self.tally.clones += 1
                self.tally.cloned_bytes += middle
                self.tally.copied_bytes += length - middle
                writer.offset += length
                return at
            self._unit = 0  # the file system has changed its mind: copy from here on
        at = writer.offset
        self._sink.copy(source, run.start, at, length)
        self.tally.copied_bytes += length
        writer.offset += length
        return at

    def _zeros(self, view: SectionView, low: int, high: int) -> fmt.Frames:
        geometry = self._view.geometry
        start, (_, end) = low * geometry.window_bytes, geometry.section_range(view.number)
        length = min(high * geometry.window_bytes, end) - start
        records, data = zero_frames(low, length, geometry.window_bytes, self._writer.offset)
        self._write(data)
        return records

    def _encode(self, view: SectionView, window: int, first_window: int) -> fmt.Frames:
        """Decode what the layers hold of one window, and encode what the result must hold."""
        geometry = self._view.geometry
        block, per_window = geometry.block_bytes, geometry.window_bytes // geometry.block_bytes
        low = window * per_window
        start = (view.number * BLOCKS_PER_SECTION + low) * block
        data = np.empty(min(geometry.window_bytes, geometry.device_bytes - start), np.uint8)
        flaws = self._view.read(view, low, data)
        if flaws:
            where = f"{flaws[0].reason}, at bytes {flaws[0].start} to {flaws[0].start + flaws[0].length}"
            raise DamagedImage(file=flaws[0].file, reason=where)
        content = data if self._whole else _kept(data, view.stored[low : low + per_window], block)
        frame = make_frame(first_window + window, memoryview(content), self._encoder)
        record = np.zeros(1, fmt.FRAME)
        record["window"], record["content"] = frame.window, frame.content_bytes
        record["stored"], record["offset"] = frame.stored_bytes, self._writer.offset
        record["checksum"] = frame.checksum
        record["digest"] = np.frombuffer(frame.digest, "V16")
        self._sink.write(self._writer.offset, frame.buffers)
        self._writer.offset += frame.stored_bytes
        self.tally.encoded_bytes += frame.stored_bytes
        return record

    def _write(self, data: bytes) -> None:
        self._sink.write(self._writer.offset, [data])
        self._writer.offset += len(data)
        self.tally.copied_bytes += len(data)


def _kept(data: npt.NDArray[np.uint8], stored: Mask, block: int) -> npt.NDArray[np.uint8]:
    """The stored blocks of a window, one after the other."""
    return data[np.repeat(stored, block)[: len(data)]]
