"""What people are told of: which events follow from how a run ended and how it was before, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from blockbak.model.schedule import shown
from blockbak.units import format_seconds

FAILURE, RECOVERY, MISSED_RPO = "failure", "recovery", "missed-rpo"
AGAIN = timedelta(days=1)
"""After so long people are told once more that a point is missing."""
_OBJECTS = ("errors",)
"""Facts that are no words: a command finds them on its standard input alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run of a job ended. ``error`` is the error's name and ``reason`` its sentence, both "" where there was
    none; ``failed`` says that people are to know: something of it was not done, or needs a look.
    """

    job: str
    run: str
    host: str
    moment: datetime
    exit: int = 0
    error: str = ""
    reason: str = ""
    seconds: float = 0.0
    volumes: Sequence[str] = ()
    points: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Whether something was not done as it should be."""
        return self.exit != 0


@dataclass(frozen=True, slots=True)
class Age:
    """How old the newest point of one of a job's sources is; ``newest`` is None where there is none. Seconds."""

    source: str
    volume: str
    newest: datetime | None
    rpo: float


@dataclass(frozen=True, slots=True)
class Event:
    """One thing to tell: a subject, a text, and facts for programs."""

    kind: str
    subject: str
    text: str
    facts: Mapping[str, Any]

    def environment(self) -> dict[str, str]:
        """The facts as variables of a command: BLOCKBAK_EVENT and so on; lists with blanks between."""
        found = {"BLOCKBAK_MESSAGE": self.text}
        for name, value in self.facts.items():
            if name in _OBJECTS:
                continue
            if isinstance(value, list | tuple):
                found[f"BLOCKBAK_{name.upper()}"] = " ".join(map(str, value))
            elif not isinstance(value, dict):
                found[f"BLOCKBAK_{name.upper()}"] = "" if value is None else str(value)
        return {name: text.replace("\0", "") for name, text in found.items()}

    def document(self) -> dict[str, Any]:
        """The same for JSON."""
        return {**self.facts, "subject": self.subject, "message": self.text}


def after(outcome: Outcome, *, failing: bool) -> list[Event]:
    """What follows from a run that is over; ``failing`` says that the run before it had failed."""
    if outcome.failed:
        # 3: there is a point, and something to look at.
        what = "failed" if outcome.exit != 3 else "needs a look"
        subject = f"blockbak: {_job(outcome)} {what}"
        return [_event(FAILURE, subject, outcome.reason or f"It ended with exit status {outcome.exit}.", outcome)]
    if failing:
        subject = f"blockbak: {_job(outcome)} is well again"
        return [_event(RECOVERY, subject, "The last run was good, the one before it was not.", outcome)]
    return []


def _event(kind: str, subject: str, text: str, outcome: Outcome) -> Event:
    facts = {
        "event": kind, "job": outcome.job, "run": outcome.run, "host": outcome.host,
        "time": outcome.moment.isoformat(timespec="seconds"), "exit": outcome.exit, "error": outcome.error,
        "seconds": outcome.seconds, "volumes": list(outcome.volumes), "points": list(outcome.points),
        **outcome.details,
    }  # fmt: skip
    return Event(kind, subject, text, facts)


def missed(ages: Sequence[Age], now: datetime) -> list[Age]:
    """Those whose newest point is older than it may be."""
    return [one for one in ages if one.newest is None or (now - one.newest).total_seconds() > one.rpo]


def missing(
    job: str, ages: Sequence[Age], now: datetime, told: datetime | None, *, run: str, host: str, repository: str
) -> Event | None:
    """What is told of points that are not new enough; None where there are none, or where people were ``told`` within
    a day.
    """
    if not ages or (told is not None and timedelta(0) <= now - told < AGAIN):
        return None
    lines = []
    for one in ages:
        newest = "it has no point" if one.newest is None else f"its newest point is of {shown(one.newest)}"
        lines.append(f"{one.source}: {newest}; at most {_span(one.rpo)} are allowed.")
    volumes = [one.volume for one in ages if one.volume]
    details = {"sources": [one.source for one in ages], "repository": repository}
    outcome = Outcome(job, run, host, now, volumes=volumes, details=details)
    return _event(MISSED_RPO, f"blockbak: {_job(outcome)} has no point that is new enough", "\n".join(lines), outcome)


def met(job: str, now: datetime, *, run: str, host: str, repository: str) -> Event:
    """What is told once a job's points are new enough again."""
    outcome = Outcome(job, run, host, now, details={"repository": repository})
    return _event(RECOVERY, f"blockbak: {_job(outcome)} is well again", "Its newest points are new enough.", outcome)


def usable(now: datetime, *, run: str, host: str) -> Event:
    """What is told once a configuration can be used that could not."""
    outcome = Outcome("", run, host, now)
    return _event(RECOVERY, f"blockbak: jobs on {host} can be run again", "The configuration can be used.", outcome)


def _job(outcome: Outcome) -> str:
    """Where no job could even be read, it is all of them."""
    return f"job {outcome.job} on {outcome.host}" if outcome.job else f"no job on {outcome.host} can be run: it"


def _span(seconds: float) -> str:
    return format_seconds(seconds) if seconds % 3600 else f"{seconds / 3600:g} h"
