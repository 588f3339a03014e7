"""systemd units of ours as files: written, compared, removed, switched on and off."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from blockbak.errors import CommandFailed, NoTimers, StoreFailed, UnitFileTaken
from blockbak.host import runner
from blockbak.host.blockio import replace_durably, sync_directory
from blockbak.host.kernel import Kernel
from blockbak.host.units import Units
from blockbak.model.timers import FAILED, MARK, Unit, is_ours

UNIT_DIR = "/etc/systemd/system"
_SYSTEMCTL_SECONDS = 90.0

State: TypeAlias = Literal["missing", "other", "same"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What was done: the names of the units that were written, and of those that were removed."""

    written: tuple[str, ...]
    removed: tuple[str, ...]


def state(unit_dir: str, unit: Unit) -> State:
    """Whether a unit is there, as it would be written now."""
    found = _content(os.path.join(unit_dir, unit.name))
    return "missing" if found is None else "same" if found == unit.text.encode() else "other"


def present(unit_dir: str) -> list[str]:
    """The units of ours that are there, by name."""
    try:
        names = sorted(os.listdir(unit_dir))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _failed(unit_dir, "read", error) from error
    return [name for name in names if is_ours(name) and _is_marked(os.path.join(unit_dir, name))]


def _is_marked(path: str) -> bool:
    return (_content(path) or b"").startswith(MARK.encode() + b"\n")


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _failed(path, "read", error) from error


def install(
    unit_dir: str, units: Sequence[Unit], known: Collection[str], kernel: Kernel, systemd: Units | None
) -> Changes:
    """Write these units, and remove those of ours whose names are not ``known``. ``systemd`` is told of them, and
    timers run from now on; None where it is not to know.

    Raises NoTimers, UnitFileTaken where somebody else's unit has one of the names, StoreFailed, CommandFailed.
    """
    live = _is_live(systemd)
    for unit in units:
        if state(unit_dir, unit) == "other" and not _is_marked(os.path.join(unit_dir, unit.name)):
            raise UnitFileTaken(path=os.path.join(unit_dir, unit.name))
    stale = [name for name in present(unit_dir) if name not in known]
    _remove(unit_dir, stale, kernel, systemd)
    written = [unit for unit in units if state(unit_dir, unit) != "same"]
    for unit in written:
        _write(os.path.join(unit_dir, unit.name), unit.text.encode(), kernel)
    if live:
        wanted = [unit.name for unit in units if unit.wanted_by]
        _systemctl("enable", "--no-reload", "--", *wanted)
        _systemctl("daemon-reload")
        if starting := [name for name in wanted if name.endswith(".timer")]:
            _systemctl("start", "--", *starting)
    return Changes(tuple(unit.name for unit in written), tuple(stale))


def remove(unit_dir: str, kernel: Kernel, systemd: Units | None) -> Changes:
    """Switch off and remove all units of ours; a run that is under way goes on. Raises NoTimers, StoreFailed,
    CommandFailed.
    """
    live = _is_live(systemd)
    names = present(unit_dir)
    _remove(unit_dir, names, kernel, systemd)
    if live and names:
        _systemctl("daemon-reload")
    return Changes((), tuple(names))


def _is_live(systemd: Units | None) -> bool:
    """Whether systemd is to know. Raises NoTimers where it is, and does not run this machine."""
    if systemd is not None and not systemd.running:
        raise NoTimers
    return systemd is not None


def _remove(unit_dir: str, names: Sequence[str], kernel: Kernel, systemd: Units | None) -> None:
    if systemd is not None and names:
        # A service is not stopped: its run would be broken off. Without its file it ends in its own time.
        if timers := [name for name in names if name.endswith(".timer")]:
            _systemctl("stop", "--", *timers)
        if single := [name for name in names if "@" not in name]:
            _systemctl("disable", "--no-reload", "--", *single)
        # Else they would be among the failed units for good. What systemd does not know of is no failure of ours.
        known = [f"{FAILED.partition('@')[0]}@*.service" if name == FAILED else name for name in names]
        _systemctl("reset-failed", "--", *known, accept=range(256))
        for name in timers:
            # When it last fired: one that is installed again would take that for a run that was missed.
            stamp = os.path.join(systemd.stamps, f"stamp-{name}")
            if os.path.lexists(stamp):
                _unlink(stamp, kernel)
    for name in names:
        _unlink(os.path.join(unit_dir, name), kernel)
    if names:
        sync_directory(unit_dir, kernel)


def _unlink(path: str, kernel: Kernel) -> None:
    try:
        kernel.unlink(path)
    except OSError as error:
        raise _failed(path, "removed", error) from error


def _write(path: str, text: bytes, kernel: Kernel) -> None:
    try:
        # Whatever the umask: systemd warns of units that not all can read.
        replace_durably(path, text, kernel, 0o644)
    except OSError as error:
        raise _failed(path, "written", error) from error


def _failed(path: str, action: str, error: OSError) -> StoreFailed:
    return StoreFailed(path=path, action=action, reason=(error.strerror or str(error)).lower())


def _systemctl(*words: str, accept: Collection[int] = (0,)) -> None:
    runner.run(["systemctl", "--quiet", *words], deadline=_SYSTEMCTL_SECONDS, accept=accept)


def next_times(names: Sequence[str], systemd: Units) -> dict[str, str]:
    """When each timer fires next, in systemd's own words; "" where it does not. Empty where systemd does not run."""
    if not names or not systemd.running:
        return {}
    properties = "Id,NextElapseUSecRealtime,ActiveState"
    try:
        done = runner.run(["systemctl", "show", f"--property={properties}", "--", *names], deadline=_SYSTEMCTL_SECONDS)
    except CommandFailed:
        return {}
    found = {}
    for block in done.stdout.split("\n\n"):
        one = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        found[one.get("Id", "")] = one.get("NextElapseUSecRealtime", "") if one.get("ActiveState") == "active" else ""
    return found
