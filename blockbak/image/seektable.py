"""The seek table, generated from the index piece by piece: the writer writes what this yields, the
reader compares with it.

Zstandard seekable format 0.1.0: one entry (stored bytes, content bytes) per frame, in file order, and a
footer. Header, section records and closing record are entries of content size 0; padding counts into
the entry before it, so that an entry's stored size is the distance to the next entry's offset.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from blockbak.image.format import SEEK_ENTRIES_MAX, SEEK_ENTRY, FormatError, Frames, SeekTable

_Numbers = npt.NDArray[np.int64]


class Generator:
    """Makes the entries in file order. The entry before a piece is only known with the offset after it, so
    what each call returns begins one entry back and ends one early.
    """

    def __init__(self) -> None:
        self._last_offset = 0

    def section(self, frames: Frames, offset: int) -> SeekTable:
        """The entries up to a section record at ``offset``, itself left out. Raises FormatError where
        offsets do not ascend.
        """
        offsets = np.empty(len(frames) + 2, np.int64)
        offsets[0], offsets[1:-1], offsets[-1] = self._last_offset, frames["offset"], offset
        contents = np.zeros(len(frames) + 1, np.int64)
        contents[1:] = frames["content"]
        self._last_offset = offset
        return _entries(offsets, contents)

    def closing(self, offset: int, length: int) -> SeekTable:
        """The last two entries: what lies before the closing record, and that record."""
        return _entries(np.array([self._last_offset, offset, offset + length]), np.zeros(2, np.int64))


def _entries(offsets: _Numbers, contents: _Numbers) -> SeekTable:
    stored = np.diff(offsets)
    if (stored <= 0).any() or (stored > 0xFFFFFFFF).any():
        raise FormatError("frames do not follow each other")
    entries = np.empty(len(stored), SEEK_ENTRY)
    entries["stored"], entries["content"] = stored, contents
    return entries


def entry_count(frames: int, sections: int) -> int:
    """Entries of an image: its frames, its sections, header and closing record."""
    count = frames + sections + 2
    if count > SEEK_ENTRIES_MAX:
        raise FormatError(f"{count} frames are more than a seek table may hold")
    return count
