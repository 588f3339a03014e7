"""``blockbak cold``."""

from __future__ import annotations

import click

from blockbak.cli import backup, common, nextboot


@click.command(epilog="Example: blockbak -r /srv/backup cold --at-next-boot /dev/sda")
@click.argument("device", required=False, type=common.PATH)
@nextboot.options
@click.option("--name", callback=backup.volume_name, metavar="VOLUME", help="The volume's name in the repository.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
@common.repository_options
def command(
    device: str | None, at_next_boot: bool, cancel: bool, name: str | None, time_limit: int, dry_run: bool,
    repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Image a disk cold."""
    if not at_next_boot:
        raise click.UsageError("Give --at-next-boot.")
    nextboot.run(
        device, repository, cancel=cancel, name=name, time_limit=time_limit, dry_run=dry_run, as_json=as_json, wait=wait
    )
