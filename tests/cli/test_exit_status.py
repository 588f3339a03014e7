"""Each exit status by a real run, and the manual's table of errors against the classes."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from blockbak import errors
from tests.cli.program import ROOT, Ended, Running, grown, ok, run
from tests.cli.stock import Stock


def done(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    return run("-r", repo.path, "verify", "--json")


def failed(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    return run("-r", repo.path, "backup", tmp_path / "none.img", "--json")


def wrong(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    return run("-r", repo.path, "backup", "--json")


def attention(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    """The source is written while it is read."""
    source = tmp_path / "busy.img"
    source.write_bytes(slow.read_bytes())
    with Running("-r", repo.path, "backup", source, "--name", "busy", "--compress", "zstd:15", "--json") as going:
        going.until("the image grew", grown(repo.path, "busy/*.partial")).pause()
        with source.open("r+b") as file:
            file.write(b"written meanwhile")
        return going.go_on().end()


def damage(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    (repo.path / "db" / f"{repo.db}.full.zst").unlink()
    return run("-r", repo.path, "verify", "--json")


def refused(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    (tmp_path / "out.img").write_bytes(b"precious")
    return run("-r", repo.path, "restore", repo.newest, tmp_path / "out.img", "--json")


def interrupted(repo: Stock, slow: Path, tmp_path: Path) -> Ended:
    with Running("-r", repo.path, "backup", slow, "--compress", "zstd:15", "--json") as going:
        going.until("the image grew", grown(repo.path, "*/*.zst.partial")).pause()
        return going.signal(signal.SIGINT).go_on().end()


STATUS = {0: done, 1: failed, 2: wrong, 3: attention, 4: damage, 5: refused, 130: interrupted}


@pytest.mark.parametrize("status", STATUS)
def test_a_real_run_reaches_each_status(status: int, repo: Stock, slow: Path, tmp_path: Path) -> None:
    reach: Callable[[Stock, Path, Path], Ended] = STATUS[status]
    ended = reach(repo, slow, tmp_path)
    assert ended.status == status, str(ended)
    if status in (1, 2, 5, 130):
        assert ended.error["exit"] == status
    if status == 3:
        (point,) = ended.document["points"]
        assert point["consistency"] == "none"
        assert "written while it was read" in " ".join(point["notes"])
        assert "written while it was read" in ended.said


def leaves(kind: type[errors.BlockbakError]) -> set[type[errors.BlockbakError]]:
    """The classes that are raised: those with a sentence of their own."""
    found = {kind} if "message" in vars(kind) and kind is not errors.BlockbakError else set()
    return found.union(*(leaves(sub) for sub in kind.__subclasses__()))


def test_the_manual_lists_every_error_under_its_status() -> None:
    page = (ROOT / "docs" / "man" / "blockbak.8").read_text().replace("\\-", "-")
    part = page.partition(".SH EXIT STATUS")[2].partition(".SH ")[0]
    listed: dict[str, int] = {}
    for code, text in re.findall(r"^\.TP\n\.B (\d+)\n(.+)$", part, re.MULTILINE):
        for name in text.partition(": ")[2].rstrip(".").split(", "):
            if name:
                assert name not in listed, f"{name} is listed twice"
                listed[name] = int(code)
    assert listed == {kind.__name__: kind.exit_code for kind in leaves(errors.BlockbakError)}
    assert set(re.findall(r"^\.TP\n\.B (\d+)\n", part, re.MULTILINE)) == {str(status) for status in STATUS}


def test_help_and_readme_tell_the_same_table() -> None:
    told = " ".join(ok("--help").text.split())
    readme = " ".join((ROOT / "README.md").read_text().partition("## Exit status")[2].partition("## ")[0].split())
    for status in STATUS:
        assert re.search(rf"\b{status} [a-z]", told), told
        assert re.search(rf"(^|· ){status} [a-z]", readme.strip()), readme


# --- what a source is not --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/dev/null", "NotABlockSource"), ("/", "NotABlockSource"), ("/dev/nosuchdisk", "NoSuchSource"), ("no/such", "NoSuchSource"), ("nosuchvg/nosuchlv", "NoSuchSource"),
        ("x" * 300, "NoSuchSource"), ("x/" * 3000, "NoSuchSource"), ("/dev/loop-control", "NotABlockSource"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_source_is_a_failure(path: str, name: str, stock: Stock) -> None:
    ended = run("-r", stock.path, "backup", path, "--json")
    assert (ended.status, ended.error["name"]) == (1, name), str(ended)


@pytest.mark.parametrize(
    ("target", "name", "status"),
    [
        ("/dev/null", "BadTarget", 1), ("/", "BadTarget", 1), ("/dev/nosuchdisk", "BadTarget", 1),
        ("/no/such/place", "BadTarget", 1), ("x" * 300, "BadTarget", 1), ("x/" * 3000, "BadTarget", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_a_target_is_a_failure(
    target: str, name: str, status: int, stock: Stock, tmp_path: Path
) -> None:
    ended = run("-r", stock.path, "restore", stock.newest, target, "--yes", "--json", cwd=tmp_path)
    assert (ended.status, ended.error["name"]) == (status, name), str(ended)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["init", "restore", "export", "backup"])
def test_an_empty_argument_is_not_the_current_directory(verb: str, stock: Stock, tmp_path: Path) -> None:
    """A script's variable that nobody set."""
    inside = tmp_path / "inside"
    inside.mkdir(mode=0o755)
    words = {"init": [""], "backup": [""], "restore": [stock.newest, ""], "export": [stock.newest, ""]}[verb]
    ended = run("-r", stock.path, verb, *words, cwd=inside)
    assert ended.status in (1, 2), str(ended)
    assert not list(inside.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    assert inside.stat().st_mode & 0o777 == 0o755
    # Not even begun: the program did not try and fail at the last step.
    assert "File exists" not in ended.said


def test_a_repository_path_that_is_too_long_is_no_damage() -> None:
    for path in ("x" * 300, "x/" * 3000):
        ended = run("-r", path, "list", "--json")
        assert (ended.status, ended.error["name"]) == (1, "NotARepository"), str(ended)
