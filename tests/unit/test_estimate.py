"""What a policy will cost, as far as arithmetic goes."""

import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import estimate
from blockbak.model.estimate import Before, Sample, Sizes, Span, Volume
from blockbak.model.events import Entry
from blockbak.model.retention import Policy
from blockbak.model.schedule import DAILY, NEVER, Kinds, Made, kind_due, parse_calendar

DAY = 86400
NOW = datetime(2026, 5, 1, 3, tzinfo=UTC)
GIB = 1 << 30

spans = st.tuples(*[st.floats(0, 1e12)] * 3).map(lambda three: Span(*sorted(three)))


IMAGE = 6144
"""Bytes of an image that holds no data."""


def volume(share=0.01, full=0.5, packed=0.6):
    """A GiB; each estimate is exact."""
    exact = lambda value: Span(value, value, value)  # noqa: E731 - it is said once
    return Volume(GIB, exact(full * GIB), exact(100), exact(share), exact(packed), exact(20))


# --- spans ------------------------------------------------------------------------------------------------------


@given(spans, spans, st.floats(0, 1000))
def test_spans_stay_spans(one, other, factor):
    for made in (one + other, one * factor, one.most(5.0)):
        assert 0 <= made.low <= made.likely <= made.high
    assert (one + other).likely == one.likely + other.likely


def test_nonsense_is_no_span():
    for wrong in ((2, 1, 3), (-1, 0, 1), (0, 2, 1)):
        with pytest.raises(ValueError, match="no span"):
            Span(*wrong)


@given(st.integers(0, 2**32), st.floats(0.1, 0.9))
def test_a_sample_holds_the_mean_of_all_nearly_always(seed, share):
    dice = np.random.default_rng(seed)
    every = np.where(dice.random(20_000) < share, dice.random(20_000) * 1000, 0)
    hit = 0
    for _ in range(20):
        span = estimate.of_mean(dice.choice(every, 400))
        hit += span.low <= every.mean() <= span.high
    assert hit >= 14, "19 of 20 in the long run"


def test_the_past_gives_its_middle_half():
    assert estimate.of_past([5, 1, 2, 3, 4]) == Span(2, 3, 4)
    assert estimate.of_past([7]) == Span(7, 7, 7)


# --- changes ---------------------------------------------------------------------------------------------------


def test_changes_fall_onto_each_other():
    one = volume(share=0.1)
    assert one.changed(DAY).likely == pytest.approx(0.1 * GIB)
    assert one.changed(2 * DAY).likely == pytest.approx(0.19 * GIB)
    assert one.changed(1000 * DAY).likely == pytest.approx(GIB)
    assert one.delta_bytes(DAY).likely == pytest.approx(0.06 * GIB + IMAGE)
    assert one.delta_bytes(1000 * DAY).likely == 0.5 * GIB, "never more than a full"


@given(st.floats(0, 1), st.floats(60, 1e8))
def test_no_more_changes_than_there_is(share, seconds):
    changed = volume(share=share).changed(seconds)
    assert 0 <= changed.likely <= GIB


def before(days, kind, stored, changed, seconds):
    """A point that was made of a device of 1000 bytes, by what is stored of those."""
    return Before(NOW + timedelta(days=days), Sizes(kind, stored + IMAGE, changed, 1000), seconds)


def test_the_past_tells_how_much_changes_in_a_day():
    full = before(0, "full", 500, 1000, 10.0)
    days = [before(1, "incremental", 30, 50, 2.0), before(3, "incremental", 60, 100, 3.0)]
    made = estimate.from_past([full, *days])
    assert (made.device_bytes, made.full_seconds) == (1000, Span(10, 10, 10))
    assert made.full_bytes.likely == 500 + IMAGE
    assert made.packed == Span(0.6, 0.6, 0.6)
    assert made.delta_seconds == Span(2.25, 2.5, 2.75)
    assert 0.05 <= made.day_share.likely <= 0.052
    assert estimate.from_past(days) is None, "no full"
    assert estimate.from_past([full]) is None, "nothing of changes"
    soon = before(5 / DAY, "incremental", 30, 50, 2.0)
    assert estimate.from_past([full, soon]) is None, "five seconds tell nothing of a day"
    told = Span(0.2, 0.2, 0.2)
    assert estimate.from_past([full, soon], told).day_share == told
    assert estimate.from_past([full], told).packed == Span(0.5, 0.5, 0.5)
    since = [full, *days, before(4, "differential", 90, 190, 2.0)]
    assert 0.05 <= estimate.from_past(since).day_share.likely <= 0.052, "in four days, not in one"


def test_the_history_tells_of_points_that_are_gone():
    def entry(point, event="made", volume="v", **facts):
        return Entry(1, "", "h", "u", "", event, "", volume, [point] if point else [], 0, "", 7.0, facts, "")

    facts = {"kind": "full", "stored_bytes": 5, "changed_bytes": 10, "device_bytes": 10, "mode": "cold"}
    entries = [
        entry("20260502T030000Z-0002", **facts | {"kind": "incremental"}),
        entry("20260501T030000Z-0001", **facts),
        entry("20260503T030000Z-0003", volume="w", **facts),
        entry("20260503T030000Z-0003", event="removed", **facts),
        entry("", source="/dev/sdb"),
        entry("20260504T030000Z-0004", **facts | {"device_bytes": 0}),
        entry("20260504T030000Z-0004", **facts | {"stored_bytes": "many"}),
        entry("no id", **facts),
    ]
    one, two = estimate.of_history(entries, "v")
    assert (one.moment, one.sizes.kind, one.seconds) == (NOW, "full", 7.0)
    assert (two.moment, two.sizes.kind) == (NOW + timedelta(days=1), "incremental")


def test_a_sample_tells_sizes_and_times():
    stored = np.array([0.0, 0.0, 100.0, 300.0])
    told = Span(0.01, 0.01, 0.01)
    made = estimate.from_sample(1000_000, Sample(1000, stored, stored > 0, 1e6, 1e4), told)
    assert made.full_bytes.likely == 100_000 + IMAGE
    assert made.full_bytes.low < 100_000 < made.full_bytes.high
    assert made.full_seconds == Span(35, 50, 100), "half of it is compressed, at 10 KB a second"
    assert made.delta_seconds.likely == 1.0
    assert made.packed.likely == pytest.approx(0.2)
    empty = estimate.from_sample(1000, Sample(10, np.zeros(5), np.zeros(5, bool), 1e6, float("inf")), told)
    assert empty.full_bytes == empty.delta_bytes(DAY) == Span(IMAGE, IMAGE, IMAGE), "an image without data is one too"


# --- policies ---------------------------------------------------------------------------------------------------


def test_runs_follow_the_calendar():
    made = estimate.runs(Kinds(), 0, NOW, NOW + timedelta(days=30), UTC)
    assert 30 <= len(made) <= 32
    assert [one.kind for one in made] == ["full"] + ["incremental"] * (len(made) - 1)
    kinds = Kinds(full=parse_calendar("monthly"), differential=parse_calendar("weekly"), incremental=DAILY)
    made = estimate.runs(kinds, 0, NOW, NOW + timedelta(days=365), UTC)
    counts = {kind: sum(one.kind == kind for one in made) for kind in ("full", "differential", "incremental")}
    assert 12 <= counts["full"] <= 14
    assert 38 <= counts["differential"] <= 54
    assert estimate.runs(Kinds(incremental=NEVER), 0, NOW, NOW + timedelta(days=9), UTC) == []


def test_which_kind_is_due_goes_by_all_that_were_made():
    kinds = Kinds(
        full=parse_calendar("monthly"), differential=parse_calendar("weekly"), incremental=parse_calendar("every 6h")
    )
    made = estimate.runs(kinds, 25 * DAY, NOW, NOW + timedelta(days=90), UTC)
    for number, one in enumerate(made):
        due = kind_due(kinds, made[:number], one.moment, UTC).kind
        last = next((before.moment for before in reversed(made[:number]) if before.kind == "full"), one.moment)
        assert one.kind == ("full" if one.moment - last >= timedelta(days=25) else due)


def test_a_full_of_its_own_comes_every_so_often():
    made = estimate.runs(Kinds(), 90 * DAY, NOW, NOW + timedelta(days=365), UTC)
    assert sum(one.kind == "full" for one in made) == 5


def test_what_is_kept_is_what_the_policy_keeps():
    made = estimate.runs(Kinds(), 0, NOW, NOW + timedelta(days=60), UTC)
    assert len(estimate.kept(made, None, NOW + timedelta(days=60))) == len(made)
    at = NOW + timedelta(days=60)
    there = estimate.kept(made, Policy(daily=7, weekly=3), at)
    assert len(there) == 8, "the last seven days have two of the three weeks"
    assert there[-1] == made[-1]
    assert len(estimate.kept(made, Policy(daily=7), NOW + timedelta(days=3))) == 4


numbers = st.integers(0, 5)
policies = st.builds(
    Policy, last=numbers, hourly=numbers, daily=numbers, weekly=numbers, monthly=numbers, yearly=numbers,
    within=st.sampled_from([0.0, 3600.0, 9 * DAY]),
)  # fmt: skip


@given(st.lists(st.integers(1, 40 * 24), min_size=1, max_size=60), policies)
def test_one_look_at_the_end_keeps_what_many_would_have_kept(hours, policy):
    moment, made = NOW, []
    for gap in hours:
        moment += timedelta(hours=gap)
        made.append(Made(moment, "incremental", held_full=False))
    there: list[Made] = []
    for one in made:
        there = estimate.kept([*there, one], policy, one.moment)
    assert estimate.kept(made, policy, moment) == there


def test_many_runs_of_which_many_are_kept_are_quick():
    made = [Made(NOW + timedelta(minutes=5 * number), "incremental", held_full=False) for number in range(20_000)]
    begun = time.process_time()
    assert len(estimate.kept(made, Policy(within=20 * DAY), NOW + timedelta(days=365))) == 20 * 288 + 1
    assert time.process_time() - begun < 5


def test_room_is_a_full_and_what_changed_between():
    one = volume(share=0.1)
    made = estimate.runs(Kinds(), 0, NOW, NOW + timedelta(days=20), UTC)
    there = estimate.kept(made, Policy(daily=7), NOW + timedelta(days=20))
    room = estimate.room(one, there)
    assert room.likely == pytest.approx(0.5 * GIB + 6 * 0.06 * GIB, rel=0.02)
    most = estimate.most_room(one, made, Policy(daily=7), NOW + timedelta(days=20))
    assert most.likely == pytest.approx(room.likely + 0.5 * GIB)
    assert estimate.room(one, []) == Span(0, 0, 0)


def test_a_snapshot_holds_what_is_written_while_it_is_read():
    busy = volume(share=0.5)
    assert estimate.snapshot_room(busy, full=True).likely == pytest.approx(busy.changed(100).likely)
    assert estimate.snapshot_room(busy, full=False).likely < estimate.snapshot_room(busy, full=True).likely
