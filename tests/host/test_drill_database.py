"""A drill of a database: its check command starts the server on an overlay over the copy, and asks it."""

from __future__ import annotations

import shutil

from tests.host.servers import PostgreSQL, file_system, postgresql, run
from tests.host.stage import MIB

CHECK = """#!/bin/sh
set -e
m=$BLOCKBAK_MOUNTS
mkdir $m/rw $m/db
# The copy is mounted read-only; what the server writes goes on top of it, and with the drill.
mount -t tmpfs tmpfs $m/rw
mkdir $m/rw/upper $m/rw/work $m/rw/run
mount -t overlay -o lowerdir=$BLOCKBAK_MOUNT,upperdir=$m/rw/upper,workdir=$m/rw/work overlay $m/db
chown postgres $m/rw/run
rm -f $m/db/data/postmaster.pid
cd /
as="setpriv --reuid postgres --regid postgres --init-groups env PGHOST=$m/rw/run"
$as PROGRAMS/pg_ctl -w -D $m/db/data -l $m/rw/run/log -o "-k $m/rw/run" start >&2
$as PROGRAMS/pg_amcheck --all --install-missing >&2
$as psql -XAtq -d postgres -c 'SELECT count(*), max(word) FROM fact'
"""


def test_a_database_is_started_from_the_copy_and_checked(program, loop, ext4, tmp_path):
    device = loop(256 * MIB)
    made = ext4(device)
    with postgresql(split=False) as server, file_system(server.place / "moved", "postgres"):
        made.where.chmod(0o755)
        shutil.chown(made.where, "postgres", "postgres")
        server.stop("fast")
        run("cp", "-a", server.data, made.where / "data")
        # The test's own directory is closed to the server's user, so the device is mounted where it is not.
        made.unmount()
        data = server.place / "moved" / "db"
        run("install", "-d", "-o", "postgres", data)
        run("mount", device.path, data)
        try:
            moved = PostgreSQL(server.place, server.programs, server.settings)
            moved.control("start", data=data / "data")
            moved.ask("CREATE TABLE fact (number int PRIMARY KEY, word text)")
            moved.ask("INSERT INTO fact SELECT n, 'the newest is ' || n FROM generate_series(1, 20000) n")
            moved.ask("CHECKPOINT")
            moved.ask("UPDATE fact SET word = 'zuletzt' WHERE number = 20000")
            run("sync", "-f", data)
            # As a crash leaves it: the server runs, and its journal and the file system's want to be replayed.
            point = program.backup(device, "--mode", "live")["point"]
            moved.stop("immediate", data / "data")
        finally:
            run("umount", data)
            server.control("start")
    check = tmp_path / "check"
    check.write_text(CHECK.replace("PROGRAMS", str(server.programs)))
    check.chmod(0o755)
    (report,) = program("drill", point, "--check", check).document["drills"]
    assert report["filesystems"][0]["replayed"] is True
    assert report["check_output"].splitlines()[0] == "20000|zuletzt"
    assert report["check_status"] == 0
