"""``blockbak synthesize``."""

from __future__ import annotations

import click

from blockbak.cli import common, render


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup synthesize web\n"
    "  blockbak -r /srv/backup synthesize web --at 20260501T030000Z-1f2e",
)
@click.argument("volume")
@click.option("--at", metavar="POINT", help="The point to compose [the newest].")
@click.option(
    "--kind",
    type=click.Choice(["full", "differential"]),
    default="full",
    show_default=True,
    help="differential: one delta of all that changed since the full below.",
)
@common.compress_option
@common.repository_options
def command(
    volume: str, at: str | None, kind: str, compress: str, repository: str | None, as_json: bool, wait: float
) -> None:
    """Compose a full at VOLUME's newest point from the images that hold it.

    The source is not read. On XFS and btrfs the new image shares its blocks with the older ones.
    """
    from dataclasses import asdict

    from blockbak.flow.synthesize import synthesize

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = synthesize(
            opened, volume, world, at=at, kind="full" if kind == "full" else "differential", compress=compress
        )
    point = report.point
    if as_json:
        extra = {
            "cloned_bytes": report.cloned_bytes, "copied_bytes": report.copied_bytes,
            "encoded_bytes": report.encoded_bytes, "written": report.written,
        }  # fmt: skip
        render.document({**asdict(point), **extra})
    elif not report.written:
        render.line(f"{point.volume}: {point.point} is held by {point.file} already; nothing was written.")
    else:
        render.line(
            f"{point.volume}: synthetic {point.kind} {point.point} composed in {render.seconds(point.seconds)}: "
            f"{render.size(report.cloned_bytes)} shared, {render.size(report.copied_bytes)} copied, "
            f"{render.size(report.encoded_bytes)} encoded."
        )
