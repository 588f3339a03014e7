"""What a mirror will not read and will not write: refused with the reason, and nothing is touched."""

from __future__ import annotations

import os

import pytest

from tests.host.stage import MIB, attached, dirty, mounted, partitioned, put, pv_label, run, sha, swapping
from tests.patterns import stamp

SIZE = 16 * MIB


@pytest.fixture
def pair(loop):
    """Two devices; what one holds is not what the other holds."""
    source, target = loop(SIZE), loop(SIZE)
    put(source.path, 0, stamp(0, SIZE // 512, 1, 3))
    dirty(target.path, SIZE)
    return source, target


def refused(program, name, source, target, *options):
    """It ends with 5, and neither side is another afterwards."""
    before = sha(source), sha(target) if os.path.exists(target) else None
    error = program("mirror", source, target, "--yes", *options, expect=5).error
    assert error["name"] == name, error
    assert (sha(source), sha(target) if os.path.exists(target) else None) == before
    return error


# --- sources --------------------------------------------------------------------------------------------------


def test_a_source_in_use_is_refused_and_told_what_to_do(pair, program, tmp_path):
    source, target = pair
    run("mkfs.ext4", "-q", "-F", source)
    with mounted(source, tmp_path / "where"):
        error = program("mirror", source, target, "--yes", expect=5).error
        assert error["name"] == "MirrorSourceInUse"
        assert str(tmp_path / "where") in error["message"]
        assert "--from-snapshot" in error["advice"]
        error = program("mirror", source, target, "--yes", "--from-snapshot", expect=1).error
        assert error["name"] == "NotSnapshotable"
    program("mirror", source, target, "--yes")
    assert sha(source) == sha(target)


def test_a_source_that_is_swap_or_backs_a_loop_device(pair, program, tmp_path, loop):
    source, target = pair
    with swapping(source):
        refused(program, "MirrorSourceInUse", source.path, target.path)
    file = tmp_path / "file.img"
    file.write_bytes(bytes(MIB))
    with attached(file) as node:
        run("mkfs.ext4", "-q", "-F", node)
        with mounted(node, tmp_path / "where"):
            assert program("mirror", file, target, "--yes", expect=5).error["name"] == "MirrorSourceInUse"


# --- the two of them ------------------------------------------------------------------------------------------------


def test_nothing_is_mirrored_onto_itself(pair, program, tmp_path, loop):
    source, _ = pair
    refused(program, "MirrorOntoItself", source.path, source.path)
    refused(program, "MirrorOntoItself", source.path, source.file)
    refused(program, "MirrorSourceInUse", source.file, source.path)
    with attached(source.file) as other:
        refused(program, "MirrorOntoItself", source.path, other)
    link = tmp_path / "link"
    link.symlink_to(source.path)
    refused(program, "MirrorOntoItself", source.path, link)
    file = tmp_path / "file"
    file.write_bytes(b"x" * MIB)
    os.link(file, tmp_path / "second")
    refused(program, "MirrorOntoItself", file, tmp_path / "second")


def test_a_disk_is_not_mirrored_onto_its_partition_nor_the_reverse(loop, program):
    disk = loop(SIZE)
    with partitioned(disk, "size=4MiB") as parts:
        refused(program, "MirrorOntoItself", disk.path, parts[0])
        refused(program, "MirrorOntoItself", parts[0], disk.path)


def test_a_copy_does_not_lie_on_what_it_is_of(pair, program, tmp_path):
    """A file on the file system of the source, or of the target."""
    _, target = pair
    run("mkfs.ext4", "-q", "-F", target)
    where = tmp_path / "where"
    with mounted(target, where):
        file = where / "file.img"
        file.write_bytes(b"x" * MIB)
        os.sync()
        assert program("mirror", target, file, "--yes", expect=5).error["name"] == "MirrorSourceInUse"
        assert program("mirror", file, target, "--yes", expect=5).error["name"] == "MirrorOntoItself"


def test_what_an_earlier_run_left_may_be_in_use_by_now(pair, program, tmp_path):
    """Or be the source itself, which would get another name."""
    from blockbak.host.blockio import mark

    source, _ = pair
    left, target = tmp_path / "copy.partial", tmp_path / "copy"
    left.write_bytes(b"x" * SIZE)
    with left.open("r+b") as file:
        mark(file.fileno())
    refused(program, "MirrorOntoItself", left, target)
    with attached(left) as other:
        refused(program, "MirrorOntoItself", other, target)
        assert "backing file" in refused(program, "TargetInUse", source.path, target)["message"]
    assert left.read_bytes() == b"x" * SIZE
    assert not target.exists()


# --- targets ----------------------------------------------------------------------------------------------------------


def test_targets_that_are_never_written(pair, program, tmp_path, loop):
    source, target = pair
    small = loop(SIZE - 4096)
    assert "at least" in refused(program, "TargetTooSmall", source.path, small.path)["message"]
    read_only = loop(SIZE, read_only=True)
    assert program("mirror", source, read_only, "--yes", expect=1).error["name"] in ("BadTarget", "NoPermission")
    run("mkfs.ext4", "-q", "-F", target)
    with mounted(target, tmp_path / "where"):
        refused(program, "TargetInUse", source.path, target.path)
    with swapping(target):
        refused(program, "TargetHolds", source.path, target.path)
    assert program("mirror", source, "/dev/no-such-node", "--yes", expect=1).error["name"] == "BadTarget"
    assert program("mirror", source, tmp_path, "--yes", expect=1).error["name"] == "BadTarget"
    inside = program.repository / "copy.img"
    assert program("mirror", source, inside, "--yes", expect=5).error["name"] == "TargetHolds"
    assert not inside.exists()


def test_what_is_there_needs_a_yes(pair, program):
    source, target = pair
    before = sha(target)
    assert program("mirror", source, target, expect=5).error["name"] == "TargetExists"
    assert sha(target) == before
    done = program("mirror", source, target, "--dry-run").document
    assert (done["dry_run"], done["differing_bytes"], done["written_bytes"]) == (True, SIZE, 0)
    assert sha(target) == before


def test_a_table_for_other_sectors_is_refused(loop, program):
    source, target = loop(SIZE), loop(SIZE, sector_size=4096)
    run("sfdisk", "--quiet", "--wipe", "never", source, stdin="label: gpt\nsize=4MiB\n")
    refused(program, "TargetSectorSize", source.path, target.path)


def test_a_member_of_a_volume_group_is_refused_unless_a_mirror_made_it_one(pair, program):
    """The source's own physical volume on the target is an older copy; another one is somebody's data."""
    source, target = pair
    put(source.path, 0, pv_label("mine"))
    other = bytearray(pv_label("other"))
    other[544:576] = b"y" * 32
    put(target.path, 0, bytes(other))
    assert "other" in refused(program, "TargetInUse", source.path, target.path)["message"]
    dirty(target.path, SIZE)
    program("mirror", source, target, "--yes")
    put(source.path, 8 * MIB, b"changed!" * 64)
    program("mirror", source, target, "--yes")
    assert sha(source) == sha(target)


def test_copies_that_carry_the_same_ids_can_be_brought_in_step_again(loop, program):
    """A mirror of a disk has its partition table's id: the two are twins from then on."""
    source, target = loop(SIZE), loop(SIZE)
    run("sfdisk", "--quiet", "--wipe", "never", source, stdin="label: gpt\nsize=4MiB\n")
    for _ in range(2):
        program("mirror", source, target, "--yes")
        assert sha(source) == sha(target)
        put(source.path, 12 * MIB, b"changed!" * 64)


def test_the_receiver_refuses_for_itself(pair, program, tmp_path):
    import shlex
    import sys

    source, target = pair
    end = [sys.executable, "-P", "-m", "blockbak", "mirror", "--receive", target.path]
    error = program("mirror", source, "--through", shlex.join(end), expect=5).error
    assert error["name"] == "PeerRefused"
    assert "overwritten only when told so" in error["message"]
    run("mkfs.ext4", "-q", "-F", target)
    with mounted(target, tmp_path / "where"):
        error = program("mirror", source, "--through", shlex.join([*end, "--yes"]), expect=5).error
        assert "mounted at" in error["message"]
    small = [*end[:-1], str(tmp_path / "new")]
    done = program("mirror", source, "--through", shlex.join(small)).document
    assert done["host"]
    assert sha(tmp_path / "new") == sha(source)


def test_the_other_end_may_have_the_same_file_or_device(pair, program, tmp_path):
    """Each end is right by itself; what the source's end opens after the other one tells."""
    import shlex
    import sys

    file = tmp_path / "file"
    file.write_bytes(b"x" * MIB)
    for place in (file, pair[0].path):
        end = [sys.executable, "-P", "-m", "blockbak", "mirror", "--receive", str(place), "--yes"]
        error = program("mirror", place, "--through", shlex.join(end), expect=5).error
        assert error["name"] == "MirrorSourceInUse"


def test_the_receiver_warns_of_a_physical_volume_that_it_has_already(pair, program):
    """It cannot read the source, and so goes by what it is told of it."""
    import shlex
    import sys

    source, target = pair
    put(source.path, 0, pv_label("mine"))
    end = [sys.executable, "-P", "-m", "blockbak", "mirror", "--receive", target.path, "--yes"]
    for words in (("--through", shlex.join(end), "--dry-run"), ("--dry-run", target)):
        notes = program("mirror", source, *words).document["notes"]
        assert [one for one in notes if "LVM's physical volume" in one and source.path in one], notes


def test_write_counters_of_the_source_are_compared(loop, program, tmp_path):
    """Somebody who does not keep to O_EXCL writes meanwhile."""
    from tests.host.stage import writing

    source = loop(SIZE)
    with writing(source.path):
        done = program("mirror", source, tmp_path / "copy", "--limit", "16M", expect=3).document
    assert (done["consistency"], done["attention"]) == ("none", True)
