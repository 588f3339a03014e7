"""``blockbak mirror``."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, TargetExists

if TYPE_CHECKING:
    from blockbak.flow.mirror import Report, Request
    from blockbak.repository.local import Repository

_STREAM = "-"
_RECEIVERS = ("receive", "overwrite", "repository")
"""What the end with the target takes; all else is told by the other one."""
_SNAPSHOTS = ("snapshot_size", "snapshot_limit", "freeze_with", "freeze_deadline")


def _program(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    try:
        words = tuple(shlex.split(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} cannot be taken apart into words: {error}") from error
    if not words:
        raise click.BadParameter("name a program")
    return words


def _given(context: click.Context) -> set[str]:
    """The parameters that are on the command line."""
    return {
        one for one in context.params if context.get_parameter_source(one) == click.core.ParameterSource.COMMANDLINE
    }


def summary(report: Report) -> str:
    """A sentence that a person can read aloud: it must not sound better than it is."""
    where = f"{report.target} on {report.host}" if report.host else report.target
    size, differs = render.size(report.device_bytes), render.size(report.differing_bytes)
    if report.dry_run:
        return f"{report.source} ({size}) to {where}: {differs} differ; nothing was written."
    told = [f"{differs} of {size} differed", f"{render.size(report.moved_bytes)} moved"]
    if report.zeroed_bytes:
        told.append(f"{render.size(report.zeroed_bytes)} made zeros")
    if report.verified_bytes:
        told.append(f"{render.size(report.verified_bytes)} read back and equal")
    lost = f", all but {len(report.unreadable)} unreadable ranges" if report.unreadable else ""
    return (
        f"{where} is in step with {report.source}{lost} after {render.seconds(report.seconds)}: {', '.join(told)}; "
        f"consistency {report.consistency}."
    )


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak mirror /dev/sdb /dev/sdc --dry-run\n"
    "  blockbak mirror /dev/sdb /dev/sdc --yes\n"
    "  blockbak mirror --from-snapshot vg/data /srv/copies/data.img --yes\n"
    "  blockbak mirror /dev/sdb --through 'ssh other blockbak mirror --receive /dev/sdc --yes'",
)
@click.argument("source", required=False, type=common.PATH)
@click.argument("target", required=False, type=common.PATH)
@click.option(
    "--through", callback=_program, metavar="COMMAND",
    help="Instead of TARGET: a program that is the other end, as ssh with 'blockbak mirror --receive TARGET' is. It is "
    "started as it stands, without a shell.",
)  # fmt: skip
@click.option(
    "--receive", type=common.PATH, metavar="TARGET",
    help="Be the other end: bring TARGET in step with what comes on standard input.",
)  # fmt: skip
@click.option("--yes", "overwrite", is_flag=True, help="Overwrite TARGET if it exists. Given at the end that has it.")
@click.option("--dry-run", is_flag=True, help="Compare, and say how much differs; write nothing.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read back what was written.")
@click.option("--from-snapshot", is_flag=True, help="Mirror a logical volume while it is used, from a snapshot.")
@common.snapshot_options
@click.option(
    "--block-size", "block_bytes", callback=common.block_size, metavar="4K…1M",
    help="What is compared and moved as one [64K].",
)  # fmt: skip
@click.option("--limit", callback=common.rate, metavar="SIZE", help="Read at most so many bytes of SOURCE a second.")
@click.option("--idle", is_flag=True, help="Read only when nobody else wants the disk, as far as its scheduler can.")
@common.retrying_options
@common.repository_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, source: str | None, target: str | None, through: tuple[str, ...], receive: str | None,
    overwrite: bool, dry_run: bool, verify: bool, from_snapshot: bool, snapshot_size: str | None,
    snapshot_limit: str | None, freeze_with: tuple[str, ...], freeze_deadline: float, block_bytes: int | None,
    limit: int | None, idle: bool, retries: int, strict: bool, repository: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Bring TARGET, a device or a file, in step with SOURCE: both are read, and only blocks that differ are written.

    What has become zeros is zeroed, or punched out of a file. A run that was broken off goes on where it was, for what
    is equal already does not move again; a new file is written as TARGET.partial until it is whole. At the end what was
    written is read back past the page cache. SOURCE must not be in use, but for a logical volume --from-snapshot.

    To another host: --through starts the program that leads there and is the other end; or give '-' for TARGET, and
    standard input and output are the two pipes to it. Both ends hash at the same time, and only digests and blocks
    that differ travel. Where SOURCE cannot be read, TARGET keeps what it has, and exit status is 3.

    A mirror is one copy, of now: what was deleted by mistake is gone from it after the next run. Restore points
    ('blockbak backup') are for that. A repository that is named is not overwritten, and its history tells of it.
    """
    from blockbak.host.system import read_idly

    known = common.known_repository(repository)
    if receive is not None:
        if _given(context) - set(_RECEIVERS):
            raise click.UsageError("--receive takes --yes and -r; all else is told by the end with the source.")
        _receive(receive, known, overwrite=overwrite)
        return
    if source is None or (target is None and not through):
        raise click.UsageError("Missing argument: give SOURCE, and TARGET or --through; or --receive TARGET.")
    if target is not None and through:
        raise click.UsageError("Name one of the two: TARGET, or --through COMMAND.")
    if (through or target == _STREAM) and overwrite:
        raise click.UsageError(
            "--yes is given at the end that has the target: 'blockbak mirror --receive TARGET --yes'."
        )
    if not from_snapshot and _given(context) & set(_SNAPSHOTS):
        raise click.UsageError("--snapshot-size, --snapshot-limit and the --freeze options belong to --from-snapshot.")
    from blockbak.flow.hot import HotOptions
    from blockbak.flow.mirror import Request
    from blockbak.image.format import BLOCK_DEFAULT

    hot = HotOptions(snapshot_size, snapshot_limit, freeze_with, freeze_deadline) if from_snapshot else None
    request = Request(
        source, target or "", overwrite, verify, hot, block_bytes or BLOCK_DEFAULT, limit, retries, strict, dry_run
    )
    if idle:
        read_idly()
    report = _sent(request, through, known, as_json) if through or target == _STREAM else _mirrored(request, known)
    _show(report, as_json=as_json, streams=target == _STREAM)
    context.exit(ATTENTION if report.attention else 0)


def _mirrored(request: Request, known: Repository | None) -> Report:
    """On this machine."""
    from dataclasses import replace

    from blockbak.flow.mirror import mirror

    try:
        with common.world() as world:
            return mirror(request, world, repository=known)
    except TargetExists as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        common.confirm(str(error.fields["path"]))
        with common.world() as world:
            return mirror(replace(request, overwrite=True), world, repository=known)


def _sent(request: Request, through: tuple[str, ...], known: Repository | None, as_json: bool) -> Report:
    """To the other end."""
    from blockbak.flow.peers import send
    from blockbak.host import pipes

    if not through:
        if as_json:
            raise click.UsageError("Standard output is the way to the other end, so it cannot hold a JSON document.")
        if pipes.is_terminal(0) or pipes.is_terminal(1):
            raise click.UsageError("'-' takes two pipes, to and from the other end; or use --through.")
    with common.world() as world:
        return send(request, through, world, repository=known)


def _receive(target: str, known: Repository | None, *, overwrite: bool) -> None:
    """At the other end: nothing of it goes to standard output, which is the way back."""
    from blockbak.flow.peers import receive
    from blockbak.host import pipes

    if pipes.is_terminal(0) or pipes.is_terminal(1):
        raise click.UsageError("--receive is the other end of 'blockbak mirror --through', and takes two pipes.")
    with common.world() as world:
        receive(target, world, overwrite=overwrite, repository=known)


def _show(report: Report, *, as_json: bool, streams: bool) -> None:
    for one in report.unreadable:
        render.say(f"Bytes {one.start} to {one.start + one.length} could not be read; their blocks are as they were.")
    if not report.host:
        for note in report.notes:
            render.say(note)
    if as_json:
        render.document(report)
    else:
        (render.say if streams else render.line)(summary(report))
