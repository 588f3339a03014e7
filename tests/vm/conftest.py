"""Volume groups on loop devices, the installed program, and a check that neither leaves anything behind.

All of this runs inside the virtual machine, where every device-mapper device is a test's.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli import program
from tests.cli.program import Ended
from tests.conftest import Loop
from tests.host.stage import Forks

MIB = 1 << 20
LIMIT_SECONDS = 240
"""What a run of blockbak may take where each of its instructions is emulated."""
SETTLE_SECONDS = 15
"""What a device or process that was told to go may take, for the same reason."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What has the machine started anew comes last."""
    items.sort(key=lambda item: item.get_closest_marker("before_boot") is not None)


def run(*words: object, expect: int = 0) -> str:
    """Run a program; what it wrote to standard output, stripped."""
    argv = [str(word) for word in words]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == expect, f"{' '.join(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def lvs(*words: object) -> list[dict[str, str]]:
    """The logical volumes, hidden ones too, as LVM reports them; sizes are bytes."""
    told = run("lvs", "-a", "--reportformat", "json", "--units", "b", "--nosuffix", "-o", FIELDS, *words)
    return json.loads(told)["report"][0]["lv"]


FIELDS = "vg_name,lv_name,lv_uuid,lv_attr,lv_size,origin,pool_lv,snap_percent,lv_tags,lv_dm_path"


# --- nothing is left behind -----------------------------------------------------------------------------


def suspended() -> set[str]:
    """The device-mapper devices that are suspended: whatever reads or writes them hangs."""
    return {
        (path.parent / "name").read_text().strip()
        for path in Path("/sys/block").glob("dm-*/dm/suspended")
        if path.read_text().strip() == "1"
    }


def things() -> set[tuple[str, str]]:
    """Each device-mapper device, loop device, mount and process of a test there is now. A volume group has these."""
    found = {("device-mapper device", path.read_text().strip()) for path in Path("/sys/block").glob("dm-*/dm/name")}
    found |= {("loop device", path.parts[3]) for path in Path("/sys/block").glob("loop*/loop/backing_file")}
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found |= {("mount", line.split()[4]) for line in mounts}
    return found | {("process", f"{one.pid} {one.name()}") for one in orphans()}


def orphans() -> Iterator[psutil.Process]:
    """Processes that a test started, by what they inherit, though their parent may have ended."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        # psutil would look at much more of each of all the kernel's own.
        with suppress(OSError, psutil.Error):
            if b"\0PYTEST_CURRENT_TEST=" in b"\0" + path.read_bytes() and path.parts[2] != str(os.getpid()):
                yield psutil.Process(int(path.parts[2]))


def of_blockbak() -> list[str]:
    """What blockbak may never leave, in sentences: volumes with its tag, and suspended devices."""
    tagged = [f"logical volume {one['vg_name']}/{one['lv_name']}" for one in lvs("-S", "lv_tags=blockbak")]
    return tagged + [f"suspended device {name}" for name in sorted(suspended())]


def clear(left: set[tuple[str, str]]) -> None:
    """Take away what is left, so that only one test fails for it."""
    # Not every orphan: the process that forks the program serves all tests.
    for pid in (int(name.split()[0]) for kind, name in left if kind == "process"):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for name in suspended():
        subprocess.run(["dmsetup", "resume", name], check=False)
    for where in sorted((name for kind, name in left if kind == "mount"), reverse=True):
        subprocess.run(["umount", "--lazy", where], check=False)
    for group in run("vgs", "--noheadings", "-o", "vg_name").split():
        subprocess.run(["vgremove", "--force", "--force", "--yes", group], check=False)
    # One lies upon another: each round takes those off that have nothing on them any more.
    for _ in left:
        for kind, name in left:
            if kind == "device-mapper device":
                subprocess.run(["dmsetup", "remove", "--retry", name], check=False, stderr=subprocess.DEVNULL)
    for kind, name in left:
        if kind == "loop device":
            subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=False)


@pytest.fixture(autouse=True)
def nothing_left(no_leftovers: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test after which the machine holds more than before. What is left for the boot, the boot takes."""
    before = things()
    yield
    if request.node.get_closest_marker("before_boot") is not None:
        return
    deadline = time.monotonic() + SETTLE_SECONDS
    while (left := things() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        clear(left)
        pytest.fail("left behind: " + "; ".join(f"{kind} {name}" for kind, name in sorted(left)), pytrace=False)


# --- volume groups --------------------------------------------------------------------------------------


@pytest.fixture
def loop_pv(loop: Callable[..., Loop]) -> Callable[..., Loop]:
    """``loop_pv(size, sector=512)`` makes a physical volume on a loop device of such sectors."""

    def make(size: int, sector: int = 512) -> Loop:
        device = loop(size, sector_size=sector)
        run("pvcreate", "--quiet", "--yes", device)
        return device

    return make


@dataclass(frozen=True)
class Group:
    """A volume group. ``/dev/NAME/VOLUME`` is a volume's path, as for any other."""

    name: str
    sector: int

    def path(self, volume: str) -> str:
        return f"/dev/{self.name}/{volume}"

    def volume(self, name: str, size: int, *options: object) -> str:
        """Make a logical volume; its path."""
        # Whatever earlier tests left on the disk below is no signature to be asked about.
        run("lvcreate", "--quiet", "--yes", "-n", name, "-L", f"{size}b", *options, self.name)
        return self.path(name)

    def snapshot(self, origin: str, name: str, size: int, *options: object) -> str:
        """Make a classic snapshot with ``size`` bytes of room for what changes; its path."""
        run("lvcreate", "--quiet", "--yes", "-s", "-n", name, "-L", f"{size}b", *options, f"{self.name}/{origin}")
        return self.path(name)

    def pool(self, name: str, size: int, *options: object) -> str:
        """Make a thin pool; its name."""
        run("lvcreate", "--quiet", "--yes", "--type", "thin-pool", "-n", name, "-L", f"{size}b", *options, self.name)
        return name

    def thin(self, pool: str, name: str, size: int, *options: object) -> str:
        """Make a thin volume; its path."""
        run("lvcreate", "--quiet", "--yes", "-n", name, "-V", f"{size}b", "-T", *options, f"{self.name}/{pool}")
        return self.path(name)

    def thin_snapshot(self, origin: str, name: str, *options: object) -> str:
        """Make a thin snapshot that is active; its path."""
        run("lvcreate", "--quiet", "--yes", "-s", "-kn", "-n", name, *options, f"{self.name}/{origin}")
        return self.path(name)

    def lvs(self, *words: object) -> dict[str, dict[str, str]]:
        """What LVM reports of its volumes, by their names; hidden ones are in brackets."""
        return {one["lv_name"]: one for one in lvs(*words, self.name)}

    def remove(self) -> None:
        """Remove it, if it is there, with all its volumes. Fails, once that is done, if something of blockbak's was."""
        left = of_blockbak()
        # Nothing of a group with a suspended device could be removed.
        for name in suspended():
            run("dmsetup", "resume", name)
        done = subprocess.run(
            ["vgremove", "--quiet", "--force", "--force", "--yes", self.name],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or f'"{self.name}" not found' in done.stderr, done.stderr
        if left:
            pytest.fail("blockbak left behind: " + "; ".join(left), pytrace=False)


_NUMBERS = itertools.count(1)


@pytest.fixture
def make_group(loop: Callable[..., Loop]) -> Iterator[Callable[..., Group]]:
    """``make_group(sector=512, size=1 GiB, disks=1)`` makes a volume group; it is removed afterwards.

    A test may remove it itself. The names have a hyphen in them, which device-mapper's names double.
    """
    with ExitStack() as undo:

        def make(sector: int = 512, size: int = 1024 * MIB, disks: int = 1) -> Group:
            group = Group(f"bb-{os.getpid():x}-{next(_NUMBERS)}", sector)
            # It makes the physical volumes itself; each of LVM's commands takes a second in here.
            run("vgcreate", "--quiet", "--yes", group.name, *(loop(size, sector_size=sector) for _ in range(disks)))
            undo.callback(group.remove)
            return group

        yield make


@pytest.fixture
def group(make_group: Callable[..., Group]) -> Group:
    """A volume group of 1 GiB with sectors of 4096 bytes; most others have 512."""
    return make_group(4096)


# --- the program ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def forks(temporary_files: Path) -> Iterator[Forks]:
    """A process that has imported the installed program: where each instruction is emulated, that takes seconds."""
    folder = temporary_files / "forks"
    folder.mkdir()
    made = Forks(folder)
    yield made
    made.end()


@dataclass
class Blockbak:
    """The installed program, with what a person would have exported. ``expect=None`` takes every exit status."""

    forks: Forks
    exported: dict[str, str]

    def __call__(self, *words: object, expect: int | None = 0) -> Ended:
        """Run it to its end, in a child of a process that has imported it."""
        argv = [str(word) for word in words]
        status, out, err = self.forks.run(argv, Path("/"), self.exported)
        return self._expected(program.must_hold(Ended(tuple(argv), status, out, err)), expect)

    def json(self, *words: object, expect: int | None = 0) -> Any:
        """The same with ``--json``; its document."""
        return self(*words, "--json", expect=expect).document

    def command(self, *words: object, expect: int | None = 0) -> Ended:
        """Run the command itself, as a shell would; for what the start or the environment has a part in."""
        argv = [str(word) for word in words]
        ended = program.run(*argv, program=("blockbak",), env=self.exported, limit=LIMIT_SECONDS)
        return self._expected(ended, expect)

    def _expected(self, ended: Ended, expect: int | None) -> Ended:
        assert expect is None or ended.status == expect, f"not {expect}: {ended}"
        return ended


@pytest.fixture
def run_blockbak(forks: Forks, tmp_path: Path) -> Blockbak:
    """``run_blockbak("devices")`` runs the installed program; ``.json("devices")`` gives its document."""
    return Blockbak(forks, {"BLOCKBAK_STATE_DIR": str(tmp_path / "state")})


@pytest.fixture
def repository(run_blockbak: Blockbak, tmp_path: Path) -> Path:
    """A new repository on the machine's own disk; ``run_blockbak`` uses it from then on."""
    where = tmp_path / "repository"
    run_blockbak("init", where)
    run_blockbak.exported["BLOCKBAK_REPO"] = str(where)
    return where
