"""What of a point is restored: all of it, or one partition."""

from __future__ import annotations

from blockbak.errors import Damage, NoSuchPartition
from blockbak.flow.points import partition_table
from blockbak.image.view import PointView
from blockbak.model.part import Part
from blockbak.model.partition import Partition, PartitionTable


def whole(view: PointView) -> Part:
    """All of the volume."""
    return Part(0, view.geometry.device_bytes)


def find_partition(view: PointView, number: int) -> tuple[Partition, PartitionTable]:
    """The partition of that number. Raises NoSuchPartition; Damage where the point is damaged so that it cannot be
    told.
    """
    met: list[Damage] = []
    table = partition_table(view, met)
    known = {one.number: one for one in table.partitions} if table else {}
    if table is not None and number in known:
        return known[number], table
    if met:
        raise met[0]
    there = ", ".join(map(str, known)) or ("none" if table else "no partition table")
    if table is not None and not (table.valid_primary or table.valid_backup):
        there = "a GPT of which both copies are damaged"
    raise NoSuchPartition(point=view.top.opening.point, number=number, there=there)
