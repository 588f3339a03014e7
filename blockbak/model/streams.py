"""The seam between image files and where they live: what a reader and a writer of images ask for.

``image`` reads and writes through these, ``repository`` hands out things that fit them; neither knows
the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | memoryview


class ByteSource(Protocol):
    """Random reads of one immutable file. Safe to use from several threads."""

    @property
    def name(self) -> str:
        """How messages call the file."""

    @property
    def size(self) -> int:
        """Bytes in the file."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. Raises UnreadableStore on EIO, DamagedImage past the end."""


class ByteSink(Protocol):
    """A file being written. ``write`` is safe from several threads for disjoint ranges."""

    @property
    def name(self) -> str:
        """How messages call the file."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from ``offset``. Raises NoSpace or StoreFailed."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes written before."""

    def clone_unit(self, source: ByteSource) -> int:
        """Bytes to which ranges must be aligned to share blocks with ``source``; 0 if they cannot."""

    def clone(self, source: ByteSource, source_offset: int, offset: int, length: int) -> bool:
        """Share ``length`` bytes of ``source`` at ``offset``; False where the file system will not."""

    def copy(self, source: ByteSource, source_offset: int, offset: int, length: int) -> None:
        """Copy ``length`` bytes of ``source`` to ``offset`` inside the kernel where it can."""
