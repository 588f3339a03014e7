"""How long a volume's own writes take while blockbak reads it: the program behind ``scripts/bench --hot``.

It makes a volume group on a loop device of its own, writes 4 KiB at random places of a logical volume, each write
durable (O_DIRECT and O_DSYNC), and takes the time of each: with nothing else going on; with a snapshot that nobody
reads; while a full backup has one, from its making to its removal; and the same with ``--limit`` and ``--idle``. Needs
root and LVM.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

MIB = 1 << 20
_PAGE = 4096
_PLACE = "/var/tmp"  # noqa: S108 - a folder of its own is made in it
_GROUP = "blockbaklatency"
_SEED = 1


def _run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def _volume(folder: str, size: int) -> Iterator[str]:
    """A logical volume of ``size`` bytes full of random data, with as much room beside it."""
    image = os.path.join(folder, "pv.img")
    with open(image, "wb") as file:
        file.truncate(2 * size + 64 * MIB)
    loop = _run("losetup", "--find", "--show", "--direct-io=on", image)
    try:
        _run("vgcreate", "-q", _GROUP, loop)
        try:
            _run("lvcreate", "-q", "-y", "-L", f"{size}b", "-n", "data", _GROUP)
            path = f"/dev/{_GROUP}/data"
            dice = random.Random(_SEED)
            with open(path, "wb") as device:
                device.writelines(dice.randbytes(MIB) for _ in range(size // MIB))
            yield path
        finally:
            _run("vgremove", "-q", "-f", "-y", _GROUP)
    finally:
        _run("losetup", "--detach", loop)


def _always() -> bool:
    return True


def _snapshotted() -> bool:
    """Whether blockbak's snapshot is there."""
    return any(name.startswith(f"{_GROUP}-blockbak--") for name in os.listdir("/dev/mapper"))


def _write(path: str, size: int, until: Callable[[], bool], counts: Callable[[], bool] = _always) -> list[float]:
    """Seconds of each write, until told to stop; of those only that began or ended while ``counts`` held."""
    times = []
    dice = random.Random(_SEED)
    page = mmap.mmap(-1, _PAGE)
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_DSYNC)
    try:
        counted = counts()
        while not until():
            page[:16] = dice.randbytes(16)
            offset = dice.randrange(size // _PAGE) * _PAGE
            start = time.monotonic()
            os.pwrite(fd, page, offset)
            took, before, counted = time.monotonic() - start, counted, counts()
            if before or counted:
                times.append(took)
    finally:
        os.close(fd)
    return times


def _for(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _backing_up(blockbak: str, folder: str, path: str, size: int, options: list[str]) -> list[float]:
    repository = tempfile.mkdtemp(dir=folder)
    _run(blockbak, "init", repository)
    command = [blockbak, "-r", repository, "backup", "--mode", "hot", "--kind", "full", *options, f"{_GROUP}/data"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    times = _write(path, size, lambda: child.poll() is not None, _snapshotted)
    said = child.communicate()[1].decode()
    if child.returncode != 0:
        raise SystemExit(f"latency: {' '.join(command)} ended with {child.returncode}: {said}")
    return times


def _row(name: str, times: list[float], alone: float) -> str:
    times.sort()
    middle, late = statistics.median(times), times[int(len(times) * 0.99)]
    share = f"{middle / alone:.1f} x" if alone else "1.0 x"
    return (
        f"{name:<34} {len(times):>7} {middle * 1000:>10.2f} {share:>7} {late * 1000:>10.2f} {times[-1] * 1000:>10.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench --hot", description=__doc__)
    parser.add_argument("--size", type=int, default=512, metavar="MIB", help="size of the volume [512]")
    parser.add_argument("--seconds", type=float, default=10, help="how long each quiet row takes [10]")
    parser.add_argument("--limit", default="20M", help="what --limit is given in its row [20M]")
    parser.add_argument("--dir", default=_PLACE, help="where its files lie, thrice the size [%(default)s]")
    parser.add_argument("--blockbak", default=os.path.join(os.path.dirname(sys.executable), "blockbak"))
    options = parser.parse_args()
    if not os.path.exists(options.blockbak):
        parser.error(f"there is no {options.blockbak}; name one with --blockbak")
    size = options.size * MIB
    rows: list[tuple[str, list[float]]] = []
    with (
        tempfile.TemporaryDirectory(dir=options.dir, prefix="blockbak-latency-") as folder,
        _volume(folder, size) as path,
    ):
        rows.append(("nothing else", _write(path, size, _for(options.seconds))))
        _run("lvcreate", "-q", "-y", "-s", "-L", f"{size}b", "-n", "snap", f"{_GROUP}/data")
        rows.append(("a snapshot that nobody reads", _write(path, size, _for(options.seconds))))
        _run("lvremove", "-q", "-y", f"{_GROUP}/snap")
        for name, more in (
            ("blockbak", []),
            ("blockbak --idle", ["--idle"]),
            (f"blockbak --limit {options.limit}", ["--limit", options.limit]),
            (f"blockbak --limit {options.limit} --idle", ["--limit", options.limit, "--idle"]),
        ):
            rows.append((name, _backing_up(options.blockbak, folder, path, size, more)))
    alone = statistics.median(rows[0][1])
    print(f"Durable 4 KiB writes at random places of a volume of {options.size} MiB, {os.cpu_count()} cores:\n")
    print(f"{'meanwhile':<34} {'writes':>7} {'median ms':>10} {'':>7} {'99 % ms':>10} {'longest ms':>10}")
    for name, times in rows:
        print(_row(name, times, alone))


if __name__ == "__main__":
    main()
