"""``blockbak cold``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockbak.cli import common, nextboot, render
from blockbak.errors import ATTENTION

if TYPE_CHECKING:
    from blockbak.flow.raw import Plan, Report
    from blockbak.model.quiesce import RestOptions

_STREAM = "-"


def summary(report: Report) -> str:
    """A sentence that a person can read aloud."""
    of = f" of {render.size(report.device_bytes)}" if report.read_bytes < report.device_bytes else ""
    read = f"{render.size(report.read_bytes)}{of} read"
    if report.bad_bytes:
        read += f" but for {render.size(report.bad_bytes)} that could not be"
    streams = report.path == _STREAM
    where = "standard output" if streams else report.path
    stored = f"{render.size(report.stored_bytes)} {'written' if streams else 'stored'}"
    beside = f" Its sidecar is {report.sidecar}." if report.sidecar else ""
    return (
        f"Raw image of {report.source} written to {where} in {render.seconds(report.seconds)}: {read}, {stored}, "
        f"consistency {report.consistency}.{beside}"
    )


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak cold /dev/sdb /srv/images/sdb.img\n"
    "  blockbak cold --stop-users --dry-run /dev/sdb /srv/images/sdb.img\n"
    "  blockbak cold --limit 50M --idle vg/home home.img\n"
    "  blockbak cold --sidecar sdb.json /dev/sdb - | ssh other blockbak restore - sdb.img\n"
    "  blockbak verify ./home.img\n"
    "  blockbak -r /srv/backup cold --at-next-boot /dev/sda",
)
@click.argument("device", required=False, type=common.PATH)
@click.argument("file", required=False, type=common.PATH)
@click.option("--yes", "overwrite", is_flag=True, help="Replace FILE, and what lies beside it, if it exists.")
@click.option("--sidecar", type=common.PATH, metavar="PATH", help="Where FILE is '-': write the sidecar there.")
@click.option("--limit", callback=common.rate, metavar="SIZE", help="Read at most so many bytes a second.")
@click.option("--idle", is_flag=True, help="Read only when nobody else wants the disk, as far as its scheduler can.")
@nextboot.options
@common.retrying_options
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@common.rest_options
@common.repository_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, device: str | None, file: str | None, overwrite: bool, sidecar: str | None,
    limit: int | None, idle: bool, at_next_boot: bool, cancel: bool, name: str | None, time_limit: int | None,
    retries: int, strict: bool, dry_run: bool, rest: RestOptions, repository: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Make a raw image of DEVICE, as dd would, in FILE: sparse, and with digests of all of it in FILE.json, so that
    'verify', 'restore' and 'adopt' know whether it is whole.

    Whoever uses DEVICE is brought to rest first, as with 'backup --mode cold', and everything is put back: see
    --dry-run. With '-' for FILE the bytes go to standard output, for a pipe. What cannot be read is zeros in the image,
    and named in the sidecar and in FILE.mapfile; exit 3. A repository that is named must not lie on DEVICE.

    The disk of the running system cannot be brought to rest. With --at-next-boot and a repository on another local disk
    (ext4, XFS or btrfs) instead of FILE, initramfs-tools' initramfs images it before it is mounted, shows how far it
    is, goes on booting whatever happens, and the image is a point of the repository once the system is up. Nothing is
    done if a hibernated system waits, if it is another disk, or if the repository's file system is not clean;
    blockbak=off on the kernel's command line passes it over.
    """
    if at_next_boot:
        nextboot.check_alone(context)
        nextboot.run(device, repository, cancel=cancel, name=name, limit=time_limit, dry_run=dry_run, as_json=as_json)
        return
    if cancel or name is not None or time_limit is not None:
        raise click.UsageError("--cancel, --name and --time-limit go with --at-next-boot.")
    if device is None or file is None:
        raise click.UsageError("Missing argument: give the DEVICE and the FILE, or '-'.")
    _image(
        context, device, file, overwrite, sidecar, limit, retries, rest, strict=strict, idle=idle, dry_run=dry_run,
        repository=repository, as_json=as_json,
    )  # fmt: skip


def _image(
    context: click.Context, device: str, file: str, overwrite: bool, sidecar: str | None, limit: int | None,
    retries: int, rest: RestOptions, *, strict: bool, idle: bool, dry_run: bool, repository: str | None, as_json: bool,
) -> None:  # fmt: skip
    """A raw image."""
    from blockbak.flow import raw as flow
    from blockbak.host import pipes
    from blockbak.host.system import read_idly

    streams = file == _STREAM
    if sidecar is not None and not streams:
        raise click.UsageError("A file's sidecar lies beside it: --sidecar takes '-' for FILE.")
    if streams and as_json:
        raise click.UsageError("Standard output holds the image there, so it cannot hold a JSON document.")
    if streams and not dry_run and pipes.is_terminal(1):
        raise click.UsageError("An image is not written to a terminal: give a pipe, or the name of a file.")
    known = common.known_repository(repository)
    request = flow.Request(device, file, overwrite, limit, sidecar, rest, retries, strict)
    if idle:
        read_idly()
    with common.world() as world:
        done = flow.plan(request, known, world) if dry_run else flow.make(request, world, repository=known)
    if isinstance(done, flow.Plan):
        _show_plan(done, as_json=as_json)
        return
    _show(done, as_json=as_json)
    context.exit(ATTENTION if done.attention else 0)


def _show_plan(plan: Plan, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        render.document({"plan": asdict(plan)})
        return
    where = "standard output" if plan.path == _STREAM else plan.path
    tell = render.say if plan.path == _STREAM else render.line
    tell(f"{plan.source}: would make a raw image of it in {where}, {render.size(plan.device_bytes)} to read.")
    for line in plan.rest:
        tell(line)
    for path in plan.replaces:
        tell(f"{path} exists; --yes would replace it.")


def _show(report: Report, *, as_json: bool) -> None:
    for note in report.notes:
        render.say(note)
    for one in report.unreadable:
        render.say(f"Bytes {one.start} to {one.start + one.length} could not be read; they are zeros in the image.")
    if report.mapfile:
        render.say(f"What could not be read is in {report.mapfile}.")
    if report.path == _STREAM:
        render.say(summary(report))
    elif as_json:
        render.document(report)
    else:
        render.line(summary(report))
