"""Tells what ``scripts/test`` ran, where, and how it ended; the exit status says whether all of it passed.

Reads the directory given: ``checks`` (name and exit status of each check, tab between), and, if tests ran here,
``pytest`` (a line for each run of it: exit status, the name of its JUnit report, how the tests were chosen); if some
were to run in a virtual machine, ``vm``: such a line for each machine, the last word of which is how it is run.
"""

from __future__ import annotations

import os
import platform
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
IN_MACHINE = "vm"


@dataclass
class Row:
    """One line of the table: what ran, and how many of it ended how."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def count(self) -> int:
        """How many ran, those that then left themselves out included."""
        return self.passed + self.failed + self.skipped

    def add(self, other: Row) -> None:
        """Count another's among its own."""
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.seconds += other.seconds


def check_rows(results: Path) -> list[Row]:
    """A row for each check that is not pytest."""
    rows = []
    for line in (results / "checks").read_text().splitlines():
        name, status = line.split("\t")
        good = status == "0"
        rows.append(Row(name, passed=int(good), failed=int(not good), note="" if good else f"exit {status}"))
    return rows


@dataclass(frozen=True)
class Run:
    """One run of pytest: its exit status, its JUnit report, and the words that go with it."""

    status: int
    report: Path
    words: str

    @property
    def unexplained(self) -> bool:
        """Whether it failed in a way that no case accounts for: 0 is all passed, 1 some failed."""
        rows = counted(self.report).values()
        return self.status != 0 and not (self.status == 1 and any(row.failed for row in rows))


def runs_of(results: Path, name: str) -> list[Run]:
    """The runs that ``pytest`` or ``vm`` tells of; none where no tests were asked for."""
    file = results / name
    lines = file.read_text().splitlines() if file.exists() else []
    fields = [line.split("\t", maxsplit=2) for line in lines]
    return [Run(int(status), results / report, words.rstrip()) for status, report, words in fields]


def counted(report: Path) -> dict[str, Row]:
    """A row for each level of tests in a JUnit report."""
    rows: dict[str, Row] = {}
    cases = ET.parse(report).getroot().iter("testcase") if report.exists() else iter(())  # noqa: S314 - our own file
    for case in cases:
        # A module that cannot even be imported is a case without a class.
        place = (case.get("classname") or case.get("name") or "").split(".")
        level = place[1] if len(place) > 1 and place[0] == TESTS.name else "elsewhere"
        row = rows.setdefault(level, Row(level))
        row.seconds += float(case.get("time", 0))
        if case.find("failure") is not None or case.find("error") is not None:
            row.failed += 1
        elif case.find("skipped") is not None:
            row.skipped += 1
        else:
            row.passed += 1
    return rows


def rows_here(runs: list[Run]) -> list[Row]:
    """A row for each level of tests of this machine, those that did not run included."""
    rows = {path.name: Row(path.name) for path in sorted(TESTS.iterdir()) if any(path.glob("test_*.py"))}
    rows.pop(IN_MACHINE, None)
    for run in runs:
        for name, row in counted(run.report).items():
            rows.setdefault(name, Row(name)).add(row)
    for row in rows.values():
        row.note = "" if row.count else "not run"
    lost = [run for run in runs if run.unexplained]
    if lost:
        told = ", ".join(str(run.status) for run in lost)
        rows["pytest"] = Row("pytest", failed=len(lost), note=f"exit {told}: see its own message above")
    return list(rows.values())


def row_in_machine(run: Run) -> Row:
    """The row of what ran in one virtual machine. If nothing ran there, that is a failure."""
    row = Row(run.report.stem)
    for one in counted(run.report).values():
        row.add(one)
    if run.unexplained:
        row.failed, row.note = row.failed + 1, f"exit {run.status}: see its own message above"
    elif not row.passed + row.failed:
        row.failed, row.note = 1, "no test ran in the virtual machine"
    return row


def main(results: Path) -> int:
    """Print the table and the closing line; 0 if everything that ran passed, else 1."""
    rows = check_rows(results)
    here, there = runs_of(results, "pytest"), runs_of(results, IN_MACHINE)
    counts = {"here": 0, "in the virtual machine": 0}
    chosen = "no tests here"
    if here:
        levels = rows_here(here)
        counts["here"] = sum(row.count for run in here for row in counted(run.report).values())
        rows += levels
        chosen = "tests chosen by " + ", ".join(run.words for run in here)
    for run in there:
        row = row_in_machine(run)
        row.note = row.note or f"in the virtual machine, run by {run.words}"
        counts["in the virtual machine"] += sum(row.count for row in counted(run.report).values())
        rows.append(row)
    if here and not there:
        rows.append(Row(IN_MACHINE, note="not run"))
    who = "root" if os.geteuid() == 0 else "not root"
    where = f"Linux {platform.release()}, {who}, Python {platform.python_version()}"
    print(f"\nwhat ran here ({where}; {chosen}):\n")
    print(f"  {'':<15} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for row in rows:
        ends = f"{row.passed:>7} {row.failed:>7} {row.skipped:>8}"
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        print(f"  {row.name:<15} {ends} {seconds:>8}  {row.note}".rstrip())
    passed, failed, skipped = (sum(getattr(row, key) for row in rows) for key in ("passed", "failed", "skipped"))
    print("\ntests: " + ", ".join(f"{count} {place}" for place, count in counts.items()))
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
