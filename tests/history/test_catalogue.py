"""All that the catalogue knows can be made again from the images alone."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.flow import backup, delete, recover, synthesize, verify
from blockbak.repository.local import Repository
from blockbak.units import KIB
from tests import children
from tests.doubles import context, new_repository
from tests.volumes import Fingerprint, Volume, difference, restored

NAMES = ("first", "second")


@dataclass
class Library:
    """Two volumes with points of every kind."""

    folder: Path
    repository: Repository
    volumes: dict[str, Volume]
    held: dict[str, Fingerprint]
    manifests: dict[Path, bytes]
    dice: random.Random

    @property
    def world(self):
        return context(self.folder / "state")

    @property
    def path(self) -> Path:
        return self.folder / "repository"

    def all_right(self) -> None:
        """Nothing is missing and nothing is damaged; every manifest is what it was, to the byte."""
        assert {path: path.read_bytes() for path in self.path.glob("*/*.json")} == self.manifests
        listed = children.run(self.path, "list", "--json")
        assert listed.code == 0, listed
        assert {point["point"] for point in listed.document} == self.held.keys()
        report = verify.verify(self.repository, [], self.world, pick=lambda: 0.0)
        assert report.ok
        assert report.leftovers == []
        target = self.folder / "target"
        for point, wanted in self.held.items():
            assert difference(restored(self.repository, point, target, self.world), wanted) is None, point
        assert children.rescue(self.path, "list").code == 0


@pytest.fixture
def library(tmp_path, rng) -> Library:
    world = context(tmp_path / "state")
    repository = new_repository(tmp_path / "repository")
    volumes = {name: Volume(tmp_path / f"{name}.img", 1500 * KIB + 77, rng) for name in NAMES}
    held = {}
    for name, volume in volumes.items():
        points = []
        for kind in ("full", "incremental", "incremental", "differential", "incremental", "full", "incremental"):
            volume.scribble(8)
            request = backup.Request(str(volume.path), kind, name=name, block_bytes=4 * KIB)
            points.append(backup.backup(repository, request, world).point)
            held[points[-1]] = volume.fingerprint
        synthesize.synthesize(repository, name, world, at=points[2])
        synthesize.synthesize(repository, name, world, at=points[4], kind="differential")
        # The newest is gone, and its sequence must stay used.
        delete.delete(repository, points[-1:], world)
        del held[points[-1]]
    manifests = {path: path.read_bytes() for path in (tmp_path / "repository").glob("*/*.json")}
    library = Library(tmp_path, repository, volumes, held, manifests, rng)
    library.all_right()
    return library


def test_lost_manifests_are_written_anew_to_the_byte(library):
    for path in library.manifests:
        path.unlink()
    assert children.run(library.path, "list", "--json").document == []
    done = children.run(library.path, "recover", "--json")
    assert done.code == 0, done
    assert set(done.document["adopted"]) == library.held.keys()
    assert done.document["left"] == []
    library.all_right()


def test_one_lost_manifest_of_any_image_comes_back(library):
    for path in library.manifests:
        path.unlink()
        report = recover.recover(library.repository, library.world)
        assert report.left == [], path
        assert len(report.adopted) == 1, path
    library.all_right()


def damages(data: bytes, others: list[bytes], dice: random.Random) -> dict[str, bytes]:
    """What can become of a manifest."""
    at = dice.randrange(len(data))
    flipped = bytearray(data)
    flipped[at] ^= 1 << dice.randrange(8)
    return {
        "a flipped bit": bytes(flipped), "cut": data[:at], "empty": b"", "zeros": bytes(len(data)),
        "noise": dice.randbytes(len(data)), "too long": data + b"\n", "another's": dice.choice(others),
    }  # fmt: skip


def damaged(library: Library, path: Path, number: int) -> bytes:
    """One of them, each in its turn."""
    data = library.manifests[path]
    others = [other for other in library.manifests.values() if other != data]
    return list(damages(data, others, library.dice).values())[number % 7]


@pytest.mark.parametrize("first", range(3))
def test_damaged_manifests_are_written_anew_to_the_byte(library, first):
    for number, path in enumerate(library.manifests, first):
        path.write_bytes(damaged(library, path, number))
    listed = children.run(library.path, "list", "--json")
    assert listed.code == 4, "a damaged manifest is damage, not absence"
    done = children.run(library.path, "recover", "--json")
    assert done.code == 0, done
    assert done.document["left"] == []
    library.all_right()


def test_one_damaged_manifest_of_any_image_comes_back(library):
    for number, path in enumerate(library.manifests, library.dice.randrange(7)):
        path.write_bytes(damaged(library, path, number))
        report = recover.recover(library.repository, library.world)
        assert report.left == [], (path, number)
    library.all_right()


def test_a_damaged_manifest_of_a_damaged_image_is_left_alone(library):
    """Neither proves the other, so nothing is written and nothing removed."""
    path = library.dice.choice(sorted(library.manifests))
    image = path.with_suffix(".zst")
    whole = image.read_bytes()
    for at in (10, len(whole) // 2, len(whole) - 5):
        data = bytearray(whole)
        data[at] ^= 4
        image.write_bytes(data)
        path.write_bytes(library.manifests[path][:-20])
        done = children.run(library.path, "recover", "--json")
        assert done.code == 3, done
        assert done.document["left"]
        assert path.read_bytes() == library.manifests[path][:-20]
        assert image.read_bytes() == data
        assert children.run(library.path, "verify").code == 4
    image.write_bytes(whole)
    assert recover.recover(library.repository, library.world).left == []
    library.all_right()


def test_a_manifest_without_its_image_stays_damage(library):
    path = library.dice.choice(sorted(library.manifests))
    image = path.with_suffix(".zst")
    data = image.read_bytes()
    image.unlink()
    done = children.run(library.path, "recover", "--json")
    assert done.code == 3, done
    assert path.exists()
    assert children.run(library.path, "list").code == 4
    image.write_bytes(data)
    library.all_right()


def test_after_the_catalogue_is_rebuilt_life_goes_on(library):
    for path in library.manifests:
        path.unlink()
    assert recover.recover(library.repository, library.world).left == []
    for name, volume in library.volumes.items():
        used = [point.sequence for point in library.repository.volume(name).catalog().points]
        volume.scribble(3)
        request = backup.Request(str(volume.path), "incremental", name=name)
        made = backup.backup(library.repository, request, library.world)
        assert made.sequence == max(used) + 2, "the deleted point's sequence stays used"
        found = restored(library.repository, made.point, library.folder / "target", library.world)
        assert difference(found, volume.fingerprint) is None
