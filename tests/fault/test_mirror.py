"""A mirror when something goes wrong: a sentence, a target that is said to be incomplete, and a next run that goes on.

Whatever happens, what is called in step is equal.
"""

from __future__ import annotations

import errno
import os
import random
import shlex
import signal
import sys
import time
from dataclasses import replace

import pytest

from blockbak.errors import (
    BadTarget,
    BlockbakError,
    Interrupted,
    NotReadBack,
    PeerGone,
    PeerNotUnderstood,
    PeerVersion,
    SourceUnreadable,
    TargetFailed,
    TargetFull,
)
from blockbak.flow.mirror import Request, mirror
from blockbak.flow.peers import send
from blockbak.host.kernel import Kernel
from blockbak.model import wire
from tests.cli.program import PROGRAM, Running, run
from tests.doubles import context
from tests.faults import BadMedium, FaultyKernel, QuickKernel
from tests.host.stage import put, sha
from tests.host.stage import run as stage_run
from tests.mirrors import BLOCK, PIECE, Last, failed, over_pipes
from tests.patterns import SECTOR, stamp

MIB = 1 << 20
SIZE = 5 * MIB + 700
SEED = 9

pytestmark = pytest.mark.root


def filled(path, size=SIZE, sequence=1):
    """Stamped sectors, and a piece of zeros."""
    data = bytearray(stamp(0, size // SECTOR + 1, sequence, SEED)[:size])
    data[2 * MIB : 2 * MIB + BLOCK * 3] = bytes(BLOCK * 3)
    path.write_bytes(data)
    return path


@pytest.fixture
def source(tmp_path):
    return filled(tmp_path / "source")


def old(tmp_path, name="target"):
    """A target that differs everywhere."""
    (tmp_path / name).write_bytes(stamp(0, SIZE // SECTOR + 1, 2, SEED)[:SIZE])
    return tmp_path / name


# --- the n-th call fails ---------------------------------------------------------------------------------------

NUMBERS = {
    "open": errno.EIO, "pwritev": errno.EIO, "preadv": errno.EIO, "fsync": errno.EIO, "close": errno.EIO,
    "truncate": errno.ENOSPC, "punch": errno.EIO, "drop_cache": errno.EIO, "rename": errno.EIO, "lock": errno.EIO,
}  # fmt: skip
MOST = 400


def throw(way, request, target, state, kernel):
    """The error that a run with a failing kernel ended with, of the end that it failed at; None if it went well."""
    world = context(state, kernel=kernel)
    if way == "here":
        try:
            report = mirror(request, world)
        except BlockbakError as error:
            return error, None
        return None, report
    ended = over_pipes(request, target, state, there=world)
    if ended.receiver is not None:
        failed(ended.receiver)
        return failed(ended.sender), None
    assert ended.sender is None, ended.sender
    return None, ended.report


@pytest.mark.parametrize("way", ["here", "over pipes"])
@pytest.mark.parametrize("new", [True, False], ids=["new file", "old file"])
@pytest.mark.parametrize("call", NUMBERS)
def test_a_failing_call_costs_no_more_than_the_run(way, new, call, source, tmp_path):
    met = 0
    for at in range(1, MOST):
        target = tmp_path / f"target-{at}"
        if not new:
            old(tmp_path, target.name)
        request = Request(str(source), str(target), overwrite=True)
        kernel = FaultyKernel(call, NUMBERS[call], at)
        error, report = throw(way, request, target, tmp_path / "state", kernel)
        assert not kernel.wrongs
        assert kernel.close_left() == []
        if error is None:
            assert report is not None
            lost = {one.start // BLOCK for one in report.unreadable}
            wrong = [
                number for number in range(-(-SIZE // BLOCK))
                if target.read_bytes()[number * BLOCK : (number + 1) * BLOCK]
                != source.read_bytes()[number * BLOCK : (number + 1) * BLOCK]
            ]  # fmt: skip
            assert set(wrong) <= lost
            assert report.attention or not lost
        elif new and target.exists():
            assert sha(target) == sha(source), "what has its name is whole"
        if kernel.fired:
            met += 1
            # The same deed, by itself.
            mirror(request, context(tmp_path / "state", kernel=QuickKernel()))
        assert sha(target) == sha(source)
        assert not os.path.exists(f"{target}.partial")
        target.unlink()
        if not kernel.fired:
            break
    else:
        pytest.fail(f"after {MOST} calls of {call} there was still one more")
    if not (call == "rename" and not new) and not (call == "punch" and new) and not (call == "truncate" and not new):
        assert met > 0, f"no call of {call}"


# --- what cannot be read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["here", "over pipes"])
def test_what_cannot_be_read_is_left_as_it_was_and_named(way, source, tmp_path):
    target = old(tmp_path)
    before = target.read_bytes()
    bad = [(MIB + 4096, MIB + 4096 + 512), (4 * MIB, 4 * MIB + BLOCK)]
    medium = BadMedium(str(source), bad)
    request = Request(str(source), str(target), overwrite=True)
    if way == "here":
        report = mirror(request, context(tmp_path / "state", kernel=medium))
    else:
        ended = over_pipes(request, target, tmp_path / "state", here=context(tmp_path / "state", kernel=medium))
        assert (ended.sender, ended.receiver) == (None, None)
        report = ended.report
    assert [(one.start, one.start + one.length) for one in report.unreadable] == bad
    assert report.attention
    expected = bytearray(source.read_bytes())
    for start, _ in bad:
        block = slice(start // BLOCK * BLOCK, start // BLOCK * BLOCK + BLOCK)
        expected[block] = before[block]
    assert target.read_bytes() == expected
    # The next run reads them again.
    assert mirror(request, context(tmp_path / "state")).differing_bytes == 2 * BLOCK
    assert sha(target) == sha(source)


@pytest.mark.parametrize("way", ["here", "over pipes"])
def test_strict_ends_at_the_first_sector_that_cannot_be_read(way, source, tmp_path):
    target = old(tmp_path)
    medium = context(tmp_path / "state", kernel=BadMedium(str(source), [(4 * MIB, 4 * MIB + 512)]))
    request = Request(str(source), str(target), overwrite=True, strict=True)
    if way == "here":
        with pytest.raises(SourceUnreadable) as error:
            mirror(request, medium)
        assert any("incomplete" in note for note in error.value.__notes__)
        return
    ended = over_pipes(request, target, tmp_path / "state", here=medium)
    assert isinstance(ended.sender, SourceUnreadable)
    assert "cannot be read at byte" in str(failed(ended.receiver))


@pytest.mark.parametrize("way", ["here", "over pipes"])
def test_a_sector_of_the_target_that_cannot_be_read_is_written(way, source, tmp_path):
    """A disk gives it another place then."""
    target = filled(tmp_path / "target")

    class Remapping(BadMedium):
        def pwritev(self, fd, buffers, offset):
            self.bad = []
            return super().pwritev(fd, buffers, offset)

    kernel = Remapping(str(target), [(4096, 4608)])
    request = Request(str(source), str(target), overwrite=True)
    world = context(tmp_path / "state", kernel=kernel)
    if way == "here":
        report = mirror(request, world)
    else:
        ended = over_pipes(request, target, tmp_path / "state", there=world)
        assert (ended.sender, ended.receiver) == (None, None)
        report = ended.report
    assert report.differing_bytes == PIECE
    assert sha(target) == sha(source)


@pytest.mark.parametrize("way", ["here", "over pipes"])
def test_a_disk_that_forgets_is_noticed(way, source, tmp_path):
    target = old(tmp_path)

    class Forgetful(Kernel):
        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            put(target, 3 * MIB + 512, bytes(512))

    request = Request(str(source), str(target), overwrite=True)
    world = context(tmp_path / "state", kernel=Forgetful())
    if way == "here":
        with pytest.raises(NotReadBack) as error:
            mirror(request, world)
        told = error.value
    else:
        ended = over_pipes(request, target, tmp_path / "state", there=world)
        assert isinstance(ended.receiver, NotReadBack)
        told = ended.sender
    assert f"{2 * MIB} to {4 * MIB}" in str(told)


@pytest.mark.parametrize("way", ["here", "over pipes"])
def test_a_full_disk_ends_it_and_the_next_run_goes_on(way, source, tmp_path, tmpfs):
    where = tmpfs(4 * MIB)
    target = where / "copy"
    request = Request(str(source), str(target), overwrite=True)
    if way == "here":
        with pytest.raises(TargetFull) as error:
            mirror(request, context(tmp_path / "state"))
        assert "incomplete" in "".join(error.value.__notes__)
    else:
        ended = over_pipes(request, target, tmp_path / "state")
        assert isinstance(ended.receiver, TargetFull)
        assert "No space is left" in str(failed(ended.sender))
    assert not target.exists()
    assert (where / "copy.partial").exists()
    stage_run("mount", "-o", "remount,size=8m", where)
    report = mirror(request, context(tmp_path / "state"))
    assert report.method == "continue"
    assert 0 < report.differing_bytes < SIZE - 2 * MIB, "what was there did not move again"
    assert sha(target) == sha(source)
    assert os.listdir(where) == ["copy"]


def taken_away(target):
    target.unlink()


def exchanged(target):
    (target.parent / "other").write_bytes(b"another")
    os.replace(target.parent / "other", target)


def cut(target):
    os.truncate(target, PIECE)


@pytest.mark.parametrize("way", ["here", "over pipes"])
@pytest.mark.parametrize("happens", [taken_away, exchanged, cut])
def test_a_target_that_others_take_away_meanwhile_is_no_copy(way, happens, source, tmp_path):
    """What differs lies at its beginning: the reading back of it goes well."""
    target = tmp_path / "target"
    target.write_bytes(bytes(BLOCK) + source.read_bytes()[BLOCK:])

    class Meanwhile(Kernel):
        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            happens(target)

    request = Request(str(source), str(target), overwrite=True)
    world = context(tmp_path / "state", kernel=Meanwhile())
    if way == "here":
        with pytest.raises(TargetFailed, match=r"Writing .*target failed"):
            mirror(request, world)
    else:
        ended = over_pipes(request, target, tmp_path / "state", there=world)
        assert isinstance(ended.receiver, TargetFailed)
        assert "Writing" in str(failed(ended.sender))


def test_nothing_that_was_never_begun_stays(source, tmp_path):
    """A failure before the first byte leaves no partial."""
    target = tmp_path / "copy"
    kernel = FaultyKernel("pwritev", errno.EIO, 1)
    with pytest.raises(TargetFailed):
        mirror(Request(str(source), str(target)), context(tmp_path / "state", kernel=kernel, workers=1))
    assert [path.name for path in tmp_path.iterdir() if "copy" in path.name] == []


def test_somebody_elses_partial_is_left_alone(source, tmp_path):
    (tmp_path / "copy.partial").write_bytes(b"mine")
    with pytest.raises(BlockbakError, match="overwritten only when told so"):
        mirror(Request(str(source), str(tmp_path / "copy")), context(tmp_path / "state"))
    assert (tmp_path / "copy.partial").read_bytes() == b"mine"


@pytest.mark.parametrize("way", ["here", "over pipes"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_nothing_is_written_through_a_link_that_is_in_the_way(way, link, source, tmp_path):
    """Whoever may write beside the target could else have any file overwritten, or the source be its own copy."""
    other, target = old(tmp_path, "other"), tmp_path / "copy"
    before = other.read_bytes()
    link(other, tmp_path / "copy.partial")
    request = Request(str(source), str(target), overwrite=True)
    if way == "here":
        with pytest.raises(BadTarget, match="link"):
            mirror(request, context(tmp_path / "state"))
    else:
        ended = over_pipes(request, target, tmp_path / "state")
        assert isinstance(ended.receiver, BadTarget)
        assert "link" in str(failed(ended.sender))
    assert other.read_bytes() == before
    assert os.path.lexists(tmp_path / "copy.partial")
    assert not target.exists()


def test_a_device_that_is_made_smaller_meanwhile_is_no_copy(source, tmp_path, loop):
    """As lvreduce does, whoever has the volume open."""
    target = loop(6 * MIB)

    class Meanwhile(Kernel):
        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            os.truncate(target.file, 4 * MIB)
            stage_run("losetup", "-c", target.path)

    kernel = Meanwhile()
    mirror(Request(str(source), target.path, overwrite=True), context(tmp_path / "state"))
    with pytest.raises(TargetFailed, match="another size"):
        mirror(Request(str(source), target.path, overwrite=True), context(tmp_path / "state", kernel=kernel))


# --- signals and kills ----------------------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        for number in range(48):
            file.write(stamp(number * 2048, 2048, 1, SEED))
    return path


def through(*words):
    """The other end as a child."""
    return shlex.join([*PROGRAM, "mirror", *map(str, words)])


def blocks(path):
    try:
        return path.stat().st_blocks
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("remote", [False, True], ids=["here", "through a program"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda one: one.name)
def test_it_is_ended_half_way_and_goes_on(number, remote, large, tmp_path):
    target = tmp_path / "copy"
    partial = tmp_path / "copy.partial"
    words = [large, "--through", through("--receive", target)] if remote else [large, target]
    with Running("mirror", "--limit", "40M", *words) as going:
        going.until("half of it was written", lambda: blocks(partial) * 512 > 8 * MIB)
        going.signal(number)
        if number == signal.SIGKILL:
            going._process.wait(20)
        else:
            ended = going.end()
            assert ended.status == 130, str(ended)
            assert "incomplete" in ended.said, str(ended)
    deadline = time.monotonic() + 20
    while remote and time.monotonic() < deadline and locked(partial):
        time.sleep(0.05)
    assert partial.exists()
    assert not target.exists()
    there = blocks(partial) * 512
    ended = run("mirror", *words, "--json")
    assert ended.status == 0, str(ended)
    report = ended.document
    assert report["method"] == "continue"
    assert report["differing_bytes"] <= 48 * MIB - there + 2 * PIECE, "what was there did not move again"
    assert sha(target) == sha(large)
    assert not partial.exists()


def locked(path):
    """Whether the receiver still has it."""
    import fcntl

    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_receiver_that_is_killed_is_told(large, tmp_path):
    target = tmp_path / "copy"
    noted = tmp_path / "pid"
    script = f"echo $$ > {noted}; exec {through('--receive', target)}"
    with Running("mirror", "--limit", "40M", large, "--through", shlex.join(["sh", "-c", script]), "--json") as going:
        going.until("some of it was written", lambda: blocks(tmp_path / "copy.partial") > 0)
        os.kill(int(noted.read_text()), signal.SIGKILL)
        ended = going.end()
    assert ended.status == 1, str(ended)
    assert ended.error["name"] == "PeerGone"
    assert "killed by signal 9" in ended.error["message"]
    assert "may be incomplete" in ended.error["notes"][0]


# --- who is no other end ---------------------------------------------------------------------------------------------


def sent_to(source, tmp_path, *argv):
    with pytest.raises(BlockbakError) as failed:
        send(Request(str(source), ""), argv, context(tmp_path / "state"))
    return failed.value


def test_programs_that_are_no_other_end(source, tmp_path):
    gone = sent_to(source, tmp_path, "true")
    assert isinstance(gone, PeerGone)
    assert "ended with status 0" in str(gone)
    assert "there is no blockbak there" in str(sent_to(source, tmp_path, "sh", "-c", "exit 127"))
    greeting = sent_to(source, tmp_path, "sh", "-c", "echo Welcome to this machine, enjoy; cat > /dev/null")
    assert isinstance(greeting, PeerNotUnderstood)
    assert "Welcome to this" in str(greeting)
    assert isinstance(sent_to(source, tmp_path, "cat"), PeerNotUnderstood), "what comes back is our own preamble"
    assert sent_to(source, tmp_path, "no-such-program").name == "MissingProgram"
    assert isinstance(sent_to(source, tmp_path, "yes"), PeerNotUnderstood)


def test_a_newer_other_end_is_named(source, tmp_path):
    import numpy as np

    newer = np.array((wire.PREAMBLE_MAGIC, 2, wire.ROLE_RECEIVER), wire.PREAMBLE).tobytes()
    code = f"import sys; sys.stdout.buffer.write({newer!r}); sys.stdout.flush(); sys.stdin.read()"
    error = sent_to(source, tmp_path, sys.executable, "-c", code)
    assert isinstance(error, PeerVersion)
    assert (error.fields["theirs"], error.fields["ours"]) == (2, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_other_end_that_hangs_can_be_given_up(number, source):
    with Running("mirror", source, "--through", "sleep 1000") as going:
        going.until("it waited", lambda: "sleep" in children(going.pid))
        going.signal(number)
        assert going.end().status == 130


def children(pid):
    import psutil

    return " ".join(one.name() for one in psutil.Process(pid).children())


def test_the_wish_to_stop_is_told_to_the_other_end(source, tmp_path):
    calls = iter(range(1 << 30))

    def check():
        if next(calls) > 12:
            raise Interrupted(state="")

    here = replace(context(tmp_path / "state"), check=check)
    ended = over_pipes(Request(str(source), ""), tmp_path / "copy", tmp_path / "state", here=here)
    assert isinstance(ended.sender, Interrupted)
    failed(ended.receiver)
    assert not (tmp_path / "copy").exists()


# --- bytes on the wire ------------------------------------------------------------------------------------------------


def alter(dice, at, kind):
    """Change the stream once, from about byte ``at`` on. A line that has lost something is cut: bytes that are missing
    at the very end would be waited for, as on a line that is only slow.
    """
    done = False

    def change(offset, data):
        nonlocal done
        if done or offset + len(data) <= at:
            return data
        done = True
        place = max(0, at - offset)
        if kind == "cut":
            return None
        if kind == "flip":
            changed = bytearray(data)
            changed[place] ^= 1 << dice.randrange(8)
            return bytes(changed)
        if kind == "drop":
            return Last(data[:place] + data[place + dice.randrange(1, 100) :])
        if kind == "twice":
            return data[:place] + data[place : place + 200] + data[place:]
        return data[:place] + dice.randbytes(dice.randrange(1, 5000)) + data[place:]

    return change


@pytest.mark.parametrize("direction", ["to_receiver", "to_sender"])
@pytest.mark.parametrize("kind", ["flip", "cut", "drop", "twice", "noise"])
def test_altered_bytes_never_pass_for_a_mirror(kind, direction, source, tmp_path, rng):
    travelled = {"to_receiver": 5 * MIB, "to_sender": 2500}[direction]
    for number in range(8):
        target = old(tmp_path, f"target-{number}")
        at = rng.choice([rng.randrange(40), rng.randrange(600), rng.randrange(travelled)])
        dice = random.Random(rng.random())
        request = Request(str(source), "")
        ended = over_pipes(request, target, tmp_path / "state", **{direction: alter(dice, at, kind)})
        equal = sha(target) == sha(source)
        if ended.report is not None:
            assert equal, f"called in step, and is not: {kind} at {at}"
        else:
            failed(ended.sender)
        if ended.receiver is not None:
            failed(ended.receiver)
        elif ended.report is None:
            assert equal, "the receiver was done, and only its last word was lost"


@pytest.mark.parametrize("role", [wire.ROLE_SENDER, wire.ROLE_RECEIVER])
def test_noise_after_a_right_preamble_is_refused(role, source, tmp_path, rng):
    for _ in range(20):
        # Less than a header is waited for, as a slow line is.
        noise = wire.preamble(role) + rng.randbytes(rng.randrange(wire.HEADER.itemsize, 5000))
        target = tmp_path / "copy"
        options = {("to_receiver" if role == wire.ROLE_SENDER else "to_sender"): replaced_by(noise)}
        ended = over_pipes(Request(str(source), ""), target, tmp_path / "state", **options)
        assert ended.report is None
        failed(ended.sender)
        failed(ended.receiver)
        assert not target.exists()


def test_a_receiver_that_fails_does_not_wait_for_a_sender_that_says_nothing(source, tmp_path):
    target = old(tmp_path)
    kernel = FaultyKernel("pwritev", errno.EIO, 1)
    carried = 0

    def silent(_, data):
        nonlocal carried
        kept = data[: max(0, 3 * MIB - carried)]
        carried += len(data)
        return kept

    there = context(tmp_path / "state", kernel=kernel)
    begin = time.monotonic()
    ended = over_pipes(Request(str(source), ""), target, tmp_path / "state", there=there, to_receiver=silent)
    assert time.monotonic() - begin < 20
    assert isinstance(ended.receiver, TargetFailed)
    assert "Writing byte" in str(failed(ended.sender))


def replaced_by(noise):
    def change(offset, data):
        return noise if offset == 0 else b""

    return change
