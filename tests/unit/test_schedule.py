"""Calendars, and what is due by them: summer time, leap days, clocks that were set back, runs that were missed."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL
from blockbak.model.schedule import (
    NEVER,
    Kinds,
    Made,
    due_since,
    kind_due,
    parse_calendar,
    synthetic_due,
)

BERLIN = ZoneInfo("Europe/Berlin")
ZONES = [UTC, BERLIN, *map(ZoneInfo, ("America/St_Johns", "Australia/Lord_Howe", "Pacific/Apia", "Asia/Kathmandu"))]
TEXTS = [
    "hourly", "hourly at :15", "every 15min", "every 6h", "every 7h", "every 45 minutes", "every 7min", "daily",
    "daily at 02:30", "daily at 23:59", "weekly", "weekly on sat,sun at 02:30", "monthly", "monthly on 31 at 02:30",
    "monthly on last", "monthly on 29", "quarterly on 15 at 12:00", "yearly", "yearly on 02-29 at 02:30",
]  # fmt: skip


def at(text: str, zone=UTC) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone).astimezone(UTC)


moments = st.datetimes(datetime.fromisoformat("1995-01-01"), datetime.fromisoformat("2060-01-01")).map(
    lambda one: one.replace(tzinfo=UTC)
)
calendars = st.sampled_from(TEXTS).map(parse_calendar)
zones = st.sampled_from(ZONES)


# --- moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "now", "last", "following"),
    [
        ("daily at 02:30", "2026-05-04 02:29", "2026-05-03 02:30", "2026-05-04 02:30"),
        ("daily at 02:30", "2026-05-04 02:30", "2026-05-04 02:30", "2026-05-05 02:30"),
        ("weekly on sunday at 23:00", "2026-05-04 00:00", "2026-05-03 23:00", "2026-05-10 23:00"),
        ("weekly", "2026-05-04 00:00", "2026-05-04 00:00", "2026-05-11 00:00"),
        ("monthly on 31", "2026-05-01 00:00", "2026-04-30 00:00", "2026-05-31 00:00"),
        ("monthly on last at 01:00", "2024-02-29 01:00", "2024-02-29 01:00", "2024-03-31 01:00"),
        ("quarterly", "2026-06-30 12:00", "2026-04-01 00:00", "2026-07-01 00:00"),
        ("yearly on 02-29", "2023-03-01 00:00", "2023-02-28 00:00", "2024-02-29 00:00"),
        ("yearly on 02-29", "2024-02-28 12:00", "2023-02-28 00:00", "2024-02-29 00:00"),
        ("yearly on 12-31 at 23:59", "2026-12-31 23:58", "2025-12-31 23:59", "2026-12-31 23:59"),
        ("hourly at :15", "2026-05-04 02:14", "2026-05-04 01:15", "2026-05-04 02:15"),
        ("every 6h", "2026-05-04 05:59", "2026-05-04 00:00", "2026-05-04 06:00"),
    ],
)
def test_moments_of_a_calendar(text, now, last, following):
    one = parse_calendar(text)
    assert one.last(at(now), UTC) == at(last)
    assert one.next(at(now), UTC) == at(following)


def test_a_time_that_summer_time_leaves_out_is_the_moment_it_would_have_been():
    one = parse_calendar("daily at 02:30")
    assert one.next(at("2026-03-28 12:00"), BERLIN) == at("2026-03-29 01:30")
    assert one.next(at("2026-03-29 01:30"), BERLIN) == at("2026-03-30 00:30")


def test_a_time_that_comes_twice_counts_once():
    one = parse_calendar("daily at 02:30")
    assert one.next(at("2026-10-24 12:00"), BERLIN) == at("2026-10-25 00:30")
    assert one.next(at("2026-10-25 00:30"), BERLIN) == at("2026-10-26 01:30")


def test_hours_go_on_through_both_changes_of_the_clock():
    one = parse_calendar("hourly at :15")
    for day in ("2026-03-29", "2026-10-25"):
        found, moment = [], at(f"{day} 00:00")
        while (moment := one.next(moment, BERLIN)) < at(f"{day} 06:00"):
            found.append(moment)
        assert len(found) == 6


@given(calendars, moments, zones)
def test_last_and_next_are_neighbours(one, now, zone):
    last, following = one.last(now, zone), one.next(now, zone)
    assert last <= now < following
    assert one.last(following, zone) == following
    assert one.next(last, zone) == following
    assert following - last <= timedelta(days=367)


@given(calendars, moments, zones)
def test_days_are_those_of_the_zone_at_the_time_of_the_zone(one, now, zone):
    assume(one.unit == "days" and zone is not ZoneInfo("Pacific/Apia"))
    wall = one.last(now, zone).astimezone(zone)
    minute = one.at or 0
    # A time that was left out may be an hour later by the clock on the wall.
    assert (wall.hour * 60 + wall.minute - minute) in (0, 30, 60)
    assert not one.weekdays or wall.weekday() in one.weekdays


@pytest.mark.parametrize(
    "text",
    ["", "sometimes", "daily at 24:00", "daily at 2:5", "weekly on funday", "monthly on 0", "monthly on 32",
     "yearly on 02-30", "yearly on 13-01", "every 0h", "every 200h", "hourly at :60", "daily at 02:30 please"],
)  # fmt: skip
def test_what_is_no_calendar_is_refused_with_a_reason(text):
    with pytest.raises(ValueError, match="is no calendar"):
        parse_calendar(text)


def test_a_calendar_takes_the_time_of_day_of_the_schedule():
    nightly = parse_calendar("daily at 02:30")
    assert parse_calendar("monthly").at_time_of(nightly).at == 150
    assert parse_calendar("monthly at 04:00").at_time_of(nightly).at == 240
    assert parse_calendar("hourly").at_time_of(nightly) == parse_calendar("hourly")
    assert parse_calendar("weekly").at_time_of(parse_calendar("every 6h")).at is None


# --- those who wake us fire at least at each moment ------------------------------------------------------------


def fields(text: str, least: int) -> set[int]:
    """The numbers of one part of a timer or cron line; empty for any."""
    if text == "*":
        return set()
    found = set()
    for part in text.split(","):
        first, _, last = part.replace("..", "-").partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@given(calendars, moments, zones)
def test_systemd_fires_at_each_moment(one, now, zone):
    moment = one.next(now, zone)
    for line in one.on_calendar(""):
        parts = line.split()
        days = parts.pop(0).split(",") if parts[0][0].isalpha() else []
        _, month, day = parts[0].split("-", 2)
        hour, minute, second = parts[1].split(":")
        assert second == "00"
        wall = moment.astimezone(UTC if parts[2:] == ["UTC"] else zone)
        if parts[2:] != ["UTC"] and wall.replace(tzinfo=None) != _named(moment, zone, one):
            return  # a time that summer time leaves out: systemd has rules of its own for it
        fits = [not days or f"{wall:%a}" in days]
        for text, value in ((month, wall.month), (day, wall.day), (hour, wall.hour), (minute, wall.minute)):
            wanted = fields(text, 0)
            fits.append(not wanted or value in wanted)
        if all(fits):
            return
    pytest.fail(f"{one}: {one.on_calendar('')} does not fire at {moment}")


@given(calendars, moments, zones)
def test_cron_fires_at_each_moment(one, now, zone):
    moment = one.next(now, zone)
    wall = moment.astimezone(zone)
    if one.unit == "days" and wall.replace(tzinfo=None) != _named(moment, zone, one):
        return
    for line in one.crontab():
        minute, hour, day, month, weekday = (fields(text, 0) for text in line.split())
        pairs = ((minute, wall.minute), (hour, wall.hour), (day, wall.day), (month, wall.month),
                 (weekday, (wall.weekday() + 1) % 7))  # fmt: skip
        if all(not wanted or value in wanted for wanted, value in pairs):
            return
    pytest.fail(f"{one}: {one.crontab()} does not fire at {wall}")


@given(calendars, moments, zones, zones)
def test_cron_fires_at_each_moment_of_another_zone(one, now, zone, machine):
    wall = one.next(now, zone).astimezone(machine)
    fires = [[fields(text, 0) for text in line.split()] for line in one.crontab(same_zone=False)]
    assert any(wall.minute in minute and rest == [set()] * 4 for minute, *rest in fires), wall


def _named(moment: datetime, zone, one) -> datetime:
    """The wall-clock time that a calendar of days names on that day."""
    wall = moment.astimezone(zone).replace(tzinfo=None)
    return wall.replace(hour=(one.at or 0) // 60, minute=(one.at or 0) % 60)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("text", TEXTS)
def test_systemd_understands_each_calendar(text):
    for line in parse_calendar(text).on_calendar("Europe/Berlin"):
        done = subprocess.run(["systemd-analyze", "calendar", line], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_never_is_no_timer():
    assert NEVER.on_calendar("") == NEVER.crontab() == []
    assert NEVER.last(at("2026-05-04"), UTC) is None


# --- what is due ------------------------------------------------------------------------------------------------


@st.composite
def kinds(draw):
    def some():
        return draw(st.one_of(st.just(NEVER), calendars))

    made = Kinds(some(), some(), some(), some())
    assume(not (made.full.never and made.differential.never and made.incremental.never))
    return made


def carried_out(past, kind, moment):
    return [*past, Made(moment, kind, kind == FULL)]


@given(kinds(), zones, moments, st.lists(st.integers(1, 60 * 24 * 40), max_size=25))
def test_what_is_made_is_not_due_again_before_its_next_moment(kinds, zone, now, waits):
    """Looked at in any rhythm: never twice in one turn, and never missed when a moment has passed."""
    past = []
    for minutes in waits:
        due = kind_due(kinds, past, now, zone)
        if not past:
            assert due.kind == FULL
        before = past
        if due.kind:
            past = carried_out(past, due.kind, now)
            again = kind_due(kinds, past, now, zone)
            assert again.kind == "", (due, again)
        else:
            newest = past[-1].moment
            assert kinds.incremental.never or kinds.incremental.last(now, zone) <= newest
        for kind, wanted in ((FULL, kinds.full),):
            boundary = wanted.last(now, zone)
            if before and boundary is not None:
                last = max((one.moment for one in before if one.kind == kind), default=None)
                assert (due.kind == kind) == (last < boundary)
        now += timedelta(minutes=minutes)


@given(kinds(), zones, moments, st.integers(0, 3), st.integers(1, 60 * 24 * 800))
def test_however_long_it_was_off_one_run_makes_up_for_it(kinds, zone, now, count, minutes):
    past = [Made(now + timedelta(minutes=number), (FULL, INCREMENTAL, DIFFERENTIAL)[number % 3], number == 0)
            for number in range(count)]  # fmt: skip
    later = now + timedelta(minutes=minutes + count)
    due = kind_due(kinds, past, later, zone)
    if due.kind:
        assert kind_due(kinds, carried_out(past, due.kind, later), later, zone).kind == ""


@given(calendars, zones, moments, st.integers(1, 60 * 24 * 4000))
def test_a_clock_that_was_set_back_does_not_stop_it(one, zone, now, minutes):
    """Due at once where the last one lies far ahead, and at the latest by the next moment where it does not."""
    last = now + timedelta(minutes=minutes)
    if due_since(one, last, now, zone):
        assert minutes > min(60, one.often / 60)
        assert not due_since(one, now, now, zone)
        return
    assert minutes <= 60
    after = one.next(last, zone)
    assert due_since(one, last, after, zone)
    assert after - now <= timedelta(hours=1) + (one.next(now, zone) - one.last(now, zone)) + timedelta(days=2)


def test_a_point_of_the_future_is_spoken_of():
    reason = due_since(parse_calendar("daily"), at("2036-01-01"), at("2026-05-04"), UTC)
    assert "the clock was set back" in reason


NIGHTLY = Kinds(
    parse_calendar("monthly at 02:00"), parse_calendar("weekly on sun at 02:00"), parse_calendar("daily at 02:00")
)


def test_the_larger_kind_stands_for_the_smaller():
    past, seen = [], []
    now = at("2026-05-01 02:17")
    for _ in range(40):
        due = kind_due(NIGHTLY, past, now, UTC)
        seen.append(due.kind)
        past = carried_out(past, due.kind, now)
        now += timedelta(days=1)
    assert seen[0] == seen[31] == FULL
    sundays = [number for number in range(40) if (at("2026-05-01") + timedelta(days=number)).weekday() == 6]
    assert [number for number, kind in enumerate(seen) if kind == DIFFERENTIAL] == sundays
    assert seen.count(INCREMENTAL) == 40 - 2 - len(sundays)


def test_why_nothing_is_due_says_when_something_is():
    past = [Made(at("2026-05-04 02:10"), FULL, held_full=True)]
    due = kind_due(NIGHTLY, past, at("2026-05-04 12:00"), UTC)
    assert due.kind == ""
    assert due.reason == "the newest point is of 2026-05-04 02:10 UTC; the next is due at 2026-05-05 02:00 UTC"


def test_order_is_the_order_of_making_not_of_clocks():
    past = [Made(at("2026-05-04 02:10"), FULL, held_full=True), Made(at("2020-01-01 00:00"), INCREMENTAL)]
    assert kind_due(NIGHTLY, past, at("2026-05-04 12:00"), UTC).kind == INCREMENTAL


def test_a_full_that_was_merged_since_is_still_known():
    past = [Made(at("2026-05-03 02:10"), INCREMENTAL, held_full=True)]
    now = at("2026-05-03 12:00")
    assert kind_due(NIGHTLY, past, now, UTC).kind == FULL
    assert kind_due(NIGHTLY, past, now, UTC, full=at("2026-05-01 02:10")).kind == ""


def test_incrementals_for_ever_with_a_synthetic_full_each_week():
    kinds = Kinds(incremental=parse_calendar("daily"), synthetic=parse_calendar("weekly"))
    past, made = [], []
    now = at("2026-05-01 00:30")
    for _ in range(30):
        due = kind_due(kinds, past, now, UTC)
        past = carried_out(past, due.kind, now)
        if synthetic_due(kinds, past, now, UTC):
            made.append(f"{now:%a}")
            past[-1] = Made(now, past[-1].kind, held_full=True)
            assert not synthetic_due(kinds, past, now, UTC)
        now += timedelta(days=1)
    assert made == ["Mon"] * 4
    assert [one.kind for one in past].count(FULL) == 1


def test_reasons_name_the_moment_that_passed():
    past = [Made(at("2026-05-03 02:10"), FULL, held_full=True)]
    due = kind_due(NIGHTLY, past, at("2026-05-04 02:05"), UTC)
    assert re.fullmatch(r"incremental: none since 2026-05-04 02:00 UTC \(daily at 02:00\)", due.reason)
