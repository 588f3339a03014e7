"""Whether volumes can be relied on: what is known of each, against what is asked of it; reasons where it is not.

Pure: what was found on disk and in the history goes in, with the moment that it is now.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

DAY = 86400.0
ROOM_SECONDS = 7 * DAY
"""A repository that will be full within it is to be looked at now: disks are not bought in a day."""
GROWTH_SECONDS = 30 * DAY
"""How far back the growth of a repository is looked at: monthly fulls are in it."""
_FOREVER = 1000 * 365 * DAY
_CLOCK_SECONDS = 300.0
"""By how much clocks may differ."""

Level = Literal["warning", "critical"]


@dataclass(frozen=True, slots=True)
class Goals:
    """What is asked of a volume, in seconds; None where nothing is."""

    rpo: float | None = None
    rto: float | None = None


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image that is there: its file, its bytes, whether the last check of it found damage, and what share of it was
    verified, when last.
    """

    file: str
    stored_bytes: int
    damaged: bool = False
    verified_share: float = 0.0
    verified_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class StoredPoint:
    """A point: when it was made, the files of the shortest whole chain that restores it (empty: none does)."""

    id: str
    made: datetime
    chain: tuple[str, ...]
    consistency: str = "crash"


@dataclass(frozen=True, slots=True)
class Drilled:
    """The last drill of a volume."""

    at: datetime
    point: str
    ok: bool
    rto_seconds: float
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """The last backup of a volume, where it made no point."""

    at: datetime
    error: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one volume. ``points`` oldest first. ``leftovers`` are what ``recover`` would treat, ``damage``
    clauses on manifests and images that cannot be used. ``failed`` is a backup after the newest point.
    """

    volume: str
    points: tuple[StoredPoint, ...] = ()
    images: tuple[StoredImage, ...] = ()
    damage: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    drilled: Drilled | None = None
    failed: Attempt | None = None
    job: str = ""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a person must look at something. ``name`` is for programs, ``text`` a sentence. ``critical``: what was asked
    for is not there; ``warning``: it will not be, or nobody knows.
    """

    name: str
    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """One volume against its goals. Ages and times in seconds; None where there is nothing to tell.

    ``verified_share`` is of the stored bytes of all its images, ``verified_at`` when the last of them was checked.
    """

    volume: str
    job: str
    goals: Goals
    points: int
    stored_bytes: int
    newest: str
    newest_at: datetime | None
    age_seconds: float | None
    chain_images: int
    consistency: str
    verified_share: float
    verified_at: datetime | None
    drilled: Drilled | None
    leftovers: tuple[str, ...]
    reasons: tuple[Reason, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be looked at."""
        return not self.reasons

    @property
    def rpo_met(self) -> bool | None:
        """None where no RPO is asked for."""
        if self.goals.rpo is None:
            return None
        return self.age_seconds is not None and self.age_seconds <= self.goals.rpo

    @property
    def rto_met(self) -> bool | None:
        """None where no RTO is asked for, or no drill has told."""
        if self.goals.rto is None or self.drilled is None:
            return None
        return self.drilled.ok and self.drilled.rto_seconds <= self.goals.rto


def judge(facts: Facts, goals: Goals, now: datetime) -> Health:
    """One volume as it is ``now``. A point is good where a whole chain restores it in which no image was found damaged:
    an older point that is good counts, a newer one that is not does not.
    """
    damaged = {image.file for image in facts.images if image.damaged}
    good = [point for point in facts.points if point.chain and not damaged & set(point.chain)]
    # Points are in their order: of two of one moment the later counts.
    newest = max(reversed(good), key=lambda point: point.made, default=None)
    age = None if newest is None else max(0.0, (now - newest.made).total_seconds())
    share, verified_at = _verified(facts.images)
    reasons = (
        *_point_reasons(facts, newest, age, goals, now),
        *_damage_reasons(facts, damaged),
        *_drill_reasons(facts.drilled, goals),
        *_leftover_reasons(facts.leftovers),
    )
    return Health(
        volume=facts.volume, job=facts.job, goals=goals, points=len(facts.points),
        stored_bytes=sum(image.stored_bytes for image in facts.images),
        newest=newest.id if newest else "", newest_at=newest.made if newest else None, age_seconds=age,
        chain_images=len(newest.chain) if newest else 0, consistency=newest.consistency if newest else "",
        verified_share=share, verified_at=verified_at, drilled=facts.drilled, leftovers=facts.leftovers,
        reasons=reasons,
    )  # fmt: skip


def _point_reasons(
    facts: Facts, newest: StoredPoint | None, age: float | None, goals: Goals, now: datetime
) -> Iterator[Reason]:
    if newest is None or age is None:
        what = "No point of it can be restored." if facts.points or facts.damage else "It has no point yet."
        yield Reason("NoGoodPoint", "critical", what)
    else:
        if goals.rpo is not None and age > goals.rpo:
            text = f"Its newest good point is {duration(age)} old; the RPO is {duration(goals.rpo)}."
            yield Reason("RpoMissed", "critical", text)
        if (newest.made - now).total_seconds() > _CLOCK_SECONDS:
            text = f"Its newest good point is of {stamp(newest.made)}, which is to come."
            yield Reason("ClockWrong", "warning", text)
    if facts.failed is not None:
        text = f"The backup of {stamp(facts.failed.at)} failed ({facts.failed.error})."
        yield Reason("BackupFailed", "critical", text)


def _damage_reasons(facts: Facts, damaged: set[str]) -> Iterator[Reason]:
    if facts.damage:
        yield Reason("Damaged", "critical", _listed("What cannot be used", facts.damage))
    if damaged:
        yield Reason("VerifyFailed", "critical", _listed("Found damaged when last verified", sorted(damaged)))
    broken = [point.id for point in facts.points if not point.chain]
    if broken:
        yield Reason("Gap", "critical", _listed("Points without a whole chain", broken))


def _drill_reasons(drilled: Drilled | None, goals: Goals) -> Iterator[Reason]:
    if drilled is None:
        if goals.rto is not None:
            text = f"It was never drilled: nobody knows whether the RTO of {duration(goals.rto)} can be kept."
            yield Reason("NeverDrilled", "warning", text)
    elif not drilled.ok:
        what = drilled.differences[0] if drilled.differences else "it did not end well"
        yield Reason("DrillFailed", "critical", f"The drill of {stamp(drilled.at)} failed: {what.removesuffix('.')}.")
    elif goals.rto is not None and drilled.rto_seconds > goals.rto:
        took, asked = duration(drilled.rto_seconds), duration(goals.rto)
        yield Reason("RtoMissed", "critical", f"The drill of {stamp(drilled.at)} took {took}; the RTO is {asked}.")


def _leftover_reasons(leftovers: Sequence[str]) -> Iterator[Reason]:
    if leftovers:
        yield Reason("Leftovers", "warning", _listed("Left over, for 'blockbak recover' to treat", leftovers))


def _verified(images: Sequence[StoredImage]) -> tuple[float, datetime | None]:
    """The share of all stored bytes that was checked and was good, and the last time of any."""
    total = sum(image.stored_bytes for image in images)
    good = sum(image.stored_bytes * image.verified_share for image in images if not image.damaged)
    times = [image.verified_at for image in images if image.verified_at is not None]
    return (min(1.0, good / total) if total else 0.0), max(times, default=None)


# --- the repository ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Growth:
    """At ``at`` the repository got larger by ``change`` bytes, or smaller where that is negative."""

    at: datetime
    change: int


@dataclass(frozen=True, slots=True)
class Place:
    """The repository itself. ``growth`` in any order; ``damage``: clauses on its history and its files; ``leftovers``:
    what killed runs left on the machine; ``idle_jobs``: jobs that should have made points here, and made none;
    ``failed_jobs``: those whose last run failed, and how.
    """

    free_bytes: int
    total_bytes: int
    growth: tuple[Growth, ...] = ()
    damage: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()
    idle_jobs: tuple[str, ...] = ()
    failed_jobs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Room:
    """How long the repository's room lasts. ``growth`` is in bytes a second, None where too little is known;
    ``full_at`` None where it is not growing, or not known to.
    """

    free_bytes: int
    total_bytes: int
    growth: float | None
    full_at: datetime | None
    leftovers: tuple[str, ...]
    reasons: tuple[Reason, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be looked at."""
        return not self.reasons


def rate(growth: Sequence[Growth], now: datetime) -> float | None:
    """Bytes a second by which the repository grew over the last ``GROWTH_SECONDS``, or as long as it is known; None
    where that is less than a day.
    """
    if not growth:
        return None
    since = max(now - timedelta(seconds=GROWTH_SECONDS), min(one.at for one in growth))
    span = (now - since).total_seconds()
    if span < DAY:
        return None
    # What came first is not what it grew by since.
    return sum(one.change for one in growth if since < one.at <= now) / span


def judge_room(place: Place, now: datetime) -> Room:
    """When the repository will be full, at the rate at which it grows."""
    growth = rate(place.growth, now)
    full_at = None
    if growth is not None and growth > 0 and place.free_bytes / growth < _FOREVER:
        full_at = now + timedelta(seconds=place.free_bytes / growth)
    return Room(
        place.free_bytes, place.total_bytes, growth, full_at, place.leftovers,
        tuple(_room_reasons(place, full_at, now)),
    )  # fmt: skip


def _room_reasons(place: Place, full_at: datetime | None, now: datetime) -> Iterator[Reason]:
    if place.free_bytes <= 0:
        yield Reason("Full", "critical", "The repository's file system is full.")
    elif full_at is not None and (full_at - now).total_seconds() < ROOM_SECONDS:
        left = duration((full_at - now).total_seconds())
        yield Reason("RoomRunsOut", "warning", f"The repository will be full in {left}, at the rate at which it grows.")
    if place.damage:
        yield Reason("Damaged", "critical", _listed("What cannot be used", place.damage))
    if place.idle_jobs:
        yield Reason("NoPointOfJob", "critical", _listed("Jobs that have made no point here", place.idle_jobs))
    if place.failed_jobs:
        yield Reason("JobFailed", "critical", _listed("Jobs whose last run failed", place.failed_jobs))
    yield from _leftover_reasons(place.leftovers)


# --- for people ----------------------------------------------------------------------------------------------


def stamp(moment: datetime) -> str:
    """``2026-05-01 03:00 UTC``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """``45 s``, ``7 min``, ``26 h``, ``9 days``: two digits are enough for who looks."""
    for limit, unit, word in ((120, 1, "s"), (7200, 60, "min"), (2 * DAY, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {word}"
    return f"{seconds / DAY:.0f} days"


def _listed(what: str, things: Sequence[str], most: int = 3) -> str:
    shown = "; ".join(thing.removesuffix(".") for thing in itertools.islice(things, most))
    more = f"; and {len(things) - most} more" if len(things) > most else ""
    return f"{what}: {shown}{more}."
