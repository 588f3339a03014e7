"""What LVM tells of its volumes and groups, through its own commands."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from blockbak.errors import BlockbakError, CommandFailed
from blockbak.host.device import devices
from blockbak.host.marks import reading
from blockbak.host.runner import Completed, run
from blockbak.host.runs import private, unlink
from blockbak.host.system import System, lvm_names
from blockbak.model import snapshot as plan
from blockbak.model.filesystem import PhysicalVolume, physical_volume
from blockbak.model.snapshot import LogicalVolume

CHANGE_SECONDS = 600.0
"""A command that changes a group is in the middle of suspended devices: it is not ended before it must hang."""
_METADATA_MOST = 4 << 20
"""Bytes of a group's metadata text that a point keeps."""
_METADATA_PREFIX = ".metadata-"
_REMOVE_TRIES = 10
_REMOVE_SECONDS = 0.25
_T = TypeVar("_T")


def command(*words: str, accept: tuple[int, ...] = (0,)) -> Completed:
    """Run one of LVM's commands. Raises MissingProgram, CommandFailed."""
    return run(list(words), deadline=CHANGE_SECONDS, env={"LVM_SUPPRESS_FD_WARNINGS": "1"}, accept=accept)


def _told(program: str, fields: Sequence[str], parse: Callable[[str], _T], *arguments: str) -> _T:
    """What ``lvs`` or ``vgs`` tells. Something that is not there makes it fail, and yet print what it has."""
    words = [program, "--reportformat", "json", "--units", "b", "--nosuffix", "-o", ",".join(fields), *arguments]
    done = command(*words, accept=(0, 5))
    try:
        return parse(done.stdout)
    except (ValueError, KeyError, TypeError) as error:
        raise CommandFailed(program=program, status=done.status, stderr=done.stderr or str(error)) from error


def _report(*arguments: str) -> list[LogicalVolume]:
    return _told("lvs", plan.VOLUME_FIELDS, plan.parse_volumes, *arguments)


def volumes() -> list[LogicalVolume]:
    """Every logical volume that is not an inner part of another. Raises MissingProgram, CommandFailed."""
    # One that a killed command left suspended would be waited for, if LVM looks into logical volumes.
    return _report("--config", "devices/ignore_suspended_devices=1")


def by_uuid(uuid: str) -> LogicalVolume | None:
    """The volume of a UUID, or None."""
    found = _report("-a", "--select", f"lv_uuid={uuid}")
    return found[0] if found else None


def named(group: str, name: str) -> LogicalVolume | None:
    """The volume of that name, active or not; None where there is none, or no such group."""
    return next((one for one in _report("-a", group) if one.name == name), None)


def inactive(path: str) -> LogicalVolume | None:
    """The volume that ``vg/lv``, ``/dev/vg/lv`` or ``/dev/mapper/…`` would name if it were active; None also
    where LVM cannot be asked.
    """
    mapped = path.removeprefix("/dev/mapper/")
    group, name = lvm_names(mapped) if mapped != path else plan.as_label(path)
    if not group or not name:
        return None
    try:
        found = named(group, name)
    except BlockbakError:
        return None
    return found if found is not None and not found.active else None


def group(name: str) -> plan.Group | None:
    """A volume group; None where there is none of that name."""
    return _told("vgs", plan.GROUP_FIELDS, plan.parse_group, name)


def pool_blocks(group: str, pool: str) -> tuple[int, bool]:
    """How many bytes a thin pool gives at a time, and whether it zeroes them before they are used."""
    return _told("lvs", ("chunk_size", "zero"), plan.parse_pool_blocks, f"{group}/{pool}")


def pool_bytes(group: str, pool: str) -> int:
    """How much data a thin pool holds."""
    found = _report("-a", f"{group}/{pool}")
    return found[0].size if found else 0


def places() -> list[str]:
    """Where LVM's own commands write: its archive, its log. Empty where it does not tell."""
    try:
        return plan.parse_places(command("lvmconfig", "-q", "-q", "--type", "full", *plan.PLACES).stdout)
    except BlockbakError:
        return []


def group_metadata(group: str, run_dir: str) -> str:
    """The group's metadata as ``vgcfgbackup`` writes it; empty where LVM does not tell."""
    path = os.path.join(run_dir, f"{_METADATA_PREFIX}{os.getpid()}-{threading.get_ident()}")
    try:
        private(run_dir)
        command("vgcfgbackup", "-q", "-q", "-f", path, group)
        return Path(path).read_text(encoding="utf-8", errors="replace")[:_METADATA_MOST]
    except (OSError, BlockbakError):
        return ""
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


def clear_texts(run_dir: str) -> None:
    """Remove the metadata texts of processes that are over."""
    for path in Path(run_dir).glob(f"{_METADATA_PREFIX}*"):
        if not Path("/proc", path.name.removeprefix(_METADATA_PREFIX).partition("-")[0]).exists():
            unlink(path)


def refresh(name: str) -> list[str]:
    """Have LVM make a volume's mapping what its metadata says, after a command that came half-way."""
    label = "/".join(lvm_names(name))
    try:
        command("lvchange", "-q", "-q", "--refresh", label)
    except CommandFailed as error:
        return [f"{label} works, but LVM could not refresh it: {error.fields['stderr']}"]
    return []


def remove(label: str) -> None:
    """Remove a volume; tried again while something has it open for a moment. Raises CommandFailed."""
    for left in reversed(range(_REMOVE_TRIES)):
        try:
            command("lvremove", "-q", "-q", "-y", label)
        except CommandFailed as error:
            text = str(error.fields["stderr"])
            if "Failed to find logical volume" in text or "not found" in text:
                return
            if left == 0 or ("in use" not in text and "is used by" not in text):
                raise
            threading.Event().wait(_REMOVE_SECONDS)
        else:
            return


# --- physical volumes -------------------------------------------------------------------------------------


def physical_volumes(without: Collection[str], system: System | None = None) -> list[tuple[str, PhysicalVolume]]:
    """Every physical volume that can be seen, with its node, LVM installed or not; but not on the devices of
    these kernel names, nor inside logical volumes, where LVM does not look (lvm.conf, scan_lvs).
    """
    system = system or System()
    found = []
    for device in devices(system):
        if device.kname in without or device.is_lv:
            continue
        with reading(device.path) as read:
            one = physical_volume(read)
        if one is not None:
            found.append((device.path, one))
    return found
