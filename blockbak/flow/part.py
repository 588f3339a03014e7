"""What lies inside a point: its partition table, one partition of it, the physical volumes."""

from __future__ import annotations

from blockbak.errors import Damage, NoSuchPartition
from blockbak.flow.points import partition_table, reader
from blockbak.image.view import PointView
from blockbak.model import partition
from blockbak.model.filesystem import PhysicalVolume, physical_volume
from blockbak.model.part import Part
from blockbak.model.partition import Partition, PartitionTable, inside


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
    raise NoSuchPartition(point=view.top.opening.point, number=number, there=there)


def table_within(view: PointView, part: Part) -> PartitionTable | None:
    """The partition table that the part begins with, if there is one: a guest's disk may lie in a partition."""
    if not part.partition:
        return partition_table(view)
    read = inside(reader(view), part.start, part.length)
    return partition.parse(read, view.top.opening.logical_sector, part.length, guess=True)


def physical_volumes(view: PointView, part: Part) -> list[PhysicalVolume]:
    """Those in the part: itself, or in its partitions."""
    read = inside(reader(view), part.start, part.length)
    table = table_within(view, part)
    places = [(0, part.length)]
    places += [(one.start, one.length) for one in table.partitions] if table else []
    found = [physical_volume(inside(read, start, length)) for start, length in places]
    return [one for one in found if one is not None]
