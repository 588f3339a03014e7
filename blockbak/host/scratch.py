"""What blockbak makes for itself: directories, loop devices on sparse files, with a file system, mounted.

Each is a context manager that undoes what it did, also when what it surrounds fails. No signal breaks into
making or undoing; what is surrounded hears them.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from blockbak.errors import BlockbakError, CommandFailed
from blockbak.host import runner
from blockbak.host.signals import undisturbed

_TRIES = 20
_PAUSE_SECONDS = 0.1


@contextmanager
def undone(release: Callable[[], object]) -> Iterator[None]:
    """Call ``release`` in the end. Where it fails after an error, that error stays and gets a note."""
    try:
        yield
    except BaseException as error:
        try:
            release()
        except (BlockbakError, OSError) as failed:
            error.add_note(f"Cleaning up failed too: {failed}")
        raise
    release()


@contextmanager
def folder(parent: str, prefix: str) -> Iterator[str]:
    """A new directory in ``parent`` that only its owner may enter; in the end it goes with all in it.

    Raises OSError.
    """
    with undisturbed() as through:
        path = tempfile.mkdtemp(prefix=prefix, dir=parent)
        # Held while we live: ``sweep`` knows by it whose owner is dead.
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with undone(lambda: shutil.rmtree(path)), through():
                yield path
        finally:
            os.close(held)


def sweep(parent: str, prefix: str, files: Collection[str]) -> list[str]:
    """Remove the directories that ``folder`` made in ``parent`` for processes that were killed; their paths.

    Only our own with nothing but ``files`` in them, at least one, and nobody holding them: an empty one may have
    been made a moment ago.
    """
    gone = []
    for path in glob.glob(os.path.join(glob.escape(parent), glob.escape(prefix) + "*")):
        with contextlib.suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                names = set(os.listdir(held))
                if names and names <= set(files) and os.fstat(held).st_uid == os.geteuid():
                    shutil.rmtree(path)
                    gone.append(path)
            finally:
                os.close(held)
    return gone


@contextmanager
def loop_device(file: str, size: int, *, sector_bytes: int = 512) -> Iterator[str]:
    """A loop device (its node) on a new sparse file of ``size`` bytes, with direct I/O; both go in the end.

    Raises CommandFailed, MissingProgram, OSError.
    """
    with undisturbed() as through:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with undone(lambda: os.unlink(file)):
            try:
                os.ftruncate(descriptor, size)
            finally:
                os.close(descriptor)
            argv = ["losetup", "--find", "--show", "--direct-io=on", f"--sector-size={sector_bytes}", file]
            node = runner.run(argv).stdout.strip()
            with undone(lambda: runner.run(["losetup", "--detach", node])), through():
                yield node


@contextmanager
def mounted(node: str, directory: str) -> Iterator[str]:
    """The file system on ``node``, mounted at ``directory`` (made if it is not there)."""
    with undisturbed() as through:
        os.makedirs(directory, exist_ok=True)
        runner.run(["mount", node, directory])
        with undone(lambda: _unmount(directory)), through():
            yield directory


def _unmount(directory: str) -> None:
    """Unmount; a scanner that looks at every new file system may hold it for a moment.

    Raises CommandFailed where somebody keeps it; it goes then when they let go.
    """
    for attempt in range(_TRIES):
        try:
            runner.run(["umount", directory])
        except CommandFailed:
            if attempt == _TRIES - 1:
                with contextlib.suppress(CommandFailed):
                    runner.run(["umount", "--lazy", directory])
                raise
            time.sleep(_PAUSE_SECONDS)
        else:
            return


def make_ext4(node: str, check: Callable[[], None] = lambda: None) -> None:
    """An empty ext4, every block of its tables written at once. ``check`` may raise meanwhile."""
    argv = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", node]
    runner.run(argv, deadline=600, check=check)
