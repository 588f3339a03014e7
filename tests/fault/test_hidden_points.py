"""A point whose manifest cannot be read is there all the same: no other is taken in its place, and none is deleted
that it, or what stands on it, may need.
"""

import os

import pytest

from blockbak.errors import AmbiguousPoint, Damage, DamagedManifest, PointNeeded
from blockbak.flow import backup, delete, recover, restore, verify
from blockbak.flow.points import find
from blockbak.units import MIB
from tests.host.stage import damage_frame, flip, frame_at
from tests.scene import BLOCK, CARRIED, CARRIED_FROM, VOLUME, Scene, write_at

SIZE = 75 * BLOCK + 3


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=3, size=SIZE)


def spoil(path):
    """Turn a bit over in the middle of a manifest."""
    flip(path, path.stat().st_size // 2)


# --- names ------------------------------------------------------------------------------------------------


@pytest.fixture
def two(memory, seed):
    """Two volumes, one point each; the second one's is newer."""
    scene = Scene.make(memory / "scene", seed, points=1, size=SIZE)
    made = backup.backup(
        scene.repository(), backup.Request(os.path.realpath(scene.source), name="wolumen"), scene.world()
    )
    return scene, scene.names[0], made.point


@pytest.mark.parametrize("volume", [VOLUME, "wolumen"])
@pytest.mark.parametrize("name", ["latest", "2026"])
def test_a_volume_that_cannot_be_read_makes_a_name_no_clearer(name, volume, two):
    scene, *_ = two
    repository = scene.repository()
    with pytest.raises(AmbiguousPoint):
        find(repository, name)
    for manifest in (scene.place / volume).glob("*.json"):
        spoil(manifest)
    for deed in (
        lambda: find(repository, name),
        lambda: restore.restore(repository, restore.Request(name, str(scene.target)), scene.world()),
        lambda: delete.delete(repository, [name], scene.world()),
    ):
        with pytest.raises((AmbiguousPoint, Damage)):
            deed()
    assert not scene.target.exists()


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_volume_that_can_be_read_is_found_by_its_name_or_its_points_id(spoilt, two):
    scene, *points = two
    names = (VOLUME, "wolumen")
    for manifest in (scene.place / names[spoilt]).glob("*.json"):
        spoil(manifest)
    good = names[1 - spoilt]
    for name in (f"{good}@latest", f"{good}@2026", points[1 - spoilt]):
        assert find(scene.repository(), name)[2].id == points[1 - spoilt]
    for name in (f"{names[spoilt]}@latest", points[spoilt]):
        with pytest.raises(DamagedManifest):
            find(scene.repository(), name)


@pytest.mark.parametrize("name", ["latest", f"{VOLUME}@latest"])
def test_whoever_asks_for_the_newest_is_told_of_newer_ones_without_manifest(name, scene):
    """As after a crash between an image and its manifest."""
    oldest, *lost = scene.names
    for point in lost:
        (scene.where / f"{point}.incremental.json").unlink()

    def notes(point):
        request = restore.Request(point, str(scene.target))
        plan = restore.restore(scene.repository(), request, scene.world(), dry_run=True)
        assert plan.point == oldest
        return [note for note in plan.notes if "no manifest" in note]

    told = notes(name)
    assert [note.split()[0] for note in told] == lost
    assert all("'blockbak recover' brings it back" in note for note in told)
    report = restore.restore(scene.repository(), restore.Request(name, str(scene.target)), scene.world())
    assert set(told) <= set(report.plan.notes)
    # Who named the point itself has what he asked for.
    assert notes(oldest) == []


def test_an_older_one_without_manifest_is_no_news_to_who_asks_for_the_newest(scene):
    scene.synthesize(scene.names[-1])
    (scene.where / f"{scene.names[1]}.incremental.json").unlink()
    request = restore.Request("latest", str(scene.target))
    plan = restore.restore(scene.repository(), request, scene.world(), dry_run=True)
    assert (plan.point, plan.notes) == (scene.names[-1], [])


# --- deleting ---------------------------------------------------------------------------------------------


def broken(scene, number):
    """Nothing tells any more what this image is."""
    point = scene.names[number]
    for file in scene.where.glob(f"{point}.*.json"):
        file.write_bytes(b"no manifest")
    for file in scene.where.glob(f"{point}.*.zst"):
        write_at(file, 0, b"no image" * 16)
        os.truncate(file, file.stat().st_size - 40)
    return point


@pytest.mark.parametrize("number", [0, 1])
def test_a_broken_point_that_others_stand_on_is_not_deleted_alone(number, scene):
    """Its image may be found whole on another disk; then what stands on it restores again."""
    point = broken(scene, number)
    there = sorted(os.listdir(scene.where))
    for dry_run in (True, False):
        with pytest.raises(PointNeeded) as raised:
            delete.delete(scene.repository(), [point], scene.world(), dry_run=dry_run)
        assert raised.value.fields == {"point": point, "needed_by": scene.names[number + 1]}
    assert sorted(os.listdir(scene.where)) == there
    # Together with all that needs it, it goes.
    gone = scene.names[number:]
    assert delete.delete(scene.repository(), gone, scene.world()).points == gone
    assert scene.listed() == scene.names[:number]
    assert [name for name in os.listdir(scene.where) if name[:-4].startswith(tuple(gone))] == []


def test_what_an_image_without_a_manifest_stands_on_is_not_deleted_and_it_is_told_what_to_do(scene):
    """As a run leaves it that was killed once its image was sealed."""
    newest, below = scene.names[2], scene.names[1]
    for file in scene.where.glob(f"{newest}.*.json"):
        file.unlink()
    with pytest.raises(PointNeeded) as raised:
        delete.delete(scene.repository(), [below], scene.world())
    assert raised.value.fields == {"point": below, "needed_by": newest}
    assert any("'blockbak recover'" in note for note in raised.value.__notes__)
    recover.recover(scene.repository(), scene.world())
    assert delete.delete(scene.repository(), [below, newest], scene.world()).points == [below, newest]


def test_a_broken_point_that_nothing_stands_on_is_deleted(scene):
    point = broken(scene, 2)
    delete.delete(scene.repository(), [point], scene.world())
    assert scene.listed() == scene.names[:2]
    assert scene.catalog().damage == []


def test_a_broken_point_whose_children_have_a_full_of_their_own_is_deleted(scene):
    scene.synthesize(scene.names[2])
    point = broken(scene, 1)
    delete.delete(scene.repository(), [point], scene.world())
    assert scene.listed() == [scene.names[0], scene.names[2]]
    assert scene.restored(scene.names[2]) == scene.held[scene.names[2]]


# --- looking ----------------------------------------------------------------------------------------------


def test_a_sample_looks_into_every_image(scene):
    """Chance may take no frame of an image; then one is taken all the same."""
    for share in (1e-9, 0.01, 0.5):
        report = verify.verify(scene.repository(), [], scene.world(), share=share, pick=lambda: 0.999)
        assert len(report.images) == 3
        assert [verdict.file for verdict in report.images if not verdict.ok or not verdict.checked_bytes] == []
        named = verify.verify(scene.repository(), ["latest"], scene.world(), share=share, pick=lambda: 0.999)
        assert [verdict.checked_bytes > 0 for verdict in named.images] == [True] * 3


def test_a_sample_finds_an_image_of_which_every_frame_is_damaged(memory, seed):
    scene = Scene.make(memory / "scene", seed, points=2, size=3 * MIB, noise=True)
    file = next(scene.where.glob("*.full.zst"))
    for window in range(12):
        assert frame_at(file, window)[1] > 0
        damage_frame(file, window)
    report = verify.verify(scene.repository(), [], scene.world(), share=1e-9, pick=lambda: 0.999)
    assert [verdict.file for verdict in report.images if not verdict.ok] == [file.name]
    checked = {verdict.file: verdict.checked_bytes for verdict in report.images}
    assert 0 < checked[file.name] < file.stat().st_size // 2, "a sample is a part"


# --- recovering -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [VOLUME, "wolumen"])
def test_a_held_volume_does_not_keep_recover_from_the_others(held, two):
    scene, *points = two
    repository = scene.repository()
    names = (VOLUME, "wolumen")
    for name in names:
        for manifest in (scene.place / name).glob("*.json"):
            manifest.unlink()
    with repository.volume(held).locked(exclusive=True):
        report = recover.recover(repository, scene.world())
        assert report.locked is not None
        assert report.locked.fields["volume"] == held
        assert report.adopted == [points[1 - names.index(held)]]
        assert scene.listed() == report.adopted
    report = recover.recover(repository, scene.world())
    assert (report.locked, report.adopted) == (None, [points[names.index(held)]])
    assert sorted(scene.listed()) == sorted(points)


def missing(path):
    path.unlink()


def another(path):
    path.write_text("an older one")


def a_link(path):
    path.unlink()
    path.with_name("elsewhere").write_text("somebody's")
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("harm", [missing, another, a_link])
def test_recover_puts_back_what_every_repository_carries(harm, name, scene):
    """A repository that was made by an older program gets the newer script, too."""
    assert recover.recover(scene.repository(), scene.world()).done == []
    harm(scene.place / name)
    (line,) = recover.recover(scene.repository(), scene.world()).done
    assert line.startswith(f"{name} ")
    assert not (scene.place / name).is_symlink()
    assert (scene.place / name).read_bytes() == (CARRIED_FROM / name).read_bytes()
    assert harm is not a_link or (scene.place / "elsewhere").read_text() == "somebody's"
    assert recover.recover(scene.repository(), scene.world()).done == []


# --- verifying --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [VOLUME, "wolumen"])
def test_a_held_volume_does_not_keep_verify_from_the_others(held, two):
    """Damage in the others is found all the same, and what was left out is not called whole."""
    scene, *points = two
    repository = scene.repository()
    free = points[1 - (VOLUME, "wolumen").index(held)]

    def verified(names=()):
        return verify.verify(repository, names, scene.world(), pick=lambda: 0.0)

    with repository.volume(held).locked(exclusive=True):
        for names in ((), points):
            report = verified(names)
            assert report.locked is not None
            assert report.locked.fields["volume"] == held
            assert [(verdict.point, verdict.ok) for verdict in report.images] == [(free, True)]
            assert (report.ok, report.damaged) == (False, False)
        report = verified([free])
        assert (report.locked, report.ok) == (None, True)
        damage_frame(next(scene.place.glob(f"*/{free}.full.zst")), 0)
        assert verified().damaged
    report = verified()
    assert report.locked is None
    assert {verdict.point: verdict.ok for verdict in report.images} == {point: point != free for point in points}
