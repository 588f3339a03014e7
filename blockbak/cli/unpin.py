"""``blockbak unpin``."""

from __future__ import annotations

import click

from blockbak.cli import common, render


@click.command(epilog="Example: blockbak -r /srv/backup unpin web@latest")
@click.argument("points", nargs=-1, required=True, metavar="POINT...")
@common.repository_options
def command(points: tuple[str, ...], repository: str | None, as_json: bool, wait: float) -> None:
    """Take the pins of points back. Refused for an immutable one before its time."""
    from blockbak.flow.pin import unpin

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        taken = unpin(opened, points, world)
    if as_json:
        render.document({"unpinned": taken})
    for one in taken if not as_json else ():
        render.line(f"{one.point} is no longer {one.reason}.")
