"""A policy carried out where there is no room, where images are damaged, and in which order; crashes at each step are
in test_crash.py, failing calls in test_nth_call.py.
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest

from blockbak.errors import Damage, DamagedHistory, NoMergeRoom, NoSpace, VolumeLocked
from blockbak.flow import prune, verify
from blockbak.model.retention import EXPIRE, KEEP, MERGE, Policy
from blockbak.repository.record import HISTORY
from blockbak.units import KIB, MIB
from tests.faults import FaultyKernel
from tests.scene import BLOCK, DEEDS, VOLUME, Scene

SMALL = 75 * BLOCK + 3


@pytest.fixture
def scene(memory):
    return Scene.make(memory / "scene", seed=1, points=4, size=SMALL)


def actions(report):
    return [one.action for one in report.decisions]


def test_new_images_are_durable_and_read_back_before_old_ones_go(memory):
    scene = Scene.make(memory / "scene", seed=1, size=SMALL)
    DEEDS["prune"].ready(scene)
    kernel = FaultyKernel()
    prune.prune(scene.repository(kernel), VOLUME, Policy(last=1), scene.world(kernel))
    done = [f"{call} {name}" for call, name in kernel.log]
    third, fifth = scene.names[2], scene.names[4]
    full, delta = f"{third}.full", f"{fifth}.incremental.2"
    removals = [at for at, step in enumerate(done) if step.startswith("rename") and step.endswith(".json")]
    assert len(removals) == 5
    for stem in (full, delta):
        steps = [f"rename {stem}.zst.partial", f"fsync {VOLUME}", f"rename {stem}.json.partial", f"fsync {VOLUME}"]
        at = -1
        for step in steps:
            at = done.index(step, at + 1)
        reads = [n for n, step in enumerate(done) if step == f"preadv {stem}.zst" and n > at]
        assert reads, f"{stem} was not read again"
        assert f"drop_cache {stem}.zst" in done[at : reads[0]]
        assert max(reads) < removals[0]
    scene.check_points(gone=(*scene.names[:2], scene.names[3]))


def test_the_lines_tell_what_was_merged_and_removed(memory):
    scene = Scene.make(memory / "scene", seed=1, size=SMALL)
    DEEDS["prune"].ready(scene)
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    *_, full, delta, removed = scene.repository().record.entries()
    assert [one.event for one in (full, delta, removed)] == ["merged", "merged", "removed"]
    assert [full.points, delta.points] == [[scene.names[2]], [scene.names[4]]]
    assert full.facts["of"] == scene.names[:3]
    assert [full.facts["file"], delta.facts["file"]] == report.composed
    assert sorted(removed.points) == sorted([*scene.names[:2], scene.names[3]])
    assert removed.facts["files"] == report.removed
    # What was read back counts as verified.
    again = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world(), dry_run=True)
    assert [one.verified for one in again.decisions] == [True, True]
    before = scene.repository().record.entries()
    prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert scene.repository().record.entries() == before, "nothing was done, and yet it was noted"


def test_a_damaged_frame_is_found_before_anything_goes(scene):
    """The base has a bad frame: nothing of its chain is merged or removed."""
    base = f"{scene.names[0]}.full.zst"
    scene.flip_a_frame(base)
    before = scene.files()
    said = []
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world(say=said.append))
    assert actions(report) == [KEEP] * 4
    assert report.attention
    assert scene.files() == before
    assert scene.catalog().leftovers == 0
    assert any("is left as it is" in sentence for sentence in said)
    assert any(base in line for line in report.damage)


def test_what_verify_found_damaged_does_not_count(scene):
    newest = f"{scene.names[3]}.incremental.zst"
    scene.flip_a_frame(newest)
    verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0)
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world(), dry_run=True)
    assert actions(report) == [KEEP] * 4
    assert report.decisions[2].reasons[0] == "one of the last 1"
    assert report.decisions[3].damaged


def test_another_chain_is_pruned_all_the_same(scene):
    scene.flip_a_frame(f"{scene.names[0]}.full.zst")
    for kind in ("full", "incremental", "incremental"):
        scene.change(len(scene.names))
        scene.back_up(kind)
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    # Nobody knows of the damage, and nobody needs what has it: all of that chain is older than the policy keeps.
    assert actions(report) == [EXPIRE] * 4 + [MERGE] * 2 + [KEEP]
    assert scene.listed() == scene.names[-1:]
    assert scene.restored(scene.names[-1]) == scene.held[scene.names[-1]]


def filled(place, left):
    """A file that leaves so many bytes of its file system."""
    status = os.statvfs(place)
    with open(place / "filler", "xb") as file:
        file.write(bytes(max(0, status.f_bavail * status.f_frsize - left)))
    return place / "filler"


def test_without_room_for_the_merge_nothing_of_it_is_begun(tmpfs, memory):
    place = tmpfs("24m")
    scene = Scene.make(place / "scene", seed=1, points=3, size=4 * MIB, noise=True)
    before = scene.files()
    filler = filled(place, 256 * KIB)
    with pytest.raises(NoMergeRoom) as raised:
        prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert raised.value.fields["needed"] > raised.value.fields["free"]
    assert scene.files() == before
    assert scene.catalog().leftovers == 0
    assert scene.repository().record.entries()[-1].error == "NoMergeRoom"
    filler.unlink()
    prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert scene.listed() == scene.names[-1:]


def test_what_nobody_needs_goes_first_and_may_be_the_room(tmpfs):
    place = tmpfs("24m")
    scene = Scene.make(place / "scene", seed=1, points=1, size=4 * MIB, noise=True)
    for kind in ("full", "incremental"):
        scene.change(len(scene.names))
        scene.back_up(kind)
    filled(place, 256 * KIB)
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert actions(report) == [EXPIRE, MERGE, KEEP]
    assert scene.listed() == scene.names[-1:]


def test_a_disk_that_fills_meanwhile_costs_no_point(scene):
    for at in range(1, 200):
        copy = scene.copy(scene.folder / str(at))
        kernel = FaultyKernel("pwritev", errno.ENOSPC, at)
        try:
            prune.prune(copy.repository(kernel), VOLUME, Policy(last=2), copy.world(kernel))
        except NoSpace:
            copy.check_points(gone=tuple(scene.names[:2]))
        if not kernel.fired:
            assert at > 10
            return
    pytest.fail("no end of it")


def test_blocks_are_shared_where_they_can_be_and_the_room_is_little(loop, xfs):
    place = xfs(loop(300 * MIB)).where
    scene = Scene.make(place / "scene", seed=1, points=3, size=64 * MIB, noise=True)
    filler = filled(place, 8 * MIB)
    free = os.statvfs(place).f_bavail
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert actions(report) == [MERGE, MERGE, KEEP]
    assert report.composed_bytes > 60 * MIB
    assert report.shared_bytes > 60 * MIB
    assert abs(os.statvfs(place).f_bavail - free) * os.statvfs(place).f_frsize < 4 * MIB
    filler.unlink()
    scene.check_points(gone=tuple(scene.names[:2]))


def test_a_hidden_image_keeps_what_it_stands_on(scene):
    """The manifest of the newest is damaged: with it back, its chain must be whole."""
    newest = scene.where / f"{scene.names[3]}.incremental.json"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    report = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert actions(report) == [KEEP] * 4
    assert "recover" in report.decisions[3].reasons[0]
    newest.write_bytes(whole)
    scene.check_points()


def test_a_hidden_image_that_went_with_its_point_keeps_nothing_any_more(scene):
    """It is of a point that a synthetic full holds and no rule keeps, and stands on one that is merged afterwards."""
    middle = scene.names[1]
    scene.back_up("differential")
    scene.synthesize(at=middle)
    (scene.where / f"{middle}.incremental.json").unlink()
    prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert scene.listed() == scene.names[-1:]
    assert scene.restored(scene.names[-1]) == scene.held[scene.names[-1]]


def test_a_history_that_cannot_be_read_stops_a_prune(scene):
    """Nobody could tell what was verified."""
    (scene.place / HISTORY).unlink()
    (scene.place / HISTORY).mkdir()
    before = scene.files()
    with pytest.raises(DamagedHistory):
        prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert scene.files() == before


def test_a_held_volume_is_not_pruned_but_looked_at(scene):
    before = scene.files()
    with scene.volume().locked(exclusive=False):
        told = prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world(), dry_run=True)
        with pytest.raises(VolumeLocked):
            prune.prune(scene.repository(), VOLUME, Policy(last=1), scene.world())
    assert len(told.removed) == len(scene.names)
    assert scene.files() == before


def test_sequences_are_not_used_again(scene):
    world = replace(scene.world(), hex_id=scene.world().hex_id)
    before = scene.catalog().points[-1].sequence
    prune.prune(scene.repository(), VOLUME, Policy(last=1), world)
    assert scene.catalog().points[-1].sequence == before
    made = scene.back_up()
    assert made.sequence == before + 1


def test_an_image_that_cannot_be_told_stops_it(scene):
    """Its bytes cannot be read just now: what it needs is not known, so nothing goes."""
    (scene.where / f"{scene.names[3]}.incremental.json").unlink()
    before = scene.files()
    for at in range(1, 60):
        kernel = FaultyKernel("preadv", errno.EIO, at)
        repository = scene.repository()
        repository.kernel = kernel
        try:
            prune.prune(repository, VOLUME, Policy(last=1), scene.world(kernel), dry_run=True)
        except Damage:
            assert scene.files() == before
        if not kernel.fired:
            return
    pytest.fail("no end of it")
