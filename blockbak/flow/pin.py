"""Says that a point stays, or no longer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from blockbak.errors import NotPinned, PointImmutable
from blockbak.flow.context import Context, iso
from blockbak.flow.points import find
from blockbak.flow.recording import recorded
from blockbak.model.identity import plain
from blockbak.model.pin import Pin
from blockbak.repository.local import Repository


def pin(
    repository: Repository, name: str, why: str, context: Context, *, until: datetime | None = None,
    immutable: bool = False,
) -> Pin:  # fmt: skip
    """Pin a point, or pin it otherwise: an immutable one only for longer. Raises NoSuchPoint, AmbiguousPoint,
    PointImmutable, DamagedPin, VolumeLocked, NoSpace, StoreFailed.
    """
    with recorded(repository, "pinned", context, asked=name, why=why) as doing:
        volume, _, point = find(repository, name)
        doing.volume, doing.points = volume.name, [point.id]
        with volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say):
            find(repository, f"{volume.name}@{point.id}")  # it may have gone while the volume was waited for
            made = Pin(
                point.id, plain(why), context.user, context.host, iso(context.now()),
                iso(until) if until else "", immutable,
            )  # fmt: skip
            pins, flaws = volume.pins()
            for error in flaws:
                if error.fields["point"] == point.id:
                    raise error
            old = pins.get(point.id)
            if old is not None and old.immutable and old.stands(context.now()):
                longer = made.immutable and (not made.until or (old.until and made.until >= old.until))
                if not longer:
                    raise PointImmutable(point=point.id, reason=old.reason)
            volume.pin(made)
        doing.facts |= {"until": made.until, "immutable": made.immutable}
    return made


def unpin(repository: Repository, names: Sequence[str], context: Context) -> list[Pin]:
    """Take the pins of points back; those that were. Raises NotPinned, PointImmutable, DamagedPin and what finding a
    point raises; then those before it are unpinned.
    """
    taken = []
    for name in names:
        with recorded(repository, "unpinned", context, asked=name) as doing:
            volume, _, point = find(repository, name)
            doing.volume, doing.points = volume.name, [point.id]
            with volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say):
                pins, flaws = volume.pins()
                for error in flaws:
                    if error.fields["point"] == point.id:
                        raise error
                old = pins.get(point.id)
                if old is None:
                    raise NotPinned(point=point.id)
                if old.immutable and old.stands(context.now()):
                    raise PointImmutable(point=point.id, reason=old.reason)
                volume.unpin(point.id)
            taken.append(old)
    return taken
