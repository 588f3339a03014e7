"""Tells what ``scripts/test`` ran, where, and how it ended; the exit status says whether all of it passed.

Reads the directory given: ``checks`` (name and exit status of each check, tab between), and, if
tests ran, ``pytest`` (its exit status and how the tests were chosen) and ``tests.xml`` (its JUnit report).
"""

from __future__ import annotations

import os
import platform
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass
class Row:
    """One line of the table: what ran, and how many of it ended how."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


def check_rows(results: Path) -> list[Row]:
    """A row for each check that is not pytest."""
    rows = []
    for line in (results / "checks").read_text().splitlines():
        name, status = line.split("\t")
        good = status == "0"
        rows.append(Row(name, passed=int(good), failed=int(not good), note="" if good else f"exit {status}"))
    return rows


def chosen(results: Path) -> tuple[int, str]:
    """How pytest ended (its exit status), and the options that chose which tests run."""
    status, choice = (results / "pytest").read_text().rstrip().split("\t", maxsplit=1)
    return int(status), choice


def level_rows(results: Path) -> list[Row]:
    """A row for each level of tests, those that did not run included."""
    status = chosen(results)[0]
    rows = {path.name: Row(path.name) for path in sorted(TESTS.iterdir()) if any(path.glob("test_*.py"))}
    report = results / "tests.xml"
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
    for row in rows.values():
        if not row.passed + row.failed + row.skipped:
            row.note = "not run"
    # 0 is all passed, 1 some failed; a failure that no case accounts for, and all else, counts itself.
    if status and not (status == 1 and any(row.failed for row in rows.values())):
        rows["pytest"] = Row("pytest", failed=1, note=f"exit {status}: see its own message above")
    return list(rows.values())


def main(results: Path) -> int:
    """Print the table and the closing line; 0 if everything that ran passed, else 1."""
    rows = check_rows(results)
    if (results / "pytest").exists():
        rows += level_rows(results)
        choice = f"tests chosen by {chosen(results)[1]}"
    else:
        choice = "no tests: --lint-only"
    who = "root" if os.geteuid() == 0 else "not root"
    where = f"Linux {platform.release()}, {who}, Python {platform.python_version()}"
    print(f"\nwhat ran here ({where}; {choice}):\n")
    print(f"  {'':<15} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}")
    for row in rows:
        counts = f"{row.passed:>7} {row.failed:>7} {row.skipped:>8}"
        seconds = f"{row.seconds:.1f}" if row.seconds else ""
        print(f"  {row.name:<15} {counts} {seconds:>8}  {row.note}".rstrip())
    passed, failed, skipped = (sum(getattr(row, key) for row in rows) for key in ("passed", "failed", "skipped"))
    print(f"\n{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
