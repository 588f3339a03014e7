"""Directories, loop devices and file systems that are gone when their ``with`` ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator

MIB = 1 << 20
GIB = 1 << 30
PIECE = 4 * MIB

_BLKFLSBUF = 0x1261
"""linux/fs.h."""
_MKFS = {
    # Lazy initialisation would go on writing to an idle device; a discard would unallocate it.
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K", "-m", "reflink=1"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
}


class ToolFailed(Exception):
    """A program of the set-up or of a contest did not end well."""

    def __init__(self, argv: list[str], status: int, told: str) -> None:
        super().__init__(f"{' '.join(argv)} ended with {status}: {told.strip()[-2000:] or '(it said nothing)'}")


def run(*argv: str, check: bool = True) -> str:
    """Run a program of the set-up; what it printed. Raises ToolFailed."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    if check and done.returncode:
        raise ToolFailed(list(argv), done.returncode, done.stderr)
    return done.stdout


@contextlib.contextmanager
def directory(parent: str) -> Iterator[str]:
    """A directory of its own below ``parent``."""
    path = tempfile.mkdtemp(prefix="blockbak-bench-", dir=parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _detach(file: str) -> None:
    """Detach every loop device of a file; waits until the kernel has let go."""
    deadline = time.monotonic() + 10
    while names := run("losetup", "--associated", file, "--noheadings", "--output", "NAME").split():
        if time.monotonic() > deadline:
            raise ToolFailed(["losetup", "--detach", *names], 1, "something still uses it")
        for name in names:
            run("losetup", "--detach", name, check=False)
        time.sleep(0.05)


@contextlib.contextmanager
def loop_device(file: str) -> Iterator[str]:
    """A loop device on ``file`` that bypasses the file's page cache, as a disk would."""
    try:
        yield run("losetup", "--find", "--show", "--direct-io=on", file).strip()
    finally:
        # By file, not by name: an interrupt may come between attaching and knowing the name.
        _detach(file)


def allocate(file: str, size: int) -> None:
    """A file of ``size`` bytes whose blocks are all written: unwritten ones are read without the disk."""
    run(
        "dd",
        "if=/dev/zero",
        f"of={file}",
        f"bs={PIECE}",
        f"count={size // PIECE}",
        "conv=fsync",
        "status=none",
    )


@contextlib.contextmanager
def allocated_device(parent: str, name: str, size: int) -> Iterator[str]:
    """A loop device on a fully allocated file."""
    file = os.path.join(parent, name)
    try:
        allocate(file, size)
        with loop_device(file) as device:
            yield device
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def make_file_system(kind: str, device: str) -> None:
    """Format a device."""
    run(*_MKFS[kind], device)


@contextlib.contextmanager
def mounted(device: str, parent: str) -> Iterator[str]:
    """Where a device's file system is mounted meanwhile."""
    where = tempfile.mkdtemp(prefix="mount-", dir=parent)
    try:
        run("mount", device, where)
        yield where
    finally:
        if os.path.ismount(where):
            run("umount", where)
        os.rmdir(where)


@contextlib.contextmanager
def file_system(kind: str, parent: str, size: int) -> Iterator[str]:
    """A new, mounted file system of ``kind`` on a loop device with a sparse file."""
    file = os.path.join(parent, f"{kind}.img")
    try:
        with open(file, "wb") as made:
            made.truncate(size)
        with loop_device(file) as device:
            make_file_system(kind, device)
            with mounted(device, parent) as where:
                yield where
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)


def forget(path: str) -> None:
    """Have the page cache forget a file or device, and a loop device's file too."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        if path.startswith("/dev/loop"):
            fcntl.ioctl(fd, _BLKFLSBUF)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):
        with open(f"/sys/block/{os.path.basename(path)}/loop/backing_file") as known:
            backing = known.read().strip()
        forget(backing)


_SETTLED_SECONDS, _SETTLING_SECONDS = 1.0, 15.0


def _free_now(where: str) -> int:
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    run("sync", "--file-system", where)
    state = os.statvfs(where)
    return state.f_bfree * state.f_frsize


def free_bytes(where: str) -> int:
    """Room in a file system, with everything written that was to be written.

    XFS and btrfs free what was unlinked in the background: the number counts once it stays the same. Where
    others write too it may never do so, and the last one serves.
    """
    deadline = time.monotonic() + _SETTLING_SECONDS
    last, now = -1, _free_now(where)
    while now != last and time.monotonic() < deadline:
        time.sleep(_SETTLED_SECONDS)
        last, now = now, _free_now(where)
    return now


def stored_bytes(path: str) -> int:
    """Bytes of a file, or of all files below a directory."""
    if not os.path.isdir(path):
        return os.path.getsize(path)
    return sum(os.path.getsize(os.path.join(base, name)) for base, _, names in os.walk(path) for name in names)


def kind_of(path: str) -> str:
    """The type of the file system that holds ``path``."""
    # Not stat's word: ext2, ext3 and ext4 have one magic number.
    return run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", path).strip()


def takes_direct_writes(parent: str) -> bool:
    """Whether files in a directory can be opened with O_DIRECT."""
    path = os.path.join(parent, "direct")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return True


def sectors_read(device: str) -> int:
    """Sectors of 512 bytes read from a device since it exists (kernel, Documentation/block/stat.rst)."""
    with open(f"/sys/block/{os.path.basename(device)}/stat") as stat:
        return int(stat.read().split()[2])
