"""What is looked at while snapshots are made and wait to be read, with devices and snapshots that are only played."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from blockbak.errors import SetVoid
from blockbak.flow import hot
from blockbak.flow.hot import HotOptions
from tests.unit.test_snapshot import VOLUME

FIRST, SECOND, THIRD = (replace(VOLUME, name=name) for name in ("a-data", "b-wal", "c-log"))
TAKEN = [FIRST, SECOND, THIRD]
NAMES = [one.dm_name for one in TAKEN]


class Devices:
    """Device-mapper, as far as it is asked whether something is suspended."""

    def __init__(self):
        self.suspended = set(NAMES)
        self.gone = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def info(self, name):
        return None if name in self.gone else SimpleNamespace(suspended=name in self.suspended)


@pytest.fixture
def devices(monkeypatch):
    devices = Devices()
    monkeypatch.setattr(hot, "Mapper", lambda: devices)
    return devices


def make(monkeypatch, devices, between=lambda label: None, held=NAMES):
    """Snapshots of three volumes; ``between`` is called with each label once its snapshot is made."""
    made = []

    def take(origin, *_, **__):
        # As lvcreate does.
        devices.suspended.discard(origin.dm_name)
        between(origin.label)
        return origin.label

    monkeypatch.setattr(hot.lvm, "take", take)
    context = SimpleNamespace(check=lambda: None)
    rest = SimpleNamespace(over=lambda: False)
    run = SimpleNamespace(id="0badc0de")
    try:
        hot._make(TAKEN, [1, 1, 1], HotOptions(together=bool(held)), run, made, rest, held, context)
    finally:
        assert made == [one.label for one in TAKEN][: len(made)]
    return made


def test_a_set_whose_volumes_all_held_still_is_made(monkeypatch, devices):
    assert len(make(monkeypatch, devices)) == 3


@pytest.mark.parametrize("vanish", [False, True])
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_set_is_void_where_somebody_else_let_a_volume_go_on(monkeypatch, devices, victim, vanish):
    def other(label):
        if victim == 0 or label == FIRST.label:
            devices.suspended.discard(NAMES[victim])
            devices.gone |= {NAMES[victim]} if vanish else set()

    if victim == 0:
        other("")
    with pytest.raises(SetVoid, match=NAMES[victim]):
        make(monkeypatch, devices, other)


def test_what_was_never_suspended_is_not_looked_at(monkeypatch, devices):
    devices.suspended.clear()
    assert len(make(monkeypatch, devices, held=())) == 3
