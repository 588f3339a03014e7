"""``blockbak verify``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from blockbak.flow.verify import Report


def _share(_: click.Context, __: click.Parameter, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / 100
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a percentage such as 5%") from error
    if not 0 < share <= 1:
        raise click.BadParameter("take more than 0% and at most 100%")
    return share


@click.command(
    epilog="\b\nExamples:\n  blockbak -r /srv/backup verify\n  blockbak -r /srv/backup verify web@latest\n"
    "  blockbak -r /srv/backup verify --sample 5%\n"
    "  blockbak verify /srv/images/sdb.img",
)
@click.argument("points", nargs=-1, metavar="[POINT...]")
@click.option(
    "--sample",
    "share",
    callback=_share,
    default="100%",
    metavar="5%",
    help="Read a random share of the frames.",
)
@common.repository_options
@click.pass_context
def command(
    context: click.Context,
    points: tuple[str, ...],
    share: float,
    repository: str | None,
    as_json: bool,
    wait: float,
) -> None:
    """Check the named points with all images they need, or everything: every stored byte.

    A word with a slash, or the name of a file with a sidecar beside it, is a raw image, which is checked against
    its sidecar; that needs no repository. Where everything is checked, the repository's history is too: an altered
    or missing line is damage.

    Exit status 4 if damage was found, 1 if all that is wrong is that an image is of a newer blockbak.
    Partial files, orphans and half-done deletions are mentioned and are no damage.
    """
    import random
    from dataclasses import replace

    from blockbak.flow import rawcheck
    from blockbak.flow.verify import Report as Found
    from blockbak.flow.verify import verify

    raw = [word for word in points if rawcheck.is_raw(word)]
    named = [word for word in points if word not in raw]
    pick = random.SystemRandom().random
    opened = common.open_repository(repository) if named or not raw else None
    with common.world(wait) as world:
        clock = world.timer()
        verdicts = rawcheck.verify_raw(raw, world, share=share, pick=pick)
        seconds = round(world.timer() - clock, 3) if raw else 0.0
        report = Found(verdicts, [], seconds)
        if opened is not None:
            of_points = verify(opened, named, world, share=share, pick=pick)
            report = replace(of_points, images=[*verdicts, *of_points.images], seconds=seconds + of_points.seconds)
    _show(report, share, as_json=as_json)
    context.exit(report.exit)


def _show(report: Report, share: float, *, as_json: bool) -> None:
    """All that was found, and at the end a sentence that a person can read aloud."""
    from dataclasses import asdict

    if as_json:
        document: dict[str, object] = {
            "ok": report.ok, "images": [asdict(verdict) for verdict in report.images],
            "leftovers": report.leftovers, "history": [error.as_dict() for error in report.history],
            "seconds": report.seconds,
        }  # fmt: skip
        render.document({**document, "error": report.locked.as_dict()} if report.locked else document)
    if report.locked is not None:
        render.failure(report.locked, as_json=False)
    for error in report.history:
        render.failure(error, as_json=False)
    for file in report.leftovers:
        render.say(f"{file} is left over from a run that did not end; 'blockbak recover' treats it.")
    for verdict in report.images:
        for flaw in verdict.damage:
            where = f"bytes {flaw.start} to {flaw.start + flaw.length}: " if flaw.length else ""
            what = f"{verdict.volume}/{verdict.file}" if verdict.volume else verdict.file
            render.say(f"{what}: {where}{flaw.reason}")
    if not as_json:
        bad = sum(not verdict.ok and not verdict.newer for verdict in report.images)
        newer = sum(verdict.newer for verdict in report.images)
        read = sum(verdict.checked_bytes for verdict in report.images)
        told = [f"{bad} damaged"] if bad else []
        told += ["the history damaged"] if report.history else []
        told += [f"{newer} of a newer blockbak"] if newer else []
        result = ", ".join(told) or ("all whole" if share == 1 else f"nothing wrong in a sample of {100 * share:g}%")
        if report.locked is not None:
            result += "; what another run holds was left out"
        if report.images:
            render.line(
                f"{render.count(len(report.images), 'image')} checked in {render.seconds(report.seconds)}, "
                f"{render.size(read)} read: {result}."
            )
        else:
            why = "another run holds what was to be" if report.locked is not None else "there is none"
            render.line(f"No image was checked: {why}.")
