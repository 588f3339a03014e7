"""systemd's units: what goes with them, which are never stopped, and what comes of stopping and starting them."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockbak.errors import CommandFailed, NoSuchUnit, NoSystemd, UnitNotStopped, UnitRestarted
from blockbak.host.runner import Completed
from blockbak.host.units import Units, full_name, is_name, protected, seconds, units_of
from tests.systemd import FakeSystemd


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    made = FakeSystemd(tmp_path)
    monkeypatch.setenv("PATH", made.install(), prepend=":")
    return made


@pytest.fixture
def units(systemd):
    return Units(Path(systemd.root))


def test_where_systemd_does_not_run_there_are_no_units(tmp_path):
    units = Units(tmp_path)
    assert units.look(["a.service"]) == {}
    with pytest.raises(NoSystemd):
        units.look(["a.service"], strict=True)


def test_a_unit_is_told_with_all_that_goes_with_it(systemd, units):
    systemd.add("db.service", TriggeredBy="db.socket idle.timer", RequiredBy="web.service")
    systemd.add("db.socket", RequiredBy="db.service")
    systemd.add("idle.timer", "inactive")
    systemd.add("web.service", ConsistsOf="worker.service", TriggeredBy="web.path")
    systemd.add("worker.service", BoundBy="report.service off.service")
    systemd.add("report.service")
    systemd.add("off.service", "inactive", RequiredBy="other.service")
    systemd.add("other.service")
    systemd.add("web.path")
    found = units.look(["db"])
    assert found["db"].name == "db.service"
    assert set(found["db"].also) == {"db.socket", "web.service", "worker.service", "report.service", "web.path"}
    assert found["worker.service"].also == ("report.service",)
    assert not found["idle.timer"].active


def test_all_are_asked_for_in_one_call(systemd, units):
    for number in range(50):
        systemd.add(f"unit-{number}.service")
    assert len(units.look([f"unit-{number}" for number in range(50)])) == 100
    assert len(systemd.log()) == 1


def test_an_alias_names_the_unit_it_stands_for(systemd, units):
    systemd.add("mariadb.service", Names="mariadb.service mysql.service")
    found = units.look(["mysql"], strict=True)
    assert found["mysql"].name == "mariadb.service"
    assert found["mysql"] == found["mariadb.service"]


def test_an_unknown_unit_is_an_error_only_for_who_named_it(systemd, units):
    systemd.add("a.service")
    assert "nope.service" not in units.look(["a", "nope"])
    for name in ("nope", "--all", "a*", "a b"):
        with pytest.raises(NoSuchUnit) as caught:
            units.look(["a", name], strict=True)
        assert caught.value.fields["unit"] == name
    assert not any("a*" in line or "a b" in line for line in systemd.log())


def test_an_answer_that_is_not_for_each_unit_is_no_answer(systemd, tmp_path):
    units = Units(Path(systemd.root), run=lambda argv, **_: Completed(tuple(argv), 0, b"Id=a.service\n", ""))
    with pytest.raises(CommandFailed):
        units.look(["a", "b"])


@pytest.mark.parametrize(
    "name",
    [
        "ssh.service", "sshd.service", "ssh.socket", "sshd@7-10.service", "init.scope", "dbus.service", "dbus.socket",
        "dbus-broker.service", "systemd-journald.service", "systemd-journald-dev-log.socket", "systemd-udevd.service",
        "systemd-logind.service", "systemd-networkd.service", "systemd-resolved.service", "session-4.scope",
        "user@0.service", "user-runtime-dir@0.service", "user-0.slice", "system.slice", "own.service",
    ],
)  # fmt: skip
def test_what_the_system_and_the_way_into_it_need_is_never_stopped(name):
    assert protected(name, {"own.service"})


@pytest.mark.parametrize("name", ["postgresql.service", "sshfs.service", "systemd-nspawn@web.service", "srv.automount"])
def test_everything_else_may_be_stopped(name):
    assert not protected(name, {"own.service"})


def test_own_units_are_those_of_all_ancestors(systemd, units):
    proc = Path(systemd.root, "proc")
    for pid, parent, cgroup in (
        ("self", 40, "0::/user.slice/user-0.slice/session-3.scope\n"),
        ("40", 1, "1:name=systemd:/system.slice/ssh.service\n4:memory:/odd.service\n0::/\n"),
        ("1", 0, "0::/init.scope\n"),
    ):
        (proc / pid).mkdir(parents=True)
        (proc / pid / "cgroup").write_text(cgroup)
        (proc / pid / "status").write_text(f"Name:\tx\nPPid:\t{parent}\n")
    assert units.own == {
        "user.slice", "user-0.slice", "session-3.scope", "system.slice", "ssh.service", "init.scope",
    }  # fmt: skip
    systemd.add("ssh.service")
    assert units.look(["ssh"])["ssh"].protected


def test_names_and_spans():
    assert full_name("postgresql") == "postgresql.service"
    assert full_name("srv-data.automount") == "srv-data.automount"
    assert full_name("php8.2-fpm") == "php8.2-fpm.service"
    assert is_name(r"dev-disk-by\x2duuid-1.swap")
    assert is_name("user@1000.service")
    assert not is_name("--now")
    assert seconds("1min 30s") == 90
    assert seconds("500ms") == 0.5
    assert seconds("infinity") == 0
    assert units_of("0::/a.slice/b.service/inner\n") == {"a.slice", "b.service"}


def test_stopping_and_starting_leave_the_same_units_running(systemd, units):
    systemd.add("db.service", RequiredBy="web.service")
    systemd.add("db.socket")
    systemd.add("web.service")
    systemd.add("off.service", "inactive")
    before = systemd.states()
    names = ["db.service", "db.socket", "web.service"]
    units.stop(names)
    assert units.active(names) == []
    started, failed = units.start(names)
    assert (sorted(started), failed) == (sorted(names), [])
    assert systemd.states() == before
    # A socket goes first: a service that runs has it refused.
    assert [line for line in systemd.log() if line.startswith("start")] == [
        "start -- db.socket", "start -- db.service web.service",
    ]  # fmt: skip
    assert units.start(names) == ([], [])


def test_a_target_is_started_without_what_it_wants(systemd, units):
    systemd.add("own.target", "inactive")
    assert units.start(["own.target"]) == (["own.target"], [])
    assert "start --job-mode=ignore-dependencies -- own.target" in systemd.log()


@pytest.mark.parametrize("when", ["restart", "meanwhile"])
def test_a_unit_that_runs_again_is_named(when, systemd, units):
    systemd.add("a.service")
    systemd.add("stubborn.service", when_stopped=when)
    with pytest.raises(UnitRestarted) as caught:
        units.stop(["a.service", "stubborn.service"])
    assert caught.value.fields["unit"] == "stubborn.service"


def test_a_unit_that_cannot_be_stopped_is_named(systemd, units):
    systemd.add("a.service")
    systemd.add("hard.service", when_stopped="refuse")
    with pytest.raises(UnitNotStopped) as caught:
        units.stop(["a.service", "hard.service"])
    assert caught.value.fields["unit"] == "hard.service"
    assert "Operation refused" in str(caught.value)


def test_a_unit_that_does_not_start_is_told(systemd, units):
    systemd.add("a.service", "inactive")
    systemd.add("broken.service", "inactive", when_started="fail")
    started, failed = units.start(["a.service", "broken.service"])
    assert started == ["a.service"]
    assert [(one.name, one.state) for one in failed] == [("broken.service", "failed")]


def test_a_stop_that_somebody_killed_had_asked_for_is_waited_for(systemd):
    systemd.add("slow.service", "active", Job="17")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            systemd.add("slow.service", "inactive")

    units = Units(Path(systemd.root), sleep=sleep)
    assert units.start(["slow.service"]) == (["slow.service"], [])
    assert len(slept) == 3
