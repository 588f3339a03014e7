"""How a person names things: points, repositories, volumes, and files whose names nobody should give."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.cli.program import both, document, fails, ok, run
from tests.cli.stock import Stock

# --- points --------------------------------------------------------------------------------------------------


def found(stock: Stock, name: str, **options: Any) -> str:
    """The point that ``show`` takes a name for."""
    return document("-r", stock.path, "show", name, **options)["point"]


def shortest(point: str, others: list[str]) -> str:
    """The shortest beginning of ``point`` that none of the others has."""
    return next(point[:n] for n in range(1, len(point) + 1) if not any(one.startswith(point[:n]) for one in others))


def test_a_point_is_known_by_its_id_and_by_any_unique_beginning(stock: Stock) -> None:
    points = [*stock.web, stock.db]
    for point in points:
        assert found(stock, point) == point
    others = [one for one in points if one != stock.newest]
    prefix = shortest(stock.newest, others)
    assert found(stock, prefix) == stock.newest
    fails(1, "AmbiguousPoint", "-r", stock.path, "show", prefix[:-1])


def test_a_volume_before_the_at_sign_narrows_the_search(stock: Stock) -> None:
    assert found(stock, "web@latest") == stock.newest
    assert found(stock, "db@latest") == stock.db
    assert found(stock, f"web@{stock.web[1]}") == stock.web[1]
    # Every id begins so, but `db` has one point only.
    assert found(stock, "db@20") == stock.db
    fails(1, "AmbiguousPoint", "-r", stock.path, "show", "web@20")
    fails(1, "NoSuchPoint", "-r", stock.path, "show", f"db@{stock.newest}")


def test_latest_needs_a_volume_where_there_are_several(stock: Stock, repo: Stock) -> None:
    error = fails(1, "AmbiguousPoint", "-r", stock.path, "show", "latest").error
    assert "web@latest" in error["message"]
    assert "db@latest" in error["message"]
    ok("-r", repo.path, "delete", repo.db)
    assert found(repo, "latest") == repo.newest


def test_a_time_is_the_newest_point_not_after_it(stock: Stock) -> None:
    made = {point["point"]: datetime.fromisoformat(point["created"]) for point in stock.points()}
    step = timedelta(milliseconds=1)
    for older, newer in zip(stock.web, stock.web[1:], strict=False):
        assert found(stock, f"web@{made[older].isoformat()}") == older
        assert found(stock, f"web@{(made[newer] - step).isoformat()}") == older
        assert found(stock, f"web@{made[newer].isoformat().replace('+00:00', 'Z')}") == newer
    assert found(stock, "web@2999-01-01") == stock.newest
    assert found(stock, f"web@{(made[stock.newest] + timedelta(days=1)).date()}") == stock.newest
    before = (made[stock.oldest] - step).isoformat()
    fails(1, "NoSuchPoint", "-r", stock.path, "show", f"web@{before}")


@pytest.mark.parametrize("zone", ["UTC0", "JST-9", "EST5"])
def test_a_time_without_a_zone_is_that_of_the_list_wherever_one_is(zone: str, stock: Stock) -> None:
    made = {point["point"]: datetime.fromisoformat(point["created"]) for point in stock.points()}
    shown = made[stock.oldest].astimezone(UTC).replace(tzinfo=None)
    assert found(stock, f"web@{shown.isoformat()}", env={"TZ": zone}) == stock.oldest
    assert found(stock, f"web@{shown.isoformat(' ')}", env={"TZ": zone}) == stock.oldest


def test_a_time_stands_for_all_of_the_second_minute_or_day_it_names(stock: Stock) -> None:
    last = max(datetime.fromisoformat(point["created"]) for point in stock.points() if point["volume"] == "web")
    for form in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%SZ", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        assert found(stock, f"web@{last.astimezone(UTC):{form}}") == stock.newest


@pytest.mark.parametrize(
    ("time", "zone"),
    [
        ("0001-01-01", "UTC0"), ("0001-01-01", "JST-9"), ("0001-01-01T00:00:00+23:00", "UTC0"),
        ("9999-12-31T23:59:59-23:59", "UTC0"), ("9999-12-31T23:59", "EST5"), ("1969-12-31", "UTC0"),
    ],
)  # fmt: skip
def test_a_time_at_the_edge_of_the_calendar_is_no_surprise(time: str, zone: str, stock: Stock) -> None:
    ended = run("-r", stock.path, "show", f"web@{time}", "--json", env={"TZ": zone})
    if ended.status == 0:
        assert time.startswith("9999")
        assert ended.document["point"] == stock.newest
    else:
        assert (ended.status, ended.error["name"]) == (1, "NoSuchPoint"), str(ended)


# --- the repository --------------------------------------------------------------------------------------------


def test_a_repository_is_named_before_or_after_the_verb_or_by_the_environment(stock: Stock, tmp_path: Path) -> None:
    expected = stock.points()
    assert document("list", "-r", stock.path) == expected
    assert document("list", "--repository", stock.path) == expected
    assert document("--repository", stock.path, "list") == expected
    assert document("list", env={"BLOCKBAK_REPO": str(stock.path)}) == expected
    ok("init", tmp_path / "empty")
    # What is said beats what is set; what is said last beats what was said first.
    assert document("-r", tmp_path / "empty", "list", env={"BLOCKBAK_REPO": str(stock.path)}) == []
    assert document("-r", stock.path, "list", "-r", tmp_path / "empty") == []


def test_a_relative_path_is_seen_from_where_one_stands(repo: Stock, tmp_path: Path) -> None:
    expected = document("-r", repo.path, "list")
    assert document("-r", "repo", "list", cwd=tmp_path) == expected
    assert document("-r", ".", "list", cwd=repo.path) == expected
    assert document("-r", "../repo/", "list", cwd=repo.path) == expected
    assert document("list", cwd=tmp_path, env={"BLOCKBAK_REPO": "repo"}) == expected
    (tmp_path / "v.img").write_bytes(b"v" * 5000)
    ok("-r", "repo", "backup", "v.img", "--name", "v", cwd=tmp_path)
    ok("-r", "repo", "restore", "v@latest", "out.img", cwd=tmp_path)
    ok("-r", "repo", "export", "v@latest", "out.raw", cwd=tmp_path)
    assert (tmp_path / "out.img").read_bytes() == (tmp_path / "out.raw").read_bytes() == b"v" * 5000
    # The same file by another path is the same volume.
    (point,) = document("-r", ".", "backup", "../v.img", cwd=repo.path)["points"]
    assert (point["volume"], point["kind"]) == ("v", "incremental")


def test_a_repository_behind_a_link_is_the_repository(repo: Stock, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("repo")
    assert document("-r", tmp_path / "link", "list") == document("-r", repo.path, "list")
    ended = run("-r", tmp_path / "link", "restore", repo.newest, repo.path / "web" / "out", "--json")
    assert (ended.status, ended.error["name"]) == (5, "TargetHolds"), str(ended)


@pytest.mark.parametrize("umask", [0o000, 0o777], ids=oct)
def test_only_the_owner_may_look_into_a_repository(umask: int, tmp_path: Path) -> None:
    repo, source = tmp_path / "repo", tmp_path / "v.img"
    source.write_bytes(b"v" * 100_000)
    ok("init", repo, umask=umask)
    for _ in range(2):
        ok("-r", repo, "backup", source, "--name", "v", umask=umask)
    ok("-r", repo, "synthesize", "v", umask=umask)
    ok("-r", repo, "delete", document("-r", repo, "list")[0]["point"], umask=umask)
    assert repo.stat().st_mode & 0o777 == 0o700
    for path in repo.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_init_shuts_an_empty_directory_that_was_open(tmp_path: Path) -> None:
    place = tmp_path / "open"
    place.mkdir()
    place.chmod(0o755)
    ok("init", place)
    assert place.stat().st_mode & 0o777 == 0o700


def test_the_state_directory_is_where_the_environment_says(loop, ext4, tmp_path: Path) -> None:
    """A source that holds it is refused, as one that holds the repository."""
    files = ext4(loop(16 << 20))
    ok("init", tmp_path / "repo")
    words = ["-r", tmp_path / "repo", "backup", files.device, "--mode", "live"]
    ok(*words)
    for where in (files.where / "state", files.where):
        found = fails(5, "SourceHoldsRepository", *words, env={"BLOCKBAK_STATE_DIR": str(where)})
        assert "state directory" in found.error["message"]


# --- volumes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "a/b", "../out", "/abs", "a b", "tab\t", "new\nline", "ünïcode", "a@b", "*", "a\\b", "-x", "x" * 201],
    ids=ascii,
)  # fmt: skip
def test_a_volume_name_that_cannot_be_a_directory_is_refused(name: str, stock: Stock, tmp_path: Path) -> None:
    before = sorted(stock.path.rglob("*"))
    outside = sorted(stock.path.parent.iterdir())
    ended = run("-r", stock.path, "backup", stock.source, f"--name={name}", "--json")
    assert (ended.status, ended.error["name"]) == (2, "WrongUsage"), str(ended)
    assert sorted(stock.path.rglob("*")) == before
    assert sorted(stock.path.parent.iterdir()) == outside


@pytest.mark.parametrize("name", ["repository.json", "rescue.py", "RESTORE.txt"])
def test_a_volume_cannot_take_the_name_of_a_file_of_the_repository(name: str, repo: Stock) -> None:
    before = (repo.path / name).read_bytes()
    ended = run("-r", repo.path, "backup", repo.source, "--name", name, "--json")
    assert (ended.status, ended.error["name"]) == (1, "VolumeExists"), str(ended)
    assert (repo.path / name).read_bytes() == before


@pytest.mark.parametrize("name", ["x" * 200, "a--", "latest", "20", "a.json"])
def test_a_volume_name_may_be_unusual(name: str, stock: Stock, tmp_path: Path) -> None:
    ok("init", tmp_path / "repo")
    (point,) = document("-r", tmp_path / "repo", "backup", f"--name={name}", stock.source)["points"]
    assert point["volume"] == name
    listed = run("-r", tmp_path / "repo", "list", "--json", "--", name).document
    assert [one["volume"] for one in listed] == [name]
    shown = run("-r", tmp_path / "repo", "show", "--json", "--", f"{name}@latest").document
    assert shown["point"] == point["point"]


def test_a_volume_keeps_its_name_whoever_has_it(tmp_path: Path) -> None:
    """Two files of one name are two volumes; each finds its own again."""
    ok("init", tmp_path / "repo")
    volumes = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "disk.img").write_bytes(folder.encode() * 3000)
        (point,) = document("-r", tmp_path / "repo", "backup", tmp_path / folder / "disk.img")["points"]
        volumes.append(point["volume"])
    assert volumes[1] == f"{volumes[0]}-2"
    for folder, volume in zip(("one", "two"), volumes, strict=True):
        (point,) = document("-r", tmp_path / "repo", "backup", tmp_path / folder / "disk.img")["points"]
        assert (point["volume"], point["kind"]) == (volume, "incremental")


# --- names that nobody should give, and people do -----------------------------------------------------------------

NAMES = [
    b" space 'quote\"$(x)& {0}{name}%s\\ ", b"new\nline\ttab\x1b[31mescape", "ümläut 日本 [bold]".encode(),
    b"\xff\xfe latin\xe4", b"x" * 200,
]  # fmt: skip
STRICT, PLAIN = {"PYTHONIOENCODING": "utf-8:strict"}, {"LC_ALL": "C", "LANG": "C"}
"""The locale of a person, where standard output takes nothing but UTF-8; and as a timer has it."""

any_name = pytest.mark.parametrize(
    ("name", "env"),
    [*((name, STRICT) for name in NAMES), (NAMES[2], PLAIN), (NAMES[3], PLAIN)],
    ids=[*map(ascii, NAMES), "text in C", "bytes in C"],
)


def path_of(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


@any_name
def test_a_source_of_any_name(name: bytes, env: dict[str, str], tmp_path: Path) -> None:
    """It is backed up and comes back, or a sentence says why not."""
    repo, source = tmp_path / "repo", path_of(tmp_path, name)
    source.write_bytes(name * 1000)
    ok("init", repo)
    for form in ([], ["--json"]):
        ended = run("-r", repo, "backup", source, *form, env=env)
        if ended.status == 1 and b"\xff" in name:
            assert "UTF-8" in ended.said, str(ended)
            return
        assert ended.status == 0, str(ended)
    assert ended.document["points"][0]["kind"] == "incremental"
    assert [ended.status for ended in both("-r", repo, "show", "latest", env=env)] == [0, 0]
    ok("-r", repo, "restore", "latest", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == name * 1000
    # Rolled back onto itself, and refused without a word: both name it.
    document("-r", repo, "restore", "latest", source, "--yes", env=env)
    fails(5, "TargetExists", "-r", repo, "restore", "latest", source, env=env)


@any_name
def test_a_target_of_any_name(name: bytes, env: dict[str, str], stock: Stock, tmp_path: Path) -> None:
    for form in ([], ["--json"]):
        folder = tmp_path / f"with{len(form)}"
        folder.mkdir()
        target = path_of(folder, name)
        ok("-r", stock.path, "restore", stock.newest, target, *form, env=env)
        assert os.listdir(os.fsencode(folder)) == [name]
        assert target.read_bytes() == stock.held[stock.newest]


@any_name
def test_an_export_of_any_name(name: bytes, env: dict[str, str], stock: Stock, tmp_path: Path) -> None:
    for form in (["--format", "qcow2"], ["--json"]):
        file = path_of(tmp_path, name)
        ok("-r", stock.path, "export", "--yes", *form, stock.newest, file, env=env)
        assert os.listdir(os.fsencode(tmp_path)) == [name]
    assert file.read_bytes() == stock.held[stock.newest]


@any_name
def test_a_repository_of_any_name(name: bytes, env: dict[str, str], stock: Stock, tmp_path: Path) -> None:
    repo = path_of(tmp_path, name)
    document("init", repo, env=env)
    fails(1, "RepositoryExists", "init", repo, env=env)
    ok("-r", repo, "backup", stock.source, env=env)
    document("-r", repo, "backup", stock.source, env=env)
    ok("-r", repo, "restore", "latest", tmp_path / "out", env=env)
    assert (tmp_path / "out").read_bytes() == stock.source.read_bytes()
    # Its own path is in the answer.
    assert [ended.status for ended in both("-r", repo, "restore", "latest", repo / "x", env=env)] == [5, 5]


def test_a_word_that_is_not_text_is_a_sentence(stock: Stock) -> None:
    word = os.fsdecode(b"\xff\xfe")
    words: list[Any]
    for words in (["show", word], ["list", word], ["backup", word]):
        ended = run("-r", stock.path, *words, "--json")
        assert (ended.status, ended.error["exit"]) == (1, 1), str(ended)
    for words in ([word], ["list", f"--{word}"], ["backup", "--kind", word, "x"], ["verify", "--sample", word]):
        assert run(*words, "--json").status == 2
