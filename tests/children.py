"""blockbak as a process of its own: run to its end, killed on the way, or measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Its ``--json`` output."""
        return json.loads(self.out)


def environment(repository: Place) -> dict[str, str]:
    """This process's, with a state directory beside the repository."""
    state = Path(repository).parent / "state"
    return {**os.environ, "BLOCKBAK_STATE_DIR": str(state)}


def arguments(repository: Place, *words: object) -> list[str]:
    return ["-r", str(repository), *map(str, words)]


def run(repository: Place, *words: object, prefix: tuple[str, ...] = ()) -> Done:
    """``blockbak -r REPOSITORY WORDS...``, behind ``prefix``."""
    command = [*prefix, sys.executable, "-m", "blockbak", *arguments(repository, *words)]
    done = subprocess.run(
        command, env=environment(repository), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def rescue(repository: Place, *words: object) -> Done:
    """``rescue.py`` of the repository, in a Python that finds no installed package: no blockbak either."""
    command = [sys.executable, "-I", "-S", os.path.join(repository, "rescue.py"), *map(str, words)]
    done = subprocess.run(command, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


# --- killed ---------------------------------------------------------------------------------------

# Imports take longer than the work; a kill among them would show nothing. So they come before the word.
_WARM = """
import sys
import blockbak.cli.backup, blockbak.cli.delete, blockbak.cli.recover, blockbak.cli.restore, blockbak.cli.synthesize
import blockbak.flow.backup, blockbak.flow.delete, blockbak.flow.recover, blockbak.flow.restore
import blockbak.flow.synthesize
from blockbak.cli.main import main
print("ready", flush=True)
sys.stdin.readline()
main()
"""


@contextmanager
def warm(repository: Place, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A child that has imported everything and waits; ``go`` starts it. Killed at the end, if it still runs."""
    child = subprocess.Popen(
        [sys.executable, "-c", _WARM, *arguments(repository, *words)], env=environment(repository), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def go(child: subprocess.Popen[str]) -> None:
    """Let it begin."""
    assert child.stdin
    child.stdin.write("\n")
    child.stdin.flush()


def kill_when(child: subprocess.Popen[str], due: Callable[[], bool]) -> bool:
    """Let it begin and SIGKILL it as soon as ``due``; False if it ended before."""
    go(child)
    while child.poll() is None:
        # The kill itself must not lose time to a pause between two looks.
        if due():
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    return child.returncode == -signal.SIGKILL


# --- measured -------------------------------------------------------------------------------------

# The peak of a process is inherited over exec from what it was before. So a small process starts the one
# that is measured: a child of the tests would show their own size.
_MEASURE = """
import json, os, subprocess, sys, time
begin = time.monotonic()
child = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(child.pid, 0)
child.returncode = os.waitstatus_to_exitcode(status)
told = {"code": child.returncode, "seconds": time.monotonic() - begin, "peak_bytes": usage.ru_maxrss * 1024,
        "cpu_seconds": usage.ru_utime + usage.ru_stime}
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
"""


@dataclass(frozen=True)
class Measured:
    """What a command took, and what it said."""

    code: int
    seconds: float
    peak_bytes: int
    cpu_seconds: float
    out: str
    err: str


def measure(repository: Place, *words: object) -> Measured:
    """Run a command and measure it and no other process."""
    told = Path(repository).parent / "measured.json"
    command = [sys.executable, "-I", "-S", "-c", _MEASURE, str(told)]
    command += [sys.executable, "-m", "blockbak", *arguments(repository, *words)]
    done = subprocess.run(
        command, env=environment(repository), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
    )
    return Measured(**json.loads(told.read_text()), out=done.stdout, err=done.stderr)
