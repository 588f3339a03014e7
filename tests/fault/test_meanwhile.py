"""Between the look at a source or target and its opening, and while it is used, others go on: what is read and
written is what was looked at, or nothing.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import (
    BadTarget,
    BlockbakError,
    SourceError,
    SourceInUse,
    SourceVanished,
    TargetInUse,
    VolumeLocked,
)
from blockbak.flow import backup, delete, recover, restore, synthesize, verify
from blockbak.repository.local import FILE
from tests import children
from tests.host.stage import locking
from tests.moments import SOURCE_MOMENTS, TARGET_MOMENTS, AtOpening, AtStage, Once, WhileWaiting
from tests.scene import BLOCK, VOLUME, Scene, write_at

SIZE = 75 * BLOCK + 3


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=2, size=SIZE)


# --- sources ----------------------------------------------------------------------------------------------


def grow(scene):
    with scene.source.open("ab") as file:
        file.write(b"more" * 1300)


def shrink(scene):
    os.truncate(scene.source, SIZE - 20 * BLOCK)


def exchange(scene):
    """Another file gets the name."""
    other = scene.folder / "other.img"
    other.write_bytes(b"\x17" * SIZE)
    other.rename(scene.source)


MOMENTS = {
    **SOURCE_MOMENTS,
    "while the parent's index is read": lambda volume, source, act: {
        "kernel": AtOpening(next(Path(volume.path).glob("*.full.zst")), act)
    },
    "when reading begins": lambda volume, source, act: {"progress": AtStage(VOLUME, act)},
}


@pytest.mark.parametrize("change", [grow, shrink, exchange])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_source_that_becomes_another_gives_a_point_that_restores_or_none(moment, change, scene):
    before, held, act = scene.files(), scene.source.read_bytes(), Once(lambda: change(scene))
    world = replace(scene.world(), **MOMENTS[moment](scene.volume(), scene.source, act))
    try:
        made = backup.backup(scene.repository(world.kernel), scene.request(), world)
    except SourceError:
        made = None
    assert act.done
    assert {name: data for name, data in scene.files().items() if name in before} == before
    if made is None:
        assert scene.files() == before
    else:
        scene.held[made.point] = scene.restored(made.point)
        # A file that lost its name when it was open already is read to its end.
        assert scene.held[made.point] in (scene.source.read_bytes(), held if change is exchange else b"")
    # The next run makes a point of what is there now.
    scene.back_up()
    assert scene.check_points()


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_a_source_that_loses_its_name_while_it_is_read_makes_no_point(kind, scene):
    """Its bytes are all there, but whether somebody wrote to it cannot be told any more."""
    before, act = scene.files(), Once(lambda: scene.source.rename(scene.folder / "elsewhere.img"))
    world = replace(scene.world(), progress=AtStage(VOLUME, act))
    with pytest.raises(SourceVanished, match="its name is gone") as raised:
        backup.backup(scene.repository(), scene.request(kind), world)
    assert act.done
    assert raised.value.exit_code == 1
    assert raised.value.fields["path"] == str(scene.source)
    assert scene.files() == before
    assert scene.catalog().leftovers == 0


def test_whoever_restores_a_torn_point_is_told(scene):
    """The one who made it was told, and may be another person."""
    act = Once(lambda: write_at(scene.source, 0, b"written meanwhile"))
    made = backup.backup(scene.repository(), scene.request(), replace(scene.world(), progress=AtStage(VOLUME, act)))
    assert (act.done, made.consistency) == (True, "none")
    torn, live = made.point, backup.backup(scene.repository(), replace(scene.request(), mode="live"), scene.world())
    for point, may_be in ((torn, True), (live.point, True), (scene.names[-1], False)):
        request = restore.Request(point, str(scene.target), overwrite=True)
        plan = restore.restore(scene.repository(), request, scene.world(), dry_run=True)
        done = restore.restore(scene.repository(), request, scene.world())
        for notes in (plan.notes, done.plan.notes):
            assert any("may be torn" in note for note in notes) is may_be, (point, notes)
        rescued = children.rescue(scene.place, "restore", point, scene.target, "--yes")
        assert rescued.code == 0, rescued
        assert ("may be torn" in rescued.err) is may_be, rescued


def test_a_source_that_gets_a_user_while_it_was_waited_for_is_refused(scene):
    """As when a virtual machine starts from it."""
    before = scene.files()
    with ExitStack() as others:
        act = Once(lambda: others.enter_context(locking("flock", scene.source)))
        world = replace(scene.world(), check=WhileWaiting(scene.volume(), act), wait=60)
        with pytest.raises(SourceInUse):
            backup.backup(scene.repository(), scene.request(), world)
        assert act.done
    assert scene.files() == before


# --- targets ----------------------------------------------------------------------------------------------


def old_target(scene):
    """A file that a restore reads first, because it holds nearly the point."""
    scene.target.write_bytes(scene.held[scene.names[1]])
    write_at(scene.target, 0, b"\x99" * 100)


def attempt(scene, target=None, **more):
    request = restore.Request(scene.names[0], str(target or scene.target), overwrite=True, verify_first=True)
    return restore.restore(scene.repository(), request, replace(scene.world(), **more))


@pytest.mark.parametrize("moment", TARGET_MOMENTS)
def test_a_link_that_is_turned_meanwhile_leads_to_no_other_file(moment, scene):
    old_target(scene)
    precious, link = scene.folder / "precious.img", scene.folder / "link"
    precious.write_bytes(b"\x23" * SIZE)
    link.symlink_to(scene.target)

    def turn():
        link.unlink()
        link.symlink_to(precious)

    act = Once(turn)
    with pytest.raises(BadTarget):
        attempt(scene, link, **TARGET_MOMENTS[moment](scene.target, act))
    assert act.done
    assert precious.read_bytes() == b"\x23" * SIZE


@pytest.mark.parametrize("moment", TARGET_MOMENTS)
def test_a_file_that_gets_the_targets_name_meanwhile_is_not_written(moment, scene):
    old_target(scene)

    def exchange():
        (scene.folder / "new.img").write_bytes(b"\x23" * SIZE)
        (scene.folder / "new.img").rename(scene.target)

    act = Once(exchange)
    held = scene.target.open("rb")  # so that the new file cannot have the old one's inode number
    with held, pytest.raises(BadTarget):
        attempt(scene, **TARGET_MOMENTS[moment](scene.target, act))
    assert act.done
    assert scene.target.read_bytes() == b"\x23" * SIZE


@pytest.mark.parametrize("moment", TARGET_MOMENTS)
def test_a_target_that_gets_a_user_meanwhile_is_refused(moment, scene):
    old_target(scene)
    before = scene.target.read_bytes()
    with ExitStack() as others:
        act = Once(lambda: others.enter_context(locking("flock", scene.target)))
        with pytest.raises(TargetInUse):
            attempt(scene, **TARGET_MOMENTS[moment](scene.target, act))
        assert act.done
    assert scene.target.read_bytes() == before


# --- two restores, one target -----------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["restoring", "reading back"])
@pytest.mark.parametrize("target", ["a new file", "an old file"])
def test_a_second_restore_to_a_target_that_is_being_written_is_refused(stage, target, scene):
    first, second = scene.names
    if target == "an old file":
        old_target(scene)
    refused = []

    def another():
        try:
            restore.restore(
                scene.repository(), restore.Request(second, str(scene.target), overwrite=True), scene.world()
            )
        except BlockbakError as error:
            refused.append(error)

    act = Once(another)
    attempt(scene, progress=AtStage(stage, act))
    assert act.done
    assert [type(error) for error in refused] == [TargetInUse]
    assert scene.target.read_bytes() == scene.held[first]
    assert not scene.partial.exists()
    restore.restore(scene.repository(), restore.Request(second, str(scene.target), overwrite=True), scene.world())
    assert scene.target.read_bytes() == scene.held[second]


@pytest.mark.parametrize("stage", ["restoring", "reading back"])
def test_a_partial_that_was_exchanged_is_neither_renamed_nor_removed(stage, scene):
    """Somebody cleans up and begins by hand what only looked as if nobody did it."""

    def exchange():
        scene.partial.rename(scene.folder / "moved")  # it keeps its inode number, so the new file gets another
        scene.partial.write_bytes(b"somebody's")

    act = Once(exchange)
    with pytest.raises(BadTarget):
        attempt(scene, progress=AtStage(stage, act))
    assert act.done
    assert not scene.target.exists()
    assert scene.partial.read_bytes() == b"somebody's"


def test_a_target_that_somebody_makes_meanwhile_is_left_to_him(scene):
    act = Once(lambda: scene.target.write_bytes(b"somebody's"))
    with pytest.raises(BlockbakError):
        attempt(scene, progress=AtStage("reading back", act))
    assert act.done
    assert scene.target.read_bytes() == b"somebody's"
    assert not scene.partial.exists()


# --- links out of the repository --------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_is_a_link_leads_nowhere(there, scene):
    """A repository may lie where others can write; a run of root's must not write elsewhere for them."""
    precious = scene.folder / "precious"
    if there:
        precious.write_bytes(b"precious")
        precious.chmod(0o644)
    lock = scene.where / ".lock"
    lock.unlink()
    lock.symlink_to(precious)
    repository = scene.repository()
    for deed in (
        scene.back_up,
        lambda: verify.verify(repository, [], scene.world(), pick=lambda: 0.0),
        lambda: attempt(scene),
        lambda: synthesize.synthesize(repository, VOLUME, scene.world()),
        lambda: delete.delete(repository, [scene.names[1]], scene.world()),
        lambda: recover.recover(repository, scene.world()),
    ):
        with pytest.raises(BlockbakError) as raised:
            deed()
        assert ".lock" in str(raised.value)
    assert precious.exists() == there
    if there:
        assert (precious.read_bytes(), precious.stat().st_mode & 0o777) == (b"precious", 0o644)


def test_a_link_is_no_volume(scene):
    elsewhere = scene.folder / "elsewhere"
    scene.where.rename(elsewhere)
    scene.where.symlink_to(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    with pytest.raises(BlockbakError):
        scene.back_up()
    with pytest.raises(BlockbakError):
        restore.restore(scene.repository(), restore.Request(f"{VOLUME}@latest", str(scene.target)), scene.world())
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert scene.listed() == []
    assert (scene.place / FILE).exists()


# --- what a lock says -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note", [b'{"pid":1,"host":"\xff\xfe","sequence":3}', b"\xff" * 300, b"{", b"[]", b'{"pid":"x"}', b"\0" * 256]
)
def test_a_lock_that_says_nonsense_keeps_nobody_out(note, scene):
    lock = scene.where / ".lock"
    lock.write_bytes(note)
    attempt(scene)
    lock.write_bytes(note)
    highest = max(image.opening.sequence for image in scene.catalog().images)
    made = scene.back_up()
    assert made.sequence == highest + 1
    assert scene.check_points()


def test_a_held_lock_that_says_nonsense_is_still_held(scene):
    with scene.volume().locked(exclusive=True):
        Path(scene.where / ".lock").write_bytes(b'{"host":"\xff"}')
        with pytest.raises(VolumeLocked):
            scene.back_up()
