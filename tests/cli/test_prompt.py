"""Overwriting: told so by `--yes`, or by the target's name typed at a terminal; never by anything else."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cli.program import Terminal, document, fails, ok, run
from tests.cli.stock import SEED, Stock
from tests.patterns import SECTOR, stamp

PROMPT = b"Type its name to go on"
OLD = stamp(0, 1000, 9, SEED + 9)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that somebody may still want."""
    path = tmp_path / "target.img"
    path.write_bytes(OLD)
    return path


def asked(stock: Stock, target: object, *words: str) -> Terminal:
    return Terminal("-r", stock.path, "restore", stock.newest, target, *words)


def test_the_name_of_the_target_goes_on(stock: Stock, target: Path) -> None:
    with asked(stock, target) as screen:
        ended = screen.until(PROMPT).type(os.fsencode(target) + b"\n").end()
    assert ended.status == 0, str(ended)
    assert target.read_bytes() == stock.held[stock.newest]
    assert os.fsencode(target) in ended.err.partition(PROMPT)[0], "the question names what is lost"
    assert PROMPT not in ended.out


def test_the_answer_to_a_script_at_a_terminal_stays_one_document(stock: Stock, target: Path) -> None:
    with asked(stock, target, "--json") as screen:
        ended = screen.until(PROMPT).type(os.fsencode(target) + b"\n").end()
    assert ended.status == 0, str(ended)
    assert ended.document["plan"]["target"] == str(target)


ANSWERS = ["", "y", "yes", "target.img", "latest", "{target} ", "{target}/", "{upper}", "{target}x"]


@pytest.mark.parametrize(("answer", "form"), [*((answer, []) for answer in ANSWERS), ("yes", ["--json"])], ids=str)
def test_anything_else_is_a_refusal(answer: str, form: list[str], stock: Stock, target: Path) -> None:
    typed = answer.format(target=target, upper=str(target).upper())
    before = target.stat()
    with asked(stock, target, *form) as screen:
        ended = screen.until(PROMPT).type(typed.encode() + b"\n").end()
    assert ended.status == 5, str(ended)
    assert "not confirmed" in ended.said
    if form:
        assert ended.error["name"] == "NotConfirmed"
    else:
        assert ended.out == b""
    assert target.read_bytes() == OLD
    assert target.stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir(target.parent) == ["target.img"]


def test_the_end_of_input_is_a_refusal(stock: Stock, target: Path) -> None:
    with asked(stock, target) as screen:
        ended = screen.until(PROMPT).type(b"\x04").end()
    assert ended.status == 5, str(ended)
    assert target.read_bytes() == OLD


def test_one_ctrl_c_at_the_prompt_is_enough(stock: Stock, target: Path) -> None:
    with asked(stock, target) as screen:
        ended = screen.until(PROMPT).type(b"\x03").end()
    assert ended.status == 130, str(ended)
    assert target.read_bytes() == OLD


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_the_prompt_ends_it(number: int, stock: Stock, target: Path) -> None:
    with asked(stock, target) as screen:
        ended = screen.until(PROMPT).signal(number).end()
    assert ended.status == 130, str(ended)
    assert target.read_bytes() == OLD


def test_without_a_terminal_nobody_is_asked(stock: Stock, target: Path) -> None:
    for words in (["restore", stock.newest, target], ["export", stock.newest, target]):
        found = fails(5, "TargetExists", "-r", stock.path, *words)
        assert "--yes" in found.error["advice"]
    assert target.read_bytes() == OLD
    assert os.listdir(target.parent) == ["target.img"]


def test_a_new_file_needs_no_answer(stock: Stock, tmp_path: Path) -> None:
    with asked(stock, tmp_path / "new.img") as screen:
        ended = screen.end()
    assert ended.status == 0, str(ended)
    assert PROMPT not in ended.err


def test_yes_needs_no_answer(stock: Stock, target: Path) -> None:
    with asked(stock, target, "--yes") as screen:
        ended = screen.end()
    assert ended.status == 0, str(ended)
    assert PROMPT not in ended.err
    assert target.read_bytes() == stock.held[stock.newest]


def test_a_dry_run_asks_nothing(stock: Stock, target: Path) -> None:
    with asked(stock, target, "--dry-run") as screen:
        ended = screen.end()
    assert ended.status == 0, str(ended)
    assert PROMPT not in ended.err
    assert target.read_bytes() == OLD


def test_what_must_not_be_written_is_refused_before_anybody_is_asked(stock: Stock, target: Path) -> None:
    inside = stock.path / "repository.json"
    before = inside.read_bytes()
    with asked(stock, inside) as screen:
        ended = screen.end()
    assert ended.status == 5, str(ended)
    assert PROMPT not in ended.err
    assert inside.read_bytes() == before


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["typed", "--yes"])
def test_a_device_is_overwritten_when_told_so(how: str, loop, stock: Stock) -> None:
    device = loop(4 << 20)
    with device.file.open("r+b") as file:
        file.write(OLD)
    found = fails(5, "TargetExists", "-r", stock.path, "restore", stock.newest, device)
    assert found.error["fields"]["path"] == device.path
    with asked(stock, device) as screen:
        assert screen.until(PROMPT).type(b"/dev/sda\n").end().status == 5
    assert device.file.read_bytes()[: len(OLD)] == OLD
    if how == "typed":
        with asked(stock, device) as screen:
            ended = screen.until(PROMPT).type(device.path.encode() + b"\n").end()
        assert ended.status == 0, str(ended)
    else:
        ok("-r", stock.path, "restore", stock.newest, device, "--yes")
    held = stock.held[stock.newest]
    assert device.file.read_bytes() == held + bytes((4 << 20) - len(held))


def test_yes_does_not_open_a_device_in_use(loop, ext4, stock: Stock) -> None:
    files = ext4(loop(16 << 20))
    (files.where / "letter").write_text("mine")
    found = fails(5, "TargetInUse", "-r", stock.path, "restore", stock.newest, files.device, "--yes")
    assert str(files.where) in found.error["message"]
    files.unmount()
    files.mount()
    assert (files.where / "letter").read_text() == "mine"


def test_yes_does_not_open_a_device_that_is_too_small(loop, stock: Stock) -> None:
    device = loop(1 << 20)
    found = fails(5, "TargetTooSmall", "-r", stock.path, "restore", stock.newest, device, "--yes")
    assert found.error["fields"]["need"] == len(stock.held[stock.newest])
    assert not any(device.file.read_bytes())


def test_rolling_a_volume_back_onto_itself_says_so_in_the_plan(tmp_path: Path) -> None:
    repo, source = tmp_path / "repo", tmp_path / "v.img"
    source.write_bytes(OLD)
    ok("init", repo)
    ok("-r", repo, "backup", source)
    with source.open("r+b") as file:
        file.seek(7 * SECTOR)
        file.write(b"changed")
    assert run("-r", repo, "restore", "latest", source).status == 5
    plan = document("-r", repo, "restore", "latest", source, "--dry-run")["plan"]
    assert "rolled back" in " ".join(plan["notes"])
    assert plan["method"] == "differ"
    done = document("-r", repo, "restore", "latest", source, "--yes")
    assert source.read_bytes() == OLD
    assert 0 < done["written_bytes"] < len(OLD)


def test_a_partial_that_nobody_named_is_not_taken_for_ones_own(stock: Stock, tmp_path: Path) -> None:
    mine = tmp_path / "out.partial"
    mine.write_bytes(b"mine")
    found = fails(5, "TargetExists", "-r", stock.path, "restore", stock.newest, tmp_path / "out")
    assert found.error["fields"]["path"] == str(mine)
    assert mine.read_bytes() == b"mine"
    shutil.rmtree(tmp_path)
