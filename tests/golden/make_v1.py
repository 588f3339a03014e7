"""Makes the frozen repository of format version 1: `python -m tests.golden.make_v1 DIRECTORY`.

The files in `v1` were written by this program once and are never written again: they stand for what
people have on their disks. What it makes today must still restore to the same bytes; with compression
"none" it must be the same bytes itself, for no library has a say in those.

`expected.json` holds, by volume and point, the SHA-256 of what a restore yields and the ranges that could
not be read; and the SHA-256 of every file as it is with compression "none".
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from pathlib import Path

from tests.images import DIFFERENTIAL, INCREMENTAL, REPOSITORY, Shelf, state

KIB, MIB = 1024, 1024 * 1024


def _points(volume: int) -> list[str]:
    """Ids of points: unique in the repository."""
    return [f"20260102T0304{number:02}Z-{volume << 8 | number:04x}" for number in range(10)]


def _text(dice: random.Random, length: int) -> bytes:
    """Bytes that compress: words, as in a log."""
    words = [b"kernel", b"mounted", b"sda1", b"0x%04x" % dice.randrange(1 << 16), b"error", b"\n"]
    line = b"".join(dice.choice(words) + b" " for _ in range(400))
    return (line * (length // len(line) + 1))[:length]


def disk(compress: str) -> Shelf:
    """An odd size, blocks of 4 KiB: a full, an incremental, a differential, an incremental on that with
    holes and unreadable sectors, an empty delta, and synthetic fulls of two of the points.
    """
    dice, points = random.Random(1), _points(1)
    size = 3 * MIB + 1536
    now = bytearray(size)
    now[4 * KIB : 10 * KIB] = dice.randbytes(6 * KIB)
    now[256 * KIB : 300 * KIB] = _text(dice, 44 * KIB)
    now[1 * MIB : 2 * MIB] = _text(dice, MIB)
    now[1 * MIB + 8 * KIB : 1 * MIB + 28 * KIB] = dice.randbytes(20 * KIB)
    now[-1000:] = dice.randbytes(1000)
    shelf = Shelf("disk", 4 * KIB, compress)
    shelf.add(points[0], state(now))
    now[8 * KIB : 12 * KIB] = bytes(4 * KIB)
    now[2 * MIB + 3 * KIB] = 1
    shelf.add(points[1], state(now), INCREMENTAL, points[0])
    now[-1] ^= 0xFF
    now[512 * KIB : 516 * KIB] = dice.randbytes(4 * KIB)
    now[1 * MIB + 64 * KIB : 1 * MIB + 70 * KIB] = _text(dice, 6 * KIB)
    shelf.add(points[2], state(now), DIFFERENTIAL, points[0])
    # One range of sectors inside a block of data, one over whole blocks, one at the end of the volume.
    bad = [(4 * KIB + 512, 5 * KIB), (1 * MIB + 40 * KIB, 1 * MIB + 52 * KIB), (size - 512, size)]
    hole = [(1 * MIB + 256 * KIB, 1 * MIB + 768 * KIB)]
    shelf.add(points[3], state(now, hole, bad), INCREMENTAL, points[2])
    now[1 * MIB + 256 * KIB : 1 * MIB + 768 * KIB] = bytes(512 * KIB)
    # The sectors at the end can be read again.
    shelf.add(points[4], state(now, (), bad[:2]), INCREMENTAL, points[3])
    quiet = state(now)
    shelf.add(points[5], quiet, INCREMENTAL, points[2])
    shelf.add(points[6], quiet, INCREMENTAL, points[5])
    shelf.add_synthetic(points[1])
    shelf.add_synthetic(points[4])
    return shelf


def wide(compress: str) -> Shelf:
    """Several sections, nearly empty: zero frames of all sizes, sections that a delta does not have."""
    dice, points = random.Random(2), _points(2)
    now = bytearray(40 * MIB + 512)
    now[17 * MIB : 17 * MIB + 3 * KIB] = dice.randbytes(3 * KIB)
    shelf = Shelf("wide", 4 * KIB, compress)
    shelf.add(points[0], state(now))
    now[33 * MIB + 5] = 7
    shelf.add(points[1], state(now), INCREMENTAL, points[0])
    shelf.add_synthetic(points[1])
    return shelf


def large_blocks(compress: str) -> Shelf:
    """Blocks of 64 KiB."""
    dice, points = random.Random(3), _points(3)
    now = bytearray(600 * KIB + 512)
    now[500 * KIB : 508 * KIB] = dice.randbytes(8 * KIB)
    shelf = Shelf("large-blocks", 64 * KIB, compress)
    shelf.add(points[0], state(now))
    now[0:100] = dice.randbytes(100)
    shelf.add(points[1], state(now), INCREMENTAL, points[0])
    return shelf


def stored() -> Shelf:
    """Frames of raw blocks: what compression "none" writes."""
    dice, points = random.Random(4), _points(4)
    now = bytearray(30 * KIB + 512)
    now[4 * KIB : 9 * KIB] = dice.randbytes(5 * KIB)
    shelf = Shelf("stored", 4 * KIB, "none")
    shelf.add(points[0], state(now))
    now[-10:] = dice.randbytes(10)
    shelf.add(points[1], state(now), INCREMENTAL, points[0])
    return shelf


def volumes(compress: str) -> list[Shelf]:
    """All volumes of the repository."""
    return [disk(compress), wide(compress), large_blocks(compress), stored()]


def digests(shelves: list[Shelf]) -> dict[str, str]:
    """The SHA-256 of every file."""
    return {
        f"{shelf.volume}/{name}": hashlib.sha256(data).hexdigest()
        for shelf in shelves
        for name, data in shelf.files.items()
    }


def expected(shelves: list[Shelf]) -> dict[str, object]:
    """What `expected.json` holds."""
    return {
        "points": {
            shelf.volume: {
                point: {"sha256": hashlib.sha256(then.content).hexdigest(), "bad": [list(pair) for pair in then.bad]}
                for point, then in shelf.states.items()
            }
            for shelf in shelves
        },
        "stored_files": digests(volumes("none")),
    }


def main(directory: Path) -> None:
    """Write everything into a directory that is not there yet."""
    shelves = volumes("zstd:19")
    repository = directory / "repository"
    for shelf in shelves:
        shelf.write(repository)
    about = {"blockbak_repository": 1, "id": REPOSITORY, "created": "2026-01-02T03:04:05Z"}
    (repository / "repository.json").write_text(json.dumps(about, indent=2) + "\n")
    (directory / "expected.json").write_text(json.dumps(expected(shelves), indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
