"""Cold images of what is in use here: mounts and processes, brought to rest and put back, into points and files."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.host.stage import MIB, Oracle, attached, mounted, other_process, run, settle, sha, spare_node

SIZE = 48 * MIB


def mounts(disk):
    """Where a device is mounted, and with which options."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((one[4], one[5]) for one in lines if str(disk) in one)


@pytest.fixture
def srv(loop, ext4):
    """A mounted ext4 with a file in it: the device, and where it is seen."""
    disk = loop(SIZE)
    made = ext4(disk)
    made.unmount()
    made.options = "noatime,nodev"
    made.mount()
    (made.where / "file").write_bytes(os.urandom(MIB))
    return disk, made.where


def sitting(where):
    return other_process("import os, sys; os.chdir(sys.argv[1]); print('ready', flush=True); sys.stdin.read()", where)


def writing(where):
    code = "import sys; f = open(sys.argv[1] + '/log', 'a'); print('ready', flush=True); sys.stdin.read()"
    return other_process(code, where)


@contextmanager
def nothing_changes(disk):
    before = mounts(disk)
    yield
    assert mounts(disk) == before


def test_a_mounted_device_is_unmounted_imaged_and_mounted_again(srv, program, tmp_path, loop):
    disk, where = srv
    with nothing_changes(disk):
        planned = program("backup", "--mode", "cold", "--dry-run", disk).document["points"][0]
        assert f"1. unmount {where}" in planned["notes"]
        made = program.backup(disk, "--mode", "cold")
    assert (made["mode"], made["consistency"]) == ("cold", "cold")
    target = loop(SIZE)
    program.restore(made["point"], target)
    # It was clean when it was read: there is no journal to replay.
    assert subprocess.run(["e2fsck", "-fn", target.path], check=False, capture_output=True).returncode == 0
    with mounted(target, tmp_path / "restored", "-o", "ro") as there:
        assert sha(there / "file") == sha(where / "file")


def test_the_same_into_a_plain_file(srv, program, tmp_path):
    disk, where = srv
    image = tmp_path / "disk.img"
    with nothing_changes(disk), sitting(where):
        plan = program("cold", disk, image, "--dry-run").document["plan"]
        assert plan["rest"] == [f"1. remount {where} read-only", f"stays: {where} (read-only)"]
        made = program("cold", disk, image).document
    assert made["consistency"] == "cold"
    assert json.loads(Path(f"{image}.json").read_text())["stopped"] == [f"{where} takes no writes."]
    program("verify", image)
    adopted = program("adopt", image).document
    # What was mounted since then is all that changed.
    after = program.backup(disk, "--mode", "cold")
    assert (after["kind"], after["parent"]) == ("incremental", adopted["point"])
    assert after["changed_bytes"] < MIB


def test_a_writer_is_in_the_way_unless_it_may_be_ended_or_frozen(srv, program, tmp_path):
    disk, where = srv
    with nothing_changes(disk), writing(where) as pid:
        error = program("backup", "--mode", "cold", disk, expect=5).error
        assert error["name"] == "CannotRest"
        assert f"process {pid}" in error["message"]
        assert program("cold", disk, tmp_path / "x.img", expect=5).error["name"] == "CannotRest"
        assert program.backup(disk, "--mode", "cold", "--freeze")["consistency"] == "cold"
        assert program.backup(disk, "--mode", "cold", "--kill")["consistency"] == "cold"
        assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_holds_the_repository_or_the_image_stays(srv, program, tmp_path):
    disk, where = srv
    (where / "images").mkdir()
    with nothing_changes(disk):
        error = program("cold", disk, where / "images" / "x.img", expect=5).error
        assert "lies on" in error["message"] or "holds" in error["message"]
    # What it is a mount point for belongs to it too, though it lies elsewhere.
    beside = tmp_path / "beside"
    beside.mkdir()
    with mounted(beside, where / "images", "--bind"), nothing_changes(disk):
        error = program("cold", disk, where / "images" / "x.img", expect=5).error
        assert (error["name"], "the image" in error["message"]) == ("CannotRest", True)


def test_mounts_that_go_by_propagation_come_back_with_their_own_flags(loop, program, tmp_path):
    """A bind mount that is read-only in one place and not in the other, of which one goes with the other."""
    disk = loop(SIZE)
    run("mkfs.ext4", "-q", disk)
    first, second = tmp_path / "first", tmp_path / "second"
    with mounted("shared", first, "-t", "tmpfs"):
        run("mount", "--make-shared", first)
        with mounted(first, second, "--bind"), mounted(disk, first / "x"):
            (first / "x" / "sub").mkdir()
            with mounted(first / "x" / "sub", first / "b", "--bind"):
                run("mount", "-o", "remount,bind,ro,noexec", first / "b")
                with nothing_changes(disk):
                    assert program.backup(disk, "--mode", "cold")["consistency"] == "cold"


def test_a_subvolume_whose_name_has_a_comma_comes_back(loop, program, tmp_path):
    disk = loop(128 * MIB)
    run("mkfs.btrfs", "-q", disk)
    where = tmp_path / "where"
    with mounted(disk, where):
        run("btrfs", "subvolume", "create", where / "a,b c")
    with mounted(disk, where, "-o", "subvolid=256,noatime"), nothing_changes(disk):
        (where / "file").touch()
        program.backup(disk, "--mode", "cold")
        assert (where / "file").exists()


def test_another_device_under_the_same_node_is_not_mounted_in_its_place(loop, program, tmp_path):
    """A disk that was unplugged after blockbak was killed, and another one that came under its name."""
    where, image, other = tmp_path / "where", tmp_path / "disk.img", tmp_path / "other.img"
    for file in (image, other):
        file.touch()
        os.truncate(file, SIZE)
        run("mkfs.ext4", "-q", file)
    where.mkdir()
    with attached(image) as node:
        run("mount", node, where)
        argv = [sys.executable, "-m", "blockbak", "cold", "--limit", "2M", node, str(tmp_path / "out.img")]
        env = {**os.environ, "BLOCKBAK_STATE_DIR": str(program.state), "BLOCKBAK_RUN_DIR": str(tmp_path / "run")}
        with subprocess.Popen(argv, env=env, stderr=subprocess.DEVNULL) as killed:
            assert settle(lambda: not where.is_mount() and (tmp_path / "out.img.partial").exists(), 30)
            killed.kill()
    with attached(other, node=node):
        left = program("recover", "--machine", expect=3).document["left"]
        assert any("is not there any more" in line for line in left), left
        assert not where.is_mount()
    with attached(image):
        program("recover", "--machine")
        assert where.is_mount()
        run("umount", where)


def test_a_file_system_that_a_program_serves_is_refused_even_with_leave_to_end_it(loop, program, tmp_path):
    disk = loop(SIZE)
    run("mkfs.ntfs", "-Q", "-F", disk)
    # mount.ntfs-3g unmounts when it is told to end, and what mounted it is nobody's to start again.
    with mounted(disk, tmp_path / "where", "-t", "ntfs-3g"), nothing_changes(disk):
        for words in ((), ("--kill",)):
            error = program("cold", *words, disk, tmp_path / "x.img", expect=5).error
            assert error["name"] == "CannotRest"
            assert "a program serves it" in error["message"]
        assert not (tmp_path / "x.img").exists()


def test_who_holds_the_device_for_a_moment_is_waited_for(srv, program, tmp_path):
    disk, _ = srv
    # As of somebody who asks again and again whether the device is free: before it is read, and before it is mounted.
    code = """import os, select, sys, time
print('ready', flush=True)
while not select.select([sys.stdin], [], [], 0.002)[0]:
    try:
        held = os.open(sys.argv[1], os.O_RDONLY | os.O_EXCL)
    except OSError:
        continue
    time.sleep(1)
    os.close(held)
    time.sleep(1)
"""
    with nothing_changes(disk), other_process(code, disk):
        program("cold", disk, tmp_path / "x.img")


def test_a_loop_device_is_not_taken_for_one_whose_name_begins_like_it(srv, program, tmp_path):
    disk, where = srv
    (where / "disk").write_bytes(bytes(MIB))
    with ExitStack() as undo:
        short = undo.enter_context(spare_node())
        first = 10 * int(short.removeprefix("/dev/loop"))
        longer = undo.enter_context(spare_node(range(first, first + 10)))
        undo.enter_context(attached(where / "disk", node=short))
        told = program("cold", "--dry-run", disk, tmp_path / "x.img").document["plan"]["rest"]
        assert told[0] == f"1. detach {short} from {where / 'disk'}"
        with attached(disk, node=longer), nothing_changes(disk):
            error = program("cold", disk, tmp_path / "x.img", expect=5).error
            assert (error["name"], longer in error["message"]) == ("CannotRest", True)
        program("cold", disk, tmp_path / "x.img")


def test_an_idle_device_needs_no_rest(loop, program, seed):
    disk = loop(SIZE)
    Oracle(disk, SIZE, seed).write((0, MIB))
    made = program.backup(disk, "--mode", "cold")
    assert made["consistency"] == "cold"
    assert not any("unmount" in note for note in made["notes"])


def test_words_of_rest_belong_to_the_cold_mode(loop, program):
    done = subprocess.run(
        [sys.executable, "-m", "blockbak", "-r", "/nowhere", "backup", "--kill", loop(MIB).path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--kill belongs to --mode cold" in done.stderr
