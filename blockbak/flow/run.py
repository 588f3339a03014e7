"""Runs jobs: makes the points that are due, then merges, prunes, verifies and drills as the job says, and tells people.

A run of a job never overlaps another, ends at its deadline, and leaves behind how it went. Nothing that is told, and
nobody who cannot be told, changes how it went.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, tzinfo
from typing import TypeAlias

from blockbak.errors import (
    ATTENTION,
    BlockbakError,
    DamagedImage,
    DeadlinePassed,
    Interrupted,
    JobRuns,
    NewerFormat,
    NoPermission,
    NoSuchJob,
    NoUsableParent,
    RunKilled,
    StoreFailed,
)
from blockbak.flow import drill, jobs, prune, status, synthesize, verify
from blockbak.flow.backup import Report as PointReport
from blockbak.flow.backup import backup, backup_all, both
from blockbak.flow.context import Context, Quiet, iso
from blockbak.flow.jobs import Wanted
from blockbak.host import clock, jobstate, notifier
from blockbak.host.jobstate import State
from blockbak.host.system import reading_idly
from blockbak.model import telling
from blockbak.model.config import Config, Job, Notify
from blockbak.model.drill import DrillOptions
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL
from blockbak.model.retention import Policy
from blockbak.model.schedule import Due, due_since
from blockbak.model.telling import Age, Event, Outcome
from blockbak.repository.local import Repository
from blockbak.units import format_seconds

DONE, NOT_DUE, RUNNING, PLANNED, FAILED = "done", "not due", "running", "planned", "failed"

Step: TypeAlias = PointReport | synthesize.Report | prune.Report | verify.Report | drill.Report | BlockbakError | str
"""What comes of a part of a run; a string is a sentence."""


@dataclass(frozen=True, slots=True)
class Options:
    """``dry_run`` only says what would be done, ``force`` does what is not due. ``wait`` are seconds for another run of
    the job to end.
    """

    dry_run: bool = False
    force: bool = False
    wait: float = 0.0


@dataclass(slots=True)
class JobReport:
    """What came of a job. ``extra`` are the other things that were due beside points (``verify``, ``drill``), and why;
    ``attention`` are sentences on what a person must look at.
    """

    job: str
    repository: str
    state: str = DONE
    wanted: list[Wanted] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)
    points: list[PointReport] = field(default_factory=list)
    synthetic: list[synthesize.Report] = field(default_factory=list)
    pruned: list[prune.Report] = field(default_factory=list)
    verified: verify.Report | None = None
    drilled: list[drill.Report] = field(default_factory=list)
    errors: list[BlockbakError] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exit(self) -> int:
        """Of its first error; 3 where a person must look at something."""
        if self.errors:
            return self.errors[0].exit_code
        return ATTENTION if self.attention or any(point.attention for point in self.points) else 0

    @property
    def interrupted(self) -> bool:
        """Whether somebody asked to stop."""
        return any(isinstance(error, Interrupted) for error in self.errors)


Tell: TypeAlias = Callable[[JobReport, Step], None]


def run_jobs(
    config: Config,
    chosen: Sequence[Job],
    options: Options,
    context: Context,
    tell: Tell,
    *,
    pick: Callable[[], float],
) -> list[JobReport]:
    """Run what is due of these jobs, one after the other; a job that fails does not keep the next from being run.

    ``tell`` is given each result as it comes, ``pick`` gives random numbers in [0, 1). Errors are in the reports, and
    none is raised but Interrupted, while people are told.
    """
    zone = clock.zone(config.timezone)
    reports = []
    well: set[str] = set()
    for job in chosen:
        run = _Run(job, config, options, replace(context, job=job.name).about(job=job.name), zone, tell, pick)
        reports.append(run.go())
        well |= {job.name} if run.recovered else set()
        if reports[-1].interrupted:
            return reports
    if not options.dry_run:
        tell_missing(config, context, well)
        write_textfiles(config, context)
    return reports


class _Run:
    """One run of one job."""

    def __init__(
        self,
        job: Job,
        config: Config,
        options: Options,
        context: Context,
        zone: tzinfo,
        tell: Tell,
        pick: Callable[[], float],
    ) -> None:
        self._job, self._config, self._options, self._zone, self._pick = job, config, options, zone, pick
        self._context = replace(context, wait=job.wait)
        self._tell = tell
        self.report = JobReport(job.name, config.path_of(job))
        self.recovered = False

    def go(self) -> JobReport:
        """Do what is due."""
        timer, report = self._context.timer, self.report
        begun = timer()
        try:
            if self._options.dry_run:
                self._plan()
            else:
                self._do()
        except BlockbakError as error:
            self._failed(error)
        report.seconds = round(timer() - begun, 3)
        if report.errors and report.state == DONE:
            report.state = FAILED
        return report

    def _failed(self, error: BlockbakError) -> None:
        self.report.errors.append(error)
        self._tell(self.report, error)

    def _done(self, step: Step) -> None:
        self._tell(self.report, step)

    # --- what is due -------------------------------------------------------------------------------------------------

    def _look(self, repository: Repository, state: State) -> bool:
        """Find out what is due; whether anything is."""
        report, job = self.report, self._job
        found, errors = jobs.sources(job)
        report.wanted = jobs.wanted(job, found, repository, self._zone, self._context)
        if self._options.force:
            report.wanted = [jobs.forced(one) for one in report.wanted]
        elif job.reading.together and any(one.due.kind for one in report.wanted):
            report.wanted = [jobs.forced(one, "its set is of one instant") for one in report.wanted]
        now = self._context.now()
        for what, calendar, last in (
            ("verify", job.verify, state.verified),
            ("drill", job.drill.schedule if job.drill else None, state.drilled),
        ):
            if calendar is not None and (reason := due_since(calendar, _moment(last), now, self._zone)):
                report.extra[what] = reason
        due = any(one.due.kind for one in report.wanted) or bool(report.extra)
        # When a source that is not found is due, nobody knows: it is missed when others are, or where it is the only.
        if errors and (due or not report.wanted):
            for error in errors:
                self._failed(error)
            due = True
        if not due:
            report.state = NOT_DUE
        for one in report.wanted:
            what = f"{_an(one.due.kind)} is due" if one.due.kind else "nothing is due"
            told = f"{one.source}: {what}: {one.due.reason}."
            if self._options.dry_run or not due:
                self._done(told)
            else:
                self._context.about(volume=one.volume).say(told)
        return due

    def _plan(self) -> None:
        """Say what would be done."""
        repository = Repository(self.report.repository, self._context.kernel)
        if self._look(repository, jobstate.load(self._context.state_dir, self._job.name)):
            self.report.state = PLANNED
            self._points(repository, dry_run=True)
            for what, reason in self.report.extra.items():
                self._done(f"{what} is due: {reason}.")

    # --- doing it ----------------------------------------------------------------------------------------------------

    def _do(self) -> None:
        context, job = self._context, self._job
        with ExitStack() as stack:
            try:
                held = jobstate.alone(
                    context.state_dir, job.name, wait=self._options.wait, check=context.check, say=context.say,
                    kernel=context.kernel,
                )  # fmt: skip
                stack.enter_context(held)
            except JobRuns as error:
                # What is due is being done: only who insists on a run of his own has not got what he asked for.
                if self._options.force:
                    raise
                self.report.state = RUNNING
                self._done(str(error))
                return
            except (StoreFailed, NoPermission) as error:
                # A volume has a lock of its own. A state directory that is full is no reason to do without a backup.
                context.say(f"Whether job {job.name} is being run already cannot be told: {error}")
            self._alone()

    def _alone(self) -> None:
        context, job, report = self._context, self._job, self.report
        state = jobstate.load(context.state_dir, job.name)
        # Where systemd does not run, nobody has told of a run that was killed.
        _tell_killed(self._config, job, state, context)
        repository: Repository | None = None
        try:
            repository = Repository(report.repository, context.kernel)
            if not self._look(repository, state):
                return
        except BlockbakError as error:
            self._failed(error)
        begun, started = context.timer(), iso(context.now())
        state.run, state.started, state.ended = context.run, started, ""
        save(state, job.name, context)
        try:
            if repository is not None:
                self._work(repository, state)
        except BlockbakError as error:
            self._failed(error)
        report.seconds = round(context.timer() - begun, 3)
        state.ended, state.exit = iso(context.now()), report.exit
        state.error = report.errors[0].name if report.errors else ""
        state.stopped = report.interrupted
        known = {one.source: one.volume or state.volumes.get(one.source, "") for one in report.wanted}
        state.volumes = {source: volume for source, volume in known.items() if volume} or state.volumes
        events: list[Event] = []
        if not report.interrupted:
            events = telling.after(outcome_of(report, context), failing=state.failing)
            state.failing = report.exit != 0
            self.recovered = any(event.kind == telling.RECOVERY for event in events)
        try:
            tell_people(self._config.notify, events, context)
        finally:
            save(state, job.name, context)

    def _work(self, repository: Repository, state: State) -> None:
        """All that is due, within the deadline."""
        with self._limited():
            self._points(repository, dry_run=False)
            volumes = self._whole()
            self._synthesize(repository, volumes)
            self._prune(repository, volumes)
            self._verify(repository, state)
            self._drill(repository, state)

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Have every check raise DeadlinePassed once the deadline is over."""
        job, before = self._job, self._context
        if job.deadline is None:
            yield
            return
        ends = before.timer() + job.deadline

        def check() -> None:
            if before.timer() >= ends:
                raise DeadlinePassed(job=job.name, seconds=f"{job.deadline:g}")

        self._context = replace(before, check=both(before.check, check))
        try:
            yield
        finally:
            self._context = before

    def _points(self, repository: Repository, *, dry_run: bool) -> None:
        """Make the points that are due."""
        job, context = self._job, self._context
        due = [one for one in self.report.wanted if one.due.kind]
        if not due:
            return
        if not dry_run:
            due = [self._with_parent(one, repository) for one in due]
        requests = [jobs.request(job, one.source, jobs.kind_asked(one.due)) for one in due]

        def told(result: PointReport | BlockbakError) -> None:
            if isinstance(result, BlockbakError):
                self._failed(result)
            else:
                self.report.points.append(result)
                self._done(result)

        with reading_idly(job.reading.idle):
            backup_all(repository, requests, context, told, hot=jobs.hot_options(job), dry_run=dry_run)

    def _with_parent(self, one: Wanted, repository: Repository) -> Wanted:
        """The same, a full where a differential is due and no full can be its parent."""
        if one.due.kind != DIFFERENTIAL:
            return one
        quiet = replace(self._context, progress=Quiet(), say=lambda _: None)
        try:
            backup(repository, jobs.request(self._job, one.source, DIFFERENTIAL), quiet, dry_run=True)
        except NoUsableParent as error:
            reason = f"{one.due.reason}; {error.fields['reason']}"
            return Wanted(one.source, one.volume, Due(FULL, reason))
        except BlockbakError:
            return one  # making it will tell
        return one

    def _whole(self) -> list[str]:
        """The job's volumes of which nothing failed in this run: what it was not able to add to, it does not prune."""
        made = {point.volume for point in self.report.points}
        return [one.volume for one in self.report.wanted if one.volume and (one.volume in made or not one.due.kind)]

    def _synthesize(self, repository: Repository, volumes: Sequence[str]) -> None:
        for volume in volumes:
            context = self._context.about(volume=volume)
            catalog = jobs.catalog_of(repository, volume)
            reason = jobs.synthetic_due(self._job, catalog, self._zone, context.now())
            if not reason:
                continue
            context.say(f"{volume}: a synthetic full is composed: {reason}.")
            with self._noted():
                made = synthesize.synthesize(repository, volume, context, compress=self._job.reading.compress)
                self.report.synthetic.append(made)
                self._done(made)

    def _prune(self, repository: Repository, volumes: Sequence[str]) -> None:
        """Keep what the policy says, of each volume that is as it should be."""
        policy = self._job.retention
        if policy is None:
            # Pruning would have told.
            for volume in volumes:
                there = {image.file for image in jobs.catalog_of(repository, volume).images}
                known = repository.volume(volume).found_damaged() & there if there else ()
                told = "was found damaged, and never whole since."
                self.report.attention += [f"{volume}: {file} {told}" for file in sorted(known)]
            return
        for one in (one for one in self.report.wanted if one.volume in volumes):
            volume = one.volume
            with self._noted():
                context, compress = self._context.about(volume=volume), self._job.reading.compress
                sharing = jobs.sharing(self._config, self._job, repository, one, context)
                for other in sharing:
                    if other.retention is None:
                        context.say(
                            f"{volume}: nothing of it may go: job {other.name} images it too, and has no retention."
                        )
                both_keep = replace(policy, others=tuple(other.retention or Policy() for other in sharing))
                found = prune.prune(repository, volume, both_keep, context, compress=compress)
                self.report.pruned.append(found)
                self.report.attention += [f"{volume}: {sentence}" for sentence in found.damage]
                self._done(found)

    def _verify(self, repository: Repository, state: State) -> None:
        """Check a share of all that the job's volumes hold."""
        if "verify" not in self.report.extra:
            return
        names = [
            f"{volume}@{point.id}"
            for volume in dict.fromkeys(one.volume for one in self.report.wanted if one.volume)
            for point in jobs.catalog_of(repository, volume).points
        ]
        if not names:
            return
        with self._noted():
            found = verify.verify(repository, names, self._context, share=self._job.verify_share, pick=self._pick)
            self.report.verified = found
            self._done(found)
            for error in flaws(found):
                self._failed(error)
            if found.locked is None:
                state.verified = iso(self._context.now())

    def _drill(self, repository: Repository, state: State) -> None:
        """Restore the newest point of each of the job's volumes to scratch. What differs needs a look."""
        plan = self._job.drill
        if plan is None or "drill" not in self.report.extra:
            return
        options = drill.options_of(plan)
        volumes = dict.fromkeys(one.volume for one in self.report.wanted if one.volume)
        done = [self._drilled(repository, volume, options) for volume in volumes]
        if done and all(done):
            state.drilled = iso(self._context.now())

    def _drilled(self, repository: Repository, volume: str, options: DrillOptions) -> bool:
        """Whether a drill came to its end, whatever it found."""
        report, rto = self.report, self._job.rto
        with self._noted():
            found = drill.drill(repository, f"{volume}@latest", options, self._context.about(volume=volume))
            report.drilled.append(found)
            report.attention += [f"Drill of {volume}@{found.point}: {difference}" for difference in found.differences]
            if rto is not None and found.rto_seconds > rto:
                took, most = format_seconds(found.rto_seconds), format_seconds(rto)
                report.attention.append(f"Drill of {volume}@{found.point}: it took {took}; the RTO is {most}.")
            self._done(found)
        return any(one.volume == volume for one in report.drilled)

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """An error of a part of the run, which does not keep the rest from being done, unless it must end."""
        try:
            yield
        except (Interrupted, DeadlinePassed):
            raise
        except BlockbakError as error:
            self._failed(error)


def flaws(found: verify.Report) -> list[BlockbakError]:
    """What a verification found, as errors: the first damage of each image, and a volume that another run held."""
    errors: list[BlockbakError] = [
        DamagedImage(file=f"{verdict.volume}/{verdict.file}", reason=verdict.damage[0].reason)
        for verdict in found.images
        if not verdict.ok and not verdict.newer
    ]
    newer = [verdict.file for verdict in found.images if verdict.newer]
    errors += [NewerFormat(what=f"The image {file}", detail="as verifying it told") for file in newer]
    return [*errors, found.locked] if found.locked is not None else errors


def _an(kind: str) -> str:
    return f"an {kind}" if kind == INCREMENTAL else f"a {kind}"


def _moment(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def save(state: State, job: str, context: Context) -> None:
    """Keep how a run went; where that cannot be, it is spoken of, and the run is none the worse for it."""
    try:
        jobstate.save(context.state_dir, job, state, context.kernel)
    except StoreFailed as error:
        context.say(f"How this run goes cannot be kept for the next one: {error}")


def remember(config: Config, context: Context) -> None:
    """Keep who is to be told, for a day on which the configuration cannot be read, and tell them once it is over."""
    try:
        jobstate.save_notify(context.state_dir, config.notify, context.kernel)
    except StoreFailed as error:
        context.say(f"Who is told of trouble cannot be kept for later: {error}")
    state = jobstate.load(context.state_dir, jobstate.NO_JOB)
    if state.failing:
        tell_people(config.notify, [telling.usable(context.now(), run=context.run, host=context.host)], context)
        state.failing = False
        save(state, jobstate.NO_JOB, context)


def write_textfiles(config: Config, context: Context) -> None:
    """Leave how all volumes are for Prometheus, where the configuration says so. What fails is said."""
    for place in config.repositories.values():
        if not place.textfile:
            continue
        try:
            repository = Repository(place.path, context.kernel)
            jobs = status.jobs_into(config, repository)
            found = status.status(repository, context, status.goals(config), jobs=jobs)
            status.write_textfile(found, place.textfile)
        except BlockbakError as error:
            context.say(f"{place.textfile} is not what it should be: {error}")


# --- telling people --------------------------------------------------------------------------------------------------


def outcome_of(report: JobReport, context: Context) -> Outcome:
    """How a run went, for those who are told."""
    first = report.errors[0] if report.errors else None
    sentences = [str(error) for error in report.errors] + report.attention
    sentences += [note for point in report.points if point.attention for note in point.notes]
    made = dict.fromkeys(point.volume for point in report.points)
    volumes = dict.fromkeys([*(one.volume for one in report.wanted if one.volume), *made])
    return Outcome(
        report.job, context.run, context.host, context.now(), report.exit, first.name if first else "",
        "\n".join(sentences), report.seconds, list(volumes), [point.point for point in report.points],
        {"errors": [error.as_dict() for error in report.errors], "repository": report.repository},
    )  # fmt: skip


def tell_people(notify: Notify, events: Sequence[Event], context: Context) -> None:
    """Tell of each event by all ways there are. What fails is said; it is never an error, and no way keeps another
    from being tried.
    """
    for event in events:
        if event.kind not in notify.on:
            continue
        failed = []
        if notify.command:
            failed.append(notifier.by_command(notify.command, event, context.check))
        if notify.urls:
            failed.append(notifier.by_urls(notify.urls, event, context.check))
        for reason in failed:
            if reason:
                context.say(f"People could not be told of this: {reason}")


def ages(job: Job, state: State, repository: Repository) -> list[Age]:
    """How old the newest good point of each source is that the job has had. Raises what reading a volume does."""
    if job.rpo is None:
        return []
    return [
        Age(source, volume, jobs.newest_good(repository, volume), job.rpo) for source, volume in state.volumes.items()
    ]


def tell_missing(config: Config, context: Context, well: Collection[str] = ()) -> None:
    """Tell people of jobs whose newest points are older than they may be, and when they are new enough again; that of
    the jobs in ``well`` they know already. Of a job that was never run nothing is told.
    """
    for job in config.jobs.values():
        if job.rpo is None:
            continue
        try:
            with jobstate.alone(
                context.state_dir, job.name, wait=0, check=context.check, say=context.say, kernel=context.kernel
            ):
                _tell_missing(job, config, context, told=job.name in well)
        except Interrupted:
            raise
        except BlockbakError as error:
            # It runs, so it will see to that itself; or its repository is not there, which its own run tells.
            if not isinstance(error, JobRuns):
                context.say(f"Whether job {job.name} has points that are new enough cannot be told: {error}")


def _tell_missing(job: Job, config: Config, context: Context, *, told: bool) -> None:
    state = jobstate.load(context.state_dir, job.name)
    if not state.started:
        return
    path = config.path_of(job)
    found = ages(job, state, Repository(path, context.kernel))
    now, here = context.now(), {"run": context.run, "host": context.host, "repository": path}
    late = telling.missed(found, now)
    before = state.told_missing
    if late:
        event = telling.missing(job.name, late, now, _moment(before), **here)
        if event is None:
            return
        state.told_missing = iso(now)
    elif before:
        event = None if told else telling.met(job.name, now, **here)
        state.told_missing = ""
    else:
        return
    tell_people(config.notify, [event] if event else [], context)
    save(state, job.name, context)


def tell_unfinished(config: Config, job: Job, context: Context) -> bool:
    """Tell people of a run that did not come to its end, if that is how it ended; whether it is. For systemd, which is
    the only one left to notice, and asks a run to end that takes too long. Raises JobRuns where it is still under way.
    """
    with jobstate.alone(
        context.state_dir, job.name, wait=0, check=context.check, say=context.say, kernel=context.kernel
    ):
        state = jobstate.load(context.state_dir, job.name)
        return _tell_killed(config, job, state, context, stopped=state.stopped)


def _tell_killed(config: Config, job: Job, state: State, context: Context, *, stopped: bool = False) -> bool:
    """Tell people of the last run of a job that is held, if it did not come to its end; whether that is so. One that
    was ``stopped`` counts too, where nobody was there who asked for it.
    """
    if not state.started or (state.ended and not stopped):
        return False
    error = RunKilled(job=job.name, started=state.started)
    state.ended, state.exit, state.error, state.failing = iso(context.now()), error.exit_code, error.name, True
    state.stopped = False
    details = {"errors": [error.as_dict()], "repository": config.path_of(job)}
    outcome = Outcome(
        job.name, state.run, context.host, context.now(), error.exit_code, error.name, str(error),
        volumes=list(state.volumes.values()), details=details,
    )  # fmt: skip
    context.say(str(error))
    tell_people(config.notify, telling.after(outcome, failing=True), context)
    save(state, job.name, context)
    return True


def tell_unusable(error: BlockbakError, context: Context) -> None:
    """Tell people, as the last usable configuration says, that the one there is now cannot be used: no job runs. Or
    that the one job that was asked for is not in it.
    """
    notify = jobstate.load_notify(context.state_dir)
    job = str(error.fields["job"]) if isinstance(error, NoSuchJob) else jobstate.NO_JOB
    notes = getattr(error, "__notes__", ())
    outcome = Outcome(
        job, context.run, context.host, context.now(), error.exit_code, error.name,
        "\n".join([str(error), *notes]), details={"errors": [error.as_dict()]},
    )  # fmt: skip
    if not job:
        state = jobstate.load(context.state_dir, job)
        state.failing = True
        save(state, job, context)
    tell_people(notify, telling.after(outcome, failing=False), context)
