"""A file for another program to read at any moment: it sees the old text or the new one, whole."""

from __future__ import annotations

import fcntl
import os

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
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
