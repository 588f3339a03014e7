"""Stand-ins that pass the contract suites of what they stand for (tests/contract)."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from blockbak.errors import DamagedImage
from blockbak.flow.context import Context, Quiet, never
from blockbak.host.kernel import Kernel
from blockbak.repository.local import Repository


class MemorySource:
    """A ByteSource over bytes."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self.data, self.name = data, name

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(self.data):
            raise DamagedImage(file=self.name, reason="it is shorter than its index says")
        return bytes(self.data[offset : offset + length])


class MemorySink:
    """A ByteSink in memory. With a ``unit`` it shares blocks as a file system with reflinks does: only
    whole ones, and only to the same place in a block.
    """

    def __init__(self, name: str = "memory", unit: int = 0) -> None:
        self.data = bytearray()
        self.name, self.unit = name, unit
        self.cloned_bytes = 0
        self._guard = threading.Lock()

    @property
    def size(self) -> int:
        return len(self.data)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        joined = b"".join(bytes(part) for part in buffers)
        with self._guard:
            if joined and len(self.data) < offset:
                self.data.extend(bytes(offset - len(self.data)))
            self.data[offset : offset + len(joined)] = joined

    def read(self, offset: int, length: int) -> bytes:
        with self._guard:
            found = bytes(self.data[offset : offset + length])
        if len(found) != length:
            raise EOFError(f"only {len(self.data)} bytes were written")
        return found

    def clone_unit(self, source: MemorySource) -> int:
        return self.unit if source.size > self.unit else 0

    def clone(self, source: MemorySource, source_offset: int, offset: int, length: int) -> bool:
        if not self.unit:
            return False
        if source_offset % self.unit or offset % self.unit or length % self.unit or not length:
            raise OSError("FICLONERANGE takes whole blocks")
        self.write(offset, [source.read(source_offset, length)])
        self.cloned_bytes += length
        return True

    def copy(self, source: MemorySource, source_offset: int, offset: int, length: int) -> None:
        if length:
            self.write(offset, [source.read(source_offset, length)])

    def sealed(self) -> MemorySource:
        """What was written, for reading."""
        return MemorySource(bytes(self.data), self.name)


class Killed(BaseException):
    """The process is no more. Nobody catches it but who killed it."""


_COUNTED = (
    "open", "preadv", "pwritev", "fsync", "truncate", "rename", "unlink", "mkdir",
    "clone_range", "copy_range", "punch", "zero_out", "allocate",
)  # fmt: skip


class MortalKernel(Kernel):
    """The real kernel, until the call number ``kill_at`` of those that ``counts`` names. From there on no
    call has an effect, as after SIGKILL: descriptors are closed, everything else raises Killed. A pwritev
    that is hit has written half of its first buffer.
    """

    def __init__(self, kill_at: int = 0, counts: Callable[[str], bool] = lambda call: True) -> None:
        self.kill_at, self.calls, self.log = kill_at, 0, list[tuple[str, str]]()
        self.dead = False
        self._counts = counts
        self._guard = threading.Lock()

    def _step(self, call: str, what: object) -> bool:
        """Count a call; True if it is the one that kills."""
        with self._guard:
            if self.dead:
                raise Killed
            self.log.append((call, str(what)))
            if self._counts(call):
                self.calls += 1
            self.dead = bool(self.kill_at) and self.calls >= self.kill_at
            return self.dead

    def close(self, fd: int) -> None:
        super().close(fd)
        if self.dead:
            raise Killed

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if self._step("pwritev", offset):
            first = memoryview(buffers[0]).cast("B")
            half = len(first) // 2
            # O_DIRECT takes whole sectors only.
            super().pwritev(fd, [first[: half - half % 4096 if half >= 4096 else half]], offset)
            raise Killed
        return super().pwritev(fd, buffers, offset)


def _mortal(call: str) -> Callable[..., Any]:
    real = getattr(Kernel, call)

    def method(self: MortalKernel, *args: Any) -> Any:
        if self._step(call, args[0]):
            raise Killed
        return real(self, *args)

    method.__name__, method.__doc__ = call, real.__doc__
    return method


for _call in _COUNTED:
    if _call != "pwritev":
        setattr(MortalKernel, _call, _mortal(_call))


class Clock:
    """A wall clock and a timer that go on by a second whenever they are read."""

    def __init__(self) -> None:
        self._seconds = 0
        self._guard = threading.Lock()

    def timer(self) -> float:
        with self._guard:
            self._seconds += 1
            return float(self._seconds)

    def now(self) -> datetime:
        return datetime(2026, 5, 1, tzinfo=UTC) + timedelta(seconds=self.timer())


def context(
    state_dir: object, *, kernel: Kernel | None = None, workers: int = 2, say: Callable[[str], None] | None = None
) -> Context:
    """A context whose clock and ids follow from nothing but the calls."""
    clock = Clock()
    ids = iter(range(1, 1 << 30))
    return Context(
        now=clock.now, timer=clock.timer, hex_id=lambda digits: f"{next(ids):032x}"[-digits:],
        say=say or (lambda sentence: None), progress=Quiet(), check=never, workers=workers, host=socket.gethostname(),
        program="blockbak test", state_dir=str(state_dir), kernel=kernel or Kernel(),
    )  # fmt: skip


REPOSITORY_ID = "1f" * 16


def new_repository(
    path: str | os.PathLike[str], *, repository_id: str = REPOSITORY_ID, kernel: Kernel | None = None
) -> Repository:
    """A repository in a new directory, with an id and a date that do not change from run to run."""
    return Repository.create(
        os.fspath(path), repository_id=repository_id, created="2026-05-01T00:00:00.000Z", kernel=kernel
    )
