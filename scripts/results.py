"""Tells what ``scripts/test`` ran, where, and how it ended; the exit status says whether all of it passed.

Reads the directory given: ``checks`` (name and exit status of each check, tab between), and, if tests ran here,
``pytest`` (its exit status and how the tests were chosen) and ``tests.xml`` (its JUnit report); if some were to run
in the virtual machine, ``vm`` (exit status and how that machine is run) and ``vm.xml``.
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


def check_rows(results: Path) -> list[Row]:
    """A row for each check that is not pytest."""
    rows = []
    for line in (results / "checks").read_text().splitlines():
        name, status = line.split("\t")
        good = status == "0"
        rows.append(Row(name, passed=int(good), failed=int(not good), note="" if good else f"exit {status}"))
    return rows


def ended(results: Path, name: str) -> tuple[int, str] | None:
    """How a run of pytest ended (its exit status), and the words that go with it; None if there was none."""
    if not (results / name).exists():
        return None
    status, words = (results / name).read_text().rstrip("\n").split("\t", maxsplit=1)
    return int(status), words


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


def unexplained(status: int, rows: dict[str, Row]) -> bool:
    """Whether a run failed in a way that no case accounts for: 0 is all passed, 1 some failed."""
    return status != 0 and not (status == 1 and any(row.failed for row in rows.values()))


def rows_here(results: Path, status: int) -> list[Row]:
    """A row for each level of tests of this machine, those that did not run included."""
    rows = {path.name: Row(path.name) for path in sorted(TESTS.iterdir()) if any(path.glob("test_*.py"))}
    rows.pop(IN_MACHINE, None)
    rows |= counted(results / "tests.xml")
    for row in rows.values():
        row.note = "" if row.count else "not run"
    if unexplained(status, rows):
        rows["pytest"] = Row("pytest", failed=1, note=f"exit {status}: see its own message above")
    return list(rows.values())


def row_in_machine(results: Path, status: int) -> Row:
    """The row of the level that runs in the virtual machine. If nothing ran there, that is a failure."""
    rows = counted(results / "vm.xml")
    row = Row(IN_MACHINE)
    for one in rows.values():
        row.passed, row.failed, row.skipped = (
            row.passed + one.passed,
            row.failed + one.failed,
            row.skipped + one.skipped,
        )
        row.seconds += one.seconds
    if unexplained(status, rows):
        row.failed, row.note = row.failed + 1, f"exit {status}: see its own message above"
    elif not row.passed + row.failed:
        row.failed, row.note = 1, "no test ran in the virtual machine"
    return row


def main(results: Path) -> int:
    """Print the table and the closing line; 0 if everything that ran passed, else 1."""
    rows = check_rows(results)
    here, there = ended(results, "pytest"), ended(results, IN_MACHINE)
    counts = {"here": 0, "in the virtual machine": 0}
    chosen = "no tests here"
    if here:
        levels = rows_here(results, here[0])
        counts["here"] = sum(row.count for row in levels)
        rows += levels
        chosen = f"tests chosen by {here[1].rstrip()}"
    if there:
        row = row_in_machine(results, there[0])
        row.note = row.note or f"in the virtual machine, run by {there[1]}"
        counts["in the virtual machine"] = row.count
        rows.append(row)
    elif here:
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
