"""The hash map of bytes that are not in an image: section digests, and nothing else of it held in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from blockbak.flow import workers
from blockbak.flow.context import Context
from blockbak.flow.scan import Job
from blockbak.host.blockio import PIECE_BYTES, Bytes, aligned
from blockbak.model import extent, hashmap
from blockbak.model.extent import Extents
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Rows

Read = Callable[[int, Bytes, int], None]
"""``read(offset, into, length)``: fills the start of ``into``, or raises."""


@dataclass(slots=True)
class _Filling:
    """A section of which not all pieces came yet."""

    rows: Rows
    missing: int
    zero: bool = True
    bad: list[Extents] = field(default_factory=list)


class MapSum:
    """Takes the rows of all pieces of a volume, in any order, from several threads; only sections that are being
    filled are in memory. ``complete`` is told the number of each section as soon as its digest is known.
    """

    def __init__(self, geometry: Geometry, complete: Callable[[int], None] = lambda _: None) -> None:
        self.geometry = geometry
        self.digests: npt.NDArray[np.uint8] = np.zeros((geometry.sections, hashmap.DIGEST_BYTES), np.uint8)
        self.data_bytes = 0
        self._complete = complete
        self._bad: list[Extents] = []
        self._filling: dict[int, _Filling] = {}
        self._guard = threading.Lock()

    def add(self, first_block: int, rows: Rows, nonzero: hashmap.Mask, bad: Extents) -> None:
        """Rows of consecutive blocks of one section, which of them are not zeros, and the ``bad`` extents in them."""
        number = first_block // BLOCKS_PER_SECTION
        low = first_block - number * BLOCKS_PER_SECTION
        with self._guard:
            section = self._filling.get(number)
            if section is None:
                blocks = self.geometry.section_blocks(number)
                section = self._filling[number] = _Filling(hashmap.empty_rows(blocks), blocks)
            section.rows[low : low + len(rows)] = rows
            section.missing -= len(rows)
            section.zero &= not nonzero.any()
            self.data_bytes += int(np.count_nonzero(nonzero)) * self.geometry.block_bytes
            if len(bad):
                section.bad.append(bad)
            if section.missing:
                return
            del self._filling[number]
        self._close(number, section)
        self._complete(number)

    def _close(self, number: int, section: _Filling) -> None:
        if section.zero and not section.bad:
            digest = self.geometry.zero_section_digest(number)
        else:
            bad = _united(section.bad)
            digest = hashmap.section_digest(section.rows, bad)
            with self._guard:
                self._bad.append(bad)
        self.digests[number] = np.frombuffer(digest, np.uint8)

    def cut(self, size: int) -> MapSum:
        """The map of the ``size`` bytes of which the rows came, where the end was not known before."""
        old = self.geometry
        made = MapSum(Geometry(size, old.block_bytes, old.window_bytes))
        whole = size // old.section_bytes
        made.digests[:whole] = self.digests[:whole]
        made.data_bytes, made._bad = self.data_bytes, self._bad
        if (section := self._filling.get(whole)) is not None:
            made._close(whole, replace(section, rows=section.rows[: made.geometry.section_blocks(whole)]))
        elif whole < made.geometry.sections:
            made.digests[whole] = self.digests[whole]
        return made

    @property
    def bad(self) -> Extents:
        """All that was bad."""
        return _united(self._bad)

    @property
    def root(self) -> str:
        """The map's root, once all pieces are in."""
        return hashmap.root(self.geometry.device_bytes, self.geometry.block_bytes, self.digests)

    def differing(self, expected: npt.NDArray[np.uint8]) -> list[tuple[int, int]]:
        """Ranges (start, end) of sections whose digest is not the expected one; neighbours are one range."""
        return ranges(self.geometry, (self.digests != expected).any(axis=1))


def ranges(geometry: Geometry, sections: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The ranges (start, end) of the sections that are set."""
    starts, ends = extent.true_runs(sections)
    return [
        (start * geometry.section_bytes, min(end * geometry.section_bytes, geometry.device_bytes))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def told(found: Iterable[tuple[int, int]]) -> str:
    """Ranges for people."""
    return ", ".join(f"{start} to {end}" for start, end in found)


def _united(tables: list[Extents]) -> Extents:
    if not tables:
        return extent.empty()
    rows = np.concatenate(tables)
    return extent.coalesce(rows[np.argsort(rows["start"], kind="stable")])


def survey(known: MapSum, jobs: Iterable[Job], read: Read, bad: Extents, context: Context) -> int:
    """Read the pieces of ``jobs`` into a map; bytes that were read. ``bad`` is what the map says could not be read
    once. Raises what ``read`` raises, and Interrupted.
    """
    geometry = known.geometry
    guard = threading.Lock()
    total = 0

    def make() -> Callable[[Job], None]:
        buffer = aligned(PIECE_BYTES)

        def take(job: Job) -> None:
            nonlocal total
            start = job.first_block * geometry.block_bytes
            length = min(job.blocks * geometry.block_bytes, geometry.device_bytes - start)
            if job.zero:
                section = job.first_block // BLOCKS_PER_SECTION
                low = job.first_block - section * BLOCKS_PER_SECTION
                rows = geometry.zero_rows(section)[low : low + job.blocks]
                nonzero = np.zeros(job.blocks, bool)
            else:
                read(start, buffer, length)
                nonzero = hashmap.nonzero_blocks(buffer[:length], geometry.block_bytes)
                rows = hashmap.digest_blocks(buffer[:length], geometry.block_bytes, nonzero)
                with guard:
                    total += length
            known.add(job.first_block, rows, nonzero, extent.clip(bad, start, start + length))
            context.progress.advance(length)

        return take

    workers.run(jobs, make, workers=context.workers, check=context.check)
    return total


def all_jobs(geometry: Geometry, touched: npt.NDArray[np.bool_] | None = None) -> Iterable[Job]:
    """Pieces of everything; those that are not ``touched`` (bool per ``PIECE_BYTES``) are holes."""
    step = PIECE_BYTES // geometry.block_bytes
    number = 0
    for section in range(geometry.sections):
        blocks, first = geometry.section_blocks(section), section * BLOCKS_PER_SECTION
        for low in range(0, blocks, step):
            hole = touched is not None and not (number < len(touched) and touched[number])
            yield Job(number, first + low, min(step, blocks - low), zero=hole)
            number += 1
