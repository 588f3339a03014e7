"""A device is brought to rest and all is put back: done to its end, failed on the way, killed at every moment."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import psutil
import pytest

from blockbak.errors import (
    CannotRest,
    CommandFailed,
    FrozenAlready,
    HookFailed,
    HookStopped,
    Interrupted,
    NotAtRest,
    RestVoid,
    StateUnusable,
    StillInUse,
    UnitRestarted,
)
from blockbak.host import bootunit, quiesce
from blockbak.host.runner import Completed
from blockbak.host.system import System
from blockbak.model.quiesce import (
    Blocked,
    Deactivate,
    DetachLoop,
    Freeze,
    Plan,
    ReadOnly,
    RunHook,
    StopUnits,
    SwapOff,
    Unexport,
    Unmount,
)  # fmt: skip
from tests.resting import CountedKernel, Moments, furnish, hook_in, in_child, process_step, sh, stage_in


@pytest.fixture
def stage(as_root, tmp_path, monkeypatch):
    for made in stage_in(tmp_path):
        monkeypatch.setenv("PATH", f"{made.systemd.directory}/bin{os.pathsep}{os.environ['PATH']}")
        yield made


def phases(stage):
    path = stage.directory / "hook.log"
    return path.read_text().split() if path.exists() else []


# --- to its end --------------------------------------------------------------------------------------------


def test_everything_is_at_rest_and_then_as_it_was(stage):
    furnish(stage)
    before = stage.picture()
    with stage.resting() as rest:
        rest.verify()
        targets = {line.target for line in System().mounts}
        assert not targets & {step.target for step in stage.steps if isinstance(step, Unmount)}
        assert not [step for step in stage.steps if isinstance(step, SwapOff) and step.path in System().swaps]
        assert stage.systemd.states() == dict.fromkeys(("db.service", "db.socket", "idle.service"), "inactive")
        still = next(step for step in stage.steps if isinstance(step, ReadOnly))
        with pytest.raises(OSError, match="Read-only"):
            Path(still.target, "x").touch()
        frozen = next(step for step in stage.steps if isinstance(step, Freeze))
        with subprocess.Popen(["touch", f"{frozen.target}/x"]) as writer:
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(0.3)
            sh("fsfreeze", "--unfreeze", frozen.target)
        assert list((stage.directory / "state/rest").glob("*.journal"))
        assert list((stage.directory / "units").rglob("*.service"))
    assert stage.picture() == before
    assert (rest.left, rest.hook_error, rest.in_time) == ([], None, True)
    assert phases(stage) == ["begin", "end"]
    stage.nothing_left()


def test_after_an_error_in_the_body_all_is_as_it_was(stage):
    furnish(stage)
    before = stage.picture()
    with pytest.raises(ZeroDivisionError) as caught, stage.resting():
        raise ZeroDivisionError
    assert stage.picture() == before
    assert getattr(caught.value, "__notes__", []) == []
    stage.nothing_left()


def test_a_wish_to_stop_is_heard_between_any_two_steps(stage):
    furnish(stage)
    before = stage.picture()
    for limit in range(1, len(stage.steps) + 1):
        left = limit

        def check():
            nonlocal left
            left -= 1
            if left == 0:
                raise Interrupted(state="nothing is left half-made")

        with pytest.raises(Interrupted), stage.resting(check=check):
            pytest.fail("it went on")
        assert stage.picture() == before
    stage.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_do_not_break_into_putting_back(stage, number):
    furnish(stage)
    before = stage.picture()

    def run(argv, **how):
        if "mount" in argv[0]:
            os.kill(os.getpid(), number)
        return quiesce.Machine("", "", "").run(argv, **how)

    def act():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with stage.resting(stage.machine(run=run)):
                pass
        except KeyboardInterrupt:
            return
        raise AssertionError("the signal was lost")

    assert in_child(act) == 0
    assert stage.picture() == before
    stage.nothing_left()


# --- killed ------------------------------------------------------------------------------------------------


def killed_at(stage, at):
    """A run that is killed at that moment; whether it came to its end before."""
    mortal = Moments(at)
    machine = stage.machine(kernel=CountedKernel(mortal), run=mortal.run)

    def act():
        with stage.resting(machine):
            mortal.pass_()

    status = in_child(act)
    assert status in (0, -signal.SIGKILL)
    return status == 0


@pytest.fixture
def moments(seed):
    """The first moment and how many go by until the next: a share of them in each run, all of them in a soak."""
    stride = 1 if os.environ.get("BLOCKBAK_SOAK") else 3
    return 1 + seed % stride, stride


@pytest.mark.slow
def test_killed_at_any_moment_all_comes_back(stage, moments):
    furnish(stage)
    before = stage.picture()
    (at, stride), changed = moments, 0
    while not killed_at(stage, at):
        changed += stage.picture()["mounts"] != before["mounts"]
        outcome = stage.put_back()
        assert outcome.left == [], (at, outcome)
        assert stage.picture() == before, at
        stage.nothing_left()
        at += stride
    assert stage.picture() == before
    assert changed > 20 / stride
    assert at > 60


@pytest.mark.slow
def test_killed_while_putting_back_the_next_one_finishes(stage, moments):
    furnish(stage)
    before = stage.picture()
    at, stride = moments

    def rest_and_die():
        with stage.resting():
            os.kill(os.getpid(), signal.SIGKILL)

    while True:
        assert in_child(rest_and_die) == -signal.SIGKILL
        mortal = Moments(at)
        machine = stage.machine(kernel=CountedKernel(mortal), run=mortal.run)
        status = in_child(lambda machine=machine: stage.put_back(machine))
        outcome = stage.put_back()
        assert outcome.left == [], (at, outcome)
        assert stage.picture() == before, at
        stage.nothing_left()
        if status == 0:
            break
        at += stride
    assert at > 30


def test_a_run_that_lives_is_let_alone(stage):
    _, where = stage.filesystem("data", "ext4")
    step = stage.unmount_step(where)
    with stage.resting(steps=[step]):
        assert stage.put_back() == quiesce.Outcome()
        assert not os.path.ismount(where)


def test_two_runs_at_once(stage):
    _, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    before = stage.picture()
    with stage.resting(steps=[stage.unmount_step(one)], run_id="a"):
        with stage.resting(steps=[stage.unmount_step(two)], run_id="b"):
            assert not os.path.ismount(one)
            assert not os.path.ismount(two)
        assert os.path.ismount(two)
        # The unit for the boot is still needed.
        assert list((stage.directory / "units").rglob("*.service"))
    assert stage.picture() == before
    stage.nothing_left()


# --- the journal -------------------------------------------------------------------------------------------


def left_behind(stage, steps):
    """The journal of a run that was killed at rest."""

    def act():
        with stage.resting(steps=steps):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(act) == -signal.SIGKILL
    return next((stage.directory / "state/rest").glob("*.journal"))


def test_a_torn_last_record_is_as_if_it_were_not_there(stage):
    _, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    before = stage.picture()
    journal = left_behind(stage, [stage.unmount_step(one), stage.unmount_step(two)])
    sh("mount", next(line for line in before["mounts"] if line[0] == str(two))[3], two)
    data = journal.read_bytes()
    end = data.index(b"\0")
    for keep in (1, 9, 200):
        last = data.rindex(b"\n", 0, end - 1) + 1
        journal.write_bytes(data[: last + keep].ljust(len(data), b"\0"))
        assert len(quiesce.unfinished(stage.machine())[0].begun) == 1
    assert stage.put_back().left == []
    assert stage.picture() == before
    stage.nothing_left()


def test_a_damaged_journal_is_followed_as_far_as_it_is_whole_and_kept(stage):
    _, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    two_device = stage.unmount_step(two).source
    before = stage.picture()
    journal = left_behind(stage, [stage.unmount_step(one), stage.unmount_step(two)])
    data = bytearray(journal.read_bytes())
    second = data.rindex(b"\n", 0, data.index(b"\0") - 1) + 1
    data[second + 50] ^= 1
    journal.write_bytes(data)
    outcome = stage.put_back()
    assert os.path.ismount(one)
    assert not os.path.ismount(two)
    assert len(outcome.left) == 1
    assert "damaged" in outcome.left[0]
    kept = Path(str(journal).replace(".journal", ".damaged"))
    assert kept.read_bytes().startswith(data.rstrip(b"\0"))
    assert stage.put_back() == quiesce.Outcome()
    sh("mount", two_device, two)
    assert stage.picture() == before


def test_a_journal_of_a_newer_blockbak_is_let_alone(stage):
    _, one = stage.filesystem("one", "ext4")
    step = stage.unmount_step(one)
    journal = left_behind(stage, [step])
    good = journal.read_bytes()
    text = b'{"version": 99}'
    journal.write_bytes(b"%08x %s\n" % (crc32(text), text))
    outcome = stage.put_back()
    assert "newer" in outcome.left[0]
    assert not os.path.ismount(one)
    journal.write_bytes(good)
    assert stage.put_back().left == []
    assert os.path.ismount(one)


def test_a_journal_that_others_could_have_written_is_not_acted_on(stage):
    _, one = stage.filesystem("one", "ext4")
    journal = left_behind(stage, [stage.unmount_step(one)])
    journal.parent.chmod(0o777)
    with pytest.raises(StateUnusable, match="others may write") as refused:
        stage.put_back()
    # Room is not what it lacks.
    assert "room" not in refused.value.hint.lower()
    journal.parent.chmod(0o700)
    os.chown(journal, 12345, -1)
    assert stage.put_back() == quiesce.Outcome()
    os.chown(journal, 0, -1)
    assert stage.put_back().left == []


def test_a_full_state_directory_is_noticed_before_anything_is_stopped(stage):
    _, full = stage.filesystem("full", "ext4", size=4 << 20)
    _, one = stage.filesystem("one", "ext4")
    stage.systemd.add("db.service")
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(["dd", "if=/dev/zero", f"of={full}/filler", "bs=64K"], check=True, capture_output=True)
    before = stage.picture()
    steps = [StopUnits(("db.service",), ("db.service",)), stage.unmount_step(one)]
    machine = stage.machine(state_dir=str(full / "state"))
    with pytest.raises(StateUnusable, match="no space"), stage.resting(machine, steps):
        pytest.fail("it began")
    assert not any(line.startswith("stop") for line in stage.systemd.log())
    assert stage.picture() == before
    assert list((full / "state/rest").glob("*")) == []


def test_a_state_directory_that_fails_later_has_all_put_back(stage):
    furnish(stage)
    before = stage.picture()

    class Failing(CountedKernel):
        def __init__(self, at):
            self.left = at

        def pwritev(self, fd, buffers, offset):
            self.left -= 1
            if self.left <= 0:
                raise OSError(28, "No space left on device")
            return os.pwritev(fd, buffers, offset)

        def allocate(self, fd, size):
            os.posix_fallocate(fd, 0, size)

        def unlink(self, path):
            os.unlink(path)

    for at in (1, 2, 6, 10):
        with pytest.raises(StateUnusable), stage.resting(stage.machine(kernel=Failing(at))):
            pytest.fail("it went on")
        assert stage.picture() == before
    stage.nothing_left()


# --- what stands against it --------------------------------------------------------------------------------


def test_a_blocked_plan_is_not_begun(stage):
    _, one = stage.filesystem("one", "ext4")
    blocked = Blocked(str(one), "written by process 7 (db)", "--kill the process")
    plan = Plan((stage.unmount_step(one),), blocked=(blocked,))
    how = {"device": "/dev/x", "run_id": "a", "deadline": 1.0, "say": print, "check": lambda: None}
    with pytest.raises(CannotRest, match="written by process 7"), quiesce.brought_to_rest(plan, stage.machine(), **how):
        pytest.fail("it began")
    assert os.path.ismount(one)
    assert not (stage.directory / "state").exists()


def test_a_busy_mount_is_never_taken_off_lazily(stage):
    _, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    before = stage.picture()
    asked = []

    def who(target):
        asked.append(target)
        return "process 77 (shell)"

    with subprocess.Popen(["sleep", "60"], cwd=two) as shell:
        try:
            steps = [stage.unmount_step(one), stage.unmount_step(two)]
            with pytest.raises(StillInUse, match="process 77") as caught, stage.resting(steps=steps, who=who):
                pytest.fail("it went on")
            assert shell.poll() is None
        finally:
            shell.kill()
    assert asked == [str(two)]
    assert caught.value.exit_code == 5
    assert stage.picture() == before
    stage.nothing_left()


def test_who_lets_go_within_seconds_is_waited_for(stage):
    _, one = stage.filesystem("one", "ext4")
    before = stage.picture()
    with subprocess.Popen(["sleep", "1"], cwd=one), stage.resting(steps=[stage.unmount_step(one)]):
        assert not os.path.ismount(one)
    assert stage.picture() == before


def test_a_unit_that_starts_itself_again(stage):
    stage.systemd.add("a.service")
    stage.systemd.add("stubborn.service", when_stopped="restart")
    before = stage.picture()
    steps = [StopUnits(("a.service", "stubborn.service"), ("a.service",))]
    with pytest.raises(UnitRestarted, match=r"stubborn\.service"), stage.resting(steps=steps):
        pytest.fail("it went on")
    assert stage.picture() == before


def test_what_a_unit_uses_that_runs_again_is_no_longer_free(stage):
    """It is started between its stop and the unmount that it is in the way of."""
    _, one = stage.filesystem("one", "ext4")
    stage.systemd.add("db.service")
    before = stage.picture()
    steps = [StopUnits(("db.service",), ("db.service",)), stage.unmount_step(one)]

    def starts_again(what):
        if what.startswith("Stopped"):
            stage.systemd.start(["db.service"])

    with subprocess.Popen(["sleep", "infinity"], cwd=one) as busy:
        with pytest.raises(UnitRestarted, match=r"db\.service") as caught, stage.resting(steps=steps, say=starts_again):
            pytest.fail("it went on")
        assert isinstance(caught.value.__cause__, StillInUse)
        busy.kill()
    assert stage.picture() == before


def test_what_comes_up_again_meanwhile_is_noticed_at_the_end(stage):
    device, one = stage.filesystem("one", "ext4")
    stage.systemd.add("db.service")
    with stage.resting(steps=[StopUnits(("db.service",), ("db.service",)), stage.unmount_step(one)]) as rest:
        rest.verify()
        stage.systemd.start(["db.service"])
        with pytest.raises(UnitRestarted):
            rest.verify()
        stage.systemd.stop(["db.service"])
        sh("mount", device, one)
        with pytest.raises(NotAtRest, match="mounted again"):
            rest.verify()
    assert len([line for line in System().mounts if line.target == str(one)]) == 1


def test_a_unit_that_does_not_start_again_is_told_and_tried_once_more(stage):
    stage.systemd.add("db.service")
    stage.systemd.add("web.service", when_started="fail")
    steps = [StopUnits(("db.service", "web.service"), ("db.service",))]
    with stage.resting(steps=steps) as rest:
        pass
    assert len(rest.left) == 1
    assert "web.service (failed)" in rest.left[0]
    assert stage.systemd.states() == {"db.service": "active", "web.service": "failed"}
    assert stage.put_back().left == rest.left
    stage.systemd.add("web.service", "failed")
    assert stage.put_back().left == []
    assert stage.systemd.states()["web.service"] == "active"
    stage.nothing_left()


def test_what_is_started_with_a_unit_and_did_not_run_is_told(stage):
    stage.systemd.add("db.service", Wants="extra.service")
    stage.systemd.add("extra.service", "inactive")
    with stage.resting(steps=[StopUnits(("db.service",), ("db.service",))]) as rest:
        pass
    assert stage.systemd.states() == {"db.service": "active", "extra.service": "active"}
    assert [line for line in rest.unlike if "extra.service" in line]


def test_nothing_is_started_on_an_empty_directory(stage):
    device, one = stage.filesystem("one", "ext4")
    stage.systemd.add("db.service")
    before = stage.picture()
    with stage.resting(steps=[StopUnits(("db.service",), ("db.service",)), stage.unmount_step(one)]) as rest:
        head = Path(device).read_bytes()[:4096]
        with open(device, "r+b") as file:
            file.write(bytes(4096))
    assert len(rest.left) == 2
    assert stage.systemd.states() == {"db.service": "inactive"}
    with open(device, "r+b") as file:
        file.write(head)
    assert stage.put_back().left == []
    assert stage.picture() == before


# --- processes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "number"), [("sleep 60", signal.SIGTERM), ("trap '' TERM; while :; do sleep 0.1; done", signal.SIGKILL)]
)
def test_a_process_is_asked_to_end_and_then_killed(stage, monkeypatch, code, number):
    monkeypatch.setattr("blockbak.host.acts.END_SECONDS", 0.5)
    with subprocess.Popen(["sh", "-c", f'exec sh -c "{code}"']) as process:
        time.sleep(0.2)
        with stage.resting(steps=[process_step(process)]) as rest:
            assert process.wait(5) == -number
    assert ("killed" in rest.done[0]) == (number == signal.SIGKILL)


def test_another_process_of_that_number_is_let_alone(stage):
    with subprocess.Popen(["sleep", "60"]) as process:
        step = process_step(process)
        other = type(step)(step.pid, step.started - 1, "sleep")
        with stage.resting(steps=[other]):
            assert process.poll() is None
        process.kill()


# --- freezing ----------------------------------------------------------------------------------------------


def test_what_somebody_else_froze_stays_frozen(stage):
    _, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    sh("fsfreeze", "--freeze", two)
    with (
        pytest.raises(FrozenAlready, match="somebody else"),
        stage.resting(steps=[Freeze(str(one), "/dev/one"), Freeze(str(two), "/dev/two")]),
    ):
        pytest.fail("it went on")
    # Still frozen: thawing it works, and once only.
    sh("fsfreeze", "--unfreeze", two)
    assert subprocess.run(["fsfreeze", "--unfreeze", one], check=False, capture_output=True).returncode != 0
    stage.nothing_left()


def test_at_the_deadline_the_image_is_void(stage):
    _, one = stage.filesystem("one", "ext4")
    with stage.resting(steps=[Freeze(str(one), "/dev/one")], deadline=1.0) as rest:
        rest.verify()
        assert not rest.over()
        Path(one, "written").touch()  # waits until it is thawed
        deadline = time.monotonic() + 5
        while not rest.over() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(RestVoid):
            rest.verify()
    assert not rest.in_time
    assert rest.over()
    assert rest.left == []
    stage.nothing_left()


def test_a_killed_run_leaves_nothing_frozen_even_if_nobody_recovers(stage):
    _, one = stage.filesystem("one", "ext4")
    left_behind(stage, [Freeze(str(one), "/dev/one")])
    with subprocess.Popen(["touch", f"{one}/x"]) as writer:
        assert writer.wait(10) == 0
    assert stage.put_back().left == []
    stage.nothing_left()


# --- hooks -------------------------------------------------------------------------------------------------


def hook_step(stage, code):
    hook = hook_in(stage, "told", code)
    return RunHook("told", str(hook), (("HOOK_LOG", str(stage.directory / "hook.log")),))


@pytest.mark.parametrize(
    ("code", "error", "told"),
    [
        ('[ "$BLOCKBAK_PHASE" = end ] || exit 63', HookStopped, ["begin", "end"]),
        ('[ "$BLOCKBAK_PHASE" = end ] || exit 1', HookFailed, ["begin", "begin", "begin", "end"]),
    ],
)
def test_a_hook_that_says_no_is_ended_all_the_same(stage, code, error, told):
    with pytest.raises(error), stage.resting(stage.machine(sleep=lambda _: None), [hook_step(stage, code)]):
        pytest.fail("it went on")
    assert phases(stage) == told
    stage.nothing_left()


def test_a_hook_may_leave_itself_out(stage):
    with stage.resting(steps=[hook_step(stage, "exit 62")]) as rest:
        pass
    assert phases(stage) == ["begin", "end"]
    assert "left out" in rest.notes[-1]
    assert rest.hook_error is None


def test_what_a_hook_prints_is_kept_and_its_end_may_say_no(stage):
    code = 'echo "$BLOCKBAK_RUN"; date > "$BLOCKBAK_HOOK_DIR/x"; [ "$BLOCKBAK_PHASE" = begin ] || exit 5'
    with stage.resting(steps=[hook_step(stage, code)]) as rest:
        pass
    assert rest.outputs == [("told begin", "5a4e\n"), ("told end", "5a4e\n")]
    assert isinstance(rest.hook_error, HookFailed)
    assert rest.left == []
    stage.nothing_left()


def test_after_a_kill_a_hook_is_ended_once(stage):
    left_behind(stage, [hook_step(stage, "")])
    assert stage.put_back().left == []
    assert phases(stage) == ["begin", "end"]


def test_a_begin_that_outlives_a_killed_run_is_ended_before_its_end(stage):
    seconds = f"77777.{os.getpid()}"
    step = hook_step(stage, f'[ "$BLOCKBAK_PHASE" = end ] || exec sleep {seconds}')

    def sleeping():
        return [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", seconds]]

    pid = os.fork()
    if pid == 0:
        with stage.resting(steps=[step]):
            os._exit(1)
    try:
        until = time.monotonic() + 10
        while not sleeping() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert sleeping()
        assert stage.put_back().left == []
        assert not sleeping()
    finally:
        for one in sleeping():
            one.kill()
    assert phases(stage) == ["begin", "end"]
    stage.nothing_left()


def test_a_hook_that_others_may_write_by_now_is_not_run(stage):
    step = hook_step(stage, "")
    left_behind(stage, [step])
    os.chmod(step.path, 0o777)
    assert "others than root may write" in stage.put_back().left[0]
    assert phases(stage) == ["begin"]
    os.chmod(step.path, 0o755)
    assert stage.put_back().left == []


# --- the same mounts, swap, loop devices --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "size"),
    [
        ("ext4", "noatime,nodiratime,errors=remount-ro,data=journal,commit=30", 32 << 20),
        ("ext4", "ro,noload", 32 << 20),
        ("xfs", "nosuid,nodev,noexec,noquota,swalloc,logbufs=4", 320 << 20),
        ("btrfs", "compress=zstd:3,noatime", 128 << 20),
    ],
)
def test_mounts_come_back_with_their_options(stage, kind, options, size):
    _, one = stage.filesystem("one with blank", kind, options, size)
    before = stage.picture()
    with stage.resting(steps=[stage.unmount_step(one)]) as rest:
        assert not os.path.ismount(one)
    assert stage.picture() == before
    assert rest.left == []
    assert [note for note in rest.notes if "quite as before" in note] == []


def test_a_part_of_a_file_system_that_is_nowhere_mounted_as_a_whole(stage):
    _, one = stage.filesystem("one", "ext4", "noatime")
    (one / "deep/er").mkdir(parents=True)
    part = stage.mounted("part", "--bind", one / "deep/er")
    sh("umount", one)
    before = stage.picture()
    with stage.resting(steps=[stage.unmount_step(part)]):
        assert not os.path.ismount(part)
    assert stage.picture() == before
    stage.nothing_left()


def test_twice_in_the_same_place(stage):
    _, one = stage.filesystem("one", "ext4")
    sh("mount", "--bind", one, one)
    step = stage.unmount_step(one)
    before = stage.picture()
    with stage.resting(steps=[step, step]):
        assert not os.path.ismount(one)
    assert stage.picture() == before


@pytest.mark.parametrize("kind", ["shared", "private", "unbindable"])
def test_mounts_propagate_as_before(stage, kind):
    base = stage.mounted("base", "--bind", stage.directory / "units")
    sh("mount", f"--make-{'private' if kind == 'shared' else 'shared'}", base)
    device, _ = stage.attached("x.img", 32 << 20)
    sh("mkfs.ext4", "-q", device)
    (base / "x").mkdir()
    one = stage.mounted("units/x", device)
    line = next(line for line in System().mounts if line.source == device)
    sh("umount", line.target)
    one = stage.mounted("base/x", device)
    sh("mount", f"--make-{kind}", one)

    def tags():
        line = next(line for line in System().mounts if line.target == str(one))
        return [tag.partition(":")[0] for tag in line.tags]

    before = tags()
    with stage.resting(steps=[stage.unmount_step(one)]) as rest:
        assert not os.path.ismount(one)
    assert tags() == before
    assert [note for note in rest.notes if "propagation" in note] == []


def test_swap_comes_back_in_the_order_the_kernel_had_given(stage):
    areas = []
    for number in range(4):
        device, _ = stage.attached(f"{number}.swap", 8 << 20)
        sh("mkswap", device)
        sh("swapon", device)
        areas.append(device)

    def order():
        rows = [row.split() for row in Path("/proc/swaps").read_text().splitlines()[1:]]
        return [row[0] for row in sorted(rows, key=lambda row: -int(row[4])) if row[0] in areas]

    before = order()
    assert before == areas
    priority = {row.split()[0]: int(row.split()[4]) for row in Path("/proc/swaps").read_text().splitlines()[1:]}
    for gone in ([0], [1, 2], [2, 1], [0, 3], [3]):
        steps = [SwapOff(areas[at], priority[areas[at]], "", tuple(areas[at + 1 :])) for at in gone]
        with stage.resting(steps=steps) as rest:
            assert order() == [area for at, area in enumerate(areas) if at not in gone]
        assert order() == before
        assert rest.left == []


def test_a_loop_device_whose_number_was_taken_comes_back_under_another(stage):
    _, outer = stage.filesystem("outer", "ext4", size=64 << 20)
    stage_file = outer / "disk.img"
    device, file = stage.attached("disk.img", 32 << 20, folder=outer)
    sh("mkfs.ext4", "-q", device)
    inner = stage.mounted("inner", device)
    with stage.resting(steps=[stage.unmount_step(inner), DetachLoop(device, str(file))]) as rest:
        other = stage.directory / "other.img"
        other.write_bytes(bytes(1 << 20))
        sh("losetup", device, other)
    try:
        assert rest.left == []
        line = next(line for line in System().mounts if line.target == str(inner))
        assert line.source != device
        assert System().loops[Path(line.source).name] == str(stage_file)
        assert System().loops[Path(device).name] == str(other)
    finally:
        sh("losetup", "--detach", device)


def test_a_loop_device_that_somebody_has_open_is_not_lost(stage):
    device, file = stage.attached("disk.img", 8 << 20)
    before = stage.picture()
    with open(device, "rb"), pytest.raises(StillInUse), stage.resting(steps=[DetachLoop(device, str(file))]):
        pytest.fail("it went on")
    assert stage.picture() == before
    stage.nothing_left()


def test_a_loop_device_that_goes_with_its_mount_comes_back_as_such(stage):
    _, outer = stage.filesystem("outer", "ext4", size=64 << 20)
    file = outer / "disk.img"
    file.write_bytes(bytes(16 << 20))
    sh("mkfs.ext4", "-q", file)
    inner = stage.mounted("inner", "-o", "loop", file)
    step = stage.unmount_step(inner)
    before = stage.picture()
    dio = System().attribute(Path(step.source).name, "loop/dio") == "1"
    steps = [step, DetachLoop(step.source, str(file), direct=dio), stage.unmount_step(outer)]
    with stage.resting(steps=steps):
        assert not os.path.ismount(outer)
    after = stage.picture()
    assert {key: after[key] for key in after if key != "utab"} == {key: before[key] for key in before if key != "utab"}
    sh("umount", inner)
    assert Path(step.source).name not in System().loops


# --- after another boot -------------------------------------------------------------------------------------


def test_after_another_boot_devices_are_found_by_what_they_are(stage):
    device, one = stage.filesystem("one", "ext4", "noatime")
    stage.systemd.add("db.service")
    step = stage.unmount_step(one)
    before = stage.picture()
    renamed = Unmount(
        step.target, "/dev/old-name", step.fstype, step.options, step.root, "", step.identity, step.propagation
    )
    sh("umount", one)
    # As if it had been this one's name then.
    os.symlink(device, "/dev/old-name")
    try:
        sh("mount", "-o", "noatime", device, one)
        left_behind(stage, [StopUnits(("db.service",), ("db.service",)), renamed])
    finally:
        os.unlink("/dev/old-name")
    missing = stage.machine(boot="another", find=lambda _: "")
    outcome = stage.put_back(missing)
    assert any("is not there any more" in line for line in outcome.left)
    found = stage.machine(boot="another", find={step.identity: device}.get)
    assert stage.put_back(found).left == []
    assert stage.picture() == before
    stage.nothing_left()


def test_what_the_boot_has_put_back_already_is_let_alone(stage):
    device, one = stage.filesystem("one", "ext4", "noatime")
    stage.systemd.add("db.service")
    before = stage.picture()
    left_behind(stage, [StopUnits(("db.service",), ("db.service",)), stage.unmount_step(one)])
    sh("mount", "-o", "noatime,x-test.note=2", device, one)
    stage.systemd.start(["db.service"])
    outcome = stage.put_back(stage.machine(boot="another", find=lambda _: device))
    assert outcome.left == []
    assert [line[:-1] for line in stage.picture()["mounts"]] == [line[:-1] for line in before["mounts"]]
    assert sum(line.startswith("start") for line in stage.systemd.log()) == 0


# --- what this machine has not got ---------------------------------------------------------------------------


class Elsewhere:
    """exportfs and lvchange on a machine that is a directory; what they were told."""

    def __init__(self, root):
        self.root, self.told = root, []
        self.etab = root / "var/lib/nfs/etab"
        self.etab.parent.mkdir(parents=True)
        self.blocks = root / "sys/class/block"
        self.blocks.mkdir(parents=True)

    def export(self, client, path, options):
        with self.etab.open("a") as file:
            file.write(f"{path}\t{client}({options})\n")

    def activate(self, label):
        group, _, volume = label.partition("/")
        name = f"{group.replace('-', '--')}-{volume.replace('-', '--')}"
        directory = self.blocks / f"dm-{len(list(self.blocks.iterdir()))}" / "dm"
        directory.mkdir(parents=True)
        (directory / "name").write_text(name)

    def run(self, argv, **how):
        self.told.append(argv)
        match argv:
            case ["exportfs", "-u", _]:
                self.etab.write_text("")
            case ["exportfs", "-o", options, place]:
                client, _, path = place.partition(":/")
                self.export(client, f"/{path}", options)
            case ["lvchange", "--activate", "n", "--", *labels]:
                if "vg/busy" in labels:
                    raise CommandFailed(program="lvchange", status=5, stderr="  Logical volume vg/busy in use.")
                shutil.rmtree(self.blocks)
                self.blocks.mkdir()
            case ["lvchange", "--activate", "y", "--ignoreactivationskip", "--", *labels]:
                for label in labels:
                    self.activate(label)
            case _:
                return quiesce.Machine("", "", "").run(argv, **how)
        return Completed(tuple(argv), 0, b"", "")


@pytest.fixture
def elsewhere(stage):
    return Elsewhere(Path(stage.systemd.root))


def test_exports_come_back_with_their_options(stage, elsewhere):
    elsewhere.export("10.0.0.0/8", "/srv/a", "rw,sync,no_subtree_check")
    before = elsewhere.etab.read_text()
    steps = [
        Unexport("10.0.0.0/8", "/srv/a", "rw,sync,no_subtree_check"),
        Unexport("10.0.0.9", "/srv/gone", "ro"),
    ]
    with stage.resting(stage.machine(run=elsewhere.run), steps):
        assert elsewhere.etab.read_text() == ""
    assert elsewhere.etab.read_text() == before
    assert [argv for argv in elsewhere.told if argv[0] == "exportfs"] == [
        ["exportfs", "-u", "10.0.0.0/8:/srv/a"],
        ["exportfs", "-o", "rw,sync,no_subtree_check", "10.0.0.0/8:/srv/a"],
    ]


def test_just_the_volumes_that_were_active_are_so_again(stage, elsewhere):
    elsewhere.activate("vg/da-ta")
    steps = [Deactivate("vg", ("vg/da-ta", "vg/was-not"))]
    with stage.resting(stage.machine(run=elsewhere.run), steps) as rest:
        rest.verify()
        elsewhere.activate("vg/da-ta")
        with pytest.raises(NotAtRest, match="active again"):
            rest.verify()
        shutil.rmtree(elsewhere.blocks)
    assert [argv[2:] for argv in elsewhere.told if argv[0] == "lvchange"] == [
        ["n", "--", "vg/da-ta"],
        ["y", "--ignoreactivationskip", "--", "vg/da-ta"],
    ]


def test_a_volume_in_use_is_told(stage, elsewhere):
    elsewhere.activate("vg/busy")
    steps = [Deactivate("vg", ("vg/busy",))]
    with pytest.raises(StillInUse, match="busy in use"), stage.resting(stage.machine(run=elsewhere.run), steps):
        pytest.fail("it went on")


def test_what_mounts_at_its_first_use_is_there_before_its_mount(stage):
    device, one = stage.filesystem("auto-one", "ext4", "noatime")
    name = sh("systemd-escape", "--path", one)
    stage.systemd.add(f"{name}.automount")
    stage.systemd.add(f"{name}.mount")
    stage.systemd.add("db.service")
    stopped = (f"{name}.automount", "db.service")
    before = stage.picture()
    with stage.resting(steps=[StopUnits(stopped, stopped), stage.unmount_step(one)]) as rest:
        assert not os.path.ismount(one)
    assert rest.left == []
    assert stage.picture() == before
    starts = [line.rpartition(" ")[2] for line in stage.systemd.log() if line.startswith("start")]
    assert starts == [f"{name}.automount", "db.service"]
    assert device


# --- as a program --------------------------------------------------------------------------------------------


def recover(stage, *words):
    """The command of the unit for the boot, on this stage."""
    unit = bootunit.text(str(stage.directory / "state"), str(stage.directory / "run"))
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).partition("=")[2]
    env = {**os.environ, "BLOCKBAK_STATE_DIR": str(stage.directory / "state"),
           "BLOCKBAK_RUN_DIR": str(stage.directory / "run")}  # fmt: skip
    argv = [*shlex.split(command), *words]
    return subprocess.run(argv, env=env, capture_output=True, text=True, check=False, cwd="/")


def test_the_units_command_puts_back_and_says_what_it_could_not(stage):
    device, one = stage.filesystem("one", "ext4")
    _, two = stage.filesystem("two", "ext4")
    before = stage.picture()
    left_behind(stage, [stage.unmount_step(one), stage.unmount_step(two)])
    shutil.rmtree(stage.directory / "units")  # the program's own place for it is the machine's
    head = Path(device).read_bytes()[:4096]
    with open(device, "r+b") as file:
        file.write(bytes(4096))
    done = recover(stage)
    assert done.returncode == 3
    assert f"{two} is mounted again." in done.stdout
    assert f"Not undone: unmount {one}." in done.stderr
    with open(device, "r+b") as file:
        file.write(head)
    done = recover(stage, "--json")
    assert done.returncode == 0, done.stderr
    assert f"{one} is mounted again." in json.loads(done.stdout)["done"]
    assert stage.picture() == before
    done = recover(stage)
    assert (done.returncode, done.stdout) == (0, "Nothing to recover.\n")
    stage.nothing_left()


def test_the_next_run_puts_back_first(stage):
    _, one = stage.filesystem("one", "ext4")
    before = stage.picture()
    left_behind(stage, [stage.unmount_step(one)])
    shutil.rmtree(stage.directory / "units")  # the program's own place for it is the machine's
    (stage.directory / "file").write_bytes(b"some bytes")
    repository = stage.directory / "repository"
    for words in (("init", repository), ("-r", repository, "backup", stage.directory / "file")):
        env = {**os.environ, "BLOCKBAK_STATE_DIR": str(stage.directory / "state"),
               "BLOCKBAK_RUN_DIR": str(stage.directory / "run")}  # fmt: skip
        argv = [sys.executable, "-m", "blockbak", *map(str, words)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert f"{one} is mounted again." in done.stderr
    assert stage.picture() == before
    stage.nothing_left()
