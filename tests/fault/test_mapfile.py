"""The mapfile of a restore with losses is a file of its own: never the target, an image, or anybody's file."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.errors import BadTarget, Refused, TargetHolds
from blockbak.flow import restore
from tests.host.stage import damage_frame
from tests.scene import BLOCK, Scene

SIZE = 75 * BLOCK + 3
OLD = b"# Mapfile. Created by GNU ddrescue version 1.27\n0x0 + 1\n"


@dataclass
class Lossy:
    """A repository of which the only full has a frame that cannot be decoded."""

    scene: Scene

    def restore(self, mapfile: object, target: object = None) -> restore.Report:
        request = restore.Request(
            self.scene.names[0], str(target or self.scene.target), overwrite=True, keep_going=True, mapfile=str(mapfile)
        )
        return restore.restore(self.scene.repository(), request, self.scene.world())

    @property
    def image(self) -> Path:
        return next(self.scene.where.glob("*.full.zst"))


@pytest.fixture
def lossy(memory, seed):
    made = Lossy(Scene.make(memory / "scene", seed, points=2, size=SIZE))
    damage_frame(made.image, 0)
    return made


def hard_link(lossy, path):
    os.link(path, lossy.scene.folder / "hard")
    return lossy.scene.folder / "hard"


def soft_link(lossy, path):
    (lossy.scene.folder / "soft").symlink_to(path)
    return lossy.scene.folder / "soft"


@pytest.mark.parametrize("name", [lambda lossy, path: path, hard_link, soft_link])
def test_a_mapfile_that_is_the_target_is_refused(lossy, name):
    target = lossy.scene.target
    target.write_bytes(b"old" * 1000)
    with pytest.raises((BadTarget, Refused)):
        lossy.restore(name(lossy, target))
    assert target.read_bytes() == b"old" * 1000


@pytest.mark.parametrize("name", [lambda lossy, path: path, soft_link])
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_a_mapfile_that_will_be_the_target_is_refused(lossy, name, suffix):
    target = lossy.scene.target
    with pytest.raises((BadTarget, Refused)):
        lossy.restore(name(lossy, Path(f"{target}{suffix}")))
    assert not target.exists()
    assert not lossy.scene.partial.exists()


@pytest.mark.parametrize("name", [lambda lossy, path: path, hard_link, soft_link])
@pytest.mark.parametrize("what", ["*.zst", "*.json"])
def test_a_mapfile_that_is_a_part_of_the_repository_is_refused(lossy, name, what):
    stored = min(lossy.scene.where.glob(what))
    held = stored.read_bytes()
    with pytest.raises(TargetHolds):
        lossy.restore(name(lossy, stored))
    with pytest.raises(TargetHolds):
        lossy.restore(lossy.scene.where / "new.map")
    assert stored.read_bytes() == held
    assert not (lossy.scene.where / "new.map").exists()
    assert not lossy.scene.target.exists()


def test_a_mapfile_replaces_nothing_but_an_older_mapfile(lossy):
    place = lossy.scene.folder / "notes"
    for held in (b"precious", b"", bytes(4096)):
        place.write_bytes(held)
        with pytest.raises(BadTarget):
            lossy.restore(place)
        assert place.read_bytes() == held
        assert not lossy.scene.target.exists()
    place.write_bytes(OLD)
    report = lossy.restore(place)
    assert (report.mapfile, len(report.flaws) > 0) == (str(place), True)
    assert place.read_text().startswith("# Mapfile. Created by blockbak")
    assert lossy.scene.target.stat().st_size == SIZE


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_a_mapfile_is_a_file(lossy, kind):
    place = lossy.scene.folder / "place"
    kind(place)
    with pytest.raises((BadTarget, Refused)):
        lossy.restore(place)
    assert not lossy.scene.target.exists()


def test_a_restore_without_losses_leaves_no_mapfile_and_an_old_one_as_it_was(lossy):
    new, old = lossy.scene.folder / "new.map", lossy.scene.folder / "old.map"
    old.write_bytes(OLD)
    made = lossy.scene.back_up("full")
    for place in (new, old):
        request = restore.Request(
            made.point, str(lossy.scene.target), overwrite=True, keep_going=True, mapfile=str(place)
        )
        assert restore.restore(lossy.scene.repository(), request, lossy.scene.world()).mapfile == ""
    assert not new.exists()
    assert old.read_bytes() == OLD
