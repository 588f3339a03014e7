"""``blockbak delete``."""

from __future__ import annotations

import click

from blockbak.cli import common, render


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup delete 20260501T030000Z-1f2e --dry-run\n"
    "  blockbak -r /srv/backup delete 20260501T030000Z-1f2e 20260502T030000Z-77aa",
)
@click.argument("points", nargs=-1, required=True, metavar="POINT...")
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@common.repository_options
def command(points: tuple[str, ...], dry_run: bool, repository: str | None, as_json: bool, wait: float) -> None:
    """Remove restore points for good.

    Refused where a later point needs one and no other image serves it: compose a synthetic full first.
    An image that takes over from a removed one is read and checked before.

    What is freed (freed_bytes with --json) is the disk space that comes back. Blocks that a removed image shares
    with one that stays (shared_bytes), as with a synthetic full on XFS and btrfs, stay with that.
    """
    from dataclasses import asdict

    from blockbak.flow.delete import delete

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = delete(opened, points, world, dry_run=dry_run)
    if as_json:
        render.document({**asdict(report), "dry_run": dry_run})
        return
    for file in report.files:
        render.line(f"{'Would remove' if dry_run else 'Removed'} {file}.")
    shared = f"; {render.size(report.shared_bytes)} are shared with images that stay" if report.shared_bytes else ""
    render.line(
        f"{render.count(len(report.points), 'point')}, {render.count(len(report.files), 'image')}, "
        f"{render.size(report.freed_bytes)}"
        f"{' would be' if dry_run else ''} freed{shared}."
    )
