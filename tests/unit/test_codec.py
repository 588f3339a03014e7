"""Frames: every level there and back, and nothing else accepted."""

from __future__ import annotations

import random
import struct
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.image import codec
from blockbak.image import format as fmt
from blockbak.units import KIB, MIB

LEVELS = ["none", "zstd", *(f"zstd:{level}" for level in range(codec.LEVEL_MIN, codec.LEVEL_MAX + 1))]


def frame_of(compress, content):
    return b"".join(bytes(part) for part in codec.encoder(compress).encode(memoryview(content)))


def some(size, seed=0):
    """Bytes of which half can be compressed."""
    dice = random.Random(f"{size} {seed}")
    return b"".join(dice.randbytes(64) + bytes(64) for _ in range(-(-size // 128)))[:size]


@pytest.mark.parametrize("compress", LEVELS)
@pytest.mark.parametrize("size", [1, 511, 4 * KIB, 128 * KIB - 1, 128 * KIB, 128 * KIB + 1, 256 * KIB + 77, MIB])
def test_round_trip(compress, size):
    content = some(size)
    frame = frame_of(compress, content)
    assert codec.frame_header_flaw(frame, size) is None
    assert codec.decode(frame, size) == content
    assert codec.decode(memoryview(frame), size) == content


@pytest.mark.parametrize("compress", ["none", "zstd", "zstd:19"])
def test_stock_zstd_reads_a_frame(compress):
    content = some(300 * KIB)
    done = subprocess.run(["zstd", "-dc"], input=frame_of(compress, content), capture_output=True, check=True)
    assert done.stdout == content


def test_one_encoder_makes_many_frames():
    encoder = codec.encoder("zstd")
    for seed in range(5):
        content = some(1000, seed)
        assert codec.decode(b"".join(encoder.encode(memoryview(content))), 1000) == content


def test_stored_frames_hold_views_not_copies():
    content = bytearray(some(256 * KIB))
    parts = codec.encoder("none").encode(memoryview(content))
    views = [part for part in parts if isinstance(part, memoryview)]
    assert [len(view) for view in views] == [128 * KIB, 128 * KIB]
    assert all(view.obj is content for view in views)
    assert sum(map(len, parts)) == len(content) + 9 + 2 * 3 + 4


@pytest.mark.parametrize("compress", ["none", "zstd"])
@given(data=st.binary(min_size=1, max_size=300), more=st.binary(min_size=1, max_size=20))
def test_nothing_may_follow_a_frame(compress, data, more):
    frame = frame_of(compress, data)
    for appended in (more, frame, fmt.padding(8), fmt.zero_frame(100)):
        with pytest.raises(fmt.FormatError):
            codec.decode(frame + appended, len(data))
    with pytest.raises(fmt.FormatError):
        codec.decode(frame + frame, 2 * len(data))


@pytest.mark.parametrize("compress", ["none", "zstd"])
@given(data=st.binary(min_size=1, max_size=300), cut=st.integers(1, 400))
def test_no_part_of_a_frame_may_be_missing(compress, data, cut):
    frame = frame_of(compress, data)
    with pytest.raises(fmt.FormatError):
        codec.decode(frame[: max(len(frame) - cut, 0)], len(data))


@pytest.mark.parametrize("compress", ["none", "zstd"])
@given(data=st.binary(min_size=2, max_size=300), claim=st.integers(1, 400))
def test_the_content_has_the_size_that_is_claimed(compress, data, claim):
    frame = frame_of(compress, data)
    if claim != len(data):
        with pytest.raises(fmt.FormatError):
            codec.decode(frame, claim)
        assert codec.frame_header_flaw(frame, claim)


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_flipped_bit_in_content_or_checksum_is_noticed(compress):
    content = random.Random(1).randbytes(600)
    frame = bytearray(frame_of(compress, content))
    for at in range(12, len(frame)):
        frame[at] ^= 0x10
        with pytest.raises(fmt.FormatError):
            codec.decode(bytes(frame), len(content))
        frame[at] ^= 0x10


def test_header_flaws_are_named():
    content = some(5000)
    good = bytearray(frame_of("none", content))
    assert codec.frame_header_flaw(bytes(good), 5000) is None
    no_checksum, reserved, unused, dictionary = bytearray(good), bytearray(good), bytearray(good), bytearray(good)
    no_checksum[4] &= ~0x04
    reserved[4] |= 0x08
    unused[4] |= 0x10
    dictionary[4] |= 0x01
    assert "checksum" in codec.frame_header_flaw(bytes(no_checksum), 5000)
    for flawed in (reserved, unused, dictionary):
        assert "flags" in codec.frame_header_flaw(bytes(flawed), 5000)
    assert "begin" in codec.frame_header_flaw(b"x" + bytes(good[1:]), 5000)
    assert "begin" in codec.frame_header_flaw(bytes(good[:8]), 5000)
    assert "begin" in codec.frame_header_flaw(fmt.padding(64), 5000)
    # Single segment with a content size of one byte, and without any: descriptor 0x04 has neither.
    unsized = struct.pack("<IBB", fmt.ZSTD_MAGIC, 0x04, 0x50) + bytes(8)
    assert "content size" in codec.frame_header_flaw(unsized, 5000)


@pytest.mark.parametrize(
    "name", ["", "lz4", "zstd:", "zstd:0", "zstd:20", "zstd:-1", "zstd:1.5", "zstd:x", "none:1", "ZSTD"]
)
def test_what_is_no_compression(name):
    with pytest.raises(ValueError, match=r"compression|levels"):
        codec.encoder(name)
