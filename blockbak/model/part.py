"""The part of a volume that is brought back: all of it, or one partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockbak.model import extent
from blockbak.model.extent import DATA, Extents


@dataclass(frozen=True, slots=True)
class Part:
    """``length`` bytes of a volume from byte ``start`` on, neither of which need be a multiple of anything.
    ``partition`` is its number in the volume's table, 0 for the whole volume.
    """

    start: int
    length: int
    partition: int = 0

    @property
    def end(self) -> int:
        """The first byte of the volume after it."""
        return self.start + self.length

    def within(self, start: int, end: int) -> tuple[int, int]:
        """What of the volume's bytes ``[start, end)`` belongs to it; an empty range where nothing does."""
        low = min(max(start, self.start), self.end)
        return low, max(low, min(end, self.end))

    def own(self, extents: Extents) -> Extents:
        """Extents of the volume as those of the part, counted from its own first byte."""
        kept = extent.clip(extents, self.start, self.end)
        kept["start"] -= np.uint64(self.start)
        return kept

    def blocks(self, first_byte: int, block_bytes: int, blocks: int) -> npt.NDArray[np.bool_]:
        """Which of ``blocks`` blocks from ``first_byte`` on hold at least one byte of it."""
        return extent.touched(extent.table([self.start], [self.end], DATA), first_byte, block_bytes, blocks)

    def cut(self, block_bytes: int, device_bytes: int) -> list[int]:
        """The first bytes of the blocks of which only a piece belongs to it: none, its first, its last, or both."""
        edges = {edge // block_bytes * block_bytes for edge in (self.start, self.end) if edge % block_bytes}
        return sorted(at for at in edges if self.start > at or self.end < min(at + block_bytes, device_bytes))
