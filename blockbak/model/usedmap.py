"""What a file system leaves unused, told by partclone's map of it, and what of that is believed.

A map is GNU ddrescue's "domain" file as ``partclone.<fs> -D`` writes it: comments, a line of state, then a row
of position, size and status for each range, ``+`` for used and ``?`` for unused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from blockbak.model import extent
from blockbak.model.extent import HOLE, Extents
from blockbak.units import GIB, KIB, MIB

HEAD_BYTES = MIB
"""Counts as used in any file system: boot loaders lie here, and no map knows of them."""
_BTRFS_MIRRORS = (64 * MIB, 256 * GIB)
"""kernel, fs/btrfs/disk-io.h, btrfs_sb_offset: where the superblock is repeated."""
_BTRFS_SUPER = 4 * KIB
_ROWS_MAX = 4_000_000
"""Rows of a map that is taken: more would cost more memory than the promise allows."""


class UnusableMap(ValueError):
    """A map that contradicts itself or the device; its text says why, as a clause."""


def unused(text: bytes, size: int) -> Extents:
    """The ranges of a file system's ``size`` bytes that its map calls unused, as HOLE extents.

    All that the map does not speak of counts as used, and so do the first ``HEAD_BYTES``. Raises UnusableMap.
    """
    starts: list[int] = []
    ends: list[int] = []
    end = 0
    for number, (position, length, status) in enumerate(_rows(text)):
        if number >= _ROWS_MAX:
            raise UnusableMap("the map has too many ranges")
        if position != end or length <= 0:
            raise UnusableMap(f"the map has a gap, or goes back, at byte {end}")
        if status not in (b"+", b"?"):
            raise UnusableMap(f"the map has an unknown status at byte {position}")
        end = position + length
        if end > size:
            raise UnusableMap(f"the map goes on to byte {end}, past the end of the device")
        if status == b"?":
            starts.append(position)
            ends.append(end)
    if not end:
        raise UnusableMap("the map is empty")
    return without(extent.coalesce(extent.table(starts, ends, HOLE)), [(0, HEAD_BYTES)])


def _rows(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    state = False
    at = 0
    while at < len(text):
        stop = text.find(b"\n", at)
        stop = len(text) if stop < 0 else stop
        line, at = text[at:stop], stop + 1
        if line.startswith(b"#") or not line.strip():
            continue
        words = line.split()
        if not state:
            state = True  # current position and its status: where a run of ddrescue would go on
            continue
        try:
            position, length, status = int(words[0], 0), int(words[1], 0), words[2]
        except (ValueError, IndexError) as error:
            raise UnusableMap("the map has a line that is none") from error
        if len(words) > 3:
            raise UnusableMap("the map has a line that is none")
        yield position, length, status


def without(holes: Extents, used: Sequence[tuple[int, int]]) -> Extents:
    """Unused ranges without those that are used all the same (starts and ends, in any order)."""
    for start, end in used:
        holes = extent.subtract(holes, extent.table([start], [end], HOLE))
    return holes


def with_copies(holes: Extents, copies: Sequence[tuple[int, int, int]]) -> Extents:
    """Unused ranges of a btrfs, for what it keeps twice and partclone maps once.

    ``copies`` are first byte, second byte and length of ranges that hold the same. What is used in one is used in
    the other; and the superblock's own copies are.
    """
    taken = [extent.table([place], [place + _BTRFS_SUPER], HOLE) for place in _BTRFS_MIRRORS]
    for first, second, length in copies:
        for here, there in ((first, second), (second, first)):
            inside = extent.clip(holes, here, here + length)
            used = extent.subtract(extent.table([here], [here + length], HOLE), inside)
            taken.append(
                extent.table(extent.starts_of(used) + (there - here), extent.ends_of(used) + (there - here), HOLE)
            )
    for place in taken[:2]:
        holes = extent.subtract(holes, place)
    others = np.concatenate([extent.empty(), *taken[2:]])
    return extent.subtract(holes, others[np.argsort(others["start"])])


def within(holes: Extents, start: int) -> Extents:
    """The same ranges, of a device on which the file system begins at byte ``start``."""
    moved = holes.copy()
    moved["start"] += np.uint64(start)
    return moved
