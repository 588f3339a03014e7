"""Restores into LVM, and what points keep of it, as far as that goes without any logical volume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.program import document, fails, run
from tests.cli.stock import Stock


@pytest.mark.parametrize(
    "words",
    [(), ("there.img", "--create-lv", "vg/new"), ("there.img", "--thin-pool", "pool"), ("--thin-pool", "pool")],
)
def test_a_restore_has_one_target(words: tuple[str, ...], stock: Stock) -> None:
    ended = run("-r", stock.path, "restore", stock.newest, *words, "--json")
    assert (ended.status, ended.error["name"]) == (2, "WrongUsage")
    assert "--create-lv" in ended.said


@pytest.mark.parametrize("name", ["new", "vg/", "vg/blockbak-new", "vg/a/b", "-vg/new"])
def test_a_new_volume_has_a_name_that_lvm_takes(name: str, stock: Stock) -> None:
    fails(1, "BadTarget", "-r", stock.path, "restore", stock.newest, f"--create-lv={name}")


def test_a_file_has_no_volume_group(stock: Stock) -> None:
    fails(1, "NoGroupMetadata", "-r", stock.path, "show", stock.newest, "--lvm-metadata")
    shown = document("-r", stock.path, "show", stock.newest)
    assert (shown["lvm_metadata"], shown["set_id"], shown["hooks"]) == ("", "", {})
    assert "volume group" not in run("-r", stock.path, "show", stock.newest).text
    assert {one["set_id"] for one in stock.points()} == {""}


def test_who_asks_for_a_hook_where_none_is_run_is_told(repo: Stock, tmp_path: Path) -> None:
    """Its application is not at rest, whatever the person thinks."""
    image = tmp_path / "app.img"
    image.write_bytes(bytes(65536))
    ended = run("-r", repo.path, "backup", "--freeze-with", "postgresql", image)
    assert ended.status == 0
    assert f"{image} is taken cold, not from a snapshot: no hook is run for it." in ended.said
