"""``blockbak verify``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import Damage, Failed


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
    "  blockbak -r /srv/backup verify --sample 5%",
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

    Exit status 4 if damage was found, 1 if all that is wrong is that an image is of a newer blockbak.
    Partial files, orphans and half-done deletions are mentioned and are no damage.
    """
    import random
    from dataclasses import asdict

    from blockbak.flow.verify import verify

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        report = verify(opened, points, world, share=share, pick=random.SystemRandom().random)
    if as_json:
        document: dict[str, object] = {
            "ok": report.ok, "images": [asdict(verdict) for verdict in report.images],
            "leftovers": report.leftovers, "seconds": report.seconds,
        }  # fmt: skip
        render.document({**document, "error": report.locked.as_dict()} if report.locked else document)
    if report.locked is not None:
        render.failure(report.locked, as_json=False)
    for file in report.leftovers:
        render.say(f"{file} is left over from a run that did not end; 'blockbak recover' treats it.")
    for verdict in report.images:
        for flaw in verdict.damage:
            where = f"bytes {flaw.start} to {flaw.start + flaw.length}: " if flaw.length else ""
            render.say(f"{verdict.volume}/{verdict.file}: {where}{flaw.reason}")
    if not as_json:
        bad = sum(not verdict.ok and not verdict.newer for verdict in report.images)
        newer = sum(verdict.newer for verdict in report.images)
        read = sum(verdict.checked_bytes for verdict in report.images)
        told = [f"{bad} damaged"] if bad else []
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
    # A newer image and a volume that is held are both a plain failure.
    context.exit(Damage.exit_code if report.damaged else 0 if report.ok else Failed.exit_code)
