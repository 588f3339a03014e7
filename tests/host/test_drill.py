"""Drills: real file systems on loop devices, as crashes leave them, restored to scratch and looked through."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockbak.flow import drill
from blockbak.host import emulator
from blockbak.host.runner import which
from blockbak.repository.local import Repository
from tests.children import environment
from tests.doubles import context
from tests.host.stage import MIB, damage_frame, mounted, partitions, put, pv_label, run, settle, sha

GPT = ("start=2048, size=65536", "size=614400", "size=225280", "size=8192")


def boot_sector(text: bytes) -> bytes:
    """An MBR whose code says ``text`` on the first serial port, and one partition.

    cli; xor ax,ax; mov ds,ax; mov si,text; next: lodsb; or al,al; jz end; mov bl,al; mov dx,0x3fd; wait: in al,dx;
    test al,0x20; jz wait; mov al,bl; mov dx,0x3f8; out dx,al; jmp next; end: hlt; jmp end
    """
    head = bytes.fromhex("fa31c08ed8be")
    rest = bytes.fromhex("ac08c0741288c3bafd03eca82074fb88d8baf803eeebe9f4ebfd")
    code = head + struct.pack("<H", 0x7C00 + len(head) + 2 + len(rest)) + rest + text + b"\0"
    entry = struct.pack("<B3xB3xII", 0x80, 0x83, 64, 64)
    return code.ljust(446, b"\0") + entry.ljust(64, b"\0") + b"\x55\xaa"


def scratch_loops() -> list[str]:
    """Loop devices on drills' scratch files."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if ".blockbak-drill-" in entry.read_text():
                found.append(entry.parts[3])
        except OSError:
            continue
    return found


@pytest.fixture(autouse=True)
def nothing_left(program, tmp_path):
    """Of no drill anything is left: no loop device, no file, no directory, no process."""
    before = set(scratch_loops())
    program.state.mkdir()
    yield
    settle(lambda: set(scratch_loops()) <= before)
    assert set(scratch_loops()) <= before
    assert not [
        path for path in tmp_path.rglob("*") if path.name.startswith(".blockbak-drill-") and path.stat().st_size
    ]
    assert not list(program.state.glob("*"))


def drilled(program, *words, expect=0):
    (report,) = program("drill", *words, expect=expect).document["drills"]
    return report


def files(where, count=40):
    for number in range(count):
        (where / f"file-{number}").write_bytes(os.urandom(3000) * (number + 1))


# --- as a crash leaves them -------------------------------------------------------------------------------


def test_an_ext4_that_was_in_use_is_replayed_checked_and_mounted(program, loop, ext4):
    device = loop(96 * MIB)
    made = ext4(device)
    files(made.where)
    os.sync()
    with (made.where / "orphan").open("wb") as held:
        held.write(b"deleted while it is open" * 9000)
        held.flush()
        os.fsync(held.fileno())
        (made.where / "orphan").unlink()
        os.sync()
        point = program.backup(device, "--mode", "live")
    report = drilled(program, point["point"])
    (one,) = report["filesystems"]
    assert (one["type"], one["replayed"], one["checked"], one["mounted"]) == ("ext4", True, "clean", True)
    assert report["verified_bytes"] == device.size
    assert report["differences"] == report["unseen"] == []
    assert set(report["seconds"]) == {"restore", "read back", "look", "replay 0", "check 0", "mount 0"}
    assert report["rto_seconds"] == pytest.approx(sum(report["seconds"].values()), abs=0.01)


def test_an_xfs_that_was_in_use_beside_its_original(program, loop, xfs):
    device = loop(300 * MIB)
    made = xfs(device)
    files(made.where)
    subprocess.run(["sync", "-f", made.where], check=True)
    point = program.backup(device, "--mode", "live")
    (made.where / "since").write_text("the original goes on")
    report = drilled(program, point["point"], "--check", "sh -c 'test ! -e $BLOCKBAK_MOUNT/since'")
    (one,) = report["filesystems"]
    assert (one["type"], one["replayed"], one["checked"], one["mounted"]) == ("xfs", True, "clean", True)


def test_a_btrfs_is_not_taken_for_its_original_which_is_mounted(program, loop, btrfs):
    """By its id the kernel would give the original instead, or refuse that later."""
    device = loop(128 * MIB)
    made = btrfs(device)
    files(made.where)
    os.sync()
    with (made.where / "synced").open("wb") as file:
        file.write(b"in the log tree" * 1000)
        file.flush()
        os.fsync(file.fileno())
    point = program.backup(device, "--mode", "live")
    (made.where / "since").write_text("the original goes on")
    check = "sh -c 'test ! -e $BLOCKBAK_MOUNT/since && test -s $BLOCKBAK_MOUNT/synced'"
    report = drilled(program, point["point"], "--check", check)
    (one,) = report["filesystems"]
    assert (one["type"], one["replayed"], one["checked"], one["mounted"]) == ("btrfs", True, "clean", True)
    # Nor does the kernel keep the copy in its place.
    made.unmount()
    made.mount()
    assert (made.where / "since").read_text() == "the original goes on"


def test_a_btrfs_that_is_renamed_in_part_is_not_shown_to_the_kernel(program, loop, tmp_path, monkeypatch):
    device = loop(128 * MIB)
    run("mkfs.btrfs", "-q", device)
    point = program.backup(device)["point"]
    whole, mounts = os.pwrite, Path("/proc/self/mountinfo").read_text()
    cut = []

    def short(fd, data, offset):
        if len(data) >= 4096 and not cut:
            cut.append(offset)
            return whole(fd, data[:512], offset)
        return whole(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", short)
    world = context(program.state)
    report = drill.drill(Repository(str(program.repository)), point, drill.DrillOptions(scratch=str(tmp_path)), world)
    assert len(cut) == 1
    assert report.filesystems == []
    assert "would be taken for the original" in report.differences[0]
    assert Path("/proc/self/mountinfo").read_text() == mounts


def test_a_vfat_that_was_in_use_is_no_error(program, tmp_path):
    source = tmp_path / "esp"
    run("mkfs.vfat", "-C", "-F", "32", source, "65536")
    put(source, 65, b"\x01")
    # A kernel without a driver for it cannot mount it, and the drill says so.
    known = subprocess.run(["modprobe", "-q", "vfat"], check=False).returncode == 0
    report = drilled(program, program.backup(source)["point"], expect=0 if known else 3)
    (one,) = report["filesystems"]
    assert (one["checked"], one["mounted"]) == ("clean", known)
    assert "was in use" in report["notes"][0]
    assert len(report["differences"]) == (not known)


# --- whole disks ------------------------------------------------------------------------------------------


def test_a_disk_with_partitions_and_what_is_never_started(program, loop, tmp_path):
    disk = loop(456 * MIB)
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, stdin="\n".join(("label: gpt", *GPT)) + "\n")
    with partitions(disk, len(GPT)) as (ext4, xfs, btrfs, lvm):
        run("mkfs.ext4", "-q", "-L", "data", ext4)
        run("mkfs.xfs", "-q", "-f", xfs)
        run("mkfs.btrfs", "-q", "-f", btrfs)
        put(lvm, 0, pv_label("vg-of-the-original"))
        with mounted(ext4, tmp_path / "m"):
            (tmp_path / "m" / "fact").write_text("on the first partition")
    point = program.backup(disk)
    check = tmp_path / "check"
    check.write_text(
        "#!/bin/sh\n"
        "set -e\n"
        "env | grep ^BLOCKBAK_ | sort\n"
        'cat "$BLOCKBAK_MOUNT_1/fact"\n'
        'if touch "$BLOCKBAK_MOUNT_1/new"; then exit 1; fi\n'
        # Whoever must write gets an overlay, which is gone afterwards.
        'mkdir "$BLOCKBAK_MOUNTS/upper" "$BLOCKBAK_MOUNTS/upper/a" "$BLOCKBAK_MOUNTS/upper/b" "$BLOCKBAK_MOUNTS/all"\n'
        'mount -t overlay -o "lowerdir=$BLOCKBAK_MOUNT_1,upperdir=$BLOCKBAK_MOUNTS/upper/a,'
        'workdir=$BLOCKBAK_MOUNTS/upper/b" overlay "$BLOCKBAK_MOUNTS/all"\n'
        'echo written > "$BLOCKBAK_MOUNTS/all/new"\n'
        "sleep 1000 &\n"
    )
    check.chmod(0o755)
    report = drilled(program, point["point"], "--check", f"{check} word")
    assert [(one["number"], one["type"], one["checked"], one["mounted"]) for one in report["filesystems"]] == [
        (1, "ext4", "clean", True), (2, "xfs", "clean", True), (3, "btrfs", "clean", True),
    ]  # fmt: skip
    assert len(report["unseen"]) == 1
    assert report["unseen"][0].startswith("partition 4: it belongs to volume group vg-of-the-original")
    said = dict(
        line.partition("=")[::2] for line in report["check_output"].splitlines() if line.startswith("BLOCKBAK_")
    )
    assert said["BLOCKBAK_POINT"] == point["point"]
    assert said["BLOCKBAK_VOLUME"] == point["volume"]
    assert said["BLOCKBAK_DEVICE"].startswith("/dev/loop")
    assert [said[f"BLOCKBAK_MOUNT_{number}"] for number in (1, 2, 3)] == [
        f"{said['BLOCKBAK_MOUNTS']}/{number}" for number in (1, 2, 3)
    ]
    assert "on the first partition" in report["check_output"]
    assert report["check_status"] == 0


def test_a_volume_that_is_a_physical_volume_is_not_even_shown_as_a_device(program, loop, tmp_path):
    device = loop(8 * MIB)
    put(device, 0, pv_label("vg-of-the-original"))
    point = program.backup(device)
    before = set(scratch_loops())
    report = drilled(program, point["point"], "--check", "sh -c 'ls /sys/block/*/loop; echo \"<$BLOCKBAK_DEVICE>\"'")
    assert "<>" in report["check_output"]
    assert set(scratch_loops()) == before
    assert report["unseen"][0].startswith("the volume: it belongs to volume group vg-of-the-original")


def test_a_disk_that_boots_and_one_that_does_not(program, tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(boot_sector(b"blockbak test disk: up\r\n").ljust(MIB, b"\0"))
    point = program.backup(disk)["point"]
    report = drilled(program, point, "--boot", "--boot-pattern", "disk: [u]p", "--boot-seconds", "120")
    assert report["booted"] is True
    assert "blockbak test disk: up" in report["console"]
    assert report["seconds"]["boot"] > 0
    report = drilled(program, point, "--boot", "--boot-seconds", "1", expect=3)
    assert report["booted"] is False
    assert "'login:'" in report["differences"][0]
    assert "within 1 s" in report["differences"][0]


@pytest.mark.parametrize("kvm", ["exec sleep 100", "echo 'no KVM here' >&2; exit 1", "kill -ABRT $$"], ids=str)
def test_a_disk_boots_under_emulation_where_kvm_does_not_work(program, tmp_path, monkeypatch, kvm):
    qemu = tmp_path / "bin" / emulator.PROGRAM
    qemu.parent.mkdir()
    qemu.write_text(f'#!/bin/sh\ncase " $* " in *" -accel kvm "*) {kvm} ;; esac\nexec {which(emulator.PROGRAM)} "$@"\n')
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{qemu.parent}:{os.environ['PATH']}")
    disk = tmp_path / "disk.img"
    disk.write_bytes(boot_sector(b"blockbak test disk: up\r\n").ljust(MIB, b"\0"))
    point = program.backup(disk)["point"]
    drill = started(program, point, "--json", "--boot", "--boot-pattern", "disk: [u]p", "--boot-seconds", "24")
    said, told = drill.communicate(timeout=60)
    assert drill.returncode == 0, told
    (report,) = json.loads(said)["drills"]
    assert report["booted"] is True
    assert (report["seconds"]["boot"] > 8) is kvm.startswith("exec sleep")


def test_a_disk_that_wants_uefi_and_does_not_boot(program, tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(8 * MIB))
    run("sfdisk", "--quiet", disk, stdin="label: gpt\nsize=2M, type=U\nsize=1M\n")
    report = drilled(program, program.backup(disk)["point"], "--boot", "--boot-seconds", "1", expect=3)
    reason = "the package ovmf is not installed" if not emulator.firmware_file() else "within 1 s"
    assert report["booted"] is False
    assert reason in report["differences"][0]


# --- what is not as it should be ---------------------------------------------------------------------------


def test_errors_in_a_file_system_are_named(program, loop, ext4):
    device = loop(32 * MIB)
    made = ext4(device, "-b", "4096", "-O", "^metadata_csum")
    files(made.where, 5)
    made.unmount()
    run("debugfs", "-w", "-R", "clri /file-3", device)
    point = program.backup(device)["point"]
    report = drilled(program, point, expect=3)
    assert report["filesystems"][0]["checked"] == "errors"
    assert report["differences"][0].startswith("e2fsck found errors in the volume (ext4) (exit status 4): ")
    assert drilled(program, point, "--no-checker")["filesystems"][0]["checked"] == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--check", "sh -c 'echo no such table >&2; exit 7'"], "The check command sh ended with 7: no such table"),
        (["--check", "sleep 100", "--check-seconds", "1"], "The check command failed: sleep failed (still running after 1 s)"),
    ],
)  # fmt: skip
def test_a_check_command_that_fails_or_hangs(program, tmp_path, words, told):
    source = tmp_path / "source"
    source.write_bytes(b"\0" * MIB)
    point = program.backup(source)["point"]
    report = drilled(program, point, *words, expect=3)
    assert report["differences"] == [told] or report["differences"][0].startswith(told)
    assert report["rto_seconds"] < 60


def test_a_program_that_is_not_there_is_told_before_anything_is_restored(program, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"\0" * MIB)
    point = program.backup(source)["point"]
    assert program("drill", point, "--check", "/no/such/program", expect=1).error["name"] == "NoCheckCommand"


def test_damage_is_the_end_and_the_record_says_so(program, loop):
    device = loop(4 * MIB)
    put(device, 0, os.urandom(4 * MIB))
    point = program.backup(device)
    drilled(program, point["point"])
    damage_frame(program.image(point), 3)
    error = program("drill", point["point"], expect=4).error
    assert error["name"] == "DamagedImage"
    good, bad = [one for one in program("history").document["entries"] if one["event"] == "drilled"]
    assert (good["exit"], good["facts"]["ok"], good["facts"]["differences"]) == (0, True, [])
    assert good["facts"]["rto_seconds"] > 0
    assert (bad["exit"], bad["error"], bad["facts"]["ok"]) == (4, "DamagedImage", False)
    assert bad["facts"]["differences"] == [error["message"]]


def test_without_a_name_the_newest_point_of_each_volume_is_drilled(program, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * MIB)
    program.backup(tmp_path / "a", "--name", "a")
    points = [program.backup(tmp_path / name, "--name", name)["point"] for name in ("a", "b")]
    assert [one["point"] for one in program("drill").document["drills"]] == points


# --- where it is restored to -------------------------------------------------------------------------------


def test_a_target_is_overwritten_only_when_told_so_and_keeps_the_copy(program, loop, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * MIB))
    point = program.backup(source)["point"]
    target = loop(2 * MIB)
    assert program("drill", point, "--target", target, expect=5).error["name"] == "TargetExists"
    assert sha(target) != sha(source)
    report = drilled(program, point, "--target", target, "--yes")
    assert sha(target) == sha(source)
    assert str(target) in report["notes"][0]


def test_a_target_that_is_mounted_is_refused(program, loop, ext4, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * MIB))
    point = program.backup(source)["point"]
    made = ext4(loop(32 * MIB))
    assert program("drill", point, "--target", made.device, "--yes", expect=5).error["name"] == "TargetInUse"


def test_a_scratch_directory_without_room_is_told_before_anything_is_written(program, tmpfs, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * MIB))
    point = program.backup(source)["point"]
    small = tmpfs("16m")
    error = program("drill", point, "--scratch", small, expect=1).error
    assert error["name"] == "NoDrillRoom"
    assert error["fields"]["needed"] > error["fields"]["free"]
    assert list(small.iterdir()) == []
    drilled(program, point, "--scratch", tmpfs("128m"))


def test_scratch_in_the_repository_is_refused(program, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(MIB))
    point = program.backup(source)["point"]
    assert program("drill", point, "--scratch", program.repository, expect=5).error["name"] == "TargetHolds"


# --- killed ------------------------------------------------------------------------------------------------


@pytest.fixture
def slow_disk(program, loop, tmp_path):
    """A point whose drill takes a second or so; its check command leaves a process behind that would go on."""
    disk = loop(400 * MIB)
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, stdin="label: gpt\nsize=40M\nsize=310M\n")
    with partitions(disk, 2) as (ext4, xfs):
        run("mkfs.ext4", "-q", ext4)
        run("mkfs.xfs", "-q", "-f", xfs)
        with mounted(ext4, tmp_path / "m"):
            files(tmp_path / "m", 20)
    return program.backup(disk)["point"]


def started(program, *words):
    argv = [sys.executable, "-P", "-m", "blockbak", "-r", program.repository, "drill", *words]
    return subprocess.Popen(
        argv, env=environment(program.repository) | {"BLOCKBAK_STATE_DIR": str(program.state)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lingering(mark):
    """Processes of a check command."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in words:
            found.append(entry.parts[2])
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_drill_that_is_killed_at_any_moment_leaves_nothing(program, slow_disk, rng: random.Random, number):
    mark = f"{os.getpid()}.{rng.randrange(10**6)}"
    check = f"sh -c 'setsid sleep {mark} & sleep 0.5' sh {mark}"
    clock = time.monotonic()
    whole = started(program, slow_disk, "--check", check)
    assert whole.wait(60) == 0, whole.communicate()
    seconds = time.monotonic() - clock
    whole.communicate()
    assert settle_soon(lambda: not lingering(mark))
    # One in each quarter of the time that there is something to leave.
    moments = [(0.25 + 0.75 * (quarter + rng.random()) / 4) * seconds for quarter in range(4)]
    ended = []
    for moment in moments:
        child = started(program, slow_disk, "--check", check)
        try:
            child.wait(moment)
        except subprocess.TimeoutExpired:
            child.send_signal(number)
        _, said = child.communicate(timeout=30)
        ended.append(child.returncode)
        # -2: before it had come so far as to catch it.
        assert child.returncode in (0, 130, -signal.SIGINT, -number), said
        assert settle_soon(lambda: not scratch_loops() and not lingering(mark)), (
            f"after {moment:.2f} s of {seconds:.2f}"
        )
    assert any(code != 0 for code in ended)
    assert drilled(program, slow_disk)["differences"] == []


def settle_soon(question):
    late = time.monotonic() + 10
    while not question():
        if time.monotonic() > late:
            return False
        time.sleep(0.02)
    return True


def test_what_a_kill_leaves_between_making_scratch_and_taking_its_name_is_swept(program, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(MIB))
    point = program.backup(source)["point"]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / ".blockbak-drill-1-0a0b0c0d").touch()
    (scratch / ".blockbak-drill-of-a-person").write_text("not empty, so not ours")
    drilled(program, point, "--scratch", scratch)
    assert [path.name for path in scratch.iterdir()] == [".blockbak-drill-of-a-person"]
    (scratch / ".blockbak-drill-of-a-person").unlink()
