"""Points brought back into LVM: new volumes that are there whole or not at all, and volumes that are left alone."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
from pathlib import Path

from tests.patterns import SECTOR, stamp
from tests.vm.conftest import MIB, lvs, run
from tests.vm.hot import start

SIZE = 10 * MIB + 123
"""Of an image file: neither whole LVM extents nor whole sectors."""


def image(path: Path, seed: int, size: int = SIZE) -> Path:
    """A file of ``size`` bytes, every sector of which says what it is."""
    path.write_bytes(stamp(0, -(-size // SECTOR), 1, seed)[:size])
    return path


def content(path, length=-1) -> bytes:
    """What the device itself holds."""
    run("blockdev", "--flushbufs", path)
    with open(path, "rb") as device:
        return device.read(length)


def digest(data: bytes) -> str:
    """For comparing: a mebibyte that differs is nothing to be printed."""
    return hashlib.sha256(data).hexdigest()


def damage(repository: Path, volume: str) -> None:
    """Overwrite a few bytes in the middle of the volume's only image."""
    (file,) = (repository / volume).glob("*.zst")
    with open(file, "r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        damaged.write(b"damaged by the test")


def restoring() -> list[dict[str, str]]:
    """Volumes of restores that are not over."""
    return lvs("-S", "lv_tags=blockbak_restore")


def test_a_new_volume_holds_the_point_and_nothing_else(make_group, run_blockbak, repository, tmp_path):
    group = make_group(size=48 * MIB)
    # What lies in the group's free room is another's, and must not show.
    filled = group.volume("filled", 40 * MIB)
    with open(filled, "r+b") as device:
        device.write(b"\xee" * 40 * MIB)
    run("lvremove", "--quiet", "--yes", filled)
    source = image(tmp_path / "source.img", 1)
    run_blockbak("backup", source, "--name", "source")

    new = f"{group.name}/new-1.x"
    plan = run_blockbak("restore", "source@latest", "--create-lv", new, "--dry-run")
    assert f"{12 * MIB} bytes" in plan.text
    assert f"volume group {group.name}" in plan.text
    assert group.lvs() == {}

    done = run_blockbak.json("restore", "source@latest", "--create-lv", new)
    assert (done["plan"]["created_lv"], done["plan"]["target_bytes"]) == (new, 12 * MIB)
    assert done["written_bytes"] == SIZE
    (made,) = group.lvs().values()
    assert (made["lv_name"], made["lv_size"], made["lv_tags"]) == ("new-1.x", str(12 * MIB), "")
    held = content(group.path("new-1.x"))
    assert digest(held[:SIZE]) == digest(source.read_bytes())
    assert held[SIZE:].strip(b"\0") == b""

    again = run_blockbak.json("restore", "source@latest", "--create-lv", new, expect=5)["error"]
    assert again["name"] == "VolumeNameTaken"
    assert digest(content(group.path("new-1.x"))) == digest(held)
    group.volume("more", 28 * MIB)
    short = run_blockbak.json("restore", "source@latest", "--create-lv", f"{group.name}/short", expect=1)["error"]
    assert short["name"] == "NoVolumeRoom"
    assert (short["fields"]["free"], short["fields"]["needed"]) == (4 * MIB, 12 * MIB)
    assert set(group.lvs()) == {"new-1.x", "more"}


def test_a_partition_of_a_disk_becomes_a_volume_of_its_size(make_group, run_blockbak, repository, tmp_path):
    """It begins at sector 63 and has an odd number of them; the volume is whole LVM extents."""
    group = make_group(size=48 * MIB)
    start, length = 63 * SECTOR, 10001 * SECTOR
    source = image(tmp_path / "disk.img", 7)
    table = bytearray(SECTOR)
    struct.pack_into("<B3xB3xII", table, 446, 0, 0x83, start // SECTOR, length // SECTOR)
    table[510:] = b"\x55\xaa"
    with open(source, "r+b") as disk:
        disk.write(table)
    run_blockbak("backup", source, "--name", "disk")
    new = f"{group.name}/part"
    plan = run_blockbak.json("restore", "disk@latest", "--partition", 1, "--create-lv", new, "--dry-run")["plan"]
    assert (plan["device_bytes"], plan["target_bytes"], plan["partition"]["start"]) == (length, 8 * MIB, start)
    run_blockbak("restore", "disk@latest", "--partition", 1, "--create-lv", new)
    held = content(group.path("part"))
    assert digest(held[:length]) == digest(source.read_bytes()[start : start + length])
    assert held[length:] == bytes(8 * MIB - length)


def test_a_restore_that_fails_leaves_no_volume(make_group, run_blockbak, repository, tmp_path):
    group = make_group(size=128 * MIB)
    run_blockbak("backup", image(tmp_path / "source.img", 2), "--name", "source")
    new = f"{group.name}/new"

    # Killed while it writes: the volume is known for what it is, and goes with 'recover'.
    with start(run_blockbak, "restore", "source@latest", "--create-lv", new) as running:
        running.until("it restores", restoring)
        os.kill(running.pid, signal.SIGKILL)
    assert [one["lv_name"] for one in restoring()] == ["new"]
    recovered = run_blockbak("recover")
    assert f"Removed {new}, the unfinished restore of a run that did not end" in recovered.text
    assert group.lvs() == {}

    damage(repository, "source")
    found = run_blockbak.json("restore", "source@latest", "--create-lv", new, expect=4)["error"]
    assert found["name"] == "DamagedImage"
    assert group.lvs() == {}

    mapfile = tmp_path / "lost.mapfile"
    kept = run_blockbak("restore", "source@latest", "--create-lv", new, "--keep-going", "--mapfile", mapfile, expect=3)
    assert f"{new} is kept, and is incomplete" in kept.said
    assert mapfile.exists()
    (made,) = group.lvs().values()
    assert (made["lv_name"], made["lv_tags"]) == ("new", "")


def test_what_an_unfinished_restore_left_may_be_restored_to_and_is_kept(make_group, run_blockbak, repository, tmp_path):
    """Its tags said that the next run is to remove it."""
    group = make_group(size=48 * MIB)
    source = image(tmp_path / "source.img", 5, 8 * MIB)
    run_blockbak("backup", source, "--name", "source")
    tags = ("blockbak", "blockbak_run=0badc0de", f"blockbak_host={os.uname().nodename}", "blockbak_boot=old")
    added = [word for tag in (*tags, "blockbak_restore", "blockbak-store") for word in ("--addtag", tag)]
    left = group.volume("left", 8 * MIB, *added)
    run_blockbak("restore", "source@latest", left, "--yes")
    assert run_blockbak.json("recover")["done"] == []
    assert group.lvs()["left"]["lv_tags"] == "blockbak-store"
    assert digest(content(left)) == digest(source.read_bytes())


def test_thin_pools_are_never_filled_by_a_restore(make_group, run_blockbak, repository, tmp_path):
    group = make_group(size=256 * MIB)
    pool = group.pool("pool", 64 * MIB)
    source = image(tmp_path / "source.img", 3, 24 * MIB)
    with open(source, "r+b") as file:
        file.truncate(64 * MIB)
    run_blockbak("backup", source, "--name", "source")

    # A new thin volume takes no more room than the content.
    new = f"{group.name}/new"
    done = run_blockbak.json("restore", "source@latest", "--create-lv", new, "--thin-pool", pool)
    assert done["plan"]["thin_pool"] == f"{group.name}/pool"
    assert float(run("lvs", "--noheadings", "-o", "data_percent", new)) < 45
    assert digest(content(group.path("new"))) == digest(source.read_bytes())

    # Both would fit once more, and then nothing else.
    other = group.thin(pool, "other", 64 * MIB)
    with open(other, "r+b") as device:
        device.write(b"\x55" * 20 * MIB)
    run("sync", other)
    short = run_blockbak.json(
        "restore", "source@latest", "--create-lv", f"{group.name}/more", "--thin-pool", pool, expect=1
    )["error"]
    assert short["name"] == "NoVolumeRoom"
    assert short["fields"]["needed"] > 24 * MIB > short["fields"]["free"] > 0
    unsafe = group.thin(pool, "unsafe", 64 * MIB)
    assert run_blockbak.json("restore", "source@latest", unsafe, "--yes", expect=5)["error"]["name"] == "TargetUnsafe"

    # What is shared with a snapshot takes room again where it is written, which shows only then.
    group.thin_snapshot("other", "kept")
    stopped = run_blockbak.json("restore", "source@latest", other, "--yes", expect=1)["error"]
    assert stopped["name"] == "PoolFilling"
    assert float(run("lvs", "--noheadings", "-o", "data_percent", f"{group.name}/pool")) < 100
    assert digest(content(group.path("kept"), 20 * MIB)) == digest(b"\x55" * 20 * MIB)


def test_volumes_that_others_depend_on_are_left_alone(make_group, run_blockbak, repository, tmp_path):
    group = make_group(size=128 * MIB)
    origin = group.volume("ori-gin", 16 * MIB)
    run("mkfs.ext4", "-q", origin)
    before = digest(content(origin))
    snapshot = group.snapshot("ori-gin", "snap", 8 * MIB)
    group.pool("pool", 16 * MIB)
    run_blockbak("backup", image(tmp_path / "source.img", 4), "--name", "source")
    mapped = group.name.replace("-", "--")
    for target, words in (
        (origin, f"its snapshot {group.name}/snap would overflow"),
        (snapshot, "it is a snapshot"),
        (f"/dev/mapper/{mapped}-pool", "an inner part of logical volumes"),
        (f"/dev/mapper/{mapped}-ori--gin-real", "an inner part of logical volumes"),
    ):
        refused = run_blockbak("restore", "source@latest", target, "--yes", expect=5)
        assert words in refused.said
    # Nobody holds the device of that name, whoever writes to the thin volumes.
    refused = run_blockbak("backup", f"/dev/mapper/{mapped}-pool", expect=5)
    assert "an inner part of logical volumes" in refused.said
    assert digest(content(origin)) == before
    assert digest(content(snapshot)) == before


def test_a_second_copy_of_a_physical_volume_is_warned_of(loop, make_group, run_blockbak, repository):
    group = make_group(size=32 * MIB)
    group.volume("data", 8 * MIB)
    # What udev begins when a physical volume is made may come late, and would activate the group again.
    run("vgchange", "--quiet", "--setautoactivation", "n", group.name)
    run("vgchange", "--quiet", "-an", group.name)
    disk = run("pvs", "--noheadings", "-o", "pv_name", "-S", f"vg_name={group.name}")
    uuid = run("pvs", "--noheadings", "-o", "pv_uuid", "-S", f"vg_name={group.name}")
    free = loop(32 * MIB)
    run_blockbak("backup", disk, "--name", "disk")
    plan = run_blockbak.json("restore", "disk@latest", free, "--dry-run")["plan"]
    (note,) = [note for note in plan["notes"] if uuid in note]
    assert group.name in note
    assert f"vgimportclone {free}" in note
    # Back onto itself it is the one there is.
    done = run_blockbak.json("restore", "disk@latest", disk, "--yes")
    assert not [note for note in done["plan"]["notes"] if uuid in note]
    run("vgchange", "--quiet", "-ay", group.name)
