"""A file for another program to read at any moment: it sees the old text or the new one, whole."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from blockbak.errors import BadTarget


def replace(path: str, text: str) -> None:
    """Make ``text`` what the file holds, which everybody may read. Of two who write at once, one comes second.

    What a kill leaves beside it (its name with a dot before and ``.new`` after, which Prometheus does not read) is used
    by the next. Raises BadTarget.
    """
    fresh = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.new")
    try:
        descriptor = _held(fresh)
        try:
            os.ftruncate(descriptor, 0)
            data = memoryview(text.encode())
            while data:
                data = data[os.write(descriptor, data) :]
            os.fchmod(descriptor, 0o644)
            # After a power cut too it is one of the two, and not an empty file.
            os.fsync(descriptor)
            os.replace(fresh, path)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error


def _held(path: str) -> int:
    """The file, which nobody else writes meanwhile. Whoever did may have given it its name a moment ago."""
    while True:
        # Without waiting: a pipe would have to be read first.
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            _check_own(os.fstat(descriptor), path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _check_own(info: os.stat_result, path: str) -> None:
    """It is emptied, and all may read it then: it must be no other name of a file that is not meant."""
    if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
        raise OSError(errno.EINVAL, f"{path} is not a file of its own")
