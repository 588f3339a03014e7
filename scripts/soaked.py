"""Tells what ``scripts/soak`` tried and how it ended: for each measure its time, its end, and its numbers."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET


def main(report: str, seed: str) -> None:
    """Print one block for each test in pytest's JUnit report."""
    failed = 0
    for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - our own file
        bad = case.find("failure") is not None or case.find("error") is not None
        failed += bad
        module = (case.get("classname") or "").rpartition(".")[2].removeprefix("test_")
        print(f"\n{module}: {(case.get('name') or '').removeprefix('test_').replace('_', ' ')}")
        print(f"    {'FAILED' if bad else 'held'}, {float(case.get('time', 0)):.0f} s")
        for number in case.iter("property"):
            print(f"    {number.get('name')}: {number.get('value')}")
    print(f"\nseed {seed}; " + (f"{failed} measures failed" if failed else "all measures held"))


if __name__ == "__main__":
    main(*sys.argv[1:])
