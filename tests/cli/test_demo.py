"""`blockbak demo`: to its last line, and broken off at any moment without a trace."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.program import Running, fails, grown, ok, run
from tests.conftest import leftovers

pytestmark = pytest.mark.root

STEPS = [
    "full", "incremental", "differential", "restore of the full", "restore of full + incremental",
    "restore of full + differential", "synthetic full", "restore of the synthetic full", "zstd -dc of the full",
    "rescue.py, full + incremental",
]  # fmt: skip


def demo(place: Path, *words: str) -> tuple[str, ...]:
    return ("demo", "--size", "64M", "--dir", str(place), *words)


def is_gone(place: Path) -> None:
    assert os.listdir(place) == []
    # A detached loop device is there until whoever looks at it has closed it.
    deadline = time.monotonic() + 10
    while (left := leftovers(place)).loops and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left.loops, str(left)
    assert not left.mounts, str(left)


@pytest.mark.slow
def test_the_demo_proves_what_it_says_and_leaves_nothing(as_root, tmp_path: Path) -> None:
    ended = ok(*demo(tmp_path))
    assert ended.text.splitlines()[-1].startswith("Proven: 3 points"), str(ended)
    for step in STEPS:
        assert step in ended.text
    assert ended.text.count("equal") >= 6
    is_gone(tmp_path)


@pytest.mark.slow
def test_the_demo_tells_scripts_the_same(as_root, tmp_path: Path) -> None:
    found = run(*demo(tmp_path, "--json")).document
    assert [row["step"] for row in found["rows"]] == STEPS
    assert found["proven"].startswith("Proven: 3 points")
    assert found["restores"] == sum(row["proof"] == "equal" for row in found["rows"]) == 6
    assert found["rows"][1]["changed_bytes"] < 64 << 20
    is_gone(tmp_path)


def has_loop(place: Path) -> Callable[[], bool]:
    return lambda: bool(leftovers(place).loops)


def is_mounted(place: Path) -> Callable[[], bool]:
    return lambda: bool(leftovers(place).mounts)


def is_filled(place: Path) -> Callable[[], bool]:
    return grown(place, "*/mnt/usr")


def backs_up(place: Path) -> Callable[[], bool]:
    return grown(place, "*/repository/demo/*.zst.partial")


def restores(place: Path) -> Callable[[], bool]:
    """The second device's file gets its first blocks."""
    return grown(place, "*/target")


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        (has_loop, signal.SIGINT), (is_mounted, signal.SIGTERM), (is_filled, signal.SIGINT), (backs_up, signal.SIGTERM),
        (restores, signal.SIGINT), (restores, signal.SIGTERM),
    ],
)  # fmt: skip
def test_the_demo_broken_off_leaves_nothing(
    moment: Callable[[Path], Callable[[], bool]], number: int, as_root, tmp_path: Path
) -> None:
    with Running(*demo(tmp_path)) as going:
        going.until(moment.__name__, moment(tmp_path)).pause()
        ended = going.signal(number).go_on().end()
    assert ended.status == 130, str(ended)
    assert "Interrupted" in ended.said
    assert ended.out == b""
    is_gone(tmp_path)


def rests(pid: int) -> Callable[[], bool]:
    """Whether a process sleeps and no signal is on its way to it, but for those it has blocked."""

    def look() -> bool:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        coming = int(fields["SigPnd"], 16) | int(fields["ShdPnd"], 16)
        return fields["State"].startswith("S") and not coming & ~int(fields["SigBlk"], 16)

    return look


def test_ctrl_c_pressed_again_while_the_demo_cleans_up_leaves_nothing(as_root, tmp_path: Path) -> None:
    """An umount that takes its time, and a person who does not."""
    place, tools = tmp_path / "place", tmp_path / "tools"
    place.mkdir()
    tools.mkdir()
    begun, go = tmp_path / "begun", tmp_path / "go"
    os.mkfifo(go)
    real = shutil.which("umount")
    slow = tools / "umount"
    slow.write_text(f'#!/bin/sh\n: > "{begun}"\nif [ -p "{go}" ]; then read _ < "{go}"; fi\nexec "{real}" "$@"\n')
    slow.chmod(0o755)
    with Running(*demo(place), env={"PATH": f"{tools}:{os.environ['PATH']}"}) as going:
        going.until("it was filled", is_filled(place)).pause()
        going.signal(signal.SIGINT).go_on().until("it cleaned up", begun.exists)
        going.signal(signal.SIGINT).signal(signal.SIGTERM).until("it took them", rests(going.pid))
        # Both ends at once: what is written stays there until the umount reads it, or nobody does.
        descriptor = os.open(go, os.O_RDWR)
        try:
            os.write(descriptor, b"go on\n")
            go.rename(tmp_path / "gone")
            ended = going.end()
        finally:
            os.close(descriptor)
    assert ended.status == 130, str(ended)
    is_gone(place)


AS_NOBODY = """
import difflib, os, sys
import blockbak.cli.demo, blockbak.flow.demo, blockbak.cli.main
if os.geteuid() == 0:
    os.setresuid(65534, 65534, 65534)
sys.argv[0] = "blockbak"
blockbak.cli.main.main()
"""
"""The program is imported before root is left: the checkout, and Python, may be root's alone."""


def test_the_demo_needs_root(public: Path) -> None:
    fails(1, "NoPermission", *demo(public), program=(sys.executable, "-P", "-c", AS_NOBODY))
    is_gone(public)
