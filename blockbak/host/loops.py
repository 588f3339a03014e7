"""Loop devices that last as long as their descriptor: whatever becomes of the process, the kernel takes them down.

For scratch files that have no name any more, which losetup(8) cannot be told.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from blockbak.errors import LoopFailed
from blockbak.host.signals import undisturbed
from blockbak.units import SECTOR

CONTROL = "/dev/loop-control"
SCRATCH_PREFIX = ".blockbak-drill-"
"""udev's rule knows a scratch file by it: the kernel goes on calling the file so when its name is gone."""

_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
"""linux/loop.h: LOOP_CTL_GET_FREE, LOOP_CONFIGURE (since kernel 5.8); LO_FLAGS_*."""
_INFO = struct.Struct("=QQQQQIIII64s64s32sQQ")
_CONFIG = struct.Struct(f"=II{_INFO.size}s64x")
"""struct loop_info64: device, inode, rdevice, offset, sizelimit, number, encryption (2), flags, names; struct
loop_config: the file's descriptor, the block size, the former.
"""
_TRIES = 50
_GONE_SECONDS = 10.0
"""Scanners that look at the device hold it for a moment."""


@contextmanager
def nameless(directory: str, size: int) -> Iterator[int]:
    """A descriptor of a new sparse file of ``size`` bytes that has no name: it is gone with its last user, also when
    the machine is reset. Raises OSError.
    """
    with undisturbed() as through:
        sweep(directory)
        path = os.path.join(directory, f"{SCRATCH_PREFIX}{os.getpid()}-{os.urandom(4).hex()}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            # Killed between the two, it leaves an empty file, which the next drill there sweeps.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.ftruncate(descriptor, size)
            with through():
                yield descriptor
        finally:
            os.close(descriptor)


def sweep(directory: str) -> list[str]:
    """Remove the empty files that drills left which were killed between making one and taking its name off; their
    paths. One that is being made loses its name a moment earlier, which does it no harm.
    """
    gone = []
    for path in glob.glob(os.path.join(glob.escape(directory), glob.escape(SCRATCH_PREFIX) + "*")):
        with contextlib.suppress(OSError):
            about = os.lstat(path)
            if about.st_size == 0 and about.st_uid == os.geteuid() and not os.path.islink(path):
                os.unlink(path)
                gone.append(path)
    return gone


@contextmanager
def attached(file: int, *, start: int = 0, length: int = 0, sector_bytes: int = SECTOR) -> Iterator[str]:
    """A loop device (its node) on ``length`` bytes (0: all) from byte ``start`` on of the open ``file``. It is gone
    when the ``with`` is left and nobody has it open any more, which is waited for. Raises LoopFailed.
    """
    with undisturbed() as through:
        descriptor, node = _configured(file, start, length, sector_bytes)
        try:
            with through():
                yield node
        finally:
            os.close(descriptor)
            _wait_for_end(node)


def _configured(file: int, start: int, length: int, sector_bytes: int) -> tuple[int, str]:
    """The descriptor that keeps it, and its node."""
    flags = _AUTOCLEAR | _DIRECT_IO
    info = _INFO.pack(0, 0, 0, start, length, 0, 0, 0, flags, b"blockbak-drill", b"", bytes(32), 0, 0)
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise LoopFailed(path=CONTROL, reason=error.strerror) from error
    try:
        for _ in range(_TRIES):
            node = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
            descriptor = os.open(node, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(descriptor, _CONFIGURE, _CONFIG.pack(file, sector_bytes, info))
            except OSError as error:
                os.close(descriptor)
                if error.errno != errno.EBUSY:
                    raise
                continue  # another process took it first
            return descriptor, node
    except OSError as error:
        raise LoopFailed(path=os.readlink(f"/proc/self/fd/{file}"), reason=error.strerror) from error
    finally:
        os.close(control)
    raise LoopFailed(path=os.readlink(f"/proc/self/fd/{file}"), reason="others took each free one first")


def _wait_for_end(node: str) -> None:
    late = time.monotonic() + _GONE_SECONDS
    backing = f"/sys/block/{os.path.basename(node)}/loop/backing_file"
    while os.path.exists(backing) and time.monotonic() < late:
        time.sleep(0.02)
