"""Moments and spans as people write them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_TIME = re.compile(
    r"\d{4}-?\d\d-?\d\d(?:[T ]\d\d:?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?P<fraction>\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
)
DAY = 86400.0
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w|y)")
_SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": DAY, "w": 7 * DAY, "y": 365 * DAY}
_SECONDS_MAX = 1000 * 365 * DAY


def _period(text: str) -> tuple[datetime, timedelta] | None:
    """First moment and length of a day, minute, second or instant, in UTC where no zone is given, for so everything
    here is shown; None for what is no time.
    """
    if not (found := _TIME.fullmatch(text)):
        return None
    unit = timedelta(seconds=1) if found["second"] else timedelta(minutes=1) if found["minute"] else timedelta(days=1)
    try:
        start = datetime.fromisoformat(text)
        start = start.replace(tzinfo=UTC) if start.tzinfo is None else start.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return start, timedelta(microseconds=1) if found["fraction"] else unit


def first_moment(text: str) -> datetime | None:
    """The first moment of a time: of that day, minute or second. None for what is no time."""
    period = _period(text)
    return period[0] if period else None


def last_moment(text: str) -> datetime | None:
    """The last moment of a time: of that day, minute or second. None for what is no time."""
    period = _period(text)
    try:
        return period[0] + period[1] - timedelta(microseconds=1) if period else None
    except OverflowError:
        return None


def span(text: str) -> float:
    """Seconds of a span such as ``90d``, ``12h``, ``30min``, ``2w``, ``1y`` (365 days). Raises ValueError."""
    found = _SPAN.fullmatch(text.strip())
    seconds = float(found[1]) * _SECONDS[found[2]] if found else -1.0
    if not 0 <= seconds <= _SECONDS_MAX:
        raise ValueError(f"not a span of time: {text!r}")
    return seconds


def since(text: str, now: datetime) -> datetime:
    """The moment that a time begins with, or that is a span before ``now``. Raises ValueError."""
    try:
        return first_moment(text) or now - timedelta(seconds=span(text))
    except OverflowError as error:
        raise ValueError(f"too long ago: {text!r}") from error
