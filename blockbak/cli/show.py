"""``blockbak show``."""

from __future__ import annotations

from typing import Any

import click

from blockbak.cli import common, render


def _lines(about: dict[str, Any]) -> list[tuple[str, str]]:
    identity = about["identity"]
    return [
        ("point", about["point"]),
        ("volume", f"{about['volume']} ({identity['kind']} {identity['value']})"),
        (
            "made",
            f"{about['created']} on {about['host']}, from {about['source']}, in {render.seconds(about['seconds'])}",
        ),
        ("kind", ("synthetic " if about["synthetic"] else "") + about["kind"]),
        ("parent", about["parent"] or "none"),
        (
            "consistency",
            f"{about['consistency']} (mode {about['mode']}, changes found by {about['change_source']})",
        ),
        ("size", f"{render.size(about['device_bytes'])} ({about['device_bytes']} bytes)"),
        (
            "blocks",
            f"{render.size(about['block_bytes'])}, in windows of {render.size(about['window_bytes'])}",
        ),
        ("sectors", f"{about['logical_sector']} logical, {about['physical_sector']} physical"),
        ("root", about["root"]),
        (
            "content",
            ", ".join(f"{render.size(size)} {kind}" for kind, size in about["extent_bytes"].items() if size),
        ),
        ("restored from", ", ".join(about["chain"])),
        *[("image", f"{one['file']}, {render.size(one['stored_bytes'])}") for one in about["images"]],
        *([("set id", about["set_id"])] if about["set_id"] else []),
        *[(f"hook {name}", line) for name, said in about["hooks"].items() for line in said.splitlines()],
        *_group(about),
        *[("note", note) for note in about["notes"]],
    ]


def _group(about: dict[str, Any]) -> list[tuple[str, str]]:
    if not about["lvm_metadata"]:
        return []
    how = f"'blockbak show {about['point']} --lvm-metadata' prints it, for vgcfgrestore"
    return [("volume group", f"its metadata is kept with the point: {how}")]


@click.command(epilog="Example: blockbak -r /srv/backup show web@latest")
@click.argument("point")
@click.option("--extents", "extents_max", type=click.IntRange(min=0), default=10_000, show_default=True,
              metavar="N", help="List at most so many extents in the JSON document.")  # fmt: skip
@click.option("--lvm-metadata", is_flag=True,
              help="Print only the volume group's metadata as it was, which vgcfgrestore takes.")  # fmt: skip
@click.option("--mapfile", is_flag=True,
              help="Print only what could not be read, as a mapfile that ddrescue takes.")  # fmt: skip
@common.repository_options
def command(
    point: str, extents_max: int, lvm_metadata: bool, mapfile: bool, repository: str | None, as_json: bool, wait: float
) -> None:
    """One point: where it is from, what holds it, its extents, partitions and file systems."""
    from blockbak.flow import show as flow

    if lvm_metadata and mapfile:
        raise click.UsageError("--lvm-metadata and --mapfile each print one thing only.")
    opened = common.open_repository(repository)
    if lvm_metadata:
        _print_only("lvm_metadata", flow.lvm_metadata(opened, point), as_json=as_json)
        return
    if mapfile:
        with common.world(wait) as world:
            _print_only("mapfile", flow.mapfile(opened, point, world), as_json=as_json)
        return
    with common.world(wait) as world:
        about = flow.as_document(flow.show(opened, point, world, extents_max=extents_max))
    if as_json:
        render.document(about)
        return
    for key, value in _lines(about):
        render.line(f"{key + ':':14} {value}")
    for row in about["extents"]:
        if row["kind"] == "bad":
            render.line(f"{'unreadable:':15}bytes {row['start']} to {row['start'] + row['length']}")
    _partitions(about)


def _print_only(name: str, text: str, *, as_json: bool) -> None:
    if as_json:
        render.document({name: text})
    else:
        render.line(text.removesuffix("\n"))


def _partitions(about: dict[str, Any]) -> None:
    systems = about["filesystems"]
    if (table := about["partition_table"]) is None:
        if "0" in systems:
            known = systems["0"]
            render.line(f"{'file system:':15}{known['type']} {known['label']} {known['uuid']}".rstrip())
        return
    scheme = table["scheme"] + (" with a hybrid MBR" if table["hybrid"] else "")
    sectors = f"{table['sector_bytes']}-byte sectors"
    render.line(f"{'partitions:':15}{' '.join([scheme, *filter(None, [table['disk_id']])])}, {sectors}")
    for note in table["notes"]:
        render.line(f"{'table note:':15}{note}")
    if not table["partitions"]:
        return
    rows = []
    for one in table["partitions"]:
        known = systems.get(str(one["number"]), {})
        size, kind = render.size(one["length"]), one["type_name"] or one["type"]
        told = [known.get(key, "") for key in ("type", "label", "uuid")]
        rows.append([one["number"], one["start"], size, kind, one["name"], one["uuid"], *told])
    columns = ["number", "start", "size", "type", "name", "PARTUUID", "file system", "label", "UUID"]
    render.table(columns, rows, numeric=["start", "size"], spare=["PARTUUID", "UUID", "name"])
