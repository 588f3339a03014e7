"""The udev rule that keeps scanners away from our snapshots: put in place, and its work checked."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from blockbak.errors import BlockbakError
from blockbak.host.runner import run
from blockbak.host.system import System
from blockbak.units import SECTOR

RULE_NAMES = ("12-blockbak.rules", "57-blockbak.rules")
"""One rule, twice: LVM's own rules are numbered from 10 to 13, Debian's from 55 to 60."""
RULE_PATH = Path(__file__).with_name("blockbak.rules")
"""The package's own copy."""
FOLDERS = (
    "/etc/udev/rules.d",
    "/run/udev/rules.d",
    "/usr/local/lib/udev/rules.d",
    "/usr/lib/udev/rules.d",
    "/lib/udev/rules.d",
)
"""udev(7): where rules lie, the first of a name wins."""
_OURS = ("/etc/udev/rules.d", "/run/udev/rules.d")
"""Where a run puts it: where it outlives the boot, if it can. LVM activates a snapshot that a crash left."""
_LABEL, _LABEL_SECTORS = b"LABELONE", 4
"""LVM's mark of a physical volume, in one of its first sectors (lib/label/label.h)."""
_WANTED = {"DM_UDEV_DISABLE_OTHER_RULES_FLAG": "1", "SYSTEMD_READY": "0", "UDISKS_IGNORE": "1"}


def udev_runs() -> bool:
    """Whether there is anybody to hide from."""
    return os.path.exists("/run/udev/control")


def ensure() -> bool:
    """The rule is in force afterwards; whether it had to be put there.

    A package puts it into udev's own folders; where it came without one (a virtual environment), it is put into
    /etc, or, where that takes no files, into /run until the next boot. Without permission nothing happens: ``seen``
    tells then.
    """
    if not udev_runs():
        return False
    wanted = RULE_PATH.read_bytes()
    missing = [name for name in RULE_NAMES if not _in_force(name, wanted)]
    if not missing:
        return False
    for folder in _OURS:
        try:
            for name in missing:
                _put(folder, name, wanted)
            run(["udevadm", "control", "--reload"])
        except (OSError, BlockbakError):
            continue
        return True
    return False


def _put(folder: str, name: str, text: bytes) -> None:
    os.makedirs(folder, exist_ok=True)
    fresh = Path(folder, f".{name}.new")
    fresh.write_bytes(text)
    fresh.chmod(0o644)
    fresh.replace(Path(folder, name))


def _in_force(name: str, wanted: bytes) -> bool:
    """Whether udev has the rule, or somebody's own version of it: ``seen`` tells whether that does its work. One that
    an older blockbak put there is none.
    """
    for folder in FOLDERS:
        with contextlib.suppress(OSError):
            text = Path(folder, name).read_bytes()
            by_us = folder in _OURS and text.partition(b"\n")[0] == wanted.partition(b"\n")[0]
            return text == wanted or not by_us
    return False


def seen(name: str, system: System | None = None) -> str:
    """Why scanners may look into the device of a kernel name; empty if they are kept out, or there are none."""
    if not udev_runs():
        return ""
    known = (system or System()).udev(name)
    if not known or "DM_NAME" not in known:
        return "udev knows nothing of it yet"
    wrong = [f"{key} is {known.get(key, 'not set')}" for key, value in _WANTED.items() if known.get(key) != value]
    return ", ".join(wrong)


def seen_by_lvm(path: str) -> str:
    """Why LVM may take a snapshot for the physical volume that its origin is; empty where that cannot be.

    No rule of udev helps there: where lvm.conf has it look into logical volumes, it looks into all of them.
    """
    with contextlib.suppress(OSError), open(path, "rb") as device:
        start = device.read(_LABEL_SECTORS * SECTOR)
        if any(start.startswith(_LABEL, at) for at in range(0, len(start), SECTOR)):
            done = run(["pvs", "-q", "-q", "--noheadings", "-o", "pv_name", path], accept=(0, 5))
            if done.status == 0:
                return 'LVM looks into it (scan_lvs) until lvm.conf has global_filter = [ "r|-blockbak--|" ]'
    return ""
