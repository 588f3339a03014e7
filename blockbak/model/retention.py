"""What a policy keeps of a volume's points, why, and how chains are merged so that the rest can go.

A point that is kept restores afterwards as it did before: nothing that it needs is taken away, but composed into an
image of its own. What does not count towards keeping, for it is damaged, is not removed either: a person must look.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import pairwise
from statistics import median
from typing import Literal, TypeAlias

from msgspec import structs

from blockbak.model.chain import Image, Point, chains, points
from blockbak.model.events import Entry
from blockbak.model.facts import FULL, INCREMENTAL, Kind
from blockbak.model.pin import Pin
from blockbak.model.schedule import AHEAD_MOST
from blockbak.model.when import first_moment
from blockbak.units import DAY

Action: TypeAlias = Literal["keep", "merge", "expire"]
KEEP: Action = "keep"
MERGE: Action = "merge"
EXPIRE: Action = "expire"
SIMULATED_MAX = 20_000
"""Points that a simulation adds at most: made more often, they are thinned out."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What is kept: so many of the last points; the newest point of each of so many hours, days, weeks (ISO), months
    and years that have one; all made ``within`` so many seconds; and in any case so many ``verified`` points. All in
    UTC. After ``full_every`` seconds a full that shares no block with others is due (0: never). What one of ``others``
    keeps stays as well.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float = 0.0
    verified: int = 0
    full_every: float = 90 * DAY
    others: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        for name in (*(rule for rule, _ in _PERIODS), "last", "within", "verified", "full_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is below zero")

    @property
    def has_rule(self) -> bool:
        """Whether it says of any point that it may go: a number of verified points alone only adds to others."""
        return bool(self.last or self.within or any(getattr(self, name) for name, _ in _PERIODS))


_PERIODS: tuple[tuple[str, Callable[[datetime], str]], ...] = (
    ("hourly", lambda moment: f"hour {moment:%Y-%m-%d %H}"),
    ("daily", lambda moment: f"day {moment:%Y-%m-%d}"),
    ("weekly", lambda moment: f"week {moment:%G-W%V}"),
    ("monthly", lambda moment: f"month {moment:%Y-%m}"),
    ("yearly", lambda moment: f"year {moment:%Y}"),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point that may be kept: that is sealed, restorable, and not known to be damaged."""

    id: str
    created: datetime
    verified: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a point: ``keep``, ``expire`` (its images go) or ``merge`` (they go, and what later points need
    of them is composed into theirs first); and why. A ``simulated`` one is not there yet.
    """

    point: str
    created: str
    action: Action
    reasons: tuple[str, ...]
    verified: bool = False
    damaged: bool = False
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class Merge:
    """An image to be composed at ``point``: of all its ``chain``, a full, where ``below`` is 0; else a delta on the
    point of the image number ``below - 1``, of the images above that one.
    """

    point: str
    chain: tuple[Image, ...]
    below: int

    @property
    def layers(self) -> tuple[Image, ...]:
        """What it is made of, oldest first."""
        return self.chain[self.below :]

    @property
    def bytes_max(self) -> int:
        """Bytes it will have at most, but for what other compression or the padding before clones adds."""
        return sum(image.image_bytes for image in self.layers)

    @property
    def base(self) -> str:
        """The file of the full that it stands on, or replaces."""
        return self.chain[0].file

    @property
    def kind(self) -> Kind:
        """What is composed."""
        return INCREMENTAL if self.below else FULL

    def imagined(self) -> Image:
        """The image, as far as it is known before there is one."""
        top = self.chain[-1]
        parent = self.chain[self.below - 1].key if self.below else (None, None)
        opening = replace(top.opening, kind=self.kind, synthetic=True, parent=parent[0], parent_root=parent[1])
        return replace(top, file=f"{top.point}.{self.kind}.new.zst", image_bytes=self.bytes_max, opening=opening)


@dataclass(frozen=True, slots=True)
class Plan:
    """The decisions, oldest point first, and the images to compose, parents before children."""

    decisions: tuple[Decision, ...]
    merges: tuple[Merge, ...] = ()

    @property
    def gone(self) -> frozenset[str]:
        """The points that go."""
        return frozenset(one.point for one in self.decisions if one.action != KEEP)

    @property
    def expired(self) -> frozenset[str]:
        """Those of them that no other point needs."""
        return frozenset(one.point for one in self.decisions if one.action == EXPIRE)

    def groups(self) -> list[tuple[list[Merge], frozenset[str]]]:
        """The merges by the full that they stand on, each with the points that can go once its images are there."""
        by_base: dict[str, list[Merge]] = {}
        for merge in self.merges:
            by_base.setdefault(merge.base, []).append(merge)
        return [
            (merges, frozenset(image.point for merge in merges for image in merge.layers) & self.gone)
            for merges in by_base.values()
        ]


# --- which points are kept -------------------------------------------------------------------------


def chosen(candidates: Sequence[Candidate], policy: Policy, now: datetime) -> dict[str, list[str]]:
    """The points that the policy keeps, each with its reasons. ``candidates`` are in their order, oldest first.

    Each rule counts by itself, and so does each policy. The newest is kept whatever the policy says; without a rule all
    are.
    """
    reasons: dict[str, list[str]] = {}
    for one in (policy, *policy.others):
        for point, why in _kept_by(one, candidates, now).items():
            known = reasons.setdefault(point, [])
            known += [reason for reason in why if reason not in known]
    return reasons


def _kept_by(policy: Policy, candidates: Sequence[Candidate], now: datetime) -> dict[str, list[str]]:
    """The same of one policy by itself."""
    reasons: dict[str, list[str]] = {}

    def keep(one: Candidate, why: str) -> None:
        reasons.setdefault(one.id, []).append(why)

    newest_first = candidates[::-1]
    if not policy.has_rule:
        return {one.id: ["no rule says that it may go"] for one in candidates}
    for one in newest_first[: policy.last]:
        keep(one, f"one of the last {policy.last}")
    for name, period in _PERIODS:
        seen: set[str] = set()
        for one in newest_first:
            if len(seen) == getattr(policy, name):
                break
            if (key := period(one.created)) not in seen:
                seen.add(key)
                keep(one, f"newest of {key}")
    for one in newest_first:
        if policy.within and (now - one.created).total_seconds() <= policy.within:
            keep(one, "young enough")
    for one in newest_first[:1]:
        if one.id not in reasons:
            keep(one, "the newest")
    wanted = policy.verified - sum(one.verified for one in candidates if one.id in reasons)
    others = [one for one in newest_first if one.verified and one.id not in reasons]
    for one in others[: max(0, wanted)]:
        keep(one, f"one of {policy.verified} verified points")
    return reasons


# --- the plan --------------------------------------------------------------------------------------

_LOST = "damaged, or not all there: left for a person to look at"
_WAITING = "without a usable manifest: 'blockbak recover' may bring it back"


def plan(
    images: Sequence[Image],
    policy: Policy,
    now: datetime,
    *,
    pins: Mapping[str, Pin] | None = None,
    verified: Collection[str] = (),
    damaged: Collection[str] = (),
    hidden: Sequence[Image] = (),
) -> Plan:
    """What becomes of a volume's points. ``pins`` hold at ``now``, by point. ``verified`` are points that were, and
    are not damaged since; ``damaged`` the files of images that are known to be; ``hidden`` images that no usable
    manifest names.

    What is damaged or hidden is left, and so is all that it, or an immutable point, stands on.
    """
    pins = pins or {}
    every = points([*images, *hidden])
    serving = _serving([image for image in images if image.file not in damaged])
    good = [
        Candidate(point.id, created(point), verified=point.id in verified) for point in every if point.id in serving
    ]
    reasons = chosen(good, policy, now)
    waiting = {image.point for image in hidden}
    for point in every:
        if point.id in pins:
            reasons.setdefault(point.id, []).append(pins[point.id].reason)
        if point.id not in serving:
            reasons.setdefault(point.id, []).append(_WAITING if point.id in waiting else _LOST)
    untouched = [point.id for point in every if point.id not in serving or _is_immutable(pins, point.id)]
    known = {point.id for point in every}
    for ancestor, needed_by in _ancestors(untouched, [*images, *hidden]).items():
        if ancestor in known:
            reasons.setdefault(ancestor, []).append(f"{needed_by} stands on it")
    _keep_forks(serving, reasons)
    merges = _merges(serving, reasons)
    needed = {image.point: merge.point for merge in reversed(merges) for image in merge.layers[:-1]}
    decisions = []
    for point in every:
        action: Action = KEEP if point.id in reasons else MERGE if point.id in needed else EXPIRE
        why = reasons.get(point.id, ["no rule keeps it"])
        if action == MERGE:
            why = [*why, f"what {needed[point.id]} needs of it goes there"]
        made, lost = point.images[0].opening.created, point.id not in serving
        decisions.append(Decision(point.id, made, action, tuple(why), verified=point.id in verified, damaged=lost))
    return Plan(tuple(decisions), tuple(merges))


def created(point: Point) -> datetime:
    """The moment of a point."""
    return datetime.fromisoformat(point.images[0].opening.created)


def _is_immutable(pins: Mapping[str, Pin], point: str) -> bool:
    return point in pins and pins[point].immutable


def _serving(usable: Sequence[Image]) -> dict[str, tuple[Image, ...]]:
    """For each point that can be restored, the chain that serves it and what stands on it, in the points' order.

    Of chains of one length the one counts that ``chains`` builds others on.
    """
    whole = chains(usable)
    found: dict[str, tuple[Image, ...]] = {}
    for image in sorted(usable, key=lambda image: (image.opening.sequence, image.opening.kind != FULL)):
        chain = whole.get(image.file)
        if chain is not None and (image.point not in found or len(chain) < len(found[image.point])):
            found[image.point] = chain
    return found


def _ancestors(of: Iterable[str], images: Iterable[Image]) -> dict[str, str]:
    """All points that these stand on, by any of their images; each with one that asks for it."""
    parents: dict[str, set[str]] = {}
    for image in images:
        if image.opening.parent is not None:
            parents.setdefault(image.point, set()).add(image.opening.parent)
    found: dict[str, str] = {}
    waiting = [(one, one) for one in of]
    while waiting:
        point, asking = waiting.pop()
        for parent in sorted(parents.get(point, ())):
            if parent not in found:
                found[parent] = asking
                waiting.append((parent, asking))
    return found


def with_bases(pins: Mapping[str, Pin], images: Sequence[Image]) -> dict[str, Pin]:
    """The pins, and one as long as theirs for each point on which an immutable one stands: it is not touched either."""
    found = dict(pins)
    for pin in pins.values():
        for base in _ancestors([pin.point], images) if pin.immutable else ():
            if base not in found or (found[base].until and (not pin.until or pin.until > found[base].until)):
                found[base] = structs.replace(pin, point=base, why=f"{pin.point} stands on it")
    return found


def _keep_forks(serving: Mapping[str, tuple[Image, ...]], reasons: dict[str, list[str]]) -> None:
    """A point on which several kept ones stand, each by itself, stays: it would have to go into all of them."""
    above: dict[str, dict[str, str]] = {}
    for point, chain in serving.items():
        if point not in reasons:
            continue
        for lower, upper in pairwise(chain):
            above.setdefault(lower.point, {})[upper.file] = point
    for lower_point, children in above.items():
        if lower_point not in reasons and len(children) > 1:
            names = sorted(children.values())
            reasons[lower_point] = [f"{names[0]} and {len(children) - 1} more stand on it, each by itself"]


def _merges(serving: Mapping[str, tuple[Image, ...]], kept: Collection[str]) -> list[Merge]:
    """What must be composed so that kept points need no others."""
    found = []
    for point, chain in serving.items():
        if point not in kept:
            continue
        below = max((at + 1 for at, image in enumerate(chain[:-1]) if image.point in kept), default=0)
        if len(chain) - below > 1:
            found.append(Merge(point, chain, below))
    return found


# --- what else is asked of it ------------------------------------------------------------------------


def full_due(of: Sequence[Point], policy: Policy, now: datetime, fulls: Iterable[datetime] = ()) -> bool:
    """Whether the next backup should be a full that is read from the source: images that were composed share disk
    blocks with others, and one bad block would harm them all. ``fulls`` are moments of such fulls that are known of
    although their images are gone.
    """
    if not policy.full_every:
        return False
    made = [
        datetime.fromisoformat(image.opening.created)
        for point in of
        for image in point.images
        if image.opening.kind == FULL and not image.opening.synthetic
    ]
    # One that is to come was made by a clock that was wrong: it would put off the next for as long.
    newest = max((one for one in [*made, *fulls] if one <= now + AHEAD_MOST), default=None)
    return newest is None or (now - newest).total_seconds() >= policy.full_every


@dataclass(slots=True)
class Checks:
    """What the history tells of images and points: the files that were last found ``good`` by a check of all of them,
    or ``bad``; the points that were ``drilled`` well; and when ``fulls`` were read from the source, by volume.
    """

    good: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    drilled: set[str] = field(default_factory=set)
    fulls: list[datetime] = field(default_factory=list)

    def verified(self, images: Sequence[Image]) -> set[str]:
        """The points all images of which, down to the full, were found good; or that were drilled."""
        serving = _serving([image for image in images if image.file not in self.bad])
        whole = {point for point, chain in serving.items() if all(image.file in self.good for image in chain)}
        return whole | (self.drilled & serving.keys())


def checks(entries: Iterable[Entry], volume: str) -> Checks:
    """What the history tells of a volume. A line whose facts are of another form than they should be tells nothing."""
    found = Checks()
    for entry in entries:
        if entry.volume != volume:
            continue
        facts = entry.facts
        if entry.event == "verified":
            # A sample may find damage; that there is none, only a look at everything tells.
            bad, good = _names(facts.get("damaged")), _names(facts.get("images")) if facts.get("share") == 1 else set()
            found.bad = (found.bad - good) | bad
            found.good = (found.good - bad) | good
        elif entry.event == "removed":
            # Their names may be given out anew.
            found.bad -= _names(facts.get("files"))
            found.good -= _names(facts.get("files"))
        elif entry.event == "merged" and facts.get("verified") is True:
            found.good |= _names([facts.get("file")])
        elif entry.event == "drilled":
            change = found.drilled.update if facts.get("ok") is True else found.drilled.difference_update
            change(entry.points)
        elif entry.event in ("made", "adopted") and entry.points and facts.get("kind") == FULL:
            moment = first_moment(entry.time)
            found.fulls += [moment] if moment is not None else []
    return found


def _names(value: object) -> set[str]:
    return {one for one in value if isinstance(one, str)} if isinstance(value, list) else set()


# --- years in a second -------------------------------------------------------------------------------


def interval(candidates: Sequence[Candidate]) -> float:
    """Seconds between points, as it was lately: the median; a day where there are too few to tell."""
    late = candidates[-30:]
    gaps = [(b.created - a.created).total_seconds() for a, b in pairwise(late)]
    return max(1.0, median(gaps)) if gaps else DAY


def simulate(
    candidates: Sequence[Candidate], policy: Policy, now: datetime, until: datetime, pins: Mapping[str, Pin]
) -> list[tuple[Candidate, list[str]]]:
    """The points there will be, each with its reasons, if they go on to be made as lately and the policy is applied
    each day. ``pins`` hold as long as they say.
    """
    there = list(candidates)
    moment = pruned = max([now, *(one.created for one in candidates)])
    seconds = max(0.0, (until - moment).total_seconds())
    step = max(interval(candidates), seconds / SIMULATED_MAX)

    def prune(at: datetime) -> dict[str, list[str]]:
        reasons = chosen(there, policy, at)
        for one in there:
            if one.id in pins and pins[one.id].stands(at):
                reasons.setdefault(one.id, []).append(pins[one.id].reason)
        return reasons

    for _ in range(int(seconds / step)):
        moment = min(until, moment + timedelta(seconds=step))
        there.append(Candidate(f"{moment:%Y%m%dT%H%M%SZ}-....", moment))
        if (moment - pruned).total_seconds() >= DAY:
            reasons = prune(moment)
            there = [one for one in there if one.id in reasons]
            pruned = moment
    reasons = prune(until)
    return [(one, reasons[one.id]) for one in there if one.id in reasons]
