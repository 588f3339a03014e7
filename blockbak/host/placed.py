"""A target that holds a part of a volume, spoken to in the volume's addresses."""

from __future__ import annotations

from blockbak.host.blockio import PAGE, Bytes, TargetWriter, aligned
from blockbak.model.part import Part
from blockbak.units import align_down


class PlacedTarget:
    """Writes what belongs to ``part`` to where it lies on the target, and reads it from there; of the rest of the
    volume nothing is touched. Raises what the ``TargetWriter`` does.
    """

    def __init__(self, target: TargetWriter, part: Part) -> None:
        self.target, self.part = target, part
        self.path, self.is_block = target.path, target.is_block

    @property
    def end(self) -> int:
        """The first byte of the volume for which the target has no place."""
        return self.part.start + self.target.size

    def flush(self) -> None:
        """Make everything written durable, then let the page cache forget the target."""
        self.target.flush()

    def write(self, offset: int, data: Bytes) -> int:
        """Write what of ``data``, the volume's content from ``offset`` on, belongs to the part; its bytes."""
        low, high = self.part.within(offset, offset + len(data))
        if low < high:
            inner = data[low - offset : high - offset]
            if inner.ctypes.data % PAGE:
                inner = _copied(inner)
            self.target.write(low - self.part.start, inner)
        return high - low

    def zero(self, offset: int, length: int) -> int:
        """Make what of a range of the volume belongs to the part read as zeros; its bytes."""
        low, high = self.part.within(offset, offset + length)
        if low < high:
            self.target.zero(low - self.part.start, high - low)
        return high - low

    def read(self, offset: int, into: Bytes, length: int) -> None:
        """Read what of ``length`` bytes of the volume from ``offset`` on belongs to the part to its place in ``into``,
        page-aligned memory; of the rest nothing is promised.
        """
        low, high = self.part.within(offset, offset + length)
        if low == high:
            return
        start = low - self.part.start
        if low == offset and start % PAGE == 0:
            self.target.read(start, into, high - low)
            return
        # A partition may begin anywhere: what the kernel takes past the page cache are whole pages.
        first = align_down(start, PAGE)
        around = aligned(high - self.part.start - first)
        self.target.read(first, around, high - self.part.start - first)
        into[low - offset : high - offset] = around[start - first :][: high - low]


def _copied(data: Bytes) -> Bytes:
    """The same bytes in memory that O_DIRECT accepts."""
    made = aligned(len(data))[: len(data)]
    made[:] = data
    return made
