"""``scripts/test`` may only succeed, and say so, if everything that ran passed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "scripts" / "results.py"

GOOD = '<testcase classname="tests.unit.test_a" name="one" time="0.5"/>'
BAD = '<testcase classname="tests.unit.test_a" name="two"><failure message="no"/></testcase>'
LEAKY = '<testcase classname="tests.host.test_b" name="three"><error message="left behind"/></testcase>'
SKIPPED = '<testcase classname="tests.unit.test_a" name="four"><skipped/></testcase>'
INSIDE = '<testcase classname="tests.vm.test_d" name="five" time="0.5"/>'
UNREADABLE = '<testcase classname="" name="tests.cli.test_c"><error message="import"/></testcase>'


def written(place, cases):
    place.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")


def told(place, checks=(0,), status=None, cases=(), machine=None, inside=()):
    (place / "checks").write_text("".join(f"check {n}\t{status}\n" for n, status in enumerate(checks)))
    if status is not None:
        (place / "pytest").write_text(f"{status}\ttests.xml\t-m 'not vm' \n")
        written(place / "tests.xml", cases)
    if machine is not None:
        (place / "vm").write_text(f"{machine}\tvm.xml\tdirect\n")
        written(place / "vm.xml", inside)
    done = subprocess.run([sys.executable, RESULTS, place], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (0, "1 passed, 0 failed")),
        ({"checks": (0, 2)}, (1, "1 passed, 1 failed")),
        ({"status": 0, "cases": [GOOD]}, (0, "2 passed, 0 failed")),
        ({"status": 0, "cases": [GOOD, SKIPPED]}, (0, "2 passed, 0 failed, 1 skipped")),
        ({"status": 1, "cases": [GOOD, BAD, LEAKY]}, (1, "2 passed, 2 failed")),
        ({"status": 1, "cases": [UNREADABLE]}, (1, "1 passed, 1 failed")),
        ({"status": 1, "cases": [GOOD]}, (1, "2 passed, 1 failed")),
        ({"status": 5}, (1, "1 passed, 1 failed")),
        ({"status": 137, "cases": [GOOD]}, (1, "2 passed, 1 failed")),
        ({"checks": (1,), "status": 0, "cases": [GOOD]}, (1, "1 passed, 1 failed")),
        ({"status": 0, "cases": [GOOD], "machine": 0, "inside": [INSIDE]}, (0, "3 passed, 0 failed")),
        ({"checks": (), "machine": 0, "inside": [INSIDE]}, (0, "1 passed, 0 failed")),
        # A machine that did not start, hung or ran nothing is a failure, whatever else passed.
        ({"machine": 1}, (1, "1 passed, 1 failed")),
        ({"machine": 0}, (1, "1 passed, 1 failed")),
        ({"machine": 0, "inside": [SKIPPED]}, (1, "1 passed, 1 failed, 1 skipped")),
        ({"machine": 124, "inside": [INSIDE]}, (1, "2 passed, 1 failed")),
        ({"machine": 1, "inside": [INSIDE, BAD]}, (1, "2 passed, 1 failed")),
    ],
)
def test_success_needs_everything_to_have_passed(tmp_path, given, expected):
    assert told(tmp_path, **given) == expected


def test_it_is_told_how_many_tests_ran_where(tmp_path):
    told(tmp_path, status=1, cases=[GOOD, BAD], machine=0, inside=[INSIDE])
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert "tests: 2 here, 1 in the virtual machine" in done.stdout.splitlines()


def test_a_machine_without_a_report_failed(tmp_path):
    (tmp_path / "checks").write_text("")
    (tmp_path / "vm").write_text("1\tvm.xml\tdirect\n")
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-2:] == ["tests: 0 here, 0 in the virtual machine", "0 passed, 1 failed"]


@pytest.mark.parametrize(
    ("status", "inside", "expected"),
    [
        (0, [INSIDE], ["tests: 0 here, 2 in the virtual machine", "2 passed, 0 failed"]),
        (1, [BAD], ["tests: 0 here, 2 in the virtual machine", "1 passed, 1 failed"]),
        # One that did not start, or ran nothing, is a failure whatever the other says.
        (1, None, ["tests: 0 here, 1 in the virtual machine", "1 passed, 1 failed"]),
        (0, [], ["tests: 0 here, 1 in the virtual machine", "1 passed, 1 failed"]),
    ],
)
def test_of_two_machines_both_must_have_passed(tmp_path, status, inside, expected):
    (tmp_path / "checks").write_text("")
    (tmp_path / "vm").write_text(f"0\tvm-first.xml\tdirect\n{status}\tvm-second.xml\tdirect\n")
    written(tmp_path / "vm-first.xml", [INSIDE])
    if inside is not None:
        written(tmp_path / "vm-second.xml", inside)
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (int("1 failed" in expected[1]), expected)
    assert [line.split()[0] for line in done.stdout.splitlines() if " vm-" in line] == ["vm-first", "vm-second"]


def test_a_run_that_left_no_report_failed(tmp_path):
    (tmp_path / "checks").write_text("ruff\t0\n")
    (tmp_path / "pytest").write_text("3\ttests.xml\t-m 'not vm' \n")
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("status", "cases", "expected"),
    [
        (0, [LEAKY.replace("error", "x")], (0, "3 passed, 0 failed")),
        (1, [LEAKY], (1, "2 passed, 1 failed")),
        # What failed in one run does not explain how the other ended.
        (137, [], (1, "2 passed, 1 failed")),
    ],
)
def test_of_two_runs_both_must_have_passed(tmp_path, status, cases, expected):
    (tmp_path / "checks").write_text("check\t0\n")
    (tmp_path / "pytest").write_text(f"0\ttests.xml\t-m one\n{status}\tbeside.xml\t-m other\n")
    written(tmp_path / "tests.xml", [GOOD])
    written(tmp_path / "beside.xml", cases)
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == expected
    assert "tests chosen by -m one, -m other" in done.stdout


def test_a_run_whose_end_its_failures_do_not_explain_is_one_more(tmp_path):
    (tmp_path / "checks").write_text("")
    (tmp_path / "pytest").write_text("1\ttests.xml\t-m one\n1\tbeside.xml\t-m other\n")
    written(tmp_path / "tests.xml", [BAD])
    written(tmp_path / "beside.xml", [GOOD])
    done = subprocess.run([sys.executable, RESULTS, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "1 passed, 2 failed")
