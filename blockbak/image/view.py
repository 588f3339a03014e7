"""A restore point seen through its images: the newest image that says anything about a block wins.

Layers are ordered oldest first. Where the first is a full, the view is complete; without one it shows
what a chain of deltas says together. Everything is done a section at a time, so the memory used does
not depend on the volume's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from blockbak.errors import Damage, DamagedImage
from blockbak.image import codec
from blockbak.image import format as fmt
from blockbak.image.reader import ImageReader, Section
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, DATA, Extents, Kinds
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Rows

_READ_GAP = 64 * 1024
"""Bytes between wanted frames that are cheaper to read than to skip."""


@dataclass(frozen=True)
class Flaw:
    """A range of the volume (bytes) whose stored bytes are not good, and why."""

    start: int
    length: int
    reason: str
    file: str

    def __str__(self) -> str:
        return f"{self.reason}, at bytes {self.start} to {self.start + self.length}"


@dataclass(frozen=True)
class Summary:
    """What a walk over all sections saw: bytes of stored blocks, and the BAD extents (volume bytes)."""

    stored_bytes: int
    bad: Extents


@dataclass(frozen=True)
class SectionView:
    """One section of the point. ``kinds`` uint8 per block, ``owner`` int16 per block: the layer that
    holds it (-1: none), ``rows`` the map rows of all blocks, ``extents`` in volume bytes,
    ``layers`` the layers' own sections (None where a layer says nothing).
    """

    number: int
    kinds: Kinds
    owner: npt.NDArray[np.int16]
    rows: Rows
    extents: Extents
    layers: Sequence[Section | None]

    @cached_property
    def stored(self) -> npt.NDArray[np.bool_]:
        """The blocks whose content lies in a frame."""
        return self.kinds == DATA


class PointView:
    """The layers of one point, oldest first."""

    def __init__(self, layers: Sequence[ImageReader]) -> None:
        self.layers = layers
        self.geometry = layers[-1].geometry
        self.complete = layers[0].whole

    @property
    def top(self) -> ImageReader:
        """The newest layer: the image of the point itself."""
        return self.layers[-1]

    def check_binding(self) -> None:
        """Every delta names the point and root of the layer below it. Raises DamagedImage."""
        for lower, upper in zip(self.layers, self.layers[1:], strict=False):
            above, below = upper.opening, lower.opening
            same = (above.device_bytes, above.block_bytes, above.window_bytes) == (
                below.device_bytes,
                below.block_bytes,
                below.window_bytes,
            )
            if not same or above.parent != below.point or above.parent_root != lower.closing.root:
                raise DamagedImage(file=upper.name, reason=f"it does not stand on {lower.name}")

    def claimed_digests(self) -> npt.NDArray[np.uint8]:
        """The point's section digests as the layers state them, ``(sections, 32)`` uint8."""
        digests = np.zeros((self.geometry.sections, 32), np.uint8)
        for layer in self.layers:
            digests[layer.sections["number"].astype(np.int64)] = layer.map_digests()
        return digests

    def section(self, number: int, top: Section | None = None, *, above: int = 0) -> SectionView:
        """One section, composed; ``top`` is the newest layer's own, where it is at hand already. The first ``above``
        layers are left out, and what only they hold is ABSENT.

        Raises DamagedImage or UnreadableStore.
        """
        asked = enumerate(self.layers[:-1])
        parts = [layer.section(number) if index >= above else None for index, layer in asked]
        parts.append((top or self.top.section(number)) if above < len(self.layers) else None)
        said = [index for index, part in enumerate(parts) if part is not None]
        if len(said) == 1:
            return self._alone(number, said[0], parts)
        blocks = self.geometry.section_blocks(number)
        kinds = np.zeros(blocks, np.uint8)
        owner = np.full(blocks, -1, np.int16)
        zero = self.geometry.zero_rows(number)
        rows = zero.copy()
        extents = extent.empty()
        for index in said:
            part = parts[index]
            assert part is not None  # noqa: S101 - chosen so
            says = part.kinds != ABSENT
            kinds[says], owner[says] = part.kinds[says], index
            gone = says & ~part.stored
            rows[gone] = zero[gone]
            rows[part.stored] = part.rows
            extents = self._laid_over(extents, part, says)
        return SectionView(number, kinds, owner, rows, extents, parts)

    def _alone(self, number: int, index: int, parts: Sequence[Section | None]) -> SectionView:
        """A section of which only layer ``index`` says anything."""
        part = parts[index]
        assert part is not None  # noqa: S101 - chosen so
        owner = np.where(part.kinds == ABSENT, np.int16(-1), np.int16(index))
        rows = self.geometry.zero_rows(number)
        if len(part.rows) == len(rows):
            rows = part.rows
        elif len(part.rows):
            rows = rows.copy()
            rows[part.stored] = part.rows
        return SectionView(number, part.kinds, owner, rows, part.extents, parts)

    def _laid_over(self, below: Extents, part: Section, said: npt.NDArray[np.bool_]) -> Extents:
        """A block is the unit of change: a newer block replaces all extents of the older one."""
        first = part.number * self.geometry.section_bytes
        claimed = extent.from_blocks(
            said.astype(np.uint8), first, self.geometry.block_bytes, self.geometry.device_bytes
        )
        return extent.overlay(extent.subtract(below, claimed), part.extents)

    def check(self) -> Summary:
        """Check everything but the frames' content, in one pass over the indexes: binding, every section,
        every seek table, the lengths, the root. Raises DamagedImage, or UnreadableStore.
        """
        self.check_binding()
        tables = [layer.seek_table_check() for layer in self.layers]
        digests = self.claimed_digests()
        stored, bad = 0, [extent.empty()]
        for number in range(self.geometry.sections):
            section = self.section(number)
            for table, part in zip(tables, section.layers, strict=True):
                if part is not None:
                    table.add(part)
            if self.complete:
                self.check_section(section, digests)
            stored += self._stored_bytes(section)
            bad.append(extent.of_kind(section.extents, BAD))
        for table in tables:
            table.finish()
        if self.complete:
            root = hashmap.root(self.geometry.device_bytes, self.geometry.block_bytes, digests)
            if root != self.top.closing.root:
                raise DamagedImage(file=self.top.name, reason="its root does not match its hash map")
        return Summary(stored, extent.coalesce(np.concatenate(bad)))

    def _stored_bytes(self, section: SectionView) -> int:
        stored = section.stored
        count = int(np.count_nonzero(stored)) * self.geometry.block_bytes
        if len(stored) and stored[-1]:
            last = section.number * BLOCKS_PER_SECTION + len(stored) - 1
            count -= self.geometry.block_bytes - self.geometry.block_length(last)
        return count

    def check_section(self, section: SectionView, digests: npt.NDArray[np.uint8]) -> None:
        """The composed rows have the digest that the newest layer states. Raises DamagedImage."""
        if section.stored.any() or (section.extents["kind"] == BAD).any():
            found = hashmap.section_digest(section.rows, section.extents)
        else:
            found = self.geometry.zero_section_digest(section.number)
        if found != digests[section.number].tobytes():
            newest = max((i for i, part in enumerate(section.layers) if part is not None), default=0)
            raise DamagedImage(
                file=self.layers[newest].name, reason=f"section {section.number} does not have its map digest"
            )

    # --- content -------------------------------------------------------------------------------

    def read(self, section: SectionView, low: int, out: npt.NDArray[np.uint8]) -> list[Flaw]:
        """Fill ``out`` (uint8) with the content from block ``low`` of the section on; what was not good.

        ``low`` is a window's first block. Every stored block is checked against its row; blocks without
        stored bytes, and damaged ones, are zeros in ``out``. Safe from several threads.
        """
        block = self.geometry.block_bytes
        high = low + -(-len(out) // block)
        flaws: dict[int, str] = {}
        for index in self._fill(section, low, high, out, flaws):
            flaws.setdefault(index, "a block does not have its digest")
        return self._flaws(section, flaws)

    def _fill(
        self, section: SectionView, low: int, high: int, out: npt.NDArray[np.uint8], flaws: dict[int, str]
    ) -> list[int]:
        block = self.geometry.block_bytes
        stored = section.stored[low:high]
        for begin, end in zip(*(edge.tolist() for edge in extent.true_runs(~stored)), strict=True):
            out[begin * block : end * block] = 0
        owners = section.owner[low:high]
        for index in np.flatnonzero(np.bincount(owners[stored])).tolist():
            wanted = np.flatnonzero(stored & (owners == index)) + low
            self._fill_from(section, index, wanted, low, out, flaws)
        for index in flaws:
            out[(index - low) * block : (index - low + 1) * block] = 0
        rows = hashmap.digest_blocks(out, block, stored)
        differ = np.flatnonzero(hashmap.changed_rows(rows, section.rows[low:high]) & stored)
        for index in differ.tolist():
            out[index * block : (index + 1) * block] = 0
        return [index + low for index in differ.tolist()]

    def _fill_from(
        self,
        section: SectionView,
        index: int,
        wanted: npt.NDArray[np.int64],
        low: int,
        out: npt.NDArray[np.uint8],
        flaws: dict[int, str],
    ) -> None:
        """Decode the frames of layer ``index`` that hold the ``wanted`` blocks (of the section)."""
        part, layer = section.layers[index], self.layers[index]
        assert part is not None  # noqa: S101 - a layer owns blocks only through its section
        block = self.geometry.block_bytes
        per_window = self.geometry.window_bytes // block
        # Runs of blocks that follow each other in a frame's content as they do in ``out``.
        windows = wanted // per_window
        breaks = np.flatnonzero((wanted[1:] != wanted[:-1] + 1) | (windows[1:] != windows[:-1])) + 1
        edges = np.concatenate(([0], breaks, [len(wanted)]))
        firsts, counts, windows = wanted[edges[:-1]], np.diff(edges), windows[edges[:-1]]
        begins = windows * per_window
        places = firsts - begins if layer.whole else part.rows_before[firsts] - part.rows_before[begins]
        first_window = section.number * BLOCKS_PER_SECTION // per_window
        at = np.searchsorted(part.frames["window"], (windows + first_window).astype(np.uint32))
        new = np.concatenate(([True], at[1:] != at[:-1]))
        stored = iter(_read_frames(layer, part.frames[at[new]]))
        content: memoryview | str = ""
        for is_new, size, place, first, count in zip(
            new.tolist(), part.frames["content"][at].tolist(), places.tolist(), firsts.tolist(), counts.tolist(),
            strict=True,
        ):  # fmt: skip
            if is_new:
                content = _content(next(stored), size)
            if isinstance(content, str):
                flaws.update(dict.fromkeys(range(first, first + count), content))
                continue
            source, target = place * block, (first - low) * block
            length = min(count * block, len(content) - source, len(out) - target)
            memoryview(out)[target : target + length] = content[source : source + length]

    def _flaws(self, section: SectionView, flaws: dict[int, str]) -> list[Flaw]:
        """Neighbouring bad blocks of one image and one reason, as ranges."""
        found: list[Flaw] = []
        block, size = self.geometry.block_bytes, self.geometry.device_bytes
        for index in sorted(flaws):
            start = (section.number * BLOCKS_PER_SECTION + index) * block
            length = min(block, size - start)
            file = self.layers[int(section.owner[index])].name
            last = found[-1] if found else None
            if last and (last.start + last.length, last.reason, last.file) == (start, flaws[index], file):
                found[-1] = Flaw(last.start, last.length + length, last.reason, last.file)
            else:
                found.append(Flaw(start, length, flaws[index], file))
        return found


def _content(stored: memoryview | Damage, content_bytes: int) -> memoryview | str:
    """What a frame holds, or why that cannot be had."""
    if isinstance(stored, Damage):
        return str(stored)
    try:
        return memoryview(codec.decode(stored, content_bytes))
    except fmt.FormatError as error:
        return str(error)


def _read_frames(layer: ImageReader, frames: fmt.Frames) -> list[memoryview | Damage]:
    """The stored bytes of each frame; near neighbours are read in one go. A read error becomes the
    frame's own, so that it costs no more than it must.
    """
    offsets = frames["offset"].astype(np.int64)
    ends = offsets + frames["stored"]
    breaks = np.flatnonzero(offsets[1:] - ends[:-1] > _READ_GAP) + 1
    result: list[memoryview | Damage] = []
    for low, high in zip([0, *breaks.tolist()], [*breaks.tolist(), len(frames)], strict=True):
        result += _read_span(layer, offsets[low:high].tolist(), ends[low:high].tolist())
    return result


def _read_span(layer: ImageReader, offsets: list[int], ends: list[int]) -> list[memoryview | Damage]:
    start = offsets[0]
    try:
        data = memoryview(layer.source.read(start, ends[-1] - start))
    except Damage as error:
        if len(offsets) == 1:
            return [error]
        return [part for pair in zip(offsets, ends, strict=True) for part in _read_span(layer, [pair[0]], [pair[1]])]
    return [data[begin - start : end - start] for begin, end in zip(offsets, ends, strict=True)]
