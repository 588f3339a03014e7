"""What is looked at while snapshots are made and wait to be read, with devices and snapshots that are only played."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest

from blockbak.errors import NotTogether, PoolFull, SetVoid
from blockbak.flow import backup, hot
from blockbak.flow.hot import HotOptions
from blockbak.flow.restore import _doubts
from blockbak.flow.source import Settled
from blockbak.host import snapshots as snapshots_room
from blockbak.host.device import Device
from blockbak.host.snapshots import Snapshot
from blockbak.model.snapshot import ThickUse
from tests.doubles import context as context_of
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

    monkeypatch.setattr(hot, "take", take)
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


def test_a_file_system_is_held_back_before_its_log():
    """It waits for the log while it is frozen: the other way round both hung until the deadline."""
    log, data, plain = (
        Device(f"/dev/dm-{number}", "", is_block=True, size=1, kind="dm", major=253, minor=number)
        for number in (1, 2, 3)
    )
    system = SimpleNamespace(mounts=[SimpleNamespace(major=253, minor=2), SimpleNamespace(major=0, minor=40)])
    assert hot.suspend_order([log, data, plain], system) == [data, log, plain]
    assert hot.suspend_order([plain, log], system) == [plain, log]


def test_a_volume_that_lvm_writes_its_archive_to_is_never_suspended(monkeypatch):
    """Wherever lvm.conf has it: lvcreate would wait for the volume, and the volume for lvcreate."""
    monkeypatch.setattr(hot.lvm, "places", lambda: ["/srv/archive-of-lvm"])
    monkeypatch.setattr(hot.os.path, "lexists", lambda _: True)
    monkeypatch.setattr(hot.usage, "carries", lambda device, path, _: path == "/srv/archive-of-lvm")
    member = hot.Member(SimpleNamespace(device=None), "")
    with pytest.raises(NotTogether, match="it carries /srv/archive-of-lvm"):
        hot.check_together([member], [FIRST], "/repository", "/state")


@pytest.mark.parametrize("where", ["/var/log/journal", "/usr/sbin", "/etc/ssl"])
def test_a_volume_that_is_mounted_among_programs_and_logs_is_never_suspended(monkeypatch, where):
    system = SimpleNamespace(mounts=[SimpleNamespace(target=where), SimpleNamespace(target="/var/lib/db")], swaps=())
    monkeypatch.setattr(hot, "System", lambda: system)
    monkeypatch.setattr(hot.lvm, "places", list)
    monkeypatch.setattr(hot.os.path, "lexists", lambda _: True)
    member = hot.Member(SimpleNamespace(device=None), "")
    monkeypatch.setattr(hot.usage, "carries", lambda device, path, _: path == where)
    with pytest.raises(NotTogether, match=f"it carries {where}"):
        hot.check_together([member], [FIRST], "/repository", "/state")
    # The data of a server are no such place.
    monkeypatch.setattr(hot.usage, "carries", lambda device, path, _: path == "/var/lib/db")
    hot.check_together([member], [FIRST], "/repository", "/state")


def test_a_snapshot_is_watched_though_no_file_can_be_opened(monkeypatch):
    def no_more(_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(snapshots_room, "by_uuid", no_more)
    snapshot = Snapshot(FIRST, "blockbak-0badc0de", 1, None, 0)
    snapshot._extend(ThickUse(9, 10))
    assert snapshot.extended == 0


def test_what_was_never_suspended_is_not_looked_at(monkeypatch, devices):
    devices.suspended.clear()
    assert len(make(monkeypatch, devices, held=())) == 3


# --- those that wait ------------------------------------------------------------------------------------------


class Source:
    """A snapshot that is void once ``error`` is set."""

    def __init__(self, name, log):
        self.name, self.log, self.error = name, log, None

    def check(self):
        if self.error:
            raise self.error

    def release(self):
        self.log.append(f"release {self.name}")
        return ""


@dataclass(frozen=True)
class Made:
    """As much of a report as it takes."""

    volume: str
    seconds: float = 0.0


def full(name):
    return PoolFull(pool="vg/pool", used=99.0, what="data", volume=name)


def test_a_snapshot_that_waits_goes_as_soon_as_it_is_void(monkeypatch):
    """Its pool may be another one than that of the volume that is read, and be full before its turn comes."""
    log = []
    sources = {name: Source(name, log) for name in "abc"}

    @contextlib.contextmanager
    def snapshots(*_):
        yield [*sources.values()]

    def locked(_, one, source, context):
        log.append(f"read {source.name}")
        sources["b"].error = full("b")
        for _ in range(3):
            context.check()
        return Made(one.seen.name)

    monkeypatch.setattr(backup, "snapshots", snapshots)
    monkeypatch.setattr(backup, "make_point", locked)
    monkeypatch.setattr(backup, "_newest", lambda _: "")
    held = [SimpleNamespace(seen=SimpleNamespace(mode="hot", name=name), volume=None) for name in sources]
    told = []
    noted = SimpleNamespace(made=told.append, failed=lambda error, *_: told.append(error))
    backup._read_held(SimpleNamespace(path="/repository"), held, HotOptions(), 0, context_of([]), noted)
    assert log == ["read a", "release b", "release a", "release b", "read c", "release c"]
    assert [type(one) for one in told] == [Made, PoolFull, Made]


# --- what is to be known later --------------------------------------------------------------------------------


def notes(**changed):
    opening = SimpleNamespace(volume="web-vg-data", point="20260501T000000Z-0001", logical_sector=512)
    closing = SimpleNamespace(**{"hooks": {}, "set_id": "", "consistency": "application"} | changed)
    return _doubts(SimpleNamespace(view=SimpleNamespace(top=SimpleNamespace(opening=opening, closing=closing))), 512)


def test_who_restores_is_told_of_what_hooks_said_and_of_the_set():
    """A server's backup_label is kept with the point: started without it, the server is damaged without a word."""
    assert notes() == []
    (one,) = notes(hooks={"postgresql end": "backup_label: ..."})
    assert "'blockbak show web-vg-data@20260501T000000Z-0001'" in one
    (one,) = notes(set_id="0badc0de")
    assert "set 0badc0de" in one


def test_a_thin_snapshot_is_gone_before_its_image_is_made_durable():
    log = []
    source = object.__new__(hot.HotSource)
    source.reader = SimpleNamespace(__exit__=lambda *_: log.append("close"))
    source._settled = Settled("filesystem")
    source._snapshot = SimpleNamespace(
        look=lambda: log.append("look"),
        release=lambda: log.append("remove") or "",
        extended=0,
        origin=SimpleNamespace(is_thin=True),
    )
    assert source.settle() == Settled("filesystem")
    assert log == ["look", "close", "remove"]
