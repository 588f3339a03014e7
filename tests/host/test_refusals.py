"""What blockbak will not read and will not write: refused with the reason, and nothing is touched."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import TargetInUse
from blockbak.flow.target import Incoming, check_target
from blockbak.host import device as devices
from blockbak.host import usage
from blockbak.host.device import look
from blockbak.host.system import System
from blockbak.image.view import PointView
from blockbak.repository.local import Repository
from tests import images
from tests.doubles import context
from tests.host.stage import (
    KIB,
    LOCKERS,
    MIB,
    Oracle,
    attached,
    dirty,
    locking,
    md_superblock,
    mounted,
    other_process,
    partitioned,
    put,
    pv_label,
    run,
    sha,
    swapping,
)

SIZE = 16 * MIB


# --- sources in use ---------------------------------------------------------------------------------------
#
# Each makes a source that somebody uses; it yields the source and a word of the reason.


@contextlib.contextmanager
def idle(device, where):
    """A mounted ext4 that has written what it had to write."""
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
    with mounted(device, where):
        os.sync()
        yield


@contextlib.contextmanager
def mounted_device(loop, where):
    disk = loop(SIZE)
    with idle(disk, where):
        yield disk.path, f"mounted at {where}"


@contextlib.contextmanager
def swap_device(loop, where):
    with swapping(loop(SIZE)) as disk:
        yield disk.path, "swap"


@contextlib.contextmanager
def disk_with_a_mounted_partition(loop, where):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=16M", "size=16M") as (_, second), idle(second, where):
        yield disk.path, f"mounted at {where} ({Path(second).name})"


@contextlib.contextmanager
def disk_with_swap_on_a_partition(loop, where):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=16M") as (first,), swapping(first):
        yield disk.path, "swap"


@contextlib.contextmanager
def device_behind_a_loop_device(loop, where):
    disk = loop(SIZE)
    with attached(disk) as upper:
        yield disk.path, f"backing device of {upper}"


@contextlib.contextmanager
def file_behind_a_loop_device(loop, where):
    disk = loop(SIZE)
    yield disk.file, f"backing file of {disk}"


@contextlib.contextmanager
def file_swapped_to(loop, where):
    disk = loop(64 * MIB)
    with idle(disk, where):
        (where / "swap").write_bytes(bytes(SIZE))
        (where / "swap").chmod(0o600)
        with swapping(where / "swap") as file:
            yield file, "swap"


def locked_by(how, *, device):
    @contextlib.contextmanager
    def locked(loop, where):
        disk = loop(SIZE)
        file = where.with_suffix(".img")
        file.write_bytes(bytes(SIZE))
        with locking(how, disk if device else file) as pid:
            yield disk.path if device else file, f"locked by process {pid}"

    return locked


USES = {
    "a mounted device": mounted_device,
    "a swap device": swap_device,
    "a disk with a mounted partition": disk_with_a_mounted_partition,
    "a disk with swap on a partition": disk_with_swap_on_a_partition,
    "a device behind a loop device": device_behind_a_loop_device,
    "a file behind a loop device": file_behind_a_loop_device,
    "a file swapped to": file_swapped_to,
    **{f"a file locked by {how}": locked_by(how, device=False) for how in LOCKERS},
    **{f"a device locked by {how}": locked_by(how, device=True) for how in LOCKERS},
}


def digest(path, use):
    """What must not change. Of swap that is the end of the first page: the kernel may really swap to it."""
    if "swap" not in use:
        return sha(path)
    return str(Path(path).read_bytes().index(b"SWAPSPACE2"))


@pytest.mark.parametrize("use", USES)
def test_a_source_in_use_is_refused_but_for_a_live_read(loop, program, tmp_path, use):
    with USES[use](loop, tmp_path / "used") as (source, reason):
        before, held = program.contents(), digest(source, use)
        for options in ([], ["--dry-run"], *([["--mode", "cold"]] if use.startswith("a file") else [])):
            error = program("backup", source, *options, expect=5).error
            assert error["name"] == "SourceInUse"
            assert reason in error["message"]
            assert "--mode live" in error["advice"]
        assert program.contents() == before
        assert digest(source, use) == held
        if use.startswith(("a device behind", "a device locked")):
            # Nobody may be asked to let go of that.
            assert program("backup", source, "--mode", "cold", expect=5).error["name"] == "CannotRest"
        point = program.backup(source, "--mode", "live")
        assert (point["mode"], point["consistency"]) == ("live", "none")
        assert program("show", point["point"]).document["consistency"] == "none"
        after = program.backup(source, "--mode", "live")
        assert (after["kind"], after["consistency"], after["attention"]) == ("incremental", "none", False)
        if "mounted" not in use and "swap" not in use:
            # Nothing wrote to it: then even a live read is right.
            assert after["changed_bytes"] == 0
            target = tmp_path / "target.img"
            program("restore", point["point"], target)
            assert sha(target) == held == sha(source)


def test_a_partition_beside_a_mounted_one_is_free(loop, program, tmp_path):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=16M", "size=16M") as (first, second), idle(second, tmp_path / "there"):
        assert program.backup(first)["consistency"] == "cold"
        error = program("backup", second, expect=5).error
        assert str(tmp_path / "there") in error["message"]


_HOLDER = """
import os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_EXCL)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("held", ["the device", "a partition"])
def test_what_another_process_holds_for_itself_alone_is_neither_read_nor_written(loop, program, point, held):
    """As the restore or the cold backup of another blockbak does."""
    disk = loop(64 * MIB)
    with contextlib.ExitStack() as undo:
        node = disk.path
        if held == "a partition":
            node = undo.enter_context(partitioned(disk, "size=16M"))[0]
        undo.enter_context(other_process(_HOLDER, node))
        # The first run makes the volume's directory: only the kernel knows of the holder, and only when asked to open.
        program("backup", disk, expect=5)
        with untouched(program, disk):
            assert program("backup", disk, expect=5).error["name"] == "SourceInUse"
            assert program.restore(point, disk, expect=5).error["name"] == "TargetInUse"
        assert program.points() == [point]
        assert program.backup(disk, "--mode", "live")["consistency"] == "none"
    assert program.backup(disk)["consistency"] == "cold"


def test_one_refusal_does_not_keep_the_other_sources_from_being_tried(loop, program, tmp_path):
    free = loop(SIZE)
    with mounted_device(loop, tmp_path / "used") as (source, _):
        done = program("backup", source, free, "/dev/nosuch", expect=5).document
    assert [one["volume"] for one in done["points"]] == [program("list").document[0]["volume"]]
    assert [one["name"] for one in done["errors"]] == ["SourceInUse", "NoSuchSource"]
    assert done["error"] == done["errors"][0]


@pytest.mark.parametrize(
    ("make", "name", "word"),
    [
        (lambda path: path.mkdir(), "NotABlockSource", "a directory"),
        (os.mkfifo, "NotABlockSource", "a named pipe"),
        (lambda path: None, "NoSuchSource", "does not exist"),
        (lambda path: path.symlink_to("/dev/null"), "NotABlockSource", "a character device"),
        (lambda path: path.touch(), "SourceEmpty", "no bytes"),
    ],
)
def test_what_is_no_source_fails_at_once(program, tmp_path, make, name, word):
    path = tmp_path / "source"
    make(path)
    before = program.contents()
    error = program("backup", path, expect=1).error
    assert (error["name"], word in error["message"]) == (name, True)
    assert program.contents() == before


# --- sources that hold the repository ---------------------------------------------------------------------


@pytest.fixture
def layers(loop, ext4, tmp_path):
    """A directory in a file system on a loop device, on a file in a file system on a partition of a disk; and
    everything below it.
    """
    disk = loop(128 * MIB)
    with partitioned(disk, "size=100M", "size=8M") as (lower, beside):
        run("mkfs.ext4", "-q", lower)
        with mounted(lower, tmp_path / "lower") as outside:
            inner = outside / "inner.img"
            inner.write_bytes(bytes(64 * MIB))
            with attached(inner) as node:
                run("mkfs.ext4", "-q", node)
                with mounted(node, tmp_path / "inside") as inside:
                    yield inside, {
                        "disk": disk.path, "its file": disk.file, "partition": lower, "inner file": inner, "inner": node,
                    }, beside  # fmt: skip


@pytest.mark.parametrize("what", ["the repository", "blockbak's state directory"])
def test_a_source_that_holds_the_repository_or_the_state_is_refused(layers, program, program_at, tmp_path, what):
    inside, below, beside = layers
    if what == "the repository":
        program = program_at(inside).at(state=tmp_path / "state")
    else:
        program = program.at(state=inside / "state/not/there/yet")
    before = program.contents()
    for name, source in below.items():
        for options in ([], ["--mode", "live"], ["--dry-run"]):
            error = program("backup", source, *options, expect=5).error
            assert (error["name"], what in error["message"]) == ("SourceHoldsRepository", True), name
    assert program.contents() == before
    assert program.backup(beside)["consistency"] == "cold"


# --- targets ----------------------------------------------------------------------------------------------
#
# Each makes a target that must not be written; it yields the target and a word of the reason.


@contextlib.contextmanager
def partition_of_a_mounted_disk(loop, where):
    """Some make a file system on a disk and leave an old table's partitions behind."""
    disk = loop(64 * MIB)
    with partitioned(disk, "size=32M") as (first,), idle(disk, where):
        yield first, f"mounted at {where}"


@contextlib.contextmanager
def member_of_a_group(loop, where):
    disk = loop(SIZE)
    put(disk, 0, pv_label("vg-data"))
    yield disk.path, "part of volume group vg-data"


@contextlib.contextmanager
def member_of_a_group_named_elsewhere(loop, where):
    """As ``pvcreate --metadatacopies 0`` and ``vgcreate`` leave the second disk of a group."""
    disk = loop(SIZE)
    label = bytearray(pv_label("vg")[:KIB])
    # After the two lists of areas, the second one empty, come version and flags: 1 is "in use".
    label[584 + 48 : 584 + 56] = (2).to_bytes(4, "little") + (1).to_bytes(4, "little")
    label[584 + 16 : 584 + 48] = bytes(32)
    put(disk, 0, bytes(label))
    yield disk.path, "part of volume group"


@contextlib.contextmanager
def disk_with_a_member_of_a_group(loop, where):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=8M", "size=16M") as (_, second):
        put(second, 0, pv_label("vg"))
    yield disk.path, "part of volume group vg (partition 2)"


def member_of_an_array(place):
    @contextlib.contextmanager
    def make(loop, where):
        disk = loop(SIZE)
        put(disk, place // 4096 * 4096, bytes(place % 4096) + md_superblock("md7", place))
        yield disk.path, "part of array md7"

    return make


USED_TARGETS = {
    **{name: make for name, make in USES.items() if "ofd" not in name},
    "a partition of a mounted disk": partition_of_a_mounted_disk,
    "a member of a group": member_of_a_group,
    "a member of a group that is named on another disk": member_of_a_group_named_elsewhere,
    "a disk with a member of a group": disk_with_a_member_of_a_group,
    "a member of an array, 1.2": member_of_an_array(4096),
    "a member of an array, 1.1": member_of_an_array(0),
    "a member of an array, 1.0": member_of_an_array(SIZE - 8 * KIB),
}


@pytest.fixture
def point(program, tmp_path, seed):
    """A small point without a partition table."""
    file = tmp_path / "source.img"
    file.write_bytes(bytes(SIZE))
    Oracle(file, SIZE, seed).write((0, 2 * MIB))
    return program.backup(file)["point"]


@contextlib.contextmanager
def untouched(program, *paths):
    """What is refused leaves target and repository as they were."""
    before = [sha(path) for path in paths]
    kept = program.contents()
    yield
    assert [sha(path) for path in paths] == before
    assert program.contents() == kept


def refused(program, point, target, name, word, *options, code=5):
    error = program("restore", point, target, "--yes", *options, expect=code).error
    assert error["name"] == name, error
    assert str(word) in error["message"]
    # A plan that cannot be carried out is none.
    assert program("restore", point, target, "--dry-run", *options, expect=code).error["name"] == name


@pytest.mark.parametrize("use", USED_TARGETS)
def test_a_target_in_use_is_refused(loop, program, tmp_path, point, use):
    # Swap that was overwritten takes the machine down, not only what used it.
    name = "TargetHolds" if "swap" in use else "TargetInUse"
    with USED_TARGETS[use](loop, tmp_path / "used") as (target, reason), untouched(program):
        held = digest(target, use)
        refused(program, point, target, name, reason)
        refused(program, point, target, name, reason, "--keep-going", "--no-verify")
        assert digest(target, use) == held


def test_a_target_is_free_again_when_nothing_uses_it(loop, program, tmp_path, point):
    with mounted_device(loop, tmp_path / "used") as (target, _):
        program.restore(point, target, expect=5)
    program.restore(point, target)
    assert sha(target) == sha(tmp_path / "source.img")


def test_a_member_of_an_array_or_a_group_is_rolled_back_onto_itself(loop, program):
    disk = loop(SIZE)
    put(disk, 0, pv_label("vg-data"))
    point = program.backup(disk)["point"]
    held = sha(disk)
    put(disk, 8 * MIB, b"x" * 512)
    program.restore(point, disk)
    assert sha(disk) == held


@pytest.mark.parametrize(
    ("boot", "seq", "host", "same"),
    [
        ("this", 0, "here", True),
        ("this", 1, "here", False),
        ("another", 0, "here", False),
        ("another", 1, "here", False),
        ("this", 0, "elsewhere", False),
    ],
)
def test_a_member_of_a_group_is_not_lost_to_what_once_had_its_node(loop, program, tmp_path, boot, seq, host, same):
    """A disk without a serial is known by its node alone, and after a reboot another one may have that."""
    disk = loop(SIZE)
    put(disk, 0, pv_label("vg-data"))
    # The loop device as a disk that has no name but its node.
    target = replace(devices.look(disk.path), kind="disk", backing_file="")
    now = devices.identity(target)
    assert (now.kind, now.value, now.diskseq > 0) == ("path", disk.path, True)
    then = replace(now, diskseq=now.diskseq + seq, boot=now.boot if boot == "this" else "another")
    content = images.state(disk.file.read_bytes())
    world = context(tmp_path / "state")
    made_on = world.host if host == "here" else "elsewhere"
    about = images.opening("vol", "20260101T000000Z-abcd", 1, content, 4 * KIB, None, identity=then, host=made_on)
    view = PointView([images.build(images.Memory(), about, content)])
    repository = Repository(str(program.repository))
    with contextlib.nullcontext() if same else pytest.raises(TargetInUse, match="part of volume group vg-data"):
        check_target(disk.path, target, Incoming.of(view), repository, world, overwrite=True)


def test_a_smaller_target_is_refused_and_a_larger_one_is_not(loop, program, point):
    small, large = loop(SIZE - 512), loop(SIZE + 512)
    dirty(small, SIZE - 512)
    with untouched(program, small):
        refused(program, point, small, "TargetTooSmall", SIZE - 512)
    program.restore(point, large)


@pytest.mark.parametrize(("have", "need"), [(4096, 512), (512, 4096)])
def test_other_sectors_are_refused_only_for_a_partition_table(loop, program, have, need):
    disk, target = loop(SIZE, sector_size=need), loop(SIZE, sector_size=have)
    dirty(target, SIZE)
    put(disk, 8 * MIB, b"x" * 4096)
    plain = program.backup(disk)["point"]
    run("sgdisk", "--new=1:256:+4M", disk)
    tabled = program.backup(disk)["point"]
    with untouched(program, target):
        refused(program, tabled, target, "TargetSectorSize", f"{have}-byte sectors")
    program.restore(plain, target)
    assert Path(target.path).read_bytes() == bytes(8 * MIB) + b"x" * 4096 + bytes(8 * MIB - 4096)
    # A file has no sectors of its own.
    program("restore", tabled, disk.file.with_suffix(".restored"))
    assert sha(disk.file.with_suffix(".restored")) == sha(disk)


@pytest.mark.parametrize("what", ["the repository", "blockbak's state directory"])
def test_a_target_that_holds_the_repository_or_the_state_is_refused(layers, program, program_at, tmp_path, what):
    inside, below, beside = layers
    if what == "the repository":
        program = program_at(inside).at(state=tmp_path / "state")
    else:
        program = program.at(state=inside / "state/not/there/yet")
    source = tmp_path / "small.img"
    source.write_bytes(b"x" * MIB)
    point = program.backup(source)["point"]
    kept = program.contents()
    for target in below.values():
        refused(program, point, target, "TargetHolds", what)
    assert program.contents() == kept
    program.restore(point, beside)
    assert Path(beside).read_bytes()[:MIB] == b"x" * MIB


def test_a_file_in_a_repository_is_no_target(program, program_at, point, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    other = program_at(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(program.repository)
    image = next(program.repository.rglob("*.zst"))
    (tmp_path / "image-link").symlink_to(image)
    with untouched(program, image):
        for target in (
            image,
            image.with_suffix(".json"),
            image.parent / "new.img",
            program.repository / "new.img",
            program.repository / "repository.json",
            tmp_path / "link" / "new.img",
            tmp_path / "image-link",
            # Another repository is one too.
            other.repository / "new.img",
        ):
            refused(program, point, target, "TargetHolds", "a part of a repository")
            exported = program("export", point, target, "--yes", expect=1 if target.is_symlink() else 5)
            assert exported.error["name"] == ("BadTarget" if target.is_symlink() else "TargetHolds")


def test_another_name_of_an_image_is_no_target(program, point, tmp_path):
    image = next(program.repository.rglob("*.zst"))
    os.link(image, tmp_path / "other-name.img")
    held = sha(image)
    program("restore", point, tmp_path / "other-name.img", "--yes", expect=5)
    assert sha(image) == held
    assert program("verify").document["ok"]


def test_a_read_only_device_is_no_target(loop, program, point, tmp_path):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(SIZE))
    dirty(file, SIZE)
    disk = loop(SIZE, file=file, read_only=True)
    with untouched(program, disk):
        refused(program, point, disk, "BadTarget", "read-only", code=1)


def test_what_exists_is_overwritten_only_when_told_so(loop, program, point, tmp_path):
    disk, file = loop(SIZE), tmp_path / "file.img"
    dirty(disk, SIZE)
    file.write_bytes(b"mine")
    with untouched(program, disk, file):
        for target in (disk, file):
            error = program("restore", point, target, expect=5).error
            assert (error["name"], "--yes" in error["advice"]) == ("TargetExists", True)
            # Asking what would be done is harmless.
            assert program("restore", point, target, "--dry-run").document["plan"]["target"] == str(target)


@pytest.mark.parametrize("what", ["a directory", "a named pipe", "a socket", "a character device"])
def test_what_cannot_hold_a_volume_is_no_target(program, point, tmp_path, what):
    target = tmp_path / "target"
    with contextlib.ExitStack() as undo:
        match what:
            case "a directory":
                target.mkdir()
            case "a named pipe":
                os.mkfifo(target)
            case "a socket":
                undo.enter_context(socket.socket(socket.AF_UNIX)).bind(str(target))
            case _:
                target.symlink_to("/dev/null")
        kind = target.stat().st_mode
        refused(program, point, target, "BadTarget", what, code=1)
        assert target.stat().st_mode == kind
        assert not target.with_name("target.partial").exists()


@pytest.mark.parametrize("target", ["/dev/blockbak-nosuch", "/dev/mapper/nosuch", "/nosuch/place/disk.img"])
def test_a_slip_of_the_pen_makes_no_file(program, point, target):
    assert not Path(target).exists()
    refused(program, point, target, "BadTarget", target, code=1)
    assert not Path(target).exists()
    assert not Path(f"{target}.partial").exists()


def test_a_link_that_leads_nowhere_makes_no_device_node(program, point, tmp_path):
    place = Path("/dev/blockbak-nosuch")
    (tmp_path / "disk").symlink_to(place)
    try:
        refused(program, point, tmp_path / "disk", "BadTarget", "such device", code=1)
        assert not place.exists()
    finally:
        place.unlink(missing_ok=True)


def test_a_device_carries_what_lies_on_it_where_no_mount_is_to_be_seen(loop, ext4, tmp_path):
    """As in a chroot into a directory that is none."""

    class Chrooted(System):
        mounts = ()

    device = loop(16 * MIB)
    where = ext4(device).where
    for path in (where, where / "not" / "yet"):
        assert usage.carries(look(device.path), str(path), Chrooted())
    assert not usage.carries(look(device.path), str(tmp_path / "elsewhere"), Chrooted())
