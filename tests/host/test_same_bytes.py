"""The bytes of a device have other ways to them than its node: loop devices over one file, a partition's whole disk,
the file behind a loop device. What goes on there is use of the device, and writes there are writes to it.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import pytest

from blockbak.flow import backup
from blockbak.flow.context import Quiet
from blockbak.repository.local import Repository
from tests.doubles import context
from tests.host.stage import (
    KIB,
    LOCKERS,
    MIB,
    Oracle,
    attached,
    locking,
    mounted,
    partitioned,
    put,
    run,
    sha,
    swapping,
)
from tests.moments import Once

SIZE = 16 * MIB


@pytest.fixture
def point(program, tmp_path, seed):
    """A small point without a partition table."""
    file = tmp_path / "source.img"
    file.write_bytes(bytes(SIZE))
    Oracle(file, SIZE, seed).write((0, 2 * MIB))
    return program.backup(file)["point"]


@contextlib.contextmanager
def in_use(device, where):
    """A mounted ext4 that has written what it had to write."""
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    with mounted(device, where):
        os.sync()
        yield f"mounted at {where}"


def neither_read_nor_written(program, point, disk, word, file, *, twin=False):
    """Backup and restore are refused for ``word``, and nothing was touched. A ``twin`` shows the whole file as the
    disk does: of two such none is backed up at all.
    """
    kept, held = program.contents(), sha(file)
    for options in ([], ["--dry-run"]):
        error = program("backup", disk, *options, expect=1 if twin else 5).error
        if twin:
            assert error["name"] == "DuplicateIdentity"
        else:
            assert (error["name"], word in error["message"]) == ("SourceInUse", True), error
        error = program.restore(point, disk, *options, expect=5).error
        assert (error["name"], word in error["message"]) == ("TargetInUse", True), error
    assert program.contents() == kept
    assert sha(file) == held


# --- loop devices over one file ---------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, MIB])
def test_what_is_mounted_by_another_loop_device_over_the_file_is_neither_read_nor_written(
    loop, program, point, tmp_path, offset
):
    """``mount -o loop,offset=`` of a partition makes such a one."""
    disk = loop(SIZE)
    with attached(disk.file, f"--offset={offset}") as other:
        with in_use(other, tmp_path / "used") as word:
            neither_read_nor_written(program, point, disk, word, disk.file, twin=not offset)
            if offset:
                assert program.backup(disk, "--mode", "live")["consistency"] == "none"
        # A loop device that nobody uses is no use of the file.
        if offset:
            assert program.backup(disk)["consistency"] == "cold"
        program.restore(point, disk)
    assert sha(disk.file) == sha(tmp_path / "source.img")


def test_swap_on_another_loop_device_over_the_file_is_neither_read_nor_written(loop, program, point):
    disk = loop(SIZE)
    with attached(disk.file) as other, swapping(other):
        program("backup", disk, expect=1)
        program.restore(point, disk, expect=5)
        assert b"SWAPSPACE2" in disk.file.read_bytes()[:8192]


def test_a_partition_of_a_disk_whose_file_is_mounted_elsewhere_is_neither_read_nor_written(
    loop, program, point, tmp_path
):
    disk = loop(64 * MIB)
    with (
        partitioned(disk, "start=2048, size=32M") as (first,),
        attached(disk.file, f"--offset={MIB}") as other,
        in_use(other, tmp_path / "used") as word,
    ):
        neither_read_nor_written(program, point, first, word, disk.file)


def test_a_partition_mounted_through_another_loop_device_is_use_of_the_disk(loop, program, point, tmp_path):
    disk = loop(64 * MIB)
    with (
        attached(disk.file) as again,
        partitioned(again, "size=32M") as (first,),
        in_use(first, tmp_path / "used") as word,
    ):
        neither_read_nor_written(program, point, disk, word, disk.file, twin=True)


def test_loop_devices_over_different_parts_of_a_file_do_not_disturb_each_other(loop, program, point, tmp_path):
    disk = loop(2 * SIZE)
    halves = [f"--offset={start} --sizelimit={SIZE}".split() for start in (0, SIZE)]
    with (
        attached(disk.file, *halves[0]) as low,
        attached(disk.file, *halves[1]) as high,
        in_use(high, tmp_path / "used"),
    ):
        held = sha(high)
        assert program.backup(low)["consistency"] == "cold"
        program.restore(point, low)
        assert sha(low) == sha(tmp_path / "source.img")
        assert sha(high) == held


@pytest.mark.parametrize("how", LOCKERS)
def test_a_lock_on_the_file_behind_a_loop_device_keeps_both_verbs_away(loop, program, point, how):
    """As qemu locks an image that somebody also attached."""
    disk = loop(SIZE)
    with locking(how, disk.file) as pid:
        neither_read_nor_written(program, point, disk, f"locked by process {pid}", disk.file)
    program.restore(point, disk)


def test_a_repository_on_another_loop_device_over_the_file_is_not_imaged_into_itself(loop, program_at, tmp_path):
    small = tmp_path / "small.img"
    small.write_bytes(os.urandom(64 * KIB))
    disk = loop(64 * MIB)
    with attached(disk.file, f"--offset={MIB}") as other, in_use(other, tmp_path / "used"):
        program = program_at(tmp_path / "used").at(state=tmp_path / "state")
        point = program.backup(small)["point"]
        kept = program.contents()
        program("backup", disk, expect=5)
        program.restore(point, disk, expect=5)
        for options in ([], ["--dry-run"]):
            error = program("backup", disk, "--mode", "live", *options, expect=5).error
            assert (error["name"], "the repository" in error["message"]) == ("SourceHoldsRepository", True)
        assert program.contents() == kept
        assert program("verify").document["ok"]


@pytest.mark.parametrize("file", ["*.full.zst", "*.full.json", "rescue.py"])
def test_a_loop_device_on_a_file_of_the_repository_is_no_target(program, tmp_path, as_root, file):
    small = tmp_path / "small.img"
    small.write_bytes(os.urandom(64 * KIB) if file == "*.full.zst" else os.urandom(512))
    point = program.backup(small)["point"]
    stored = next(program.repository.rglob(file))
    held = stored.read_bytes()
    with attached(stored) as node:
        for options in ([], ["--dry-run"]):
            assert program.restore(point, node, *options, expect=5).error["name"] == "TargetHolds"
    assert stored.read_bytes() == held


# --- writes that go past the node -------------------------------------------------------------------------


class Writing(Quiet):
    """Progress that writes when the first piece has been read."""

    def __init__(self, act):
        self.act = Once(act)

    def advance(self, done, changed=0):
        self.act()


def backed_up_while(program, source, act):
    """A cold backup of a source, during which ``act`` is called."""
    writing = Writing(act)
    world = replace(context(program.state), progress=writing)
    made = backup.backup(Repository(str(program.repository)), backup.Request(str(source)), world)
    assert writing.act.done
    assert made.mode == "cold"
    return made


def test_a_partition_that_is_written_through_its_disk_is_torn(loop, program):
    disk = loop(64 * MIB)
    with partitioned(disk, "start=2048, size=16M", "size=16M") as (first, _):
        made = backed_up_while(program, first, lambda: put(disk, 9 * MIB, b"x" * 4096))
        assert (made.consistency, made.attention) == ("none", True)
        assert any("was written while it was read" in note for note in made.notes)
        # As long as nobody writes, it is cold again.
        assert program.backup(first)["consistency"] == "cold"


def test_a_partition_is_not_torn_by_what_is_written_to_another(loop, program):
    disk = loop(64 * MIB)
    with partitioned(disk, "start=2048, size=16M", "size=16M") as (first, second):
        made = backed_up_while(program, first, lambda: put(second, MIB, b"x" * 4096))
        assert (made.consistency, made.attention) == ("cold", False)


def test_a_loop_device_whose_file_is_written_is_torn(loop, program):
    disk = loop(SIZE)
    made = backed_up_while(program, disk, lambda: put(disk.file, 8 * MIB, b"x" * 4096))
    assert (made.consistency, made.attention) == ("none", True)


def test_a_loop_device_whose_file_is_written_through_another_is_torn(loop, program):
    disk = loop(SIZE)
    with attached(disk.file, f"--offset={MIB}") as part:
        made = backed_up_while(program, part, lambda: put(disk, 9 * MIB, b"x" * 4096))
        assert (made.consistency, made.attention) == ("none", True)
        made = backed_up_while(program, disk, lambda: put(part, 9 * MIB, b"y" * 4096))
        assert (made.consistency, made.attention) == ("none", True)


def test_a_loop_device_is_not_torn_by_what_is_written_to_another_part_of_its_file(program, tmp_path, as_root):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(2 * SIZE))
    halves = [f"--offset={start} --sizelimit={SIZE}".split() for start in (0, SIZE)]
    with attached(file, *halves[0]) as low, attached(file, *halves[1]) as high:
        made = backed_up_while(program, low, lambda: put(high, MIB, b"x" * 4096))
        assert (made.consistency, made.attention) == ("cold", False)


def test_reading_a_loop_device_through_its_file_is_no_write(loop, program):
    disk = loop(SIZE)
    made = backed_up_while(program, disk, disk.file.read_bytes)
    assert (made.consistency, made.attention) == ("cold", False)
