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
from blockbak.model import extent
from blockbak.model.extent import ABSENT, DATA, HOLE, ZERO
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


def scanned(path, tmp_path, *, below=None, workers=1, kernel=None, unused=()):
    """The view of an image of ``path``, on the view ``below``; ``unused`` are starts and ends, in order."""
    parent, root = (below.top.opening.sequence, below.top.closing.root) if below else (None, None)
    number = (parent or 0) + 1
    about = dataclasses.replace(image(number, parent, parent_root=root).opening, device_bytes=SIZE, block_bytes=BLOCK)
    sink = MemorySink()
    writer = ImageWriter(sink, about, below.claimed_digests() if below else None)
    with SourceReader(str(path), exclusive=True, kernel=kernel) as reader:
        holes = extent.table([start for start, _ in unused], [end for _, end in unused], HOLE)
        world = context(tmp_path / "state", workers=workers)
        read_bytes = scan(reader, writer, below, "zstd", world, unused=holes)
    counts = writer.counts
    closing = dataclasses.replace(
        image(number).closing, root=writer.root, read_bytes=read_bytes, changed_bytes=counts.changed_bytes, frames=counts.frames,
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


# --- what no file system uses -----------------------------------------------------------------------


def kinds(view, section):
    return view.section(section).kinds


class Asked(Kernel):
    """The real kernel; notes what is read."""

    def __init__(self):
        self.ranges = []

    def preadv(self, fd, buffers, offset):
        self.ranges.append((offset, offset + sum(len(memoryview(part).cast("B")) for part in buffers)))
        return super().preadv(fd, buffers, offset)


@pytest.mark.parametrize("workers", [1, 4])
def test_a_block_is_left_out_only_if_no_byte_of_it_is_in_use(workers, source, tmp_path):
    """The data of a section is two blocks from its block 5 on."""
    at = [section * SECTION + 5 * BLOCK for section in (0, 10, 11, SECTIONS - 1)]
    unused = [
        (at[0], at[0] + 2 * BLOCK - 1),  # one byte of the second block is in use
        (at[1] + 1, at[1] + 2 * BLOCK),  # the first byte of the first one is
        (at[2] - BLOCK, at[2] + BLOCK), (at[2] + BLOCK + 1, at[2] + 3 * BLOCK),
        (at[3] - BLOCK, SIZE),
    ]  # fmt: skip
    kernel = Asked()
    view = scanned(source, tmp_path, unused=unused, workers=workers, kernel=kernel)
    assert kinds(view, 0)[4:8].tolist() == [ZERO, HOLE, DATA, ZERO]
    assert kinds(view, 10)[4:8].tolist() == [ZERO, DATA, HOLE, ZERO]
    assert kinds(view, 11)[3:9].tolist() == [ZERO, HOLE, HOLE, DATA, HOLE, ZERO]
    last = kinds(view, SECTIONS - 1)
    assert (last[:4] == ZERO).all()
    assert (last[4:] == HOLE).all(), "the short block at the end too"
    holes = [at[0], at[1] + BLOCK, at[2] - BLOCK, at[2], at[2] + 2 * BLOCK, *range(at[3] - BLOCK, SIZE, BLOCK)]
    for low, high in kernel.ranges:
        assert not any(low < hole + BLOCK and hole < high for hole in holes[:40]), "it was read"
    assert view.top.closing.hole_bytes == sum(min(BLOCK, SIZE - hole) for hole in holes)
    # A restore writes zeros there, so that is what the root is of.
    for hole in holes[:5]:
        write_at(source, hole, bytes(BLOCK))
    write_at(source, at[3], bytes(2 * BLOCK))
    assert view.top.closing.root == scanned(source, tmp_path).top.closing.root


def test_what_is_claimed_and_was_not_is_a_change_and_so_is_the_reverse(source, tmp_path):
    start = 10 * SECTION
    unused = [(start, start + SECTION)]
    first = scanned(source, tmp_path, unused=unused)
    assert (kinds(first, 10) == HOLE).all()
    same = scanned(source, tmp_path, below=first, unused=unused)
    assert same.top.sections["number"].tolist() == [], "nothing changed"
    used = scanned(source, tmp_path, below=first, unused=[(start + 6 * BLOCK, start + SECTION)])
    own = used.top.section(10).kinds
    assert own[:7].tolist() == [ZERO] * 5 + [DATA, ABSENT]
    assert (own[6:] == ABSENT).all()
    # Without the option all is compared, and all is claimed again.
    whole = scanned(source, tmp_path, below=used)
    assert not any((kinds(whole, number) == HOLE).any() for number in range(SECTIONS))
    assert whole.top.closing.root == scanned(source, tmp_path).top.closing.root
    # Blocks of zeros and of data, which nobody uses any more.
    gone = scanned(source, tmp_path, below=whole, unused=[(start + 4 * BLOCK, start + 6 * BLOCK)])
    own = gone.top.section(10).kinds
    assert own[3:8].tolist() == [ABSENT, HOLE, HOLE, ABSENT, ABSENT]


def test_what_is_unused_costs_no_reading(source, tmp_path):
    view = scanned(source, tmp_path, unused=[(BLOCK, SIZE)], kernel=(kernel := Asked()))
    assert kernel.ranges == [(0, BLOCK)]
    assert view.top.closing.read_bytes == BLOCK
    assert view.top.closing.hole_bytes == SIZE - BLOCK
