"""Who uses a device, seen on real mounts: stacked, bound, in other namespaces, in loop devices on files."""

import mmap
import os
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

from blockbak.host import occupants
from blockbak.host.device import look
from blockbak.model.quiesce import RestOptions, plan
from tests.host.stage import attached, mounted, run

MIB = 1 << 20


@contextmanager
def python(code, *words, prefix=()):
    """A process that does something, says so, and stays until it is let go; its pid."""
    code = f"import os, sys; {code}; print('ready', flush=True); sys.stdin.read()"
    argv = [*prefix, sys.executable, "-c", code, *map(str, words)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process.pid
        finally:
            process.communicate("")


def scene(disk, kept=None):
    return occupants.look(look(str(disk)), kept or {})


def occupant(found, pid):
    (one,) = [one for one in found.occupants if one.pid == pid]
    return one


@pytest.fixture
def srv(loop, ext4):
    """A mounted ext4: the device and where it is seen."""
    disk = loop(64 * MIB)
    return disk, ext4(disk).where


HOLDING = {
    "a working directory": ("os.chdir(sys.argv[1])", "working directory", False),
    "a file that is read": ("f = open(sys.argv[1] + '/f')", "has open", False),
    "a file that is written": ("f = open(sys.argv[1] + '/f', 'a')", "writes", True),
    "a directory": ("f = os.open(sys.argv[1], os.O_RDONLY)", "has open", False),
    # Not by the mmap module: it keeps the file open.
    "a mapping whose file is closed": (
        ("import ctypes; f = os.open(sys.argv[1] + '/f', os.O_RDWR); "
        "ctypes.CDLL(None).mmap(None, ctypes.c_size_t(4096), 3, 1, f, ctypes.c_long(0)); os.close(f)"),
        "has mapped", True,
    ),
    "a socket": (
        "import socket; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1] + '/s')", "socket", False,
    ),
    "a file without a name": ("f = open(sys.argv[1] + '/g', 'w'); os.unlink(sys.argv[1] + '/g')", "writes", True),
}  # fmt: skip


@pytest.mark.parametrize("how", HOLDING)
def test_a_process_is_found_by_whatever_it_holds(srv, how):
    disk, where = srv
    (where / "f").write_bytes(bytes(mmap.PAGESIZE))
    code, words, writes = HOLDING[how]
    with python(code, where) as pid:
        one = occupant(scene(disk), pid)
    assert one.mounts
    assert bool(one.writes) is writes
    assert any(words in reason for reason in one.reasons), one.reasons


def test_who_holds_nothing_of_it_is_no_occupant(srv, tmp_path):
    disk, _ = srv
    with python("os.chdir(sys.argv[1])", tmp_path) as pid:
        assert pid not in {one.pid for one in scene(disk).occupants}


@pytest.mark.parametrize(("flags", "writes"), [("os.O_RDONLY", False), ("os.O_RDWR", True)])
def test_a_raw_node_that_is_open_is_seen(loop, flags, writes):
    disk = loop(8 * MIB)
    with python(f"f = os.open(sys.argv[1], {flags})", disk) as pid:
        found = scene(disk)
        one = occupant(found, pid)
        assert one.nodes == {os.path.basename(str(disk))}
        assert bool(one.raw_writes) is writes
        assert bool(plan(found, RestOptions()).blocked) is writes


def steps(disk):
    made = plan(scene(disk), RestOptions())
    assert made.blocked == ()
    return [str(step) for step in made.steps]


def test_a_bind_mount_and_what_is_mounted_on_top_belong_to_it(srv, tmp_path, loop):
    disk, where = srv
    (where / "sub").mkdir()
    other = loop(16 * MIB)
    run("mkfs.ext4", "-q", other)
    bound, top = tmp_path / "bound", where / "top"
    with mounted(where / "sub", bound, "--bind"), mounted(other, top):
        made = plan(scene(disk), RestOptions())
    assert [str(step) for step in made.steps] == [f"unmount {one}" for one in (top, bound, where)]
    assert {step.target: step.origin for step in made.steps}[str(bound)] == str(where / "sub")


@pytest.mark.parametrize("what", [("scratch", "-t", "tmpfs"), ("/dev/pts", "--bind"), ("none", "-t", "proc")])
def test_what_could_not_be_mounted_with_its_content_again_stays(srv, what):
    """What is in memory would be gone: nothing is taken off, and the file system below takes no writes."""
    disk, where = srv
    source, *options = what
    with mounted(source, where / "top", *options):
        assert steps(disk) == [f"remount {where} read-only"]


def test_a_file_without_a_name_is_not_let_go_of(srv, tmp_path):
    disk, where = srv
    (where / "gone").write_text("only here")
    (tmp_path / "seen").touch()
    run("mount", "--bind", where / "gone", tmp_path / "seen")
    try:
        (where / "gone").unlink()
        assert steps(disk) == [f"unmount {where}", f"remount {tmp_path / 'seen'} read-only"]
    finally:
        run("umount", tmp_path / "seen")
    image = where / "inner.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    with attached(image) as inner:
        image.unlink()
        image.write_bytes(b"another file of that name")
        (blocked,) = plan(scene(disk), RestOptions()).blocked
        assert inner in blocked.why


def test_an_overlay_keeps_what_it_is_made_of(srv, tmp_path):
    disk, where = srv
    for name in ("lower", "upper", "work"):
        (where / name).mkdir()
    layers = ",".join(f"{key}={where / name}" for key, name in
                      (("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")))  # fmt: skip
    with mounted("overlay", tmp_path / "merged", "-t", "overlay", "-o", layers):
        assert steps(disk) == [f"remount {where} read-only"]


def test_blockbak_does_not_freeze_what_it_writes_to(srv):
    disk, where = srv
    with (where / "log").open("w"):
        (blocked,) = plan(scene(disk), RestOptions(freeze=True, kill=True, stop_users=True)).blocked
    assert "blockbak itself" in blocked.why


def test_a_file_without_a_name_that_is_only_read_is_a_write_to_come(srv):
    disk, where = srv
    (where / "f").touch()
    with python("f = open(sys.argv[1] + '/f'); os.unlink(sys.argv[1] + '/f')", where) as pid:
        assert occupant(scene(disk), pid).writes


def test_what_takes_the_image_out_of_a_pipe_is_not_ended(srv):
    disk, where = srv
    with subprocess.Popen(["sleep", "100"], cwd=where) as beside:
        try:
            assert "job" in occupant(scene(disk), beside.pid).protected
        finally:
            beside.kill()


UNSHARED = ("unshare", "--mount", "--propagation", "slave")


@pytest.mark.parametrize("how", ["remount,bind,ro", "", "--bind elsewhere"])
def test_a_service_that_sees_it_otherwise_keeps_it(srv, tmp_path, how):
    """What systemd makes of ProtectHome= and the like: it would not come back as it was."""
    disk, where = srv
    outside = tmp_path / "shared"
    (tmp_path / "container").mkdir()
    with mounted("shared", outside, "-t", "tmpfs"):
        run("mount", "--make-shared", outside)
        with mounted(disk, outside / "there"):
            command = {
                "": "['true']",
                "remount,bind,ro": f"['mount', '-o', 'remount,bind,ro', {str(outside / 'there')!r}]",
                "--bind elsewhere": f"['mount', '--bind', {str(outside / 'there')!r}, {str(tmp_path / 'container')!r}]",
            }[how]
            code = f"import subprocess; subprocess.run({command}, check=True)"
            run("umount", where)
            with python(code, prefix=UNSHARED) as pid:
                found = scene(disk)
                made = plan(found, RestOptions())
                if not how:
                    assert [str(step) for step in made.steps] == [f"unmount {outside / 'there'}"]
                    assert pid not in {one.pid for one in found.occupants}
                else:
                    assert [str(step) for step in made.steps] == [f"remount {outside / 'there'} read-only"]
                    assert any("mount namespace of its own" in reason for reason in occupant(found, pid).reasons)
            run("mount", disk, where)


def test_a_loop_device_on_a_file_of_it_belongs_to_it(srv, tmp_path):
    disk, where = srv
    image = where / "inner.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    run("mkfs.ext4", "-q", image)
    with attached(image) as inner, mounted(inner, tmp_path / "inner") as there:
        made = plan(scene(disk), RestOptions())
    assert [str(step) for step in made.steps] == [
        f"unmount {there}", f"detach {inner} from {image}", f"unmount {where}",
    ]  # fmt: skip
    assert made.blocked == ()


def test_a_mount_that_another_namespace_keeps_is_told_with_who_has_it(srv):
    disk, where = srv
    with python("pass", prefix=("unshare", "--mount", "--propagation", "private")) as pid:
        one = occupant(scene(disk), pid)
    assert any(f"has {where} mounted" in reason for reason in one.reasons)


def test_a_mount_that_only_another_namespace_has_stands_against_it(loop, tmp_path):
    disk = loop(64 * MIB)
    run("mkfs.ext4", "-q", disk)
    inside = tmp_path / "inside"
    inside.mkdir()
    code = "import subprocess; subprocess.run(['mount', sys.argv[1], sys.argv[2]], check=True)"
    with python(code, disk, inside, prefix=("unshare", "--mount", "--propagation", "private")) as pid:
        found = scene(disk)
        assert occupant(found, pid).elsewhere == {str(inside)}
        (blocked,) = plan(found, RestOptions()).blocked
        assert str(pid) in blocked.why


def test_what_holds_the_repository_is_known_by_its_mount(srv):
    disk, where = srv
    (where / "repo").mkdir()
    made = plan(scene(disk, {str(where / "repo"): "the repository"}), RestOptions())
    assert "the repository" in made.blocked[0].why


def test_it_is_found_again_by_its_identity(srv):
    disk, _ = srv
    (mount,) = scene(disk).mounts
    assert occupants.find(mount.identity) == str(disk)
    assert occupants.find("file /nowhere") == ""


def test_an_address_of_the_network_is_no_name_of_a_file(srv):
    disk, _ = srv
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("\0blockbak-test")
        assert scene(disk).occupants == ()
