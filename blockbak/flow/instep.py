"""A target that is brought in step with a source: what differs is written, zeros are zeroed, all of it is proven."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blockbak.errors import NotReadBack, TargetFailed
from blockbak.flow import workers
from blockbak.flow.context import Context, never
from blockbak.flow.rawmap import MapSum, told
from blockbak.host.blockio import PIECE_BYTES, Bytes, SourceReader, aligned
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, Extents
from blockbak.model.hashmap import Geometry, Mask, Rows
from blockbak.units import KIB

_ZERO_RUN = 256 * KIB
"""On a device, shorter runs of zeros are written: a request to zero them costs more than their bytes."""


class Target(Protocol):
    """What is brought in step. Raises what a ``TargetWriter`` does."""

    path: str
    is_block: bool

    def next_data(self, offset: int) -> int:
        """The first byte from ``offset`` on that is not in a hole."""

    def read(self, offset: int, into: Bytes, length: int) -> None:
        """Read ``length`` bytes past the page cache."""

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data``."""

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros."""

    def flush(self) -> None:
        """Make all of it durable."""


class Untouched:
    """A target that is only compared with, ``size`` bytes of it; None for one that is not there yet, which is all
    holes.
    """

    def __init__(self, path: str, reader: SourceReader | None, size: int) -> None:
        self.path, self._reader, self._size = path, reader, size
        self.is_block = reader is not None and reader.is_block

    def next_data(self, offset: int) -> int:
        """What it is made longer by reads as zeros."""
        if self._reader is None or offset >= self._reader.size:
            return self._size
        return self._reader.next_data(offset)

    def read(self, offset: int, into: Bytes, length: int) -> None:
        """Read it. Raises TargetFailed for what cannot be read."""
        if self._reader is None:
            into[:length] = 0
            return
        there = max(min(length, self._reader.size - offset), 0)
        if there and len(self._reader.read(offset, into, there)):
            raise TargetFailed(action=f"Reading byte {offset} of", path=self.path, reason="some of it cannot be read")
        into[there:length] = 0

    def write(self, offset: int, data: Bytes) -> None:
        """What is only compared with is never written: whoever asks has lost track of a dry run."""
        raise AssertionError(f"{len(data)} bytes at {offset} of {self.path}")

    def zero(self, offset: int, length: int) -> None:
        """What is only compared with is never written: whoever asks has lost track of a dry run."""
        raise AssertionError(f"{length} zeros at {offset} of {self.path}")

    def flush(self) -> None:
        """Nothing was written."""


def mark_of(rows: Rows) -> np.uint64:
    """Eight bytes that stand for the rows of a piece. They notice a disk that gives back something else; that both
    ends hold the same is for the root to say.
    """
    return np.uint64(np.frombuffer(hashmap.digest(np.ascontiguousarray(rows).tobytes())[:8], "<u8")[0])


class InStep:
    """What the target holds, and holds by now. Safe from several threads, each in other pieces (``PIECE_BYTES``, from
    a multiple of it). ``permit`` is asked before each write, and may raise.

    ``resized`` says that the target got another size when it was opened. ``known`` is the map of what it holds once all
    was brought. For the reading back eight bytes are kept of each piece that is written: 64 MiB for 16 TiB.
    """

    def __init__(
        self, target: Target, geometry: Geometry, permit: Callable[[], None] = never, *, resized: bool = False
    ) -> None:
        self.target, self.geometry, self._permit = target, geometry, permit
        self.resized = resized
        self.known = MapSum(geometry)
        pieces = -(-geometry.device_bytes // PIECE_BYTES)
        self._marks: npt.NDArray[np.uint64] = np.zeros(pieces, np.uint64)
        self.touched: npt.NDArray[np.bool_] = np.zeros(pieces, bool)
        self._zeros = aligned(PIECE_BYTES)
        self.read_bytes = self.written_bytes = self.zeroed_bytes = self.differing_bytes = 0
        self._guard = threading.Lock()

    def is_hole(self, start: int, length: int) -> bool:
        """Whether nothing of a range is stored, so that it reads as zeros without being read."""
        return self.target.next_data(start) >= start + length

    def held(self, start: int, into: Bytes, length: int) -> bool:
        """Read what the target holds; False where it cannot be read: a disk gives such a sector another place when it
        is written.
        """
        try:
            self.target.read(start, into, length)
        except TargetFailed:
            return False
        with self._guard:
            self.read_bytes += length
        return True

    def bring(self, start: int, rows: Rows, data: Mask, zero: Mask, content: Bytes, *, packed: bool = False) -> None:
        """Write the blocks of a piece that are in ``data`` and make those in ``zero`` zeros; ``rows`` are all its
        rows as they will be. ``content`` (page-aligned) is the whole piece, or where it is ``packed`` the blocks of
        ``data`` alone, one after the other. Raises TargetFailed, TargetFull, and what ``permit`` raises.
        """
        block, end = self.geometry.block_bytes, self.geometry.device_bytes
        self._permit()
        with self._guard:
            # Before the first byte: a piece that is written in part must be known as one.
            self.touched[start // PIECE_BYTES] = True
        written = zeroed = 0
        for low, high in _runs(data):
            first = written if packed else low * block
            run = content[first : first + min(start + high * block, end) - start - low * block]
            self.target.write(start + low * block, run)
            written += len(run)
        for low, high in _runs(zero):
            length = min(start + high * block, end) - start - low * block
            if self.target.is_block and length < _ZERO_RUN:
                self.target.write(start + low * block, self._zeros[:length])
            else:
                self.target.zero(start + low * block, length)
            zeroed += length
        with self._guard:
            self._marks[start // PIECE_BYTES] = mark_of(rows)
            self.written_bytes += written
            self.zeroed_bytes += zeroed

    def differs(self, length: int) -> None:
        """Note bytes that were not equal."""
        with self._guard:
            self.differing_bytes += length

    def prove(self, context: Context) -> int:
        """Read back past the page cache all pieces that were written, once they are durable; bytes that were read.
        Raises TargetFailed, NotReadBack, Interrupted.
        """
        geometry, bad, wrong, total = self.geometry, self.known.bad, list[int](), 0
        pieces = np.flatnonzero(self.touched).tolist()

        def make() -> Callable[[int], None]:
            buffer = aligned(PIECE_BYTES)

            def compare(number: int) -> None:
                nonlocal total
                start = number * PIECE_BYTES
                length = min(PIECE_BYTES, geometry.device_bytes - start)
                self.target.read(start, buffer, length)
                rows = read_rows(buffer[:length], start, geometry, bad)[0]
                with self._guard:
                    total += length
                    if mark_of(rows) != self._marks[number]:
                        wrong.append(number)
                context.progress.advance(length)

            return compare

        context.progress.begin("reading back", len(pieces) * PIECE_BYTES)
        try:
            workers.run(pieces, make, workers=context.workers, check=context.check)
        finally:
            context.progress.end()
        if wrong:
            ranges = [(at * PIECE_BYTES, min((at + 1) * PIECE_BYTES, geometry.device_bytes)) for at in sorted(wrong)]
            raise NotReadBack(path=self.target.path, ranges=told(ranges))
        return total


def length_of(start: int, mask: Mask, geometry: Geometry) -> int:
    """Bytes of the blocks of a piece, from byte ``start`` on, that are set."""
    total = int(np.count_nonzero(mask)) * geometry.block_bytes
    if len(mask) and mask[-1]:
        total -= geometry.block_bytes - geometry.block_length(start // geometry.block_bytes + len(mask) - 1)
    return total


def blocks_of(left: Mask, start: int, geometry: Geometry) -> Extents:
    """The blocks from byte ``start`` on that are set, as BAD extents: what nothing is known of."""
    kinds = np.where(left, np.uint8(BAD), np.uint8(ABSENT))
    return extent.from_blocks(kinds, start, geometry.block_bytes, geometry.device_bytes)


def without(rows: Rows, left: Mask, first_block: int, geometry: Geometry) -> Rows:
    """The rows of consecutive blocks, those that are ``left`` as they are replaced by zeros' rows: nothing is known
    of them, and the map says so by its BAD extents.
    """
    if not left.any():
        return rows
    made = rows.copy()
    made[left] = hashmap.zero_row(geometry.block_bytes)
    if left[-1]:
        made[-1] = hashmap.zero_row(geometry.block_length(first_block + len(rows) - 1))
    return made


def read_rows(data: Bytes, start: int, geometry: Geometry, bad: Extents) -> tuple[Rows, Mask]:
    """The rows of a piece that begins at byte ``start``, and which of its blocks are not zeros. Blocks that ``bad``
    touches count as zeros: nothing is known of them.
    """
    block = geometry.block_bytes
    nonzero = hashmap.nonzero_blocks(data, block)
    if len(bad):
        nonzero &= ~extent.touched(bad, start, block, len(nonzero))
    return hashmap.digest_blocks(data, block, nonzero), nonzero


def _runs(mask: Mask) -> Iterator[tuple[int, int]]:
    starts, ends = extent.true_runs(mask)
    return zip(starts.tolist(), ends.tolist(), strict=True)
