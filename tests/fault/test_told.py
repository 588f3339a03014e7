"""What whoever restores or exports a point must be told of it, and what is not so and must not be said."""

from pathlib import Path

import pytest

from blockbak.errors import DamagedImage
from blockbak.flow import backup, export, restore
from tests.host.stage import damage_frame, flip, image_at
from tests.scene import BLOCK, Scene, write_at

SIZE = 75 * BLOCK + 3


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=2, size=SIZE, noise=True)


def base(scene) -> Path:
    return scene.where / f"{scene.names[0]}.full.zst"


def keep_going(scene, target, mapfile):
    request = restore.Request(
        scene.names[-1], str(target), overwrite=True, keep_going=True, mapfile=str(mapfile) if mapfile else None
    )
    return restore.restore(scene.repository(), request, scene.world())


# --- damage ---------------------------------------------------------------------------------------------------


def test_damage_that_was_passed_over_is_told_though_every_byte_was_restored(scene):
    with image_at(base(scene)) as reader:
        place = reader.seek_offset
    flip(base(scene), place + 8)
    request = restore.Request(scene.names[-1], str(scene.target))
    with pytest.raises(DamagedImage) as stopped:
        restore.restore(scene.repository(), request, scene.world())
    done = keep_going(scene, scene.target, None)
    assert scene.target.read_bytes() == scene.held[scene.names[-1]]
    assert (done.flaws, done.mapfile, done.attention) == ([], "", True)
    assert done.plan.damage == str(stopped.value)
    assert [note for note in done.plan.notes if str(stopped.value) in note]


def test_what_the_target_holds_already_is_not_lost_with_a_damaged_frame(scene):
    """A rollback reads the frame for one block of it, and only that one becomes zeros."""
    point = scene.held[scene.names[-1]]
    damage_frame(base(scene), 0)
    number = 40
    assert point[number * BLOCK : (number + 1) * BLOCK] == scene.held[scene.names[0]][number * BLOCK :][:BLOCK]
    scene.target.write_bytes(point)
    write_at(scene.target, number * BLOCK, b"\xa5" * BLOCK)
    mapfile = scene.folder / "map"
    done = keep_going(scene, scene.target, mapfile)
    assert [(flaw.start, flaw.length) for flaw in done.flaws] == [(number * BLOCK, BLOCK)]
    wanted = bytearray(point)
    wanted[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    assert scene.target.read_bytes() == wanted
    lost = [line.split()[:2] for line in mapfile.read_text().splitlines() if line.endswith("-")]
    assert [(int(start, 16), int(length, 16)) for start, length in lost] == [(number * BLOCK, BLOCK)]


# --- export ---------------------------------------------------------------------------------------------------


def exported(scene, name):
    return export.export(scene.repository(), name, str(scene.target), "raw", scene.world(), overwrite=False)


def test_an_export_of_a_point_that_may_be_torn_says_so(scene):
    request = backup.Request(str(scene.source), name=scene.where.name, block_bytes=BLOCK, mode="live")
    made = backup.backup(scene.repository(), request, scene.world())
    assert made.consistency == "none"
    assert [note for note in exported(scene, made.point).notes if "torn" in note]


def test_an_export_of_a_whole_point_has_nothing_to_say(scene):
    assert exported(scene, scene.names[-1]).notes == []


def test_an_export_of_the_latest_names_a_newer_orphan(scene):
    (scene.where / f"{scene.names[-1]}.incremental.json").unlink()
    report = exported(scene, f"{scene.where.name}@latest")
    assert report.point == scene.names[0]
    assert [note for note in report.notes if scene.names[-1] in note]


# --- the plan -------------------------------------------------------------------------------------------------


def test_the_plan_says_that_a_longer_file_is_cut(scene):
    scene.target.write_bytes(b"\xa5" * (SIZE + 100))
    request = restore.Request(scene.names[-1], str(scene.target), overwrite=True)
    planned = restore.restore(scene.repository(), request, scene.world(), dry_run=True)
    assert "The file is longer by 100 bytes; they are cut off." in planned.notes
    restore.restore(scene.repository(), request, scene.world())
    assert scene.target.stat().st_size == SIZE
    planned = restore.restore(scene.repository(), request, scene.world(), dry_run=True)
    assert planned.notes == []
