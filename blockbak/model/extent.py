"""Range algebra over extents: numpy tables of half-open byte ranges, each with a kind.

An extent table is a structured array of ``EXTENT`` rows (``start``, ``length`` in bytes, ``kind``),
sorted by start, disjoint, with equal neighbours merged ("coalesced"). Every function here takes and
returns such tables; none loops over rows in Python.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

ABSENT = 0
"""Not claimed by this image at all: a delta says nothing about the range."""
DATA = 1
ZERO = 2
"""Reads as zeros."""
HOLE = 3
"""Content is not claimed: discarded or unused. Restored as zeros."""
BAD = 4
"""Could not be read from the source. Restored as zeros, and named."""

KIND_NAMES = {DATA: "data", ZERO: "zero", HOLE: "hole", BAD: "bad"}

EXTENT = np.dtype([("start", "<u8"), ("length", "<u8"), ("kind", "u1")])

Extents: TypeAlias = npt.NDArray[np.void]
Kinds: TypeAlias = npt.NDArray[np.uint8]
Offsets: TypeAlias = npt.NDArray[np.int64]


def empty() -> Extents:
    """A table without rows."""
    return np.empty(0, EXTENT)


def table(starts: Any, ends: Any, kinds: Any) -> Extents:
    """A table from columns (array-likes of equal length; ``kinds`` may be one number)."""
    starts = np.asarray(starts, np.int64)
    rows = np.empty(len(starts), EXTENT)
    rows["start"] = starts
    rows["length"] = np.asarray(ends, np.int64) - starts
    rows["kind"] = kinds
    return rows


def starts_of(extents: Extents) -> Offsets:
    """First bytes, int64."""
    return extents["start"].astype(np.int64)


def ends_of(extents: Extents) -> Offsets:
    """One past the last bytes, int64."""
    return (extents["start"] + extents["length"]).astype(np.int64)


def total(extents: Extents, kind: int | None = None) -> int:
    """Bytes covered, by one kind or by all."""
    rows = extents if kind is None else extents[extents["kind"] == kind]
    return int(rows["length"].sum())


def of_kind(extents: Extents, *kinds: int) -> Extents:
    """The rows of the given kinds."""
    column = extents["kind"]
    mask = column == kinds[0]
    for kind in kinds[1:]:
        mask |= column == kind
    return extents[mask]


def runs(values: npt.NDArray[Any]) -> tuple[Offsets, Offsets]:
    """Starts and ends (exclusive) of the maximal runs of equal neighbours in ``values``."""
    if not len(values):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    edges = np.flatnonzero(values[1:] != values[:-1]) + 1
    starts = np.concatenate(([0], edges)).astype(np.int64)
    return starts, np.append(starts[1:], len(values)).astype(np.int64)


def true_runs(mask: npt.NDArray[np.bool_]) -> tuple[Offsets, Offsets]:
    """Starts and ends (exclusive) of the runs of True.

    From the set positions and the jumps between them: on sparse masks several times faster than a
    difference over the whole mask.
    """
    where = np.flatnonzero(mask)
    if not len(where):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    if where[-1] - where[0] == len(where) - 1:
        return where[:1], where[-1:] + 1  # one run: the usual case
    jumps = np.flatnonzero(where[1:] != where[:-1] + 1)
    return where[np.concatenate(([0], jumps + 1))], where[np.concatenate((jumps, [len(where) - 1]))] + 1


def from_blocks(kinds: Kinds, first_byte: int, block_bytes: int, limit: int) -> Extents:
    """Extents of consecutive blocks: ``kinds`` uint8 per block, ABSENT left out.

    ``first_byte`` is the address of the first block, ``limit`` the volume's size: the last block may
    be short.
    """
    starts, ends = runs(kinds)
    kept = kinds[starts] != ABSENT if len(starts) else np.empty(0, bool)
    starts, ends = starts[kept], ends[kept]
    return table(
        first_byte + starts * block_bytes,
        np.minimum(first_byte + ends * block_bytes, limit),
        kinds[starts] if len(starts) else 0,
    )


def touched(extents: Extents, first_byte: int, block_bytes: int, blocks: int) -> npt.NDArray[np.bool_]:
    """Which of ``blocks`` blocks from ``first_byte`` hold at least one byte of ``extents``."""
    if not len(extents):
        return np.zeros(blocks, bool)
    begin = (starts_of(extents) - first_byte) // block_bytes
    end = -(-(ends_of(extents) - first_byte) // block_bytes)
    begin = np.minimum(np.maximum(begin, 0), blocks)
    end = np.minimum(np.maximum(end, 0), blocks)
    depth = np.zeros(blocks + 1, np.int64)
    np.add.at(depth, begin, 1)
    np.add.at(depth, end, -1)
    covered: npt.NDArray[np.bool_] = np.cumsum(depth[:-1]) > 0
    return covered


def to_blocks(extents: Extents, first_byte: int, block_bytes: int, blocks: int) -> Kinds:
    """The kind of each block, ABSENT where no extent lies.

    A block with several kinds counts as the one that asks for most care: DATA (it has stored bytes)
    over BAD over HOLE over ZERO.
    """
    if len(extents) == 1:
        start, length, kind = extents[0].tolist()
        if start <= first_byte and start + length >= first_byte + blocks * block_bytes:
            return np.full(blocks, kind, np.uint8)
    kinds = np.zeros(blocks, np.uint8)
    for kind in (ZERO, HOLE, BAD, DATA):
        rows = of_kind(extents, kind)
        if len(rows):
            kinds[touched(rows, first_byte, block_bytes, blocks)] = kind
    return kinds


def coalesce(extents: Extents) -> Extents:
    """Merge touching neighbours of equal kind. The rows must be sorted and disjoint."""
    if len(extents) < 2:
        return extents
    joined = (ends_of(extents)[:-1] == starts_of(extents)[1:]) & (extents["kind"][:-1] == extents["kind"][1:])
    first = np.concatenate(([True], ~joined))
    last = np.append(~joined, True)
    return table(starts_of(extents)[first], ends_of(extents)[last], extents["kind"][first])


def clip(extents: Extents, start: int, end: int) -> Extents:
    """The part inside ``[start, end)``."""
    begin = np.maximum(starts_of(extents), start)
    finish = np.minimum(ends_of(extents), end)
    kept = begin < finish
    return table(begin[kept], finish[kept], extents["kind"][kept])


def align_out(extents: Extents, unit: int, limit: int) -> Extents:
    """Widen every extent to multiples of ``unit`` (not past ``limit``), then unite.

    The kinds must be equal; meant for ranges that say "something in here changed".
    """
    if not len(extents):
        return extents
    begin = starts_of(extents) // unit * unit
    finish = np.minimum(-(-ends_of(extents) // unit) * unit, limit)
    finish = np.maximum.accumulate(finish)
    first = np.concatenate(([True], begin[1:] > finish[:-1]))
    last = np.append(first[1:], True)
    return table(begin[first], finish[last], extents["kind"][first])


def _kind_at(extents: Extents, points: Offsets) -> Kinds:
    """The kind that holds at each of ``points`` (bytes), ABSENT outside."""
    kinds = np.zeros(len(points), np.uint8)
    if not len(extents):
        return kinds
    at = np.searchsorted(starts_of(extents), points, side="right") - 1
    inside = (at >= 0) & (points < ends_of(extents)[at])
    kinds[inside] = extents["kind"][at[inside]]
    return kinds


def _edges(*tables: Extents) -> Offsets:
    bounds = [np.concatenate((starts_of(rows), ends_of(rows))) for rows in tables]
    edges: Offsets = np.unique(np.concatenate(bounds))
    return edges


def _painted(edges: Offsets, kinds: Kinds) -> Extents:
    kept = kinds != ABSENT
    return coalesce(table(edges[:-1][kept], edges[1:][kept], kinds[kept]))


def overlay(below: Extents, above: Extents) -> Extents:
    """``above`` where it says anything, ``below`` elsewhere: the newest wins."""
    if not len(above):
        return below
    if not len(below):
        return above
    edges = _edges(below, above)
    upper, lower = _kind_at(above, edges[:-1]), _kind_at(below, edges[:-1])
    return _painted(edges, np.where(upper != ABSENT, upper, lower))


def subtract(extents: Extents, taken: Extents) -> Extents:
    """``extents`` without the ranges of ``taken``, whatever its kinds."""
    if not len(extents) or not len(taken):
        return extents
    edges = _edges(extents, taken)
    kept, gone = _kind_at(extents, edges[:-1]), _kind_at(taken, edges[:-1])
    return _painted(edges, np.where(gone != ABSENT, np.uint8(ABSENT), kept))


def _lone_flaw(first: int, length: int, kind: int, start: int, end: int, *, tiling: bool) -> str | None:
    """The same for the only row of a table."""
    if not DATA <= kind <= BAD:
        return "an extent of unknown kind"
    if first >= end or length > end:
        return "an extent outside its range"
    if not length:
        return "an empty extent"
    if first < start or first + length > end:
        return "extents out of order or outside their range"
    if tiling and (first, first + length) != (start, end):
        return "extents do not cover the range"
    return None


def flaw(extents: Extents, start: int, end: int, *, tiling: bool) -> str | None:
    """What is wrong with a table that claims to cover a part of ``[start, end)``, or None.

    Checks known kinds, no empty rows, sorted, disjoint, coalesced, inside the range; with ``tiling``
    also that every byte is covered.
    """
    if not len(extents):
        return "extents do not cover the range" if tiling and end > start else None
    if len(extents) == 1:
        first_byte, length, kind = extents[0].tolist()
        return _lone_flaw(first_byte, length, kind, start, end, tiling=tiling)
    if (extents["kind"] < DATA).any() or (extents["kind"] > BAD).any():
        return "an extent of unknown kind"
    if (extents["start"] >= np.uint64(end)).any() or (extents["length"] > np.uint64(end)).any():
        return "an extent outside its range"
    first, last = starts_of(extents), ends_of(extents)
    if (last <= first).any():
        return "an empty extent"
    if first[0] < start or last[-1] > end or (first[1:] < last[:-1]).any():
        return "extents out of order or outside their range"
    if len(coalesce(extents)) != len(extents):
        return "extents are not coalesced"
    if tiling and (first[0] != start or last[-1] != end or (first[1:] != last[:-1]).any()):
        return "extents do not cover the range"
    return None
