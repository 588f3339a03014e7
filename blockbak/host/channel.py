"""The two ends of a mirror: messages over a pair of pipes, and the program that is the other end.

One thread reads an end, any may write it. What is too long, out of turn or not whole is never taken in: the header is
looked at first, and what it promises goes into memory that is there already.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from blockbak.errors import CommandFailed, MissingProgram, PeerGone, PeerNotUnderstood, PipeFailed, StreamFailed
from blockbak.host import pipes
from blockbak.host.blockio import Bytes
from blockbak.host.runner import package_of, search_path, which
from blockbak.host.signals import undisturbed
from blockbak.model import wire
from blockbak.model.wire import Message

_GRACE_SECONDS = 5.0
"""What the other end's program may take to end once its input is closed, or once it is asked to."""
_NOT_FOUND = 127
"""Exit status of a shell that finds no such program (POSIX, 2.8.2)."""


class Channel:
    """Messages to and from the other end. ``role`` is this end's; ``check`` may raise while the other end is waited
    for. ``ended`` tells, once nothing comes any more, how it ended, in words, or nothing.
    """

    def __init__(
        self, read_fd: int, write_fd: int, role: int, check: Callable[[], None],
        ended: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        for fd in (read_fd, write_fd):
            pipes.widen(fd)
        self._role, self._ended = role, ended
        self._reader = pipes.PipeReader(read_fd, check)
        self._writer = pipes.PipeWriter(write_fd, check)
        self._guard = threading.Lock()
        self._sent = self._received = 0
        self._whole = True
        self._header = np.empty(wire.HEADER.itemsize, np.uint8)
        self._head = np.empty(wire.HEAD_MAX, np.uint8)

    @property
    def sent_bytes(self) -> int:
        """All that was written."""
        return self._writer.written

    @property
    def received_bytes(self) -> int:
        """All that was read."""
        return self._reader.taken

    @property
    def usable(self) -> bool:
        """Whether no message was broken off half-way: else none can follow."""
        return self._whole

    def greet(self) -> None:
        """Exchange preambles. Raises PeerGone, PeerNotUnderstood, PeerVersion, and what ``check`` raises."""
        self._write(wire.preamble(self._role))
        other = wire.ROLE_RECEIVER if self._role == wire.ROLE_SENDER else wire.ROLE_SENDER
        into = np.empty(wire.PREAMBLE.itemsize, np.uint8)
        count = self._fill(into)
        if not count:
            raise PeerGone(reason=self._ended() or "it said nothing")
        wire.check_preamble(into[:count].tobytes(), other)

    def send(self, message: Message, data: Sequence[memoryview] = ()) -> None:
        """Send a message whole. Raises PeerGone, and what ``check`` raises."""
        with self._guard:
            header = wire.header(self._sent, message, data)
            self._sent += 1
            self._whole = False
            self._write(header + message.head)
            for part in data:
                self._write(part)
            self._whole = True

    def ready(self) -> bool:
        """Whether something came that can be received."""
        return self._reader.ready()

    def receive(self, allowed: Sequence[int], into: Bytes | None = None) -> tuple[Message, int]:
        """The next message, of one of the ``allowed`` kinds, and how many bytes of data it has, which then are at the
        start of ``into``: that has room for ``DATA_MAX``. Without it messages with data are not allowed.

        Raises PeerGone where nothing comes any more, PeerNotUnderstood, and what ``check`` raises.
        """
        count = self._fill(self._header)
        if count < len(self._header):
            where = "in the middle of a message" if count else "before it was done"
            raise PeerGone(reason=self._ended() or f"it closed the connection {where}")
        said = wire.parse_header(self._received, self._header.tobytes(), allowed)
        head, data = self._head[: said.head_bytes], self._header[:0] if into is None else into[: said.data_bytes]
        if len(data) != said.data_bytes:
            raise PeerNotUnderstood(reason="data where none may be")
        if self._fill(head) < len(head) or self._fill(data) < len(data):
            raise PeerGone(reason=self._ended() or "it closed the connection in the middle of a message")
        kept = head.tobytes()
        if wire.checksum(self._received, kept, [memoryview(data)]) != said.checksum:
            raise PeerNotUnderstood(reason=f"message {self._received} does not have its checksum")
        self._received += 1
        return Message(said.kind, said.start, said.blocks, kept), said.data_bytes

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._writer.write(data)
        except PipeFailed as error:
            raise PeerGone(reason=self._ended() or str(error.fields["reason"])) from error

    def _fill(self, into: Bytes) -> int:
        try:
            return self._reader.fill(into) if len(into) else 0
        except StreamFailed as error:
            raise PeerGone(reason=self._ended() or str(error.fields["reason"])) from error

    def close(self) -> None:
        """Release what was opened for it; the descriptors it was given stay open."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Program:
    """A program that is the other end, on its standard input and output. What it says on standard error goes where
    ours goes, and it may ask at the terminal, as ssh does for a password.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        self.write_fd, self.read_fd = process.stdin.fileno(), process.stdout.fileno()

    def ended(self) -> str:
        """How it ended, in words; nothing where it has not within a moment."""
        try:
            status = self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        program = Path(os.fsdecode(self._process.args[0])).name  # type: ignore[index, arg-type]  # a list, as given
        if status < 0:
            return f"{program} was killed by signal {-status}"
        known = ": there is no blockbak there, or none on its PATH" if status == _NOT_FOUND else ""
        return f"{program} ended with status {status}{known}"

    def close(self) -> None:
        """Close both its ends and wait for it; who does not end by that is made to."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        for end in (None, self._process.terminate, self._process.kill):
            if end is not None:
                end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
                return
        self._process.wait()


@contextlib.contextmanager
def started(argv: Sequence[str]) -> Iterator[Program]:
    """Start a program, never through a shell, as the other end; it is over when the ``with`` is left. Raises
    MissingProgram, CommandFailed.
    """
    path = which(argv[0])
    if path is None:
        raise MissingProgram(program=Path(argv[0]).name, package=package_of(Path(argv[0]).name))
    with undisturbed() as through:
        try:
            # In our own process group: a program in another one could not ask at the terminal.
            process = subprocess.Popen(
                argv, executable=path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=True,
                env={**os.environ, "PATH": search_path()},
            )  # fmt: skip
        except OSError as error:
            raise CommandFailed(
                program=Path(argv[0]).name, status="not started", stderr=error.strerror or ""
            ) from error
        program = Program(process)
        try:
            with through():
                yield program
        finally:
            program.close()
