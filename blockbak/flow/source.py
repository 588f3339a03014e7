"""The source of a point: looked at, refused or named, opened, and read as what it was when looked at."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from blockbak.errors import (
    DuplicateIdentity,
    NoSuchSource,
    NotSnapshotable,
    RootInUse,
    SourceChangedSize,
    SourceEmpty,
    SourceHoldsRepository,
    SourceInner,
    SourceInUse,
    SourceVanished,
    VolumeExists,
    VolumeInactive,
)
from blockbak.flow.context import Context
from blockbak.flow.points import hidden_images
from blockbak.host import device as devices
from blockbak.host import lvm, usage
from blockbak.host.blockio import RETRIES, DiskReader, SourceReader
from blockbak.host.device import Device
from blockbak.host.system import System
from blockbak.model.chain import Image
from blockbak.model.facts import Opening
from blockbak.model.identity import Identity
from blockbak.model.nextboot import ways
from blockbak.model.quiesce import RestOptions
from blockbak.model.snapshot import LogicalVolume
from blockbak.repository.local import NAME_RULE, Repository, Volume, usable_name


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``kind`` and ``mode`` may be ``auto``; ``block_bytes`` None keeps the
    volume's, or takes the default. ``limit`` is the most bytes a second to read, None for no limit.
    ``own_repository`` allows a hot volume to hold the repository. ``rest`` says what may be done to bring the users
    of a cold device to rest; None leaves them alone. An unreadable sector is asked for ``retries`` times more; with
    ``strict`` it is an error then. ``used_only`` leaves out what file systems do not use.
    """

    source: str
    kind: str = "auto"
    mode: str = "auto"
    name: str | None = None
    block_bytes: int | None = None
    compress: str = "zstd"
    limit: int | None = None
    own_repository: bool = False
    rest: RestOptions | None = None
    retries: int = RETRIES
    strict: bool = False
    used_only: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """What is known of a source once it was read: how consistent the image is, and sentences about it.
    ``attention`` asks a person to look.
    """

    consistency: str
    notes: list[str] = field(default_factory=list)
    attention: bool = False


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a point keeps of its moment beside the bytes: the set it belongs to, the volume group's metadata as
    LVM writes it, and what hooks said.
    """

    set_id: str = ""
    lvm_metadata: str = ""
    hooks: dict[str, str] = field(default_factory=dict)


class Source(Protocol):
    """What is read into an image."""

    @property
    def reader(self) -> DiskReader:
        """The bytes."""

    @property
    def circumstances(self) -> Circumstances:
        """What else the point keeps."""

    @property
    def moment(self) -> datetime | None:
        """When the content was what it is; None for now."""

    def check(self) -> None:
        """Raise what has gone wrong with it meanwhile; asked again and again."""

    def settle(self) -> Settled:
        """Asked once all is read. Raises SourceChangedSize, SourceVanished, SnapshotError."""


# --- the source ------------------------------------------------------------------------------------


def resolve_mode(device: Device, mode: str, *, rest: bool = False) -> str:
    """``hot``, ``cold`` or ``live``; ``auto`` takes a logical volume in use hot, and what is not in use cold.

    With ``rest`` the users of a block device that is to be cold are brought to rest before it is read. Raises
    SourceInUse where ``auto`` or ``cold`` meets a user, NotSnapshotable where ``hot`` meets no logical volume.
    """
    if mode == "hot" and not device.is_lv:
        raise NotSnapshotable(volume=device.label, reason="it is not a logical volume")
    if mode in ("live", "hot") or (mode == "cold" and rest and device.is_block):
        return mode
    users = usage.users(device)
    if users and mode == "auto" and device.is_lv:
        return "hot"
    if users:
        raise SourceInUse(path=device.label, holders=", ".join(str(use) for use in users))
    return "cold"


_SYSTEM = ("/", "/usr")
"""What no system can do without for a while."""


def _check_running(device: Device) -> None:
    """Raises RootInUse for what cannot be unmounted while the system runs, with the ways that there are."""
    system = System()
    what = next((place for place in _SYSTEM if usage.carries(device, place, system)), None)
    if what is None or not device.is_block:
        return
    above = [devices.block(name, system) for name in system.above(device.kname)]
    volumes = [one.label for one in above if one.is_lv and one.mounts]
    below = sorted(system.node(name) for name in system.below(device.kname) if not system.bases[name])
    disk = device.path if device.kind in ("disk", "partition") or not below else below[0]
    raise RootInUse(path=device.label, what=what, ways=ways(disk, volumes))


def check_source(device: Device, repository: Repository | None, request: Request, context: Context) -> None:
    """Refuse a source that would contain its own image, or that cannot be at rest while the system runs;
    ``repository`` is the one that is known of, if any. Raises SourceEmpty, SourceInner, SourceHoldsRepository,
    RootInUse, DuplicateIdentity.

    A snapshot does not change while the state directory is written, so the volume that holds it can be taken hot.
    """
    hot = device.is_lv and request.mode in ("auto", "hot")
    if device.size == 0:
        raise SourceEmpty(path=device.label)
    # Who writes to a thin pool holds nothing of the device that bears its name.
    if request.mode != "live" and devices.is_inner(device.kname, System()):
        raise SourceInner(path=device.label)
    held = repository is not None and usage.carries(device, repository.path)
    if held and not (hot and request.own_repository):
        raise SourceHoldsRepository(path=device.label, what="the repository")
    if not hot and request.mode != "live":
        _check_running(device)
    if not hot and usage.carries(device, context.state_dir):
        raise SourceHoldsRepository(path=device.label, what="blockbak's state directory")
    twin = devices.find_twin(device)
    if twin is not None:
        raise DuplicateIdentity(first=device.path, second=twin.path, identity=devices.identity(device))


def volume_name(
    device: Device, identity: Identity, repository: Repository, host: str, asked: str | None
) -> tuple[str, str]:
    """The volume that has this identity, or a new name for it; ``asked`` wins. With a new one, what the node was the
    last time, in words, where it was another volume. Raises VolumeExists.
    """
    if asked is not None:
        if not usable_name(asked):
            raise VolumeExists(volume=asked, reason=f"it takes {NAME_RULE}")
        return asked, ""
    taken: dict[str, Opening | None] = {}
    claimed: set[str] = set()
    for volume in repository.volumes():
        catalog = volume.catalog()
        images = (*catalog.images, *(image for image in hidden_images(volume, catalog) if _is_own(image, volume)))
        newest = max(images, key=lambda image: image.opening.sequence, default=None)
        taken[volume.name] = newest.opening if newest else None
        if newest is None and volume.claimed_by_another(str(identity)):
            claimed.add(volume.name)
    for name, known in taken.items():
        if known is not None and known.is_of(identity, host):
            return name, ""
    of_node = [known for known in taken.values() if known and (known.source, known.host) == (device.label, host)]
    last = max(of_node, key=lambda known: known.created, default=None)
    before = f"{device.label} was {last.identity}, volume {last.volume}, the last time" if last is not None else ""
    base = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in f"{host}-{_short_name(device)}")
    base = base.lstrip(".-")[:180] or "volume"
    number, name = 1, base
    while taken.get(name) is not None or name in claimed:
        number += 1
        name = f"{base}-{number}"
    return name, before


def _is_own(image: Image, volume: Volume) -> bool:
    """Not one of a directory that was renamed, or copied from elsewhere."""
    return image.opening.volume == volume.name


def _short_name(device: Device) -> str:
    """``vg-lv``, the node's or the file's own name."""
    return f"{device.vg}-{device.lv}" if device.is_lv else device.dm_name or os.path.basename(device.path)


class _Watch:
    """Notices writes to the source while it is read: the kernel's counters, a file's times."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._before = self._state()

    def _state(self) -> tuple[int, ...] | None:
        if self._device.is_block:
            return usage.write_counters(self._device)
        try:
            return usage.file_stamp(self._device.path)
        except OSError as error:
            raise SourceVanished(path=self._device.path, reason="its name is gone") from error

    @property
    def blind(self) -> bool:
        """Whether the kernel keeps no count for this device: then a write could not be noticed."""
        return self._before is None

    def written(self) -> bool:
        """Whether anything was written since it was made."""
        return usage.written(self._before, self._state())


@dataclass(frozen=True, slots=True)
class Seen:
    """The source as it was looked at, and what follows from that. ``before`` says of a volume that is new what its
    node was the last time, where it was another one.
    """

    device: Device
    identity: Identity
    mode: str
    name: str
    before: str = ""


def look_at(path: str) -> Device:
    """What ``path`` names. Raises VolumeInactive, NoSuchSource, NotABlockSource, NoPermission."""
    try:
        return devices.look(path)
    except NoSuchSource as error:
        if (volume := lvm.inactive(path)) is not None:
            raise activation_needed(volume) from error
        raise


def activation_needed(volume: LogicalVolume) -> VolumeInactive:
    """The error for a volume that LVM knows and the kernel does not."""
    # lvs(8), lv_attr: the tenth letter is the flag that an activation passes it over.
    flags = "-ay -K" if volume.attr[9:10] == "k" else "-ay"
    return VolumeInactive(volume=volume.label, flags=flags)


def look(repository: Repository, request: Request, context: Context) -> Seen:
    """Look at the source. Raises every error of the source and refusal trees, VolumeExists."""
    device = look_at(request.source)
    check_source(device, repository, request, context)
    mode = resolve_mode(device, request.mode, rest=request.rest is not None)
    identity = devices.identity(device)
    name, before = volume_name(device, identity, repository, context.host, request.name)
    return Seen(device, identity, mode, name, before)


class AtRest:
    """A source read as it is: cold, which nothing else may use meanwhile, or live. Closed with ``close``."""

    def __init__(self, seen: Seen, request: Request, context: Context, *, exclusive: bool = True) -> None:
        self._seen = seen
        self.moment: datetime | None = None
        self.reader = open_as_seen(seen, request, context, exclusive=exclusive and seen.mode == "cold")
        self._watch = _Watch(seen.device)
        self.circumstances = Circumstances(lvm_metadata=group_metadata(seen.device, context))

    def check(self) -> None:
        """Nothing is known before the end."""

    def settle(self) -> Settled:
        """Whether it was written meanwhile. Raises SourceChangedSize, SourceVanished."""
        device, reader = self._seen.device, self.reader
        after = reader.current_size()
        if after != reader.size:
            raise SourceChangedSize(path=device.path, before=reader.size, after=after)
        if self._seen.mode == "live":
            return Settled("none")
        notes = []
        written = self._watch.written()
        if self._watch.blind:
            notes.append(f"The kernel counts no writes to {device.path}: one by a process without a lock went unseen.")
        if written:
            notes.append(f"{device.path} was written while it was read: what was made of it may be torn.")
        return Settled("none" if written else "cold", notes, written)

    def close(self) -> None:
        """Release it."""
        self.reader.__exit__(None, None, None)


def group_metadata(device: Device, context: Context) -> str:
    """The metadata of a logical volume's group, for the point to keep."""
    return lvm.group_metadata(device.vg, context.run_dir) if device.is_lv else ""


def open_as_seen(seen: Seen, request: Request, context: Context, *, exclusive: bool) -> SourceReader:
    """Open what was looked at, and nothing else: a node is handed on, a file replaced, in a moment.

    With ``exclusive`` it is held from here on. Raises SourceVanished, SourceChangedSize, and what opening it raises.
    """
    device = seen.device
    source = SourceReader(device.path, exclusive=exclusive, kernel=context.kernel)
    with ExitStack() as stack:
        stack.push(source)
        now = devices.look(request.source)
        same = (now.path, now.diskseq, now.file_id, devices.identity(now)) == (
            device.path, device.diskseq, device.file_id, seen.identity,
        )  # fmt: skip
        if not same or not source.is_of(device.path, device.file_id):
            raise SourceVanished(path=device.path, reason="another one has its name now")
        if source.size != device.size:
            raise SourceChangedSize(path=device.path, before=device.size, after=source.size)
        stack.pop_all()
    return source
