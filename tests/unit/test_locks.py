"""The locked packages are those that pyproject.toml asks for, and nothing tells where they came from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {
    "requirements.txt": PROJECT["project"]["dependencies"],
    "requirements-build.txt": PROJECT["dependency-groups"]["build"],
    "requirements-notify.txt": PROJECT["project"]["optional-dependencies"]["notify"],
    "requirements-dev.txt": [
        *PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"]["notify"],
        *(entry for group in ("build", "test", "lint") for entry in PROJECT["dependency-groups"][group]),
    ],
}


def locked(name):
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), flags=re.MULTILINE)
    return {canonicalize_name(package): version for package, version in pins}


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_what_is_asked_for(name):
    pins = locked(name)
    for text in LOCKS[name]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), f"{text}: run scripts/lock"


def test_tests_run_with_what_is_shipped():
    assert locked("requirements.txt").items() <= locked("requirements-dev.txt").items()
    assert locked("requirements-build.txt").items() <= locked("requirements-dev.txt").items()
    assert locked("requirements-notify.txt").items() <= locked("requirements-dev.txt").items()


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_packages_and_hashes_only(name):
    for line in (ROOT / name).read_text().splitlines():
        assert re.fullmatch(
            r"# [^/]*"
            r"|# Written by scripts/lock .*"
            r"|[\w.-]+==[\w.]+( ; [\w.]+ [<>=!]+ \"[\w.]+\")* \\"
            r"|    --hash=sha256:[0-9a-f]{64}( \\)?",
            line,
        ), line
