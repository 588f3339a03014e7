"""A machine with everything on it that a cold backup brings to rest, and a child that is killed while it does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockbak.host import quiesce, runner
from blockbak.host.kernel import Kernel
from blockbak.host.quiesce import Machine, Rest
from blockbak.host.system import System
from blockbak.model.quiesce import (
    DetachLoop,
    EndProcess,
    Freeze,
    Plan,
    ReadOnly,
    RunHook,
    Step,
    StopUnits,
    SwapOff,
    Unmount,
)
from tests.systemd import FakeSystemd

DEADLINE = 60.0


def sh(*argv: object) -> str:
    words = [str(word) for word in argv]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout.strip()


def never() -> None:
    pass


# --- killed at a moment ------------------------------------------------------------------------------------


class Moments:
    """Counts what is done that lasts, and kills this process just before the ``at``-th of it: which is just after
    the one before.
    """

    def __init__(self, at: int) -> None:
        self.left = at

    def pass_(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def run(self, argv: Sequence[str], **how: Any) -> runner.Completed:
        if "show" in argv:  # looks, and changes nothing
            return runner.run(argv, **how)
        self.pass_()
        return runner.run(argv, **how)


class CountedKernel(Kernel):
    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        self._moments.pass_()
        return super().pwritev(fd, buffers, offset)

    def allocate(self, fd: int, size: int) -> None:
        self._moments.pass_()
        super().allocate(fd, size)

    def unlink(self, path: str) -> None:
        self._moments.pass_()
        super().unlink(path)


def in_child(act: Callable[[], None]) -> int:
    """Do it in a process of its own; how that ended, as waitstatus_to_exitcode has it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            act()
            status = 0
        except BaseException as error:  # noqa: BLE001 - told by the exit status, and here
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- the machine ------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """Devices, mounts, swap and units of a test; ``close`` takes all of it away, however it stands."""

    directory: Path
    systemd: FakeSystemd
    steps: list[Step] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)

    def machine(self, **more: Any) -> Machine:
        facts = {
            "state_dir": str(self.directory / "state"), "run_dir": str(self.directory / "run"), "boot": System().boot,
            "host": "test", "unit_dir": str(self.directory / "units"), "root": Path(self.systemd.root),
        }  # fmt: skip
        return Machine(**(facts | more))

    def resting(self, machine: Machine | None = None, steps: Sequence[Step] | None = None, **more: Any):
        how = {"device": "/dev/test", "run_id": "5a4e", "deadline": DEADLINE, "say": lambda _: None, "check": never}
        plan = Plan(tuple(self.steps if steps is None else steps))
        return quiesce.brought_to_rest(plan, machine or self.machine(), **(how | more))

    def put_back(self, machine: Machine | None = None) -> quiesce.Outcome:
        machine = machine or self.machine()
        done, left = [], []
        for one in quiesce.unfinished(machine):
            outcome = quiesce.put_back(one, machine)
            done += outcome.done
            left += outcome.left
        return quiesce.Outcome(done, left)

    # --- made -------------------------------------------------------------------------------------------

    def attached(self, name: str, size: int, *options: str, folder: Path | None = None) -> tuple[str, Path]:
        """A loop device over a new file."""
        file = (folder or self.directory) / name
        with file.open("xb") as made:
            made.truncate(size)
        device = sh("losetup", "--find", "--show", *options, file)
        self.stack.callback(subprocess.run, ["losetup", "--detach", device], check=False, capture_output=True)
        self.stack.callback(_detach_all_of, str(file))
        return device, file

    def mounted(self, name: str, *argv: object) -> Path:
        """``mount`` with these words, at a new directory of that name."""
        target = self.directory / name
        target.mkdir(exist_ok=True)
        self.stack.callback(_unmount_all, str(target))
        sh("mount", *argv, target)
        return target

    def filesystem(self, name: str, kind: str, options: str = "defaults", size: int = 32 << 20) -> tuple[str, Path]:
        """A new file system, mounted; its device and where."""
        device, _ = self.attached(f"{name}.img", size)
        quick = {"ext4": ("-q", "-F"), "xfs": ("-q", "-f"), "btrfs": ("-q", "-f")}[kind]
        sh(f"mkfs.{kind}", *quick, device)
        return device, self.mounted(name, "-o", options, device)

    def unmount_step(self, target: Path, origin: str = "") -> Unmount:
        line = [one for one in System().mounts if one.target == str(target)][-1]
        tags = " ".join(line.tags)
        return Unmount(
            line.target, line.source, line.fstype, line.options, line.root, origin, f"id of {line.source}", tags
        )

    # --- looked at --------------------------------------------------------------------------------------

    def picture(self) -> dict[str, Any]:
        """All that must be as before: mounts with their options, swap, loop devices, units, who can write."""
        below = f"{self.directory}/"
        lines = [one for one in System().mounts if one.target.startswith(below)]
        loops = json.loads(sh("losetup", "--list", "--json") or '{"loopdevices": []}')["loopdevices"]
        return {
            "mounts": sorted((one.target, one.root, one.fstype, one.source, one.options, one.tags) for one in lines),
            "utab": sorted(row for row in _rows("/run/mount/utab") if below in row),
            "swaps": sorted((-int(row[4]), row[0]) for row in _swaps() if self._is_ours(row[0])),
            "loops": sorted((one for one in loops if one["back-file"].startswith(below)), key=str),
            "units": self.systemd.states(),
            "frozen": [
                one.target for one in lines if one.writable and one.options[0] == "rw" and _is_frozen(one.target)
            ],
        }

    def _is_ours(self, path: str) -> bool:
        file = System().loops.get(os.path.basename(path), path)
        return file.startswith(f"{self.directory}/")

    def nothing_left(self) -> None:
        """No journal, no unit for the boot, nothing of the guardian."""
        assert list((self.directory / "state/rest").glob("*")) == []
        assert [one for one in (self.directory / "units").rglob("*") if not one.is_dir()] == []
        deadline = time.monotonic() + 10
        while (left := list((self.directory / "run").glob("*"))) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []

    def close(self) -> None:
        for row in _swaps():
            if self._is_ours(row[0]):
                subprocess.run(["swapoff", row[0]], check=False)
        for line in System().mounts:
            if line.target.startswith(f"{self.directory}/"):
                subprocess.run(["fsfreeze", "--unfreeze", line.target], check=False, capture_output=True)
        self.stack.close()


def _rows(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []


def _swaps() -> list[list[str]]:
    return [row.split() for row in _rows("/proc/swaps")[1:]]


def _is_frozen(target: str) -> bool:
    """Whether a write hangs."""
    writer = subprocess.Popen(["touch", f"{target}/written"])
    try:
        return writer.wait(2) != 0
    except subprocess.TimeoutExpired:
        subprocess.run(["fsfreeze", "--unfreeze", target], check=False, capture_output=True)
        writer.wait(10)
        return True


def _unmount_all(target: str) -> None:
    while target in [line.target for line in System().mounts]:
        if subprocess.run(["umount", target], check=False, capture_output=True).returncode:
            subprocess.run(["umount", "--lazy", target], check=True)


def _detach_all_of(file: str) -> None:
    for name, backing in System().loops.items():
        if backing == file:
            subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=False, capture_output=True)


def _remove_loop(node: str) -> None:
    fd = os.open("/dev/loop-control", os.O_RDWR)
    deadline = time.monotonic() + 10
    try:
        while True:
            try:
                fcntl.ioctl(fd, 0x4C81, int(node.removeprefix("/dev/loop")))  # linux/loop.h, LOOP_CTL_REMOVE
            except OSError as error:  # whoever lists loop devices opens each for a moment
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return
    finally:
        os.close(fd)


def stage_in(directory: Path) -> Iterator[Stage]:
    """An empty stage; cleared away afterwards, whatever became of it."""
    (directory / "units").mkdir()
    (directory / "run").mkdir(mode=0o700)
    (directory / "systemd").mkdir()
    stage = Stage(directory, FakeSystemd(directory / "systemd"))
    stage.systemd.install()
    try:
        yield stage
    finally:
        stage.close()


def furnish(stage: Stage) -> None:
    """A bit of everything, and the steps that bring it to rest, as a plan has them."""
    _, where = stage.filesystem("outer", "ext4", "noatime,nosuid,x-test.note=1")
    (where / "sub").mkdir()
    bind = stage.mounted("bind", "--bind", where / "sub")
    sh("mount", "-o", "remount,bind,ro,nosuid,noexec,noatime", bind)
    # A number that nobody else takes while it is free.
    inner, file = f"/dev/loop{300 + os.getpid() % 300}", where / "inner.img"
    with file.open("xb") as made:
        made.truncate(16 << 20)
    stage.stack.callback(_remove_loop, inner)
    sh("losetup", "--offset=4096", inner, file)
    stage.stack.callback(_detach_all_of, str(file))
    sh("mkfs.ext4", "-q", "-F", inner)
    nested = stage.mounted("outer/nested", inner)
    many, pool = stage.filesystem("pool", "btrfs", "noatime", size=128 << 20)
    sh("btrfs", "subvolume", "create", pool / "vol")
    volume = stage.mounted("volume", "-o", "subvol=vol,noatime", many)
    first, _ = stage.attached("first.swap", 8 << 20)
    second, _ = stage.attached("second.swap", 8 << 20)
    third, _ = stage.attached("third.swap", 8 << 20)
    for device, how in ((first, ()), (second, ("--priority=7",)), (third, ())):
        sh("mkswap", device)
        sh("swapon", *how, device)
    _, still = stage.filesystem("still", "ext4", "nodev")
    _, frozen = stage.filesystem("frozen", "ext4")
    stage.systemd.add("db.service")
    stage.systemd.add("db.socket")
    stage.systemd.add("idle.service", "inactive")
    hook = hook_in(stage, "log")
    direct = System().attribute(Path(inner).name, "loop/dio") == "1"
    stage.steps = [
        RunHook("log", str(hook), (("BLOCKBAK_MODE", "cold"), ("HOOK_LOG", str(stage.directory / "hook.log")))),
        StopUnits(("db.service", "db.socket", "idle.service"), ("db.service",)),
        SwapOff(first, next(int(row[4]) for row in _swaps() if row[0] == first), "", (third,)),
        SwapOff(second, 7),
        stage.unmount_step(volume),
        stage.unmount_step(pool),
        stage.unmount_step(nested),
        DetachLoop(inner, str(file), offset=4096, direct=direct),
        stage.unmount_step(bind, str(where / "sub")),
        stage.unmount_step(where),
        ReadOnly(str(still), "/dev/still"),
        Freeze(str(frozen), "/dev/frozen"),
    ]


def hook_in(stage: Stage, name: str, code: str = "") -> Path:
    """A hook that says in ``HOOK_LOG`` when it is called; in a directory that only root may write."""
    folder = Path("/var/lib/blockbak-test-hooks")
    folder.mkdir(mode=0o700, exist_ok=True)
    hook = folder / f"{name}-{os.getpid()}-{stage.directory.name}"
    hook.write_text(f'#!/bin/sh\necho "$BLOCKBAK_PHASE" >> "$HOOK_LOG"\n{code}\n')
    hook.chmod(0o755)

    def remove() -> None:
        hook.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()

    stage.stack.callback(remove)
    return hook


def process_step(process: subprocess.Popen[Any], name: str = "sleep") -> EndProcess:
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return EndProcess(process.pid, int(stat.rpartition(")")[2].split()[19]), name)


__all__ = ["CountedKernel", "Moments", "Rest", "Stage", "furnish", "in_child", "process_step", "sh", "stage_in"]
