"""Sources that are found anew at each run: block devices by what udev says of them, logical volumes by a tag."""

from __future__ import annotations

from blockbak.host import lvm
from blockbak.host.device import devices
from blockbak.host.system import System
from blockbak.model.config import Selector
from blockbak.model.snapshot import PREFIX

_OF_PARTITIONS = "DEVTYPE"


def found(selector: Selector, system: System | None = None) -> list[str]:
    """What is meant by it now: nodes, or ``vg/lv``, in natural order. Raises MissingProgram, CommandFailed."""
    if selector.lvm_tag:
        return tagged(selector.lvm_tag)
    system = system or System()
    fits = [device for device in devices(system) if selector.fits(properties(device.kname, system))]
    names = {device.kname for device in fits}
    if any(name == _OF_PARTITIONS for name, _ in selector.udev):
        return [device.path for device in fits]
    # A disk's partitions carry its properties: the disk is meant, and they come with it.
    return [
        device.path
        for device in fits
        if not system.is_partition(device.kname) or system.whole(device.kname) not in names
    ]


def tagged(tag: str) -> list[str]:
    """The logical volumes with that tag; not our own snapshots, which may have inherited it."""
    return sorted(one.label for one in lvm.volumes() if tag in one.tags and not one.name.startswith(PREFIX))


def properties(name: str, system: System) -> dict[str, str]:
    """What is known of a device: the kernel's properties, and udev's where it runs."""
    return system.uevent(name) | system.udev(name)
