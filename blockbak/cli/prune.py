"""``blockbak prune``."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, BlockbakError, Interrupted

if TYPE_CHECKING:
    from blockbak.flow.prune import Report

F = TypeVar("F", bound=Callable[..., Any])


def _number(name: str, what: str) -> Callable[[F], F]:
    kept: Callable[[F], F] = click.option(
        f"--keep-{name}", name, type=click.IntRange(min=0), default=0, metavar="N", help=what
    )
    return kept


def policy_options(function: F) -> F:
    """The arguments of a Policy, by its names."""
    options: list[Callable[[F], F]] = [
        _number("last", "The last N points."),
        *(
            _number(name, f"The newest point of each of the last N {unit} that have one.")
            for name, unit in (
                ("hourly", "hours"), ("daily", "days"), ("weekly", "ISO weeks"), ("monthly", "months"),
                ("yearly", "years"),
            )
        ),
        click.option(
            "--keep-within", "within", callback=common.duration, default="0s", metavar="DURATION",
            help="All that are younger.",
        ),
        _number("verified", "Whatever else: at least N points that were verified whole, or drilled."),
        click.option(
            "--full-every", callback=common.duration, default="90d", show_default=True, metavar="DURATION",
            help="Say that a full is due where none was read from the source for so long; 0d: never.",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup prune web --keep-last 3 --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run\n"
    "  blockbak -r /srv/backup prune --keep-within 30d --keep-yearly 5\n"
    "  blockbak -r /srv/backup prune web --keep-daily 14 --keep-monthly 12 --as-of 2030-01-01",
)
@click.argument("volume", required=False)
@policy_options
@common.compress_option
@click.option("--dry-run", is_flag=True, help="Say what would become of each point, and why; change nothing.")
@click.option(
    "--as-of", callback=common.last_moment, metavar="WHEN",
    help="Say what is kept at another time; in the future as if points went on to be made as lately. Changes nothing.",
)  # fmt: skip
@common.repository_options
@click.pass_context
def command(
    context: click.Context, /, volume: str | None, compress: str, dry_run: bool, as_of: datetime | None,
    repository: str | None, as_json: bool, wait: float, **rules: float,
) -> None:  # fmt: skip
    """Keep of VOLUME, or of all volumes, the points that a policy names, and remove the others.

    Each rule counts by itself, from the newest point back, in UTC. Pinned points stay, and so does the newest. What is
    damaged does not count and is left: exit status 3. What kept points need of others is merged first: the beginning of
    a chain into a synthetic full at its oldest kept point, what lies between two kept points into one incremental. A
    point on which several kept ones stand, each by itself, stays with them. New images are read and checked before old
    ones go.
    """
    from blockbak.flow.prune import prune
    from blockbak.model.retention import Policy

    policy = Policy(**rules)  # type: ignore[arg-type]  # click has made whole numbers of what must be
    if not policy.has_rule:
        raise click.UsageError("No rule says what is kept: give one of --keep-last to --keep-yearly, or --keep-within.")
    opened = common.open_repository(repository)
    names = [volume] if volume is not None else opened.volume_names()
    reports: list[Report] = []
    errors: list[BlockbakError] = []
    with common.world(wait) as world:
        for name in names:
            try:
                report = prune(opened, name, policy, world, dry_run=dry_run, as_of=as_of, compress=compress)
            except BlockbakError as error:
                errors.append(error)
                render.failure(error, as_json=False)
                if isinstance(error, Interrupted):
                    break
                continue
            reports.append(report)
            _show(report, as_json=as_json)
    if as_json:
        document: dict[str, object] = {
            "volumes": [_document(report) for report in reports],
            "errors": [error.as_dict() for error in errors],
        }
        render.document({**document, "error": errors[0].as_dict()} if errors else document)
    elif not names:
        render.line("No volumes yet.")
    if errors:
        context.exit(errors[0].exit_code)
    context.exit(ATTENTION if any(report.attention for report in reports) else 0)


def _document(report: Report) -> dict[str, object]:
    from dataclasses import asdict

    return asdict(report)


def _show(report: Report, *, as_json: bool) -> None:
    """A row for each point, and what came of all of them."""
    if not as_json:
        rows = [
            [one.point, one.created[:19].replace("T", " "), one.action, "; ".join(one.reasons)]
            for one in report.decisions
        ]
        if rows:
            render.table(["point", "made (UTC)", "what", "why"], rows, spare=["made (UTC)"])
        render.line(_summary(report))
    for line in report.damage:
        render.say(line)
    if report.full_due:
        render.say(f"{report.volume}: a full is due; 'blockbak backup --kind full' makes one.")


def _summary(report: Report) -> str:
    """A sentence that a person can read aloud."""
    kept = sum(one.action == "keep" for one in report.decisions)
    if report.as_of:
        when = report.as_of[:16].replace("T", " ")
        return f"{report.volume}: {render.count(kept, 'point')} kept as of {when}."
    would = "would be " if report.dry_run else ""
    told = [f"{render.count(kept, 'point')} kept", f"{len(report.decisions) - kept} {would}removed"]
    if report.composed:
        size = f"{'at most ' if report.dry_run else ''}{render.size(report.composed_bytes)}"
        told.append(f"{render.count(len(report.composed), 'image')} {would}composed ({size})")
    told.append(f"{render.size(report.freed_bytes)} {would}freed")
    shared = f"; {render.size(report.shared_bytes)} are shared with images that stay" if report.shared_bytes else ""
    return f"{report.volume}: {', '.join(told)}{shared}."
