"""Ninety days of a job on a real device, with crashes and full disks: what the policy promises is there and nothing
else, and what ``status`` says is so on every day.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from blockbak.flow import recover, restore, status, verify
from blockbak.flow.jobs import load
from blockbak.host.kernel import Kernel
from blockbak.units import KIB, MIB
from tests.doubles import Killed
from tests.faults import QuickKernel, QuickMortal
from tests.machine import Machine
from tests.patterns import SECTOR, stamp
from tests.scene import open_descriptors

DAYS = 90
SIZE = 2 * MIB
SEED = 7
RPO = timedelta(hours=36)
JOB = """schedule = "daily at 02:00"
name = "web"
block_size = "4K"
full = "monthly"
differential = "weekly on sun"
rpo = "36h"
"""
LAST, PERIODS = 2, {"%Y-%m-%d": 5, "%G-%V": 3, "%Y-%m": 2}
RETENTION = """[jobs.web.retention]
keep_last = 2
keep_daily = 5
keep_weekly = 3
keep_monthly = 2
full_every = "30d"
"""


def promised(points: list[str]) -> set[str]:
    """What the policy keeps of all points that ever were, by their ids."""
    newest_first = sorted(points, reverse=True)
    kept = set(newest_first[:LAST])
    for form, most in PERIODS.items():
        found: dict[str, str] = {}
        for point in newest_first:
            found.setdefault(f"{datetime.strptime(point[:15], '%Y%m%dT%H%M%S'):{form}}", point)  # noqa: DTZ007 - UTC
        kept |= set(list(found.values())[:most])
    return kept


class Days:
    """A machine on which things go wrong, what its device held on each day, and what was seen of its points."""

    def __init__(self, place: Path, device: os.PathLike[str]) -> None:
        self.machine = Machine(place)
        self.machine.source.unlink()
        self.machine.source = Path(device)
        self.machine.configure(JOB, RETENTION)
        self.held: dict[str, bytes] = {}
        self.ever: set[str] = set()
        self.failed: bool | None = False

    @property
    def folder(self) -> Path:
        return Path(self.machine.repository.path, "web")

    @property
    def points(self) -> set[str]:
        return {path.name[:21] for path in self.folder.glob("*.json")}

    def edit(self, day: int, count: int, place: Callable[[int], int]) -> None:
        """The day's changes; the device's bytes are noted."""
        with self.machine.source.open("r+b") as file:
            for _ in range(count):
                sector = place(SIZE // SECTOR - 32)
                file.seek(sector * SECTOR)
                file.write(stamp(sector, 32, day + 2, SEED))
        self.held[f"{self.machine.now:%Y%m%d}"] = self.machine.source.read_bytes()

    def run(self, kernel: Kernel) -> int | None:
        """The exit status of a run; None if it was killed. Whether the history has a line of a point that it made
        before, nobody knows.
        """
        machine = self.machine
        usual, before, there = machine.context, open_descriptors(), self.points
        machine.context = replace(usual, kernel=kernel)
        machine.said.clear()
        try:
            report = machine.once()
        except Killed:
            self.failed = None if self.points - there else self.failed
            return None
        finally:
            machine.context = usual
            # The kernel closes what a killed process had open.
            for fd, path in open_descriptors().items():
                if before.get(fd) != path:
                    os.close(fd)
        # Where not even the history had room for a line, only the next line can tell.
        if not any("history" in sentence for sentence in machine.said):
            self.failed = not report.points and bool(report.errors)
        return report.exit

    def recover(self) -> None:
        recover.recover(self.machine.repository, self.machine.context)

    def check_kept(self) -> None:
        """What the policy promises, and nothing else but what several of them stand on, each by itself."""
        kept = promised(sorted(self.ever))
        assert kept <= self.points
        images = self.machine.repository.volume("web").catalog().images
        children = Counter(image.opening.parent for image in images)
        assert all(children[point] > 1 for point in self.points - kept)

    def check_status(self) -> None:
        """What it says beside what lies there."""
        machine, points = self.machine, self.points
        config = load(str(machine.file))
        found = status.status(machine.repository, machine.context, status.goals(config))
        assert found.room.free_bytes == shutil.disk_usage(machine.place).free
        assert {reason.name for reason in found.room.reasons} <= {"RoomRunsOut", "Full"}
        if not self.folder.exists():
            assert found.volumes == []
            return
        (web,) = found.volumes
        assert (web.newest, web.points) == (max(points, default=""), len(points))
        expected = set()
        if not points:
            expected.add("NoGoodPoint")
        else:
            age = machine.now - datetime.strptime(f"{web.newest[:16]}+0000", "%Y%m%dT%H%M%SZ%z")
            assert abs(web.age_seconds - age.total_seconds()) < 1
            expected |= {"RpoMissed"} if age > RPO else set()
        names = [path.name for path in self.folder.iterdir()]
        left = [name for name in names if name.endswith((".partial", ".deleted"))]
        # The mark of a deletion that was begun stands for the image, too.
        marked = {name.removesuffix(".json.deleted") for name in names}
        images = [name for name in names if name.endswith(".zst") and name[:21] not in points]
        left += [name for name in images if name.removesuffix(".zst") not in marked]
        assert ("Leftovers" in {reason.name for reason in web.reasons}) == bool(web.leftovers)
        assert set(left) <= set(web.leftovers)
        expected |= {"Leftovers"} if web.leftovers else set()
        expected |= {"BackupFailed"} if self.failed else set()
        unknown = {"BackupFailed"} if self.failed is None else set()
        assert {reason.name for reason in web.reasons} - unknown == expected

    def check_restores(self) -> None:
        target = self.machine.place / "target.img"
        for point in sorted(self.points):
            asked = restore.Request(f"web@{point}", str(target), overwrite=True)
            restore.restore(self.machine.repository, asked, self.machine.context)
            assert target.read_bytes() == self.held[point[:8]], point
        target.unlink()


@contextlib.contextmanager
def little_room(place: Path, left: int) -> Iterator[None]:
    """A disk that somebody else has filled."""
    ballast = place / "ballast"
    with ballast.open("xb") as file:
        os.posix_fallocate(file.fileno(), 0, max(shutil.disk_usage(place).free - left, 1))
    try:
        yield
    finally:
        ballast.unlink()


@pytest.mark.slow
def test_ninety_days_with_crashes_and_full_disks(loop, tmpfs, rng):
    days = Days(tmpfs(48 * MIB), loop(SIZE))
    machine, seen = days.machine, {"well": 0, "killed": 0, "full": 0}
    for day in range(DAYS):
        days.edit(day, rng.randrange(1, 6), rng.randrange)
        last = day == DAYS - 1
        if last:
            days.recover()
        trouble = "none" if last else rng.choices(["none", "kill", "full"], [6, 2, 2])[0]
        if trouble == "full":
            with little_room(machine.place, rng.randrange(200 * KIB)):
                exit_code = days.run(QuickKernel())
                days.check_status()
        else:
            exit_code = days.run(QuickMortal(rng.randrange(1, 150)) if trouble == "kill" else QuickKernel())
        seen["killed" if exit_code is None else "full" if exit_code else "well"] += 1
        if exit_code is None and rng.random() < 0.7:
            days.recover()
        days.ever |= days.points
        if exit_code == 0:
            days.check_kept()
        elif trouble == "none":
            # A point of a killed run that nobody has brought back is something to look at.
            assert exit_code == 3, (day, machine.said)
            assert any("'blockbak recover' brings it back" in sentence for sentence in machine.said), machine.said
        days.check_status()
        machine.now += timedelta(hours=21)
        days.check_status()
        machine.now += timedelta(hours=3)
        if day % 15 == 14:
            days.check_restores()
    assert min(seen.values()) >= 5, f"hardly anything went wrong, or right: {seen}"
    days.check_kept()
    days.check_restores()
    found = verify.verify(machine.repository, [], machine.context, pick=lambda: 0.0)
    assert (found.ok, found.history) == (True, [])
