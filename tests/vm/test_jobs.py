"""Jobs under systemd itself: timers that fire and make up, services in their sandbox, people told, drills.

The clock of the machine is put forward instead of waiting for it, and set right again in the end.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.postgres import ending
from tests.vm.cluster import LIMIT_SECONDS as SERVER_SECONDS
from tests.vm.cluster import NEW, PROGRAMS, by_server
from tests.vm.conftest import LIMIT_SECONDS, MIB, Blockbak, Group, run
from tests.vm.hot import as_disk, check_gone, check_repository, mapped, noise, pause_reading, start

UNITS, RUNTIME = Path("/etc/systemd/system"), Path("/run/systemd/system")
STAMPS = Path("/var/lib/systemd/timers")
OURS = ("blockbak-job-", "blockbak-failed@", "blockbak-boot")
TURN_SECONDS = 600
"""Between two moments of the jobs' calendar."""
LATE_SECONDS = 65
"""A timer may fire a minute late (AccuracySec=); then it does so at once."""

CONFIG = """
[repositories.main]
path = "{repository}"
[jobs.web]
sources = ["{source}"]
mode = "hot"
schedule = "every 10min"
random_delay = "0s"
rpo = "2h"
snapshot_size = "16M"
{job}
[notify]
command = ["{place}/tell"]
"""
TELL = "#!/bin/sh\ncat >>{place}/told\n"

# What it may do in there is what the service may: it is the service's child. Where the test says so, it stops the
# backup for good, or has blockbak hang while there is a snapshot.
HOOK = """#!/bin/sh
case $BLOCKBAK_PHASE in
begin)
    test ! -e {place}/fail || exit 63
    exec >{place}/sandbox 2>/dev/null
    nice
    ionice
    chrt -p $$ | head -n 1
    grep CapBnd /proc/self/status
    touch /usr/written && echo /usr
    touch /etc/written && echo /etc && rm /etc/written
    dd if=/dev/port of=/dev/null bs=1 count=1 && echo /dev/port
    true ;;
end)
    test ! -e {place}/hang || kill -STOP $(systemctl show --value --property=MainPID blockbak-job-web.service) ;;
esac
"""

CHECK = """#!/bin/sh
set -e
m=$BLOCKBAK_MOUNTS
mkdir $m/rw $m/db
mount -t tmpfs tmpfs $m/rw
mkdir $m/rw/upper $m/rw/work $m/rw/run
mount -t overlay -o lowerdir=$BLOCKBAK_MOUNT,upperdir=$m/rw/upper,workdir=$m/rw/work overlay $m/db
chown postgres $m/rw/run
rm -f $m/db/cluster/postmaster.pid
as="setpriv --reuid postgres --regid postgres --init-groups env PGHOST=$m/rw/run"
exec >{place}/checked 2>&1
$as {programs}/pg_ctl -w -t {seconds} -D $m/db/cluster -l $m/rw/run/log -o "-k $m/rw/run {settings}" start
$as {programs}/pg_amcheck -d postgres --install-missing --verbose
$as {programs}/psql -XAtq -d postgres -c 'SELECT count(*), max(word) FROM fact'
"""


@dataclass(frozen=True)
class Place:
    """A configuration with one job, ``web``, whose units are installed; and what people were told."""

    path: Path
    blockbak: Blockbak
    repository: Path

    @property
    def file(self) -> Path:
        return self.path / "blockbak.toml"

    def script(self, name: str, text: str, **words: object) -> Path:
        """A program of root's that nobody else may write, nor what leads to it."""
        script = self.path / name
        script.write_text(text.format(place=self.path, **words))
        script.chmod(0o755)
        return script

    def install(self, source: str, job: str) -> list[str]:
        self.file.write_text(CONFIG.format(repository=self.repository, source=source, job=job, place=self.path))
        self.script("tell", TELL)
        done = self.blockbak.json("timers", "install", "--config", self.file)
        assert (done["directory"], done["removed"]) == (str(UNITS), [])
        return done["written"]

    def told(self) -> list[tuple[str, str]]:
        """Of which events since the last time, and with which error."""
        file = self.path / "told"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [(event["event"], event["error"]) for event in map(json.loads, lines)]

    def status(self, expect: int) -> tuple[dict[str, Any], list[str]]:
        """What it says of the one volume, and the names of the reasons."""
        document = self.blockbak.json("status", "--config", self.file, expect=expect)
        (volume,) = document["volumes"]
        return volume, [reason["name"] for reason in document["reasons"]]


def shown(unit: str) -> dict[str, str]:
    wanted = "ActiveState,SubState,Result,ExecMainStatus,MainPID,InvocationID,InactiveEnterTimestampMonotonic"
    return dict(line.split("=", 1) for line in run("systemctl", "show", f"--property={wanted}", unit).splitlines())


def journal(unit: str) -> str:
    return run("journalctl", "--boot", "--no-pager", "--output=cat", f"--unit={unit}")


def until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert time.monotonic() < deadline, f"it never came to this: {what}\n{journal('blockbak-job-web.service')}"
        time.sleep(1.5)


def ran_again(before: str) -> dict[str, str]:
    """The job's service, once it has run another time than the one ``before``."""
    service = "blockbak-job-web.service"

    def over() -> bool:
        now = shown(service)
        return now["InvocationID"] != before and now["ActiveState"] in ("inactive", "failed")

    until("the service has run", over)
    return shown(service)


def failed() -> None:
    """Come back once what OnFailure= names has run after the last run of the job."""
    ended = shown("blockbak-job-web.service")["InactiveEnterTimestampMonotonic"]
    teller = "blockbak-failed@web.service"

    def over() -> bool:
        now = shown(teller)
        return now["ActiveState"] == "inactive" and int(now["InactiveEnterTimestampMonotonic"]) > int(ended)

    until("people are told", over)


@pytest.fixture
def clock() -> Iterator[Callable[[], None]]:
    """Puts the machine's clock just behind the next moment of the calendar."""
    ahead = time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_BOOTTIME)

    def turn() -> None:
        now = time.clock_gettime(time.CLOCK_REALTIME)
        moment = (now // TURN_SECONDS + 1) * TURN_SECONDS
        time.clock_settime(time.CLOCK_REALTIME, moment + LATE_SECONDS)

    yield turn
    time.clock_settime(time.CLOCK_REALTIME, ahead + time.clock_gettime(time.CLOCK_BOOTTIME))


@pytest.fixture
def place(run_blockbak: Blockbak, repository: Path) -> Iterator[Place]:
    """Not below /tmp: who may write there could exchange what root runs."""
    made = Place(Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/lib")), run_blockbak, repository)
    try:
        yield made
    finally:
        run_blockbak("timers", "remove")
        shutil.rmtree(made.path)


def left_of_units() -> list[str]:
    """What there is of blockbak's units: files, links that switch them on, stamps, and what systemd knows of them."""
    places = (UNITS, RUNTIME, STAMPS)
    files = [str(path) for place in places for name in OURS for path in place.rglob(f"*{name}*")]
    known = run("systemctl", "list-units", "--all", "--plain", "--no-legend", *(f"{name}*" for name in OURS))
    return [*files, *known.splitlines()]


def test_a_job_from_its_timer_to_its_removal(make_group, ext4, place, clock, tmp_path):
    group: Group = make_group(size=128 * MIB)
    data = group.volume("data", 32 * MIB)
    mounted = ext4(as_disk(data))
    assert left_of_units() == []
    place.script("hook", HOOK)
    written = place.install(f"{group.name}/data", f'freeze_with = ["{place.path}/hook"]')
    service, timer = "blockbak-job-web.service", "blockbak-job-web.timer"
    assert written == [service, timer, "blockbak-failed@.service", "blockbak-boot.service"]
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(UNITS / name for name in written)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    assert run("systemctl", "is-enabled", timer, "blockbak-boot.service").split() == ["enabled", "enabled"]
    assert shown(timer)["SubState"] == "waiting"

    # The timer fires, and LVM's snapshots are made and read in the sandbox.
    before = shown(service)["InvocationID"]
    clock()
    now = ran_again(before)
    assert (now["Result"], now["ExecMainStatus"]) == ("success", "0"), journal(service)
    # What it cannot reach in there is there.
    run("dd", "if=/dev/port", "of=/dev/null", "bs=1", "count=1")
    nice, idle, policy, powers, *allowed = (place.path / "sandbox").read_text().splitlines()
    assert (nice, idle, policy.rpartition(" ")[2], allowed) == ("10", "idle", "SCHED_BATCH", ["/etc"])
    assert int(powers.split()[1], 16) & (1 << 39 | 1 << 12 | 1 << 22) == 0, "CAP_BPF, CAP_NET_ADMIN, CAP_SYS_BOOT"
    lines = [
        json.loads(line)
        for line in run(
            "journalctl", "--output=json", f"_SYSTEMD_INVOCATION_ID={now['InvocationID']}", "SYSLOG_IDENTIFIER=blockbak"
        ).splitlines()
    ]
    (made,) = (line for line in lines if "BLOCKBAK_POINT" in line)
    assert made["BLOCKBAK_JOB"] == "web"
    assert made["BLOCKBAK_VOLUME"]
    assert ": full " in made["MESSAGE"]
    assert made["MESSAGE"].endswith("consistency application.")
    assert len({line["BLOCKBAK_RUN"] for line in lines}) == 1

    # It hangs with a snapshot, where it does not see that its time is up. systemd does.
    (place.path / "hang").touch()
    before = now["InvocationID"]
    clock()

    def hangs() -> bool:
        pid = shown(service)["MainPID"]
        return pid != "0" and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    until("it hangs", hangs)
    assert [name for name in mapped(group) if "blockbak" in name]
    (place.path / "hang").unlink()
    limit = RUNTIME / f"{service}.d" / "limit.conf"
    limit.parent.mkdir(parents=True)
    limit.write_text("[Service]\nTimeoutStartSec=1\n")
    try:
        # A service that is under way takes it from then on.
        run("systemctl", "daemon-reload")
        now = ran_again(before)
    finally:
        shutil.rmtree(limit.parent)
        run("systemctl", "daemon-reload")
    assert (now["Result"], now["ExecMainStatus"]) == ("timeout", "130"), journal(service)
    check_gone(group)
    check_repository(place.repository)
    failed()
    assert place.told() == [("failure", "RunKilled")]
    assert place.status(3)[1] == ["BackupFailed"]

    # The next moment passes while nobody is there to fire; it is made up for as soon as somebody is, and all is well.
    (mounted.where / "since").write_bytes(noise(1, MIB))
    run("systemctl", "stop", timer)
    before = now["InvocationID"]
    clock()
    time.sleep(1)
    assert shown(service)["InvocationID"] == before
    run("systemctl", "start", timer)
    now = ran_again(before)
    assert now["Result"] == "success", journal(service)
    assert "an incremental is due: incremental: none since" in journal(service)
    assert place.told() == [("recovery", "")]
    volume, reasons = place.status(0)
    assert (volume["points"], volume["chain_images"], volume["rpo_met"], reasons) == (2, 2, True, [])
    place.blockbak("restore", volume["newest"], tmp_path / "restored", "--yes")
    run("debugfs", "-R", f"dump /since {tmp_path}/since", tmp_path / "restored")
    assert (tmp_path / "since").read_bytes() == noise(1, MIB)

    # One that fails by itself tells so itself, once.
    (place.path / "fail").touch()
    before = now["InvocationID"]
    clock()
    now = ran_again(before)
    assert (now["Result"], now["ExecMainStatus"]) == ("exit-code", "1")
    failed()
    assert place.told() == [("failure", "HookStopped")]
    check_gone(group)

    # What starts at each boot puts right what a crash left.
    (place.path / "fail").unlink()
    with start(place.blockbak, "backup", f"{group.name}/data", "--snapshot-size", "16M") as running:
        pause_reading(running)
    assert [name for name in mapped(group) if "blockbak" in name]
    run("systemctl", "start", "blockbak-boot.service")
    until("it is over", lambda: shown("blockbak-boot.service")["ActiveState"] != "active")
    assert shown("blockbak-boot.service")["Result"] == "success", journal("blockbak-boot.service")
    check_gone(group)

    # Nothing stays, not even that it failed.
    removed = place.blockbak.json("timers", "remove")["removed"]
    assert sorted(removed) == sorted(written)
    assert left_of_units() == []


def test_a_drill_of_a_database_in_the_service_of_its_job(make_group, place):
    group: Group = make_group(size=256 * MIB)
    data = group.volume("data", 64 * MIB)
    run("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0", data)
    where = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
    where.chmod(0o755)
    settings = "-c listen_addresses= -c shared_buffers=8MB -c autovacuum=off"
    check = place.script("check", CHECK, programs=PROGRAMS, seconds=SERVER_SECONDS, settings=f"{settings} -c fsync=off")
    place.install(f"{group.name}/data", f'rto = "1h"\n[jobs.web.drill]\ncheck = ["{check}"]')
    run("mount", data, where)
    try:
        run("cp", "--archive", NEW, where / "cluster")
        shutil.chown(where, "postgres", "postgres")
        control = (PROGRAMS / "pg_ctl", "-w", "-t", str(SERVER_SECONDS), "-D", where / "cluster", "-l", where / "log")
        by_server(*control, "-o", f"-k {where} {settings}", "start")
        try:
            by_server(
                PROGRAMS / "psql", "-h", where, "-XAtq", "-d", "postgres", "-c",
                "CREATE TABLE fact (number int PRIMARY KEY, word text);"
                "INSERT INTO fact SELECT n, 'one of many' FROM generate_series(1, 2000) n;"
                "UPDATE fact SET word = 'zuletzt' WHERE number = 2000",
            )  # fmt: skip
            # As a crash leaves it: the server goes on, and what is drilled is the snapshot.
            done = subprocess.run(
                ["systemctl", "start", "blockbak-job-web.service"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr + journal("blockbak-job-web.service")
        finally:
            with ending(where / "cluster"):
                by_server(*control, "-m", "immediate", "stop")
    finally:
        run("umount", where)
        where.rmdir()
    checked = (place.path / "checked").read_text()
    assert checked.splitlines()[-1] == "2000|zuletzt", checked
    assert '"postgres.public.fact"' in checked
    volume, reasons = place.status(0)
    assert (volume["rto_met"], reasons) == (True, [])
    drilled = volume["drilled"]
    assert (drilled["ok"], drilled["point"], drilled["differences"]) == (True, volume["newest"], [])
    assert place.told() == []
    check_gone(group)
