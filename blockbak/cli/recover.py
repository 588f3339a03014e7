"""``blockbak recover``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION


@click.command(epilog="Example: blockbak -r /srv/backup recover")
@common.repository_options
@click.option("--machine", "only_machine", is_flag=True, help="Only what is on this machine; needs no repository.")
@click.pass_context
def command(context: click.Context, repository: str | None, as_json: bool, wait: float, only_machine: bool) -> None:
    """Finish or undo what a crash left behind.

    On this machine: volumes that were held back go on, applications at rest are let go, what a cold backup stopped,
    unmounted or froze is put back, snapshots, and volumes that an unfinished restore made, of runs that are over are
    removed; only what blockbak itself made or stopped. In the repository: files that were never finished are swept,
    half-done deletions are finished, images without a manifest are checked and get it back. Nothing that is whole is
    ever removed. Exit status 3 if something is left that a person must look at.
    """
    from blockbak.flow.leftovers import settle
    from blockbak.flow.recover import Report, recover

    with common.world(wait) as world:
        # What holds the machine up comes first, whatever becomes of the repository.
        settled = settle(world, restores=True)
        for sentence in settled.done if not as_json else ():
            render.line(sentence)
        for sentence in settled.left:
            render.say(sentence)
        report = Report() if only_machine else recover(common.open_repository(repository), world)
    report.done[:0] = settled.done
    report.left[:0] = settled.left
    if as_json:
        document = {"done": report.done, "left": report.left, "adopted": report.adopted}
        render.document({**document, "error": report.locked.as_dict()} if report.locked else document)
    else:
        for sentence in report.done[len(settled.done) :]:
            render.line(sentence)
        if not report.done and not report.left and not report.locked:
            render.line("Nothing to recover.")
    for sentence in report.left[len(settled.left) :]:
        render.say(sentence)
    if report.locked is not None:
        render.failure(report.locked, as_json=False)
        context.exit(report.locked.exit_code)
    context.exit(ATTENTION if report.left else 0)
