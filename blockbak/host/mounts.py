"""Mounts taken off, made read-only, and made again as they were: through mount(8) and umount(8)."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from blockbak.errors import CommandFailed, NotAtRest, NotPutBack, StillInUse
from blockbak.host.proc import MountLine, unescape
from blockbak.host.runner import Completed
from blockbak.host.scratch import undone
from blockbak.host.system import System
from blockbak.model import mounting
from blockbak.model.quiesce import ReadOnly, Unmount

UTAB = "/run/mount/utab"
MOUNT_SECONDS = 600.0
"""A journal's replay, or dirty pages that have to be written first."""
BUSY_SECONDS = 3.0
"""How long a busy mount is tried: who was just ended, and udev's probes, let go within that."""
BUSY_PAUSE_SECONDS = 0.2
HELD_SECONDS = 10.0
"""How long a device is asked for that somebody else holds: what only looks whether it is free soon lets go of it, and
what is given up here is missed by its users.
"""

Run = Callable[..., Completed]
Nothing = Callable[[], None]


def lines_at(target: str, system: System) -> list[MountLine]:
    """The mounts at a directory; the last one is seen."""
    return [line for line in system.mounts if line.target == target]


def is_same(line: MountLine, step: Unmount, source: str, system: System) -> bool:
    """Whether a mount shows what the one that a step takes off does, under whatever name of its device."""
    if (line.target, line.root, line.fstype) != (step.target, step.root, step.fstype):
        return False
    name = system.name_at(source)
    return line.source == source or (bool(name) and name in system.devices_of(line))


def present(step: Unmount, source: str, system: System) -> int:
    """How often it is mounted there."""
    return sum(is_same(line, step, source, system) for line in lines_at(step.target, system))


def userspace_options(line: MountLine, utab: str = UTAB) -> list[str]:
    """The options that mount(8) keeps for itself (``_netdev``, ``x-…``, ``user=``)."""
    try:
        text = Path(utab).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return []
    for row in text.splitlines():
        fields = {key: unescape(value) for key, _, value in (word.partition("=") for word in row.split())}
        if fields.get("TARGET") == line.target and fields.get("ROOT", line.root) == line.root:
            return [one for one in fields.get("OPTS", "").split(",") if one]
    return []


# --- taken off -----------------------------------------------------------------------------------------------


def look(step: Unmount) -> dict[str, Any]:
    """What is to be known before it goes: how often it is there, what only mount(8) knows of it."""
    system = System()
    found = [line for line in lines_at(step.target, system) if is_same(line, step, step.source, system)]
    name = system.name_at(step.source)
    return {
        "count": len(found),
        "userspace": userspace_options(found[-1]) if found else [],
        "instance": instance(step.source, system),
        "autoclear": system.attribute(name, "loop/autoclear") == "1" if name else False,
        "folder": os.path.isdir(step.target),
    }


def instance(path: str, system: System) -> list[int] | None:
    """The kernel's numbers of the device that a path names: another one under the same name has others. None where
    it names none.
    """
    name = system.name_at(path)
    if not name:
        return None
    return [*system.device_number(name), system.number(system.whole(name), "diskseq")]


def unmount(step: Unmount, run: Run, check: Nothing, who: Callable[[str], str], sleep: Callable[[float], None]) -> None:
    """Take the mount off; nothing where it is gone. Raises StillInUse, NotAtRest, CommandFailed."""
    system = System()
    before = present(step, step.source, system)
    if not before:
        return
    top = lines_at(step.target, system)[-1]
    if not is_same(top, step, step.source, system):
        raise NotAtRest(path=step.target, what=f"{top.source} was mounted over it meanwhile")
    # Never lazily: it would go on being written to. The name is the kernel's own; looking it up could mount it.
    argv = ["umount", "--no-canonicalize", "--", step.target]

    def gone() -> bool:
        return present(step, step.source, System()) < before

    _persistently(argv, gone, step.target, run, check, who, sleep)


def _persistently(
    argv: Sequence[str],
    done: Callable[[], bool],
    target: str,
    run: Run,
    check: Nothing,
    who: Callable[[str], str],
    sleep: Callable[[float], None],
) -> None:
    """Run it until it is done, as long as all that stands against it is that the mount is busy."""
    until = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            run(argv, deadline=MOUNT_SECONDS, check=check)
        except CommandFailed as error:
            if done():
                return
            if "busy" not in str(error.fields["stderr"]):
                raise
            if time.monotonic() >= until:
                raise StillInUse(path=target, holders=who(target) or "nobody was found who does") from error
            check()
            sleep(BUSY_PAUSE_SECONDS)
        else:
            return


# --- made again ----------------------------------------------------------------------------------------------


def mount_again(step: Unmount, seen: dict[str, Any], source: str, run: Run, run_dir: str) -> list[str]:
    """Mount it as it was where it is not, with its own options as they were; sentences on what was done
    and on what differs. Raises NotPutBack, CommandFailed.
    """
    there = present(step, source, System())
    said = []
    if there < seen.get("count", 1):
        if seen.get("folder") and not os.path.isdir(step.target):
            os.makedirs(step.target)
        said += [f"{step.target} is mounted again.", *_mount_once_more(step, seen, source, run, run_dir, there)]
    # Also where it was there: whoever mounted it may have been killed before this.
    line = _line(step.target)
    if mounting.parts(line.options)[0] != mounting.parts(step.options)[0]:
        _tune(["-o", ",".join(mounting.to_bind(step.options))], step.target, run)
    if mounting.kinds(" ".join(line.tags)) != mounting.kinds(step.propagation):
        for kind in mounting.kinds(step.propagation):
            _tune([f"--make-{kind}"], step.target, run)
    return [*said, *_told_differences(step)]


def _mount_once_more(step: Unmount, seen: dict[str, Any], source: str, run: Run, run_dir: str, there: int) -> list[str]:
    if mounting.shows_all(step.fstype, step.root, step.options) and not there:
        return _mount_filesystem(step, seen, source, step.target, run)
    if not there and not step.origin:
        return _bind_from_within(step, seen, source, run, run_dir)
    # Twice in one place, the second time it is bound to itself.
    run(_bind(step.target if there else step.origin, step.target), deadline=MOUNT_SECONDS)
    return []


def patiently(argv: Sequence[str], run: Run, deadline: float) -> Completed:
    """Run a program that wants a device for itself. Raises CommandFailed."""
    until = time.monotonic() + HELD_SECONDS
    while True:
        try:
            return run(argv, deadline=deadline)
        except CommandFailed as error:
            if "busy" not in str(error.fields["stderr"]) or time.monotonic() > until:
                raise
        time.sleep(BUSY_PAUSE_SECONDS)


def _mount_filesystem(step: Unmount, seen: dict[str, Any], source: str, target: str, run: Run) -> list[str]:
    options = mounting.to_mount(step.fstype, step.options, seen.get("userspace", ()))
    # A block device that FUSE serves goes by its own type only as long as it is mounted.
    of_type = [] if step.fstype.startswith("fuse") else ["-t", step.fstype]
    try:
        patiently(_mount(of_type, options, source, target), run, MOUNT_SECONDS)
    except CommandFailed as error:
        if "option" not in str(error.fields["stderr"]):
            raise
        # Something that the kernel shows and does not take: mounted without is better than not mounted.
        own, of_filesystem = mounting.parts(step.options)
        which = [one for one in of_filesystem if one.startswith("subvolid=")]
        plain = mounting.to_mount(step.fstype, [*own, *of_filesystem[:1], *which], seen.get("userspace", ()))
        patiently(_mount(of_type, plain, source, target), run, MOUNT_SECONDS)
        return [f"{step.target} could only be mounted without {','.join(options)}."]
    return []


def _mount(of_type: Sequence[str], options: Sequence[str], source: str, target: str) -> list[str]:
    return ["mount", "--options-source=disable", *of_type, "-o", ",".join(options), "--", source, target]


def _bind(origin: str, target: str) -> list[str]:
    return ["mount", "--bind", "--", origin, target]


def _bind_from_within(step: Unmount, seen: dict[str, Any], source: str, run: Run, run_dir: str) -> list[str]:
    """A part of a file system that is mounted nowhere as a whole: mounted aside for a moment."""
    os.makedirs(run_dir, mode=0o700, exist_ok=True)
    aside = tempfile.mkdtemp(prefix="mount-", dir=run_dir)
    try:
        said = _mount_filesystem(step, seen, source, aside, run)
        with undone(lambda: patiently(["umount", "--", aside], run, MOUNT_SECONDS)):
            run(_bind(aside + step.root, step.target), deadline=MOUNT_SECONDS)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(aside)
    return said


def _tune(words: Sequence[str], target: str, run: Run) -> None:
    run(["mount", "--options-source=disable", *words, "--", target], deadline=MOUNT_SECONDS)


def _line(target: str) -> MountLine:
    found = lines_at(target, System())
    if not found:
        raise NotPutBack(what=target, reason="it was unmounted again at once")
    return found[-1]


def _told_differences(step: Unmount) -> list[str]:
    found = [line for line in lines_at(step.target, System()) if line.root == step.root]
    if not found:
        return []
    said = mounting.differences(step.options, found[-1].options)
    before, now = mounting.kinds(step.propagation), mounting.kinds(" ".join(found[-1].tags))
    if before != now:
        said.append(f"propagation {'+'.join(before)} before, {'+'.join(now)} now")
    return [f"{step.target} is not mounted quite as before: {'; '.join(said)}."] if said else []


# --- read-only and back --------------------------------------------------------------------------------------


def look_read_only(step: ReadOnly) -> dict[str, Any]:
    """The options it has before."""
    found = lines_at(step.target, System())
    return {"options": list(found[-1].options) if found else []}


def make_read_only(
    step: ReadOnly, run: Run, check: Nothing, who: Callable[[str], str], sleep: Callable[[float], None]
) -> None:
    """Have the file system take no writes. Raises StillInUse, NotAtRest, CommandFailed."""

    def done() -> bool:
        found = lines_at(step.target, System())
        return bool(found) and not found[-1].writable

    if not done():
        _persistently(_remount("ro", step.target), done, step.target, run, check, who, sleep)
        if not done():
            raise NotAtRest(path=step.target, what="it takes writes after it was remounted read-only")


def make_writable(step: ReadOnly, seen: dict[str, Any], run: Run) -> list[str]:
    """Take writes again, where it did before; sentences. Raises CommandFailed."""
    before = seen.get("options", [])
    found = lines_at(step.target, System())
    if not found or not before or "ro" in mounting.parts(before)[1][:1]:
        return []
    said = []
    if not found[-1].writable:
        run(_remount("rw", step.target), deadline=MOUNT_SECONDS)
        said.append(f"{step.target} takes writes again.")
    line = _line(step.target)
    if mounting.parts(line.options)[0] != mounting.parts(before)[0]:
        _tune(["-o", ",".join(mounting.to_bind(before))], step.target, run)
    differs = mounting.differences(before, _line(step.target).options)
    return [*said, *([f"{step.target} is not mounted quite as before: {'; '.join(differs)}."] if differs else [])]


def _remount(how: str, target: str) -> list[str]:
    # The options that it has, and not those of fstab, which may say something else.
    return ["mount", "--options-source=mtab", "-o", f"remount,{how}", "--", target]
