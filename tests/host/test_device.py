"""Devices as they are on this machine: loop devices, partitions, file systems, mounts, locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import NoSuchSource, NotABlockSource
from blockbak.host import device, usage
from blockbak.host.system import System, without_deleted
from tests.host.stage import LOCKERS, MIB, locking, md_superblock, mounted, partitioned, put, pv_label, run, settle


def details(path):
    return [str(use) for use in usage.users(device.look(str(path)))]


def named(path):
    return device.identity(device.look(str(path)))


# --- what a path names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_loop_device_is_as_it_was_made(loop, sector_size):
    made = loop(8 * MIB, sector_size=sector_size)
    seen = device.look(made.path)
    assert (seen.path, seen.is_block, seen.kind, seen.size) == (made.path, True, "loop", 8 * MIB)
    assert (seen.logical_sector, seen.read_only, seen.backing_file) == (sector_size, False, str(made.file))
    assert seen.physical_sector >= sector_size
    assert os.makedev(seen.major, seen.minor) == Path(made.path).stat().st_rdev
    assert seen.diskseq > 0
    assert (seen.mounts, seen.holders, seen.disk_id) == ((), (), "")


def test_a_size_of_odd_sectors_and_a_read_only_device(loop):
    seen = device.look(loop(MIB + 512, read_only=True).path)
    assert (seen.size, seen.read_only) == (MIB + 512, True)


def test_links_lead_to_the_device(loop, tmp_path):
    made = loop(MIB)
    (tmp_path / "first").symlink_to(made.path)
    (tmp_path / "second").symlink_to("first")
    seen = device.look(str(tmp_path / "second"))
    assert (seen.path, seen.given) == (made.path, str(tmp_path / "second"))


def test_another_node_of_a_device_is_that_device(loop, tmp_path):
    made = loop(MIB)
    os.mknod(tmp_path / "node", 0o600 | 0o060000, Path(made.path).stat().st_rdev)
    assert device.look(str(tmp_path / "node")).path == made.path


def test_a_file_is_an_image(tmp_path, monkeypatch):
    file = tmp_path / "disk.img"
    file.write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    seen = device.look("link")
    assert (seen.path, seen.kind, seen.size, seen.is_block, seen.kname) == (
        str(file),
        "file",
        1000,
        False,
        "",
    )
    assert str(device.identity(seen)) == f"file {file}"


def test_what_is_no_source_says_so(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path, what in (
            (tmp_path, "a directory"),
            ("/dev/null", "a character device"),
            (tmp_path / "pipe", "a named pipe"),
            (tmp_path / "socket", "a socket"),
        ):
            with pytest.raises(NotABlockSource, match=what):
                device.look(str(path))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/dev/nothing",
        "vg/lv",
        "/dev/vg/lv",
        "/dev/mapper/x",
        "no\0name",
        "/" + "x" * 5000,
        "/etc/passwd/x",
    ],
)
def test_what_is_not_there_says_so(path):
    with pytest.raises(NoSuchSource):
        device.look(path)


def test_a_link_to_itself_leads_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NoSuchSource):
        device.look(str(tmp_path / "loop"))


def test_the_list_has_loops_with_files_and_none_without(loop):
    made = loop(MIB)
    listed = {one.path: one for one in device.devices()}
    assert listed[made.path].backing_file == str(made.file)
    assert all(one.size > 0 for one in listed.values())
    assert all(one.backing_file for one in listed.values() if one.kind == "loop")
    assert not [path for path in listed if path.startswith(("/dev/ram", "/dev/zram"))]


# --- partitions and their tables ------------------------------------------------------------------------


@pytest.mark.parametrize(("sector_size", "label"), [(512, "gpt"), (4096, "gpt"), (512, "dos"), (4096, "dos")])
def test_partitions_are_found_in_the_kernel_and_in_the_table(loop, sector_size, label):
    disk = loop(64 * MIB, sector_size=sector_size)
    with partitioned(disk, "size=8M", "size=16M", label=label) as (first, second):
        seen = device.look(second)
        assert (seen.kind, seen.partition_number, seen.size) == ("partition", 2, 16 * MIB)
        assert seen.logical_sector == sector_size
        whole = device.look(disk.path)
        table = device.table(whole)
        assert [(one.number, one.start) for one in table.partitions] == [
            (1, device.look(first).start),
            (2, seen.start),
        ]
        assert table.partitions[1].uuid == seen.partuuid != ""
        told = run("blkid", "-p", "-o", "value", "-s", "PTUUID", disk).strip()
        assert whole.disk_id == table.disk_id == told
        assert run("blkid", "-p", "-o", "value", "-s", "PART_ENTRY_UUID", second).strip() == seen.partuuid
        assert named(second).value == f"{seen.partuuid} on file {disk.file}"
        assert not named(second).same_as(named(first))
        # The file behind it holds the same table, whatever its sectors.
        assert device.table(device.look(str(disk.file))).disk_id == table.disk_id
        assert first in [one.path for one in device.devices()]


def test_a_table_the_kernel_has_not_read_yet_names_no_partition(loop):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=8M") as (first,):
        run(
            "sfdisk",
            "--quiet",
            "--no-reread",
            "--no-tell-kernel",
            disk,
            stdin="label: gpt\nstart=4M, size=8M\n",
        )
        assert device.look(first).partuuid == ""


def test_a_gpt_of_4096_byte_sectors_is_read_from_a_plain_file(loop):
    disk = loop(64 * MIB, sector_size=4096)
    run("sgdisk", "--new=1:256:+8M", disk)
    assert device.look(str(disk.file)).disk_id == device.look(disk.path).disk_id != ""


# --- identity -------------------------------------------------------------------------------------------


def test_a_loop_device_is_the_file_behind_it(loop):
    disk = loop(16 * MIB)
    assert named(disk.path) == named(disk.file)
    run("sgdisk", "--new=1:2048:0", disk)
    # A table it got since changes nothing.
    assert named(disk.path) == named(disk.file)


def test_a_loop_device_on_a_part_of_a_file_is_another_volume(loop, tmp_path):
    disk = loop(16 * MIB)
    part = run("losetup", "--find", "--show", "--offset", MIB, "--sizelimit", 4 * MIB, disk.file).strip()
    try:
        assert device.look(part).size == 4 * MIB
        assert not named(part).same_as(named(disk.path))
        assert device.find_twin(device.look(part)) is None
    finally:
        run("losetup", "--detach", part)


def test_a_loop_device_on_a_device_is_that_device(loop):
    disk = loop(16 * MIB)
    upper = run("losetup", "--find", "--show", disk).strip()
    try:
        assert named(upper).same_as(named(disk.path))
        assert device.find_twin(device.look(upper)) is None
        assert device.find_twin(device.look(disk.path)) is None
        assert details(disk.path) == [f"backing device of {upper}"]
        assert details(disk.file) == [f"backing file of {disk.path}"]
        assert usage.carries(device.look(disk.path), upper)
    finally:
        run("losetup", "--detach", upper)


def test_a_file_that_cannot_even_be_asked_for_names_nothing_any_more(monkeypatch):
    """On a FUSE or NFS that is dead: one loop device over it must not keep all others from being backed up."""

    def dead(path, **_):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected", str(path))

    monkeypatch.setattr(os, "stat", dead)
    assert without_deleted("/gone/nbd (deleted)") is None


def test_a_deleted_file_names_nothing_any_more(loop):
    disk = loop(16 * MIB)
    run("sgdisk", "--new=1:2048:0", disk)
    disk.file.rename(disk.file.with_suffix(".kept"))
    assert named(disk.path).value == str(disk.file.with_suffix(".kept"))
    disk.file.with_suffix(".kept").unlink()
    assert named(disk.path).kind == "gpt"
    run("sgdisk", "--zap-all", disk)
    seen = named(disk.path)
    assert (seen.kind, seen.value) == ("path", disk.path)
    assert seen.diskseq > 0
    assert seen.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_a_node_used_again_is_another_disk(loop):
    disk = loop(MIB)
    disk.file.unlink()
    before = device.look(disk.path)
    identity = device.identity(before)
    other = disk.file.with_suffix(".other")
    other.write_bytes(bytes(MIB))
    run("losetup", "--detach", disk)
    assert settle(lambda: not device.look(disk.path).backing_file)
    run("losetup", disk, other)
    other.unlink()
    assert device.look(disk.path).diskseq > before.diskseq
    assert not named(disk.path).same_as(identity)


def test_two_loop_devices_on_one_file_are_twins(loop):
    first = loop(MIB)
    second = loop(MIB, file=first.file)
    assert device.find_twin(device.look(first.path)).path == second.path
    assert device.find_twin(device.look(str(first.file))) is None
    assert device.find_twin(device.look(loop(MIB).path)) is None


def test_copies_of_a_disk_are_twins_only_where_nothing_else_tells_them_apart(loop):
    first = loop(16 * MIB)
    run("sgdisk", "--new=1:2048:0", first)
    copy = first.file.with_suffix(".copy")
    copy.write_bytes(first.file.read_bytes())
    second = loop(16 * MIB, file=copy)
    assert device.find_twin(device.look(first.path)) is None
    first.file.unlink()
    copy.unlink()
    assert device.find_twin(device.look(first.path)).path == second.path


# --- who uses it ------------------------------------------------------------------------------------------


def test_an_idle_device_is_free(loop):
    disk = loop(MIB)
    assert details(disk.path) == []
    found = device.look(disk.path)
    assert usage.decide_mode(found, usage.users(found)) == ("cold", "not in use")


@pytest.mark.parametrize(("kind", "size"), [("ext4", 16), ("xfs", 320), ("btrfs", 128)])
def test_a_mounted_device_is_in_use_until_it_is_not(loop, request, kind, size):
    disk = loop(size * MIB)
    made = request.getfixturevalue(kind)(disk)
    seen = device.look(disk.path)
    assert [(one.target, one.fstype) for one in seen.mounts] == [(str(made.where), kind)]
    assert details(disk.path) == [f"mounted at {made.where}"]
    assert f"mounted at {made.where} ({seen.kname})" in details(disk.file)
    mode, reason = usage.decide_mode(seen, usage.users(seen))
    assert (mode, "--mode live" in reason, str(made.where) in reason) == ("refused", True, True)
    assert usage.carries(seen, str(made.where))
    made.unmount()
    assert settle(lambda: details(disk.path) == [])
    assert not usage.carries(seen, str(made.where))


def test_a_lazy_unmount_that_is_not_over_is_in_use(loop, ext4):
    disk = loop(16 * MIB)
    made = ext4(disk)
    with (made.where / "open").open("w"):
        run("umount", "--lazy", made.where)
        assert details(disk.path) == ["mounted in another namespace or not yet let go (ext4)"]
    assert settle(lambda: details(disk.path) == [])


def test_a_mount_in_another_namespace_is_in_use(loop, tmp_path):
    disk = loop(16 * MIB)
    run("mkfs.ext4", "-q", disk)
    (tmp_path / "there").mkdir()
    script = f"mount {disk} {tmp_path}/there && echo ready && read wait"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        assert details(disk.path) == ["mounted in another namespace or not yet let go (ext4)"]
        other.communicate("\n")
    assert settle(lambda: details(disk.path) == [])


def test_every_place_of_a_file_system_is_named(loop, ext4, tmp_path):
    disk = loop(16 * MIB)
    made = ext4(disk)
    (made.where / "inner").mkdir()
    with mounted(made.where / "inner", tmp_path / "with space", "--bind"):
        assert details(disk.path) == [f"mounted at {made.where}", f"mounted at {tmp_path}/with space"]
        assert usage.carries(device.look(disk.path), f"{tmp_path}/with space")


def test_a_btrfs_on_two_devices_uses_both(loop, tmp_path):
    first, second = loop(128 * MIB), loop(128 * MIB)
    run("mkfs.btrfs", "-q", "-f", first, second)
    run("btrfs", "device", "scan", first, second)
    try:
        with mounted(first, tmp_path / "both") as where:
            run("btrfs", "subvolume", "create", where / "sub")
            (where / "sub/repo").mkdir()
            for disk in (first, second):
                seen = device.look(disk.path)
                assert [one.target for one in seen.mounts] == [str(where)]
                assert details(disk.path) == [f"mounted at {where}"]
                # A subvolume has a device number of its own, which no device has.
                assert usage.carries(seen, f"{where}/sub/repo/new")
    finally:
        run("btrfs", "device", "scan", "--forget", first)
        run("btrfs", "device", "scan", "--forget", second)


def test_swap_is_in_use_on_devices_and_in_files(loop, tmp_path):
    disk = loop(16 * MIB)
    run("mkswap", disk)
    run("swapon", disk)
    try:
        assert details(disk.path) == ["swap"]
        assert usage.holds_running_system(device.look(disk.path)) == "swap"
    finally:
        run("swapoff", disk)
    assert settle(lambda: details(disk.path) == [])
    assert usage.holds_running_system(device.look(disk.path)) is None


def test_a_disk_is_used_by_its_partitions_and_they_by_it(loop, tmp_path):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=16M", "size=16M") as (first, second):
        run("mkfs.ext4", "-q", second)
        with mounted(second, tmp_path / "second") as where:
            name = Path(second).name
            assert details(disk.path) == [f"mounted at {where} ({name})"]
            assert details(second) == [f"mounted at {where}"]
            assert details(first) == []
            assert usage.carries(device.look(disk.path), str(where))
            assert usage.carries(device.look(second), str(where))
            assert not usage.carries(device.look(first), str(where))
        # A file system on the whole disk, as on a stick made from an image, uses each partition.
        upper = run("losetup", "--find", "--show", disk).strip()
        try:
            assert details(first) == [f"backing device of {upper} ({disk.path.removeprefix('/dev/')})"]
        finally:
            run("losetup", "--detach", upper)
        assert settle(lambda: details(first) == [])


def test_a_file_on_a_file_system_on_a_loop_device_on_a_file(loop, ext4, tmp_path):
    """The whole tower: each layer is carried by all below it, and by nothing else."""
    outer = loop(64 * MIB)
    lower = ext4(outer)
    inner_file = lower.where / "inner.img"
    inner_file.write_bytes(bytes(16 * MIB))
    bystander = loop(MIB)
    with contextlib.ExitStack() as undo:
        inner = run("losetup", "--find", "--show", inner_file).strip()
        undo.callback(run, "losetup", "--detach", inner)
        run("mkfs.ext4", "-q", inner)
        where = undo.enter_context(mounted(inner, tmp_path / "inner"))
        for below in (inner, inner_file, outer.path, outer.file):
            assert usage.carries(device.look(str(below)), str(where))
            assert usage.carries(device.look(str(below)), f"{where}/not/there/yet")
        for beside in (bystander.path, bystander.file):
            assert not usage.carries(device.look(str(beside)), str(where))
        assert not usage.carries(device.look(inner), str(lower.where))
        assert usage.carries(device.look(outer.path), str(inner_file))
        assert details(inner_file) == [f"backing file of {inner}", f"mounted at {where} ({Path(inner).name})"]
        root = System().mount_of("/")
        for disk in System().devices_of(root):
            assert usage.carries(device.block(disk, System()), str(where))
            assert usage.holds_running_system(device.block(disk, System())) == "/"


def test_what_a_loop_device_shows_of_a_deleted_file_is_known(loop, tmp_path):
    disk = loop(MIB)
    os.link(disk.file, tmp_path / "other-name")
    disk.file.unlink()
    assert details(tmp_path / "other-name") == [f"backing file of {disk.path}"]


@pytest.mark.parametrize("fstype", ["tmpfs", "overlay"])
def test_a_directory_without_a_device_is_carried_by_none(loop, tmp_path, as_root, fstype):
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    disk = device.look(loop(MIB).path)
    with mounted(fstype, tmp_path / "there", "-t", fstype, *(["-o", options] if fstype == "overlay" else [])) as where:
        assert not usage.carries(disk, str(where))
        # An overlay lies where its layers do.
        bases = System().devices_of(System().mount_of(str(tmp_path)))
        for base in bases:
            assert usage.carries(device.block(base, System()), str(where)) is (fstype == "overlay")


# --- locks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOCKERS)
def test_locks_of_others_on_a_file_are_named(tmp_path, how):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(MIB))
    with locking(how, file) as pid:
        (told,) = details(file)
        assert told.startswith(f"locked by process {pid} (python")
        seen = device.look(str(file))
        assert usage.decide_mode(seen, usage.users(seen))[0] == "refused"
    assert details(file) == []


@pytest.mark.parametrize("how", LOCKERS)
def test_locks_of_others_on_a_device_are_named(loop, how):
    disk = loop(MIB)
    with locking(how, disk.path) as pid:
        (told,) = details(disk.path)
        assert told.startswith(f"locked by process {pid} (python")


def test_locks_on_btrfs_are_found_though_its_device_number_differs(loop, btrfs):
    made = btrfs(loop(128 * MIB))
    run("btrfs", "subvolume", "create", made.where / "sub")
    file = made.where / "sub/disk.img"
    file.write_bytes(bytes(4096))
    with locking("flock", file) as pid:
        assert details(file)[0].startswith(f"locked by process {pid}")


def test_our_own_locks_are_no_hindrance(tmp_path):
    file = tmp_path / "disk.img"
    file.write_bytes(b"x")
    with file.open("r+b") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        assert details(file) == []


# --- members ----------------------------------------------------------------------------------------------


def test_a_member_of_a_group_is_known_without_lvm(loop):
    disk = loop(16 * MIB)
    assert usage.memberships(device.look(disk.path)) == []
    Path(disk.path).write_bytes(pv_label("vg-data"))
    assert [str(use) for use in usage.memberships(device.look(disk.path))] == ["part of volume group vg-data"]
    assert usage.memberships(device.look(str(disk.file))) == []
    # In a logical volume it is a guest's: no refusal for every virtual machine's disk.
    assert usage.memberships(replace(device.look(disk.path), lv_uuid="some")) == []
    assert details(disk.path) == []


def test_members_in_partitions_are_known_whether_or_not_the_kernel_shows_them(loop):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=8M", "size=16M") as (first, second):
        put(second, 0, pv_label("vg"))
        name = Path(second).name
        assert [str(use) for use in usage.memberships(device.look(disk.path))] == [f"part of volume group vg ({name})"]
        assert [str(use) for use in usage.memberships(device.look(second))] == ["part of volume group vg"]
        assert usage.memberships(device.look(first)) == []
    assert [str(use) for use in usage.memberships(device.look(disk.path))] == ["part of volume group vg (partition 2)"]


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_a_member_of_an_array_is_known_without_md(loop, version):
    disk = loop(16 * MIB)
    size = 16 * MIB
    place = {"1.0": size - 16 * 512, "1.1": 0, "1.2": 4096}[version]
    with Path(disk.path).open("r+b") as file:
        file.seek(place)
        file.write(md_superblock("md7", place))
    assert [str(use) for use in usage.memberships(device.look(disk.path))] == ["part of array md7"]


# --- did it change ----------------------------------------------------------------------------------------


def write_at(path, offset):
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, b"x" * 4096, offset)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def test_reading_counts_nothing_and_writing_counts(loop):
    disk = loop(16 * MIB)
    seen = device.look(disk.path)
    before = usage.write_counters(seen)
    assert Path(disk.path).read_bytes() == bytes(16 * MIB)
    assert usage.write_counters(seen) == before
    write_at(disk.path, MIB)
    assert usage.write_counters(seen) != before


def test_a_discard_counts_as_a_write(loop):
    disk = loop(16 * MIB)
    seen = device.look(disk.path)
    before = usage.write_counters(seen)
    run("blkdiscard", "--offset", MIB, "--length", MIB, disk)
    assert usage.write_counters(seen) != before


def test_a_write_to_a_partition_counts_on_its_disk(loop):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=8M", "size=8M") as (first, second):
        whole, other = device.look(disk.path), device.look(first)
        before, beside = usage.write_counters(whole), usage.write_counters(other)
        write_at(second, 0)
        assert usage.write_counters(whole) != before
        assert usage.write_counters(other) == beside


def test_files_have_stamps_instead_of_counters(tmp_path):
    file = tmp_path / "disk.img"
    file.write_bytes(b"x" * 4096)
    assert usage.write_counters(device.look(str(file))) is None
    before = usage.file_stamp(str(file))
    assert usage.file_stamp(str(file)) == before
    time.sleep(0.02)
    write_at(file, 0)
    assert usage.file_stamp(str(file)) != before
    assert usage.file_stamp(str(file))[0] == 4096


# --- start-up ---------------------------------------------------------------------------------------------


def test_heavy_libraries_are_left_for_when_they_are_needed():
    code = "import sys; import blockbak.host.device, blockbak.host.usage; print([n for n in ('pyudev', 'psutil', 'numpy') if n in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_listing_and_looking_take_no_time(loop):
    disk = loop(MIB)
    started = time.perf_counter()
    for one in device.devices():
        device.identity(one)
        usage.users(one)
    device.look(disk.path)
    assert time.perf_counter() - started < 2
