"""The record is whole whatever happens to whoever writes it, and nothing that is done depends on it."""

from __future__ import annotations

import errno
import os
import subprocess
import threading

import pytest

from blockbak.errors import DamagedHistory, NoSuchPoint
from blockbak.flow import backup, delete, export, recover, restore, synthesize, verify
from blockbak.repository.local import Repository
from blockbak.repository.record import HEAD, HISTORY
from tests.doubles import Killed, context, new_repository
from tests.faults import FaultyKernel, PowerCut, QuickKernel, QuickMortal
from tests.scene import Scene, open_descriptors

MOST = 60
SMALL = 3 * 4096 + 3


@pytest.fixture
def scene(memory):
    return Scene.make(memory / "scene", seed=1, points=2, size=SMALL)


# --- what is written -----------------------------------------------------------------------------------


def test_every_use_case_has_its_line(scene):
    repository, world = scene.repository(), scene.world()
    first, second = scene.names
    restore.restore(repository, restore.Request(first, str(scene.target)), world)
    export.export(repository, second, str(scene.folder / "file.img"), "raw", world, overwrite=False)
    verify.verify(repository, [], world, pick=lambda: 0.0)
    composed = synthesize.synthesize(repository, "vol", world)
    synthesize.synthesize(repository, "vol", world)  # it is there: nothing is written, and nothing is noted
    delete.delete(repository, [first], world, dry_run=True)
    delete.delete(repository, [first], world)
    recover.recover(repository, world)
    found = repository.record.entries()
    assert [(one.event, one.volume, one.points) for one in found] == [
        ("made", "vol", [first]), ("made", "vol", [second]), ("restored", "vol", [first]),
        ("exported", "vol", [second]), ("verified", "vol", [first, second]), ("merged", "vol", [second]),
        ("removed", "vol", [first]), ("recovered", "", []),
    ]  # fmt: skip
    assert {(one.exit, one.error) for one in found} == {(0, "")}
    assert all(one.seconds > 0 for one in found)
    made, checked, merged, removed = (found[at].facts for at in (1, 4, 5, 6))
    assert (made["kind"], made["device_bytes"], made["parent"]) == ("incremental", len(scene.held[second]), first)
    assert merged["stored_bytes"] == composed.point.stored_bytes == (scene.where / merged["file"]).stat().st_size
    assert (checked["ok"], checked["share"], len(checked["images"]), checked["damaged"]) == (True, 1.0, 2, [])
    assert removed["files"] == [f"{second}.incremental.zst", f"{first}.full.zst"]
    assert repository.record.flaws() == []


def test_what_fails_has_its_line_too(scene):
    repository, world = scene.repository(), scene.world()
    with pytest.raises(NoSuchPoint):
        restore.restore(repository, restore.Request("nothing", str(scene.target)), world)
    newest = f"{scene.names[1]}.incremental.zst"
    image = bytearray((scene.where / newest).read_bytes())
    image[5000] ^= 1
    (scene.where / newest).write_bytes(image)
    verify.verify(repository, [], world, pick=lambda: 0.0)
    told: list[object] = []
    request = backup.Request(str(scene.folder / "gone.img"), name="other")
    backup.backup_all(repository, [request], world, told.append)
    restored, checked, made = repository.record.entries()[-3:]
    assert (restored.event, restored.exit, restored.error) == ("restored", 1, "NoSuchPoint")
    assert restored.facts["asked"] == "nothing"
    assert (checked.event, checked.exit, checked.facts["ok"]) == ("verified", 4, False)
    assert checked.facts["damaged"] == [newest]
    assert checked.facts["images"] == [f"{scene.names[0]}.full.zst"]
    assert (made.event, made.exit, made.error, made.facts["source"]) == ("made", 1, "NoSuchSource", request.source)


def test_the_files_are_their_owners_alone(scene):
    for name in (HISTORY, HEAD):
        assert (scene.place / name).stat().st_mode & 0o777 == 0o600


# --- what goes wrong while it is written ----------------------------------------------------------------


def crashes(folder, make_kernel, ready):
    """Kill an append at its n-th call, for every n; the repository afterwards, and whether it came through."""
    for at in range(1, MOST):
        place = folder / str(at)
        place.mkdir()
        repository = new_repository(place / "repo", kernel=QuickKernel())
        world = context(place / "state")
        for number in range(ready):
            repository.record.append("made", world, volume="vol", facts={"number": number})
        kernel = make_kernel(at)
        before = open_descriptors()
        try:
            repository.kernel = kernel
            repository.record.append("made", world, volume="vol", facts={"number": ready})
        except Killed:
            last = False
        else:
            last = True
        for fd, path in open_descriptors().items():
            if before.get(fd) != path:
                os.close(fd)
        yield kernel, Repository(repository.path, QuickKernel()), world, last
        if last:
            assert at > 5, "hardly anything was done"
            return
    pytest.fail(f"after {MOST} calls there was still one more")


def check_after_crash(repository, world, ready):
    """All earlier lines are there and nothing is damaged, now and after the next line."""
    numbers = [one.facts["number"] for one in repository.record.entries()]
    assert numbers in (list(range(ready)), list(range(ready + 1)))
    assert repository.record.flaws() == []
    assert repository.record.append("made", world, volume="vol", facts={"number": 99}) == ""
    found = repository.record.entries()
    assert [one.facts["number"] for one in found] == [*numbers, 99]
    assert [one.number for one in found] == list(range(1, len(found) + 1))
    assert repository.record.flaws() == []


@pytest.mark.parametrize("ready", [0, 1, 3])
def test_a_kill_at_any_call_tears_nothing_but_the_line(ready, memory):
    for kernel, repository, world, _ in crashes(memory, QuickMortal, ready):
        try:
            check_after_crash(repository, world, ready)
        except AssertionError as error:
            pytest.fail(f"killed at {kernel.log[-1]}: {error}")


@pytest.mark.parametrize("keep", [0, 1, 99])
@pytest.mark.parametrize("ready", [0, 1, 3])
def test_a_power_cut_at_any_call_tears_nothing_but_the_line(ready, keep, memory):
    for kernel, repository, world, last in crashes(memory, PowerCut, ready):
        kernel.lose(keep)
        try:
            check_after_crash(repository, world, ready)
        except AssertionError as error:
            pytest.fail(f"power lost at {kernel.log[-1]}: {error}")
        if last:
            assert len(repository.record.entries()) == ready + 2, "what was reported was lost"


def test_a_torn_line_is_witnessed_by_the_next(scene):
    repository, world = scene.repository(), scene.world()
    with (scene.place / HISTORY).open("ab") as file:
        file.write(b'{"number":3,"time":"2026-05-')
    assert repository.record.flaws() == []
    repository.record.append("verified", world)
    found = repository.record.entries()
    assert (found[-1].number, found[-1].facts) == (3, {"torn_bytes": 29})
    assert b'2026-05-\n{"number":3' in (scene.place / HISTORY).read_bytes()
    assert repository.record.flaws() == []


@pytest.mark.parametrize("call", ["open", "close", "preadv", "pwritev", "fsync", "lock"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_an_append_that_fails_says_so_and_nothing_else_fails(call, number, memory):
    for at in range(1, MOST):
        place = memory / str(at)
        place.mkdir()
        repository = new_repository(place / "repo", kernel=QuickKernel())
        said: list[str] = []
        world = context(place / "state", say=said.append)
        repository.record.append("made", world, facts={"number": 0})
        kernel = FaultyKernel(call, number, at)
        opened = Repository(repository.path)
        opened.kernel = kernel
        missing = opened.record.append("made", world, facts={"number": 1})
        assert kernel.close_left() == []
        assert kernel.wrongs == []
        assert said == ([missing] if missing else [])
        if kernel.fired and call != "close":
            assert missing.startswith("The history of the repository has no line of this: ")
        assert repository.record.flaws() == []
        assert repository.record.append("made", world, facts={"number": 2}) == ""
        assert repository.record.flaws() == []
        assert [one.facts["number"] for one in repository.record.entries()] in ([0, 2], [0, 1, 2])
        if not kernel.fired:
            assert at > 1
            return
    pytest.fail("no end of it")


def test_lines_of_many_runs_at_once(memory):
    repository = new_repository(memory / "repo", kernel=QuickKernel())
    world = context(memory / "state")

    def work(number):
        mine = Repository(repository.path, QuickKernel())
        for at in range(20):
            assert mine.record.append("made", world, volume=f"vol-{number}", facts={"at": at}) == ""

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    found = repository.record.entries()
    assert [one.number for one in found] == list(range(1, 81))
    for number in range(4):
        assert [one.facts["at"] for one in found if one.volume == f"vol-{number}"] == list(range(20))
    assert repository.record.flaws() == []


def test_a_long_line_is_no_obstacle(memory):
    """The end of the file is read in pieces."""
    repository = new_repository(memory / "repo", kernel=QuickKernel())
    world = context(memory / "state")
    repository.record.append("verified", world, facts={"images": ["x" * 50] * 5000})
    repository.record.append("verified", world)
    with open(os.path.join(repository.path, HISTORY), "ab") as file:
        file.write(b"\0" * 300_000)
    repository.record.append("verified", world)
    assert [one.number for one in repository.record.entries()] == [1, 2, 3]
    assert repository.record.flaws() == []


def test_names_that_are_no_text_are_noted_all_the_same(memory):
    repository = new_repository(memory / "repo", kernel=QuickKernel())
    world = context(memory / "state")
    assert repository.record.append("restored", world, facts={"target": os.fsdecode(b"/mnt/\xff")}) == ""
    assert repository.record.entries()[0].facts["target"] == r"/mnt/\xff"


# --- where nothing can be written ----------------------------------------------------------------------


def test_a_read_only_repository_is_restored_from_in_silence(tmpfs, tmp_path):
    place = tmpfs("32m")
    scene = Scene.make(place / "scene", seed=1, points=1, size=SMALL)
    before = (scene.place / HISTORY).read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    try:
        said: list[str] = []
        target = tmp_path / "target.img"
        world = context(tmp_path / "state", say=said.append)
        restore.restore(scene.repository(), restore.Request("latest", str(target)), world)
        assert verify.verify(scene.repository(), [], world, pick=lambda: 0.0).ok
        assert target.read_bytes() == scene.held[scene.names[0]]
        assert said == []
        assert (scene.place / HISTORY).read_bytes() == before
        # A verb that changes the repository says that it has no line.
        assert "Read-only file system" in scene.repository().record.append("removed", world)
        assert len(said) == 1
    finally:
        subprocess.run(["mount", "-o", "remount,rw", place], check=True)


def test_a_backup_whose_line_cannot_be_written_keeps_its_point_and_says_so(scene):
    (scene.place / HISTORY).unlink()
    (scene.place / HISTORY).mkdir()
    said: list[str] = []
    made = backup.backup(scene.repository(), scene.request(), scene.world(say=said.append))
    assert made.attention
    assert any(note.startswith("The history of the repository has no line of this") for note in made.notes)
    assert any("no line of this" in sentence for sentence in said)
    assert scene.restored(made.point) == scene.source.read_bytes()


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_what_somebody_else_put_there_is_not_written(scene, what):
    path = scene.place / HISTORY
    path.unlink()
    other = scene.folder / "other"
    other.write_text("mine")
    if what == "link":
        path.symlink_to(other)
    else:
        os.mkfifo(path)
    said: list[str] = []
    assert [scene.repository().record.append("made", scene.world(say=said.append))] == said
    assert other.read_text() == "mine"


# --- what is noticed afterwards --------------------------------------------------------------------------


def test_verify_calls_an_altered_history_damage(scene):
    path = scene.place / HISTORY
    path.write_bytes(path.read_bytes().replace(b'"kind":"incremental"', b'"kind":"differential"'))
    repository = scene.repository()
    report = verify.verify(repository, [], scene.world(), pick=lambda: 0.0)
    assert [type(one) for one in report.history] == [DamagedHistory]
    assert (report.ok, report.damaged, report.exit) == (False, True, 4)
    assert all(verdict.ok for verdict in report.images)
    # The check has its line, and a later one finds it again.
    assert repository.record.entries()[-1].exit == 4
    assert len(verify.verify(repository, [], scene.world(), pick=lambda: 0.0).history) == 1
    # Of one point it says nothing, and a restore does not ask.
    assert verify.verify(repository, [scene.names[0]], scene.world(), pick=lambda: 0.0).ok
    assert scene.restored(scene.names[1]) == scene.held[scene.names[1]]


@pytest.mark.parametrize(
    ("name", "told"),
    [(HISTORY, "the lines 1 to 2 are missing"), (HEAD, "the file that tells its end is missing or damaged")],
)
def test_a_file_that_is_gone_is_damage_and_stays_so(scene, name, told):
    (scene.place / name).unlink()
    repository = scene.repository()
    for _ in range(2):
        assert [told in str(one) for one in repository.record.flaws()] == [True]
        assert repository.record.append("verified", scene.world()) == ""


def test_both_moved_away_is_a_new_history(scene):
    """What the advice says."""
    for name in (HISTORY, HEAD):
        os.rename(scene.place / name, scene.place / f"{name}.old")
    repository = scene.repository()
    assert repository.record.entries() == []
    assert repository.record.flaws() == []
    repository.record.append("verified", scene.world())
    assert [one.number for one in repository.record.entries()] == [1]
    assert repository.record.flaws() == []
    assert repository.volume_names() == ["vol"]
