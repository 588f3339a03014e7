"""The time zone of calendars: a name, TZ, or what the machine has."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from blockbak.errors import NoSuchZone
from blockbak.host.clock import alike, zone

SUMMER = datetime(2026, 7, 1, tzinfo=UTC)


def offset(found) -> float:
    return SUMMER.astimezone(found).utcoffset().total_seconds() / 3600


def test_a_zone_by_its_name(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert offset(zone("Europe/Berlin")) == 2
    for name in ("Mars/Olympus", "Europe", "../../etc/passwd"):
        with pytest.raises(NoSuchZone, match=name):
            zone(name)


def test_without_a_name_it_is_that_of_tz_or_of_the_machine(monkeypatch, tmp_path):
    for value, hours in (("Asia/Tokyo", 9), (":Asia/Tokyo", 9), ("/usr/share/zoneinfo/Asia/Tokyo", 9), ("Nowhere", 0)):
        monkeypatch.setenv("TZ", value)
        assert offset(zone()) == hours
    monkeypatch.delenv("TZ")
    assert offset(zone(local="/usr/share/zoneinfo/America/St_Johns")) == -2.5
    assert zone(local=str(tmp_path / "none")) is UTC
    (tmp_path / "none").write_text("nonsense")
    assert zone(local=str(tmp_path / "none")) is UTC


def test_zones_are_alike_if_they_are_so_all_year():
    assert alike(zone("Europe/Berlin"), zone("Europe/Paris"), SUMMER)
    # In summer both are an hour ahead of UTC.
    assert not alike(zone("Europe/London"), zone("Africa/Lagos"), SUMMER)
