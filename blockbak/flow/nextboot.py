"""Images of a disk at the next boot: ordered, taken back, and made points once the system is up again.

What belongs to an order lies in the repository, in ``.next-boot``: ``order.json``, and ``id``, which the stage in the
initramfs looks for; then what the stage wrote: ``attempted``, the spool (``image.zst``, ``index``, ``bad``), the
kernel's counters ``before`` and ``after``, and at last ``complete``, or ``stopped`` with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from blockbak.errors import (
    ATTENTION,
    BlockbakError,
    DuplicateIdentity,
    InitramfsFailed,
    Interrupted,
    NextBootOrdered,
    NoPermission,
    NoSpoolRoom,
    NothingOrdered,
    SourceEmpty,
    SourceHoldsRepository,
    SpoolDamaged,
)
from blockbak.flow import backup
from blockbak.flow.context import Context
from blockbak.flow.recording import recorded
from blockbak.flow.source import Circumstances, Request, Seen, Settled, look_at, volume_name
from blockbak.host import nextboot, usage
from blockbak.host.blockio import StoredFile, read_error, store_error, sync_directory, write_durably
from blockbak.host.device import Device, find_twin, identity
from blockbak.host.nextboot import Installation
from blockbak.host.system import System
from blockbak.image.spool import SpoolReader, parse_index
from blockbak.model.nextboot import Order, stage_order, unit
from blockbak.model.unmounted import unclean
from blockbak.repository.local import Repository

FOLDER = ".next-boot"
_ORDER, _ID, _COMPLETE = "order.json", "id", "complete"
_IMAGE = "image.zst"
_WRITES = (6, 13)
"""Fields of ``stat`` (kernel, Documentation/block/stat.rst): sectors written, sectors discarded."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """What was ordered, or would be. Sizes are bytes; ``limit`` is in seconds, ``images`` are the initramfs's files."""

    source: str
    volume: str
    identity: str
    device_bytes: int
    repository: str
    limit: int
    images: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Finished:
    """Sentences on what was done about an order, and on what a person must look at. ``report`` is the point's."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    report: backup.Report | None = None


# --- ordered and taken back ----------------------------------------------------------------------------


def order(
    repository: Repository,
    source: str,
    context: Context,
    *,
    name: str | None = None,
    limit: int,
    dry_run: bool = False,
    installation: Installation | None = None,
) -> Ordered:
    """Have the disk or partition imaged at the next boot, for at most ``limit`` seconds.

    Raises NotAtNextBoot, NextBootOrdered, NoSpoolRoom, InitramfsFailed, NoPermission, and what looking at a source
    raises. Either all of it is ordered, or nothing.
    """
    if os.geteuid() != 0:
        raise NoPermission(action="have an image made at the next boot of", path=source)
    installation = installation or Installation(check=context.check)
    device = look_at(source)
    _check_source(device, repository)
    marks = nextboot.marks(device)
    folder = os.path.join(repository.path, FOLDER)
    place = nextboot.place(folder)
    installation.check_tools(device.path, place)
    _check_none(repository, installation)
    room = os.statvfs(repository.path)
    free, needed = room.f_bavail * room.f_frsize, nextboot.used_bytes(device)
    if free < needed:
        raise NoSpoolRoom(path=repository.path, free=free, source=device.path, needed=needed)
    known = identity(device)
    volume, was = volume_name(device, known, repository, context.host, name)
    made = Ordered(device.path, volume, str(known), device.size, repository.path, limit)
    if not installation.has_systemd:
        made.notes.append("systemd does not run here: after the boot, 'blockbak recover' makes the image a point.")
    if was:
        made.notes.append(was)
    if dry_run:
        return made
    wanted = Order(
        id=context.hex_id(32), boot=System().boot, created=int(context.now().timestamp()), host=context.host,
        volume=volume, source=device.label, path=device.path, identity_kind=known.kind, identity_value=known.value,
        diskseq=known.diskseq, length=device.size, logical=device.logical_sector, physical=device.physical_sector,
        limit=limit,
    )  # fmt: skip
    if installation.ordered()[0]:
        # Of an order that was taken back, or whose repository is gone.
        installation.remove()
    _write_order(repository, folder, wanted)
    try:
        text = stage_order(wanted, marks, place, [device.path, place.node], repository.path)
        images = installation.install(text, unit(wanted, repository.path, nextboot.python()))
    except BaseException:
        _clear(repository, folder)
        raise
    made.images.extend(images)
    return made


def _check_source(device: Device, repository: Repository) -> None:
    """That it is in use, and holds the state directory, is why it is imaged in this way. Raises SourceEmpty,
    SourceHoldsRepository, DuplicateIdentity.
    """
    if device.size == 0:
        raise SourceEmpty(path=device.path)
    if usage.carries(device, repository.path):
        raise SourceHoldsRepository(path=device.path, what="the repository")
    twin = find_twin(device)
    if twin is not None:
        raise DuplicateIdentity(first=device.path, second=twin.path, identity=identity(device))


def _check_none(repository: Repository, installation: Installation) -> None:
    """Raises NextBootOrdered. There is one order a repository, and one a machine."""
    if (other := _read_order(repository)) is not None:
        raise NextBootOrdered(source=other.source, repository=repository.path)
    number, where = installation.ordered()
    if number and _is_given(number, where):
        raise NextBootOrdered(source="another disk, or this one", repository=where)


def _is_given(number: str, repository: str) -> bool:
    """Whether a repository still has the order of that id."""
    with contextlib.suppress(OSError), open(os.path.join(repository, FOLDER, _ID), encoding="ascii") as file:
        return file.read().strip() == number
    return False


def _write_order(repository: Repository, folder: str, wanted: Order) -> None:
    kernel = repository.kernel
    try:
        if os.path.lexists(folder):
            _clear(repository, folder)
        kernel.mkdir(folder)
        sync_directory(repository.path, kernel)
        data = msgspec.json.format(msgspec.json.encode(wanted), indent=2)
        write_durably(os.path.join(folder, _ORDER), f"{FOLDER}/{_ORDER}", data + b"\n", kernel)
        # What the stage looks for comes last: with it, the order is given.
        write_durably(os.path.join(folder, _ID), f"{FOLDER}/{_ID}", f"{wanted.id}\n".encode(), kernel)
    except OSError as error:
        raise store_error(error, folder, "written") from error


def cancel(repository: Repository, context: Context, *, installation: Installation | None = None) -> str:
    """Take an order back, with whatever was made for it; a sentence. Raises NothingOrdered, InitramfsFailed."""
    installation = installation or Installation(check=context.check)
    folder = os.path.join(repository.path, FOLDER)
    found = None
    with contextlib.suppress(SpoolDamaged):
        found = _read_order(repository)
    if found is None and not os.path.lexists(folder) and installation.ordered()[1] != repository.path:
        raise NothingOrdered(repository=repository.path)
    # First what it all hangs on: without it, a stage that is still in the initramfs does nothing.
    if os.path.lexists(folder):
        _clear(repository, folder)
    if found is None or installation.ordered()[0] in ("", found.id):
        installation.remove()
    return f"The image of {found.source if found else 'a disk'} at the next boot is not wanted any more."


def _read_order(repository: Repository) -> Order | None:
    """The order in a repository, if there is one. One that was not written to its end is none."""
    folder = os.path.join(repository.path, FOLDER)
    if not os.path.lexists(os.path.join(folder, _ID)):
        return None
    try:
        return msgspec.json.decode(_text(repository, _ORDER), type=Order)
    except msgspec.DecodeError as error:
        raise SpoolDamaged(file=f"{FOLDER}/{_ORDER}", reason=str(error)) from error


def _clear(repository: Repository, folder: str) -> None:
    """Remove the order and its spool. What it all hangs on goes first."""
    try:
        names = set(os.listdir(folder))
        for name in (_ID, *sorted(names - {_ID})):
            if name in names:
                repository.kernel.unlink(os.path.join(folder, name))
                if name == _ID:
                    sync_directory(folder, repository.kernel)
        os.rmdir(folder)
        sync_directory(repository.path, repository.kernel)
    except OSError as error:
        raise store_error(error, folder, "removed") from error


def _text(repository: Repository, name: str) -> bytes:
    """A small file of the order; empty where there is none. Raises UnreadableStore."""
    path = os.path.join(repository.path, FOLDER, name)
    try:
        with StoredFile(path, f"{FOLDER}/{name}", repository.kernel) as file:
            return bytes(file.read(0, file.size))
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise read_error(error, path, f"{FOLDER}/{name}") from error


# --- after the boot --------------------------------------------------------------------------------------


def finish(repository: Repository, context: Context, *, installation: Installation | None = None) -> Finished:
    """Make what the stage left in a repository a point, and take everything away that was there for that one boot.

    Nothing is done where nothing was ordered, or where the boot is still to come. Never raises but for Interrupted:
    what could not be done is told, and tried again by the next run.
    """
    told = Finished()
    if os.geteuid() != 0:
        return told  # nor could it have been ordered
    installation = installation or Installation(check=context.check)
    try:
        found = _read_order(repository)
        if found is None:
            # A stage may have been left behind where the initramfs could not be made at that time.
            if installation.ordered()[1] == repository.path and installation.remove():
                told.done.append("What was in the initramfs for one boot was removed.")
            return told
        if found.host != context.host:
            told.left.append(f"An image of {found.source} at the next boot is ordered on {found.host}, not here.")
            return told
        if found.boot == System().boot:
            context.say(f"{found.source} will be imaged at the next boot.")
            return told
        _after_boot(repository, found, context, installation, told)
    except Interrupted:
        raise
    except BlockbakError as error:
        told.left.append(str(error))
    return told


def _after_boot(
    repository: Repository, found: Order, context: Context, installation: Installation, told: Finished
) -> None:
    folder = os.path.join(repository.path, FOLDER)
    volume = repository.make_volume(found.volume)
    with volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say) as lock:
        # While it was waited for, another run may have done it all.
        if _read_order(repository) != found:
            return
        if installation.ordered()[0] == found.id:
            try:
                installation.remove()
            except InitramfsFailed as error:
                told.left.append(f"The stage stays in the initramfs, where it does nothing any more: {error}")
        if not os.path.lexists(os.path.join(folder, _COMPLETE)):
            told.left += _without(repository, found, installation)
            _clear(repository, folder)
            return
        with _source(repository, found, context) as source:
            seen = Seen(_device(found), found.identity, "cold", found.volume)
            request = Request(found.path, name=found.volume)
            held = backup.Held(request, seen, volume, lock)
            with recorded(repository, "made", context, volume=volume.name, source=found.source) as doing:
                told.report = backup.make_point(repository, held, source, context)
                doing.points, doing.exit = [told.report.point], ATTENTION if told.report.attention else 0
                doing.facts |= told.report.facts
        # Only now: until the point is there, the spool is all there is.
        _clear(repository, folder)
    report = told.report
    told.done.append(f"{report.volume}: the image of {found.source} from the boot is point {report.point} now.")
    if report.attention:
        told.left += report.notes


def _without(repository: Repository, found: Order, installation: Installation) -> list[str]:
    """Why there is no image."""
    reason = _text(repository, "stopped").decode("utf-8", "replace").strip()
    if not reason and os.path.lexists(os.path.join(repository.path, FOLDER, "attempted")):
        reason = "the attempt did not come to its end"
    said = installation.said()
    if not reason:
        reason = said[-1].removeprefix("no image is made: ") if said else "the system started without the initramfs"
    return [f"No image of {found.source} was made at the boot: {reason}."]


def _device(found: Order) -> Device:
    """The disk as it was when it was ordered."""
    return Device(
        path=found.path, given=found.source, is_block=True, size=found.length, kind="disk",
        logical_sector=found.logical, physical_sector=found.physical,
    )  # fmt: skip


@contextmanager
def _source(repository: Repository, found: Order, context: Context) -> Iterator[_FromSpool]:
    """The spool of an order, checked as far as it can be without reading all of it. Raises SpoolDamaged."""
    name = f"{FOLDER}/{_IMAGE}"
    texts = {part: _text(repository, part).decode("utf-8", "replace") for part in _SMALL}
    if texts[_COMPLETE].strip() != str(found.length):
        raise SpoolDamaged(file=name, reason=f"it is of {texts[_COMPLETE].strip()} bytes instead of {found.length}")
    index = parse_index(name, texts["index"], texts["bad"], found.length)
    path = os.path.join(repository.path, FOLDER, _IMAGE)
    with ExitStack() as stack:
        try:
            file = stack.enter_context(StoredFile(path, name, repository.kernel))
        except OSError as error:
            raise read_error(error, path, name) from error
        reader = SpoolReader(
            file, index, size=found.length, logical=found.logical, physical=found.physical, path=found.path
        )
        flaws = unclean(reader.peek, found.logical, found.length)
        reader.rewind()
        yield _FromSpool(reader, _moment(texts["attempted"], found, context.now()), flaws, _written(texts))


_SMALL = (_COMPLETE, "index", "bad", "attempted", "before", "after")


def _moment(text: str, found: Order, now: datetime) -> datetime | None:
    """When the stage began, by the clock of the initramfs; None where that cannot be."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        moment = datetime.fromtimestamp(int(text), UTC)
        if found.created <= moment.timestamp() <= now.timestamp():
            return moment
    return None


def _written(texts: dict[str, str]) -> bool:
    """Whether the kernel counted a write to the disk while it was read, or its counters are not known."""
    counts = [
        [fields[at] for at in _WRITES if at < len(fields)] for fields in (texts[one].split() for one in _SMALL[4:])
    ]
    return counts[0] != counts[1] or not counts[0]


class _FromSpool:
    """The source of the point: a spool. ``flaws`` say which file systems were in use, ``written`` whether anything
    wrote to the disk while it was read.
    """

    def __init__(self, reader: SpoolReader, moment: datetime | None, flaws: list[str], written: bool) -> None:
        self.reader, self.moment = reader, moment
        self.circumstances = Circumstances()
        self._flaws, self._written = flaws, written

    def check(self) -> None:
        """Nothing can change any more."""

    def settle(self) -> Settled:
        """Cold where all was unmounted as it should be, else what a crash would have left."""
        if self._written:
            return Settled("none", ["The disk was written while it was read: the image may be torn."], attention=True)
        if self._flaws:
            return Settled("crash", [f"Not cleanly unmounted before: {', '.join(self._flaws)}."])
        return Settled("cold")
