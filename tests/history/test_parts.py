"""Partitions that begin and end anywhere, brought back alone from random histories of their disk."""

from __future__ import annotations

import random
import struct

import pytest

from blockbak.flow import backup, restore
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB
from tests.doubles import context, new_repository
from tests.faults import BadMedium, ShortKernel

SECTOR = 512


def table(dice, sectors):
    """Up to four partitions, in sectors, in no order and with gaps or without."""
    edges = sorted(dice.sample(range(1, sectors + 1), 8))
    if dice.random() < 0.5:
        edges[2] = edges[1]  # neighbours
    pairs = [pair for pair in zip(edges[::2], edges[1::2], strict=True) if pair[0] < pair[1]]
    dice.shuffle(pairs)
    return pairs


def written(pairs):
    """The first sector of a disk that has them."""
    sector = bytearray(510) + b"\x55\xaa"
    for number, (first, end) in enumerate(pairs):
        struct.pack_into("<B3xB3xII", sector, 446 + 16 * number, 0, 0x83, first, end - first)
    return bytes(sector)


class Disk:
    """A random disk: its file, and what each of its points must give back."""

    def __init__(self, folder, seed):
        self.dice = random.Random(seed)
        self.folder = folder
        self.path = folder / "disk.img"
        self.pairs = table(self.dice, sectors := self.dice.randrange(500, 12000))
        self.data = bytearray(sectors * SECTOR)
        self.data[:SECTOR] = written(self.pairs)
        new_repository(folder / "repo")
        self.repository = Repository(str(folder / "repo"))
        self.block = self.dice.choice((4 * KIB, 16 * KIB, 64 * KIB))
        self.held = {}

    def change(self):
        """Noise and zeros, most of it at the edges of partitions."""
        edges = [edge * SECTOR for pair in self.pairs for edge in pair]
        for _ in range(self.dice.randrange(1, 12)):
            at = self.dice.choice(edges) + self.dice.randrange(-3000, 3000)
            length = self.dice.choice((1, 600, self.block, 300 * KIB))
            at = min(max(at, SECTOR), len(self.data) - 1)
            data = self.dice.randbytes(length) if self.dice.random() < 0.7 else bytes(length)
            self.data[at : at + length] = data[: len(self.data) - at]
        self.path.write_bytes(self.data)

    def back_up(self):
        bad = []
        for _ in range(self.dice.choice((0, 0, 1, 3))):
            start = self.dice.randrange(1, len(self.data) // SECTOR) * SECTOR
            bad.append((start, min(start + self.dice.choice((1, 5, 200)) * SECTOR, len(self.data))))
        kind = self.dice.choice(("full", "incremental", "differential")) if self.held else "full"
        request = backup.Request(str(self.path), kind=kind, name="disk", block_bytes=self.block)
        made = backup.backup(self.repository, request, context(self.folder / "state", kernel=BadMedium(self.path, bad)))
        lost = bytearray(len(self.data))
        for start, end in bad:
            lost[start:end] = b"\1" * (end - start)
        self.held[made.point] = bytes(self.data), lost

    def check(self, point, number):
        """Bring a partition back onto a target in some state; it is what it was."""
        data, lost = self.held[point]
        start, end = (sector * SECTOR for sector in self.pairs[number - 1])
        expected, gone = bytearray(data[start:end]), lost[start:end]
        for at in range(0, len(gone), SECTOR):
            if gone[at]:
                expected[at : at + SECTOR] = bytes(SECTOR)
        target = self.folder / "target.img"
        target.unlink(missing_ok=True)
        state = self.dice.choice(("new", "other", "near"))
        if state == "other":
            target.write_bytes(self.dice.randbytes(self.dice.randrange(1, 2 * len(expected))))
        elif state == "near":
            near = bytearray(expected)
            for at in (0, len(near) - 1, self.dice.randrange(len(near))):
                near[at] ^= self.dice.choice((0, 1))
            target.write_bytes(near)
        kernel = ShortKernel(self.dice) if self.dice.random() < 0.3 else None
        world = context(self.folder / "state", kernel=kernel, workers=self.dice.choice((1, 3)))
        done = restore.restore(
            self.repository,
            restore.Request(point, str(target), overwrite=True, partition=number, keep_going=self.dice.random() < 0.3),
            world,
        )
        assert target.read_bytes() == expected
        assert done.flaws == []
        assert done.attention is any(gone)
        unread = bytearray(len(gone))
        for row in done.unreadable:
            unread[row["start"] : row["start"] + row["length"]] = b"\1" * row["length"]
        assert unread == gone
        assert done.plan.bad_bytes == sum(gone)


@pytest.mark.parametrize("number", range(3))
def test_every_partition_of_every_point_is_what_it_was(tmp_path, seed, times, number):
    for turn in range(times(2, 40)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        disk = Disk(folder, f"{seed} {number} {turn}")
        assert len(disk.data) < 6 * MIB
        for _ in range(3):
            disk.change()
            disk.back_up()
        for point in disk.held:
            for which in range(1, len(disk.pairs) + 1):
                try:
                    disk.check(point, which)
                except Exception as error:
                    raise AssertionError(f"partition {which} of {point}, turn {turn}, seed {seed}") from error
