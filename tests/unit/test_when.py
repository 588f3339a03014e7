"""Moments and spans as people write them."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model.when import first_moment, last_moment, since, span

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


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5min", 300), ("5m", 300), ("36h", 129600), ("7d", 604800), ("2w", 1209600), ("1y", 31536000),
     ("1.5h", 5400), (" 7 d ", 604800), ("0d", 0)],
)  # fmt: skip
def test_spans(text, seconds):
    assert span(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "7 days", "1e3d", "9999999y", "nan d"])
def test_what_is_no_span(text):
    with pytest.raises(ValueError):
        span(text)


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
    with contextlib.suppress(ValueError):
        assert span(text) >= 0
