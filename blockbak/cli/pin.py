"""``blockbak pin``."""

from __future__ import annotations

from datetime import datetime

import click

from blockbak.cli import common, render


@click.command(
    epilog='\b\nExamples:\n  blockbak -r /srv/backup pin web@latest --why "before the upgrade"\n'
    '  blockbak -r /srv/backup pin web@2026-12-31 --why "year end" --until 2036-12-31 --immutable',
)
@click.argument("point")
@click.option("--why", required=True, metavar="TEXT", help="For those who will ask.")
@click.option(
    "--until", callback=common.last_moment, metavar="WHEN", help="Up to the end of that day, minute or second (UTC)."
)
@click.option("--immutable", is_flag=True, help="Until then nobody takes it back, and delete refuses it too.")
@common.repository_options
def command(
    point: str, why: str, until: datetime | None, immutable: bool, repository: str | None, as_json: bool, wait: float
) -> None:
    """Say that POINT stays, whatever a policy says. Pinned again, the new pin takes the old one's place.

    An immutable point, and all that it stands on, is neither removed nor merged by 'prune' or 'delete' before its time.
    That guards against mistakes, and not against whoever can write the repository's files.
    """
    from blockbak.flow.pin import pin

    if not why.strip():
        raise click.UsageError("--why says nothing.")
    if immutable and until is None:
        raise click.UsageError("--immutable needs an end: --until WHEN.")
    opened = common.open_repository(repository)
    with common.world(wait) as world:
        made = pin(opened, point, why, world, until=until, immutable=immutable)
    if as_json:
        render.document(made)
    else:
        render.line(f"{made.point} is {made.reason}.")
