"""Policies over random histories with real images, against an oracle that keeps every byte.

Every kept point restores to its bytes, nothing else is there, no kept point needs a removed one, and the disk holds
what the plan said.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockbak.flow import backup, pin, prune, restore, synthesize, verify
from blockbak.model import retention
from blockbak.model.chain import chains
from blockbak.model.retention import KEEP, Policy
from blockbak.units import KIB
from tests.doubles import context, new_repository
from tests.faults import QuickKernel

VOLUME, BLOCK, SIZE = "vol", 4 * KIB, 75 * 4 * KIB + 3
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
SLACK = 8 * KIB
"""Bytes that a composed image may have more than those it is made of: another section record, and its header."""

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["auto", "auto", "auto", "full", "differential", "synthesize", "pin", "verify"]),
        st.floats(0.01, 40),
        st.integers(0, 1 << 30),
    ),
    min_size=2,
    max_size=9,
)
FEW = st.integers(0, 3)
POLICIES = st.builds(
    Policy, last=FEW, daily=FEW, weekly=FEW, monthly=FEW, yearly=FEW, within=st.sampled_from([0.0, 86400.0 * 20]),
    verified=FEW,
).filter(lambda policy: policy.has_rule)  # fmt: skip


class World:
    """A repository, its volume, a calendar, and the bytes of every point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.repository = new_repository(folder / "repo", kernel=QuickKernel())
        self.source = folder / "source.img"
        self.source.write_bytes(random.Random(1).randbytes(SIZE))
        self.held: dict[str, bytes] = {}
        self.pinned: set[str] = set()
        self._context = context(folder / "state", kernel=QuickKernel())

    @property
    def context(self):
        return replace(self._context, now=lambda: self.now)

    @property
    def catalog(self):
        return self.repository.volume(VOLUME).catalog()

    def full_is_due(self, policy: Policy) -> bool:
        fulls = retention.checks(self.repository.record.entries(), VOLUME).fulls
        return retention.full_due(self.catalog.points, policy, self.now, fulls)

    def step(self, what: str, days: float, seed: int) -> None:
        self.now += timedelta(days=days)
        dice = random.Random(seed)
        if what == "synthesize" and self.held:
            synthesize.synthesize(self.repository, VOLUME, self.context, at=dice.choice(sorted(self.held)))
        elif what == "pin" and self.held:
            point = dice.choice(sorted(self.held))
            pin.pin(self.repository, point, "a test", self.context)
            self.pinned.add(point)
        elif what == "verify" and self.held:
            verify.verify(self.repository, [], self.context, pick=lambda: 0.0)
        else:
            self.back_up(what if what in ("auto", "full", "differential") and self.held else "full", dice)

    def back_up(self, kind: str, dice: random.Random) -> None:
        with self.source.open("r+b") as file:
            for _ in range(dice.randrange(4)):
                file.seek(dice.randrange(SIZE - BLOCK))
                file.write(dice.choice((dice.randbytes(BLOCK), bytes(BLOCK))))
        request = backup.Request(str(self.source), kind=kind, name=VOLUME, block_bytes=BLOCK)
        made = backup.backup(self.repository, request, self.context)
        self.held[made.point] = self.source.read_bytes()

    def restored(self, point: str) -> bytes:
        target = self.folder / "target.img"
        restore.restore(self.repository, restore.Request(point, str(target), overwrite=True), self.context)
        return target.read_bytes()


@pytest.mark.slow
@settings(
    max_examples=300 if os.environ.get("BLOCKBAK_SOAK") == "1" else 20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(STEPS, POLICIES)
def test_what_a_policy_promises_is_there_and_nothing_else(steps, policy):
    with tempfile.TemporaryDirectory(prefix="blockbak-retention-", dir=MEMORY) as folder:
        world = World(Path(folder))
        for what, days, seed in steps:
            world.step(what, days, seed)
        before = {image.file: image.image_bytes for image in world.catalog.images}
        said = prune.prune(world.repository, VOLUME, policy, world.context, dry_run=True)
        assert {image.file for image in world.catalog.images} == before.keys(), "a dry run changed something"
        done = prune.prune(world.repository, VOLUME, policy, world.context)
        assert done.decisions == said.decisions
        kept = {one.point for one in done.decisions if one.action == KEEP}
        catalog = world.catalog
        assert {point.id for point in catalog.points} == kept
        assert world.pinned <= kept
        assert max(world.held) in kept
        for point in sorted(kept):
            assert world.restored(point) == world.held[point]
        whole = chains(catalog.images)
        assert {image.file for image in catalog.images} == whole.keys(), "an image lost its parent"
        assert {image.opening.parent for image in catalog.images} - {None} <= kept
        assert (catalog.damage, catalog.leftovers) == ([], 0)
        # The disk holds what the plan said.
        volume = Path(world.repository.path) / VOLUME
        there = {path.name: path.stat().st_size for path in volume.glob("*.zst*")}
        assert sum(there.values()) == done.image_bytes <= said.image_bytes + SLACK * len(said.composed)
        assert there.keys() == (before.keys() - set(said.removed)) | set(done.composed)
        assert len(done.composed) == len(said.composed)
        assert set(done.removed) == set(said.removed)
        report = verify.verify(world.repository, [], world.context, pick=lambda: 0.0)
        assert (report.ok, report.history) == (True, [])
        # The next backup stands on what is left.
        world.back_up("auto", random.Random(1))
        newest = max(world.held)
        assert world.restored(newest) == world.held[newest]


@pytest.mark.slow
def test_ninety_days_of_one_policy():
    """A backup a day, a prune after each: what is there each day is what the policy says of all that ever was."""
    folder = Path(tempfile.mkdtemp(prefix="blockbak-retention-", dir=MEMORY))
    try:
        world = World(folder)
        policy = Policy(last=2, daily=5, weekly=3, monthly=2, full_every=30 * 86400.0)
        fulls = 0
        for day in range(90):
            world.now += timedelta(days=1)
            due = day == 0 or world.full_is_due(policy)
            world.back_up("full" if due else "auto", random.Random(day))
            fulls += due
            done = prune.prune(world.repository, VOLUME, policy, world.context)
            assert not done.full_due
            kept = sorted(one.point for one in done.decisions if one.action == KEEP)
            assert [point.id for point in world.catalog.points] == kept
            if day % 10 == 9:
                for point in kept:
                    assert world.restored(point) == world.held[point]
        assert fulls == 3
        # Five days, three weeks, two months: of 90 days in 2026 from 2 January to 1 April.
        assert [point[:8] for point in kept] == [
            "20260322", "20260328", "20260329", "20260330", "20260331", "20260401",
        ]  # fmt: skip
        assert world.repository.record.flaws() == []
    finally:
        shutil.rmtree(folder)
