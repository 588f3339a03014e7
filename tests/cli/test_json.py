"""The documents that scripts live on: which keys they have, of which type, in success and in trouble."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import document, fails, grown, ok, run
from tests.cli.stock import SECTORS, Stock, overwrite
from tests.patterns import SECTOR

POINT = r"\d{8}T\d{6}Z-[0-9a-f]{4}"
TEXT, NUMBER, FLAG, SECONDS = str, int, bool, (int, float)
NAME_OR_NONE = (str, type(None))

ERROR = {"name": TEXT, "message": TEXT, "exit": NUMBER, "advice": TEXT, "fields": dict}
MADE = {
    "point": TEXT, "volume": TEXT, "kind": TEXT, "synthetic": FLAG, "parent": NAME_OR_NONE, "sequence": NUMBER,
    "mode": TEXT, "consistency": TEXT, "change_source": TEXT, "device_bytes": NUMBER, "read_bytes": NUMBER,
    "changed_bytes": NUMBER, "stored_bytes": NUMBER, "seconds": SECONDS,
}  # fmt: skip
IMAGE = {"kind": TEXT, "synthetic": FLAG, "file": TEXT, "stored_bytes": NUMBER}
VERDICT = {"point": TEXT, "kind": TEXT, "file": TEXT, "ok": FLAG, "damage": list}
FLAW = {"start": NUMBER, "length": NUMBER, "reason": TEXT}
PLAN = {
    "point": TEXT, "volume": TEXT, "images": list, "target": TEXT, "target_bytes": NUMBER, "device_bytes": NUMBER,
    "method": TEXT, "notes": list,
}  # fmt: skip


def is_shaped(value: Any, shape: dict[str, Any]) -> dict[str, Any]:
    """``value`` has at least these keys, each of its type; a flag is no number here."""
    assert isinstance(value, dict), value
    assert shape.keys() <= value.keys(), f"missing: {shape.keys() - value.keys()}"
    for key, kind in shape.items():
        found, kinds = value[key], kind if isinstance(kind, tuple) else (kind,)
        assert isinstance(found, kinds), f"{key}: {found!r}"
        assert isinstance(found, bool) <= (bool in kinds), f"{key}: {found!r}"
    return value


# --- init, devices -------------------------------------------------------------------------------------------


def test_init(tmp_path: Path) -> None:
    made = is_shaped(document("init", tmp_path / "repo"), {"repository": TEXT, "id": TEXT})
    assert made["repository"] == str(tmp_path / "repo")
    assert re.fullmatch("[0-9a-f]{32}", made["id"])


@pytest.mark.parametrize("what", ["a repository", "a full directory", "a file", "no parent"])
def test_init_says_why_not(what: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if what == "a repository":
        ok("init", place)
    elif what == "a full directory":
        place.mkdir()
        (place / "letters").write_text("mine")
    elif what == "a file":
        place.write_text("mine")
    else:
        place = place / "deeper"
    before = sorted(tmp_path.rglob("*"))
    fails(1, "RepositoryExists", "init", place)
    assert sorted(tmp_path.rglob("*")) == before


def test_devices_tells_of_a_loop_device(loop, ext4) -> None:
    device = loop(8 << 20)
    shape = {
        "path": TEXT, "kind": TEXT, "size": NUMBER, "label": TEXT, "identity": dict, "uses": list, "mode": TEXT,
        "reason": TEXT, "read_only": FLAG, "logical_sector": NUMBER, "mounts": list, "holders": list,
    }  # fmt: skip
    for found in document("devices"):
        is_shaped(found, shape)
        is_shaped(found["identity"], {"kind": TEXT, "value": TEXT})
    mine = next(found for found in document("devices") if found["path"] == device.path)
    assert (mine["size"], mine["kind"], mine["mode"], mine["uses"]) == (8 << 20, "loop", "cold", [])
    assert mine["identity"] == {"kind": "file", "value": str(device.file)}
    files = ext4(device)
    mine = next(found for found in document("devices") if found["path"] == device.path)
    assert mine["mode"] == "refused"
    assert str(files.where) in " ".join(mine["uses"])
    assert "--mode live" in mine["reason"]


# --- backup, synthesize ----------------------------------------------------------------------------------------


def test_backup_reports_each_kind(tmp_path: Path) -> None:
    repo, source = tmp_path / "repo", tmp_path / "v.img"
    source.write_bytes(bytes(SECTORS * SECTOR))
    overwrite(source, 0, 400, 1)
    ok("init", repo)
    size = SECTORS * SECTOR
    points = []
    for number, kind in enumerate(["auto", "incremental", "auto", "differential", "full"], 1):
        if number == 3:
            overwrite(source, 128, 1, 2)
        found = document("-r", repo, "backup", source, "--kind", kind)
        assert found["errors"] == []
        (point,) = found["points"]
        is_shaped(point, MADE)
        assert re.fullmatch(POINT, point["point"])
        assert (point["sequence"], point["device_bytes"], point["synthetic"]) == (number, size, False)
        assert (point["mode"], point["consistency"], point["change_source"]) == ("cold", "cold", "scan")
        points.append(point)
    assert [point["kind"] for point in points] == ["full", "incremental", "incremental", "differential", "full"]
    parents = [None, points[0]["point"], points[1]["point"], points[0]["point"], None]
    assert [point["parent"] for point in points] == parents
    assert [point["changed_bytes"] for point in points] == [size, 0, 65536, 65536, size]
    assert len({point["volume"] for point in points}) == 1
    host = re.sub("[^A-Za-z0-9._-]", "-", socket.gethostname())
    assert points[0]["volume"] == f"{host}-v.img".lstrip(".")
    for point in points:
        (file,) = (repo / point["volume"]).glob(f"{point['point']}.{point['kind']}.zst")
        assert file.stat().st_size == point["stored_bytes"]


def test_backup_tries_all_sources_and_takes_the_exit_of_the_first_error(tmp_path: Path) -> None:
    repo, good, more = tmp_path / "repo", tmp_path / "good.img", tmp_path / "more.img"
    good.write_bytes(b"g" * 70_000)
    more.write_bytes(b"m" * 70_000)
    (tmp_path / "empty.img").write_bytes(b"")
    ok("init", repo)
    words = [tmp_path / "none.img", good, tmp_path, tmp_path / "empty.img", more]
    ended = run("-r", repo, "backup", *words, "--json")
    assert ended.status == 1, str(ended)
    found = ended.document
    assert [point["source"] for point in found["points"]] == [str(good), str(more)]
    assert [error["name"] for error in found["errors"]] == ["NoSuchSource", "NotABlockSource", "SourceEmpty"]
    for error in (*found["errors"], found["error"]):
        is_shaped(error, ERROR)
    assert found["error"] == found["errors"][0]
    assert [point["volume"] for point in document("-r", repo, "list")] == [p["volume"] for p in found["points"]]


def test_the_first_error_decides_whatever_comes_after(loop, ext4, tmp_path: Path) -> None:
    device = ext4(loop(16 << 20)).device
    ok("init", tmp_path / "repo")
    for order, status in ((("in use", "missing"), 5), (("missing", "in use"), 1)):
        words = [device.path if word == "in use" else str(tmp_path / "none.img") for word in order]
        found = document("-r", tmp_path / "repo", "backup", *words, status=status)
        assert found["points"] == []
        assert [error["exit"] for error in found["errors"]] == [5 if word == "in use" else 1 for word in order]
        assert found["error"]["exit"] == status


def test_backup_dry_run_has_the_same_document_and_writes_nothing(stock: Stock) -> None:
    before = sorted(stock.path.rglob("*"))
    found = document("-r", stock.path, "backup", stock.source, "--dry-run")
    (point,) = found["points"]
    is_shaped(point, MADE)
    assert (point["point"], point["volume"], point["kind"], point["parent"]) == ("", "web", "incremental", stock.newest)
    assert sorted(stock.path.rglob("*")) == before


def test_a_kind_that_cannot_be_made_says_why(stock: Stock, tmp_path: Path) -> None:
    ok("init", tmp_path / "repo")
    for kind in ("incremental", "differential"):
        found = document("-r", tmp_path / "repo", "backup", stock.source, "--kind", kind, status=1)
        assert found["error"]["name"] == "NoUsableParent"
        assert kind in found["error"]["message"]
    assert not list((tmp_path / "repo").rglob("*.zst*"))


def test_auto_says_why_it_made_a_full(repo: Stock, tmp_path: Path) -> None:
    grew = tmp_path / "grew.img"
    shutil.copyfile(repo.source, grew)
    ended = run("-r", repo.path, "backup", grew, "--name", "web", "--json")
    (point,) = ended.document["points"]
    assert (ended.status, point["kind"], point["parent"]) == (0, "full", None)
    assert "A full is made" in " ".join(point["notes"])
    assert "A full is made" in ended.said


def test_synthesize(repo: Stock) -> None:
    shape = MADE | {"cloned_bytes": NUMBER, "copied_bytes": NUMBER, "encoded_bytes": NUMBER}
    made = is_shaped(document("-r", repo.path, "synthesize", "web", "--at", repo.web[1]), shape)
    assert (made["point"], made["kind"], made["synthetic"], made["parent"]) == (repo.web[1], "full", True, None)
    assert (made["change_source"], made["read_bytes"]) == ("images", 0)
    assert made["cloned_bytes"] + made["copied_bytes"] + made["encoded_bytes"] > 0
    before = sorted(repo.path.rglob("*"))
    again = is_shaped(document("-r", repo.path, "synthesize", "web", "--at", repo.web[1]), shape)
    assert (again["point"], again["root"]) == (made["point"], made["root"])
    assert again["cloned_bytes"] + again["copied_bytes"] + again["encoded_bytes"] == 0
    assert sorted(repo.path.rglob("*")) == before


def test_a_sequence_is_never_used_twice_though_its_manifest_is_damaged(repo: Stock) -> None:
    """One more than the highest ever used, not than the highest that can be read."""
    for manifest in (repo.path / "web").glob(f"{repo.newest}.*.json"):
        manifest.write_bytes(manifest.read_bytes().replace(b"cold", b"hold", 1))
    (point,) = document("-r", repo.path, "backup", repo.source)["points"]
    assert point["volume"] == "web"
    assert point["sequence"] == len(repo.web) + 1


def test_a_sequence_is_never_used_twice_though_its_point_was_deleted(repo: Stock) -> None:
    ok("-r", repo.path, "delete", repo.newest)
    (point,) = document("-r", repo.path, "backup", repo.source)["points"]
    assert point["sequence"] == len(repo.web) + 1


# --- list, show ------------------------------------------------------------------------------------------------


def test_list_has_one_object_a_point_the_newest_last(stock: Stock) -> None:
    shape = {
        key: kind for key, kind in MADE.items() if key not in ("read_bytes", "seconds", "stored_bytes", "change_source")
    }
    found = document("-r", stock.path, "list", "web")
    assert [point["point"] for point in found] == list(stock.web)
    assert [point["sequence"] for point in found] == [1, 2, 3]
    assert [point["created"] for point in found] == sorted(point["created"] for point in found)
    for point in found:
        is_shaped(point, shape | {"created": TEXT, "images": list, "restorable": FLAG})
        for image in point["images"]:
            is_shaped(image, IMAGE)
            assert (stock.path / "web" / image["file"]).stat().st_size == image["stored_bytes"]
    kinds = [[(image["kind"], image["synthetic"]) for image in point["images"]] for point in found]
    assert kinds == [[("full", False)], [("incremental", False)], [("differential", False), ("full", True)]]
    assert {point["point"] for point in stock.points()} == {*stock.web, stock.db}


def test_list_of_nothing_is_an_empty_list(tmp_path: Path) -> None:
    ok("init", tmp_path / "repo")
    assert document("-r", tmp_path / "repo", "list") == []
    assert "No points" in ok("-r", tmp_path / "repo", "list").text


def test_list_lists_what_is_whole_beside_what_is_not(repo: Stock) -> None:
    (repo.path / "web" / f"{repo.web[0]}.full.zst").unlink()
    ended = run("-r", repo.path, "list", "web", "--json")
    assert ended.status == 4, str(ended)
    # The synthetic full holds the newest; the incremental has lost its base.
    found = {point["point"]: point["restorable"] for point in ended.document}
    assert found == {repo.web[1]: False, repo.web[2]: True}
    assert repo.web[0] in ended.said
    for word in (repo.web[1], repo.web[2]):
        assert word in run("-r", repo.path, "list", "web").text


def test_show(stock: Stock) -> None:
    shape = MADE | {
        "created": TEXT, "identity": dict, "source": TEXT, "host": TEXT, "block_bytes": NUMBER, "root": TEXT,
        "window_bytes": NUMBER, "logical_sector": NUMBER, "images": list, "chain": list, "extent_bytes": dict,
        "extent_count": NUMBER, "extents": list, "partition_table": (dict, type(None)), "filesystems": dict,
    }  # fmt: skip
    del shape["stored_bytes"]
    found = is_shaped(document("-r", stock.path, "show", "web@latest"), shape)
    assert (found["point"], found["volume"], found["device_bytes"]) == (stock.newest, "web", SECTORS * SECTOR)
    assert found["chain"] == [f"{stock.newest}.full.zst"]
    assert sum(found["extent_bytes"].values()) == SECTORS * SECTOR
    for row in found["extents"]:
        is_shaped(row, {"start": NUMBER, "length": NUMBER, "kind": TEXT})
    for image in found["images"]:
        is_shaped(image, IMAGE)
    assert found["extent_count"] == len(found["extents"]) == 1
    assert document("-r", stock.path, "show", stock.web[1])["chain"] == [
        f"{stock.web[0]}.full.zst", f"{stock.web[1]}.incremental.zst",
    ]  # fmt: skip


# --- restore, export ---------------------------------------------------------------------------------------------


def test_restore(stock: Stock, tmp_path: Path) -> None:
    target = tmp_path / "out.img"
    shape = {
        "plan": dict, "written_bytes": NUMBER, "verified_bytes": NUMBER, "flaws": list, "unreadable": list,
        "mapfile": TEXT, "seconds": SECONDS,
    }  # fmt: skip
    found = is_shaped(document("-r", stock.path, "restore", stock.web[1], target), shape)
    plan = is_shaped(found["plan"], PLAN)
    assert (plan["point"], plan["target"], plan["method"]) == (stock.web[1], str(target), "create")
    assert found["verified_bytes"] == SECTORS * SECTOR
    assert (found["flaws"], found["unreadable"], found["mapfile"]) == ([], [], "")
    assert target.read_bytes() == stock.held[stock.web[1]]
    assert sorted(os.listdir(tmp_path)) == ["out.img"]
    again = document("-r", stock.path, "restore", stock.newest, target, "--yes", "--no-verify")
    assert again["verified_bytes"] == 0
    assert target.read_bytes() == stock.held[stock.newest]


@pytest.mark.parametrize("exists", [False, True])
def test_restore_dry_run_gives_the_plan_and_writes_nothing(exists: bool, stock: Stock, tmp_path: Path) -> None:
    target = tmp_path / "out.img"
    if exists:
        target.write_bytes(b"precious")
    found = document("-r", stock.path, "restore", stock.newest, target, "--dry-run")
    plan = is_shaped(found["plan"], PLAN)
    assert plan["method"] == ("write" if exists else "create")
    assert plan["target_bytes"] == (8 if exists else 0)
    assert plan["images"] == [f"{stock.newest}.full.zst"]
    assert target.exists() == exists
    assert sorted(os.listdir(tmp_path)) == (["out.img"] if exists else [])
    assert not exists or target.read_bytes() == b"precious"


def test_a_plan_for_people_is_on_standard_output(stock: Stock, tmp_path: Path) -> None:
    """What was asked for goes there, as it does for the dry runs of backup and delete."""
    plan = ok("-r", stock.path, "restore", stock.newest, tmp_path / "out.img", "--dry-run").text
    assert stock.newest in plan
    assert str(tmp_path / "out.img") in plan


def damaged(repo: Stock) -> None:
    """One frame of the only image of `db` no longer holds what it held."""
    image = repo.path / "db" / f"{repo.db}.full.zst"
    with image.open("r+b") as file:
        file.seek(8000)
        file.write(bytes(32))


def test_restore_that_keeps_going_names_what_is_lost(repo: Stock, tmp_path: Path) -> None:
    damaged(repo)
    target = tmp_path / "out.img"
    stopped = fails(4, "DamagedImage", "-r", repo.path, "restore", repo.db, target)
    assert "written so far" in stopped.error["message"]
    assert not target.exists()
    found = document("-r", repo.path, "restore", repo.db, target, "--keep-going", status=3)
    for flaw in found["flaws"]:
        is_shaped(flaw, FLAW)
    assert found["flaws"]
    assert found["mapfile"] == f"{target}.mapfile"
    assert "-" in Path(found["mapfile"]).read_text()
    assert target.stat().st_size == len(repo.held[repo.db])


def test_a_mapfile_that_cannot_be_made_is_a_sentence_before_anything_is_written(repo: Stock, tmp_path: Path) -> None:
    damaged(repo)
    target = tmp_path / "out.img"
    words = ["restore", repo.db, target, "--keep-going", "--mapfile", tmp_path / "no" / "such" / "place"]
    ended = run("-r", repo.path, *words)
    assert ended.status == 1, str(ended)
    assert not target.exists()


def test_a_mapfile_replaces_nothing_that_was_not_named(repo: Stock, tmp_path: Path) -> None:
    damaged(repo)
    target, mine = tmp_path / "out.img", tmp_path / "out.img.mapfile"
    mine.write_text("mine")
    run("-r", repo.path, "restore", repo.db, target, "--keep-going")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_export(kind: str, stock: Stock, tmp_path: Path) -> None:
    file = tmp_path / "out"
    shape = {
        "point": TEXT,
        "volume": TEXT,
        "file": TEXT,
        "format": TEXT,
        "device_bytes": NUMBER,
        "file_bytes": NUMBER,
        "seconds": SECONDS,
    }
    found = is_shaped(document("-r", stock.path, "export", stock.newest, file, "--format", kind), shape)
    assert (found["point"], found["file"], found["format"]) == (stock.newest, str(file), kind)
    assert found["file_bytes"] == file.stat().st_size
    assert file.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["out"]
    fails(5, "TargetExists", "-r", stock.path, "export", stock.newest, file, "--format", kind)
    file.write_bytes(b"old")
    ok("-r", stock.path, "export", stock.newest, file, "--yes")
    assert file.read_bytes() == stock.held[stock.newest]


# --- verify, delete, recover ---------------------------------------------------------------------------------------


def test_verify(stock: Stock) -> None:
    found = is_shaped(document("-r", stock.path, "verify"), {"ok": FLAG, "images": list, "leftovers": list})
    assert found["ok"] is True
    for verdict in found["images"]:
        is_shaped(verdict, VERDICT)
        assert (verdict["ok"], verdict["damage"]) == (True, [])
    assert len(found["images"]) == 5
    named = document("-r", stock.path, "verify", stock.web[1])
    assert {verdict["file"] for verdict in named["images"]} == {
        f"{stock.web[0]}.full.zst", f"{stock.web[1]}.incremental.zst",
    }  # fmt: skip
    assert document("-r", stock.path, "verify", "--sample", "1%")["ok"] is True


def test_verify_names_damage_by_volume_bytes(repo: Stock) -> None:
    damaged(repo)
    found = document("-r", repo.path, "verify", status=4)
    assert found["ok"] is False
    bad = [verdict for verdict in found["images"] if not verdict["ok"]]
    assert [verdict["point"] for verdict in bad] == [repo.db]
    for flaw in bad[0]["damage"]:
        is_shaped(flaw, FLAW)
        assert 0 <= flaw["start"] < flaw["start"] + flaw["length"] <= len(repo.held[repo.db])


def test_what_runs_left_behind_is_mentioned_and_is_no_damage(repo: Stock) -> None:
    web = repo.path / "web"
    (web / f"{repo.newest}.incremental.zst.partial").write_bytes(b"begun")
    (web / f"{repo.web[1]}.incremental.json").unlink()
    found = run("-r", repo.path, "verify", "--json")
    assert (found.status, found.document["ok"]) == (0, True), str(found)
    assert len(found.document["leftovers"]) == 2
    assert "recover" in found.said
    report = document("-r", repo.path, "recover")
    is_shaped(report, {"done": list, "left": list, "adopted": list})
    assert (report["adopted"], report["left"], len(report["done"])) == ([repo.web[1]], [], 2)
    assert document("-r", repo.path, "recover") == {"done": [], "left": [], "adopted": []}
    assert not grown(repo.path, "*/*.partial")()
    assert [point["point"] for point in document("-r", repo.path, "list", "web")] == list(repo.web)


def test_recover_says_3_for_what_a_person_must_look_at(repo: Stock) -> None:
    (repo.path / "db" / f"{repo.db}.full.zst").unlink()
    report = document("-r", repo.path, "recover", status=3)
    assert any(repo.db in sentence for sentence in report["left"])


def test_delete(repo: Stock) -> None:
    shape = {"points": list, "files": list, "freed_bytes": NUMBER, "shared_bytes": NUMBER, "dry_run": FLAG}
    before = sorted(repo.path.rglob("*.zst"))
    would = is_shaped(document("-r", repo.path, "delete", repo.db, repo.web[1], "--dry-run"), shape)
    assert would["dry_run"] is True
    assert would["points"] == [repo.db, repo.web[1]]
    assert sorted(repo.path.rglob("*.zst")) == before
    done = is_shaped(document("-r", repo.path, "delete", repo.db, repo.web[1]), shape)
    assert done == would | {"dry_run": False}
    gone = set(before) - set(repo.path.rglob("*.zst"))
    assert {path.name for path in gone} == set(done["files"])
    assert not list((repo.path).rglob("*.deleted"))


def test_delete_refuses_what_is_needed(stock: Stock) -> None:
    found = fails(5, "PointNeeded", "-r", stock.path, "delete", stock.oldest)
    assert found.error["fields"] == {"point": stock.oldest, "needed_by": stock.web[1]}
    assert "synthesize" in found.error["advice"]
