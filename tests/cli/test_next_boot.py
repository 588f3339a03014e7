"""Images at the next boot, where none can be made: each says why, and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockbak.flow.nextboot import FOLDER
from tests.cli.program import ok, run
from tests.cli.stock import Stock


def test_a_file_is_no_disk(repo: Stock, as_root: None) -> None:
    error = run("-r", repo.path, "cold", "--at-next-boot", repo.source, "--json").error
    assert (error["name"], error["exit"]) == ("NotAtNextBoot", 5)
    assert error["message"].endswith("it is a file, not a disk or a partition.")
    assert "rescue system" in error["advice"]
    assert not (repo.path / FOLDER).exists()


def test_nothing_ordered_cannot_be_taken_back(repo: Stock) -> None:
    error = run("-r", repo.path, "cold", "--at-next-boot", "--cancel", "--json").error
    assert (error["name"], error["exit"]) == ("NothingOrdered", 1)


def test_the_disk_of_the_running_system_says_which_ways_there_are(tmpfs: Callable[..., Path]) -> None:
    number = os.stat("/").st_dev
    name = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    if not Path("/dev", name).is_block_device():
        pytest.fail(f"/ is on no block device that is here: {name}", pytrace=False)
    repository = tmpfs("16M") / "repository"
    ok("init", repository)
    told = run("-r", repository, "backup", f"/dev/{name}", "--dry-run", "--json").document
    (error,) = told["errors"]
    assert (error["name"], error["exit"]) == ("RootInUse", 5)
    assert error["message"] == f"/dev/{name} carries the running system (/): it cannot be unmounted while that runs."
    assert f"'blockbak cold --at-next-boot /dev/{name}' takes the disk before the system starts." in error["advice"]
