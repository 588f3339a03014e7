"""PostgreSQL in the machine: its programs, and the files of a server that never ran."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.host import servers

LIMIT_SECONDS = 240
"""What one of its programs may take where each of its instructions is emulated."""
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def by_server(*words: str | Path) -> str:
    """Run a program as the server's user; what it wrote."""
    return servers.run(*words, user="postgres", timeout=LIMIT_SECONDS)


@contextmanager
def made() -> Iterator[Path]:
    """A new cluster's files, to be copied: to make them takes as long as all else that one test does with them."""
    place = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
    try:
        shutil.chown(place, "postgres", "postgres")
        by_server(
            PROGRAMS / "initdb", "--no-sync", "--auth=trust", "--data-checksums", "--wal-segsize=1", "--no-locale",
            "--encoding=UTF8", "-D", place / "data",
        )  # fmt: skip
        yield place / "data"
    finally:
        shutil.rmtree(place)
