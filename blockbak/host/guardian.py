"""blockbak's side of the guardian: starting it, asking it to let go, and doing its work where it is dead too.

Nothing is suspended and no application is brought to rest before a guardian is ready to undo it. What it is to
undo lies in its journal, whose lock it holds while it lives: one that is not locked belongs to a guardian that
died, and ``settle`` does its work.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blockbak.errors import MapperFailed, NoGuardian
from blockbak.host import guard
from blockbak.host.mapper import Mapper
from blockbak.host.signals import undisturbed

if TYPE_CHECKING:
    from blockbak.host.guard import Resumer

PROGRAM = (sys.executable, "-I", "-S", guard.__file__)
"""Isolated, without site packages: nothing of the environment decides what it loads."""
START_SECONDS = 30.0
"""What its start may take. Nothing is held back yet, so a machine that is busy gets the time it needs."""
LET_GO_SECONDS = 30.0
"""What resuming may take, beside the end commands' own timeouts, until no report is waited for any more."""

MINDED = 'ln -s "$$" "$1" 2>/dev/null || exit; shift; exec "$@"'
"""A shell's line, because the very process that notes itself (in a link, its first word) must become the program."""


@dataclass(frozen=True, slots=True)
class Ending:
    """A command the guardian runs at the end, with exactly this environment, for at most ``timeout`` seconds.

    It must do no harm when it is run a second time.
    """

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    timeout: float
    label: str


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of an Ending. ``status`` is None where it did not end by itself, and ``reason`` says why;
    negative, it is a signal's number. ``output`` is the beginning of its standard output, ``stderr`` the end
    of its messages.
    """

    label: str
    status: int | None
    reason: str
    output: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it was let go. ``in_time``: all was held until blockbak asked to let go. ``reasons`` are sentences:
    late, a device not resumed, the guardian gone.
    """

    in_time: bool
    reasons: tuple[str, ...]
    endings: tuple[Ended, ...]


@dataclass(frozen=True, slots=True)
class Journal:
    """What a guardian that died has left to do. ``state``: of this boot; of an earlier one, which ended all that
    was held; or not to be understood.
    """

    path: str
    pid: int
    devices: tuple[tuple[str, str], ...]
    endings: tuple[Ending, ...]
    scratch: str
    state: Literal["now", "earlier", "unreadable"]


class Guardian:
    """A guardian that is ready. Made by ``guarded``."""

    def __init__(
        self, process: subprocess.Popen[bytes], channel: socket.socket, journal: Journal, mapper: Resumer | None
    ) -> None:
        self._process, self._channel, self._journal, self._mapper = process, channel, journal, mapper
        self._received = b""
        self._outcome: Outcome | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def acted(self) -> bool:
        """Whether it let go by itself already, or died. Costs one system call."""
        if self._outcome is not None:
            return True
        # It says nothing between "ready" and that it is late, or its report.
        return bool(self._received) or _readable(self._channel, 0)

    def within(self, seconds: float) -> None:
        """Bring its deadline forward to ``seconds`` from now; it is never put off."""
        self._say({"within": seconds})

    @contextmanager
    def minding(self, argv: Sequence[str]) -> Iterator[tuple[str, ...]]:
        """A form of ``argv`` that the guardian ends before it runs its end commands, if it is still at work then.

        To be run inside the ``with``, as the first process of a session, with the scratch directory named in its
        environment. It does not even begin where the guardian has acted.
        """
        link = os.path.join(self._journal.scratch, guard.RUNNING, "process")
        try:
            yield ("/bin/sh", "-c", MINDED, "sh", link, *argv)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(link)

    def release(self) -> Outcome:
        """Let go now, and say how it went; the same answer each time. Returns when all has been let go.

        Raises nothing: a guardian that is dead has its work done here.
        """
        if self._outcome is None:
            self._outcome = self._released()
        return self._outcome

    def _say(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # who is gone is noticed when its report is waited for
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _released(self) -> Outcome:
        self._say({"release": True})
        limit = LET_GO_SECONDS + sum(one.timeout + 2 * guard.GRACE_SECONDS for one in self._journal.endings)
        until = time.monotonic() + limit
        report = self._next(until)
        if report is not None and "late" in report:
            report = self._next(until)
        self._channel.close()
        if report is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LET_GO_SECONDS)
            ended = tuple(Ended(**one) for one in report["ended"])
            return Outcome(report["in_time"], tuple(report["reasons"]), ended)
        try:
            status = self._process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            said = f"The guardian (process {self.pid}) has not let go within {limit:g} s, and is still trying."
            return Outcome(in_time=False, reasons=(said,), endings=())
        said = f"The guardian died before it let go ({_in_words(status)}); blockbak did it instead."
        done, ended = _undo(self._journal, self._mapper)
        return Outcome(in_time=False, reasons=(said, *done), endings=ended)

    def _next(self, until: float) -> Any:
        """Its next message; None when it is gone, or at ``until``."""
        while b"\n" not in self._received:
            if not _readable(self._channel, max(0.0, until - time.monotonic())):
                return None
            try:
                data = self._channel.recv(1 << 16)
            except OSError:
                return None
            if not data:
                return None
            self._received += data
        line, self._received = self._received.split(b"\n", 1)
        return json.loads(line)

    def start(self, orders: Mapping[str, Any]) -> None:
        """Give it its orders and wait until it is ready. Raises NoGuardian, with nothing left of it."""
        self._say(orders)
        answer = self._next(time.monotonic() + START_SECONDS)
        if answer is not None and "ready" in answer:
            return
        self._channel.close()
        if answer is None:
            self._process.kill()
        status = self._process.wait()
        self._outcome = Outcome(in_time=False, reasons=("There was no guardian.",), endings=())
        guard.clear(self._journal.scratch)
        for path in (self._journal.path, self._journal.path + ".partial"):
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise NoGuardian(reason=answer["failed"] if answer else f"it was not ready in time ({_in_words(status)})")


@contextmanager
def guarded(
    devices: Sequence[tuple[str, str]],
    endings: Sequence[Ending],
    *,
    deadline: float,
    run_dir: str,
    boot: str,
    scratch: str = "",
    program: Sequence[str] = PROGRAM,
    mapper: Resumer | None = None,
) -> Iterator[Guardian]:
    """A guardian for as long as the ``with`` lasts, for at most ``deadline`` seconds.

    At its end, at the deadline, or when blockbak dies, ``devices`` (name and uuid, as device-mapper knows them)
    are resumed where they are suspended; then ``endings`` are run in their order; then ``scratch``, a directory
    that the guardian makes, is removed with all in it. Suspending is the caller's part. ``program`` and
    ``mapper`` are for tests. Raises NoGuardian.
    """
    path = os.path.join(os.path.abspath(run_dir), f"guardian-{os.getpid()}-{secrets.token_hex(4)}.json")
    journal = Journal(path, 0, tuple(devices), tuple(endings), scratch, "now")
    orders = {
        "journal": path,
        "deadline": deadline,
        "boot": boot,
        "devices": [list(device) for device in devices],
        "ends": [_fields(one) for one in endings],
        "scratch": scratch,
    }
    # A signal between the start of the process and the `try` would leave it running.
    with undisturbed() as through:
        guardian = _spawn(program, journal, mapper)
        try:
            guardian.start(orders)
            with through():
                yield guardian
        finally:
            guardian.release()


def _spawn(program: Sequence[str], journal: Journal, mapper: Resumer | None) -> Guardian:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = subprocess.Popen(
                program,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise NoGuardian(reason=f"it could not be started: {error.strerror}") from error
    return Guardian(process, ours, journal, mapper)


# --- what guardians that died have left --------------------------------------------------------


def leftovers(run_dir: str, boot: str) -> list[Journal]:
    """The journals of guardians that died, of this boot or an earlier one; to be given to ``settle``.

    Raises NoGuardian where others than we could have put journals there.
    """
    directory = os.path.abspath(run_dir)
    try:
        if reason := guard.unsafe_directory(directory):
            raise NoGuardian(reason=f"{directory} is not safe: {reason}")
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        if name.startswith("guardian-") and name.endswith(".json"):
            path = os.path.join(directory, name)
            with _unattended(path) as file:
                if file is not None:
                    found.append(_parse(path, file, boot))
    return found


def settle(journal: Journal, mapper: Resumer | None = None) -> list[str]:
    """Do what a dead guardian has left: resume, run the end commands, remove its journal. Sentences for people.

    Nothing is done where the journal is gone or in another's hands by now, nor for one of an earlier boot, which
    is only removed. One that cannot be read stays. Without ``mapper``, device-mapper is opened where it is needed.
    """
    with _unattended(journal.path) as file:
        if file is None:
            return []
        if journal.state == "unreadable":
            return [f"The journal {journal.path} cannot be read; look whether a device is suspended (dmsetup info)."]
        said: list[str] = []
        if journal.state == "earlier":
            guard.clear(journal.scratch)
            with contextlib.suppress(OSError):
                os.unlink(journal.path)
        else:
            said.append(f"Process {journal.pid}, which was to let go of what a backup held still, died.")
            done, ended = _undo(journal, mapper)
            said += [*done, *(_told(one) for one in ended)]
        return said


def _undo(journal: Journal, mapper: Resumer | None) -> tuple[list[str], tuple[Ended, ...]]:
    """What the guardian does at its end. The journal goes last, and stays where a device may be suspended."""
    said: list[str] = []
    left: list[tuple[str, str]] = []
    if journal.devices:
        try:
            with contextlib.ExitStack() as undo:
                said, left = guard.resume_all(mapper or undo.enter_context(Mapper()), journal.devices)
        except MapperFailed as error:  # the end commands must be run all the same
            said, left = [str(error)], list(journal.devices)
    guard.stop_running(journal.scratch)
    ended = tuple(Ended(**guard.run_ending(_fields(one))) for one in journal.endings)
    guard.clear(journal.scratch)
    if not left:
        with contextlib.suppress(OSError):
            os.unlink(journal.path)
    return said, ended


@contextmanager
def _unattended(path: str) -> Iterator[int | None]:
    """The open journal, with its lock held; None where its guardian lives, or somebody settles it, or did."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:  # gone, or a link, which no guardian makes
        yield None
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        # Removed by whoever held the lock until now.
        yield fd if os.fstat(fd).st_nlink else None
    finally:
        os.close(fd)


def _parse(path: str, file: int, boot: str) -> Journal:
    unreadable = Journal(path, 0, (), (), "", "unreadable")
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        return unreadable
    try:
        with open(file, "rb", closefd=False) as stream:
            fields = json.load(stream)
        if fields["version"] != guard.VERSION:
            return unreadable
        return Journal(
            path,
            fields["pid"],
            tuple((str(name), str(uuid)) for name, uuid in fields["devices"]),
            tuple(_ending(one) for one in fields["ends"]),
            fields["scratch"],
            "now" if fields["boot"] == boot else "earlier",
        )
    except (ValueError, KeyError, TypeError):
        return unreadable


def _ending(fields: Mapping[str, Any]) -> Ending:
    env = tuple((str(key), str(value)) for key, value in fields["env"])
    return Ending(tuple(fields["argv"]), env, float(fields["timeout"]), fields["label"])


def _fields(ending: Ending) -> dict[str, Any]:
    """An Ending as a journal and ``guard.run_ending`` have it."""
    return {"label": ending.label, "argv": ending.argv, "env": ending.env, "timeout": ending.timeout}


def _readable(channel: socket.socket, seconds: float) -> bool:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def _told(ended: Ended) -> str:
    if ended.status == 0:
        return f"Its end command '{ended.label}' was run."
    what = ended.reason or _in_words(ended.status)
    return f"Its end command '{ended.label}' failed ({what}): {ended.stderr or 'it said nothing'}."


def _in_words(status: int | None) -> str:
    return f"killed by signal {-status}" if status is not None and status < 0 else f"exit status {status}"
