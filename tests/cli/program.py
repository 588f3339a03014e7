"""The program as a person or a script runs it: always a child process, and what must hold of every run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import pytest

from tests.host.stage import Forks

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, "-P", "-m", "blockbak")
LIMIT_SECONDS = 45
"""No run of these tests takes a tenth of it; it ends one that hangs."""

Word = str | bytes | os.PathLike[str]


def _without_powers() -> tuple[str, ...]:
    owner = ROOT.stat()
    if os.geteuid() != 0:
        return PROGRAM
    uid, gid = f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}"
    return ("setpriv", uid, gid, "--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--", *PROGRAM)


PLAIN = _without_powers()
"""The program without root's powers: as the owner of the checkout, who can read the program at least. Where that
is root, it is a root that files of mode 0 keep out.
"""
PLAIN_UID = ROOT.stat().st_uid


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Ours, without what would steer blockbak, and with a state directory of the tests."""
    made = {name: value for name, value in os.environ.items() if not name.startswith(("BLOCKBAK_", "PYTHONIO"))}
    return made | {"BLOCKBAK_STATE_DIR": f"{os.environ['TMPDIR']}/state"} | (more or {})


_forks: list[Forks] = []


@contextlib.contextmanager
def forked(folder: Path) -> Iterator[None]:
    """Runs that need nothing of a start of Python are children of a process that has imported the program."""
    _forks.append(Forks(folder, environment()))
    try:
        yield
    finally:
        _forks.pop().end()


def parsed(text: bytes) -> Any:
    """The one JSON document that ``text`` is. Raises ValueError, also for what only Python takes for JSON."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text.decode("utf-8"), parse_constant=refuse)


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    words: tuple[Word, ...]
    status: int
    out: bytes
    err: bytes

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def said(self) -> str:
        return self.err.decode("utf-8", "backslashreplace")

    @property
    def document(self) -> Any:
        return parsed(self.out)

    @property
    def error(self) -> dict[str, Any]:
        return self.document["error"]

    def __str__(self) -> str:
        words = " ".join(os.fsdecode(word) for word in self.words)
        return f"{words!a} ended with {self.status}\n--- stdout\n{self.out!r}\n--- stderr\n{self.said}"


def must_hold(ended: Ended, *, terminal: bool = False, documented: bool = True) -> Ended:
    """What is true of every run, however it ends."""
    both = ended.out + ended.err
    assert b"Traceback" not in both, str(ended)
    assert b"an error it does not know" not in both, str(ended)
    assert ended.status in (0, 1, 2, 3, 4, 5, 130), str(ended)
    if not terminal:
        assert b"\r" not in ended.err, f"a progress bar where no terminal is: {ended}"
    if documented and "--json" in ended.words:
        assert isinstance(ended.document, dict | list), str(ended)
    return ended


def run(
    *words: Word,
    program: Sequence[str] = PROGRAM,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    umask: int = -1,
    stdout: int = subprocess.PIPE,
    limit: float = LIMIT_SECONDS,
) -> Ended:
    """Run it to its end, without a terminal and with nothing on standard input."""
    ours = all(name.startswith("BLOCKBAK_") for name in env or {})
    if _forks and program is PROGRAM and ours and (umask, stdout) == (-1, subprocess.PIPE):
        where = cwd or Path.cwd()
        told = _forks[-1].run([os.fsdecode(word) for word in words], where, environment(env))
        return must_hold(Ended(words, *told))
    done = subprocess.run(
        [*program, *words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, cwd=cwd,
        env=environment(env), umask=umask, timeout=limit, check=False,
    )  # fmt: skip
    ended = Ended(words, done.returncode, done.stdout or b"", done.stderr)
    return must_hold(ended, documented=stdout == subprocess.PIPE)


def ok(*words: Word, **options: Any) -> Ended:
    """A run that must succeed."""
    ended = run(*words, **options)
    assert ended.status == 0, str(ended)
    return ended


def document(*words: Word, status: int = 0, **options: Any) -> Any:
    """The document of a run with ``--json``."""
    ended = run(*words, "--json", **options)
    assert ended.status == status, str(ended)
    return ended.document


def both(*words: Word, **options: Any) -> tuple[Ended, Ended]:
    """The same command line for a person and, with ``--json``, for a script; both run at once."""
    with Running(*words, **options) as for_people, Running(*words, "--json", **options) as for_scripts:
        return for_people.end(), for_scripts.end()


def fails(status: int, name: str, *words: Word, **options: Any) -> Ended:
    """A command line that must fail so: a document for scripts, and its sentence on standard error for people."""
    ended = run(*words, "--json", **options)
    assert ended.status == status, str(ended)
    error = ended.error
    assert (error["name"], error["exit"]) == (name, status), str(ended)
    assert error["message"].endswith("."), error
    assert isinstance(error["advice"], str)
    assert isinstance(error["fields"], dict)
    assert ended.said.startswith("blockbak: "), str(ended)
    return ended


class Child:
    """A run that is under way; whatever happens, it is over when the ``with`` is left."""

    _process: subprocess.Popen[bytes]

    def __init__(self, words: tuple[Word, ...]) -> None:
        self.words = words
        self._close = ExitStack()
        self._out = self._file()

    def _file(self) -> IO[bytes]:
        """For what it says. No pipe: nobody needs to empty it while it runs."""
        return self._close.enter_context(tempfile.TemporaryFile())

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: int) -> Self:
        self._process.send_signal(number)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._close.close()


class Running(Child):
    """A run without a terminal."""

    _looks_every = 0.001
    """Seconds between two looks at what it does."""

    def __init__(
        self,
        *words: Word,
        program: Sequence[str] = PROGRAM,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        limit: float = LIMIT_SECONDS,
    ) -> None:
        super().__init__(words)
        self._limit = limit
        self._err = self._file()
        self._process = subprocess.Popen(
            [*program, *words], stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err, cwd=cwd,
            env=environment(env),
        )  # fmt: skip

    def _so_far(self, status: int) -> Ended:
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read())
        return Ended(self.words, status, texts[0], texts[1])

    def said(self) -> str:
        """What it said until now; the place where it writes stays where it is."""
        return os.pread(self._err.fileno(), 1 << 20, 0).decode()

    def until(self, what: str, holds: Callable[[], bool]) -> Self:
        """Come back as soon as ``holds`` does; fails if the run is over before."""
        deadline = time.monotonic() + self._limit
        while not holds():
            if (status := self._process.poll()) is not None:
                pytest.fail(f"it was over before {what}: {self._so_far(status)}")
            if time.monotonic() > deadline:
                pytest.fail(f"it never came to this: {what}")
            time.sleep(self._looks_every)
        return self

    def pause(self) -> Self:
        """Stop it where it is; fails if it is over."""
        self.signal(signal.SIGSTOP)
        while (state := self._state()) != "T":
            if state in ("", "Z", "X"):
                pytest.fail(f"it was over before it could be stopped: {self._so_far(self._process.wait())}")
            time.sleep(0.001)
        return self

    def _state(self) -> str:
        """proc_pid_stat(5): of all of its threads, once they stopped together; an empty string where it is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def go_on(self) -> Self:
        """Let it go on after ``pause``; signals that came meanwhile reach it first."""
        return self.signal(signal.SIGCONT)

    def end(self) -> Ended:
        """Wait for its end."""
        try:
            status = self._process.wait(self._limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end: {self._so_far(-1)}")
        return must_hold(self._so_far(status))


class Terminal(Child):
    """A run at a terminal: input and messages are the terminal, standard output is a file beside it, or with
    ``answers`` the terminal too. ``size`` is what the terminal says of its rows and columns.
    """

    def __init__(
        self,
        *words: Word,
        env: dict[str, str] | None = None,
        size: tuple[int, int] = (40, 160),
        answers: bool = False,
    ) -> None:
        super().__init__(words)
        self.seen = b""
        self._master, slave = os.openpty()
        self._close.callback(os.close, self._master)
        try:
            fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            # With a controlling terminal of its own, so that Ctrl-C typed there is SIGINT.
            self._process = subprocess.Popen(
                ["setsid", "--ctty", *PROGRAM, *words], stdin=slave, stdout=slave if answers else self._out, stderr=slave,
                env=environment({"TERM": "xterm"} | (env or {})),
            )  # fmt: skip
        except BaseException:
            self._close.close()
            raise
        finally:
            os.close(slave)

    def _read(self, deadline: float) -> bool:
        """Take what is there; False when the other side is closed."""
        if not select.select([self._master], [], [], max(0, deadline - time.monotonic()))[0]:
            pytest.fail(f"nothing more came from the terminal; seen so far: {self.seen!r}")
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # EIO: nobody has the terminal open any more
            return False
        self.seen += data
        return bool(data)

    def until(self, text: bytes) -> Self:
        """Come back once ``text`` was on the screen."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.seen:
            if not self._read(deadline):
                pytest.fail(f"it was over before it said {text!r}; it said {self.seen!r}")
        return self

    def type(self, keys: bytes) -> Self:
        os.write(self._master, keys)
        return self

    def end(self) -> Ended:
        deadline = time.monotonic() + LIMIT_SECONDS
        while self._read(deadline):
            pass
        status = self._process.wait(LIMIT_SECONDS)
        self._out.seek(0)
        return must_hold(Ended(self.words, status, self._out.read(), self.seen), terminal=True)


# --- what lies on the disk -----------------------------------------------------------------------------


def grown(folder: Path, pattern: str) -> Callable[[], bool]:
    """Whether a file of ``folder`` that fits ``pattern`` has bytes of its own."""

    def look() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_blocks > 0 for path in folder.glob(pattern))
        return False

    return look


def opened(run: Running, path: Path) -> Callable[[], bool]:
    """Whether the run has ``path`` open."""

    def look() -> bool:
        with contextlib.suppress(FileNotFoundError):
            folder = f"/proc/{run.pid}/fd"
            return any(os.readlink(f"{folder}/{entry}") == str(path) for entry in os.listdir(folder))
        return False

    return look


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below ``folder``: equal if nothing was made, changed or removed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        found[str(path.relative_to(folder))] = (info.st_ino, info.st_size, info.st_mtime_ns)
    return found
