"""A file system that really is full: at the image, at the manifest, while composing.

The free space grows a page at a time until the deed succeeds, so that it ends at every place where it can.
"""

import json
import os
import subprocess
import sys

import pytest

from blockbak.errors import BlockbakError, NoSpace, TargetFull
from blockbak.flow import backup, delete, recover, restore
from blockbak.repository.local import FILE
from blockbak.units import KIB, MIB
from tests.scene import BLOCK, CARRIED_FROM, VOLUME, Scene, write_at

PAGE = 4096
SIZE = 20 * BLOCK + 3
MOST = 120

pytestmark = pytest.mark.root


class Filler:
    """A file that takes all room but what it is told to leave."""

    def __init__(self, where):
        self.path = where / "filler"
        self.path.touch()

    def leave(self, pages):
        """Exactly so many pages are free."""
        with self.path.open("r+b") as file:
            stats = os.fstatvfs(file.fileno())
            size = file.seek(0, os.SEEK_END) + (stats.f_bfree - pages) * stats.f_bsize
            file.truncate(max(size, 0))
            if size > 0:
                os.posix_fallocate(file.fileno(), 0, size)
            assert os.fstatvfs(file.fileno()).f_bfree == pages

    def free(self):
        self.path.write_bytes(b"")


def history(tmp_path, where):
    """Three points of incompressible bytes, on the small file system; the source lies elsewhere."""
    scene = Scene.make(tmp_path / "made", seed=1, size=SIZE, noise=True)
    return scene.copy(where / "scene")


def widening(filler, run):
    """Run it with 0, 1, 2 … pages free until it succeeds; the sentence of each failure, and what it returned."""
    assert NoSpace.exit_code == 1
    sentences = []
    for pages in range(MOST):
        filler.leave(pages)
        try:
            done = run()
        except (NoSpace, TargetFull) as error:
            sentences.append(str(error))
        else:
            return sentences, done
    return pytest.fail(f"{MOST} pages were not enough: {sentences[-1]}")


def test_a_backup_that_runs_out_of_space_loses_nothing(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)
    before, orphans = scene.files(), 0

    def run():
        nonlocal orphans
        try:
            return backup.backup(scene.repository(), scene.request("full"), scene.world())
        finally:
            orphans += bool(scene.catalog().orphans)
            scene.check_points(also=scene.source.read_bytes(), before=before)
            assert scene.catalog().partials == []

    sentences, made = widening(filler, run)
    assert scene.restored(made.point) == scene.source.read_bytes()
    assert any(".full.zst" in sentence for sentence in sentences)
    # Where only the manifest found no room, the image stays, and is brought back.
    assert any(".full.json" in sentence for sentence in sentences)
    assert orphans > 0
    filler.free()
    report = recover.recover(scene.repository(), scene.world())
    assert report.left == []
    assert len(report.adopted) > 0
    scene.check_points(also=scene.source.read_bytes())
    scene.back_up("incremental")
    scene.check_points(also=scene.source.read_bytes())


def test_a_synthesis_that_runs_out_of_space_loses_nothing(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)

    def run():
        try:
            return scene.synthesize()
        finally:
            scene.check_points()
            assert scene.catalog().partials == []

    sentences, made = widening(filler, run)
    assert len(sentences) > 10
    assert made.written
    assert scene.catalog().points[-1].has_full
    filler.free()
    assert recover.recover(scene.repository(), scene.world()).left == []
    scene.check_points()


def test_the_first_backup_of_a_volume_that_finds_no_space_says_so(tmp_path, tmpfs):
    """Not even the lock file can be written."""
    where = tmpfs(8 * MIB)
    (where / "scene").mkdir()
    scene, filler = Scene(where / "scene", 1), Filler(where)
    source = tmp_path / "source.img"
    source.write_bytes(os.urandom(SIZE))
    scene.source.symlink_to(source)
    scene.create()
    sentences, made = widening(filler, lambda: backup.backup(scene.repository(), scene.request(), scene.world()))
    assert len(sentences) > 10
    assert scene.restored(made.point) == source.read_bytes()


OLDER = "print('of an older blockbak')" * 1000
"""Of a rescue.py; it takes about as many pages."""


def test_recovering_takes_the_room_of_what_it_sweeps(tmp_path, tmpfs):
    """After an update of the program rescue.py is another one; a full disk must not keep recover from its work."""
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)
    (scene.where / f"{scene.names[0]}.full.zst.partial").write_bytes(bytes(64 * PAGE))
    (scene.place / "rescue.py").write_text(OLDER)
    filler.leave(0)
    report = recover.recover(scene.repository(), scene.world())
    assert [line.split()[0] for line in report.done] == [f"{VOLUME}:", "rescue.py"]
    assert scene.catalog().partials == []
    assert (scene.place / "rescue.py").read_bytes() == (CARRIED_FROM / "rescue.py").read_bytes()


def test_without_room_for_the_new_rescue_script_the_old_one_stays(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)
    script = scene.place / "rescue.py"
    script.write_text(OLDER)

    def run():
        try:
            return recover.recover(scene.repository(), scene.world())
        except NoSpace:
            assert script.read_text() == OLDER
            raise
        finally:
            assert not list(scene.place.glob("*.partial"))

    sentences, report = widening(filler, run)
    assert any("rescue.py" in sentence for sentence in sentences)
    assert (len(report.done), report.left) == (1, [])
    assert script.read_bytes() == (CARRIED_FROM / "rescue.py").read_bytes()


def test_an_init_that_finds_no_space_can_be_done_again(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    (where / "scene").mkdir()
    scene, filler = Scene(where / "scene", 1), Filler(where)

    def run():
        try:
            return scene.create()
        finally:
            assert not scene.place.exists() or not list(scene.place.glob("*.partial"))

    sentences, _ = widening(filler, run)
    assert len(sentences) >= 3
    assert (scene.place / FILE).exists()
    assert scene.repository().volume_names() == []


def test_a_deletion_makes_room_on_a_full_disk(tmp_path, tmpfs):
    """It is what a person does when a backup found no space."""
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)
    filler.leave(0)
    newest = scene.names[-1]
    delete.delete(scene.repository(), [newest], scene.world())
    assert scene.listed() == scene.names[:-1]
    assert os.statvfs(where).f_bfree > 0
    scene.check_points(gone=(newest,))


def test_an_orphan_on_a_full_disk_waits(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, where), Filler(where)
    newest = scene.names[-1]
    (scene.where / f"{newest}.incremental.json").unlink()
    filler.leave(0)
    with pytest.raises(NoSpace):
        recover.recover(scene.repository(), scene.world())
    assert scene.catalog().partials == []
    filler.leave(3)
    assert recover.recover(scene.repository(), scene.world()).adopted == [newest]
    filler.free()
    scene.check_points()


def test_a_restore_to_a_file_that_finds_no_space_leaves_none(tmp_path, tmpfs):
    where = tmpfs(8 * MIB)
    scene, filler = history(tmp_path, tmp_path), Filler(where)
    target = where / "target.img"

    def run():
        try:
            return restore.restore(scene.repository(), restore.Request(scene.names[0], str(target)), scene.world())
        except BlockbakError:
            assert sorted(os.listdir(where)) == ["filler"]
            raise

    sentences, done = widening(filler, run)
    assert len(sentences) > 10
    assert not done.attention
    assert target.read_bytes() == scene.held[scene.names[0]]


# --- as a person runs it -----------------------------------------------------------------------------


def blockbak(*argv, state):
    environment = {**os.environ, "BLOCKBAK_STATE_DIR": str(state)}
    return subprocess.run(
        [sys.executable, "-m", "blockbak", *map(str, argv)],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, env=environment,
    )  # fmt: skip


def test_a_full_file_system_with_a_journal_ends_the_backup_with_a_sentence(tmp_path, loop, ext4):
    """Delayed allocation, reserved blocks, a journal: what tmpfs has not."""
    where = ext4(loop(16 * MIB)).where
    scene = Scene.make(tmp_path / "made", seed=1, size=SIZE, noise=True).copy(where / "scene")
    large = tmp_path / "large.img"
    large.write_bytes(os.urandom(16 * MIB))
    done = blockbak("-r", scene.place, "backup", large, "--json", state=tmp_path / "state")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["name"] == "NoSpace"
    assert "No space is left for" in done.stderr
    assert "Traceback" not in done.stderr
    scene.check_points()
    small = tmp_path / "small.img"
    small.write_bytes(os.urandom(256 * KIB))
    done = blockbak("-r", scene.place, "backup", small, "--json", state=tmp_path / "state")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["points"][0]["device_bytes"] == 256 * KIB
    assert list(scene.place.glob("*/*.partial")) == []


@pytest.mark.parametrize("what", ["full", "read-only", "a file", "below a file"])
def test_a_state_directory_that_cannot_be_written_costs_no_backup(what, tmp_path, tmpfs):
    """What lies there can be done without."""
    scene = Scene.make(tmp_path / "scene", seed=1, points=1, size=SIZE)
    match what:
        case "full":
            place = tmpfs(1 * MIB)
            Filler(place).leave(0)
        case "read-only":
            place = tmpfs(1 * MIB, "ro")
        case "a file":
            place = tmp_path / "state"
            place.touch()
        case "below a file":
            (tmp_path / "file").touch()
            place = tmp_path / "file" / "state"
    for round_ in range(2):
        write_at(scene.source, 0, os.urandom(BLOCK))
        done = blockbak("-r", scene.place, "backup", scene.source, "--name", VOLUME, "--json", state=place)
        assert done.returncode == 0, done.stderr
        point = json.loads(done.stdout)["points"][0]
        assert (point["kind"], point["sequence"]) == ("incremental", round_ + 2)
    assert scene.restored(point["point"]) == scene.source.read_bytes()
