"""Images, the points they hold, and the chain that restores a point: the newest image wins."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from blockbak.errors import AmbiguousPoint, Gap, NoSuchPoint, NoSuchVolume
from blockbak.model.facts import FULL, Closing, Opening
from blockbak.model.when import last_moment

POINT_CHARS = 21
"""Of a point's id, with which the names of its files begin."""


def moment_of_id(point: str) -> datetime | None:
    """When a point was made, to the second, as its id tells it; None for what is no id."""
    try:
        return datetime.strptime(point.partition("-")[0], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Image:
    """One image: its file's name in the volume's directory, its size, what it says, how many sections it has."""

    file: str
    image_bytes: int
    closing_sha256: str
    opening: Opening
    closing: Closing
    sections: int

    @property
    def point(self) -> str:
        """The id of the point that it holds."""
        return self.opening.point

    @property
    def key(self) -> tuple[str, str]:
        """Point and root: what a child asks of its parent."""
        return self.opening.point, self.closing.root


@dataclass(frozen=True, slots=True)
class Point:
    """A restore point and the images that hold it, the one that came first first."""

    id: str
    images: tuple[Image, ...]

    @property
    def volume(self) -> str:
        """The name of its volume."""
        return self.images[0].opening.volume

    @property
    def sequence(self) -> int:
        """Its place in the volume's history."""
        return self.images[0].opening.sequence

    @property
    def has_full(self) -> bool:
        """Whether one of its images is a full, made or composed."""
        return any(image.opening.kind == FULL for image in self.images)


def points(images: Iterable[Image]) -> list[Point]:
    """The points of one volume, oldest first: order is the sequence, never a clock."""
    grouped: dict[str, list[Image]] = {}
    for image in sorted(images, key=lambda image: (image.opening.sequence, image.closing.finished, image.file)):
        grouped.setdefault(image.point, []).append(image)
    return [Point(name, tuple(group)) for name, group in grouped.items()]


def chains(images: Iterable[Image]) -> dict[str, tuple[Image, ...]]:
    """For each image file whose chain is whole: the images that restore its point, base first.

    Where a parent is held by several images, the one with the shortest chain serves.
    """
    whole: dict[str, tuple[Image, ...]] = {}
    best: dict[tuple[str, str], tuple[Image, ...]] = {}
    for image in sorted(images, key=lambda image: (image.opening.sequence, image.opening.kind != FULL)):
        if image.opening.kind == FULL:
            chain: tuple[Image, ...] = (image,)
        else:
            below = best.get((image.opening.parent or "", image.opening.parent_root or ""))
            if below is None:
                continue
            chain = (*below, image)
        whole[image.file] = chain
        if image.key not in best or len(chain) < len(best[image.key]):
            best[image.key] = chain
    return whole


def shortest(found: Iterable[tuple[Image, ...]]) -> tuple[Image, ...]:
    """The chain with the fewest images, of several such the one with the fewest bytes. There must be one."""
    return min(found, key=lambda chain: (len(chain), sum(image.image_bytes for image in chain)))


def plan(point: Point, images: Iterable[Image], without: Collection[str] = ()) -> tuple[Image, ...]:
    """The shortest chain that restores ``point``, base first; images named in ``without`` do not count.

    Raises Gap, naming the first missing parent.
    """
    usable = [image for image in images if image.file not in without]
    whole = chains(usable)
    candidates = [whole[image.file] for image in point.images if image.file in whole]
    if candidates:
        return shortest(candidates)
    raise Gap(point=point.id, parent=_missing(point, usable))


def _missing(point: Point, images: Sequence[Image]) -> str:
    """The nearest ancestor that no image holds as it was: with the root that the image above it asks for."""
    by_key = {image.key: image for image in images}
    image = min(point.images, key=lambda image: image.opening.kind == FULL)
    while (below := by_key.get((image.opening.parent or "", image.opening.parent_root or ""))) is not None:
        image = below
    return image.opening.parent or point.id


def choose(name: str, by_volume: dict[str, list[Point]]) -> Point:
    """The point a person named: an id, a unique prefix, ``latest``, ``VOLUME@latest``,
    ``VOLUME@PREFIX`` or ``VOLUME@TIME`` (the newest not after it).

    Raises NoSuchPoint, AmbiguousPoint or NoSuchVolume.
    """
    volume, at, rest = name.rpartition("@")
    if at:
        if volume not in by_volume:
            raise NoSuchVolume(volume=volume)
        by_volume = {volume: by_volume[volume]}
    if rest == "latest":
        newest = [group[-1] for group in by_volume.values() if group]
        return _only(name, newest, [f"{point.volume}@latest" for point in newest])
    every = [point for group in by_volume.values() for point in group]
    found = [point for point in every if rest and point.id.startswith(rest)]
    then = last_moment(rest) if at and not found else None
    if then is not None:
        found = [point for point in every if datetime.fromisoformat(point.images[0].opening.created) <= then][-1:]
    return _only(name, found, [point.id for point in found])


def _only(name: str, found: Sequence[Point], names: Sequence[str]) -> Point:
    if not found:
        raise NoSuchPoint(point=name)
    exact = [point for point in found if point.id == name]
    if len(found) > 1 and not exact:
        raise AmbiguousPoint(point=name, candidates=", ".join(names[:8]) + (" …" if len(names) > 8 else ""))
    return exact[0] if exact else found[0]
