"""``blockbak adopt``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup adopt /srv/images/sdb.img\n"
    "  blockbak -r /srv/backup adopt sdb.img --name web",
)
@click.argument("file", type=common.PATH)
@click.option("--name", callback=common.volume_name, metavar="VOLUME", help="The volume's name in the repository.")
@common.compress_option
@common.repository_options
@click.pass_context
def command(
    context: click.Context, file: str, name: str | None, compress: str, repository: str | None, as_json: bool,
    wait: float,
) -> None:  # fmt: skip
    """Make the raw image FILE a full point of the device that it is of, as it was then.

    FILE is checked against its sidecar FILE.json, which 'blockbak cold' made; where they differ there is no point,
    exit 4. FILE stays as it is and is not needed any more. The next 'backup' of the device makes an incremental.
    """
    from dataclasses import asdict

    from blockbak.cli.backup import summary
    from blockbak.flow.adopt import Wish, adopt

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = adopt(opened, Wish(file, name, compress), world)
    for note in report.notes if report.attention else ():
        render.say(note)
    if as_json:
        render.document(asdict(report))
    else:
        render.line(summary(report))
    context.exit(ATTENTION if report.attention else 0)
