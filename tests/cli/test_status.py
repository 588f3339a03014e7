"""``blockbak status``: what it says of each volume, its reasons, and its formats."""

from __future__ import annotations

import os
import shutil
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from blockbak.repository.record import HEAD, HISTORY
from tests.cli.jobs import Place
from tests.cli.program import document, fails, ok, run
from tests.cli.stock import Stock
from tests.expositions import parse
from tests.host.stage import flip


def of(found, name):
    (one,) = [volume for volume in found["volumes"] if volume["volume"] == name]
    return one


def reasons(found) -> list[tuple[str, str]]:
    return [(one["volume"], one["name"]) for one in found["reasons"]]


@pytest.fixture
def unverified(repo: Stock) -> Stock:
    """A stock whose history does not tell who looked at it before, as other tests do."""
    for name in (HISTORY, HEAD):
        (repo.path / name).unlink()
    return repo


def test_a_stock_that_is_as_it_should_be(unverified: Stock) -> None:
    stock = unverified
    found = document("-r", stock.path, "status")
    assert found["ok"] is True
    assert found["reasons"] == []
    web = of(found, "web")
    # A synthetic full holds the newest point: one image restores it.
    assert (web["newest"], web["points"], web["chain_images"]) == (stock.newest, 3, 1)
    assert web["stored_bytes"] == sum(
        image["stored_bytes"] for one in stock.points() if one["volume"] == "web" for image in one["images"]
    )
    made = datetime.fromisoformat(web["newest_at"])
    assert 0 <= (datetime.now(UTC) - made).total_seconds() - web["age_seconds"] < 60
    assert (web["verified_share"], web["drilled"], web["rpo_met"], web["rto_met"]) == (0, None, None, None)
    assert found["room"]["free_bytes"] > 0
    ended = ok("-r", stock.path, "status")
    assert stock.newest in ended.text
    assert ended.err == b""


def test_an_rpo_that_is_missed_and_one_that_is_not(stock: Stock) -> None:
    assert document("-r", stock.path, "status", "--rpo", "52w")["ok"] is True
    found = document("-r", stock.path, "status", "--rpo", "0.001s", status=3)
    assert set(reasons(found)) == {("web", "RpoMissed"), ("db", "RpoMissed")}
    assert of(found, "web")["rpo_met"] is False
    ended = run("-r", stock.path, "status", "--rpo", "0.001s")
    assert ended.status == 3
    assert "blockbak: web: Its newest good point is " in ended.said


def test_one_volume_alone(stock: Stock) -> None:
    found = document("-r", stock.path, "status", "db", "--rpo", "0.001s", status=3)
    assert [one["volume"] for one in found["volumes"]] == ["db"]
    assert reasons(found) == [("db", "RpoMissed")]


def test_an_rto_without_a_drill(stock: Stock) -> None:
    found = document("-r", stock.path, "status", "web", "--rto", "1h", status=3)
    assert reasons(found) == [("web", "NeverDrilled")]
    assert found["reasons"][0]["level"] == "warning"


@pytest.mark.parametrize("word", ["soon", "0h", "-1h", "", "26"])
def test_what_is_no_duration_is_a_wrong_command_line(stock: Stock, word: str) -> None:
    assert run("-r", stock.path, "status", "--rpo", word).status == 2


def test_what_verify_found_stands_until_it_finds_otherwise(repo: Stock) -> None:
    ok("-r", repo.path, "verify")
    found = document("-r", repo.path, "status")
    assert of(found, "web")["verified_share"] == 1
    assert of(found, "web")["verified_at"] is not None
    image = repo.path / "db" / f"{repo.db}.full.zst"
    flip(image, image.stat().st_size // 3)
    # Nobody knows before it is looked at.
    assert document("-r", repo.path, "status")["ok"] is True
    assert run("-r", repo.path, "verify").status == 4
    found = document("-r", repo.path, "status", status=3)
    assert reasons(found) == [("db", "NoGoodPoint"), ("db", "VerifyFailed")]
    assert (of(found, "db")["newest"], of(found, "db")["verified_share"]) == ("", 0)
    assert of(found, "web")["ok"] is True
    flip(image, image.stat().st_size // 3)
    ok("-r", repo.path, "verify", repo.db)
    assert document("-r", repo.path, "status")["ok"] is True


def test_a_sample_counts_for_its_share(unverified: Stock) -> None:
    repo = unverified
    ok("-r", repo.path, "verify", "--sample", "25%")
    assert of(document("-r", repo.path, "status"), "web")["verified_share"] == pytest.approx(0.25)


def test_leftovers_and_damage_are_reasons(repo: Stock) -> None:
    (repo.path / "web" / "20260101T000000Z-abcd.full.zst.partial").touch()
    found = document("-r", repo.path, "status", status=3)
    assert reasons(found) == [("web", "Leftovers")]
    assert of(found, "web")["leftovers"] == ["20260101T000000Z-abcd.full.zst.partial"]
    ok("-r", repo.path, "recover")
    assert document("-r", repo.path, "status")["ok"] is True
    (repo.path / "db" / f"{repo.db}.full.zst").unlink()
    found = document("-r", repo.path, "status", status=3)
    assert reasons(found) == [("db", "NoGoodPoint"), ("db", "Damaged")]


def test_a_backup_that_failed_is_a_reason_until_one_does_not(repo: Stock, tmp_path: Path) -> None:
    source = tmp_path / "web.img"
    shutil.copy(repo.source, source)
    ok("-r", repo.path, "backup", source, "--name", "new")
    os.truncate(source, 0)
    assert run("-r", repo.path, "backup", source, "--name", "new").status != 0
    found = document("-r", repo.path, "status")
    # It failed before it was known of which volume it is, and belongs to no job.
    assert found["ok"] is True


def test_a_history_that_was_altered_is_a_reason(repo: Stock) -> None:
    history = repo.path / "history.jsonl"
    history.write_bytes(history.read_bytes().replace(b'"event":"made"', b'"event":"Made"', 1))
    found = document("-r", repo.path, "status", status=3)
    assert reasons(found) == [("", "Damaged")]
    assert "history" in found["reasons"][0]["text"]


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b'"time":"2', b'"time":"r'), (b'Z","host"', b'","host"'), (b'"stored_bytes":', b'"stored_bytes":"x","x":'),
        (b'"share":1', b'"share":[]'),
    ],
)  # fmt: skip
def test_a_history_with_a_nonsensical_line_is_a_reason(repo: Stock, was: bytes, becomes: bytes) -> None:
    ok("-r", repo.path, "verify")
    history = repo.path / HISTORY
    before = history.read_bytes()
    assert was in before
    history.write_bytes(before.replace(was, becomes, 1))
    found = document("-r", repo.path, "status", status=3)
    assert reasons(found) == [("", "Damaged")]
    assert {one["volume"] for one in found["volumes"]} == {"web", "db"}


def test_a_repository_without_points(tmp_path: Path) -> None:
    ok("init", tmp_path / "new")
    found = document("-r", tmp_path / "new", "status")
    assert (found["ok"], found["volumes"]) == (True, [])
    assert "No volume yet." in ok("-r", tmp_path / "new", "status").text


def test_status_takes_no_lock_and_changes_nothing(repo: Stock) -> None:
    before = {path: path.read_bytes() for path in repo.path.rglob("*") if path.is_file()}
    ok("-r", repo.path, "status")
    assert {path: path.read_bytes() for path in repo.path.rglob("*") if path.is_file()} == before


# --- by the configuration ------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_job_that_has_made_no_point_is_a_reason(place: Place) -> None:
    found = place.document("status", status=3)
    assert [(one["volume"], one["name"], one["level"]) for one in found["reasons"]] == [
        ("", "NoPointOfJob", "critical")
    ]
    place.ok("run")
    found = place.document("status")
    assert (found["ok"], found["volumes"][0]["job"]) == (True, "web")


def test_a_volume_is_judged_by_its_job(place: Place) -> None:
    place.ok("run")
    place.configure('rpo = "2d"\nrto = "1h"')
    (web,) = place.document("status", status=3)["volumes"]
    assert web["goals"] == {"rpo": 2 * 86400, "rto": 3600}
    assert [one["name"] for one in web["reasons"]] == ["NeverDrilled"]
    # What the command line says goes first.
    (web,) = place.document("status", "--rpo", "0.001s", status=3)["volumes"]
    assert web["goals"] == {"rpo": 0.001, "rto": 3600}
    ok("-r", place.repository, "backup", place.source, "--name", "other")
    other = of(place.document("status", status=3), "other")
    assert (other["job"], other["goals"]) == ("", {"rpo": None, "rto": None})


def test_a_backup_of_a_job_that_failed_is_a_reason_until_one_does_not(place: Place) -> None:
    place.ok("run")
    held = place.source.read_bytes()
    place.source.unlink()
    assert place.run("run", "--force").status == 1
    found = place.document("status", status=3)
    assert [one["name"] for one in found["reasons"]] == ["BackupFailed"]
    assert "NoSuchSource" in found["reasons"][0]["text"]
    place.source.write_bytes(held)
    place.ok("run", "--force")
    assert place.document("status")["ok"] is True


def test_a_run_that_failed_is_a_reason_whatever_became_of_its_volumes(place: Place) -> None:
    """The first source is of no volume, and the point of the second one is made after that was tried."""
    text = place.file.read_text()
    lost = place.path / "lost.img"
    place.file.write_text(text.replace("sources = [", f'sources = ["{lost}", '))
    assert place.run("run").status == 1
    found = place.document("status", status=3)
    assert [(one["name"], one["text"]) for one in found["reasons"]] == [
        ("JobFailed", "Jobs whose last run failed: web (NoSuchSource).")
    ]
    place.file.write_text(text)
    place.ok("run", "--force")
    assert place.document("status")["ok"] is True


def test_a_configuration_that_cannot_be_used(place: Place) -> None:
    place.file.write_text("nonsense")
    assert place.document("status", status=1)["error"]["name"] == "BadConfig"
    ended = place.run("status", "--format", "nagios")
    assert ended.status == 3
    assert ended.text.startswith("BLOCKBAK UNKNOWN - ")


# --- formats -------------------------------------------------------------------------------------------------


def test_the_text_for_prometheus_is_of_its_format(stock: Stock) -> None:
    found = parse(ok("-r", stock.path, "status", "--format", "prometheus").text)
    here = {"repository": str(stock.path), "volume": "web"}
    assert found["blockbak_points"].value(**here) == 3
    assert found["blockbak_volume_ok"].value(**here) == 1
    ended = run("-r", stock.path, "status", "--rpo", "0.001s", "--format", "prometheus")
    assert ended.status == 3
    assert parse(ended.text)["blockbak_rpo_met"].value(**here) == 0


def test_a_textfile_is_written_beside_any_format(stock: Stock, tmp_path: Path) -> None:
    file = tmp_path / "blockbak.prom"
    document("-r", stock.path, "status", "--textfile", file)
    assert parse(file.read_text())["blockbak_points"].value(volume="db") == 1
    assert file.stat().st_mode & 0o777 == 0o644
    # What a kill left of another run is used.
    (tmp_path / ".blockbak.prom.new").write_text("half of a li")
    assert run("-r", stock.path, "status", "--rpo", "0.001s", "--textfile", file).status == 3
    assert parse(file.read_text())["blockbak_rpo_met"].value(volume="db") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["blockbak.prom"]


def test_whoever_reads_a_textfile_sees_a_whole_one(stock: Stock, tmp_path: Path) -> None:
    from blockbak.host import textfile

    file = tmp_path / "a.prom"
    texts = [f"# TYPE a gauge\na {number}\n" * 1 + "# end\n" * 2000 * number for number in range(2)]
    textfile.replace(str(file), texts[0])
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for text in texts:
                textfile.replace(str(file), text)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for one in writers:
        one.start()
    try:
        assert {file.read_text() for _ in range(500)} <= set(texts)
    finally:
        done.set()
        for one in writers:
            one.join()
    assert [path.name for path in tmp_path.iterdir()] == ["a.prom"]


def test_a_textfile_that_cannot_be_written(stock: Stock, tmp_path: Path) -> None:
    fails(1, "BadTarget", "-r", stock.path, "status", "--textfile", tmp_path / "no" / "where.prom")


@pytest.mark.parametrize("kind", ["link", "pipe", "name"])
def test_nothing_else_is_written_to_where_a_textfile_begins(stock: Stock, tmp_path: Path, kind: str) -> None:
    begun, other = tmp_path / ".a.prom.new", tmp_path / "secret"
    other.write_text("kept")
    other.chmod(0o600)
    if kind == "pipe":
        os.mkfifo(begun)
    else:
        (os.link if kind == "name" else os.symlink)(other, begun)
    fails(1, "BadTarget", "-r", stock.path, "status", "--textfile", tmp_path / "a.prom")
    assert (other.read_text(), other.stat().st_mode & 0o777) == ("kept", 0o600)
    assert not (tmp_path / "a.prom").exists()


def test_a_plugin_has_the_exit_status_of_a_plugin(stock: Stock, tmp_path: Path) -> None:
    ended = ok("-r", stock.path, "status", "--format", "nagios")
    assert ended.text.startswith("BLOCKBAK OK - 2 volumes")
    for words, status, word in (
        (["--rto", "1h"], 1, "WARNING"),
        (["--rpo", "0.001s"], 2, "CRITICAL"),
    ):
        ended = run("-r", stock.path, "status", "--format", "nagios", *words)
        assert (ended.status, ended.text.split(" - ")[0]) == (status, f"BLOCKBAK {word}")
    ended = run("-r", tmp_path, "status", "--format", "nagios")
    assert ended.status == 3
    assert ended.text.startswith("BLOCKBAK UNKNOWN - ")
