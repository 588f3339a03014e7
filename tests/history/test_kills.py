"""SIGKILL at any moment: what was there before is whole, and the next run needs to be told nothing."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.flow import backup, recover, synthesize, verify
from blockbak.repository.local import Catalog, Repository
from blockbak.units import KIB, MIB
from tests import children
from tests.doubles import context, new_repository
from tests.volumes import Fingerprint, Volume, difference, fingerprint, restored

NAME = "vol"
SIZE = 9 * MIB + 4097


@dataclass
class Ward:
    """A volume with a history of points, copied afresh for every kill."""

    folder: Path
    volume: Volume
    dice: random.Random
    held: dict[str, Fingerprint]

    @property
    def template(self) -> Path:
        return self.folder / "template"

    @property
    def path(self) -> Path:
        return self.folder / "repository"

    @property
    def directory(self) -> Path:
        return self.path / NAME

    @property
    def repository(self) -> Repository:
        return Repository(str(self.path))

    @property
    def world(self):
        return context(self.folder / "state")

    @property
    def catalog(self) -> Catalog:
        return self.repository.volume(NAME).catalog()

    def fresh(self) -> None:
        """The repository as it was before."""
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.template, self.path)

    def names(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()}

    # --- what must be so ----------------------------------------------------------------------------

    def check(self, wanted: dict[str, Fingerprint], what: str, *, by_command: bool) -> None:
        """List and verify find no damage, and every point of ``wanted`` is there and right."""
        if by_command:
            listed = children.run(self.path, "list", "--json")
            assert listed.code == 0, (what, listed)
            assert wanted.keys() <= {point["point"] for point in listed.document}, what
            done = children.run(self.path, "verify")
            assert done.code == 0, (what, done)
        else:
            catalog = self.catalog
            assert catalog.damage == [], what
            assert catalog.gaps == [], what
            assert wanted.keys() <= {point.id for point in catalog.points}, what
            report = verify.verify(self.repository, [], self.world, pick=lambda: 0.0)
            assert report.ok, (what, [verdict for verdict in report.images if not verdict.ok])
        for point, expected in wanted.items():
            self.right(point, expected, what)

    def right(self, point: str, expected: Fingerprint, what: str) -> None:
        found = restored(self.repository, point, self.folder / "target", self.world, verify=False)
        assert difference(found, expected) is None, (what, point)

    def new_points(self) -> set[str]:
        return {point.id for point in self.catalog.points} - self.held.keys()

    def next_backup(self, what: str) -> None:
        """The next run succeeds without being told anything, is right, and leaves nothing lying about."""
        done = children.run(self.path, "backup", self.volume.path, "--name", NAME, "--json")
        assert done.code == 0, (what, done)
        (point,) = done.document["points"]
        assert point["kind"] == "incremental", what
        self.right(point["point"], self.volume.fingerprint, what)
        assert not [name for name in self.names() if name.endswith((".partial", ".deleted"))], what
        report = verify.verify(self.repository, [], self.world, pick=lambda: 0.0)
        assert report.ok, what
        sequences = [one.sequence for one in self.catalog.points]
        assert len(set(sequences)) == len(sequences), what


@pytest.fixture
def ward(tmp_path, rng) -> Ward:
    """A full, an incremental, a differential and two incrementals."""
    volume = Volume(tmp_path / "source", SIZE, rng)
    volume.fill(0.5)
    found = Ward(tmp_path, volume, rng, {})
    repository = new_repository(found.template)
    world = context(tmp_path / "state")
    for kind in ("full", "incremental", "differential", "incremental", "incremental"):
        made = backup.backup(repository, backup.Request(str(volume.path), kind, name=NAME, block_bytes=4 * KIB), world)
        found.held[made.point] = volume.fingerprint
        volume.scribble(12)
        volume.fill(0.05)
    found.fresh()
    return found


# --- moments --------------------------------------------------------------------------------------


def measured(ward: Ward, prepare: Callable[[], None], words: tuple[object, ...]) -> float:
    """How long the command takes when nobody kills it, from the word to the exit."""
    prepare()
    with children.warm(ward.path, *words) as child:
        begin = time.monotonic()
        assert not children.kill_when(child, lambda: False)
        assert child.returncode == 0, child.communicate()[1]
        return time.monotonic() - begin


def after(seconds: float) -> Callable[[], bool]:
    """A moment that comes by the clock. The clock starts when it is first asked for."""
    begin: list[float] = []

    def due() -> bool:
        if not begin:
            begin.append(time.monotonic())
        return time.monotonic() - begin[0] >= seconds

    return due


def grown(ward: Ward, size: int) -> Callable[[], bool]:
    """The partial image has reached a size."""

    def due() -> bool:
        for path in ward.directory.glob("*.zst.partial"):
            try:
                return path.stat().st_size >= size
            except FileNotFoundError:
                return False
        return False

    return due


def appeared(ward: Ward, end: str) -> Callable[[], bool]:
    """A file of that kind is there that was not before."""
    before = ward.names()
    return lambda: any(name.endswith(end) for name in ward.names() - before)


def vanished(ward: Ward, end: str) -> Callable[[], bool]:
    """A file of that kind is gone that was there before."""
    before = {name for name in ward.names() if name.endswith(end)}
    return lambda: bool(before - ward.names())


def moment(ward: Ward, seconds: float, size: int, number: int) -> tuple[str, Callable[[], bool]]:
    """One by the clock in two; the others by what can be seen in the directory."""
    if number % 2 == 0:
        delay = ward.dice.uniform(0, seconds * 1.05)
        return f"after {delay:.4f} s", after(delay)
    if number % 8 == 1:
        end = ward.dice.choice([".zst", ".json.partial", ".json", ".zst.partial"])
        return f"at a new {end}", appeared(ward, end)
    reached = ward.dice.randrange(size)
    return f"at {reached} bytes", grown(ward, reached)


# --- backup and synthesize --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_backup_harms_nothing(ward, times, tell):
    words = ("backup", ward.volume.path, "--name", NAME)
    kinds = ("incremental", "full")
    seconds, sizes = {}, {}
    for kind in kinds:
        before = ward.names()
        seconds[kind] = measured(ward, ward.fresh, (*words, "--kind", kind))
        (made,) = [name for name in ward.names() - before if name.endswith(".zst")]
        sizes[kind] = (ward.directory / made).stat().st_size
    killed = 0
    for number in range(times(8, 150)):
        kind = kinds[number // 2 % 2]
        ward.fresh()
        with children.warm(ward.path, *words, "--kind", kind) as child:
            when, due = moment(ward, seconds[kind], sizes[kind], number)
            what = f"try {number}: a {kind} killed {when}"
            killed += children.kill_when(child, due)
        fresh = ward.new_points()
        assert len(fresh) <= 1, what
        now = ward.volume.fingerprint
        ward.check({**ward.held, **dict.fromkeys(fresh, now)}, what, by_command=number % 10 == 0)
        orphans = ward.catalog.orphans
        ward.next_backup(what)
        if orphans:
            # A sealed image whose manifest the kill prevented: never swept, and a point once asked for.
            assert set(orphans) <= ward.names(), what
            adopted = recover.recover(ward.repository, ward.world).adopted
            assert adopted == [name[:21] for name in orphans], what
            ward.check(dict.fromkeys(adopted, now), what, by_command=False)
    tell("kills that hit", killed)
    tell("kills that came too late", times(8, 150) - killed)


@pytest.mark.slow
def test_a_killed_synthesis_harms_nothing(ward, times, tell):
    newest = max(ward.held)
    words = ("synthesize", NAME)
    seconds = measured(ward, ward.fresh, words)
    size = (ward.directory / f"{newest}.full.zst").stat().st_size
    killed = 0
    for number in range(times(6, 100)):
        ward.fresh()
        with children.warm(ward.path, *words) as child:
            when, due = moment(ward, seconds, size, number)
            what = f"try {number}: killed {when}"
            killed += children.kill_when(child, due)
        assert ward.new_points() == set(), what
        ward.check(ward.held, what, by_command=number % 10 == 0)
        if number % 2:
            ward.next_backup(what)
        report = synthesize.synthesize(ward.repository, NAME, ward.world, at=newest)
        assert report.point.kind == "full", what
        ward.check(ward.held, what, by_command=False)
    tell("kills that hit", killed)
    tell("kills that came too late", times(6, 100) - killed)


# --- delete and recover -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_deletion_is_finished_by_the_next_run(ward, times, tell):
    gone = sorted(ward.held)[-3:]
    kept = {point: ward.held[point] for point in sorted(ward.held)[:-3]}
    words = ("delete", *gone)
    seconds = measured(ward, ward.fresh, words)
    killed = half = 0
    for number in range(times(4, 60)):
        ward.fresh()
        with children.warm(ward.path, *words) as child:
            delay = ward.dice.uniform(0, seconds)
            when, due = ward.dice.choice(
                [
                    (f"after {delay:.4f} s", after(delay)),
                    ("at a marker", appeared(ward, ".json.deleted")),
                    ("when an image is gone", vanished(ward, ".zst")),
                ]
            )
            what = f"try {number}: killed {when}"
            killed += children.kill_when(child, due)
        half += any(name.endswith(".deleted") for name in ward.names())
        left = {point.id for point in ward.catalog.points}
        assert left >= kept.keys(), what
        ward.check({point: ward.held[point] for point in left}, what, by_command=number % 10 == 0)
        if number % 2:
            assert recover.recover(ward.repository, ward.world).left == [], what
            assert not [name for name in ward.names() if name.endswith(".deleted")], what
        # A sequence is never used again, whatever became of its point.
        ward.next_backup(what)
        if left == kept.keys():
            assert ward.catalog.points[-1].sequence == len(ward.held) + 1, what
    tell("kills that hit", killed)
    tell("half-done deletions", half)


@pytest.mark.slow
def test_a_killed_recovery_is_taken_up_again(ward, times, tell):
    def broken() -> None:
        """No manifests, a partial, and a deletion half done."""
        ward.fresh()
        for path in ward.directory.glob("*.json"):
            path.unlink()
        (ward.directory / "20260101T000000Z-dead.full.zst.partial").write_bytes(b"half")
        for end in ("zst", "json.deleted"):
            (ward.directory / f"20260101T000000Z-beef.full.{end}").write_bytes(b"gone")

    seconds = measured(ward, broken, ("recover",))
    killed = 0
    for number in range(times(4, 60)):
        broken()
        with children.warm(ward.path, "recover") as child:
            delay = ward.dice.uniform(0, seconds)
            when, due = ward.dice.choice(
                [(f"after {delay:.4f} s", after(delay)), ("at a manifest", appeared(ward, ".json"))]
            )
            what = f"try {number}: killed {when}"
            killed += children.kill_when(child, due)
        # The oldest image may have no parent's manifest yet; what is listed is no damage all the same.
        assert ward.catalog.damage == [], what
        report = recover.recover(ward.repository, ward.world)
        assert report.left == [], what
        assert ward.catalog.leftovers == 0, what
        ward.check(ward.held, what, by_command=number % 10 == 0)
        assert {point.id for point in ward.catalog.points} == ward.held.keys(), what
    tell("kills that hit", killed)


# --- restore --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_restore_leaves_no_finished_file(ward, times, tell):
    point = max(ward.held)
    target = ward.folder / "killed"
    words = ("restore", point, target)
    seconds = measured(ward, ward.fresh, words)
    target.unlink()
    killed = 0
    for number in range(times(4, 60)):
        with children.warm(ward.path, *words) as child:
            delay = ward.dice.uniform(0, seconds)
            killed += children.kill_when(child, after(delay))
        what = f"try {number}: killed after {delay:.4f} s"
        if target.exists():
            assert difference(fingerprint(target), ward.held[point]) is None, what
            target.unlink()
        # What is left of it is not in the way of a person who says so.
        done = children.run(ward.path, *words, "--yes")
        assert done.code == 0, (what, done)
        assert difference(fingerprint(target), ward.held[point]) is None, what
        target.unlink()
    ward.check(ward.held, "after all kills", by_command=True)
    tell("kills that hit", killed)
