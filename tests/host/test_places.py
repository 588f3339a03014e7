"""Repositories and targets on file systems that are full, read-only or mounted elsewhere."""

from __future__ import annotations

import contextlib
import sys

import pytest

from tests.host.stage import MIB, Oracle, attached, dirty, mounted, put, run, sha


@pytest.fixture
def source(tmp_path, seed):
    """8 MiB that hardly compress."""
    file = tmp_path / "source.img"
    file.write_bytes(bytes(8 * MIB))
    Oracle(file, 8 * MIB, seed).write((0, 8 * MIB))
    return file


@pytest.fixture
def room(tmp_path, as_root):
    """A file system in memory with 12 MiB of room."""
    with mounted("none", tmp_path / "room", "-t", "tmpfs", "-o", "size=12m") as where:
        yield where


# --- full -------------------------------------------------------------------------------------------------


def test_a_repository_without_room_keeps_what_it_has(program_at, room, source, tmp_path):
    program = program_at(room)
    full = program.backup(source)
    kept = program.contents()
    put(source, 0, b"x" * 4096 + bytes(5 * MIB))
    Oracle(source, 8 * MIB, 99).write((0, 7 * MIB))
    for argv in (("backup", source), ("backup", source, "--kind", "full")):
        error = program(*argv, expect=1).error
        assert error["name"] == "NoSpace"
        assert program.contents() == kept
    target = tmp_path / "target.img"
    program("restore", full["point"], target)
    assert sha(target) != sha(source)
    run("mount", "-o", "remount,size=40m", room)
    made = program.backup(source)
    assert (made["kind"], made["parent"]) == ("incremental", full["point"])
    assert program("verify").document["ok"]
    program.restore(made["point"], target)
    assert sha(target) == sha(source)


def test_composing_without_room_leaves_no_trace(program_at, room, source):
    program = program_at(room)
    program.backup(source)
    put(source, 0, b"x" * 4096)
    last = program.backup(source)
    kept = program.contents()
    assert program("synthesize", last["volume"], expect=1).error["name"] == "NoSpace"
    assert program.contents() == kept
    assert program("verify").document["leftovers"] == []


def test_a_file_that_does_not_fit_is_not_left_half_made(program, room, source):
    point = program.backup(source)["point"]
    (room / "filler").write_bytes(bytes(6 * MIB))
    error = program("restore", point, room / "target.img", expect=1).error
    assert error["name"] in ("TargetFull", "TargetFailed")
    assert [path.name for path in room.iterdir()] == ["filler"]


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_device_that_takes_no_more_fails_the_restore(program, loop, ext4, source, direct):
    """A loop device on a sparse file whose file system is full stands for a thin volume whose pool is."""
    point = program.backup(source)["point"]
    where = ext4(loop(24 * MIB), "-b", "4096", "-m", "0").where
    backing = where / "backing.img"
    with backing.open("wb") as file:
        file.truncate(8 * MIB)
    with (where / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with attached(backing, f"--direct-io={direct}") as node:
        for options in ([], ["--no-verify"]):
            error = program.restore(point, node, *options, expect=1).error
            assert error["name"] in ("TargetFull", "TargetFailed")
        (where / "filler").unlink()
        program.restore(point, node)
        assert sha(node) == sha(source)


@pytest.mark.parametrize("options", [[], ["--no-verify"]])
def test_a_file_that_was_overwritten_until_the_disk_was_full_is_said_to_be_unusable(program, room, source, options):
    """It is sparse, so it takes room as it is written; nothing of it is what it was, nor what it should be."""
    point = program.backup(source)["point"]
    target = room / "target.img"
    with target.open("xb") as file:
        file.truncate(8 * MIB)
    (room / "filler").write_bytes(bytes(6 * MIB))
    done = program.restore(point, target, *options, expect=1)
    assert done.error["name"] in ("TargetFull", "TargetFailed")
    assert "earlier points" not in done.said
    said = " ".join(done.error["notes"])
    assert f"{target} is not to be used" in said
    assert "written:" in said
    assert said in done.said
    # With room it is mended.
    (room / "filler").unlink()
    program.restore(point, target, *options)
    assert sha(target) == sha(source)


# --- read-only --------------------------------------------------------------------------------------------


def test_points_are_restored_from_a_repository_that_nobody_can_write(program_at, loop, ext4, source, tmp_path):
    made = ext4(loop(64 * MIB))
    program = program_at(made.where)
    full = program.backup(source)
    put(source, MIB, b"x" * 512)
    last = program.backup(source)
    run("mount", "-o", "remount,ro", made.where)
    held = program.contents()
    assert program.points() == [full["point"], last["point"]]
    assert program("show", "latest").document["point"] == last["point"]
    assert program("verify").document["ok"]
    target = loop(8 * MIB)
    dirty(target, 8 * MIB)
    program.restore(last["point"], target)
    assert sha(target) == sha(source)
    run(sys.executable, program.repository / "rescue.py", "restore", last["point"], tmp_path / "rescued.img")
    assert sha(tmp_path / "rescued.img") == sha(source)
    for argv in (("backup", source), ("synthesize", last["volume"]), ("delete", last["point"])):
        error = program(*argv, expect=1).error
        assert error["name"] in ("NoPermission", "StoreFailed"), error
    assert program.contents() == held


def test_a_read_only_device_is_backed_up(loop, program, source):
    disk = loop(8 * MIB, file=source, read_only=True)
    point = program.backup(disk)
    assert point["consistency"] == "cold"
    target = source.with_suffix(".restored")
    program("restore", point["point"], target)
    assert sha(target) == sha(source)


# --- moved ------------------------------------------------------------------------------------------------


def test_a_repository_moves_with_its_disk(program_at, loop, ext4, source):
    """It is found by its path and known by its content."""
    disk = loop(64 * MIB)
    made = ext4(disk)
    program = program_at(made.where)
    full = program.backup(source)
    made.unmount()
    with mounted(disk, made.where.with_name("elsewhere")) as where:
        moved = program.at(repository=where / "repository", state=where / "state")
        put(source, MIB, b"x" * 512)
        last = moved.backup(source)
        assert (last["kind"], last["parent"]) == ("incremental", full["point"])
        assert moved("verify").document["ok"]
