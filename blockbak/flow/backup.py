"""Makes one restore point of one source."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

from blockbak.errors import (
    BadBlockSize,
    BlockbakError,
    Damage,
    DuplicateIdentity,
    NewerFormat,
    NoUsableParent,
    SourceChangedSize,
    SourceEmpty,
    SourceHoldsRepository,
    SourceInUse,
    SourceVanished,
    VolumeExists,
)
from blockbak.flow.context import Context, iso
from blockbak.flow.points import damage_since, hidden_images, highest_sequence, open_chain
from blockbak.flow.scan import scan
from blockbak.host import device as devices
from blockbak.host import usage
from blockbak.host.blockio import SourceReader
from blockbak.host.device import Device
from blockbak.host.lock import Lock
from blockbak.image.format import BLOCK_DEFAULT, BLOCK_MAX, BLOCK_MIN, window_for
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter
from blockbak.model.chain import POINT_CHARS, Image, Point, plan
from blockbak.model.extent import BAD
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL, Closing, Kind, Opening
from blockbak.model.identity import Identity, ending, plain
from blockbak.repository.local import NAME_RULE, Catalog, Repository, Volume, usable_name

_SOURCE_MAX = 1000
"""Characters of the source's path that the header repeats, for people."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``kind`` and ``mode`` may be ``auto``; ``block_bytes`` None keeps the
    volume's, or takes the default.
    """

    source: str
    kind: str = "auto"
    mode: str = "auto"
    name: str | None = None
    block_bytes: int | None = None
    compress: str = "zstd"


@dataclass(frozen=True, slots=True)
class Report:
    """One point that was made, or with ``dry_run`` would be. Sizes are bytes."""

    point: str
    volume: str
    kind: str
    synthetic: bool
    parent: str | None
    sequence: int
    mode: str
    consistency: str
    change_source: str
    device_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int
    bad_bytes: int
    seconds: float
    source: str
    file: str
    root: str
    notes: list[str] = field(default_factory=list)
    attention: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """Which kind will be made, on which parent, and why it is a full where one could have expected less."""

    kind: Kind
    parent: Point | None
    reason: str = ""


# --- decisions: functions of values --------------------------------------------------------------


def check_block_size(size: int) -> None:
    """Raises BadBlockSize unless ``size`` is a power of two from 4 KiB to 1 MiB."""
    if not BLOCK_MIN <= size <= BLOCK_MAX or size & (size - 1):
        raise BadBlockSize(size=size)


def unlike(point: Point, identity: Identity, host: str, device_bytes: int, block_bytes: int | None) -> str:
    """Why the source cannot be compared with a point, or an empty string."""
    opening = point.images[0].opening
    if opening.identity.same_as(identity) and not opening.is_of(identity, host):
        return f"the source is {identity} on {host}, the last point is of {opening.host}"
    if not opening.is_of(identity, host):
        return f"the source is {identity}, the last point is of {opening.identity}"
    if opening.device_bytes != device_bytes:
        return f"the source has {device_bytes} bytes, the last point {opening.device_bytes}"
    if block_bytes is not None and opening.block_bytes != block_bytes:
        return f"the block size is now {block_bytes}, it was {opening.block_bytes}"
    if opening.window_bytes != window_for(device_bytes, opening.block_bytes):
        return "the window size is another one now"
    return ""


def choose(
    kind: str,
    points: Sequence[Point],
    identity: Identity,
    host: str,
    device_bytes: int,
    block_bytes: int | None,
    volume: str,
    broken: str = "",
) -> Choice:
    """The kind to make and the parent it needs. ``broken`` says why there are points that cannot be used.

    ``auto`` becomes a full where nothing can be a parent; an explicit delta raises NoUsableParent.
    """
    if kind == FULL:
        return Choice(FULL, None)
    candidates = points if kind != DIFFERENTIAL else [point for point in points if point.has_full]
    if not candidates:
        reason = broken or ("the volume has no point yet" if not points else "the volume has no full")
    else:
        reason = unlike(candidates[-1], identity, host, device_bytes, block_bytes)
    if not reason:
        return Choice(DIFFERENTIAL if kind == DIFFERENTIAL else INCREMENTAL, candidates[-1])
    return without_parent(kind, volume, reason)


def without_parent(kind: str, volume: str, reason: str) -> Choice:
    """A full instead, for ``auto``; NoUsableParent for a delta that was asked for by name."""
    if kind != "auto":
        raise NoUsableParent(kind=kind, volume=volume, reason=reason)
    return Choice(FULL, None, reason)


def point_id(now: datetime, hex_id: Callable[[int], str], taken: Callable[[str], bool]) -> str:
    """``YYYYMMDDTHHMMSSZ-xxxx`` in UTC, not yet used in the repository."""
    while True:
        name = f"{now:%Y%m%dT%H%M%SZ}-{hex_id(4)}"
        if not taken(name):
            return name


# --- the source ------------------------------------------------------------------------------------


def resolve_mode(device: Device, mode: str) -> str:
    """``cold`` or ``live``. Raises SourceInUse where ``auto`` or ``cold`` meets a user."""
    if mode == "live":
        return "live"
    users = usage.users(device)
    if users:
        raise SourceInUse(path=device.path, holders=", ".join(str(use) for use in users))
    return "cold"


def check_source(device: Device, repository: Repository, context: Context) -> None:
    """Refuse a source that would contain its own image. Raises SourceEmpty, SourceHoldsRepository,
    DuplicateIdentity.
    """
    if device.size == 0:
        raise SourceEmpty(path=device.path)
    for path, what in (
        (repository.path, "the repository"),
        (context.state_dir, "blockbak's state directory"),
    ):
        if usage.carries(device, path):
            raise SourceHoldsRepository(path=device.path, what=what)
    twin = devices.find_twin(device)
    if twin is not None:
        raise DuplicateIdentity(first=device.path, second=twin.path, identity=devices.identity(device))


def volume_name(device: Device, identity: Identity, repository: Repository, host: str, asked: str | None) -> str:
    """The volume that has this identity, or a new name for it; ``asked`` wins. Raises VolumeExists."""
    if asked is not None:
        if not usable_name(asked):
            raise VolumeExists(volume=asked, reason=f"it takes {NAME_RULE}")
        return asked
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
            return name
    base = "".join(c if (c.isalnum() and c.isascii()) or c in "._-" else "-" for c in f"{host}-{_short_name(device)}")
    base = base.lstrip(".-")[:180] or "volume"
    number, name = 1, base
    while taken.get(name) is not None or name in claimed:
        number += 1
        name = f"{base}-{number}"
    return name


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


# --- the use-case ----------------------------------------------------------------------------------


@contextmanager
def _parent_view(
    volume: Volume, catalog: Catalog, choice: Choice, request: Request
) -> Iterator[tuple[Choice, PointView | None]]:
    """The parent's chain, checked from end to end; a damaged one makes ``auto`` a full, and so does a newer
    point that cannot be used: what was changed since then is to be found, whatever happened to its manifest.
    """
    with ExitStack() as stack:
        view = None
        if choice.parent is not None:
            fulls = choice.kind == DIFFERENTIAL
            error: BlockbakError | None = damage_since(volume, catalog, choice.parent, fulls=fulls)
            try:
                if error is None:
                    view = open_chain(volume, plan(choice.parent, catalog.images), stack)
                    view.check()
            except (Damage, NewerFormat) as damage:
                view, error = None, damage
            if error is not None:
                reason = f"the last {'full' if fulls else 'point'} cannot be used: {_clause(error)}"
                choice = without_parent(request.kind, volume.name, reason)
        yield choice, view


@dataclass(frozen=True, slots=True)
class _Seen:
    """The source as it was looked at, and what follows from that."""

    device: Device
    identity: Identity
    mode: str
    name: str


def _look(repository: Repository, request: Request, context: Context) -> _Seen:
    """Look at the source. Raises every error of the source and refusal trees, VolumeExists."""
    device = devices.look(request.source)
    check_source(device, repository, context)
    mode = resolve_mode(device, request.mode)
    identity = devices.identity(device)
    name = volume_name(device, identity, repository, context.host, request.name)
    return _Seen(device, identity, mode, name)


def backup(repository: Repository, request: Request, context: Context, *, dry_run: bool = False) -> Report:
    """Make one point. Raises every error of the source, repository, damage and refusal trees."""
    clock = context.timer()
    if request.block_bytes is not None:
        check_block_size(request.block_bytes)
    seen = _look(repository, request, context)
    if dry_run:
        return _planned(repository, seen.name, seen.device, seen.identity, context.host, seen.mode, request)
    with ExitStack() as stack:
        while True:
            volume = repository.make_volume(seen.name)
            with ExitStack() as holding:
                lock = holding.enter_context(
                    volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say)
                )
                # While it was waited for, the source may have become another one, or in use; and another
                # identity may have taken a name that was free.
                again = _look(repository, request, context)
                if again.name == seen.name:
                    stack.push(holding.pop_all())
                    break
            seen = again
        source = stack.enter_context(_open_source(again, request, context))
        made = _locked(repository, volume, lock, again, source, request, context)
    return replace(made, seconds=round(context.timer() - clock - lock.waited, 3))


def _open_source(seen: _Seen, request: Request, context: Context) -> SourceReader:
    """Open what was looked at, and nothing else: a node is handed on, a file replaced, in a moment.

    From here on it is held. Raises SourceVanished, SourceChangedSize, and what opening it raises.
    """
    device = seen.device
    source = SourceReader(device.path, exclusive=seen.mode == "cold", kernel=context.kernel)
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


def _locked(
    repository: Repository,
    volume: Volume,
    lock: Lock,
    seen: _Seen,
    source: SourceReader,
    request: Request,
    context: Context,
) -> Report:
    """Make one point in a volume that is held, of a source that is open."""
    device, identity = seen.device, seen.identity
    lock.claim(str(identity))
    catalog = volume.catalog()
    for line in volume.tidy(catalog):
        context.say(line)
    for orphan in catalog.orphans:
        context.say(f"{orphan} has no manifest; 'blockbak recover' brings it back.")
    points = catalog.points
    choice = choose(
        request.kind, points, identity, context.host, device.size, request.block_bytes, volume.name, _broken(catalog)
    )
    with _parent_view(volume, catalog, choice, request) as (chosen, view):
        sequence = highest_sequence(volume, catalog, lock) + 1
        # Durable before the image that carries it: it must not be used again, whatever becomes of the image.
        lock.remember(sequence)
        block_bytes = _block_bytes(request, view, points)
        job = _Making(repository, volume, seen, source, chosen, view, sequence, block_bytes, request.compress)
        return _make(job, context)


def _broken(catalog: Catalog) -> str:
    """Why the newest of the points that cannot be used cannot; empty if there is none."""
    return f"the last point cannot be used: {_clause(catalog.damage[-1])}" if catalog.damage else ""


def _clause(error: BlockbakError) -> str:
    """Its sentence, to stand inside another."""
    return str(error).removesuffix(".")


def _block_bytes(request: Request, view: PointView | None, points: Sequence[Point]) -> int:
    """The parent's; else what was asked for, what the volume has, or the default."""
    if view is not None:
        return view.geometry.block_bytes
    return request.block_bytes or (points[-1].images[0].opening.block_bytes if points else BLOCK_DEFAULT)


def _planned(
    repository: Repository, name: str, device: Device, identity: Identity, host: str, mode: str, request: Request
) -> Report:
    """What ``backup`` would do, without a byte written."""
    points: list[Point] = []
    volume, catalog = None, Catalog()
    if name in repository.volume_names():
        volume = repository.volume(name)
        catalog = volume.catalog()
        points = catalog.points
    choice = choose(request.kind, points, identity, host, device.size, request.block_bytes, name, _broken(catalog))
    if volume is not None:
        with _parent_view(volume, catalog, choice, request) as (checked, _):
            choice = checked
    notes = [f"A full is made: {choice.reason}."] if choice.reason else []
    return Report(
        point="", volume=name, kind=choice.kind, synthetic=False,
        parent=choice.parent.id if choice.parent else None,
        sequence=points[-1].sequence + 1 if points else 1,
        mode=mode, consistency="cold" if mode == "cold" else "none", change_source="scan",
        device_bytes=device.size, read_bytes=device.size, changed_bytes=0, stored_bytes=0, bad_bytes=0,
        seconds=0.0, source=device.path, file="", root="", notes=notes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Making:
    """A point that is about to be made in a volume that is held: of what, which kind, on which parent (None for
    a full).
    """

    repository: Repository
    volume: Volume
    seen: _Seen
    source: SourceReader
    choice: Choice
    parent: PointView | None
    sequence: int
    block_bytes: int
    compress: str


def _opening(job: _Making, started: datetime, context: Context) -> Opening:
    """What the header says."""
    source, parent, device = job.source, job.parent, job.seen.device
    point = point_id(started, context.hex_id, _taken(job.repository))
    return Opening(
        repository=job.repository.id, image=context.hex_id(32), volume=job.volume.name,
        point=point, sequence=job.sequence, kind=job.choice.kind, synthetic=False,
        parent=parent.top.opening.point if parent else None,
        parent_root=parent.top.closing.root if parent else None,
        identity=job.seen.identity, device_bytes=source.size, block_bytes=job.block_bytes,
        window_bytes=window_for(source.size, job.block_bytes),
        logical_sector=source.logical, physical_sector=source.physical,
        created=iso(started), source=ending(plain(device.path), _SOURCE_MAX), host=context.host,
    )  # fmt: skip


def _read(job: _Making, writer: ImageWriter, context: Context) -> int:
    """Read the source into the image; bytes that were read. Raises SourceChangedSize, and what ``scan`` raises."""
    source = job.source
    context.progress.begin(f"{job.volume.name} {job.choice.kind}", source.size)
    try:
        read_bytes = scan(source, writer, job.parent, job.compress, context)
    finally:
        context.progress.end()
    after = source.current_size()
    if after != source.size:
        raise SourceChangedSize(path=job.seen.device.path, before=source.size, after=after)
    return read_bytes


def _doubts(job: _Making, watch: _Watch, *, written: bool, bad_bytes: int) -> Iterator[str]:
    """What whoever restores the point should know."""
    path = job.seen.device.path
    if job.seen.mode == "cold" and watch.blind:
        yield f"The kernel counts no writes to {path}: one by a process without a lock went unseen."
    if written:
        yield f"{path} was written while it was read: the image may be torn."
    if bad_bytes:
        yield f"{bad_bytes} bytes could not be read."


def _make(job: _Making, context: Context) -> Report:
    """Read, write, seal and commit."""
    mode, volume = job.seen.mode, job.volume
    notes = [f"A full is made: {job.choice.reason}."] if job.choice.reason else []
    for line in notes:
        context.say(line)
    started, clock = context.now(), context.timer()
    watch = _Watch(job.seen.device)
    opening = _opening(job, started, context)
    file = volume.free_name(opening.point, opening.kind)
    with volume.begin(file) as partial:
        writer = ImageWriter(partial, opening, job.parent.claimed_digests() if job.parent else None)
        read_bytes = _read(job, writer, context)
        written = mode == "cold" and watch.written()
        counts = writer.counts
        notes += _doubts(job, watch, written=written, bad_bytes=counts.by_kind[BAD])
        context.check()
        closing = Closing(
            root=writer.root, mode=mode, consistency="cold" if mode == "cold" and not written else "none",
            change_source="scan", read_bytes=read_bytes, changed_bytes=counts.changed_bytes,
            **counts.by_name(), frames=counts.frames,
            started=iso(started), finished=iso(context.now()), seconds=round(context.timer() - clock, 3),
            program=context.program, notes=notes,
        )  # fmt: skip
        size, digest = writer.finish(closing)
        # The image must be durable under its own name before a manifest names it.
        partial.seal()
        image = Image(file, size, digest, opening, closing, writer.listed)
        volume.commit(image)
    return replace(report(image), seconds=round(context.timer() - clock, 3), attention=written or closing.bad_bytes > 0)


def _taken(repository: Repository) -> Callable[[str], bool]:
    names = {file[:POINT_CHARS] for volume in repository.volumes() for file in volume.names()}
    return names.__contains__


def report(image: Image) -> Report:
    """The report of a committed image."""
    opening, closing = image.opening, image.closing
    return Report(
        point=opening.point, volume=opening.volume, kind=opening.kind, synthetic=opening.synthetic,
        parent=opening.parent, sequence=opening.sequence, mode=closing.mode, consistency=closing.consistency,
        change_source=closing.change_source, device_bytes=opening.device_bytes, read_bytes=closing.read_bytes,
        changed_bytes=closing.changed_bytes, stored_bytes=image.image_bytes, bad_bytes=closing.bad_bytes,
        seconds=closing.seconds, source=opening.source, file=image.file, root=closing.root,
        notes=list(closing.notes),
    )  # fmt: skip
