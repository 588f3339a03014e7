"""Brings a point back onto a device or into a file, and reads it back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from blockbak.errors import ATTENTION, BadTarget, BlockbakError, Damage, DamagedImage, Interrupted
from blockbak.flow import grow
from blockbak.flow.context import Context, never
from blockbak.flow.into_lvm import NewVolume, new_volume, plan_volume, pool_of, taken, twin_notes
from blockbak.flow.mapfile import Mapfile, mapfile
from blockbak.flow.part import find_partition, whole
from blockbak.flow.points import Opened, find, newer_orphans, open_point, open_reader
from blockbak.flow.recording import from_root, recorded
from blockbak.flow.target import Incoming, check_target, existing, is_itself, look_at_target, new_file
from blockbak.flow.writing import PointContent, Writing, mostly_equal, read_back, write_all
from blockbak.host import volumes
from blockbak.host.blockio import TargetWriter
from blockbak.host.device import Device
from blockbak.host.volumes import PoolWatch
from blockbak.image.reader import ImageReader
from blockbak.image.view import Flaw, PointView, Summary
from blockbak.model import extent
from blockbak.model.chain import Image, Point
from blockbak.model.extent import BAD, Extents
from blockbak.model.gpt import Growth
from blockbak.model.part import Part
from blockbak.model.partition import Partition
from blockbak.repository.local import Catalog, Repository, Volume


@dataclass(frozen=True, slots=True)
class Request:
    """What a person asked for. ``overwrite`` stands for ``--yes``. ``create_lv`` (``vg/lv``) is made instead of
    writing to ``target``, in ``thin_pool`` of its group where that is named. ``partition`` is the number of the one
    to be restored (0: the whole volume), ``grow`` moves the GPT's backup to the end of a larger target.
    """

    point: str
    target: str
    overwrite: bool = False
    verify: bool = True
    verify_first: bool = False
    keep_going: bool = False
    mapfile: str | None = None
    create_lv: str | None = None
    thin_pool: str | None = None
    partition: int = 0
    grow: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What a restore will do. ``method`` is ``create`` (a new file or volume), ``write`` (everything) or
    ``differ`` (read the target, write what differs). ``created_lv`` is the logical volume to be made, of
    ``target_bytes``, ``thin_pool`` the pool it comes out of. ``partition`` is the one that is restored (None: the
    whole volume), and ``device_bytes`` then its size. ``grow``: the GPT's backup is moved. ``damage`` is what would
    stop it without ``keep_going``, else empty.
    """

    point: str
    volume: str
    images: list[str]
    target: str
    target_bytes: int
    device_bytes: int
    data_bytes: int
    bad_bytes: int
    method: str
    created_lv: str = ""
    thin_pool: str = ""
    notes: list[str] = field(default_factory=list)
    damage: str = ""
    partition: Partition | None = None
    grow: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What a restore did. ``flaws`` and ``unreadable`` are ranges of the target that are zeros instead of
    content: damaged in the repository, or never read from the source.
    """

    plan: Plan
    written_bytes: int
    verified_bytes: int
    flaws: list[Flaw]
    unreadable: list[dict[str, int]]
    mapfile: str
    seconds: float

    @property
    def lost_bytes(self) -> int:
        """Bytes that are zeros on the target instead of content."""
        flaws = [(flaw.start, flaw.start + flaw.length) for flaw in self.flaws]
        unread = [(row["start"], row["start"] + row["length"]) for row in self.unreadable]
        tables = [extent.table([a for a, _ in pairs], [b for _, b in pairs], BAD) for pairs in (unread, flaws)]
        return extent.total(extent.overlay(*tables))

    @property
    def attention(self) -> bool:
        """Something a person must look at."""
        return bool(self.flaws or self.unreadable or self.plan.damage)


# --- the plan --------------------------------------------------------------------------------------


def _surviving(view: PointView) -> Summary:
    """What a walk over a damaged point's index sees: sections that cannot be read are left out."""
    stored, bad = 0, [extent.empty()]
    for number in range(view.geometry.sections):
        with contextlib.suppress(Damage):
            section = view.section(number)
            stored += int(np.count_nonzero(section.stored)) * view.geometry.block_bytes
            bad.append(extent.of_kind(section.extents, BAD))
    return Summary(min(stored, view.geometry.device_bytes), extent.coalesce(np.concatenate(bad)))


def _method(wanted: _Wanted, target: Device | None, pool: PoolWatch | None, context: Context) -> str:
    """How the target will be written."""
    if target is None:
        return "create"
    if pool is not None:
        return "differ"  # zeros that are written where a thin volume holds nothing would take room
    if is_itself(target, wanted.incoming, context, surely=False):
        return "differ"
    with TargetWriter(target.path, kernel=context.kernel) as opened:
        return "differ" if mostly_equal(wanted.opened.view, wanted.part, opened) else "write"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is restored: the point, opened; the part of it, and the partition that this is (None: the whole volume)."""

    opened: Opened
    part: Part
    partition: Partition | None = None
    notes: tuple[str, ...] = ()

    @property
    def incoming(self) -> Incoming:
        """It, as what is to lie on a target."""
        return Incoming.of(self.opened.view, self.part)

    @property
    def bad(self) -> Extents:
        """BAD extents, in bytes of the part."""
        return self.part.own(self.opened.summary.bad)


def _wanted(opened: Opened, number: int) -> _Wanted:
    """The partition of that number, or all. Raises NoSuchPartition, Damage."""
    if not number:
        return _Wanted(opened, whole(opened.view))
    found, table = find_partition(opened.view, number)
    return _Wanted(opened, Part(found.start, found.length, number), found, table.notes)


def _data_bytes(wanted: _Wanted) -> int:
    """Bytes of the part that are stored."""
    view, part = wanted.opened.view, wanted.part
    if wanted.partition is None:
        return wanted.opened.summary.stored_bytes
    total = 0
    for number in range(part.start // view.geometry.section_bytes, view.geometry.sections):
        start, end = view.geometry.section_range(number)
        if start >= part.end:
            break
        with contextlib.suppress(Damage):  # only where the restore goes on without it
            section = view.section(number)
            kinds = np.where(section.stored, np.uint8(extent.DATA), np.uint8(extent.ABSENT))
            total += extent.total(part.own(extent.from_blocks(kinds, start, view.geometry.block_bytes, end)))
    return total


def _plan(
    wanted: _Wanted, request: Request, target: Device | None, new: NewVolume | None, method: str,
    growth: Growth | None, context: Context,
) -> Plan:  # fmt: skip
    opened, part = wanted.opened, wanted.part
    opening, notes = opened.view.top.opening, list(wanted.notes)
    if target is not None and is_itself(target, wanted.incoming, context, surely=True):
        itself = "the partition" if part.partition else "the volume"
        notes.append(f"The target is {itself} itself: it is rolled back.")
    elif target is not None:
        notes += twin_notes(target, wanted.incoming)
    if target is not None and target.is_block and target.size > part.length and growth is None:
        notes.append(f"The target is larger by {target.size - part.length} bytes; they are left alone.")
    if target is not None and not target.is_block and target.size > part.length:
        notes.append(f"The file is longer by {target.size - part.length} bytes; they are cut off.")
    if target is not None and target.is_block:
        notes += _doubts(opened, target.logical_sector)
    else:
        notes += _doubts(opened, new.logical_sector if new else 0)
    bad = extent.total(wanted.bad)
    if bad:
        notes.append(f"{bad} bytes could not be read from the source; they become zeros.")
    if opened.damage is not None:
        notes.append(f"Damage was passed over: {opened.damage}")
    return Plan(
        point=opening.point, volume=opening.volume, images=[image.file for image in opened.chain],
        target=new.label if new else request.target,
        target_bytes=new.size if new else target.size if target else 0, device_bytes=part.length,
        data_bytes=_data_bytes(wanted), bad_bytes=bad, method=method,
        created_lv=new.label if new else "", thin_pool=f"{new.group}/{new.pool}" if new and new.pool else "",
        notes=notes, damage=str(opened.damage or ""), partition=wanted.partition, grow=growth is not None,
    )  # fmt: skip


def _growth(
    wanted: _Wanted, request: Request, target: Device | None, new: NewVolume | None
) -> tuple[Growth | None, list[str]]:
    """What moves the GPT's backup, where that was asked for, and what to say of it; else an offer, where it would do
    something. Raises BadTarget, CannotGrow.
    """
    view, path = wanted.opened.view, new.label if new else request.target
    room = new.size if new else target.size if target is not None and target.is_block else 0
    if not request.grow:
        return None, grow.offer(view, room) if wanted.partition is None and room > wanted.part.length else []
    if not room:
        raise BadTarget(path=path, reason="--grow is for a device: a file gets just the volume's size")
    return grow.plan_growth(view, room, path)


def _doubts(opened: Opened, sector: int) -> list[str]:
    """What whoever restores should know of the point, and was told to somebody else when it was made."""
    opening, closing = opened.view.top.opening, opened.view.top.closing
    notes = []
    if closing.hooks:
        # PostgreSQL's backup_label may be there: a server that starts without it is damaged, and does not say so.
        where = f"'blockbak show {opening.volume}@{opening.point}'"
        notes.append(f"A hook left words with this point: read {where} before its application is started.")
    if closing.set_id:
        notes.append(f"It is of one instant with the other points of set {closing.set_id}: restore those too.")
    if closing.consistency == "none":
        notes.append("The source was in use or written while it was read: the point may be torn.")
    if sector and sector != opening.logical_sector:
        notes.append(f"The point is of {opening.logical_sector}-byte sectors, the target has {sector}.")
    return notes


def _open_damaged(volume: Volume, catalog: Catalog, point: Point, stack: ExitStack) -> Opened:
    """For ``--keep-going``: the point as whole as it can be had, from the images that open at all."""
    try:
        return open_point(volume, catalog, point, stack)
    except Damage as error:
        found: list[Opened] = []
        for image in point.images:
            with contextlib.suppress(Damage):
                found.append(_open_remains(volume, _remains(image, catalog), stack))
        if not found:
            raise error from None
        most = max(found, key=lambda one: (one.view.complete, one.summary.stored_bytes))
        return replace(most, damage=error)


def _open_remains(volume: Volume, chain: Sequence[Image], stack: ExitStack) -> Opened:
    """As much of a chain as opens, from its top on down. Raises Damage where not even the top does."""
    layers: list[ImageReader] = []
    for image in reversed(chain):
        try:
            layers.insert(0, open_reader(volume, image, stack))
        except Damage:
            if not layers:
                raise
            break  # below it nothing is certain: what the newer images do not hold is lost
    view = PointView(layers)
    return Opened(view, list(chain[-len(layers) :]), _surviving(view))


def _remains(top: Image, catalog: Catalog) -> list[Image]:
    """The images from the nearest full, or the first gap, up to one of the point."""
    by_key = {image.key: image for image in catalog.images}
    at: Image | None = top
    chain: list[Image] = []
    while at is not None:
        chain.insert(0, at)
        at = by_key.get((at.opening.parent or "", at.opening.parent_root or ""))
    return chain


def restore(repository: Repository, request: Request, context: Context, *, dry_run: bool = False) -> Plan | Report:
    """Restore a point; with ``dry_run`` only say how. Raises Damage before the first byte is written for
    everything but a frame's content, NoSuchPartition, Refused for a target that must not be written, NoVolumeRoom,
    PoolFilling, TargetFailed, VerificationFailed, Interrupted.
    """
    if dry_run:
        return bring_back(repository, request, context, dry_run=True)
    target = request.create_lv or from_root(request.target)
    with recorded(repository, "restored", context, asked=request.point, target=target) as doing:
        done = bring_back(repository, request, context)
        assert isinstance(done, Report)  # noqa: S101 - only a dry run gives a plan
        doing.volume, doing.points = done.plan.volume, [done.plan.point]
        doing.exit = ATTENTION if done.attention else 0
        doing.facts |= {
            "device_bytes": done.plan.device_bytes, "written_bytes": done.written_bytes,
            "verified_bytes": done.verified_bytes, "lost_bytes": done.lost_bytes, "partition": request.partition,
        }  # fmt: skip
    return done


def bring_back(repository: Repository, request: Request, context: Context, *, dry_run: bool = False) -> Plan | Report:
    """``restore``, for a use-case that notes itself what it does."""
    from blockbak.flow.verify import check_frames

    clock = context.timer()
    volume, _, _ = find(repository, request.point)
    with ExitStack() as stack:
        lock = stack.enter_context(
            volume.locked(exclusive=False, wait=context.wait, check=context.check, say=context.say)
        )
        volume, catalog, point = find(repository, request.point)
        opener = _open_damaged if request.keep_going else open_point
        opened = opener(volume, catalog, point, stack)
        view, wanted = opened.view, _wanted(opened, request.partition)
        part = wanted.part
        target, new, pool = None, None, None
        if request.create_lv is not None:
            new = plan_volume(request.create_lv, request.thin_pool or "", view, part, context)
        else:
            target = look_at_target(request.target)
            overwrite = request.overwrite or dry_run
            check_target(request.target, target, wanted.incoming, repository, context, overwrite=overwrite)
            if target is not None:
                pool = pool_of(target, lambda unit: taken(view, unit, part), request.target, context)
        method = _method(wanted, target, pool, context)
        growth, told = _growth(wanted, request, target, new)
        planned = _plan(wanted, request, target, new, method, growth, context)
        planned.notes.extend(told)
        planned.notes.extend(newer_orphans(volume, catalog, point, request.point))
        if dry_run:
            return planned
        if request.verify_first:
            check_frames(view, context)
        job = _Restoring(repository, request, wanted, target, new, pool, planned, growth)
        return _carry_out(job, context, clock + lock.waited)


@dataclass(frozen=True, slots=True)
class _Restoring:
    """A restore that was planned: what of which point, the target as it was looked at (None: a file or volume to be
    made) and, where it is thin, its pool; where; what is done to the GPT in the end.
    """

    repository: Repository
    request: Request
    wanted: _Wanted
    target: Device | None
    new: NewVolume | None
    pool: PoolWatch | None
    planned: Plan
    growth: Growth | None

    @property
    def path(self) -> str:
        """What is opened: links are followed once, when the target is looked at."""
        if self.new is not None:
            return self.new.label
        return self.target.path if self.target else os.path.realpath(self.request.target)

    @property
    def view(self) -> PointView:
        """The point."""
        return self.wanted.opened.view

    @property
    def part(self) -> Part:
        """What of the volume is restored."""
        return self.wanted.part


def _carry_out(job: _Restoring, context: Context, clock: float) -> Report:
    path, part, request, planned = job.path, job.part, job.request, job.planned
    bad, method = job.wanted.bad, planned.method
    pools = [job.pool] if job.pool is not None else []
    with ExitStack() as stack:
        lost = stack.enter_context(_mapfile(job)) if request.keep_going else None
        target = stack.enter_context(_open(job, context, pools))
        if job.target is not None and job.target.is_lv:
            # Whoever names what an unfinished restore left wants to keep it.
            volumes.adopt(job.target.lv_uuid)
        # What is new and yet not blank holds what others left there.
        blank = method == "create" and (job.new is None or job.new.blank)
        writing = "create" if blank else "differ" if method == "differ" else "write"
        permit = pools[0].check if pools else never
        content = PointContent(job.view, part, keep_going=request.keep_going)
        shared = Writing(content, target, writing, context, part=part, permit=permit)
        try:
            verified = _fill(content, shared, request, context)
        except Interrupted as error:
            if method == "create":
                raise
            raise Interrupted(state=f"{path} is not to be used (written: {shared.written_ranges()})") from error
        except BlockbakError as error:
            if method != "create":
                # Damage tells itself what was written.
                so_far = "" if isinstance(error, DamagedImage) else f" (written: {shared.written_ranges()})"
                error.add_note(f"{path} is not to be used as it is now{so_far}.")
            raise
        if job.growth is not None:
            grow.grow(job.growth, target)
        flaws = [replace(flaw, start=flaw.start - part.start) for flaw in shared.flaws]
        flaws.sort(key=lambda flaw: flaw.start)
        if lost is not None and (flaws or len(bad)):
            lost.write(flaws, bad, part.length)
    if job.new is not None and flaws:
        planned.notes.append(f"{path} is kept, and is incomplete.")
    return Report(
        planned, shared.written_bytes, verified, flaws,
        [{"start": int(row["start"]), "length": int(row["length"])} for row in bad],
        lost.path if lost is not None and lost.written else "", round(context.timer() - clock, 3),
    )  # fmt: skip


def _open(job: _Restoring, context: Context, pools: list[PoolWatch]) -> AbstractContextManager[TargetWriter]:
    """The target, open; the pool that it takes its room from is in ``pools`` then."""
    if job.new is not None:
        return new_volume(job.new, job.view, job.part, context, pools.append)
    if job.target is None:
        return new_file(job.path, job.part.length, context, overwrite=job.request.overwrite)
    return existing(job.request.target, job.target, job.wanted.incoming, job.repository, context)


def _mapfile(job: _Restoring) -> AbstractContextManager[Mapfile]:
    is_device = job.new is not None or (job.target is not None and job.target.is_block)
    beside = job.planned.point if is_device else job.path
    return mapfile(job.request.mapfile, job.path, f"{beside}.mapfile", job.repository)


def _fill(content: PointContent, shared: Writing, request: Request, context: Context) -> int:
    """Write everything, flush it, read it back; bytes compared."""
    write_all(shared, context)
    shared.target.flush()
    return read_back(content, shared, context) if request.verify else 0
