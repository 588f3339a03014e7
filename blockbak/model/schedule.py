"""Calendars, and what is due by them: functions of the points that there are, the clock and the time zone.

A calendar's moments are wall-clock times of a zone. One that a change to summer time leaves out is the moment that it
would have been without the change; one that comes twice counts the first time. Calendars of minutes and hours count
in UTC, which has neither.
"""

from __future__ import annotations

import calendar as months
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Literal, TypeAlias

from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL

Unit: TypeAlias = Literal["never", "minutes", "days"]

_DAY_MINUTES = 24 * 60
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_QUARTERS = (1, 4, 7, 10)
_SHORTEST_MONTH = 28
_FAR_DAYS = 370
"""No calendar lets more than a year pass between two of its moments."""
AHEAD_MOST = timedelta(hours=1)
"""So far ahead of the clock a point may lie and yet be taken for one made just now, but never by more than one turn
of the calendar. Beyond that the clock was wrong then or is now, and its time says nothing.
"""

FORMS = (
    "never, hourly, 'hourly at :15', 'every 6h', 'every 15min', daily, 'daily at 02:30', weekly, "
    "'weekly on sat,sun at 23:00', monthly, 'monthly on 15', 'monthly on last', quarterly, yearly, 'yearly on 02-29'"
)
"""What a person may write."""
_AT = r"(?: at (?P<hour>\d\d?):(?P<minute>\d\d))?"
_PATTERNS = {
    name: re.compile(pattern)
    for name, pattern in {
        "never": r"never",
        "every": r"every (?P<count>\d+) ?(?P<span>min|m|h|minutes?|hours?)",
        "hourly": r"hourly(?: at :(?P<minute>\d\d))?",
        "daily": rf"daily{_AT}",
        "weekly": rf"weekly(?: on (?P<days>[a-z]+(?: ?, ?[a-z]+)*))?{_AT}",
        "monthly": rf"monthly(?: on (?P<day>\d\d?|last))?{_AT}",
        "quarterly": rf"quarterly(?: on (?P<day>\d\d?|last))?{_AT}",
        "yearly": rf"yearly(?: on (?P<month>\d\d)-(?P<day>\d\d|last))?{_AT}",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Calendar:
    """Moments that come again.

    With the unit ``minutes`` every ``minutes`` of them, ``at`` after midnight UTC of 1970. With ``days`` at the minute
    ``at`` after midnight (None: nobody said) of each day that fits: its weekday (0 is Monday) is one of ``weekdays``,
    its month one of ``in_months``, where those are not empty, and it is ``day`` of its month (0: any; 31: the last).
    A month that is too short for ``day`` has its last day instead. ``text`` is how a person put it.
    """

    text: str
    unit: Unit
    minutes: int = 0
    at: int | None = None
    weekdays: tuple[int, ...] = ()
    day: int = 0
    in_months: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def never(self) -> bool:
        """Whether it has no moment."""
        return self.unit == "never"

    @property
    def often(self) -> float:
        """About how many seconds lie between two moments; infinite where there are none."""
        if self.unit == "never":
            return float("inf")
        if self.unit == "minutes":
            return self.minutes * 60.0
        days = 7 / len(self.weekdays) if self.weekdays else 1.0
        if self.day:
            days = 365 / len(self.in_months) if self.in_months else 30.0
        return days * 86400.0

    def at_time_of(self, other: Calendar) -> Calendar:
        """The same, at the time of day of ``other`` where it names none itself."""
        if self.unit != "days" or self.at is not None or other.unit != "days" or other.at is None:
            return self
        return replace(self, at=other.at)

    def last(self, now: datetime, zone: tzinfo) -> datetime | None:
        """The newest of its moments that is not after ``now``, in UTC; None where there is none."""
        if self.unit == "minutes":
            return self._turn(now, 0)
        return next((one for one in self._days(now, zone, -1) if one <= now), None)

    def next(self, now: datetime, zone: tzinfo) -> datetime | None:
        """The first of its moments that is after ``now``, in UTC; None where there is none."""
        if self.unit == "minutes":
            return self._turn(now, 1)
        return next((one for one in self._days(now, zone, 1) if one > now), None)

    def _turn(self, now: datetime, more: int) -> datetime:
        step, first = self.minutes * 60, (self.at or 0) * 60
        epoch = datetime(1970, 1, 1, tzinfo=UTC)
        passed = (now - epoch) // timedelta(seconds=1)
        return epoch + timedelta(seconds=(passed - first) // step * step + first + more * step)

    def _days(self, now: datetime, zone: tzinfo, direction: int) -> Iterator[datetime]:
        """Its moments, from a day on the other side of ``now`` on: a zone may be a day away from where it was."""
        today = now.astimezone(zone).date()
        for number in range(-2, _FAR_DAYS):
            day = today + timedelta(days=number * direction)
            if self._fits(day):
                minute = self.at or 0
                wall = datetime(day.year, day.month, day.day, minute // 60, minute % 60, tzinfo=zone)
                yield wall.astimezone(UTC)

    def _fits(self, day: date) -> bool:
        if self.unit != "days" or (self.weekdays and day.weekday() not in self.weekdays):
            return False
        if self.in_months and day.month not in self.in_months:
            return False
        return not self.day or day.day == min(self.day, months.monthrange(day.year, day.month)[1])

    # --- for those who wake us ------------------------------------------------------------------------------

    def on_calendar(self, zone: str) -> list[str]:
        """What systemd's timers are told, with the name of the zone if it is not the machine's.
        They may fire more often than its moments, never less: what is due then is not for them to say.
        """
        if self.unit == "never":
            return []
        if self.unit == "minutes":
            return [f"*-*-* {hours}:{minutes}:00 UTC" for minutes, hours in self._turns()]
        minute = self.at or 0
        names = ",".join(_WEEKDAYS[day][:3].title() for day in self.weekdays)
        in_months = ",".join(f"{month:02d}" for month in self.in_months) or "*"
        day = "*" if not self.day else f"{self.day:02d}"
        if self.day > _SHORTEST_MONTH:
            day = f"{_SHORTEST_MONTH}..31"
        parts = [names, f"*-{in_months}-{day}", f"{minute // 60:02d}:{minute % 60:02d}:00", zone]
        return [" ".join(part for part in parts if part)]

    def crontab(self, *, same_zone: bool = True) -> list[str]:
        """The five fields that cron takes, in the machine's own zone; as ``on_calendar`` rather too often. Where its
        moments are not of the ``same_zone``, that is at every quarter of an hour: zones differ by nothing less.
        """
        if self.unit == "never":
            return []
        if self.unit == "minutes":
            return [f"{minutes} {hours} * * *" for minutes, hours in self._turns(own_zone=True)]
        minute = self.at or 0
        if not same_zone:
            return [f"{','.join(str(one) for one in range(minute % 15, 60, 15))} * * * *"]
        weekdays = ",".join(str((day + 1) % 7) for day in self.weekdays) or "*"
        day = "*" if not self.day else str(self.day)
        if self.day > _SHORTEST_MONTH:
            day = f"{_SHORTEST_MONTH}-31"
        in_months = ",".join(map(str, self.in_months)) or "*"
        return [f"{minute % 60} {minute // 60} {day} {in_months} {weekdays}"]

    def _turns(self, *, own_zone: bool = False) -> list[tuple[str, str]]:
        """Minutes and hours of a day at which it may be time. What does not divide a day is looked at more often; and
        so is, in a zone that may be off by any quarter of an hour, what counts in UTC.
        """
        at = self.at or 0
        if _DAY_MINUTES % self.minutes or own_zone:
            step = next(part for part in (60, 30, 15, 5, 1) if self.minutes % part == 0)
            step = min(step, 15) if own_zone and self.minutes > 15 else step
            return [(",".join(str(minute) for minute in range(at % step, 60, step)), "*")]
        if self.minutes >= 60 and self.minutes % 60 == 0:
            hours = range(at // 60, 24, self.minutes // 60)
            return [(f"{at % 60:02d}", "*" if len(hours) == 24 else ",".join(f"{hour:02d}" for hour in hours))]
        if 60 % self.minutes == 0:
            return [(",".join(f"{minute:02d}" for minute in range(at % self.minutes, 60, self.minutes)), "*")]
        moments = range(at, _DAY_MINUTES, self.minutes)
        return [(f"{moment % 60:02d}", f"{moment // 60:02d}") for moment in moments]


NEVER = Calendar("never", "never")
DAILY = Calendar("daily", "days")


def parse_calendar(text: str) -> Calendar:
    """A calendar as a person writes it. Raises ValueError, with what can be taken."""
    words = " ".join(text.lower().split())
    for name, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(words):
            try:
                return _calendar(name, words, found.groupdict())
            except ValueError as error:
                raise ValueError(f"{text!r} is no calendar: {error}") from error
    raise ValueError(f"{text!r} is no calendar; take {FORMS}")


def _calendar(name: str, words: str, parts: dict[str, str | None]) -> Calendar:
    if name == "never":
        return NEVER
    if name == "every":
        minutes = int(parts["count"] or 0) * (60 if str(parts["span"]).startswith("h") else 1)
        if not 1 <= minutes <= 7 * _DAY_MINUTES:
            raise ValueError("take from a minute to a week")
        return Calendar(words, "minutes", minutes)
    if name == "hourly":
        return Calendar(words, "minutes", 60, _within(int(parts["minute"] or 0), 0, 59, "minute"))
    at = None
    if parts["hour"] is not None:
        at = _within(int(parts["hour"]), 0, 23, "hour") * 60 + _within(int(parts["minute"] or 0), 0, 59, "minute")
    if name == "daily":
        return Calendar(words, "days", at=at)
    if name == "weekly":
        return Calendar(words, "days", at=at, weekdays=_weekdays(parts["days"] or "monday"))
    day = 31 if parts["day"] == "last" else _within(int(parts["day"] or 1), 1, 31, "day")
    if name == "monthly":
        return Calendar(words, "days", at=at, day=day)
    if name == "quarterly":
        return Calendar(words, "days", at=at, day=day, in_months=_QUARTERS)
    month = _within(int(parts["month"] or 1), 1, 12, "month")
    if day > months.monthrange(2024, month)[1] and parts["day"] != "last":
        raise ValueError(f"no year has a day {month:02d}-{day:02d}")
    return Calendar(words, "days", at=at, day=day, in_months=(month,))


def _within(value: int, least: int, most: int, what: str) -> int:
    if not least <= value <= most:
        raise ValueError(f"there is no {what} {value}")
    return value


def _weekdays(text: str) -> tuple[int, ...]:
    found = set()
    for word in text.replace(" ", "").split(","):
        fits = [number for number, name in enumerate(_WEEKDAYS) if name == word or (word and name[:3] == word)]
        if not fits:
            raise ValueError(f"there is no weekday {word!r}")
        found.add(fits[0])
    return tuple(sorted(found))


# --- what is due --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kinds:
    """When which kind of image is to be made: of each, the calendar."""

    full: Calendar = NEVER
    differential: Calendar = NEVER
    incremental: Calendar = DAILY
    synthetic: Calendar = NEVER


@dataclass(frozen=True, slots=True)
class Made:
    """A point of a volume: when, and as which kind it was made from the source; ``held_full`` says that a full holds
    it, made or composed.
    """

    moment: datetime
    kind: str
    held_full: bool = False


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be made now, ``""`` for nothing, and why."""

    kind: str
    reason: str


def due_since(calendar: Calendar, last: datetime | None, now: datetime, zone: tzinfo) -> str:
    """Why something that was done ``last`` is to be done again, as a clause; an empty string where it is not.

    A moment that was missed is made up for, once. A ``last`` that lies ahead of the clock counts as just now for up
    to an hour, or one turn of a calendar that turns faster; beyond that it counts for nothing: a clock that once was
    years ahead would else keep it from being done for years.
    """
    boundary = calendar.last(now, zone)
    if boundary is None:
        return ""
    if last is None:
        return "never yet"
    if last - now > min(AHEAD_MOST, timedelta(seconds=calendar.often)):
        return f"the last one is of {shown(last)}, which is yet to come: the clock was set back"
    return f"none since {shown(boundary)} ({calendar})" if last < boundary else ""


def kind_due(kinds: Kinds, past: Sequence[Made], now: datetime, zone: tzinfo, *, full: datetime | None = None) -> Due:
    """Which kind is due of a volume whose points, in their order, are ``past``. The larger kind stands for a smaller.

    Order is that in which the points were made, which their times need not tell. ``full`` is when the newest full was
    made, where that is known otherwise: its image may be gone by now.
    """
    full = full or next((one.moment for one in reversed(past) if one.kind == FULL), None)
    if not past:
        wanted = not (kinds.full.never and kinds.differential.never and kinds.incremental.never)
        return Due(FULL, "the volume has no point yet") if wanted else Due("", "no kind is ever due")
    if reason := due_since(kinds.full, full, now, zone):
        return Due(FULL, f"full: {reason}")
    since = next((one.moment for one in reversed(past) if one.held_full or one.kind in (FULL, DIFFERENTIAL)), None)
    if reason := due_since(kinds.differential, since, now, zone):
        return Due(DIFFERENTIAL, f"differential: {reason}")
    newest = past[-1].moment
    if reason := due_since(kinds.incremental, newest, now, zone):
        return Due(INCREMENTAL, f"incremental: {reason}")
    after = [one.next(now, zone) for one in (kinds.full, kinds.differential, kinds.incremental)]
    coming = min((moment for moment in after if moment is not None), default=None)
    told = f"; the next is due at {shown(coming)}" if coming is not None else ""
    return Due("", f"the newest point is of {shown(newest)}{told}")


def synthetic_due(kinds: Kinds, past: Sequence[Made], now: datetime, zone: tzinfo) -> str:
    """Why a synthetic full is to be composed at the newest point; an empty string where none is. A full that was made
    stands for it.
    """
    if not past or past[-1].held_full:
        return ""
    newest = next((one.moment for one in reversed(past) if one.held_full), None)
    return due_since(kinds.synthetic, newest, now, zone)


def shown(moment: datetime) -> str:
    """A moment for people: UTC, to the minute."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
