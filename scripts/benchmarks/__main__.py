"""The program behind ``scripts/bench``. Its exit status tells whether it could measure, nothing else."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from contextlib import ExitStack
from typing import NoReturn

from benchmarks import goals, place, report, work
from benchmarks.contests import CONTESTS, Bench
from benchmarks.place import GIB, MIB, ToolFailed

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_SMALLEST = 512 * MIB
_ON, _TO = "/var/tmp", "/dev/shm"  # noqa: S108 - directories of its own are made there


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([MG])", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; take 1G or 2048M")
    size = int(found[1]) * (GIB if found[2] == "G" else MIB)
    if size < _SMALLEST or size % (64 * MIB):
        raise argparse.ArgumentTypeError("take at least 512M, in steps of 64M")
    return size


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("take at least 1")
    return int(text)


def _contests(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in CONTESTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(CONTESTS)}")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures blockbak beside its peers on a loop device of its own, and judges the goals.",
        epilog="Exit status 0 even when a goal is missed: this is a measurement, not a test.",
    )
    add = parser.add_argument
    add("--on", default=_ON, metavar="DIR", help="where the devices' files lie [/var/tmp]")
    add("--to", default=_TO, metavar="DIR", help="where images and peers' files go [/dev/shm]")
    add("--size", type=_size, default=4 * GIB, metavar="SIZE", help="size of the device [4G]")
    add("--rounds", type=_rounds, default=3, metavar="N", help="how often everybody runs [3]")
    add(
        "--only",
        type=_contests,
        default=list(CONTESTS),
        metavar="NAME,...",
        help=f"some of {', '.join(CONTESTS)}",
    )
    add("--write", action="store_true", help="write docs/benchmarks.md")
    return parser.parse_args()


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _check_room(options: argparse.Namespace) -> None:
    """Stop before half the work is done.

    ``on`` holds the source, and for restores the target; ``to`` the source's copy, a repository or two, and
    what one peer writes. The most of both does not come at once.
    """
    if os.stat(options.on).st_dev == os.stat(options.to).st_dev:
        needs = [(options.on, 3.5)]
    else:
        needs = [(options.on, 2.0), (options.to, 2.2)]
    for path, copies in needs:
        free, wanted = shutil.disk_usage(path).free, copies * options.size
        if free < wanted:
            sys.exit(
                f"bench: {path} has {free / GIB:.1f} GiB free, {wanted / GIB:.1f} GiB are needed; take a smaller --size"
            )


def _end(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _deaf() -> None:
    """Clearing away must not be interrupted halfway."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """Measure, judge, print."""
    options = _arguments()
    # Children must not see this program's own modules.
    os.environ.pop("PYTHONPATH", None)
    os.chdir(_ROOT)
    _check_room(options)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    before = report.load()
    with ExitStack() as stack:
        on = stack.enter_context(place.directory(os.path.abspath(options.on)))
        to = stack.enter_context(place.directory(os.path.abspath(options.to)))
        _say(f"building the standard work, {options.size / GIB:g} GiB")
        standard = stack.enter_context(work.standard(on, to, options.size))
        stack.callback(_deaf)
        bench = Bench(standard, on, to, options.rounds, _say)
        for name in options.only:
            CONTESTS[name](bench)
        judged = goals.rows(bench)
        text = report.document(bench, judged, before)
    print(text)
    if options.write:
        path = os.path.join(_ROOT, "docs", "benchmarks.md")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        _say("wrote docs/benchmarks.md")
    _say(report.closing(judged))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolFailed as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; everything has been cleared away")
