"""The ways by which people are told, and what becomes of broken ones: a sentence, never an error."""

from __future__ import annotations

import http.server
import json
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blockbak.errors import Interrupted
from blockbak.host import notifier
from blockbak.model import telling
from blockbak.model.telling import Outcome

NOW = datetime(2026, 5, 4, 2, 30, tzinfo=UTC)


def never():
    pass


@pytest.fixture
def event():
    bad = Outcome("web", "0a" * 16, "h1", NOW, 1, "NoSuchSource", "vg/x does not exist.", volumes=["a", "b"])
    (made,) = telling.after(bad, failing=False)
    return made


@pytest.fixture
def safe(as_root):
    """A directory that nobody but root can write to, and none above it: pytest's own are below /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="blockbak-test-", dir="/run"))
    yield folder
    shutil.rmtree(folder)


def program(folder, text):
    path = folder / "tell"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# --- a command -----------------------------------------------------------------------------------------------


def test_a_command_has_the_facts_in_its_environment_and_on_standard_input(event, safe):
    path = program(safe, f'cat >{safe}/document; env >{safe}/environment; echo "$@" >{safe}/words')
    assert notifier.by_command([path, "a b", "c"], event, never) == ""
    document = json.loads((safe / "document").read_text())
    assert document["event"] == "failure"
    assert document["message"] == "vg/x does not exist."
    assert document["volumes"] == ["a", "b"]
    assert "BLOCKBAK_VOLUMES=a b" in (safe / "environment").read_text().splitlines()
    assert (safe / "words").read_text() == "a b c\n"


def test_a_command_that_fails_or_is_not_there_is_a_sentence(event, safe):
    assert notifier.by_command([program(safe, "echo no mail here >&2; exit 7")], event, never) == (
        "tell failed (7): no mail here"
    )
    assert notifier.by_command([str(safe / "nowhere")], event, never) == (
        f"{safe}/nowhere cannot be looked at: No such file or directory."
    )


def test_a_command_that_others_may_exchange_is_not_run(event, safe):
    path = program(safe, f"touch {safe}/ran")
    Path(path).chmod(0o777)
    assert "others than root may write it" in notifier.by_command([path], event, never)
    assert not (safe / "ran").exists()


def test_a_command_that_hangs_is_ended_at_its_deadline(event, safe):
    begun = time.monotonic()
    reason = notifier.by_command([program(safe, "sleep 100")], event, never, seconds=0.5)
    assert reason.startswith("tell failed (still running after 0.5 s)")
    assert time.monotonic() - begun < 10


def test_ctrl_c_ends_the_command_and_comes_through(event, safe):
    def check():
        raise Interrupted(state="nothing is left half-made")

    with pytest.raises(Interrupted):
        notifier.by_command([program(safe, "sleep 100")], event, check)


# --- addresses -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A web server that takes messages; ``status`` is what it answers."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.taken.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(self.server.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.taken, made.status = [], 200
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def address(server):
    return f"json://user:secret@127.0.0.1:{server.server_port}/hook"


def test_a_webhook_gets_subject_and_text(event, server):
    assert notifier.by_urls([address(server)], event, never) == ""
    ((path, message),) = server.taken
    assert path == "/hook"
    assert message["title"] == "blockbak: job web on h1 failed"
    assert message["message"] == "vg/x does not exist."
    assert message["type"] == "failure"


def test_one_address_that_fails_does_not_keep_the_others_from_being_told(event, server):
    reason = notifier.by_urls(["nonsense://secret", "json://127.0.0.1:1/secret", address(server)], event, never)
    assert reason == "Nobody was told by nonsense, json: it could not be sent."
    assert len(server.taken) == 1


def test_addresses_are_looked_at_without_telling_anybody(server):
    assert notifier.not_understood([address(server)]) == ""
    reason = notifier.not_understood([address(server), "nonsense://secret", "mailto://"])
    assert reason == "apprise does not understand the address nonsense://…, mailto://…"
    assert server.taken == []


def test_a_sender_that_breaks_has_told_nobody(event):
    no_address = None
    assert notifier.by_urls([no_address], event, never) == "Nobody was told by mail or web: it broke down."


def test_a_server_that_refuses_is_a_sentence_without_secrets(event, server):
    server.status = 500
    reason = notifier.by_urls([address(server)], event, never)
    assert reason == "Nobody was told by json: it could not be sent."


def test_an_address_that_hangs_is_ended_at_its_deadline(event):
    reason = notifier.by_urls(["json://192.0.2.1/secret"], event, never, seconds=0.2)
    assert reason == "Nobody was told by mail or web: still running after 0.2 s."
