"""What is restored to: looked at, refused if it must not be written, opened as what was looked at."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blockbak.errors import (
    BadTarget,
    NoSuchSource,
    NotABlockSource,
    SourceError,
    TargetExists,
    TargetFailed,
    TargetHolds,
    TargetInUse,
    TargetSectorSize,
    TargetTooSmall,
    TargetUnsafe,
)
from blockbak.flow.context import Context, never
from blockbak.flow.points import reader
from blockbak.flow.source import activation_needed
from blockbak.host import device as devices
from blockbak.host import lvm, usage
from blockbak.host.blockio import TargetWriter, is_marked, mark, read_error, sync_directory, unmark
from blockbak.host.device import Device
from blockbak.host.system import System
from blockbak.image.view import PointView
from blockbak.model import partition
from blockbak.model.facts import Opening
from blockbak.model.filesystem import PhysicalVolume, Read
from blockbak.model.part import Part
from blockbak.model.partition import PartitionTable
from blockbak.repository.local import Repository, repository_above
from blockbak.units import align_down


@dataclass(frozen=True, slots=True)
class Incoming:
    """What is to lie on a target: what its header says of it, and ``read(offset, length)`` of its content; or, where
    that cannot be read beforehand, the partition table and the physical volumes that it is said to have. ``part`` is
    what of the volume it is (None: all), and ``read`` then counts from its first byte. ``copied``: an older copy of
    it lies on the target, so that the volume group or array which that seems to belong to is the content's own.
    """

    opening: Opening
    read: Read
    said_table: PartitionTable | None = None
    said_volumes: tuple[PhysicalVolume, ...] = ()
    part: Part | None = None
    copied: bool = False

    @classmethod
    def of(cls, view: PointView, part: Part | None = None) -> Incoming:
        """A point, or a part of it; what is damaged of it reads as zeros."""
        read = reader(view) if part is None else partition.inside(reader(view), part.start, part.length)
        return cls(view.top.opening, read, part=part)

    @property
    def size(self) -> int:
        """Bytes of it."""
        return self.opening.device_bytes if self.part is None else self.part.length

    def table(self) -> PartitionTable | None:
        """The partition table in it, if there is one."""
        return self.said_table or partition.parse(self.read, self.opening.logical_sector, self.size, guess=True)


def look_at_target(path: str) -> Device | None:
    """The target as it is now; None for a file that does not exist. Raises BadTarget, VolumeInactive."""
    if not path:
        raise BadTarget(path="''", reason="an empty name names nothing")
    try:
        return devices.look(path)
    except NoSuchSource as error:
        directory = os.path.dirname(os.path.realpath(path))
        # Where device nodes live, a name that is not there is a slip of the pen; /dev/shm is another place.
        is_node = f"{directory}/".startswith("/dev/") and (
            not os.path.isdir(directory) or os.stat(directory).st_dev == os.stat("/dev").st_dev
        )
        # LVM is not asked of a file that is to be made.
        if (is_node or not os.path.isdir(directory)) and (volume := lvm.inactive(path)) is not None:
            raise activation_needed(volume) from error
        if not os.path.isdir(directory):
            raise BadTarget(path=path, reason=f"there is no directory {directory}") from error
        if is_node:
            raise BadTarget(path=path, reason="there is no such device") from error
        return None
    except NotABlockSource as error:
        what = error.fields["what"]
        raise BadTarget(path=path, reason=f"it is {what}, not a block device or a file") from error
    except SourceError as error:
        raise BadTarget(path=path, reason=str(error).removesuffix(".")) from error


def check_target(
    path: str,
    target: Device | None,
    incoming: Incoming,
    repository: Repository | None,
    context: Context,
    *,
    overwrite: bool,
) -> None:
    """Refuse every target that must not be written; ``repository`` is the one that is known of, if any. Raises a
    Refused, naming the reason.
    """
    for place in (path, *(usage.files_below(target) if target else ())):
        if repository_above(os.path.realpath(place)) or (repository is not None and is_stored(place, repository)):
            raise TargetHolds(path=path, what="a part of a repository")
    if target is None:
        return
    places = [(context.state_dir, "blockbak's state directory")]
    if repository is not None:
        places.insert(0, (repository.path, "the repository"))
    for place, what in places:
        if usage.carries(target, place):
            raise TargetHolds(path=path, what=what)
    if system := usage.holds_running_system(target):
        raise TargetHolds(path=path, what=f"the running system ({system})")
    users = usage.users(target)
    if not incoming.copied and not is_itself(target, incoming, context, surely=True):
        # A disk of an inactive volume group may be rolled back onto itself; any other may not be lost to it.
        users += usage.memberships(target)
    if devices.is_inner(target.kname, System()):
        reason = "it is an inner part of logical volumes, which LVM keeps for itself"
        raise TargetUnsafe(path=path, reason=reason, way="Name the logical volume that is to hold the point.")
    if users:
        raise TargetInUse(path=path, holders=", ".join(str(use) for use in users))
    if reason := usage.snapshots(target):
        way = "Remove the snapshot first, or restore to a new volume with --create-lv."
        raise TargetUnsafe(path=path, reason=reason, way=way)
    if target.is_block:
        _check_device(path, target, incoming)
    if not overwrite:
        raise TargetExists(path=path)


def _check_device(path: str, target: Device, incoming: Incoming) -> None:
    """Size and sectors of a device. Raises BadTarget, TargetTooSmall, TargetSectorSize."""
    if target.read_only:
        raise BadTarget(path=path, reason="it is read-only")
    need = incoming.size
    # What is left over behind the last whole sector cannot be written.
    room = align_down(target.size, target.logical_sector)
    if room < need:
        raise TargetTooSmall(path=path, have=room, need=need)
    have, table = target.logical_sector, incoming.table()
    if table is not None and have != table.sector_bytes:
        raise TargetSectorSize(path=path, have=have, need=table.sector_bytes)


def is_itself(target: Device, incoming: Incoming, context: Context, *, surely: bool) -> bool:
    """Whether the target is what the content was taken of: the volume, or the same partition of it. ``surely`` is for
    where a mistake would cost data.
    """
    opening, part, device = incoming.opening, incoming.part, target
    if part is not None and part.partition:
        place = (target.partition_number, target.start, target.size)
        disk = devices.disk_of(target)
        if disk is None or place != (part.partition, part.start, part.length):
            return False
        device = disk
    known = opening.surely_of if surely else opening.is_of
    return known(devices.identity(device), context.host)


def is_stored(path: str, repository: Repository) -> bool:
    """Whether ``path`` is another name of a file in the repository: a hard link, or a bind mount of one.

    Raises UnreadableStore or NoPermission where that cannot be told.
    """
    try:
        mine = os.stat(path)
    except OSError:
        return False
    places = [repository.path, *(volume.path for volume in repository.volumes())]
    for place in places:
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    # Deleted by another run meanwhile; or the disk cannot tell of it, as it could of `path`.
                    with contextlib.suppress(OSError):
                        if os.path.samestat(mine, entry.stat(follow_symlinks=False)):
                            return True
        except OSError as error:
            raise read_error(error, place, place) from error
    return False


# --- opening it -----------------------------------------------------------------------------------


@contextlib.contextmanager
def existing(
    given: str, known: Device, incoming: Incoming, repository: Repository | None, context: Context
) -> Iterator[TargetWriter]:
    """A target that was there when it was looked at as ``known``, open, and nobody else's; a file gets the
    content's size. Raises BadTarget if it has become another one since, TargetFailed if others took it away or
    gave it another size while it was written, and what ``check_target`` raises.
    """
    with TargetWriter(known.path, kernel=context.kernel) as target:
        # Between the look at it and now a node may have been handed on, a link turned, a file been mounted.
        now = look_at_target(given)
        if now is None or _marks(now) != _marks(known) or not target.is_of(known.path, known.file_id):
            raise BadTarget(path=given, reason="it is not what it was a moment ago")
        check_target(given, now, incoming, repository, context, overwrite=True)
        if not target.is_block:
            target.resize(incoming.size)
        yield target
        # Else what was written would be in a file that nobody finds, or its end would be lost.
        if not target.is_block and not _is_named(target.fd, known.path):
            raise TargetFailed(action="Writing", path=given, reason="its name was taken away, or given to another file")
        try:
            size = target.current_size()
        except OSError as error:
            raise TargetFailed(action="Asking the size of", path=given, reason=error.strerror) from error
        if size < incoming.size or (size > incoming.size and not target.is_block):
            raise TargetFailed(action="Writing", path=given, reason="somebody gave it another size meanwhile")


def _marks(device: Device) -> tuple[object, ...]:
    number = device.major, device.minor, device.diskseq
    return device.path, device.size, number, device.file_id, devices.identity(device)


@contextlib.contextmanager
def new_file(
    path: str, size: int, context: Context, *, overwrite: bool, ready: Callable[[], None] = never
) -> Iterator[TargetWriter]:
    """A file of ``size`` bytes, written as ``path.partial``; it gets its name when all went well, and else goes.
    ``ready`` is called between: who flushes the file first may clear the name for it there.

    Raises TargetExists, TargetInUse, BadTarget.
    """
    partial = path + ".partial"
    if os.path.lexists(partial):
        # A restore that was killed left it, if it says so; else it may be somebody's, and was not named.
        ours = is_marked(partial)
        if not (overwrite or ours) or not os.path.isfile(partial):
            raise TargetExists(path=partial)
        with TargetWriter(partial, kernel=context.kernel):  # held by nobody, or it is refused
            context.kernel.unlink(partial)
    writer = TargetWriter(partial, create=True, kernel=context.kernel)
    held = os.dup(writer.fd)  # the lock lasts until the file has its name
    try:
        with writer as target:
            mark(target.fd)
            target.resize(size)
            yield target
            unmark(target.fd)
        if not _is_named(held, partial):
            raise BadTarget(path=path, reason=f"{partial} was taken away meanwhile")
        ready()
        context.kernel.rename(partial, path)
        sync_directory(os.path.dirname(path), context.kernel)
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error
    finally:
        try:
            if _is_named(held, partial):
                with contextlib.suppress(OSError):
                    context.kernel.unlink(partial)
        finally:
            os.close(held)


@contextlib.contextmanager
def continued_file(path: str, size: int, context: Context, *, overwrite: bool) -> Iterator[TargetWriter]:
    """A file of ``size`` bytes, written as ``path.partial``, which gets its name when all went well. Else it stays, if
    it holds anything, for the next run to go on with: what an earlier one left is what is opened.

    Raises TargetExists, TargetInUse, BadTarget.
    """
    partial = path + ".partial"
    there = os.path.lexists(partial)
    if there and (not os.path.isfile(partial) or not (overwrite or is_marked(partial))):
        # It may be somebody's, and was not named.
        raise TargetExists(path=partial)
    writer = TargetWriter(partial, create=not there, kernel=context.kernel)
    held = os.dup(writer.fd)  # the lock lasts until the file has its name
    own = False
    try:
        with writer as target:
            # Through a link another file would be written, which nobody named; it may even be the source.
            own = _is_named(held, partial) and os.fstat(held).st_nlink == 1
            if not own:
                raise BadTarget(path=path, reason=f"{partial} is another file's link")
            mark(target.fd)
            target.resize(size)
            yield target
            unmark(target.fd)
        if not _is_named(held, partial):
            raise BadTarget(path=path, reason=f"{partial} was taken away meanwhile")
        context.kernel.rename(partial, path)
        sync_directory(os.path.dirname(path), context.kernel)
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error
    finally:
        try:
            if own and not os.fstat(held).st_blocks and _is_named(held, partial):
                with contextlib.suppress(OSError):
                    context.kernel.unlink(partial)
        finally:
            os.close(held)


def _is_named(fd: int, path: str) -> bool:
    """Whether the open file still has that name."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    return False
