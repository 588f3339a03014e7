"""Estimates beside what really came of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from blockbak.flow import backup, estimate, prune
from blockbak.flow.estimate import Wish
from blockbak.flow.source import Request
from blockbak.model import estimate as model
from blockbak.model.retention import Policy
from tests.doubles import context, new_repository

MIB = 1 << 20
BLOCK = 64 << 10
SIZE = 24 * MIB
NOW = datetime(2026, 5, 1, 3, tzinfo=UTC)
DAYS = 12
SHARE = 0.08


def piece(dice, place, size):
    """Of four windows two are noise, one compresses, one is zeros: in runs, as files lie."""
    kind = place // MIB % 4
    return dice.integers(0, (256, 256, 16, 1)[kind], size, dtype=np.uint8)


def content(dice, size):
    return np.concatenate([piece(dice, start, MIB) for start in range(0, size, MIB)])


@pytest.fixture
def volume(tmp_path, seed):
    dice = np.random.default_rng(seed)
    source = tmp_path / "source"
    source.write_bytes(content(dice, SIZE).tobytes())
    return source, dice


def stored(repository):
    return sum(image.image_bytes for volume in repository.volumes() for image in volume.catalog().images)


def edit(source, dice):
    """A day's changes: as many blocks as are told, anywhere but in zeros, each to what compresses as well."""
    places = [start for start in range(0, SIZE, BLOCK) if start // MIB % 4 < 3]
    with source.open("r+b") as file:
        for start in dice.choice(places, round(SHARE * SIZE / BLOCK), replace=False).tolist():
            file.seek(start)
            file.write(piece(dice, start, BLOCK).tobytes())


def test_a_sample_says_how_large_a_full_becomes(volume, tmp_path):
    source, _ = volume
    world = context(tmp_path / "state")
    report = estimate.plan(Wish(str(source)), None, UTC, world)
    assert (report.basis, report.change, report.device_bytes) == ("sample", "assumed", SIZE)
    assert any("not known" in note for note in report.notes)
    repository = new_repository(tmp_path / "repository")
    made = backup.backup(repository, Request(str(source)), world)
    # All of so small a volume is in the sample: what is left is the index.
    assert report.full_bytes.low <= made.stored_bytes <= report.full_bytes.high + (64 << 10)
    assert report.full_bytes.likely == pytest.approx(made.stored_bytes, rel=0.05)
    assert report.snapshot_bytes is None
    assert (report.free_bytes, report.fits) == (None, None)


@pytest.mark.parametrize("basis", ["sample", "history"])
def test_a_repository_grows_as_it_was_foreseen(basis, volume, tmp_path):
    """Twelve days of a policy, with merges: the room that is taken lies where it was said to."""
    source, dice = volume
    policy = Policy(daily=4, weekly=2)
    repository = new_repository(tmp_path / "repository")
    world = context(tmp_path / "state")
    report = None
    if basis == "sample":
        report = estimate.plan(
            Wish(str(source), policy=policy, day_share=SHARE), repository, UTC, replace(world, now=lambda: NOW)
        )
    kept = 0
    for day in range(DAYS):
        at = replace(world, now=lambda day=day: NOW + timedelta(days=day))
        backup.backup(repository, Request(str(source), name="v"), at)
        prune.prune(repository, "v", policy, at)
        edit(source, dice)
        if basis == "history" and day == 4:
            report = estimate.plan(Wish(str(source), policy=policy), repository, UTC, at)
            assert (report.basis, report.volume) == ("history", "v")
            assert report.day_share.likely == pytest.approx(SHARE, rel=0.2)
    kept = len(repository.volume("v").catalog().points)
    assert report is not None
    known = model.Volume(
        report.device_bytes, report.full_bytes, report.full_seconds, report.day_share,
        model.of_past([1.0]), report.incremental_seconds,
    )  # fmt: skip
    end = NOW + timedelta(days=DAYS - 1)
    made = model.runs(Wish("").kinds, policy.full_every, NOW, end, UTC)
    there = model.kept(made, policy, end)
    assert abs(len(there) - kept) <= 1
    room = model.room(known, there)
    assert room.likely == pytest.approx(stored(repository), rel=0.25)


def test_a_repository_that_is_too_small_is_said_to_be(volume, tmp_path, tmpfs):
    source, _ = volume
    repository = new_repository(tmpfs(4 * MIB) / "repository")
    report = estimate.plan(Wish(str(source), policy=Policy(daily=7)), repository, UTC, context(tmp_path / "state"))
    assert report.fits is False
    assert 0 < report.free_bytes < 4 * MIB
    roomy = new_repository(tmpfs(2048 * MIB) / "repository")
    report = estimate.plan(Wish(str(source), policy=Policy(daily=7)), roomy, UTC, context(tmp_path / "state"))
    assert report.fits is True


def test_nothing_is_written(volume, tmp_path):
    source, _ = volume
    before = source.read_bytes(), source.stat().st_mtime_ns
    repository = new_repository(tmp_path / "repository")
    names = sorted(path.name for path in repository_files(tmp_path))
    estimate.plan(Wish(str(source)), repository, UTC, context(tmp_path / "state"))
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before
    assert sorted(path.name for path in repository_files(tmp_path)) == names


def repository_files(tmp_path):
    return list((tmp_path / "repository").rglob("*"))
