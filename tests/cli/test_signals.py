"""SIGINT, SIGTERM and SIGHUP in the middle of every verb that takes long: it stops, says so, leaves nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.program import PROGRAM, ROOT, Running, Terminal, document, grown, ok, opened, run
from tests.cli.stock import SEED, Stock, overwrite
from tests.patterns import stamp

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
any_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: signal.Signals(number).name)


def interrupted(going: Running, number: int, what: str, holds: Callable[[], bool]) -> str:
    """Stop the run where ``holds`` begins to, send the signal; the run must end with 130. What it says."""
    going.until(what, holds).pause()
    ended = going.signal(number).go_on().end()
    assert ended.status == 130, str(ended)
    if "--json" in ended.words:
        assert ended.error["name"] == "Interrupted"
        assert ended.error["exit"] == 130
    else:
        assert ended.out == b"", str(ended)
    assert "Interrupted" in ended.said, str(ended)
    return ended.said


@pytest.fixture
def repo(stock: Stock, tmp_path: Path) -> Path:
    """A repository with one point of `v`, which is to survive."""
    ok("init", tmp_path / "repo")
    ok("-r", tmp_path / "repo", "backup", stock.source, "--name", "v")
    return tmp_path / "repo"


def stored(repo: Path) -> set[tuple[str, int]]:
    """All files but locks: equal if nothing was added, removed or replaced."""
    return {(str(path), path.stat().st_ino) for path in repo.rglob("*") if path.is_file() and path.name != ".lock"}


def is_as_before(repo: Path, before: set[tuple[str, int]]) -> None:
    """The repository holds what it held, and that is whole."""
    assert stored(repo) == before
    ended = run("-r", repo, "verify", "--json")
    assert (ended.status, ended.document["leftovers"]) == (0, []), str(ended)


# --- backup, synthesize ----------------------------------------------------------------------------------------


@any_signal
def test_backup(number: int, repo: Path, slow: Path, stock: Stock) -> None:
    before = stored(repo)
    with Running("-r", repo, "backup", slow, "--name", "v", "--compress", "zstd:15") as going:
        interrupted(going, number, "the image grew", grown(repo, "v/*.zst.partial"))
    is_as_before(repo, before)
    (point,) = document("-r", repo, "backup", stock.source, "--name", "v")["points"]
    assert point["kind"] == "incremental"
    assert point["sequence"] > 1


def test_backup_of_several_sources_stops_at_the_first(repo: Path, slow: Path, stock: Stock, tmp_path: Path) -> None:
    words = ["-r", repo, "backup", stock.source, slow, tmp_path / "never.img", "--compress", "zstd:15", "--json"]
    with Running(*words) as going:
        going.until("the second image grew", grown(repo, "*slow*/*.zst.partial")).pause()
        ended = going.signal(signal.SIGINT).go_on().end()
    assert ended.status == 130, str(ended)
    assert [point["source"] for point in ended.document["points"]] == [str(stock.source)]
    assert [error["name"] for error in ended.document["errors"]] == ["Interrupted"]


def test_a_second_signal_does_no_harm(repo: Path, slow: Path) -> None:
    before = stored(repo)
    with Running("-r", repo, "backup", slow, "--name", "v", "--compress", "zstd:15") as going:
        going.until("the image grew", grown(repo, "v/*.zst.partial")).pause()
        ended = going.signal(signal.SIGINT).signal(signal.SIGTERM).signal(signal.SIGHUP).go_on().end()
    assert ended.status == 130, str(ended)
    is_as_before(repo, before)


def test_hangup_is_ignored_under_nohup(repo: Path, slow: Path) -> None:
    words = ["-r", repo, "backup", slow, "--name", "v", "--compress", "zstd:15", "--json"]
    with Running(*words, program=("nohup", *PROGRAM)) as going:
        going.until("the image grew", grown(repo, "v/*.zst.partial")).pause()
        ended = going.signal(signal.SIGHUP).go_on().end()
    assert ended.status == 0, str(ended)
    assert document("-r", repo, "verify")["ok"] is True


@pytest.fixture(scope="session")
def scattered(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """Two points whose synthetic full takes long: every window of 64 has one block of each."""
    folder = tmp_path_factory.mktemp("scattered")
    path, source = folder / "repo", folder / "scattered.img"
    source.write_bytes(stamp(0, 1 << 15, 1, SEED))
    ok("init", path)
    points = []
    for round_ in range(2):
        points.append(document("-r", path, "backup", source, "--name", "scattered")["points"][0]["point"])
        for window in range(64 * (1 - round_)):
            overwrite(source, window * 512, 1, 2)
    return Stock(path, source, tuple(points), "", {points[1]: source.read_bytes()})


@any_signal
def test_synthesize(number: int, scattered: Stock, tmp_path: Path) -> None:
    repo = scattered.path
    before = stored(repo)
    with Running("-r", repo, "synthesize", "scattered", "--compress", "zstd:15", "--json") as going:
        interrupted(going, number, "the image grew", grown(repo, "scattered/*.full.zst.partial"))
    is_as_before(repo, before)
    ok("-r", repo, "restore", "latest", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == scattered.held[scattered.newest]


# --- verify ------------------------------------------------------------------------------------------------------


@any_signal
def test_verify(number: int, large: Stock) -> None:
    image = next(large.path.glob("large/*.zst"))
    with Running("-r", large.path, "verify") as going:
        interrupted(going, number, "the image was opened", opened(going, image))


# --- restore ------------------------------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks
    except FileNotFoundError:
        return 0


@any_signal
def test_restore_to_a_new_file(number: int, large: Stock, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Running("-r", large.path, "restore", "latest", target) as going:
        interrupted(going, number, "the file grew", lambda: blocks(tmp_path / "out.partial") > 0)
    assert os.listdir(tmp_path) == []
    if number == signal.SIGINT:
        ok("-r", large.path, "restore", "latest", target)
        assert target.read_bytes() == large.source.read_bytes()


@any_signal
def test_restore_to_an_existing_file(number: int, large: Stock, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"")
    with Running("-r", large.path, "restore", "latest", target, "--yes") as going:
        said = interrupted(going, number, "the file grew", lambda: blocks(target) > 0)
    # Nothing can be undone here: what was written is named.
    assert str(target) in said
    assert re.search(r"written: 0 to \d+", said), said
    assert "undone" not in said
    assert os.listdir(tmp_path) == ["out"]


def test_restore_to_an_existing_file_while_it_is_read_back(large: Stock, tmp_path: Path) -> None:
    """It is overwritten already: nobody may say that nothing happened."""
    target = tmp_path / "out"
    target.write_bytes(b"")
    with Terminal("-r", large.path, "restore", "latest", target, "--yes") as screen:
        screen.until(b"reading back").signal(signal.SIGINT)
        ended = screen.end()
    assert ended.status == 130, str(ended)
    assert "undone" not in ended.said
    assert str(target) in ended.said
    assert os.listdir(tmp_path) == ["out"]


def test_restore_to_a_device(loop, stock: Stock, tmp_path: Path) -> None:
    """The loop device's file grows as it is written."""
    device = loop(192 << 20)
    source = tmp_path / "source.img"
    source.write_bytes(stamp(0, 1 << 18, 1, SEED))
    ok("init", tmp_path / "repo")
    ok("-r", tmp_path / "repo", "backup", source)
    with Running("-r", tmp_path / "repo", "restore", "latest", device, "--yes", "--json") as going:
        said = interrupted(going, signal.SIGTERM, "the device was written", lambda: blocks(device.file) > 0)
    assert device.path in said
    assert re.search(r"written: 0 to \d+", said), said
    ok("-r", tmp_path / "repo", "restore", "latest", device, "--yes")
    with device.file.open("rb") as file:
        assert file.read(source.stat().st_size) == source.read_bytes()


# --- export --------------------------------------------------------------------------------------------------------


@any_signal
def test_export(number: int, large: Stock, tmp_path: Path) -> None:
    file = tmp_path / "out"
    file.write_bytes(b"old")
    with Running("-r", large.path, "export", "latest", file, "--yes") as going:
        interrupted(going, number, "the file grew", grown(tmp_path, ".blockbak-*/raw.partial"))
    assert os.listdir(tmp_path) == ["out"]
    assert file.read_bytes() == b"old"


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A qemu-img that says when it has begun, and never ends; the file that says so, and the environment."""
    tools = tmp_path / "tools"
    tools.mkdir()
    begun = tmp_path / "begun"
    program = tools / "qemu-img"
    program.write_text(f'#!/bin/sh\necho "$$" > "{begun}.new"\nmv "{begun}.new" "{begun}"\nexec sleep 3000\n')
    program.chmod(0o755)
    yield begun, {"PATH": f"{tools}:{os.environ['PATH']}"}
    if begun.exists():
        try:
            os.kill(int(begun.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            return


@any_signal
def test_export_while_another_program_converts(
    number: int, endless: tuple[Path, dict[str, str]], stock: Stock, tmp_path: Path
) -> None:
    begun, env = endless
    place = tmp_path / "place"
    place.mkdir()
    words = ["-r", stock.path, "export", stock.newest, place / "out.qcow2", "--format", "qcow2"]
    with Running(*words, env=env) as going:
        interrupted(going, number, "qemu-img ran", begun.exists)
    assert os.listdir(place) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(begun.read_text()), 0)


# --- before anything begins ------------------------------------------------------------------------------------

# Python reads a module of this name before it runs a program.
_SLOW_TO_LOAD = """
import os, sys, time

def seen(event, arguments):
    if event == "import" and arguments[0] == "blockbak.cli.main":
        open(os.environ["LOADING"], "w").close()
        time.sleep(60)

sys.addaudithook(seen)
"""


@any_signal
def test_while_the_program_is_loaded(number: int, repo: Path, stock: Stock, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_SLOW_TO_LOAD)
    loading = tmp_path / "loading"
    before = stored(repo)
    words = ["-r", repo, "backup", stock.source, "--name", "v"]
    with Running(*words, env={"PYTHONPATH": str(tmp_path), "LOADING": str(loading)}) as going:
        said = interrupted(going, number, "it was being loaded", loading.exists)
    assert said == "blockbak: Interrupted; nothing was begun.\n"
    is_as_before(repo, before)


# --- wherever the tests run ------------------------------------------------------------------------------------

# What nohup does, and a shell to what it starts in the background of a script.
_IGNORING = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_child_of_the_tests_ignores_no_signal() -> None:
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    (ignored,) = re.findall(r"^SigIgn:\s*([0-9a-f]+)$", status, re.MULTILINE)
    assert not [number for number in SIGNALS if int(ignored, 16) & 1 << (number - 1)]


def test_nor_where_the_tests_themselves_were_started_so() -> None:
    pytest_words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"{__file__}::test_a_child_of_the_tests_ignores_no_signal",
    ]
    words = [sys.executable, "-c", _IGNORING, sys.executable, *pytest_words]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
