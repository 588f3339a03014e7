"""``blockbak restore``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, TargetExists

if TYPE_CHECKING:
    from blockbak.flow import rawrestore
    from blockbak.flow.restore import Plan, Report

_STREAM = "-"
_METHODS = {
    "create": "a new file is made",
    "write": "everything is written",
    "differ": "the target is read and only what differs is written",
}


def describe(plan: Plan) -> list[str]:
    """The plan for people, before anything is written."""
    what = f"{_what(plan)}, {render.size(plan.device_bytes)}"
    how = _METHODS[plan.method]
    if plan.created_lv:
        place = f"thin pool {plan.thin_pool}" if plan.thin_pool else f"volume group {plan.created_lv.split('/')[0]}"
        size = f"{render.size(plan.target_bytes)} ({plan.target_bytes} bytes)"
        how = f"a new logical volume of {size} is made in {place}"
    return [f"{what}, to {plan.target}: {how}.", f"From {', '.join(plan.images)}.", *plan.notes]


def _what(plan: Plan) -> str:
    part = f"partition {plan.partition.number} of " if plan.partition else ""
    return f"{part}{plan.point} of {plan.volume}"


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup restore latest /dev/sdc --dry-run\n"
    "  blockbak -r /srv/backup restore web@latest /dev/sdc --yes\n"
    "  blockbak -r /srv/backup restore web@2026-05-01T03:00 disk.img\n"
    "  blockbak -r /srv/backup restore db@latest --create-lv vg/db-restored\n"
    "  blockbak -r /srv/backup restore web@latest root.img --partition 2\n"
    "  blockbak -r /srv/backup restore web@latest /dev/sdd --grow --yes\n"
    "  blockbak restore /srv/images/sdb.img /dev/sdc --yes\n"
    "  ssh other blockbak cold /dev/sdb - | blockbak restore - /dev/sdc --yes",
)
@click.argument("point")
@click.argument("target", type=common.PATH, required=False)
@click.option(
    "--create-lv",
    type=common.PATH,
    metavar="VG/NAME",
    help="Make a new logical volume, as large as what is restored, instead of writing to TARGET.",
)
@click.option("--thin-pool", type=common.PATH, metavar="POOL", help="Make it a thin one, in this pool of VG.")
@click.option("--partition", type=click.IntRange(min=1), metavar="NUMBER",
              help="Restore only this partition of a whole disk; 'blockbak show POINT' lists them.")  # fmt: skip
@click.option("--grow", is_flag=True,
              help="On a larger disk move the GPT's backup to its end, once the volume is written.")  # fmt: skip
@click.option("--yes", "overwrite", is_flag=True, help="Overwrite TARGET if it exists.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Read back what was written.")
@click.option("--verify-first", is_flag=True, help="Read and check all images before the first byte.")
@click.option("--keep-going", is_flag=True, help="Restore what can be; name the rest in a mapfile, exit 3.")
@click.option(
    "--mapfile",
    type=common.PATH,
    metavar="FILE",
    help="Where --keep-going writes its mapfile [beside a file; for a device POINT.mapfile here].",
)
@click.option(
    "--sidecar", type=common.PATH, metavar="PATH", help="Where POINT is '-': what tells whether all of it came."
)
@common.repository_options
@click.pass_context
def command(
    context: click.Context, point: str, target: str | None, create_lv: str | None, thin_pool: str | None,
    partition: int | None, grow: bool, overwrite: bool, dry_run: bool, verify: bool, verify_first: bool,
    keep_going: bool, mapfile: str | None, sidecar: str | None, repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Bring POINT, or one partition of it, back onto the device, or into the file, TARGET; or into a new logical
    volume.

    POINT is an id, a unique beginning of one, latest, VOLUME@latest or VOLUME@TIME: the newest made in or before
    that second, minute or day, in UTC where no zone is given. Index and structure
    of all images needed are checked before the first byte is written, every block before it is.

    Instead of POINT, a word with a slash, or the name of a file with a sidecar beside it, is a raw image, all of
    which is checked before the first byte; '-' is standard input, of whatever length. Both need no repository.
    """
    from dataclasses import replace

    from blockbak.flow import rawcheck
    from blockbak.flow.restore import Plan, Request, restore

    if mapfile is not None and not keep_going:
        raise click.UsageError("--mapfile names what --keep-going leaves out, so it takes that too.")
    if target is None and create_lv is None:
        raise click.UsageError("Missing argument 'TARGET'; or take --create-lv VG/NAME.")
    if target is not None and create_lv is not None:
        raise click.UsageError("Name one of the two: TARGET, or --create-lv VG/NAME.")
    if thin_pool is not None and create_lv is None:
        raise click.UsageError("--thin-pool is where --create-lv makes its volume, so it takes that too.")
    if grow and partition is not None:
        raise click.UsageError("--grow moves the backup of a whole disk's GPT; --partition restores no table.")
    if sidecar is not None and point != _STREAM:
        raise click.UsageError("A file's sidecar lies beside it: --sidecar takes '-' for POINT.")
    if point == _STREAM or rawcheck.is_raw(point):
        if target is None or keep_going or partition is not None or grow:
            words = "--create-lv, --partition, --grow and --keep-going"
            raise click.UsageError(f"{words} are for points of a repository.")
        _raw(context, point, target, overwrite, dry_run, verify, sidecar, repository, as_json)
        return
    opened = common.open_repository(repository)
    request = Request(
        point, target or "", overwrite, verify, verify_first, keep_going, mapfile, create_lv,
        thin_pool, partition or 0, grow,
    )  # fmt: skip
    try:
        with common.world(wait) as world:
            done = restore(opened, request, world, dry_run=dry_run)
    except TargetExists as error:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        with common.world(wait) as world:
            plan = restore(opened, request, world, dry_run=True)
        assert isinstance(plan, Plan)  # noqa: S101 - a dry run gives one
        for sentence in describe(plan):
            render.say(sentence)
        # Asked outside of a world: there a signal is a wish, and nobody would look for it.
        common.confirm(str(error.fields["path"]))
        # By its id: what a name such as latest means may have changed since it was shown.
        request = replace(request, point=f"{plan.volume}@{plan.point}", overwrite=True)
        with common.world(wait) as world:
            done = restore(opened, request, world)
    _show(done, as_json=as_json)
    context.exit(ATTENTION if not dry_run and getattr(done, "attention", False) else 0)


def _raw(
    context: click.Context, image: str, target: str, overwrite: bool, dry_run: bool, verify: bool,
    sidecar: str | None, repository: str | None, as_json: bool,
) -> None:  # fmt: skip
    """The same for a raw image, or for standard input."""
    from dataclasses import replace

    from blockbak.flow import rawrestore as flow
    from blockbak.host import pipes

    if image == _STREAM and not dry_run and pipes.is_terminal(0):
        raise click.UsageError("Nothing is restored from a terminal: give a pipe, or the name of a file.")
    known = common.known_repository(repository)
    request = flow.Request(image, target, overwrite, verify, sidecar)
    try:
        with common.world() as world:
            done = flow.restore(request, world, repository=known, dry_run=dry_run)
    except TargetExists as error:
        if image == _STREAM or not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise
        common.confirm(str(error.fields["path"]))
        with common.world() as world:
            done = flow.restore(replace(request, overwrite=True), world, repository=known)
    _show_raw(done, as_json=as_json)
    context.exit(ATTENTION if isinstance(done, flow.Report) and done.attention else 0)


def _show_raw(done: rawrestore.Plan | rawrestore.Report, *, as_json: bool) -> None:
    from dataclasses import asdict

    from blockbak.flow.rawrestore import Plan

    if as_json:
        render.document({"plan": asdict(done)} if isinstance(done, Plan) else done)
    plan = done if isinstance(done, Plan) else done.plan
    image = "standard input" if plan.image == _STREAM else plan.image
    if isinstance(done, Plan):
        size = render.size(plan.device_bytes) if plan.device_bytes else "as much as comes"
        for sentence in (f"{image}, {size}, to {plan.target}: {_METHODS[plan.method]}.", *plan.notes):
            if not as_json:
                render.line(sentence)
        return
    for one in done.unreadable:
        render.say(f"Bytes {one.start} to {one.start + one.length} could not be read from the device; they are zeros.")
    for note in plan.notes:
        render.say(note)
    if not as_json:
        render.line(raw_summary(done))


def raw_summary(done: rawrestore.Report) -> str:
    """A sentence that a person can read aloud: it must not sound better than it is."""
    image = "standard input" if done.plan.image == _STREAM else done.plan.image
    lost = sum(one.length for one in done.unreadable)
    but = f", all but {render.size(lost)}" if lost else ""
    told = [f"{render.size(done.written_bytes)} of {render.size(done.device_bytes)} written"]
    if done.plan.method == "differ":
        told.append("the rest was equal already")
    if done.verified_bytes:
        told.append(f"{render.size(done.verified_bytes)} read back and equal")
    return f"Restored {image} to {done.plan.target} in {render.seconds(done.seconds)}{but}: {', '.join(told)}."


def _show(done: Plan | Report, *, as_json: bool) -> None:
    from dataclasses import asdict

    from blockbak.flow.restore import Plan

    if as_json:
        render.document({"plan": asdict(done)} if isinstance(done, Plan) else asdict(done))
    if isinstance(done, Plan):
        for sentence in describe(done) if not as_json else ():
            render.line(sentence)
        return
    for flaw in done.flaws:
        render.say(
            f"Bytes {flaw.start} to {flaw.start + flaw.length} are zeros on the target: {flaw.reason} ({flaw.file})."
        )
    for row in done.unreadable:
        render.say(
            f"Bytes {row['start']} to {row['start'] + row['length']} could not be read from the source; they are zeros."
        )
    if done.mapfile:
        render.say(f"What could not be restored is in {done.mapfile}.")
    for note in done.plan.notes:
        render.say(note)
    if not as_json:
        render.line(summary(done))


def summary(done: Report) -> str:
    """A sentence that a person can read aloud: it must not sound better than it is."""
    but = f", all but {render.size(done.lost_bytes)}" if done.lost_bytes else ""
    told = [f"{render.size(done.written_bytes)} written"]
    if done.plan.method == "differ" and not done.flaws:
        told.append(f"{render.size(done.plan.device_bytes - done.written_bytes)} equal already")
    if done.verified_bytes:
        told.append(f"{render.size(done.verified_bytes)} read back and equal")
    return (
        f"Restored {_what(done.plan)} to {done.plan.target} in {render.seconds(done.seconds)}{but}: {', '.join(told)}."
    )
