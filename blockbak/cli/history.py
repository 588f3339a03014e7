"""``blockbak history``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import Damage

if TYPE_CHECKING:
    from blockbak.model.events import Entry


_POINTS_SHOWN = 2
"""Of one line, in the table; --json has all."""


def _since(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    from blockbak.model.when import since

    if value is None:
        return None
    try:
        return since(value, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is neither a time like 2026-05-01T03:00 nor a duration like 7d") from error


def _row(entry: Entry) -> list[object]:
    ended = f"{entry.exit} {entry.error}".strip() if entry.exit else "done"
    who = f"{entry.user}@{entry.host}" if entry.user else entry.host
    points = (
        entry.points if len(entry.points) <= _POINTS_SHOWN else [*entry.points[:1], f"{len(entry.points) - 1} more"]
    )
    return [
        entry.number, entry.time[:19].replace("T", " "), entry.event, entry.volume, ", ".join(points), ended,
        render.seconds(entry.seconds), who, entry.job,
    ]  # fmt: skip


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup history\n  blockbak -r /srv/backup history --since 7d\n"
    "  blockbak -r /srv/backup history --since 2026-05-01 --volume web --json",
)
@click.option(
    "--since", "moment", callback=_since, metavar="WHEN", help="What came at or after a time (UTC), or so long ago: 7d."
)
@click.option("--volume", callback=common.volume_name, metavar="VOLUME", help="What was done to this volume.")
@common.repository_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, moment: datetime | None, volume: str | None, repository: str | None, as_json: bool
) -> None:
    """What was done with the repository, oldest first: when, by which host and user, with which result.

    A line is written by every backup, merge, removal, restore, export, verification, drill, pin, adoption and recovery,
    and by a mirror that names the repository, also by those that fail. Each has the digest of the one before it: exit
    status 4 if one was altered or is missing; what can be read is shown all the same. Where the repository cannot be
    written, nothing is noted.
    """
    from blockbak.units import iso

    opened = common.open_repository(repository)
    begin = iso(moment) if moment is not None else ""  # all moments have one form, so they compare as text
    flaws = opened.record.flaws()
    entries = [entry for entry in opened.record.entries() if volume in (None, entry.volume) and entry.time >= begin]
    if as_json:
        document: dict[str, object] = {"entries": entries}
        render.document({**document, "error": flaws[0].as_dict()} if flaws else document)
    elif entries:
        render.table(
            ["line", "when (UTC)", "what", "volume", "points", "result", "took", "by", "job"],
            [_row(entry) for entry in entries],
            numeric=["line", "took"],
            spare=["job", "took", "by"],
        )
    else:
        render.line("Nothing is noted.")
    for error in flaws:
        render.failure(error, as_json=False)
    context.exit(Damage.exit_code if flaws else 0)
