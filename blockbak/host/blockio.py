"""Bytes in and out: sources read past the page cache, targets written and read back, durable files."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from blockbak.errors import (
    BadTarget,
    BlockbakError,
    DamagedImage,
    NoPermission,
    NoSpace,
    NoSuchSource,
    SourceInUse,
    SourceNotOpened,
    SourceUnreadable,
    SourceVanished,
    StoreFailed,
    TargetFailed,
    TargetFull,
    TargetInUse,
    UnreadableStore,
)
from blockbak.host.kernel import Kernel
from blockbak.model import extent
from blockbak.model.extent import BAD, DATA, Extents
from blockbak.model.streams import Buffer, ByteSource
from blockbak.units import KIB, MIB, SECTOR, align_down, align_up

PIECE_BYTES = 2 * MIB
"""One read: large enough to keep a disk streaming, small enough to stay in a core's cache."""
PAGE = mmap.PAGESIZE

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ERRORS = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.EBADMSG, errno.ETIMEDOUT)
"""A medium that cannot deliver a sector says one of these (block/blk-core.c, blk_errors)."""
_STEPS = (64 * KIB, 4 * KIB)
"""Where a piece cannot be read, parts of these sizes are asked for, and at last sectors. A failing read may take
seconds and a good one takes none, so a bad sector should lie in few failing ones: four here, a dozen if halved.
"""
RETRIES = 1
"""How often a sector that could not be read is asked for again."""
ROUND_SECONDS = 60.0
"""How long the parts of one piece are looked through, the first time and each time again. The first step, of at
most 32 reads, is always made.
"""
_GONE = (errno.ENXIO, errno.ENODEV, errno.ESHUTDOWN)
_NO_CLONE = (
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EPERM,
    errno.ETXTBSY,
)

Bytes = npt.NDArray[np.uint8]


def aligned(size: int) -> Bytes:
    """A uint8 array of ``size`` bytes (rounded up to a page) whose memory O_DIRECT accepts.

    An anonymous mapping: page-aligned, and back with the kernel when the array is gone.
    """
    return np.frombuffer(mmap.mmap(-1, align_up(max(size, 1), PAGE)), np.uint8)


class _Opened:
    """A descriptor of a device or file, with O_DIRECT where it is granted. ``size`` is that of the opening.

    Raises OSError, with nothing left open.
    """

    def __init__(self, kernel: Kernel, path: str, flags: int) -> None:
        self.kernel = kernel
        self.path = path
        self.direct = True
        self._plain = -1
        self._access = flags & os.O_ACCMODE
        try:
            self.fd = kernel.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.direct = False
            if flags & os.O_CREAT:
                # The refused call may have made the file (Linux up to 6.5, tmpfs): it is ours all the same.
                flags = flags & ~os.O_EXCL | os.O_NOFOLLOW
            self.fd = kernel.open(path, flags)
        try:
            self.is_block = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            self.logical, self.physical = kernel.sector_sizes(self.fd) if self.is_block else (SECTOR, 4 * KIB)
            self.size = self.current_size()
        except BaseException:
            with contextlib.suppress(OSError):
                kernel.close(self.fd)
            raise

    def current_size(self) -> int:
        """Bytes now."""
        return self.kernel.device_size(self.fd) if self.is_block else os.fstat(self.fd).st_size

    def is_of(self, path: str, file_id: tuple[int, int]) -> bool:
        """Whether what is open here is what was looked at: the file of that st_dev and st_ino, or the device
        that ``path`` is a node of.
        """
        mine = os.fstat(self.fd)
        if not self.is_block:
            return (mine.st_dev, mine.st_ino) == file_id
        try:
            return mine.st_rdev == os.stat(path).st_rdev
        except OSError:
            return False

    def _buffered(self) -> int:
        """A second descriptor without O_DIRECT, for what is not a whole sector; whatever the name says by now."""
        if self._plain < 0:
            self._plain = self.kernel.open(f"/proc/self/fd/{self.fd}", self._access)
        return self._plain

    def close(self) -> None:
        """Release the descriptors, all of them; closing twice is harmless. Raises OSError."""
        fds, self.fd, self._plain = [fd for fd in (self.fd, self._plain) if fd >= 0], -1, -1
        with contextlib.ExitStack() as stack:
            for fd in fds:
                stack.callback(self.kernel.close, fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What was only read does not suffer from it.
        with contextlib.suppress(OSError):
            self.close()

    def read_some(self, offset: int, into: Bytes) -> int:
        """Fill ``into`` as far as one request goes; bytes that now are good.

        ``into`` may be longer than what is left: O_DIRECT wants whole sectors, the kernel stops at the end.
        """
        try:
            count = self.kernel.preadv(self.fd, [memoryview(into)], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or not self.direct:
                raise
            # A piece around a bad sector, of a file that lies on sectors larger than 512 bytes; or the end of a
            # device whose size is not a whole number of its sectors.
            return self.kernel.preadv(self._buffered(), [memoryview(into)], offset)
        if not self.direct:
            os.posix_fadvise(self.fd, offset, len(into), os.POSIX_FADV_DONTNEED)
        return count

    def next_data(self, offset: int) -> int:
        """For an image file: the first byte from ``offset`` on that is not in a hole; ``size`` if none.

        Holes of a file are zeros by definition, so they need no reading. Devices have none to tell.
        """
        if self.is_block:
            return offset
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            return self.size if error.errno == errno.ENXIO else offset


class DiskReader(Protocol):
    """What is read into an image: a device, a file, or a spool of one. Sizes are bytes; ``retries``, ``strict`` and
    ``doubt`` are ``SourceReader``'s, and mean nothing to what has been read from its disk already.
    """

    path: str
    size: int
    logical: int
    physical: int
    retries: int
    strict: bool
    doubt: Callable[[], None]

    def read(self, offset: int, into: Bytes, length: int) -> Extents:
        """Read ``length`` bytes at ``offset`` into the start of ``into``; what could not be read, BAD."""

    def next_data(self, offset: int) -> int:
        """The first byte from ``offset`` on that is not in a hole."""

    def is_alive(self, places: Iterable[int]) -> bool:
        """Whether a sector at one of ``places`` (bytes) can be read."""


def _parts(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """The range, cut at multiples of ``step``."""
    while start < end:
        cut = min(align_down(start, step) + step, end)
        yield start, cut
        start = cut


class SourceReader(_Opened):
    """What is backed up: opened read-only, never written, past the page cache.

    ``doubt`` is called at every read error, and may raise what it knows of the reason: an overflowed snapshot
    answers with the errors of a failing disk. ``retries`` is how often an unreadable sector is asked for again;
    ``strict`` makes the first one an error. ``exclusive`` opens a block device with O_EXCL: nothing can mount or
    claim it while it is read, and a device in use is refused. Raises NoSuchSource, NoPermission, NotABlockSource,
    SourceInUse.
    """

    def __init__(
        self, path: str, *, exclusive: bool, kernel: Kernel | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.doubt: Callable[[], None] = lambda: None
        self.retries = RETRIES
        self.strict = False
        self._clock = clock
        try:
            is_block = stat.S_ISBLK(os.stat(path).st_mode)
            super().__init__(kernel or Kernel(), path, os.O_RDONLY | (os.O_EXCL if exclusive and is_block else 0))
        except FileNotFoundError as error:
            raise NoSuchSource(path=path) from error
        except PermissionError as error:
            raise NoPermission(action="read", path=path) from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise SourceInUse(path=path, holders="the kernel does not grant exclusive use") from error
            if error.errno in (*_GONE, errno.ENOMEDIUM):
                raise SourceVanished(path=path, reason=os.strerror(error.errno)) from error
            raise SourceNotOpened(path=path, reason=error.strerror) from error

    def read(self, offset: int, into: Bytes, length: int) -> Extents:
        """Read ``length`` bytes at ``offset`` into the start of ``into``; what could not be read.

        ``into`` is page-aligned memory of at least ``length`` rounded up to a page. Unreadable sectors are
        zeros in ``into`` and BAD extents (volume bytes) in the result. Where that takes too long, more than the
        sectors around them may be. Raises SourceVanished, and SourceUnreadable where ``strict``.
        """
        if self._try(offset, into, length) is None:
            return extent.empty()
        bad = self._read_around(offset, into, length)
        for start, end in bad:
            into[start - offset : end - offset] = 0
        if not bad:
            return extent.empty()
        starts, ends = zip(*bad, strict=True)
        return extent.coalesce(extent.table(starts, ends, BAD))

    def is_alive(self, places: Iterable[int]) -> bool:
        """Whether a sector at one of ``places`` (bytes) can be read: a disk that is gone answers none."""
        into = aligned(self.logical)
        for place in places:
            start = align_down(place, self.logical)
            if self._try(start, into, min(self.logical, self.size - start)) is None:
                return True
        return False

    def _try(self, offset: int, into: Bytes, length: int) -> OSError | None:
        """Read it all, or the error of the medium that was met. Raises SourceVanished."""
        # No sector beyond: it may be a bad one.
        room = align_up(length, PAGE if length > PAGE else self.logical)
        done = 0
        while done < length:
            try:
                count = self.read_some(offset + done, into[done:room])
            except OSError as error:
                self._check_present(error)
                return error
            if self.direct and count < length - done:
                count = align_down(count, self.logical)  # the next request must begin at a sector
            if count == 0:
                raise SourceVanished(path=self.path, reason=f"reading ended at byte {offset + done}")
            done += count
        return None

    def _read_around(self, offset: int, into: Bytes, length: int) -> list[tuple[int, int]]:
        """What of a piece cannot be read, as ranges in order. All that is good is read before anything is asked
        for again: a disk that is dying may not answer for long.
        """
        steps = [step for step in _STEPS if step > self.logical]

        def read(start: int, end: int) -> OSError | None:
            part = aligned(end - start)
            error = self._try(start, part, end - start)
            if error is None:
                into[start - offset : end - offset] = part[: end - start]
            return error

        if self.strict:
            self._read_strictly(offset, offset + length, [*steps, self.logical], read)
            return []
        first = steps.pop(0)
        bad = [part for part in _parts(offset, offset + length, first) if read(*part) is not None]
        for _ in range(1 + self.retries):
            late = self._clock() + ROUND_SECONDS
            for step in (*steps, self.logical):
                bad = list(self._still_bad(bad, step, late, read))
        return bad

    def _still_bad(
        self, bad: Sequence[tuple[int, int]], step: int, late: float, read: Callable[[int, int], OSError | None]
    ) -> Iterator[tuple[int, int]]:
        """What is left of unreadable ranges once they were asked for in parts of ``step`` bytes. What the time
        until ``late`` does not suffice for is left as it is.
        """
        for start, end in bad:
            if end - start <= step and step > self.logical:
                yield start, end  # it was asked for as it is
                continue
            for low, high in _parts(start, end, step):
                if self._clock() >= late:
                    yield low, end
                    break
                if read(low, high) is not None:
                    yield low, high

    def _read_strictly(
        self, start: int, end: int, steps: Sequence[int], read: Callable[[int, int], OSError | None]
    ) -> None:
        """Find the first sector that cannot be read, and raise SourceUnreadable; none may be there any more."""
        for low, high in _parts(start, end, steps[0]):
            error = read(low, high)
            if error is None:
                continue
            if len(steps) > 1:
                self._read_strictly(low, high, steps[1:], read)
            elif all(read(low, high) is not None for _ in range(self.retries)):
                raise SourceUnreadable(
                    path=self.path, byte=low, sector=low // self.logical, sector_bytes=self.logical,
                    reason=error.strerror,
                ) from error  # fmt: skip

    def _check_present(self, error: OSError) -> None:
        """An error of the medium goes on; anything else, or a device that is gone, ends the run."""
        self.doubt()
        if error.errno in _GONE or error.errno not in _READ_ERRORS:
            raise SourceVanished(path=self.path, reason=error.strerror) from error
        try:
            size = self.current_size()
        except OSError as gone:
            raise SourceVanished(path=self.path, reason=gone.strerror) from error
        if size < self.size:
            raise SourceVanished(path=self.path, reason="it has no bytes any more") from error


class TargetWriter(_Opened):
    """What is restored to: a block device, opened with O_EXCL, or a file.

    Raises BadTarget, NoPermission, TargetInUse here; TargetFailed in its methods.
    """

    def __init__(self, path: str, *, create: bool = False, kernel: Kernel | None = None) -> None:
        try:
            if create:
                super().__init__(kernel or Kernel(), path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                os.fchmod(self.fd, 0o600)
            else:
                exclusive = os.O_EXCL if stat.S_ISBLK(os.stat(path).st_mode) else 0
                super().__init__(kernel or Kernel(), path, os.O_RDWR | exclusive)
        except PermissionError as error:
            raise NoPermission(action="write", path=path) from error
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise TargetInUse(path=path, holders="the kernel does not grant exclusive use") from error
            raise BadTarget(path=path, reason=error.strerror) from error
        if not self.is_block:
            self._claim()

    def _claim(self) -> None:
        """O_EXCL guards a device; a file takes a lock, so that two restores never write one. Raises TargetInUse."""
        try:
            self.kernel.lock(self.fd, exclusive=True)
        except BlockingIOError as error:
            self.close()
            raise TargetInUse(path=self.path, holders="another run is writing it") from error
        except OSError:
            pass  # a file system without locks

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except OSError as failed:
            if error is None:
                raise TargetFailed(action="Closing", path=self.path, reason=failed.strerror) from failed

    @contextlib.contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise TargetFull(path=self.path) from error
            raise TargetFailed(action=action, path=self.path, reason=error.strerror) from error

    def write(self, offset: int, data: Bytes) -> None:
        """Write all of ``data`` (page-aligned memory) at ``offset``; whole sectors go past the page cache."""
        unit = max(self.physical if not self.is_block else 0, self.logical)
        whole = align_down(len(data), unit)
        done = 0
        with self._failing(f"Writing byte {offset} of"):
            while done < len(data):
                direct = self.direct and done < whole and not (offset + done) % unit
                fd, end = (self.fd, whole) if direct else (self._buffered(), len(data))
                count = self.kernel.pwritev(fd, [memoryview(data)[done:end]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += count

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros: by the device's or file system's own means, or by writing."""
        with self._failing(f"Writing byte {offset} of"):
            whole = align_down(length, self.logical) if self.is_block else length
            try:
                if self.is_block and whole:
                    self.kernel.zero_out(self.fd, offset, whole)
                elif whole:
                    self.kernel.punch(self.fd, offset, whole)
                done = whole
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
                    raise
                done = 0
        zeros = aligned(min(PIECE_BYTES, length - done)) if done < length else None
        while zeros is not None and done < length:
            part = zeros[: min(len(zeros), length - done)]
            self.write(offset + done, part)
            done += len(part)

    def read(self, offset: int, into: Bytes, length: int) -> None:
        """Read back ``length`` bytes, not from the page cache. Raises TargetFailed.

        A short result (a target that shrank) is an error too. ``into`` is as for ``SourceReader.read``.
        """
        done = 0
        with self._failing(f"Reading back byte {offset} of"):
            while done < length:
                count = self.read_some(offset + done, into[done : align_up(length, PAGE)])
                if count == 0:
                    raise OSError(errno.EIO, "it ends before the volume does")
                done += count

    def resize(self, size: int) -> None:
        """Set a file target to exactly ``size`` bytes."""
        if size == self.size:
            return  # a file that a program serves (FUSE) may have no other
        with self._failing("Setting the size of"):
            self.kernel.truncate(self.fd, size)
        self.size = size

    def flush(self) -> None:
        """Make everything written durable, then let the page cache forget the target."""
        with self._failing("Making durable what was written to"):
            if self._plain >= 0:
                self.kernel.fsync(self._plain)
            self.kernel.fsync(self.fd)
            self.kernel.drop_cache(self.fd, block=self.is_block)


# --- files of the repository -----------------------------------------------------------------------


class StoredFile:
    """A sealed file, read at random: a ``ByteSource``. ``fd`` is open as long as the object lives."""

    def __init__(self, path: str, name: str, kernel: Kernel | None = None) -> None:
        self._kernel = kernel or Kernel()
        self._name = name
        self.path = path
        # A pipe in its place would be waited for.
        self.fd = self._kernel.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self._size = os.fstat(self.fd).st_size

    @property
    def name(self) -> str:
        """How messages call it: its path below the repository."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes when it was opened."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes, as a memoryview. Raises UnreadableStore, or DamagedImage past the end."""
        if offset < 0 or offset + length > self._size:
            raise DamagedImage(file=self._name, reason="it is shorter than its index says")
        # Not a bytearray: that would be filled with zeros first.
        view = memoryview(np.empty(length, np.uint8))
        done = 0
        while done < length:
            try:
                count = self._kernel.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise UnreadableStore(file=self._name, offset=offset + done, reason=error.strerror) from error
            if count == 0:
                raise DamagedImage(file=self._name, reason="it was cut short while it was read")
            done += count
        return view  # type: ignore[return-value]  # it serves as well as bytes and saves a copy

    def drop_cache(self) -> None:
        """Let the page cache drop the file, so that it is read from its disk. Raises UnreadableStore, StoreFailed."""
        try:
            self._kernel.drop_cache(self.fd, block=False)
        except OSError as error:
            raise read_error(error, self.path, self._name) from error

    def close(self) -> None:
        """Release the descriptor."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            self._kernel.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # It was only read.
        with contextlib.suppress(OSError):
            self.close()


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of disk space of some files: those that only they hold, and those that other files hold too."""

    own: int
    shared: int


def space_of(paths: Sequence[str], others: Sequence[str], kernel: Kernel) -> Space:
    """What removing the files ``paths`` gives back, and what stays because ``others`` share it.

    Where the file system does not tell, all of it counts as their own. What it holds for others yet (a
    snapshot of btrfs) does so too, for it comes back with them.
    """
    places = [place for path in paths for place in _map_of(path, kernel)]
    shared = [place for place in places if place[2]]
    if not shared:
        return Space(sum(map(_allocated, paths)), 0)
    kept = _united(place for path in others for place in _map_of(path, kernel) if place[2])
    # btrfs keeps all of an extent while any of it is used; XFS tells of each part by itself.
    stays = _united(place for place in shared if len(extent.clip(kept, place[0], place[0] + place[1])))
    alone = sum(length for _, length, is_shared in places if not is_shared)
    return Space(alone + extent.total(extent.subtract(_united(shared), stays)), extent.total(stays))


def _map_of(path: str, kernel: Kernel) -> list[tuple[int, int, bool]]:
    """Where a file lies; empty where that cannot be told."""
    try:
        with StoredFile(path, path, kernel) as file:
            return kernel.extents(file.fd)
    except OSError:
        return []


def _allocated(path: str) -> int:
    """Bytes that a file takes on its file system; 0 if it is not there."""
    try:
        return os.stat(path).st_blocks * SECTOR
    except OSError:
        return 0


def _united(places: Iterable[tuple[int, int, bool]]) -> Extents:
    """Ranges of a device, sorted and without overlaps."""
    rows = sorted((start, start + length) for start, length, _ in places)
    return extent.align_out(extent.table([a for a, _ in rows], [b for _, b in rows], DATA), 1, (1 << 63) - 1)


class PartialFile:
    """A file of the repository while it is written: a ``ByteSink`` under a name that says so.

    ``seal`` makes it durable under its final name; leaving the ``with`` without that removes it. A failed
    fsync or close is final: the kernel may have dropped the pages, so it is never tried again.
    """

    def __init__(self, path: str, name: str, kernel: Kernel | None = None) -> None:
        self._kernel = kernel or Kernel()
        self._name = name
        self.final = path
        self.path = path + ".partial"
        self._cloning = True
        with self._failing("made"):
            self.fd = self._kernel.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.fchmod(self.fd, 0o600)

    @property
    def name(self) -> str:
        """How messages call it: the final path below the repository."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes written so far, seen from the file's end."""
        return os.fstat(self.fd).st_size

    @contextlib.contextmanager
    def _failing(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise store_error(error, self._name, action) from error

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers, one after the other, from ``offset``. Raises NoSpace or StoreFailed."""
        pending = [memoryview(part).cast("B") for part in buffers if len(part)]
        with self._failing("written"):
            while pending:
                count = self._kernel.pwritev(self.fd, pending, offset)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                offset += count
                while pending and count >= len(pending[0]):
                    count -= len(pending.pop(0))
                if count:
                    pending[0] = pending[0][count:]

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes written before. Raises StoreFailed."""
        data = bytearray(length)
        done = 0
        with self._failing("read back"):
            while done < length:
                count = self._kernel.preadv(self.fd, [memoryview(data)[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "it is shorter than what was written")
                done += count
        return bytes(data)

    def clone_unit(self, source: ByteSource) -> int:
        """Tried out on the start of the file, which must not be written yet."""
        if not isinstance(source, StoredFile) or os.fstat(source.fd).st_dev != os.fstat(self.fd).st_dev:
            return 0
        unit = os.fstatvfs(self.fd).f_bsize
        if source.size <= unit or not self.clone(source, 0, 0, unit):
            return 0
        with self._failing("written"):
            self._kernel.truncate(self.fd, 0)  # what is written may be less than a unit of it
        return unit

    def clone(self, source: ByteSource, source_offset: int, offset: int, length: int) -> bool:
        """Share ``length`` bytes of ``source`` at ``offset``; False where the file system will not, now and from
        then on. Raises NoSpace or StoreFailed.
        """
        if not self._cloning or not isinstance(source, StoredFile):
            return False
        try:
            self._kernel.clone_range(source.fd, source_offset, length, self.fd, offset)
        except OSError as error:
            if error.errno in _NO_CLONE:
                self._cloning = False
                return False
            raise store_error(error, self._name, "written") from error
        return True

    def copy(self, source: ByteSource, source_offset: int, offset: int, length: int) -> None:
        """Copy ``length`` bytes of ``source`` to ``offset``, inside the kernel where it can. Raises NoSpace,
        StoreFailed, and what reading the source raises.
        """
        while length:
            count = self._copy_inside(source, source_offset, offset, length)
            if not count:
                count = min(length, PIECE_BYTES)
                self.write(offset, [source.read(source_offset, count)])
            source_offset, offset, length = source_offset + count, offset + count, length - count

    def _copy_inside(self, source: ByteSource, source_offset: int, offset: int, length: int) -> int:
        """Bytes the kernel copied by itself; 0 where it does not."""
        if not isinstance(source, StoredFile):
            return 0
        try:
            return self._kernel.copy_range(source.fd, source_offset, length, self.fd, offset)
        except OSError as error:
            if error.errno in _NO_CLONE:
                return 0
            if error.errno in _NO_SPACE:
                raise NoSpace(path=self._name) from error
            # Which side failed is not told: reading and writing by ourselves will name it.
            return 0

    def harden(self) -> None:
        """Flush and close: nothing of it but its name can be lost. Only once."""
        with self._failing("made durable"):
            self._kernel.fsync(self.fd)
            fd, self.fd = self.fd, -1
            self._kernel.close(fd)

    def seal(self) -> None:
        """Harden it if that was not done, rename to the final name (never replacing), flush the directory."""
        if self.fd >= 0:
            self.harden()
        with self._failing("made durable"):
            self._kernel.rename(self.path, self.final)
            self.path = ""
            sync_directory(os.path.dirname(self.final), self._kernel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # What fails here leaves a partial, which the next run sweeps; the first error stays the one seen.
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):
                self._kernel.close(fd)
        if self.path:
            with contextlib.suppress(OSError):
                self._kernel.unlink(self.path)


def read_error(error: OSError, path: str, name: str) -> BlockbakError:
    """The sentence for an OSError while a file or directory of the repository was opened or read: damage
    only where the medium below cannot deliver it.
    """
    if error.errno in (errno.EACCES, errno.EPERM):
        return NoPermission(action="read", path=path)
    reason = error.strerror or str(error)
    if error.errno in (*_READ_ERRORS, *_GONE, errno.ESTALE, errno.EUCLEAN):
        return UnreadableStore(file=name, offset=0, reason=reason)
    return StoreFailed(path=path, action="opened", reason=reason)


def store_error(error: OSError, name: str, action: str) -> BlockbakError:
    """The sentence for an OSError while a file of the repository was ``action`` (a past participle)."""
    if error.errno in _NO_SPACE:
        return NoSpace(path=name)
    if error.errno in (errno.EACCES, errno.EPERM):
        return NoPermission(action="write", path=name)
    return StoreFailed(path=name, action=action, reason=error.strerror or str(error))


_MARK = "user.blockbak"
"""An extended attribute (xattr(7)) of a file that is not finished."""


def mark(fd: int) -> None:
    """Note on a file that it is blockbak's and not finished, where its file system keeps such notes."""
    with contextlib.suppress(OSError):
        os.setxattr(fd, _MARK, b"unfinished")


def unmark(fd: int) -> None:
    """Take the note off."""
    with contextlib.suppress(OSError):
        os.removexattr(fd, _MARK)


def is_marked(path: str) -> bool:
    """Whether a file carries the note."""
    try:
        return os.getxattr(path, _MARK, follow_symlinks=False) == b"unfinished"
    except OSError:
        return False


def sync_directory(path: str, kernel: Kernel) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = kernel.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        kernel.fsync(fd)
    finally:
        kernel.close(fd)


def write_durably(path: str, name: str, data: bytes, kernel: Kernel) -> None:
    """A whole small file, all or nothing, never replacing one. Raises NoSpace or StoreFailed."""
    with PartialFile(path, name, kernel) as partial:
        partial.write(0, [data])
        partial.seal()


def replace_durably(path: str, data: bytes, kernel: Kernel, mode: int = 0o600) -> None:
    """Make ``data`` what a small file holds, all or nothing, whatever the umask. Raises OSError."""
    partial = f"{path}.partial"
    with contextlib.suppress(FileNotFoundError):
        kernel.unlink(partial)
    fd = kernel.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        done = 0
        while done < len(data):
            count = kernel.pwritev(fd, [memoryview(data)[done:]], done)
            if count == 0:
                raise OSError(errno.EIO, "nothing was written")
            done += count
        kernel.fsync(fd)
    finally:
        kernel.close(fd)
    # Whole before it has the name: a power cut leaves the old one or the new one.
    os.replace(partial, path)
    sync_directory(os.path.dirname(path), kernel)
