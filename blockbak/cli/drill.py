"""``blockbak drill``."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, BlockbakError, Interrupted

if TYPE_CHECKING:
    from blockbak.flow.drill import Looked, Report
    from blockbak.model.config import Job
    from blockbak.model.drill import DrillOptions


def _words(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    try:
        words = tuple(word for part in value for word in shlex.split(part))
    except ValueError as error:
        raise click.BadParameter(f"{error}; write it as for a shell") from error
    if value and not (words and words[0]):
        raise click.BadParameter("it names no command")
    return words


def _pattern(_: click.Context, __: click.Parameter, value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise click.BadParameter(f"{value!r} is no regular expression: {error}") from error
    return value


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup drill\n"
    "  blockbak -r /srv/backup drill web@latest --check '/usr/local/sbin/look-at web'\n"
    "  blockbak -r /srv/backup drill root@latest --boot --boot-pattern 'web1 login:'\n"
    "  blockbak -r /srv/backup drill db@latest --target /dev/vg/drill --yes\n"
    "  blockbak drill --job nightly",
)
@click.argument("point", required=False)
@click.option("--job", "job_name", metavar="JOB",
              help="Drill the newest point of each of the job's volumes, as its configuration says.")  # fmt: skip
@click.option("--scratch", type=common.PATH, metavar="DIR",
              help="Where the copy's sparse file is made [the state directory, or TMPDIR].")  # fmt: skip
@click.option("--target", type=common.PATH, metavar="DEVICE", help="Restore to this device instead; it keeps the copy.")
@click.option("--yes", "overwrite", is_flag=True, help="Overwrite the device that --target names.")
@click.option("--checker/--no-checker", default=True, show_default=True,
              help="Run each file system's own checker: e2fsck, xfs_repair, btrfs check and so on.")  # fmt: skip
@click.option("--check", "check", multiple=True, callback=_words, metavar="'COMMAND ARG'",
              help="Run this once all is mounted; repeatable, for more of its words.")  # fmt: skip
@click.option("--check-seconds", type=click.FloatRange(min=1), default=3600, show_default=True, metavar="SECONDS",
              help="How long it may take.")  # fmt: skip
@click.option("--boot", is_flag=True, help="Boot the copy in QEMU.")
@click.option("--boot-pattern", callback=_pattern, default="login:", show_default=True, metavar="REGEX",
              help="What its serial console must say.")  # fmt: skip
@click.option("--boot-seconds", type=click.FloatRange(min=1), default=600, show_default=True, metavar="SECONDS",
              help="Within what time.")  # fmt: skip
@common.config_option
@common.repository_options
@click.pass_context
def command(
    context: click.Context, point: str | None, job_name: str | None, scratch: str | None, target: str | None,
    overwrite: bool, checker: bool, check: tuple[str, ...], check_seconds: float, boot: bool, boot_pattern: str,
    boot_seconds: float, config_file: str | None, repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Prove that POINT, or the newest point of each volume, can be restored, and how long that takes.

    It is restored to a sparse file that has no name, on a loop device, and every block is read back. Then each file
    system in it is looked at: its journal is replayed if it wants to be, its checker is run, it is mounted read-only,
    and at last the check command is run. Volume groups, arrays and encrypted devices are named and never started.

    The check command is told BLOCKBAK_POINT, BLOCKBAK_VOLUME, BLOCKBAK_DEVICE (the copy), BLOCKBAK_MOUNTS (a directory
    with all mounts), BLOCKBAK_MOUNT (the first of them) and BLOCKBAK_MOUNT_1 and so on, by partition; 1 where there is
    no partition table. It may mount more, such as an overlay to write on: it sees mounts and processes of its own,
    which end with the drill. Nothing is left behind, also if the drill is killed.

    With --job, what the command line says goes before what the job says.

    Exit status 3 if something is not as it should be, 4 if an image is damaged. The history has a line of each drill.
    """
    from dataclasses import replace

    from blockbak.flow.drill import drill, points_of
    from blockbak.flow.jobs import chosen, load
    from blockbak.flow.points import newest_points
    from blockbak.model.drill import DrillOptions

    if overwrite and target is None:
        raise click.UsageError("--yes is for the device that --target names.")
    if target is not None and point is None:
        raise click.UsageError("--target takes one point: name it.")
    if target is not None and scratch is not None and not boot:
        raise click.UsageError("Name one of the two: --target or --scratch.")
    if point is not None and job_name is not None:
        raise click.UsageError("Name one of the two: POINT or --job.")
    if config_file is not None and job_name is None:
        raise click.UsageError("--config is for --job.")
    options = DrillOptions(
        target or "", overwrite, scratch or "", checker, check, check_seconds, boot, boot_pattern, boot_seconds
    )
    if job_name is not None:
        config = load(common.config_path(config_file))
        (job,) = chosen(config, [job_name])
        options = _of_job(context, job, options)
        opened = common.open_repository(repository, config, job)
        names = points_of(opened, job_name)
    else:
        opened = common.open_repository(repository)
        names = [point] if point is not None else newest_points(opened)
    reports: list[Report] = []
    errors: list[BlockbakError] = []
    with common.world(wait) as world:
        for name in names:
            try:
                reports.append(drill(opened, name, options, replace(world, job=job_name or "")))
            except Interrupted:
                raise
            except BlockbakError as error:
                if point is not None:
                    raise
                errors.append(error)
    _show(reports, errors, as_json=as_json)
    code = errors[0].exit_code if errors else 0 if all(one.ok for one in reports) else ATTENTION
    context.exit(code)


def _of_job(context: click.Context, job: Job, asked: DrillOptions) -> DrillOptions:
    """What a job asks for, where the command line does not say otherwise."""
    from dataclasses import replace

    from click.core import ParameterSource

    from blockbak.flow.drill import options_of

    if job.drill is None:
        return asked
    said = {
        option: getattr(asked, option)
        for option in ("checker", "check", "check_seconds", "boot", "boot_pattern", "boot_seconds", "scratch")
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE
    }
    return replace(options_of(job.drill), **said)


def as_document(report: Report) -> dict[str, object]:
    """The report as it stands in ``--json`` output."""
    from dataclasses import asdict

    return {**asdict(report), "ok": report.ok, "rto_seconds": report.rto_seconds}


def _show(reports: list[Report], errors: list[BlockbakError], *, as_json: bool) -> None:
    if as_json:
        render.document(
            {"drills": [as_document(one) for one in reports], "errors": [error.as_dict() for error in errors]}
        )
    for error in errors:
        render.failure(error, as_json=False)
    for report in reports:
        for sentence in report.differences:
            render.say(sentence)
        for sentence in () if as_json else lines(report):
            render.line(sentence)
    if not reports and not errors and not as_json:
        render.line("Nothing was drilled: there is no point yet.")


def lines(report: Report) -> list[str]:
    """What was done, for people. It must not sound better than it is."""
    result = "all as it should be" if report.ok else f"{render.count(len(report.differences), 'thing')} to look at"
    steps = ", ".join(f"{name} {render.seconds(spent)}" for name, spent in report.seconds.items())
    verified = f"{render.size(report.verified_bytes)} read back and equal"
    told = [
        f"Drilled {report.point} of {report.volume} in {render.seconds(report.rto_seconds)}: {result}.",
        f"  {render.size(report.device_bytes)} restored to {report.target}, {verified}.",
        *(f"  {_looked(one)}." for one in report.filesystems),
    ]
    if report.check_status is not None:
        told.append(f"  The check command ended with {report.check_status}.")
    if report.booted is not None:
        told.append("  It booted." if report.booted else "  It did not boot.")
    told += [f"  Not looked into: {sentence}" for sentence in report.unseen]
    told += [f"  {note}" for note in report.notes]
    return [*told, f"  Steps: {steps}."]


def _looked(one: Looked) -> str:
    place = f"Partition {one.number}" if one.number else "The volume"
    what = " ".join(part for part in (one.type, one.label) if part)
    said = ["its journal was replayed"] if one.replayed else []
    said += [f"checked: {one.checked}"] if one.checked else []
    said.append("mounted" if one.mounted else "not mounted")
    return f"{place} ({what}): {', '.join(said)}"
