"""The standard work: a device with an ext4 that is 60 % full of real files, and what changes on it.

C0: nothing. C1: 1 % of its 64 KiB blocks, chosen at random, overwritten: half with random bytes, half
with base64 text. C5: files deleted, copied, modified and added. Same tree, same size: same work.
"""

from __future__ import annotations

import base64
import contextlib
import multiprocessing
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks import place
from benchmarks.place import MIB

BLOCK = 64 * 1024
SEED = 20260501

# Shares of the device's size.
_TREE_SHARE = 0.41
_RANDOM_SHARE = 0.145
_ZERO_SHARE = 0.015
_DELETED_SHARE = 0.015
_LARGEST_SHARE = 0.02
"""A larger file of the tree would make up too much of it."""


@dataclass(frozen=True, slots=True)
class Change:
    """Blocks of the device with their bytes before and after, in files; ``share`` of all blocks."""

    name: str
    offsets: list[int]
    before: str
    after: str
    share: float

    @property
    def changed_bytes(self) -> int:
        return len(self.offsets) * BLOCK


@dataclass(frozen=True, slots=True)
class Work:
    """The device in its base state; ``raw`` is a copy of that as a file."""

    device: str
    size: int
    raw: str
    used_percent: int
    zero_percent: float
    changes: dict[str, Change]

    @contextlib.contextmanager
    def state(self, name: str) -> Iterator[None]:
        """The device in state C0, C1 or C5 meanwhile."""
        change = self.changes.get(name)
        if change is None:
            yield
            return
        try:
            write_blocks(self.device, change.offsets, change.after)
            yield
        finally:
            write_blocks(self.device, change.offsets, change.before)


def write_blocks(device: str, offsets: list[int], content: str) -> None:
    """Write a file's consecutive blocks to their places on the device, down to its own file."""
    fd = os.open(device, os.O_WRONLY)
    try:
        with open(content, "rb") as blocks:
            for offset in offsets:
                os.pwrite(fd, blocks.read(BLOCK), offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    place.forget(device)


def _tree(dice: random.Random) -> list[tuple[str, int]]:
    """Regular files of the system, in an order that mixes their kinds; each inode once."""
    found: dict[tuple[int, int], tuple[str, int]] = {}
    for base, folders, names in os.walk("/usr"):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(base, name)
            state = os.lstat(path)
            if stat.S_ISREG(state.st_mode):
                found.setdefault((state.st_dev, state.st_ino), (path, state.st_size))
    files = list(found.values())
    dice.shuffle(files)
    return files


def _in_child(function: Callable[..., None], *arguments: object) -> None:
    """Call a function in a process of its own: its memory must not show in the peaks of later children."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise place.ToolFailed([function.__name__.strip("_")], child.exitcode, "see above")


def _fill(where: str, size: int) -> None:
    """Put the base state's files into the mounted file system."""
    dice = random.Random(SEED)
    room, number = int(size * _TREE_SHARE), 0
    for path, length in _tree(dice):
        if length > min(room, size * _LARGEST_SHARE):
            continue
        name = f"{number:06}-{os.path.basename(path)[:80]}"
        target = os.path.join(where, "tree", f"{number // 500:03}", name)
        if number % 500 == 0:
            os.makedirs(os.path.dirname(target))
        shutil.copyfile(path, target)
        room -= length
        number += 1
    parts = [(f"random-{n}", int(size * _RANDOM_SHARE / 8), True) for n in range(8)]
    parts += [("zeros", int(size * _ZERO_SHARE), False), ("deleted", int(size * _DELETED_SHARE), True)]
    for name, length, filled in parts:
        with open(os.path.join(where, name), "wb") as file:
            for start in range(0, length, MIB):
                part = min(MIB, length - start)
                file.write(dice.randbytes(part) if filled else bytes(part))
            os.fsync(file.fileno())
    os.unlink(os.path.join(where, "deleted"))


def _churn(where: str) -> None:
    """State C5: what a busy day does to the files."""
    dice = random.Random(SEED + 2)
    tree = os.path.join(where, "tree")
    files = sorted(os.path.join(base, name) for base, _, names in os.walk(tree) for name in names)
    dice.shuffle(files)
    share = len(files) // 100
    deleted, copied, modified = files[: 3 * share], files[3 * share : 6 * share], files[6 * share : 9 * share]
    for path in deleted:
        os.unlink(path)
    os.mkdir(os.path.join(where, "copies"))
    for number, path in enumerate(copied):
        shutil.copyfile(path, os.path.join(where, "copies", f"{number:06}"))
    for path in modified:
        with open(path, "r+b") as file:
            length = os.fstat(file.fileno()).st_size
            file.seek(dice.randrange(length + 1))
            file.write(base64.b64encode(dice.randbytes(3072)))
    state = os.statvfs(where)
    with open(os.path.join(where, "added"), "wb") as file:
        for number in range(int(state.f_blocks * state.f_frsize * 0.012) // MIB):
            data = dice.randbytes(MIB)
            file.write(data if number % 2 else base64.b64encode(data)[:MIB])


def _random_change(work: str, device: str, size: int) -> Change:
    """State C1."""
    dice = random.Random(SEED + 1)
    offsets = sorted(number * BLOCK for number in dice.sample(range(size // BLOCK), size // BLOCK // 100))
    before, after = os.path.join(work, "C1.before"), os.path.join(work, "C1.after")
    fd = os.open(device, os.O_RDONLY)
    try:
        with open(before, "wb") as old, open(after, "wb") as new:
            for number, offset in enumerate(offsets):
                old.write(os.pread(fd, BLOCK, offset))
                data = dice.randbytes(BLOCK)
                new.write(data if number % 2 else base64.b64encode(data)[:BLOCK])
    finally:
        os.close(fd)
    return Change("C1", offsets, before, after, len(offsets) * BLOCK / size)


def _difference(work: str, device: str, size: int, raw: str) -> Change:
    """State C5, as the blocks in which the device now differs from its copy; the device is put back."""
    offsets: list[int] = []
    before, after = os.path.join(work, "C5.before"), os.path.join(work, "C5.after")
    with (
        open(raw, "rb") as known, open(device, "rb", buffering=0) as now,
        open(before, "wb") as old, open(after, "wb") as new,
    ):  # fmt: skip
        for start in range(0, size, MIB):
            was, is_now = known.read(MIB), now.read(MIB)
            if was == is_now:
                continue
            for low in range(0, MIB, BLOCK):
                if was[low : low + BLOCK] != is_now[low : low + BLOCK]:
                    offsets.append(start + low)
                    old.write(was[low : low + BLOCK])
                    new.write(is_now[low : low + BLOCK])
    write_blocks(device, offsets, before)
    return Change("C5", offsets, before, after, len(offsets) * BLOCK / size)


def _zero_share(raw: str, size: int) -> float:
    zeros, empty = 0, bytes(BLOCK)
    with open(raw, "rb") as file:
        while block := file.read(BLOCK):
            zeros += block == empty
    return zeros / (size // BLOCK)


@contextlib.contextmanager
def standard(on: str, to: str, size: int) -> Iterator[Work]:
    """The device on the directory ``on``, its copy and its changes in ``to``."""
    with place.allocated_device(on, "source.img", size) as device:
        place.make_file_system("ext4", device)
        with place.mounted(device, on) as where:
            _in_child(_fill, where, size)
            state = os.statvfs(where)
            used = 100 - 100 * state.f_bfree // state.f_blocks
        place.forget(device)
        raw = os.path.join(to, "source.raw")
        place.run("dd", f"if={device}", f"of={raw}", f"bs={place.PIECE}", "conv=fsync", "status=none")
        with place.mounted(device, on) as where:
            _in_child(_churn, where)
        place.forget(device)
        c5 = _difference(to, device, size, raw)
        c1 = _random_change(to, device, size)
        place.run("cmp", device, raw)
        yield Work(device, size, raw, used, 100 * _zero_share(raw, size), {"C1": c1, "C5": c5})
