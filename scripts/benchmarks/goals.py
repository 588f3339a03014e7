"""What is promised for each work, and whether this run kept it.

A goal is an upper limit, "at least", and an aim. A median that misses is called a miss even where single
rounds kept it; the spread beside it tells how far to trust either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.contests import Bench
from benchmarks.measure import Ratio, Series, ratio
from benchmarks.place import GIB, MIB

_FAST_DEVICE = 2e9
"""Bytes a second; above it a scan is bound by the processor, not by the device."""
_UNIT = 4096
TIMES = "x"
"""The unit of a ratio."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. ``value`` is what is judged: a ratio, or a number in ``unit``; NaN where what was
    measured cannot be true.
    """

    work: str
    blockbak: str
    peer: str
    value: float
    spread: str
    unit: str
    at_least: float | None
    aim: float | None

    @property
    def measured(self) -> bool:
        return not math.isnan(self.value)

    @property
    def met(self) -> bool | None:
        """None where nothing is promised, or measured."""
        return None if self.at_least is None or not self.measured else self.value <= self.at_least

    @property
    def verdict(self) -> str:
        if self.met is None:
            return "" if self.measured else "not measured"
        if not self.met:
            return "NO"
        return "yes" if self.aim is None or self.value > self.aim else "yes, and the aim"

    def limit(self, number: float | None) -> str:
        """A goal as a person reads it."""
        return "" if number is None else f"{number:g} {self.unit}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _mib(value: float) -> str:
    return f"{value / MIB:.1f} MiB" if value < 100 * MIB else f"{value / MIB:.0f} MiB"


def _against(
    work: str, ours: Series, peer: str, found: Ratio, theirs: str, goal: tuple[float, float] | float | None,
    key: str = "wall",
) -> Row:  # fmt: skip
    at_least, aim = goal if isinstance(goal, tuple) else (goal, None)
    show = _seconds if key != "stored" else _mib
    spread = "" if found.least == found.most else f"{found.least:.2f} to {found.most:.2f}"
    return Row(work, show(ours.median(key)), f"{peer}: {theirs}", found.median, spread, TIMES, at_least, aim)


def _pair(work: str, ours: Series, theirs: Series, goal: tuple[float, float] | float | None, key: str = "wall") -> Row:
    show = _seconds if key != "stored" else _mib
    return _against(work, ours, theirs.name, ratio(ours, theirs, key), show(theirs.median(key)), goal, key)


def _number(work: str, value: float, unit: str, goal: tuple[float, float] | float | None) -> Row:
    at_least, aim = goal if isinstance(goal, tuple) else (goal, None)
    return Row(work, f"{value:.3g} {unit}", "", value, "", unit, at_least, aim)


def is_fast(bench: Bench) -> bool:
    """Whether the device is one at memory speed."""
    for contest in ("changes", "rollback of 1 %", "full, raw"):
        if bench.has(contest, "dd of=/dev/null"):
            return bench.work.size / bench.get(contest, "dd of=/dev/null").median() > _FAST_DEVICE
    return False


def _full(bench: Bench) -> Iterator[Row]:
    name = "full, zstd 1"
    if not bench.has(name, "blockbak"):
        return
    ours, pipe = bench.get(name, "blockbak"), bench.get(name, "dd | zstd -1 -T2")
    yield _pair(name, ours, pipe, (0.6, 0.4))
    yield _pair(name, ours, bench.get(name, "borg, 4 MiB, lz4"), 0.75)
    for peer in ("partclone | zstd -1 -T2", "qemu-img, qcow2, zstd", "restic, stdin"):
        yield _pair(name, ours, bench.get(name, peer), 1.0)
    yield _pair(f"{name}, stored", ours, pipe, (1.02, 1.0), "stored")
    best = min(
        ("partclone | zstd -1 -T2", "qemu-img, qcow2, zstd"),
        key=lambda peer: bench.get(name, peer).median("stored"),
    )
    yield _pair(f"{name}, stored", ours, bench.get(name, best), None, "stored")


def _none(bench: Bench) -> Iterator[Row]:
    name = "full, none"
    if bench.has(name, "blockbak"):
        yield _pair(f"{name}", bench.get(name, "blockbak"), bench.get(name, "dd conv=sparse"), (1.5, 1.1))


def _raw(bench: Bench) -> Iterator[Row]:
    name = "full, raw"
    if not bench.has(name, "blockbak"):
        return
    ours, dd = bench.get(name, "blockbak"), bench.get(name, "dd conv=sparse")
    fast = is_fast(bench)
    yield _pair(f"{name}, {'memory speed' if fast else 'a disk'}", ours, dd, 1.5 if fast else (1.1, 1.0))
    yield _number(f"{name}, CPU per GiB", ours.median("cpu") * GIB / bench.work.size, "s", None)


def _changes(bench: Bench) -> Iterator[Row]:
    if not bench.has("changes", "nothing changed"):
        return
    series = {label: bench.get("changes", label) for contest, label in bench.series if contest == "changes"}
    still, dd, some = series["nothing changed"], series["dd of=/dev/null"], series["1 % changed"]
    fast = is_fast(bench)
    speed = "memory speed" if fast else "a disk"
    yield _pair(f"nothing changed, {speed}", still, dd, (2.5, 1.6) if fast else (1.15, 1.02))
    yield _number("nothing changed, CPU per GiB", still.median("cpu") * GIB / bench.work.size, "s", (0.35, 0.25))
    yield _pair("nothing changed", still, series["borg, nothing changed"], None)
    yield _pair("nothing changed", still, series["restic, nothing changed"], None)

    def allowed(number: int) -> float:
        return still.samples[number].wall + series["zstd -1 of the 1 %"].samples[number].wall

    both = still.median() + series["zstd -1 of the 1 %"].median()
    yield _against("1 % changed", some, "no change, then zstd -1 of it", ratio(some, allowed), _seconds(both), 1.0)
    for label, state in (("1 % changed", "C1"), ("files changed", "C5")):
        ours, change = series[label], bench.work.changes[state]
        stored = ours.median("stored") / change.changed_bytes
        found = Ratio(stored, stored, stored)
        yield _against(f"{label}, stored", ours, "changed blocks", found, _mib(change.changed_bytes), None, "stored")
        for peer in ("borg", "restic"):
            yield _pair(label, ours, series[f"{peer}, {label}"], None)


def _synthetic(bench: Bench) -> Iterator[Row]:
    for contest, label in bench.series:
        if label != "blockbak" or not contest.startswith("synthetic full on "):
            continue
        kind, ours = contest.rpartition(" ")[2], bench.get(contest, label)
        shares = bench.has("clone calls", kind)
        yield _pair(contest, ours, bench.get(contest, "cp of the full"), None if shares else (0.5, 0.2))
        if not shares:
            continue
        calls = bench.get("clone calls", kind)
        per_thousand = calls.fact("seconds") * 1e6 / max(calls.fact("clones"), 1)
        yield _number(f"{contest}, a thousand clones", per_thousand, "ms", 50)
        # The encoded and copied bytes are the windows, sections, padding frames, heads and tails.
        granted = ours.fact("encoded_bytes") + ours.fact("copied_bytes") + 2 * _UNIT * calls.fact("clones")
        granted += ours.fact("cloned_bytes") // MIB * 64  # the seek table and the manifest
        taken = ours.fact("taken_bytes")
        # Less than what was encoded anew cannot have been taken: the file system accounted for something else.
        true = taken >= ours.fact("encoded_bytes")
        yield Row(
            f"{contest}, new blocks",
            _mib(taken) if true else "",
            f"what it must write: {_mib(granted)}",
            taken / granted if true else math.nan,
            "",
            TIMES,
            1.0,
            None,
        )


def _back(bench: Bench) -> Iterator[Row]:
    fast = is_fast(bench)
    if bench.has("restore", "blockbak"):
        ours, dd = bench.get("restore", "blockbak"), bench.get("restore", "dd of the raw image")
        chain = bench.get("restore", "blockbak, chain")
        yield _pair(f"restore, {'memory speed' if fast else 'a disk'}", ours, dd, (1.6, 1.2) if fast else (1.15, 1.0))
        yield _against("restore of a chain", chain, "the full alone", ratio(chain, ours), _seconds(ours.median()), 1.0)
        yield _pair("restore, read back", bench.get("restore", "blockbak, read back"), dd, None)
    if bench.has("rollback of 1 %", "blockbak"):
        ours, dd = bench.get("rollback of 1 %", "blockbak"), bench.get("rollback of 1 %", "dd of=/dev/null")
        yield _pair("rollback of 1 %", ours, dd, (2.5, 1.6) if fast else (1.15, 1.02))
        read, size = ours.fact("source_read"), bench.work.size
        yield Row(
            "rollback of 1 %, read",
            _mib(read),
            f"the device: {_mib(size)}",
            read / size,
            "",
            TIMES,
            1.02,
            None,
        )
        wrote, least = ours.fact("written_bytes"), bench.work.changes["C1"].changed_bytes
        yield Row(
            "rollback of 1 %, written",
            _mib(wrote),
            f"the difference: {_mib(least)}",
            wrote / least,
            "",
            TIMES,
            1.0,
            None,
        )


def _mirror(bench: Bench) -> Iterator[Row]:
    name = "mirror of 1 %"
    if not bench.has(name, "blockbak"):
        return
    ours, ends = bench.get(name, "blockbak"), bench.get(name, "blockbak, two ends")
    if bench.has(name, "bdsync"):
        for series in (ours, ends, bench.get(name, "blockbak, read back")):
            yield _pair(f"{name}, {series.name}", series, bench.get(name, "bdsync"), 1.0)
            cpu = ratio(series, bench.get(name, "bdsync"), "cpu")
            theirs = _seconds(bench.get(name, "bdsync").median("cpu"))
            yield _against(f"{name}, {series.name}, CPU", series, "bdsync", cpu, theirs, 1.0, "cpu")
    moved, changed = ends.fact("moved_bytes"), bench.work.changes["C1"].changed_bytes
    row = f"{name}, moved between two ends"
    yield Row(row, _mib(moved), f"changed blocks: {_mib(changed)}", moved / changed, "", TIMES, 1.05, 1.03)


def _rest(bench: Bench) -> Iterator[Row]:
    if bench.has("verify", "blockbak"):
        yield _pair("verify", bench.get("verify", "blockbak"), bench.get("verify", "zstd -t"), (0.75, 0.5))
    for what, limit in (("--help", 0.25), ("list", 0.4)):
        if bench.has("start-up", what):
            yield _number(f"start-up, {what}", bench.get("start-up", what).median(), "s", limit)
    if bench.has("16 TiB, sparse", "full"):
        for what in ("full", "nothing changed", "verify"):
            ours = bench.get("16 TiB, sparse", what)
            yield _number(f"16 TiB, sparse, {what}, peak of memory", ours.most("rss") / MIB, "MiB", (128, 64))
            yield _number(f"16 TiB, sparse, {what}", ours.median(), "s", None)
    if bench.has("hash map of 16 TiB", "compare"):
        yield _number("hash map of 16 TiB, CPU", bench.get("hash map of 16 TiB", "compare").median("cpu"), "s", 2)
    runs = [series for series in bench.series.values() if is_blockbak(series)]
    if runs:
        worst = max(runs, key=lambda series: series.most("rss"))
        row = f"peak of memory, worst of all ({worst.contest}: {worst.name})"
        yield _number(row, worst.most("rss") / MIB, "MiB", (128, 64))


def is_blockbak(series: Series) -> bool:
    """Whether it was blockbak that ran."""
    if series.contest in ("clone calls", "hash map of 16 TiB"):
        return False
    ours = ("nothing changed", "1 % changed", "files changed")
    return series.contest in ("start-up", "16 TiB, sparse") or series.name.startswith("blockbak") or series.name in ours


def rows(bench: Bench) -> list[Row]:
    """Every goal that this run can judge."""
    parts = (_full, _none, _raw, _changes, _synthetic, _back, _mirror, _rest)
    return [row for part in parts for row in part(bench)]
