"""A systemd unit that puts back at boot what a run that lost its power had stopped. It is there only for as long as
there is a journal.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable

from blockbak.host.blockio import replace_durably, sync_directory
from blockbak.host.kernel import Kernel

UNIT_DIR = "/etc/systemd/system"
_NAME = "blockbak-recover"
_STATE_DIR = "/var/lib/blockbak"
_WANTS = "multi-user.target.wants"
_PARTIAL = ".partial"


def name_for(state_dir: str) -> str:
    """The unit's name; another state directory than root's usual one has a unit of its own."""
    place = os.path.abspath(state_dir)
    own = "" if place == _STATE_DIR else f"-{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"
    return f"{_NAME}{own}.service"


def text(state_dir: str, run_dir: str, python: str = sys.executable) -> str:
    """The unit. It is started as soon as its process is: units that it starts in turn, and that come after a target
    which wants it, would else wait for it while it waits for them. For ten minutes it tries again: a disk or a volume
    may be there later than this is.
    """
    state, run = os.path.abspath(state_dir), os.path.abspath(run_dir)
    return "\n".join(
        [
            "# Written by blockbak before it stopped anything, and removed by it once all is put back.",
            "[Unit]",
            "Description=Put back what blockbak had stopped for a cold backup",
            "After=local-fs.target remote-fs.target swap.target",
            f"RequiresMountsFor={_quoted(state)} {_quoted(python)} {_quoted(os.path.dirname(__file__))}",
            "StartLimitIntervalSec=1h",
            "StartLimitBurst=20",
            "",
            "[Service]",
            "Type=exec",
            f"Environment={_quoted(f'BLOCKBAK_STATE_DIR={state}')} {_quoted(f'BLOCKBAK_RUN_DIR={run}')}",
            f"ExecStart={_quoted(python)} -I -m blockbak recover --machine",
            "Restart=on-failure",
            "RestartSec=30",
            "",
            "[Install]",
            "WantedBy=multi-user.target",
            "",
        ]
    )


def _quoted(word: str) -> str:
    """A word of a unit file: in quotes, with what stands for something else in there (systemd.syntax(7))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def write(unit_dir: str, state_dir: str, run_dir: str, kernel: Kernel) -> None:
    """Have it run at the next boot, durably. Raises OSError."""
    name = name_for(state_dir)
    path, link = os.path.join(unit_dir, name), os.path.join(unit_dir, _WANTS, name)
    wanted = text(state_dir, run_dir).encode()
    if _content(path) != wanted:
        replace_durably(path, wanted, kernel, 0o644)
    if not os.path.lexists(link):
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(f"../{name}", link)
    for directory in (os.path.dirname(link), unit_dir):
        sync_directory(directory, kernel)


def remove(unit_dir: str, state_dir: str, kernel: Kernel, say: Callable[[str], None] = lambda _: None) -> None:
    """It has nothing to do any more. Where it cannot be removed it does no harm, and is spoken of."""
    name = name_for(state_dir)
    unit = os.path.join(unit_dir, name)
    for path in (os.path.join(unit_dir, _WANTS, name), unit, unit + _PARTIAL):
        try:
            kernel.unlink(path)
            sync_directory(os.path.dirname(path), kernel)
        except FileNotFoundError:
            continue
        except OSError as error:
            say(f"{path} is of no use any more and cannot be removed: {error.strerror}.")


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""
