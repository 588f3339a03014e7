"""Kernels that fail, or give less than was asked for, and a watch over what may never be tried again."""

from __future__ import annotations

import mmap
import os
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

from blockbak.host.kernel import Kernel
from blockbak.units import align_down, align_up
from tests.doubles import Killed, MortalKernel

CALLS = (
    "open", "close", "preadv", "pwritev", "fsync", "truncate", "rename", "unlink", "mkdir", "clone_range",
    "copy_range", "punch", "zero_out", "device_size", "sector_sizes", "drop_cache", "lock", "extents",
    "allocate",
)  # fmt: skip
"""Every method of a Kernel; a test holds this list to the class."""


class QuickKernel(Kernel):
    """The real kernel, but nothing waits for the disk: all else that durability asks for is done."""

    def fsync(self, fd: int) -> None:
        os.fstat(fd)


class FaultyKernel(QuickKernel):
    """A QuickKernel, but the call number ``at`` of the kind ``call`` fails with ``number``; 0 never does.

    A failed close has closed the descriptor, as Linux does. A failed pwritev has written nothing. What a
    caller may never do stands in ``wrongs`` afterwards: flush again, write to or rename what could not be
    flushed, close twice, use what is closed. ``log`` has every call, with the name of the file it is about.
    """

    def __init__(self, call: str = "", number: int = 0, at: int = 0) -> None:
        self.call, self.number, self.at = call, number, at
        self.count, self.fired, self.what = 0, False, ""
        self.wrongs: list[str] = []
        self.log: list[tuple[str, str]] = []
        self._open: dict[int, str] = {}
        self._void: dict[int, str] = {}
        self._void_paths: set[str] = set()
        self._read_only: set[int] = set()
        self._guard = threading.Lock()

    def _step(self, call: str, what: object) -> bool:
        """Count a call; True if it is the one that fails."""
        with self._guard:
            name = self._open.get(what, "?") if isinstance(what, int) else str(what)
            self.log.append((call, os.path.basename(name)))
            if call != self.call:
                return False
            self.count += 1
            if self.count != self.at:
                return False
            self.fired, self.what = True, name
            return True

    def _error(self) -> OSError:
        return OSError(self.number, os.strerror(self.number))

    def _use(self, call: str, fd: int) -> None:
        with self._guard:
            if fd not in self._open:
                self.wrongs.append(f"{call} of a descriptor that is not open")
            elif fd in self._void and call in ("fsync", "pwritev", "truncate", "clone_range", "copy_range"):
                self.wrongs.append(f"{call} of {self._void[fd]}, which could not be flushed")

    def close_left(self) -> list[str]:
        """Close what was left open; the names of it."""
        left, self._open = self._open, {}
        for fd in left:
            super().close(fd)
        return list(left.values())

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if self._step("open", path):
            raise self._error()
        fd = super().open(path, flags, mode)
        with self._guard:
            self._open[fd] = str(path)
            self._read_only.discard(fd)
            if not flags & os.O_ACCMODE:
                self._read_only.add(fd)
            if flags & (os.O_CREAT | os.O_EXCL) == os.O_CREAT | os.O_EXCL:
                self._void_paths.discard(str(path))  # a new file of that name
        return fd

    def close(self, fd: int) -> None:
        fails = self._step("close", fd)
        self._use("close", fd)
        with self._guard:
            path = self._open.pop(fd, "")
            self._void.pop(fd, None)
            if fails and fd not in self._read_only:
                self._void_paths.add(path)
        super().close(fd)
        if fails:
            raise self._error()

    def fsync(self, fd: int) -> None:
        self._use("fsync", fd)
        if self._step("fsync", fd):
            with self._guard:
                self._void[fd] = self._open.get(fd, "?")
                self._void_paths.add(self._void[fd])
            raise self._error()
        super().fsync(fd)

    def rename(self, old: str, new: str) -> None:
        if str(old) in self._void_paths:
            self.wrongs.append(f"rename of {old}, which could not be flushed or closed")
        if self._step("rename", old):
            raise self._error()
        super().rename(old, new)


def _faulty(call: str, descriptors: Sequence[int]) -> Callable[..., Any]:
    real = getattr(Kernel, call)

    def method(self: FaultyKernel, *args: Any, **named: Any) -> Any:
        for index in descriptors:
            self._use(call, args[index])
        if self._step(call, args[0]):
            raise self._error()
        return real(self, *args, **named)

    method.__name__, method.__doc__ = call, real.__doc__
    return method


for _call, _descriptors in (
    ("preadv", [0]), ("pwritev", [0]), ("truncate", [0]), ("unlink", []), ("mkdir", []),
    ("clone_range", [0, 3]), ("copy_range", [0, 3]), ("punch", [0]), ("zero_out", [0]), ("device_size", [0]),
    ("sector_sizes", [0]), ("drop_cache", [0]), ("lock", [0]), ("extents", [0]),
    ("allocate", [0]),
):  # fmt: skip
    setattr(FaultyKernel, _call, _faulty(_call, _descriptors))


class ShortKernel(Kernel):
    """The real kernel, but reads, writes and copies take fewer bytes than they are asked to, at least one.

    Where O_DIRECT was granted they take whole sectors of 4096 bytes, as the kernel does; elsewhere any
    number. ``direct=False`` grants it nowhere.
    """

    def __init__(self, dice: random.Random, *, direct: bool = True, sector: int = 4096) -> None:
        self._dice, self._direct, self._sector = dice, direct, sector
        self._direct_fds: set[int] = set()
        self._guard = threading.Lock()
        self.shortened = 0

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if flags & os.O_DIRECT and not self._direct:
            raise OSError(22, os.strerror(22))
        fd = super().open(path, flags, mode)
        with self._guard:
            (self._direct_fds.add if flags & os.O_DIRECT else self._direct_fds.discard)(fd)
        return fd

    def _fewer(self, asked: int, unit: int) -> int:
        with self._guard:
            if asked <= unit:
                return asked
            count = self._dice.choice((1, 3, 511, 4095, 4096, 4097, asked // 3, asked // 2, asked - 1, asked))
            # The first time it is less in any case, so that no throw of the dice leaves a test without one.
            count = max(count - count % unit, unit) if self.shortened else unit
            self.shortened += count < asked
            return min(count, asked)

    def _buffers(self, fd: int, buffers: Sequence[Any]) -> list[memoryview]:
        views = [memoryview(part).cast("B") for part in buffers]
        left = self._fewer(sum(map(len, views)), self._sector if fd in self._direct_fds else 1)
        short = []
        for view in views:
            short.append(view[: min(left, len(view))])
            left -= len(short[-1])
            if not left:
                break
        return short

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return super().preadv(fd, self._buffers(fd, buffers), offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        return super().pwritev(fd, self._buffers(fd, buffers), offset)

    def copy_range(self, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> int:
        return super().copy_range(source_fd, source_offset, self._fewer(length, 1), fd, offset)


class BadMedium(Kernel):
    """The real kernel, but reads that touch one of the ``bad`` byte ranges of the file or device ``path``
    fail with EIO; those that begin before it do not end early, for few drivers do that.

    As the block layer does, it refuses direct reads that are not aligned to ``logical``; and as the page cache
    does, it fails buffered ones by whole pages.
    """

    def __init__(self, path: str, bad: Sequence[tuple[int, int]], *, number: int = 5, logical: int = 512) -> None:
        self.path, self.bad, self.number, self.logical = str(path), list(bad), number, logical
        self._direct: dict[int, bool] = {}
        self.reads: list[tuple[int, int]] = []
        self._guard = threading.Lock()

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        fd = super().open(path, flags, mode)
        with self._guard:
            self._direct.pop(fd, None)
            if os.path.realpath(path) == os.path.realpath(self.path):
                self._direct[fd] = bool(flags & os.O_DIRECT)
        return fd

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if fd in self._direct:
            length = sum(len(memoryview(part).cast("B")) for part in buffers)
            if self._direct[fd] and (offset % self.logical or length % self.logical):
                raise OSError(22, os.strerror(22))
            with self._guard:
                self.reads.append((offset, length))
            unit = 1 if self._direct[fd] else mmap.PAGESIZE
            low, high = align_down(offset, unit), align_up(offset + length, unit)
            if any(low < end and start < high for start, end in self.bad):
                raise OSError(self.number, os.strerror(self.number))
        return super().preadv(fd, buffers, offset)


class QuickMortal(MortalKernel):
    """A MortalKernel for which nothing waits for the disk. A kill at a read is one at the call after it, so reads
    do not count.
    """

    def __init__(self, kill_at: int = 0) -> None:
        super().__init__(kill_at, counts=lambda call: call != "preadv")

    def fsync(self, fd: int) -> None:
        os.fstat(fd)
        if self._step("fsync", fd):
            raise Killed


class PowerCut(QuickMortal):
    """A QuickMortal whose machine loses its power with it: what was not flushed may be gone.

    ``lose(keep)`` takes back what no fsync made durable: changes of names of which the directory was not
    flushed, but for the first ``keep`` in each directory, and what was written to a file since its own flush.
    A file whose name is kept may so be empty. Only files that went through this kernel count.
    """

    def __init__(self, kill_at: int = 0) -> None:
        super().__init__(kill_at)
        self._paths: dict[int, str] = {}
        self._undo: dict[str, list[Callable[[], None]]] = {}
        self._durable: dict[int, bytes] = {}
        self._dirty: dict[int, str] = {}

    def _pending(self, path: str, undo: Callable[[], None]) -> None:
        self._undo.setdefault(os.path.dirname(os.path.abspath(path)), []).append(undo)

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        new = bool(flags & os.O_CREAT) and not os.path.lexists(path)
        fd = super().open(path, flags, mode)
        self._paths[fd] = os.path.abspath(path)
        if new:
            self._durable[os.fstat(fd).st_ino] = b""
            self._pending(path, lambda: os.unlink(path))
        return fd

    def _touched(self, fd: int) -> None:
        """Bytes of the file change: from now on it is not what the disk holds."""
        inode = os.fstat(fd).st_ino
        if inode not in self._durable:
            with open(self._paths[fd], "rb") as file:
                self._durable[inode] = file.read()
        self._dirty[inode] = self._paths[fd]

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._touched(fd)
        return super().pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        self._touched(fd)
        super().truncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        self._touched(fd)
        super().allocate(fd, size)

    def clone_range(self, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> None:
        self._touched(fd)
        super().clone_range(source_fd, source_offset, length, fd, offset)

    def copy_range(self, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> int:
        self._touched(fd)
        return super().copy_range(source_fd, source_offset, length, fd, offset)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._touched(fd)
        super().punch(fd, offset, length)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        path = self._paths[fd]
        if os.path.isdir(path):
            self._undo.pop(path, None)
        else:
            with open(path, "rb") as file:
                self._durable[os.fstat(fd).st_ino] = file.read()
            self._dirty.pop(os.fstat(fd).st_ino, None)

    def rename(self, old: str, new: str) -> None:
        super().rename(old, new)
        self._dirty = {inode: new if path == os.path.abspath(old) else path for inode, path in self._dirty.items()}
        self._pending(new, lambda: os.rename(new, old))

    def unlink(self, path: str) -> None:
        with open(path, "rb") as file:
            content = file.read()
        super().unlink(path)

        def undo() -> None:
            with open(path, "xb") as file:
                file.write(content)

        self._pending(path, undo)

    def mkdir(self, path: str) -> None:
        super().mkdir(path)
        self._pending(path, lambda: os.rmdir(path))

    def lose(self, keep: int = 0) -> None:
        """The power is back, and this is what the disk holds."""
        for inode, path in self._dirty.items():
            for name in (
                path,
                *(os.path.join(os.path.dirname(path), one) for one in os.listdir(os.path.dirname(path))),
            ):
                if os.path.isfile(name) and os.stat(name).st_ino == inode:
                    with open(name, "wb") as file:
                        file.write(self._durable[inode])
        # Deeper directories first: a new directory must be empty before it goes.
        for directory in sorted(self._undo, key=len, reverse=True):
            for undo in reversed(self._undo[directory][keep:]):
                undo()
