"""Sizes, alignment and moments: the only 512 in the package, and the only size parser."""

from __future__ import annotations

import re
from datetime import UTC, datetime

SECTOR = 512
"""Bytes of the kernel's own sector (sysfs ``size``, ``stat``), whatever the device's."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

DAY = 86400.0
"""Seconds of a day that is as long as most."""

_SPANS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": DAY, "w": 7 * DAY, "y": 365 * DAY}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(min|[smhdwy])")
_SECONDS_MAX = 1000 * _SPANS["y"]
_FACTORS = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"(\d+)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def align_down(value: int, unit: int) -> int:
    """The largest multiple of ``unit`` that is not above ``value``."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


def count(value: int, unit: int) -> int:
    """How many ``unit`` pieces cover ``value`` bytes, the last one perhaps short."""
    return -(-value // unit)


def parse_size(text: str) -> int:
    """Bytes named by ``64K``, ``1 MiB``, ``4096``; binary factors. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"not a size: {text!r}")
    return int(found[1]) * _FACTORS[found[2].upper()]


def parse_duration(text: str) -> float:
    """Seconds named by ``90s``, ``15min`` (or ``15m``), ``1h 30m``, ``2d``, ``6w``, ``1y`` of 365 days; a thousand
    years at most. Raises ValueError.
    """
    words = text.strip()
    seconds = sum((float(number) * _SPANS[unit] for number, unit in _SPAN.findall(words)), 0.0)
    if not words or _SPAN.sub("", words).strip() or seconds > _SECONDS_MAX:
        raise ValueError(f"not a duration: {text!r}")
    return seconds


def format_size(value: int) -> str:
    """``value`` bytes for people, binary units, three digits: ``1.30 GiB``."""
    if value < KIB:
        return f"{value} B"
    for factor, unit in ((KIB, "KiB"), (MIB, "MiB"), (GIB, "GiB"), (TIB, "TiB")):
        number = value / factor
        # Chosen by what is printed: 1023.9 KiB would be rounded to 1024 of them.
        if round(number) < KIB or factor == TIB:
            break
    digits = 2 if round(number, 2) < 10 else 1 if round(number, 1) < 100 else 0
    return f"{number:.{digits}f} {unit}"


def format_seconds(seconds: float) -> str:
    """A duration for people: ``0.8 s``, ``2 min 05 s``, ``1 h 12 min``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def iso(moment: datetime) -> str:
    """ISO 8601 in UTC with milliseconds."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
