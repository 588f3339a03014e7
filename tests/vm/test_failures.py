"""What goes wrong while a snapshot is read, on purpose: no point is made of it, nothing stays, the origin goes on."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.vm.conftest import MIB, lvs, run, suspended
from tests.vm.hot import (
    KILL_AFTER,
    KILL_BEFORE,
    KILL_PARENT,
    KILL_SUSPENDED,
    as_disk,
    check_gone,
    check_point,
    check_repository,
    dm_name,
    instead,
    killed,
    mapped,
    noise,
    pause_reading,
    snapshot_read,
    start,
    suspended_path,
    write,
    written,
)
from tests.volumes import fingerprint

KIB = 1024
HOT = ("backup", "--mode", "hot", "--json")


def free(group):
    return int(float(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", group.name)))


def failed(ended, name):
    """The error of a run that must have failed so, without a point."""
    assert ended.status == 1, str(ended)
    assert ended.document["points"] == []
    assert ended.error["name"] == name, str(ended)
    return ended.error


def filled(name):
    """How much of a snapshot's store is used; all of it where the kernel has given the snapshot up."""
    used, _, total = run("dmsetup", "status", name).split()[3].partition("/")
    return int(used) / int(total) if total else 1.0


# --- too little room -----------------------------------------------------------------------------------------


def test_a_snapshot_that_fills_is_extended_or_given_up(make_group, repository, run_blockbak, tmp_path):
    group = make_group(size=128 * MIB)
    data, label = group.volume("data", 32 * MIB), f"{group.name}/data"
    write(data, 0, noise(1, 8 * MIB))
    held = fingerprint(data)
    # In time: it is looked at more often than this fills it.
    with start(run_blockbak, *HOT, "--snapshot-size", "8M", "--limit", "2M", label) as running:
        name = pause_reading(running)
        running.go_on()
        with written(data) as put:
            for number in range(20):
                put(number * MIB, noise(100 + number, MIB))
                # How fast it fills is the machine's affair, and so is how long LVM takes.
                while snapshot_read(running.pid) and filled(name) > 0.8:
                    time.sleep(0.5)
        made = running.end()
    assert made.status == 0, str(made)
    (point,) = made.document["points"]
    assert any("extended by" in note for note in point["notes"])
    check_point(run_blockbak, point["point"], tmp_path, held)
    # Held to its size by the person, and then by the group, which has nothing more to give.
    for limits in (("--snapshot-limit", "8M"), ()):
        if not limits:
            group.volume("filler", free(group) - 8 * MIB)
        with start(run_blockbak, *HOT, "--snapshot-size", "8M", *limits, label) as running:
            pause_reading(running)
            write(data, 0, noise(200, 12 * MIB))
            running.go_on()
            error = failed(running.end(), "SnapshotOverflowed")
        assert error["fields"] == {"volume": label, "size": 8 * MIB}
        check_gone(group)
        check_repository(repository)
    held = fingerprint(data)
    (point,) = run_blockbak.json(*HOT[:3], "--snapshot-size", "8M", label)["points"]
    assert point["kind"] == "incremental"
    check_point(run_blockbak, point["point"], tmp_path, held)


def test_a_pool_that_fills_is_not_filled_by_the_snapshot(make_group, repository, run_blockbak, tmp_path):
    group = make_group(size=128 * MIB)
    group.pool("pool", 72 * MIB)
    data, label = group.thin("pool", "data", 40 * MIB), f"{group.name}/data"
    write(data, 0, noise(1, 36 * MIB))
    other = group.thin("pool", "other", 32 * MIB)
    with start(run_blockbak, *HOT, "--limit", "1M", label) as running:
        pause_reading(running)
        running.go_on()
        # Each of it takes room of its own, for as long as there is a snapshot: until a twentieth is left.
        with written(data) as put:
            put(0, noise(100, 31 * MIB))
            for number in range(80):
                put(31 * MIB + number * 64 * KIB, noise(101 + number, 64 * KIB))
                if not snapshot_read(running.pid) and number > 40:
                    break
                time.sleep(0.2)
        error = failed(running.end(), "PoolFull")
    write(data, 0, noise(3, 4 * MIB))
    use = lvs(f"{group.name}/pool")[0]
    assert use["lv_attr"][:6] == "twi-ao"
    assert use["lv_attr"][8] == "-"
    assert error["fields"]["what"] == "data"
    check_gone(group)
    check_repository(repository)
    # Now others have taken what a snapshot may need.
    write(other, 0, noise(2, 8 * MIB))
    error = failed(run_blockbak(*HOT, label, expect=None), "NoPoolRoom")
    assert error["fields"]["pool"] == f"{group.name}/pool"
    check_gone(group)
    run("blkdiscard", other)
    held = fingerprint(data)
    (point,) = run_blockbak.json(*HOT[:3], label)["points"]
    check_point(run_blockbak, point["point"], tmp_path, held)


# --- other hands --------------------------------------------------------------------------------------------


def test_other_hands_on_the_snapshot(make_group, repository, run_blockbak):
    group = make_group(size=256 * MIB)
    data, label = group.volume("data", 32 * MIB), f"{group.name}/data"
    write(data, 0, noise(1, 8 * MIB))
    with start(run_blockbak, *HOT, "--snapshot-size", "8M", label) as running:
        name = pause_reading(running)
        (snapshot,) = (one["lv_name"] for one in lvs(group.name) if one["lv_name"].startswith("blockbak-"))
        # It is in use, and so LVM removes neither it nor what it came from.
        run("lvremove", "--force", "--yes", f"{group.name}/{snapshot}", expect=5)
        run("lvremove", "--force", "--yes", label, expect=5)
        # This replaces it by errors, as it is in use.
        subprocess.run(["dmsetup", "remove", "--force", name], capture_output=True, check=False)
        assert run("dmsetup", "table", name).split()[2] == "error"
        running.go_on()
        failed(running.end(), "SnapshotLost")
    check_gone(group)
    check_repository(repository)
    write(data, 0, noise(2, MIB))


# --- bad sectors ---------------------------------------------------------------------------------------------


def test_a_bad_sector_below_the_origin_is_not_taken_for_an_overflow(loop, repository, run_blockbak, tmp_path):
    disk = loop(48 * MIB)
    sectors, bad = (disk.size - MIB) // 512, 14 * MIB // 512
    # Behind a gap: at the disk's own start LVM would find the physical volume a second time.
    gap = MIB // 512
    healthy = f"0 {sectors} linear {disk} {gap}"
    parts = ((0, bad), (bad + 1, sectors - bad - 1))
    around = [f"{at} {count} linear {disk} {gap + at}" for at, count in parts]
    sick = "\n".join((around[0], f"{bad} 1 error", around[1]))

    below, name = f"below-{os.getpid()}", f"bb-bad-{os.getpid()}"

    def load(table):
        subprocess.run(["dmsetup", "load", below], input=table, text=True, check=True)
        run("dmsetup", "suspend", "--noflush", below)
        run("dmsetup", "resume", below)

    run("dmsetup", "create", below, "--table", healthy)
    try:
        run("pvcreate", "--quiet", "--yes", f"/dev/mapper/{below}")
        run("vgcreate", "--quiet", name, f"/dev/mapper/{below}")
        run("lvcreate", "--quiet", "--yes", "-n", "data", "-L", "20m", name)
        data, label = f"/dev/{name}/data", f"{name}/data"
        write(data, 0, noise(1, 20 * MIB))
        start_at = int(float(run("pvs", "--noheadings", "--units", "b", "--nosuffix", "-o", "pe_start",
                                 f"/dev/mapper/{below}")))  # fmt: skip
        at = 14 * MIB - start_at
        load(sick)
        made = run_blockbak(*HOT, "--snapshot-size", "8M", label, expect=3)
        (point,) = made.document["points"]
        assert point["bad_bytes"] == 512
        extents = run_blockbak.json("show", point["point"])["extents"]
        assert [one for one in extents if one["kind"] == "bad"] == [{"start": at, "length": 512, "kind": "bad"}]
        words = ("restore", point["point"], tmp_path / "partly", "--yes", "--keep-going")
        restored = run_blockbak.json(*words, "--mapfile", tmp_path / "mapfile", expect=3)
        assert restored["unreadable"] == [{"start": at, "length": 512}]
        assert f"0x{at:08X}  0x00000200  -" in (tmp_path / "mapfile").read_text()
        # A write beside it has its chunk copied first, which the disk refuses: no room would help there.
        with start(run_blockbak, *HOT, "--snapshot-size", "16M", label) as running:
            pause_reading(running)
            write(data, at + 4096 - 512, noise(3, 512))
            running.go_on()
            assert "failed" in failed(running.end(), "SnapshotLost")["message"]
        load(healthy)
        held = fingerprint(data)
        (point,) = run_blockbak.json(*HOT[:3], "--snapshot-size", "8M", label)["points"]
        assert (point["kind"], point["bad_bytes"]) == ("incremental", 0)
        folder = tmp_path / "whole"
        folder.mkdir()
        check_point(run_blockbak, point["point"], folder, held)
    finally:
        load(healthy)
        subprocess.run(["vgremove", "--force", "--yes", name], check=False)
        run("dmsetup", "remove", "--retry", below)


# --- killed at each step -------------------------------------------------------------------------------------


def foreign(group, name, tags):
    """A snapshot that somebody else made, for all that it looks like ours."""
    added = [word for tag in tags for word in ("--addtag", tag)]
    group.snapshot("other", name, 4 * MIB, *added)
    return name


def test_killed_at_each_step(make_group, repository, run_blockbak, tmp_path):
    group = make_group(size=256 * MIB)
    data, label = group.volume("data", 32 * MIB), f"{group.name}/data"
    group.volume("other", 16 * MIB)
    write(data, 0, noise(1, 8 * MIB))
    words = (*HOT, "--snapshot-size", "8M", label)
    host = os.uname().nodename
    ours_of = ("blockbak", "blockbak_run=0badc0de")
    foreigners = {
        foreign(group, "blockbak-untagged", ()),
        foreign(group, "tagged", ("blockbak", "blockbak_run=0badc0de", f"blockbak_host={host}", "blockbak_boot=old")),
        foreign(group, "blockbak-elsewhere", (*ours_of, "blockbak_host=elsewhere", "blockbak_boot=old")),
    }
    others = {"data", "other", *foreigners}
    foreign(group, "blockbak-0badc0de", (*ours_of, f"blockbak_host={host}", "blockbak_boot=old"))

    killed(run_blockbak, *words, env=instead(tmp_path, "lvcreate", KILL_BEFORE))
    # The leftover of an earlier boot went when the run began.
    assert mapped(group) == others
    killed(run_blockbak, *words, env=instead(tmp_path, "lvcreate", KILL_AFTER.format(program="lvcreate")))
    (second,) = mapped(group) - others
    (tmp_path / "bin" / "lvcreate").unlink()
    with start(run_blockbak, *words) as running:
        pause_reading(running, after=dm_name(group, second))
        (third,) = mapped(group) - others - {second}
    said = run_blockbak.json("recover")["done"]
    removed = [line for line in said if line.startswith(f"Removed {group.name}/")]
    assert removed == [f"Removed {group.name}/{third}, the snapshot of a run that did not end."]
    assert mapped(group) == others
    killed(run_blockbak, *words, env=instead(tmp_path, "lvremove", KILL_BEFORE))
    (tmp_path / "bin" / "lvremove").unlink()
    write(data, MIB, noise(2, MIB))
    held = fingerprint(data)
    (point,) = run_blockbak.json(*words[:-1], label)["points"]
    assert point["kind"] == "incremental"
    assert mapped(group) == others
    run("lvremove", "--quiet", "--yes", *(f"{group.name}/{name}" for name in foreigners))
    check_gone(group)
    check_point(run_blockbak, point["point"], tmp_path, held)


@pytest.mark.parametrize(("dies", "thin"), [("both", False), ("lvcreate", True)], ids=["both-thick", "lvcreate-thin"])
def test_lvcreate_killed_while_it_holds_the_volume(make_group, ext4, repository, run_blockbak, tmp_path, dies, thin):
    group = make_group(size=256 * MIB)
    label = f"{group.name}/data"
    data = group.thin(group.pool("pool", 96 * MIB), "data", 32 * MIB) if thin else group.volume("data", 32 * MIB)
    mounted = ext4(as_disk(data))
    state = suspended_path(dm_name(group, "data"))
    before = {path.read_text() for path in Path("/sys/block").glob("dm-*/dm/name")}
    script = KILL_SUSPENDED.format(suspended=str(state), then=KILL_PARENT if dies == "both" else "")
    words = ("backup", "--snapshot-size", "8M", label, "--json")
    env = instead(tmp_path, "lvcreate", script)
    if dies == "both":
        killed(run_blockbak, *words, env=env)
        assert state.read_text().strip() == "1"
        said = run_blockbak.json("recover")["done"]
        assert any(line.startswith(f"Resumed {dm_name(group, 'data')}, ") for line in said), said
    else:
        with start(run_blockbak, *words, env=env) as running:
            ended = running.end()
        failed(ended, "CommandFailed")
        assert any(note.startswith(f"Resumed {dm_name(group, 'data')}, ") for note in ended.error["notes"]), str(ended)
    assert suspended() == set()
    # Its file system was told of no error, and the volume is what it was, without a part of a snapshot below it.
    (mounted.where / "file").write_bytes(noise(1, MIB))
    run("sync", "--file-system", mounted.where)
    check_gone(group)
    assert {path.read_text() for path in Path("/sys/block").glob("dm-*/dm/name")} == before
    (tmp_path / "bin" / "lvcreate").unlink()
    (point,) = run_blockbak.json(*words[:-1])["points"]
    assert point["kind"] == "full"
    mounted.unmount()
    run("e2fsck", "-fn", data)


def test_a_run_that_begins_while_another_sweeps_is_left_alone(make_group, repository, run_blockbak, tmp_path):
    """The sweeper is held between looking for the living and asking LVM, while the other makes its snapshot."""
    group = make_group(size=256 * MIB)
    group.volume("data", 32 * MIB)
    held, go = tmp_path / "held", tmp_path / "go"
    script = f"""#!/bin/sh
case "$*" in *--select*|*-a*) ;; *) touch {held}; while [ ! -e {go} ]; do sleep 0.1; done;; esac
exec /usr/sbin/lvs "$@"
"""
    with start(run_blockbak, "recover", "--json", env=instead(tmp_path, "lvs", script)) as sweeping:
        sweeping.until("it asks LVM", held.exists)
        with start(run_blockbak, *HOT, "--snapshot-size", "8M", f"{group.name}/data") as running:
            pause_reading(running)
            go.touch()
            ended = sweeping.end()
            # The volume itself is in other hands, which is all it says.
            assert (ended.error["name"], ended.document["done"]) == ("VolumeLocked", [])
            assert len(lvs("-S", "lv_tags=blockbak")) == 1
            running.go_on()
            assert running.end().status == 0
    check_gone(group)


def test_a_file_system_that_somebody_froze_is_named(make_group, ext4, repository, run_blockbak):
    group = make_group(size=48 * MIB)
    path = group.volume("data", 16 * MIB)
    mounted = ext4(as_disk(path))
    run("fsfreeze", "--freeze", mounted.where)
    try:
        refused = run_blockbak("backup", path, expect=5)
    finally:
        run("fsfreeze", "--unfreeze", mounted.where)
    assert f"{mounted.where} is frozen already, by somebody else." in refused.said
    check_gone(group)
    (mounted.where / "after").write_text("goes on")
