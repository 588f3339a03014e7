"""PostgreSQL in the machine: its programs, and the files of a server that never ran."""

from __future__ import annotations

from pathlib import Path

from tests.host import servers

LIMIT_SECONDS = 240
"""What one of its programs may take where each of its instructions is emulated."""
NEW = Path("/var/lib/postgresql/new")
"""Those files, to be copied; vagrant/guest-setup has made them."""
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))


def by_server(*words: str | Path) -> str:
    """Run a program as the server's user; what it wrote."""
    return servers.run(*words, user="postgres", timeout=LIMIT_SECONDS)
