"""Applies a retention policy to a volume: composes what kept points need of others, and removes those."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime

from blockbak.errors import ATTENTION, Damage, NewerFormat, NoMergeRoom
from blockbak.flow import delete
from blockbak.flow.context import Context, iso
from blockbak.flow.points import culprit, hidden_images, highest_sequence, open_chain, open_reader
from blockbak.flow.recording import Doing, recorded
from blockbak.flow.synthesize import compose
from blockbak.flow.verify import check_image
from blockbak.model import retention
from blockbak.model.chain import POINT_CHARS, Image
from blockbak.model.facts import FULL
from blockbak.model.pin import Pin, standing
from blockbak.model.retention import EXPIRE, KEEP, Candidate, Checks, Decision, Merge, Plan, Policy
from blockbak.repository.local import Catalog, Repository, Volume
from blockbak.units import MIB

_REENCODED = 4
"""A changed block of 64 KiB may have its window of 256 KiB encoded anew, where all else is cloned."""


@dataclass(frozen=True, slots=True)
class Report:
    """What became, or with ``dry_run`` would become, of a volume's points. ``composed`` are the new images, of
    ``composed_bytes`` (at most so many, where they were not made), ``removed`` the files that went. ``freed_bytes`` is
    the disk space that comes back with those, ``shared_bytes`` what stays because others share it; ``image_bytes`` what
    all images have afterwards. ``full_due``: the next backup should be a full. ``damage`` tells what did not count.
    ``as_of`` is the moment for which it was asked, where that is not now.
    """

    volume: str
    decisions: tuple[Decision, ...]
    composed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    composed_bytes: int = 0
    freed_bytes: int = 0
    shared_bytes: int = 0
    image_bytes: int = 0
    full_due: bool = False
    damage: list[str] = field(default_factory=list)
    dry_run: bool = False
    as_of: str = ""
    seconds: float = 0.0

    @property
    def attention(self) -> bool:
        """Something a person must look at."""
        return bool(self.damage)


# --- the plan --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Known:
    """All that a plan is made of; ``flaws`` tell what is wrong with it."""

    volume: Volume
    catalog: Catalog
    hidden: tuple[Image, ...]
    pins: dict[str, Pin]
    checks: Checks
    flaws: list[str]

    @property
    def images(self) -> list[Image]:
        """Those that are not known to be damaged."""
        return [image for image in self.catalog.images if image.file not in self.checks.bad]

    def plan(self, policy: Policy, now: datetime) -> Plan:
        """What becomes of the points there are."""
        return retention.plan(
            self.catalog.images, policy, now, pins=standing(self.pins.values(), now),
            verified=self.checks.verified(self.catalog.images), damaged=self.checks.bad, hidden=self.hidden,
        )  # fmt: skip

    def until(self, moment: datetime) -> _Known:
        """As if nothing had been made since."""
        catalog = replace(
            self.catalog,
            images=[one for one in self.catalog.images if datetime.fromisoformat(one.opening.created) <= moment],
        )
        return replace(self, catalog=catalog)


def _look(repository: Repository, volume: Volume, catalog: Catalog, bad: Collection[str]) -> _Known:
    """``bad`` are files that were found damaged just now. Raises UnreadableStore, NoPermission, NewerFormat where it
    cannot be told what an image needs.
    """
    hidden = tuple(hidden_images(volume, catalog, strict=True))
    pins, flaws = volume.pins()
    checks = retention.checks(repository.record.entries(), volume.name)
    checks.bad |= {*bad}
    there = {image.file for image in catalog.images}
    told = [f"{file} was found damaged, and never whole since." for file in sorted(checks.bad & there)]
    return _Known(volume, catalog, hidden, pins, checks, [str(one) for one in (*catalog.damage, *flaws)] + told)


def _damage(known: _Known, plan: Plan) -> list[str]:
    """Why points do not count."""
    lost = [f"{one.point} cannot be restored: it does not count, and is left." for one in plan.decisions if one.damaged]
    return [f"{known.volume.name}: {line}" for line in (*known.flaws, *lost)]


def _foreseen(known: _Known, plan: Plan, policy: Policy, now: datetime) -> Report:
    """What carrying out the plan would do."""
    composed = [merge.imagined() for merge in plan.merges]
    removal = delete.decide([*known.images, *composed], plan.gone, known.hidden)
    going = [*(image.file for image in removal.images), *_also(known, plan.gone, removal)]
    space = known.volume.space_of(going)
    there = [*known.catalog.images, *composed]
    return Report(
        known.volume.name, plan.decisions, [image.file for image in composed], going,
        sum(image.image_bytes for image in composed), space.own, space.shared,
        sum(image.image_bytes for image in there if image.file not in going),
        _is_due(known, plan, policy, now), _damage(known, plan), dry_run=True,
    )  # fmt: skip


def _also(known: _Known, gone: Collection[str], removal: delete.Removal) -> list[str]:
    """Damaged images of points that go by others: they go too."""
    files = {image.file for image in removal.images}
    return [one.file for one in known.catalog.images if one.point in gone and one.file not in files]


def _is_due(known: _Known, plan: Plan, policy: Policy, now: datetime) -> bool:
    lost = {one.point for one in plan.decisions if one.damaged}
    points = [point for point in known.catalog.points if point.id not in lost]
    return retention.full_due(points, policy, now, known.checks.fulls)


def _simulated(known: _Known, policy: Policy, now: datetime, until: datetime) -> Report:
    """What there will be at a moment to come, if points go on to be made as lately."""
    plan = known.plan(policy, now)
    created = {point.id: retention.created(point) for point in known.catalog.points}
    candidates = [
        Candidate(one.point, created[one.point], one.verified)
        for one in plan.decisions
        if one.point in created and not one.damaged
    ]
    there = retention.simulate(candidates, policy, now, until, retention.with_bases(known.pins, known.catalog.images))
    kept = {one.id: tuple(why) for one, why in there}

    def then(one: Decision) -> Decision:
        why = kept.get(one.point, ("no rule keeps it until then",))
        return one if one.damaged else replace(one, action=KEEP if one.point in kept else EXPIRE, reasons=why)

    decisions = [then(one) for one in plan.decisions]
    decisions += [
        Decision(one.id, iso(one.created), KEEP, tuple(why), simulated=True)
        for one, why in there
        if one.id not in created
    ]
    return Report(known.volume.name, tuple(decisions), damage=_damage(known, plan), dry_run=True, as_of=iso(until))


# --- carrying it out ---------------------------------------------------------------------------------


def prune(
    repository: Repository,
    volume_name: str,
    policy: Policy,
    context: Context,
    *,
    dry_run: bool = False,
    as_of: datetime | None = None,
    compress: str = "zstd",
) -> Report:
    """Keep of a volume what the policy says. ``as_of`` only tells what that is, or will be, at another moment.

    Raises NoSuchVolume, VolumeLocked, NoMergeRoom, NoSpace, StoreFailed, UnreadableStore, NewerFormat, Interrupted; at
    no moment a kept point lacks what it needs.
    """
    clock, now = context.timer(), context.now()
    volume = repository.volume(volume_name)
    only_told = dry_run or as_of is not None
    with ExitStack() as stack:
        lock = stack.enter_context(
            volume.locked(exclusive=not only_told, wait=context.wait, check=context.check, say=context.say)
        )
        if only_told:
            known = _look(repository, volume, volume.catalog(), ())
            if as_of is not None and as_of > now:
                return _simulated(known, policy, now, as_of)
            if as_of is None:
                return _foreseen(known, known.plan(policy, now), policy, now)
            known = known.until(as_of)
            return replace(_foreseen(known, known.plan(policy, as_of), policy, as_of), as_of=iso(as_of))
        with recorded(repository, "removed", context, volume=volume_name, by="prune") as doing:
            catalog = volume.catalog()
            for line in volume.tidy(catalog):
                context.say(line)
            # The sequences of what goes must not be used again, even if they were the last.
            lock.remember(highest_sequence(volume, catalog, lock))
            report = _Pruning(repository, volume, policy, now, context, doing, compress).run(catalog)
            doing.quiet = not report.removed
            doing.exit = ATTENTION if report.attention else 0
    return replace(report, seconds=round(context.timer() - clock - lock.waited, 3))


@dataclass(slots=True)
class _Pruning:
    """The carrying out of a policy in a volume that is held."""

    repository: Repository
    volume: Volume
    policy: Policy
    now: datetime
    context: Context
    doing: Doing
    compress: str
    bad: set[str] = field(default_factory=set)
    composed: list[Image] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    freed: int = 0
    shared: int = 0

    def run(self, catalog: Catalog) -> Report:
        """All of it. What turns out to be damaged on the way is left, and the rest planned anew."""
        decisions: dict[str, Decision] = {}
        while True:
            known = _look(self.repository, self.volume, catalog, self.bad)
            plan = known.plan(self.policy, self.now)
            decisions |= {one.point: one for one in plan.decisions}
            if self._carry_out(known, plan):
                break
            catalog = self.volume.catalog()
        left = self._left(known).catalog.images
        return Report(
            self.volume.name, tuple(decisions.values()), [image.file for image in self.composed], self.removed,
            sum(image.image_bytes for image in self.composed), self.freed, self.shared,
            sum(image.image_bytes for image in left), _is_due(known, plan, self.policy, self.now),
            _damage(known, plan),
        )  # fmt: skip

    def _carry_out(self, known: _Known, plan: Plan) -> bool:
        """Remove what nobody needs, then merge, chain by chain; False where damage was met."""
        # First: the room that it gives back may be what the rest takes.
        self._remove(known, plan.expired, [])
        for merges, points in plan.groups():
            self._check_room(merges)
            made: list[Image] = []
            for merge in merges:
                self.context.check()
                image = self._merged(merge)
                if image is None:
                    return False
                made.append(image)
            # The new images are durable and read back before the old ones go.
            self._remove(self._left(known), points, made)
        return True

    def _left(self, known: _Known) -> _Known:
        """What is known, with what was composed and without what was removed since. Not read anew: the volume is held,
        and a manifest that cannot be read just now would hide an image from whoever decides what others need.
        """
        there = {image.file: image for image in (*known.catalog.images, *self.composed)}
        images = [image for file, image in there.items() if file not in self.removed]
        hidden = tuple(image for image in known.hidden if image.file not in self.removed)
        return replace(known, catalog=replace(known.catalog, images=images), hidden=hidden)

    def _check_room(self, merges: Sequence[Merge]) -> None:
        """Raises NoMergeRoom."""
        needed = sum(merge.bytes_max for merge in merges)
        status = os.statvfs(self.volume.path)
        free = status.f_bavail * status.f_frsize
        if free < needed and self._clones(merges[0].chain[0]):
            needed = sum(min(merge.bytes_max, self._encoded_max(merge)) for merge in merges)
        if free < needed:
            raise NoMergeRoom(volume=self.volume.name, needed=needed, free=free)

    def _clones(self, image: Image) -> bool:
        """Whether images of the volume can share disk blocks."""
        name = self.volume.free_name(image.point, FULL)
        with self.volume.open_image(image.file) as source, self.volume.begin(name) as partial:
            return partial.clone_unit(source) > 0

    def _encoded_max(self, merge: Merge) -> int:
        """Bytes that are written where the frames of the lowest layer, which is nearly all of it, are cloned."""
        return MIB + _REENCODED * sum(image.image_bytes for image in merge.layers[1:])

    def _merged(self, merge: Merge) -> Image | None:
        """The composed image, its frames read and checked; None where an image it is made of is damaged."""
        name = self.volume.name
        try:
            with ExitStack() as stack, recorded(self.repository, "merged", self.context, volume=name) as doing:
                doing.points = [merge.point]
                view = open_chain(self.volume, merge.chain, stack)
                view.check()
                image, tally = compose(self.volume, view, merge.below, merge.kind, self.compress, self.context)
                try:
                    delete.verify(self.volume, [image], self.context)
                except Damage:
                    self.volume.remove(image.file)
                    raise
                doing.facts |= {
                    "kind": image.opening.kind, "file": image.file, "stored_bytes": image.image_bytes,
                    "of": [layer.point for layer in merge.layers], "verified": True, "by": "prune",
                    "cloned_bytes": tally.cloned_bytes,
                }  # fmt: skip
        except (Damage, NewerFormat) as error:
            found = self._culprits(merge)
            if not found:
                raise
            self.context.say(f"{merge.point} is left as it is: {error}")
            self.bad |= found
            return None
        self.composed.append(image)
        return image

    def _culprits(self, merge: Merge) -> set[str]:
        """The images of a merge that are damaged, in their structure or in a frame."""
        found = set()
        for image in merge.chain:
            with ExitStack() as stack:
                try:
                    flaws, _ = check_image(open_reader(self.volume, image, stack, from_disk=True), self.context)
                    if flaws:
                        found.add(image.file)
                except (Damage, NewerFormat):
                    found.add(image.file)
        if not found:
            with ExitStack() as stack:
                try:
                    open_chain(self.volume, merge.chain, stack).check()
                except (Damage, NewerFormat):
                    found.add(culprit(self.volume, merge.chain))
        return found

    def _remove(self, known: _Known, gone: Collection[str], verified: Sequence[Image]) -> None:
        """Remove points that nobody needs any more; those that take over were ``verified``, or are now."""
        if not gone:
            return
        removal = delete.decide(known.images, gone, known.hidden)
        delete.check_pins(self.volume, gone, removal.images, self.context)
        fresh = {image.file for image in verified}
        delete.verify(self.volume, [image for image in removal.verify if image.file not in fresh], self.context)
        files = [*(image.file for image in removal.images), *_also(known, gone, removal)]
        space = self.volume.space_of(files)
        self.doing.facts["files"] = self.removed
        for file in files:
            self.context.check()
            self.volume.remove(file)
            self.removed.append(file)
            if (point := file[:POINT_CHARS]) in gone and point not in self.doing.points:
                self.doing.points.append(point)
        for point in gone:
            self.volume.unpin(point)  # one whose time is over
        self.freed, self.shared = self.freed + space.own, self.shared + space.shared
