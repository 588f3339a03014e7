"""Finds the point a person named, and opens the chain of images that restores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from blockbak.errors import (
    AmbiguousPoint,
    BlockbakError,
    Damage,
    DamagedImage,
    DamagedManifest,
    Gap,
    NewerFormat,
    NoSuchPoint,
    NoSuchVolume,
)
from blockbak.host.lock import Lock
from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView, Summary
from blockbak.model import partition
from blockbak.model.chain import Image, Point, choose, plan
from blockbak.model.facts import FULL
from blockbak.model.when import last_moment
from blockbak.repository.local import Catalog, Repository, Volume

# --- finding a point -----------------------------------------------------------------------------


def find(repository: Repository, name: str) -> tuple[Volume, Catalog, Point]:
    """The point a person named, with its volume. Raises NoSuchPoint, AmbiguousPoint, NoSuchVolume, and
    what makes the manifest of the point that was meant unusable: never an older one in its place.
    """
    volume_name, at, rest = name.rpartition("@")
    asked = {one.name: one.catalog() for one in repository.volumes() if not at or one.name == volume_name}
    try:
        point = choose(name, {volume: catalog.points for volume, catalog in asked.items()})
    except (NoSuchPoint, NoSuchVolume):
        if (error := _unusable(rest, asked)) is not None:
            raise error from None
        raise
    if rest == "latest":
        _check_others(point, asked)
    elif point.id.startswith(rest):
        _check_prefix(name, rest, point, asked)
        return repository.volume(point.volume), asked[point.volume], point
    volume, catalog = repository.volume(point.volume), asked[point.volume]
    # What a damaged manifest hides may be what was meant.
    if (error := damage_since(volume, catalog, point, until=last_moment(rest))) is not None:
        raise error
    return volume, catalog, point


def newest_points(repository: Repository) -> list[str]:
    """The name ``VOLUME@latest`` of each volume that has points, or should have."""
    catalogs = {one.name: one.catalog() for one in repository.volumes()}
    return [f"{name}@latest" for name, catalog in catalogs.items() if catalog.images or catalog.damage]


def _unusable(rest: str, asked: dict[str, Catalog]) -> BlockbakError | None:
    """Why a point of that name, or every point of the volume, cannot be had although it is there."""
    for catalog in asked.values():
        for error in reversed(catalog.damage):
            if rest and (str(error.fields["point"]).startswith(rest) or (rest == "latest" and not catalog.images)):
                return error
    return None


def _check_others(point: Point, asked: dict[str, Catalog]) -> None:
    """'latest' is clear only where one volume has points. Raises what hides all points of another."""
    for own, catalog in asked.items():
        if own != point.volume and catalog.damage:
            raise catalog.damage[-1]


def _check_prefix(name: str, rest: str, point: Point, asked: dict[str, Catalog]) -> None:
    """A beginning must not fit what a damaged manifest hides as well. Raises AmbiguousPoint."""
    if point.id == rest:
        return
    hidden = {str(error.fields["point"]) for catalog in asked.values() for error in catalog.damage}
    alike = {point.id, *(one for one in hidden if one.startswith(rest))}
    if len(alike) > 1:
        raise AmbiguousPoint(point=name, candidates=", ".join(sorted(alike)))


def hidden_images(volume: Volume, catalog: Catalog, *, strict: bool = False) -> Iterator[Image]:
    """The whole-looking images that no usable manifest names: orphans, and those whose manifest is damaged.

    One that is damaged itself is left out. ``strict`` raises UnreadableStore, NoPermission or NewerFormat
    where it cannot be told what an image is.
    """
    for file in (*catalog.orphans, *catalog.hidden):
        try:
            with volume.open_image(file) as source:
                reader = ImageReader(source)
                yield Image(
                    file, source.size, reader.closing_sha256, reader.opening, reader.closing, len(reader.sections)
                )
        except BlockbakError as error:
            if strict and not isinstance(error, DamagedImage):
                raise


def damage_since(
    volume: Volume, catalog: Catalog, point: Point, *, fulls: bool = False, until: datetime | None = None
) -> BlockbakError | None:
    """What makes a point unusable that is newer than ``point``, and made not later than ``until``; None if
    there is none. ``fulls`` looks at fulls alone. Where the manifest or the image of such a point still tells
    its sequence, that decides, else the date in its name.
    """
    told = {image.file: image.opening.sequence for image in hidden_images(volume, catalog)} if catalog.damage else {}
    known = {one.id for one in catalog.points}
    for error in catalog.damage:
        name, kind, image = (str(error.fields[key]) for key in ("point", "kind", "image"))
        sequence = error.fields.get("sequence", told.get(image))
        newer = sequence > point.sequence if isinstance(sequence, int) else name > point.id
        late = until is not None and _made(name) > until
        if newer and not late and name not in known and (kind == FULL or not fulls):
            return error
    return None


def _made(point: str) -> datetime:
    """The moment that a point's id begins with."""
    return datetime.strptime(point[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)


def newer_orphans(volume: Volume, catalog: Catalog, point: Point, name: str) -> list[str]:
    """A sentence for each image that is newer than ``point`` and has no manifest, where ``name`` asked for
    the newest.
    """
    if name.rpartition("@")[2] != "latest" or not catalog.orphans:
        return []
    return [
        f"{image.point} is newer and has no manifest: 'blockbak recover' brings it back."
        for image in hidden_images(volume, catalog)
        if image.file in catalog.orphans and image.opening.sequence > point.sequence
    ]


def highest_sequence(volume: Volume, catalog: Catalog, lock: Lock) -> int:
    """The highest sequence ever used in the volume: by images, with or without manifest, or deleted ones."""
    images = (*catalog.images, *hidden_images(volume, catalog))
    told = [number for error in catalog.damage if isinstance(number := error.fields.get("sequence"), int)]
    return max([lock.sequence, *told, *(image.opening.sequence for image in images)])


# --- opening its chain ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """A point ready to be read: its view, the images it is made of, what a walk over its index saw; and the
    damage because of which it is less than the whole point, where that was asked for.
    """

    view: PointView
    chain: list[Image]
    summary: Summary
    damage: Damage | None = None


def open_reader(volume: Volume, image: Image, stack: ExitStack, *, from_disk: bool = False) -> ImageReader:
    """One image, open as long as ``stack`` lives, and the one its manifest names. Raises Damage.

    ``from_disk`` is for whoever wants to know what the disk holds: what the page cache has may be what was
    written, and not what came to lie there.
    """
    source = stack.enter_context(volume.open_image(image.file))
    if from_disk:
        source.drop_cache()
    reader = ImageReader(source)
    said = (image.opening, image.closing, image.image_bytes, image.sections)
    if (reader.opening, reader.closing, reader.source.size, len(reader.sections)) != said:
        raise DamagedManifest(file=image.file, reason="it and its image do not say the same")
    if reader.closing_sha256 != image.closing_sha256:
        raise DamagedManifest(file=image.file, reason="it names another closing record")
    return reader


def open_chain(volume: Volume, chain: Sequence[Image], stack: ExitStack) -> PointView:
    """The view of a chain's top, its files open as long as ``stack`` lives.

    Raises Damage where an image is not the one its manifest names.
    """
    return PointView([open_reader(volume, image, stack) for image in chain])


def open_point(volume: Volume, catalog: Catalog, point: Point, stack: ExitStack) -> Opened:
    """The point's view, checked but for the frames' content.

    Where an image is damaged, or was when last verified, and others hold the point too, those serve. Raises the first
    Damage where no whole chain is left.
    """
    # Only where a point is held twice there is a choice.
    avoided = volume.found_damaged() if len(catalog.images) > len(catalog.points) else set()
    without: set[str] = set()
    first: Exception | None = None
    while True:
        try:
            chain = plan(point, catalog.images, without | avoided)
        except Gap as gap:
            if avoided:
                # What was found damaged serves where nothing else does: most of it may be whole.
                avoided = set()
                continue
            raise (first or _why_gap(catalog, point) or gap) from None
        attempt = ExitStack()
        try:
            view = open_chain(volume, chain, attempt)
            summary = view.check()
        except (Damage, NewerFormat) as error:
            attempt.close()
            first = first or error
            without.add(culprit(volume, chain))
        except BaseException:
            attempt.close()
            raise
        else:
            stack.push(attempt)
            return Opened(view, list(chain), summary)


def _why_gap(catalog: Catalog, point: Point) -> Exception | None:
    """The damage that hides the missing parent, if it is known."""
    parents = {image.opening.parent for image in catalog.images} | {point.id}
    return next((error for error in catalog.damage if error.fields["point"] in parents), None)


def culprit(volume: Volume, chain: Sequence[Image]) -> str:
    """The first image of a chain that fails its own checks; the top where only the sum is wrong."""
    for length in range(1, len(chain) + 1):
        with ExitStack() as stack:
            try:
                open_chain(volume, chain[:length], stack).check()
            except (Damage, NewerFormat):
                return chain[length - 1].file
    return chain[-1].file


def find_and_open(repository: Repository, name: str, stack: ExitStack) -> tuple[Volume, Point, Opened]:
    """Both, without a lock: an image that a run deletes in between is looked for again, not called damage."""
    volume, catalog, point = find(repository, name)
    while True:
        try:
            return volume, point, open_point(volume, catalog, point, stack)
        except Damage:
            before = {image.file for image in catalog.images}
            volume, catalog, point = find(repository, name)
            if before == {image.file for image in catalog.images}:
                raise


# --- looking inside ------------------------------------------------------------------------------


_WINDOWS_KEPT = 4
"""Parsers read many small pieces of the same few windows."""


def reader(view: PointView, met: list[Damage] | None = None) -> Callable[[int, int], bytes]:
    """``read(offset, length)`` of the point's content, for the parsers of partition tables; what is
    damaged reads as zeros, and is added to ``met``.
    """
    kept: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def window(number: int, low: int) -> npt.NDArray[np.uint8]:
        """The window of a section that begins ``low`` bytes after it."""
        if (number, low) not in kept:
            geometry = view.geometry
            start, end = geometry.section_range(number)
            data = np.zeros(min(geometry.window_bytes, end - start - low), np.uint8)
            try:
                flaws = view.read(view.section(number), low // geometry.block_bytes, data)
                damage: list[Damage] = [DamagedImage(file=one.file, reason=str(one)) for one in flaws]
            except Damage as error:
                damage = [error]
            if met is not None:
                met.extend(damage)
            if len(kept) == _WINDOWS_KEPT:
                kept.pop(next(iter(kept)))
            kept[number, low] = data
        return kept[number, low]

    def read(offset: int, length: int) -> bytes:
        geometry = view.geometry
        if offset < 0:
            return b""
        length = max(0, min(length, geometry.device_bytes - offset))
        out = bytearray()
        while length > 0:
            number = offset // geometry.section_bytes
            start, _ = geometry.section_range(number)
            low = (offset - start) // geometry.window_bytes * geometry.window_bytes
            part = window(number, low)[offset - start - low :][:length].tobytes()
            out += part
            offset, length = offset + len(part), length - len(part)
        return bytes(out)

    return read


def partition_table(view: PointView, met: list[Damage] | None = None) -> partition.PartitionTable | None:
    """The partition table inside the point, if there is one; ``met`` is as for ``reader``."""
    opening = view.top.opening
    return partition.parse(reader(view, met), opening.logical_sector, opening.device_bytes, guess=True)
