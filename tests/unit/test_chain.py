"""Points, the plan that restores one, and the names people give them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import AmbiguousPoint, Gap, NoSuchPoint, NoSuchVolume
from blockbak.model.chain import chains, choose, plan, points
from blockbak.model.facts import DIFFERENTIAL
from tests.points import histories, image, point_name


def shortest(wanted, images):
    """How many images the shortest chain to an image of a point has; None without one. By trying all."""

    def length(one):
        if one.opening.parent is None:
            return 1
        below = [length(other) for other in images if other.key == (one.opening.parent, one.opening.parent_root)]
        return min((count + 1 for count in below if count), default=None)

    found = [length(one) for one in images if one.point == wanted]
    return min((count for count in found if count), default=None)


def assert_whole(chain, wanted):
    assert chain[0].opening.parent is None
    assert chain[-1].point == wanted
    for lower, upper in itertools.pairwise(chain):
        assert (upper.opening.parent, upper.opening.parent_root) == lower.key


@given(histories(), st.data())
def test_the_plan_is_the_shortest_whole_chain(images, data):
    lost = data.draw(st.sets(st.sampled_from([one.file for one in images])))
    left = [one for one in images if one.file not in lost]
    for point in points(images):
        expected = shortest(point.id, left)
        if expected is None:
            with pytest.raises(Gap) as gap:
                plan(point, images, lost)
            assert gap.value.fields["point"] == point.id
            assert not any(one.point == gap.value.fields["parent"] and not one.opening.parent for one in left)
        else:
            chain = plan(point, images, lost)
            assert len(chain) == expected
            assert_whole(chain, point.id)
            assert not lost & {one.file for one in chain}


@given(histories(), st.data())
def test_chains_are_those_of_the_images_that_have_one(images, data):
    left = data.draw(st.permutations(images))[: data.draw(st.integers(0, len(images)))]
    found = chains(left)
    for one in left:
        held = [other for other in left if other.key == (one.opening.parent, one.opening.parent_root)]
        whole = one.opening.parent is None or any(other.file in found for other in held)
        assert (one.file in found) == whole
        if whole:
            assert_whole(found[one.file], one.point)
            assert found[one.file][-1] is one


def test_of_equally_long_chains_the_smaller_one_serves():
    images = [image(1, image_bytes=900), image(1, copy=2, image_bytes=500), image(2, 1)]
    assert plan(points(images)[0], images) == (images[1],)


def test_a_synthetic_full_serves_the_children_of_its_point():
    images = [image(1), image(2, 1), image(2, synthetic=True, copy=2), image(3, 2)]
    assert plan(points(images)[2], images) == (images[2], images[3])
    assert plan(points(images)[2], images, {images[2].file}) == (images[0], images[1], images[3])


def test_an_image_of_the_right_point_with_another_root_serves_no_child():
    images = [image(1, root="another"), image(2, 1)]
    with pytest.raises(Gap):
        plan(points(images)[1], images)


@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_a_gap_names_the_missing_parent(lost):
    whole = [image(1), *(image(number, number - 1) for number in (2, 3, 4, 5))]
    left = [one for one in whole if one.opening.sequence != lost]
    for point in points(whole):
        number = point.sequence
        if number > lost:
            with pytest.raises(Gap) as gap:
                plan(point, left)
            assert gap.value.fields == {"point": point.id, "parent": point_name(lost)}
        elif number < lost:
            assert len(plan(point, left)) == number


@given(histories())
def test_the_files_of_all_plans_restore_every_point_by_themselves(images):
    every = points(images)
    files = {one.file for point in every for one in plan(point, images)}
    left = [one for one in images if one.file in files]
    for point in every:
        assert_whole(plan(point, left), point.id)


def test_points_are_ordered_by_sequence_not_by_clock_or_name():
    images = [image(30), image(3), image(12, 3)]
    assert [point.sequence for point in points(images)] == [3, 12, 30]
    assert [one.file for one in points([image(4, copy=2), image(4)])[0].images] == [
        image(4).file,
        image(4, copy=2).file,
    ]


# --- names ------------------------------------------------------------------------------------------


def two_volumes():
    """Points 1, 2, 3 of ``db`` and 17, 18 of ``web``."""
    one = [image(1, volume="db"), image(2, 1, volume="db"), image(3, 1, DIFFERENTIAL, volume="db")]
    other = [image(17, volume="web"), image(18, 17, volume="web")]
    return {"db": points(one), "web": points(other)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (point_name(2), 2),
        ("20260503", 2),
        (f"db@{point_name(3)}", 3),
        ("db@20260504", 3),
        ("db@latest", 3),
        ("web@latest", 18),
        ("db@2026-05-03T00:00:00Z", 2),
        ("db@2026-05-03T23:59:59+00:00", 2),
        ("db@2026-05-03T00:30:00+02:00", 1),
        ("db@2030-01-01", 3),
    ],
)
def test_names_that_fit_one_point(name, expected):
    assert choose(name, two_volumes()).sequence == expected


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("latest", AmbiguousPoint),
        ("2026", AmbiguousPoint),
        ("db@2026", AmbiguousPoint),
        ("", NoSuchPoint),
        ("db@", NoSuchPoint),
        ("nonsense", NoSuchPoint),
        ("2026-05-03", NoSuchPoint),
        ("db@2020-01-01", NoSuchPoint),
        (f"web@{point_name(2)}", NoSuchPoint),
        ("mail@latest", NoSuchVolume),
        ("@latest", NoSuchVolume),
    ],
)
def test_names_that_do_not(name, error):
    with pytest.raises(error) as raised:
        choose(name, two_volumes())
    assert name.rpartition("@")[0] in str(raised.value)


def test_latest_needs_no_volume_where_there_is_one():
    assert choose("latest", {"db": two_volumes()["db"], "empty": []}).sequence == 3


def test_latest_goes_by_sequence_even_if_the_clock_was_turned_back():
    images = [image(1, created="2026-05-09T00:00:00.000Z"), image(2, 1, created="2026-05-02T00:00:00.000Z")]
    assert choose("vol@latest", {"vol": points(images)}).sequence == 2


def test_of_too_many_candidates_some_are_named():
    images = [image(number) for number in range(1, 13)]
    with pytest.raises(AmbiguousPoint) as raised:
        choose("2026", {"vol": points(images)})
    assert str(raised.value).count("2026") == 9
    assert "…" in str(raised.value)


def test_an_id_that_begins_another_is_still_exact():
    """A whole id is never ambiguous."""
    images = [image(number) for number in (1, 2)]
    for point in points(images):
        assert choose(point.id, {"vol": points(images)}) == point
