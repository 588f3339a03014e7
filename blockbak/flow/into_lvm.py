"""Logical volumes as targets: made for a restore and gone again if it fails; thin ones, while their pool has room."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from blockbak.errors import (
    BadTarget,
    Damage,
    NoVolumeRoom,
    SourceError,
    TargetSectorSize,
    TargetUnsafe,
    VolumeNameTaken,
)
from blockbak.flow.context import Context
from blockbak.flow.leftovers import settle
from blockbak.flow.target import Incoming
from blockbak.host import device as devices
from blockbak.host import lvm, runs, volumes
from blockbak.host.blockio import PIECE_BYTES, TargetWriter
from blockbak.host.device import Device
from blockbak.host.system import System
from blockbak.host.volumes import PoolWatch
from blockbak.image.view import PointView
from blockbak.model import snapshot as plan
from blockbak.model import twins
from blockbak.model.filesystem import PhysicalVolume, physical_volume
from blockbak.model.part import Part
from blockbak.model.partition import inside
from blockbak.units import align_down, align_up

_RUN_DIGITS = 8


@dataclass(frozen=True, slots=True)
class NewVolume:
    """A logical volume to be made: its size in bytes, its thin pool or an empty string, the sectors it will have
    (0: not known), and whether all of it reads as zeros once it is made.
    """

    group: str
    name: str
    size: int
    pool: str
    logical_sector: int
    blank: bool

    @property
    def label(self) -> str:
        """``vg/lv``."""
        return f"{self.group}/{self.name}"


def plan_volume(label: str, pool: str, view: PointView, part: Part, context: Context) -> NewVolume:
    """The volume that the part needs. Raises BadTarget, VolumeNameTaken, NoVolumeRoom, TargetSectorSize;
    MissingProgram, CommandFailed.
    """
    group_name, name = plan.as_label(label)
    if not name:
        raise BadTarget(path=label, reason="it is not the name of a volume group, a slash, and a new volume's name")
    if "/" in pool and not pool.startswith(f"{group_name}/"):
        raise BadTarget(path=label, reason=f"thin pool {pool} is in another volume group")
    pool = pool.rpartition("/")[2]
    if name.startswith(plan.PREFIX):
        raise BadTarget(path=label, reason=f"names that begin with {plan.PREFIX} are those of blockbak's snapshots")
    group = lvm.group(group_name)
    if group is None:
        raise BadTarget(path=label, reason=f"there is no volume group {group_name}")
    if lvm.named(group_name, name) is not None:
        raise VolumeNameTaken(volume=f"{group_name}/{name}")
    size = align_up(part.length, group.lvm_extent)
    wanted = NewVolume(
        group_name, name, size, pool, _check_sectors(label, group.disks, Incoming.of(view, part)), blank=False
    )
    if not pool:
        if group.free < size:
            raise NoVolumeRoom(place=f"Volume group {group_name}", free=group.free, volume=wanted.label, needed=size)
        return wanted
    return replace(wanted, blank=_check_pool(wanted, view, part, context))


def _check_pool(wanted: NewVolume, view: PointView, part: Part, context: Context) -> bool:
    """Whether a new volume of the pool reads as zeros. Raises BadTarget, NoVolumeRoom."""
    label = f"{wanted.group}/{wanted.pool}"
    pool = lvm.named(wanted.group, wanted.pool)
    if pool is None or not {"thin", "pool"} <= set(pool.layout):
        raise BadTarget(path=wanted.label, reason=f"there is no thin pool {label}")
    unit, blank = lvm.pool_blocks(wanted.group, wanted.pool)
    needed = taken(view, unit, part) if blank else wanted.size
    # An inactive pool tells nothing yet; it is watched in any case.
    if pool.data_percent is not None:
        free = int(pool.size * (100 - pool.data_percent) / 100)
        needed += plan.pool_reserve(pool.size) + _on_the_way(context)
        if free < needed:
            raise NoVolumeRoom(place=f"Thin pool {label}", free=free, volume=wanted.label, needed=needed)
    return blank


def _check_sectors(label: str, disks: tuple[str, ...], incoming: Incoming) -> int:
    """The largest sector of a group's disks: a volume may come to lie on any. Raises TargetSectorSize."""
    found = [0]
    for disk in disks:
        with contextlib.suppress(SourceError):  # one that is missing
            found.append(devices.look(disk).logical_sector)
    have, table = max(found), incoming.table()
    if have and table is not None and have != table.sector_bytes:
        raise TargetSectorSize(path=label, have=have, need=table.sector_bytes)
    return have


def _on_the_way(context: Context) -> int:
    """Bytes that may be written after a look at the pool that any of the workers had."""
    return context.workers * PIECE_BYTES


def taken(view: PointView, unit: int, part: Part) -> int:
    """Bytes that the part's content takes where room is given ``unit`` bytes at a time."""
    count, last = 0, -1
    for number in range(view.geometry.sections):
        try:
            stored = np.flatnonzero(view.section(number).stored)
        except Damage:
            continue  # only where the restore goes on without it
        if not len(stored):
            continue
        begin, end = view.geometry.section_range(number)
        starts = begin + stored.astype(np.int64) * view.geometry.block_bytes
        ends = np.minimum(starts + view.geometry.block_bytes, min(end, part.end)) - part.start
        starts = np.maximum(starts, part.start) - part.start
        starts, ends = starts[starts < ends], ends[starts < ends]
        if not len(starts):
            continue
        first = starts // unit
        final = (ends - 1) // unit
        before = np.concatenate(([last], final[:-1]))
        count += int((final - first + 1).sum()) - int((first == before).sum())
        last = int(final[-1])
    return count * unit


@contextlib.contextmanager
def new_volume(
    wanted: NewVolume, view: PointView, part: Part, context: Context, watch: Callable[[PoolWatch], None]
) -> Iterator[TargetWriter]:
    """The volume, made and open; it is an ordinary one once the ``with`` ends well, and else it is removed.

    What lies past the part's end reads as zeros. ``watch`` is handed what must be asked while it is written.
    Raises CommandFailed, MapperFailed, TargetFailed, TargetSectorSize.
    """
    for line in settle(context).told:
        context.say(line)
    boot = System().boot
    with (
        runs.alive(context.hex_id(_RUN_DIGITS), context.host, boot, context.run_dir) as run,
        volumes.new_volume(run, wanted.group, wanted.name, wanted.size, wanted.pool) as path,
        TargetWriter(path, kernel=context.kernel) as target,
    ):
        _check_sectors(wanted.label, (path,), Incoming.of(view, part))
        if wanted.pool:
            watch(PoolWatch(devices.look(path), _on_the_way(context)))
        if not wanted.blank:
            # From the last whole sector on, which the content is then written into.
            start = align_down(part.length, target.logical)
            if start < target.size:
                target.zero(start, target.size - start)
        yield target


def pool_of(target: Device, needs: Callable[[int], int], path: str, context: Context) -> PoolWatch | None:
    """What watches the pool of a thin target; None for any other. ``needs`` tells the bytes that the content takes
    at least where room is given so many at a time. Raises TargetUnsafe where it surely does not fit into the pool:
    all its other volumes would fail with it.
    """
    if not volumes.thin_pool(target):
        return None
    watch = PoolWatch(target, _on_the_way(context))
    short = watch.short(needs(watch.unit))
    if short is not None:
        free, needed = short
        reason = f"thin pool {watch.label} has {free} bytes free, at least {needed} are needed"
        raise TargetUnsafe(path=path, reason=reason, way=f"Extend {watch.label} with lvextend.")
    return watch


# --- physical volumes twice ---------------------------------------------------------------------------------


def twin_notes(target: Device, incoming: Incoming) -> list[str]:
    """What to say before a physical volume that is here already is written to another device."""
    copies = _physical_volumes(incoming)
    if not copies or target.is_lv or not target.is_block:
        return []
    system = System()
    family = {target.kname, *system.above(target.kname)}
    for name in list(family):
        family |= system.below(name)
    present = lvm.physical_volumes(family, system)
    return [line for one in copies for line in twins.warnings(one, present, target.label)]


def _physical_volumes(incoming: Incoming) -> list[PhysicalVolume]:
    """Those in the content: itself, or in its partitions; or those that it is said to have."""
    if incoming.said_volumes:
        return list(incoming.said_volumes)
    table = incoming.table()
    places = [(0, incoming.size)]
    places += [(one.start, one.length) for one in table.partitions] if table else []
    found = [physical_volume(inside(incoming.read, start, length)) for start, length in places]
    return [one for one in found if one is not None]
