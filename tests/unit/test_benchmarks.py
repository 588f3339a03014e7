"""What ``scripts/bench`` makes of its numbers: nothing untrue is a goal that is met, and a miss has its reason."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchmarks import goals, report
from benchmarks.measure import Sample, Series
from benchmarks.reasons import reasons

MIB = 1 << 20
GIB = 1 << 30


@dataclass
class Measured:
    """What a run of the benchmark leaves."""

    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    work: Any = field(default_factory=lambda: SimpleNamespace(size=4 * GIB))

    def add(self, contest: str, name: str, wall: float, cpu: float = 1.0, **facts: object) -> Measured:
        self.series[contest, name] = Series(contest, name, {0: Sample(wall, cpu, 50 * MIB, facts=facts)})
        return self

    def has(self, contest: str, name: str) -> bool:
        return (contest, name) in self.series

    def get(self, contest: str, name: str) -> Series:
        return self.series[contest, name]


def composed(taken: int) -> Measured:
    found = (
        Measured().add("synthetic full on xfs", "cp of the full", 1.0).add("clone calls", "xfs", 0, clones=1, seconds=0)
    )
    return found.add(
        "synthetic full on xfs",
        "blockbak",
        1.0,
        encoded_bytes=70 * MIB,
        copied_bytes=MIB,
        cloned_bytes=0,
        taken_bytes=taken,
    )


def new_blocks(bench: Any) -> goals.Row:
    (row,) = [row for row in goals.rows(bench) if row.work.endswith("new blocks")]
    return row


def test_fewer_blocks_than_were_written_are_no_measurement() -> None:
    for taken in (-MIB, 0, 69 * MIB):
        bench = composed(taken)
        row = new_blocks(bench)
        assert (row.met, row.verdict) == (None, "not measured")
        assert "synthetic full on xfs, new blocks" in report.absent(bench, [row])
        (*_, line) = report.goals_table([row])
        assert "nan" not in line
        assert "-" not in line.replace("met?", "")


def test_what_can_be_true_is_judged() -> None:
    assert (new_blocks(composed(70 * MIB)).met, new_blocks(composed(90 * MIB)).met) == (True, False)


def verified(wall: float) -> Measured:
    return Measured().add("verify", "blockbak", wall, cpu=3.5).add("verify", "zstd -t", 2.0, cpu=2.25)


def test_a_missed_goal_has_its_reason_in_numbers_of_this_run() -> None:
    bench = verified(1.9)
    (told,) = reasons(bench, goals.rows(bench))
    assert "3.50 s of processor time in 1.90 s" in told
    assert "in 2.25 s" in told


def test_what_was_met_needs_none() -> None:
    bench = verified(1.0)
    assert reasons(bench, goals.rows(bench)) == []


def test_rows_for_memory_speed_are_named_where_they_are_absent() -> None:
    slow, fast = (Measured().add("changes", "dd of=/dev/null", wall) for wall in (4.0, 0.5))
    assert "memory speed" in report.absent(slow, [])
    assert "memory speed" not in report.absent(fast, [])


def test_the_committed_document_keeps_to_this() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| synthetic full") and "new blocks" in line]
    assert rows
    assert not [line for line in rows if "| -" in line], "a negative number of blocks"
    missed = "MISSED" in text
    assert ("## Why goals are missed" in text) is missed
    assert "at a disk's speed" not in text or "a device at memory speed" in text.rpartition("Not measured here:")[2]
