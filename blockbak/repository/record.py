"""The record of a repository: what was done, when, by which host and user, with which result.

``history.jsonl`` only ever grows, a line for each thing done; ``history.head`` tells where it ends. How the lines hold
each other is in ``model.events`` and docs/format.md. Nothing that is done depends on it: where it cannot be written,
that is said, and what was done stands.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from blockbak.errors import Damage, DamagedHistory, UnreadableStore
from blockbak.host.blockio import StoredFile, read_error, store_error, sync_directory
from blockbak.host.kernel import Kernel
from blockbak.model import events
from blockbak.model.events import Entry, Head
from blockbak.model.identity import all_plain
from blockbak.units import KIB, iso

__all__ = ["HEAD", "HISTORY", "Author", "Entry", "Record"]

HISTORY, HEAD = "history.jsonl", "history.head"
_WAIT_SECONDS = 10.0
"""For another run to have written its line, which takes two flushes."""
_PAUSE_SECONDS = 0.05
_TAIL_BYTES = 64 * KIB
_READING = ("restored", "exported", "verified", "drilled")
"""What can be done with a repository that may only be read: that it has no line of it goes without saying."""
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class Author(Protocol):
    """Who did something: the part of ``flow.context.Context`` that a line takes from it."""

    @property
    def now(self) -> Callable[[], datetime]:
        """The wall clock."""

    @property
    def host(self) -> str:
        """Name of the machine."""

    @property
    def user(self) -> str:
        """Name of the person."""

    @property
    def run(self) -> str:
        """32 hex digits that name the process."""

    @property
    def job(self) -> str:
        """The job it is for, or an empty string."""

    @property
    def say(self) -> Callable[[str], None]:
        """Takes sentences for people."""


class Record:
    """The history of the repository in the directory ``path``, whose id binds the first line."""

    def __init__(self, path: str, repository_id: str, kernel: Kernel) -> None:
        self._path = path
        self._origin = repository_id.encode()
        self._kernel = kernel

    def _at(self, file: str) -> str:
        return os.path.join(self._path, file)

    # --- writing -------------------------------------------------------------------------------

    def append(
        self,
        event: str,
        context: Author,
        *,
        volume: str = "",
        points: Sequence[str] = (),
        exit: int = 0,  # noqa: A002 - it is an entry's
        error: str = "",
        seconds: float = 0.0,
        job: str = "",
        facts: Mapping[str, Any] | None = None,
    ) -> str:
        """Add a line, durably; ``event`` is one of ``events.EVENTS``. ``job`` is the context's where it is not given.

        Never raises for what the disk, its file system or another run does: the sentence that is returned then, and
        said, tells why there is no line. It is empty where there is one.
        """
        if event not in events.EVENTS:
            raise ValueError(f"no event: {event!r}")

        def entry(place: events.Place) -> Entry:
            told = dict(facts or {}) | ({events.TORN: place.torn} if place.torn else {})
            return Entry(
                number=place.number, time=iso(context.now()), host=context.host, user=context.user, run=context.run,
                event=event, job=job or context.job, volume=volume, points=list(points), exit=exit, error=error,
                seconds=round(seconds, 3), facts=told, previous=place.previous,
            )  # fmt: skip

        try:
            self._append(entry)
        except OSError as failed:
            told = str(store_error(failed, self._at(HISTORY), "written"))
            sentence = f"The history of the repository has no line of this: {told}"
            if event not in _READING or failed.errno not in _READ_ONLY:
                context.say(sentence)
            return sentence
        return ""

    def _append(self, entry: Callable[[events.Place], Entry]) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = self._kernel.open(self._at(HISTORY), flags)
        with contextlib.ExitStack() as stack:
            stack.callback(self._close, fd)
            self._check(fd)
            self._lock(fd)
            head_fd, head, free = self._open_head(fd, stack)
            place = self._place(fd, head)
            made = entry(place)
            line = events.encoded(Entry(**all_plain({name: getattr(made, name) for name in Entry.__struct_fields__})))
            # The line must be durable before the head that says that it is there.
            self._write(fd, place.prefix + line, os.fstat(fd).st_size)
            self._kernel.fsync(fd)
            if head is not None and head_fd >= 0:
                self._write(head_fd, events.encode_slot(Head(place.number, events.digest(line))), free)
                self._kernel.fsync(head_fd)

    def _check(self, fd: int) -> None:
        """Raises OSError for what is not a file. Whatever the umask took from it, its owner may read it."""
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a file")
        with contextlib.suppress(OSError):
            os.fchmod(fd, 0o600)

    def _lock(self, fd: int) -> None:
        """Be the only one that appends. Raises OSError where another run does not let go of it."""
        late = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                self._kernel.lock(fd, exclusive=True)
            except BlockingIOError as error:
                if time.monotonic() >= late:
                    raise OSError(errno.EBUSY, "another run holds it") from error
                time.sleep(_PAUSE_SECONDS)
            else:
                return

    def _open_head(self, fd: int, stack: contextlib.ExitStack) -> tuple[int, Head | None, int]:
        """The head file, what it says, and where the next half goes. One that is missing beside lines, or damaged, is
        evidence: it is left as it is, and the descriptor may be -1.
        """
        empty = os.fstat(fd).st_size == 0
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            head_fd = self._kernel.open(self._at(HEAD), flags | (os.O_CREAT if empty else 0))
        except FileNotFoundError:
            return -1, None, 0
        stack.callback(self._close, head_fd)
        self._check(head_fd)
        data = bytearray(os.fstat(head_fd).st_size)
        head, free = events.decode_head(bytes(data[: self._read(head_fd, memoryview(data), 0)]))
        if head is None and empty:
            # It must be there before the first line: a head that is missing beside lines is damage.
            head, free = Head(0, events.digest(self._origin)), len(events.encode_slot(Head(0, "")))
            self._write(head_fd, events.encode_slot(head), 0)
            self._kernel.fsync(head_fd)
        if empty:
            sync_directory(self._path, self._kernel)
        return head_fd, head, free

    def _place(self, fd: int, head: Head | None) -> events.Place:
        """Where the next line goes. Reads as much of the file's end as it takes."""
        size = os.fstat(fd).st_size
        length = min(size, _TAIL_BYTES)
        while True:
            data = bytearray(length)
            self._read(fd, memoryview(data), size - length)
            # What is cut off at the front may be the end of a line.
            ending = bytes(data) if length == size else bytes(data[data.find(b"\n") + 1 :])
            place = events.next_place(ending, head, self._origin)
            if place is not None:
                return place
            if length == size:
                return events.first_place(ending, head, self._origin)
            length = min(size, length * 8)

    def _read(self, fd: int, into: memoryview, offset: int) -> int:
        done = 0
        while done < len(into):
            count = self._kernel.preadv(fd, [into[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _write(self, fd: int, data: bytes, offset: int) -> None:
        done = 0
        while done < len(data):
            count = self._kernel.pwritev(fd, [memoryview(data)[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            done += count

    def _close(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self._kernel.close(fd)  # what must last was flushed

    # --- reading -------------------------------------------------------------------------------

    def _content(self, file: str) -> bytes | None:
        """A whole file; None if it is not there. Raises NoPermission, UnreadableStore, StoreFailed."""
        try:
            with StoredFile(self._at(file), file, self._kernel) as stored:
                if not stat.S_ISREG(os.fstat(stored.fd).st_mode):
                    raise DamagedHistory(file=file, reason="it is not a file")
                return bytes(stored.read(0, stored.size))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise read_error(error, self._at(file), file) from error

    def _reading(self) -> events.Reading:
        # The head comes first: a line is always written before the head that tells of it.
        head_data = self._content(HEAD)
        data = self._content(HISTORY)
        head = events.decode_head(head_data)[0] if head_data is not None else None
        return events.read(data or b"", head, self._origin)

    def entries(self) -> list[Entry]:
        """All lines that can be read, oldest first. Needs no lock. Raises NoPermission, UnreadableStore,
        StoreFailed, DamagedHistory where it is no file.
        """
        return self._reading().entries

    def flaws(self) -> list[Damage]:
        """What was altered or is missing. Raises NoPermission, StoreFailed where that cannot be told."""
        try:
            return [DamagedHistory(file=HISTORY, reason=reason) for reason in self._reading().flaws]
        except (UnreadableStore, DamagedHistory) as error:
            return [error]
