"""PostgreSQL imaged while it is written: each point starts, is whole, and has what was committed before its moment.

The server keeps its durability (fsync, full_page_writes, checksums); pgbench moves amounts, and a client that waits
for each of its commits knows which of them must be there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.postgres import ending
from tests.vm.cluster import NEW, PROGRAMS, by_server
from tests.vm.conftest import LIMIT_SECONDS, MIB, Blockbak, Group, run
from tests.vm.writers import Client, Taken, Writer, find_least, take

DATA_SIZE, WAL_SIZE = 64 * MIB, 24 * MIB
MKFS = ("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0")

# Checkpoints come often, so that points fall into them; everything that only takes processor time is off.
SETTINGS = """
listen_addresses = ''
fsync = on
full_page_writes = on
synchronous_commit = on
checkpoint_timeout = 30s
min_wal_size = 2MB
max_wal_size = 12MB
archive_mode = on
archive_command = 'cp %p {place}/archive/%f'
unix_socket_directories = '{place}'
autovacuum = off
jit = off
max_connections = 12
shared_buffers = 8MB
"""

TABLES = """
CREATE TABLE accounts (id int PRIMARY KEY, balance bigint NOT NULL);
CREATE TABLE history (id bigserial PRIMARY KEY, account int NOT NULL, delta bigint NOT NULL, note text);
CREATE TABLE counter (changes bigint NOT NULL);
CREATE TABLE witness (number int PRIMARY KEY);
INSERT INTO accounts SELECT number, 0 FROM generate_series(1, 1000) AS number;
INSERT INTO counter VALUES (0);
CREATE EXTENSION amcheck;
"""

TRANSFER = """
\\set account random(1, 1000)
\\set delta random(-5000, 5000)
BEGIN;
UPDATE accounts SET balance = balance + :delta WHERE id = :account;
INSERT INTO history (account, delta, note) VALUES (:account, :delta, repeat(md5(:delta::text), 8));
UPDATE counter SET changes = changes + 1;
COMMIT;
"""

# What every transaction of pgbench keeps; how many there were; the numbers that the witness wrote.
SUMS = """
SELECT (SELECT sum(balance) FROM accounts) = sum(delta) AND (SELECT changes FROM counter) = count(*), count(*),
    (SELECT count(*) FROM witness), (SELECT max(number) FROM witness)
FROM history
"""


def as_server(*words: object) -> list[str]:
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--", *map(str, words)]


@dataclass(frozen=True)
class Server:
    """A server whose files are on volumes, mounted below ``place``, where its socket and its archive are too."""

    place: Path

    @property
    def data(self) -> Path:
        return self.place / "data-volume" / "cluster"

    def control(self, *words: str | Path) -> None:
        by_server(
            PROGRAMS / "pg_ctl", "-w", "-t", str(LIMIT_SECONDS), "-D", self.data, "-l", self.place / "log", *words
        )

    @contextmanager
    def running(self, options: str = "", stop: str = "immediate") -> Iterator[None]:
        self.control("-o", options, "start")
        try:
            yield
        finally:
            with ending(self.data):
                self.control("-m", stop, "stop")

    def ask(self, sql: str) -> str:
        return by_server(PROGRAMS / "psql", "-h", self.place, "-XAtq", "-d", "postgres", "-c", sql).strip()

    @contextmanager
    def mounted(self, volumes: dict[str, str]) -> Iterator[None]:
        """With these devices mounted as ``data`` and ``wal``."""
        with ExitStack() as undo:
            for name, device in volumes.items():
                where = self.place / f"{name}-volume"
                where.mkdir(exist_ok=True)
                run("mount", device, where)
                undo.callback(run, "umount", where)
            yield


@pytest.fixture
def server(run_blockbak: Blockbak) -> Iterator[Server]:
    """A place for a server, which hooks find."""
    place = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
    try:
        (place / "archive").mkdir()
        for path in (place, place / "archive"):
            shutil.chown(path, "postgres", "postgres")
        run_blockbak.exported["PGHOST"] = str(place)
        yield Server(place)
    finally:
        shutil.rmtree(place)


@contextmanager
def under_load(server: Server, *, split: bool) -> Iterator[Writer]:
    """A new server on the volumes that are mounted, with pgbench and the witness at work."""
    run("cp", "--archive", NEW, server.data)
    if split:
        wal = server.place / "wal-volume" / "wal"
        run("mv", server.data / "pg_wal", wal)
        (server.data / "pg_wal").symlink_to(wal)
    with (server.data / "postgresql.conf").open("a") as file:
        file.write(SETTINGS.format(place=server.place))
    script = server.place / "transfer.sql"
    script.write_text(TRANSFER)
    with server.running():
        server.ask(TABLES)
        pgbench = as_server(
            PROGRAMS / "pgbench", "-h", server.place, "-n", "-M", "prepared", "-c", 2, "-R", 8, "-T", 3600, "-f", script,
            "postgres",
        )  # fmt: skip
        psql = as_server(PROGRAMS / "psql", "-h", server.place, "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", "postgres")
        # psql comes to the second command when the first one is committed.
        line = "INSERT INTO witness VALUES ({n});\n\\echo {n}"
        with (
            subprocess.Popen(pgbench, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as load,
            Client(psql, line) as client,
        ):
            try:
                with Writer(client.step) as witness:
                    witness.go_on(3)
                    yield witness
                assert load.poll() is None, "pgbench gave up"
            finally:
                load.kill()


class Checked:
    """Looks at restored servers, in the order of their points."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._changes = self._seen = 0

    def check(self, taken: Taken, *, options: str = "", thorough: bool = False) -> None:
        """Start what is mounted: it must be whole, have all that was committed at its moment, and nothing later."""
        server = self._server
        (server.data / "postmaster.pid").unlink()
        # What comes of the copy need not last.
        settings = f"-c fsync=off -c archive_mode=off {options}"
        with server.running(settings, stop="fast" if thorough else "immediate"):
            kept, changes, seen, last = server.ask(SUMS).split("|")
            assert kept == "t", taken
            assert taken.least <= int(seen) <= taken.most, taken
            assert seen == last, taken
            # Both wrote between this point and the one before.
            assert int(changes) > self._changes
            assert int(seen) > self._seen
            self._changes, self._seen = int(changes), int(seen)
            if thorough:
                by_server(PROGRAMS / "pg_amcheck", "-h", server.place, "-d", "postgres")
        if thorough:
            by_server(PROGRAMS / "pg_checksums", "--check", "-D", server.data)


def restore(blockbak: Blockbak, group: Group, taken: Taken) -> dict[str, str]:
    """Bring the points of a run onto the new volumes, which hold those of the run before; mounts by name."""
    for label, point in taken.points.items():
        blockbak("restore", point, f"{group.path(label.split('/')[1])}-new", "--yes")
    return {label.split("/")[1]: f"{group.path(label.split('/')[1])}-new" for label in taken.points}


def bring_back(server: Server, text: str) -> str:
    """Do what the hook's text says; the options that are for the configuration."""
    found = re.search(r"\nbackup_label:\n(.*?\n)tablespace_map:\n\nLast WAL file: (\w+)\n", text, re.DOTALL)
    assert found is not None, text
    assert (server.place / "archive" / found[2]).exists()
    (server.data / "backup_label").write_text(found[1])
    (server.data / "recovery.signal").touch()
    for name in ("backup_label", "recovery.signal"):
        shutil.chown(server.data / name, "postgres", "postgres")
    # As soon as it is whole, so that what was committed later is not there.
    return (
        f"-c restore_command='cp {server.place}/archive/%f %p' "
        "-c recovery_target=immediate -c recovery_target_action=promote"
    )


def test_a_whole_server_on_one_volume(make_group, run_blockbak, repository, server):
    group = make_group(4096, 512 * MIB)
    data = group.thin(group.pool("pool", 256 * MIB), "data", DATA_SIZE)
    copy = group.volume("data-new", DATA_SIZE)
    run(*MKFS, data)
    label = f"{group.name}/data"
    with server.mounted({"data": data}), under_load(server, split=False) as witness:
        runs = [
            take(run_blockbak, witness, label, "--freeze-with", "postgresql"),
            take(run_blockbak, witness, label),
            take(run_blockbak, witness, label, "--kind", "differential"),
        ]
    assert [one.documents[0]["kind"] for one in runs] == ["full", "incremental", "differential"]
    assert [one.documents[0]["consistency"] for one in runs] == ["application", "filesystem", "filesystem"]
    find_least(run_blockbak, witness, runs)
    checked = Checked(server)
    for number, taken in enumerate(runs):
        restore(run_blockbak, group, taken)
        with server.mounted({"data": copy}):
            checked.check(taken, thorough=number == 1)


def test_data_and_wal_on_two_volumes(make_group, run_blockbak, repository, server):
    group = make_group(512, 512 * MIB)
    origins = {"data": group.volume("data", DATA_SIZE), "wal": group.volume("wal", WAL_SIZE)}
    new = {"data": group.volume("data-new", DATA_SIZE), "wal": group.volume("wal-new", WAL_SIZE)}
    for device in origins.values():
        run(*MKFS, device)
    data, wal = f"{group.name}/data", f"{group.name}/wal"
    hook = ("--freeze-with", "postgresql")
    both = ("--together", "--together-deadline", "60")
    with server.mounted(origins), under_load(server, split=True) as witness:
        together = [take(run_blockbak, witness, *both, data, wal, *hook)]
        alone = take(run_blockbak, witness, data, *hook)
        together.append(take(run_blockbak, witness, *both, wal, data))
        together.append(take(run_blockbak, witness, *both, data, wal))
    runs = [together[0], alone, *together[1:]]
    kinds = [[document["kind"] for document in one.documents] for one in runs]
    assert kinds == [["full"] * 2, ["incremental"], *[["incremental"] * 2] * 2]
    consistencies = [one.documents[0]["consistency"] for one in runs]
    assert consistencies == ["application", "application", "filesystem", "filesystem"]
    for one in together:
        assert len({document["set_id"] for document in one.documents} - {""}) == 1
    find_least(run_blockbak, witness, runs)
    checked = Checked(server)
    for number, taken in enumerate(runs):
        restore(run_blockbak, group, taken)
        with server.mounted(new):
            options = ""
            if taken is alone:
                told = run_blockbak.json("show", taken.points[data])["hooks"]
                options = bring_back(server, told["postgresql end"])
                # Nothing of the WAL's volume is needed: it is all in the archive.
                (server.data / "pg_wal").unlink()
                by_server("mkdir", server.data / "pg_wal")
            checked.check(taken, options=options, thorough=number in (1, 3))
