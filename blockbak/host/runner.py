"""One way to run a program: an argument list, a deadline, the C locale, a typed failure.

Output goes to memory files, not pipes: a program that leaves a daemon behind (which keeps its output
open) is done when it ends itself, and no amount of output can make it wait.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockbak.errors import CommandFailed, MissingProgram
from blockbak.host.signals import undisturbed

GRACE_SECONDS = 2.0
"""Between asking a late program to end and killing it: time to take back what it began."""
STDERR_TAIL = 2000
"""Characters of a failed program's messages that its error repeats."""
CHECK_SECONDS = 0.1
"""Between two looks at whether someone asked to stop."""

_SYSTEM_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin")
"""Looked through after PATH: a timer's or a plain user's PATH often lacks the sbin directories."""

_PACKAGES = {
    "lvm": "lvm2",
    "lvs": "lvm2",
    "vgs": "lvm2",
    "pvs": "lvm2",
    "lvcreate": "lvm2",
    "lvremove": "lvm2",
    "lvchange": "lvm2",
    "lvextend": "lvm2",
    "thin_delta": "thin-provisioning-tools",
    "thin_dump": "thin-provisioning-tools",
    "sfdisk": "fdisk",
    "sgdisk": "gdisk",
    "losetup": "mount",
    "umount": "mount",
    "swapon": "mount",
    "swapoff": "mount",
    "fsfreeze": "util-linux",
    "lsblk": "util-linux",
    "blockdev": "util-linux",
    "partx": "util-linux",
    "systemctl": "systemd",
    "udevadm": "udev",
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_logprint": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "fusermount3": "fuse3",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "e2fsck": "e2fsprogs",
    "xfs_repair": "xfsprogs",
    "btrfs": "btrfs-progs",
    "fsck.vfat": "dosfstools",
    "fsck.exfat": "exfatprogs",
    "ntfsfix": "ntfs-3g",
    "qemu-system-x86_64": "qemu-system-x86",
}
"""Debian's package of a program, where the two differ in name."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended as it was allowed to.

    ``output`` is what it wrote to standard output, untouched; ``stderr`` its messages, stripped.
    """

    argv: tuple[str, ...]
    status: int
    output: bytes
    stderr: str

    @property
    def stdout(self) -> str:
        """``output`` as text; bytes that are not UTF-8 survive as surrogates."""
        return self.output.decode("utf-8", "surrogateescape")


def which(program: str) -> str | None:
    """Where ``program`` is: on PATH or in the system's own directories; None if nowhere."""
    return shutil.which(program, path=search_path())


def package_of(program: str) -> str:
    """The Debian package that brings ``program``."""
    if program.startswith("partclone."):
        return "partclone"
    return _PACKAGES.get(program, program)


def run(
    argv: Sequence[str],
    *,
    deadline: float = 60,
    input: bytes | None = None,  # noqa: A002 - what everybody calls it
    env: Mapping[str, str] | None = None,
    accept: Collection[int] = (0,),
    check: Callable[[], None] = lambda: None,
    umask: int = -1,
) -> Completed:
    """Run ``argv`` (never through a shell) to its end and return what it said.

    ``deadline`` is in seconds; at it the program's whole process group is asked to end, then killed. The
    same happens when waiting is interrupted. ``input`` is its standard input (else /dev/null), ``env`` is
    added to the environment, ``accept`` names the exit statuses that are no failure. ``check`` is called
    ten times a second while the program runs; what it raises ends the program and is raised here. ``umask``
    is ours where none is given.

    Raises MissingProgram where it is not installed, and CommandFailed (``status`` is the exit status, or
    words where there is none) where it ended otherwise or too late.
    """
    program = Path(argv[0]).name
    path = which(argv[0])
    if path is None:
        raise MissingProgram(program=program, package=package_of(program))
    with _memory_files() as (stdin, stdout, stderr):
        _fill(stdin, input or b"")
        files = (None if input is None else stdin, stdout, stderr)
        status = _run_to_end(path, argv, files, deadline=deadline, env=env, check=check, umask=umask)
        output, said = _content(stdout), _content(stderr).decode("utf-8", "replace").strip()
    if status not in accept:
        raise CommandFailed(program=program, status=_in_words(status, deadline), stderr=said[-STDERR_TAIL:])
    assert status is not None  # noqa: S101 - only a late program has none, and None is never accepted
    return Completed(tuple(argv), status, output, said)


def _run_to_end(
    path: str,
    argv: Sequence[str],
    files: tuple[int | None, int, int],
    *,
    deadline: float,
    env: Mapping[str, str] | None,
    check: Callable[[], None],
    umask: int,
) -> int | None:
    """The exit status (negative: a signal's number), or None for a program stopped at its deadline."""
    stdin, stdout, stderr = files
    # A signal between the start of the program and the `try` would leave it running.
    with undisturbed() as through:
        try:
            process = subprocess.Popen(
                argv,
                executable=path,
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=stdout,
                stderr=stderr,
                env=_environment(env),
                close_fds=True,
                start_new_session=True,
                umask=umask,
            )
        except OSError as error:
            program = Path(argv[0]).name
            raise CommandFailed(program=program, status="not started", stderr=error.strerror or "") from error
        try:
            with through():
                ended = _wait(process, deadline, check)
        except BaseException:
            _end_group(process)
            raise
        if not ended:
            _end_group(process)
            return None
        return process.wait()


def _wait(process: subprocess.Popen[bytes], seconds: float, check: Callable[[], None] = lambda: None) -> bool:
    """Whether it ends within ``seconds``; noticed at once, not at the next look. It is not reaped yet."""
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            if poll.poll(min(left, CHECK_SECONDS) * 1000):
                return True
            if left <= CHECK_SECONDS:
                return False
            check()
    finally:
        os.close(descriptor)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the program and everything it started in its session, by force if asking does not do."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        _wait(process, GRACE_SECONDS)
    finally:
        # It may have ended and left others. Not reaped yet, it still keeps the group's number from reuse.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _memory_files() -> Iterator[tuple[int, int, int]]:
    with contextlib.ExitStack() as undo:
        files = []
        for name in ("stdin", "stdout", "stderr"):
            files.append(os.memfd_create(name, os.MFD_CLOEXEC))
            undo.callback(os.close, files[-1])
        yield files[0], files[1], files[2]


def _fill(file: int, data: bytes) -> None:
    with os.fdopen(os.dup(file), "wb") as stream:
        stream.write(data)
    os.lseek(file, 0, os.SEEK_SET)


def _content(file: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as stream:
        stream.seek(0)
        return stream.read()


def search_path() -> str:
    """PATH, and after it the system's own directories."""
    return os.pathsep.join([*os.environ.get("PATH", "").split(os.pathsep), *_SYSTEM_PATHS])


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, with messages and number formats that do not depend on who runs it."""
    made = {name: value for name, value in os.environ.items() if name not in ("LANGUAGE", "LANG")}
    return made | {"LC_ALL": "C", "PATH": search_path()} | dict(extra or {})


def _in_words(status: int | None, deadline: float) -> int | str:
    if status is None:
        return f"still running after {deadline:g} s"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return status
