"""Puts the stage that images a disk at the next boot into the initramfs, and takes it out again.

Debian's initramfs-tools alone. What is installed is three scripts, the order they follow, and a systemd unit; all of
it is gone after one boot.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from blockbak.errors import BlockbakError, CommandFailed, InitramfsFailed, NotAtNextBoot
from blockbak.host.device import Device, block
from blockbak.host.marks import reading, table_at
from blockbak.host.proc import MountLine
from blockbak.host.runner import run, which
from blockbak.host.system import System, lv_uuid, lvm_names
from blockbak.model.filesystem import filesystem
from blockbak.model.nextboot import FILE_SYSTEMS, Fact, Marks, Place, programs
from blockbak.units import KIB, SECTOR

SAID = "/run/initramfs/blockbak/said"
"""What the stage said; it is there until the next boot."""
UNIT = "blockbak-next-boot.service"

_SCRIPTS = Path(__file__).with_name("initramfs")
_HOOK = "etc/initramfs-tools/hooks/blockbak"
_PREMOUNT = "etc/initramfs-tools/scripts/local-premount/blockbak"
_STAGE = "etc/initramfs-tools/blockbak/stage"
_ORDER = "etc/initramfs-tools/blockbak/order"
_UNIT = f"etc/systemd/system/{UNIT}"
_WANTED = f"etc/systemd/system/multi-user.target.wants/{UNIT}"
_HELD = "usr/lib/blockbak/stage"
"""Where the hook puts the stage inside the initramfs."""
_UPDATE_SECONDS = 1800.0
_LIST_SECONDS = 600.0
_SECTOR_ATTRIBUTES = ("wwid", "device/wwid", "serial", "device/serial", "device/model")
_WAYS = (
    "Start a rescue system and run 'blockbak backup' there, or take a root file system that is on LVM from a snapshot."
)


# --- what must be known before -------------------------------------------------------------------------


def marks(device: Device, system: System | None = None) -> Marks:
    """By what a disk or partition is known again in the initramfs. Raises NotAtNextBoot for anything else, and for a
    disk that has nothing of its own.
    """
    system = system or System()
    if device.kind not in ("disk", "partition"):
        raise NotAtNextBoot(path=device.label, reason=f"it is {_article(device)}, not a disk or a partition", way=_WAYS)
    whole = block(system.whole(device.kname), system)
    facts = [*_attributes(whole, system), *_contents(whole)]
    # A model alone is a thousand disks'.
    if all(fact.place == "device/model" for fact in facts):
        raise NotAtNextBoot(path=device.label, reason="nothing tells its disk from another one", way=_WAYS)
    partition = device.kind == "partition"
    return Marks(
        disk_bytes=whole.size,
        sector=whole.logical_sector,
        partition=device.partition_number if partition else 0,
        start=device.start if partition else 0,
        length=device.size,
        facts=tuple(facts),
    )


def _article(device: Device) -> str:
    if device.is_lv:
        return "a logical volume"
    return {"md": "an array", "dm": "a mapped device", "loop": "a loop device", "file": "a file"}.get(
        device.kind, f"a {device.kind}"
    )


def _attributes(disk: Device, system: System) -> Iterator[Fact]:
    """What the kernel alone knows of it: udev's knowledge may differ in the initramfs."""
    for place in _SECTOR_ATTRIBUTES:
        # As the shell's `read` has it: the first line, without blanks around it.
        text = system.attribute(disk.kname, place).partition("\n")[0].strip(" \t")
        if text and text.isprintable() and text.isascii() and "\\" not in text:
            yield Fact("text", place, text)
    page = system.raw(disk.kname, "device/vpd_pg80")
    if page:
        yield Fact("raw", "device/vpd_pg80", page.hex())


def _contents(disk: Device) -> Iterator[Fact]:
    """The id of its partition table, or of the file system that it is."""
    places = []
    table = table_at(disk.path, disk.logical_sector, disk.size, guess=False)
    with reading(disk.path) as read:
        if table is not None and table.scheme == "gpt" and table.valid_primary:
            places = [(disk.logical_sector + 56, 16)]  # UEFI 2.10, 5.3.2: the disk's GUID in the header
        elif table is not None and table.disk_id:
            places = [(440, 4)]
        elif (found := filesystem(read, disk.size)) is not None:
            place = {"ext": KIB + 104, "xfs": 32, "btrfs": 64 * KIB + 32}.get(found.type.rstrip("234"))
            places = [(place, 16)] if place else []
        for offset, length in places:
            if any(data := read(offset, length)):
                yield Fact("content", str(offset), data.hex())


def place(path: str, system: System | None = None) -> Place:
    """Where ``path``, in a repository, lies as the initramfs will find it. Raises NotAtNextBoot where it cannot."""
    system = system or System()
    real = os.path.realpath(path)
    line = system.mount_of(real)

    def refused(reason: str) -> NotAtNextBoot:
        way = "Make a repository on another local disk, on an ext4, XFS or btrfs."
        return NotAtNextBoot(path=path, reason=f"the repository's file system {reason}", way=way)

    if line is None or line.fstype not in FILE_SYSTEMS:
        raise refused(f"is {line.fstype if line else 'not known'}")
    names = sorted(system.devices_of(line))
    if len(names) != 1:
        raise refused(f"lies on {len(names)} devices")
    if reason := _unreachable(names[0], system):
        raise refused(reason)
    node = system.node(names[0])
    with reading(node) as read:
        found = filesystem(read, system.size(names[0]))
    if found is None or not found.uuid:
        raise refused("has no UUID")
    uuid = system.attribute(names[0], "dm/uuid")
    volume = "/".join(lvm_names(system.attribute(names[0], "dm/name"))) if lv_uuid(uuid) else ""
    return Place(line.fstype, found.uuid, volume, _inside(real, line), node)


def _inside(path: str, line: MountLine) -> str:
    return os.path.normpath(os.path.join(line.root, os.path.relpath(path, line.target)))


def _unreachable(name: str, system: System) -> str:
    """Why a device would not be there in the initramfs; empty if it is a partition, a disk, or a plain logical
    volume on such.
    """
    if system.number(name, "size") == 0:
        return "is on no block device"
    if lv_uuid(system.attribute(name, "dm/uuid")):
        lower = [system.whole(one) for one in system.links(name, "slaves")]
        plain = all(not system.links(one, "slaves") and _is_disk(one) for one in lower)
        return "" if lower and plain else "is on a logical volume that is not simply on disks"
    if system.links(name, "slaves") or not _is_disk(system.whole(name)):
        return f"is on {system.node(name)}, which is neither a disk, a partition nor a logical volume"
    return ""


def _is_disk(name: str) -> bool:
    return not name.startswith(("loop", "dm-", "md", "nbd", "zram", "ram"))


# --- the initramfs --------------------------------------------------------------------------------------


class Installation:
    """The files on this machine, below ``root``. ``check`` is asked while programs run."""

    def __init__(self, root: str = "/", check: Callable[[], None] = lambda: None) -> None:
        self._root, self._check = root, check

    def _at(self, path: str) -> str:
        return os.path.join(self._root, path)

    def check_tools(self, path: str, place: Place) -> None:
        """Raise NotAtNextBoot where the initramfs is not initramfs-tools', or a program for it is missing."""
        if which("update-initramfs") is None or not os.path.isfile(
            self._at("usr/share/initramfs-tools/hook-functions")
        ):
            reason = "this system's initramfs is not made by initramfs-tools"
            raise NotAtNextBoot(path=path, reason=reason, way=_WAYS)
        missing = [name for name in (*programs(place), "lsinitramfs") if which(name) is None]
        if missing:
            raise NotAtNextBoot(
                path=path, reason=f"{missing[0]} is needed and not installed", way="Install it, and run again."
            )

    def ordered(self) -> tuple[str, str]:
        """The id of the order that the installed stage follows, and the repository; empty where none is installed."""
        try:
            words = shlex.split(Path(self._at(_ORDER)).read_text(encoding="utf-8", errors="surrogateescape"))
        except (OSError, ValueError):
            return "", ""
        told = dict(word.split("=", 1) for word in words if "=" in word)
        return told.get("ORDER", ""), told.get("REPOSITORY", "")

    def install(self, order: str, unit: str) -> list[str]:
        """Put the stage into every initramfs of this machine, and the unit in place; the files that were made anew.

        ``order`` is the stage's order. Raises InitramfsFailed, with everything taken back.
        """
        try:
            self._write(_ORDER, order, 0o600)
            for name, target, mode in (
                ("stage", _STAGE, 0o755),
                ("hook", _HOOK, 0o755),
                ("premount", _PREMOUNT, 0o755),
            ):
                self._write(target, (_SCRIPTS / name).read_text(encoding="utf-8"), mode)
            made = self._rebuild()
            self._check_held(made)
            if self.has_systemd:
                self._write(_UNIT, unit, 0o644)
                os.makedirs(os.path.dirname(self._at(_WANTED)), exist_ok=True)
                os.symlink(f"../{UNIT}", self._at(_WANTED))
                self._reload()
        except BaseException as error:
            try:
                self.remove()
            except BlockbakError as again:
                error.add_note(str(again))
            if isinstance(error, OSError | CommandFailed):
                raise InitramfsFailed(reason=str(error).removesuffix(".")) from error
            raise
        return made

    def _check_held(self, images: list[str]) -> None:
        """Raises InitramfsFailed unless the stage is in all of them, and there is one."""
        reason = "" if images else "update-initramfs made none"
        for image in images:
            held = run(["lsinitramfs", image], deadline=_LIST_SECONDS, check=self._check).stdout.split()
            reason = reason or ("" if _HELD in held else f"{image} does not hold it")
        if reason:
            raise InitramfsFailed(reason=reason)

    def remove(self) -> bool:
        """Take all of it away, and make the initramfs without it; whether anything was there. Raises
        InitramfsFailed where that could not be done: the stage in there does nothing, for its order is gone.
        """
        staged = [path for path in (_HOOK, _PREMOUNT, _STAGE, _ORDER) if os.path.lexists(self._at(path))]
        units = [path for path in (_WANTED, _UNIT) if os.path.lexists(self._at(path))]
        try:
            # The order comes last: while it is there, the next run knows that something is to be removed.
            for path in (*units, *staged):
                if path != _ORDER:
                    os.unlink(self._at(path))
            if staged:
                self._rebuild()
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._at(_ORDER))
                os.rmdir(self._at(os.path.dirname(_ORDER)))
            if units:
                self._reload()
        except (OSError, CommandFailed) as error:
            raise InitramfsFailed(reason=str(error).removesuffix(".")) from error
        return bool(staged or units)

    @property
    def has_systemd(self) -> bool:
        """Whether a unit is of any use."""
        return os.path.isdir(self._at("run/systemd/system"))

    def said(self) -> list[str]:
        """What the stage said at this boot."""
        try:
            lines = Path(self._at(SAID.lstrip("/"))).read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return [line.removeprefix("blockbak: ") for line in lines]

    def _rebuild(self) -> list[str]:
        """Make every initramfs anew; their paths."""
        # Whichever kernel is started next, its initramfs must be the right one.
        done = run(["update-initramfs", "-u", "-k", "all"], deadline=_UPDATE_SECONDS, check=self._check)
        return re.findall(r"^update-initramfs: Generating (\S+)", done.stdout, re.MULTILINE)

    def _reload(self) -> None:
        if self.has_systemd:
            run(["systemctl", "daemon-reload"])

    def _write(self, path: str, text: str, mode: int) -> None:
        target = Path(self._at(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8", errors="surrogateescape")
        target.chmod(mode)


def python() -> str:
    """What runs this program."""
    return sys.executable


def used_bytes(device: Device, system: System | None = None) -> int:
    """Bytes of a device that are not known to be free: its size less what the file systems mounted from it have
    free.
    """
    system = system or System()
    known: dict[tuple[int, int], int] = {}
    names = set(system.above(device.kname))
    for line in system.mounts:
        if names & system.devices_of(line):
            with contextlib.suppress(OSError):
                about = os.statvfs(line.target)
                known[line.major, line.minor] = about.f_bfree * about.f_frsize
    return max(device.size - sum(known.values()), SECTOR)
