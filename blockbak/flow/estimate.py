"""Estimates what a policy will cost for a source: by the points that there are of it, or by a sample that is read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta, tzinfo
from itertools import pairwise

import numpy as np

from blockbak.errors import BlockbakError, SourceEmpty
from blockbak.flow.context import Context
from blockbak.flow.source import look_at
from blockbak.host import clock
from blockbak.host import device as devices
from blockbak.host.blockio import PIECE_BYTES, SourceReader, aligned
from blockbak.host.device import Device
from blockbak.host.system import System
from blockbak.image import codec
from blockbak.image.format import BLOCK_DEFAULT, window_for
from blockbak.model import estimate, hashmap
from blockbak.model.estimate import Before, Sample, Span
from blockbak.model.retention import Policy
from blockbak.model.schedule import Kinds
from blockbak.repository.local import Repository
from blockbak.units import DAY, MIB, SECTOR

WINDOWS = 400
"""Of a sample: enough for a few percent, and read in seconds from a slow disk."""
_STRETCH_BYTES = 64 * MIB
"""Read in one go, for the speed of the disk."""
_HORIZONS = (("month", 30), ("year", 365))
_LEAST_UPTIME = 3600.0
_ASSUMED = Span(0.001, 0.01, 0.05)
"""Share of a volume that changes in a day, where nothing is known of it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is thought of: the source, when points of it are to be made, what is kept of them (None: all) and how they
    are compressed. ``day_share`` is the share that changes in a day, where a person knows it.
    """

    source: str
    kinds: Kinds = field(default_factory=Kinds)
    policy: Policy | None = None
    compress: str = "zstd"
    day_share: float | None = None
    job: str = ""


@dataclass(frozen=True, slots=True)
class Growth:
    """How many points there will be after so many days, and the bytes that they take; ``at_most_bytes`` while a merge
    goes on.
    """

    days: int
    points: int
    bytes: Span
    at_most_bytes: Span


@dataclass(frozen=True, slots=True)
class Report:
    """What it will cost, in bytes and seconds. ``basis`` is ``history`` or ``sample``, ``change`` where the share that
    changes comes from: ``history``, ``told``, ``written`` (the kernel's counters) or ``assumed``. ``incremental_bytes``
    are of a usual gap between two points. ``snapshot_bytes`` is None for what is not a logical volume. ``free_bytes``
    is the repository's, None without one; ``fits`` whether the year's most does.
    """

    job: str
    source: str
    volume: str
    basis: str
    change: str
    device_bytes: int
    full_bytes: Span
    full_seconds: Span
    incremental_bytes: Span
    incremental_seconds: Span
    day_share: Span
    snapshot_bytes: Span | None
    growth: list[Growth]
    free_bytes: int | None
    fits: bool | None
    notes: list[str] = field(default_factory=list)


def plan(wish: Wish, repository: Repository | None, zone: tzinfo, context: Context) -> Report:
    """The costs of a wish. Raises NoSuchSource, NotABlockSource, NoPermission, SourceEmpty, SourceVanished and
    Interrupted; what is wrong with the repository is a note.
    """
    device = look_at(wish.source)
    if not device.size:
        raise SourceEmpty(path=device.path)
    notes: list[str] = []
    name, past = _history(device, repository, context, notes)
    basis = change = "history"
    volume = estimate.from_past(past) if wish.day_share is None else None
    if volume is None:
        share, change = day_share(device, wish, notes)
        volume = estimate.from_past(past, share)
    if volume is None:
        basis = "sample"
        volume = estimate.from_sample(device.size, sample(device, wish.compress, context), share)
    now = context.now()
    longest = now + timedelta(days=max(days for _, days in _HORIZONS))
    policy = wish.policy
    made = estimate.runs(wish.kinds, policy.full_every if policy else 0.0, now, longest, zone)
    growth = []
    for _, days in _HORIZONS:
        at = now + timedelta(days=days)
        there = estimate.kept(made, policy, at)
        most = estimate.most_room(volume, made, policy, at)
        growth.append(Growth(days, len(there), estimate.room(volume, there), most))
    free = _free(repository)
    usual = _usual_gap([(b.moment - a.moment).total_seconds() for a, b in pairwise(made)])
    if len(made) == estimate.RUNS_MAX:
        notes.append(f"Only the first {estimate.RUNS_MAX} runs were gone through.")
    return Report(
        job=wish.job, source=device.label, volume=name, basis=basis, change=change, device_bytes=device.size,
        full_bytes=volume.full_bytes, full_seconds=volume.full_seconds, incremental_bytes=volume.delta_bytes(usual),
        incremental_seconds=volume.delta_seconds, day_share=volume.day_share,
        snapshot_bytes=estimate.snapshot_room(volume, full=True) if device.is_lv else None, growth=growth,
        free_bytes=free, fits=None if free is None else growth[-1].at_most_bytes.high <= free, notes=notes,
    )  # fmt: skip


def _usual_gap(gaps: Sequence[float]) -> float:
    return float(np.median(gaps)) if gaps else DAY


def _free(repository: Repository | None) -> int | None:
    if repository is None:
        return None
    about = os.statvfs(repository.path)
    return about.f_bavail * about.f_frsize


# --- by the points there are --------------------------------------------------------------------------------------


def _history(
    device: Device, repository: Repository | None, context: Context, notes: list[str]
) -> tuple[str, list[Before]]:
    """The volume of this device, or an empty name, and what the history tells of the points that were made of it."""
    if repository is None:
        return "", []
    identity = devices.identity(device)
    try:
        for volume in repository.volumes():
            catalog = volume.catalog()
            if catalog.images and catalog.images[-1].opening.is_of(identity, context.host):
                return volume.name, estimate.of_history(repository.record.entries(), volume.name)
    except BlockbakError as error:
        notes.append(f"The repository tells nothing of it: {error}")
    return "", []


# --- by a sample -----------------------------------------------------------------------------------------------------


def sample(device: Device, compress: str, context: Context) -> Sample:
    """Read windows from all over the device, one somewhere in each of as many equal parts, and compress them. Raises
    what opening a source raises, SourceVanished, Interrupted.
    """
    window = window_for(device.size, BLOCK_DEFAULT)
    whole = max(device.size // window, 1)
    count = min(WINDOWS, whole)
    dice = np.random.default_rng(int(context.hex_id(16), 16))
    edges = np.linspace(0, whole, count + 1)
    picks = np.minimum((edges[:-1] + dice.random(count) * np.diff(edges)).astype(np.int64), whole - 1)
    encoder, buffer = codec.encoder(compress), aligned(PIECE_BYTES)
    stored, data = np.zeros(count), np.zeros(count, bool)
    packing = packed = 0.0
    with SourceReader(device.path, exclusive=False, kernel=context.kernel) as reader:
        context.progress.begin(f"{device.label} sample", count * window + min(_STRETCH_BYTES, device.size))
        try:
            rate = _read_rate(reader, buffer, context)
            for number, pick in enumerate(picks.tolist()):
                context.check()
                start = pick * window
                length = min(window, device.size - start)
                reader.read(start, buffer, length)
                content = buffer[:length]
                data[number] = hashmap.nonzero_blocks(content, BLOCK_DEFAULT).any()
                if data[number]:
                    begin = context.timer()
                    stored[number] = sum(map(len, encoder.encode(memoryview(content))))
                    packing += context.timer() - begin
                    packed += length
                context.progress.advance(length)
        finally:
            context.progress.end()
    speed = packed / packing * len(os.sched_getaffinity(0)) if packing > 0 else float("inf")
    return Sample(window, stored, data, rate, speed)


def _read_rate(reader: SourceReader, buffer: hashmap.Bytes, context: Context) -> float:
    """Bytes a second of a stretch at the middle."""
    length = min(_STRETCH_BYTES, reader.size)
    start = (reader.size - length) // 2 // PIECE_BYTES * PIECE_BYTES
    begin, done = context.timer(), 0
    while done < length:
        context.check()
        part = min(PIECE_BYTES, length - done, reader.size - start - done)
        reader.read(start + done, buffer, part)
        done += part
        context.progress.advance(part)
    return length / max(context.timer() - begin, 1e-6)


def day_share(device: Device, wish: Wish, notes: list[str]) -> tuple[Span, str]:
    """The share of a device that changes in a day, and where that is from."""
    if wish.day_share is not None:
        return Span(wish.day_share, wish.day_share, wish.day_share), "told"
    system = System()
    fields = system.attribute(device.kname, "stat").split() if device.is_block else []
    uptime = clock.uptime()
    if len(fields) > 6 and uptime >= _LEAST_UPTIME and int(fields[6]):
        most = min(int(fields[6]) * SECTOR / device.size * DAY / uptime, 1.0)
        notes.append(
            "How much changes is told by what the kernel wrote to it since the boot: places that are written again "
            "and again count each time, so it is less."
        )
        return Span(most / 20, most / 3, most), "written"
    notes.append("How much changes in a day is not known, and is taken for 1 % (0.1 to 5 %); --change tells it.")
    return _ASSUMED, "assumed"
