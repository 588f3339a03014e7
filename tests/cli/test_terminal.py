"""What a person sees on terminals of all sizes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cli.program import Terminal, ok
from tests.cli.stock import Stock


def words_on_screen(screen: bytes) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", screen.decode()).split()


def shown(columns: int, *words: object) -> list[str]:
    """The words of what a run prints on a terminal so wide."""
    with Terminal(*map(str, words), size=(24, columns), answers=True) as going:
        ended = going.end()
    assert ended.status == 0, str(ended)
    return words_on_screen(ended.err)


@pytest.mark.parametrize("columns", [0, 40, 60, 80, 132])
def test_no_id_and_no_volume_is_broken(columns: int, stock: Stock) -> None:
    words = shown(columns, "-r", stock.path, "list")
    for word in (*stock.web, stock.db, "web", "db"):
        assert word in words, words


def test_what_says_nothing_new_is_left_out_first(stock: Stock) -> None:
    assert {"made", "parent"} <= set(shown(160, "-r", stock.path, "list"))
    assert not {"made", "parent"} & set(shown(80, "-r", stock.path, "list"))


def test_a_line_of_80_columns_holds_a_point(stock: Stock) -> None:
    with Terminal("-r", stock.path, "list", size=(24, 80), answers=True) as going:
        screen = re.sub(r"\x1b\[[0-9;]*m", "", going.end().err.decode())
    assert max(map(len, screen.splitlines())) <= 80, screen


def test_a_pipe_gets_a_line_for_each_point(stock: Stock, tmp_path: Path) -> None:
    repo, long = tmp_path / "repo", "n" * 200
    ok("init", repo)
    ok("-r", repo, "backup", stock.source, "--name", long)
    _, _, row = ok("-r", repo, "list").text.splitlines()
    assert row.startswith(long), row


def test_no_device_is_broken(loop) -> None:
    assert str(loop(1 << 20)) in shown(40, "devices")


@pytest.mark.parametrize("size", [(40, 160), (24, 80), (0, 0), (0, 120), (40, 0)])
def test_how_far_it_is_stands_on_every_terminal(size: tuple[int, int], large: Stock) -> None:
    """A serial console reports no rows and no columns."""
    with Terminal("-r", large.path, "verify", size=size) as going:
        ended = going.until(b"verifying large").end()
    assert ended.status == 0, str(ended)
