"""Sources that are written, resized or taken away while they are read."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import SourceChangedSize, SourceVanished
from blockbak.flow import backup, restore
from blockbak.flow.context import Quiet
from blockbak.repository.local import Repository
from tests.doubles import context
from tests.host.stage import (
    KIB,
    MIB,
    Oracle,
    attached,
    dirty,
    partitioned,
    put,
    run,
    sha,
    writing,
)

SIZE = 32 * MIB


# --- by another process -----------------------------------------------------------------------------------


def check_torn(program, source, point):
    """The point is there, says what it is, and the next one puts it right."""
    assert (point["mode"], point["consistency"], point["attention"]) == ("cold", "none", True)
    assert any("was written while it was read" in note for note in point["notes"])
    assert program("list", point["volume"]).document[-1]["consistency"] == "none"
    assert program("verify").document["ok"]
    after = program.backup(source)
    assert (after["kind"], after["parent"], after["consistency"]) == ("incremental", point["point"], "cold")
    target = program.repository.parent / "target.img"
    program("restore", after["point"], target)
    assert sha(target) == sha(source)


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_source_that_another_process_writes_makes_a_torn_point(loop, program, tmp_path, kind, seed):
    source = loop(SIZE).path if kind == "device" else tmp_path / "disk.img"
    if kind == "file":
        source.write_bytes(bytes(SIZE))
    Oracle(source, SIZE, seed).write((0, SIZE))
    with writing(source):
        done = program("backup", source, expect=3)
    (point,) = done.document["points"]
    assert done.document["errors"] == []
    assert "was written while it was read" in done.said
    check_torn(program, source, point)


def test_a_partition_that_is_written_tears_the_image_of_its_disk(loop, program, seed):
    disk = loop(SIZE)
    with partitioned(disk, "size=8M", "size=8M") as (first, second):
        Oracle(first, 8 * MIB, seed).write((0, 8 * MIB))
        with writing(second):
            assert program.backup(first)["consistency"] == "cold"
            point = program.backup(disk, expect=3)
        check_torn(program, disk, point)


# --- at a moment of our choice ----------------------------------------------------------------------------


class Interference(Quiet):
    """Progress that does something once, when the first piece has been read."""

    def __init__(self, act):
        self._act = act

    def advance(self, done, changed=0):
        act, self._act = self._act, lambda: None
        act()


class Run:
    """Backups in this process, with interference."""

    def __init__(self, program):
        self.program = program
        self.repository = Repository(str(program.repository))
        self._world = context(program.state, workers=1)

    def backup(self, source, act=lambda: None, **more):
        world = replace(self._world, progress=Interference(act))
        return backup.backup(self.repository, backup.Request(str(source), **more), world)

    def restore(self, point, target, **more):
        return restore.restore(
            self.repository, restore.Request(point, str(target), overwrite=True, **more), self._world
        )


@pytest.fixture
def runs(program):
    return Run(program)


@pytest.fixture
def disk(loop, seed):
    made = loop(SIZE)
    Oracle(made, SIZE, seed).write((0, SIZE))
    return made


ACTS = {
    "a write": lambda path: put(path, 20 * MIB, b"x" * 512),
    "a write of what is there": lambda path: put(path, 0, Path(path).read_bytes()[:4096]),
    "a write behind the reader": lambda path: put(path, 0, b"x" * 512),
    "a discard": lambda path: run("blkdiscard", "--force", "--offset", 20 * MIB, "--length", MIB, path),
    "zeros": lambda path: run("blkdiscard", "--force", "--zeroout", "--offset", 20 * MIB, "--length", MIB, path),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_device_that_is_written_while_it_is_read_makes_a_torn_point(runs, disk, act):
    made = runs.backup(disk, lambda: ACTS[act](disk.path))
    assert (made.consistency, made.attention) == ("none", True)
    assert runs.backup(disk).consistency == "cold"


def test_reading_a_device_is_no_write(runs, disk):
    made = runs.backup(disk, lambda: sha(disk))
    assert (made.consistency, made.attention, made.notes[1:]) == ("cold", False, [])


def in_place(path):
    """Write, and set the clock of the file back as it was."""
    info = path.stat()
    put(path, 20 * MIB, b"x" * 512)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


def exchanged(path):
    """Another file under the same name."""
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.rename(path)


@pytest.mark.parametrize("act", [in_place, exchanged, lambda path: put(path, 0, b"x")])
def test_a_file_that_changes_while_it_is_read_makes_a_torn_point(runs, tmp_path, act, seed):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(SIZE))
    Oracle(file, SIZE, seed).write((0, SIZE))
    made = runs.backup(file, lambda: act(file))
    assert (made.consistency, made.attention) == ("none", True)
    assert runs.backup(file, lambda: sha(file)).consistency == "cold"


def test_nothing_can_mount_a_device_while_it_is_read(runs, loop, tmp_path):
    device = loop(SIZE)
    run("mkfs.ext4", "-q", device)
    (tmp_path / "there").mkdir()
    statuses = []

    def mount():
        statuses.append(subprocess.run(["mount", device, tmp_path / "there"], check=False, capture_output=True))

    assert runs.backup(device, mount).consistency == "cold"
    assert statuses[0].returncode == 32
    assert b"busy" in statuses[0].stderr or b"already mounted" in statuses[0].stderr


def test_where_the_kernel_counts_no_writes_it_is_said(runs, disk):
    switch = Path("/sys/block", Path(disk.path).name, "queue/iostats")
    switch.write_text("0")
    try:
        made = runs.backup(disk)
        assert any("counts no writes" in note for note in made.notes)
        assert runs.backup(disk, mode="live").consistency == "none"
    finally:
        switch.write_text("1")
    assert not any("counts no writes" in note for note in runs.backup(disk).notes)


# --- sizes ------------------------------------------------------------------------------------------------


def resized(disk, size):
    os.truncate(disk.file, size)
    run("losetup", "--set-capacity", disk)


@pytest.mark.parametrize("size", [SIZE + MIB, SIZE + 512, SIZE - 512, 5 * MIB])
@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_source_that_changes_its_size_makes_no_point(runs, program, disk, tmp_path, size, kind):
    source = disk
    if kind == "file":
        source = tmp_path / "disk.img"
        source.write_bytes(disk.file.read_bytes())
    first = runs.backup(source)
    before = program.contents()
    act = (lambda: resized(disk, size)) if kind == "device" else (lambda: os.truncate(source, size))
    with pytest.raises(SourceChangedSize if size > SIZE else (SourceChangedSize, SourceVanished)) as found:
        runs.backup(source, act, kind="full")
    assert found.value.exit_code == 1
    assert str(source) in str(found.value)
    assert program.contents() == before
    made = runs.backup(source)
    # The number of the point that was not made may be left out, but not come twice.
    assert (made.kind, made.device_bytes, made.sequence > first.sequence) == ("full", size, True)


# --- what cannot be read ----------------------------------------------------------------------------------


def bad(program, point):
    """The ranges of a point that are named unreadable."""
    extents = program("show", point).document["extents"]
    return [(one["start"], one["start"] + one["length"]) for one in extents if one["kind"] == "bad"]


def test_a_part_that_cannot_be_read_is_named_and_never_passed_off_as_data(program, loop, tmp_path, seed):
    size, cut = 8 * MIB, 7 * MIB + 256 * KIB + 512
    disk, target = loop(size), loop(size)
    oracle = Oracle(disk, size, seed)
    oracle.write((0, size))
    full, then = program.backup(disk), oracle.now()
    os.truncate(disk.file, cut)
    point = program.backup(disk, expect=3)
    assert (point["kind"], point["bad_bytes"], point["attention"]) == ("incremental", size - cut, True)
    assert bad(program, point["point"]) == [(cut, size)]
    assert program("list").document[-1]["bad_bytes"] == size - cut
    assert program("verify").document["ok"]
    dirty(target, size)
    done = program.restore(point["point"], target, expect=3).document
    assert done["unreadable"] == [{"start": cut, "length": size - cut}]
    assert then.wrong(target, [(cut, size)]) is None, f"seed {seed}"
    done = program.restore(point["point"], target, "--keep-going", "--mapfile", tmp_path / "map", expect=3)
    sectors = run("ddrescuelog", "--block-size=512", "--list-blocks=-", tmp_path / "map").split()
    assert [int(sectors[0]), int(sectors[-1]), len(sectors)] == [cut // 512, size // 512 - 1, (size - cut) // 512]

    composed = program("synthesize", point["volume"]).document
    assert (composed["root"], composed["bad_bytes"]) == (point["root"], size - cut)
    program("delete", full["point"])
    assert bad(program, point["point"]) == [(cut, size)]

    # It can be read again: zeros now, which is what the point would restore to, and yet not the same.
    os.truncate(disk.file, size)
    oracle.zeroed(cut, size)
    healed = program.backup(disk)
    assert (healed["kind"], healed["bad_bytes"]) == ("incremental", 0)
    assert healed["changed_bytes"] >= size - cut
    assert bad(program, healed["point"]) == []
    program.restore(healed["point"], target)
    assert oracle.now().wrong(target) is None, f"seed {seed}"


def test_a_part_that_is_lost_while_it_is_read_is_named(runs, program, disk, tmp_path, seed):
    made = runs.backup(disk, lambda: os.truncate(disk.file, SIZE - MIB))
    assert (made.bad_bytes, made.attention) == (MIB, True)
    assert bad(program, made.point) == [(SIZE - MIB, SIZE)]
    target = tmp_path / "target.img"
    done = runs.restore(made.point, target)
    assert [one["start"] for one in done.unreadable] == [SIZE - MIB]
    assert target.read_bytes()[SIZE - MIB :] == bytes(MIB)


def test_a_device_without_its_file_is_still_a_device(program, tmp_path, seed):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(MIB))
    Oracle(file, MIB, seed).write((0, MIB))
    with attached(file) as node:
        file.unlink()
        point = program.backup(node)
        target = tmp_path / "target.img"
        program("restore", point["point"], target)
        assert sha(target) == sha(node)
        assert program.backup(node)["kind"] == "incremental"
