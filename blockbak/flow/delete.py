"""Removes points that nothing else needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blockbak.errors import DamagedImage, PointNeeded
from blockbak.flow.backup import highest_sequence, open_reader
from blockbak.flow.context import Context
from blockbak.flow.restore import find
from blockbak.flow.verify import check_image
from blockbak.model.chain import Image, chains, plan, points
from blockbak.repository.local import Repository, Volume


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


def delete(repository: Repository, names: Sequence[str], context: Context, *, dry_run: bool = False) -> Report:
    """Delete the named points. Raises NoSuchPoint, AmbiguousPoint, PointNeeded, and Damage where an image
    that must take over is not whole; nothing is removed then.
    """
    by_volume: dict[str, set[str]] = {}
    for name in names:
        point = find(repository, name)[2]
        by_volume.setdefault(point.volume, set()).add(point.id)
    with ExitStack() as stack:
        plans: list[tuple[Volume, Removal]] = []
        for name, gone in sorted(by_volume.items()):
            volume = repository.volume(name)
            lock = stack.enter_context(volume.locked(exclusive=True, wait=context.wait, check=context.check))
            catalog = volume.catalog()
            removal = decide(catalog.images, gone)
            plans.append((volume, removal))
            if not dry_run:
                for line in volume.tidy(catalog):
                    context.say(line)
                # The deleted points' sequences must not be used again, even if they were the last.
                lock.remember(highest_sequence(volume, catalog, lock))
        if not dry_run:
            for volume, removal in plans:
                _verify(volume, removal, context)
            for volume, removal in plans:
                for image in removal.images:
                    context.check()
                    volume.remove(image.file)
    images = [image for _, removal in plans for image in removal.images]
    return Report(
        sorted({point for gone in by_volume.values() for point in gone}),
        [image.file for image in images],
        sum(image.image_bytes for image in images),
        [image.file for _, removal in plans for image in removal.verify],
    )


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
