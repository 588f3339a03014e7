"""Mirrors of logical volumes in use, from snapshots; onto volumes that LVM knows."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import descendants
from tests.vm.conftest import LIMIT_SECONDS, MIB, run
from tests.vm.hot import as_disk, check_gone, noise, pause_reading, start, write

SIZE = 32 * MIB


def sha(path: object, size: int = SIZE) -> str:
    with open(str(path), "rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[str]:
    """What starts a program through this machine's own sshd, as root and with a key, as between two machines."""
    key, known, allowed = tmp_path / "key", tmp_path / "known", Path("/root/.ssh/authorized_keys")
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
    known.write_text(f"127.0.0.1 {Path('/etc/ssh/ssh_host_ed25519_key.pub').read_text()}")
    assert not allowed.exists()
    allowed.parent.mkdir(mode=0o700, exist_ok=True)
    allowed.write_text(key.with_suffix(".pub").read_text())
    try:
        yield f"ssh -i {key} -o UserKnownHostsFile={known} -o BatchMode=yes root@127.0.0.1"
    finally:
        allowed.unlink()


def program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it ended meanwhile
        return ""


def receivers(target: str) -> list[str]:
    """The processes that are told to receive onto ``target``, sshd's and the shell's among them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_text().replace("\0", " ")
        except OSError:
            continue
        if f"--receive {target}" in words:
            found.append(words)
    return found


def test_a_line_through_ssh_that_breaks_is_taken_up_again(make_group, run_blockbak, ssh):
    def piece(path: str) -> bytes:
        with open(path, "rb") as file:
            file.seek(4 * MIB)
            return file.read(MIB // 4)

    group = make_group()
    size = 12 * MIB
    source, target = group.volume("data", size), group.volume("copy", size)
    write(source, 0, noise(1, 2 * MIB))
    through = f"{ssh} blockbak mirror --receive {target}"
    refused = run_blockbak.json("mirror", source, "--through", through, expect=5)
    assert refused["error"]["name"] == "PeerRefused"
    through += " --yes"
    report = run_blockbak.json("mirror", source, "--through", through)
    assert report["host"] == os.uname().nodename
    assert sha(source, size) == sha(target, size)

    changed = noise(2, 8 * MIB)
    write(source, 4 * MIB, changed)
    with start(run_blockbak, "mirror", "--limit", "2M", source, "--through", through, "--json") as running:
        running.until("some of it was written", lambda: piece(target) == changed[: MIB // 4])
        (line,) = (pid for pid in descendants(running.pid) if program_of(pid) == "ssh")
        os.kill(line, signal.SIGKILL)
        ended = running.end()
    assert ended.status == 1, str(ended)
    assert ended.error["name"] == "PeerGone"
    # The other end hears of it from sshd, and does not stay.
    deadline = time.monotonic() + LIMIT_SECONDS
    while left := receivers(target):
        assert time.monotonic() < deadline, left
        time.sleep(1)
    assert sha(source, size) != sha(target, size)
    again = run_blockbak.json("mirror", source, "--through", through)
    assert again["written_bytes"] < 8 * MIB
    assert sha(source, size) == sha(target, size)


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
