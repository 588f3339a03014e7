"""Reads one image: header, index, structure. Decoding content is ``view``'s and ``check``'s work.

Nothing read here is trusted before a digest proved it: the header and the closing record carry their
own SHA-256, the closing record that of the header and of every section.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from blockbak.errors import DamagedImage, NewerFormat
from blockbak.image import format as fmt
from blockbak.image import seektable
from blockbak.model import extent
from blockbak.model.extent import BAD, DATA, Extents, Kinds
from blockbak.model.facts import FULL
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry, Rows
from blockbak.model.streams import ByteSource


@dataclass(frozen=True)
class Section:
    """One section of an image's index, unpacked and found free of contradictions.

    ``kinds`` uint8 per block (ABSENT where the image says nothing), ``stored`` bool per block: the
    blocks whose bytes lie in this image, in the order of ``rows``.
    """

    number: int
    rows: Rows
    extents: Extents
    frames: fmt.Frames
    kinds: Kinds
    stored: npt.NDArray[np.bool_]

    @cached_property
    def rows_before(self) -> npt.NDArray[np.int64]:
        """How many rows belong to blocks before each block; one more at the end: all of them."""
        return np.concatenate(([0], np.cumsum(self.stored)))

    @cached_property
    def bad(self) -> Extents:
        """What could not be read from the source."""
        return extent.of_kind(self.extents, BAD)


def _frames_flaw(
    frames: fmt.Frames, stored: npt.NDArray[np.bool_], number: int, geometry: Geometry, whole: bool
) -> str | None:
    """What is wrong with a section's frame records, given which of its blocks hold stored bytes."""
    per_window = geometry.window_bytes // geometry.block_bytes
    start, end = geometry.section_range(number)
    windows = -(-(end - start) // geometry.window_bytes)
    held = np.zeros(windows, bool)
    if stored.any():
        held = np.logical_or.reduceat(stored, np.arange(0, len(stored), per_window))
    local = frames["window"].astype(np.int64) - start // geometry.window_bytes
    content = frames["content"].astype(np.int64)
    if len(local) and (local[0] < 0 or local[-1] >= windows or (np.diff(local) <= 0).any()):
        return "frames out of order"
    if whole:
        begin = local * geometry.window_bytes
        if (
            not len(begin)
            or begin[0]
            or (begin[1:] != (begin + content)[:-1]).any()
            or begin[-1] + content[-1] != end - start
        ):
            return "frames do not cover their section"
        data = held[local]
        room = np.minimum(end - start - begin[data], geometry.window_bytes)
        if (content[data] != room).any():
            return "a frame does not hold its window"
        return None if int(data.sum()) == int(held.sum()) else "a frame of zeros covers stored blocks"
    if not np.array_equal(local, np.flatnonzero(held)):
        return "frames and changed blocks do not match"
    lengths = np.full(len(stored), geometry.block_bytes, np.int64)
    lengths[-1] = geometry.block_length(number * BLOCKS_PER_SECTION + len(stored) - 1)
    sums = np.add.reduceat(np.where(stored, lengths, 0), np.arange(0, len(stored), per_window))
    return None if np.array_equal(content, sums[held]) else "a frame does not hold its changed blocks"


class ImageReader:
    """One sealed image. Raises DamagedImage, NewerFormat or UnreadableStore, here and in each method."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.name = source.name
        try:
            self._open()
        except fmt.NewerImage as error:
            raise NewerFormat(what=f"The image {self.name}", detail=str(error)) from error
        except fmt.FormatError as error:
            raise self._damage(error) from error

    def _damage(self, reason: object) -> DamagedImage:
        return DamagedImage(file=self.name, reason=reason)

    def _open(self) -> None:
        size = self.source.size
        smallest = fmt.HEADER_BYTES + fmt.CLOSING.itemsize + fmt.seek_table_bytes(2)
        if size < smallest:
            raise fmt.FormatError(f"it has only {size} bytes")
        self.header = self.source.read(0, fmt.HEADER_BYTES)
        self.opening = fmt.unpack_header(self.header)
        self.geometry = self.opening.geometry
        footer = np.frombuffer(
            self.source.read(size - fmt.SEEK_FOOTER.itemsize, fmt.SEEK_FOOTER.itemsize), fmt.SEEK_FOOTER
        )[0]
        if footer["magic"] != fmt.SEEKABLE_MAGIC or footer["descriptor"] != 0:
            raise fmt.FormatError("it does not end with a seek table: cut short or never finished")
        self.seek_entries = int(footer["entries"])
        self.seek_offset = size - fmt.seek_table_bytes(self.seek_entries)
        if not 2 <= self.seek_entries <= fmt.SEEK_ENTRIES_MAX or self.seek_offset < smallest - fmt.seek_table_bytes(2):
            raise fmt.FormatError("its seek table has an impossible length")
        last_at = size - fmt.SEEK_FOOTER.itemsize - fmt.SEEK_ENTRY.itemsize
        last = np.frombuffer(self.source.read(last_at, fmt.SEEK_ENTRY.itemsize), fmt.SEEK_ENTRY)[0]
        self.closing_bytes = int(last["stored"])
        self.closing_offset = self.seek_offset - self.closing_bytes
        if self.closing_offset < fmt.HEADER_BYTES or self.closing_bytes < fmt.CLOSING.itemsize:
            raise fmt.FormatError("its seek table names an impossible closing record")
        # The record says its length too: one wrong bit of the table must not have gigabytes read for one.
        begin = self.source.read(self.closing_offset, fmt.SKIPPABLE.itemsize)
        if begin != fmt.closing_begin(self.closing_bytes):
            raise fmt.FormatError("its seek table does not lead to a closing record")
        self.closing_raw = self.source.read(self.closing_offset, self.closing_bytes)
        record = fmt.unpack_closing(self.closing_raw)
        if record.header_sha256 != fmt.sha256(self.header):
            raise fmt.FormatError("header and closing record are not of one image")
        self.closing = record.closing
        self.sections = record.sections
        self._check_list()

    def _check_list(self) -> None:
        numbers = self.sections["number"].astype(np.int64)
        offsets = self.sections["offset"].astype(np.int64)
        ends = offsets + self.sections["length"]
        if len(numbers) and (
            (np.diff(numbers) <= 0).any()
            or numbers[-1] >= self.geometry.sections
            or offsets[0] < fmt.HEADER_BYTES
            or (offsets[1:] < ends[:-1]).any()
            or ends[-1] > self.closing_offset
        ):
            raise fmt.FormatError("its section list contradicts itself")
        if self.whole and len(numbers) != self.geometry.sections:
            raise fmt.FormatError("its section list is not complete")

    @property
    def closing_sha256(self) -> str:
        """What the manifest names the image by, hex."""
        return fmt.sha256(self.closing_raw).hex()

    @property
    def whole(self) -> bool:
        """True for a full: its sections tile the volume and its frames hold whole windows."""
        return self.opening.kind == FULL

    def position(self, number: int) -> int | None:
        """Where section ``number`` stands in the section list; None if nothing changed in it."""
        at = int(np.searchsorted(self._numbers, number))
        return at if at < len(self._numbers) and int(self._numbers[at]) == number else None

    @cached_property
    def _numbers(self) -> npt.NDArray[np.uint32]:
        """The numbers of the listed sections in memory of their own: a search in the list would copy them."""
        return np.ascontiguousarray(self.sections["number"])

    def section(self, number: int) -> Section | None:
        """The section, checked by digest and for contradictions; None if the image does not have it."""
        at = self.position(number)
        return None if at is None else self.section_at(at)

    def section_at(self, at: int) -> Section:
        """The section at place ``at`` of the section list."""
        entry = self.sections[at]
        number = int(entry["number"])
        data = self.source.read(int(entry["offset"]), int(entry["length"]))
        if fmt.sha256(data) != bytes(entry["sha256"]):
            raise self._damage(f"the digest of section {number} does not match")
        try:
            record = fmt.unpack_section(data)
            return self._unpacked(record, number, at)
        except fmt.FormatError as error:
            raise self._damage(f"section {number}: {error}") from error

    def _unpacked(self, record: fmt.SectionRecord, number: int, at: int) -> Section:
        if record.number != number:
            raise fmt.FormatError(f"it says it is number {record.number}")
        start, end = self.geometry.section_range(number)
        if flaw := extent.flaw(record.extents, start, end, tiling=self.whole):
            raise fmt.FormatError(flaw)
        if not len(record.extents):
            raise fmt.FormatError("it is empty")
        blocks = self.geometry.section_blocks(number)
        kinds = extent.to_blocks(record.extents, start, self.geometry.block_bytes, blocks)
        stored = kinds == DATA
        if int(stored.sum()) != len(record.rows):
            raise fmt.FormatError("digest rows and stored blocks do not match")
        if flaw := _frames_flaw(record.frames, stored, number, self.geometry, self.whole):
            raise fmt.FormatError(flaw)
        self._check_offsets(record.frames, at)
        return Section(number, record.rows, record.extents, record.frames, kinds, stored)

    def region_start(self, at: int) -> int:
        """The file offset from which the frames of the section at place ``at`` may lie."""
        if at == 0:
            return fmt.HEADER_BYTES
        before = self.sections[at - 1]
        return int(before["offset"]) + int(before["length"])

    def _check_offsets(self, frames: fmt.Frames, at: int) -> None:
        """Frames lie in order between two section records; gaps are long enough to be padding."""
        offsets = frames["offset"].astype(np.int64)
        begins = np.concatenate((offsets, [int(self.sections["offset"][at])]))
        ends = np.concatenate(([self.region_start(at)], offsets + frames["stored"]))
        gaps = begins - ends
        if ((gaps != 0) & (gaps < fmt.PADDING_MIN)).any():
            raise fmt.FormatError("frames overlap or leave a gap")

    def all_sections(self) -> Iterator[Section]:
        """Every section of the list in order."""
        for at in range(len(self.sections)):
            yield self.section_at(at)

    def seek_table_check(self) -> SeekTableCheck:
        """A comparison of the stored seek table with the one the index generates; give it every section."""
        return SeekTableCheck(self)

    def map_digests(self) -> npt.NDArray[np.uint8]:
        """The section digests of the listed sections, ``(n, 32)`` uint8."""
        column = np.ascontiguousarray(self.sections["map_digest"])
        return np.frombuffer(column.tobytes(), np.uint8).reshape(-1, 32)


class SeekTableCheck:
    """Takes an image's sections in order and compares piece by piece, so that no table is held whole.

    Raises DamagedImage at the first entry that differs.
    """

    def __init__(self, reader: ImageReader) -> None:
        self._reader = reader
        self._table = seektable.Generator()
        head, _ = fmt.seek_table_ends(reader.seek_entries)
        self._at = reader.seek_offset
        self._end = reader.source.size - fmt.SEEK_FOOTER.itemsize
        self._taken = 0
        self._expect(head)

    def add(self, section: Section) -> None:
        """The next section of the list."""
        offset = int(self._reader.sections["offset"][self._taken])
        self._taken += 1
        self._expect(self._generated(self._table.section, section.frames, offset))

    def finish(self) -> None:
        """All sections were given: compare the end."""
        reader = self._reader
        self._expect(self._generated(self._table.closing, reader.closing_offset, reader.closing_bytes))
        if self._at != self._end or self._taken != len(reader.sections):
            raise DamagedImage(file=reader.name, reason="its seek table does not match its index")

    def _generated(self, make: Callable[..., fmt.SeekTable], *args: object) -> bytes:
        try:
            return make(*args).tobytes()
        except fmt.FormatError as error:
            raise DamagedImage(file=self._reader.name, reason=error) from error

    def _expect(self, data: bytes) -> None:
        if self._at + len(data) > self._end or self._reader.source.read(self._at, len(data)) != data:
            raise DamagedImage(file=self._reader.name, reason="its seek table does not match its index")
        self._at += len(data)
