"""Messages as lines of a log: for people, as JSON, and in systemd's journal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from blockbak.host import journald
from tests.cli.jobs import Place
from tests.cli.program import LIMIT_SECONDS, PROGRAM, environment, ok, run


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_any_verb_logs_where_it_is_asked_to(place):
    source = str(place.source)
    ended = ok("--log", "json", "-r", str(place.repository), "backup", source, "--kind", "full")
    assert b"made in" in ended.out, "answers stay where they were"
    ended = run("-r", str(place.repository), "show", "nonsense", env={"BLOCKBAK_LOG": "json"})
    (line,) = [json.loads(text) for text in ended.err.splitlines()]
    assert (line["level"], line["error"]) == ("error", "NoSuchPoint")
    assert len(line["run"]) == 32
    assert line["time"].endswith("Z")
    ended = run("--log", "human", "-r", str(place.repository), "show", "nonsense")
    assert ended.said.startswith("blockbak: error: There is no restore point nonsense.")
    assert "[run " in ended.said


def test_a_form_that_is_none_is_refused():
    assert run("--log", "xml", "list").status == 2
    assert run("list", env={"BLOCKBAK_LOG": "xml"}).status == 2


def test_names_that_would_steer_a_terminal_do_not(place):
    evil = place.path / "a\x1b[2J\nb.img"
    for form in ("human", "json"):
        ended = run("--log", form, "-r", str(place.repository), "backup", str(evil))
        assert ended.status == 1
        assert b"\x1b[2J" not in ended.err
        assert len(ended.err.splitlines()) == 1


def test_what_the_journal_gets_can_be_told_apart(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "journal"))
        assert journald.send({"MESSAGE": "one", "BLOCKBAK_RUN": "0a"}, str(tmp_path / "journal"))
        assert server.recv(1 << 16) == b"MESSAGE=one\nBLOCKBAK_RUN=0a\n"
        assert journald.send({"MESSAGE": "one\ntwo"}, str(tmp_path / "journal"))
        assert server.recv(1 << 16) == b"MESSAGE\n\x07\0\0\0\0\0\0\0one\ntwo\n"
    assert not journald.send({"MESSAGE": "one"}, str(tmp_path / "nowhere"))


def test_without_a_journal_its_lines_are_on_standard_error_with_their_priority(place):
    if Path(journald.SOCKET).exists():
        pytest.skip("this machine has a journal")
    ended = run("--log", "journal", "-r", str(place.repository), "show", "nonsense")
    assert ended.said.startswith("<3>There is no restore point nonsense.")


def test_a_run_whose_messages_go_to_the_journal_logs_there(place):
    """By what systemd says of the stream; where no journal is, such a line shows the priority that it would have."""
    if Path(journald.SOCKET).exists():
        pytest.skip("this machine has a journal")
    reader, writer = os.pipe()
    info = os.fstat(writer)
    done = subprocess.run(
        [*PROGRAM, "run"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=writer, check=False,
        env=environment(place.env | {"JOURNAL_STREAM": f"{info.st_dev}:{info.st_ino}"}), timeout=LIMIT_SECONDS,
    )  # fmt: skip
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    assert done.returncode == 0
    assert all(line.startswith("<6>") for line in said.splitlines())
    assert "made in" in said
