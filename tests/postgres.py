"""What tests of real PostgreSQL servers share, here and in the virtual machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def ending(data: Path, seconds: float = 30) -> Iterator[None]:
    """The server on ``data`` is told to stop in here, and has ended afterwards.

    ``pg_ctl`` comes back when the pid file is gone. Until its process is gone too, a moment later, the server's
    directory is in use, and the file system that it lies on.
    """
    pid = int((data / "postmaster.pid").read_text().splitlines()[0])
    yield
    deadline = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        # Who should wait for it may not do that soon: as a zombie it holds nothing any more.
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"the server on {data}, process {pid}, does not end"
            time.sleep(0.02)
