"""``blockbak list``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import BlockbakError, Damage

if TYPE_CHECKING:
    from blockbak.model.chain import Point
    from blockbak.model.pin import Pin


def _as_dict(point: Point, lost: set[str], pins: dict[str, Pin]) -> dict[str, object]:
    first = point.images[0]
    opening, closing = first.opening, first.closing
    return {
        "point": point.id,
        "volume": point.volume,
        "sequence": point.sequence,
        "created": opening.created,
        "kind": opening.kind,
        "synthetic": opening.synthetic,
        "parent": opening.parent,
        "mode": closing.mode,
        "consistency": closing.consistency,
        "set_id": closing.set_id,
        "device_bytes": opening.device_bytes,
        "changed_bytes": closing.changed_bytes,
        "hole_bytes": closing.hole_bytes,
        "bad_bytes": closing.bad_bytes,
        "root": closing.root,
        "restorable": point.id not in lost,
        "pin": pins.get(point.id),
        "images": [
            {
                "kind": image.opening.kind,
                "synthetic": image.opening.synthetic,
                "file": image.file,
                "stored_bytes": image.image_bytes,
            }
            for image in point.images
        ],
    }


def _row(point: Point, pins: dict[str, Pin]) -> list[object]:
    first = point.images[0]
    kinds = ", ".join(
        f"synthetic {image.opening.kind}" if image.opening.synthetic else image.opening.kind for image in point.images
    )
    return [
        point.volume,
        point.id,
        first.opening.created[:19].replace("T", " "),
        kinds,
        first.opening.parent or "",
        render.size(first.opening.device_bytes),
        render.size(sum(image.image_bytes for image in point.images)),
        first.closing.consistency
        + (f", {render.size(first.closing.hole_bytes)} left out" if first.closing.hole_bytes else "")
        + (f", {render.size(first.closing.bad_bytes)} unreadable" if first.closing.bad_bytes else ""),
        *([pins[point.id].reason if point.id in pins else ""] if pins else []),
    ]


@click.command(name="list", epilog="Example: blockbak -r /srv/backup list")
@click.argument("volume", required=False)
@common.repository_option
@common.json_option
@click.pass_context
def command(context: click.Context, volume: str | None, repository: str | None, as_json: bool) -> None:
    """The restore points, oldest first; those of VOLUME, or of all.

    Exit status 4 if a manifest or a pin is damaged, an image missing, or a point without its parent; what is whole
    is listed all the same.
    """
    opened = common.open_repository(repository)
    volumes = [opened.volume(volume)] if volume is not None else opened.volumes()
    catalogs = [one.catalog() for one in volumes]
    points = [point for catalog in catalogs for point in catalog.points]
    found = [one.pins() for one in volumes]
    now = datetime.now(UTC)
    pins = {point: pin for by_point, _ in found for point, pin in by_point.items() if pin.stands(now)}
    gaps = [gap for catalog in catalogs for gap in catalog.gaps]
    damage: list[BlockbakError] = [error for catalog in catalogs for error in catalog.damage] + list(gaps)
    damage += [error for _, flaws in found for error in flaws]
    lost = {str(gap.fields["point"]) for gap in gaps}
    if as_json:
        render.document([_as_dict(point, lost, pins) for point in points])
    elif points:
        columns = ["volume", "point", "made (UTC)", "images", "parent", "size", "stored", "consistency"]
        render.table(
            [*columns, "pin"] if pins else columns,
            [_row(point, pins) for point in points],
            numeric=["size", "stored"],
            spare=["parent", "made (UTC)"],  # what `show` says, and what the point's id says itself
        )
    else:
        render.line("No points yet.")
    for error in damage:
        render.failure(error, as_json=False)
    # What a run that goes on right now has begun is not left over.
    leftovers = sum(
        catalog.leftovers
        for one, catalog in zip(volumes, catalogs, strict=True)
        if catalog.leftovers and not one.holder()
    )
    if leftovers:
        files = render.count(leftovers, "file")
        render.say(f"Left over from runs that did not end: {files}; 'blockbak recover' treats what is left.")
    worst = next((error for error in damage if isinstance(error, Damage)), next(iter(damage), None))
    context.exit(worst.exit_code if worst else 0)
