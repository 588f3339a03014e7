"""What deleting points means: the decision, without files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import PointNeeded
from blockbak.flow.delete import decide
from blockbak.model.chain import chains, points
from tests.points import histories, image, point_name


def served(images):
    """The points that can be restored."""
    images = list(images)
    return {one.point for one in images if one.file in chains(images)}


@given(histories(), st.data())
def test_no_kept_point_ever_loses_its_chain(images, data):
    lost = data.draw(st.sets(st.sampled_from([one.file for one in images]), max_size=2))
    images = [one for one in images if one.file not in lost]
    names = sorted({one.point for one in images})
    gone = data.draw(st.sets(st.sampled_from(names))) if names else set()
    left = [one for one in images if one.point not in gone]
    must_serve = served(images) - gone
    if not must_serve <= served(left):
        with pytest.raises(PointNeeded) as raised:
            decide(images, gone)
        assert raised.value.fields["point"] in gone
        assert raised.value.fields["needed_by"] in must_serve - served(left)
        return
    removal = decide(images, gone)
    assert {one.file for one in images if one.point in gone} <= {one.file for one in removal.images}
    assert len({one.file for one in removal.images}) == len(removal.images)
    there = list(images)
    whole = set(chains(there))
    for one in removal.images:
        there.remove(one)
        assert must_serve <= served(there)
        # At no moment does an image that stood on its parents lack one.
        assert {other.file for other in there} & whole <= set(chains(there))
    assert not {one.point for one in there} & gone
    sequences = [one.opening.sequence for one in removal.images]
    assert sequences == sorted(sequences, reverse=True)
    # What never had a chain is none of this decision's business.
    assert {one.file for one in left if one.file not in whole} <= {one.file for one in there}


@given(histories(), st.data())
def test_what_a_hidden_image_needs_is_kept(images, data):
    """An image whose manifest cannot be used serves nobody, but with its manifest back it is a point again."""
    covered = data.draw(st.sets(st.sampled_from([one.file for one in images]), max_size=3))
    known = [one for one in images if one.file not in covered]
    hidden = [one for one in images if one.file in covered]
    gone = data.draw(st.sets(st.sampled_from(sorted({one.point for one in images}))))
    left = [one for one in images if one.point not in gone]
    by_itself = served(known) - gone
    with_recover = served(images) - served(known) - gone
    kept = served(one for one in left if one.file not in covered)
    if not (by_itself <= kept and with_recover <= served(left)):
        with pytest.raises(PointNeeded) as raised:
            decide(known, gone, hidden)
        assert raised.value.fields["point"] in gone
        assert raised.value.fields["needed_by"] in (by_itself - kept) | (with_recover - served(left))
        return
    there = list(images)
    for one in decide(known, gone, hidden).images:
        there.remove(one)
        assert by_itself <= served(one for one in there if one.file not in covered)
        assert with_recover <= served(there)
    assert not {one.point for one in there} & gone


@given(histories())
def test_deleting_everything_is_never_refused(images):
    removal = decide(images, {one.point for one in images})
    assert {one.file for one in removal.images} == {one.file for one in images}
    assert removal.verify == ()


@given(histories())
def test_what_takes_over_is_verified_first(images):
    """Deleting all but the newest point: where it is a synthetic full that stays, it is read before."""
    newest = points(images)[-1]
    gone = {one.point for one in images} - {newest.id}
    if not newest.has_full:
        return
    removal = decide(images, gone)
    removed = {one.file for one in removal.images}
    lost_other = any(one.file in removed for one in newest.images)
    keepers = {one.file for one in removal.verify}
    assert not keepers & removed
    if lost_other:
        kept = [one for one in newest.images if one.file not in removed and one.opening.synthetic]
        assert keepers & {one.file for one in kept} or not kept


def test_a_base_is_needed_until_a_synthetic_full_serves():
    images = [image(1), image(2, 1), image(3, 2)]
    with pytest.raises(PointNeeded) as raised:
        decide(images, {point_name(1)})
    assert raised.value.fields == {"point": point_name(1), "needed_by": point_name(2)}
    full = image(2, synthetic=True, copy=2)
    removal = decide([*images, full], {point_name(1)})
    assert removal.images == (images[1], images[0])
    assert removal.verify == (full,)


def test_the_middle_of_a_chain_is_refused_and_its_end_is_not():
    images = [image(1), image(2, 1), image(3, 2)]
    with pytest.raises(PointNeeded):
        decide(images, {point_name(2)})
    assert decide(images, {point_name(3)}).images == (images[2],)
    assert decide(images, {point_name(2), point_name(3)}).images == (images[2], images[1])


def test_differentials_do_not_need_each_other():
    images = [image(1), image(2, 1, "differential"), image(3, 1, "differential")]
    assert decide(images, {point_name(2)}).images == (images[1],)
