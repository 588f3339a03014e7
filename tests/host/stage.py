"""What these tests share: the program as a child process, devices in some state, damage, an oracle."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockbak.host.blockio import StoredFile
from blockbak.image.reader import ImageReader
from blockbak.model import extent
from blockbak.repository.record import HEAD, HISTORY
from tests.patterns import SECTOR, explain, stamp

KIB = 1 << 10
MIB = 1 << 20

DIRT_SEED = 0xD187
"""Seed of what lay on a target before: a sector that was left says so itself."""


def run(*argv, stdin=""):
    done = subprocess.run([str(word) for word in argv], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (argv, done.stdout, done.stderr)
    return done.stdout


def settle(question, seconds=5.0):
    """The kernel lets go of a device a moment after its last user has."""
    deadline = time.monotonic() + seconds
    while not question() and time.monotonic() < deadline:
        time.sleep(0.02)
    return question()


# --- the program ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """How a run of the program ended."""

    exit: int
    document: Any
    said: str

    @property
    def error(self) -> dict[str, Any]:
        return self.document["error"]


class Forks:
    """Runs of the program as children of one process that has imported it."""

    def __init__(self, folder: Path, environment: dict[str, str] | None = None) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._number = 0
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def run(self, argv: list[str], where: Path, environment: dict[str, str]) -> tuple[int, bytes, bytes]:
        """Exit status, standard output and standard error of one run. ``environment`` is beside that of the process."""
        for file in (self._out, self._err):
            file.write_bytes(b"")
        status = self._ask(argv=argv, where=str(where), environment=environment, out=str(self._out), err=str(self._err))
        return int(status), self._out.read_bytes(), self._err.read_bytes()

    def begin(self, argv: list[str], where: Path, environment: dict[str, str], out: str, err: str) -> Forked:
        """A run beside the test, which says what it says into the files ``out`` and ``err``."""
        pid = self._ask(argv=argv, where=str(where), environment=environment, out=out, err=err, beside=True)
        return Forked(int(pid), lambda wait: self._ask(of=int(pid), wait=wait))

    def _ask(self, **request: object) -> str:
        self._number += 1
        print(json.dumps({"number": self._number, **request}), file=self._server.stdin, flush=True)
        # A run that a test did not wait for may have been answered meanwhile.
        for line in self._server.stdout:
            number, told = line.split()
            if int(number) == self._number:
                return told
        raise AssertionError("the process that runs the program ended")

    def end(self) -> None:
        self._server.communicate()


class Forked:
    """A run that another process is the parent of, as far as a test needs what subprocess.Popen gives."""

    def __init__(self, pid: int, ask: Callable[[bool], str]) -> None:
        self.pid, self._ask = pid, ask
        self._status: int | None = None

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._looked(wait=False)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it is over. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self._looked(wait=deadline is None)) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["blockbak"], timeout)
            time.sleep(0.02)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _looked(self, *, wait: bool) -> int | None:
        if self._status is None and (told := self._ask(wait)) != "runs":
            self._status = int(told)
        return self._status


@dataclass(frozen=True)
class Program:
    """The command line in a child process, with a repository and a state directory of the test's own."""

    forks: Forks
    repository: Path
    state: Path

    def __call__(self, *argv: object, expect: int = 0, where: Path | None = None) -> Done:
        words = ["-r", str(self.repository), *map(str, argv), "--json"]
        environment = {"BLOCKBAK_STATE_DIR": str(self.state)}
        status, out, err = self.forks.run(words, where or self.repository.parent, environment)
        told = " ".join(map(str, argv))
        assert status == expect, f"{told} ended with {status}, not {expect}:\n{out.decode()}{err.decode()}"
        return Done(status, json.loads(out), err.decode())

    def at(self, *, repository: Path | None = None, state: Path | None = None) -> Program:
        """The same with another repository or state directory."""
        return Program(self.forks, repository or self.repository, state or self.state)

    def backup(self, source: object, *options: object, expect: int = 0) -> dict[str, Any]:
        """Back up one source; its point."""
        (point,) = self("backup", source, *options, expect=expect).document["points"]
        return point

    def restore(self, point: str, target: object, *options: object, expect: int = 0) -> Done:
        """Restore over whatever is there."""
        return self("restore", point, target, "--yes", *options, expect=expect)

    def points(self) -> list[str]:
        """The points, oldest first."""
        return [one["point"] for one in self("list").document]

    def image(self, point: dict[str, Any]) -> Path:
        """The file that a report names."""
        return self.repository / point["volume"] / point["file"]

    def contents(self) -> dict[str, tuple[int, int, int]]:
        """Every file and directory of the repository, so that two moments can be compared. Locks are no content, nor is
        the history: it tells of what failed and was refused, too.
        """
        found = {}
        for path in sorted(self.repository.rglob("*")):
            info = path.stat()
            if path.name not in (".lock", HISTORY, HEAD):
                written = 0 if path.is_dir() else info.st_mtime_ns
                found[str(path.relative_to(self.repository))] = (info.st_ino, info.st_size, written)
        return found


# --- devices in some state --------------------------------------------------------------------------------


@contextlib.contextmanager
def partitioned(disk, *lines, label="gpt"):
    """The kernel's partitions of a loop device, by a table of sfdisk's; gone again afterwards."""
    table = "\n".join([f"label: {label}", *lines]) + "\n"
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, stdin=table)
    with partitions(disk, len(lines)) as nodes:
        yield nodes


@contextlib.contextmanager
def partitions(disk, count):
    """The kernel's partitions, by the table that is there."""
    nodes = [f"{disk}p{number}" for number in range(1, count + 1)]
    # A plain file of that name, which somebody made by writing to a partition that was gone, stays in the node's place.
    assert not [node for node in nodes if Path(node).is_file()]
    run("partx", "--update", disk)
    try:
        yield nodes
    finally:
        run("partx", "--delete", disk)


@contextlib.contextmanager
def mounted(what, where, *options):
    where.mkdir(exist_ok=True)
    run("mount", *options, what, where)
    try:
        yield where
    finally:
        run("umount", where)


@contextlib.contextmanager
def swapping(where):
    """Swap on a device or file, for as long as it takes."""
    run("mkswap", where)
    run("swapon", where)
    try:
        yield where
    finally:
        run("swapoff", where)


@contextlib.contextmanager
def attached(file, *options, node=None):
    """A loop device on a file: the ``node`` that is asked for, or a free one; let go of in the end."""
    if node is None:
        node = run("losetup", "--find", "--show", *options, file).strip()
    else:
        run("losetup", *options, node, file)
    try:
        yield node
    finally:
        run("losetup", "--detach", node)
        backing = Path("/sys/block", Path(node).name, "loop/backing_file")
        assert settle(lambda: not backing.exists()), f"{node} is still held after it was detached"


_LOOP_CTL_ADD, _LOOP_CTL_REMOVE = 0x4C80, 0x4C81
"""linux/loop.h."""


@contextlib.contextmanager
def spare_node(numbers=None):
    """A loop node without a file, of the first free of ``numbers``: of those that ``losetup --find`` comes to last."""
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        for number in numbers or itertools.count(1000 + os.getpid() % 1000):
            try:
                fcntl.ioctl(control, _LOOP_CTL_ADD, number)
                break
            except FileExistsError:
                continue
        yield f"/dev/loop{number}"

        def removed():
            with contextlib.suppress(OSError):  # not yet, or it was removed the last time
                fcntl.ioctl(control, _LOOP_CTL_REMOVE, number)
            return not Path(f"/sys/block/loop{number}").exists()

        assert settle(removed)
    finally:
        os.close(control)


LOCKERS = {
    "flock": "fcntl.flock(file, fcntl.LOCK_SH)",
    "posix": "fcntl.lockf(file, fcntl.LOCK_EX)",
    # fcntl.h: F_OFD_SETLK, as qemu locks its images.
    "ofd": "fcntl.fcntl(file, 37, struct.pack('=hhqqi4x', fcntl.F_WRLCK, 0, 100, 1, 0))",
}


@contextlib.contextmanager
def other_process(code, *argv):
    """A Python of its own that runs ``code`` up to where it waits for its input to end; its pid."""
    # Not of one job with whatever the test runs.
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, argv)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "ready\n"
        try:
            yield other.pid
        finally:
            other.communicate("")


@contextlib.contextmanager
def locking(how, path):
    code = (
        "import fcntl, struct, sys; file = open(sys.argv[1], 'r+b', buffering=0); "
        f"{LOCKERS[how]}; print('ready', flush=True); sys.stdin.read()"
    )
    with other_process(code, path) as pid:
        yield pid


_WRITER = """
import mmap, os, select, sys
page = mmap.mmap(-1, 4096)
page[:] = b"w" * 4096
file = os.open(sys.argv[1], os.O_WRONLY | os.O_DIRECT)
os.pwritev(file, [page], 0)
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    os.pwritev(file, [page], 0)
"""


@contextlib.contextmanager
def writing(path):
    """Another process that writes the first page of a device or file over and over."""
    with other_process(_WRITER, path) as pid:
        yield pid


def pv_label(group):
    """A physical volume's first mebibyte, as lvm2 lays it out; what is read of it is tested elsewhere."""
    data = bytearray(MIB)
    data[512:520], data[536:544], data[544:576] = b"LABELONE", b"LVM2 001", b"x" * 32
    for place, value in ((584, MIB // 2), (616, 4096), (624, 65536)):
        data[place : place + 8] = value.to_bytes(8, "little")
    data[4100:4116] = b"\x20LVM2\x20x[5A%r0N*>"
    text = f"{group} {{\n".encode()
    for place, value in ((4136, 512), (4144, len(text))):
        data[place : place + 8] = value.to_bytes(8, "little")
    data[4608 : 4608 + len(text)] = text
    return bytes(data)


def md_superblock(name, place):
    """An array member's superblock of version 1.x, as it lies at byte ``place``."""
    block = bytearray(256)
    block[0:8] = bytes.fromhex("fc4e2ba901000000")
    block[32 : 32 + len(name)] = name.encode()
    block[144:152] = (place // 512).to_bytes(8, "little")
    return bytes(block)


def put(path, offset, data):
    """Write to a device or file, and have it reach the device."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, memoryview(data)[done:], offset + done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dirty(path, size):
    """Leave nothing of a device or file as it was, and no sector zero."""
    part = stamp(0, MIB // SECTOR, 1, DIRT_SEED)
    for start in range(0, size, MIB):
        put(path, start, part[: min(MIB, size - start)])


def sha(path):
    """What a device or file holds, told by nothing of blockbak's."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def counters(device):
    """Sectors (of 512 bytes) the kernel has read from and written to a device (Documentation/block/stat.rst)."""
    fields = Path("/sys/block", Path(device).name, "stat").read_text().split()
    return int(fields[2]), int(fields[6])


# --- the oracle -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a device of stamped sectors held at one moment: each sector's sequence, 0 for zeros."""

    sequence: Any
    seed: int

    def data(self) -> bytes:
        """The bytes themselves."""
        found = np.frombuffer(stamp(0, len(self.sequence), self.sequence, self.seed), np.uint8)
        return (found.reshape(-1, SECTOR) * (self.sequence != 0)[:, None]).astype(np.uint8).tobytes()

    def wrong(self, path, lost=()) -> str | None:
        """What is wrong with the first sector that is not as it was; sectors in ``lost`` (byte ranges) must be zeros."""
        expected = self.sequence.copy()
        for start, end in lost:
            expected[start // SECTOR : end // SECTOR] = 0
        with open(path, "rb", buffering=0) as file:
            for low, high in zip(*_runs(expected != 0), strict=True):
                # Longer parts would be held several times over in memory.
                for first in range(low, high, 16 * MIB // SECTOR):
                    last = min(first + 16 * MIB // SECTOR, high)
                    file.seek(first * SECTOR)
                    data = file.read((last - first) * SECTOR)
                    if len(data) != (last - first) * SECTOR:
                        return f"it ends before sector {last}"
                    told = _part(data, first, expected[first:last], self.seed)
                    if told:
                        return told
        return None


def _part(data, first, sequence, seed):
    if sequence[0]:
        return explain(data, first, sequence, seed)
    words = np.frombuffer(data, np.uint8).reshape(-1, SECTOR).any(axis=1)
    return f"sector {first + int(words.argmax())} is not all zeros" if words.any() else None


def _runs(mask):
    starts, ends = extent.runs(mask)
    return starts.tolist(), ends.tolist()


class Oracle:
    """Stamps sectors of a device and remembers what each holds."""

    def __init__(self, path, size, seed):
        self.path, self.seed = path, seed
        self._sequence = np.zeros(size // SECTOR, np.uint64)
        self._latest = 0

    def write(self, *ranges):
        """Stamp byte ranges ``(start, end)`` anew, in whole sectors."""
        self._latest += 1
        for start, end in ranges:
            first, last = start // SECTOR, end // SECTOR
            put(self.path, start, stamp(first, last - first, self._latest, self.seed))
            self._sequence[first:last] = self._latest

    def zero(self, *ranges):
        """Write zeros."""
        for start, end in ranges:
            put(self.path, start, bytes(end - start))
            self.zeroed(start, end)

    def zeroed(self, start, end):
        """Somebody else made the range zeros."""
        self._sequence[start // SECTOR : end // SECTOR] = 0

    def now(self) -> Held:
        """What it holds now, to be compared with later."""
        return Held(self._sequence.copy(), self.seed)


# --- images, and damage to them ---------------------------------------------------------------------------


@contextlib.contextmanager
def image_at(path) -> Iterator[ImageReader]:
    """One image, open."""
    with StoredFile(str(path), Path(path).name) as file:
        yield ImageReader(file)


def frame_at(path, window):
    """Where the frame of a window lies in an image: offset and stored bytes."""
    with image_at(path) as reader:
        for section in reader.all_sections():
            for frame in section.frames:
                if int(frame["window"]) == window:
                    return int(frame["offset"]), int(frame["stored"])
    raise AssertionError(f"{path} has no frame of window {window}")


def record_at(path, number):
    """Where the record of a section lies in an image: offset and length."""
    with image_at(path) as reader:
        entry = reader.sections[reader.position(number)]
        return int(entry["offset"]), int(entry["length"])


def flip(path, offset, bits=0x10):
    """Turn one bit over, or several of one byte."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        (old,) = file.read(1)
        file.seek(offset)
        file.write(bytes([old ^ bits]))


def damage_frame(path, window):
    """Turn a bit over in the middle of the frame of a window."""
    offset, stored = frame_at(path, window)
    flip(path, offset + stored // 2)


_FIEMAP, _FIEMAP_SYNC, _FIEMAP_SHARED, _FIEMAP_MAX = 0xC020660B, 1, 0x2000, 4096
"""linux/fs.h, linux/fiemap.h."""


def file_extents(path):
    """``(start, length, shared)`` of a file's allocated ranges."""
    with open(path, "rb", buffering=0) as file:
        head = struct.pack("=QQIIII", 0, 1 << 62, _FIEMAP_SYNC, 0, _FIEMAP_MAX, 0)
        data = bytearray(head + bytes(56 * _FIEMAP_MAX))
        fcntl.ioctl(file, _FIEMAP, data)
    count = struct.unpack_from("=I", data, 20)[0]
    assert count < _FIEMAP_MAX
    found = []
    for number in range(count):
        start, _, length, _, _, flags = struct.unpack_from("=QQQQQI", data, 32 + 56 * number)
        found.append((start, length, bool(flags & _FIEMAP_SHARED)))
    return found


_IN_OPEN = 0x20
"""linux/inotify.h."""


@contextlib.contextmanager
def noticing_opens(path):
    """Whether anybody opened a file or node meanwhile: a function that tells it, since it was last asked."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watch >= 0
    try:
        assert libc.inotify_add_watch(watch, os.fsencode(path), _IN_OPEN) >= 0

        def opened():
            try:
                return bool(os.read(watch, 1 << 16))
            except BlockingIOError:
                return False

        yield opened
    finally:
        os.close(watch)
