"""Images through standard input and output: in order, never waiting for the other end without an ear for Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable

from blockbak.errors import PipeFailed, StreamFailed
from blockbak.host.blockio import Bytes
from blockbak.model.streams import Buffer
from blockbak.units import MIB

_LOOK_SECONDS = 0.2
_PIPE_BYTES = MIB
"""pipe(7): what an unprivileged user may have at most."""


class PipeWriter:
    """Standard output, or another descriptor. ``check`` may raise while the other end is waited for."""

    def __init__(self, fd: int, check: Callable[[], None]) -> None:
        self._check = check
        self.written = 0
        # A pipe is opened anew: not to wait is a property of the opening, which others may share.
        self._own = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC) if self._own else fd
        # A socket (sshd may give one) is asked not to wait with each call.
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        self._socket = socket.socket(fileno=os.dup(fd)) if is_socket else None
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def _some(self, view: memoryview) -> int:
        return os.write(self._fd, view) if self._socket is None else self._socket.send(view, socket.MSG_DONTWAIT)

    def write(self, data: Bytes | Buffer) -> None:
        """Write all of it. Raises PipeFailed, and what ``check`` raises."""
        view = memoryview(data).cast("B")
        while view:
            self._check()
            if not self._poll.poll(_LOOK_SECONDS * 1000):
                continue
            try:
                count = self._some(view)
            except BlockingIOError:
                continue
            except OSError as error:
                raise PipeFailed(written=self.written, reason=error.strerror) from error
            self.written += count
            view = view[count:]

    def sync(self) -> None:
        """Where a file is written to, make it durable. Raises PipeFailed."""
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise PipeFailed(written=self.written, reason=error.strerror) from error

    def close(self) -> None:
        """Let go of it; standard output itself stays open."""
        if self._own:
            os.close(self._fd)
        if self._socket is not None:
            self._socket.close()


class PipeReader:
    """Standard input, or another descriptor. ``check`` may raise while the other end is waited for."""

    def __init__(self, fd: int, check: Callable[[], None]) -> None:
        self._fd, self._check = fd, check
        self.taken = 0
        self._poll = select.poll()
        # A file is always ready, but cannot be asked.
        self._asks = not stat.S_ISREG(os.fstat(fd).st_mode)
        self._poll.register(fd, select.POLLIN)

    def fill(self, into: Bytes) -> int:
        """Fill ``into`` from its start; fewer bytes only at the end of the stream. Raises StreamFailed, and what
        ``check`` raises.
        """
        view, done = memoryview(into), 0
        while done < len(into):
            self._check()
            if self._asks and not self._poll.poll(_LOOK_SECONDS * 1000):
                continue
            try:
                count = os.readv(self._fd, [view[done:]])
            except BlockingIOError:
                continue
            except OSError as error:
                raise StreamFailed(reason=f"after {self.taken} bytes, {error.strerror}") from error
            if not count:
                break
            done += count
            self.taken += count
        return done

    def ready(self) -> bool:
        """Whether something can be read, or the end seen, without waiting."""
        return not self._asks or bool(self._poll.poll(0))


def widen(fd: int) -> None:
    """Let a pipe hold more, so that two processes need not take turns so often; where the system allows it."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def is_terminal(fd: int) -> bool:
    """Whether a person sits at the other end."""
    return os.isatty(fd)


def place_of(fd: int) -> str:
    """The path of the file or device that a descriptor is of; an empty string for anything else."""
    mode = os.fstat(fd).st_mode
    return os.readlink(f"/proc/self/fd/{fd}") if stat.S_ISREG(mode) or stat.S_ISBLK(mode) else ""
