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

    On this machine: volumes that were held back go on, applications at rest are let go, snapshots, and volumes that
    an unfinished restore made, of runs that are over are removed; only what blockbak itself made. In the repository:
    files that were never finished are swept, half-done deletions are finished, images without a manifest are checked
    and get it back. Nothing that is whole is ever removed. Exit status 3 if something is left that a person must look
    at.
    """
    from blockbak.flow.leftovers import settle
    from blockbak.flow.recover import recover

    with common.world(wait) as world:
        # What holds the machine up comes first, whatever becomes of the repository.
        settled = settle(world, restores=True)
        for sentence in settled if not as_json else ():
            render.line(sentence)
        report = recover(common.open_repository(repository), world)
    report.done[:0] = settled
    if as_json:
        document = {"done": report.done, "left": report.left, "adopted": report.adopted}
        render.document({**document, "error": report.locked.as_dict()} if report.locked else document)
    else:
        for sentence in report.done[len(settled) :]:
            render.line(sentence)
        if not report.done and not report.left and not report.locked:
            render.line("Nothing to recover.")
    for sentence in report.left:
        render.say(sentence)
    if report.locked is not None:
        render.failure(report.locked, as_json=False)
        context.exit(report.locked.exit_code)
    context.exit(ATTENTION if report.left else 0)
