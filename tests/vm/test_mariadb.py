"""MariaDB imaged while it is written: held up for the snapshot alone, and every committed row is in the copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.host import servers
from tests.vm.conftest import LIMIT_SECONDS, MIB, Blockbak, run
from tests.vm.writers import Client, Writer, find_least, take

SIZE = 112 * MIB
LIMIT = 14 * MIB
"""Bytes a second to be read: so reading takes much longer than anything the server may be held up for."""
LOCK_SECONDS = 20.0
"""What it may be held up for where each instruction is emulated, on a machine that has other work too: it is a
second or two on others.
"""
BUSY_SECONDS = 5.0
"""What one commit may take there meanwhile."""

OPTIONS = """
[mariadbd]
datadir={place}/volume/mysql
socket={place}/socket
pid-file={place}/pid
log-error={place}/log
skip-networking
log-bin=binary
server-id=1
sync-binlog=1
innodb-flush-log-at-trx-commit=1
innodb-buffer-pool-size=16M
innodb-buffer-pool-load-at-startup=0
[client]
socket={place}/socket
user=root
"""


@dataclass(frozen=True)
class Server:
    """A server whose files are on a volume, mounted below ``place``, where its socket and its options are too."""

    place: Path

    @property
    def data(self) -> Path:
        return self.place / "volume" / "mysql"

    def client(self, *words: str) -> list[str]:
        """Unbuffered, so that each answer comes at once."""
        options = f"--defaults-file={self.place}/my.cnf"
        return ["mariadb", options, "--batch", "--skip-column-names", "--unbuffered", *words]

    def ask(self, sql: str) -> str:
        return servers.run(*self.client("-e", sql), timeout=LIMIT_SECONDS).strip()

    @contextmanager
    def mounted(self, device: str) -> Iterator[None]:
        (self.place / "volume").mkdir(exist_ok=True)
        run("mount", device, self.place / "volume")
        try:
            yield
        finally:
            run("umount", self.place / "volume")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Killed at the end, as what it writes then is nobody's business."""
        argv = ["/usr/sbin/mariadbd", f"--defaults-file={self.place}/my.cnf", "--user=mysql"]
        with subprocess.Popen(argv, cwd="/", stderr=subprocess.DEVNULL, env=servers.environment()) as process:
            try:
                deadline = time.monotonic() + LIMIT_SECONDS
                while not (self.place / "socket").exists():
                    assert process.poll() is None, (self.place / "log").read_text()
                    assert time.monotonic() < deadline, (self.place / "log").read_text()
                    time.sleep(0.05)
                yield
            finally:
                process.kill()
                (self.place / "socket").unlink(missing_ok=True)


@pytest.fixture
def server(run_blockbak: Blockbak) -> Iterator[Server]:
    """A place for a server, which hooks find."""
    place = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
    try:
        shutil.chown(place, "mysql", "mysql")
        (place / "my.cnf").write_text(OPTIONS.format(place=place))
        run_blockbak.exported["BLOCKBAK_MYSQL_DEFAULTS_FILE"] = str(place / "my.cnf")
        yield Server(place)
    finally:
        shutil.rmtree(place)


def test_the_lock_is_held_for_the_snapshot_alone(
    make_group, run_blockbak, repository, server, record_property
):  # fmt: skip
    group = make_group(512, 384 * MIB)
    origin, copy = group.volume("data", SIZE), group.volume("copy", SIZE)
    run("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0", origin)
    with ExitStack() as undo:
        undo.enter_context(server.mounted(origin))
        # The files of the package's own server, which never ran: to make new ones takes a minute in here.
        run("cp", "--archive", "--sparse=always", "/var/lib/mysql", server.data)
        undo.enter_context(server.running())
        server.ask("CREATE DATABASE load_; CREATE TABLE load_.witness (number INT PRIMARY KEY) ENGINE=InnoDB")
        line = "INSERT INTO load_.witness VALUES ({n}); SELECT {n};"
        client = undo.enter_context(Client(server.client(), line))
        with Writer(client.step, pause=0.1) as writer:
            writer.go_on(3)
            start = time.time()
            taken = take(
                run_blockbak, writer, f"{group.name}/data", "--freeze-with", "mariadb", "--limit", LIMIT
            )  # fmt: skip
            end = time.time()
    gap = writer.longest_gap(start, end)
    record_property("longest gap between two commits, s", round(gap, 3))
    record_property("the whole backup, s", round(end - start, 3))
    assert gap < LOCK_SECONDS
    # It went on while the snapshot was read.
    assert writer.longest_gap(end - SIZE / LIMIT, end) < min(gap, BUSY_SECONDS)
    find_least(run_blockbak, writer, [taken])
    (point,) = taken.points.values()
    told = run_blockbak.json("show", point)
    assert told["consistency"] == "application"
    found = re.search(r"^Binary log, file and position: (\S+)\t(\d+)", told["hooks"]["mariadb begin"], re.MULTILINE)
    assert found is not None, told["hooks"]
    run_blockbak("restore", point, copy, "--yes")
    with server.mounted(copy):
        # Nothing was written under the lock: the position is where the log of the copy ends.
        assert os.path.getsize(server.data / found[1]) == int(found[2])
        with server.running():
            count, last = map(int, server.ask("SELECT COUNT(*), MAX(number) FROM load_.witness").split())
            assert taken.least <= last <= taken.most
            assert count == last
            assert server.ask("CHECK TABLE load_.witness").endswith("OK")
