"""The time zone of this machine, or one by its name; and how long the machine runs."""

from __future__ import annotations

import os
from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from blockbak.errors import NoSuchZone

_LOCAL = "/etc/localtime"


def zone(name: str = "", local: str = _LOCAL) -> tzinfo:
    """The zone of that name; without one the machine's: that of TZ, of /etc/localtime, or UTC where there is neither.

    Raises NoSuchZone.
    """
    wanted = name or os.environ.get("TZ", "").removeprefix(":")
    if wanted:
        try:
            if wanted.startswith("/"):
                local = wanted
            else:
                return ZoneInfo(wanted)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            if name:
                raise NoSuchZone(zone=name) from error
            return UTC
    try:
        with open(local, "rb") as file:
            return ZoneInfo.from_file(file)
    except (OSError, ValueError):
        return UTC


def uptime() -> float:
    """Seconds since the boot."""
    with open("/proc/uptime", encoding="ascii") as file:
        return float(file.read().split()[0])
