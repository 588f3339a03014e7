"""Writes one image: frames in address order, an index section after each range, closing record, seek table.

Workers finish pieces in any order and hand them in; a ticket makes each wait until its predecessor has
taken its file offset. Only that is serial: the bytes are written outside the lock, by the worker that
made them, while they are still in its cache.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from blockbak.image import format as fmt
from blockbak.image import seektable
from blockbak.image.codec import Encoder
from blockbak.model import extent, hashmap
from blockbak.model.extent import BAD, DATA, HOLE, ZERO, Extents, Kinds
from blockbak.model.facts import FULL, Closing, Opening
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Rows
from blockbak.model.streams import Buffer, ByteSink


@dataclass(frozen=True, slots=True)
class Frame:
    """One encoded frame, not yet placed."""

    window: int
    content_bytes: int
    stored_bytes: int
    checksum: int
    digest: bytes
    buffers: Sequence[Buffer]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a worker found in consecutive blocks of one section.

    ``number`` counts pieces in address order without gaps. ``kinds`` (uint8 per block) is ABSENT where
    a delta says nothing; DATA means the block has stored bytes. ``rows`` are the map rows of *all*
    blocks. ``bad`` are byte ranges inside the piece that could not be read. Frames are in window order.
    """

    number: int
    first_block: int
    kinds: Kinds
    bad: Extents
    rows: Rows
    frames: Sequence[Frame]


class Stopped(Exception):
    """Another worker failed; this one's piece is no longer wanted. Never reaches a person."""


def encode_windows(
    data: npt.NDArray[np.uint8],
    kinds: Kinds,
    first_block: int,
    geometry: Geometry,
    encoder: Encoder,
    *,
    whole: bool,
) -> list[Frame]:
    """Frames for the windows of a piece that hold stored bytes.

    ``data`` uint8, the piece's bytes from block ``first_block`` (a window's first); ``whole`` puts the
    whole window into its frame (a full), else only its DATA blocks (a delta). The compressor calls
    release the GIL. Frames may be views of ``data``: write them before it changes.
    """
    per_window = geometry.window_bytes // geometry.block_bytes
    stored = kinds == DATA
    view = memoryview(data)
    frames = []
    starts = np.flatnonzero(np.logical_or.reduceat(stored, np.arange(0, len(stored), per_window)))
    for index in starts.tolist():
        low, high = index * per_window, (index + 1) * per_window
        if whole:
            content = view[low * geometry.block_bytes : high * geometry.block_bytes]
        else:
            content = _gather(view, stored[low:high], low, geometry.block_bytes)
        frames.append(make_frame(first_block // per_window + index, content, encoder))
    return frames


def _gather(view: memoryview, wanted: npt.NDArray[np.bool_], first: int, block: int) -> memoryview:
    begins, ends = extent.true_runs(wanted)
    if len(begins) == 1:
        return view[(first + int(begins[0])) * block : (first + int(ends[0])) * block]
    parts = [
        view[(first + a) * block : (first + b) * block] for a, b in zip(begins.tolist(), ends.tolist(), strict=True)
    ]
    return memoryview(b"".join(parts))


def make_frame(window: int, content: memoryview, encoder: Encoder) -> Frame:
    """One frame of ``content``, with the digest of its stored bytes."""
    buffers = encoder.encode(content)
    hasher = blake3()
    for part in buffers:
        hasher.update(part)
    stored = sum(len(part) for part in buffers)
    checksum = int.from_bytes(buffers[-1][-fmt.CHECKSUM_BYTES :], "little")
    return Frame(window, len(content), stored, checksum, hasher.digest(fmt.FRAME_DIGEST_BYTES), buffers)


def frame_records(frames: Sequence[Frame], offset: int) -> fmt.Frames:
    """The records of frames that are to lie one after the other from ``offset`` on."""
    records = np.empty(len(frames), fmt.FRAME)
    stored = np.array([frame.stored_bytes for frame in frames], np.int64)
    records["window"] = [frame.window for frame in frames]
    records["content"] = [frame.content_bytes for frame in frames]
    records["stored"] = stored
    records["offset"] = offset + np.cumsum(stored) - stored
    records["checksum"] = [frame.checksum for frame in frames]
    records["digest"] = np.frombuffer(b"".join(frame.digest for frame in frames), "V16")
    return records


class Turns:
    """Lets workers that finish numbered jobs in any order pass one point in the order of the numbers."""

    def __init__(self) -> None:
        self._next = 0
        self._stopped = False
        self._condition = threading.Condition()

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """Waits for the jobs before this one; those after it wait until the ``with`` ends without an error.

        Raises Stopped after ``stop``.
        """
        with self._condition:
            self._condition.wait_for(lambda: self._stopped or self._next == number)
            if self._stopped:
                raise Stopped
            yield
            self._next += 1
            self._condition.notify_all()

    def stop(self) -> None:
        """Release all who wait: there is nothing to wait for any more."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()


@dataclass(slots=True)
class Counts:
    """Bytes by kind and frames, summed while writing."""

    by_kind: dict[int, int] = field(default_factory=lambda: dict.fromkeys((DATA, ZERO, HOLE, BAD), 0))
    frames: int = 0

    @property
    def changed_bytes(self) -> int:
        """Bytes that the image claims anything about."""
        return sum(self.by_kind.values())

    def by_name(self) -> dict[str, int]:
        """Bytes by kind, as the closing record names them."""
        return {f"{extent.KIND_NAMES[kind]}_bytes": count for kind, count in self.by_kind.items()}


class _OpenSection:
    """The section that is being filled."""

    def __init__(self, number: int, geometry: Geometry) -> None:
        self.number = number
        blocks = geometry.section_blocks(number)
        self.end_block = number * BLOCKS_PER_SECTION + blocks
        self.kinds = np.zeros(blocks, np.uint8)
        self.rows = hashmap.empty_rows(blocks)
        self.bad: list[Extents] = []
        self.frames: list[npt.NDArray[np.void]] = []
        self.zero_start = 0
        self.zero_bytes = 0


class ImageWriter:
    """Fills ``sink`` with one image. ``parent_digests`` (n, 32) uint8: the parent point's section digests,
    taken over for sections in which nothing changed; None for a full.
    """

    def __init__(self, sink: ByteSink, opening: Opening, parent_digests: npt.NDArray[np.uint8] | None = None) -> None:
        self.geometry = opening.geometry
        self.counts = Counts()
        self._sink = sink
        self._whole = opening.kind == FULL
        self._header = fmt.pack_header(opening)
        self.offset = len(self._header)
        self._turns = Turns()
        self._section: _OpenSection | None = None
        self._list = np.zeros(self.geometry.sections, fmt.SECTION_ENTRY)
        self._frame_counts = np.zeros(self.geometry.sections, np.int64)
        self._listed = 0
        self.map_digests = (
            np.zeros((self.geometry.sections, 32), np.uint8) if parent_digests is None else parent_digests.copy()
        )
        sink.write(0, [self._header])

    # --- pieces --------------------------------------------------------------------------------

    def add(self, piece: Piece) -> None:
        """Place and write a piece; waits for the pieces before it. Raises Stopped after ``stop``."""
        with self._turns.turn(piece.number):
            offset, buffers = self._place(piece)
        if buffers:
            self._sink.write(offset, buffers)

    def stop(self) -> None:
        """Release all waiting workers: the image will not be finished."""
        self._turns.stop()

    def _place(self, piece: Piece) -> tuple[int, list[Buffer]]:
        """Offsets for the piece's frames, and for its section if it is the last; what to write where."""
        number = piece.first_block // BLOCKS_PER_SECTION
        if self._section is None or self._section.number != number:
            self._section = _OpenSection(number, self.geometry)
        section = self._section
        low = piece.first_block - number * BLOCKS_PER_SECTION
        high = low + len(piece.kinds)
        section.kinds[low:high], section.rows[low:high] = piece.kinds, piece.rows
        if len(piece.bad):
            section.bad.append(piece.bad)
        begin, buffers = self.offset, list[Buffer]()
        if self._whole:
            self._place_whole(section, piece, buffers)
        elif piece.frames:
            self._place_frames(section, piece.frames, buffers)
        if piece.first_block + len(piece.kinds) == section.end_block:
            self._close_section(section, buffers)
            self._section = None
        return begin, buffers

    def _place_whole(self, section: _OpenSection, piece: Piece, buffers: list[Buffer]) -> None:
        """In a full every window has a frame: runs of windows with frames alternate with zero runs."""
        window_bytes = self.geometry.window_bytes
        start = piece.first_block * self.geometry.block_bytes
        end = min(start + len(piece.kinds) * self.geometry.block_bytes, self.geometry.device_bytes)
        first_window = start // window_bytes
        if not piece.frames:
            self._await_zeros(section, first_window, end - start)
            return
        held = np.zeros(-(-(end - start) // window_bytes), bool)
        held[[frame.window - first_window for frame in piece.frames]] = True
        taken = 0
        for low, high in zip(*(edges.tolist() for edges in extent.runs(held)), strict=True):
            if held[low]:
                self._flush_zeros(section, buffers)
                self._place_frames(section, piece.frames[taken : taken + high - low], buffers)
                taken += high - low
            else:
                length = min(start + high * window_bytes, end) - (start + low * window_bytes)
                self._await_zeros(section, first_window + low, length)

    def _await_zeros(self, section: _OpenSection, window: int, length: int) -> None:
        """Zeros from ``window`` on: they become frames once it is known how far they go."""
        if not section.zero_bytes:
            section.zero_start = window
        section.zero_bytes += length

    def _place_frames(self, section: _OpenSection, frames: Sequence[Frame], buffers: list[Buffer]) -> None:
        records = frame_records(frames, self.offset)
        section.frames.append(records)
        self.offset += int(records["stored"].sum(dtype=np.int64))
        for frame in frames:
            buffers.extend(frame.buffers)

    def _flush_zeros(self, section: _OpenSection, buffers: list[Buffer]) -> None:
        if not section.zero_bytes:
            return
        records, data = zero_frames(section.zero_start, section.zero_bytes, self.geometry.window_bytes, self.offset)
        section.frames.append(records)
        buffers.append(data)
        self.offset += len(data)
        section.zero_bytes = 0

    def _close_section(self, section: _OpenSection, buffers: list[Buffer]) -> None:
        if self._whole:
            self._flush_zeros(section, buffers)
        elif not section.kinds.any():
            return
        first_byte = section.number * self.geometry.section_bytes
        extents = extent.from_blocks(section.kinds, first_byte, self.geometry.block_bytes, self.geometry.device_bytes)
        if section.bad:
            extents = extent.overlay(extents, extent.coalesce(np.concatenate(section.bad)))
        frames = np.concatenate(section.frames) if section.frames else np.empty(0, fmt.FRAME)
        rows = section.rows[section.kinds == DATA]
        record = fmt.pack_section(section.number, rows, extents, frames)
        if len(rows) or section.bad or not self._whole:
            digest = hashmap.section_digest(section.rows, extents)
        else:
            digest = self.geometry.zero_section_digest(section.number)
        self.map_digests[section.number] = np.frombuffer(digest, np.uint8)
        self.list_section(section.number, record, extents, len(frames))
        buffers.append(record)

    def list_section(self, number: int, record: bytes, extents: Extents, frames: int) -> None:
        """Enter a section record, to be written at the current offset, in the section list."""
        entry = self._list[self._listed]
        entry["number"], entry["length"], entry["offset"] = number, len(record), self.offset
        entry["map_digest"] = np.void(self.map_digests[number].tobytes())
        entry["sha256"] = np.void(fmt.sha256(record))
        self._frame_counts[self._listed] = frames
        self._listed += 1
        self.offset += len(record)
        self.counts.frames += frames
        # A section's sums are exact in a float64.
        sums = np.bincount(extents["kind"], extents["length"], BAD + 1)
        for kind in self.counts.by_kind:
            self.counts.by_kind[kind] += int(sums[kind])

    # --- the end -------------------------------------------------------------------------------

    @property
    def root(self) -> str:
        """The root of the point's map, once all pieces are in."""
        return hashmap.root(self.geometry.device_bytes, self.geometry.block_bytes, self.map_digests)

    def finish(self, closing: Closing) -> tuple[int, str]:
        """Write closing record and seek table; the image's size in bytes and the record's SHA-256."""
        sections = self._list[: self._listed]
        record = fmt.pack_closing(closing, self._header, sections)
        self._sink.write(self.offset, [record])
        count = seektable.entry_count(self.counts.frames, self._listed)
        at = self.offset + len(record)
        table_bytes = fmt.seek_table_bytes(count)
        head, tail = fmt.seek_table_ends(count)
        self._sink.write(at, [head])
        end = at + len(head)
        table = seektable.Generator()
        for frames, offset in self._stored_frames(sections):
            entries = table.section(frames, offset)
            self._sink.write(end, [entries.tobytes()])
            end += entries.nbytes
        last = table.closing(self.offset, len(record))
        self._sink.write(end, [last.tobytes()])
        end += last.nbytes
        self._sink.write(end, [tail])
        if end + len(tail) != at + table_bytes:
            raise fmt.FormatError("the seek table does not have the size the index gives it")
        return end + len(tail), fmt.sha256(record).hex()

    @property
    def listed(self) -> int:
        """How many sections the image has so far."""
        return self._listed

    def _stored_frames(self, sections: fmt.SectionList) -> Iterator[tuple[fmt.Frames, int]]:
        """Each section's frame records, read back: held in memory they would grow with the volume."""
        for entry, count in zip(sections, self._frame_counts.tolist(), strict=False):
            offset, length = int(entry["offset"]), int(entry["length"])
            size = count * fmt.FRAME.itemsize
            data = self._sink.read(offset + length - size, size) if size else b""
            yield np.frombuffer(data, fmt.FRAME), offset


@lru_cache(maxsize=64)
def _zero_run(length: int, window_bytes: int) -> tuple[fmt.Frames, bytes]:
    """Records and bytes of a run of zeros, as if it were the volume's first window and lay at offset 0."""
    sizes = np.array(fmt.zero_frame_sizes(length, window_bytes), np.int64)
    frames = [fmt.zero_frame(size) for size in sizes.tolist()]
    stored = np.array([len(frame) for frame in frames], np.int64)
    records = np.empty(len(sizes), fmt.FRAME)
    records["window"] = (np.cumsum(sizes) - sizes) // window_bytes
    records["content"], records["stored"] = sizes, stored
    records["offset"] = np.cumsum(stored) - stored
    records["checksum"] = 0
    digests = b"".join(blake3(frame).digest(fmt.FRAME_DIGEST_BYTES) for frame in frames)
    records["digest"] = np.frombuffer(digests, "V16")
    return records, b"".join(frames)


def zero_frames(first_window: int, length: int, window_bytes: int, offset: int) -> tuple[fmt.Frames, bytes]:
    """Records and bytes of the frames for a run of ``length`` zero bytes, to lie at ``offset``."""
    known, data = _zero_run(length, window_bytes)
    records = known.copy()
    records["window"] += first_window
    records["offset"] += offset
    return records, data
