"""What people and copying programs put into a repository, and what a killed run leaves beside its volumes."""

import os

import pytest

from blockbak.errors import DamagedManifest
from blockbak.flow import backup, recover, restore, verify
from blockbak.repository import local
from tests.scene import BLOCK, Scene


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=3, size=75 * BLOCK + 3)


def newest(scene, end):
    return scene.where / f"{scene.names[-1]}.incremental.{end}"


# --- a manifest that is no file -------------------------------------------------------------------------------


def link(manifest):
    manifest.rename(manifest.parent.parent / "elsewhere.json")
    manifest.symlink_to("../elsewhere.json")


def directory(manifest):
    manifest.unlink()
    manifest.mkdir()


def pipe(manifest):
    manifest.unlink()
    os.mkfifo(manifest)


@pytest.mark.parametrize("exchange", [link, directory, pipe])
def test_a_manifest_that_is_no_file_is_damage_and_recover_writes_it_anew(scene, exchange):
    """Passed over, it would take its point out of the list, and 'latest' would be an older one."""
    exchange(newest(scene, "json"))
    (damage,) = scene.catalog().damage
    assert (damage.name, damage.fields["point"]) == ("DamagedManifest", scene.names[-1])
    assert not verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0).ok
    with pytest.raises(DamagedManifest):
        restore.restore(scene.repository(), restore.Request("latest", str(scene.target)), scene.world())
    done = recover.recover(scene.repository(), scene.world())
    assert (done.adopted, done.left) == ([scene.names[-1]], [])
    scene.check_points()


@pytest.mark.parametrize("exchange", [link, directory, pipe])
def test_what_has_a_manifests_name_and_no_image_is_nobodys(scene, exchange):
    path = scene.where / "20260401T000000Z-beef.full.json"
    path.write_bytes(b"{}")
    exchange(path)
    catalog = scene.catalog()
    assert (catalog.damage, catalog.orphans, catalog.hidden) == ([], [], [])
    recover.recover(scene.repository(), scene.world())
    assert os.path.lexists(path)


# --- a deletion that somebody takes back ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "deed",
    [
        lambda scene: backup.backup(scene.repository(), scene.request(), scene.world()),
        lambda scene: recover.recover(scene.repository(), scene.world()),
    ],
    ids=["backup", "recover"],
)
def test_an_image_whose_manifest_was_put_back_is_not_deleted(scene, deed):
    """The mark is a renamed manifest: blockbak itself never leaves both."""
    marker = newest(scene, "json.deleted")
    marker.write_bytes(newest(scene, "json").read_bytes())
    deed(scene)
    assert not marker.exists()
    assert newest(scene, "zst").exists()
    listed = scene.listed()
    assert listed[: len(scene.names)] == scene.names
    assert scene.restored(scene.names[-1]) == scene.held[scene.names[-1]]


# --- a run that was killed while it renewed what every repository carries ---------------------------------------


@pytest.mark.parametrize("name", ["rescue.py", "RESTORE.txt"])
def test_recover_begins_again_where_a_killed_one_left_off(scene, name):
    shipped = scene.place / name
    right = shipped.read_bytes()
    shipped.unlink()
    (scene.place / f"{name}.partial").write_bytes(right[:100])
    newest(scene, "json").unlink()
    done = recover.recover(scene.repository(), scene.world())
    assert shipped.read_bytes() == right
    assert done.adopted == [scene.names[-1]]
    assert not (scene.place / f"{name}.partial").exists()


# --- a deletion while the catalogue is read --------------------------------------------------------------------


def test_what_is_deleted_while_the_catalogue_is_read_is_there_or_gone_but_no_gap(scene, monkeypatch):
    """Points of one second sort by chance, so a child may be read before its parent: then both are deleted."""
    read = local.Volume._catalog_manifest

    def interrupted(volume, found, name, *rest):
        read(volume, found, name, *rest)
        for each in scene.where.glob("*.*.*"):
            each.unlink()

    monkeypatch.setattr(local, "sorted", lambda names: sorted(names, reverse=True), raising=False)
    monkeypatch.setattr(local.Volume, "_catalog_manifest", interrupted)
    found = scene.catalog()
    assert (found.images, found.damage) == ([], [])
