"""Hot backups as they are seen from outside: the snapshot that is read, who holds it, and that nothing stays."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cli.program import Child, Running
from tests.conftest import Loop
from tests.vm.conftest import LIMIT_SECONDS, Blockbak, Group, lvs, suspended
from tests.volumes import Fingerprint, difference, fingerprint

RUN_FOLDER = Path("/run/blockbak")


def noise(seed: int, length: int) -> bytes:
    """Bytes that do not compress and belong to ``seed`` alone."""
    return random.Random(seed).randbytes(length)


def write(path: str | os.PathLike[str], start: int, data: bytes) -> None:
    """Write to a device itself, past its page cache. Raises OSError."""
    with written(path) as put:
        put(start, data)


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Callable[[int, bytes], None]]:
    """The same many times, ``put(start, data)``: udev looks at the device again only once it is closed."""
    device = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def put(start: int, data: bytes) -> None:
        memory = mmap.mmap(-1, len(data))
        memory.write(data)
        done = 0
        while done < len(data):
            done += os.pwritev(device, [memoryview(memory)[done:]], start + done)

    try:
        yield put
    finally:
        os.close(device)


def as_disk(path: str, size: int = 0) -> Loop:
    """A logical volume for fixtures that take a loop device."""
    return Loop(path, Path(path), size, 512)


# --- a run that is under way ------------------------------------------------------------------------------


class Beside(Running):
    """A run beside the test, in a child of the process that has imported the program."""

    # A look takes the emulated processor some milliseconds, which the run has not for itself.
    _looks_every = 0.05

    def __init__(self, blockbak: Blockbak, words: tuple[str, ...], exported: dict[str, str]) -> None:
        Child.__init__(self, words)
        self._limit = LIMIT_SECONDS
        self._err = self._file()
        out, err = (f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (self._out, self._err))
        self._process = blockbak.forks.begin(list(words), Path("/"), exported, out, err)


def start(blockbak: Blockbak, *words: object, env: dict[str, str] | None = None) -> Running:
    """Run the installed program beside the test."""
    return Beside(blockbak, tuple(str(word) for word in words), blockbak.exported | (env or {}))


def snapshot_read(pid: int) -> str:
    """The device-mapper name of the snapshot that a process reads past the page cache, or an empty string.

    It also looks at the partition tables of all devices, snapshots that others left among them, but not so.
    """
    opened = []
    try:
        entries = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return ""  # it has ended
    for entry in entries:
        # What is closed meanwhile, as pipes to LVM's commands are, is not what is read.
        with contextlib.suppress(OSError, IndexError):
            path = os.readlink(f"/proc/{pid}/fd/{entry}")
            flags = Path(f"/proc/{pid}/fdinfo/{entry}").read_text().partition("flags:")[2].split()[0]
            opened.append((path, int(flags, 8)))
    for path, how in opened:
        if path.startswith("/dev/dm-") and how & os.O_DIRECT:
            name = Path("/sys/block", path[5:], "dm/name").read_text().strip()
            # Every device is opened for a moment when twins are looked for, others' volumes too.
            if re.search(r"-blockbak--[0-9a-f]{8}(--\d+)?$", name):
                return name
    return ""


def pause_reading(running: Running, after: str = "") -> str:
    """Stop a run that has just opened a snapshot, another one than ``after``; the snapshot's name."""

    def reading() -> bool:
        return snapshot_read(running.pid) not in ("", after)

    running.until("it reads a snapshot", reading).pause()
    return snapshot_read(running.pid)


def killed(blockbak: Blockbak, *words: object, env: dict[str, str] | None = None) -> None:
    """A run that something kills with SIGKILL on its way."""
    argv = [str(word) for word in words]
    status, out, err = blockbak.forks.run(argv, Path("/"), blockbak.exported | (env or {}))
    assert status == -9, f"it was not killed, but ended with {status}\n{out}{err}"


# --- what the machine holds -------------------------------------------------------------------------------


def suspended_path(name: str) -> Path:
    """Where the kernel says whether the device of a device-mapper name is suspended."""
    (found,) = (path.parent for path in Path("/sys/block").glob("dm-*/dm/name") if path.read_text().strip() == name)
    return found / "suspended"


def dm_name(group: Group, volume: str) -> str:
    return f"{group.name.replace('-', '--')}-{volume.replace('-', '--')}"


def mapped(group: Group) -> set[str]:
    """The group's volumes that are active, as device-mapper has them, without the stores of snapshots."""
    names = {path.read_text().strip() for path in Path("/sys/block").glob("dm-*/dm/name")}
    prefix = dm_name(group, "")
    parts = ("-cow", "-real", "-tpool", "_tdata", "_tmeta")
    return {name.removeprefix(prefix).replace("--", "-") for name in names if not name.endswith(parts)}


def check_gone(group: Group) -> None:
    """Nothing of any run is left on the machine."""
    left = [one["lv_name"] for one in lvs(group.name) if "blockbak" in one["lv_name"] or "blockbak" in one["lv_tags"]]
    assert left == []
    assert [name for name in mapped(group) if "blockbak" in name] == []
    assert suspended() == set()
    assert [path.name for path in RUN_FOLDER.iterdir()] == []


def check_repository(repository: Path) -> None:
    """Nothing unfinished is in it."""
    left = [path.name for path in repository.rglob("*") if ".partial" in path.name or path.name.endswith(".new")]
    assert left == []


# --- what came of it --------------------------------------------------------------------------------------


def check_point(blockbak: Blockbak, point: str, folder: Path, wanted: Fingerprint, expect: int = 0) -> Path:
    """A point restored to a new file has this content."""
    target = folder / f"restored-{point}"
    blockbak("restore", point, target, "--yes", expect=expect)
    assert difference(fingerprint(target), wanted) is None
    return target


# --- programs in the place of LVM's -----------------------------------------------------------------------


def instead(folder: Path, program: str, text: str) -> dict[str, str]:
    """A script that blockbak finds in the place of a program; the environment that makes it so.

    ``$PPID`` is blockbak itself, ``/usr/sbin/PROGRAM`` the real one.
    """
    where = folder / "bin"
    where.mkdir(exist_ok=True)
    script = where / program
    script.write_text(text)
    script.chmod(0o755)
    return {"PATH": f"{where}:{os.environ['PATH']}"}


KILL_BEFORE = "#!/bin/sh\nkill -KILL $PPID\n"
KILL_AFTER = '#!/bin/sh\n/usr/sbin/{program} "$@"\nkill -KILL $PPID\n'
KILL_SUSPENDED = """#!/usr/bin/python3 -IS
# Kills lvcreate while it holds the origin suspended, and then whom the test wants killed too. strace has it
# linger after each step it takes of device-mapper.
import os, signal, sys, time
linger = ["strace", "-o", "/dev/null", "-P", "/dev/mapper/control", "-e", "inject=ioctl:delay_exit=200000"]
child = os.spawnv(os.P_NOWAIT, "/usr/bin/strace", [*linger, "/usr/sbin/lvcreate", *sys.argv[1:]])
deadline = time.monotonic() + 100
with open({suspended!r}) as file:
    while True:
        file.seek(0)
        if file.read(1) == "1":
            break
        if time.monotonic() > deadline or os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("it was never seen suspended")
with open(f"/proc/{{child}}/task/{{child}}/children") as file:
    os.kill(int(file.read()), signal.SIGKILL)
os.waitpid(child, 0)
{then}
sys.exit(1)
"""
KILL_PARENT = "os.kill(os.getppid(), signal.SIGKILL)"
