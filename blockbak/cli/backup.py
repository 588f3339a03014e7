"""``blockbak backup``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, BadBlockSize, BlockbakError, Interrupted

if TYPE_CHECKING:
    from blockbak.flow.backup import Report


def _block_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from blockbak.flow.backup import check_block_size
    from blockbak.units import parse_size

    try:
        size = parse_size(value)
        check_block_size(size)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size; take 4K to 1M") from error
    except BadBlockSize as error:
        raise click.BadParameter("take a power of two from 4K to 1M") from error
    return size


def _name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    from blockbak.repository.local import NAME_RULE, usable_name

    if value is not None and not usable_name(value):
        raise click.BadParameter(f"{value!r} is no name for a volume: it takes {NAME_RULE}")
    return value


def summary(report: Report) -> str:
    """A sentence that a person can read aloud."""
    what = f"{report.volume}: {report.kind} {report.point}"
    of = f" of {render.size(report.device_bytes)}" if report.read_bytes < report.device_bytes else ""
    told = [f"{render.size(report.read_bytes)}{of} read"]
    if report.bad_bytes:
        told[0] += f" but for {render.size(report.bad_bytes)} that could not be"
    if report.kind != "full":
        told.append(f"{render.size(report.changed_bytes)} changed")
    told += [f"{render.size(report.stored_bytes)} stored", f"consistency {report.consistency}"]
    return f"{what} made in {render.seconds(report.seconds)}: {', '.join(told)}."


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup backup /dev/sdb\n"
    "  blockbak -r /srv/backup backup --kind differential --name web /dev/sdb1\n"
    "  blockbak -r /srv/backup backup --dry-run /var/lib/images/vm.img",
)
@click.argument("sources", nargs=-1, required=True, type=common.PATH, metavar="SOURCE...")
@click.option(
    "--kind",
    type=click.Choice(["auto", "full", "incremental", "differential"]),
    default="auto",
    show_default=True,
    help="auto: an incremental where a point can be its parent, else a full.",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "cold", "live"]),
    default="auto",
    show_default=True,
    help="cold: only a device that nothing uses. live: as it is, consistency none.",
)
@click.option("--name", callback=_name, metavar="VOLUME", help="The volume's name in the repository.")
@click.option(
    "--block-size",
    "block_bytes",
    callback=_block_size,
    metavar="4K…1M",
    help="Unit of change detection [64K].",
)
@common.compress_option
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@common.repository_options
@click.pass_context
def command(
    context: click.Context, sources: tuple[str, ...], kind: str, mode: str, name: str | None,
    block_bytes: int | None, compress: str, dry_run: bool, repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Make a restore point of each SOURCE: a disk, partition, logical volume or image file.

    All sources are tried; the exit status is that of the first error.
    """
    from dataclasses import asdict, replace

    from blockbak.flow.backup import Request, backup

    if name is not None and len(sources) > 1:
        raise click.UsageError("--name names one volume, so it takes one SOURCE.")
    opened = common.open_repository(repository)
    reports: list[Report] = []
    errors: list[BlockbakError] = []
    said: set[str] = set()

    def say(sentence: str) -> None:
        said.add(sentence)
        render.say(sentence)

    with common.world(wait) as outer:
        world = replace(outer, say=say)
        for source in sources:
            request = Request(source, kind, mode, name, block_bytes, compress)
            try:
                report = backup(opened, request, world, dry_run=dry_run)
            except BlockbakError as error:
                errors.append(error)
                render.failure(error, as_json=False)
                if isinstance(error, Interrupted):
                    break
                continue
            reports.append(report)
            for note in report.notes:
                if (report.attention or dry_run) and note not in said:
                    render.say(note)
            if report.bad_bytes:
                render.say(f"'blockbak show {report.volume}@{report.point}' names what could not be read.")
            if not as_json:
                render.line(_would(report) if dry_run else summary(report))
    if as_json:
        document: dict[str, object] = {
            "points": [asdict(report) for report in reports],
            "errors": [error.as_dict() for error in errors],
        }
        if errors:
            document["error"] = errors[0].as_dict()
        render.document(document)
    if errors:
        context.exit(errors[0].exit_code)
    context.exit(ATTENTION if any(report.attention for report in reports) else 0)


def _would(report: Report) -> str:
    parent = f" on {report.parent}" if report.parent else ""
    article = "an" if report.kind[0] == "i" else "a"
    return (
        f"{report.volume}: would make {article} {report.kind}{parent} of {report.source}, "
        f"{render.size(report.device_bytes)} to read, mode {report.mode}."
    )
