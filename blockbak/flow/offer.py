"""What can be backed up, and how it would be taken."""

from __future__ import annotations

from dataclasses import dataclass

from blockbak.errors import BlockbakError
from blockbak.host import device as devices
from blockbak.host import lvm, usage
from blockbak.host.device import Device
from blockbak.host.system import System
from blockbak.host.usage import Use
from blockbak.model import snapshot as plan
from blockbak.model.snapshot import LogicalVolume


@dataclass(frozen=True, slots=True)
class Offer:
    """A device, what uses it, and how ``auto`` takes it: ``cold``, ``hot`` or ``refused``, and why.

    ``thin_pool`` is ``vg/pool`` or empty; ``snapshot_room`` is None where there is no snapshot, or LVM does not
    tell.
    """

    device: Device
    uses: list[Use]
    mode: str
    reason: str
    thin_pool: str = ""
    snapshot_room: int | None = None


def offers() -> list[Offer]:
    """Everything that can be backed up but our own snapshots. LVM is asked once, and not where it has nothing."""
    system = System()
    found = devices.devices(system)
    volumes = _volumes() if any(one.is_lv for one in found) else []
    by_uuid = {one.uuid: one for one in volumes}
    by_label = {one.label: one for one in volumes}
    told = []
    for device in found:
        known = by_uuid.get(device.lv_uuid)
        if not _is_ours(device, known):
            pool = by_label.get(f"{known.group}/{known.pool}") if known else None
            told.append(offer(device, usage.users(device, system), known, pool, lvm.thin_pool_label(device, system)))
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
