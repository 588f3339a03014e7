"""One window's content to one zstd frame and back."""

from __future__ import annotations

import sys
from typing import Protocol, TypeAlias

import xxhash

from blockbak.image.format import ZSTD_MAGIC, FormatError
from blockbak.units import KIB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Buffer: TypeAlias = bytes | memoryview

LEVEL_DEFAULT = 1
LEVEL_MIN, LEVEL_MAX = 1, 19
"""Levels above 19 may ask for windows that small decoders refuse."""

_RAW_BLOCK = 128 * KIB


class Encoder(Protocol):
    """Makes frames; one per thread."""

    def encode(self, content: memoryview) -> list[Buffer]:
        """One frame with content size and checksum, as consecutive buffers.

        The buffers may be views of ``content``: write them before it changes.
        """


class ZstdEncoder:
    """Frames compressed at one level."""

    def __init__(self, level: int = LEVEL_DEFAULT) -> None:
        keys = zstd.CompressionParameter
        self._compressor = zstd.ZstdCompressor(
            options={
                keys.compression_level: level,
                keys.checksum_flag: 1,
                keys.content_size_flag: 1,
                keys.dict_id_flag: 0,
            }
        )

    def encode(self, content: memoryview) -> list[Buffer]:
        """One frame with content size and checksum, in one buffer of its own."""
        return [self._compressor.compress(content, zstd.ZstdCompressor.FLUSH_FRAME)]


class StoreEncoder:
    """Frames of raw blocks: valid zstd, nothing compressed, nothing copied.

    RFC 8878, 3.1.1: descriptor 0xA4 (4-byte content size, single segment, checksum), raw blocks of at
    most 128 KiB, then the low 4 bytes of XXH64 of the content.
    """

    def encode(self, content: memoryview) -> list[Buffer]:
        """One frame; all but its heads and checksum are views of ``content``."""
        size = len(content)
        parts: list[Buffer] = [ZSTD_MAGIC.to_bytes(4, "little") + b"\xa4" + size.to_bytes(4, "little")]
        for start in range(0, size, _RAW_BLOCK):
            end = min(start + _RAW_BLOCK, size)
            parts += [((end - start) << 3 | (end == size)).to_bytes(3, "little"), content[start:end]]
        checksum = xxhash.xxh64_intdigest(content) & 0xFFFFFFFF
        return [*parts, checksum.to_bytes(4, "little")]


def encoder(compress: str) -> Encoder:
    """The encoder for ``none``, ``zstd`` or ``zstd:LEVEL``. Raises ValueError for anything else."""
    if compress == "none":
        return StoreEncoder()
    name, _, level = compress.partition(":")
    if name != "zstd" or (level and not level.isdecimal()) or compress.endswith(":"):
        raise ValueError(f"not a compression: {compress!r}")
    number = int(level) if level else LEVEL_DEFAULT
    if not LEVEL_MIN <= number <= LEVEL_MAX:
        raise ValueError(f"zstd levels go from {LEVEL_MIN} to {LEVEL_MAX}")
    return ZstdEncoder(number)


def decode(frame: Buffer, content_bytes: int) -> bytes:
    """The content of exactly one frame. Raises FormatError if it is not, or not of that size."""
    decompressor = zstd.ZstdDecompressor()
    try:
        content = decompressor.decompress(frame, content_bytes)
        # A frame's checksum may still wait behind its last byte of content.
        if not decompressor.eof and len(content) == content_bytes:
            content += decompressor.decompress(b"", 1)
    except zstd.ZstdError as error:
        raise FormatError(f"a frame does not decompress ({error})") from error
    if len(content) != content_bytes or not decompressor.eof or decompressor.unused_data:
        raise FormatError("a frame does not hold what its record says")
    return content


def frame_header_flaw(frame: Buffer, content_bytes: int) -> str | None:
    """What a DATA frame's header lacks of what the format demands, or None.

    RFC 8878, 3.1.1.1: descriptor bit 2 is the checksum flag, bits 3 and 4 must be zero, bits 0 and 1 the
    dictionary id's size.
    """
    if len(frame) < 9 or int.from_bytes(frame[:4], "little") != ZSTD_MAGIC:
        return "a frame does not begin as one"
    descriptor = frame[4]
    if not descriptor & 0x04:
        return "a frame has no checksum"
    if descriptor & 0x1B:
        return "a frame has unknown flags or a dictionary"
    try:
        size = zstd.get_frame_info(frame).decompressed_size
    except zstd.ZstdError as error:
        return f"a frame's header is not valid ({error})"
    return None if size == content_bytes else "a frame's content size differs from its record"
