"""The time zone of this machine, or one by its name, and whether they are alike; and how long the machine runs."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta, tzinfo
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


def alike(one: tzinfo, other: tzinfo, now: datetime) -> bool:
    """Whether two zones have the same time of day for a year to come, as far as every fifth day tells."""
    moments = [now + timedelta(days=days) for days in range(0, 366, 5)]
    return all(moment.astimezone(one).utcoffset() == moment.astimezone(other).utcoffset() for moment in moments)


def uptime() -> float:
    """Seconds since the boot."""
    with open("/proc/uptime", encoding="ascii") as file:
        return float(file.read().split()[0])
