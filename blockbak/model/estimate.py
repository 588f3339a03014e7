"""What a policy will cost before it is used: sizes, times, room. Estimates are spans, and say how wide they are.

Changes are taken to fall anywhere: of a volume of which a share ``p`` changes in a day, ``1 - (1 - p) ** days`` has
changed after some days. Where the same places are written again and again, less does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, tzinfo
from itertools import pairwise
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from blockbak.model.chain import POINT_CHARS, moment_of_id
from blockbak.model.events import Entry
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL
from blockbak.model.retention import Candidate, Policy, chosen
from blockbak.model.schedule import Kinds, Made, kind_due
from blockbak.units import DAY

Numbers = npt.NDArray[np.float64]
RUNS_MAX = 20_000
"""Runs that are gone through at most: an hourly job for two years."""
_TELLING_SECONDS = 3600.0
_LARGER: dict[str, int] = {INCREMENTAL: 0, DIFFERENTIAL: 1, FULL: 2}
_IMAGE_BYTES = 6144.0
"""What an image takes that holds no data: header, index and closing, a block of the file system at least, and its
manifest."""
_SURE = 1.96
"""Standard deviations around a mean that hold 95 % of what could be meant."""


@dataclass(frozen=True, slots=True)
class Span:
    """An estimate: between ``low`` and ``high``, most likely ``likely``."""

    low: float
    likely: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.likely <= self.high:
            raise ValueError(f"no span: {self.low}, {self.likely}, {self.high}")

    def map(self, function: Callable[[float], float]) -> Span:
        """The span of a function that never falls."""
        return Span(function(self.low), function(self.likely), function(self.high))

    def __mul__(self, factor: float) -> Span:
        return self.map(lambda value: value * factor)

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def most(self, limit: float) -> Span:
        """The same, but nothing above ``limit``."""
        return self.map(lambda value: min(value, limit))


def of_mean(values: Numbers) -> Span:
    """Where the mean of all lies, of which ``values`` are a sample; nothing below 0."""
    mean = float(values.mean()) if len(values) else 0.0
    spread = _SURE * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else mean
    return Span(max(0.0, mean - spread), mean, mean + spread)


def of_past(values: Sequence[float]) -> Span:
    """What will come if it goes on as it was: the middle half of ``values``, and their median."""
    low, likely, high = (float(one) for one in np.quantile(np.array(values, float), (0.25, 0.5, 0.75)))
    return Span(low, likely, high)


# --- a volume ------------------------------------------------------------------------------------------------


class Sizes(msgspec.Struct, frozen=True):
    """What an image was when it was made: of ``device_bytes``, ``changed_bytes`` had changed since its parent."""

    kind: str
    stored_bytes: int
    changed_bytes: int
    device_bytes: Annotated[int, msgspec.Meta(gt=0)]


@dataclass(frozen=True, slots=True)
class Before:
    """A point that was made of it, as it was then: its images may be merged since."""

    moment: datetime
    sizes: Sizes
    seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """Windows that were read and compressed: bytes that each would take, of ``window_bytes``; ``data`` says which hold
    anything. ``read_rate`` and ``compress_rate`` are bytes a second, all workers together.
    """

    window_bytes: int
    stored: Numbers
    data: npt.NDArray[np.bool_]
    read_rate: float
    compress_rate: float


@dataclass(frozen=True, slots=True)
class Volume:
    """What is known of a volume that a policy is thought up for. ``day_share`` is the share of its blocks that changes
    in a day, ``packed`` bytes stored for each byte that changed.
    """

    device_bytes: int
    full_bytes: Span
    full_seconds: Span
    day_share: Span
    packed: Span
    delta_seconds: Span

    def changed(self, seconds: float) -> Span:
        """The bytes that differ after so long."""
        return self.day_share.map(lambda share: self.device_bytes * (1 - (1 - min(share, 1.0)) ** (seconds / DAY)))

    def delta_bytes(self, seconds: float) -> Span:
        """What an image of the changes of so long takes; never more than a full."""
        changed = self.changed(seconds)
        return Span(
            min(changed.low * self.packed.low + _IMAGE_BYTES, self.full_bytes.low),
            min(changed.likely * self.packed.likely + _IMAGE_BYTES, self.full_bytes.likely),
            min(changed.high * self.packed.high + _IMAGE_BYTES, self.full_bytes.high),
        )


def of_history(entries: Iterable[Entry], volume: str) -> list[Before]:
    """The points of a volume that a history tells of, in their order, those that are gone by now too. A line whose
    facts are of another form than they should be tells nothing.
    """
    found = []
    for entry in entries:
        if entry.event != "made" or entry.volume != volume or not entry.points:
            continue
        moment = moment_of_id(entry.points[0])
        with contextlib.suppress(msgspec.ValidationError):
            sizes = msgspec.convert(entry.facts, Sizes)
            found += [Before(moment, sizes, entry.seconds)] if moment is not None else []
    return sorted(found, key=lambda one: one.moment)


def from_past(past: Sequence[Before], day_share: Span | None = None) -> Volume | None:
    """A volume as the points tell that were made of it, in their order. ``day_share`` is known otherwise; None where
    neither it nor they tell how much changes, or where there is no full. What changed in less than an hour tells
    nothing of a day.
    """
    fulls = [one for one in past if one.sizes.kind == FULL]
    deltas = [one for one in past if one.sizes.kind != FULL]
    shares = [
        _day_share(one.sizes.changed_bytes / one.sizes.device_bytes, seconds)
        for one, seconds in _gaps(past)
        if seconds >= _TELLING_SECONDS
    ]
    if not fulls or (day_share is None and not shares):
        return None
    packed = [_data_bytes(one.sizes) / one.sizes.changed_bytes for one in deltas if one.sizes.changed_bytes]
    return Volume(
        device_bytes=past[-1].sizes.device_bytes,
        full_bytes=of_past([one.sizes.stored_bytes for one in fulls]),
        full_seconds=of_past([one.seconds for one in fulls]),
        day_share=day_share or of_past(shares),
        packed=of_past(packed or [_data_bytes(one.sizes) / one.sizes.device_bytes for one in fulls]),
        delta_seconds=of_past([one.seconds for one in deltas or fulls]),
    )


def _data_bytes(sizes: Sizes) -> float:
    return max(sizes.stored_bytes - _IMAGE_BYTES, 0.0)


def _gaps(past: Sequence[Before]) -> Iterator[tuple[Before, float]]:
    """Each image of changes, and the seconds in which they came: a differential's came since the full before it."""
    last: Before | None = None
    full: Before | None = None
    for one in past:
        parent = full if one.sizes.kind == DIFFERENTIAL else last
        if one.sizes.kind != FULL and parent is not None:
            yield one, (one.moment - parent.moment).total_seconds()
        last, full = one, one if one.sizes.kind == FULL else full


def _day_share(share: float, seconds: float) -> float:
    """The share of a day, of that which changed in ``seconds``."""
    return float(1 - (1 - min(share, 1.0)) ** (DAY / seconds))


def from_sample(device_bytes: int, sample: Sample, day_share: Span) -> Volume:
    """A volume as a sample of it tells. How fast a disk goes on, and what else is done meanwhile, no sample knows: the
    times may be twice as long.
    """
    windows = device_bytes / sample.window_bytes
    full = of_mean(sample.stored) * windows + Span(_IMAGE_BYTES, _IMAGE_BYTES, _IMAGE_BYTES)
    filled = float(sample.data.mean()) if len(sample.data) else 0.0
    reading = device_bytes / sample.read_rate
    slowest = max(reading, filled * device_bytes / sample.compress_rate)
    inside = sample.stored[sample.data] / sample.window_bytes
    return Volume(
        device_bytes=device_bytes,
        full_bytes=full,
        full_seconds=Span(0.7 * slowest, slowest, 2 * slowest),
        day_share=day_share,
        packed=of_mean(inside) if len(inside) else Span(0, 0, 0),
        delta_seconds=Span(0.7 * reading, reading, 2 * reading),
    )


# --- a policy ----------------------------------------------------------------------------------------------------


def runs(kinds: Kinds, full_every: float, now: datetime, until: datetime, zone: tzinfo) -> list[Made]:
    """The points that a job makes of a volume from ``now`` on, if all goes well; at most RUNS_MAX."""
    made: list[Made] = []
    # The last of each kind that no larger one came after: what is due goes by no others, and those are many.
    late: list[Made] = []
    moment: datetime | None = now
    while moment is not None and moment <= until and len(made) < RUNS_MAX:
        due = kind_due(kinds, late, moment, zone)
        if due.kind:
            last = next((one.moment for one in late if one.kind == FULL), None)
            old = last is not None and full_every and (moment - last).total_seconds() >= full_every
            new = Made(moment, FULL if old else due.kind, held_full=bool(old) or due.kind == FULL)
            late = [one for one in late if _LARGER[one.kind] > _LARGER[new.kind]] + [new]
            made.append(new)
        after = [one.next(moment, zone) for one in (kinds.full, kinds.differential, kinds.incremental)]
        moment = min((one for one in after if one is not None), default=None)
        if made and moment is not None and moment <= made[-1].moment:
            moment = made[-1].moment + timedelta(seconds=1)
    return made


def kept(made: Sequence[Made], policy: Policy | None, at: datetime) -> list[Made]:
    """Those of the points made until ``at`` that a policy, applied each time, keeps.

    One look at the end tells that: what a rule keeps then, it kept all the time before.
    """
    there = [one for one in made if one.moment <= at]
    if policy is None or not policy.has_rule or not there:
        return there
    candidates = [Candidate(f"{number:0{POINT_CHARS}d}", one.moment) for number, one in enumerate(there)]
    reasons = chosen(candidates, policy, there[-1].moment)
    return [one for candidate, one in zip(candidates, there, strict=True) if candidate.id in reasons]


def room(volume: Volume, there: Sequence[Made]) -> Span:
    """What these points take, each once what it needs of others that are gone was merged into it."""
    if not there:
        return Span(0, 0, 0)
    total = volume.full_bytes
    for before, one in pairwise(there):
        gap = (one.moment - before.moment).total_seconds()
        total += volume.full_bytes if one.kind == FULL else volume.delta_bytes(gap)
    return total


def most_room(volume: Volume, made: Sequence[Made], policy: Policy | None, until: datetime) -> Span:
    """What is taken at most while a merge goes on: its new images are there before the old ones go, so a full more."""
    there = room(volume, kept(made, policy, until))
    return there if policy is None else there + volume.full_bytes


def snapshot_room(volume: Volume, *, full: bool) -> Span:
    """What is written to a volume while it is read: the room that its snapshot fills."""
    seconds = volume.full_seconds if full else volume.delta_seconds
    low, likely, high = volume.changed(seconds.low), volume.changed(seconds.likely), volume.changed(seconds.high)
    return Span(low.low, likely.likely, high.high)
