"""The jobs of the configuration: read, their sources found, and what of them is due."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from shutil import which

from blockbak.errors import (
    BadBlockSize,
    BadConfig,
    BlockbakError,
    NoCheckCommand,
    NoSourceFits,
    NoSuchJob,
)
from blockbak.flow.backup import check_block_size
from blockbak.flow.context import Context
from blockbak.flow.hot import HotOptions
from blockbak.flow.source import Request, look, look_at
from blockbak.host import clock, configfile, hooks, jobstate, notifier, selection
from blockbak.model import config as configs
from blockbak.model import retention, schedule
from blockbak.model.chain import Point, chains, moment_of_id
from blockbak.model.config import Config, Job, Problem, Selector, Unusable
from blockbak.model.events import Entry
from blockbak.model.facts import FULL, INCREMENTAL
from blockbak.model.schedule import Due, Made
from blockbak.repository.local import Catalog, Repository

# --- the configuration ----------------------------------------------------------------------------------------------


def load(path: str) -> Config:
    """The configuration in a file. Raises NoConfig, UnsafeConfig where others could have written it, and BadConfig with
    everything that is wrong noted on it.
    """
    text = configfile.read(path)
    try:
        config = configs.parse(text)
    except Unusable as error:
        raise bad(path, error.problems) from error
    if wrong := _beyond(config):
        raise bad(path, wrong)
    return config


def bad(path: str, problems: Sequence[Problem]) -> BadConfig:
    """The error for all of these, a line each."""
    error = BadConfig(path=path, count="one thing is" if len(problems) == 1 else f"{len(problems)} things are")
    for one in problems:
        error.add_note(f"{path}, {one}")
    return error


def _beyond(config: Config) -> list[Problem]:
    """What is wrong by what the format and this machine know, and the text alone does not tell."""
    wrong = []
    for name, job in config.jobs.items():
        try:
            if job.reading.block_bytes is not None:
                check_block_size(job.reading.block_bytes)
        except BadBlockSize as error:
            key = ("jobs", name, "block_size")
            wrong.append(Problem(config.lines[key], ".".join(key), str(error).removesuffix(".")))
    try:
        clock.zone(config.timezone)
    except BlockbakError as error:
        wrong.append(Problem(config.lines[("timezone",)], "timezone", str(error).removesuffix(".")))
    return wrong


def chosen(config: Config, names: Sequence[str]) -> list[Job]:
    """The jobs of these names, each once, in the order of the file; all where none is named. Raises NoSuchJob."""
    for name in names:
        if name not in config.jobs:
            raise NoSuchJob(job=name, there=", ".join(config.jobs) or "none")
    return [job for name, job in config.jobs.items() if not names or name in names]


# --- its sources ----------------------------------------------------------------------------------------------------


def sources(job: Job) -> tuple[list[str], list[BlockbakError]]:
    """What the job's sources are now, each once; and why some are not known. The rest is done all the same."""
    found: dict[str, None] = {}
    errors: list[BlockbakError] = []
    for one in job.sources:
        if not isinstance(one, Selector):
            found[one] = None
            continue
        try:
            fits = selection.found(one)
        except BlockbakError as error:
            errors.append(error)
            continue
        if not fits:
            errors.append(NoSourceFits(job=job.name, source=one))
        found.update(dict.fromkeys(fits))
    return list(found), errors


def request(job: Job, source: str, kind: str) -> Request:
    """What is asked for of one of its sources."""
    reading = job.reading
    rest = job.rest if job.mode == "cold" else None
    return Request(
        source, kind, job.mode, reading.name, reading.block_bytes, reading.compress, reading.limit,
        reading.own_repository, rest, retries=reading.retries, strict=reading.strict, used_only=reading.used_only,
    )  # fmt: skip


def hot_options(job: Job) -> HotOptions:
    """How its snapshots are made."""
    reading = job.reading
    return HotOptions(
        size=reading.snapshot_size, limit=reading.snapshot_limit, freeze_with=reading.freeze_with,
        freeze_seconds=reading.freeze_seconds, together=reading.together, together_seconds=reading.together_seconds,
    )  # fmt: skip


# --- what is due -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source of a job, the volume that it is ("" where it could not be looked at: trying it will tell why), and what
    of it is due.
    """

    source: str
    volume: str
    due: Due


def moment_of(point: Point) -> datetime:
    """When a point was what it is of."""
    return datetime.fromisoformat(point.images[0].opening.created)


def past(catalog: Catalog) -> list[Made]:
    """The points of a volume as far as what is due goes by them. One that only a composed image holds any more counts
    as an incremental: it is not a full that was read from the source.
    """
    found = []
    for point in catalog.points:
        own = next((image.opening.kind for image in point.images if not image.opening.synthetic), INCREMENTAL)
        found.append(Made(moment_of(point), own, point.has_full))
    return found


def newest_good(repository: Repository, volume: str) -> datetime | None:
    """When the newest point was made that a whole chain restores, of images that were not found damaged."""
    catalog = catalog_of(repository, volume)
    damaged = repository.volume(volume).found_damaged() if catalog.images else ()
    whole = chains(image for image in catalog.images if image.file not in damaged)
    good = [point for point in catalog.points if any(image.file in whole for image in point.images)]
    return moment_of(good[-1]) if good else None


def catalog_of(repository: Repository, volume: str) -> Catalog:
    """What a volume holds; nothing where it is not there yet."""
    return repository.volume(volume).catalog() if volume in repository.volume_names() else Catalog()


def wanted(job: Job, found: Sequence[str], repository: Repository, zone: tzinfo, context: Context) -> list[Wanted]:
    """What is due of each of these sources. Raises Damage, UnreadableStore and NoPermission of the repository."""
    try:
        entries = repository.record.entries()
    except BlockbakError as error:
        # The points tell nearly all, and whoever verifies is told.
        context.say(f"What is due is told without the history: {error}")
        entries = []
    return [_wanted(job, source, repository, entries, zone, context) for source in found]


def _wanted(
    job: Job, source: str, repository: Repository, entries: Sequence[Entry], zone: tzinfo, context: Context
) -> Wanted:
    try:
        volume = look(repository, request(job, source, "auto"), context).name
    except BlockbakError as error:
        # Whatever is due of it: only trying tells people that it cannot be had.
        return Wanted(source, "", Due(INCREMENTAL, f"it cannot be looked at ({str(error).removesuffix('.')})"))
    catalog, now = catalog_of(repository, volume), context.now()
    due = schedule.kind_due(job.kinds, past(catalog), now, zone, full=last_full(entries, volume))
    if job.retention is not None and due.kind not in ("", FULL):
        fulls = retention.checks(entries, volume).fulls
        if retention.full_due(catalog.points, job.retention, now, fulls):
            due = Due(FULL, f"{due.reason}; full_every: the last full of its own is too old")
    return Wanted(source, volume, due)


def last_full(entries: Sequence[Entry], volume: str) -> datetime | None:
    """When the newest full of a volume was read from its source, by the history: its image may be merged since."""
    for entry in reversed(entries):
        if entry.event == "made" and entry.volume == volume and entry.points and entry.facts.get("kind") == FULL:
            return moment_of_id(entry.points[0])
    return None


def sharing(config: Config, job: Job, repository: Repository, one: Wanted, context: Context) -> list[Job]:
    """The other jobs that make points of this volume of the repository: those that name the same source, and those of
    which their last run tells, or the history where no run is known of.
    """
    here = os.path.realpath(repository.path)
    others = [
        other
        for other in config.jobs.values()
        if other.name != job.name and os.path.realpath(config.path_of(other)) == here
    ]
    if not others:
        return []
    made = {entry.job for entry in repository.record.entries() if entry.event == "made" and entry.volume == one.volume}

    def shares(other: Job) -> bool:
        state = jobstate.load(context.state_dir, other.name)
        known = one.volume in state.volumes.values() if state.started else other.name in made
        return known or one.source in other.sources

    return [other for other in others if shares(other)]


def synthetic_due(job: Job, catalog: Catalog, zone: tzinfo, now: datetime) -> str:
    """Why a full is to be composed at a volume's newest point; "" where none is."""
    return schedule.synthetic_due(job.kinds, past(catalog), now, zone)


def forced(one: Wanted, why: str = "forced") -> Wanted:
    """The same, due whether it is or not."""
    if one.due.kind:
        return one
    return Wanted(one.source, one.volume, Due(INCREMENTAL, f"{why}: {one.due.reason}"))


def kind_asked(due: Due) -> str:
    """As ``backup`` takes it: an incremental becomes a full where nothing can be its parent."""
    return "auto" if due.kind == INCREMENTAL else due.kind or FULL


# --- what would go wrong now ------------------------------------------------------------------------------------------


def doubts(config: Config, path: str) -> list[str]:
    """Sentences on what would go wrong on this machine now: repositories that are not there, sources that are not
    found, hooks and checks that cannot be run, people who cannot be told. None of it is an error of the configuration:
    a disk may come back.
    """
    found = []
    for place in config.repositories.values():
        try:
            Repository(place.path)
        except BlockbakError as error:
            found.append(f"Repository {place.name}: {error}")
        if place.textfile and not os.path.isdir(folder := os.path.dirname(place.textfile)):
            found.append(f"Repository {place.name}: the textfile cannot be written: there is no directory {folder}.")
    for job in config.jobs.values():
        named, errors = sources(job)
        found += [str(error) for error in errors]
        for source in named:
            try:
                look_at(source)
            except BlockbakError as error:
                found.append(f"Job {job.name}: {error}")
        found += [f"Job {job.name}: {reason}" for reason in _unready(job)]
    if config.notify.urls and os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        found.append(f"{path} holds the secrets of notify.urls, and others may read it: chmod 600 {path}")
    if config.notify.urls and not notifier.has_apprise():
        found.append("notify.urls needs the extra blockbak[notify], which is not installed.")
    elif config.notify.urls and (reason := notifier.not_understood(config.notify.urls)):
        found.append(f"notify.urls: {reason}.")
    if config.notify.command and (reason := notifier.unusable(config.notify.command)):
        found.append(f"notify.command: {reason}")
    return found


def _unready(job: Job) -> list[str]:
    """What of a job's hooks and of its drill is not there, or would not be run."""
    found = []
    for named in (job.reading.freeze_with, job.rest.hooks):
        try:
            if named:
                hooks.find(named)
        except BlockbakError as error:
            found.append(str(error))
    if job.drill is None:
        return found
    if job.drill.check and which(job.drill.check[0]) is None:
        found.append(str(NoCheckCommand(program=job.drill.check[0])))
    if job.drill.target:
        try:
            look_at(job.drill.target)
        except BlockbakError as error:
            found.append(f"the drill's target: {error}")
    return found
