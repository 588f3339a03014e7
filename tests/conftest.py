"""What every test gets: a check that it leaves nothing behind, real loop devices, file systems, a seed."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from blockbak.host.signals import ENDING

TESTS = Path(__file__).parent

# Levels are folders; the marker of the same name is set here, so that it cannot be forgotten.
LEVELS = ("unit", "golden", "contract", "fault", "history", "cli", "host", "vm")

SEED = int(os.environ.get("BLOCKBAK_TEST_SEED") or random.SystemRandom().randrange(2**30))


def pytest_configure(config: pytest.Config) -> None:
    """Under nohup, or behind a script that runs the tests in its background, signals are ignored, and every
    child would inherit that. A handler of ours is none for a child. Ctrl-C is what Python makes of it.
    """
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else lambda *_: None)
    # Its import takes ten seconds in the virtual machine, where nobody needs it.
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import settings

        # A deadline for one example would fail on a machine that is busy with something else.
        settings.register_profile("blockbak", deadline=None, print_blob=True)
        settings.load_profile("blockbak")


def pytest_report_header() -> str:
    return f"seed: {SEED} (replay with BLOCKBAK_TEST_SEED={SEED})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        level = item.path.relative_to(TESTS).parts[0]
        if level in LEVELS:
            item.add_marker(level)
        if {"loop", "tmpfs", "as_root"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("root")


@pytest.fixture
def seed() -> int:
    """The run's seed: every test that rolls dice rolls them from it."""
    return SEED


@pytest.fixture
def rng(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """Dice of the test's own: the same seed gives the same throws, whatever else ran before."""
    return random.Random(f"{seed} {request.node.nodeid}")


# --- nothing is left behind -------------------------------------------------------------------


@dataclass(frozen=True)
class Leftovers:
    """Loop devices and mounts that belong to a directory, processes that belong to the tests, and plain files where
    only nodes of devices should be: one of them keeps the kernel from making the node of that name.
    """

    loops: frozenset[tuple[str, str]]
    mounts: frozenset[tuple[str, str]]
    children: frozenset[psutil.Process]
    files: frozenset[str]

    def __sub__(self, other: Leftovers) -> Leftovers:
        return Leftovers(
            self.loops - other.loops, self.mounts - other.mounts, self.children - other.children,
            self.files - other.files,
        )  # fmt: skip

    def __bool__(self) -> bool:
        return bool(self.loops or self.mounts or self.children or self.files)

    def __str__(self) -> str:
        lines = [f"loop device {name} of {file}" for name, file in sorted(self.loops)]
        lines += [f"mount {where} of {source}" for where, source in sorted(self.mounts)]
        lines += [f"process {child.pid}: {_command(child)}" for child in self.children]
        lines += [f"the plain file {file}" for file in sorted(self.files)]
        return "left behind: " + "; ".join(lines)

    def remove(self) -> None:
        """Clear away what one test left, so that only that test fails."""
        for child in self.children:
            try:
                child.kill()
                child.wait(5)
            except psutil.Error:
                continue
        # The last mounted comes off first: it may lie in an earlier one.
        for where, _ in sorted(self.mounts, key=lambda mount: len(mount[0]), reverse=True):
            subprocess.run(["umount", "--lazy", where], check=False)
        for name, _ in self.loops:
            subprocess.run(["losetup", "--detach", f"/dev/{name}"], check=False)
        for file in self.files:
            Path(file).unlink(missing_ok=True)


def leftovers(directory: Path) -> Leftovers:
    """What there is now below ``directory``; other people's devices and mounts do not count."""
    below = f"{directory}/"
    loops = set()
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            # The kernel appends " (deleted)" to the name of a file that is gone.
            file = entry.read_text().rstrip("\n")
        except OSError:
            continue  # detached meanwhile
        if file.startswith(below):
            loops.add((entry.parts[3], file))
    names = {f"/dev/{name}" for name, _ in loops}
    mounts = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, origin = line.partition(" - ")
        where, source = _unescape(fields.split()[4]), _unescape(origin.split()[1])
        if where.startswith(below) or source in names:
            mounts.add((where, source))
    children = set()
    for pid in descendants(os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            child = psutil.Process(pid)
            if child.status() != psutil.STATUS_ZOMBIE:
                children.add(child)
    with os.scandir("/dev") as nodes:
        files = {node.path for node in nodes if node.is_file(follow_symlinks=False)}
    return Leftovers(frozenset(loops), frozenset(mounts), frozenset(children), frozenset(files))


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def descendants(pid: int) -> Iterator[int]:
    """The processes below one. (psutil looks at every process of the machine, twice for each of thousands of tests.)"""
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            for child in map(int, task.read_text().split()):
                yield child
                yield from descendants(child)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return "(ended meanwhile)"


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Temporary files of the code under test, and of programs it starts, go where leftovers are looked for."""
    base = tmp_path_factory.getbasetemp().resolve()
    place = base / "tmp"
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place))
        patch.setattr(tempfile, "tempdir", None)
        yield base


@pytest.fixture(autouse=True)
def no_leftovers(temporary_files: Path) -> Iterator[None]:
    """Fail the test that leaves a loop device, a mount or a running process behind."""
    before = leftovers(temporary_files)
    yield
    # A process that was told to end, and a loop device that was detached, take a moment.
    deadline = time.monotonic() + 2
    while (left := leftovers(temporary_files) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    if left:
        told = str(left)
        left.remove()
        pytest.fail(told, pytrace=False)


# --- devices ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A loop device of the test's own; usable wherever a path is."""

    path: str
    file: Path
    size: int
    sector_size: int

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path


def _run(*argv: str | os.PathLike[str]) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, argv))} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def as_root() -> None:
    """Fail where the test cannot run: a test that is skipped proves nothing."""
    if os.geteuid() != 0:
        pytest.fail("this test needs root; scripts/test --quick runs those that do not", pytrace=False)


def _detach(device: str) -> None:
    _run("losetup", "--detach", device)
    backing = Path("/sys/block", Path(device).name, "loop/backing_file")
    # The kernel lets go only after the last user has, who may be one of udev's on a machine that is emulated.
    deadline = time.monotonic() + 15
    while backing.exists():
        if time.monotonic() > deadline:
            pytest.fail(f"{device} is still held by something after it was detached")
        time.sleep(0.02)


@pytest.fixture
def loop(as_root: None, no_leftovers: None, tmp_path: Path) -> Iterator[Callable[..., Loop]]:
    """``loop(size, sector_size=512, direct=True)`` makes a loop device; all are detached afterwards.

    ``direct`` has the device bypass the page cache of its file, as a disk would. ``file`` gives the
    backing file, which is else made, sparse. ``read_only`` is what it says.
    """
    with ExitStack() as undo:

        def make(
            size: int,
            sector_size: int = 512,
            *,
            direct: bool = True,
            file: Path | None = None,
            read_only: bool = False,
        ) -> Loop:
            if file is None:
                number = sum(1 for _ in tmp_path.glob("loop-*.img"))
                file = tmp_path / f"loop-{number}.img"
                with file.open("xb") as made:
                    made.truncate(size)
            options = [f"--sector-size={sector_size}", f"--direct-io={'on' if direct else 'off'}"]
            if read_only:
                options.append("--read-only")
            device = _run("losetup", "--find", "--show", *options, file)
            undo.callback(_detach, device)
            return Loop(device, file, size, sector_size)

        yield make


@dataclass
class Filesystem:
    """A file system on a device, mounted at ``where``."""

    device: Loop
    where: Path
    options: str = "defaults"

    def mount(self) -> None:
        """Mount it; it was made mounted, so this comes after ``unmount``."""
        _run("mount", "-o", self.options, self.device, self.where)

    def unmount(self) -> None:
        """Unmount it, if it is mounted: a test may do this, and the fixture does it at the end."""
        if os.path.ismount(self.where):
            _run("umount", self.where)


def _filesystems(tmp_path: Path, *mkfs: str, options: str = "defaults") -> Iterator[Callable[..., Filesystem]]:
    with ExitStack() as undo:

        def make(device: Loop, *more: str) -> Filesystem:
            _run(*mkfs, *more, device)
            where = tmp_path / f"mount-{Path(device.path).name}"
            where.mkdir(exist_ok=True)
            made = Filesystem(device, where, options)
            undo.callback(made.unmount)
            made.mount()
            return made

        yield make


@pytest.fixture
def ext4(loop: object, tmp_path: Path) -> Iterator[Callable[..., Filesystem]]:
    """``ext4(device, *mkfs_options)`` makes and mounts one; it is unmounted afterwards."""
    # Lazy initialisation would go on writing to an idle device after the mount.
    yield from _filesystems(tmp_path, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0")


@pytest.fixture
def xfs(loop: object, tmp_path: Path) -> Iterator[Callable[..., Filesystem]]:
    """``xfs(device, *mkfs_options)``, the same; mkfs wants 300 MiB."""
    # A restored copy carries the identity of its source, which may be mounted beside it.
    yield from _filesystems(tmp_path, "mkfs.xfs", "-q", "-f", options="nouuid")


@pytest.fixture
def btrfs(loop: object, tmp_path: Path) -> Iterator[Callable[..., Filesystem]]:
    """``btrfs(device, *mkfs_options)``, the same; mkfs wants 109 MiB."""
    yield from _filesystems(tmp_path, "mkfs.btrfs", "-q", "-f")


@pytest.fixture
def tmpfs(as_root: None, no_leftovers: None, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """``tmpfs(size, *mount_options)`` mounts one and gives its directory; it is unmounted afterwards."""
    with ExitStack() as undo:

        def make(size: int, *more: str) -> Path:
            where = tmp_path / f"tmpfs-{sum(1 for _ in tmp_path.glob('tmpfs-*'))}"
            where.mkdir()
            _run("mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", "mode=0700", *more]), "tmpfs", where)
            undo.callback(_run, "umount", where)
            return where

        yield make
