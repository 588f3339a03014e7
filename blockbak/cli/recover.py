"""``blockbak recover``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION


@click.command(epilog="Example: blockbak -r /srv/backup recover")
@common.repository_options
@click.pass_context
def command(context: click.Context, repository: str | None, as_json: bool, wait: float) -> None:
    """Finish or undo what a crash left behind.

    Files that were never finished are swept, half-done deletions are finished, images without a manifest
    are checked and get it back. Nothing that is whole is ever removed. Exit status 3 if something is left
    that a person must look at.
    """
    from dataclasses import asdict

    from blockbak.flow.recover import recover

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = recover(opened, world)
    if as_json:
        render.document(asdict(report))
    else:
        for sentence in report.done:
            render.line(sentence)
        if not report.done and not report.left:
            render.line("Nothing to recover.")
    for sentence in report.left:
        render.say(sentence)
    context.exit(ATTENTION if report.left else 0)
