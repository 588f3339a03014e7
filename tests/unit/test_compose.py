"""Images written, read and composed in memory: what a point's layers say together is what is stored."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockbak.flow import workers
from blockbak.image import codec
from blockbak.image.compose import REENCODE, ZEROS, Composer, plan_windows
from blockbak.image.reader import ImageReader, Section
from blockbak.image.view import PointView, SectionView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, BAD, DATA, HOLE, ZERO
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry
from blockbak.units import KIB
from tests.doubles import MemorySink
from tests.points import image

BLOCK, WINDOW = 64 * KIB, 256 * KIB
PER_WINDOW = WINDOW // BLOCK


# --- which frames can be taken over ----------------------------------------------------------------


def layered(layers, *, full):
    """The view of layers that are given as kinds per block; the first may be a full."""
    count = len(layers[0])
    kinds, owner, parts = np.zeros(count, np.uint8), np.full(count, -1, np.int16), []
    for index, row in enumerate(np.array(layers, np.uint8)):
        said = np.where(row == ABSENT, np.uint8(ZERO), row) if full and index == 0 else row
        kinds[said != ABSENT], owner[said != ABSENT] = said[said != ABSENT], index
        empty = hashmap.empty_rows(0), extent.empty(), np.empty(0)
        parts.append(Section(0, *empty, said, said == DATA) if said.any() else None)
    return SectionView(0, kinds, owner, hashmap.empty_rows(count), extent.empty(), parts)


@given(st.data(), st.booleans())
def test_a_frame_is_taken_over_if_and_only_if_it_is_what_the_result_needs(data, full):
    count = data.draw(st.integers(1, 18))
    one = st.lists(st.sampled_from([ABSENT, ABSENT, ZERO, DATA, DATA]), min_size=count, max_size=count)
    view = layered(data.draw(st.lists(one, min_size=1, max_size=4)), full=full)
    geometry = Geometry(count * BLOCK - 5, BLOCK, WINDOW)
    whole_layers = [full, *[False] * (len(view.layers) - 1)]
    plan = plan_windows(view, geometry, whole_layers=whole_layers, whole=full)
    assert len(plan) == -(-count // PER_WINDOW)

    def token(block):
        return (int(view.owner[block]), block) if view.kinds[block] == DATA else None

    for window, decided in enumerate(plan.tolist()):
        blocks = range(window * PER_WINDOW, min((window + 1) * PER_WINDOW, count))
        needed = [token(block) for block in blocks if full or view.kinds[block] == DATA]
        if not any(needed):
            assert decided == ZEROS
            continue
        usable = []
        for index, part in enumerate(view.layers):
            if part is None:
                continue
            held = [(index, block) if part.kinds[block] == DATA else None for block in blocks]
            # A full's frame holds the whole window; a delta's only the blocks it stores.
            frame = held if whole_layers[index] else [one for one in held if one]
            if frame == needed:
                usable.append(index)
        if decided == REENCODE:
            # A newer layer may say "zero" where the full has zeros: then nobody looks twice.
            assert not [index for index in usable if not whole_layers[index]]
            assert all(any(view.owner[block] != index for block in blocks) for index in usable)
        else:
            assert decided in usable


# --- whole images in memory --------------------------------------------------------------------------


def opened(number, parent, size, parent_root=None):
    return dataclasses.replace(
        image(number, parent, parent_root=parent_root).opening,
        device_bytes=size,
        block_bytes=BLOCK,
        window_bytes=WINDOW,
    )


def closing_of(writer, number):
    counts = writer.counts
    return dataclasses.replace(
        image(number).closing, root=writer.root, changed_bytes=counts.changed_bytes, frames=counts.frames,
        **counts.by_name(),
    )  # fmt: skip


def stored(number, content, kinds, bad, below, compress, pieces):
    """An image of ``content`` as a MemorySource; ``below`` is its parent's view, None for a full."""
    data = np.frombuffer(content, np.uint8)
    above = (number - 1, len(data), below.top.closing.root) if below else (None, len(data), None)
    opening = opened(number, *above)
    sink = MemorySink(f"image {number}")
    writer = ImageWriter(sink, opening, below.claimed_digests() if below else None)
    geometry, encoder = writer.geometry, codec.encoder(compress)
    step = PER_WINDOW * pieces
    for piece, low in enumerate(range(0, len(kinds), step)):
        mine = kinds[low : low + step]
        part = data[low * BLOCK : (low + len(mine)) * BLOCK]
        rows = hashmap.digest_blocks(part, BLOCK, np.ones(len(mine), bool))
        frames = []
        if (mine == DATA).any():
            frames = encode_windows(part, mine, low, geometry, encoder, whole=below is None)
        inside = extent.clip(bad, low * BLOCK, (low + len(mine)) * BLOCK)
        writer.add(Piece(piece, low, mine, inside, rows, frames))
    writer.finish(closing_of(writer, number))
    return sink.sealed()


def content_of(view):
    """Everything a view restores, and no flaw in it."""
    size = view.geometry.device_bytes
    out = np.full(size, 0xEE, np.uint8)
    for number in range(view.geometry.sections):
        start, end = view.geometry.section_range(number)
        assert view.read(view.section(number), 0, out[start:end]) == []
    return out.tobytes()


def composed(layers, whole, number, *, full, unit, compress="zstd", threads=1):
    """What synthesize does, in memory."""
    parent = None if full else 1
    opening = opened(number, parent, whole.geometry.device_bytes, None if full else whole.layers[0].closing.root)
    sink = MemorySink("composed", unit)
    writer = ImageWriter(sink, opening, None if full else whole.claimed_digests())
    composer = Composer(layers, writer, sink, sink.clone_unit(layers.layers[0].source))
    workers.run(
        composer.pieces(),
        lambda: composer.worker(codec.encoder(compress), lambda _: None),
        workers=threads,
        check=lambda: None,
        stop=composer.stop,
    )
    composer.finish()
    writer.finish(closing_of(writer, number))
    reader = ImageReader(sink.sealed())
    table = reader.seek_table_check()
    for section in reader.all_sections():
        table.add(section)
    table.finish()
    assert sink.cloned_bytes == composer.tally.cloned_bytes
    return reader


@st.composite
def stories(draw):
    """Contents of one small volume at some points; which blocks each image claims; BAD sectors of each."""
    size = draw(st.integers(1, 20 * BLOCK))
    blocks = -(-size // BLOCK)
    dice = draw(st.randoms(use_true_random=False))
    content, told = bytearray(size), []
    bad = extent.empty()
    for number in range(draw(st.integers(1, 4))):
        kinds = np.full(blocks, ABSENT if number else ZERO, np.uint8)
        claimed = set(range(blocks)) if number == 0 else draw(st.sets(st.integers(0, blocks - 1), max_size=8))
        # A BAD block equals nothing: whoever makes a delta claims it anew.
        claimed |= set(np.flatnonzero(extent.touched(bad, 0, BLOCK, blocks)).tolist())
        for block in sorted(claimed):
            length = min(BLOCK, size - block * BLOCK)
            kind = dice.choice([DATA, DATA, DATA, ZERO, HOLE])
            part = dice.randbytes(length) if kind == DATA else bytes(length)
            kinds[block] = DATA if any(part) else kind if kind != DATA else ZERO
            content[block * BLOCK : block * BLOCK + length] = part
        bad = extent.empty()
        for block in np.flatnonzero(kinds != ABSENT).tolist():
            if dice.random() < 0.1:
                start = block * BLOCK
                end = min(start + 512, size)
                content[start:end] = bytes(end - start)
                if kinds[block] == DATA and not any(content[start : min(start + BLOCK, size)]):
                    kinds[block] = ZERO
                bad = extent.overlay(bad, extent.table([start], [end], BAD))
        told.append((bytes(content), kinds, bad))
    return told


@settings(max_examples=60)
@given(stories(), st.sampled_from(["none", "zstd"]), st.integers(1, 3), st.sampled_from([0, 4096]))
def test_every_point_reads_as_it_was_and_composes_to_itself(story, compress, pieces, unit):
    layers, view = [], None
    for number, (content, kinds, bad) in enumerate(story, 1):
        layers.append(ImageReader(stored(number, content, kinds, bad, view, compress, pieces)))
        view = PointView(list(layers))
        view.check()
        assert content_of(view) == content
        found = [view.section(n).extents for n in range(view.geometry.sections)]
        assert extent.flaw(found[0], 0, len(content), tiling=True) is None
        assert extent.of_kind(found[0], BAD).tolist() == bad.tolist()
    assert view is not None
    full = composed(view, view, len(story), full=True, unit=unit, threads=pieces)
    assert full.closing.root == view.top.closing.root
    alone = PointView([full])
    alone.check()
    assert content_of(alone) == story[-1][0]
    assert alone.section(0).extents.tolist() == view.section(0).extents.tolist()
    if len(layers) > 1:
        delta = composed(PointView(layers[1:]), view, len(story), full=False, unit=unit)
        assert delta.closing.root == view.top.closing.root
        two = PointView([layers[0], delta])
        two.check()
        assert content_of(two) == story[-1][0]


def test_a_full_is_composed_by_cloning_where_blocks_can_be_shared():
    """Random data, one block of it changed: all but a window is shared, whatever the offsets modulo 4096."""
    dice = np.random.default_rng(5)
    blocks = 64
    content = bytearray(dice.bytes(blocks * BLOCK - 100))
    everything = np.full(blocks, DATA, np.uint8)
    base = ImageReader(stored(1, bytes(content), everything, extent.empty(), None, "zstd", 4))
    one = np.zeros(blocks, np.uint8)
    one[9] = DATA
    content[9 * BLOCK : 10 * BLOCK] = dice.bytes(BLOCK)
    top = ImageReader(stored(2, bytes(content), one, extent.empty(), PointView([base]), "zstd", 4))
    view = PointView([base, top])
    sink_free = composed(view, view, 2, full=True, unit=0)
    shared = composed(view, view, 2, full=True, unit=4096)
    assert content_of(PointView([shared])) == content_of(PointView([sink_free])) == bytes(content)
    # Two runs, before and after the window: a padding frame and two blocks each.
    assert shared.source.size <= sink_free.source.size + 2 * (4096 + 8)


@pytest.mark.parametrize("unit", [0, 4096])
@pytest.mark.parametrize("full", [True, False])
def test_what_is_composed_does_not_depend_on_the_number_of_workers(unit, full):
    """Windows to be taken over, to be encoded again and of zeros take turns, in several pieces."""
    dice = np.random.default_rng(7)
    blocks = 1200
    content = np.zeros(blocks * BLOCK - 100, np.uint8)
    layers: list[ImageReader] = []
    for number in range(1, 4):
        chosen = np.repeat(dice.random(blocks // 20), 20) < 0.7 if number == 1 else dice.random(blocks) < 0.05
        kinds = np.where(chosen, dice.choice([DATA, DATA, ZERO], blocks), ABSENT if layers else ZERO).astype(np.uint8)
        for block in np.flatnonzero(chosen).tolist():
            part = content[block * BLOCK : (block + 1) * BLOCK]
            part[:] = np.resize(dice.integers(1, 255, 3000), len(part)) if kinds[block] == DATA else 0
        parent = PointView(list(layers)) if layers else None
        layers.append(ImageReader(stored(number, content.tobytes(), kinds, extent.empty(), parent, "zstd", 8)))
    view = PointView(layers)
    below = view if full else PointView(layers[1:])
    one, four = (composed(below, view, 3, full=full, unit=unit, threads=threads) for threads in (1, 4))
    assert one.source.data == four.source.data
    PointView([one] if full else [layers[0], one]).check()


@pytest.mark.parametrize("blocks", [BLOCKS_PER_SECTION - 1, BLOCKS_PER_SECTION, BLOCKS_PER_SECTION + 1])
def test_sections_end_where_they_must(blocks):
    """A volume of zeros but for its last byte, around the end of a section."""
    size = (blocks - 1) * BLOCK + 7
    geometry = Geometry(size, BLOCK, WINDOW)
    sink = MemorySink()
    writer = ImageWriter(sink, opened(1, None, size))
    for section in range(geometry.sections):
        count = geometry.section_blocks(section)
        low = section * BLOCKS_PER_SECTION
        last = low + count == blocks
        rows, kinds, frames = geometry.zero_rows(section).copy(), np.full(count, ZERO, np.uint8), []
        if last:
            tail = np.array([0] * 6 + [1], np.uint8)
            rows[-1] = np.frombuffer(hashmap.digest(tail), "<u8")
            kinds[-1] = DATA
            at = (count - 1) // PER_WINDOW * PER_WINDOW
            # The window's other blocks are zeros, and stored with it.
            data = np.concatenate((np.zeros((count - 1 - at) * BLOCK, np.uint8), tail))
            frames = encode_windows(data, kinds[at:], low + at, geometry, codec.encoder("zstd"), whole=True)
        writer.add(Piece(section, low, kinds, extent.empty(), rows, frames))
    writer.finish(closing_of(writer, 1))
    view = PointView([ImageReader(sink.sealed())])
    view.check()
    section = view.section(geometry.sections - 1)
    start, end = geometry.section_range(section.number)
    assert (section.kinds[-1], end) == (DATA, size)
    low = (len(section.kinds) - 1) // PER_WINDOW * PER_WINDOW
    window = np.ones(end - start - low * BLOCK, np.uint8)
    assert view.read(section, low, window) == []
    assert np.flatnonzero(window).tolist() == [len(window) - 1]
