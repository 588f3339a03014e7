"""``blockbak demo``."""

from __future__ import annotations

import click

from blockbak.cli import common, render
from blockbak.errors import NoPermission
from blockbak.units import MIB, TIB, parse_size


def _size(_: click.Context, __: click.Parameter, value: str) -> int:
    try:
        size = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size such as 512M") from error
    if size < 64 * MIB or size % 4096:
        raise click.BadParameter("take at least 64M, in whole pages")
    if size > 16 * TIB:
        raise click.BadParameter("take at most 16T")
    return size


@click.command(epilog="Example: sudo blockbak demo")
@click.option("--size", callback=_size, default="512M", show_default=True, help="Of the loop device.")
@click.option(
    "--dir", "directory", type=click.Path(exists=True, file_okay=False), default="/var/tmp", show_default=True,  # noqa: S108
    help="Where the demo's files lie while it runs.",
)  # fmt: skip
@common.json_option
def command(size: int, directory: str, as_json: bool) -> None:
    """The whole story on a loop device, in a minute.

    Makes a loop device with an ext4 of real files, takes a full, an incremental and a differential with
    edits in between, composes a synthetic full, restores each point and compares it with what the device
    held. Needs root; removes everything it made, also on Ctrl-C. Only SIGKILL can leave something behind: a
    directory blockbak-demo-… in --dir, its mount and two loop devices.
    """
    import os
    from dataclasses import asdict

    from blockbak.flow.demo import demo

    if os.geteuid() != 0:
        raise NoPermission(action="make loop devices under", path="/dev")
    with common.world() as world:
        report = demo(world, size=size, directory=directory)
    if as_json:
        render.document(asdict(report))
        return
    rows = [
        [
            row.step,
            "" if row.changed_bytes is None else render.size(row.changed_bytes),
            "" if row.stored_bytes is None else render.size(row.stored_bytes),
            render.seconds(row.seconds),
            row.proof,
        ]
        for row in report.rows
    ]
    render.table(["step", "changed", "stored", "time", "compared"], rows, numeric=["changed", "stored", "time"])
    render.line(report.proven)
