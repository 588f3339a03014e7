"""The stage that images a disk from the initramfs, run in a root of its own as the initramfs would, by its shells."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from blockbak.flow import nextboot as flow
from blockbak.flow.context import Context
from blockbak.flow.nextboot import FOLDER, Finished
from blockbak.host import nextboot
from blockbak.host.device import Device, identity, look
from blockbak.host.nextboot import Installation
from blockbak.model.nextboot import Fact, Marks, Order, Place, stage_order
from blockbak.repository.local import Repository
from tests.conftest import Filesystem

STAGE = Path(nextboot.__file__).with_name("initramfs") / "stage"
SHELLS = {"dash": ["dash"], "busybox": ["busybox", "sh"]}
LIBRARY = re.compile(r"(/\S+) \(")
BEFORE = 1_777_000_000
"""When the orders of tests are given: seconds since 1970, in April 2026."""


def mark(device: Device, *facts: Fact) -> Marks:
    """A loop device has nothing but its content to be known by."""
    return Marks(
        disk_bytes=device.size, sector=device.logical_sector, partition=0, start=0, length=device.size,
        facts=facts or tuple(nextboot._contents(device)),
    )  # fmt: skip


@dataclass
class Boot:
    """An order for ``disk`` into a repository on a file system that is unmounted while the stage runs.

    With ``hooked`` the root holds nothing but what the hook of initramfs-tools put there, and busybox.
    ``run`` is one boot: what was said comes back. Nothing of it stays on the machine: mounts are in a namespace.
    """

    base: Path
    disk: Path
    store: Filesystem
    repository: Repository
    world: Context
    limit: int = 600
    marks: Marks | None = None
    nodes: Sequence[os.PathLike[str]] = ()
    shell: str = "dash"
    programs: dict[str, str] = field(default_factory=dict)
    order: Order | None = None
    hooked: bool = False

    @property
    def spool(self) -> Path:
        return Path(self.repository.path, FOLDER)

    def give(self) -> None:
        """Write the order into the repository."""
        device = look(str(self.disk))
        known = identity(device)
        self.order = Order(
            id="0b" * 16, boot="another boot", created=BEFORE, host=self.world.host, volume="disk",
            source=device.label, path=device.path, identity_kind=known.kind, identity_value=known.value,
            diskseq=0, length=device.size, logical=device.logical_sector, physical=device.physical_sector,
            limit=self.limit,
        )  # fmt: skip
        self.marks = self.marks or mark(device)
        flow._write_order(self.repository, str(self.spool), self.order)

    def place(self) -> Place:
        uuid = subprocess.run(
            ["blkid", "-c", "/dev/null", "-o", "value", "-s", "UUID", self.store.device],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        fstype = next(line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()
                      if line.split()[1] == str(self.store.where))  # fmt: skip
        inside = "/" + os.path.relpath(self.spool, self.store.where)
        return Place(fstype, uuid, "", inside, str(self.store.device))

    def run(self, *resume: str, unmount: bool = True) -> list[str]:
        """One boot: with the repository unmounted first, unless it is to be found as it is. What was said."""
        assert self.order is not None
        text = stage_order(
            replace_order(self.order, limit=self.limit), self.marks, self.place(), [], self.repository.path
        )
        if unmount:
            self.store.unmount()
        root = self.base / "initramfs"
        shutil.rmtree(root, ignore_errors=True)
        if self.hooked:
            self._hook(root, text.replace("WAIT=30", "WAIT=0"))
        for folder in ("usr", "proc", "sys", "dev", "run/initramfs/blockbak", "blockbak/bin", "etc", "tmp"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            if not (root / name).exists():
                (root / name).symlink_to(f"usr/{name}")
        shutil.copy(STAGE, root / "blockbak/stage")
        (root / "blockbak/order").write_text(text.replace("WAIT=30", "WAIT=0"))
        for name, script in self.programs.items():
            (root / "blockbak/bin" / name).write_text(script)
            (root / "blockbak/bin" / name).chmod(0o755)
        for node in (self.disk, self.store.device, *self.nodes):
            os.mknod(root / "dev" / Path(os.fspath(node)).name, 0o600 | stat.S_IFBLK, os.stat(node).st_rdev)
        for name, minor in (("null", 3), ("zero", 5)):
            os.mknod(root / "dev" / name, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        # A pipe keeps all that is written to it, as a screen does.
        os.mkfifo(root / "dev/console")
        console = os.open(root / "dev/console", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        mine = "true" if self.hooked else f"mount --rbind --make-rprivate /usr {root}/usr"
        stage = "/usr/lib/blockbak/stage" if self.hooked else "/blockbak/stage"
        script = (
            f"{mine} && mount --bind /proc {root}/proc && mount --rbind /sys {root}/sys &&"
            f' shell=$1 && shift && exec chroot {root} $shell {stage} "$@"'
        )
        with open(console, "rb", buffering=0) as screen:
            done = self._unshared(script, resume)
            self.console = (screen.read(1 << 16) or b"").decode()
        assert done.returncode == 0, done.stderr
        self.store.unmount()
        assert not os.path.ismount(root / "run/initramfs/blockbak/repository")
        clean = subprocess.run(["dumpe2fs", "-h", self.store.device], capture_output=True, text=True, check=False)
        self.left_clean = "needs_recovery" not in clean.stdout
        self.store.mount()
        said = root / "run/initramfs/blockbak/said"
        return [line.removeprefix("blockbak: ") for line in said.read_text().splitlines()] if said.exists() else []

    def _unshared(self, script: str, resume: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the stage in the root that was made for it."""
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", " ".join(SHELLS[self.shell]), *(resume or ("", ""))],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=240,
        )  # fmt: skip

    def _hook(self, root: Path, order: str) -> None:
        """Have the hook fill the root, as mkinitramfs would; what it takes from is seen by nobody else."""
        for folder in ("usr/bin", "usr/lib", "usr/lib64", "usr/sbin"):
            (root / folder).mkdir(parents=True)
        for name in ("bin", "sbin", "lib", "lib64"):
            (root / name).symlink_to(f"usr/{name}")
        given = self.base / "given"
        shutil.rmtree(given, ignore_errors=True)
        (given / "blockbak").mkdir(parents=True)
        (given / "blockbak/order").write_text(order)
        shutil.copy(STAGE, given / "blockbak/stage")
        shutil.copy(STAGE.with_name("hook"), given / "hook")
        script = f"mount --bind {given} /etc/initramfs-tools && exec sh -eu /etc/initramfs-tools/hook"
        told = {**os.environ, "DESTDIR": str(root), "version": os.uname().release, "verbose": "n"}
        subprocess.run(["unshare", "--mount", "sh", "-c", script], env=told, check=True)
        # A shell, and no more: programs are what the stage brings itself.
        busybox = shutil.which("busybox")
        assert busybox is not None
        shutil.copy(busybox, root / "usr/bin/busybox")
        for library in LIBRARY.findall(
            subprocess.run(["ldd", busybox], capture_output=True, text=True, check=True).stdout
        ):
            copy = root / library.lstrip("/")
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(library, copy)

    def finish(self) -> Finished:
        """What the next run of blockbak makes of it."""
        machine = self.base / "machine"
        machine.mkdir(exist_ok=True)
        world = replace(self.world, now=lambda: datetime.now(UTC))
        return flow.finish(self.repository, world, installation=Installation(str(machine)))


def replace_order(order: Order, **changes: Any) -> Order:
    """The order with other values."""
    return Order(**{name: getattr(order, name) for name in order.__struct_fields__} | changes)
