"""A part of a volume lies on its target as the volume has it, wherever in the volume it begins and ends."""

import os

import numpy as np
import pytest

from blockbak.errors import TargetFailed
from blockbak.host.blockio import PAGE, TargetWriter, aligned
from blockbak.host.placed import PlacedTarget
from blockbak.model.part import Part
from blockbak.units import KIB, MIB, align_up

pytestmark = pytest.mark.root

SPARE = 64 * KIB
"""The target is larger by so much: that stays as it was."""
OLD = 0xA5
PARTS = [
    Part(0, 3 * MIB + 512, 1),
    Part(63 * 512, 2 * MIB + 7 * 512, 1),
    Part(1 * MIB, 1 * MIB, 1),
    Part(34 * 512, 3 * 512, 1),
    Part(12 * KIB, 1 * MIB + 4 * KIB, 1),
    Part(1000, 1 * MIB + 77, 1),
]
VOLUME = 4 * MIB
PIECE = 1 * MIB


@pytest.fixture(params=["file", "loop device, 512", "loop device, 4096"])
def target(request, tmp_path):
    """``target(size)`` is full of something else."""

    def make(size):
        if request.param == "file":
            path = tmp_path / "target.img"
            path.write_bytes(bytes([OLD]) * size)
            return str(path)
        sector = int(request.param[-4:].strip(", "))
        file = tmp_path / "disk.img"
        file.write_bytes(bytes([OLD]) * size)
        return str(request.getfixturevalue("loop")(size, sector, file=file))

    return make


def content(path, size):
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read(size)


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_pieces_of_the_volume_come_to_lie_where_the_part_has_them(target, part, rng):
    volume = rng.randbytes(VOLUME)
    size = align_up(part.length, 4096) + SPARE
    path = target(size)
    zeroed = range(part.start + part.length // 3, part.start + part.length // 2)
    with TargetWriter(path) as writer:
        placed = PlacedTarget(writer, part)
        assert placed.end == part.start + size
        written = 0
        for at in range(0, VOLUME, PIECE):
            data = aligned(PIECE)
            data[:] = np.frombuffer(volume, np.uint8)[at : at + PIECE]
            written += placed.write(at, data)
        assert written == part.length
        assert placed.zero(zeroed.start, len(zeroed)) == len(zeroed)
        placed.flush()
        held = bytearray(volume)
        held[zeroed.start : zeroed.stop] = bytes(len(zeroed))
        for at in range(0, VOLUME, PIECE):
            into = aligned(PIECE + PAGE)
            placed.read(at, into, PIECE)
            low, high = part.within(at, at + PIECE)
            assert into[low - at : high - at].tobytes() == held[low:high]
    found = content(path, size)
    assert found[: part.length] == held[part.start : part.end]
    assert found[part.length :] == bytes([OLD]) * (size - part.length)


def test_a_target_that_ends_too_early_is_an_error(target):
    with TargetWriter(target(64 * KIB)) as writer:
        placed = PlacedTarget(writer, Part(512, 128 * KIB, 1))
        with pytest.raises(TargetFailed):
            placed.read(0, aligned(256 * KIB), 256 * KIB)
