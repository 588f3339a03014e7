"""The hash map: one BLAKE3 digest per block, in numpy; what changed between two; its root.

Digest rows are ``(n, 4)`` arrays of little-endian uint64, 32 bytes a row: comparing words is several
times faster than comparing bytes. A *section* is ``BLOCKS_PER_SECTION`` consecutive blocks; the root
is a digest over the section digests, so that a small change recomputes little.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from blockbak.model.extent import BAD, Extents, of_kind

DIGEST_BYTES = 32
DIGEST_WORDS = 4
BLOCKS_PER_SECTION = 4096

Rows: TypeAlias = npt.NDArray[np.uint64]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]

_ROOT_CONTEXT = b"blockbak root 1"


def empty_rows(count: int) -> Rows:
    """``count`` rows of all-zero words: not the digest of anything."""
    return np.zeros((count, DIGEST_WORDS), "<u8")


def digest(data: Bytes | bytes | memoryview) -> bytes:
    """32 bytes of BLAKE3."""
    return blake3(data).digest()


@lru_cache(maxsize=64)
def _zero_digest(length: int) -> bytes:
    return blake3(bytes(length)).digest()


def zero_row(length: int) -> Rows:
    """The row (shape ``(4,)``) of a block of ``length`` zero bytes."""
    return np.frombuffer(_zero_digest(length), "<u8")


def nonzero_blocks(data: Bytes, block_bytes: int) -> Mask:
    """Which blocks of ``data`` (uint8, page-aligned start) hold a byte that is not zero.

    The last block may be short. Whole blocks are tested by or-ing uint64 words at memory speed; every
    bit of every byte takes part.
    """
    whole = len(data) // block_bytes
    mask = np.empty(-(-len(data) // block_bytes), bool)
    words = data[: whole * block_bytes].view(np.uint64).reshape(whole, block_bytes // 8)
    mask[:whole] = np.bitwise_or.reduce(words, axis=1) != 0
    if whole < len(mask):
        mask[whole] = data[whole * block_bytes :].any()
    return mask


def unequal_blocks(one: Bytes, other: Bytes, block_bytes: int) -> Mask:
    """Which blocks of two equally long pieces (uint8, page-aligned starts) differ in any byte."""
    whole = len(one) // block_bytes
    mask = np.empty(-(-len(one) // block_bytes), bool)
    end = whole * block_bytes
    unequal = np.not_equal(one[:end].view(np.uint64), other[:end].view(np.uint64))
    # Eight bools are read as one word: a block of 4 KiB has 64 of them.
    mask[:whole] = np.bitwise_or.reduce(unequal.view(np.uint64).reshape(whole, block_bytes // 64), axis=1) != 0
    if whole < len(mask):
        mask[whole] = (one[end:] != other[end:]).any()
    return mask


def digest_blocks(data: Bytes, block_bytes: int, wanted: Mask) -> Rows:
    """Rows of all blocks of ``data``: hashed where ``wanted``, the zero row elsewhere.

    ``data`` uint8, ``wanted`` (n,) bool with an entry per block, the last perhaps short; the rows are (n, 4)
    uint64. The hash calls release the GIL.
    """
    rows = np.empty((len(wanted), DIGEST_WORDS), "<u8")
    rows[:] = zero_row(block_bytes)
    tail = len(data) - (len(wanted) - 1) * block_bytes
    if len(wanted) and tail != block_bytes:
        rows[-1] = zero_row(tail)
    which = np.flatnonzero(wanted)
    if len(which):
        view = memoryview(data)
        digests = [blake3(view[start : start + block_bytes]).digest() for start in (which * block_bytes).tolist()]
        rows[which] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, DIGEST_WORDS)
    return rows


def changed_rows(new: Rows, old: Rows) -> Mask:
    """Which of two tables' rows, both ``(n, 4)`` uint64, differ: ``(n,)`` bool.

    The four bools of a row are read as one uint32 word, five times faster than ``any(axis=1)``.
    """
    unequal = np.not_equal(new, old)
    mask: Mask = unequal.view(np.uint32)[:, 0] != 0
    return mask


def section_digest(rows: Rows, extents: Extents) -> bytes:
    """The digest of one section of the map, 32 bytes.

    Over the rows of all its blocks, then the ``(start, length)`` of its BAD extents: a point that could
    not read a range never has the root of one that read zeros there.
    """
    hasher = blake3(memoryview(np.ascontiguousarray(rows)).cast("B"))
    bad = of_kind(extents, BAD)
    if len(bad):
        pairs = np.stack((bad["start"], bad["length"]), axis=1).astype("<u8")
        hasher.update(pairs.tobytes())
    return hasher.digest()


@lru_cache(maxsize=8)
def zero_section_rows(blocks: int, block_bytes: int, last_bytes: int) -> Rows:
    """The rows of ``blocks`` zero blocks, the last of ``last_bytes``; read-only, because it is shared."""
    rows = np.empty((blocks, DIGEST_WORDS), "<u8")
    rows[:] = zero_row(block_bytes)
    rows[-1] = zero_row(last_bytes)
    rows.flags.writeable = False
    return rows


@lru_cache(maxsize=8)
def zero_section_digest(blocks: int, block_bytes: int, last_bytes: int) -> bytes:
    """The section digest of ``blocks`` zero blocks, the last of ``last_bytes``."""
    return blake3(memoryview(zero_section_rows(blocks, block_bytes, last_bytes)).cast("B")).digest()


def root(device_bytes: int, block_bytes: int, section_digests: npt.NDArray[np.uint8]) -> str:
    """The root of a map, hex: over its geometry and the section digests, ``(n, 32)`` uint8.

    The geometry is part of it, so that a map is never used with another volume size or block size.
    """
    hasher = blake3(_ROOT_CONTEXT)
    hasher.update(device_bytes.to_bytes(8, "little") + block_bytes.to_bytes(4, "little"))
    hasher.update(np.ascontiguousarray(section_digests).tobytes())
    return hasher.hexdigest()


class Geometry:
    """How a volume divides into blocks, windows and sections. All sizes in bytes.

    ``window_bytes`` is a multiple of ``block_bytes``, a section a multiple of ``window_bytes``; only
    the last of each may be short.
    """

    __slots__ = ("block_bytes", "blocks", "device_bytes", "section_bytes", "sections", "window_bytes")

    def __init__(self, device_bytes: int, block_bytes: int, window_bytes: int) -> None:
        self.device_bytes = device_bytes
        self.block_bytes = block_bytes
        self.window_bytes = window_bytes
        self.section_bytes = block_bytes * BLOCKS_PER_SECTION
        self.blocks = -(-device_bytes // block_bytes)
        self.sections = -(-device_bytes // self.section_bytes)

    def section_range(self, number: int) -> tuple[int, int]:
        """First byte of a section and one past its last."""
        start = number * self.section_bytes
        return start, min(start + self.section_bytes, self.device_bytes)

    def section_blocks(self, number: int) -> int:
        """How many blocks the section has: all but the last have ``BLOCKS_PER_SECTION``."""
        return min(BLOCKS_PER_SECTION, self.blocks - number * BLOCKS_PER_SECTION)

    def block_length(self, block: int) -> int:
        """Bytes of one block, by its number in the volume."""
        return min(self.block_bytes, self.device_bytes - block * self.block_bytes)

    def zero_rows(self, number: int) -> Rows:
        """The rows of a section whose blocks are all zero; read-only."""
        return zero_section_rows(*self._zeros(number))

    def zero_section_digest(self, number: int) -> bytes:
        """The digest of a section whose blocks are all zero."""
        return zero_section_digest(*self._zeros(number))

    def _zeros(self, number: int) -> tuple[int, int, int]:
        blocks = self.section_blocks(number)
        return blocks, self.block_bytes, self.block_length(number * BLOCKS_PER_SECTION + blocks - 1)
