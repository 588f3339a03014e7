"""``blockbak plan``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockbak.cli import common, prune, render
from blockbak.errors import ATTENTION, BlockbakError, Interrupted, NotARepository

if TYPE_CHECKING:
    from blockbak.flow.context import Context
    from blockbak.flow.estimate import Report
    from blockbak.model.estimate import Span

_WORDS = {
    "history": "as its points tell", "told": "as --change tells", "written": "by what the kernel wrote to it",
    "assumed": "assumed",
}  # fmt: skip


def _share(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise click.BadParameter(f"{value!r} is no share of a day; take 2% or 0.5%")
    return share


def _calendar(_: click.Context, __: click.Parameter, value: str | None) -> object:
    from blockbak.model.schedule import parse_calendar

    if value is None:
        return None
    try:
        return parse_calendar(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error


def _sizes(span: Span) -> str:
    """A span of bytes for people."""
    return f"{render.size(int(span.likely))} ({render.size(int(span.low))} to {render.size(int(span.high))})"


def _times(span: Span) -> str:
    return f"{render.seconds(span.likely)} ({render.seconds(span.low)} to {render.seconds(span.high)})"


def _percent(span: Span) -> str:
    return f"{span.likely:.2%} ({span.low:.2%} to {span.high:.2%})"


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak plan web\n"
    "  blockbak plan --source /dev/sdb --keep-daily 7 --keep-weekly 5 --keep-monthly 12\n"
    "  blockbak -r /srv/backup plan --source vg/data --schedule hourly --keep-within 2d --keep-daily 30 --change 3%",
)
@click.argument("job", required=False)
@click.option("--source", type=common.PATH, metavar="SOURCE", help="Instead of JOB: a source, without a configuration.")
@click.option("--schedule", callback=_calendar, metavar="WHEN", help="With --source: when points are made [daily].")
@prune.policy_options
@click.option(
    "--change",
    callback=_share,
    metavar="SHARE%",
    help="The share of the source that changes in a day, where it is known.",
)
@common.compress_option
@common.config_option
@common.repository_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, /, job: str | None, source: str | None, schedule: object, change: float | None,
    compress: str, config_file: str | None, repository: str | None, as_json: bool, **rules: float,
) -> None:  # fmt: skip
    """Estimate what JOB of the configuration will cost for each of its sources, before it is used: how large images
    become and how long they take, how much a snapshot must hold, and how the repository grows under its retention.

    Where the repository has points of a source, they tell. Else a few hundred windows from all over the source are read
    and compressed, which takes seconds and writes nothing. Each estimate is a span; sizes from a sample are right
    within it 19 times of 20. Exit status is 3 where the repository has too little room for a year.
    """
    given = {
        one for one in context.params if context.get_parameter_source(one) == click.core.ParameterSource.COMMANDLINE
    }
    if (job is None) == (source is None):
        raise click.UsageError("Name one of the two: a JOB of the configuration, or --source SOURCE.")
    if job is not None and given - {"job", "change", "config_file", "repository", "as_json"}:
        raise click.UsageError("The configuration says when and how JOB is made, and what is kept: leave those out.")
    with common.world() as world:
        if job is not None:
            reports, errors = _of_job(job, common.config_path(config_file), change, repository, world)
        else:
            reports, errors = _of_source(str(source), schedule, rules, change, compress, repository, world), []
    if as_json:
        render.document({"plans": reports, "errors": [error.as_dict() for error in errors]})
    for error in errors:
        render.failure(error, as_json=False)
    for report in reports:
        _show(report, as_json=as_json)
    if errors:
        context.exit(errors[0].exit_code)
    context.exit(ATTENTION if any(report.fits is False for report in reports) else 0)


def _of_job(
    name: str, path: str, change: float | None, repository: str | None, world: Context
) -> tuple[list[Report], list[BlockbakError]]:
    from blockbak.flow import jobs
    from blockbak.flow.estimate import Wish, plan
    from blockbak.host import clock

    config = jobs.load(path)
    (job,) = jobs.chosen(config, [name])
    sources, errors = jobs.sources(job)
    opened = None
    try:
        opened = common.open_repository(repository, config, job)
    except NotARepository as error:
        world.say(f"What there is already is not known: {error}")
    zone = clock.zone(config.timezone)
    reports = []
    for source in sources:
        wish = Wish(source, job.kinds, job.retention, job.reading.compress, change, job.name)
        try:
            reports.append(plan(wish, opened, zone, world))
        except Interrupted:
            raise
        except BlockbakError as error:
            errors.append(error)
    return reports, errors


def _of_source(
    source: str, schedule: object, rules: dict[str, float], change: float | None, compress: str,
    repository: str | None, world: Context,
) -> list[Report]:  # fmt: skip
    from blockbak.flow.estimate import Wish, plan
    from blockbak.host import clock
    from blockbak.model.retention import Policy
    from blockbak.model.schedule import DAILY, Calendar, Kinds

    policy = Policy(**rules)  # type: ignore[arg-type]  # click has made whole numbers of what must be
    kinds = Kinds(incremental=schedule if isinstance(schedule, Calendar) else DAILY)
    wish = Wish(source, kinds, policy if policy.has_rule else None, compress, change)
    return [plan(wish, common.known_repository(repository), clock.zone(), world)]


def _show(report: Report, *, as_json: bool) -> None:
    for note in report.notes:
        render.say(note)
    if as_json:
        return
    how = "by its points" if report.basis == "history" else "by a sample"
    render.line(f"{report.source}, {render.size(report.device_bytes)}, {how}:")
    render.line(f"  full          {_sizes(report.full_bytes)}, in {_times(report.full_seconds)}")
    render.line(f"  incremental   {_sizes(report.incremental_bytes)}, in {_times(report.incremental_seconds)}")
    render.line(f"  changes a day {_percent(report.day_share)}, {_WORDS[report.change]}")
    if report.snapshot_bytes is not None:
        render.line(f"  its snapshot  {_sizes(report.snapshot_bytes)} are written while a full is read")
    for one in report.growth:
        points = render.count(one.points, "point")
        most = render.size(int(one.at_most_bytes.high))
        render.line(
            f"  in {one.days:>3} days   {points}, {_sizes(one.bytes)}; room for {most} is needed while they merge"
        )
    if report.free_bytes is not None:
        fits = "a year fits" if report.fits else "that may not do for a year"
        render.line(f"  the repository has {render.size(report.free_bytes)} free: {fits}.")
