"""A point that several images hold, and none of them whole: ``--keep-going`` takes the one that gives most."""

import os
import random

import pytest

from blockbak.errors import Damage
from blockbak.flow import restore
from tests.host.stage import flip, record_at
from tests.scene import BLOCK, SIZE, VOLUME, Scene, write_at
from tests.volumes import SECTION

FIRST, LAST = (0, SECTION), (SECTION, SIZE)
"""What the two sections of the index stand for; far more lies in the first."""


@pytest.fixture
def scene(memory, seed):
    """A full and two incrementals, which both have something of either section; the newest is also a full."""
    made = Scene.make(memory / "scene", seed, points=1)
    dice = random.Random(seed)
    for start in (40 * BLOCK, 20 * BLOCK):
        write_at(made.source, start, dice.randbytes(50 * BLOCK))
        write_at(made.source, SIZE - BLOCK, dice.randbytes(100))
        made.back_up("incremental")
    made.synthesize()
    return made


def base(scene):
    return scene.where / f"{scene.names[0]}.full.zst"


def full(scene):
    return scene.where / f"{scene.names[-1]}.full.zst"


def delta(scene):
    return scene.where / f"{scene.names[-1]}.incremental.zst"


def record(image, section):
    """An index section is damaged: what it stands for is lost with that image."""
    return lambda scene: flip(image(scene), record_at(image(scene), section)[0] + 100)


def unusable(image):
    """It does not even open: a bit of its header is another."""
    return lambda scene: flip(image(scene), 100)


def cut(image):
    """Its manifest is of no use any more either."""
    return lambda scene: os.truncate(image(scene), image(scene).stat().st_size - 100)


def gone(image):
    return lambda scene: image(scene).unlink()


def keep_going(scene):
    request = restore.Request(scene.names[-1], str(scene.target), keep_going=True)
    return restore.restore(scene.repository(), request, scene.world())


# What happened, which image of the point serves, and what of it is lost.
HARMS = {
    "the full does not open": ([unusable(full), record(delta, 1)], delta, LAST),
    "the increment does not open": ([unusable(delta), record(full, 0)], full, FIRST),
    "the full is cut": ([cut(full), record(delta, 1)], delta, LAST),
    "the full is gone": ([gone(full), record(delta, 0)], delta, FIRST),
    "the full lost more": ([record(full, 0), record(delta, 1)], delta, LAST),
    "the increment lost more": ([record(full, 1), record(delta, 0)], full, LAST),
    "the increment has no base": ([record(full, 1), gone(base)], full, LAST),
    "an increment without base holds more than a full": ([record(full, 0), gone(base)], full, FIRST),
}


@pytest.mark.parametrize("harm", HARMS)
def test_the_image_that_gives_most_serves(harm, scene):
    harms, best, lost = HARMS[harm]
    for do in harms:
        do(scene)
    with pytest.raises(Damage):
        scene.restored(scene.names[-1])
    done = keep_going(scene)
    assert done.plan.images[-1] == best(scene).name
    assert [(flaw.start, flaw.start + flaw.length) for flaw in done.flaws] == [lost]
    right = bytearray(scene.held[scene.names[-1]])
    right[lost[0] : lost[1]] = bytes(lost[1] - lost[0])
    assert scene.target.read_bytes() == right


def test_where_no_image_opens_the_first_damage_is_told(scene):
    for image in (full, delta):
        unusable(image)(scene)
    with pytest.raises(Damage) as told:
        scene.restored(scene.names[-1])
    with pytest.raises(Damage) as raised:
        keep_going(scene)
    assert str(raised.value) == str(told.value)
    assert not scene.target.exists()
    assert not scene.partial.exists()


def test_what_newer_images_hold_is_kept_where_an_older_ones_index_is_damaged(scene):
    gone(full)(scene)
    record(lambda one: one.where / f"{one.names[1]}.incremental.zst", 0)(scene)
    done = keep_going(scene)
    lost = [(0, 20 * BLOCK), (70 * BLOCK, SECTION)]
    assert [(flaw.start, flaw.start + flaw.length) for flaw in done.flaws] == lost
    assert {flaw.file for flaw in done.flaws} == {f"{VOLUME}/{scene.names[1]}.incremental.zst"}
    right = bytearray(scene.held[scene.names[-1]])
    for start, end in lost:
        right[start:end] = bytes(end - start)
    assert scene.target.read_bytes() == right
