"""The stage in the initramfs: what it images, what it leaves, and every way in which it images nothing."""

from __future__ import annotations

import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from blockbak.host.device import look
from blockbak.image.spool import PIECE_BYTES
from blockbak.model.nextboot import Fact
from blockbak.units import KIB, MIB
from tests.doubles import context, new_repository
from tests.host.boots import SHELLS, Boot, mark
from tests.patterns import SECTOR, explain, stamp

SIZE = PIECE_BYTES + 5 * MIB + 3 * SECTOR
MARK = MIB
"""Where stamps begin on the disk, behind what it is known by."""
STAMPS = 2 * MIB // SECTOR


def stamped(path, seed, at):
    with open(path, "r+b", buffering=0) as file:
        file.seek(at)
        file.write(stamp(at // SECTOR, STAMPS, 1, seed))


@pytest.fixture
def disk(loop, tmp_path, seed):
    """A disk known by a partition table's id, with stamps at its start and over the edge of two pieces."""
    file = tmp_path / "disk.img"
    with file.open("xb") as made:
        made.truncate(SIZE)
    with file.open("r+b") as made:
        # One partition, of which nothing is known but that it is all zeros at its start.
        entry = struct.pack(
            "<B3sB3sII", 0, b"\0\xff\xff", 0x83, b"\xff\xff\xff", 128 * MIB // SECTOR, 4 * MIB // SECTOR
        )
        made.seek(440)
        made.write(bytes.fromhex("d15cd15c0000") + entry)
        made.seek(510)
        made.write(b"\x55\xaa")
    stamped(file, seed, MARK)
    stamped(file, seed, PIECE_BYTES - MIB)
    return loop(SIZE, file=file)


@pytest.fixture
def make_boot(disk, loop, ext4, tmp_path):
    def make(store=None, **options):
        store = store or ext4(loop(300 * MIB))
        repository = new_repository(store.where / "repository")
        made = Boot(tmp_path, Path(disk.path), store, repository, context(tmp_path / "state"), **options)
        made.give()
        return made

    return make


@pytest.fixture
def boot(make_boot):
    return make_boot()


def as_restored(boot, report, tmp_path):
    """The bytes of a point."""
    target = tmp_path / "restored.img"
    image = Path(boot.repository.path, report.volume, report.file)
    with target.open("wb") as out:
        subprocess.run(["zstd", "-dcq", image], stdout=out, check=True)
    return target.read_bytes()


def nothing_was_read(boot):
    """Whether the attempt is still there, and nothing of an image."""
    return {path.name for path in boot.spool.iterdir()} == {"order.json", "id"}


# --- an image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_the_disk_is_imaged_and_becomes_a_point(make_boot, disk, tmp_path, seed, shell):
    boot = make_boot(shell=shell)
    said = boot.run()
    assert "is imaged before the system starts" in said[0]
    assert "was imaged in" in said[1]
    assert "50 % after" in boot.console
    assert boot.left_clean
    assert subprocess.run(["zstd", "-dcq", boot.spool / "image.zst"], capture_output=True, check=True).stdout == (
        disk.file.read_bytes()
    )
    told = boot.finish()
    assert told.left == []
    assert told.report.mode == "cold"
    assert told.report.device_bytes == SIZE
    assert abs(time.time() - boot_moment(told.report.point)) < 120
    restored = as_restored(boot, told.report, tmp_path)
    assert restored == disk.file.read_bytes()
    for at in (MARK, PIECE_BYTES - MIB):
        assert explain(restored[at : at + STAMPS * SECTOR], at // SECTOR, 1, seed) is None
    assert not boot.spool.exists()
    assert boot.finish().done == []


def boot_moment(point):
    return time.mktime(time.strptime(point[:16], "%Y%m%dT%H%M%SZ")) - time.timezone


def test_the_next_one_is_an_incremental(boot, disk, seed, tmp_path):
    boot.run()
    first = boot.finish().report
    boot.give()
    with open(disk, "r+b", buffering=0) as device:
        device.seek(64 * MIB)
        device.write(stamp(64 * MIB // SECTOR, 128, 2, seed))
    boot.run()
    second = boot.finish().report
    assert (first.kind, second.kind, second.parent) == ("full", "incremental", first.point)
    assert second.changed_bytes == 64 * KIB


@pytest.mark.parametrize("name", ["xfs", "btrfs"])
def test_the_repository_may_lie_on_other_file_systems(make_boot, loop, request, name):
    boot = make_boot(request.getfixturevalue(name)(loop(400 * MIB)))
    boot.run()
    assert boot.finish().report.device_bytes == SIZE


def test_a_subvolume_is_found_inside_its_btrfs(disk, loop, btrfs, tmp_path):
    store = btrfs(loop(300 * MIB))
    subprocess.run(["btrfs", "-q", "subvolume", "create", store.where / "inner"], check=True)
    boot = Boot(
        tmp_path, Path(disk.path), store, new_repository(store.where / "inner" / "repository"),
        context(tmp_path / "state"),
    )  # fmt: skip
    boot.give()
    boot.run()
    assert boot.finish().report is not None


@pytest.mark.parametrize("name", ["ext4", "xfs"])
def test_the_hook_brings_all_that_the_stage_calls(make_boot, loop, request, name):
    boot = make_boot(request.getfixturevalue(name)(loop(400 * MIB)), shell="busybox", hooked=True)
    assert "was imaged in" in boot.run()[-1]
    assert boot.finish().report.device_bytes == SIZE


# --- the attempt --------------------------------------------------------------------------------------------------


def test_the_attempt_is_used_up_before_the_first_read(make_boot):
    # It ends where the first byte of the image would be read.
    dead = '#!/bin/sh\ncase $* in *count=134217728*) kill -9 $PPID ;; esac\nexec /usr/bin/dd "$@"\n'
    boot = make_boot(programs={"dd": dead})
    boot.programs["timeout"] = (
        '#!/bin/sh\nsync_seen=$(ls -l /run/initramfs/blockbak/repository/repository/.next-boot)\necho "$sync_seen" >/run/initramfs/seen\nexit 9\n'
    )
    boot.run()
    assert "attempted" in (boot.base / "initramfs/run/initramfs/seen").read_text()
    boot.programs.clear()
    assert boot.run() == ["no image is made: the one attempt was made already"]


def test_an_attempt_without_an_end_is_told_and_cleared_away(boot):
    (boot.spool / "attempted").write_text("1790000000\n")
    told = boot.finish()
    assert told.left == [f"No image of {boot.disk} was made at the boot: the attempt did not come to its end."]
    assert not boot.spool.exists()


def test_what_is_not_wanted_any_more_is_not_done(boot):
    (boot.spool / "id").write_text("another\n")
    assert boot.run() == ["no image is made: it is no longer wanted"]
    (boot.spool / "id").unlink()
    assert boot.run() == ["no image is made: it is no longer wanted"]


# --- what forbids it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "signature"),
    [(4096, b"S1SUSPEND"), (65536, b"S1SUSPEND"), (4096, b"S2SUSPEND"), (4096, b"LINHIB0001")],
)
def test_a_hibernated_system_is_left_alone(boot, loop, page, signature):
    swap = loop(2 * MIB)
    subprocess.run(["mkswap", "-q", "-p", str(page), swap], check=True, stderr=subprocess.DEVNULL)
    boot.nodes = (swap,)
    with open(swap, "r+b", buffering=0) as file:
        file.seek(page - 10)
        assert file.read(10) == b"SWAPSPACE2"
    with swap.file.open("r+b") as file:
        file.seek(page - 10)
        file.write(signature.ljust(10, b"\0"))
    subprocess.run(["blockdev", "--flushbufs", swap], check=True)
    assert boot.run() == [f"no image is made: a hibernated system is on {swap}"]
    assert nothing_was_read(boot)


def test_a_swap_that_is_only_a_swap_is_no_hindrance(boot, loop):
    swap = loop(2 * MIB)
    subprocess.run(["mkswap", "-q", swap], check=True)
    boot.nodes = (swap,)
    assert "was imaged in" in boot.run()[-1]


def test_a_repository_in_use_elsewhere_is_not_clean(boot):
    # Mounted all the while, as a file system is that was never unmounted.
    assert boot.run(unmount=False) == [
        f"no image is made: the repository's file system on {boot.store.device} is not clean"
    ]
    assert nothing_was_read(boot)


def test_an_ext4_with_errors_is_not_clean(boot):
    place = boot.place()
    boot.place = lambda: place
    boot.store.unmount()
    subprocess.run(["debugfs", "-w", "-R", "ssv state 3", boot.store.device], check=True, capture_output=True)
    said = boot.run()
    assert said == [f"no image is made: the repository's file system on {boot.store.device} is not clean"]


def test_an_xfs_with_a_log_to_replay_is_not_clean(make_boot, loop, xfs):
    boot = make_boot(xfs(loop(400 * MIB)))
    (boot.store.where / "more").write_text("logged")
    assert boot.run(unmount=False) == [
        f"no image is made: the repository's file system on {boot.store.device} is not clean"
    ]


def test_another_disk_under_the_name_is_not_imaged(make_boot, disk):
    fact = Fact("content", "440", "00000000")
    boot = make_boot(marks=mark(look(disk.path), fact))
    assert boot.run() == ["no image is made: the disk that was to be imaged is not there, or another one"]
    assert nothing_was_read(boot)


@pytest.mark.parametrize("change", [{"disk_bytes": SIZE + SECTOR}, {"sector": 4096}])
def test_a_disk_of_another_size_is_not_imaged(make_boot, disk, change):
    marks = mark(look(disk.path))
    other = type(marks)(**{name: getattr(marks, name) for name in marks.__struct_fields__} | change)
    assert "is not there, or another one" in make_boot(marks=other).run()[0]


def test_of_two_disks_that_cannot_be_told_apart_none_is_imaged(boot, disk, loop, tmp_path):
    twin = tmp_path / "twin.img"
    twin.write_bytes(disk.file.read_bytes())
    boot.nodes = (loop(SIZE, file=twin),)
    assert "is not there, or another one" in boot.run()[0]


def test_a_disk_is_known_by_what_the_kernel_says_of_it(make_boot, disk):
    raw = f"{disk.file}\n".encode().hex()
    facts = (Fact("text", "loop/backing_file", str(disk.file)), Fact("raw", "loop/backing_file", raw))
    boot = make_boot(marks=mark(look(disk.path), *facts))
    assert "was imaged in" in boot.run()[-1]


def test_without_the_repository_nothing_is_done(boot):
    place = boot.place()
    boot.place = lambda: type(place)(place.fstype, "11111111-2222-3333-4444-555555555555", "", place.path, place.node)
    assert boot.run() == ["no image is made: the repository's disk is not there"]


# --- what ends it -------------------------------------------------------------------------------------------------


def test_the_time_limit(make_boot):
    # Each read of a piece takes longer than there is.
    slow = '#!/bin/sh\ncase $* in *bs=4M*) sleep 5 ;; esac\nexec /usr/bin/dd "$@"\n'
    boot = make_boot(limit=2, programs={"dd": slow})
    begin = time.monotonic()
    said = boot.run()
    assert time.monotonic() - begin < 30
    assert said[-1] == f"no image was made: the time limit of 2 s was reached at byte 0 of {SIZE}"
    assert not (boot.spool / "image.zst").exists()
    told = boot.finish()
    assert told.left == [
        f"No image of {boot.disk} was made at the boot: the time limit of 2 s was reached at byte 0 of {SIZE}."
    ]
    assert not boot.spool.exists()


def test_no_room(make_boot, loop, ext4, disk):
    # Room for one piece that is incompressible, not for two.
    boot = make_boot(ext4(loop(230 * MIB)))
    with open(disk, "r+b", buffering=0) as device:
        device.seek(4 * MIB)
        device.writelines(os.urandom(MIB) for _ in range(60))
    said = boot.run()
    assert (
        said[-1]
        == f"no image was made: no room is left on the repository's file system at byte {PIECE_BYTES} of {SIZE}"
    )
    assert boot.left_clean
    assert "no room is left" in boot.finish().left[0]
    assert not boot.spool.exists()


def test_sectors_that_cannot_be_read_are_named(make_boot, disk, tmp_path):
    bad = 5 * MIB + 7 * SECTOR
    # Whatever touches that sector fails.
    sick = f"""#!/bin/bash
for word; do case $word in skip=*) skip=${{word#*=}};; count=*) count=${{word#*=}};; if=*) file=${{word#*=}};; esac; done
if [ "$file" = {disk} ] && [ $skip -le {bad} ] && [ {bad} -lt $((skip + count)) ]; then
    /usr/bin/dd if="$file" bs=512 iflag=skip_bytes,count_bytes skip=$skip count=$(({bad} - skip)) status=none
    exit 1
fi
exec /usr/bin/dd "$@"
"""
    boot = make_boot(programs={"dd": sick})
    assert "was imaged in" in boot.run()[-1]
    assert (boot.spool / "bad").read_text() == f"{bad} {SECTOR}\n"
    told = boot.finish()
    assert told.report.bad_bytes == SECTOR
    assert told.report.attention
    expected = bytearray(disk.file.read_bytes())
    expected[bad : bad + SECTOR] = bytes(SECTOR)
    assert as_restored(boot, told.report, tmp_path) == bytes(expected)


def test_a_damaged_spool_is_no_point(boot):
    boot.run()
    image = boot.spool / "image.zst"
    data = bytearray(image.read_bytes())
    data[len(data) // 2] ^= 1
    image.write_bytes(data)
    told = boot.finish()
    assert told.report is None
    assert ".next-boot/image.zst is damaged" in told.left[0]
    # It stays until somebody has looked at it.
    assert image.exists()


def test_a_spool_cut_short_is_no_point(boot):
    boot.run()
    image = boot.spool / "image.zst"
    image.write_bytes(image.read_bytes()[:-1])
    assert "instead of" in boot.finish().left[0]


def test_before_the_boot_nothing_is_made_of_it(boot):
    from blockbak.host.system import System
    from tests.host.boots import replace_order

    order = replace_order(boot.order, boot=System().boot)
    (boot.spool / "id").unlink()
    from blockbak.flow import nextboot

    nextboot._write_order(boot.repository, str(boot.spool), order)
    told = boot.finish()
    assert (told.done, told.left) == ([], [])
    assert boot.spool.exists()
