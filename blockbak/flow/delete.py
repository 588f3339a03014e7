"""Removes points that nothing else needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from blockbak.errors import (
    Damage,
    DamagedImage,
    Interrupted,
    NewerFormat,
    PointImmutable,
    PointNeeded,
    PointPinned,
)
from blockbak.flow.context import Context
from blockbak.flow.points import find, hidden_images, highest_sequence, open_reader
from blockbak.flow.recording import Doing, recorded
from blockbak.flow.verify import check_image
from blockbak.model.chain import POINT_CHARS, Image, Point, chains, points, shortest
from blockbak.model.pin import standing
from blockbak.repository.local import Catalog, Repository, Volume

Chain: TypeAlias = tuple[Image, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What was, or with ``dry_run`` would be, removed. ``verified`` are the images that now alone hold what
    removed ones held; their frames were read first. ``freed_bytes`` is the disk space that comes back with
    it, ``shared_bytes`` what the removed images share with others, and which stays.
    """

    points: list[str]
    files: list[str]
    freed_bytes: int
    shared_bytes: int
    verified: list[str]


@dataclass(frozen=True, slots=True)
class Removal:
    """A decision: the images that go, in the order in which they may, and those to verify before."""

    images: tuple[Image, ...]
    verify: tuple[Image, ...]


def decide(images: Sequence[Image], gone: Collection[str], hidden: Sequence[Image] = ()) -> Removal:
    """What deleting the points ``gone`` means. Raises PointNeeded if a later point would lose its chain.

    ``hidden`` are images that no usable manifest names: they serve nobody, but once 'recover' has been there
    they are points again, so what they need stays too. Images of kept points that stand on a removed one go
    too, where another image holds their point. The newest go first: at no moment does an image lack its parent.
    """
    every = (*images, *hidden)
    left = [image for image in every if image.point not in gone]
    sound = {image.file for image in images}
    before, after = chains(every), chains(left)
    sound_before, sound_after = chains(images), chains(image for image in left if image.file in sound)
    kept = points(left)
    for point in kept:
        files = [image.file for image in point.images]
        # What serves by itself must go on doing so; what only waits for 'recover', must go on waiting.
        was, now = (sound_before, sound_after) if any(file in sound_before for file in files) else (before, after)
        if any(file in was for file in files) and not any(file in now for file in files):
            chain = min((was[file] for file in files if file in was), key=len)
            needed = next(image.point for image in reversed(chain) if image.point in gone)
            raise PointNeeded(point=needed, needed_by=point.id)
    broken = {image.file for image in left if image.file in before and image.file not in after}
    removed = [image for image in every if image.point in gone or image.file in broken]
    order = sorted(removed, key=lambda image: (image.opening.sequence, image.opening.kind != "full"), reverse=True)
    return Removal(tuple(order), _keepers(kept, {image.file for image in removed}, before, sound_after))


def _keepers(
    kept: Sequence[Point], removed: Collection[str], before: Mapping[str, Chain], after: Mapping[str, Chain]
) -> tuple[Image, ...]:
    """The synthetic images that take over from removed ones."""
    found: dict[str, Image] = {}
    for point in kept:
        files = [image.file for image in point.images]
        affected = any(image.file in removed for file in files for image in before.get(file, ()))
        serving = [after[file] for file in files if file in after]
        if affected and serving:
            found.update({image.file: image for image in shortest(serving) if image.opening.synthetic})
    return tuple(found.values())


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
    """What goes, and the files of images too damaged to be looked at, which go after it."""
    errors = {str(error.fields["image"]): error for error in catalog.damage}
    try:
        removal = decide(catalog.images, gone, list(hidden_images(volume, catalog, strict=True)))
    except PointNeeded as refusal:
        needed_by = str(refusal.fields["needed_by"])
        if any(file.startswith(needed_by) for file in catalog.orphans):
            refusal.add_note(f"{needed_by} has no manifest: 'blockbak recover' makes it a point, which can be deleted.")
        # It may be that another image serves, and only its manifest cannot be used.
        for error in catalog.damage:
            if error.fields["point"] == needed_by:
                raise error from refusal
        raise
    for image in removal.images:
        if image.file in errors and image.point not in gone:
            raise errors[image.file]
    files = {image.file for image in removal.images}
    unknown = [file for file, error in errors.items() if error.fields["point"] in gone and file not in files]
    unknown += [file for file in catalog.orphans if file[:POINT_CHARS] in gone and file not in files]
    _spare_hopes(catalog.images, gone, {file[:POINT_CHARS] for file in unknown})
    return removal, unknown


def _spare_hopes(images: Sequence[Image], gone: Collection[str], broken: Collection[str]) -> None:
    """What stands on a missing or damaged image is lost only as long as no copy of it is found.

    Raises PointNeeded while a kept point still asks for one of the ``broken`` points.
    """
    whole = chains(images)
    served = {image.point for image in images if image.file in whole}
    for image in images:
        if image.point not in gone and image.point not in served and image.opening.parent in broken:
            raise PointNeeded(point=image.opening.parent, needed_by=image.point)


def delete(repository: Repository, names: Sequence[str], context: Context, *, dry_run: bool = False) -> Report:
    """Delete the named points. Raises NoSuchPoint, AmbiguousPoint, PointNeeded, PointPinned, PointImmutable, and
    Damage where an image that must take over is not whole, or where it cannot be told what an image needs; nothing is
    removed then.
    """
    if dry_run:
        return _delete(repository, names, context, Doing(), dry_run=True)
    with recorded(repository, "removed", context, asked=list(names)) as doing:
        return _delete(repository, names, context, doing, dry_run=False)


def _delete(repository: Repository, names: Sequence[str], context: Context, doing: Doing, *, dry_run: bool) -> Report:
    by_volume: dict[str, set[str]] = {}
    asked = [_named(repository, name) for name in names]
    for volume_name, point in asked:
        by_volume.setdefault(volume_name, set()).add(point)
    with ExitStack() as stack:
        plans: list[tuple[Volume, Removal, list[str]]] = []
        for name, gone in sorted(by_volume.items()):
            volume = repository.volume(name)
            lock = stack.enter_context(
                volume.locked(exclusive=not dry_run, wait=context.wait, check=context.check, say=context.say)
            )
            catalog = volume.catalog()
            removal, broken = _decide(volume, catalog, gone)
            check_pins(volume, gone, removal.images, context)
            plans.append((volume, removal, broken))
            if not dry_run:
                for line in volume.tidy(catalog):
                    context.say(line)
                # The deleted points' sequences must not be used again, even if they were the last.
                lock.remember(highest_sequence(volume, catalog, lock))
        if not dry_run:
            for volume, removal, _ in plans:
                verify(volume, removal.verify, context)
        spaces = [volume.space_of(_files(removal, broken)) for volume, removal, broken in plans]
        if not dry_run:
            _remove(plans, by_volume, context, doing)
    images = [image for _, removal, _ in plans for image in removal.images]
    return Report(
        list(dict.fromkeys(point for _, point in asked)),
        [image.file for image in images] + [file for _, _, broken in plans for file in broken],
        sum(space.own for space in spaces),
        sum(space.shared for space in spaces),
        [image.file for _, removal, _ in plans for image in removal.verify],
    )


def _files(removal: Removal, broken: Sequence[str]) -> list[str]:
    """What goes, in the order in which it may."""
    return [*(image.file for image in removal.images), *broken]


def _remove(
    plans: Sequence[tuple[Volume, Removal, list[str]]], gone: Mapping[str, Collection[str]], context: Context,
    doing: Doing,
) -> None:  # fmt: skip
    removed = 0
    for volume, removal, broken in plans:
        files: list[str] = []
        doing.part(volume.name, sorted(gone[volume.name]), files=files)
        for file in _files(removal, broken):
            try:
                context.check()
            except Interrupted as error:
                raise Interrupted(state=f"{removed} images were removed, what is left is whole") from error
            volume.remove(file)
            files.append(file)
            removed += 1
        for point in gone[volume.name]:
            volume.unpin(point)  # one whose time is over


def check_pins(volume: Volume, gone: Collection[str], images: Sequence[Image], context: Context) -> None:
    """None of the points ``gone`` may be pinned, and none of the ``images`` that go be an immutable point's. Raises
    PointPinned, PointImmutable; and what makes a pin unreadable, where it is one of these.
    """
    pins, flaws = volume.pins()
    unread = {error.fields["point"]: error for error in flaws}
    for point, pin in standing(pins.values(), context.now()).items():
        if pin.immutable and (point in gone or any(image.point == point for image in images)):
            raise unread.get(point, PointImmutable(point=point, reason=pin.reason))
        if point in gone:
            raise PointPinned(point=point, reason=pin.reason)


def verify(volume: Volume, images: Sequence[Image], context: Context) -> None:
    """Read images that take over from others, frame by frame. Raises DamagedImage."""
    if not images:
        return
    context.progress.begin("verifying what is kept", sum(image.image_bytes for image in images))
    try:
        for image in images:
            with ExitStack() as stack:
                flaws, _ = check_image(open_reader(volume, image, stack, from_disk=True), context)
            if flaws:
                raise DamagedImage(file=image.file, reason=f"{flaws[0].reason}; nothing was deleted")
    finally:
        context.progress.end()
