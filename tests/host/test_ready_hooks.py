"""The ready-made hooks, on real servers: at rest inside, going on afterwards, also when blockbak is killed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from blockbak.errors import HookFailed, HookStopped
from blockbak.host import hooks
from tests.host import servers

pytestmark = pytest.mark.usefixtures("as_root")

MIB = 1 << 20
PACKAGE = os.path.dirname(hooks.__file__)


@pytest.fixture(scope="module")
def split():
    with servers.postgresql(split=True) as server:
        yield server


@pytest.fixture(scope="module")
def mariadb():
    with servers.mariadb() as server:
        yield server


def ready(name):
    return hooks.Hook(name, f"{PACKAGE}/ready/{hooks.READY[name]}")


def at_rest(name, settings, tmp_path, deadline=20.0, together=False, sources="vg/data vg/wal"):
    facts = {"BLOCKBAK_SOURCES": sources, "BLOCKBAK_TOGETHER": "1" if together else "0"}
    return hooks.at_rest(
        [ready(name)],
        facts,
        deadline=deadline,
        run_dir=str(tmp_path / "run"),
        boot="this",
        environ=os.environ | settings,
    )


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


KILLED = """
import sys, time
from blockbak.host import hooks
name, path, run_dir, *settings = sys.argv[1:]
environ = dict(one.split("=", 1) for one in settings)
facts = {"BLOCKBAK_SOURCES": "vg/data vg/wal", "BLOCKBAK_TOGETHER": "0"}
with hooks.at_rest([hooks.Hook(name, path)], facts, deadline=60, run_dir=run_dir, boot="this", environ=environ):
    print("at rest", flush=True)
    time.sleep(60)
"""


def killed_at_rest(name, settings, tmp_path, check):
    """Kill a process while it has the application at rest."""
    pairs = [f"{key}={value}" for key, value in (os.environ | settings).items()]
    argv = [sys.executable, "-c", KILLED, name, ready(name).path, str(tmp_path / "run"), *pairs]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "at rest\n"
            check()
        finally:
            process.kill()
    until(lambda: not os.listdir(tmp_path / "run"))


# --- PostgreSQL ----------------------------------------------------------------------------------


def checkpoint(server):
    return server.ask("SELECT checkpoint_lsn FROM pg_control_checkpoint()")


def test_postgresql_of_one_instant_makes_a_checkpoint(split, tmp_path):
    split.ask("CREATE TABLE one AS SELECT 1")
    before = checkpoint(split)
    with at_rest("postgresql", split.settings, tmp_path, together=True) as rest:
        assert checkpoint(split) != before
        assert split.backups() == 0
    assert rest.applied
    assert rest.in_time
    assert rest.outputs == []


def test_postgresql_is_in_backup_mode_while_several_are_imaged_one_by_one(split, tmp_path):
    with at_rest("postgresql", split.settings, tmp_path) as rest:
        assert rest.applied
        assert split.backups() == 1
        assert rest.outputs == []
    until(lambda: split.backups() == 0)
    [(label, text)] = rest.outputs
    assert label == "postgresql end"
    assert "START WAL LOCATION: " in text
    assert "LABEL: blockbak" in text
    assert os.listdir(tmp_path / "run") == []


def test_what_postgresql_printed_brings_a_server_back(split, tmp_path):
    """Imaged under load, the data well before the WAL: what the output says to do gives a whole server."""
    pgbench = ["env", f"PGHOST={split.place}", split.programs / "pgbench"]
    servers.run(*pgbench, "-q", "-i", "-s", "2", "postgres", user="postgres")
    load = subprocess.Popen(
        ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *pgbench, "-c2", "-T60", "postgres"],
        cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    copy = split.place / "copy"
    try:
        with at_rest("postgresql", split.settings, tmp_path) as rest:
            # Files that vanish while they are copied are PostgreSQL's own affair in backup mode.
            subprocess.run(["cp", "-a", split.data, copy], stderr=subprocess.DEVNULL, check=False)
            time.sleep(0.5)
            (copy / "pg_wal").unlink()
            subprocess.run(["cp", "-a", split.place / "other" / "wal", copy / "pg_wal"], check=False)
    finally:
        load.kill()
        load.wait()
    text = dict(rest.outputs)["postgresql end"]
    found = re.search(r"\nbackup_label:\n(.*?\n)tablespace_map:\n\nLast WAL file: (\w+)\n", text, re.DOTALL)
    until((split.place / "archive" / found[2]).exists)
    (copy / "postmaster.pid").unlink()
    (copy / "backup_label").write_text(found[1])
    (copy / "recovery.signal").touch()
    for name in ("backup_label", "recovery.signal"):
        shutil.chown(copy / name, "postgres", "postgres")
    with (copy / "postgresql.conf").open("a") as file:
        file.write(f"restore_command = 'cp {split.place}/archive/%f %p'\narchive_mode = off\nport = 5433\n")
    try:
        split.control("start", data=copy)
        sums = "SELECT (SELECT sum(abalance) FROM pgbench_accounts) = (SELECT sum(delta) FROM pgbench_history)"
        restored = ["env", f"PGHOST={split.place}", "PGPORT=5433", "psql", "-XAtq", "-d", "postgres", "-c"]
        assert servers.run(*restored, sums, user="postgres") == "t\n"
    finally:
        split.control("-m", "immediate", "stop", data=copy)
        shutil.rmtree(copy)


def test_a_set_that_lacks_some_of_the_server_is_not_of_one_instant(split, loop, tmp_path):
    """Without the WAL's volume, what was written since the last checkpoint is in the archive alone."""
    sources = f"{loop(MIB)} {loop(MIB)}"
    with at_rest("postgresql", split.settings, tmp_path, together=True, sources=sources) as rest:
        assert split.backups() == 1
    assert "backup_label:" in dict(rest.outputs)["postgresql end"]


def test_a_set_that_has_all_of_the_server_is_of_one_instant(loop, tmp_path):
    disk = loop(16 * MIB)
    servers.run("mkfs.ext4", "-q", "-F", disk.path)
    with servers.postgresql(split=False) as server, ExitStack() as undo:
        place = server.place / "disk"
        place.mkdir()
        servers.run("mount", disk.path, place)
        undo.callback(servers.run, "umount", "--lazy", place)
        shutil.chown(place, "postgres", "postgres")
        server.ask(f"CREATE TABLESPACE disk LOCATION '{place}'")
        root = servers.run("findmnt", "-n", "-v", "-o", "SOURCE", "-T", server.place).strip()
        before = checkpoint(server)
        sources = f"{root} {disk}"
        with at_rest("postgresql", server.settings, tmp_path, together=True, sources=sources) as rest:
            assert checkpoint(server) != before
        assert rest.outputs == []
        # One that is missing leaves it without a way back, as there is no archive.
        stopped = pytest.raises(HookStopped)
        sources = f"{root} {loop(MIB)}"
        with stopped as caught, at_rest("postgresql", server.settings, tmp_path, together=True, sources=sources):
            pytest.fail("it was not at rest")
        assert "archive_mode" in caught.value.__notes__[0]


def test_postgresql_leaves_backup_mode_when_blockbak_is_killed(split, tmp_path):
    def check():
        assert split.backups() == 1

    killed_at_rest("postgresql", split.settings, tmp_path, check)
    until(lambda: split.backups() == 0)


def test_postgresql_leaves_backup_mode_at_the_deadline(split, tmp_path):
    with at_rest("postgresql", split.settings, tmp_path, deadline=6) as rest:
        assert split.backups() == 1
        until(lambda: split.backups() == 0)
        until(rest.over)
    assert not rest.in_time


def test_a_backup_mode_that_was_lost_meanwhile_is_an_error(split, tmp_path):
    lost = pytest.raises(HookFailed, match=r"(?s)phase end.*connection to server was lost")
    with lost, at_rest("postgresql", split.settings, tmp_path):
        split.ask("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%\\_backup\\_start%'")
        until(lambda: split.backups() == 0)


def test_postgresql_that_does_not_run_is_an_error(split, tmp_path):
    settings = {"PGHOST": f"{split.place}/nothing"}
    failed = pytest.raises(HookFailed, match=r"phase begin.*No such file or directory")
    with failed as caught, at_rest("postgresql", settings, tmp_path):
        pytest.fail("it was not at rest")
    assert not hasattr(caught.value, "__notes__")


def test_postgresql_without_archive(tmp_path):
    with servers.postgresql(split=False) as server:
        # On one file system, the snapshot of one volume is enough.
        before = checkpoint(server)
        with at_rest("postgresql", server.settings, tmp_path) as rest:
            assert checkpoint(server) != before
        assert rest.outputs == []
        server.ask(f"CREATE TABLESPACE other LOCATION '{server.place}/other'")
        # On several, one after the other, there would be no way back.
        with pytest.raises(HookStopped) as caught, at_rest("postgresql", server.settings, tmp_path):
            pytest.fail("it was not at rest")
        assert "archive_mode" in caught.value.__notes__[0]
        with at_rest("postgresql", server.settings, tmp_path, sources="vg/data") as rest:
            pass
        assert "Alone, this image cannot be started" in rest.outputs[0][1]


# --- MariaDB -------------------------------------------------------------------------------------


class Writer:
    """Another client's INSERT, which waits while the lock is held."""

    def __init__(self, server, number):
        self._process = subprocess.Popen(server.client(f"INSERT INTO test.rows VALUES ({number})"))

    def waits(self):
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return True
        return False

    def done(self):
        return self._process.wait(10) == 0


@pytest.fixture
def rows(mariadb):
    mariadb.ask("CREATE DATABASE IF NOT EXISTS test; CREATE OR REPLACE TABLE test.rows (number INT)")


@pytest.mark.usefixtures("rows")
@pytest.mark.parametrize("name", ["mariadb", "mysql"])
def test_mariadb_is_locked_until_the_end(name, mariadb, tmp_path):
    with at_rest(name, mariadb.settings, tmp_path) as rest:
        position = mariadb.ask("SHOW MASTER STATUS")
        writer = Writer(mariadb, 1)
        assert writer.waits()
        assert mariadb.ask("SHOW MASTER STATUS") == position
    assert writer.done()
    assert mariadb.ask("SELECT number FROM test.rows") == "1"
    assert rest.applied
    assert rest.in_time
    [(label, text)] = rest.outputs
    assert label == f"{name} begin"
    assert text.split() == ["Binary", "log,", "file", "and", "position:", *position.split()]
    assert os.listdir(tmp_path / "run") == []


@pytest.mark.usefixtures("rows")
def test_mariadb_goes_on_when_blockbak_is_killed(mariadb, tmp_path):
    writers = []

    def check():
        writers.append(Writer(mariadb, 2))
        assert writers[0].waits()

    killed_at_rest("mariadb", mariadb.settings, tmp_path, check)
    assert writers[0].done()


@pytest.mark.usefixtures("rows")
def test_mariadb_goes_on_at_the_deadline_also_without_a_guardian(mariadb, tmp_path):
    """The session that holds the lock ends by itself."""
    directory = tmp_path / "hook"
    directory.mkdir()
    env = os.environ | mariadb.settings | {"BLOCKBAK_HOOK_DIR": str(directory), "BLOCKBAK_DEADLINE": "3"}
    subprocess.run(
        [ready("mariadb").path], env=env | {"BLOCKBAK_PHASE": "begin"}, check=True, stdout=subprocess.DEVNULL
    )
    writer = Writer(mariadb, 3)
    assert writer.waits()
    assert writer.done()
    # What comes too late says so, once.
    late = subprocess.run(
        [ready("mariadb").path], env=env | {"BLOCKBAK_PHASE": "end"}, stderr=subprocess.PIPE, check=False
    )
    assert late.returncode == 1
    assert b"over before the snapshot was made" in late.stderr
    subprocess.run([ready("mariadb").path], env=env | {"BLOCKBAK_PHASE": "end"}, check=True)


@pytest.mark.usefixtures("rows")
def test_writers_do_not_wait_long_for_a_lock_that_is_not_had(mariadb, tmp_path):
    """A statement that goes on keeps the lock away; the hook gives up, and holds nobody back meanwhile."""
    busy = subprocess.Popen(mariadb.client("INSERT INTO test.rows VALUES (4); UPDATE test.rows SET number=SLEEP(60)"))
    find = "SELECT id FROM information_schema.processlist WHERE info LIKE 'UPDATE%SLEEP%'"
    try:
        until(lambda: mariadb.ask(find))
        settings = mariadb.settings | {"BLOCKBAK_MYSQL_LOCK_WAIT": "1"}
        with pytest.raises(HookFailed, match="Lock wait timeout"), at_rest("mariadb", settings, tmp_path, deadline=30):
            pytest.fail("it was not at rest")
    finally:
        mariadb.ask(f"KILL {mariadb.ask(find)}")
        busy.wait()


@pytest.mark.usefixtures("rows")
def test_a_lock_that_was_lost_meanwhile_is_an_error(mariadb, tmp_path):
    """The client must not connect anew by itself: that session would never have held it."""
    lost = pytest.raises(HookFailed, match="phase end")
    with lost, at_rest("mariadb", mariadb.settings, tmp_path):
        find = "SELECT id FROM information_schema.processlist WHERE command = 'Sleep'"
        mariadb.ask(f"KILL {mariadb.ask(find)}")
        assert Writer(mariadb, 5).done()


def test_mariadb_that_does_not_run_is_an_error(tmp_path):
    options = tmp_path / "my.cnf"
    options.write_text(f"[client]\nsocket={tmp_path}/nothing\n")
    settings = {"BLOCKBAK_MYSQL_DEFAULTS_FILE": str(options)}
    failed = pytest.raises(HookFailed, match=r"phase begin.*Can't connect")
    with failed as caught, at_rest("mariadb", settings, tmp_path):
        pytest.fail("it was not at rest")
    assert not hasattr(caught.value, "__notes__")
