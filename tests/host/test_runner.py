"""Programs are run as asked, end when they must, and fail with a sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from blockbak.errors import CommandFailed, Interrupted, MissingProgram
from blockbak.host import runner


def python(code):
    return [sys.executable, "-c", code]


def ended(pid, seconds=3.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_output_and_messages_are_kept_apart():
    done = runner.run(python("import sys; print('out'); print(' err ', file=sys.stderr)"))
    assert (done.stdout, done.output, done.stderr, done.status) == ("out\n", b"out\n", "err", 0)


def test_arguments_are_no_shell_words():
    done = runner.run([*python("import sys; print(sys.argv[1:])"), "a b", "$HOME", "; false", "*"])
    assert done.stdout == "['a b', '$HOME', '; false', '*']\n"


def test_bytes_that_are_not_text_survive():
    done = runner.run(python("import sys; sys.stdout.buffer.write(bytes([255, 0, 10]))"))
    assert done.output == b"\xff\x00\n"
    assert done.stdout.encode("utf-8", "surrogateescape") == done.output


def test_input_and_its_absence():
    copy = python("import sys; sys.stdout.write(sys.stdin.read())")
    assert runner.run(copy, input=b"hello").stdout == "hello"
    assert runner.run(copy, input=b"").stdout == ""
    assert runner.run(copy).stdout == ""
    assert runner.run(python("import os; print(os.readlink('/proc/self/fd/0'))")).stdout == "/dev/null\n"


def test_much_in_and_out_does_not_block():
    copy = python(
        "import sys, shutil; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer); print('x' * 300000, file=sys.stderr)"
    )
    data = os.urandom(1 << 20) * 8
    done = runner.run(copy, input=data)
    assert done.output == data
    assert len(done.stderr) == 300000


def test_messages_are_in_one_language(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    show = python(
        "import os; print(os.environ['LC_ALL'], os.environ.get('LANGUAGE'), os.environ.get('LANG'), os.environ.get('MORE'))"
    )
    assert runner.run(show, env={"MORE": "yes"}).stdout == "C None None yes\n"


def test_no_descriptor_is_inherited():
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(descriptor, True)  # noqa: FBT003 - the standard library's own
    try:
        listed = runner.run(python("import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))")).stdout
    finally:
        os.close(descriptor)
    # The fourth is the listing's own.
    assert listed == "[0, 1, 2, 3]\n"


def test_descriptors_are_given_back():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        runner.run(["true"])
        with pytest.raises(CommandFailed):
            runner.run(["false"])
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_failure_has_the_program_its_status_and_its_words():
    with pytest.raises(CommandFailed) as caught:
        runner.run(python("import sys; print('no such group', file=sys.stderr); sys.exit(5)"))
    assert caught.value.fields["status"] == 5
    assert caught.value.fields["stderr"] == "no such group"
    assert caught.value.fields["program"] == Path(sys.executable).name


def test_a_status_may_be_accepted():
    done = runner.run(python("import sys; sys.exit(1)"), accept=(0, 1))
    assert done.status == 1


def test_only_the_end_of_many_words_is_kept():
    with pytest.raises(CommandFailed) as caught:
        runner.run(python("import sys; print('a' * 10000 + 'the reason', file=sys.stderr); sys.exit(1)"))
    assert caught.value.fields["stderr"].endswith("athe reason")
    assert len(caught.value.fields["stderr"]) == runner.STDERR_TAIL


def test_a_signal_is_told_by_name():
    with pytest.raises(CommandFailed, match="killed by SIGSEGV"):
        runner.run(python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"))


def test_a_missing_program_is_told_with_its_package():
    with pytest.raises(MissingProgram) as caught:
        runner.run(["thin_delta_of_nobody"])
    assert caught.value.fields == {"program": "thin_delta_of_nobody", "package": "thin_delta_of_nobody"}
    with pytest.raises(MissingProgram):
        runner.run(["/nonexistent/lvs"])
    assert runner.package_of("lvs") == "lvm2"
    assert runner.package_of("partclone.ext4") == "partclone"


def test_what_cannot_be_started_is_a_failure(tmp_path):
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x7fELF not really")
    odd.chmod(0o755)
    with pytest.raises(CommandFailed, match="not started"):
        runner.run([str(odd)])


def test_the_system_directories_are_searched_whatever_path_says(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert runner.which("losetup") is not None
    assert runner.which("no such program") is None
    assert "/usr/sbin" in runner.run(["sh", "-c", "echo $PATH"]).stdout


def test_a_late_program_ends_with_all_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('some output', flush=True)\n"
        "print('some words', file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    with pytest.raises(CommandFailed, match=r"still running after 1 s.*some words"):
        runner.run(python(code), deadline=1)
    assert time.monotonic() - started < 1 + runner.GRACE_SECONDS
    assert all(ended(int(pid)) for pid in pids.read_text().split())


def test_a_program_that_will_not_end_is_killed():
    started = time.monotonic()
    with pytest.raises(CommandFailed, match=r"still running after 0\.5 s"):
        runner.run(["sh", "-c", "trap '' TERM; sleep 60"], deadline=0.5)
    assert time.monotonic() - started < 0.5 + runner.GRACE_SECONDS + 2


def test_a_program_asked_to_end_may_clean_up_first(tmp_path):
    left = tmp_path / "left"
    with pytest.raises(CommandFailed):
        runner.run(["sh", "-c", f"trap 'echo clean >{left}; exit 0' TERM; sleep 60 & wait"], deadline=0.5)
    assert left.read_text() == "clean\n"


def test_a_daemon_left_behind_is_not_waited_for(tmp_path):
    pid = tmp_path / "pid"
    started = time.monotonic()
    done = runner.run(["sh", "-c", f"sleep 30 & echo $! >{pid}; echo done"])
    assert done.stdout == "done\n"
    assert time.monotonic() - started < 5
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_an_interrupted_wait_ends_the_program(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def interrupt():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        runner.run(python(code))
    thread.join()
    assert ended(int(pid.read_text()))


def test_one_who_looks_may_stop_it(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def check():
        if pid.exists() and pid.read_text():
            raise Interrupted(state="as asked")

    started = time.monotonic()
    with pytest.raises(Interrupted, match="as asked"):
        runner.run(python(code), check=check)
    assert time.monotonic() - started < 10
    assert ended(int(pid.read_text()))


def test_while_it_runs_somebody_looks_now_and_then():
    looks = []
    assert runner.run(["sleep", "1"], check=lambda: looks.append(1)).status == 0
    assert 2 <= len(looks) <= 10
    with pytest.raises(CommandFailed, match=r"still running after 0\.5 s"):
        runner.run(["sleep", "60"], deadline=0.5, check=lambda: looks.append(1))


def test_a_signal_that_raises_nothing_does_not_end_the_wait():
    came = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: came.append(number))
    try:
        done = runner.run(["sh", "-c", f"kill -USR1 {os.getpid()}; sleep 0.3; echo done"])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert came == [signal.SIGUSR1]
    assert done.stdout == "done\n"
