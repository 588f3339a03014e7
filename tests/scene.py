"""A repository with a short history whose bytes are known, and the deeds that faults are thrown at.

``Scene`` makes it; ``copy`` gives each fault one of its own. A ``Deed`` is something a person does to it, with
what must be so before and after.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from blockbak.errors import TargetExists
from blockbak.flow import backup, delete, pin, prune, recover, restore, synthesize, verify
from blockbak.flow.context import Context
from blockbak.host.blockio import is_marked
from blockbak.host.kernel import Kernel
from blockbak.image.reader import ImageReader
from blockbak.model.chain import plan, points
from blockbak.model.retention import Policy
from blockbak.repository import local
from blockbak.repository.local import FILE, Catalog, Repository, Volume
from blockbak.repository.record import HEAD, HISTORY
from blockbak.units import KIB
from tests.doubles import context, new_repository
from tests.faults import QuickKernel
from tests.volumes import SECTION

BLOCK = 4 * KIB
SIZE = SECTION + 9 * BLOCK + 3
"""Two sections, the second one short, the last block odd. Most of it is a hole, so it is quickly read."""
VOLUME = "vol"
CARRIED = ("rescue.py", "RESTORE.txt")
"""What every repository has, to be restored from without blockbak."""
CARRIED_FROM = Path(local.__file__).parent


def write_at(path: Path, at: int, data: bytes) -> None:
    """Change some bytes of a file, its size apart."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def open_descriptors() -> dict[int, str]:
    """The process's descriptors of files and devices, and what they are of."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # the listing's own
        if target.startswith("/") and not target.startswith(("/dev/null", "/dev/pts", "/proc")):
            found[int(name)] = target
    return found


@dataclass
class Scene:
    """``held`` are the bytes of each point that was made; ``source`` is the volume, an image file."""

    folder: Path
    seed: int
    held: dict[str, bytes] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        return self.folder / "source.img"

    @property
    def place(self) -> Path:
        return self.folder / "repo"

    @property
    def target(self) -> Path:
        return self.folder / "target.img"

    @property
    def partial(self) -> Path:
        """The target until it is whole."""
        return self.folder / "target.img.partial"

    @property
    def where(self) -> Path:
        """The volume's directory."""
        return self.place / VOLUME

    @classmethod
    def make(cls, folder: Path, seed: int, points: int = 3, size: int = SIZE, *, noise: bool = False) -> Scene:
        """A full and incrementals on it; the source is then changed once more. ``noise`` fills the volume with
        bytes that do not compress, so that frames are long enough to be cloned.
        """
        folder.mkdir()
        scene = cls(folder, seed)
        with scene.source.open("xb") as file:
            file.truncate(size)
        if noise:
            write_at(scene.source, 0, random.Random(seed).randbytes(size))
        scene.create()
        for number in range(points):
            scene.change(number)
            scene.back_up("full" if not number else "incremental")
        scene.change(points)
        return scene

    def create(self, kernel: Kernel | None = None) -> Repository:
        return new_repository(self.place, kernel=kernel or QuickKernel())

    def change(self, number: int) -> None:
        """Bytes that compress and bytes that do not, at the edges of blocks, windows and sections, and zeros."""
        dice = random.Random(f"{self.seed} {number}")
        size = self.source.stat().st_size
        places = [0, 5 * BLOCK + 7, 256 * KIB - 3, SECTION - BLOCK - 1, size - BLOCK - 5, size - 2]
        for at in places if number == 0 else dice.sample(places, 3):
            length = dice.choice((1, BLOCK, 3 * BLOCK + 1))
            data = dice.choice((dice.randbytes(length), bytes([dice.randrange(1, 256)]) * length))
            write_at(self.source, min(at, size - 1), data[: size - at])
        if number:
            write_at(self.source, 3 * BLOCK, bytes(BLOCK))
        else:
            write_at(self.source, 3 * BLOCK, dice.randbytes(2 * BLOCK))

    def copy(self, folder: Path) -> Scene:
        """The same in another directory. The source stays where it is: its path is its identity."""
        folder.mkdir()
        shutil.copytree(self.place, folder / "repo")
        os.symlink(self.source, folder / "source.img")
        return Scene(folder, self.seed, dict(self.held), list(self.names), dict(self.extra))

    # --- doing things ------------------------------------------------------------------------------

    def world(self, kernel: Kernel | None = None, say: Callable[[str], None] | None = None) -> Context:
        """A context whose ids do not meet those of earlier points."""
        return context(self.folder / "state", kernel=kernel or QuickKernel(), say=say)

    def repository(self, kernel: Kernel | None = None) -> Repository:
        return Repository(str(self.place), kernel or QuickKernel())

    def volume(self) -> Volume:
        return self.repository().volume(VOLUME)

    def catalog(self) -> Catalog:
        return self.volume().catalog()

    def request(self, kind: str = "auto") -> backup.Request:
        return backup.Request(os.path.realpath(self.source), kind=kind, name=VOLUME, block_bytes=BLOCK)

    def back_up(self, kind: str = "auto") -> backup.Report:
        made = backup.backup(self.repository(), self.request(kind), self.world())
        self.held[made.point] = self.source.read_bytes()
        self.names.append(made.point)
        return made

    def synthesize(self, at: str | None = None) -> synthesize.Report:
        return synthesize.synthesize(self.repository(), VOLUME, self.world(), at=at)

    def listed(self) -> list[str]:
        """The points there are, oldest first; none before the volume's first."""
        repository = self.repository()
        return [point.id for volume in repository.volumes() for point in volume.catalog().points]

    def restored(self, point: str) -> bytes:
        """What a restore of the point gives; it is made beside the source, for the repository may have no room."""
        out = Path(os.path.realpath(self.source)).parent / "out.img"
        restore.restore(self.repository(), restore.Request(point, str(out)), self.world())
        try:
            return out.read_bytes()
        finally:
            out.unlink()

    def flip_a_frame(self, name: str, frame: int = 0) -> None:
        """Change a stored byte of a frame of an image, the first one, which its index does not show."""
        with self.volume().open_image(name) as source:
            section = next(iter(ImageReader(source).all_sections()))
            offset = int(section.frames["offset"][frame]) + int(section.frames["stored"][frame]) // 2
        byte = (self.where / name).read_bytes()[offset]
        write_at(self.where / name, offset, bytes([byte ^ 0xFF]))

    # --- what must hold ------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """What makes the points: images that have a manifest, and the manifests."""
        names = {name for name in os.listdir(self.where) if name.endswith(".json")} if self.where.exists() else set()
        names |= {name.removesuffix(".json") + ".zst" for name in names}
        return {name: (self.where / name).read_bytes() for name in names if (self.where / name).exists()}

    def _restores_from(self, before: dict[str, bytes], files: dict[str, bytes], point: str) -> bool:
        """Whether a point is made of files that are in ``before``, byte for byte."""
        images = self.catalog().images
        chain = plan(next(one for one in points(images) if one.id == point), images)
        names = [name for image in chain for name in (image.file, image.file.removesuffix("zst") + "json")]
        return all(name in before and files[name] == before[name] for name in names)

    def check_points(
        self,
        *,
        also: bytes | None = None,
        gone: tuple[str, ...] = (),
        before: dict[str, bytes] | None = None,
    ) -> list[str]:
        """All points but those ``gone`` are there and hold their bytes; a new one may be, and holds ``also``.

        Nothing listed is half-made: everything verifies. What is made of ``files`` that are as they were
        ``before``, when all was good, needs not be restored. Whatever was torn or failed, the history is whole.
        """
        assert self.repository().record.flaws() == []
        files = self.files()
        if before is not None and files == before:
            return self.names
        listed = self.listed()
        assert [point for point in self.names if point not in gone and point not in listed] == []
        for point in listed:
            right = self.held.get(point, also)
            assert right is not None, f"{point} is listed, and nobody made it"
            if not self._restores_from(before or {}, files, point):
                assert self.restored(point) == right, f"{point} restores to other bytes (seed {self.seed})"
        if listed:
            assert self.catalog().damage == []
            report = verify.verify(self.repository(), [], self.world(), pick=lambda: 0.0)
            assert [verdict for verdict in report.images if not verdict.ok] == []
        return listed


@dataclass(frozen=True)
class Deed:
    """``ready`` puts a repository into the state before, ``fresh`` what lies beside it; ``run`` does it,
    ``done`` says what holds after it went well. ``gone`` are points that it may take away, ``also`` the bytes of
    one that it may add. ``again`` is how it is done once more after it failed, where that differs.
    """

    name: str
    run: Callable[[Scene, Repository, Context], object]
    done: Callable[[Scene], None]
    ready: Callable[[Scene], object] = lambda scene: None
    fresh: Callable[[Scene], object] = lambda scene: None
    gone: Callable[[Scene], tuple[str, ...]] = lambda scene: ()
    also: Callable[[Scene], bytes | None] = lambda scene: None
    again: Callable[[Scene, Repository, Context], object] | None = None

    def __str__(self) -> str:
        return self.name

    def repeat(self, scene: Scene) -> None:
        """Do it once more, without faults; it must go well."""
        (self.again or self.run)(scene, scene.repository(), scene.world())


def _backup(kind: str) -> Deed:
    def run(scene: Scene, repository: Repository, world: Context) -> object:
        return backup.backup(repository, scene.request(kind), world)

    def done(scene: Scene) -> None:
        listed = scene.listed()
        assert len(listed) > len(scene.names)
        newest = scene.catalog().points[-1]
        assert [image.opening.kind for image in newest.images] == [kind]
        assert scene.restored(newest.id) == scene.source.read_bytes()

    return Deed(f"backup-{kind}", run, done, also=lambda scene: scene.source.read_bytes())


def _composed(scene: Scene) -> None:
    newest = scene.catalog().points[-1]
    assert newest.id == scene.names[-1]
    assert newest.has_full
    assert scene.restored(newest.id) == scene.held[newest.id]


def _first(scene: Scene) -> tuple[str, ...]:
    return (scene.names[0],)


def _delete_first(scene: Scene, repository: Repository, world: Context) -> object:
    return delete.delete(repository, [scene.names[0]], world)


def _delete_first_if_there(scene: Scene, repository: Repository, world: Context) -> object:
    """A deletion whose marker is durable has happened; what was left of it, the next run finishes."""
    if scene.names[0] in scene.listed():
        return _delete_first(scene, repository, world)
    return recover.recover(repository, world)


def _deleted(scene: Scene) -> None:
    """The point is gone, and no file of it is left; nor of the incremental that the synthetic full replaces."""
    assert scene.listed() == scene.names[1:]
    assert [name for name in os.listdir(scene.where) if scene.names[0] in name] == []
    assert scene.catalog().leftovers == 0
    assert [image.opening.kind for image in scene.catalog().points[0].images] == ["full"]


def _crashed(scene: Scene) -> None:
    """An orphan, a partial, a deletion that was begun; and what every repository carries is gone, or another one."""
    scene.back_up("full")
    doomed = scene.names.pop()
    del scene.held[doomed]
    os.rename(scene.where / f"{doomed}.full.json", scene.where / f"{doomed}.full.json.deleted")
    newest = scene.names[-1]
    (scene.where / f"{newest}.incremental.json").unlink()
    (scene.where / f"{newest}.full.zst.partial").write_bytes(b"half an image")
    (scene.place / "rescue.py").write_text("print('of an older blockbak')")
    (scene.place / "RESTORE.txt").unlink()


def _recovered(scene: Scene) -> None:
    assert scene.listed() == scene.names
    assert scene.catalog().leftovers == 0
    assert len(list(scene.where.glob("*.zst"))) == len(scene.names)
    assert sorted(os.listdir(scene.place)) == sorted([*CARRIED, FILE, HISTORY, HEAD, VOLUME])
    for name in CARRIED:
        assert (scene.place / name).read_bytes() == (CARRIED_FROM / name).read_bytes()


def _middles(scene: Scene) -> None:
    """Five points, of which a policy of one and a pin keep the third and the fifth."""
    for number in (7, 8):
        scene.change(number)
        scene.back_up("incremental")
    pin.pin(scene.repository(), scene.names[2], "to be kept", scene.world())


def _prune(scene: Scene, repository: Repository, world: Context) -> object:
    return prune.prune(repository, VOLUME, Policy(last=1), world)


def _pruned(scene: Scene) -> None:
    """A synthetic full and one incremental are left, or what a crash left beside them."""
    kept = [scene.names[2], scene.names[4]]
    assert scene.listed() == kept
    points = scene.catalog().points
    assert "full" in [image.opening.kind for image in points[0].images]
    assert [scene.restored(point) for point in kept] == [scene.held[point] for point in kept]
    assert list(scene.volume().pins()[0]) == [scene.names[2]]


def _target(scene: Scene) -> str:
    return scene.extra.get("target", str(scene.target))


def _restored(scene: Scene) -> None:
    right = scene.held[scene.names[1]]
    with open(_target(scene), "rb") as file:
        assert file.read(len(right)) == right
    assert not scene.partial.exists()


def _restore(name: str, fresh: Callable[[Scene], object], *, overwrite: bool = True) -> Deed:
    def run(scene: Scene, repository: Repository, world: Context) -> object:
        return restore.restore(repository, restore.Request(scene.names[1], _target(scene), overwrite), world)

    def again(scene: Scene, repository: Repository, world: Context) -> object:
        request = restore.Request(scene.names[1], _target(scene), overwrite)
        if not overwrite and scene.target.exists():
            # It has its name, so it is whole: only its directory may not have been flushed.
            _restored(scene)
            scene.target.unlink()
        elif not overwrite and scene.partial.exists() and not is_marked(str(scene.partial)):
            # Nothing says that a killed run left it: it was not named, so it is not overwritten unasked.
            before = scene.partial.read_bytes()
            with pytest.raises(TargetExists):
                restore.restore(repository, request, world)
            assert scene.partial.read_bytes() == before
            request = replace(request, overwrite=True)
        return restore.restore(repository, request, world)

    return Deed(f"restore-{name}", run, _restored, fresh=fresh, again=again)


def _old_target(scene: Scene) -> None:
    """Something else lay there, longer than the volume: nothing of it may shine through."""
    scene.target.write_bytes(b"\xa5" * (len(scene.held[scene.names[1]]) + 5000))


def _near_target(scene: Scene) -> None:
    """The next point lies there: a restore reads first, and writes what differs."""
    scene.target.write_bytes(scene.held[scene.names[2]])


def _dirty_device(scene: Scene) -> None:
    """``extra["target"]`` names a device: every byte of it is something else's."""
    with open(scene.extra["target"], "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(b"\xa5" * size)
        os.fsync(file.fileno())


DEEDS = {
    deed.name: deed
    for deed in (
        _backup("full"),
        _backup("incremental"),
        Deed(
            "synthesize",
            lambda scene, repository, world: synthesize.synthesize(repository, VOLUME, world),
            _composed,
        ),
        Deed(
            "delete",
            _delete_first,
            _deleted,
            lambda scene: scene.synthesize(scene.names[1]),
            gone=_first,
            again=_delete_first_if_there,
        ),
        Deed(
            "recover",
            lambda scene, repository, world: recover.recover(repository, world),
            _recovered,
            _crashed,
            gone=lambda scene: (scene.names[-1],),
        ),
        Deed(
            "prune",
            _prune,
            _pruned,
            _middles,
            gone=lambda scene: (scene.names[0], scene.names[1], scene.names[3]),
        ),
        _restore("to-a-new-file", lambda scene: None, overwrite=False),
        _restore("to-an-old-file", _old_target),
        _restore("what-differs", _near_target),
        _restore("to-a-device", _dirty_device),
    )
}
