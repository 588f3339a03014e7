"""Moments as people write them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from blockbak.units import parse_duration

_TIME = re.compile(
    r"\d{4}-?\d\d-?\d\d(?:[T ]\d\d:?(?P<minute>\d\d)(?::?(?P<second>\d\d)(?P<fraction>\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?"
)


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


def since(text: str, now: datetime) -> datetime:
    """The moment that a time begins with, or that is a duration before ``now``. Raises ValueError."""
    try:
        return first_moment(text) or now - timedelta(seconds=parse_duration(text))
    except OverflowError as error:
        raise ValueError(f"too long ago: {text!r}") from error
