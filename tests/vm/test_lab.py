"""The machine the other tests of this level run in has what they need, and what is tested is what was installed."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.patterns import SECTOR, explain, stamp
from tests.vm.conftest import MIB, clear, lvs, of_blockbak, run, things
from tests.volumes import difference, fingerprint

TARGETS = ("crypt", "era", "flakey", "log-writes", "snapshot", "thin-pool")
PROGRAMS = (
    "btrfs", "cryptsetup", "ddrescue", "dmsetup", "lvcreate", "mariadbd", "mkfs.btrfs", "mkfs.ext4", "mkfs.vfat",
    "mkfs.xfs", "partclone.ext4", "sfdisk", "sgdisk", "strace", "systemctl", "thin_delta", "thin_dump", "zstd",
    "/usr/lib/postgresql/15/bin/initdb", "/usr/lib/postgresql/15/bin/pgbench",
)  # fmt: skip


def write(path, sequence, seed, start=0, length=MIB):
    """Stamp some of a device, past the page cache's mercy."""
    with open(path, "r+b", buffering=0) as device:
        device.seek(start)
        device.write(stamp(start // SECTOR, length // SECTOR, sequence, seed))
    run("sync", path)


def read(path, length=MIB):
    """The first bytes of a device, as the device has them."""
    run("blockdev", "--flushbufs", path)
    with open(path, "rb") as device:
        return device.read(length)


# --- the machine ----------------------------------------------------------------------------------------


def test_what_is_tested_is_what_was_installed():
    import blockbak

    assert Path(blockbak.__file__).is_relative_to(sys.prefix)
    assert Path(shutil.which("blockbak")).resolve() == Path(sys.prefix, "bin", "blockbak")


def test_the_kernel_has_the_modules():
    run("modprobe", "--all", "btrfs", "vfat", "xfs", *(f"dm-{target}" for target in TARGETS))
    assert set(TARGETS) <= {line.split()[0] for line in run("dmsetup", "targets").splitlines()}
    # It makes a disk, which no other test is to find.
    run("modprobe", "scsi_debug")
    run("modprobe", "--remove", "scsi_debug")


def test_the_programs_are_there():
    assert [name for name in PROGRAMS if not shutil.which(name)] == []


def test_no_database_runs_by_itself():
    for service in ("postgresql", "mariadb"):
        assert run("systemctl", "is-active", service, expect=3) == "inactive"


def test_udev_runs_and_names_volumes(group):
    run("udevadm", "control", "--ping")
    path = group.volume("named", 16 * MIB)
    # lvcreate waits for udev's rules, so the link is there when it comes back.
    assert Path(path).is_symlink()
    told = run("udevadm", "info", "--query=property", path).splitlines()
    assert {f"DM_VG_NAME={group.name}", "DM_LV_NAME=named"} <= set(told)


def test_snapshots_keep_what_was(group, seed):
    data = group.volume("data", 64 * MIB)
    assert run("blockdev", "--getss", data) == str(group.sector)
    write(data, 1, seed)
    snapshot = group.snapshot("data", "then", 16 * MIB, "-p", "r")
    write(data, 2, seed)
    assert explain(read(snapshot), 0, 1, seed) is None
    assert explain(read(data), 0, 2, seed) is None
    assert group.lvs()["then"]["lv_attr"].startswith("sri-a-s")


def test_thin_snapshots_keep_what_was(group, seed):
    data = group.thin(group.pool("pool", 128 * MIB), "data", 256 * MIB)
    write(data, 1, seed)
    snapshot = group.thin_snapshot("data", "then")
    write(data, 2, seed)
    assert explain(read(snapshot), 0, 1, seed) is None
    assert explain(read(data), 0, 2, seed) is None


# --- the check after each test ----------------------------------------------------------------------------


def test_what_blockbak_would_leave_is_seen_and_cleared_away(make_group):
    group = make_group()
    before = things()
    assert of_blockbak() == []
    group.volume("data", 16 * MIB)
    group.snapshot("data", "left", 16 * MIB, "--addtag", "blockbak")
    name = f"{group.name.replace('-', '--')}-data"
    run("dmsetup", "suspend", name)
    assert of_blockbak() == [f"logical volume {group.name}/left", f"suspended device {name}"]
    with pytest.raises(pytest.fail.Exception, match=f"volume {group.name}/left; suspended device {name}"):
        group.remove()
    assert things() == before
    assert of_blockbak() == []


def test_whatever_else_is_left_is_seen_and_cleared_away(tmp_path):
    before = things()
    where = tmp_path / "there"
    where.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", where)
    (tmp_path / "file").write_bytes(bytes(MIB))
    loop = run("losetup", "--find", "--show", tmp_path / "file").removeprefix("/dev/")
    run("dmsetup", "create", "stray", "--table", "0 8 zero")
    # Its parent ends at once, so it is nobody's child.
    run("sh", "-c", "sleep 600 >/dev/null 2>&1 &")
    left = things() - before
    (process,) = (name for kind, name in left if kind == "process")
    assert process.endswith(" sleep")
    wanted = {("mount", str(where)), ("loop device", loop), ("device-mapper device", "stray"), ("process", process)}
    assert left == wanted
    clear(left)
    deadline = time.monotonic() + 10
    while things() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert things() == before


# --- blockbak -------------------------------------------------------------------------------------------


def test_a_logical_volume_is_listed_by_its_names(group, run_blockbak):
    path = group.volume("my-data", 16 * MIB)
    (uuid,) = (one["lv_uuid"] for one in lvs(group.name) if one["lv_name"] == "my-data")
    (one,) = (one for one in run_blockbak.json("devices") if one["vg"] == group.name)
    assert (one["lv"], one["label"], one["size"]) == ("my-data", f"{group.name}/my-data", 16 * MIB)
    assert one["identity"]["kind"] == "lv-uuid"
    assert one["identity"]["value"].replace("-", "") == uuid.replace("-", "")
    assert one["logical_sector"] == group.sector
    assert (one["mode"], one["uses"]) == ("cold", [])
    assert Path(one["path"]).samefile(path)


def test_a_volume_that_is_not_mounted_goes_there_and_back(group, run_blockbak, repository, seed):
    data, target = group.volume("data", 16 * MIB), group.volume("target", 16 * MIB)
    # The first run is the command itself, as a person's shell finds it.
    held, points = [], []
    for sequence, (kind, do) in enumerate((("full", run_blockbak.command), ("incremental", run_blockbak)), start=1):
        write(data, sequence, seed, start=sequence * 4 * MIB, length=2 * MIB)
        held.append(fingerprint(data))
        (point,) = do("backup", f"{group.name}/data", "--json").document["points"]
        assert point["kind"] == kind
        points.append(point["point"])
    assert held[0] != held[1]
    for point, wanted in zip(points, held, strict=True):
        run_blockbak("restore", point, target, "--yes")
        assert difference(fingerprint(target), wanted) is None
