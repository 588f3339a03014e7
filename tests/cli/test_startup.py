"""What is imported when nothing heavy is done: `--help`, a slip of the pen and `list` stay quick."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from blockbak.cli.main import VERBS
from tests.cli.program import LIMIT_SECONDS, environment
from tests.cli.stock import Stock

HEAVY = {"numpy", "blake3", "xxhash", "tqdm", "psutil", "pyudev", "rich", "msgspec", "structlog", "apprise"}


def imported(*words: object, status: int = 0) -> set[str]:
    """The packages that a run imports."""
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "blockbak", *map(str, words)],
        capture_output=True, text=True, env=environment(), timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    found = re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "click" in found
    return {name.partition(".")[0] for name in found} | {name for name in found if name.startswith("blockbak.")}


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    found = imported(*words)
    assert not found & HEAVY
    assert not {name for name in found if name.startswith(("blockbak.flow", "blockbak.image", "blockbak.host"))}


def test_a_wrong_command_line_imports_nothing_heavy() -> None:
    assert not imported("backup", "--no-such-option", status=2) & HEAVY


def test_list_imports_nothing_that_only_a_backup_needs(stock: Stock) -> None:
    for form in ([], ["--json"]):
        found = imported("-r", stock.path, "list", *form)
        assert not found & {"tqdm", "psutil", "pyudev", "backports", "xxhash"}
        assert not {"blockbak.image.codec", "blockbak.flow.scan"} & found


def test_without_a_terminal_no_progress_bar_is_even_imported(stock: Stock) -> None:
    assert "tqdm" not in imported("-r", stock.path, "verify")
