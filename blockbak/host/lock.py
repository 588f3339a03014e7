"""Locks between runs: flock on a file that also says who holds it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import msgspec

from blockbak.errors import NoPermission, StoreFailed, UnreadableStore, VolumeLocked
from blockbak.host.blockio import read_error, store_error
from blockbak.host.kernel import Kernel
from blockbak.host.system import System

_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Note:
    """What the lock file says: the last exclusive holder, the highest sequence ever used, and a digest of the
    identity that the last holder was about to image.
    """

    pid: int = 0
    host: str = ""
    sequence: int = 0
    identity: str = ""


def _read_note(path: str) -> Note:
    """The note; an empty one where it cannot be read. It is information, never a decision."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(4096).rstrip(b"\0 \n") or b"{}", type=Note)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors, and so is text that is not UTF-8
        return Note()


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock; ``pid`` is 0 where it cannot be told."""

    pid: int
    host: str


def claimed_by_another(path: str, identity: str) -> bool:
    """Whether the lock file is held by a run that images something else than ``identity``."""
    digest = _read_note(path).identity
    return digest not in ("", _digest(identity)) and holder(path) is not None


def _digest(identity: str) -> str:
    """Short, so that a note always fits its place."""
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def holder(path: str) -> Holder | None:
    """Who holds the lock file at ``path`` on this machine, by the kernel's own word; None if nobody does.

    What another machine holds on a shared file system is not seen.
    """
    try:
        info = os.stat(path)
    except OSError:
        return None
    locks = System().locks_on(path, info)
    return Holder(locks[0].pid, socket.gethostname()) if locks else None


class Lock:
    """A held lock, after ``waited`` seconds. ``remember`` stores the highest sequence in the file, durably."""

    def __init__(self, fd: int, path: str, kernel: Kernel, waited: float) -> None:
        self.waited = waited
        self._fd, self._path, self._kernel = fd, path, kernel
        self.sequence = _read_note(path).sequence
        self._identity = ""

    def remember(self, sequence: int) -> None:
        """Never use a sequence up to this one again, even if its images are deleted.

        Raises NoSpace or StoreFailed.
        """
        self.sequence = max(self.sequence, sequence)
        try:
            self._note()
            self._kernel.fsync(self._fd)
        except OSError as error:
            raise store_error(error, self._path, "written") from error

    def claim(self, identity: str) -> None:
        """Say whose volume this will be, before there is an image that does."""
        self._identity = _digest(identity)
        self.sign()

    def sign(self) -> None:
        """Say who holds it, for the message others get; where that cannot be written, they do not learn it."""
        with contextlib.suppress(OSError):
            self._note()

    def _note(self) -> None:
        note = Note(os.getpid(), socket.gethostname(), self.sequence, self._identity)
        # Padded to a fixed length: an overwrite never leaves the end of an older note behind.
        text = memoryview(msgspec.json.encode(asdict(note)).ljust(256) + b"\n")
        done = 0
        while done < len(text):
            count = self._kernel.pwritev(self._fd, [text[done:]], done)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            done += count


def _open_to_read(path: str, error: OSError, *, exclusive: bool, kernel: Kernel) -> int:
    """Something to lock where nothing may be written: the file, or the directory it would be in.

    A repository on a read-only medium, or one that belongs to somebody else, can still be restored from.
    """
    if not exclusive and error.errno in (errno.EROFS, errno.EACCES):
        for place in (path, os.path.dirname(path)):
            try:
                return kernel.open(place, os.O_RDONLY)
            except OSError:
                continue
    if error.errno == errno.EACCES:
        raise NoPermission(action="lock", path=path) from error
    if isinstance(unreadable := read_error(error, path, path), UnreadableStore):
        raise unreadable from error
    raise store_error(error, path, "opened") from error


def _locked_by(path: str, volume: str) -> VolumeLocked:
    """That the volume is locked, and by whom."""
    note = _read_note(path)
    who = holder(path) or Holder(note.pid, note.host or "another host")
    return VolumeLocked(volume=volume, pid=who.pid or note.pid, host=who.host)


def _check_own(fd: int, path: str) -> None:
    """It is written to, so it must be nothing but a lock file. Raises StoreFailed."""
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_nlink > 1:
        raise StoreFailed(path=path, action="locked", reason="it is another name of some other file")


@contextmanager
def held(
    path: str,
    volume: str,
    *,
    exclusive: bool,
    wait: float,
    check: Callable[[], None],
    say: Callable[[str], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    kernel: Kernel,
) -> Iterator[Lock]:
    """Hold the lock file at ``path`` (made if it is not there) for as long as the ``with`` lasts.

    ``wait`` seconds are spent trying, ``check`` may raise in between; ``say`` is told who is waited for.
    Children do not inherit it. Raises VolumeLocked, naming who holds it; NoPermission, StoreFailed or
    UnreadableStore where it cannot be tried.
    """
    try:
        fd = kernel.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    except OSError as error:
        fd = _open_to_read(path, error, exclusive=exclusive, kernel=kernel)
    try:
        _check_own(fd, path)
        with contextlib.suppress(OSError):
            os.fchmod(fd, 0o600)  # whatever the umask took from it; somebody else's file has its mode already
        begun, waiting = clock(), False
        deadline = begun + wait
        while True:
            try:
                kernel.lock(fd, exclusive=exclusive)
                break
            except BlockingIOError as error:
                if clock() >= deadline:
                    raise _locked_by(path, volume) from error
                if not waiting:
                    say(f"{str(_locked_by(path, volume)).removesuffix('.')}; waiting for it to end.")
                    waiting = True
            except OSError as error:
                raise StoreFailed(path=path, action="locked", reason=error.strerror) from error
            check()
            sleep(min(_PAUSE_SECONDS, max(0.0, deadline - clock())))
        lock = Lock(fd, path, kernel, clock() - begun if waiting else 0.0)
        if exclusive:
            lock.sign()
        yield lock
    finally:
        # Nothing in it needs the close to be good: what must last was flushed.
        with contextlib.suppress(OSError):
            kernel.close(fd)
