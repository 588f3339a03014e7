"""``blockbak prune``, ``pin`` and ``unpin``."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from tests.cli.program import document, ok, run


def files(repo, volume="web"):
    return sorted(path.name for path in (repo.path / volume).glob("*.zst"))


def test_a_dry_run_tells_what_and_why_and_changes_nothing(repo):
    before = files(repo)
    (report,) = document("-r", repo.path, "prune", "web", "--keep-last", "1", "--dry-run")["volumes"]
    assert [one["action"] for one in report["decisions"]] == ["expire", "expire", "keep"]
    assert [one["point"] for one in report["decisions"]] == list(repo.web)
    assert report["decisions"][2]["reasons"] == ["one of the last 1"]
    assert report["dry_run"] is True
    assert sorted(report["removed"]) == [one for one in before if not one.startswith(repo.newest) or "diff" in one]
    assert report["freed_bytes"] > 0
    text = ok("-r", repo.path, "prune", "web", "--keep-last", "1", "--dry-run").text
    assert text.splitlines()[0].split() == ["point", "made", "(UTC)", "what", "why"]
    assert "1 point kept, 2 would be removed" in text
    assert files(repo) == before


def test_all_volumes_are_pruned_and_every_kept_point_restores(repo, tmp_path):
    before = len(document("-r", repo.path, "history")["entries"])
    found = document("-r", repo.path, "prune", "--keep-last", "2")
    assert [one["volume"] for one in found["volumes"]] == ["db", "web"]
    assert found["errors"] == []
    web = found["volumes"][1]
    assert [one["action"] for one in web["decisions"]] == ["merge", "keep", "keep"]
    assert web["composed"] == [f"{repo.web[1]}.full.zst"]
    # Two points of one second are in no order by their names.
    assert files(repo) == sorted([f"{repo.web[1]}.full.zst", f"{repo.newest}.full.zst"])
    events = [(one["event"], one["volume"]) for one in document("-r", repo.path, "history")["entries"]]
    assert events[before:] == [("merged", "web"), ("removed", "web")]
    for point in repo.web[1:]:
        target = tmp_path / point
        ok("-r", repo.path, "restore", point, target)
        assert target.read_bytes() == repo.held[point]
    assert run("-r", repo.path, "verify").status == 0
    assert ok("-r", repo.path, "prune", "web", "--keep-last", "2").text.splitlines()[-1].startswith(
        "web: 2 points kept, 0 removed"
    )  # fmt: skip


def test_without_a_rule_nothing_is_done(repo):
    for words in ((), ("--keep-verified", "2"), ("--keep-last", "0")):
        ended = run("-r", repo.path, "prune", *words)
        assert ended.status == 2
        assert "No rule" in ended.said


@pytest.mark.parametrize(
    "words",
    [("--keep-within", "soon"), ("--keep-last", "-1"), ("--keep-last", "1", "--as-of", "then"),
     ("--keep-last", "1", "--full-every", "often")],
)  # fmt: skip
def test_what_makes_no_sense_is_wrong_usage(repo, words):
    assert run("-r", repo.path, "prune", *words).status == 2


def test_years_are_simulated(repo):
    before = files(repo)
    year = datetime.now(UTC).year + 3
    words = ("--keep-monthly", "6", "--keep-yearly", "9", "--as-of", f"{year}-07-01")
    stock = document("-r", repo.path, "prune", "db", *words)["volumes"][0]
    assert stock["as_of"].startswith(f"{year}-07-01")
    simulated = [one for one in stock["decisions"] if one["simulated"]]
    # A single point a day, as it is assumed: six months, and the years before.
    assert 7 <= len(simulated) <= 10
    assert all(one["reasons"] and one["action"] == "keep" for one in simulated)
    assert simulated[-1]["created"].startswith(f"{year}-07-01")
    assert "kept as of" in ok("-r", repo.path, "prune", "db", *words).text
    # In the past only what there was counts.
    assert document("-r", repo.path, "prune", "web", "--keep-last", "1", "--as-of", "2020-01-01")["volumes"][0][
        "decisions"
    ] == []  # fmt: skip
    assert files(repo) == before


def test_a_full_that_is_due_is_told(repo):
    ended = run("-r", repo.path, "prune", "web", "--keep-last", "9", "--full-every", "1s", "--dry-run")
    assert ended.status == 0
    assert "a full is due" in ended.said
    assert document("-r", repo.path, "prune", "web", "--keep-last", "9", "--dry-run")["volumes"][0]["full_due"] is False


def test_damage_is_left_and_told(repo):
    image = repo.path / "web" / f"{repo.web[1]}.incremental.zst"
    image.unlink()
    ended = run("-r", repo.path, "prune", "web", "--keep-last", "1", "--json")
    assert ended.status == 3
    (report,) = ended.document["volumes"]
    assert any(image.name in line for line in report["damage"])
    assert f"{repo.newest}.full.zst" in files(repo)


def test_pins(repo):
    point, before = repo.oldest, len(document("-r", repo.path, "history")["entries"])
    made = document("-r", repo.path, "pin", point, "--why", "the first")
    assert (made["point"], made["why"], made["immutable"], made["until"]) == (point, "the first", False, "")
    kept = document("-r", repo.path, "prune", "web", "--keep-last", "1", "--dry-run")["volumes"][0]["decisions"]
    assert kept[0]["action"] == "keep"
    assert [one["pin"] is not None for one in document("-r", repo.path, "list", "web")] == [True, False, False]
    assert "pinned" in ok("-r", repo.path, "list", "web").text
    assert "the first" in kept[0]["reasons"][0]
    refused = run("-r", repo.path, "delete", *repo.web, "--json")
    assert (refused.status, refused.error["name"]) == (5, "PointPinned")
    assert "is no longer pinned" in ok("-r", repo.path, "unpin", point).text
    assert run("-r", repo.path, "unpin", point).status == 1
    assert run("-r", repo.path, "pin", point, "--why", " ").status == 2
    assert run("-r", repo.path, "pin", point).status == 2
    assert run("-r", repo.path, "pin", point, "--why", "law", "--immutable").status == 2
    text = ok("-r", repo.path, "pin", point, "--why", "law", "--immutable", "--until", "2999-12-31").text
    assert "immutable until 2999-12-31 23:59" in text
    # The script in the repository passes over what it does not know.
    rescue = [sys.executable, repo.path / "rescue.py", "list"]
    listed = subprocess.run(rescue, capture_output=True, text=True, check=True).stdout
    assert all(one in listed for one in repo.web)
    for words in (("unpin", point), ("delete", *repo.web), ("pin", point, "--why", "other")):
        ended = run("-r", repo.path, *words, "--json")
        assert (ended.status, ended.error["name"]) == (5, "PointImmutable")
    assert [one["event"] for one in document("-r", repo.path, "history")["entries"]][before:] == [
        "pinned", "removed", "unpinned", "unpinned", "pinned", "unpinned", "removed", "pinned",
    ]  # fmt: skip
