"""Removes points that nothing else needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blockbak.errors import Damage, DamagedImage, Interrupted, NewerFormat, PointNeeded
from blockbak.flow.context import Context
from blockbak.flow.points import find, hidden_images, highest_sequence, open_reader
from blockbak.flow.verify import check_image
from blockbak.model.chain import POINT_CHARS, Image, chains, plan, points
from blockbak.repository.local import Catalog, Repository, Volume


@dataclass(frozen=True, slots=True)
class Report:
    """What was, or with ``dry_run`` would be, removed. ``verified`` are the images that now alone hold what
    removed ones held; their frames were read first.
    """

    points: list[str]
    files: list[str]
    freed_bytes: int
    verified: list[str]


@dataclass(frozen=True, slots=True)
class Removal:
    """A decision: the images that go, in the order in which they may, and those to verify before."""

    images: tuple[Image, ...]
    verify: tuple[Image, ...]


def decide(images: Sequence[Image], gone: Collection[str]) -> Removal:
    """What deleting the points ``gone`` means. Raises PointNeeded if a later point would lose its chain.

    Images of kept points that stand on a removed one go too, where another image holds their point. The
    newest go first: at no moment does an image lack its parent.
    """
    before = chains(images)
    left = [image for image in images if image.point not in gone]
    after = chains(left)
    kept = points(left)
    for point in kept:
        served = any(image.file in before for image in point.images)
        if served and not any(image.file in after for image in point.images):
            chain = plan(point, images)
            needed = next(image.point for image in reversed(chain) if image.point in gone)
            raise PointNeeded(point=needed, needed_by=point.id)
    broken = {image.file for image in left if image.file in before and image.file not in after}
    removed = [image for image in images if image.point in gone or image.file in broken]
    files = {image.file for image in removed}
    affected = [
        point
        for point in kept
        if any(files & {one.file for one in before.get(image.file, ())} for image in point.images)
    ]
    keepers = {
        image.file: image
        for point in affected
        if any(image.file in after for image in point.images)
        for image in plan(point, left)
        if image.opening.synthetic
    }
    order = sorted(removed, key=lambda image: (image.opening.sequence, image.opening.kind != "full"), reverse=True)
    return Removal(tuple(order), tuple(keepers.values()))


def guard(removal: Removal, images: Sequence[Image], hidden: Sequence[Image], gone: Collection[str]) -> list[Image]:
    """Images without a usable manifest are points again once 'recover' has been there: their parents stay.

    The hidden images that lose their chain although another image goes on holding their point. Raises
    PointNeeded if one that alone holds its point would lose it.
    """
    files = {image.file for image in removal.images}
    left = [image for image in images if image.file not in files]
    before = chains((*images, *hidden))
    after = chains((*left, *(image for image in hidden if image.point not in gone)))
    served = {image.point for image in left if image.file in after}
    lost = [one for one in hidden if one.point not in gone and one.file in before and one.file not in after]
    for image in lost:
        if image.point not in served:
            needed = next(one.point for one in reversed(before[image.file]) if one.file in files)
            raise PointNeeded(point=needed, needed_by=image.point)
    return lost


def _named(repository: Repository, name: str) -> tuple[str, str]:
    """Volume and id of a point. One that cannot be used any more can be deleted too, by its whole id."""
    try:
        point = find(repository, name)[2]
    except (Damage, NewerFormat) as error:
        if error.fields.get("point") != name.rpartition("@")[2]:
            raise
        return str(error.fields["volume"]), str(error.fields["point"])
    return point.volume, point.id


def _decide(volume: Volume, catalog: Catalog, gone: Collection[str]) -> tuple[Removal, list[str]]:
    """What goes, and the files of unusable images that go after it."""
    hidden = list(hidden_images(volume, catalog, strict=True))
    errors = {str(error.fields["image"]): error for error in catalog.damage}
    try:
        removal = decide(catalog.images, gone)
    except PointNeeded as refusal:
        # It may be that another image serves, and only its manifest cannot be used.
        for error in catalog.damage:
            if error.fields["point"] == refusal.fields["needed_by"]:
                raise error from refusal
        raise
    lost = guard(removal, catalog.images, hidden, gone)
    for image in lost:
        if image.file in errors:
            raise errors[image.file]
    broken = [image.file for image in lost]
    broken += [file for file, error in errors.items() if error.fields["point"] in gone]
    broken += [file for file in catalog.orphans if file[:POINT_CHARS] in gone]
    return removal, broken


def delete(repository: Repository, names: Sequence[str], context: Context, *, dry_run: bool = False) -> Report:
    """Delete the named points. Raises NoSuchPoint, AmbiguousPoint, PointNeeded, and Damage where an image
    that must take over is not whole, or where it cannot be told what an image needs; nothing is removed then.
    """
    by_volume: dict[str, set[str]] = {}
    for name in names:
        volume_name, point = _named(repository, name)
        by_volume.setdefault(volume_name, set()).add(point)
    with ExitStack() as stack:
        plans: list[tuple[Volume, Removal, list[str]]] = []
        for name, gone in sorted(by_volume.items()):
            volume = repository.volume(name)
            lock = stack.enter_context(volume.locked(exclusive=True, wait=context.wait, check=context.check))
            catalog = volume.catalog()
            plans.append((volume, *_decide(volume, catalog, gone)))
            if not dry_run:
                for line in volume.tidy(catalog):
                    context.say(line)
                # The deleted points' sequences must not be used again, even if they were the last.
                lock.remember(highest_sequence(volume, catalog, lock))
        if not dry_run:
            for volume, removal, _ in plans:
                _verify(volume, removal, context)
            _remove(plans, context)
    images = [image for _, removal, _ in plans for image in removal.images]
    return Report(
        sorted({point for gone in by_volume.values() for point in gone}),
        [image.file for image in images] + [file for _, _, broken in plans for file in broken],
        sum(image.image_bytes for image in images),
        [image.file for _, removal, _ in plans for image in removal.verify],
    )


def _remove(plans: Sequence[tuple[Volume, Removal, list[str]]], context: Context) -> None:
    removed = 0
    for volume, removal, broken in plans:
        for file in (*(image.file for image in removal.images), *broken):
            try:
                context.check()
            except Interrupted as error:
                raise Interrupted(state=f"{removed} images were removed, what is left is whole") from error
            volume.remove(file)
            removed += 1


def _verify(volume: Volume, removal: Removal, context: Context) -> None:
    """Read the images that take over, frame by frame. Raises DamagedImage."""
    if not removal.verify:
        return
    context.progress.begin("verifying what is kept", sum(image.image_bytes for image in removal.verify))
    try:
        for image in removal.verify:
            with ExitStack() as stack:
                flaws, _ = check_image(open_reader(volume, image, stack), context)
            if flaws:
                raise DamagedImage(file=image.file, reason=f"{flaws[0].reason}; nothing was deleted")
    finally:
        context.progress.end()
