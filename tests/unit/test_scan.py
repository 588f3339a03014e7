"""Reading a source with many hands: the parent's map is there for each of them, whatever order they ask in."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from blockbak.flow.scan import ParentMap, scan
from blockbak.host.blockio import PIECE_BYTES, SourceReader
from blockbak.host.kernel import Kernel
from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter
from blockbak.units import KIB
from tests.doubles import MemorySink, MemorySource, context
from tests.patterns import SECTOR, stamp
from tests.points import image
from tests.scene import write_at
from tests.volumes import SECTION

BLOCK = 4 * KIB
SECTIONS = 24
SIZE = SECTIONS * SECTION - 3
FEW = 6
"""Sections that others come to before the one that is read slowly."""


class Counted(MemorySource):
    """Notes where it was read; ``few`` is set once that was ``FEW`` times."""

    def __init__(self, data, name):
        super().__init__(data, name)
        self.reads, self.few = [], threading.Event()

    def forget(self):
        self.reads.clear()
        self.few.clear()

    def read(self, offset, length):
        self.reads.append(offset)
        if len(self.reads) == FEW:
            self.few.set()
        return super().read(offset, length)


class SlowMedium(Kernel):
    """The real kernel, but reads wait for an event."""

    def __init__(self, event):
        self._event = event

    def preadv(self, fd, buffers, offset):
        assert self._event.wait(20), "it never came"
        return super().preadv(fd, buffers, offset)


@pytest.fixture
def source(tmp_path):
    """A sparse file with data in its first sections and its last: the others are one piece each."""
    path = tmp_path / "source.img"
    with path.open("xb") as file:
        file.truncate(SIZE)
    for section in (0, 10, 11, SECTIONS - 1):
        change(path, section, 1)
    return path


def change(path, section, sequence):
    at = section * SECTION + 5 * BLOCK
    write_at(path, at, stamp(at // SECTOR, 16, sequence, seed=section))


def scanned(path, tmp_path, *, below=None, workers=1, kernel=None):
    """The view of an image of ``path``, on the view ``below``."""
    number, parent, root = (2, 1, below.top.closing.root) if below else (1, None, None)
    about = dataclasses.replace(image(number, parent, parent_root=root).opening, device_bytes=SIZE, block_bytes=BLOCK)
    sink = MemorySink()
    writer = ImageWriter(sink, about, below.claimed_digests() if below else None)
    with SourceReader(str(path), exclusive=True, kernel=kernel) as reader:
        scan(reader, writer, below, "zstd", context(tmp_path / "state", workers=workers))
    counts = writer.counts
    closing = dataclasses.replace(
        image(number).closing, root=writer.root, changed_bytes=counts.changed_bytes, frames=counts.frames,
        **counts.by_name(),
    )  # fmt: skip
    writer.finish(closing)
    made = PointView([*(below.layers if below else ()), ImageReader(Counted(sink.sealed().data, f"image {number}"))])
    made.check()
    return made


@pytest.mark.parametrize("most", [1, 3, 12])
def test_a_parents_map_gives_the_section_that_is_asked_for(most, source, tmp_path, rng):
    """A worker may fall behind all the others, and ask for a section before all that were asked for since."""
    full = scanned(source, tmp_path)
    known = ParentMap(full, most)
    order = [*range(SECTIONS), *reversed(range(SECTIONS)), *(rng.randrange(SECTIONS) for _ in range(SECTIONS))]
    for number in order:
        found, right = known.section(number), full.section(number)
        assert found.number == number
        assert np.array_equal(found.rows, right.rows)
        assert np.array_equal(found.extents, right.extents)


def test_a_parents_map_keeps_what_was_asked_for_last(source, tmp_path):
    """Pieces of as many sections as there are workers come in turn; each section is read once."""
    full = scanned(source, tmp_path)
    known, reads = ParentMap(full, 4), full.top.source.reads
    for first in range(0, SECTIONS, 4):
        reads.clear()
        for _ in range(8):
            for number in reversed(range(first, first + 4)):
                known.section(number)
        assert len(reads) == 4


@pytest.mark.parametrize("workers", [1, 10])
def test_an_incremental_of_a_sparse_file_is_the_same_with_any_number_of_workers(workers, source, tmp_path):
    full = scanned(source, tmp_path)
    for section in (2, 3, 11, SECTIONS - 1):
        change(source, section, 2)
    made = scanned(source, tmp_path, below=full, workers=workers)
    assert made.top.closing.root == scanned(source, tmp_path).top.closing.root
    assert made.top.sections["number"].tolist() == [2, 3, 11, SECTIONS - 1]
    assert made.top.closing.data_bytes == 4 * 2 * BLOCK


def test_a_section_is_had_by_who_comes_to_it_last(source, tmp_path):
    """Its pieces are read slowly, each by a worker of its own, while others pass over the holes behind them."""
    pieces = SECTION // PIECE_BYTES
    for number in range(pieces):
        write_at(source, number * PIECE_BYTES, b"slow")
    full = scanned(source, tmp_path)
    change(source, 0, 2)
    full.top.source.forget()
    kernel = SlowMedium(full.top.source.few)
    made = scanned(source, tmp_path, below=full, workers=pieces + FEW, kernel=kernel)
    assert made.top.closing.root == scanned(source, tmp_path).top.closing.root
    assert made.top.sections["number"].tolist() == [0]
