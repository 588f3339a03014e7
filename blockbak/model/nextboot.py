"""The order for an image at the next boot: what is known of it before, and what the initramfs is told."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

import msgspec

from blockbak.model.identity import Identity
from blockbak.units import SECTOR

LIMIT_SECONDS = 3600
"""What the image may take while the system waits, unless somebody says otherwise."""
WAIT_SECONDS = 30
"""What the disks may take to appear."""
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "xfs", "btrfs")
"""Those whose state the stage can tell without a checker that takes minutes."""
PROGRAMS = (
    "blkid", "cat", "cp", "date", "dd", "grep", "head", "mkdir", "mount", "od", "rm", "sleep", "stat", "sync", "tee",
    "timeout", "truncate", "umount", "zstd",
)  # fmt: skip
"""What the stage calls."""


class Fact(msgspec.Struct, frozen=True):
    """One thing by which a disk is known again: ``text`` or ``raw`` (hex) is an attribute in sysfs, ``content``
    (hex) are bytes of the disk from ``place`` on.
    """

    kind: str
    place: str
    value: str

    def __str__(self) -> str:
        if self.kind == "content":
            return f"content {self.place} {len(self.value) // 2} {self.value}"
        return f"{self.kind} {self.place} {self.value}"


class Marks(msgspec.Struct, frozen=True):
    """What must be so for a disk, or one partition of it, to be the one that was ordered. ``partition`` is 0 for a
    whole disk; ``start`` and ``length`` are then the disk's. Bytes, but for nothing.
    """

    disk_bytes: int
    sector: int
    partition: int
    start: int
    length: int
    facts: tuple[Fact, ...]


class Place(msgspec.Struct, frozen=True):
    """Where the spool lies: ``path`` inside the file system of type ``fstype`` and ``uuid``, on the logical volume
    ``volume`` (empty where it is on none). ``node`` is its device now.
    """

    fstype: str
    uuid: str
    volume: str
    path: str
    node: str


class Order(msgspec.Struct, frozen=True):
    """What was ordered, as it is kept beside the spool. ``boot`` is the id of the boot in which that was, ``created``
    the time in seconds since 1970, ``source`` and ``path`` what the device was called then.
    """

    id: str
    boot: str
    created: int
    host: str
    volume: str
    source: str
    path: str
    identity_kind: str
    identity_value: str
    diskseq: int
    length: int
    logical: int
    physical: int
    limit: int

    @property
    def identity(self) -> Identity:
        """What the volume is known by."""
        return Identity(self.identity_kind, self.identity_value, self.diskseq, self.boot)


def programs(place: Place) -> list[str]:
    """The programs that the initramfs must hold for a spool there."""
    more = ["xfs_logprint"] if place.fstype == "xfs" else []
    return sorted([*PROGRAMS, *more, *(["lvm"] if place.volume else [])])


def stage_order(order: Order, marks: Marks, place: Place, nodes: Sequence[str], repository: str) -> str:
    """The order as the stage in the initramfs reads it: variables of a shell. ``nodes`` are the devices whose
    drivers it needs, ``repository`` is where the repository is while the system runs.
    """
    values = {
        "ORDER": order.id,
        "REPOSITORY": repository,
        "REPOSITORY_UUID": place.uuid,
        "REPOSITORY_TYPE": place.fstype,
        "REPOSITORY_LV": place.volume,
        "REPOSITORY_PATH": place.path,
        "DISK_SECTORS": str(marks.disk_bytes // SECTOR),
        "SECTOR": str(marks.sector),
        "PARTITION": str(marks.partition) if marks.partition else "",
        "START": str(marks.start // SECTOR) if marks.partition else "",
        "SECTORS": str(marks.length // SECTOR),
        "FACTS": "\n".join(map(str, marks.facts)),
        "LIMIT": str(order.limit),
        "WAIT": str(WAIT_SECONDS),
        "PROGRAMS": " ".join(programs(place)),
        "NODES": " ".join(nodes),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def unit(order: Order, repository: str, python: str) -> str:
    """The systemd unit that makes the spool a point once the system is up. ``python`` runs blockbak."""
    return f"""\
# Made by blockbak for one boot, and removed by it afterwards.
[Unit]
Description=Make the image that was taken of {_plain(order.source)} at boot a restore point
RequiresMountsFor={_quoted(repository)}
After=local-fs.target

[Service]
# Not oneshot: the start of the system would wait for it.
Type=exec
ExecStart={_quoted(python)} -I -m blockbak -r {_quoted(repository)} recover
SuccessExitStatus=3
Nice=10
IOSchedulingClass=idle

[Install]
WantedBy=multi-user.target
"""


def _quoted(word: str) -> str:
    """As systemd.syntax(7) and systemd.service(5) have it: % and $ mean something in there."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _plain(text: str) -> str:
    return re.sub(r"[^ -~]", "?", text).replace("%", "%%")


def ways(path: str, volumes: Sequence[str]) -> str:
    """How the disk of a running system can be imaged. ``volumes`` are the logical volumes on it that are in use."""
    hot = [f"'blockbak backup {volume}' takes {volume} from a snapshot" for volume in volumes]
    told = [*hot, f"'blockbak cold --at-next-boot {path}' takes the disk before the system starts"]
    return f"{'; '.join(told)}."
