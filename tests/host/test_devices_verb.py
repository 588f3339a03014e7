"""``blockbak devices`` on devices in every state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.host.stage import MIB, attached, locking, mounted, partitioned, run, swapping


def listed(program):
    return {one["path"]: one for one in program("devices").document}


def test_devices_are_listed_with_size_identity_use_and_mode(loop, program, tmp_path):
    free, used, swap, locked, below, disk = (loop(16 * MIB) for _ in range(6))
    small = loop(8 * MIB, sector_size=4096, read_only=True, file=make(tmp_path / "small.img"))
    run("mkfs.ext4", "-q", used)
    with (
        mounted(used, tmp_path / "there"),
        swapping(swap),
        locking("flock", locked) as pid,
        attached(below) as upper,
        partitioned(disk, "size=4M", "size=8M") as (first, second),
    ):
        found = listed(program)
        uuid = run("blkid", "-p", "-o", "value", "-s", "PART_ENTRY_UUID", second).strip()
    one = found[free.path]
    assert (one["size"], one["kind"], one["logical_sector"], one["read_only"]) == (16 * MIB, "loop", 512, False)
    assert one["identity"] == {"kind": "file", "value": str(free.file)}
    assert (one["uses"], one["mode"], one["reason"]) == ([], "cold", "not in use")
    assert one["label"] == free.path
    assert (found[small.path]["logical_sector"], found[small.path]["read_only"]) == (4096, True)
    for device, reason in (
        (used.path, f"mounted at {tmp_path}/there"),
        (swap.path, "swap"),
        (locked.path, f"locked by process {pid}"),
        (below.path, f"backing device of {upper}"),
    ):
        one = found[device]
        assert one["mode"] == "refused"
        assert len(one["uses"]) == 1
        assert reason in one["uses"][0]
        assert reason in one["reason"]
    assert found[used.path]["mounts"][0]["fstype"] == "ext4"
    # A device on a device is that device.
    assert found[upper]["identity"] == found[below.path]["identity"]
    assert (found[first]["size"], found[second]["size"], found[second]["kind"]) == (4 * MIB, 8 * MIB, "partition")
    assert found[second]["identity"] == {"kind": "partuuid", "value": f"{uuid} on file {disk.file}"}
    assert found[disk.path]["uses"] == []
    # All of them can be asked for, and what is listed as free is.
    assert {one["mode"] for one in found.values()} == {"cold", "refused"}


def make(file):
    file.write_bytes(bytes(8 * MIB))
    return file


def test_a_device_in_use_by_its_partition_says_so(loop, program, tmp_path):
    disk = loop(64 * MIB)
    with partitioned(disk, "size=16M", "size=16M") as (first, second):
        run("mkfs.ext4", "-q", second)
        with mounted(second, tmp_path / "there"):
            found = listed(program)
            assert found[disk.path]["uses"] == [f"mounted at {tmp_path}/there ({Path(second).name})"]
            assert (found[disk.path]["mode"], found[second]["mode"], found[first]["mode"]) == (
                "refused", "refused", "cold",
            )  # fmt: skip


def test_the_mode_that_is_listed_is_the_one_that_is_taken(loop, program, tmp_path):
    disk = loop(16 * MIB)
    for _ in range(2):
        mode = listed(program)[disk.path]["mode"]
        done = program("backup", disk, "--dry-run", expect=0 if mode == "cold" else 5).document
        assert (mode == "cold") is bool(done["points"])
    run("mkfs.ext4", "-q", disk)
    with mounted(disk, tmp_path / "there"):
        assert listed(program)[disk.path]["mode"] == "refused"
        program("backup", disk, "--dry-run", expect=5)


def test_the_table_for_people_names_every_device(loop, tmp_path):
    disk = loop(16 * MIB)
    words = [sys.executable, "-m", "blockbak", "devices"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    (row,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [disk.path]]
    assert "16" in row
    assert "cold" in row
    assert "file" in row
    assert done.stderr == ""


def test_two_devices_that_cannot_be_told_apart_are_refused(loop, program):
    one, lone = loop(8 * MIB), loop(8 * MIB)
    two = loop(8 * MIB, file=one.file)
    found = listed(program)
    for device, twin in ((one, two), (two, one)):
        assert found[device.path]["mode"] == "refused"
        assert found[device.path]["reason"] == f"{twin.path} carries the same identity; detach one of them"
    assert found[lone.path]["mode"] == "cold"
