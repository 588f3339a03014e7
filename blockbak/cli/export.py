"""``blockbak export``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup export web@latest web.img\n"
    "  blockbak -r /srv/backup export web@latest web.qcow2 --format qcow2",
)
@click.argument("point")
@click.argument("file", type=common.PATH)
@click.option("--format", "file_format", type=click.Choice(["raw", "qcow2"]), default="raw", show_default=True)
@click.option("--partition", type=click.IntRange(min=1), metavar="NUMBER",
              help="Write only this partition of a whole disk; 'blockbak show POINT' lists them.")  # fmt: skip
@click.option("--yes", "overwrite", is_flag=True, help="Replace FILE if it exists.")
@common.repository_options
@click.pass_context
def command(
    context: click.Context, point: str, file: str, file_format: str, partition: int | None, overwrite: bool,
    repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Write POINT, or one partition of it, to FILE for other programs: raw (sparse) or qcow2 (through qemu-img)."""
    from dataclasses import asdict

    from blockbak.flow.export import export

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = export(opened, point, file, file_format, world, overwrite=overwrite, partition=partition or 0)
    for note in report.notes:
        render.say(note)
    part = f"partition {report.partition} of " if report.partition else ""
    if as_json:
        render.document(asdict(report))
    else:
        render.line(
            f"Exported {part}{report.point} of {report.volume} to {report.file} ({report.format}) "
            f"in {render.seconds(report.seconds)}."
        )
    if report.attention:
        render.say("Parts of the point could not be read from its source; they are zeros. See 'blockbak show'.")
    context.exit(ATTENTION if report.attention else 0)
