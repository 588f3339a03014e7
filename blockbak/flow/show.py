"""One point, looked at from all sides."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from blockbak.errors import NoGroupMetadata
from blockbak.flow.context import Context
from blockbak.flow.mapfile import text
from blockbak.flow.points import find, find_and_open, partition_table, reader
from blockbak.image.view import PointView
from blockbak.model import extent
from blockbak.model.chain import Image
from blockbak.model.extent import BAD, HOLE, KIND_NAMES, Extents
from blockbak.model.filesystem import Filesystem, Read, filesystem
from blockbak.model.partition import PartitionTable, inside
from blockbak.model.partition_types import type_name
from blockbak.repository.local import Repository


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a point. ``extents`` are those of the whole point (volume bytes), at most as many as
    were asked for; ``extent_bytes`` sums all of them by kind. ``filesystems`` maps partition numbers (0: the
    volume itself) to what lies there.
    """

    point: str
    volume: str
    images: list[Image]
    chain: list[str]
    extent_bytes: dict[str, int]
    extent_count: int
    extents: list[dict[str, Any]]
    partition_table: PartitionTable | None
    filesystems: dict[str, Filesystem]


def show(repository: Repository, name: str, context: Context, *, extents_max: int) -> Report:
    """Look at a point. Raises NoSuchPoint, AmbiguousPoint, Damage."""
    with ExitStack() as stack:
        _, point, opened = find_and_open(repository, name, stack)
        view = opened.view
        sums, count, kept = _extents(view, extents_max, context)
        table = partition_table(view)
        return Report(
            point=point.id, volume=point.volume, images=list(point.images),
            chain=[image.file for image in opened.chain], extent_bytes=sums, extent_count=count,
            extents=[
                {"start": int(row["start"]), "length": int(row["length"]), "kind": KIND_NAMES[int(row["kind"])]}
                for row in kept
            ],
            partition_table=table, filesystems=filesystems_in(reader(view), table, view.geometry.device_bytes),
        )  # fmt: skip


def lvm_metadata(repository: Repository, name: str) -> str:
    """The volume group's metadata that a point keeps, from its manifest: for that no image need be whole.

    Raises NoGroupMetadata, NoSuchPoint, AmbiguousPoint, Damage.
    """
    _, _, point = find(repository, name)
    metadata = point.images[0].closing.lvm_metadata
    if not metadata:
        raise NoGroupMetadata(point=point.id)
    return metadata


def mapfile(repository: Repository, name: str, context: Context) -> str:
    """What of a point could not be read, as a mapfile for ddrescue. Raises NoSuchPoint, AmbiguousPoint, Damage."""
    with ExitStack() as stack:
        _, _, opened = find_and_open(repository, name, stack)
        view = opened.view
        lost = [extent.empty()]
        for number in range(view.geometry.sections):
            context.check()
            lost.append(extent.of_kind(view.section(number).extents, BAD, HOLE))
        return text(extent.coalesce(np.concatenate(lost)), view.geometry.device_bytes)


def _extents(view: PointView, most: int, context: Context) -> tuple[dict[str, int], int, Extents]:
    """Sums by kind, the number of extents, and the first ``most`` of them; a section at a time."""
    sums = dict.fromkeys(KIND_NAMES.values(), 0)
    kept, count = extent.empty(), 0
    last: Extents = extent.empty()
    for number in range(view.geometry.sections):
        context.check()
        rows = view.section(number).extents
        for kind, word in KIND_NAMES.items():
            sums[word] += extent.total(rows, kind)
        joined = extent.coalesce(np.concatenate((last, rows[:1]))) if len(last) else rows[:1]
        count += len(rows) - (len(last) == 1 and len(joined) == 1)
        last = rows[-1:]
        if len(kept) <= most:
            kept = extent.coalesce(np.concatenate((kept, rows)))
    return sums, count, kept[:most]


def filesystems_in(read: Read, table: PartitionTable | None, size: int) -> dict[str, Filesystem]:
    """What lies in each partition of ``table``, by its number; in the ``size`` bytes themselves, as ``0``, where there
    is no table.
    """
    found: dict[str, Filesystem] = {}
    places = [(0, 0, size)] if table is None else [(one.number, one.start, one.length) for one in table.partitions]
    for number, start, length in places:
        known = filesystem(inside(read, start, length), length)
        if known is not None:
            found[str(number)] = known
    return found


def as_document(report: Report) -> dict[str, Any]:
    """The report as it stands in ``--json`` output."""
    first = report.images[0]
    opening, closing = asdict(first.opening), asdict(first.closing)
    return {
        "point": report.point,
        "volume": report.volume,
        "kind": opening["kind"],
        "synthetic": opening["synthetic"],
        "parent": opening["parent"],
        **{key: opening[key] for key in ("sequence", "created", "identity", "source", "host", "device_bytes")},
        **{key: opening[key] for key in ("block_bytes", "window_bytes", "logical_sector", "physical_sector")},
        **closing,
        "images": [
            {
                "kind": image.opening.kind,
                "synthetic": image.opening.synthetic,
                "file": image.file,
                "stored_bytes": image.image_bytes,
            }
            for image in report.images
        ],
        "chain": report.chain,
        "extent_bytes": report.extent_bytes,
        "extent_count": report.extent_count,
        "extents": report.extents,
        "partition_table": _table_document(report.partition_table) if report.partition_table else None,
        "filesystems": {number: asdict(known) for number, known in report.filesystems.items()},
    }


def _table_document(table: PartitionTable) -> dict[str, Any]:
    partitions = [{**asdict(one), "type_name": type_name(one.type)} for one in table.partitions]
    return {**asdict(table), "partitions": partitions}
