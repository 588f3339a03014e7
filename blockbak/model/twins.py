"""Physical volumes that LVM could not tell apart: what to say before a second one is written."""

from __future__ import annotations

from collections.abc import Sequence

from blockbak.model.filesystem import PhysicalVolume


def warnings(copy: PhysicalVolume, present: Sequence[tuple[str, PhysicalVolume]], target: str) -> list[str]:
    """What a person must know before ``copy`` is written to ``target``; nothing where LVM gets along with it.

    ``present`` are the other physical volumes on this machine, each with its device.
    """
    apart = (
        f"Keep {target} out of LVM's sight (lvmdevices --deldev, or a filter in lvm.conf) until the original is gone, "
        f"or run 'vgimportclone {target}', which gives the copy ids and a name of its own."
    )
    for path, one in present:
        if one.uuid == copy.uuid:
            where = f" of volume group {copy.group}" if copy.names_group else ""
            return [f"The copy is LVM's physical volume {copy.uuid}{where}, and so is {path}. {apart}"]
    if not copy.names_group:
        return []
    same = [(path, one) for path, one in present if one.group == copy.group]
    others = [path for path, one in same if one.group_uuid != copy.group_uuid or not copy.group_uuid]
    if others:
        return [f"The copy is of a volume group {copy.group}, and {others[0]} is of another one of that name. {apart}"]
    if same:
        joins = f"The copy is of volume group {copy.group}, of which {same[0][0]} is here"
        return [f"{joins}: LVM takes {target} for its missing physical volume. {apart}"]
    return []
