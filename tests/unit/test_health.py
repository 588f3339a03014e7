"""Health: what is known of a volume against what is asked of it, at any moment."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model.health import (
    DAY,
    ROOM_SECONDS,
    Attempt,
    Drilled,
    Facts,
    Goals,
    Growth,
    Place,
    StoredImage,
    StoredPoint,
    duration,
    judge,
    judge_room,
    rate,
    stamp,
)

NOW = datetime(2026, 5, 1, 3, 0, tzinfo=UTC)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def point(name: str, age: float, *chain: str) -> StoredPoint:
    return StoredPoint(name, ago(age), chain)


def image(file: str, size: int = 100, **more) -> StoredImage:
    return StoredImage(file, size, **more)


def names(health) -> list[str]:
    return [one.name for one in health.reasons]


GOOD = Facts(
    "web", (point("old", 90_000, "a"), point("new", 3600, "a", "b")), (image("a", 900), image("b", 100)),
    drilled=Drilled(ago(86_400), "old", ok=True, rto_seconds=600.0),
)  # fmt: skip


def test_a_volume_that_is_as_it_should_be():
    health = judge(GOOD, Goals(rpo=7200, rto=900), NOW)
    assert health.ok
    assert (health.newest, health.age_seconds, health.chain_images, health.points) == ("new", 3600, 2, 2)
    assert (health.rpo_met, health.rto_met, health.stored_bytes) == (True, True, 1000)


@pytest.mark.parametrize(
    ("facts", "goals", "reasons"),
    [
        (Facts("v"), Goals(), ["NoGoodPoint"]),
        (GOOD, Goals(rpo=3599), ["RpoMissed"]),
        (GOOD, Goals(rpo=3600), []),
        (GOOD, Goals(rto=599), ["RtoMissed"]),
        (GOOD, Goals(rto=600), []),
        (replace(GOOD, drilled=None), Goals(), []),
        (replace(GOOD, drilled=None), Goals(rto=1), ["NeverDrilled"]),
        (replace(GOOD, drilled=Drilled(NOW, "new", ok=False, rto_seconds=1.0)), Goals(), ["DrillFailed"]),
        (replace(GOOD, failed=Attempt(NOW, "NoSpace")), Goals(), ["BackupFailed"]),
        (replace(GOOD, leftovers=("x.partial",)), Goals(), ["Leftovers"]),
        (replace(GOOD, damage=("The manifest x is damaged.",)), Goals(), ["Damaged"]),
        (replace(GOOD, points=(*GOOD.points, point("gap", 60))), Goals(rpo=3600), ["Gap"]),
        (replace(GOOD, points=(point("later", -3600, "a"),)), Goals(), ["ClockWrong"]),
        (replace(GOOD, points=(point("later", -200, "a"),)), Goals(rpo=1), []),
    ],
)
def test_each_reason_by_itself(facts, goals, reasons):
    assert names(judge(facts, goals, NOW)) == reasons


def test_what_was_found_damaged_does_not_count_and_an_older_point_does():
    facts = replace(GOOD, images=(image("a"), image("b", damaged=True)))
    health = judge(facts, Goals(rpo=7200), NOW)
    assert (health.newest, health.rpo_met) == ("old", False)
    assert names(health) == ["RpoMissed", "VerifyFailed"]
    health = judge(replace(GOOD, images=(image("a", damaged=True), image("b"))), Goals(rpo=7200), NOW)
    assert (health.newest, health.age_seconds, health.chain_images) == ("", None, 0)
    assert (health.rpo_met, names(health)) == (False, ["NoGoodPoint", "VerifyFailed"])


def test_a_drill_that_failed_has_not_met_its_rto_however_quick_it_was():
    failed = Drilled(NOW, "new", ok=False, rto_seconds=1.0, differences=("It did not boot.", "Nor was it checked."))
    health = judge(replace(GOOD, drilled=failed), Goals(rto=900), NOW)
    assert health.rto_met is False
    assert health.reasons[0].text == "The drill of 2026-05-01 03:00 UTC failed: It did not boot."


def test_the_verified_share_is_of_bytes():
    images = (image("a", 900, verified_share=1.0, verified_at=ago(50)), image("b", 100, verified_share=0.05))
    health = judge(replace(GOOD, images=images), Goals(), NOW)
    assert health.verified_share == pytest.approx(0.905)
    assert health.verified_at == ago(50)
    bad = (image("a", 900, damaged=True, verified_share=1.0), image("b", 100, verified_share=1.0))
    assert judge(replace(GOOD, images=bad), Goals(), NOW).verified_share == pytest.approx(0.1)


# --- laws ----------------------------------------------------------------------------------------------------

FILES = [f"image-{number}" for number in range(6)]
seconds = st.floats(0, 400 * DAY)
points = st.lists(
    st.builds(point, st.uuids().map(str), seconds, *[st.sampled_from(FILES)]) | st.builds(point, st.uuids().map(str), seconds),
    max_size=6,
)  # fmt: skip
images = st.lists(
    st.builds(StoredImage, st.sampled_from(FILES), st.integers(1, 10**12), st.booleans(), st.floats(0, 1)), max_size=6
)
drills = st.none() | st.builds(Drilled, seconds.map(ago), st.just("p"), st.booleans(), st.floats(0, 1e6))
facts = st.builds(
    Facts, st.just("v"), points.map(tuple), images.map(tuple), st.lists(st.text(), max_size=2).map(tuple),
    st.lists(st.text(), max_size=2).map(tuple), drills,
)  # fmt: skip
goals = st.builds(Goals, st.none() | st.floats(1, 1e8), st.none() | st.floats(1, 1e8))


@given(facts, goals)
def test_ok_says_that_there_is_a_good_point_and_both_goals_are_met(facts, goals):
    health = judge(facts, goals, NOW)
    assert health.ok == (not health.reasons)
    if health.ok:
        assert health.newest
        assert health.rpo_met in (None, True)
        assert health.rto_met in (None, True)
        assert (goals.rpo is None) == (health.rpo_met is None)
        assert (goals.rto is None) == (health.rto_met is None)


@given(facts, goals)
def test_the_newest_good_point_is_whole_and_none_that_is_good_is_newer(facts, goals):
    health = judge(facts, goals, NOW)
    damaged = {one.file for one in facts.images if one.damaged}
    good = [one for one in facts.points if one.chain and not damaged.intersection(one.chain)]
    assert health.age_seconds == min(((NOW - one.made).total_seconds() for one in good), default=None)
    assert health.newest in {one.id for one in good} or not (good or health.newest)


@given(facts, goals, st.floats(0, 1e8))
def test_time_alone_never_makes_anything_better(facts, goals, later):
    before, after = judge(facts, goals, NOW), judge(facts, goals, NOW + timedelta(seconds=later))
    assert set(names(before)) <= set(names(after))


@given(facts, goals)
def test_stricter_goals_never_make_anything_better(facts, goals):
    loose = Goals(goals.rpo and goals.rpo * 2, goals.rto and goals.rto * 2)
    assert set(names(judge(facts, loose, NOW))) <= set(names(judge(facts, goals, NOW)))


@given(facts, goals)
def test_shares_lie_between_none_and_all(facts, goals):
    assert 0 <= judge(facts, goals, NOW).verified_share <= 1


@given(facts, goals)
def test_each_reason_is_a_sentence(facts, goals):
    for reason in judge(facts, goals, NOW).reasons:
        assert reason.text[:1].isupper()
        assert reason.text.endswith(".")
        assert reason.level in ("warning", "critical")


# --- room ----------------------------------------------------------------------------------------------------


def test_the_rate_is_what_came_after_the_first():
    growth = [Growth(ago(10 * DAY), 10**12), *(Growth(ago(day * DAY), 86_400) for day in range(10))]
    assert rate(growth, NOW) == pytest.approx(1.0)


def test_older_growth_than_a_month_does_not_count():
    growth = [Growth(ago(400 * DAY), 5), Growth(ago(40 * DAY), 10**12), Growth(ago(15 * DAY), 30 * 86_400)]
    assert rate(growth, NOW) == pytest.approx(1.0)


@pytest.mark.parametrize("growth", [[], [Growth(ago(3600), 10**9)], [Growth(ago(DAY - 1), 1), Growth(NOW, 10**9)]])
def test_nothing_is_told_before_a_day_is_known(growth):
    assert rate(growth, NOW) is None
    assert judge_room(Place(1, 10, tuple(growth)), NOW).full_at is None


def test_what_is_removed_makes_room():
    growth = [Growth(ago(9 * DAY), 5), Growth(ago(5 * DAY), 1000), Growth(ago(4 * DAY), -3000)]
    found = judge_room(Place(10**6, 10**7, tuple(growth)), NOW)
    assert found.growth < 0
    assert found.full_at is None
    assert found.ok


def test_jobs_that_made_nothing_here_are_named():
    (reason,) = judge_room(Place(10, 10, idle_jobs=("a", "b")), NOW).reasons
    assert (reason.name, reason.text) == ("NoPointOfJob", "Jobs that have made no point here: a; b.")


def test_jobs_that_failed_are_named():
    (reason,) = judge_room(Place(10, 10, failed_jobs=("a (NoSpace)", "b (RunKilled)")), NOW).reasons
    assert (reason.name, reason.text) == ("JobFailed", "Jobs whose last run failed: a (NoSpace); b (RunKilled).")


def test_room_that_runs_out_is_told_in_time():
    growth = (Growth(ago(10 * DAY), 0), Growth(ago(5 * DAY), 10 * 86_400))
    enough, short = int(ROOM_SECONDS) + 3600, int(ROOM_SECONDS) - 3600
    assert judge_room(Place(enough, 10**9, growth), NOW).ok
    found = judge_room(Place(short, 10**9, growth), NOW)
    assert [one.name for one in found.reasons] == ["RoomRunsOut"]
    assert found.full_at == NOW + timedelta(seconds=short)
    assert [one.name for one in judge_room(Place(0, 10**9, growth), NOW).reasons] == ["Full"]


@given(
    st.integers(0, 10**18), st.lists(st.builds(Growth, seconds.map(ago), st.integers(-(10**15), 10**15)), max_size=8)
)
def test_no_history_is_too_odd_for_it(free, growth):
    found = judge_room(Place(free, 10**18, tuple(growth)), NOW)
    assert found.full_at is None or found.full_at >= NOW
    assert (found.full_at is not None) <= (found.growth is not None and found.growth > 0)


# --- words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"), [(45, "45 s"), (420, "7 min"), (26 * 3600, "26 h"), (9 * DAY, "9 days"), (0, "0 s")]
)
def test_durations_are_short(value, text):
    assert duration(value) == text


def test_moments_are_utc():
    assert stamp(datetime.fromisoformat("2026-05-01T05:00+02:00")) == "2026-05-01 03:00 UTC"
