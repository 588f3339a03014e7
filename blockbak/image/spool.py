"""The spool that the initramfs leaves: a disk's bytes, not an image of a repository yet.

``image.zst`` is zstd frames, one after the other, each of ``PIECE_BYTES`` of the disk (the last of what is left) with
its checksum; ``index`` has a line for each with its number and stored size, ``bad`` one for each range that could not
be read, with its first byte and its length in bytes. So it is read at any place, and ``zstd -dc`` gives the disk.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockbak.errors import SpoolDamaged
from blockbak.model import extent
from blockbak.model.extent import BAD, Extents
from blockbak.model.streams import ByteSource
from blockbak.units import MIB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 128 * MIB
"""As ``host/initramfs/stage`` has it."""
_STEP_BYTES = 2 * MIB
_AHEAD_BYTES = 64 * MIB
"""Readers that take turns are never farther apart."""
_INPUT_BYTES = MIB

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Index:
    """How long each frame is in the file, what could not be read of the disk, and how much of it a frame holds."""

    stored: tuple[int, ...]
    bad: Extents
    piece_bytes: int

    @property
    def total(self) -> int:
        """Bytes of the file."""
        return sum(self.stored)


def parse_index(name: str, index: str, bad: str, device_bytes: int, piece_bytes: int = PIECE_BYTES) -> Index:
    """The two small files of a spool. Raises SpoolDamaged where they do not fit a disk of that size."""
    try:
        rows = [(int(number), int(size)) for number, size in (line.split() for line in index.splitlines())]
        ranges = [(int(start), int(length)) for start, length in (line.split() for line in bad.splitlines())]
    except ValueError as error:
        raise SpoolDamaged(file=name, reason="its index cannot be understood") from error
    pieces = -(-device_bytes // piece_bytes)
    if [number for number, _ in rows] != list(range(pieces)) or any(size <= 0 for _, size in rows):
        raise SpoolDamaged(file=name, reason=f"its index does not have {pieces} frames")
    if any(start < 0 or length <= 0 or start + length > device_bytes for start, length in ranges):
        raise SpoolDamaged(file=name, reason="what could not be read lies outside of the disk")
    ranges.sort()
    unread = extent.coalesce(extent.table([a for a, _ in ranges], [a + b for a, b in ranges], BAD))
    return Index(tuple(size for _, size in rows), unread, piece_bytes)


class SpoolReader:
    """The disk that a spool holds, read as a device is. Several threads may read; each byte is decoded once where
    together they go through it in order.

    ``path`` is what the disk was called, sizes are bytes. Raises SpoolDamaged.
    """

    def __init__(self, file: ByteSource, index: Index, *, size: int, logical: int, physical: int, path: str) -> None:
        if file.size != index.total:
            raise SpoolDamaged(file=file.name, reason=f"it has {file.size} bytes instead of {index.total}")
        self.size, self.logical, self.physical, self.path = size, logical, physical, path
        self.retries, self.strict = 0, False
        self.doubt: Callable[[], None] = lambda: None
        self._file, self._index = file, index
        self._begins = np.cumsum([0, *index.stored])
        self._guard = threading.Lock()
        self._kept: dict[int, bytes] = {}
        self._place(0)

    def read(self, offset: int, into: Bytes, length: int) -> Extents:
        """``length`` bytes at ``offset`` into the start of ``into``; what could not be read, as zeros and BAD."""
        with self._guard:
            data = self._take(offset, length)
        into[:length] = np.frombuffer(data, np.uint8)
        return extent.clip(self._index.bad, offset, offset + length)

    def next_data(self, offset: int) -> int:
        """Nothing is known of holes: ``offset``."""
        return offset

    def is_alive(self, places: Iterable[int]) -> bool:  # noqa: ARG002 - all are alike
        """It is no disk that could fall off its bus: what was unreadable was so at the boot, and that is all."""
        return True

    def peek(self, offset: int, length: int) -> bytes:
        """Some bytes from anywhere; fewer past the end, none before the start."""
        if not 0 <= offset < self.size:
            return b""
        length = min(length, self.size - offset)
        with self._guard:
            if not self._at <= offset < self._at + _AHEAD_BYTES:
                self._place(offset)
            while self._at < offset:
                self._decode(min(_STEP_BYTES, offset - self._at))
            return self._decode(length)

    def rewind(self) -> None:
        """To the start, where reading in order begins."""
        with self._guard:
            self._place(0)

    # --- decoding --------------------------------------------------------------------------------------

    def _take(self, offset: int, length: int) -> bytes:
        kept = self._kept.pop(offset, None)
        if kept is not None and len(kept) == length:
            return kept
        if not self._at <= offset < self._at + _AHEAD_BYTES:
            self._place(offset)
        while self._at < offset:
            # Another thread will ask for it.
            at = self._at
            self._kept[at] = self._decode(min(_STEP_BYTES, offset - at))
        return self._decode(length)

    def _place(self, offset: int) -> None:
        """Go on from the frame that holds ``offset``."""
        self._kept.clear()
        self._enter(offset // self._index.piece_bytes)
        while self._at < offset:
            self._decode(min(_STEP_BYTES, offset - self._at))

    def _enter(self, piece: int) -> None:
        self._at, self._piece = piece * self._index.piece_bytes, piece
        self._decoder = zstd.ZstdDecompressor()
        self._fed = int(self._begins[piece])

    def _decode(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        parts = []
        while length:
            end = min((self._piece + 1) * self._index.piece_bytes, self.size)
            part = self._decode_frame(min(length, end - self._at))
            parts.append(part)
            length -= len(part)
            self._at += len(part)
            if self._at == end:
                self._leave(end)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _decode_frame(self, length: int) -> bytes:
        parts, left = [], length
        while left:
            if self._decoder.eof:
                raise self._damaged("a frame is shorter than its piece of the disk")
            data = self._feed() if self._decoder.needs_input else b""
            part = self._decompress(data, left)
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def _leave(self, end: int) -> None:
        """At a frame's end, its checksum is still to come; then the next begins."""
        while not self._decoder.eof:
            if self._decompress(self._feed() if self._decoder.needs_input else b"", 1):
                raise self._damaged("a frame is longer than its piece of the disk")
        if self._decoder.unused_data or self._fed != self._begins[self._piece + 1]:
            raise self._damaged("there is more than one frame for a piece of the disk")
        if end < self.size:
            self._enter(self._piece + 1)

    def _feed(self) -> bytes:
        left = int(self._begins[self._piece + 1]) - self._fed
        if left <= 0:
            raise self._damaged("a frame is cut short")
        data = self._file.read(self._fed, min(_INPUT_BYTES, left))
        self._fed += len(data)
        return data

    def _decompress(self, data: bytes, most: int) -> bytes:
        try:
            return self._decoder.decompress(data, most)
        except zstd.ZstdError as error:
            raise self._damaged(f"a frame does not decompress ({error})") from error

    def _damaged(self, reason: str) -> SpoolDamaged:
        return SpoolDamaged(file=self._file.name, reason=f"{reason}, at byte {self._at} of it")
