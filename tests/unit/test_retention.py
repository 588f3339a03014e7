"""What a policy keeps, why, and what is merged: laws over random histories, and years by the calendar."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import PointNeeded
from blockbak.flow.delete import decide
from blockbak.model import retention
from blockbak.model.chain import chains, points
from blockbak.model.events import Entry
from blockbak.model.pin import Pin
from blockbak.model.retention import (
    EXPIRE,
    KEEP,
    MERGE,
    Candidate,
    Policy,
    chosen,
    full_due,
    plan,
    simulate,
    with_bases,
)
from blockbak.units import DAY
from tests.points import histories, image, point_name

NOW = datetime(2026, 6, 1, tzinfo=UTC)
START = datetime(2026, 1, 1, 3, tzinfo=UTC)


def daily(count, start=START, step=timedelta(days=1), verified=()):
    return [Candidate(f"p{at}", start + at * step, verified=at in verified) for at in range(count)]


def kept(candidates, now=NOW, **rules):
    return list(reversed([one.id for one in candidates if one.id in chosen(candidates, Policy(**rules), now)]))


def policies():
    few = st.integers(0, 3)
    return st.builds(
        Policy, last=few, hourly=few, daily=few, weekly=few, monthly=few, yearly=few,
        within=st.sampled_from([0.0, 3 * DAY, 40 * DAY]), verified=few,
    )  # fmt: skip


def pin(number, *, immutable=False, until=""):
    return Pin(point_name(number), "why", "root", "web", "2026-05-01T00:00:00.000Z", until, immutable)


# --- which are kept ------------------------------------------------------------------------------------


def test_the_last_ones():
    assert kept(daily(10), last=3) == ["p9", "p8", "p7"]


def test_the_newest_of_each_period():
    four_a_day = daily(40, step=timedelta(hours=6))  # 3, 9, 15, 21 o'clock
    assert kept(four_a_day, hourly=3) == ["p39", "p38", "p37"]
    assert kept(four_a_day, daily=3) == ["p39", "p35", "p31"]
    # 2026-01-01 was a Thursday: weeks end with the Sundays 4 and 11 January.
    assert kept(daily(14), weekly=3) == ["p13", "p10", "p3"]
    assert kept(daily(70), monthly=5) == ["p69", "p58", "p30"]
    assert kept(daily(800), yearly=2) == ["p799", "p729"]


def test_a_period_without_a_point_does_not_count():
    gaps = [one for at, one in enumerate(daily(100)) if at % 10 == 0]
    assert kept(gaps, daily=3) == ["p90", "p80", "p70"]


def test_iso_weeks_do_not_end_with_the_year():
    around = daily(10, start=datetime(2026, 12, 26, tzinfo=UTC))
    # 2026-12-28 to 2027-01-03 is one week, 2026-W53.
    assert kept(around, weekly=9) == ["p9", "p8", "p1"]


def test_rules_count_each_by_itself_and_all_reasons_are_told():
    found = chosen(daily(10), Policy(last=1, daily=2), NOW)
    assert found == {"p9": ["one of the last 1", "newest of day 2026-01-10"], "p8": ["newest of day 2026-01-09"]}


def test_young_ones():
    now = START + timedelta(days=9)
    assert kept(daily(10), now, within=2 * DAY) == ["p9", "p8", "p7"]
    # By a clock that was set back, or forward, nothing young goes.
    assert kept(daily(10), START - timedelta(days=400), within=2 * DAY) == [f"p{at}" for at in range(9, -1, -1)]


def test_the_newest_stays_whatever_the_policy_says():
    assert kept(daily(3), START + timedelta(days=500), within=1.0) == ["p2"]
    assert chosen([], Policy(last=3), NOW) == {}


def test_without_a_rule_everything_stays():
    assert not Policy().has_rule
    assert not Policy(verified=2).has_rule
    assert len(kept(daily(5))) == 5
    assert len(kept(daily(5), verified=2)) == 5


def test_so_many_verified_ones_stay():
    some = daily(10, verified=(0, 1, 4))
    assert kept(some, last=2) == ["p9", "p8"]
    assert kept(some, last=2, verified=2) == ["p9", "p8", "p4", "p1"]
    assert kept(some, last=6, verified=1) == ["p9", "p8", "p7", "p6", "p5", "p4"]
    assert kept(some, last=1, verified=9) == ["p9", "p4", "p1", "p0"]


@pytest.mark.parametrize("name", [field.name for field in fields(Policy) if field.name != "others"])
def test_a_policy_below_zero_is_refused_at_birth(name):
    with pytest.raises(ValueError, match=name):
        Policy(**{name: -1})


@given(st.lists(st.tuples(st.integers(0, 500), st.booleans()), max_size=30), policies())
def test_pruning_twice_is_pruning_once(days, policy):
    there = [Candidate(f"p{at}", START + timedelta(days=day), ok) for at, (day, ok) in enumerate(sorted(days))]
    first = chosen(there, policy, NOW)
    assert chosen([one for one in there if one.id in first], policy, NOW).keys() == first.keys()
    assert not there or there[-1].id in first


# --- what is merged --------------------------------------------------------------------------------------


def carried_out(images, found, hidden=()):
    """What is there after each step of the plan, as the flow does it."""
    images, hidden = list(images), list(hidden)

    def remove(gone):
        if gone:
            for one in decide(images, gone, hidden).images:
                (images if one in images else hidden).remove(one)

    remove(found.expired)
    yield images
    for merges, gone in found.groups():
        images += [merge.imagined() for merge in merges]
        yield images
        remove(gone)
        yield images


def served(images):
    return {one.point for one in images if one.file in chains(images)}


@given(histories(), policies(), st.data())
def test_every_kept_point_is_served_at_every_step_and_needs_none_that_went(images, policy, data):
    files = sorted(one.file for one in images)
    damaged = data.draw(st.sets(st.sampled_from(files), max_size=2))
    covered = data.draw(st.sets(st.sampled_from(files), max_size=2))
    pins = {
        point_name(number): pin(number, immutable=immutable)
        for number, immutable in data.draw(st.dictionaries(st.integers(1, 10), st.booleans(), max_size=2)).items()
    }
    known = [one for one in images if one.file not in covered]
    hidden = [one for one in images if one.file in covered]
    found = plan(known, policy, NOW, pins=pins, damaged=damaged, hidden=hidden)
    usable = [one for one in known if one.file not in damaged]
    actions = {one.point: one.action for one in found.decisions}
    assert actions.keys() == {one.point for one in images}
    stays = {point for point, action in actions.items() if action == KEEP}
    good = served(usable)
    # What is damaged, hidden or pinned stays; so does the newest that is good.
    assert {point for point in actions if point not in good or point in pins} <= stays
    assert not good or max(good, key=lambda point: int(point[-4:], 16)) in stays
    there = usable
    for there in carried_out(usable, found, hidden):
        assert stays & good <= served(there)
    assert not {one.point for one in there} & found.gone
    # Of what is kept nothing stands on what went; nor does what only waits for a person.
    whole = chains(there)
    assert all(one.point in stays for chain in whole.values() for one in chain)
    parents = {one.opening.parent for one in images if one.point not in good} - {None}
    assert not parents & found.gone
    for point, one in pins.items():
        if one.immutable and point in actions:
            left = {each.file for each in there}
            assert {each.file for each in usable if each.point == point} <= left, "an immutable point was touched"


@given(histories(), policies())
def test_a_plan_that_was_carried_out_has_nothing_more_to_do(images, policy):
    found = plan(images, policy, NOW)
    there = list(images)
    for there in carried_out(images, found):
        pass
    again = plan(there, policy, NOW)
    assert not again.merges
    # A fork that stayed for others may go now that one of them is merged elsewhere; nothing else does.
    forks = {one.point for one in found.decisions if any("each by itself" in why for why in one.reasons)}
    assert again.gone <= forks


def chain(count):
    return [image(1), *(image(at, at - 1) for at in range(2, count + 1))]


def actions(found):
    return {int(one.point[-4:], 16): one.action for one in found.decisions}


def test_the_beginning_becomes_a_full_and_the_middle_one_delta():
    found = plan(chain(5), Policy(last=1), NOW, pins={point_name(3): pin(3)})
    assert actions(found) == {1: MERGE, 2: MERGE, 3: KEEP, 4: MERGE, 5: KEEP}
    full, delta = found.merges
    assert (full.point, full.kind, full.below) == (point_name(3), "full", 0)
    assert [one.opening.sequence for one in full.layers] == [1, 2, 3]
    assert (delta.point, delta.kind, delta.below) == (point_name(5), "incremental", 3)
    assert [one.opening.sequence for one in delta.layers] == [4, 5]
    assert delta.imagined().opening.parent == point_name(3)
    assert delta.imagined().opening.parent_root == "root 3"
    assert full.bytes_max == 3000
    (group,) = found.groups()
    assert group == ([full, delta], {point_name(1), point_name(2), point_name(4)})


def test_what_no_one_needs_expires():
    images = [*chain(3), image(4), image(5, 4)]
    found = plan(images, Policy(last=1), NOW)
    assert actions(found) == {1: EXPIRE, 2: EXPIRE, 3: EXPIRE, 4: MERGE, 5: KEEP}
    assert found.decisions[0].reasons == ("no rule keeps it",)
    assert found.decisions[3].reasons == ("no rule keeps it", f"what {point_name(5)} needs of it goes there")


def test_the_end_of_a_chain_needs_no_merge():
    found = plan(chain(4), Policy(last=1), NOW, pins={point_name(1): pin(1)})
    assert actions(found) == {1: KEEP, 2: MERGE, 3: MERGE, 4: KEEP}
    assert [(one.point, one.below) for one in found.merges] == [(point_name(4), 1)]
    assert plan(chain(2), Policy(last=2), NOW).merges == ()


def test_a_full_on_which_several_differentials_stand_stays_with_them():
    images = [image(1), image(2, 1, "differential"), image(3, 1, "differential"), image(4, 1, "differential")]
    found = plan(images, Policy(last=2), NOW)
    assert actions(found) == {1: KEEP, 2: EXPIRE, 3: KEEP, 4: KEEP}
    assert found.decisions[0].reasons == (f"{point_name(3)} and 1 more stand on it, each by itself",)
    assert found.merges == ()
    # With one of them left, it goes into that.
    found = plan(images, Policy(last=1), NOW)
    assert actions(found) == {1: MERGE, 2: EXPIRE, 3: EXPIRE, 4: KEEP}


def test_a_synthetic_full_serves_already():
    images = [*chain(3), image(3, synthetic=True, copy=2)]
    found = plan(images, Policy(last=1), NOW)
    assert actions(found) == {1: EXPIRE, 2: EXPIRE, 3: KEEP}
    assert found.merges == ()


def test_what_is_damaged_does_not_count_and_keeps_what_it_stands_on():
    images = chain(4)
    found = plan(images, Policy(last=1), NOW, damaged={images[3].file})
    assert actions(found) == {1: KEEP, 2: KEEP, 3: KEEP, 4: KEEP}
    assert [one.damaged for one in found.decisions] == [False, False, False, True]
    assert found.decisions[2].reasons == ("one of the last 1", f"{point_name(4)} stands on it")
    # A damaged middle takes its children along.
    found = plan([*images, image(5), image(6, 5)], Policy(last=1), NOW, damaged={images[1].file})
    assert actions(found) == {1: KEEP, 2: KEEP, 3: KEEP, 4: KEEP, 5: MERGE, 6: KEEP}


def test_what_an_immutable_point_stands_on_is_not_merged():
    images = chain(4)
    found = plan(images, Policy(last=1), NOW, pins={point_name(3): pin(3, immutable=True)})
    assert actions(found) == {1: KEEP, 2: KEEP, 3: KEEP, 4: KEEP}
    assert "immutable, by root@web: why" in found.decisions[2].reasons
    found = plan(images, Policy(last=1), NOW, pins={point_name(3): pin(3)})
    assert actions(found) == {1: MERGE, 2: MERGE, 3: KEEP, 4: KEEP}


def test_a_pin_holds_until_its_time():
    one = pin(1, until="2026-06-01T00:00:00.000Z")
    assert one.stands(NOW - timedelta(seconds=1))
    assert not one.stands(NOW)
    assert pin(1).stands(NOW)


# --- what the history tells ------------------------------------------------------------------------------


def line(event, points=(), volume="vol", time="2026-05-01T00:00:00.000Z", **facts):
    return Entry(1, time, "web", "root", "", event, "", volume, list(points), 0, "", 1.0, facts, "")


def test_verified_is_what_a_whole_check_found_whole_and_nothing_since():
    images = chain(3)
    files = [one.file for one in images]
    whole = line("verified", images=files, damaged=[], share=1.0)

    def verified(*entries):
        return {int(one[-4:], 16) for one in retention.checks(entries, "vol").verified(images)}

    assert verified(whole) == {1, 2, 3}
    assert verified(line("verified", images=files, damaged=[], share=0.5)) == set()
    assert verified(line("verified", images=files, damaged=[], share=1.0, volume="other")) == set()
    assert verified(line("verified", images=files[:2], damaged=[], share=1.0)) == {1, 2}
    bad = line("verified", images=[files[0]], damaged=[files[1]], share=0.1)
    assert verified(whole, bad) == {1}
    assert retention.checks([whole, bad], "vol").bad == {files[1]}
    # A sample that finds nothing does not take it back, a whole check does.
    assert verified(whole, bad, line("verified", images=files, damaged=[], share=0.5)) == {1}
    assert verified(whole, bad, whole) == {1, 2, 3}
    assert verified(whole, line("removed", files=[files[2]])) == {1, 2}
    assert verified(line("drilled", [point_name(2)], ok=True)) == {2}
    assert verified(line("drilled", [point_name(2)], ok=True), line("drilled", [point_name(2)], ok=False)) == set()
    assert verified(line("merged", [point_name(1)], file=files[0], verified=True)) == {1}


def test_lines_of_another_form_tell_nothing():
    odd = [line("verified", images="all", share="1"), line("verified"), line("merged", verified=True, file=3),
           line("made", ["p"], kind="full", time="once")]  # fmt: skip
    found = retention.checks(odd, "vol")
    assert (found.good, found.bad, found.drilled, found.fulls) == (set(), set(), set(), [])


def test_a_full_is_due_when_the_last_one_from_the_source_is_old():
    made = datetime(2026, 5, 2, tzinfo=UTC)
    there = points([image(1), image(2, 1), image(2, synthetic=True, copy=2)])
    policy = Policy(full_every=10 * DAY)
    assert not full_due(there, policy, made + timedelta(days=9))
    assert full_due(there, policy, made + timedelta(days=10))
    assert not full_due(there, replace(policy, full_every=0.0), made + timedelta(days=10_000))
    # A synthetic one does not count; one that was merged since, and that the history knows of, does.
    composed = points([image(2, synthetic=True)])
    assert full_due(composed, policy, made + timedelta(days=3))
    assert not full_due(composed, policy, made + timedelta(days=3), [made])
    assert full_due([], policy, made)


# --- years in a second -----------------------------------------------------------------------------------


def test_a_full_of_a_clock_that_was_ahead_does_not_put_off_the_next_for_years():
    later = [image(1, created="2031-01-01T00:00:00.000Z")]
    assert full_due(points(later), Policy(full_every=90 * DAY), NOW)
    assert full_due([], Policy(full_every=90 * DAY), NOW, [NOW + timedelta(days=2000)])
    # A little may be two machines that do not agree.
    assert not full_due([], Policy(full_every=90 * DAY), NOW, [NOW + timedelta(minutes=30)])


def test_years_of_a_policy():
    now = START + timedelta(days=9)
    until = now + timedelta(days=5 * 365)
    policy = Policy(last=3, daily=7, weekly=5, monthly=12, yearly=10)
    found = simulate(daily(10), policy, now, until, {})
    moments = [one.created for one, _ in found]
    assert moments == sorted(moments)
    assert until - moments[-1] < timedelta(days=1)
    # 7 days, 5 weeks, 12 months and the 5 years that are over, some of them the same points.
    assert len([one for one, why in found if any("year" in each for each in why)]) == 6
    assert 20 <= len(found) <= 7 + 5 + 12 + 6
    assert all(why for _, why in found)


def test_a_pin_stays_in_the_simulation_until_its_time():
    there = [Candidate(point_name(1), START)]
    policy, until = Policy(last=1), START + timedelta(days=30)
    for end, stays in (("2026-01-20T00:00:00.000Z", False), ("2026-03-01T00:00:00.000Z", True), ("", True)):
        found = simulate(there, policy, START, until, {point_name(1): pin(1, until=end)})
        assert (point_name(1) in {one.id for one, _ in found}) is stays


def test_what_an_immutable_point_stands_on_stays_as_long_as_it():
    pins = {point_name(1): pin(1, until="2026-07-01T00:00:00.000Z"), point_name(3): pin(3, immutable=True)}
    found = with_bases(pins, chain(4))
    assert found.keys() == {point_name(number) for number in (1, 2, 3)}
    assert all(one.stands(NOW + timedelta(days=5000)) for one in found.values())
    assert with_bases({point_name(3): pin(3)}, chain(4)).keys() == {point_name(3)}


def test_points_of_every_second_are_thinned_out_and_the_years_gone_through_all_the_same():
    fast = daily(10, start=NOW, step=timedelta(seconds=1))
    until = NOW + timedelta(days=7 * 365)
    found = simulate(fast, Policy(yearly=9), NOW, until, {})
    assert [one.created.year for one, _ in found] == list(range(2026, 2034))
    far = datetime(9999, 12, 30, tzinfo=UTC)
    assert far - simulate(fast, Policy(last=1), NOW, far, {})[-1][0].created < timedelta(days=200)


def test_nothing_is_simulated_backwards():
    assert [one.id for one, _ in simulate(daily(3), Policy(last=2), NOW, START, {})] == ["p1", "p2"]


def test_the_decision_is_that_of_delete():
    """What the plan calls gone, a deletion by itself would refuse where it is merged."""
    images = chain(3)
    found = plan(images, Policy(last=1), NOW)
    with pytest.raises(PointNeeded):
        decide(images, found.gone)
