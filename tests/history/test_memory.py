"""Nothing grows with the volume but the image: volumes of tebibytes in a memory of 128 MiB."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.units import GIB, MIB, TIB
from tests import children
from tests.children import Measured
from tests.doubles import new_repository

LIMIT = 128 * MIB
PIECE = 4096


@dataclass
class Giant:
    """A sparse source, and what was written where."""

    folder: Path
    size: int
    dice: random.Random
    written: dict[int, bytes]
    tell: object

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def path(self) -> Path:
        return self.folder / "repository"

    def scatter(self, count: int) -> None:
        """Little data at many places; always something in the last bytes."""
        places = [self.dice.randrange(self.size - PIECE) for _ in range(count - 1)]
        with self.source.open("r+b") as file:
            for at in [*places, self.size - 1000]:
                data = self.dice.randbytes(min(PIECE, self.size - at))
                file.seek(at)
                file.write(data)
                self.written = {
                    place: old
                    for place, old in self.written.items()
                    if place + len(old) <= at or at + len(data) <= place
                }
                self.written[at] = data

    def run(self, what: str, *words: object) -> Measured:
        done = children.measure(self.path, *words)
        assert done.code == 0, (what, done)
        self.tell(f"{what}: seconds", round(done.seconds, 2))
        self.tell(f"{what}: CPU seconds", round(done.cpu_seconds, 2))
        self.tell(f"{what}: peak MiB", round(done.peak_bytes / MIB, 1))
        assert done.peak_bytes <= LIMIT, f"{what} took {done.peak_bytes / MIB:.1f} MiB"
        return done

    def check(self, target: Path) -> None:
        """What was written is there, nothing else is (by the blocks that the file has)."""
        assert target.stat().st_size == self.size
        with target.open("rb") as file:
            for at, data in self.written.items():
                file.seek(at)
                assert file.read(len(data)) == data, at
            # All other data of the file is zeros.
            end = 0
            while True:
                try:
                    start = os.lseek(file.fileno(), end, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                file.seek(start)
                assert end - start <= 64 * MIB
                data = bytearray(file.read(end - start))
                for at, known in self.written.items():
                    if start <= at < end:
                        data[at - start : at - start + len(known)] = bytes(len(known))
                assert not any(data), (start, end)


@pytest.fixture
def giant(tmp_path, rng, times, tell) -> Giant:
    size = times(128 * GIB, 16 * TIB - 2 * MIB) - 4096 - 1535
    found = Giant(tmp_path, size, rng, {}, tell)
    with found.source.open("xb") as made:
        made.truncate(size)
    new_repository(found.path)
    found.scatter(200)
    yield found
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_sparse_giant_needs_little_memory_and_no_time_for_its_holes(giant):
    backup = ("backup", giant.source, "--name", "giant", "--json")
    assert giant.run("full", *backup).out
    giant.scatter(40)
    giant.run("incremental", *backup)
    giant.run("list", "list", "--json")
    giant.run("show", "show", "latest", "--json")
    giant.run("synthesize", "synthesize", "giant", "--json")
    giant.run("verify", "verify", "--json")
    target = giant.folder / "target"
    giant.run("restore to a new file", "restore", "latest", target, "--no-verify", "--json")
    giant.check(target)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_reading_back_a_new_file_passes_over_its_holes(tmp_path, rng, times, tell):
    """The holes of a file that the restore has made itself hold zeros by definition."""
    size = times(96 * GIB, TIB) + 511
    giant = Giant(tmp_path, size, rng, {}, tell)
    with giant.source.open("xb") as made:
        made.truncate(size)
    new_repository(giant.path)
    giant.scatter(50)
    giant.run("full", "backup", giant.source, "--name", "giant")
    without = giant.run("restore", "restore", "latest", tmp_path / "one", "--no-verify")
    with_it = giant.run("restore and read back", "restore", "latest", tmp_path / "two")
    giant.check(tmp_path / "two")
    assert with_it.cpu_seconds < 3 * without.cpu_seconds + 2
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_volume_full_of_data_needs_no_more(tmp_path, rng, times, tell):
    """Every buffer is in use here, and every section full of digests."""
    size = times(200 * MIB, 4 * GIB) + 511
    giant = Giant(tmp_path, size, rng, {}, tell)
    block = giant.dice.randbytes(MIB)
    with giant.source.open("xb") as made:
        for number in range(size // MIB):
            made.write(number.to_bytes(8, "little") + block[8:])
        made.truncate(size)
    new_repository(giant.path)
    for compress in ("zstd", "none"):
        backup = ("backup", giant.source, "--name", compress, "--block-size", "4K", "--compress", compress)
        giant.run(f"full, {compress}", *backup)
        with giant.source.open("r+b") as file:
            for _ in range(300):
                file.seek(giant.dice.randrange(size))
                file.write(b"changed")
            file.truncate(size)
        giant.run(f"incremental, {compress}", *backup)
        giant.run(f"synthesize, {compress}", "synthesize", compress)
        giant.run(f"verify, {compress}", "verify")
        giant.run(f"restore, {compress}", "restore", f"{compress}@latest", tmp_path / "target")
        shutil.rmtree(giant.path / compress)
        (tmp_path / "target").unlink()
