"""The system calls that data and durability depend on, one method each.

Everything else in the package that reads, writes, flushes or renames goes through a ``Kernel``, so that
tests can fail the n-th call of any kind. Errors are the kernel's own (OSError); callers make sentences.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import struct
from collections.abc import Sequence
from typing import Any

_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B
_BLKFLSBUF = 0x1261
_BLKZEROOUT = 0x127F
"""linux/fs.h."""
_FICLONERANGE = 0x4020940D
"""linux/fs.h, ``_IOW(0x94, 13, struct file_clone_range)``."""
_FS_IOC_FIEMAP = 0xC020660B
"""linux/fs.h, ``_IOWR('f', 11, struct fiemap)``."""
_FIEMAP_FLAG_SYNC, _FIEMAP_EXTENT_LAST, _FIEMAP_EXTENT_SHARED = 1, 1, 0x2000
"""linux/fiemap.h."""
_FIEMAP_HEAD = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
_FIEMAP_EXTENTS = 4096
"""Asked for in one call."""
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
"""linux/falloc.h."""
_RENAME_NOREPLACE = 1
"""linux/fs.h."""
_AT_FDCWD = -100
_IOV_MAX = 1024
"""limits.h: most buffers of one pwritev."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""malloc.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def keep_memory() -> None:
    """Tell glibc to reuse freed buffers instead of returning each to the kernel.

    Frames decoded into fresh mappings cost a page fault per 4 KiB: restores took twice as long. Other C
    libraries have no such switch and need none.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 64 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def allow_many_files() -> None:
    """Raise the limit of open files as far as it may be: a long chain has as many images open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _checked(result: int, path: str = "") -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


class Kernel:
    """The real one. All offsets and lengths are bytes."""

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A close-on-exec descriptor."""
        return os.open(path, flags | os.O_CLOEXEC, mode)

    def close(self, fd: int) -> None:
        """Close; an error here is as final as one of fsync."""
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Bytes read, perhaps fewer than asked; 0 at the end."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """Bytes written, perhaps fewer than asked. At most the first 1024 buffers are taken."""
        return os.pwritev(fd, buffers[:_IOV_MAX], offset)

    def fsync(self, fd: int) -> None:
        """Make a file or directory durable."""
        os.fsync(fd)

    def truncate(self, fd: int, size: int) -> None:
        """Set a file's size."""
        os.ftruncate(fd, size)

    def allocate(self, fd: int, size: int) -> None:
        """Take the room of a file's first ``size`` bytes now; what is new reads as zeros."""
        os.posix_fallocate(fd, 0, size)

    def rename(self, old: str, new: str) -> None:
        """Rename without ever replacing: EEXIST if ``new`` is there."""
        renameat2 = getattr(_libc, "renameat2", None)
        if renameat2 is not None:
            try:
                _checked(
                    renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE),
                    new,
                )
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS):
                    raise
            else:
                return
        # The file system has no such rename. The volume's lock keeps other runs away in between.
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make a directory that only its owner may enter, whatever the umask."""
        os.mkdir(path, 0o700)
        os.chmod(path, 0o700)

    def clone_range(self, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> None:
        """Share blocks between files (FICLONERANGE)."""
        fcntl.ioctl(fd, _FICLONERANGE, struct.pack("=qQQQ", source_fd, source_offset, length, offset))

    def copy_range(self, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> int:
        """Bytes copied inside the kernel, perhaps fewer than asked."""
        return os.copy_file_range(source_fd, fd, length, source_offset, offset)

    def extents(self, fd: int) -> list[tuple[int, int, bool]]:
        """Where a file's bytes lie on its file system's device: start, length, and whether another file, or
        another place of this one, has them too (FIEMAP). Not every file system can tell.
        """
        found: list[tuple[int, int, bool]] = []
        begin, last = 0, False
        while not last:
            size = _FIEMAP_HEAD.size + _FIEMAP_EXTENTS * _FIEMAP_EXTENT.size
            asked = _FIEMAP_HEAD.pack(begin, (1 << 63) - begin, _FIEMAP_FLAG_SYNC, 0, _FIEMAP_EXTENTS, 0)
            data = bytearray(asked.ljust(size, b"\0"))
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, data)
            count = _FIEMAP_HEAD.unpack_from(data)[3]
            last = count == 0
            for number in range(count):
                at = _FIEMAP_HEAD.size + number * _FIEMAP_EXTENT.size
                start, place, length, flags = _FIEMAP_EXTENT.unpack_from(data, at)
                found.append((place, length, bool(flags & _FIEMAP_EXTENT_SHARED)))
                begin, last = start + length, bool(flags & _FIEMAP_EXTENT_LAST)
        return found

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a range of a file read as zeros without blocks of its own."""
        mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
        _checked(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))

    def zero_out(self, fd: int, offset: int, length: int) -> None:
        """Make a range of a block device read as zeros (BLKZEROOUT: writes them, or the same by the
        device's own guarantee; never a plain discard).
        """
        fcntl.ioctl(fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))

    def device_size(self, fd: int) -> int:
        """Bytes of an open block device."""
        return int(struct.unpack("=Q", fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)))[0])

    def sector_sizes(self, fd: int) -> tuple[int, int]:
        """Logical and physical sector size of an open block device, in bytes."""
        logical = struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0]
        return int(logical), int(struct.unpack("=I", fcntl.ioctl(fd, _BLKPBSZGET, bytes(4)))[0])

    def drop_cache(self, fd: int, *, block: bool) -> None:
        """Forget what the page cache holds of an open device or file (after an fsync)."""
        if block:
            # Who may write the device need not be root; what is clean by now can be dropped without it.
            with contextlib.suppress(PermissionError):
                fcntl.ioctl(fd, _BLKFLSBUF)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def lock(self, fd: int, *, exclusive: bool) -> None:
        """Take a flock without waiting; BlockingIOError while another process holds it."""
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
