"""Hooks are found, run around a body, tried again, left out, and always ended."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from blockbak.errors import HookFailed, HookStopped, NoSuchHook, UnsafeHook
from blockbak.host import guardian, hooks

pytestmark = pytest.mark.usefixtures("as_root")

FACTS = {"BLOCKBAK_VOLUME": "web-data", "BLOCKBAK_TOGETHER": "0"}


class Scripts:
    """Hooks of a test; each tells a log what it was called for, then does as it is told in that phase."""

    def __init__(self, folder):
        self.folder, self.said = folder, []

    def __call__(self, name, begin="", end=""):
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\necho "{name} $BLOCKBAK_PHASE" >>{self.folder}/log\n'
            f"case $BLOCKBAK_PHASE in\nbegin)\n:\n{begin}\n;;\nend)\n:\n{end}\n;;\nesac\n"
        )
        path.chmod(0o755)
        return hooks.Hook(name, str(path))

    def at_rest(self, *found, deadline=20.0, **more):
        return hooks.at_rest(
            found, FACTS, deadline=deadline, run_dir=str(self.folder / "run"), boot="this", sleep=lambda _: None,
            say=self.said.append, **more,
        )  # fmt: skip

    def log(self):
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def rest(self):
        """Inside: the body of a backup leaves its mark."""
        with (self.folder / "log").open("a") as file:
            file.write("snapshot\n")

    def left(self):
        return os.listdir(self.folder / "run")


@pytest.fixture
def script(tmp_path):
    return Scripts(tmp_path)


def test_begins_body_and_ends_in_reverse(script):
    with script.at_rest(script("a", "echo out", "echo gone"), script("b")) as rest:
        script.rest()
        assert rest.applied
        assert not rest.over()
    assert script.log() == ["a begin", "b begin", "snapshot", "b end", "a end"]
    assert rest.outputs == [("a begin", "out\n"), ("a end", "gone\n")]
    assert (rest.in_time, rest.reasons, rest.notes) == (True, [], [])
    assert script.left() == []


def test_without_hooks_and_devices_nothing_is_started(script):
    with script.at_rest() as rest:
        assert rest.guardian is None
    assert (rest.applied, rest.in_time) == (False, True)
    assert not (script.folder / "run").exists()


def test_what_a_hook_is_told(script, monkeypatch):
    for name in [name for name in os.environ if name.startswith("BLOCKBAK_")]:
        monkeypatch.delenv(name)
    tell = "env | grep ^BLOCKBAK_ | sort; stat -c %a $BLOCKBAK_HOOK_DIR; pwd; echo $MINE"
    one = script("a", tell + "; echo kept >$BLOCKBAK_HOOK_DIR/note", tell + "; cat $BLOCKBAK_HOOK_DIR/note")
    with script.at_rest(one, environ={"MINE": "mine", "PATH": os.environ["PATH"]}) as rest:
        pass
    begin, end = (text.splitlines() for _, text in rest.outputs)
    told = {name: [line.split("=", 1) for line in lines[:-3]] for name, lines in (("begin", begin), ("end", end[:-1]))}
    for phase, pairs in told.items():
        given = dict(pairs)
        assert given.pop("BLOCKBAK_HOOK_DIR").startswith(str(script.folder / "run"))
        assert given.pop("BLOCKBAK_PHASE") == phase
        assert given.pop("BLOCKBAK_DEADLINE") in ({"begin": ("20", "19"), "end": ("60",)})[phase]
        assert given == FACTS
    assert begin[-3] == "700"
    assert begin[-1] == "mine"
    assert end[-4:] == ["700", "/", "mine", "kept"]
    assert script.left() == []


def test_a_hook_that_is_left_out(script):
    with script.at_rest(script("a", "echo not here >&2; exit 62", "exit 1"), script("b")) as rest:
        script.rest()
    assert not rest.applied
    assert script.log() == ["a begin", "b begin", "snapshot", "b end", "a end"]
    assert rest.notes == [
        "Hook a was left out: it said so (exit status 62): not here.",
        "Hook a, which was left out, failed in its phase end: exit status 1.",
    ]
    assert script.said == rest.notes


def test_a_hook_that_stops_it(script):
    with pytest.raises(HookStopped) as caught, script.at_rest(script("a"), script("b", "echo no >&2; exit 63")):
        pytest.fail("it was not at rest")
    assert caught.value.fields == {"hook": "b", "phase": "begin"}
    assert caught.value.__notes__ == ["no"]
    assert script.log() == ["a begin", "b begin", "b end", "a end"]


def test_a_hook_that_stops_it_at_the_end(script):
    with pytest.raises(HookStopped, match="phase end"), script.at_rest(script("a", end="exit 63"), script("b")):
        script.rest()
    assert script.log()[-2:] == ["b end", "a end"]


def test_a_failed_begin_is_tried_again(script):
    count = "echo x >>$BLOCKBAK_HOOK_DIR/count; test $(wc -l <$BLOCKBAK_HOOK_DIR/count) -ge 3"
    with script.at_rest(script("a", f"echo try; {count}")) as rest:
        script.rest()
    assert script.log() == ["a begin"] * 3 + ["snapshot", "a end"]
    assert rest.applied
    # Only what the good one printed counts.
    assert rest.outputs == [("a begin", "try\n")]
    assert len(script.said) == 2


def test_a_begin_that_fails_every_time(script):
    failing = script("b", "echo oh >&2; exit 5", "echo left >&2; exit 4")
    failed = pytest.raises(HookFailed, match=r"phase begin: exit status 5 \(oh\)")
    with failed as caught, script.at_rest(script("a"), failing, script("c")):
        pytest.fail("it was not at rest")
    # Begun half-way or not at all: their ends are run, and what they say is not lost.
    assert script.log() == ["a begin", *["b begin"] * 3, "c end", "b end", "a end"]
    assert caught.value.__notes__ == ["Hook b failed in its phase end: exit status 4 (left)."]


def test_a_failed_end_voids_what_was_made(script):
    failed = pytest.raises(HookFailed, match=r"phase end: exit status 3 \(lost\)")
    with failed as caught, script.at_rest(script("a", end="exit 2"), script("b", end="echo lost >&2; exit 3")):
        script.rest()
    assert script.log()[-2:] == ["b end", "a end"]
    assert caught.value.__notes__ == ["Hook a failed in its phase end: exit status 2."]


def test_the_error_of_the_body_comes_first(script):
    with pytest.raises(ZeroDivisionError) as caught, script.at_rest(script("a", end="exit 2")):
        raise ZeroDivisionError
    assert caught.value.__notes__ == ["Hook a failed in its phase end: exit status 2."]
    assert script.log() == ["a begin", "a end"]


def test_a_begin_that_does_not_end(script):
    started = time.monotonic()
    failed = pytest.raises(HookFailed, match="still running after")
    with failed, script.at_rest(script("a", "sleep 60"), deadline=2):
        pytest.fail("it was not at rest")
    assert time.monotonic() - started < 8
    assert script.log() == ["a begin", "a end"]


def test_at_the_deadline_the_end_comes_in_the_middle_of_the_body(script):
    with script.at_rest(script("a"), deadline=1.5) as rest:
        wait_for(rest.over)
        # It is told that all is over before the end has been run.
        wait_for(lambda: script.log() == ["a begin", "a end"])
        script.rest()
    assert script.log() == ["a begin", "a end", "snapshot"]
    assert not rest.in_time
    assert rest.reasons == ["The deadline passed."]


def test_the_deadline_is_brought_forward(script):
    with script.at_rest(script("a"), deadline=20) as rest:
        rest.within(0.3)
        until = time.monotonic() + 10
        while not rest.over():
            assert time.monotonic() < until
            time.sleep(0.02)
    assert not rest.in_time


def test_where_the_guardian_dies_the_ends_are_run_all_the_same(script):
    with script.at_rest(script("a"), script("b")) as rest:
        os.kill(rest.guardian.pid, 9)
    assert script.log() == ["a begin", "b begin", "b end", "a end"]
    assert not rest.in_time
    assert script.left() == []


def test_without_a_guardian_nothing_is_begun(script):
    with pytest.raises(guardian.NoGuardian), script.at_rest(script("a"), program=("/nowhere/python",)):
        pytest.fail("it was not at rest")
    assert script.log() == []


# --- finding them ---------------------------------------------------------------------------------


@pytest.fixture
def safe():
    """A directory that nobody but root can write to, and none above it: pytest's own are below /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="blockbak-test-", dir="/run"))
    yield folder
    shutil.rmtree(folder)


def put(folder, name, mode=0o755):
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


def test_hooks_of_the_folder_come_in_order_and_then_those_named(safe):
    for name in ("20-b", "10-a", "10-a~", "10-a.dpkg-old", "README", ".hidden"):
        put(safe, name, 0o644 if name == "README" else 0o755)
    (safe / "folder").mkdir()
    other = put(safe, "other.sh")
    found = hooks.find([str(other)], str(safe))
    assert [(hook.name, hook.path) for hook in found] == [
        ("10-a", f"{safe}/10-a"),
        ("20-b", f"{safe}/20-b"),
        ("other.sh", f"{safe}/other.sh"),
    ]


def test_two_of_one_name_can_be_told_apart(safe):
    path = put(safe, "a")
    assert [hook.name for hook in hooks.find([str(path)], str(safe))] == ["a", str(path)]


def test_there_need_be_no_folder(safe):
    assert hooks.find([], f"{safe}/nothing") == []


def test_what_is_not_there(safe):
    with pytest.raises(NoSuchHook, match=r"There is no hook oracle\.") as caught:
        hooks.find(["oracle"], str(safe))
    assert "postgresql" in caught.value.hint
    with pytest.raises(NoSuchHook, match="nothing"):
        hooks.find([f"{safe}/nothing"], str(safe))


def test_a_hook_that_others_may_exchange_is_refused(safe):
    path = put(safe, "a")
    assert len(hooks.find([], str(safe))) == 1
    path.chmod(0o775)
    with pytest.raises(UnsafeHook, match="others than root may write it") as caught:
        hooks.find([], str(safe))
    assert caught.value.exit_code == 5
    path.chmod(0o755)
    os.chown(path, 1, 1)
    with pytest.raises(UnsafeHook, match="belongs to user 1"):
        hooks.find([], str(safe))
    os.chown(path, 0, 0)
    safe.chmod(0o777)
    with pytest.raises(UnsafeHook, match=f"others than root may write {safe}"):
        hooks.find([], str(safe))


def test_a_hook_below_a_directory_for_everybody_is_refused(safe):
    safe.chmod(0o1777)
    (safe / "mine").mkdir(0o700)
    path = put(safe / "mine", "a")
    with pytest.raises(UnsafeHook, match=f"others than root may write {safe}"):
        hooks.find([str(path)], "/nowhere")


def test_a_link_is_as_safe_as_what_it_leads_to(safe):
    (safe / "folder").mkdir()
    (safe / "good").symlink_to(put(safe / "folder", "a"))
    assert [hook.name for hook in hooks.find([], str(safe))] == ["good"]
    (safe / "bad").symlink_to(put(safe / "folder", "b", 0o777))
    with pytest.raises(UnsafeHook, match="bad is not run"):
        hooks.find([], str(safe))


@pytest.mark.parametrize("name", sorted(hooks.READY))
def test_ready_made_ones_are_there(name):
    path = Path(hooks.__file__).parent / "ready" / hooks.READY[name]
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/sh\n# Hook of blockbak for ")


# --- blockbak is killed ---------------------------------------------------------------------------

KILLED = """
import sys
from blockbak.host import hooks
path, run_dir = sys.argv[1:]
with hooks.at_rest([hooks.Hook("a", path)], {}, deadline=60, run_dir=run_dir, boot="this"):
    pass
"""


def wait_for(condition, seconds=10):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("both", [False, True])
def test_a_begin_does_not_outlive_blockbak(script, both):
    """Else it would bring to rest what its end has let go."""
    hook = script("a", f"(sleep 2; echo too late >>{script.folder}/log) & wait; sleep 60", "sleep 0.2")
    run = str(script.folder / "run")
    with subprocess.Popen([sys.executable, "-c", KILLED, hook.path, run]) as process:
        wait_for(lambda: script.log() == ["a begin"])
        if both:
            [guard] = psutil.Process(process.pid).children()[:1]
            assert "guard.py" in " ".join(guard.cmdline())
            guard.kill()
        process.kill()
    if both:
        # A killed process lets go of its lock a moment after the signal was sent.
        wait_for(lambda: guardian.leftovers(run, "this"))
        [journal] = guardian.leftovers(run, "this")
        guardian.settle(journal)
    wait_for(lambda: not os.listdir(run))
    assert script.log() == ["a begin", "a end"]
    time.sleep(2.2)
    assert script.log() == ["a begin", "a end"]
