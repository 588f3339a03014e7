"""Keeps a copy of a device or file in step with it, on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace

import numpy as np

from blockbak.errors import (
    ATTENTION,
    BlockbakError,
    DuplicateIdentity,
    Interrupted,
    MirrorOntoItself,
    MirrorSourceInUse,
    SourceInUse,
)
from blockbak.flow.backup import both, check_block_size
from blockbak.flow.context import Context, never
from blockbak.flow.hot import HotOptions, Member, foreseen, snapshots
from blockbak.flow.instep import InStep, Target, Untouched, blocks_of, length_of, without
from blockbak.flow.into_lvm import pool_of, twin_notes
from blockbak.flow.recording import from_root, recorded
from blockbak.flow.scan import Found, Sink, scan_into
from blockbak.flow.source import AtRest, Seen, Settled, Source, check_source, look_at, resolve_mode
from blockbak.flow.source import Request as SourceRequest
from blockbak.flow.target import Incoming, check_target, continued_file, existing, look_at_target
from blockbak.host import device as devices
from blockbak.host import usage, volumes
from blockbak.host.blockio import PIECE_BYTES, RETRIES, SourceReader, aligned, is_marked
from blockbak.host.device import Device
from blockbak.host.marks import reading
from blockbak.image.format import BLOCK_DEFAULT, window_for
from blockbak.image.sidecar import Range, ranges
from blockbak.model import extent, hashmap
from blockbak.model.extent import ABSENT, DATA, Extents
from blockbak.model.facts import FULL, Opening
from blockbak.model.filesystem import PhysicalVolume, Read, filesystem
from blockbak.model.hashmap import Mask
from blockbak.model.identity import Identity
from blockbak.model.partition import PartitionTable, inside, parse
from blockbak.repository.local import Repository

_FACTS = (
    "source", "target", "host", "method", "mode", "consistency", "root", "device_bytes", "read_bytes",
    "differing_bytes", "moved_bytes", "written_bytes", "zeroed_bytes",
)  # fmt: skip
"""What the history says of a mirror."""
_PHYSICAL_VOLUME = "LVM2_member"
_MEMBERS = (_PHYSICAL_VOLUME, "linux_raid_member")


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``overwrite`` stands for ``--yes``, ``limit`` is the most bytes of the source to read
    a second. ``hot`` has the source read from a snapshot.
    """

    source: str
    target: str
    overwrite: bool = False
    verify: bool = True
    hot: HotOptions | None = None
    block_bytes: int = BLOCK_DEFAULT
    limit: int | None = None
    retries: int = RETRIES
    strict: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What was done, or with ``dry_run`` found. Sizes are bytes.

    ``method`` is ``create``, ``continue`` (with what an earlier run left of a new file) or ``differ``; ``host`` is the
    target's, empty for this one. ``read_bytes`` were read of the source; ``differing_bytes`` are the blocks that were
    not equal; ``moved_bytes`` went from one side to the other, over a connection all that was sent and received;
    ``written_bytes`` and ``zeroed_bytes`` are of the target, ``verified_bytes`` were read back. ``unreadable`` are
    ranges of the source that could not be read: the blocks that hold them are as they were on the target.
    """

    source: str
    target: str
    host: str
    method: str
    mode: str
    dry_run: bool
    device_bytes: int
    target_bytes: int
    block_bytes: int
    read_bytes: int
    differing_bytes: int
    moved_bytes: int
    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    root: str
    consistency: str
    unreadable: list[Range]
    seconds: float
    notes: list[str] = field(default_factory=list)
    attention: bool = False


# --- the source ----------------------------------------------------------------------------------------------


def look(request: Request, context: Context) -> Seen:
    """The source, looked at and found free; or, to be read from a snapshot, whatever uses it. Raises every error of
    the source tree, MirrorSourceInUse, RootInUse, SourceHoldsRepository, NotSnapshotable, BadBlockSize.
    """
    check_block_size(request.block_bytes)
    device = look_at(request.source)
    asked = _asked(request)
    with contextlib.suppress(DuplicateIdentity):  # the last that is asked: its twin may be an older mirror of it
        # A repository may lie on it: the copy does not contain itself, as an image would.
        check_source(device, None, asked, context)
    try:
        mode = resolve_mode(device, asked.mode)
    except SourceInUse as error:
        raise MirrorSourceInUse(**error.fields) from error
    return Seen(device, devices.identity(device), mode, device.label)


def _asked(request: Request) -> SourceRequest:
    return SourceRequest(request.source, mode="cold" if request.hot is None else "hot")


@contextlib.contextmanager
def opened(seen: Seen, request: Request, context: Context) -> Iterator[Source]:
    """The source, open and held as it was looked at, or a snapshot of it. Raises every error of the source and
    snapshot trees, MirrorSourceInUse.
    """
    with ExitStack() as stack:
        source: Source
        if request.hot is None or request.dry_run:
            # Nothing is made for a dry run: what is compared then is a volume that goes on being written.
            seen = seen if request.hot is None else replace(seen, mode="live")
            try:
                # The other end opened its target meanwhile, and that may be the same file.
                resolve_mode(seen.device, seen.mode)
                source = stack.enter_context(closing(AtRest(seen, _asked(request), context)))
            except SourceInUse as error:
                raise MirrorSourceInUse(**error.fields) from error
        else:
            # With one member nothing is asked of a repository's place.
            (source,) = stack.enter_context(snapshots([Member(seen, "")], request.hot, "", context))
        source.reader.retries, source.reader.strict = request.retries, request.strict
        yield source


def read_all(source: Source, seen: Seen, sink: Sink, request: Request, context: Context) -> tuple[int, Settled]:
    """Read the source into ``sink``; the bytes that were read, and what is known of it afterwards. Raises every error
    of the source and snapshot trees, and what the sink raises.
    """
    context.progress.begin(f"{seen.device.label} mirror", source.reader.size)
    try:
        count = scan_into(source.reader, sink, context, request.limit)
    finally:
        context.progress.end()
    return count, source.settle()


def snapshot_notes(seen: Seen, request: Request, context: Context) -> list[str]:
    """What would be made of a volume that is read from a snapshot, for a dry run. Raises what making it would, as far
    as it shows.
    """
    if request.hot is None or not request.dry_run:
        return []
    return foreseen([Member(seen, "")], request.hot, "", context.state_dir)


def checked(context: Context, source: Source) -> Context:
    """A context whose ``check`` also raises what goes wrong with the source."""
    return replace(context, check=both(context.check, source.check))


def united(tables: list[Extents]) -> list[Range]:
    """What could not be read, in order."""
    rows = np.concatenate(tables)
    return ranges(extent.coalesce(rows[np.argsort(rows["start"], kind="stable")]))


def reads(device: Device) -> Read:
    """``read(offset, length)`` of what lies on a device now; short where nothing can be read."""

    def read(offset: int, length: int) -> bytes:
        with reading(device.path) as inner:
            return inner(offset, length)

    return read


def table_of(device: Device) -> PartitionTable | None:
    """The partition table in it."""
    return parse(reads(device), device.logical_sector, device.size, guess=not device.is_block)


def members(device: Device) -> list[str]:
    """What of volume groups and arrays lies on it: type and UUID, of all of it and of its partitions."""
    read, table = reads(device), table_of(device)
    places = [(0, device.size), *((one.start, one.length) for one in (table.partitions if table else ()))]
    found = [filesystem(inside(read, start, length), length) for start, length in places]
    return sorted({f"{one.type} {one.uuid}" for one in found if one is not None and one.type in _MEMBERS})


# --- the target ----------------------------------------------------------------------------------------------


def volumes_among(told: list[str]) -> tuple[PhysicalVolume, ...]:
    """The physical volumes among ``members``; of which group they are those do not tell."""
    pairs = (one.partition(" ") for one in told)
    return tuple(PhysicalVolume(uuid, "") for kind, _, uuid in pairs if kind == _PHYSICAL_VOLUME)


def is_older_copy(target: Device | None, ours: list[str]) -> bool:
    """Whether all that lays claim to the target is what lays claim to the source: then a mirror put it there."""
    return target is not None and bool(ours) and set(members(target)) <= set(ours)


def opening_of(
    size: int, block_bytes: int, sectors: tuple[int, int], identity: Identity, host: str
) -> Opening:  # fmt: skip
    """What is known of a source, as checks of targets take it. Raises SourceTooLarge."""
    return Opening(
        repository="", image="", volume="", point="", sequence=0, kind=FULL, synthetic=False, parent=None,
        parent_root=None, identity=identity, device_bytes=size, block_bytes=block_bytes,
        window_bytes=window_for(size, block_bytes), logical_sector=sectors[0], physical_sector=sectors[1],
        created="", host=host,
    )  # fmt: skip


def _incoming(seen: Seen, target: Device | None, block_bytes: int, context: Context) -> Incoming:
    device = seen.device
    sectors = device.logical_sector, device.physical_sector
    opening = opening_of(device.size, block_bytes, sectors, seen.identity, context.host)
    return Incoming(opening, reads(device), table_of(device), copied=is_older_copy(target, members(device)))


def _check_apart(source: Device, path: str, target: Device | None) -> None:
    """Raises MirrorOntoItself where the two have any byte in common, or one lies on the other."""
    if usage.carries(source, os.path.realpath(path)) or (target is not None and usage.carries(target, source.path)):
        raise MirrorOntoItself(target=path, source=source.label)


def partial_of(path: str) -> str:
    """Where a new file is written until it is whole."""
    return f"{os.path.realpath(path)}.partial"


def method_of(target: Device | None, path: str) -> str:
    """How it is brought in step."""
    if target is not None:
        return "differ"
    return "continue" if os.path.lexists(partial_of(path)) else "create"


def notes_on(target: Device | None, incoming: Incoming, path: str) -> list[str]:
    """What whoever mirrors should know."""
    if target is None:
        if method_of(target, path) == "create":
            return []
        return [f"{path}.partial is there, of a run that did not end: what is equal in it does not move again."]
    notes = twin_notes(target, incoming)
    if target.size > incoming.size:
        more, how = target.size - incoming.size, "left alone" if target.is_block else "cut off"
        notes.append(f"The target is longer by {more} bytes; they are {how}.")
    return notes


@contextlib.contextmanager
def brought(
    given: str, known: Device | None, incoming: Incoming, repository: Repository | None, context: Context, *,
    overwrite: bool, dry_run: bool,
) -> Iterator[tuple[Target, Callable[[], None]]]:  # fmt: skip
    """The target, open, and what to ask before each write. With ``dry_run`` it is only read. Raises what opening and
    checking a target raises.
    """
    if dry_run:
        place = known.path if known is not None else partial_of(given)
        with ExitStack() as stack:
            there = known is not None or os.path.isfile(place)
            reader = stack.enter_context(SourceReader(place, exclusive=False)) if there else None
            yield Untouched(place, reader, incoming.size), never
    elif known is None:
        place = partial_of(given)
        left = look_at_target(place)
        if left is not None:
            # An earlier run left it. Somebody may have mounted it since, or it may be of no run.
            own = replace(incoming, copied=True)
            check_target(place, left, own, repository, context, overwrite=overwrite or is_marked(left.path))
        with continued_file(os.path.realpath(given), incoming.size, context, overwrite=overwrite) as new:
            yield new, never
    else:
        if known.is_lv:
            # Whoever names what an unfinished restore left wants to keep it.
            volumes.adopt(known.lv_uuid)
        pool = pool_of(known, lambda _: 0, given, context)
        with existing(given, known, incoming, repository, context) as old:
            yield old, never if pool is None else pool.check


def is_resized(target: Device | None, incoming: Incoming, dry_run: bool) -> bool:
    """Whether opening it gave a file another size."""
    return not dry_run and target is not None and not target.is_block and target.size != incoming.size


@contextlib.contextmanager
def incomplete(step: InStep) -> Iterator[None]:
    """What goes wrong inside leaves a target that is in step in parts only, and says so."""
    place = step.target.path
    try:
        yield
    except BlockbakError as error:
        if step.touched.any() or step.resized:
            told = f"{place} is incomplete; run again, and what is equal by then does not move again"
        else:
            told = f"nothing was written to {place}"
        if isinstance(error, Interrupted):
            raise Interrupted(state=told) from error
        error.add_note(f"{told[0].upper()}{told[1:]}.")
        raise


# --- both on this machine ------------------------------------------------------------------------------------


class _Sink:
    """Compares each piece with what the target holds there, and brings what differs."""

    def __init__(self, step: InStep, *, dry_run: bool) -> None:
        self.geometry = step.geometry
        self.unread = [extent.empty()]
        self._step, self._dry_run = step, dry_run

    def hand(self) -> Callable[[Found], None]:
        """For one more worker, with a buffer of its own."""
        buffer = aligned(PIECE_BYTES)

        def take(found: Found) -> None:
            self._take(found, buffer)

        return take

    def _take(self, found: Found, buffer: hashmap.Bytes) -> None:
        step, block = self._step, self.geometry.block_bytes
        first, count = found.first_block * block, len(found.kinds)
        end = min(first + count * block, self.geometry.device_bytes)
        left = extent.touched(found.bad, first, block, count)
        nonzero = (found.kinds == DATA) & ~left
        rows = without(found.rows, left, found.first_block, self.geometry)
        step.known.add(found.first_block, rows, nonzero, blocks_of(left, first, self.geometry))
        if len(found.bad):
            self.unread.append(found.bad)
        if not len(found.data) and step.is_hole(first, end - first):
            found.kinds[:] = ABSENT  # a hole here and there
            return
        for low in range(0, count, PIECE_BYTES // block):
            start = first + low * block
            length = min(PIECE_BYTES, end - start)
            part = slice(low, low + -(-length // block))
            data = found.data[low * block : low * block + length]
            differing = self._unequal(start, length, data, nonzero[part], buffer) & ~left[part]
            # What counts as changed is what is still marked afterwards.
            found.kinds[part][~differing] = ABSENT
            if not differing.any():
                continue
            step.differs(length_of(start, differing, self.geometry))
            if not self._dry_run:
                step.bring(start, rows[part], differing & nonzero[part], differing & ~nonzero[part], data)

    def _unequal(self, start: int, length: int, data: hashmap.Bytes, nonzero: Mask, buffer: hashmap.Bytes) -> Mask:
        """Which blocks the target holds otherwise; no ``data`` are zeros."""
        if self._step.is_hole(start, length):
            return nonzero.copy()
        if not self._step.held(start, buffer, length):
            return np.ones(len(nonzero), bool)
        if not len(data):
            return hashmap.nonzero_blocks(buffer[:length], self.geometry.block_bytes)
        return hashmap.unequal_blocks(data, buffer[:length], self.geometry.block_bytes)

    def stop(self) -> None:
        """Nobody waits for anybody."""


@contextlib.contextmanager
def noted(request: Request, target: str, repository: Repository | None, context: Context) -> Iterator[list[Report]]:
    """What is put into the list is told in the history of the repository, if one is named; a dry run is not."""
    reports: list[Report] = []
    if repository is None or request.dry_run:
        yield reports
        return
    with recorded(repository, "mirrored", context, source=from_root(request.source), target=target) as doing:
        yield reports
        for report in reports:
            doing.exit = ATTENTION if report.attention else 0
            doing.facts |= {name: getattr(report, name) for name in _FACTS}
            if not report.host:
                doing.facts["target"] = target


def mirror(request: Request, context: Context, *, repository: Repository | None = None) -> Report:
    """Bring a target on this machine in step; with ``dry_run`` only compare. ``repository`` is one that is known of.

    What is equal is not written, so a run that was broken off goes on where it was: an existing target, and what was
    begun of a new file, are read anyway. Raises every error of the source and snapshot trees, a Refused for a source
    or target that must not be, TargetFailed, TargetFull, NotReadBack, Interrupted.
    """
    with noted(request, from_root(request.target), repository, context) as reports:
        reports.append(_mirror(request, context, repository))
    return reports[0]


def _mirror(request: Request, context: Context, repository: Repository | None) -> Report:
    clock = context.timer()
    seen = look(request, context)
    target = look_at_target(request.target)
    # What is written of a file that is not there yet is its partial.
    written = request.target if target is not None else partial_of(request.target)
    _check_apart(seen.device, written, target or look_at_target(written))
    incoming = _incoming(seen, target, request.block_bytes, context)
    overwrite = request.overwrite or request.dry_run
    check_target(request.target, target, incoming, repository, context, overwrite=overwrite)
    notes = [*snapshot_notes(seen, request, context), *notes_on(target, incoming, request.target)]
    method, verified = method_of(target, request.target), 0
    with ExitStack() as stack:
        source = stack.enter_context(opened(seen, request, context))
        place, permit = stack.enter_context(
            brought(
                request.target, target, incoming, repository, context,
                overwrite=overwrite, dry_run=request.dry_run,
            )
        )  # fmt: skip
        step = InStep(place, incoming.opening.geometry, permit, resized=is_resized(target, incoming, request.dry_run))
        sink = _Sink(step, dry_run=request.dry_run)
        with incomplete(step):
            watched = checked(context, source)
            read_bytes, settled = read_all(source, seen, sink, request, watched)
            place.flush()
            if request.verify and not request.dry_run:
                verified = step.prove(context)
    unread = united(sink.unread)
    return Report(
        source=seen.device.label, target=request.target, host="", method=method, mode=seen.mode,
        dry_run=request.dry_run, device_bytes=seen.device.size, target_bytes=target.size if target else 0,
        block_bytes=request.block_bytes, read_bytes=read_bytes, differing_bytes=step.differing_bytes,
        moved_bytes=step.written_bytes, written_bytes=step.written_bytes, zeroed_bytes=step.zeroed_bytes,
        verified_bytes=verified, root=step.known.root, consistency=settled.consistency, unreadable=unread,
        seconds=round(context.timer() - clock, 3), notes=[*notes, *settled.notes],
        attention=settled.attention or bool(unread),
    )  # fmt: skip
