"""Makes one restore point of one source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TypeAlias

from blockbak.errors import (
    ATTENTION,
    BadBlockSize,
    BlockbakError,
    Damage,
    DamagedImage,
    DamagedRawImage,
    Gap,
    Interrupted,
    NewerFormat,
    NotTogether,
    NoUsableParent,
    SourceTwice,
)
from blockbak.flow.cold import planned as planned_rest
from blockbak.flow.cold import resting
from blockbak.flow.context import Context, iso
from blockbak.flow.hot import HotOptions, Member, Waiting, consistency, foreseen, snapshots
from blockbak.flow.leftovers import settle_known
from blockbak.flow.points import damage_since, highest_sequence, open_chain
from blockbak.flow.scan import scan
from blockbak.flow.source import AtRest, Request, Seen, Settled, Source, look, look_at, resolve_mode
from blockbak.flow.used import Unused, find_unused, require
from blockbak.host.lock import Lock
from blockbak.image.format import BLOCK_DEFAULT, BLOCK_MAX, BLOCK_MIN, window_for
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter
from blockbak.model.chain import POINT_CHARS, Image, Point, plan
from blockbak.model.extent import BAD
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL, Closing, Kind, Opening
from blockbak.model.identity import Identity, ending, plain
from blockbak.repository.local import Catalog, Repository, Volume

_SOURCE_MAX = 1000
"""Characters of the source's path that the header repeats, for people."""


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
    set_id: str = ""
    hole_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    attention: bool = False

    @property
    def facts(self) -> dict[str, object]:
        """What the history says of it."""
        return {
            "kind": self.kind, "parent": self.parent, "sequence": self.sequence, "file": self.file,
            "stored_bytes": self.stored_bytes, "changed_bytes": self.changed_bytes, "read_bytes": self.read_bytes,
            "device_bytes": self.device_bytes, "bad_bytes": self.bad_bytes, "mode": self.mode,
            "consistency": self.consistency, "source": self.source,
        }  # fmt: skip


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
    """The kind to make and the parent it needs. ``broken`` says why there are points that cannot be used, or why there
    is none.

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


# --- the use-case ----------------------------------------------------------------------------------


@contextmanager
def _parent_view(
    volume: Volume, catalog: Catalog, choice: Choice, request: Request, context: Context
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
                    view = open_chain(volume, _parent_chain(volume, catalog, choice.parent, context), stack)
                    view.check()
            except (Damage, NewerFormat) as damage:
                view, error = None, damage
            if error is not None:
                reason = f"the last {'full' if fulls else 'point'} cannot be used: {_clause(error)}"
                choice = without_parent(request.kind, volume.name, reason)
        yield choice, view


def _parent_chain(volume: Volume, catalog: Catalog, parent: Point, context: Context) -> Sequence[Image]:
    """The chain that the new point will stand on. Raises Gap, and DamagedImage where every chain has an image that was
    damaged when last verified: nothing that stands on it could be restored.
    """
    bad = volume.found_damaged(context.say)
    chain = plan(parent, catalog.images)
    found = next((image.file for image in chain if image.file in bad), None)
    if found is None:
        return chain
    try:
        return plan(parent, catalog.images, bad)
    except Gap:
        raise DamagedImage(file=found, reason="that was found when it was last verified") from None


Result: TypeAlias = Report | BlockbakError


def backup_all(
    repository: Repository,
    requests: Sequence[Request],
    context: Context,
    tell: Callable[[Result], None],
    *,
    hot: HotOptions | None = None,
    dry_run: bool = False,
) -> None:
    """Make a point of each source, and tell each outcome as it comes: all are tried, but after Interrupted.

    With hooks, or together, the snapshots of all hot sources are made before the first is read.
    """
    hot = hot or HotOptions()
    if not dry_run:
        try:
            for line in settle_known(context, [request.source for request in requests]).told:
                context.say(line)
        except BlockbakError as error:
            # What somebody else left is no reason to do without a backup.
            context.say(f"What an earlier run left on the machine could not be cleared away: {error}")
    waiting: list[Request] = []
    for request in requests:
        try:
            context.check()
            if hot.together or (len(requests) > 1 and _is_hot(request) and hot.has_hooks()):
                waiting.append(request)
                continue
            result: Result = backup(repository, request, context, hot=hot, dry_run=dry_run)
        except BlockbakError as error:
            result = error
        tell(result)
        if isinstance(result, Interrupted):
            return
    if waiting:
        _backup_group(repository, waiting, hot, context, tell, dry_run=dry_run)


def _is_hot(request: Request) -> bool:
    device = look_at(request.source)
    return device.is_lv and resolve_mode(device, request.mode) == "hot"


def backup(
    repository: Repository,
    request: Request,
    context: Context,
    *,
    hot: HotOptions | None = None,
    dry_run: bool = False,
) -> Report:
    """Make one point. Raises every error of the source, repository, damage, snapshot and refusal trees."""
    results: list[Result] = []
    _backup_group(repository, [request], hot or HotOptions(), context, results.append, dry_run=dry_run)
    (result,) = results
    if isinstance(result, BlockbakError):
        raise result
    return result


@dataclass(slots=True)
class Held:
    """A volume that is locked, and the source whose point it gets."""

    request: Request
    seen: Seen
    volume: Volume
    lock: Lock


def _backup_group(
    repository: Repository,
    requests: Sequence[Request],
    hot: HotOptions,
    context: Context,
    tell: Callable[[Result], None],
    *,
    dry_run: bool,
) -> None:
    """Points of sources that are all held before the first is read. A set that is taken together is told one
    error, and no point is made; otherwise each source has its own outcome.
    """
    if dry_run:
        _plan_group(repository, requests, hot, context, tell)
        return
    clock = context.timer()
    noted = _Noted(repository, context, tell)
    with ExitStack() as stack:
        held: list[Held] = []
        for request in requests:
            try:
                held.append(_hold(repository, request, context, stack, held))
                if hot.together:
                    _check_member(held[-1].seen)
            except BlockbakError as error:
                noted.failed(error, [request] if not hot.together else requests, clock)
                if hot.together or isinstance(error, Interrupted):
                    return
        try:
            waited = sum(one.lock.waited for one in held)
            _read_held(repository, held, hot, clock + waited, context, noted)
        except BlockbakError as error:
            noted.failed(error, held, clock)


@dataclass(frozen=True, slots=True)
class _Noted:
    """Tells each outcome, once the history has a line of it."""

    repository: Repository
    context: Context
    tell: Callable[[Result], None]

    def made(self, report: Report) -> None:
        """A point. Where the history could not be written, somebody must look at that."""
        missing = self.repository.record.append(
            "made", self.context, volume=report.volume, points=[report.point],
            exit=ATTENTION if report.attention else 0, seconds=report.seconds, facts=report.facts,
        )  # fmt: skip
        if missing:
            report = replace(report, notes=[*report.notes, missing], attention=True)
        self.tell(report)

    def failed(self, error: BlockbakError, of: Sequence[Held | Request], clock: float) -> None:
        """No point of any of these, since ``clock``."""
        for one in of:
            volume, request = (one.volume.name, one.request) if isinstance(one, Held) else ("", one)
            self.repository.record.append(
                "made", self.context, volume=volume, exit=error.exit_code, error=error.name,
                seconds=self.context.timer() - clock, facts={"source": request.source},
            )  # fmt: skip
        self.tell(error)


def _plan_group(
    repository: Repository,
    requests: Sequence[Request],
    hot: HotOptions,
    context: Context,
    tell: Callable[[Result], None],
) -> None:
    """What would be done for each source, and all snapshots at once."""
    planned: list[tuple[Seen, Report]] = []
    for request in requests:
        try:
            _check_request(request)
            seen = look(repository, request, context)
            _check_once(seen, [one for one, _ in planned])
            if hot.together:
                _check_member(seen)
            planned.append((seen, _planned(repository, seen, request, context)))
        except BlockbakError as error:
            tell(error)
            if hot.together:
                return
    members = [Member(seen, "") for seen, _ in planned if seen.mode == "hot"]
    try:
        rooms = iter(foreseen(members, hot, repository.path, context.state_dir) if members else ())
    except BlockbakError as error:
        tell(error)
        rooms, planned = iter(()), [(seen, made) for seen, made in planned if seen.mode != "hot"]
    for seen, made in planned:
        tell(replace(made, notes=[*made.notes, next(rooms)]) if seen.mode == "hot" else made)


def _check_once(seen: Seen, others: Sequence[Seen]) -> None:
    """All are locked at one time: the lock of one that is named again would be waited for by its own holder."""
    if any(seen.identity.same_as(other.identity) for other in others):
        raise SourceTwice(path=seen.device.label)


def _check_member(seen: Seen) -> None:
    if seen.mode != "hot":
        reason = "it is not in use: a cold image of it needs no other's company"
        raise NotTogether(volume=seen.device.label, reason=reason if seen.device.is_lv else "it is no logical volume")


def _check_request(request: Request) -> None:
    """Raises what can be known before the source is looked at: BadBlockSize, MissingProgram."""
    if request.block_bytes is not None:
        check_block_size(request.block_bytes)
    if request.used_only:
        require()


def _hold(repository: Repository, request: Request, context: Context, stack: ExitStack, others: Sequence[Held]) -> Held:
    """Look at a source, and lock its volume until ``stack`` is closed. Raises SourceTwice for one of the others."""
    _check_request(request)
    seen = look(repository, request, context)
    _check_once(seen, [one.seen for one in others])
    while True:
        volume = repository.make_volume(seen.name)
        with ExitStack() as holding:
            lock = holding.enter_context(
                volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say)
            )
            # While it was waited for, the source may have become another one, or in use; and another
            # identity may have taken a name that was free.
            again = look(repository, request, context)
            if again.name == seen.name:
                stack.push(holding.pop_all())
                return Held(request, again, volume, lock)
        seen = again


def _read_held(
    repository: Repository,
    held: Sequence[Held],
    hot: HotOptions,
    clock: float,
    context: Context,
    noted: _Noted,
) -> None:
    """The points of sources that are held: the hot ones from snapshots that are all made first."""
    members = [Member(one.seen, _newest(one.volume)) for one in held if one.seen.mode == "hot"]
    with ExitStack() as stack:
        sources = stack.enter_context(snapshots(members, hot, repository.path, context)) if members else ()
        waiting = Waiting(sources, context.say)
        context = replace(context, check=both(context.check, waiting.look))
        for one in held:
            left = ""
            if hot.freeze_with and one.seen.mode != "hot":
                label = one.seen.device.label
                context.say(f"{label} is taken {one.seen.mode}, not from a snapshot: no hook is run for it.")
            try:
                if one.seen.mode == "hot":
                    source = waiting.next()
                    try:
                        source.check()
                        report = make_point(repository, one, source, context)
                    finally:
                        left = source.release()
                else:
                    with _at_rest(one, repository, context) as source_at_rest:
                        report = make_point(repository, one, source_at_rest, context)
            except BlockbakError as error:
                if left:
                    error.add_note(left)
                noted.failed(error, [one], clock)
                if isinstance(error, Interrupted):
                    return
                continue
            if left:
                report = replace(report, notes=[*report.notes, left], attention=True)
            noted.made(replace(report, seconds=round(context.timer() - clock, 3)))
            clock = context.timer()


def _at_rest(held: Held, repository: Repository, context: Context) -> AbstractContextManager[AtRest]:
    """The source as it is; a cold device brought to rest first, where that was asked for."""
    seen, request = held.seen, held.request
    if seen.mode == "cold" and request.rest is not None and seen.device.is_block:
        return resting(seen, request, {repository.path: "the repository"}, context, request.rest)
    return closing(AtRest(seen, request, context))


def _newest(volume: Volume) -> str:
    points = volume.catalog().points
    return points[-1].id if points else ""


def make_point(repository: Repository, held: Held, source: Source, context: Context, root: str = "") -> Report:
    """Make one point in a volume that is held, of a source that is open. Its hash map must have the ``root`` that is
    given, if one is: else DamagedRawImage is raised, and there is no point.
    """
    request, volume, seen = held.request, held.volume, held.seen
    context = context.about(volume=volume.name)
    held.lock.claim(str(seen.identity))
    catalog = volume.catalog()
    for line in volume.tidy(catalog):
        context.say(line)
    for orphan in catalog.orphans:
        context.say(f"{orphan} has no manifest; 'blockbak recover' brings it back.")
    points = catalog.points
    choice = _choose(request, seen, points, catalog, volume.name, context)
    with _parent_view(volume, catalog, choice, request, context) as (chosen, view):
        sequence = highest_sequence(volume, catalog, held.lock) + 1
        # Durable before the image that carries it: it must not be used again, whatever becomes of the image.
        held.lock.remember(sequence)
        block = _block_bytes(request, view, points)
        return _make(_Making(repository, held, source, chosen, view, sequence, block, root), context)


def _choose(
    request: Request, seen: Seen, points: Sequence[Point], catalog: Catalog, name: str, context: Context
) -> Choice:
    broken = _broken(catalog)
    if not points and not broken and seen.before:
        broken = f"the volume has no point yet; {seen.before}"
    return choose(
        request.kind, points, seen.identity, context.host, seen.device.size, request.block_bytes, name, broken
    )


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


def _planned(repository: Repository, seen: Seen, request: Request, context: Context) -> Report:
    """What ``backup`` would do, without a byte written."""
    device, name = seen.device, seen.name
    points: list[Point] = []
    volume, catalog = None, Catalog()
    if name in repository.volume_names():
        volume = repository.volume(name)
        catalog = volume.catalog()
        points = catalog.points
    choice = _choose(request, seen, points, catalog, name, context)
    if volume is not None:
        with _parent_view(volume, catalog, choice, request, context) as (checked, _):
            choice = checked
    notes = [f"A full is made: {choice.reason}."] if choice.reason else []
    if request.used_only and seen.mode != "live":
        notes.append("What file systems do not use is not read: how much that is, partclone tells then.")
    if seen.mode == "cold" and request.rest is not None and device.is_block:
        notes += planned_rest(device, request.rest, [(repository.path, "the repository")], context)
    found = {"cold": "cold", "hot": consistency(device, hooked=False)}.get(seen.mode, "none")
    return Report(
        point="", volume=name, kind=choice.kind, synthetic=False,
        parent=choice.parent.id if choice.parent else None,
        sequence=points[-1].sequence + 1 if points else 1,
        mode=seen.mode, consistency=found, change_source="scan",
        device_bytes=device.size, read_bytes=device.size, changed_bytes=0, stored_bytes=0, bad_bytes=0,
        seconds=0.0, source=device.label, file="", root="", notes=notes,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Making:
    """A point that is about to be made in a volume that is held: of what, which kind, on which parent (None for
    a full). Its map must have the ``root``, where that is not empty.
    """

    repository: Repository
    held: Held
    source: Source
    choice: Choice
    parent: PointView | None
    sequence: int
    block_bytes: int
    root: str


def _opening(job: _Making, moment: datetime, context: Context) -> Opening:
    """What the header says."""
    reader, parent, seen = job.source.reader, job.parent, job.held.seen
    return Opening(
        repository=job.repository.id, image=context.hex_id(32), volume=job.held.volume.name,
        point=point_id(moment, context.hex_id, _taken(job.repository)),
        sequence=job.sequence, kind=job.choice.kind, synthetic=False,
        parent=parent.top.opening.point if parent else None,
        parent_root=parent.top.closing.root if parent else None,
        identity=seen.identity, device_bytes=reader.size, block_bytes=job.block_bytes,
        window_bytes=window_for(reader.size, job.block_bytes),
        logical_sector=reader.logical, physical_sector=reader.physical,
        created=iso(moment), source=ending(plain(seen.device.label), _SOURCE_MAX), host=context.host,
    )  # fmt: skip


def _read(job: _Making, writer: ImageWriter, context: Context) -> tuple[int, Settled]:
    """Read the source into the image; bytes that were read, and what is known of them now."""
    request, reader = job.held.request, job.source.reader
    unused = _unused(job, context) if request.used_only else Unused()
    reader.retries, reader.strict = request.retries, request.strict
    # An area that cannot be read may keep a worker for minutes.
    reader.doubt = both(reader.doubt, context.check)
    context.progress.begin(f"{job.held.volume.name} {job.choice.kind}", reader.size)
    try:
        read_bytes = scan(reader, writer, job.parent, request.compress, context, request.limit, unused.extents)
    finally:
        context.progress.end()
    settled = job.source.settle()
    return read_bytes, replace(settled, notes=[*unused.notes, *settled.notes])


def _unused(job: _Making, context: Context) -> Unused:
    """What need not be read of a source that is held."""
    seen = job.held.seen
    if seen.mode == "live":
        unused = Unused(notes=[f"All of {seen.device.label} is read: it may be written meanwhile."])
    else:
        frozen = seen.mode == "hot" and consistency(seen.device, hooked=False) == "filesystem"
        unused = find_unused(job.source.reader.path, seen.device.label, context.check, frozen=frozen)
    for line in unused.notes:
        context.say(line)
    return unused


def _make(job: _Making, context: Context) -> Report:
    """Read, write, seal and commit."""
    volume, kept = job.held.volume, job.source.circumstances
    notes = [f"A full is made: {job.choice.reason}."] if job.choice.reason else []
    for line in notes:
        context.say(line)
    started, clock = context.now(), context.timer()
    context = replace(context, check=both(context.check, job.source.check))
    opening = _opening(job, job.source.moment or started, context)
    context = context.about(volume=volume.name, point=opening.point)
    file = volume.free_name(opening.point, opening.kind)
    with volume.begin(file) as partial:
        writer = ImageWriter(partial, opening, job.parent.claimed_digests() if job.parent else None)
        read_bytes, settled = _read(job, writer, context)
        if job.root and writer.root != job.root:
            raise DamagedRawImage(file=job.source.reader.path, reason="it does not have its sidecar's root")
        counts = writer.counts
        notes += settled.notes
        if counts.by_kind[BAD]:
            notes.append(f"{counts.by_kind[BAD]} bytes could not be read.")
        context.check()
        facts = Closing(
            root=writer.root, mode=job.held.seen.mode, consistency=settled.consistency, change_source="scan",
            read_bytes=read_bytes, changed_bytes=counts.changed_bytes, **counts.by_name(), frames=counts.frames,
            started=iso(started), finished=iso(context.now()), seconds=round(context.timer() - clock, 3),
            program=context.program, notes=notes, set_id=kept.set_id, lvm_metadata=kept.lvm_metadata,
            hooks=kept.hooks,
        )  # fmt: skip
        size, digest = writer.finish(facts)
        # The image must be durable under its own name before a manifest names it.
        partial.seal()
        image = Image(file, size, digest, opening, facts, writer.listed)
        volume.commit(image)
    return replace(
        report(image),
        seconds=round(context.timer() - clock, 3),
        attention=settled.attention or facts.bad_bytes > 0,
    )


def both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    """One check of two."""

    def check() -> None:
        first()
        second()

    return check


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
        changed_bytes=closing.changed_bytes, stored_bytes=image.image_bytes,
        hole_bytes=closing.hole_bytes, bad_bytes=closing.bad_bytes, seconds=closing.seconds,
        source=opening.source, file=image.file, root=closing.root, set_id=closing.set_id, notes=list(closing.notes),
    )  # fmt: skip
