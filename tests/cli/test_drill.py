"""``blockbak drill`` as a person and as a script meets it; what it does to file systems is in ``host``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.jobs import Place
from tests.cli.program import PLAIN, PLAIN_UID, document, fails, ok, run
from tests.cli.stock import Stock, copied
from tests.host.stage import flip


def test_a_drill_says_what_was_proven_and_in_what_time(repo: Stock, tmp_path: Path, as_root: None) -> None:
    ended = ok("-r", repo.path, "drill", repo.newest, "--scratch", tmp_path)
    first, second, *rest = ended.text.splitlines()
    assert first.startswith(f"Drilled {repo.newest} of web in ")
    assert first.endswith(": all as it should be.")
    assert f"restored to a file in {tmp_path}, " in second
    assert second.endswith(" read back and equal.")
    assert rest[-1].startswith("  Steps: restore ")
    assert ended.err == b""


def test_the_document_has_every_step(repo: Stock, tmp_path: Path, as_root: None) -> None:
    words = ["-r", repo.path, "drill", repo.newest, "--scratch", tmp_path, "--check", "sh -c umask"]
    # A timer's is closed; a server that the check starts as another user must get at what the check makes for it.
    found = document(*words, umask=0o077)
    assert found["errors"] == []
    (one,) = found["drills"]
    assert (one["ok"], one["point"], one["volume"], one["check_status"]) == (True, repo.newest, "web", 0)
    assert one["check_output"] == "0022"
    assert list(one["seconds"]) == ["restore", "read back", "look", "check command"]
    assert one["rto_seconds"] == pytest.approx(sum(one["seconds"].values()), abs=0.01)
    assert one["verified_bytes"] == one["device_bytes"]


def test_status_tells_of_the_last_drill(repo: Stock, tmp_path: Path, as_root: None) -> None:
    words = ["-r", repo.path, "drill", repo.newest, "--scratch", tmp_path]
    ok(*words)
    web = document("-r", repo.path, "status", "web", "--rto", "1h")["volumes"][0]
    assert (web["drilled"]["point"], web["drilled"]["ok"], web["rto_met"]) == (repo.newest, True, True)
    found = document("-r", repo.path, "status", "web", "--rto", "0.0001s", status=3)
    assert [one["name"] for one in found["reasons"]] == ["RtoMissed"]
    assert run(*words, "--check", "false").status == 3
    found = document("-r", repo.path, "status", "web", status=3)
    assert [one["name"] for one in found["reasons"]] == ["DrillFailed"]
    assert "The check command false ended with 1" in found["reasons"][0]["text"]
    ok(*words)
    assert document("-r", repo.path, "status", "web")["ok"] is True


def test_all_volumes_are_drilled_whatever_becomes_of_one(repo: Stock, tmp_path: Path, as_root: None) -> None:
    image = repo.path / "db" / f"{repo.db}.full.zst"
    flip(image, image.stat().st_size // 3)
    found = document("-r", repo.path, "drill", "--scratch", tmp_path, status=4)
    assert [one["volume"] for one in found["drills"]] == ["web"]
    assert [one["name"] for one in found["errors"]] == ["DamagedImage"]


@pytest.mark.parametrize(
    "words",
    [
        ["--yes"],
        ["--target", "/dev/null"],
        ["latest", "--target", "/dev/null", "--scratch", "."],
        ["latest", "--boot-pattern", "(", "--boot"],
        ["latest", "--check", "'unclosed"],
        ["latest", "--check", ""],
        ["latest", "--check", " "],
        ["latest", "--check-seconds", "0"],
        ["latest", "--job", "web"],
        ["latest", "--config", "/nowhere"],
    ],
)
def test_words_that_do_not_go_together(stock: Stock, words: list[str]) -> None:
    assert run("-r", stock.path, "drill", *words).status == 2


def test_a_repository_without_points(tmp_path: Path, as_root: None) -> None:
    ok("init", tmp_path / "new")
    assert "no point yet" in ok("-r", tmp_path / "new", "drill").text
    assert document("-r", tmp_path / "new", "drill") == {"drills": [], "errors": []}


def test_a_job_is_drilled_as_it_says(tmp_path: Path, as_root: None) -> None:
    place = Place(tmp_path)
    check = 'check = ["/bin/sh", "-c", "echo $BLOCKBAK_VOLUME; exit 9"]'
    place.configure(more=f'[jobs.web.drill]\nschedule = "yearly"\n{check}')
    assert (
        place.document("drill", "--job", "web", status=1)["error"]["message"] == "There is no restore point of job web."
    )
    place.run("run")
    (one,) = place.document("drill", "--job", "web", "--scratch", tmp_path, status=3)["drills"]
    assert (one["check_status"], one["check_output"]) == (9, one["volume"])
    # What the command line says goes first.
    (one,) = place.document("drill", "--job", "web", "--check", "true", "--scratch", tmp_path)["drills"]
    assert one["check_status"] == 0
    (web,) = place.document("status")["volumes"]
    assert web["drilled"]["ok"] is True
    last = document("-r", place.repository, "history")["entries"][-1]
    assert (last["event"], last["job"]) == ("drilled", "web")
    assert place.document("drill", "--job", "db", status=1)["error"]["name"] == "NoSuchJob"


def test_a_drill_takes_root(stock: Stock, public: Path) -> None:
    mine = copied(stock, public)
    for path in [mine.path, *mine.path.rglob("*")]:
        shutil.chown(path, PLAIN_UID)
    # Root without root's powers is told by the kernel that it is none.
    name = "NoPlaceApart" if PLAIN_UID == 0 else "NoPermission"
    fails(1, name, "-r", mine.path, "drill", mine.newest, "--scratch", public, program=PLAIN)
