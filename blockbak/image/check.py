"""Accounts for every byte of an image: what ``verify`` does beyond opening and indexing it.

Decoding is not enough: unused header bits, window descriptors and equivalent bit streams pass zstd's own
checksum. So each frame is checked by the digest of its stored bytes, by being exactly one frame in them,
and block by block; frames of zeros and padding by being the one form the format allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from blockbak.errors import Damage
from blockbak.image import codec
from blockbak.image import format as fmt
from blockbak.image.reader import ImageReader, Section
from blockbak.image.view import Flaw
from blockbak.model import hashmap
from blockbak.model.hashmap import BLOCKS_PER_SECTION
from blockbak.units import MIB

_SPAN_BYTES = 4 * MIB
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


def spans(reader: ImageReader) -> Iterator[Span]:
    """The file from the header's end to the last section record, in pieces; section records left out."""
    for at, section in enumerate(reader.all_sections()):
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
    frames = span.section.frames[span.low : span.high]
    try:
        data = memoryview(reader.source.read(span.start, span.end - span.start))
    except Damage as error:
        return _all_frames(reader, span, str(error))
    flaws = []
    at = span.start
    for window, content, stored, offset, checksum, digest in zip(
        frames["window"].tolist(), frames["content"].tolist(), frames["stored"].tolist(),
        frames["offset"].tolist(), frames["checksum"].tolist(), frames["digest"], strict=True,
    ):  # fmt: skip
        frame = data[offset - span.start : offset - span.start + stored]
        gap = data[at - span.start : offset - span.start]
        reason = _gap_flaw(gap) or _frame_flaw(reader, span.section, frame, window, content, bytes(digest))
        reason = reason or _checksum_flaw(frame, checksum)
        if reason:
            flaws.append(_flaw(reader, window, content, reason))
        at = offset + stored
    if reason := _gap_flaw(data[at - span.start :]):
        start, end = reader.geometry.section_range(span.section.number)
        flaws.append(Flaw(start, end - start, reason, reader.name))
    return flaws


def _gap_flaw(gap: memoryview) -> str | None:
    return "bytes between frames are not padding" if len(gap) and gap != fmt.padding(len(gap)) else None


def _checksum_flaw(frame: memoryview, checksum: int) -> str | None:
    """The record must name the checksum that the frame ends with; a frame of zeros has none (bit 2)."""
    has = int.from_bytes(frame[-fmt.CHECKSUM_BYTES :], "little") if frame[4] & 0x04 else 0
    return None if has == checksum else "a frame does not end with the checksum of its record"


def _flaw(reader: ImageReader, window: int, content: int, reason: str) -> Flaw:
    """The frame's windows as a range of the volume."""
    start = window * reader.geometry.window_bytes
    length = max(content, reader.geometry.window_bytes)
    return Flaw(start, min(length, reader.geometry.device_bytes - start), reason, reader.name)


def _all_frames(reader: ImageReader, span: Span, reason: str) -> list[Flaw]:
    frames = span.section.frames[span.low : span.high]
    return [
        _flaw(reader, window, content, reason)
        for window, content in zip(frames["window"].tolist(), frames["content"].tolist(), strict=True)
    ]


def _held(reader: ImageReader, section: Section, window: int, content: int) -> npt.NDArray[np.int64]:
    """The stored blocks (of the section) in a frame's range."""
    per_window = reader.geometry.window_bytes // reader.geometry.block_bytes
    first = window * per_window - section.number * BLOCKS_PER_SECTION
    count = max(per_window, -(-content // reader.geometry.block_bytes))
    return np.flatnonzero(section.stored[first : first + count]) + first


def _frame_flaw(
    reader: ImageReader, section: Section, frame: memoryview, window: int, content_bytes: int, digest: bytes
) -> str | None:
    if blake3(frame).digest(fmt.FRAME_DIGEST_BYTES) != digest:
        return "the stored bytes of a frame do not have their digest"
    held = _held(reader, section, window, content_bytes)
    if not len(held):
        return None if frame == _canonical(content_bytes) else "a frame of zeros is not in its one form"
    if reason := codec.frame_header_flaw(frame, content_bytes):
        return reason
    try:
        content = np.frombuffer(codec.decode(frame, content_bytes), np.uint8)
    except fmt.FormatError as error:
        return str(error)
    return _content_flaw(reader, section, content, window, held)


def _content_flaw(
    reader: ImageReader,
    section: Section,
    content: npt.NDArray[np.uint8],
    window: int,
    held: npt.NDArray[np.int64],
) -> str | None:
    """Every stored block has its row; in a full, every other block of the window is zeros."""
    block = reader.geometry.block_bytes
    known = section.rows[np.searchsorted(np.flatnonzero(section.stored), held)]
    wanted = np.ones(-(-len(content) // block), bool)
    places = np.arange(len(wanted))
    if reader.whole:
        first = window * (reader.geometry.window_bytes // block) - section.number * BLOCKS_PER_SECTION
        places = held - first
        wanted[:] = False
        wanted[places] = True
        for index in np.flatnonzero(~wanted).tolist():
            if content[index * block : (index + 1) * block].any():
                return "a block that should be zeros is not"
    rows = hashmap.digest_blocks(content, block, wanted)
    if hashmap.changed_rows(np.ascontiguousarray(rows[places]), np.ascontiguousarray(known)).any():
        return "a block does not have its digest"
    return None
