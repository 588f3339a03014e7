"""Logical volumes and their snapshots as values: reports of LVM parsed, sizes planned, leftovers told apart.

LVM's own unit is always called "LVM extent" here. Sizes are bytes.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from blockbak.units import KIB, MIB, SECTOR, align_up

PREFIX = "blockbak-"
_OUR_MAPPING = re.compile(r"(?<!-)-blockbak--[0-9a-f]{8}(--\d+)?\Z")
"""How every snapshot of ours is named; the udev rule goes by it."""
TAG = "blockbak"
RUN_TAG, HOST_TAG, BOOT_TAG = "blockbak_run=", "blockbak_host=", "blockbak_boot="
RESTORE_TAG = "blockbak_restore"
"""On a volume that a restore made and has not finished."""

SHARE = 10
"""Percent of the origin that a thick snapshot is given, where nobody says otherwise."""
FLOOR = 1024 * MIB
"""And at least so much, where there is room."""
LEAST_SHARE, LEAST = 50, 32 * MIB
"""Below a fiftieth of the origin, or 32 MiB, a snapshot is not begun: it would hardly outlive the reading."""
EXTEND_AT = 70
"""Percent full at which a thick snapshot is extended."""
POOL_META_MOST, POOL_META_GIVE_UP = 90, 95
_POOL_META_BLOCK, _LVM_META_FREE = 4 << 10, 4 << 20
"""Percent of a thin pool's metadata in use: more than that and no snapshot is begun; a running one is given up."""

STORE_CHUNK_LEAST = 4 * KIB
"""The smallest chunk of an exception store; all others are multiples of it."""
_STORE_MAGIC = 0x70416E53
_EXCEPTION = struct.Struct("<QQ")
"""``struct core_exception``: old chunk, new chunk."""
_STORE_PENDING = 2048 + 1
"""Chunks that are being copied at once at most, and are not in the table yet (drivers/md/dm-snap.c, cow_threshold)."""

Health: TypeAlias = Literal["good", "overflowed", "lost"]

_TAG_CHARS = re.compile(r"[^A-Za-z0-9_+.-]")
"""lvm(8): what a tag may hold, less what only newer releases take."""


# --- reports ----------------------------------------------------------------------------------------------


VOLUME_FIELDS = (
    "vg_name", "vg_uuid", "vg_free", "vg_extent_size", "lv_name", "lv_uuid", "lv_attr", "lv_size", "origin", "pool_lv",
    "lv_tags", "lv_layout", "lv_role", "lv_active", "data_percent", "metadata_percent", "vg_partial",
)  # fmt: skip
"""What ``lvs -o`` is asked for."""


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """One line of ``lvs``. ``origin`` and ``pool`` are names in the same group, or empty; percents are None
    where LVM tells none. ``free`` and ``lvm_extent`` are the group's, and so is ``partial``: it misses a disk.
    """

    group: str
    group_uuid: str
    free: int
    lvm_extent: int
    name: str
    uuid: str
    attr: str
    size: int
    origin: str
    pool: str
    tags: tuple[str, ...]
    layout: tuple[str, ...]
    role: tuple[str, ...]
    active: bool
    data_percent: float | None
    metadata_percent: float | None
    partial: bool = False

    @property
    def label(self) -> str:
        """``vg/lv``."""
        return f"{self.group}/{self.name}"

    @property
    def is_thin(self) -> bool:
        """Whether its snapshots come out of a thin pool."""
        return bool(self.pool) and "thin" in self.layout

    @property
    def dm_name(self) -> str:
        """Its device-mapper name."""
        return dm_name(self.group, self.name)

    @property
    def dm_uuid(self) -> str:
        """Its UUID in device-mapper."""
        return "LVM-" + (self.group_uuid + self.uuid).replace("-", "")

    @property
    def run(self) -> str:
        """The run that made it, or an empty string."""
        return self._tagged(RUN_TAG)

    @property
    def host(self) -> str:
        """The host that made it, as a tag has it."""
        return self._tagged(HOST_TAG)

    @property
    def boot(self) -> str:
        """The boot it was made in."""
        return self._tagged(BOOT_TAG)

    def _tagged(self, key: str) -> str:
        return next((tag.removeprefix(key) for tag in self.tags if tag.startswith(key)), "")


def is_our_mapping(name: str) -> bool:
    """Whether a device-mapper name is that of a snapshot of ours: a run's id, and a number in a set, follow."""
    return _OUR_MAPPING.search(name) is not None


def dm_name(group: str, name: str) -> str:
    """The device-mapper name of a volume: hyphens inside a name are doubled."""
    return f"{group.replace('-', '--')}-{name.replace('-', '--')}"


GROUP_FIELDS = ("vg_name", "vg_free", "vg_extent_size", "pv_name")
"""What ``vgs -o`` is asked for: a line for each physical volume."""


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group, and the nodes of its physical volumes."""

    name: str
    free: int
    lvm_extent: int
    disks: tuple[str, ...]


def parse_group(report: str) -> Group | None:
    """The one group of a ``vgs`` report; None where it has none. Raises ValueError where it is no report."""
    rows = [row for one in json.loads(report)["report"] for row in one.get("vg", ())]
    if not rows:
        return None
    first = rows[0]
    disks = tuple(row["pv_name"] for row in rows)
    return Group(first["vg_name"], int(first["vg_free"]), int(first["vg_extent_size"]), disks)


def parse_volumes(report: str) -> list[LogicalVolume]:
    """The lines of ``lvs --reportformat json --units b --nosuffix``. Raises ValueError where it is none."""
    return [_volume(row) for one in json.loads(report)["report"] for row in one.get("lv", ())]


def _volume(row: Mapping[str, Any]) -> LogicalVolume:
    return LogicalVolume(
        group=row["vg_name"],
        group_uuid=row["vg_uuid"],
        free=int(row["vg_free"]),
        lvm_extent=int(row["vg_extent_size"]),
        name=row["lv_name"].strip("[]"),
        uuid=row["lv_uuid"],
        attr=row["lv_attr"],
        size=int(row["lv_size"]),
        origin=row["origin"].strip("[]"),
        pool=row["pool_lv"].strip("[]"),
        tags=_words(row["lv_tags"]),
        layout=_words(row["lv_layout"]),
        role=_words(row["lv_role"]),
        active=row["lv_active"] == "active",
        data_percent=_percent(row["data_percent"]),
        metadata_percent=_percent(row["metadata_percent"]),
        partial=bool(row.get("vg_partial")),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _percent(text: str) -> float | None:
    return float(text) if text else None


PLACES = ("backup/archive_dir", "backup/backup_dir", "log/file", "global/locking_dir")
"""Settings of lvm.conf: where each of its commands writes."""


def parse_places(report: str) -> list[str]:
    """The paths of ``lvmconfig``'s lines ``name="value"``."""
    return re.findall(r'^\s*\w+="(/[^"\n]*)"$', report, re.MULTILINE)


# --- what can be snapshotted, and how large ---------------------------------------------------------------


def unfit(volume: LogicalVolume) -> str:
    """Why no snapshot of it can be made, or an empty string."""
    if TAG in volume.tags and volume.name.startswith(PREFIX):
        return "it is a snapshot that blockbak made for one run"
    if "pool" in volume.layout or "private" in volume.role:
        return "it is an inner part of other volumes"
    if "thicksnapshot" in volume.role:
        return "it is itself a snapshot, and LVM makes none of those"
    if volume.partial:
        return f"volume group {volume.group} misses a physical volume, and LVM changes none that does"
    return ""


def met_frozen(stderr: str) -> bool:
    """Whether an lvcreate failed because a file system on the volume is frozen already: only then is suspending it
    refused as busy (kernel, fs/super.c, freeze_super).
    """
    return re.search(r"suspend ioctl .*failed: Device or resource busy", stderr) is not None


def outlook(volume: LogicalVolume, pool: LogicalVolume | None) -> tuple[int | None, str]:
    """How many bytes there are for a snapshot of ``volume``, and why none can be made, or an empty string.

    ``pool`` is its thin pool. None is for what cannot be snapshotted whatever the room. What LVM tells is a
    moment old, so a backup asks again.
    """
    if reason := unfit(volume):
        return None, reason
    if not volume.is_thin:
        size, needed = thick_size(volume, None)
        short = f"volume group {volume.group} has {volume.free} bytes free, a snapshot needs {needed}"
        return volume.free, "" if size else short
    if pool is None or pool.data_percent is None or pool.metadata_percent is None:
        return None, f"thin pool {volume.group}/{volume.pool} is not active"
    use = PoolUse(round(pool.metadata_percent * 100), 10_000, round(pool.data_percent * 100), 10_000, writable=True)
    what = pool_short(use, pool.size, thin_need(volume, None))
    percent = pool.metadata_percent if what == "metadata" else pool.data_percent
    room = int(pool.size * (100 - pool.data_percent) / 100)
    return room, f"thin pool {pool.label} is {percent:g} % full ({what})" if what else ""


_NAME = re.compile(r"[A-Za-z0-9+_.][A-Za-z0-9+_.-]*")
"""lvm(8), Valid names."""


def as_label(path: str) -> tuple[str, str]:
    """Group and name of ``vg/lv``, also as ``/dev/vg/lv``; two empty strings where it can be none."""
    group, _, name = path.removeprefix("/dev/").partition("/")
    fits = _NAME.fullmatch(group) and _NAME.fullmatch(name) and name not in (".", "..")
    return (group, name) if fits else ("", "")


def parse_size(text: str, origin_bytes: int, parse: Callable[[str], int]) -> int:
    """``20%`` of the origin, or a size. Raises ValueError."""
    if text.endswith("%"):
        share = float(text[:-1])
        if not 0 < share <= 100:
            raise ValueError(f"{text!r} is not a share from 1 to 100 %")
        return int(origin_bytes * share / 100)
    return parse(text)


def full_size(origin_bytes: int, lvm_extent: int, chunk_bytes: int = 4 * KIB) -> int:
    """What a thick snapshot needs to hold every chunk of its origin: then it cannot overflow.

    One header chunk, then areas of one chunk of 16-byte exceptions before the chunks these name
    (kernel, drivers/md/dm-snap-persistent.c).
    """
    chunks = -(-origin_bytes // chunk_bytes)
    areas = chunks // (chunk_bytes // 16) + 1
    return align_up((1 + areas + chunks) * chunk_bytes, lvm_extent)


def thick_size(volume: LogicalVolume, asked: int | None, beside: int = 0) -> tuple[int, int]:
    """How large a thick snapshot is made, and how much it takes at least: (bytes, bytes needed).

    What was asked for is given whole or refused; otherwise a share of the origin with a floor, less where the
    group has less. ``beside`` bytes of the group are spoken for. The first number is 0 where even the least
    does not fit.
    """
    most = full_size(volume.size, volume.lvm_extent)
    free = max(0, volume.free - beside) // volume.lvm_extent * volume.lvm_extent
    if asked is not None:
        wanted = min(align_up(max(asked, 1), volume.lvm_extent), most)
        return (wanted if wanted <= free else 0), wanted
    wanted = min(align_up(max(volume.size * SHARE // 100, FLOOR), volume.lvm_extent), most)
    least = min(align_up(max(volume.size // LEAST_SHARE, LEAST), volume.lvm_extent), most)
    return (min(wanted, free) if free >= least else 0), least


@dataclass(frozen=True, slots=True)
class ThickUse:
    """How full an exception store is."""

    used: int
    total: int

    @property
    def percent(self) -> float:
        """Of the store."""
        return 100 * self.used / self.total if self.total else 100.0


def parse_thick(kind: str, parameters: str) -> ThickUse | Health:
    """The status of a ``snapshot`` target (kernel, Documentation/admin-guide/device-mapper/snapshot.rst)."""
    if kind != "snapshot":
        return "lost"
    found = re.match(r"(\d+)/(\d+)", parameters)
    if found is None:
        # "Invalid", "Overflow", "Merge failed", "Unknown".
        return "overflowed"
    return ThickUse(int(found[1]) * SECTOR, int(found[2]) * SECTOR)


def surely_not_full(read: Callable[[int, int], bytes], store_bytes: int) -> bool:
    """Whether an exception store that the kernel gave up still had room, by its own table: then it did not
    overflow, but a disk failed. ``read`` gives so many bytes at an offset.
    """
    magic, _, version, chunk_sectors = struct.unpack_from("<4I", read(0, STORE_CHUNK_LEAST))
    chunk = chunk_sectors * SECTOR
    if magic != _STORE_MAGIC or version != 1 or chunk < STORE_CHUNK_LEAST or chunk % STORE_CHUNK_LEAST:
        return False
    each = chunk // _EXCEPTION.size
    used, area, chunks = 1, 0, store_bytes // chunk
    while (at := 1 + area * (each + 1)) < chunks:
        # One that names no new chunk ends the table (kernel, drivers/md/dm-snap-persistent.c).
        held = next((n for n, (_, new) in enumerate(_EXCEPTION.iter_unpack(read(at * chunk, chunk))) if not new), each)
        used += 1 + held
        area += 1
        if held < each:
            break
    return used + _STORE_PENDING < chunks


def extension(use: ThickUse, origin_bytes: int, lvm_extent: int, free: int, limit: int | None) -> int:
    """By how many bytes to extend a thick snapshot now; 0 where it is not full enough, or nothing is left.

    It is doubled each time, so that a few steps keep up with any writer.
    """
    if use.percent < EXTEND_AT:
        return 0
    most = full_size(origin_bytes, lvm_extent)
    if limit is not None:
        most = min(most, limit)
    room = min(most - use.total, free) // lvm_extent * lvm_extent
    return max(0, min(align_up(use.total, lvm_extent), room))


@dataclass(frozen=True, slots=True)
class PoolUse:
    """How full a thin pool is: its data and metadata, in the pool's own units of each."""

    metadata_used: int
    metadata_total: int
    data_used: int
    data_total: int
    writable: bool

    @property
    def data_percent(self) -> float:
        """Of the data."""
        return 100 * self.data_used / self.data_total if self.data_total else 100.0

    @property
    def metadata_percent(self) -> float:
        """Of the metadata."""
        return 100 * self.metadata_used / self.metadata_total if self.metadata_total else 100.0


def parse_pool(kind: str, parameters: str) -> PoolUse | None:
    """The status of a ``thin-pool`` target (kernel, admin-guide/device-mapper/thin-provisioning.rst); None for
    a pool that failed.
    """
    words = parameters.split()
    if kind != "thin-pool" or len(words) < 5 or "/" not in words[1] or "/" not in words[2]:
        return None
    (metadata_used, metadata_total), (data_used, data_total) = (
        (int(part) for part in words[at].split("/")) for at in (1, 2)
    )
    return PoolUse(metadata_used, metadata_total, data_used, data_total, "rw" in words[4:6])


def parse_thin(kind: str, parameters: str) -> int:
    """The status of a ``thin`` target: bytes that are mapped; 0 where it tells none."""
    first = parameters.split(" ", 1)[0]
    return int(first) * SECTOR if kind == "thin" and first.isdigit() else 0


def parse_pool_blocks(report: str) -> tuple[int, bool]:
    """The one line of ``lvs -o chunk_size,zero`` about a thin pool."""
    row = json.loads(report)["report"][0]["lv"][0]
    return int(row["chunk_size"]), row["zero"] == "zero"


def pool_short(use: PoolUse, pool_bytes: int, needed: int) -> str:
    """What a pool is short of for a snapshot that may take ``needed`` bytes: ``data``, ``metadata``, or ''."""
    if use.metadata_percent > POOL_META_MOST or _metadata_free(use) < _metadata_least(use):
        return "metadata"
    free = pool_bytes * (use.data_total - use.data_used) // max(use.data_total, 1)
    return "data" if free < needed + pool_reserve(pool_bytes) else ""


def _metadata_free(use: PoolUse) -> int:
    return (use.metadata_total - use.metadata_used) * _POOL_META_BLOCK


def _metadata_least(use: PoolUse) -> int:
    """What LVM itself wants free before it makes a thin volume (metadata/thin_manip.c, pool_metadata_min_threshold)."""
    return min(use.metadata_total * _POOL_META_BLOCK // 4, _LVM_META_FREE)


def pool_gives_out(use: PoolUse, pool_bytes: int, beside: int = 0) -> str:
    """What runs out, so that the snapshot is given up before its origin's writes fail; or ''. ``beside`` bytes are
    on their way already.
    """
    if use.metadata_percent >= POOL_META_GIVE_UP:
        return "metadata"
    free = pool_bytes * (use.data_total - use.data_used) // max(use.data_total, 1)
    return "data" if free < pool_reserve(pool_bytes) + beside else ""


def surely_short(use: PoolUse, pool_bytes: int, needed: int) -> tuple[int, int] | None:
    """Free bytes of a pool and what is needed, with a reserve for its other volumes, if that is more; else None."""
    free = pool_bytes * (use.data_total - use.data_used) // max(use.data_total, 1)
    needed += pool_reserve(pool_bytes)
    return (free, needed) if free < needed else None


def pool_reserve(pool_bytes: int) -> int:
    """What is left to a pool's other volumes."""
    return min(max(pool_bytes // 100, 16 * MIB), pool_bytes // 20)


def thin_need(volume: LogicalVolume, asked: int | None) -> int:
    """How much a snapshot of a thin volume may take from its pool while it is read."""
    return min(volume.size, max(volume.size // LEAST_SHARE, LEAST) if asked is None else asked)


# --- ours, and whether still wanted -----------------------------------------------------------------------


def tag_text(text: str) -> str:
    """``text`` with what a tag may not hold replaced."""
    return _TAG_CHARS.sub("_", text)


def tags(run: str, host: str, boot: str) -> tuple[str, ...]:
    """The tags of everything that a run makes."""
    return (TAG, f"{RUN_TAG}{run}", f"{HOST_TAG}{tag_text(host)}", f"{BOOT_TAG}{boot}")


def is_of_ours(tag: str) -> bool:
    """Whether a tag is one that runs and restores give."""
    return tag in (TAG, RESTORE_TAG) or tag.startswith((RUN_TAG, HOST_TAG, BOOT_TAG))


def leftovers(volumes: Sequence[LogicalVolume], host: str, boot: str, alive: Collection[str]) -> list[LogicalVolume]:
    """What of ``volumes`` a run of this host made that is over: it was killed, or the machine went down.

    Only what carries our tag together with our name, or the tag of an unfinished restore, and this host's name:
    another host's, in a group that two machines see, is its own affair.
    """
    return [
        one
        for one in volumes
        if TAG in one.tags
        and (one.name.startswith(PREFIX) or RESTORE_TAG in one.tags)
        and one.run
        and one.host == tag_text(host)
        and (one.boot != boot or one.run not in alive)
    ]


def strangers(volumes: Sequence[LogicalVolume], host: str) -> list[LogicalVolume]:
    """What of ``volumes`` is a snapshot of another host's run; or of this machine's, when it had another name."""
    return [
        one
        for one in volumes
        if TAG in one.tags and one.name.startswith(PREFIX) and one.run and one.host not in ("", tag_text(host))
    ]
