"""What is held still goes on: when asked, at the deadline, and whoever is killed; once, and in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from blockbak.errors import NoGuardian
from blockbak.host import guard
from blockbak.host.guardian import Ending, guarded, leftovers, settle
from tests import mappers
from tests.mappers import FileMapper

BOOT = "this-boot"


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


class Place:
    """Devices, a run directory, and end commands that tell the same journal as the devices."""

    def __init__(self, directory):
        self.directory = directory
        self.run = directory / "run"
        self.mapper = FileMapper(directory / "devices")
        self.devices = [("vg-data", "LVM-one"), ("vg-wal", "LVM-two")]
        self.program = (sys.executable, "-I", "-S", mappers.__file__, guard.__file__, str(directory / "devices"))

    def ending(self, label, code="", timeout=10.0):
        shell = f"echo end {label} >> {self.directory}/devices/log; {code}"
        return Ending(("/bin/sh", "-c", shell), (("PATH", os.environ["PATH"]), ("NAME", label)), timeout, label)

    def guarded(self, *endings, deadline=30.0, devices=None, **more):
        return guarded(
            self.devices if devices is None else devices, endings, deadline=deadline, run_dir=str(self.run), boot=BOOT,
            program=self.program, mapper=self.mapper, **more,
        )  # fmt: skip

    def suspend(self):
        for name, _ in self.devices:
            self.mapper.suspend(name)

    def suspended(self):
        return [name for name, _ in self.devices if self.mapper.info(name).suspended]

    def log(self):
        return self.mapper.log()


@pytest.fixture
def place(tmp_path, as_root):
    (tmp_path / "devices").mkdir()
    place = Place(tmp_path)
    for device in place.devices:
        place.mapper.add(*device)
    return place


HELD = ["suspend vg-data", "suspend vg-wal"]
LET_GO = ["resume vg-data", "resume vg-wal"]


def test_released_in_time(place):
    with place.guarded(place.ending("b", "echo $NAME; echo oh >&2"), place.ending("a", "exit 7")) as guardian:
        place.suspend()
        assert not guardian.acted()
        outcome = guardian.release()
        assert guardian.acted()
        assert guardian.release() is outcome
    assert place.log() == [*HELD, *LET_GO, "end b", "end a"]
    assert (outcome.in_time, outcome.reasons) == (True, ())
    b, a = outcome.endings
    assert (b.label, b.status, b.output, b.stderr) == ("b", 0, "b\n", "oh")
    assert (a.label, a.status, a.output, a.stderr) == ("a", 7, "", "")
    assert os.listdir(place.run) == []


def test_released_at_the_end_also_of_a_body_that_fails(place):
    def fail():
        place.suspend()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), place.guarded(place.ending("a")) as guardian:
        fail()
    assert guardian.release().in_time
    assert place.log() == [*HELD, *LET_GO, "end a"]


def test_the_deadline(place):
    started = time.monotonic()
    with place.guarded(place.ending("a"), deadline=1.0) as guardian:
        place.suspend()
        until(guardian.acted)
        assert 0.9 < time.monotonic() - started < 5
        until(lambda: place.log() == [*HELD, *LET_GO, "end a"])
        assert place.suspended() == []
    outcome = guardian.release()
    assert (outcome.in_time, outcome.reasons) == (False, ("The deadline passed.",))
    assert [one.status for one in outcome.endings] == [0]
    assert place.log() == [*HELD, *LET_GO, "end a"]


def test_the_deadline_can_be_brought_forward_and_not_put_off(place):
    with place.guarded(deadline=30.0) as guardian:
        guardian.within(0.5)
        guardian.within(20)
        until(guardian.acted, 5)
    assert not guardian.release().in_time


def test_what_is_suspended_after_the_deadline_is_resumed_too(place):
    """blockbak was about to suspend a device when the deadline passed."""
    with place.guarded(place.ending("a"), deadline=0.3) as guardian:
        until(guardian.acted)
        place.suspend()
        until(lambda: not place.suspended())
    assert place.log().count("end a") == 1


def test_what_is_suspended_while_an_end_runs_is_resumed_at_once(place):
    """It was being suspended when the deadline passed, which took its time; and the end may need it."""
    with place.guarded(place.ending("a", "sleep 8"), deadline=0.3) as guardian:
        until(lambda: "end a" in place.log())
        assert guardian.acted()
        place.suspend()
        until(lambda: not place.suspended(), 4)
        assert guardian.release().in_time is False
    assert place.log() == ["end a", *HELD, *LET_GO]


def test_a_device_that_cannot_be_resumed_does_not_keep_the_others(place):
    place.devices.insert(0, place.mapper.add("vg-stuck", "LVM-three", failing=2))
    with place.guarded(place.ending("a")) as guardian:
        place.suspend()
    assert place.log() == ["suspend vg-stuck", *HELD, *LET_GO, "resume vg-stuck", "end a"]
    assert guardian.release().reasons == ()


def test_a_device_that_stays_suspended_is_named_and_its_journal_kept(place):
    place.devices.append(place.mapper.add("vg-stuck", "LVM-three", failing=guard.RESUME_TRIES + 1))
    with place.guarded(place.ending("a")) as guardian:
        place.suspend()
    assert guardian.release().reasons == ("Device vg-stuck could not be resumed: Input/output error.",)
    assert place.suspended() == ["vg-stuck"]
    [journal] = leftovers(str(place.run), BOOT)
    settle(journal, place.mapper)
    assert place.suspended() == []
    # The end command was not kept for it: it was run.
    assert place.log().count("end a") == 1
    assert leftovers(str(place.run), BOOT) == []


def test_another_device_of_that_name_is_left_alone(place):
    with place.guarded() as guardian:
        place.mapper.add("vg-data", "LVM-other")
        place.suspend()
    assert place.suspended() == ["vg-data"]
    assert "another one now" in guardian.release().reasons[0]


def test_nothing_is_loaded_once_it_is_ready(place):
    ends, scratch = (place.ending("a", "exit 1"), place.ending("late", "sleep 5", timeout=0.2)), place.run / "scratch"
    with place.guarded(*ends, deadline=0.3, scratch=str(scratch)) as one:
        place.suspend()
        (scratch / guard.RUNNING / "process").symlink_to(str(os.getpid()))
        until(one.acted)
    assert [line for line in place.log() if line.startswith("import")] == []


def least_score():
    """What a process may set here: not every container lets root do it."""
    code = "echo -1000 > /proc/self/oom_score_adj; cat /proc/self/oom_score_adj"
    return subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=False).stdout


def test_its_memory_is_locked_and_it_is_the_last_to_be_killed(place):
    with place.guarded() as guardian:
        status = Path(f"/proc/{guardian.pid}/status").read_text().split()
        locked, resident = (int(status[status.index(field) + 1]) for field in ("VmLck:", "VmRSS:"))
        assert locked > 0.9 * resident
        assert Path(f"/proc/{guardian.pid}/oom_score_adj").read_text() == least_score()
        files = os.listdir(f"/proc/{guardian.pid}/fd")
        assert len(files) == 4, "the channel, nothing twice, the journal"
        assert os.getsid(guardian.pid) == guardian.pid


def test_what_it_runs_is_not_hard_to_kill(place):
    with place.guarded(place.ending("a", "cat /proc/self/oom_score_adj; kill -TERM $$")) as guardian:
        pass
    [ended] = guardian.release().endings
    assert ended.output == Path("/proc/self/oom_score_adj").read_text()
    assert ended.status == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_that_ask_it_to_end_are_not_heard(place, number):
    with place.guarded(place.ending("a")) as guardian:
        place.suspend()
        for _ in range(3):
            os.kill(guardian.pid, number)
            time.sleep(0.05)
        assert place.log() == HELD
        assert not guardian.acted()
    assert guardian.release().in_time
    assert place.log() == [*HELD, *LET_GO, "end a"]


def test_an_end_command_that_does_not_end(place):
    with place.guarded(place.ending("a", "echo begun; sleep 60", timeout=0.5), place.ending("b")) as guardian:
        pass
    a, b = guardian.release().endings
    assert (a.status, a.reason, a.output) == (None, "it was still running after 0.5 s", "begun\n")
    assert b.status == 0


def test_an_end_command_that_is_not_there(place):
    nothing = Ending(("/nowhere/nothing",), (), 1, "nothing")
    with place.guarded(nothing, place.ending("b")) as guardian:
        pass
    a, b = guardian.release().endings
    assert (a.status, a.reason) == (None, "it could not be started: No such file or directory")
    assert b.status == 0


def test_of_much_output_the_beginning_is_kept_and_of_messages_the_end(place):
    code = "yes out | head -c 1000000; (yes err | head -c 100000; echo last) >&2"
    with place.guarded(*(place.ending(label, code) for label in "abcdefgh")) as guardian:
        pass
    for ended in guardian.release().endings:
        assert len(ended.output) == guard.OUTPUT_BYTES
        assert ended.stderr.endswith("last")
        assert len(ended.stderr) <= guard.MESSAGE_BYTES


def test_the_scratch_directory_is_there_until_the_end(place):
    scratch = place.run / "scratch"
    code = f"cat {scratch}/x"
    with place.guarded(place.ending("a", code), scratch=str(scratch)):
        assert scratch.stat().st_mode & 0o777 == 0o700
        (scratch / "x").write_text("x")
        (scratch / "folder").mkdir()
        (scratch / "folder" / "y").write_text("y")
        (scratch / "away").symlink_to(place.directory)
    assert os.listdir(place.run) == []
    assert place.directory.exists()


# --- who is killed --------------------------------------------------------------------------------

BLOCKBAK = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.fault.test_guardian import Place
place = Place(Path(sys.argv[1]))
with place.guarded(place.ending("b"), place.ending("a"), scratch=str(place.run / "scratch")) as guardian:
    place.suspend()
    print(guardian.pid, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def blockbak(place):
    """A process that holds all, and the pid of its guardian."""
    argv = [sys.executable, "-c", BLOCKBAK, str(place.directory), str(Path(__file__).parents[2])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            pid = int(process.stdout.readline())
            yield process, pid
        finally:
            process.kill()


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("whole_session", [False, True])
def test_blockbak_is_killed(place, blockbak, whole_session):
    process, pid = blockbak
    assert place.suspended() == ["vg-data", "vg-wal"]
    if whole_session:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    until(lambda: gone(pid))
    assert place.log() == [*HELD, *LET_GO, "end b", "end a"]
    assert os.listdir(place.run) == []


def test_blockbak_is_stopped_and_the_guardian_lives(place, blockbak):
    """As at a terminal's Ctrl-Z: nothing is let go before the deadline, and nobody else takes the journal for left."""
    process, pid = blockbak
    process.send_signal(signal.SIGSTOP)
    assert leftovers(str(place.run), BOOT) == []
    assert place.suspended() == ["vg-data", "vg-wal"]
    process.kill()
    until(lambda: gone(pid))


def test_both_are_killed_and_the_next_run_does_what_is_left(place, blockbak):
    process, pid = blockbak
    os.kill(pid, signal.SIGKILL)
    process.kill()
    until(lambda: gone(pid))
    assert place.suspended() == ["vg-data", "vg-wal"]
    [journal] = leftovers(str(place.run), BOOT)
    assert (journal.pid, journal.state) == (pid, "now")
    assert journal.devices == tuple(place.devices)
    assert [one.label for one in journal.endings] == ["b", "a"]
    said = settle(journal, place.mapper)
    assert place.log() == [*HELD, *LET_GO, "end b", "end a"]
    assert len(said) == 3
    assert str(pid) in said[0]
    assert os.listdir(place.run) == []
    # Whoever has looked at the same time finds nothing to do.
    assert settle(journal, place.mapper) == []
    assert place.log() == [*HELD, *LET_GO, "end b", "end a"]


def test_the_guardian_is_killed_and_blockbak_does_its_work(place):
    with place.guarded(place.ending("a", "echo out")) as guardian:
        place.suspend()
        os.kill(guardian.pid, signal.SIGKILL)
        until(guardian.acted)
        assert place.suspended() == ["vg-data", "vg-wal"]
    outcome = guardian.release()
    assert place.log() == [*HELD, *LET_GO, "end a"]
    assert not outcome.in_time
    assert outcome.reasons == ("The guardian died before it let go (killed by signal 9); blockbak did it instead.",)
    assert [one.output for one in outcome.endings] == ["out\n"]
    assert os.listdir(place.run) == []


def test_without_device_mapper_the_end_commands_are_run_all_the_same(place):
    """The real one is asked for where none is given; on a machine that has none, that is said."""
    left(place, devices=[("blockbak-no-such-device", "LVM-none")])
    [journal] = leftovers(str(place.run), BOOT)
    said = settle(journal)
    assert place.log() == ["end a"]
    assert any("Device" in sentence for sentence in said[1:])


# --- it cannot start ------------------------------------------------------------------------------


def test_where_no_guardian_can_be_had_nothing_is_begun(place):
    place.program = ("/nowhere/python",)
    with pytest.raises(NoGuardian, match="No such file"), place.guarded(place.ending("a")):
        pytest.fail("there is no guardian")
    assert place.log() == []


@pytest.mark.parametrize("code", ["import sys; sys.exit(3)", "import os; os.kill(os.getpid(), 9)"])
def test_a_guardian_that_dies_before_it_is_ready(place, code):
    place.program = (sys.executable, "-c", code)
    with pytest.raises(NoGuardian, match="not ready"), place.guarded(place.ending("a")):
        pytest.fail("there is no guardian")
    assert place.log() == []


def test_the_real_one_opens_device_mapper_before_it_is_ready(place):
    real = guarded(
        [("blockbak-no-such-device", "LVM-none")], [place.ending("a")], deadline=5, run_dir=str(place.run), boot=BOOT
    )
    if os.path.exists("/dev/mapper/control"):
        with real as guardian:
            pass
        assert guardian.release().reasons == ("Device blockbak-no-such-device is no longer there.",)
        return
    with pytest.raises(NoGuardian, match="/dev/mapper/control"), real:
        pytest.fail("there is no guardian")
    assert place.log() == []
    assert not place.run.exists() or os.listdir(place.run) == []


def test_a_run_directory_that_others_may_write_is_not_used(place):
    place.run.mkdir()
    place.run.chmod(0o777)
    with pytest.raises(NoGuardian, match="others may write"), place.guarded(place.ending("a")):
        pytest.fail("there is no guardian")
    with pytest.raises(NoGuardian, match="others may write"):
        leftovers(str(place.run), BOOT)
    assert os.listdir(place.run) == []


def test_the_journal_is_there_before_it_is_ready(place):
    with place.guarded(place.ending("a")) as guardian:
        [name] = os.listdir(place.run)
        path = place.run / name
        assert path.stat().st_mode & 0o777 == 0o600
        fields = json.loads(path.read_text())
        assert (fields["version"], fields["boot"], fields["pid"]) == (guard.VERSION, BOOT, guardian.pid)
        assert place.run.stat().st_mode & 0o777 == 0o700


# --- journals -------------------------------------------------------------------------------------


def left(place, **changes):
    place.run.mkdir(mode=0o700, exist_ok=True)
    end = place.ending("a")
    fields = {
        "version": guard.VERSION, "pid": 1, "boot": BOOT, "devices": place.devices, "scratch": "",
        "ends": [{"label": end.label, "argv": end.argv, "env": end.env, "timeout": end.timeout}],
    }  # fmt: skip
    path = place.run / "guardian-1-00000000.json"
    path.write_text(json.dumps(fields | changes))
    return path


def test_a_journal_of_another_boot_is_only_removed(place):
    left(place, boot="another")
    place.suspend()
    [journal] = leftovers(str(place.run), BOOT)
    assert settle(journal, place.mapper) == []
    assert place.log() == HELD
    assert os.listdir(place.run) == []


@pytest.mark.parametrize("changes", [{"version": 99}, {"devices": 5}, {"ends": [{}]}, {"devices": [["one"]]}])
def test_a_journal_that_is_not_understood_stays_and_is_named(place, changes):
    path = left(place, **changes)
    [journal] = leftovers(str(place.run), BOOT)
    [sentence] = settle(journal, place.mapper)
    assert str(path) in sentence
    assert path.exists()
    assert place.log() == []


def test_a_journal_of_somebody_else_is_not_followed(place):
    path = left(place)
    os.chown(path, 1, 1)
    [journal] = leftovers(str(place.run), BOOT)
    assert journal.state == "unreadable"
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert leftovers(str(place.run), BOOT) == []


def test_an_end_command_that_fails_then_is_told(place):
    end = place.ending("a", "echo why >&2; exit 5")
    left(place, ends=[{"label": end.label, "argv": end.argv, "env": end.env, "timeout": end.timeout}])
    [journal] = leftovers(str(place.run), BOOT)
    assert settle(journal, place.mapper)[-1] == "Its end command 'a' failed (exit status 5): why."
    assert os.listdir(place.run) == []


def test_where_nothing_ever_ran_nothing_is_left(place):
    assert leftovers(str(place.run), BOOT) == []
