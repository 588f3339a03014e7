"""Every way in which a frame can be wrong is found, and told by its own reason."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from blake3 import blake3

from blockbak.errors import UnreadableStore
from blockbak.image import check, codec
from blockbak.image import format as fmt
from blockbak.image.check import Span
from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, DATA, ZERO
from blockbak.units import KIB
from tests.doubles import MemorySink, MemorySource
from tests.points import image

BLOCK, WINDOW = 64 * KIB, 256 * KIB
BLOCKS = 23
SIZE = BLOCKS * BLOCK - 100


def stored(kinds, parent=None):
    """An image of random DATA blocks, and what they hold."""
    dice = np.random.default_rng(3)
    content = np.zeros(SIZE, np.uint8)
    for block in np.flatnonzero(kinds == DATA).tolist():
        part = content[block * BLOCK : (block + 1) * BLOCK]
        part[:] = np.resize(dice.integers(1, 255, 5000), len(part))
    opening = dataclasses.replace(
        image(2 if parent else 1, 1 if parent else None, parent_root=parent.closing.root if parent else None).opening,
        device_bytes=SIZE, block_bytes=BLOCK, window_bytes=WINDOW,
    )  # fmt: skip
    sink = MemorySink()
    writer = ImageWriter(sink, opening, PointView([parent]).claimed_digests() if parent else None)
    rows = hashmap.digest_blocks(content, BLOCK, np.ones(BLOCKS, bool))
    frames = encode_windows(content, kinds, 0, writer.geometry, codec.encoder("zstd"), whole=parent is None)
    writer.add(Piece(0, 0, kinds, extent.empty(), rows, frames))
    counts = writer.counts
    writer.finish(
        dataclasses.replace(
            image(1).closing,
            root=writer.root,
            changed_bytes=counts.changed_bytes,
            frames=counts.frames,
            **counts.by_name(),
        )
    )
    return ImageReader(sink.sealed()), content


@pytest.fixture
def full():
    """Windows: whole, with a zero block, of zeros (two, one frame), whole, short."""
    kinds = np.full(BLOCKS, DATA, np.uint8)
    kinds[5] = kinds[8:16] = ZERO
    return stored(kinds)


@pytest.fixture
def delta(full):
    kinds = np.full(BLOCKS, ABSENT, np.uint8)
    kinds[[1, 3, 9, 20, 21, 22]] = DATA
    return stored(kinds, full[0])


def rebuilt(reader, frames, gaps=(), **records):
    """A reader and a span of the one section of an image with other stored bytes per frame, and their digests; ``gaps`` are bytes
    before each frame and after the last, ``records`` other columns of its records.
    """
    section = reader.section_at(0)
    table = section.frames.copy()
    data, at = bytearray(), fmt.HEADER_BYTES
    gaps = {**dict.fromkeys(range(len(frames) + 1), b""), **dict(gaps)}
    for index, frame in enumerate(frames):
        data += gaps[index] + frame
        table["offset"][index], table["stored"][index] = at + len(data) - len(frame), len(frame)
        table["digest"][index] = np.void(blake3(frame).digest(fmt.FRAME_DIGEST_BYTES))
    data += gaps[len(frames)]
    for name, values in records.items():
        for index, value in values.items():
            table[name][index] = value
    other = copy.copy(reader)
    other.source = MemorySource(reader.source.read(0, at) + bytes(data))
    section = dataclasses.replace(section, frames=table)
    return other, Span(section, 0, len(table), at, at + len(data))


def frames_of(reader):
    return [reader.source.read(int(frame["offset"]), int(frame["stored"])) for frame in reader.section_at(0).frames]


def encoded(content):
    return b"".join(codec.encoder("zstd").encode(memoryview(content)))


def reasons(reader, span):
    return [(flaw.start // WINDOW, flaw.reason) for flaw in check.check_span(reader, span)]


def test_an_image_as_written_has_no_flaw(full, delta):
    for reader, _ in (full, delta):
        assert [flaw for span in check.spans(reader) for flaw in check.check_span(reader, span)] == []
        assert reasons(*rebuilt(reader, frames_of(reader))) == []


def test_each_block_is_compared_with_its_row(full, delta):
    for reader, _ in (full, delta):
        frames = frames_of(reader)
        for index, record in enumerate(reader.section_at(0).frames):
            inside = codec.decode(frames[index], int(record["content"]))
            if not any(inside):
                continue
            for at in (0, len(inside) - 1):
                changed = bytearray(inside)
                changed[at] ^= 1
                frame = encoded(changed)
                checksum = {"checksum": {index: int.from_bytes(frame[-4:], "little")}}
                span = rebuilt(reader, [*frames[:index], frame, *frames[index + 1 :]], **checksum)
                assert reasons(*span) == [(int(record["window"]), "a block does not have its digest")]


def test_zero_blocks_of_a_window_are_zeros(full):
    reader, content = full
    frames = frames_of(reader)
    window = content[WINDOW : 2 * WINDOW].copy()
    window[2 * BLOCK - 1] = 1
    frames[1] = encoded(window)
    assert reasons(*rebuilt(reader, frames)) == [(1, "a block that should be zeros is not")]


def test_stored_bytes_have_their_digest(full):
    reader, _ = full
    frames = frames_of(reader)
    span = rebuilt(reader, frames, digest={0: np.void(bytes(16)), 4: np.void(bytes(16))})
    told = "the stored bytes of a frame do not have their digest"
    assert reasons(*span) == [(0, told), (5, told)]


def test_frames_of_zeros_have_one_form(full):
    reader, _ = full
    frames = frames_of(reader)
    frames[2] = encoded(bytes(2 * WINDOW))
    assert reasons(*rebuilt(reader, frames)) == [(2, "a frame of zeros is not in its one form")]


def test_a_record_names_the_checksum(full):
    reader, _ = full
    frames = frames_of(reader)
    told = "a frame does not end with the checksum of its record"
    assert reasons(*rebuilt(reader, frames, checksum={2: 1, 3: 1})) == [(2, told), (4, told)]


@pytest.mark.parametrize(
    ("frame", "told"),
    [
        (b"", "a frame does not begin as one"),
        (b"(\xb5/\xfd", "a frame does not begin as one"),
        (fmt.zero_frame(WINDOW), "a frame has no checksum"),
        (encoded(bytes(BLOCK)), "a frame's content size differs from its record"),
        (encoded(b"x" * WINDOW) + b"\0", "a frame does not hold what its record says"),
        (encoded(b"x" * WINDOW)[:-1], "a frame does not hold what its record says"),
    ],
)  # fmt: skip
def test_a_frame_is_exactly_one_frame(full, frame, told):
    reader, _ = full
    frames = frames_of(reader)
    frames[0] = frame
    assert reasons(*rebuilt(reader, frames)) == [(0, told)]


@pytest.mark.parametrize("place", range(6))
def test_gaps_hold_padding_and_nothing_else(full, place):
    reader, _ = full
    frames = frames_of(reader)
    assert reasons(*rebuilt(reader, frames, {place: fmt.padding(77)})) == []
    for gap in (bytes(77), fmt.padding(77)[:-1] + b"\1"):
        told = reasons(*rebuilt(reader, frames, {place: gap}))
        assert [reason for _, reason in told] == ["bytes between frames are not padding"]


def test_flaws_of_several_frames_are_told_apart(full):
    reader, content = full
    frames = frames_of(reader)
    window = content[:WINDOW].copy()
    window[-1] ^= 1
    frames[0], frames[3] = encoded(window), b"not a frame at all"
    assert reasons(*rebuilt(reader, frames, checksum={4: 1})) == [
        (0, "a block does not have its digest"),
        (4, "a frame does not begin as one"),
        (5, "a frame does not end with the checksum of its record"),
    ]


class BadSectors(MemorySource):
    """Reads that touch one of the ``bad`` ranges fail."""

    def __init__(self, data, bad):
        super().__init__(data)
        self.bad = bad

    def read(self, offset, length):
        if any(offset < end and start < offset + length for start, end in self.bad):
            raise UnreadableStore(file=self.name, offset=offset, reason="Input/output error")
        return super().read(offset, length)


@pytest.mark.parametrize("hurt", [[0], [1], [3], [4], [0, 4], [2, 3]])
def test_a_bad_sector_condemns_its_own_frame_and_no_other(hurt, full):
    """Frames are read many at once; the others of a read that failed are looked at one by one."""
    reader, _ = full
    frames = frames_of(reader)
    gaps = {0: fmt.padding(70), 2: fmt.padding(90), 5: fmt.padding(77)}
    reader, span = rebuilt(reader, frames, gaps)
    table = span.section.frames
    ends = (table["offset"] + table["stored"]).astype(int).tolist()
    # The last byte of a frame: what is read too much by one is hit as well.
    reader.source = BadSectors(reader.source.data, [(ends[index] - 1, ends[index]) for index in hurt])
    told = reasons(reader, span)
    assert [window for window, _ in told] == table["window"][hurt].tolist()
    assert all("Input/output error" in reason for _, reason in told)


def test_beside_a_bad_sector_other_flaws_are_told_all_the_same(full):
    reader, _ = full
    frames = frames_of(reader)
    frames[3] = b"not a frame at all"
    reader, span = rebuilt(reader, frames, {1: bytes(77), 5: bytes(77)})
    start = int(span.section.frames["offset"][2])
    reader.source = BadSectors(reader.source.data, [(start, start + 1)])
    told = reasons(reader, span)
    assert [window for window, _ in told] == [1, 2, 4, 0]
    gap = "bytes between frames are not padding"
    assert [reason for _, reason in told if "Input/output" not in reason] == [gap, "a frame does not begin as one", gap]


def test_a_section_of_zeros_is_looked_at_as_a_whole():
    reader, _ = stored(np.full(BLOCKS, ZERO, np.uint8))
    frames = frames_of(reader)
    assert reasons(*rebuilt(reader, frames)) == []
    frames[1] = encoded(bytes(codec.decode(frames[1], int(reader.section_at(0).frames["content"][1]))))
    told = "a frame of zeros is not in its one form"
    assert [reason for _, reason in reasons(*rebuilt(reader, frames))] == [told]
