"""Hot backups of volumes in use: what is read, who can see it meanwhile, and how much room it takes."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.vm.conftest import MIB, lvs, run
from tests.vm.hot import as_disk, check_gone, check_point, noise, pause_reading, start, write
from tests.volumes import fingerprint

RULES = ("12-blockbak.rules", "57-blockbak.rules")
VOLATILE, LASTING = Path("/run/udev/rules.d"), Path("/etc/udev/rules.d")


def udev(path):
    """What udev's database has of a device."""
    told = run("udevadm", "info", "--query=property", "--name", path)
    return dict(line.split("=", 1) for line in told.splitlines())


def links_to(path):
    """Who in /dev/disk points to a device by what lies on it."""
    node = os.path.realpath(path)
    links = [*Path("/dev/disk").glob("by-uuid/*"), *Path("/dev/disk").glob("by-label/*")]
    return [str(link) for link in links if os.path.realpath(link) == node]


def check_snapshot(group, name, thin):
    """It is what the documents say of it, and nobody can take it for its origin."""
    path = f"/dev/mapper/{name}"
    (one,) = (row for row in lvs(group.name) if row["lv_name"].startswith("blockbak-"))
    assert one["lv_attr"].startswith("Vri-aotz" if thin else "sri-aos"), one
    run_id = one["lv_name"].removeprefix("blockbak-")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    wanted = {"blockbak", f"blockbak_run={run_id}", f"blockbak_host={os.uname().nodename}", f"blockbak_boot={boot}"}
    assert set(one["lv_tags"].split(",")) == wanted
    assert run("blockdev", "--getro", path) == "1"
    known = udev(path)
    hidden = {"DM_UDEV_DISABLE_OTHER_RULES_FLAG": "1", "SYSTEMD_READY": "0", "UDISKS_IGNORE": "1"}
    assert hidden.items() <= known.items()
    assert [key for key in known if key.startswith("ID_FS_")] == []
    assert links_to(path) == []
    return int(one["lv_size"])


def test_mounted_volumes_thick_and_thin(group, ext4, repository, run_blockbak, tmp_path):
    thick = group.volume("my-thick", 32 * MIB)
    group.pool("pool", 96 * MIB)
    thin = group.thin("pool", "thin", 32 * MIB)
    mounted = [ext4(as_disk(path)) for path in (thick, thin)]
    # A package may have put the rule there; a plain installation has not.
    for rule in RULES:
        for folder in (VOLATILE, LASTING):
            folder.joinpath(rule).unlink(missing_ok=True)
    run("udevadm", "control", "--reload")
    points = {}
    for turn, (kind, size, room) in enumerate((("full", "8M", 8 * MIB), ("incremental", "50%", 16 * MIB))):
        for number, one in enumerate(mounted):
            (one.where / f"before-{turn}").write_bytes(noise(10 * turn + number, MIB))
        words = ("backup", f"{group.name}/my-thick", f"{group.name}/thin", "--snapshot-size", size, "--json")
        frozen, last = [], ""
        with start(run_blockbak, *words) as running:
            for number, one in enumerate(mounted):
                last = pause_reading(running, last)
                taken = check_snapshot(group, last, thin=number == 1)
                assert taken == (room if number == 0 else 32 * MIB)
                (one.where / f"meanwhile-{turn}").write_bytes(noise(20 * turn + number, MIB))
                run("sync", "--file-system", one.where)
                frozen.append(fingerprint(f"/dev/mapper/{last}"))
                running.go_on()
            made = running.end()
        assert made.status == 0, str(made)
        for point, content in zip(made.document["points"], frozen, strict=True):
            assert (point["kind"], point["mode"], point["consistency"]) == (kind, "hot", "filesystem")
            points[point["point"], point["volume"]] = content
        check_gone(group)
    # The rule is in force now, and will be at the next boot, when LVM finds what a crash may have left.
    assert all((LASTING / rule).exists() for rule in RULES)
    for (point, _), content in points.items():
        check_point(run_blockbak, point, tmp_path, content)


def seen_by_lvm(*options):
    """What LVM says of physical volumes, on both channels."""
    done = subprocess.run(
        ["pvs", "--noheadings", "-o", "pv_name,vg_name", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done
    return done.stdout + done.stderr


LVM_LOCAL = Path("/etc/lvm/lvmlocal.conf")
LOOKS = "devices {\n\tscan_lvs = 1\n}\n"
LOOKS_ASIDE = 'devices {\n\tscan_lvs = 1\n\tglobal_filter = [ "r|-blockbak--|" ]\n}\n'


@pytest.fixture
def lvm_looks_into_volumes():
    """LVM takes physical volumes inside logical ones for its own, as some set it."""
    before = LVM_LOCAL.read_bytes() if LVM_LOCAL.exists() else b""
    LVM_LOCAL.write_text(LOOKS)
    yield
    LVM_LOCAL.write_bytes(before)


def btrfs_members(where):
    """The devices that a mounted btrfs is on."""
    shown = run("btrfs", "filesystem", "show", where).splitlines()
    return [line.partition(" path ")[2] for line in shown if " path " in line]


def test_twins_of_btrfs_and_of_physical_volumes_are_seen_by_nobody(
    make_group, btrfs, lvm_looks_into_volumes, repository, run_blockbak, tmp_path
):
    group = make_group()
    data, outer = group.volume("btr", 128 * MIB), group.volume("outer", 64 * MIB)
    mounted = btrfs(as_disk(data))
    (mounted.where / "file").write_bytes(noise(1, 2 * MIB))
    inner = f"{group.name}-in"
    run("pvcreate", "--quiet", "--yes", outer)
    run("vgcreate", "--quiet", inner, outer)
    try:
        run("lvcreate", "--quiet", "--yes", "-n", "nested", "-L", "16m", inner)
        write(f"/dev/{inner}/nested", 0, noise(2, MIB))
        members, known = btrfs_members(mounted.where), seen_by_lvm()
        words = ("backup", "--snapshot-size", "16M", "--json", f"{group.name}/outer")
        with start(run_blockbak, *words, f"{group.name}/btr") as running:
            # LVM would meet the twin, so the first is refused.
            pause_reading(running)
            # Whoever has all devices scanned by hand is told that the twin is one, and the kernel does not take it.
            subprocess.run(["btrfs", "device", "scan"], check=False, capture_output=True)
            assert btrfs_members(mounted.where) == members
            (mounted.where / "more").write_bytes(noise(3, 2 * MIB))
            running.go_on()
            ended = running.end()
        assert (ended.status, ended.error["name"]) == (1, "SnapshotSeen"), str(ended)
        assert "global_filter" in ended.error["message"]
        assert [point["mode"] for point in ended.document["points"]] == ["hot"]
        run("btrfs", "scrub", "start", "-B", mounted.where)
        run("btrfs", "device", "stats", "--check", mounted.where)
        check_gone(group)
        LVM_LOCAL.write_text(LOOKS_ASIDE)
        with start(run_blockbak, *words) as running:
            name = pause_reading(running)
            frozen = fingerprint(f"/dev/mapper/{name}")
            assert seen_by_lvm() == known
            # Nor is the group locked against changes, as it is where a physical volume has a duplicate.
            run("lvchange", "--quiet", "--addtag", "changed", f"{inner}/nested")
            LVM_LOCAL.write_text("")
            outside = seen_by_lvm()
            assert group.name in outside
            assert "WARNING" not in outside
            assert "blockbak" not in outside
            running.go_on()
            made = running.end()
        LVM_LOCAL.write_text(LOOKS_ASIDE)
        assert made.status == 0, str(made)
        check_point(run_blockbak, made.document["points"][0]["point"], tmp_path, frozen)
        check_gone(group)
    finally:
        run("vgremove", "--quiet", "--force", "--yes", inner)


def test_a_rule_that_unhides_the_snapshot_is_noticed(make_group, repository, run_blockbak):
    group = make_group()
    group.volume("data", 16 * MIB)
    other = VOLATILE / "58-somebody.rules"
    VOLATILE.mkdir(exist_ok=True)
    other.write_text('SUBSYSTEM=="block", KERNEL=="dm-*", ENV{SYSTEMD_READY}="1"\n')
    try:
        run("udevadm", "control", "--reload")
        ended = run_blockbak("backup", "--mode", "hot", f"{group.name}/data", "--json", expect=1)
    finally:
        other.unlink()
        run("udevadm", "control", "--reload")
    assert ended.error["name"] == "SnapshotSeen"
    assert "SYSTEMD_READY is 1" in ended.error["message"]
    check_gone(group)


def test_no_room_is_said_beforehand(make_group, repository, run_blockbak):
    group = make_group(size=128 * MIB)
    group.volume("data", 64 * MIB)
    group.volume("other", 40 * MIB)
    free = int(float(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", group.name)))
    data = f"{group.name}/data"
    # The least that is begun with where nobody asked, and what was asked for.
    for words, needed in (((), 32 * MIB), (("--snapshot-size", "50%"), 32 * MIB)):
        refused = run_blockbak("backup", "--mode", "hot", data, *words, "--json", expect=1).error
        assert refused["name"] == "NoSnapshotRoom"
        assert (refused["fields"]["free"], refused["fields"]["needed"]) == (free, needed)
    refused = run_blockbak("backup", "--dry-run", "--mode", "hot", data, "--json", expect=1).error
    assert (refused["name"], refused["fields"]["free"]) == ("NoSnapshotRoom", free)
    (would,) = run_blockbak.json("backup", "--dry-run", "--mode", "hot", data, "--snapshot-size", "12M")["points"]
    assert would["notes"][-1] == f"A snapshot of {data} is made, with 12.0 MiB of {group.name} for it."
    check_gone(group)


# --- the volume becomes another ------------------------------------------------------------------------------


def test_a_volume_keeps_its_points_whatever_is_done_to_it(loop, make_group, ext4, repository, run_blockbak, tmp_path):
    """On several disks, one of them encrypted; renamed, trimmed, grown and shrunk between its points."""
    disk, key, crypt = loop(56 * MIB), tmp_path / "key", f"crypt-{os.getpid()}"
    key.write_bytes(b"not a secret")
    run(
        "cryptsetup", "luksFormat", "--batch-mode", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000",
        "--key-file", key, disk,
    )  # fmt: skip
    run("cryptsetup", "open", "--allow-discards", "--key-file", key, disk, crypt)
    group = make_group(size=32 * MIB)
    run("vgextend", "--quiet", "--yes", group.name, f"/dev/mapper/{crypt}")
    # Of one disk's whole room, and some of the other's.
    data = group.volume("da-ta.1", 40 * MIB)
    mounted = ext4(as_disk(data))
    try:
        (mounted.where / "gone").write_bytes(noise(1, 4 * MIB))
        label = f"{group.name}/da-ta.1"
        first = run_blockbak.json("backup", label, "--snapshot-size", "16M")["points"][0]
        (mounted.where / "gone").unlink()
        (mounted.where / "there").write_bytes(noise(2, MIB))
        run("sync", "--file-system", mounted.where)
        run("fstrim", mounted.where)
        run("lvrename", "--quiet", group.name, "da-ta.1", "other--name_2")
        label, data = f"{group.name}/other--name_2", group.path("other--name_2")
        second = run_blockbak.json("backup", label, "--snapshot-size", "16M")["points"][0]
        assert (second["kind"], second["volume"], second["parent"]) == ("incremental", first["volume"], first["point"])
        mounted.unmount()
        for change in (("lvextend", "-L", "+8m"), ("lvreduce", "--force", "-L", "-16m")):
            run(*change, "--quiet", "--yes", label)
            held = fingerprint(data)
            point = run_blockbak.json("backup", "--mode", "hot", label, "--snapshot-size", "8M")["points"][0]
            assert (point["kind"], point["volume"]) == ("full", first["volume"])
            assert "bytes, the last point" in point["notes"][0]
        check_point(run_blockbak, point["point"], tmp_path, held)
        check_gone(group)
    finally:
        mounted.unmount()
        group.remove()
        run("cryptsetup", "close", crypt)


# --- beside others -------------------------------------------------------------------------------------------


def test_two_runs_at_one_time_and_how_fast_they_read(make_group, repository, run_blockbak, tmp_path):
    group = make_group()
    paths = [group.volume(name, 64 * MIB) for name in ("one", "two")]
    for number, path in enumerate(paths):
        write(path, 0, noise(number, 8 * MIB))
    held = [fingerprint(path) for path in paths]
    words = ("backup", "--mode", "hot", "--snapshot-size", "16M", "--limit", "8M", "--idle", "--json")
    with (
        start(run_blockbak, *words, f"{group.name}/one") as one,
        start(run_blockbak, *words, f"{group.name}/two") as two,
    ):
        pause_reading(one)
        threads = psutil.Process(one.pid).threads()
        assert {run("ionice", "-p", thread.id) for thread in threads} == {"idle"}
        refused = run_blockbak("backup", "--mode", "hot", f"{group.name}/one", "--json", expect=1).error
        assert (refused["name"], refused["fields"]["pid"]) == ("VolumeLocked", one.pid)
        begun = time.monotonic()
        one.go_on()
        ended = [one.end(), two.end()]
        lasted = time.monotonic() - begun
    # At 8 MiB/s; how much slower it is, is the machine's affair.
    assert lasted > 64 / 8 * 0.8
    for made, content in zip(ended, held, strict=True):
        assert made.status == 0, str(made)
        (point,) = made.document["points"]
        check_point(run_blockbak, point["point"], tmp_path, content)
    check_gone(group)
