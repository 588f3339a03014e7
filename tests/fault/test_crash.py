"""The process is killed, or the power fails, at every call that changes anything, or might.

A kill at a read is a kill at the call after it. Afterwards every earlier point is listed, verifies and restores;
the next run succeeds without being told anything; deletions are finished; an orphan is reported, and
``recover`` brings it back.
"""

import errno
import os
import shutil
from pathlib import Path

import pytest

from blockbak.errors import BlockbakError
from blockbak.flow import backup, delete, recover, restore, synthesize
from blockbak.repository.local import FILE, Repository
from tests.doubles import REPOSITORY_ID, Killed
from tests.faults import FaultyKernel, PowerCut, QuickMortal
from tests.scene import BLOCK, DEEDS, VOLUME, Scene, open_descriptors

SMALL = 75 * BLOCK + 3
MOST = 200
KEPT = (0, 1, 99)
"""How many of the names that were not flushed a power cut leaves."""
NAMES = [name for name in DEEDS if name != "restore-to-a-device"]


@pytest.fixture(scope="module")
def histories(memory_for_module):
    """Three points in a volume of two sections, and in a small one."""
    folder = memory_for_module
    return {
        "two sections": Scene.make(folder / "large", seed=1),
        "small": Scene.make(folder / "small", seed=1, size=SMALL),
    }


def kills(deed, template, folder, make_kernel):
    """One scene after the other in which the deed was killed at its n-th call, and that n."""
    for at in range(1, MOST):
        scene = template.copy(folder / str(at))
        deed.fresh(scene)
        kernel = make_kernel(at)
        before = open_descriptors()
        try:
            deed.run(scene, scene.repository(kernel), scene.world(kernel))
        except Killed:
            pass
        else:
            shutil.rmtree(scene.folder)
            assert at > 5, "hardly anything was done"
            return
        finally:
            # The kernel closes what a killed process had open.
            for fd, path in open_descriptors().items():
                if before.get(fd) != path:
                    os.close(fd)
        yield at, kernel, scene
        shutil.rmtree(scene.folder)
    pytest.fail(f"after {MOST} calls there was still one more")


def check_after(deed, scene, before):
    """What must hold once the machine runs again."""
    listed = scene.check_points(also=deed.also(scene), gone=deed.gone(scene), before=before)
    left = scene.catalog()
    told = []
    if left.orphans and deed.name.startswith("backup"):
        # The orphan is a whole point that nobody sees. It must survive the next run, whose word on it is heard.
        deed.run(scene, scene.repository(), scene.world(say=told.append))
        assert any(left.orphans[0] in line and "recover" in line for line in told), told
    else:
        deed.repeat(scene)
    deed.done(scene)
    now = scene.catalog()
    assert (now.partials, now.deleted) == ([], [])
    assert set(left.orphans) <= set(now.orphans) or deed.name in ("recover", "delete")
    report = recover.recover(scene.repository(), scene.world())
    assert report.left == []
    assert set(report.adopted) == {name[:21] for name in now.orphans}
    assert scene.catalog().leftovers == 0
    after = scene.check_points(also=deed.also(scene), gone=deed.gone(scene), before=before)
    assert set(after) >= {*listed, *report.adopted} - set(deed.gone(scene))
    sequences = [point.sequence for point in scene.catalog().points]
    assert sequences == sorted(set(sequences))


@pytest.mark.parametrize("name", NAMES)
def test_a_kill_at_any_call_costs_no_more_than_the_run(name, histories, memory):
    deed = DEEDS[name]
    size = "two sections" if name in ("backup-full", "synthesize") else "small"
    template = histories[size].copy(memory / "template")
    deed.ready(template)
    before = template.files()
    for at, kernel, scene in kills(deed, template, memory, QuickMortal):
        try:
            check_after(deed, scene, before)
        except (AssertionError, BlockbakError, OSError) as error:
            pytest.fail(f"killed at call {at}, {kernel.log[-1]}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", ["backup-full", "backup-incremental", "synthesize", "delete", "recover", "prune"])
def test_a_power_cut_at_any_call_costs_no_more_than_the_run(name, histories, memory, seed):
    """Bytes that were not flushed are gone, and of the names all, all but the first, or none: at each call one of
    these, in a soak each of them.
    """
    deed = DEEDS[name]
    template = histories["small"].copy(memory / "template")
    deed.ready(template)
    before = template.files()
    for turn in range(len(KEPT) if os.environ.get("BLOCKBAK_SOAK") else 1):
        cut_power(deed, template, before, memory, seed + turn)


def cut_power(deed, template, before, memory, first):
    for at, kernel, scene in kills(deed, template, memory, PowerCut):
        kernel.lose(KEPT[(first + at) % len(KEPT)])
        try:
            check_after(deed, scene, before)
        except (AssertionError, BlockbakError, OSError) as error:
            pytest.fail(f"power lost at call {at}, {kernel.log[-1]}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("name", ["backup-full", "backup-incremental", "synthesize", "delete", "recover", "prune"])
def test_what_a_run_has_reported_survives_a_power_cut(name, histories, memory):
    """It ended well, and the power failed in the next moment."""
    deed = DEEDS[name]
    scene = histories["small"].copy(memory / "scene")
    deed.ready(scene)
    kernel = PowerCut()
    deed.run(scene, scene.repository(kernel), scene.world(kernel))
    listed = scene.listed()
    kernel.lose()
    assert scene.listed() == listed
    # Only a deletion's mark may be there again: the next run takes it away.
    scene.repository().volume(VOLUME).tidy(scene.catalog())
    deed.done(scene)
    scene.check_points(also=deed.also(scene), gone=deed.gone(scene))


# --- the beginnings ------------------------------------------------------------------------------------


def create(scene, kernel=None):
    scene.create(kernel)


def first_backup(scene, kernel=None):
    if not (scene.place / FILE).exists():
        scene.create()
    backup.backup(scene.repository(kernel), scene.request(), scene.world(kernel))


@pytest.mark.parametrize("cut", [None, 0, 1, 99], ids=["kill", "all-lost", "one-name-kept", "names-kept"])
@pytest.mark.parametrize("deed", [create, first_backup])
def test_a_crash_in_the_beginnings_leaves_what_can_be_begun_again(deed, cut, memory):
    source = memory / "source.img"
    source.write_bytes(b"first" * 5000)
    for at in range(1, MOST):
        (memory / str(at)).mkdir()
        scene = Scene(memory / str(at), 1)
        os.symlink(source, scene.source)
        kernel = QuickMortal(at) if cut is None else PowerCut(at)
        try:
            deed(scene, kernel)
        except Killed:
            pass
        else:
            assert at > 5, "hardly anything was done"
            break
        if cut is not None:
            kernel.lose(cut)
        try:
            if not (scene.place / FILE).exists():
                scene.create()
            assert Repository(str(scene.place)).id == REPOSITORY_ID
            assert {"rescue.py", "RESTORE.txt"} <= set(os.listdir(scene.place))
            assert (scene.place / "rescue.py").stat().st_size > 0
            scene.check_points(also=source.read_bytes())
            made = scene.back_up()
            assert scene.restored(made.point) == source.read_bytes()
            assert recover.recover(scene.repository(), scene.world()).left == []
            scene.check_points(also=source.read_bytes())
        except (AssertionError, BlockbakError, OSError) as error:
            pytest.fail(f"killed at call {at}, {kernel.log[-1]}: {type(error).__name__}: {error}")


def test_a_repository_that_was_reported_survives_a_power_cut(memory):
    scene = Scene(memory, 1)
    kernel = PowerCut()
    scene.create(kernel)
    kernel.lose()
    assert scene.repository().volume_names() == []
    scene.source.write_bytes(b"first" * 5000)
    kernel = PowerCut()
    made = backup.backup(scene.repository(kernel), scene.request(), scene.world(kernel))
    kernel.lose()
    assert scene.restored(made.point) == scene.source.read_bytes()


# --- orphans and what depends on them --------------------------------------------------------------------


def test_a_point_that_an_orphan_stands_on_is_not_deleted(histories, memory):
    """The image of an incremental is sealed, its manifest was never begun: its parent is needed all the same."""
    scene = histories["small"].copy(memory / "scene")
    newest = scene.names[-1]
    (scene.where / f"{newest}.incremental.json").unlink()
    try:
        delete.delete(scene.repository(), [scene.names[1]], scene.world())
    except BlockbakError as refused:
        assert refused.exit_code in (4, 5)  # noqa: PT017
    assert recover.recover(scene.repository(), scene.world()).adopted == [newest]
    assert scene.restored(newest) == scene.held[newest]


def test_a_damaged_orphan_is_reported_and_left(histories, memory):
    scene = histories["small"].copy(memory / "scene")
    newest = scene.names[-1]
    (scene.where / f"{newest}.incremental.json").unlink()
    image = scene.where / f"{newest}.incremental.zst"
    data = bytearray(image.read_bytes())
    data[5000] ^= 0x10
    image.write_bytes(data)
    report = recover.recover(scene.repository(), scene.world())
    assert report.adopted == []
    assert [image.name in line for line in report.left] == [True]
    assert image.read_bytes() == data
    assert scene.catalog().orphans == [image.name]


# --- the order of durable steps, as it is kept -----------------------------------------------------------


def steps(run, scene):
    """The calls of a deed that change or flush something, as ``call name``, in order."""
    kernel = FaultyKernel()
    repository = scene.repository(kernel)
    kernel.log.clear()
    run(repository, scene.world(kernel))
    assert kernel.wrongs == []
    wanted = ("pwritev", "fsync", "rename", "unlink", "mkdir", "truncate", "close")
    opened = [
        f"{call} {name}" for call, name in kernel.log if call in wanted or (call, name[-8:]) == ("open", ".partial")
    ]
    return [step for step in opened if ".lock" not in step]


def in_order(steps, *wanted):
    """Each of ``wanted`` is there, after the one before it, and the last of its name where that is a write."""
    at = -1
    for step in wanted:
        assert step in steps[at + 1 :], f"{step!r} does not follow {wanted[: wanted.index(step)]} in {steps}"
        at = steps.index(step, at + 1)
        if step.startswith("pwritev"):
            at = len(steps) - 1 - steps[::-1].index(step)
    return at


def commit_steps(name):
    """Writing an image and its manifest, by the design's section on the repository."""
    image, manifest = f"{name}.zst.partial", f"{name}.json.partial"
    return [
        f"open {image}", f"pwritev {image}", f"fsync {image}", f"close {image}", f"rename {image}", f"fsync {VOLUME}",
        f"open {manifest}", f"pwritev {manifest}", f"fsync {manifest}", f"close {manifest}", f"rename {manifest}",
        f"fsync {VOLUME}",
    ]  # fmt: skip


def test_an_image_is_durable_before_its_manifest_is_begun(histories, memory):
    scene = histories["two sections"].copy(memory / "scene")
    done = steps(lambda repository, world: backup.backup(repository, scene.request("full"), world), scene)
    point = scene.listed()[-1]
    in_order(done, *commit_steps(f"{point}.full"))
    assert done.count(f"rename {point}.full.zst.partial") == 1


def test_a_composed_image_is_durable_before_its_manifest_is_begun(histories, memory):
    scene = histories["two sections"].copy(memory / "scene")
    done = steps(lambda repository, world: synthesize.synthesize(repository, VOLUME, world), scene)
    in_order(done, *commit_steps(f"{scene.names[-1]}.full"))


def test_a_new_volume_is_durable_before_anything_lies_in_it(memory):
    scene = Scene(memory, 1)
    scene.create()
    scene.source.write_bytes(b"first" * 5000)
    done = steps(lambda repository, world: backup.backup(repository, scene.request(), world), scene)
    point = scene.listed()[-1]
    in_order(done, f"mkdir {VOLUME}", "fsync repo", *commit_steps(f"{point}.full"))


def test_a_deletion_is_marked_before_the_image_goes_and_the_mark_goes_last(histories, memory):
    scene = histories["small"].copy(memory / "scene")
    newest, middle = scene.names[-1], scene.names[-2]
    done = steps(lambda repository, world: delete.delete(repository, [newest, middle], world), scene)
    wanted = []
    for point in (newest, middle):
        stem = f"{point}.incremental"
        wanted += [f"rename {stem}.json", f"fsync {VOLUME}", f"unlink {stem}.zst", f"fsync {VOLUME}"]
        wanted.append(f"unlink {stem}.json.deleted")
    in_order(done, *wanted)


def test_what_takes_over_is_read_before_anything_is_deleted(histories, memory):
    """The synthetic full's frames: a bad one keeps everything."""
    scene = histories["small"].copy(memory / "scene")
    scene.synthesize(scene.names[1])
    before = scene.files()
    image = scene.where / f"{scene.names[1]}.full.zst"
    for at in range(1, MOST):
        kernel = FaultyKernel("preadv", errno.EIO, at)
        repository = scene.repository()
        repository.kernel = kernel
        try:
            delete.delete(repository, [scene.names[0]], scene.world(kernel))
        except BlockbakError:
            assert scene.files() == before
        else:
            break
    assert sum(call == "preadv" and name == image.name for call, name in kernel.log) > 3
    first = next(index for index, (call, _) in enumerate(kernel.log) if call == "rename")
    reads = [index for index, (call, name) in enumerate(kernel.log) if (call, name) == ("preadv", image.name)]
    assert max(reads) < first


def test_a_restored_file_is_durable_before_it_has_its_name(histories, memory):
    scene = histories["small"].copy(memory / "scene")
    request = restore.Request(scene.names[-1], str(scene.target))
    done = steps(lambda repository, world: restore.restore(repository, request, world), scene)
    partial = f"{scene.target.name}.partial"
    in_order(done, f"pwritev {partial}", f"fsync {partial}", f"close {partial}", f"rename {partial}", "fsync scene")


def test_a_repository_is_one_only_when_all_else_in_it_is_durable(memory):
    scene = Scene(memory, 1)
    kernel = FaultyKernel()
    scene.create(kernel)
    done = [f"{call} {name}" for call, name in kernel.log]
    last = in_order(
        done, "mkdir repo", f"fsync {memory.name}", "rename rescue.py.partial", "fsync repo",
        "rename RESTORE.txt.partial", "fsync repo", f"open {FILE}.partial", f"fsync {FILE}.partial",
        f"rename {FILE}.partial", "fsync repo",
    )  # fmt: skip
    assert not {"pwritev", "rename", "unlink"} & {step.split()[0] for step in done[last:]}
    assert Path(scene.place).stat().st_mode & 0o777 == 0o700
