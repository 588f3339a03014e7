"""Database servers of a test's own: on a Unix socket in a directory of their own, gone with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.postgres import ending


@contextmanager
def _place(owner: str) -> Iterator[Path]:
    """A directory that ``owner`` can reach: pytest's own ones are closed to everybody else, and a socket's path
    must be short.
    """
    place = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
    try:
        shutil.chown(place, owner, owner)
        yield place
    finally:
        shutil.rmtree(place)


def environment() -> dict[str, str]:
    """Ours, without the temporary directory of the tests, where the servers' users may not look."""
    return {name: value for name, value in os.environ.items() if name != "TMPDIR"}


def run(*argv: str | Path, user: str = "root", timeout: float = 60) -> str:
    as_user = ["setpriv", "--reuid", user, "--regid", user, "--init-groups", *map(str, argv)]
    done = subprocess.run(
        as_user, capture_output=True, text=True, check=False, timeout=timeout, cwd="/", env=environment()
    )  # fmt: skip
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class PostgreSQL:
    """A running server, and the environment in which a hook finds it."""

    place: Path
    programs: Path
    settings: dict[str, str]

    @property
    def data(self) -> Path:
        return self.place / "data"

    def ask(self, sql: str) -> str:
        command = ["env", f"PGHOST={self.place}", "psql", "-XAtq", "-d", "postgres", "-c", sql]
        return run(*command, user="postgres").strip()

    def control(self, *argument: str | Path, data: Path | None = None) -> str:
        return run(
            self.programs / "pg_ctl", "-w", "-D", data or self.data, "-l", self.place / "log", *argument,
            user="postgres",
        )  # fmt: skip

    def stop(self, how: str, data: Path | None = None) -> None:
        """As ``pg_ctl -m``; it has ended afterwards."""
        with ending(data or self.data):
            self.control("-m", how, "stop", data=data)

    def backups(self) -> int:
        """How many sessions keep the server in backup mode."""
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%\\_backup%' AND pid <> pg_backend_pid()"
        return int(self.ask(sessions))


@contextmanager
def postgresql(*, split: bool) -> Iterator[PostgreSQL]:
    """A server; ``split``: its WAL lies on another file system than its data, and is archived."""
    with _place("postgres") as place, ExitStack() as undo:
        version = max(Path("/usr/lib/postgresql").iterdir(), key=lambda path: int(path.name))
        server = PostgreSQL(place, version / "bin", {"PGHOST": str(place)})
        options, settings = [], "fsync = off\nshared_buffers = 16MB\n"
        other = undo.enter_context(file_system(place / "other", "postgres"))
        if split:
            options = [f"--waldir={other}/wal"]
            settings += f"archive_mode = on\narchive_command = 'cp %p {place}/archive/%f'\n"
        (place / "archive").mkdir()
        shutil.chown(place / "archive", "postgres", "postgres")
        run(
            server.programs / "initdb", "--no-sync", "--auth=trust", *options, "-D", server.data, user="postgres"
        )  # fmt: skip
        with (server.data / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = ''\nunix_socket_directories = '{place}'\n{settings}")
        server.control("start")
        try:
            yield server
        finally:
            server.stop("immediate")


@contextmanager
def file_system(where: Path, owner: str) -> Iterator[Path]:
    """Another file system, that ``owner`` may use."""
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size=256m,uid={owner},mode=700", "tmpfs", where)
    try:
        yield where
    finally:
        run("umount", where)


@dataclass(frozen=True)
class MariaDB:
    """A running server, and the environment in which a hook finds it."""

    place: Path
    settings: dict[str, str]

    def client(self, sql: str) -> list[str]:
        return ["mariadb", f"--defaults-file={self.place}/my.cnf", "--batch", "--skip-column-names", "-e", sql]

    def ask(self, sql: str) -> str:
        return run(*self.client(sql)).strip()


@contextmanager
def mariadb() -> Iterator[MariaDB]:
    with _place("mysql") as place:
        options = place / "my.cnf"
        options.write_text(
            f"[mariadbd]\ndatadir={place}/data\nsocket={place}/socket\npid-file={place}/pid\nskip-networking\n"
            f"log-error={place}/log\nlog-bin=binary\nserver-id=1\ninnodb-flush-log-at-trx-commit=0\n"
            f"innodb-buffer-pool-size=16M\n[client]\nsocket={place}/socket\nuser=root\n"
        )
        server = MariaDB(place, {"BLOCKBAK_MYSQL_DEFAULTS_FILE": str(options)})
        run(
            "mariadb-install-db", f"--defaults-file={options}", "--skip-test-db", "--auth-root-authentication-method=normal",
            "--user=mysql",
        )  # fmt: skip
        process = subprocess.Popen(
            [
                shutil.which("mariadbd", path=f"{os.environ['PATH']}:/usr/sbin"),
                f"--defaults-file={options}",
                "--user=mysql",
            ],
            cwd="/",
            env=environment(),
        )
        try:
            deadline = time.monotonic() + 30
            while not (place / "socket").exists():
                assert process.poll() is None, (place / "log").read_text()
                assert time.monotonic() < deadline, (place / "log").read_text()
                time.sleep(0.05)
            yield server
        finally:
            process.kill()
            process.wait()
