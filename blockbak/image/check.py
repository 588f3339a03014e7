"""Accounts for every byte of an image: what ``verify`` does beyond opening and indexing it.

Decoding is not enough: unused header bits, window descriptors and equivalent bit streams pass zstd's own
checksum. So each frame is checked by the digest of its stored bytes, by being exactly one frame in them,
and block by block; frames of zeros and padding by being the one form the format allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from blake3 import blake3

from blockbak.errors import Damage
from blockbak.image import codec
from blockbak.image import format as fmt
from blockbak.image.reader import ImageReader, Section
from blockbak.image.view import Flaw
from blockbak.image.writer import zero_frames
from blockbak.model import hashmap
from blockbak.model.hashmap import BLOCKS_PER_SECTION, DIGEST_BYTES, DIGEST_WORDS
from blockbak.units import MIB

_SPAN_BYTES = 1 * MIB
"""Stored bytes read at once."""


@dataclass(frozen=True)
class Span:
    """Consecutive frames of a section, and the file range they account for: from the end of what lies
    before them to the end of the last one, or with ``last`` to the section's record.
    """

    section: Section
    low: int
    high: int
    start: int
    end: int

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file it accounts for."""
        return self.end - self.start


def spans(reader: ImageReader, sections: Iterable[Section] | None = None) -> Iterator[Span]:
    """The file from the header's end to the last section record, in pieces; section records left out.

    ``sections`` are all of the image's, for a caller that walks the index for reasons of its own.
    """
    for at, section in enumerate(reader.all_sections() if sections is None else sections):
        start, end = reader.region_start(at), int(reader.sections["offset"][at])
        ends = section.frames["offset"].astype(np.int64) + section.frames["stored"]
        low = 0
        while low < len(ends):
            high = max(int(np.searchsorted(ends, start + _SPAN_BYTES, side="right")), low + 1)
            stop = int(ends[high - 1]) if high < len(ends) else end
            yield Span(section, low, high, start, stop)
            low, start = high, stop
        if not len(ends) and end > start:
            yield Span(section, 0, 0, start, end)


def check_tail(reader: ImageReader) -> Flaw | None:
    """The bytes between the last section record and the closing record: nothing, or padding."""
    start = reader.region_start(len(reader.sections))
    gap = reader.closing_offset - start
    if gap and reader.source.read(start, gap) != (fmt.padding(gap) if gap >= fmt.PADDING_MIN else b""):
        return Flaw(0, reader.geometry.device_bytes, "bytes before the closing record are not padding", reader.name)
    return None


@lru_cache(maxsize=64)
def _canonical(length: int) -> bytes:
    return fmt.zero_frame(length)


def check_span(reader: ImageReader, span: Span) -> list[Flaw]:
    """What is wrong in a span, as ranges of the volume. Safe from several threads."""
    try:
        data = memoryview(reader.source.read(span.start, span.end - span.start))
    except Damage as error:
        if span.high - span.low > 1:
            # One bad sector must not condemn its neighbours.
            return [flaw for one in _singly(span) for flaw in check_span(reader, one)]
        return [_flaw(reader, span, index, str(error)) for index in range(span.high - span.low)]
    if _is_canonical(reader, span, data):
        return []
    checked = _Checked(reader, span, data)
    flaws = [_flaw(reader, span, index, reason) for index, reason in sorted(checked.reasons.items())]
    if checked.after:
        start, end = reader.geometry.section_range(span.section.number)
        flaws.append(Flaw(start, end - start, checked.after, reader.name))
    return flaws


def _singly(span: Span) -> Iterator[Span]:
    """The same bytes, a frame at a time."""
    frames = span.section.frames[span.low : span.high]
    ends = (frames["offset"].astype(np.int64) + frames["stored"]).tolist()
    ends[-1] = span.end
    start = span.start
    for index, end in enumerate(ends):
        yield replace(span, low=span.low + index, high=span.low + index + 1, start=start, end=end)
        start = end


def _is_canonical(reader: ImageReader, span: Span, data: memoryview) -> bool:
    """Whether a span is a section of zeros as this program writes it: one look for all its frames.

    Another cut into frames is no flaw, so False says nothing.
    """
    section, geometry = span.section, reader.geometry
    if not reader.whole or len(section.rows) or span.high - span.low < len(section.frames):
        return False
    start, end = geometry.section_range(section.number)
    first, window = start // geometry.window_bytes, geometry.window_bytes
    frames, stored = zero_frames(first, end - start, window, span.start)
    return frames.tobytes() == section.frames.tobytes() and data.tobytes() == stored


def _flaw(reader: ImageReader, span: Span, index: int, reason: str) -> Flaw:
    """The windows of a span's frame as a range of the volume."""
    frame = span.section.frames[span.low + index]
    start = int(frame["window"]) * reader.geometry.window_bytes
    length = max(int(frame["content"]), reader.geometry.window_bytes)
    return Flaw(start, min(length, reader.geometry.device_bytes - start), reason, reader.name)


def _gap_flaw(gap: memoryview) -> str | None:
    return "bytes between frames are not padding" if len(gap) and gap != fmt.padding(len(gap)) else None


class _Checked:
    """What is wrong with the frames of a span: the first reason of each, by its place in the span.

    What can be asked of all frames at once is; only the digests and the decoding go frame by frame.
    ``after`` is what is wrong with the bytes behind the last frame.
    """

    def __init__(self, reader: ImageReader, span: Span, data: memoryview) -> None:
        self.reasons: dict[int, str] = {}
        self.after: str | None = None
        self._reader, self._span, self._data = reader, span, data
        self._frames = span.section.frames[span.low : span.high]
        offsets = self._frames["offset"].astype(np.int64) - span.start
        self._begins, self._ends = offsets, offsets + self._frames["stored"]
        self._gaps()
        self._contents()
        self._checksums()

    def _gaps(self) -> None:
        """Between frames lies nothing, or padding."""
        begins = np.append(self._begins, len(self._data))
        ends = np.concatenate(([0], self._ends))
        for index in np.flatnonzero(begins != ends).tolist():
            if reason := _gap_flaw(self._data[ends[index] : begins[index]]):
                if index < len(self._frames):
                    self.reasons[index] = reason
                else:
                    self.after = reason

    def _contents(self) -> None:
        """Each frame is what its record and the rows of its blocks say."""
        if not len(self._frames):
            return
        section, geometry = self._span.section, self._reader.geometry
        per_window = geometry.window_bytes // geometry.block_bytes
        first = self._frames["window"].astype(np.int64) * per_window - section.number * BLOCKS_PER_SECTION
        count = np.maximum(per_window, -(-self._frames["content"].astype(np.int64) // geometry.block_bytes))
        # Rows lie in the order of their blocks, so those of a frame follow those of the frame before it.
        low, high = section.rows_before[first], section.rows_before[np.minimum(first + count, len(section.stored))]
        digests: list[bytes] = []
        for index, (begin, end, content, digest, block, held) in enumerate(
            zip(
                self._begins.tolist(), self._ends.tolist(), self._frames["content"].tolist(),
                self._frames["digest"].tolist(), first.tolist(), (high - low).tolist(), strict=True,
            )
        ):  # fmt: skip
            frame = self._data[begin:end]
            found = self.reasons.get(index) or self._frame(frame, content, digest, block, held)
            if isinstance(found, str):
                self.reasons[index] = found
                found = [bytes(DIGEST_BYTES)] * held
            digests += found
        rows = np.frombuffer(b"".join(digests), "<u8").reshape(-1, DIGEST_WORDS)
        unequal = np.flatnonzero(hashmap.changed_rows(rows, section.rows[low[0] : high[-1]])) + low[0]
        for index in np.searchsorted(high, unequal, side="right").tolist():
            self.reasons.setdefault(index, "a block does not have its digest")

    def _frame(self, frame: memoryview, content_bytes: int, digest: bytes, first: int, held: int) -> list[bytes] | str:
        """The digests of the ``held`` stored blocks in a frame (its first block is ``first`` of the section),
        or what is wrong with it.
        """
        if blake3(frame).digest(fmt.FRAME_DIGEST_BYTES) != digest:
            return "the stored bytes of a frame do not have their digest"
        if not held:
            return [] if frame == _canonical(content_bytes) else "a frame of zeros is not in its one form"
        if reason := codec.frame_header_flaw(frame, content_bytes):
            return reason
        try:
            content = memoryview(codec.decode(frame, content_bytes))
        except fmt.FormatError as error:
            return str(error)
        block = self._reader.geometry.block_bytes
        starts = range(0, content_bytes, block)
        if self._reader.whole and held < len(starts):
            stored = self._span.section.stored[first : first + len(starts)].tolist()
            if any(
                np.frombuffer(content[at : at + block], np.uint8).any()
                for at, is_stored in zip(starts, stored, strict=True)
                if not is_stored
            ):
                return "a block that should be zeros is not"
            return [
                blake3(content[at : at + block]).digest()
                for at, is_stored in zip(starts, stored, strict=True)
                if is_stored
            ]
        return [blake3(content[at : at + block]).digest() for at in starts]

    def _checksums(self) -> None:
        """A record must name the checksum that its frame ends with; a frame of zeros has none (bit 2)."""
        sound = np.setdiff1d(np.arange(len(self._frames)), list(self.reasons))
        if not len(sound):
            return
        data = np.frombuffer(self._data, np.uint8)
        last = self._ends[sound, np.newaxis] - np.arange(fmt.CHECKSUM_BYTES, 0, -1)
        ending = np.ascontiguousarray(data[last]).view("<u4")[:, 0]
        has = np.where(data[self._begins[sound] + 4] & 0x04, ending, 0)
        for index in sound[has != self._frames["checksum"][sound]].tolist():
            self.reasons[index] = "a frame does not end with the checksum of its record"
