"""The last line of a run is read aloud: it must not sound better than it was."""

from __future__ import annotations

import fcntl
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from blockbak.cli.backup import summary
from blockbak.flow.backup import Report
from tests.cli.program import Ended, Running, ok, opened, run
from tests.cli.stock import Stock

MIB = 1 << 20


def last_line(ended: Ended) -> str:
    return ended.text.splitlines()[-1]


@contextmanager
def held(volume: Path) -> Iterator[None]:
    with (volume / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def restored(stock: Stock, point: str, target: Path, *words: str, status: int = 0) -> Ended:
    ended = run("-r", stock.path, "restore", point, target, *words)
    assert ended.status == status, str(ended)
    return ended


# --- restore ---------------------------------------------------------------------------------------------------


def test_a_restore_with_a_gap_says_how_much_is_not_there(repo: Stock, tmp_path: Path) -> None:
    for file in (*repo.path.glob(f"web/{repo.oldest}.*"), *repo.path.glob(f"web/{repo.newest}.full.*")):
        file.unlink()
    ended = restored(repo, repo.web[1], tmp_path / "out", "--keep-going", status=3)
    flaws = [line.split() for line in (tmp_path / "out.mapfile").read_text().splitlines() if line.endswith("-")]
    lost = sum(int(length, 16) for _, length, _ in flaws)
    assert lost > MIB
    assert f", all but {lost / MIB:.2f} MiB: " in last_line(ended)


def test_what_is_missing_is_named_and_not_what_is_there(repo: Stock, tmp_path: Path) -> None:
    for file in (*repo.path.glob(f"web/{repo.oldest}.*"), *repo.path.glob(f"web/{repo.newest}.full.*")):
        file.unlink()
    said = restored(repo, repo.web[1], tmp_path / "out", "--keep-going", status=3).said
    zeros = [line for line in said.splitlines() if "are zeros on the target" in line]
    assert zeros
    assert all(f"(web/{repo.oldest})." in line and repo.web[1] not in line for line in zeros), said


def test_a_whole_restore_names_no_loss(stock: Stock, tmp_path: Path) -> None:
    assert "all but" not in last_line(restored(stock, stock.newest, tmp_path / "out"))


def test_a_target_that_holds_the_point_was_found_equal(stock: Stock, tmp_path: Path) -> None:
    restored(stock, stock.newest, tmp_path / "out")
    line = last_line(restored(stock, stock.newest, tmp_path / "out", "--yes"))
    assert line.endswith(": 0 B written, 1.95 MiB equal already.")


# --- verify ----------------------------------------------------------------------------------------------------


def test_nothing_to_check_is_not_whole(tmp_path: Path) -> None:
    ok("init", tmp_path / "repo")
    assert last_line(ok("-r", tmp_path / "repo", "verify")) == "No image was checked: there is none."


def test_what_is_held_is_not_whole(repo: Stock) -> None:
    with held(repo.path / "db"):
        one = run("-r", repo.path, "verify")
        with held(repo.path / "web"):
            both = run("-r", repo.path, "verify")
    assert (one.status, both.status) == (1, 1)
    assert last_line(one).endswith("read: all whole; what another run holds was left out.")
    assert last_line(both) == "No image was checked: another run holds what was to be."


def test_an_interrupted_verify_claims_to_undo_nothing(large: Stock) -> None:
    (image,) = large.path.glob("large/*.zst")
    with Running("-r", large.path, "verify") as going:
        going.until("it reads the image", opened(going, image)).pause()
        ended = going.signal(signal.SIGINT).go_on().end()
    assert ended.status == 130, str(ended)
    assert "Interrupted; nothing is left half-made." in ended.said


# --- backup ----------------------------------------------------------------------------------------------------

MADE = Report(
    point="20260301T000000Z-0001", volume="web", kind="full", synthetic=False, parent=None, sequence=1, mode="cold",
    consistency="cold", change_source="scan", device_bytes=9 * MIB, read_bytes=9 * MIB, changed_bytes=0,
    stored_bytes=2 * MIB, bad_bytes=0, seconds=1.5, source="web.img", file="", root="",
)  # fmt: skip


def test_a_full_says_what_was_read() -> None:
    assert "s: 9.00 MiB read, 2.00 MiB stored," in summary(MADE)


def test_holes_are_not_read() -> None:
    assert "s: 4.00 MiB of 9.00 MiB read, 2.00 MiB" in summary(replace(MADE, read_bytes=4 * MIB))


def test_what_was_left_out_is_in_the_summary() -> None:
    told = summary(replace(MADE, read_bytes=4 * MIB, hole_bytes=5 * MIB))
    assert "s: 4.00 MiB of 9.00 MiB read, 5.00 MiB left out as unused, 2.00 MiB stored," in told


def test_what_could_not_be_read_is_in_the_summary() -> None:
    told = summary(replace(MADE, kind="incremental", changed_bytes=MIB, bad_bytes=4 * MIB))
    assert "s: 9.00 MiB read but for 4.00 MiB that could not be, 1.00 MiB changed," in told


# --- one is not many -------------------------------------------------------------------------------------------


def test_one_image_and_one_point(repo: Stock) -> None:
    assert last_line(run("-r", repo.path, "verify", repo.db)).startswith("1 image checked in")
    assert last_line(ok("-r", repo.path, "delete", repo.db, "--dry-run")).startswith("1 point, 1 image, ")
    (repo.path / "db" / f"{repo.db}.incremental.zst.partial").touch()
    assert "runs that did not end: 1 file;" in ok("-r", repo.path, "list").said


# --- notes -----------------------------------------------------------------------------------------------------


def test_each_note_is_said_once_and_where_to_look(loop, tmp_path: Path) -> None:
    source = loop(2 * MIB)
    os.truncate(source.file, MIB)  # the device keeps its size, and half of it cannot be read
    ok("init", tmp_path / "repo")
    ended = run("-r", tmp_path / "repo", "backup", source, "--name", "io")
    assert ended.status == 3, str(ended)
    assert ended.said.count("A full is made: the volume has no point yet.") == 1, str(ended)
    assert ended.said.count(f"{MIB} bytes could not be read.") == 1, str(ended)
    (words,) = re.findall("'blockbak (show .*)' names what could not be read", ended.said)
    shown = ok("-r", tmp_path / "repo", *words.split()).text
    assert re.search(rf"^unreadable: +bytes {MIB} to {2 * MIB}$", shown, re.MULTILINE), shown
