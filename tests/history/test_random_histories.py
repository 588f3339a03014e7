"""Thirty points of a volume, made and merged and deleted as the dice fall; every one still held comes back,
through each door there is.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import pyzstd

from blockbak.errors import NothingToMerge, NoUsableParent, PointNeeded
from blockbak.flow import backup, delete, recover, restore, synthesize, verify
from blockbak.model.chain import Point
from blockbak.units import KIB, MIB
from tests import children
from tests.doubles import context, new_repository
from tests.volumes import SECTION, Fingerprint, Volume, difference, fingerprint

POINTS = 30
NAME = "vol"
BLOCKS = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
# No size is a multiple of a block; two cross the end of a section (4096 blocks).
SHAPES = [
    (3, 4 * KIB),
    (513, 64 * KIB),
    (4 * KIB + 1, 4 * KIB),
    (300_001, 4 * KIB),
    (5 * MIB + 4097, 16 * KIB),
    (SECTION + 37 * KIB + 3, 4 * KIB),
]


class History:
    """One volume, one repository, and what every point must be."""

    def __init__(self, folder: Path, volume: Volume, block: int, dice: random.Random, repository: Path) -> None:
        self.folder, self.volume, self.block, self.dice = folder, volume, block, dice
        self.world = context(folder / "state")
        self.repository = new_repository(repository)
        self.held: dict[str, Fingerprint] = {}
        self.made = 0

    # --- what happens ----------------------------------------------------------------------------

    def run(self) -> None:
        """Make the points."""
        while self.made < POINTS:
            self.volume.scribble(self.dice.randrange(7))
            self.back_up()
            chance = self.dice.random()
            if chance < 0.25:
                self.synthesize()
            elif chance < 0.4:
                self.delete()
            elif chance < 0.45:
                assert recover.recover(self.repository, self.world) == recover.Report()

    def points(self) -> list[Point]:
        return self.repository.volume(NAME).catalog().points

    def back_up(self) -> None:
        if self.dice.random() < 0.06:
            self.block = self.dice.choice(BLOCKS)
        kind = self.dice.choices(["auto", "incremental", "differential", "full"], [6, 4, 4, 1])[0]
        compress = self.dice.choice(["none", "zstd", "zstd:3"])
        try:
            report = self.request(kind, compress)
        except NoUsableParent:
            assert kind in ("incremental", "differential")
            report = self.request("auto", compress)
            assert report.kind == "full" or kind == "differential"
        assert report.consistency == "cold"
        assert not report.attention
        self.held[report.point] = self.volume.fingerprint
        self.made += 1

    def request(self, kind: str, compress: str) -> backup.Report:
        asked = backup.Request(str(self.volume.path), kind, name=NAME, block_bytes=self.block, compress=compress)
        return backup.backup(self.repository, asked, self.world)

    def synthesize(self) -> None:
        point = self.dice.choice(self.points()).id
        kind = self.dice.choice(["full", "full", "differential"])
        compress = self.dice.choice(["none", "zstd"])
        try:
            synthesize.synthesize(self.repository, NAME, self.world, at=point, kind=kind, compress=compress)
        except NothingToMerge:
            assert kind == "differential"

    def delete(self) -> None:
        gone = self.dice.sample(sorted(self.held), min(len(self.held) - 1, self.dice.randrange(1, 5)))
        if not gone:
            return
        try:
            delete.delete(self.repository, gone, self.world)
        except PointNeeded:
            assert [point.id for point in self.points()] == sorted(self.held)
        else:
            for point in gone:
                del self.held[point]

    # --- what must be ----------------------------------------------------------------------------

    def check(self, place: Path, *, onto: Path | None = None) -> None:
        """Every point is right, restored to a new file, to the one before it, and onto ``onto`` if there is
        one; by the rescue script; and each full by zstd.
        """
        points = self.points()
        assert [point.id for point in points] == sorted(self.held)
        report = verify.verify(self.repository, [], self.world, pick=lambda: 0.0)
        assert report.ok, [verdict for verdict in report.images if not verdict.ok]
        new, dirty = place / "new", place / "dirty"
        dirty.write_bytes(self.dice.randbytes(max(1, self.volume.size + self.dice.randint(-70_000, 70_000))))
        order = self.dice.sample(points, len(points))
        by_command = {point.id for point in order[:2]}
        for point in order:
            wanted = self.held[point.id]
            if point.id in by_command:
                done = children.run(self.repository.path, "restore", point.id, new)
                assert done.code == 0, done.err
            else:
                self.restore(point.id, new)
            self.same(new, wanted, point.id)
            new.unlink()
            self.restore(point.id, dirty)
            self.same(dirty, wanted, point.id)
            done = children.rescue(self.repository.path, "restore", point.id, new)
            assert done.code == 0, done.err
            self.same(new, wanted, point.id)
            new.unlink()
            if onto is not None:
                self.restore(point.id, onto)
                assert difference(fingerprint(onto, self.volume.size), wanted) is None, point.id
            for image in point.images:
                if image.opening.kind == "full":
                    self.by_others(Path(self.repository.path, NAME, image.file), new, wanted)
        assert not list(place.glob("*.partial"))

    def restore(self, point: str, target: Path) -> None:
        done = restore.restore(self.repository, restore.Request(point, str(target), overwrite=True), self.world)
        assert isinstance(done, restore.Report)
        assert not done.attention

    def same(self, path: Path, wanted: Fingerprint, point: str) -> None:
        assert path.stat().st_size == self.volume.size, point
        assert difference(fingerprint(path), wanted) is None, point

    def by_others(self, image: Path, new: Path, wanted: Fingerprint) -> None:
        """Stock zstd decodes a full to the device, a seekable reader any range of it."""
        with new.open("wb") as out:
            subprocess.run(["zstd", "-dcq", image], stdout=out, check=True)
        self.same(new, wanted, image.name)
        content = new.read_bytes()
        new.unlink()
        with pyzstd.SeekableZstdFile(image, "rb") as file:
            assert file.seek(0, os.SEEK_END) == len(content)
            for _ in range(8):
                start = self.dice.randrange(len(content))
                length = self.dice.randrange(1, 300 * KIB)
                file.seek(start)
                assert file.read(length) == content[start : start + length], (image.name, start, length)


def test_the_rescue_script_finds_no_blockbak():
    """Else what it restores here would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import blockbak"], cwd="/", capture_output=True, check=False
    )
    assert b"No module named 'blockbak'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("size", "block"), SHAPES, ids=[f"{size}-by-{block}" for size, block in SHAPES])
def test_every_point_of_a_random_history_comes_back(size, block, rng, times, tell, tmp_path):
    points = 0
    for number in range(times(1, 20)):
        place = tmp_path / str(number)
        place.mkdir()
        history = History(place, Volume(place / "source", size, rng), block, rng, place / "repository")
        history.run()
        history.check(place)
        points += len(history.held)
    tell("points restored", points)


@pytest.mark.slow
def test_every_point_of_a_device_comes_back_onto_a_device(loop, rng, times, tell, tmp_path):
    points = 0
    for number in range(times(1, 10)):
        place = tmp_path / str(number)
        place.mkdir()
        source = loop(9 * MIB + 512)
        target = loop(10 * MIB)
        Path(target).write_bytes(b"\xa5" * target.size)
        volume = Volume(source.path, source.size, rng, device=True)
        history = History(place, volume, 64 * KIB, rng, place / "repository")
        history.run()
        history.check(place, onto=Path(target))
        with open(target, "rb") as file:
            file.seek(source.size)
            assert file.read() == b"\xa5" * (target.size - source.size), "the rest of a larger device is not ours"
        points += len(history.held)
    tell("points restored", points)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_every_point_comes_back_where_images_share_their_blocks(kind, loop, request, rng, times, tell, tmp_path):
    points = cloned = 0
    store = request.getfixturevalue(kind)(loop(600 * MIB))
    for number in range(times(1, 10)):
        place = tmp_path / str(number)
        place.mkdir()
        volume = Volume(place / "source", times(3 * MIB, SECTION + 3 * MIB) + 255, rng)
        volume.fill(0.3)
        history = History(place, volume, 4 * KIB, rng, store.where / str(number))
        history.run()
        report = synthesize.synthesize(history.repository, NAME, history.world)
        cloned += report.cloned_bytes
        history.check(place)
        points += len(history.held)
        subprocess.run(["rm", "-rf", history.repository.path], check=True)
    tell("points restored", points)
    tell("bytes shared by the last synthetic full", cloned)
