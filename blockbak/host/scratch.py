"""Devices that blockbak makes for itself: loop devices on sparse files, with a file system, mounted.

Each is a context manager that undoes what it did, also when what it surrounds fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from blockbak.errors import CommandFailed
from blockbak.host import runner

_TRIES = 20
_PAUSE_SECONDS = 0.1


@contextmanager
def loop_device(file: str, size: int, *, sector_bytes: int = 512) -> Iterator[str]:
    """A loop device (its node) on a new sparse file of ``size`` bytes, with direct I/O; both go in the end.

    Raises CommandFailed, MissingProgram, OSError.
    """
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)
    try:
        argv = ["losetup", "--find", "--show", "--direct-io=on", f"--sector-size={sector_bytes}", file]
        node = runner.run(argv).stdout.strip()
        try:
            yield node
        finally:
            runner.run(["losetup", "--detach", node])
    finally:
        os.unlink(file)


@contextmanager
def mounted(node: str, directory: str) -> Iterator[str]:
    """The file system on ``node``, mounted at ``directory`` (made if it is not there)."""
    os.makedirs(directory, exist_ok=True)
    runner.run(["mount", node, directory])
    try:
        yield directory
    finally:
        _unmount(directory)


def _unmount(directory: str) -> None:
    """Unmount; a scanner that looks at every new file system may hold it for a moment."""
    import time

    for attempt in range(_TRIES):
        try:
            runner.run(["umount", directory])
        except CommandFailed:
            if attempt == _TRIES - 1:
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def make_ext4(node: str) -> None:
    """An empty ext4, every block of its tables written at once."""
    runner.run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", node], deadline=600)
