"""A place apart: mounts that nobody else sees, and programs that end with us.

A process keeps a mount and a process namespace for as long as it can read from a pipe of ours. Whatever becomes of us,
the pipe's other end closes, that process ends, the kernel ends all others of its namespace, and the mounts go with
the last of them. So there is nothing that somebody would have to clear away afterwards.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from blockbak.errors import CommandFailed, MissingProgram, NoPlaceApart
from blockbak.host import runner
from blockbak.host.runner import Completed, package_of, run, search_path, which
from blockbak.host.signals import undisturbed

START_SECONDS = 20.0
END_SECONDS = 20.0
MOUNT_SECONDS = 600.0
"""A journal may have to be replayed meanwhile."""
_TMPFS = "mode=0755,size=64m"

# Mounts of the rest of the system that are taken off go here too, else they would keep their devices busy.
_KEEPER = (
    "unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
    "sh", "-c", "echo ready; exec cat >/dev/null",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Apart:
    """A place apart, made by ``apart``. ``base`` is a directory that is empty there at first, and is nobody else's."""

    pid: int
    base: str

    @property
    def _enter(self) -> tuple[str, ...]:
        namespaces = f"/proc/{self.pid}/ns"
        return ("nsenter", f"--mount={namespaces}/mnt", f"--pid={namespaces}/pid_for_children", "--")

    def seen(self, path: str) -> str:
        """How a file of the place is reached from outside of it."""
        return f"/proc/{self.pid}/root{path}"

    def run(
        self,
        argv: Sequence[str],
        *,
        deadline: float,
        check: Callable[[], None] = lambda: None,
        env: Mapping[str, str] | None = None,
        accept: Collection[int] = (0,),
        umask: int = -1,
    ) -> Completed:
        """Run a program there; otherwise as ``runner.run``. Raises MissingProgram, CommandFailed."""
        program = os.path.basename(argv[0])
        path = which(argv[0])
        if path is None:
            raise MissingProgram(program=program, package=package_of(program))
        try:
            words = [*self._enter, path, *argv[1:]]
            return run(words, deadline=deadline, check=check, env=env, accept=accept, umask=umask)
        except CommandFailed as error:
            raise CommandFailed(**{**error.fields, "program": program}) from error

    def mount(
        self, node: str, number: int, fstype: str, options: Sequence[str], check: Callable[[], None] = lambda: None
    ) -> str:
        """Mount a device at the directory ``number`` of ``base``, which is given. Raises CommandFailed."""
        where = f"{self.base}/{number}"
        self.run(["mkdir", "-p", where], deadline=runner.GRACE_SECONDS * 10)
        kind = ["-t", fstype] if fstype else []
        self.run(["mount", *kind, "-o", ",".join(options), node, where], deadline=MOUNT_SECONDS, check=check)
        return where

    def unmount(self, where: str, check: Callable[[], None] = lambda: None) -> None:
        """Take a mount off again. Raises CommandFailed."""
        self.run(["umount", where], deadline=MOUNT_SECONDS, check=check)


@contextmanager
def apart(base: str) -> Iterator[Apart]:
    """A place apart, with an empty directory ``base``: one that is there outside too, and is hidden in the place.

    Raises NoPlaceApart, MissingProgram.
    """
    for program in ("unshare", "nsenter"):
        if which(program) is None:
            raise MissingProgram(program=program, package=package_of(program))
    with undisturbed() as through:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            keeper = _started(reading)
        except BaseException:
            os.close(writing)
            raise
        finally:
            os.close(reading)
        try:
            _await(keeper)
            place = Apart(keeper.pid, base)
            try:
                os.makedirs(base, mode=0o700, exist_ok=True)
                place.run(["mount", "-t", "tmpfs", "-o", _TMPFS, "tmpfs", base], deadline=START_SECONDS)
            except OSError as error:
                raise NoPlaceApart(reason=f"{base}: {error.strerror}") from error
            except CommandFailed as error:
                raise NoPlaceApart(reason=str(error).removesuffix(".")) from error
            with through():
                yield place
        finally:
            os.close(writing)
            _ended(keeper)


def _started(reading: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            _KEEPER, executable=which(_KEEPER[0]), stdin=reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={"PATH": search_path(), "LC_ALL": "C"}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise NoPlaceApart(reason=error.strerror) from error


def _await(keeper: subprocess.Popen[bytes]) -> None:
    """Wait until all namespaces are there. Raises NoPlaceApart."""
    assert keeper.stdout is not None  # noqa: S101 - it was asked for
    ready, _, _ = select.select([keeper.stdout], [], [], START_SECONDS)
    if ready and keeper.stdout.readline() == b"ready\n":
        return
    keeper.kill()
    said = keeper.communicate()[1].decode("utf-8", "replace").strip()
    raise NoPlaceApart(reason=said or f"nothing came of it within {START_SECONDS:g} s")


def _ended(keeper: subprocess.Popen[bytes]) -> None:
    """The kernel ends what runs there; a program that hangs in it keeps the place until it does not any more."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        keeper.wait(END_SECONDS)
    for stream in (keeper.stdout, keeper.stderr):
        if stream is not None:
            stream.close()
