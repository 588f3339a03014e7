"""Jobs as a timer and a person run them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.cli.jobs import Place
from tests.cli.program import Terminal, fails, grown, ok


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def log(ended) -> list[dict]:
    """The lines of a run that was not on a terminal."""
    return [json.loads(line) for line in ended.err.splitlines()]


def test_a_job_is_run_and_then_nothing_is_due(place):
    made = place.document("run")
    (job,) = made["jobs"]
    assert (job["state"], job["exit"], [point["kind"] for point in job["points"]]) == ("done", 0, ["full"])
    assert job["due"][0]["reason"] == "the volume has no point yet"
    (job,) = place.document("run", "web")["jobs"]
    assert (job["state"], job["points"]) == ("not due", [])
    (job,) = place.document("run", "--force")["jobs"]
    assert [point["kind"] for point in job["points"]] == ["incremental"]
    assert len(ok("-r", place.repository, "list", "--json").document) == 2


def test_each_line_of_the_log_says_run_job_volume_and_point(place):
    ended = place.run("run")
    assert ended.status == 0
    lines = log(ended)
    assert len({line["run"] for line in lines}) == 1
    assert all(line["job"] == "web" for line in lines)
    made = lines[-1]
    (point,) = ok("-r", place.repository, "list", "--json").document
    assert (made["point"], made["volume"]) == (point["point"], point["volume"])
    assert made["level"] == "info"
    assert made["message"] == ended.text.removesuffix("\n"), "the answer is where answers are, too"


def test_a_failure_is_a_line_with_its_name(place):
    place.configure(source=place.path / "nowhere")
    ended = place.run("run")
    assert ended.status == 1
    line = log(ended)[-1]
    assert (line["level"], line["error"], line["job"]) == ("error", "NoSuchSource", "web")
    document = place.document("run", status=1)
    assert document["error"]["name"] == "NoSuchSource"
    assert document["jobs"][0]["state"] == "failed"


def test_on_a_terminal_people_are_spoken_to(place):
    with Terminal("run", env=place.env) as terminal:
        ended = terminal.end()
    assert ended.status == 0
    assert b"a full is due: the volume has no point yet." in ended.err
    assert b"full" in ended.out
    assert ended.out.endswith(b"consistency cold.\n")


def test_a_dry_run_says_what_and_why_and_makes_nothing(place):
    ended = place.ok("--log", "human", "run", "--dry-run")
    assert f"{place.source}: a full is due: the volume has no point yet." in ended.text
    assert "would make a full" in ended.text
    assert not list(place.repository.glob("*/*.zst"))
    assert not place.state.exists()


def test_a_job_that_is_not_there_is_named_and_so_are_those_that_are(place):
    ended = fails(1, "NoSuchJob", "run", "wbe", env=place.env | {"BLOCKBAK_LOG": "human"})
    assert ended.error["message"] == "The configuration has no job wbe; it has: web."


def test_a_broken_configuration_runs_nothing(place):
    place.configure('schedule = "dayly"\nlimit = "1K"')
    ended = fails(1, "BadConfig", "run", env=place.env | {"BLOCKBAK_LOG": "human"})
    assert ended.error["notes"] == [
        f"{place.file}, line 5: jobs.web.schedule: 'dayly' is no calendar; take "
        + ended.error["notes"][0].partition("; take ")[2],
        f"{place.file}, line 6: jobs.web.limit: takes at least 64K",
    ]
    assert not list(place.repository.glob("*/*.zst"))


def test_no_configuration_is_a_sentence_that_says_what_to_do(tmp_path):
    ended = fails(1, "NoConfig", "--log", "human", "run", "--config", str(tmp_path / "none.toml"))
    assert "no such file or directory" in ended.error["message"]


def reads(place: Place, running) -> None:
    """Come back once a run has begun to write an image."""
    running.until("it reads", lambda: any(grown(folder, "*.partial")() for folder in place.repository.glob("*")))


def files(place: Place) -> list[str]:
    """What lies in the volumes but their locks."""
    return [path.name for path in place.repository.glob("*/*") if path.name != ".lock"]


@pytest.mark.slow
def test_two_runs_of_a_job_never_overlap(place, slow):
    place.configure('limit = "8M"', source=slow)
    with place.running("run", "web") as first:
        reads(place, first)
        first.pause()
        second = place.document("run")
        assert (second["jobs"][0]["state"], second["jobs"][0]["points"]) == ("running", [])
        forced = place.document("run", "--force", status=1)
        assert forced["error"]["name"] == "JobRuns"
        assert forced["error"]["fields"]["pid"] == first.pid
        with place.running("run", "--wait", "40", "--json") as waiting:
            waiting.until("it waits", lambda: "waiting for it to end" in waiting.said())
            assert first.go_on().end().status == 0
            ended = waiting.end()
    assert (ended.status, ended.document["jobs"][0]["state"]) == (0, "not due")


@pytest.mark.slow
def test_a_run_past_its_deadline_is_ended_cleanly(place, slow):
    place.configure('limit = "256K"\ndeadline = "2s"', source=slow)
    document = place.document("run", status=1)
    assert document["error"]["name"] == "DeadlinePassed"
    assert files(place) == []


@pytest.mark.slow
def test_a_signal_ends_a_run_cleanly_and_the_next_one_makes_up_for_it(place, slow):
    place.configure('limit = "1M"', source=slow)
    with place.running("run", "--json") as running:
        reads(place, running)
        ended = running.signal(signal.SIGTERM).end()
    assert ended.status == 130
    assert ended.document["error"]["name"] == "Interrupted"
    assert files(place) == []
    place.configure("idle = true", source=slow)
    assert place.document("run")["jobs"][0]["points"][0]["kind"] == "full"


@pytest.mark.slow
def test_a_run_that_was_killed_is_told_by_what_systemd_starts_then(place, slow):
    place.configure('limit = "1M"', source=slow)
    with place.running("run") as running:
        reads(place, running)
        running.signal(signal.SIGKILL)
    assert place.document("timers", "failed", "web") == {"job": "web", "unfinished": True}
    assert place.document("timers", "failed", "web") == {"job": "web", "unfinished": False}
    place.configure(source=slow)
    assert place.document("run")["jobs"][0]["state"] == "done"
