"""Runs that make volumes: each holds a lock file that says it is alive.

So what a killed run left is known by its tag and its missing lock, and nothing else is ever touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from blockbak.errors import MapperFailed
from blockbak.model import snapshot as plan


def private(run_dir: str) -> None:
    """Make the directory of runs, which nobody else may look into. Raises OSError."""
    os.makedirs(run_dir, mode=0o700, exist_ok=True)


def _lock_path(run_dir: str, run_id: str) -> str:
    return os.path.join(run_dir, f"run-{run_id}.lock")


class Note(msgspec.Struct):
    """What a run's lock file says: the volumes whose snapshots it makes, by device-mapper name and UUID."""

    origins: list[tuple[str, str]] = msgspec.field(default_factory=list)


@dataclass(slots=True)
class Run:
    """A run that makes snapshots: who it is, and the lock that says it lives."""

    id: str
    host: str
    boot: str
    run_dir: str
    _fd: int = field(default=-1, repr=False)

    @property
    def tags(self) -> tuple[str, ...]:
        """For everything it makes."""
        return plan.tags(self.id, self.host, self.boot)

    def touches(self, origins: Sequence[tuple[str, str]]) -> None:
        """Note whose tables LVM is about to exchange: a command that is killed meanwhile leaves them suspended."""
        text = msgspec.json.encode(Note(list(origins)))
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text, 0)


@contextmanager
def alive(run_id: str, host: str, boot: str, run_dir: str) -> Iterator[Run]:
    """Be a run, until the ``with`` is over. Raises SnapshotError where the directory cannot be used."""
    path = _lock_path(run_dir, run_id)
    try:
        private(run_dir)
        fd = _held(path)
    except OSError as error:
        raise MapperFailed(action="lock", device=path, reason=error.strerror, errno=error.errno) from error
    try:
        yield Run(run_id, host, boot, run_dir, fd)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(fd)


def _held(path: str) -> int:
    """A new lock file, held. Who sweeps may meet it before it is, and remove it: then it is made once more."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def known_runs(run_dir: str) -> set[str]:
    """The runs that have a lock file, alive or not."""
    return {path.name.removeprefix("run-").removesuffix(".lock") for path in Path(run_dir).glob("run-*.lock")}


def living_runs(run_dir: str) -> set[str]:
    """The runs that hold their lock file right now."""
    living = set()
    for run_id in known_runs(run_dir):
        try:
            fd = os.open(_lock_path(run_dir, run_id), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            living.add(run_id)
        finally:
            os.close(fd)
    return living


@contextmanager
def dead_runs(run_dir: str) -> Iterator[dict[str, Note]]:
    """The runs that are over and what they noted; their files go when this ends without an error."""
    dead: dict[str, Note] = {}
    with ExitStack() as stack:
        for run_id in sorted(known_runs(run_dir)):
            path = Path(_lock_path(run_dir, run_id))
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            stack.callback(os.close, fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            dead[run_id] = Note()
            with contextlib.suppress(OSError, ValueError):
                dead[run_id] = msgspec.json.decode(os.pread(fd, 1 << 20, 0) or b"{}", type=Note)
        yield dead
        # What could not be let go of is to be known to the next run as well.
        for run_id in dead:
            unlink(Path(_lock_path(run_dir, run_id)))


def unlink(path: Path) -> None:
    """Remove a file, if it is there and that can be done."""
    with contextlib.suppress(OSError):
        path.unlink()
