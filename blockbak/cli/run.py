"""``blockbak run``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blockbak.flow.run import JobReport, Step


@click.command(
    epilog="\b\nExamples:\n  blockbak run\n  blockbak run --dry-run\n  blockbak run --force web db",
)
@click.argument("jobs", nargs=-1, metavar="[JOB...]")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and why; do nothing.")
@click.option("--force", is_flag=True, help="Make points although none is due.")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=0, metavar="SECONDS",
    help="Wait so long for another run of the same job to end.",
)  # fmt: skip
@common.config_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, jobs: tuple[str, ...], dry_run: bool, force: bool, wait: float, config_file: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Run what is due of each JOB of the configuration, or of all of them, one after the other.

    What is due is told by the points that there are, the job's calendars and the clock, so a run that was missed is
    made up for by the next. After the points come, each as far as the job says so, synthetic fulls, pruning,
    verification and a drill. A job that fails does not keep the next from being run.

    A job is never run twice at a time: while it runs, a second run of it says so and is done, exit status 0, for what
    is due is being done; with --force it has not got what it asked for, exit status 1. A run that is not done within
    the job's deadline is ended as Ctrl-C would, exit status 1.

    People are told as the configuration says. Nothing of that changes the exit status.
    """
    from dataclasses import replace
    from random import SystemRandom

    from blockbak.cli import log
    from blockbak.errors import JobError, UnsafeConfig
    from blockbak.flow import run
    from blockbak.flow.jobs import chosen, load

    log.begin_unless_begun()
    with common.world() as world:
        try:
            config = load(common.config_path(config_file))
            wanted = chosen(config, jobs)
        except (JobError, UnsafeConfig) as error:
            # Who sits at a terminal sees it.
            if not dry_run and not sys.stderr.isatty():
                run.tell_unusable(error, world)
            raise
        if not dry_run:
            run.remember(config, world)
        told = _Told(dry_run=dry_run, as_json=as_json)
        options = run.Options(dry_run=dry_run, force=force, wait=wait)
        speaking = replace(world, say=told.say, voice=told.voice)
        reports = run.run_jobs(config, wanted, options, speaking, told, pick=SystemRandom().random)
    if not wanted:
        told.line("The configuration has no job.", {})
    if as_json:
        render.document(document(reports, world.run))
    context.exit(next((report.exit for report in reports if report.exit), 0))


def document(reports: list[JobReport], run_id: str) -> dict[str, Any]:
    """All that came of it."""
    found: dict[str, Any] = {"run": run_id, "jobs": [_job(report) for report in reports]}
    if errors := [error for report in reports for error in report.errors]:
        found["error"] = errors[0].as_dict()
    return found


def _job(report: JobReport) -> dict[str, Any]:
    from dataclasses import asdict

    verified = report.verified
    return {
        "job": report.job, "repository": report.repository, "state": report.state,
        "due": [
            {"source": one.source, "volume": one.volume, "kind": one.due.kind, "reason": one.due.reason}
            for one in report.wanted
        ],
        "also": dict(report.extra),
        "points": [asdict(point) for point in report.points],
        "synthetic": [asdict(one.point) | {"written": one.written} for one in report.synthetic],
        "pruned": [
            {
                "volume": one.volume, "removed": one.removed, "composed": one.composed, "freed_bytes": one.freed_bytes,
                "damage": one.damage,
            }
            for one in report.pruned
        ],
        "verified": None if verified is None else {"ok": verified.ok, "images": len(verified.images)},
        "drilled": [asdict(one) | {"ok": one.ok, "rto_seconds": one.rto_seconds} for one in report.drilled],
        "errors": [error.as_dict() for error in report.errors],
        "attention": list(report.attention), "seconds": report.seconds, "exit": report.exit,
    }  # fmt: skip


class _Told:
    """What is told of each part of a run as soon as it is done."""

    def __init__(self, *, dry_run: bool, as_json: bool) -> None:
        self._dry_run, self._as_json = dry_run, as_json
        self._said: set[str] = set()

    def say(self, sentence: str) -> None:
        """A message."""
        self.voice(sentence, {})

    def voice(self, sentence: str, facts: Mapping[str, str]) -> None:
        """A message, and what it is about."""
        self._said.add(sentence)
        render.say_about(sentence, facts)

    def line(self, sentence: str, facts: dict[str, str]) -> None:
        """An answer, on standard output; a log for programs has it as well, with what it is about."""
        from blockbak.cli import log

        if not log.for_people():
            render.say_about(sentence, facts)
        if not self._as_json:
            render.line(sentence)

    def __call__(self, report: JobReport, step: Step) -> None:
        from blockbak.errors import BlockbakError
        from blockbak.flow import drill, prune, synthesize, verify

        facts = {"job": report.job}
        if isinstance(step, BlockbakError):
            render.failure_about(step, facts)
        elif isinstance(step, str):
            self.line(f"{report.job}: {step}", facts)
        elif isinstance(step, synthesize.Report):
            about = facts | {"volume": step.point.volume, "point": step.point.point}
            self.line(f"{step.point.volume}: synthetic full {step.point.point} composed.", about)
        elif isinstance(step, prune.Report):
            if step.removed:
                freed = render.size(step.freed_bytes)
                told = f"{step.volume}: {render.count(len(step.removed), 'image')} removed, {freed} freed."
                self.line(told, facts | {"volume": step.volume})
            for sentence in step.damage:
                render.say_about(sentence, facts | {"volume": step.volume})
        elif isinstance(step, verify.Report):
            bad = sum(not verdict.ok for verdict in step.images)
            result = f"{bad} damaged" if bad else "nothing wrong in what was looked at"
            self.line(f"{report.job}: {render.count(len(step.images), 'image')} verified: {result}.", facts)
        elif isinstance(step, drill.Report):
            about = facts | {"volume": step.volume, "point": step.point}
            result = "all as it should be" if step.ok else render.count(len(step.differences), "thing") + " to look at"
            took = render.seconds(step.rto_seconds)
            self.line(f"{step.volume}: drill of {step.point} done in {took}: {result}.", about)
            for difference in step.differences:
                render.say_about(difference, about)
        else:
            self._point(step, facts | {"volume": step.volume, "point": step.point})

    def _point(self, point: Any, facts: dict[str, str]) -> None:
        from blockbak.cli.backup import summary, would

        for note in point.notes:
            if (point.attention or self._dry_run) and note not in self._said:
                render.say_about(note, facts)
        self.line(would(point) if self._dry_run else summary(point), facts)
