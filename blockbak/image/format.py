"""Every magic, struct and limit of the image format, and nothing else. Prose: docs/format.md.

An image is a sequence of zstd frames (RFC 8878) and skippable frames, without gaps:
header, then per section its frames and its section record, then closing record, then seek table.
All numbers are little-endian; all records are packed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from blockbak.errors import SourceTooLarge
from blockbak.model.extent import EXTENT, Extents
from blockbak.model.facts import Closing, Opening
from blockbak.model.hashmap import BLOCKS_PER_SECTION, DIGEST_WORDS, Rows
from blockbak.units import GIB, KIB, MIB, TIB

FORMAT_VERSION = 1
KNOWN_FEATURES = 0
"""Incompatible-feature bits this program understands: none are assigned yet."""

ZSTD_MAGIC = 0xFD2FB528
HEADER_MAGIC = 0x184D2A50
PADDING_MAGIC = 0x184D2A51
SECTION_MAGIC = 0x184D2A52
CLOSING_MAGIC = 0x184D2A53
SEEK_TABLE_MAGIC = 0x184D2A5E
"""Skippable frame of the zstd seekable format 0.1.0; the others are free for use (RFC 8878, 3.1.2)."""
SEEKABLE_MAGIC = 0x8F92EAB1

HEADER_BYTES = 4096
SIGNATURE_HEADER = b"blockbak"
SIGNATURE_SECTION = b"bbsectio"
SIGNATURE_CLOSING = b"bbclosin"

BLOCK_MIN = 4 * KIB
BLOCK_MAX = 1 * MIB
BLOCK_DEFAULT = 64 * KIB
WINDOW_MIN = 256 * KIB
WINDOW_MAX = 1 * MIB
ZERO_FRAME_MAX = 16 * MIB
FRAME_DIGEST_BYTES = 16
CHECKSUM_BYTES = 4
"""The zstd checksum at the end of a frame of data."""
SEEK_ENTRIES_MAX = 2**27
DEVICE_MAX = 120 * TIB
"""Keeps the seek table of a volume without a zero block below SEEK_ENTRIES_MAX."""

SKIPPABLE = np.dtype([("magic", "<u4"), ("length", "<u4")])
"""Start of every skippable frame; ``length`` counts what follows these 8 bytes."""

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),
        ("signature", "S8"),
        ("version", "<u2"),
        ("reserved", "<u2"),
        ("json_bytes", "<u4"),
        ("features", "<u8"),
    ]
)
"""Then ``json_bytes`` of JSON, zeros up to byte 4064, and the SHA-256 of the 4064 bytes before it."""

SECTION = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),
        ("signature", "S8"),
        ("number", "<u4"),
        ("rows", "<u4"),
        ("extents", "<u4"),
        ("frames", "<u4"),
    ]
)
"""Then the digest rows (32 bytes each), the extents, the frame records."""

FRAME = np.dtype(
    [
        ("window", "<u4"),
        ("content", "<u4"),
        ("stored", "<u4"),
        ("offset", "<u8"),
        ("checksum", "<u4"),
        ("digest", "V16"),
    ]
)
"""``window`` is counted from the volume's start; ``digest``: 16 bytes of BLAKE3 over the stored bytes;
``checksum``: the zstd checksum with which a frame of data ends, 0 for zeros. It binds the content to the
index for readers that can compute SHA-256 and have zstd, but no BLAKE3.
"""

CLOSING = np.dtype(
    [
        ("magic", "<u4"),
        ("length", "<u4"),
        ("signature", "S8"),
        ("json_bytes", "<u4"),
        ("sections", "<u4"),
        ("header_sha256", "V32"),
    ]
)
"""Then ``json_bytes`` of JSON, the section list, and the SHA-256 of all bytes of the record before it."""

SECTION_ENTRY = np.dtype(
    [
        ("number", "<u4"),
        ("length", "<u4"),
        ("offset", "<u8"),
        ("map_digest", "V32"),
        ("sha256", "V32"),
    ]
)
"""``length`` and ``sha256`` are of the whole section record, its first 8 bytes included."""

SEEK_ENTRY = np.dtype([("stored", "<u4"), ("content", "<u4")])
SEEK_FOOTER = np.dtype([("entries", "<u4"), ("descriptor", "u1"), ("magic", "<u4")])

ROW_BYTES = 32
SHA256_BYTES = 32
PADDING_MIN = SKIPPABLE.itemsize

RECORDS = {
    "HEADER": HEADER,
    "SECTION": SECTION,
    "EXTENT": EXTENT,
    "FRAME": FRAME,
    "CLOSING": CLOSING,
    "SECTION_ENTRY": SECTION_ENTRY,
    "SEEK_ENTRY": SEEK_ENTRY,
    "SEEK_FOOTER": SEEK_FOOTER,
    "SKIPPABLE": SKIPPABLE,
}
"""Every packed record by its name in docs/format.md."""

Frames = npt.NDArray[np.void]
SectionList = npt.NDArray[np.void]
SeekTable = npt.NDArray[np.void]
_T = TypeVar("_T")


class FormatError(ValueError):
    """Bytes that are not what the format demands. The caller adds the file's name."""


class NewerImage(ValueError):
    """A sound record of a version or with a feature this program does not know."""


def window_for(device_bytes: int, block_bytes: int) -> int:
    """Bytes of a volume's window: it grows with the volume to bound the seek table.

    Raises SourceTooLarge where no window would do.
    """
    if device_bytes > DEVICE_MAX:
        raise SourceTooLarge(path="The source", size=device_bytes, limit=DEVICE_MAX)
    window = WINDOW_MIN if device_bytes <= 16 * TIB else 2 * WINDOW_MIN if device_bytes <= 32 * TIB else WINDOW_MAX
    return max(window, block_bytes)


def sha256(data: bytes | memoryview) -> bytes:
    """SHA-256: for metadata, so that the standard library alone can check it."""
    return hashlib.sha256(data).digest()


# --- zero frames and padding -----------------------------------------------------------------

_RLE_BLOCK = 128 * KIB


def zero_frame(length: int) -> bytes:
    """The one zstd frame that stands for ``length`` zero bytes.

    RFC 8878, 3.1.1: descriptor 0x80 (4-byte content size, no checksum, no single segment), window
    descriptor 0x38 (128 KiB), then RLE blocks of zero, 128 KiB each, the last marked and perhaps short.
    """
    full, rest = divmod(length, _RLE_BLOCK)
    sizes = [_RLE_BLOCK] * full + ([rest] if rest else [])
    blocks = [(size << 3 | 1 << 1).to_bytes(3, "little") + b"\0" for size in sizes[:-1]]
    blocks.append((sizes[-1] << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0")
    head = ZSTD_MAGIC.to_bytes(4, "little") + b"\x80\x38" + length.to_bytes(4, "little")
    return head + b"".join(blocks)


def zero_frame_sizes(length: int, window_bytes: int) -> list[int]:
    """How a run of ``length`` zero bytes is cut into frames: powers of two from one window up to
    ``ZERO_FRAME_MAX``, largest first; what is left (at the volume's end only) is one odd frame.
    """
    sizes = []
    size = ZERO_FRAME_MAX
    while length >= window_bytes:
        if length >= size:
            sizes.append(size)
            length -= size
        else:
            size //= 2
    return [*sizes, length] if length else sizes


def padding(length: int) -> bytes:
    """A padding frame of ``length`` bytes in all, at least ``PADDING_MIN``."""
    head = np.array((PADDING_MAGIC, length - PADDING_MIN), SKIPPABLE)
    return head.tobytes() + bytes(length - PADDING_MIN)


# --- header ------------------------------------------------------------------------------------


def _decode(data: bytes, kind: type[_T], what: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{what} cannot be parsed: {error}") from error


def pack_header(opening: Opening) -> bytes:
    """The first HEADER_BYTES of an image."""
    text = msgspec.json.encode(opening)
    room = HEADER_BYTES - HEADER.itemsize - SHA256_BYTES
    if len(text) > room:
        raise FormatError(f"the header needs {len(text)} bytes of {room}")
    head = np.zeros((), HEADER)
    head["magic"], head["length"] = HEADER_MAGIC, HEADER_BYTES - SKIPPABLE.itemsize
    head["signature"], head["version"] = SIGNATURE_HEADER, FORMAT_VERSION
    head["json_bytes"] = len(text)
    body = (head.tobytes() + text).ljust(HEADER_BYTES - SHA256_BYTES, b"\0")
    return body + sha256(body)


def unpack_header(data: bytes) -> Opening:
    """The values of a header. Raises FormatError, or NewerImage once the digest has proved it whole."""
    if len(data) != HEADER_BYTES:
        raise FormatError("the file is shorter than a header")
    if sha256(data[:-SHA256_BYTES]) != data[-SHA256_BYTES:]:
        raise FormatError("the header's digest does not match")
    head = np.frombuffer(data, HEADER, 1)[0]
    if head["magic"] != HEADER_MAGIC or head["signature"] != SIGNATURE_HEADER:
        raise FormatError("this is not a blockbak image")
    if head["version"] != FORMAT_VERSION:
        raise NewerImage(f"format version {head['version']}, this program knows {FORMAT_VERSION}")
    if int(head["features"]) & ~KNOWN_FEATURES:
        raise NewerImage(f"feature bits {int(head['features']):#x}")
    end = HEADER.itemsize + int(head["json_bytes"])
    if end > HEADER_BYTES - SHA256_BYTES:
        raise FormatError("the header's text is too long")
    opening = _decode(data[HEADER.itemsize : end], Opening, "the header")
    if flaw := _opening_flaw(opening):
        raise FormatError(flaw)
    return opening


def _opening_flaw(opening: Opening) -> str | None:
    block, window = opening.block_bytes, opening.window_bytes
    if not (BLOCK_MIN <= block <= BLOCK_MAX) or block & (block - 1):
        return f"the header names a block size of {block}"
    if not (max(WINDOW_MIN, block) <= window <= WINDOW_MAX) or window & (window - 1):
        return f"the header names a window size of {window}"
    if not 0 < opening.device_bytes <= DEVICE_MAX:
        return f"the header names a device of {opening.device_bytes} bytes"
    if (opening.kind == "full") != (opening.parent is None) or (opening.parent is None) != (
        opening.parent_root is None
    ):
        return "the header's kind and parent contradict each other"
    return None


# --- sections -----------------------------------------------------------------------------------


def pack_section(number: int, rows: Rows, extents: Extents, frames: Frames) -> bytes:
    """One section record. ``rows`` are those of the blocks that hold stored bytes, in order."""
    head = np.zeros((), SECTION)
    body = b"".join((rows.astype("<u8", copy=False).tobytes(), extents.tobytes(), frames.tobytes()))
    head["magic"] = SECTION_MAGIC
    head["length"] = SECTION.itemsize - SKIPPABLE.itemsize + len(body)
    head["signature"], head["number"] = SIGNATURE_SECTION, number
    head["rows"], head["extents"], head["frames"] = len(rows), len(extents), len(frames)
    return head.tobytes() + body


@dataclass(frozen=True, slots=True)
class SectionRecord:
    """A section as stored: digest rows ``(n, 4)`` uint64, extents (volume bytes), frame records."""

    number: int
    rows: Rows
    extents: Extents
    frames: Frames


def unpack_section(data: bytes) -> SectionRecord:
    """The parts of a section record. Raises FormatError where the lengths do not add up."""
    if len(data) < SECTION.itemsize:
        raise FormatError("a section is too short")
    head = np.frombuffer(data, SECTION, 1)[0]
    if head["magic"] != SECTION_MAGIC or head["signature"] != SIGNATURE_SECTION:
        raise FormatError("a section does not begin as one")
    rows, extents, frames = int(head["rows"]), int(head["extents"]), int(head["frames"])
    parts = (rows * ROW_BYTES, extents * EXTENT.itemsize, frames * FRAME.itemsize)
    if SECTION.itemsize + sum(parts) != len(data) or int(head["length"]) != len(data) - SKIPPABLE.itemsize:
        raise FormatError("a section's length does not match its counts")
    at = SECTION.itemsize
    row_table = np.frombuffer(data, "<u8", rows * DIGEST_WORDS, at).reshape(rows, DIGEST_WORDS)
    at += parts[0]
    extent_table = np.frombuffer(data, EXTENT, extents, at)
    return SectionRecord(
        int(head["number"]), row_table, extent_table, np.frombuffer(data, FRAME, frames, at + parts[1])
    )


# --- closing record ---------------------------------------------------------------------------


def pack_closing(closing: Closing, header: bytes, sections: SectionList) -> bytes:
    """The closing record; ``header`` are the image's first HEADER_BYTES."""
    text = msgspec.json.encode(closing.as_json())
    head = np.zeros((), CLOSING)
    size = CLOSING.itemsize + len(text) + sections.nbytes + SHA256_BYTES
    head["magic"], head["length"] = CLOSING_MAGIC, size - SKIPPABLE.itemsize
    head["signature"], head["json_bytes"], head["sections"] = SIGNATURE_CLOSING, len(text), len(sections)
    head["header_sha256"] = np.void(sha256(header))
    body = head.tobytes() + text + sections.tobytes()
    return body + sha256(body)


def closing_begin(length: int) -> bytes:
    """How a closing record of ``length`` bytes in all begins: its magic, and the length once more."""
    return np.array((CLOSING_MAGIC, length - SKIPPABLE.itemsize), SKIPPABLE).tobytes()


@dataclass(frozen=True, slots=True)
class ClosingRecord:
    """A closing record as stored."""

    closing: Closing
    header_sha256: bytes
    sections: SectionList


def unpack_closing(data: bytes) -> ClosingRecord:
    """The parts of a closing record. Raises FormatError."""
    if len(data) < CLOSING.itemsize + SHA256_BYTES:
        raise FormatError("the closing record is too short")
    if sha256(data[:-SHA256_BYTES]) != data[-SHA256_BYTES:]:
        raise FormatError("the closing record's digest does not match")
    head = np.frombuffer(data, CLOSING, 1)[0]
    if head["magic"] != CLOSING_MAGIC or head["signature"] != SIGNATURE_CLOSING:
        raise FormatError("the closing record does not begin as one")
    json_end = CLOSING.itemsize + int(head["json_bytes"])
    size = json_end + int(head["sections"]) * SECTION_ENTRY.itemsize + SHA256_BYTES
    if size != len(data) or int(head["length"]) != size - SKIPPABLE.itemsize:
        raise FormatError("the closing record's length does not match its counts")
    closing = _decode(data[CLOSING.itemsize : json_end], Closing, "the closing record")
    sections = np.frombuffer(data, SECTION_ENTRY, int(head["sections"]), json_end)
    return ClosingRecord(closing, bytes(head["header_sha256"]), sections)


# --- seek table ---------------------------------------------------------------------------------


def seek_table_ends(entries: int) -> tuple[bytes, bytes]:
    """What stands before and after the entries of a seek table (no checksums, descriptor 0)."""
    size = entries * SEEK_ENTRY.itemsize + SEEK_FOOTER.itemsize
    head = np.array((SEEK_TABLE_MAGIC, size), SKIPPABLE)
    footer = np.array((entries, 0, SEEKABLE_MAGIC), SEEK_FOOTER)
    return head.tobytes(), footer.tobytes()


def seek_table_bytes(entries: int) -> int:
    """How long a seek table of so many entries is in the file."""
    return SKIPPABLE.itemsize + entries * SEEK_ENTRY.itemsize + SEEK_FOOTER.itemsize


assert BLOCKS_PER_SECTION * BLOCK_MIN >= ZERO_FRAME_MAX  # noqa: S101 - a frame never crosses a section
assert BLOCKS_PER_SECTION * BLOCK_MAX == 4 * GIB  # noqa: S101 - sections stay a multiple of the window
