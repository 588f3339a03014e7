"""What blockbak makes for itself is made whole and taken down whole, whatever signals come."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from blockbak.errors import CommandFailed
from blockbak.host import scratch
from blockbak.host.signals import ENDING, undisturbed


@pytest.fixture
def heard():
    """The signals that came through, in a handler of the test's own."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ENDING}
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def breaks_in(number, frame):
    raise KeyboardInterrupt


# --- signals -----------------------------------------------------------------------------------


def test_signals_wait_until_it_is_over(heard):
    handlers = [signal.getsignal(number) for number in ENDING]
    with undisturbed():
        send(signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
        assert heard == []
    assert sorted(heard) == sorted(ENDING)
    assert [signal.getsignal(number) for number in ENDING] == handlers


def test_they_come_through_to_the_work_in_between(heard):
    with undisturbed() as through:
        send(signal.SIGTERM)
        assert heard == []
        with through():
            assert heard == [signal.SIGTERM]
            send(signal.SIGINT)
            assert heard == [signal.SIGTERM, signal.SIGINT]
        send(signal.SIGHUP)
        assert heard == [signal.SIGTERM, signal.SIGINT]
    assert heard == [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def test_inside_another_they_wait_for_the_outer(heard):
    with undisturbed():
        with undisturbed() as through, through():
            send(signal.SIGINT)
        assert heard == []
    assert heard == [signal.SIGINT]


def test_one_that_raises_does_so_at_the_end_and_leaves_the_handlers_as_they_were(heard):
    signal.signal(signal.SIGINT, breaks_in)
    done = []

    def work():
        with undisturbed():
            send(signal.SIGINT)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done
    assert signal.getsignal(signal.SIGINT) is breaks_in


def test_an_ignored_signal_stays_ignored(heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with undisturbed() as through, through():
        send(signal.SIGHUP)
    assert heard == []
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_another_thread_is_never_broken_into(heard):
    done = []

    def work():
        with undisturbed() as through, through():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


# --- a folder ------------------------------------------------------------------------------------


def test_a_folder_is_its_owners_alone_and_goes_with_all_in_it(tmp_path):
    with scratch.folder(str(tmp_path), ".mine-") as path:
        assert Path(path).parent == tmp_path
        assert Path(path).name.startswith(".mine-")
        assert Path(path).stat().st_mode & 0o777 == 0o700
        (Path(path) / "deep").mkdir()
        (Path(path) / "deep" / "file").write_text("x")
    assert os.listdir(tmp_path) == []


def test_a_folder_goes_though_a_signal_comes_while_it_is_removed(tmp_path, heard):
    signal.signal(signal.SIGINT, breaks_in)

    def interrupt(path):
        while path.exists():
            time.sleep(0)
        send(signal.SIGINT)

    def work():
        with scratch.folder(str(tmp_path), "x") as path:
            for number in range(2000):
                (Path(path) / str(number)).write_text("x")
            thread = threading.Thread(target=interrupt, args=(Path(path) / os.listdir(path)[0],))
            thread.start()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert os.listdir(tmp_path) == []


def test_the_first_error_stays_and_hears_of_the_second(tmp_path):
    def work(error):
        with scratch.folder(str(tmp_path), "x") as path:
            os.rmdir(path)
            if error is not None:
                raise error

    with pytest.raises(ValueError, match="first") as caught:
        work(ValueError("first"))
    assert "Cleaning up failed too" in caught.value.__notes__[0]
    with pytest.raises(FileNotFoundError):
        work(None)


# --- devices -------------------------------------------------------------------------------------


def loops(file):
    return [
        entry
        for entry in Path("/sys/block").glob("loop*/loop/backing_file")
        if entry.read_text().strip().startswith(str(file))
    ]


def test_a_device_and_its_mount_are_taken_down_though_signals_come(as_root, tmp_path, heard):
    """An umount and a losetup in whose middle, each, a signal comes."""
    file, where, tools = tmp_path / "disk", tmp_path / "mnt", tmp_path / "tools"
    tools.mkdir()
    signal.signal(signal.SIGTERM, breaks_in)

    def work(patch):
        with scratch.loop_device(str(file), 16 << 20) as node:
            scratch.make_ext4(node)
            with scratch.mounted(node, str(where)):
                for name in ("umount", "losetup"):
                    real = shutil.which(name)
                    (tools / name).write_text(f'#!/bin/sh\nkill -TERM {os.getpid()}\nsleep 0.2\nexec {real} "$@"\n')
                    (tools / name).chmod(0o755)
                patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        work(patch)
    assert not os.path.ismount(where)
    assert not file.exists()
    assert loops(file) == []


def test_a_mount_that_somebody_keeps_goes_when_they_let_go(as_root, tmp_path, monkeypatch):
    file, where = tmp_path / "disk", tmp_path / "mnt"
    monkeypatch.setattr(scratch, "_TRIES", 2)
    with scratch.loop_device(str(file), 16 << 20) as node:
        scratch.make_ext4(node)
        with pytest.raises(CommandFailed, match="umount"), scratch.mounted(node, str(where)):
            descriptor = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
        assert not os.path.ismount(where)
        os.close(descriptor)


def test_making_a_file_system_can_be_stopped(as_root, tmp_path):
    def stop():
        raise ValueError("stop")

    with scratch.loop_device(str(tmp_path / "disk"), 64 << 20) as node:
        tools = tmp_path / "tools"
        tools.mkdir()
        (tools / "mkfs.ext4").write_text("#!/bin/sh\nexec sleep 60\n")
        (tools / "mkfs.ext4").chmod(0o755)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
            with pytest.raises(ValueError, match="stop"):
                scratch.make_ext4(node, stop)


# --- what the killed leave ---------------------------------------------------------------------


def test_only_what_the_killed_left_is_swept(tmp_path):
    dead, empty, foreign = (tmp_path / f".blockbak-{name}" for name in ("dead", "empty", "foreign"))
    for path in (dead, empty, foreign):
        path.mkdir(0o700)
    (dead / "raw.partial").write_bytes(b"half")
    (foreign / "raw").write_bytes(b"whole")
    (foreign / "letter").write_bytes(b"mine")
    with scratch.folder(str(tmp_path), ".blockbak-") as alive:
        Path(alive, "raw").write_bytes(b"at work")
        assert scratch.sweep(str(tmp_path), ".blockbak-", ("raw", "raw.partial")) == [str(dead)]
        assert Path(alive, "raw").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".blockbak-empty", ".blockbak-foreign"]
