"""A pin holds whatever happens to whoever makes it, and what is immutable is not touched."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from blockbak.errors import DamagedPin, NewerFormat, NotPinned, PointImmutable, PointPinned
from blockbak.flow import delete, pin, prune, verify
from blockbak.model import selfdigest
from blockbak.model.pin import decode, encode
from blockbak.model.retention import Policy
from tests.doubles import Killed
from tests.faults import PowerCut, QuickMortal
from tests.scene import VOLUME, Scene, open_descriptors

SMALL = 3 * 4096 + 3
LATER = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def scene(memory):
    return Scene.make(memory / "scene", seed=1, points=3, size=SMALL)


def pins(scene):
    found, flaws = scene.volume().pins()
    assert flaws == []
    return {scene.names.index(point): (one.why, one.immutable) for point, one in found.items()}


def test_a_pin_tells_who_and_why_and_until_when(scene):
    world = replace(scene.world(), user="alice", host="web")
    made = pin.pin(scene.repository(), scene.names[1], "before the upgrade", world, until=LATER)
    assert scene.volume().pins()[0] == {scene.names[1]: made}
    assert (made.user, made.host, made.why) == ("alice", "web", "before the upgrade")
    assert (made.since[:10], made.until) == ("2026-05-01", "2030-01-01T00:00:00.000Z")
    assert made.reason == "pinned until 2030-01-01 00:00, by alice@web: before the upgrade"
    line = scene.repository().record.entries()[-1]
    assert (line.event, line.volume, line.points) == ("pinned", VOLUME, [scene.names[1]])
    assert (line.facts["why"], line.facts["until"], line.facts["immutable"]) == (made.why, made.until, False)
    path = scene.where / f"{scene.names[1]}.1.pin"
    assert path.stat().st_mode & 0o777 == 0o600
    assert selfdigest.flaw(path.read_bytes()) == ""


def test_a_new_pin_takes_the_place_of_the_old_one(scene):
    for why in ("one", "two", "three"):
        pin.pin(scene.repository(), scene.names[0], why, scene.world())
    assert pins(scene) == {0: ("three", False)}
    assert [name for name in os.listdir(scene.where) if "pin" in name] == [f"{scene.names[0]}.3.pin"]


def test_what_is_pinned_is_not_deleted_until_it_is_unpinned(scene):
    newest = scene.names[2]
    pin.pin(scene.repository(), newest, "stays", scene.world())
    for dry_run in (True, False):
        with pytest.raises(PointPinned):
            delete.delete(scene.repository(), [newest], scene.world(), dry_run=dry_run)
    pin.unpin(scene.repository(), [newest], scene.world())
    assert pins(scene) == {}
    with pytest.raises(NotPinned):
        pin.unpin(scene.repository(), [newest], scene.world())
    delete.delete(scene.repository(), [newest], scene.world())
    assert scene.listed() == scene.names[:2]
    assert [one.event for one in scene.repository().record.entries()[-3:]] == ["unpinned", "unpinned", "removed"]


def test_what_is_immutable_is_touched_by_nobody_before_its_time(scene):
    middle, newest = scene.names[1], scene.names[2]
    repository = scene.repository()
    pin.pin(repository, middle, "by law", scene.world(), until=LATER, immutable=True)
    before = scene.files()
    with pytest.raises(PointImmutable):
        pin.unpin(repository, [middle], scene.world())
    for until, immutable in ((LATER - timedelta(days=1), True), (LATER, False), (None, False)):
        with pytest.raises(PointImmutable):
            pin.pin(repository, middle, "otherwise", scene.world(), until=until, immutable=immutable)
    with pytest.raises(PointImmutable):
        delete.delete(repository, [middle, newest], scene.world())
    # Its base and the point itself stay as they are, to the byte, where a policy would merge them.
    report = prune.prune(repository, VOLUME, Policy(last=1), scene.world())
    assert [one.action for one in report.decisions] == ["keep", "keep", "keep"]
    assert scene.files() == before
    # Nor does a deletion take the images of an immutable point for which another serves.
    scene.synthesize(middle)
    with pytest.raises(PointImmutable):
        delete.delete(repository, [scene.names[0]], scene.world())
    pin.pin(repository, middle, "longer", scene.world(), until=LATER + timedelta(days=1), immutable=True)
    assert pins(scene) == {1: ("longer", True)}


def test_its_time_over_an_immutable_point_is_one_like_others(scene):
    pin.pin(scene.repository(), scene.names[1], "by law", scene.world(), until=LATER, immutable=True)
    then = replace(scene.world(), now=lambda: LATER)
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), then)
    assert [one.action for one in report.decisions] == ["merge", "merge", "keep"]
    # Its pin went with it.
    assert [name for name in os.listdir(scene.where) if "pin" in name] == []
    scene.check_points(gone=tuple(scene.names[:2]))


def test_a_damaged_pin_is_damage_and_holds(scene):
    oldest = scene.names[0]
    pin.pin(scene.repository(), oldest, "stays", scene.world())
    path = scene.where / f"{oldest}.1.pin"
    data = bytearray(path.read_bytes())
    data[40] ^= 1
    path.write_bytes(data)
    report = verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0)
    assert [one.file for one in report.images if not one.ok] == [path.name]
    assert report.exit == 4
    told = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert told.attention
    assert path.name in told.damage[0]
    assert told.decisions[0].action == "keep"
    for change in (
        lambda: delete.delete(scene.repository(), [oldest, scene.names[2]], scene.world()),
        lambda: pin.unpin(scene.repository(), [oldest], scene.world()),
        lambda: pin.pin(scene.repository(), oldest, "anew", scene.world()),
    ):
        with pytest.raises(DamagedPin):
            change()


def test_a_pin_file_is_of_its_point_and_of_a_known_version(scene):
    made = pin.pin(scene.repository(), scene.names[0], "why", scene.world())
    data = encode(made)
    assert decode(data, "file", made.point) == made
    with pytest.raises(DamagedPin):
        decode(data, "file", scene.names[1])
    newer = selfdigest.encoded({"blockbak_pin": 2, "sha256": selfdigest.BLANK})
    with pytest.raises(NewerFormat):
        decode(newer, "file", made.point)


@pytest.mark.parametrize("make", [QuickMortal, PowerCut])
@pytest.mark.parametrize("keep", [0, 1, 99])
def test_a_crash_never_unpins_what_was_to_be_pinned_otherwise(make, keep, scene, memory):
    pin.pin(scene.repository(), scene.names[1], "old", scene.world(), until=LATER, immutable=True)
    for at in range(1, 100):
        copy = scene.copy(memory / str(at))
        kernel, before = make(at), open_descriptors()
        until = LATER + timedelta(days=1)
        try:
            pin.pin(copy.repository(kernel), copy.names[1], "new", copy.world(kernel), until=until, immutable=True)
        except Killed:
            done = False
        else:
            done = True
        for fd, path in open_descriptors().items():
            if before.get(fd) != path:
                os.close(fd)
        if make is PowerCut:
            kernel.lose(keep)
        assert pins(copy) in ({1: ("old", True)}, {1: ("new", True)}), f"killed at {kernel.log[-1]}"
        pin.pin(copy.repository(), copy.names[1], "again", copy.world(), until=until, immutable=True)
        assert pins(copy) == {1: ("again", True)}
        if done:
            assert at > 10
            return
    pytest.fail("no end of it")
