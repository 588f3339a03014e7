"""What people are told of, and in which words."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

from blockbak.model import telling
from blockbak.model.telling import Age, Outcome

NOW = datetime(2026, 5, 4, 2, 30, tzinfo=UTC)


def outcome(**facts):
    return Outcome(**({"job": "web", "run": "0a" * 16, "host": "h1", "moment": NOW} | facts))


def test_a_failure_is_told_each_time_and_a_recovery_once():
    bad = outcome(exit=1, error="NoSuchSource", reason="vg/x does not exist.", volumes=["h1-vg-x"])
    for failing in (False, True):
        (event,) = telling.after(bad, failing=failing)
        assert (event.kind, event.subject) == ("failure", "blockbak: job web on h1 failed")
        assert event.text == "vg/x does not exist."
    (event,) = telling.after(outcome(), failing=True)
    assert (event.kind, event.subject) == ("recovery", "blockbak: job web on h1 is well again")
    assert telling.after(outcome(), failing=False) == []


def test_a_point_that_needs_a_look_is_told_as_such():
    (event,) = telling.after(outcome(exit=3, reason="4096 bytes could not be read."), failing=False)
    assert event.subject == "blockbak: job web on h1 needs a look"


def test_a_missing_point_is_told_once_a_day():
    old = Age("vg/a", "h1-vg-a", NOW - timedelta(hours=30), 86400.0)
    none, new = Age("vg/b", "", None, 1200.0), Age("vg/c", "h1-vg-c", NOW - timedelta(hours=1), 86400.0)
    late = telling.missed([old, none, new], NOW)
    assert late == [old, none]
    for told, wanted in ((None, True), (NOW - timedelta(hours=23), False), (NOW - timedelta(days=1), True),
                         (NOW + timedelta(days=400), True)):  # fmt: skip
        event = telling.missing("web", late, NOW, told, run="1", host="h1", repository="/r")
        assert (event is not None) == wanted, told
    event = telling.missing("web", late, NOW, None, run="1", host="h1", repository="/r")
    assert event.environment()["BLOCKBAK_REPOSITORY"] == "/r"
    assert event.text.splitlines() == [
        "vg/a: its newest point is of 2026-05-02 20:30 UTC; at most 24 h are allowed.",
        "vg/b: it has no point; at most 20 min 00 s are allowed.",
    ]
    assert telling.missing("web", [], NOW, None, run="1", host="h1", repository="/r") is None


def test_facts_are_an_environment_and_a_document():
    (event,) = telling.after(
        outcome(
            exit=1, error="NoSuchSource", reason="vg/x does not exist.\0", volumes=["a", "b"], seconds=1.5,
            details={"errors": [{"name": "NoSuchSource"}]},
        ),
        failing=False,
    )  # fmt: skip
    found = event.environment()
    assert found["BLOCKBAK_EVENT"] == "failure"
    assert found["BLOCKBAK_VOLUMES"] == "a b"
    assert found["BLOCKBAK_EXIT"] == "1"
    assert found["BLOCKBAK_TIME"] == "2026-05-04T02:30:00+00:00"
    assert found["BLOCKBAK_MESSAGE"] == "vg/x does not exist."
    assert "BLOCKBAK_ERRORS" not in found, "objects are no words"
    document = json.loads(json.dumps(event.document()))
    assert (document["volumes"], document["errors"]) == (["a", "b"], [{"name": "NoSuchSource"}])
