"""Several volumes at one instant: what a set promises, who is refused, and that nothing stays suspended."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

from tests.vm.conftest import MIB, SETTLE_SECONDS, run, suspended
from tests.vm.hot import as_disk, check_gone, dm_name, instead, killed, mapped, noise, start, suspended_path, write
from tests.volumes import fingerprint

WRITER = """
import mmap, os, sys, time
page = mmap.mmap(-1, 4096)
first, second = (os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC) for path in sys.argv[1:])
number = 0
while True:
    number += 1
    page[:8] = number.to_bytes(8, "little")
    for device in (first, second):
        os.pwritev(device, [page], 0)
        # Many times while one snapshot is made, and not all that an emulated processor can do.
        time.sleep(0.02)
"""


class Writing:
    """A process that writes a counter to the first device and then to the second, over and over."""

    def __init__(self, *paths):
        self.paths = paths

    def __enter__(self):
        self._process = subprocess.Popen([sys.executable, "-c", WRITER, *self.paths])
        return self

    def __exit__(self, *_):
        assert self._process.poll() is None, "a write failed"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


def counter(path):
    with open(path, "rb") as file:
        return struct.unpack("<Q", file.read(8))[0]


def held_back(paths):
    """Which of these devices are suspended."""
    return [path.read_text().strip() == "1" for path in paths]


def two(make_group):
    """Two volumes of a group, and the state of each."""
    group = make_group(size=256 * MIB)
    paths = [group.volume(name, 16 * MIB) for name in ("a-data", "b-wal")]
    return group, paths, [suspended_path(dm_name(group, name)) for name in ("a-data", "b-wal")]


def words(group):
    # Where everything is emulated and others have the processor too, two snapshots may take longer than usual.
    return ("backup", "--mode", "hot", "--together", "--together-deadline", "60", "--snapshot-size", "8M", "--json",
            f"{group.name}/a-data", f"{group.name}/b-wal")  # fmt: skip


def test_points_of_a_set_are_of_one_instant(make_group, repository, run_blockbak, tmp_path):
    group, paths, _ = two(make_group)
    with Writing(*paths):
        sets = [run_blockbak.json(*words(group)[:-3], *words(group)[-2:])["points"] for _ in range(2)]
    for points in sets:
        first, second = points
        assert first["set_id"] == second["set_id"] != ""
        found = []
        for point in points:
            target = tmp_path / point["point"]
            run_blockbak("restore", point["point"], target, "--yes")
            found.append(counter(target))
        assert found[0] - found[1] in (0, 1), found
        assert found[1] > 0
    assert sets[0][0]["set_id"] != sets[1][0]["set_id"]
    check_gone(group)


def test_a_set_that_takes_too_long_is_void(make_group, repository, run_blockbak, tmp_path):
    group, paths, states = two(make_group)
    slow = '#!/bin/sh\nsleep 12\nexec /usr/sbin/lvcreate "$@"\n'
    env = instead(tmp_path, "lvcreate", slow)
    with Writing(*paths), start(run_blockbak, *words(group), "--together-deadline", "3", env=env) as running:
        running.until("the volumes are suspended", lambda: any(held_back(states)))
        begun = time.monotonic()
        while any(held_back(states)):
            assert time.monotonic() < begun + 60
            time.sleep(0.05)
        lasted = time.monotonic() - begun
        ended = running.end()
    # At its deadline, and not when whoever is slow comes back; a machine that has other work takes a while, too.
    assert 1 < lasted < 3 + 6
    assert (ended.status, ended.error["name"], ended.document["points"]) == (1, "SetVoid", [])
    check_gone(group)


def test_whoever_dies_while_volumes_are_suspended_they_go_on(make_group, repository, run_blockbak, tmp_path):
    group, paths, states = two(make_group)
    write(paths[0], 0, noise(1, MIB))
    # blockbak alone: its guardian lets go.
    killed(run_blockbak, *words(group), env=instead(tmp_path, "lvcreate", "#!/bin/sh\nkill -KILL $PPID\n"))
    deadline = time.monotonic() + SETTLE_SECONDS
    while any(held_back(states)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert suspended() == set()
    # Its guardian with it: nobody is left to.
    both = """#!/bin/sh
kill -KILL $(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/' /run/blockbak/guardian-*.json) $PPID
"""
    killed(run_blockbak, *words(group), env=instead(tmp_path, "lvcreate", both))
    assert held_back(states) == [True, True]
    said = run_blockbak.json("recover")["done"]
    assert any("died" in line for line in said), said
    assert suspended() == set()
    assert mapped(group) == {"a-data", "b-wal"}
    (tmp_path / "bin" / "lvcreate").unlink()
    held = [fingerprint(path) for path in paths]
    assert len(run_blockbak.json(*words(group)[:-3], *words(group)[-2:])["points"]) == 2
    assert [fingerprint(path) for path in paths] == held
    check_gone(group)


def refusal(blockbak, *sources, **env):
    """Why these cannot be suspended together."""
    exporting = replace(blockbak, exported=blockbak.exported | env)
    return exporting("backup", "--mode", "hot", "--together", "--dry-run", *sources, expect=5).said


def test_who_is_refused(make_group, ext4, repository, run_blockbak, tmp_path):
    group, paths, _ = two(make_group)
    group.pool("pool", 32 * MIB)
    group.thin("pool", "thin", 16 * MIB)
    first, second = (f"{group.name}/{name}" for name in ("a-data", "b-wal"))
    assert f"{group.name}/thin cannot" in refusal(run_blockbak, first, f"{group.name}/thin")
    # Its lock is held already, by the very run that would wait for it.
    twice = run_blockbak("backup", "--mode", "hot", "--together", "--wait", "100", first, paths[0], expect=5)
    assert f"{first} is named twice." in twice.said
    run("mkswap", paths[1])
    run("swapon", paths[1])
    try:
        assert f"{second} cannot be suspended together with others: it carries swap." in refusal(
            run_blockbak, first, second
        )
    finally:
        run("swapoff", paths[1])
    mounted = ext4(as_disk(paths[0]))
    state = mounted.where / "state"
    state.mkdir()
    said = refusal(run_blockbak, first, second, BLOCKBAK_STATE_DIR=str(state))
    assert f"{first} cannot be suspended together with others: it carries blockbak's state directory." in said
    # It stands for every place that LVM and blockbak's commands need.
    run("mount", "--bind", mounted.where, "/var/log")
    try:
        said = refusal(run_blockbak, first, second)
        assert f"{first} cannot be suspended together with others: it carries /var/log." in said
    finally:
        run("umount", "/var/log")
    check_gone(group)
