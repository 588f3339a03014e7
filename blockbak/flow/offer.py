"""What can be backed up, and how it would be taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockbak.errors import BlockbakError
from blockbak.host import device as devices
from blockbak.host import lvm, usage
from blockbak.host.device import Device
from blockbak.host.occupants import everybody
from blockbak.host.system import System
from blockbak.host.usage import Use
from blockbak.host.volumes import thin_pool_label
from blockbak.model import snapshot as plan
from blockbak.model.snapshot import LogicalVolume


@dataclass(frozen=True, slots=True)
class Offer:
    """A device, what uses it, and how ``auto`` takes it: ``cold``, ``hot`` or ``refused``, and why.

    ``occupants`` are the units and processes that use it or what is stacked on it, as far as we may know.
    ``thin_pool`` is ``vg/pool`` or empty; ``snapshot_room`` is None where there is no snapshot, or LVM does not
    tell.
    """

    device: Device
    uses: list[Use]
    mode: str
    reason: str
    thin_pool: str = ""
    snapshot_room: int | None = None
    occupants: tuple[str, ...] = ()


def offers() -> list[Offer]:
    """Everything that can be backed up but our own snapshots. LVM is asked once, and not where it has nothing."""
    system = System()
    found = devices.devices(system)
    volumes = _volumes() if any(one.is_lv for one in found) else []
    by_uuid = {one.uuid: one for one in volumes}
    by_label = {one.label: one for one in volumes}
    names = [devices.identity(device, system) for device in found]
    busy = everybody(system)
    told = []
    for device, name in zip(found, names, strict=True):
        known = by_uuid.get(device.lv_uuid)
        if _is_ours(device, known):
            continue
        pool = by_label.get(f"{known.group}/{known.pool}") if known else None
        one = offer(device, usage.users(device, system), known, pool, thin_pool_label(device, system))
        if sum(other.same_as(name) for other in names) > 1 and (twin := devices.find_twin(device, system)) is not None:
            # Whatever the mode: which of the two is meant cannot be told.
            one = replace(one, mode="refused", reason=f"{twin.path} carries the same identity; detach one of them")
        told.append(replace(one, occupants=busy.get(device.kname, ())))
    return told


def _volumes() -> list[LogicalVolume]:
    try:
        return lvm.volumes()
    except BlockbakError:
        return []  # not root, or no lvm2: the kernel's own word has to do


def _is_ours(device: Device, known: LogicalVolume | None) -> bool:
    named = device.is_lv and device.lv.startswith(plan.PREFIX)
    return named and (known is None or plan.TAG in known.tags)


def offer(
    device: Device, uses: list[Use], known: LogicalVolume | None, pool: LogicalVolume | None, thin_pool: str
) -> Offer:
    """The decision, from what was found out; ``known`` and ``pool`` are LVM's word of a volume and its pool."""
    mode, reason = usage.decide_mode(device, uses)
    if known is None:
        return Offer(device, uses, mode, reason, thin_pool)
    room, short = plan.outlook(known, pool)
    if mode == "hot" and short:
        mode, reason = "refused", f"{reason}; no snapshot can be made: {short}"
    return Offer(device, uses, mode, reason, thin_pool, room)
