"""Mirrors of logical volumes in use, from snapshots; onto volumes that LVM knows."""

from __future__ import annotations

import hashlib

import pytest

from tests.vm.conftest import MIB, run
from tests.vm.hot import as_disk, check_gone, noise, pause_reading, start, write

SIZE = 32 * MIB


def sha(path: object, size: int = SIZE) -> str:
    with open(str(path), "rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


@pytest.mark.parametrize(("sector", "thin"), [(512, False), (4096, True)], ids=["512-thick", "4096-thin"])
def test_a_mounted_volume_is_mirrored_from_a_snapshot(sector, thin, make_group, ext4, run_blockbak, tmp_path):
    """What was written before is in the copy, which is a file system that needs no repair."""
    group = make_group(sector)
    if thin:
        group.pool("pool", 96 * MIB)
        source = group.thin("pool", "data", SIZE)
    else:
        source = group.volume("data", SIZE)
    mounted = ext4(as_disk(source))
    copy = tmp_path / "copy.img"
    label = f"{group.name}/data"
    refused = run_blockbak.json("mirror", label, copy, expect=5)
    assert refused["error"]["name"] == "MirrorSourceInUse"
    for turn in range(2):
        data = noise(turn, MIB)
        (mounted.where / f"file-{turn}").write_bytes(data)
        words = ["mirror", "--from-snapshot", "--snapshot-size", "16M", label, copy, *(["--yes"] if turn else [])]
        report = run_blockbak.json(*words)
        assert (report["mode"], report["consistency"]) == ("hot", "filesystem")
        assert report["method"] == ("differ" if turn else "create")
        assert turn == 0 or report["written_bytes"] < 8 * MIB
        check_gone(group)
        run("e2fsck", "-f", "-n", copy)
        out = run("debugfs", "-R", f"dump /file-{turn} {tmp_path}/out", copy)
        assert (tmp_path / "out").read_bytes() == data, out


def test_a_dry_run_makes_no_snapshot(make_group, ext4, run_blockbak, tmp_path):
    group = make_group()
    source = group.volume("data", SIZE)
    ext4(as_disk(source))
    before = sorted(group.lvs())
    words = ["mirror", "--from-snapshot", "--dry-run", "--snapshot-size", "16M"]
    report = run_blockbak.json(*words, f"{group.name}/data", tmp_path / "copy")
    assert any("A snapshot of" in note for note in report["notes"])
    assert sorted(group.lvs()) == before
    assert not (tmp_path / "copy").exists()


def test_a_volume_is_mirrored_onto_another(make_group, run_blockbak):
    group = make_group(4096)
    source, target = group.volume("data", SIZE), group.volume("copy", SIZE)
    write(source, 0, noise(1, 4 * MIB))
    run_blockbak("mirror", source, target, "--yes")
    assert sha(source) == sha(target)
    # A snapshot of the target would overflow with it.
    group.snapshot("copy", "kept", 8 * MIB)
    refused = run_blockbak.json("mirror", source, target, "--yes", expect=5)
    assert refused["error"]["name"] == "TargetUnsafe"


def test_a_snapshot_that_overflows_ends_the_mirror_and_not_the_volume(make_group, ext4, run_blockbak, tmp_path):
    group = make_group()
    source = group.volume("data", 64 * MIB)
    mounted = ext4(as_disk(source))
    (mounted.where / "before").write_bytes(noise(1, 16 * MIB))
    words = ["mirror", "--from-snapshot", "--snapshot-size", "4M", "--snapshot-limit", "4M", "--limit", "2M"]
    with start(run_blockbak, *words, f"{group.name}/data", tmp_path / "copy", "--json") as running:
        pause_reading(running)
        (mounted.where / "after").write_bytes(noise(2, 24 * MIB))
        run("sync", "--file-system", mounted.where)
        running.go_on()
        ended = running.end()
    assert ended.status == 1, str(ended)
    assert ended.error["name"] == "SnapshotOverflowed"
    check_gone(group)
    assert (mounted.where / "after").read_bytes() == noise(2, 24 * MIB)
    assert not (tmp_path / "copy").exists()
