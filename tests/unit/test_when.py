"""Moments as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model.when import first_moment, last_moment, since

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "first", "length"),
    [
        ("2026-05-01", "2026-05-01T00:00:00+00:00", timedelta(days=1)),
        ("20260501", "2026-05-01T00:00:00+00:00", timedelta(days=1)),
        ("2026-05-01T03:10", "2026-05-01T03:10:00+00:00", timedelta(minutes=1)),
        ("2026-05-01 03:10:07", "2026-05-01T03:10:07+00:00", timedelta(seconds=1)),
        ("2026-05-01T03:10+02:00", "2026-05-01T01:10:00+00:00", timedelta(minutes=1)),
        ("2026-05-01T03:10:07.25Z", "2026-05-01T03:10:07.250000+00:00", timedelta(microseconds=1)),
    ],
)
def test_a_time_is_a_period(text, first, length):
    assert first_moment(text).isoformat() == first
    assert last_moment(text) == first_moment(text) + length - timedelta(microseconds=1)


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "2026-05-32", "2026", "7d", "2026-05-01T25:00"])
def test_what_is_no_time(text):
    assert first_moment(text) is None
    assert last_moment(text) is None


def test_the_last_day_there_is_has_no_end():
    assert last_moment("9999-12-31") is None


def test_since_takes_both():
    assert since("2026-04-30", NOW) == datetime(2026, 4, 30, tzinfo=UTC)
    assert since("12h", NOW) == datetime(2026, 5, 1, tzinfo=UTC)
    for text in ("tomorrow", ""):
        with pytest.raises(ValueError):
            since(text, NOW)
    with pytest.raises(ValueError):
        since("900y", datetime(3, 1, 1, tzinfo=UTC))


@given(st.text())
def test_no_text_is_anything_but_a_value_or_an_error(text):
    first, last = first_moment(text), last_moment(text)
    assert first is None or last is None or first <= last
