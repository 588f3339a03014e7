"""The units and cron lines that start jobs: what they say, and that systemd finds nothing wrong with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from blockbak.errors import NoTimers, UnitFileTaken
from blockbak.host import unitfiles
from blockbak.host.kernel import Kernel
from blockbak.host.units import Units
from blockbak.model import timers
from blockbak.model.config import parse
from blockbak.model.timers import BOOT, FAILED, MARK, Call
from tests.faults import ShortKernel

CONFIG = """
timezone = "Europe/Berlin"
[repositories.main]
path = "/srv/back up"
[jobs.web-1]
sources = ["vg/home"]
mode = "hot"
schedule = "daily at 02:30"
deadline = "6h"
[jobs.db]
sources = ["/dev/disk/by-id/x"]
mode = "cold"
stop_users = true
schedule = "monthly on 31 at 23:00"
random_delay = "1h"
[jobs.often]
sources = ["/srv/a.img"]
schedule = "every 6h"
[jobs.asked]
sources = ["/srv/b.img"]
schedule = "never"
incremental = "daily"
"""
CALL = Call((sys.executable, "-I", "-m", "blockbak"), "/etc/block bak/100%.toml", "/var/lib/blockbak")


@pytest.fixture(scope="module")
def config():
    return parse(CONFIG)


def made(config, *jobs, call=CALL):
    return {unit.name: unit for unit in timers.units(config, call, jobs or list(config.jobs))}


def lines(unit):
    return unit.text.splitlines()


def test_one_timer_and_one_service_a_job(config):
    units = made(config)
    assert set(units) == {
        "blockbak-job-web-1.service", "blockbak-job-web-1.timer", "blockbak-job-db.service", "blockbak-job-db.timer",
        "blockbak-job-often.service", "blockbak-job-often.timer", "blockbak-job-asked.service", FAILED, BOOT,
    }  # fmt: skip
    assert {name for name, unit in units.items() if unit.wanted_by} == {
        *(name for name in units if name.endswith(".timer")), BOOT,
    }  # fmt: skip
    assert all(unit.text.startswith(MARK + "\n") for unit in units.values())


def test_a_timer_makes_up_for_what_was_missed_and_begins_by_chance(config):
    units = made(config)
    nightly = lines(units["blockbak-job-web-1.timer"])
    assert {"OnCalendar=*-*-* 02:30:00 Europe/Berlin", "Persistent=true", "RandomizedDelaySec=600"} <= set(nightly)
    assert "OnCalendar=*-*-28..31 23:00:00 Europe/Berlin" in lines(units["blockbak-job-db.timer"])
    assert "RandomizedDelaySec=3600" in lines(units["blockbak-job-db.timer"])
    assert "OnCalendar=*-*-* 00,06,12,18:00:00 UTC" in lines(units["blockbak-job-often.timer"])


def test_a_service_is_nice_and_its_failure_is_told(config):
    service = lines(made(config)["blockbak-job-web-1.service"])
    start = f'ExecStart={sys.executable} -I -m blockbak run --config "/etc/block bak/100%%.toml" web-1'
    wanted = {start, "Nice=10", "IOSchedulingClass=idle", "OnFailure=blockbak-failed@web-1.service", "KillMode=process"}
    assert wanted <= set(service)
    # Messages go where answers go, unless something else is said (systemd.exec(5)).
    assert {"StandardOutput=null", "StandardError=journal"} <= set(service)
    assert "TimeoutStartSec=22500" in service
    assert "TimeoutStartSec=infinity" in lines(made(config)["blockbak-job-db.service"])
    assert lines(made(config)[FAILED]).count(
        f'ExecStart={sys.executable} -I -m blockbak timers --config "/etc/block bak/100%%.toml" failed %i'
    ) == 1  # fmt: skip


def test_only_what_never_unmounts_has_mounts_of_its_own(config):
    units = made(config)
    hot, cold = lines(units["blockbak-job-web-1.service"]), lines(units["blockbak-job-db.service"])
    assert {"ProtectSystem=yes", 'ReadWritePaths=-"/srv/back up"', "ReadWritePaths=-/var/lib/blockbak"} <= set(hot)
    both = set(hot) & set(cold)
    assert {"DevicePolicy=closed", "DeviceAllow=block-* rwm", "LockPersonality=yes", "UMask=0077"} <= both
    # Each of these would give it a mount namespace (systemd.exec(5)), in which what it unmounts stays mounted.
    namespaces = ("Protect", "Private", "ReadWrite", "ReadOnly", "Inaccessible", "TemporaryFile", "Bind", "MountFlags")
    assert not [line for line in cold if line.startswith(namespaces)]


def test_at_boot_what_a_crash_left_is_put_right(config):
    boot = lines(made(config)[BOOT])
    assert f"ExecStart={sys.executable} -I -m blockbak recover --machine" in boot
    assert "WantedBy=multi-user.target" in boot


def test_directories_of_its_own_are_in_the_environment(config):
    call = Call(CALL.program, CALL.config, "/x", (("BLOCKBAK_STATE_DIR", "/x y"),))
    for unit in made(config, call=call).values():
        assert ('Environment="BLOCKBAK_STATE_DIR=/x y"' in lines(unit)) == unit.name.endswith(".service")
    assert "BLOCKBAK_STATE_DIR=/x y" in timers.crontab(config, call, ["db"], same_zone=True)


def test_a_dollar_sign_is_doubled_where_systemd_looks_for_variables_alone():
    config = parse(CONFIG.replace("/srv/back up", "/srv/$a"))
    call = Call(("/opt/$b/python",), "/etc/$c.toml", "/var/$d", (("BLOCKBAK_STATE_DIR", "/var/$d"),))
    service = lines(made(config, call=call)["blockbak-job-web-1.service"])
    assert 'ExecStart="/opt/$b/python" run --config "/etc/$$c.toml" web-1' in service
    wanted = {'Environment="BLOCKBAK_STATE_DIR=/var/$d"', 'ReadWritePaths=-"/srv/$a"', 'ReadWritePaths=-"/var/$d"'}
    assert wanted <= set(service)


def test_cron_lines(config):
    found = timers.crontab(config, CALL, ["web-1", "db", "asked"], same_zone=True)
    run = f"root nice -n 10 {sys.executable} -I -m blockbak run --config '/etc/block bak/100\\%.toml'"
    assert found[1:] == [
        "# web-1: daily at 02:30", f"30 2 * * * {run} web-1", "# db: monthly on 31 at 23:00",
        f"0 23 28-31 * * {run} db", "# asked: never", f"@reboot root {sys.executable} -I -m blockbak recover --machine",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong_with_them(config, tmp_path):
    units = timers.units(config, CALL, list(config.jobs))
    unitfiles.install(str(tmp_path), units, {unit.name for unit in units}, Kernel(), None)
    names = [str(tmp_path / unit.name) for unit in units if "@" not in unit.name]
    names.append(str(tmp_path / FAILED.replace("@", "@web-1")))
    shutil.copy(tmp_path / FAILED, names[-1])
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, check=False,
        env=os.environ | {"SYSTEMD_LOG_LEVEL": "notice"},
    )  # fmt: skip
    # What it finds wrong with the machine's own units is not of our making.
    said = [line for line in done.stderr.splitlines() if "blockbak" in line]
    assert not said, done.stderr


# --- files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """One that writes down what it is told."""
    place = tmp_path / "bin"
    place.mkdir()
    (tmp_path / "root/run/systemd/system").mkdir(parents=True)
    program = place / "systemctl"
    program.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/told\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=":")
    return Units(tmp_path / "root")


def told(tmp_path) -> list[str]:
    file = tmp_path / "told"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def install(folder: Path, config, *jobs, systemd=None):
    known = {unit.name for unit in timers.units(config, CALL, list(config.jobs))}
    return unitfiles.install(str(folder), timers.units(config, CALL, jobs), known, Kernel(), systemd)


def test_units_are_written_switched_on_changed_and_removed(config, systemd, tmp_path):
    folder = tmp_path / "units"
    folder.mkdir()
    (folder / "other.service").write_text("[Unit]\n")
    changes = install(folder, config, "web-1", "db", systemd=systemd)
    assert len(changes.written) == 6
    assert told(tmp_path) == [
        f"--quiet enable --no-reload -- blockbak-job-web-1.timer blockbak-job-db.timer {BOOT}", "--quiet daemon-reload",
        "--quiet start -- blockbak-job-web-1.timer blockbak-job-db.timer",
    ]  # fmt: skip
    assert (folder / BOOT).stat().st_mode & 0o777 == 0o644
    assert install(folder, config, "web-1", "db", systemd=systemd).written == ()
    told(tmp_path)
    # A job of which nothing is said stays, one that is gone from the configuration goes.
    less = parse(CONFIG.partition("[jobs.db]")[0])
    changes = install(folder, less, "web-1", systemd=systemd)
    assert changes.removed == ("blockbak-job-db.service", "blockbak-job-db.timer")
    assert "--quiet stop -- blockbak-job-db.timer" in told(tmp_path)
    assert install(folder, config, "often").removed == ()
    stamps = tmp_path / "root/var/lib/systemd/timers"
    stamps.mkdir(parents=True)
    for name in ("blockbak-job-web-1.timer", "other.timer"):
        (stamps / f"stamp-{name}").touch()
    unitfiles.remove(str(folder), Kernel(), systemd)
    assert [path.name for path in folder.iterdir()] == ["other.service"]
    ours = [f"blockbak-job-{name}" for name in ("often.service", "often.timer", "web-1.service", "web-1.timer")]
    # Nor is anything left in systemd's own memory: a failure, or when a timer last fired.
    assert told(tmp_path) == [
        "--quiet stop -- blockbak-job-often.timer blockbak-job-web-1.timer",
        f"--quiet disable --no-reload -- {BOOT} {' '.join(ours)}",
        f"--quiet reset-failed -- {BOOT} blockbak-failed@*.service {' '.join(ours)}",
        "--quiet daemon-reload",
    ]
    assert [path.name for path in stamps.iterdir()] == ["stamp-other.timer"]


def test_a_unit_is_whole_though_the_kernel_takes_a_part_at_a_time(config, tmp_path):
    units = timers.units(config, CALL, ["db"])
    unitfiles.install(str(tmp_path), units, [unit.name for unit in units], ShortKernel(Random(1)), None)
    assert {unit.name: unit.text for unit in units} == {path.name: path.read_text() for path in tmp_path.iterdir()}


def test_a_unit_of_somebody_else_is_neither_overwritten_nor_removed(config, tmp_path):
    (tmp_path / "blockbak-job-db.timer").write_text("[Timer]\n")
    with pytest.raises(UnitFileTaken):
        install(tmp_path, config, "db")
    assert [path.name for path in tmp_path.iterdir()] == ["blockbak-job-db.timer"]
    assert unitfiles.remove(str(tmp_path), Kernel(), None).removed == ()


def test_without_systemd_nothing_is_written(config, tmp_path):
    folder = tmp_path / "units"
    folder.mkdir()
    with pytest.raises(NoTimers):
        install(folder, config, "db", systemd=Units(tmp_path))
    assert not list(folder.iterdir())


def test_a_directory_that_is_not_there_is_an_error_with_a_sentence(config, tmp_path):
    from blockbak.errors import StoreFailed

    with pytest.raises(StoreFailed, match="could not be written: no such file or directory"):
        install(tmp_path / "nowhere", config, "db")
