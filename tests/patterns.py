"""Data that says where it belongs: every 512-byte sector names itself.

A sector holds, little-endian::

    0    8   b"BBSECTOR"
    8    8   sector number
    16   8   sequence: which writing of the sector this is
    24   8   seed: which volume, or which run
    32   4   CRC-32 of the 32 bytes before
    36   4   zero
    40   472 noise that follows from number, sequence and seed

A wrong sector therefore tells what it is instead (another sector, an older writing, another
volume, zeros), and one wrong byte anywhere in it is noticed. The noise does not compress, as
most data that is worth a backup does not.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

SECTOR = 512
MAGIC = b"BBSECTOR"

_HEAD = np.dtype(
    [
        ("magic", "S8"),
        ("sector", "<u8"),
        ("sequence", "<u8"),
        ("seed", "<u8"),
        ("crc", "<u4"),
        ("zero", "<u4"),
        ("noise", "<u8", (59,)),
    ]
)
_CRC_OFFSET = 32

_CRC_TABLE = np.zeros(256, dtype=np.uint32)
for _byte in range(256):
    _value = _byte
    for _ in range(8):
        _value = (_value >> 1) ^ (0xEDB88320 if _value & 1 else 0)
    _CRC_TABLE[_byte] = _value

_STEPS = np.arange(1, 60, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def stamp(start_sector: int, count: int, sequence: int | NDArray[np.uint64], seed: int) -> bytes:
    """``count`` sectors as they belong at ``start_sector``.

    ``sequence`` is one number for all of them, or an array of ``count``.
    """
    return _stamped(start_sector, count, sequence, seed).tobytes()


def explain(data: bytes | memoryview, start_sector: int, sequence: int | NDArray[np.uint64], seed: int) -> str | None:
    """What is wrong with the first sector that is not as ``stamp`` makes it; None if all are.

    ``data`` is what was read at ``start_sector``.
    """
    if len(data) % SECTOR:
        return f"{len(data)} bytes are not whole sectors"
    found = np.frombuffer(data, dtype=_HEAD)
    expected = _stamped(start_sector, len(found), sequence, seed)
    rows = found.view(np.uint8).reshape(-1, SECTOR), expected.view(np.uint8).reshape(-1, SECTOR)
    wrong = (rows[0] != rows[1]).any(axis=1)
    if not wrong.any():
        return None
    at = int(wrong.argmax())
    return f"sector {start_sector + at} {_difference(found[at], expected[at])}"


def _stamped(start_sector: int, count: int, sequence: int | NDArray[np.uint64], seed: int) -> NDArray[np.void]:
    sectors = np.zeros(count, dtype=_HEAD)
    sectors["magic"] = MAGIC
    sectors["sector"] = np.arange(start_sector, start_sector + count, dtype=np.uint64)
    sectors["sequence"] = sequence
    sectors["seed"] = seed
    head = sectors.view(np.uint8).reshape(count, SECTOR)[:, :_CRC_OFFSET]
    sectors["crc"] = _crc32(head)
    origin = _mix(_mix(_mix(sectors["sector"]) ^ sectors["sequence"]) ^ sectors["seed"])
    sectors["noise"] = _mix(origin[:, None] + _STEPS)
    return sectors


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: equal words stay equal, near ones get far apart."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _crc32(rows: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """``zlib.crc32`` of every row at once: byte by byte along the rows, all rows in step."""
    crc = np.full(len(rows), 0xFFFFFFFF, dtype=np.uint32)
    for column in rows.T:
        crc = _CRC_TABLE[(crc ^ column) & 0xFF] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def _difference(found: np.void, expected: np.void) -> str:
    """What ``found`` is, in the words that tell most; the two are known to differ."""
    raw, right = found.tobytes(), expected.tobytes()
    if not any(raw):
        return f"is all zeros, expected sequence {expected['sequence']}"
    if found["magic"] != MAGIC:
        return f"carries no stamp (it begins {raw[:8].hex(' ')}), expected sequence {expected['sequence']}"
    if zlib.crc32(raw[:_CRC_OFFSET]) != found["crc"]:
        return "has a damaged stamp: its checksum does not fit"
    if found["seed"] != expected["seed"]:
        return f"belongs to seed {found['seed']}, expected seed {expected['seed']}"
    if found["sector"] != expected["sector"]:
        return f"holds sector {found['sector']}, sequence {found['sequence']}"
    if found["sequence"] != expected["sequence"]:
        return f"holds sequence {found['sequence']}, expected {expected['sequence']}"
    at = next(i for i in range(SECTOR) if raw[i] != right[i])
    return f"differs at byte {at}: {raw[at]:#04x}, expected {right[at]:#04x}"
