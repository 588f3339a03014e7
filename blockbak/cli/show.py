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
        *[("note", note) for note in about["notes"]],
    ]


@click.command(epilog="Example: blockbak -r /srv/backup show web@latest")
@click.argument("point")
@click.option("--extents", "extents_max", type=click.IntRange(min=0), default=10_000, show_default=True,
              metavar="N", help="List at most so many extents in the JSON document.")  # fmt: skip
@common.repository_options
def command(point: str, extents_max: int, repository: str | None, as_json: bool, wait: float) -> None:
    """One point: where it is from, what holds it, its extents, partitions and file systems."""
    from blockbak.flow.show import as_document, show

    opened = common.open_repository(repository)
    with common.world(wait) as world:
        about = as_document(show(opened, point, world, extents_max=extents_max))
    if as_json:
        render.document(about)
        return
    for key, value in _lines(about):
        render.line(f"{key + ':':15}{value}")
    for row in about["extents"]:
        if row["kind"] == "bad":
            render.line(f"{'unreadable:':15}bytes {row['start']} to {row['start'] + row['length']}")
    _partitions(about)


def _partitions(about: dict[str, Any]) -> None:
    systems = about["filesystems"]
    if (table := about["partition_table"]) is None:
        if "0" in systems:
            known = systems["0"]
            render.line(f"{'file system:':15}{known['type']} {known['label']} {known['uuid']}".rstrip())
        return
    render.line(f"{'partitions:':15}{table['scheme']} {table['disk_id']}")
    rows = []
    for one in table["partitions"]:
        known = systems.get(str(one["number"]), {})
        rows.append(
            [
                one["number"],
                one["start"],
                render.size(one["length"]),
                one["name"],
                known.get("type", ""),
                known.get("label", ""),
            ]
        )
    render.table(["number", "start", "size", "name", "file system", "label"], rows, numeric=["start", "size"])
