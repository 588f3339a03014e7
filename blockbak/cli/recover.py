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
    from blockbak.flow.recover import recover

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = recover(opened, world)
    if as_json:
        document = {"done": report.done, "left": report.left, "adopted": report.adopted}
        render.document({**document, "error": report.locked.as_dict()} if report.locked else document)
    else:
        for sentence in report.done:
            render.line(sentence)
        if not report.done and not report.left and not report.locked:
            render.line("Nothing to recover.")
    for sentence in report.left:
        render.say(sentence)
    if report.locked is not None:
        render.failure(report.locked, as_json=False)
        context.exit(report.locked.exit_code)
    context.exit(ATTENTION if report.left else 0)
