"""The tables, as Markdown: it reads well on a terminal too."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime

from benchmarks import place
from benchmarks.contests import Bench
from benchmarks.goals import TIMES, Row, is_fast
from benchmarks.place import GIB, MIB, run
from benchmarks.reasons import reasons

_VERSIONS = (
    ("dd", "--version"), ("zstd", "--version"), ("borg", "--version"), ("restic", "version"),
    ("partclone.ext4", "--version"), ("qemu-img", "--version"),
)  # fmt: skip
_NUMBER = re.compile(r"\d+(?:\.\d+)+")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[at]) for line in (head, *lines)) for at in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return [row(head), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(row, lines)]


def _first(path: str, key: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return "unknown"


def load() -> str:
    """The load averages now."""
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _version(argv: Sequence[str]) -> str:
    found = _NUMBER.search(run(*argv, check=False))
    return f"{argv[0]} {found[0] if found else '(unknown)'}"


def _setting(bench: Bench, load_before: str) -> list[str]:
    import blockbak

    work, cores = bench.work, len(os.sched_getaffinity(0))
    memory = int(_first("/proc/meminfo", "MemTotal").split()[0]) * 1024
    on, to = place.kind_of(bench.on), place.kind_of(bench.to)
    direct = "" if bench.direct_writes else " (which refuses O_DIRECT, so dd writes without it)"
    shares = ", ".join(f"{change.name} {100 * change.share:.1f} %" for change in work.changes.values())
    speed = "at memory speed" if is_fast(bench) else "at a disk's speed"
    points = (
        f"""{datetime.now(UTC):%Y-%m-%d}, {cores} cores ({_first("/proc/cpuinfo", "model name")}),
        {memory / GIB:.0f} GiB of memory, Linux {platform.release()}; load average {load_before} before,
        {load()} after.""",
        f"""blockbak {blockbak.__version__} on Python {platform.python_version()};
        {", ".join(_version(argv) for argv in _VERSIONS)}.""",
        f"""The work: a loop device of {work.size / GIB:g} GiB, direct I/O on, on an allocated file on {on},
        {speed}; an ext4 in it, {work.used_percent} % used; {work.zero_percent:.0f} % of the 64 KiB blocks are
        zeros. Changed 64 KiB blocks: {shares}.""",
        f"""Images and peers' files go to {to}{direct}; restores go to a second such device.""",
        """Cache: before each run the source, and before each restore and verify what is read, is evicted from
        the page cache (fadvise and BLKFLSBUF); what lies on a tmpfs stays in memory all the same.""",
        f"""{bench.rounds} rounds, in each of which all contestants run one after the other, each time another
        one first; restic, and borg with a change, run once. Each run is a whole process: wall clock, user and
        system time of its process tree (the loop driver's kernel threads are not counted), peak memory of its
        largest process. A ratio is the median of the ratios of pairs from one round, the spread is the
        smallest and the largest of them.""",
        "Every restore was compared with its source byte by byte.",
    )
    return ["- " + " ".join(point.split()) for point in points]


def _value(row: Row) -> str:
    if not row.measured:
        return ""
    return f"{row.value:.2f} {TIMES}" if row.unit == TIMES else f"{row.value:.3g} {row.unit}"


def goals_table(rows: Sequence[Row]) -> list[str]:
    """The goals, each with what was measured."""
    head = ("work", "blockbak", "peer", "ratio or value", "spread", "at least", "aim", "met?")
    lines = [
        (
            row.work, row.blockbak, row.peer,
            _value(row),
            row.spread, row.limit(row.at_least), row.limit(row.aim), row.verdict,
        )
        for row in rows
    ]  # fmt: skip
    return _table(head, lines)


def runs_table(bench: Bench) -> list[str]:
    """Everything that was measured."""
    head = ("contest", "contestant", "runs", "wall, median (least)", "CPU, median", "peak memory", "stored")
    lines = [
        (
            series.contest, series.name, str(len(series.samples)),
            f"{series.median():.2f} s ({series.least():.2f})", f"{series.median('cpu'):.2f} s",
            f"{series.most('rss') / MIB:.0f} MiB",
            f"{series.median('stored') / MIB:.1f} MiB" if series.most("stored") else "",
        )
        for series in bench.series.values()
        if series.contest != "clone calls"
    ]  # fmt: skip
    return _table(head, lines)


def closing(rows: Sequence[Row]) -> str:
    """What came out, in a sentence."""
    missed = [row.work for row in rows if row.met is False]
    judged = sum(row.met is not None for row in rows)
    if not missed:
        return f"All {judged} goals measured here are met."
    return f"{judged - len(missed)} of {judged} goals measured here are met; MISSED: {'; '.join(missed)}."


_TEXT = """\
# Benchmarks

Made by `scripts/bench --write`; run it on your own machine. Ratios say more than seconds: other work on the
machine disturbs both sides of a pair alike.

{setting}

## Goals

Every value is an upper limit: "at least" must be kept, the aim is what we would like. A peer's time stands
beside its name.

{goals}

{closing}

{reasons}## All runs

{runs}

Not measured here: {absent}.
"""
_REASONS = """\
## Why goals are missed

{reasons}

"""


def absent(bench: Bench, rows: Sequence[Row]) -> str:
    """What has a goal, or should have one, and is not in the tables."""
    missing = [row.work for row in rows if not row.measured]
    if not is_fast(bench):
        missing.append(
            "a device at memory speed (nothing changed: at least 2.5 x, aim 1.6 x; restore: at least 1.6 x, aim 1.2 x; "
            "`scripts/bench --on /dev/shm`)"
        )
    missing += [
        "changes reported by the kernel (snapshots of LVM volumes)",
        "repositories that are not local directories",
    ]
    return "; ".join(missing)


def document(bench: Bench, rows: Sequence[Row], load_before: str) -> str:
    """The whole report."""
    why = "\n".join(f"- {text}" for text in reasons(bench, rows))
    return _TEXT.format(
        reasons=_REASONS.format(reasons=why) if why else "",
        absent=absent(bench, rows),
        setting="\n".join(_setting(bench, load_before)),
        goals="\n".join(goals_table(rows)),
        closing=closing(rows),
        runs="\n".join(runs_table(bench)),
    )
