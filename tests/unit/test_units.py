"""Sizes and durations, there and back."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak import units

values, sizes = st.integers(0, 2**60), st.integers(1, 2**40)


@given(values, sizes)
def test_alignment(value, unit):
    low, high = units.align_down(value, unit), units.align_up(value, unit)
    assert low % unit == high % unit == 0
    assert low <= value <= high < value + unit
    assert value - low < unit
    assert units.count(value, unit) * unit == high


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0), ("4096", 4096), ("64K", 65536), ("64k", 65536), ("64KiB", 65536), ("64 KB", 65536),
        (" 1 MiB ", 1 << 20), ("2G", 2 << 30), ("3TiB", 3 << 40), ("512B", 512),
    ],
)  # fmt: skip
def test_sizes_people_write(text, expected):
    assert units.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "1P", "0x10", "4K4K", "64 Ki B", "64iB x", "1e3"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="not a size"):
        units.parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("5min", 300), ("5m", 300), ("36h", 129600), ("7d", 604800), ("2w", 1209600), ("1y", 31536000),
        ("1.5h", 5400), (" 7 d ", 604800), ("0d", 0), ("1h 30m", 5400), ("1h30m", 5400), ("1000y", 31536000000),
    ],
)  # fmt: skip
def test_durations_people_write(text, seconds):
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "-1d", "7 days", "1e3d", "1h 30", "nan d", "inf d", "1001y", "9" * 400 + "y"]
)
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="not a duration"):
        units.parse_duration(text)


@given(st.text())
def test_no_text_is_anything_but_a_duration_or_an_error(text):
    with contextlib.suppress(ValueError):
        assert units.parse_duration(text) >= 0


@given(values)
def test_a_size_for_people_has_three_digits_and_the_right_value(value):
    number, unit = units.format_size(value).split()
    factor = {"B": 1, "KiB": units.KIB, "MiB": units.MIB, "GiB": units.GIB, "TiB": units.TIB}[unit]
    assert abs(float(number) * factor - value) <= max(value * 0.005, 0.5)
    if unit == "B":
        assert value < units.KIB
    elif value < 999 * units.TIB:
        assert len(number.replace(".", "")) == 3 or float(number) >= 1000, number
        assert float(number) <= units.KIB


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1536, "1.50 KiB"), (10 << 20, "10.0 MiB"),
        (999 << 20, "999 MiB"), (1 << 30, "1.00 GiB"), (16 << 40, "16.0 TiB"),
        (10239, "10.0 KiB"), (102399, "100 KiB"), ((1 << 20) - 1, "1.00 MiB"), ((1 << 40) - 1, "1.00 TiB"),
    ],
)  # fmt: skip
def test_sizes_for_people(value, expected):
    assert units.format_size(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0 s"), (0.84, "0.8 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (60, "1 min 00 s"),
        (125, "2 min 05 s"), (3599.6, "1 h 00 min"), (3600, "1 h 00 min"), (4325, "1 h 12 min"),
    ],
)  # fmt: skip
def test_durations_for_people(seconds, expected):
    assert units.format_seconds(seconds) == expected
