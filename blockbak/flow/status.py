"""Looks at a repository without a lock, and at what this machine left half-done, and judges it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from blockbak.errors import BlockbakError, Interrupted
from blockbak.flow.context import Context
from blockbak.flow.leftovers import remaining
from blockbak.host import jobstate, textfile
from blockbak.model import exposition
from blockbak.model.chain import chains, shortest
from blockbak.model.config import Config
from blockbak.model.events import Entry
from blockbak.model.health import (
    Attempt,
    Drilled,
    Facts,
    Goals,
    Growth,
    Health,
    Place,
    Reason,
    Room,
    StoredImage,
    StoredPoint,
    judge,
    judge_room,
)
from blockbak.repository.local import Catalog, Repository, Volume

_NO_GOALS = Goals()
_DONE_EXITS = (0, 3)
"""Of a backup that made a point."""


@dataclass(frozen=True, slots=True)
class Report:
    """The repository and each of its volumes, as they were at ``at``."""

    repository: str
    at: datetime
    room: Room
    volumes: list[Health]

    @property
    def ok(self) -> bool:
        """Whether nothing needs to be looked at."""
        return not self.reasons

    @property
    def reasons(self) -> list[tuple[str, Reason]]:
        """Every one, with its volume; an empty name stands for the repository itself."""
        return [
            *(("", one) for one in self.room.reasons),
            *((health.volume, one) for health in self.volumes for one in health.reasons),
        ]


def goals(config: Config | None, asked: Goals = _NO_GOALS) -> Callable[[str, str], Goals]:
    """What is asked of a volume, by its name and its job's: what was ``asked`` for all, else what the job says."""

    def of(_: str, name: str) -> Goals:
        job = config.jobs.get(name) if config is not None else None
        if job is None:
            return asked
        return Goals(job.rpo if asked.rpo is None else asked.rpo, job.rto if asked.rto is None else asked.rto)

    return of


def jobs_into(config: Config | None, repository: Repository) -> list[str]:
    """The jobs of the configuration that make points in this repository."""
    if config is None:
        return []
    here = os.path.realpath(repository.path)
    return [name for name, job in config.jobs.items() if os.path.realpath(config.path_of(job)) == here]


def status(
    repository: Repository, context: Context, goals: Callable[[str, str], Goals], *, only: Sequence[str] = (),
    jobs: Sequence[str] = (),
) -> Report:  # fmt: skip
    """Judge every volume, or those in ``only``. ``goals`` gives what is asked of a volume, by its name and its job's;
    ``jobs`` are those that should have made points here.

    Raises NoSuchVolume, NoPermission, UnreadableStore where not even the directories can be read.
    """
    now = context.now()
    entries, damage = _history(repository)
    catalogs = {one.name: (one, one.catalog()) for one in repository.volumes()}
    for name in only:
        repository.volume(name)
    judged = []
    for name, (volume, catalog) in catalogs.items():
        if not only or name in only:
            facts = _facts(volume, catalog, entries)
            judged.append(judge(facts, goals(name, facts.job), now))
    idle = _idle(jobs, catalogs, entries)
    about = os.statvfs(repository.path)
    place = Place(
        free_bytes=about.f_bavail * about.f_frsize, total_bytes=about.f_blocks * about.f_frsize,
        growth=tuple(_growth(entries, [catalog for _, catalog in catalogs.values()])), damage=tuple(damage),
        leftovers=tuple(remaining(context)), idle_jobs=tuple(idle),
        failed_jobs=tuple(_failing([name for name in jobs if name not in idle], judged, context)),
    )  # fmt: skip
    return Report(repository.path, now, judge_room(place, now), judged)


def _idle(jobs: Sequence[str], volumes: Iterable[str], entries: Sequence[Entry]) -> list[str]:
    """The jobs that made no point of what is here."""
    there = set(volumes)
    made = {one.job for one in entries if one.event == "made" and one.points and one.volume in there}
    return [name for name in jobs if name not in made]


def _failing(jobs: Sequence[str], judged: Sequence[Health], context: Context) -> Iterator[str]:
    """The jobs whose last run failed, as far as no volume of theirs tells of it: a source that cannot be found is of no
    volume, and what merging and pruning met is no backup that failed. What a run that made all it should only wanted
    to be looked at is left to who looks: the volumes tell of it, as long as it is so.
    """
    told = {one.job for one in judged if any(reason.level == "critical" for reason in one.reasons)}
    for name in jobs:
        state = jobstate.load(context.state_dir, name)
        if state.failing and state.error and name not in told:
            yield f"{name} ({state.error})"


def exported(report: Report) -> str:
    """The text for Prometheus."""
    return exposition.text(exposition.families(report.repository, report.room, report.volumes, report.at))


def write_textfile(report: Report, path: str) -> None:
    """Make the text for Prometheus what a file holds, all of it at once. Raises BadTarget."""
    textfile.replace(path, exported(report))


def job_of(entries: Sequence[Entry], volume: str) -> str:
    """The job of a volume: that of the newest point that one made."""
    return next((one.job for one in reversed(entries) if one.event == "made" and one.volume == volume and one.job), "")


def _history(repository: Repository) -> tuple[list[Entry], list[str]]:
    """The entries that can be read, and what is wrong with the others."""
    try:
        return repository.record.entries(), [str(flaw) for flaw in repository.record.flaws()]
    except BlockbakError as error:
        return [], [str(error)]


def _facts(volume: Volume, catalog: Catalog, entries: Sequence[Entry]) -> Facts:
    own = [one for one in entries if one.volume == volume.name]
    job = job_of(own, volume.name)
    images = _images(catalog, own)
    damaged = {one.file for one in images if one.damaged}
    whole = chains(catalog.images)
    # What restores a point goes by images that are good, where there are such.
    good = chains(image for image in catalog.images if image.file not in damaged)
    points = []
    for point in catalog.points:
        held = [image.file for image in point.images if image.file in whole]
        candidates = [good[file] for file in held if file in good] or [whole[file] for file in held]
        first = point.images[0]
        files = tuple(image.file for image in shortest(candidates)) if candidates else ()
        points.append(
            StoredPoint(point.id, datetime.fromisoformat(first.opening.created), files, first.closing.consistency)
        )
    # What a run that goes on right now has begun is not left over.
    left = (*catalog.partials, *catalog.orphans, *catalog.deleted) if catalog.leftovers and not volume.holder() else ()
    return Facts(
        volume=volume.name, points=tuple(points), images=images, damage=tuple(str(error) for error in catalog.damage),
        leftovers=tuple(left), drilled=_last_drill(own), failed=_failed(entries, volume.name, job), job=job,
    )  # fmt: skip


def _images(catalog: Catalog, own: Iterable[Entry]) -> tuple[StoredImage, ...]:
    """The images with what verifying them told: the largest share of each that was good since it was last found
    damaged, and whether it was found damaged since it was last good.
    """
    share: dict[str, float] = {}
    at: dict[str, datetime] = {}
    damaged: set[str] = set()
    for entry in own:
        if entry.event == "removed":
            # Their names may be given out anew.
            for file in _texts(entry, "files"):
                share.pop(file, None)
                at.pop(file, None)
                damaged.discard(file)
        if entry.event != "verified":
            continue
        moment = entry.moment
        looked_at = _number(entry, "share")
        for file in _texts(entry, "images"):
            if file in damaged and looked_at < 1:
                continue  # a sample that does not meet the damage does not undo it
            share[file] = max(share.get(file, 0.0), looked_at)
            at[file] = moment
            damaged.discard(file)
        for file in _texts(entry, "damaged"):
            share[file], at[file] = 0.0, moment
            damaged.add(file)
    return tuple(
        StoredImage(one.file, one.image_bytes, one.file in damaged, share.get(one.file, 0.0), at.get(one.file))
        for one in catalog.images
    )


def _texts(entry: Entry, name: str) -> list[str]:
    found = entry.facts.get(name, [])
    return [str(one) for one in found] if isinstance(found, list) else []


def _number(entry: Entry, name: str, otherwise: float = 0.0) -> float:
    """A fact; one of another form than it should be tells nothing."""
    found = entry.facts.get(name)
    return found if isinstance(found, int | float) else otherwise


def _last_drill(own: Sequence[Entry]) -> Drilled | None:
    """One that a person broke off tells nothing."""
    for entry in reversed(own):
        if entry.event == "drilled" and entry.exit != Interrupted.exit_code:
            return Drilled(
                at=entry.moment, point=entry.points[0] if entry.points else "",
                ok=bool(entry.facts.get("ok")), rto_seconds=_number(entry, "rto_seconds", entry.seconds),
                differences=tuple(_texts(entry, "differences")),
            )  # fmt: skip
    return None


def _failed(entries: Sequence[Entry], volume: str, job: str) -> Attempt | None:
    """The last backup of the volume, if it made no point. One that failed before it was known which volumes it is of
    counts for all of its job.
    """
    for entry in reversed(entries):
        if entry.event == "made" and (entry.volume == volume or (not entry.volume and job and entry.job == job)):
            failed = entry.exit not in _DONE_EXITS
            return Attempt(entry.moment, entry.error or f"exit {entry.exit}") if failed else None
    return None


def _growth(entries: Sequence[Entry], catalogs: Sequence[Catalog]) -> list[Growth]:
    """When the repository got larger and smaller, by the history; without one, by the images that are there. The
    first image of a volume is no growth that will go on.
    """
    found: list[Growth] = []
    stored: dict[tuple[str, str], int] = {}
    known: set[str] = set()
    for entry in entries:
        moment = entry.moment
        if entry.event in ("made", "merged", "adopted") and "stored_bytes" in entry.facts:
            size, file = int(_number(entry, "stored_bytes")), str(entry.facts.get("file", ""))
            stored[entry.volume, file] = size
            found.append(Growth(moment, size if entry.volume in known else 0))
            known.add(entry.volume)
        if entry.event in ("removed", "merged"):
            gone = sum(stored.pop((entry.volume, file), 0) for file in _texts(entry, "files"))
            found.append(Growth(moment, -gone))
    if not found:
        for catalog in catalogs:
            images = sorted(catalog.images, key=lambda one: one.closing.finished)
            for number, one in enumerate(images):
                found.append(Growth(datetime.fromisoformat(one.closing.finished), one.image_bytes if number else 0))
    return found
