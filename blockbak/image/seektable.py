"""The seek table, generated from the index piece by piece: the writer writes what this yields, the
reader compares with it.

Zstandard seekable format 0.1.0: one entry (stored bytes, content bytes) per frame, in file order, and a
footer. Header, section records and closing record are entries of content size 0; padding counts into
the entry before it, so that an entry's stored size is the distance to the next entry's offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from blockbak.image.format import SEEK_ENTRIES_MAX, SEEK_ENTRY, FormatError, Frames, SeekTable


def generate(sections: Iterable[tuple[Frames, int]], closing_offset: int, closing_bytes: int) -> Iterator[SeekTable]:
    """Entries in file order. ``sections`` yields each section's frame records and its record's offset.

    The entry before a piece can only be known with the offset after it, so each array yielded ends one
    entry early. Raises FormatError where offsets do not ascend.
    """
    last_offset, last_content = 0, 0
    for frames, offset in sections:
        offsets = np.empty(len(frames) + 2, np.int64)
        offsets[0], offsets[1:-1], offsets[-1] = last_offset, frames["offset"], offset
        contents = np.empty(len(frames) + 1, np.int64)
        contents[0], contents[1:] = last_content, frames["content"]
        yield _entries(offsets, contents)
        last_offset, last_content = offset, 0
    yield _entries(np.array([last_offset, closing_offset]), np.array([last_content]))
    yield _entries(np.array([closing_offset, closing_offset + closing_bytes]), np.array([0]))


def _entries(offsets: np.ndarray[tuple[int], np.dtype[np.int64]], contents: object) -> SeekTable:
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
