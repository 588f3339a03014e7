"""`config` and `timers` as a person uses them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.jobs import Place
from tests.cli.program import fails, run


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_good_configuration_is_called_good(place):
    ended = place.ok("config", "check")
    assert ended.text == f"{place.file} can be used: 1 job, 1 repository.\n"
    assert place.document("config", "check") == {"ok": True, "file": str(place.file), "warnings": []}


def test_what_would_go_wrong_now_is_said_and_is_no_error(place):
    place.configure(
        source=place.path / "gone", more='[notify]\ncommand = ["/nonexistent/tell"]\n'
        f'[repositories.other]\npath = "{place.path}/none"\n', job='repository = "main"',
    )  # fmt: skip
    warnings = place.document("config", "check")["warnings"]
    assert warnings == [
        f"Repository other: {place.path}/none is not a blockbak repository (it is not a directory).",
        f"Job web: {place.path}/gone does not exist.",
        "notify.command: /nonexistent/tell cannot be looked at: No such file or directory.",
    ]
    assert place.ok("config", "check").said.count("blockbak: ") == 3


def test_all_that_is_wrong_is_told_at_once_with_file_and_line(place):
    place.configure('mode = "warm"\nblock_size = "5K"\nrpo = 3')
    ended = fails(1, "BadConfig", "config", "check", env=place.env)
    assert ended.document["ok"] is False
    assert [note.partition(": ")[0] for note in ended.error["notes"]] == [
        f"{place.file}, line {line}" for line in (5, 7)
    ]
    for line in (5, 7):
        assert f"blockbak: {place.file}, line {line}: jobs.web." in ended.said
    place.configure('block_size = "5K"')
    ended = fails(1, "BadConfig", "config", "show", env=place.env)
    assert ended.error["notes"] == [f"{place.file}, line 5: jobs.web.block_size: 5120 is not a usable block size"]
    place.configure(more="", job="")
    place.file.write_text('timezone = "Mars/Olympus"\n' + place.file.read_text())
    ended = fails(1, "BadConfig", "config", "check", env=place.env)
    assert ended.error["notes"] == [f"{place.file}, line 1: timezone: This machine knows no time zone Mars/Olympus"]


def test_the_file_is_named_by_option_or_variable(place, tmp_path):
    other = tmp_path / "other.toml"
    other.write_text("nonsense")
    ended = run("config", "check", "--config", str(other), env=place.env)
    assert f"{other}, line 1: this is not TOML" in ended.said
    assert run("config", "check", env={"BLOCKBAK_CONFIG": str(other)}).status == 1
    assert place.ok("config", "check").status == 0
    other.write_bytes(b"x = '\xff'")
    assert "it is not UTF-8" in run("config", "check", "--config", str(other)).said
    assert "longer than any" in run("config", "check", "--config", "/dev/zero").said


def test_show_fills_in_defaults_and_says_where_each_value_came_from(place):
    place.configure('mode = "live"', '[notify]\nurls = ["json://user:secret@host"]')
    document = place.document("config", "show")
    shown = {one["key"]: one for one in document["settings"]}
    assert shown["jobs.web.mode"] == {"key": "jobs.web.mode", "value": '"live"', "from": "file", "line": 5}
    assert shown["jobs.web.wait"] == {"key": "jobs.web.wait", "value": "10min", "from": "default", "line": None}
    text = place.ok("config", "show").text
    assert "secret" not in text
    assert "secret" not in str(document)
    (line,) = [line for line in text.splitlines() if line.startswith("jobs.web.mode ")]
    assert line.split() == ["jobs.web.mode", '"live"', "line", "5"]


def test_timers_are_written_shown_and_removed(place, tmp_path):
    units = tmp_path / "units"
    units.mkdir()
    where = ("--unit-dir", str(units))
    document = place.document("timers", "install", *where)
    assert set(document["written"]) == {
        "blockbak-job-web.service", "blockbak-job-web.timer", "blockbak-failed@.service", "blockbak-boot.service",
    }  # fmt: skip
    assert place.ok("timers", "install", *where).text == "All units are there as they should be.\n"
    shown = place.document("timers", "show", *where)
    assert {unit["state"] for unit in shown["units"]} == {"same"}
    service = next(unit["text"] for unit in shown["units"] if unit["name"] == "blockbak-job-web.service")
    assert f"run --config {place.file} web\n" in service
    assert f"Environment=BLOCKBAK_STATE_DIR={place.state}\n" in service
    place.configure('schedule = "hourly"')
    assert "installed, but not as above" in place.ok("timers", "show", *where).text
    assert place.ok("timers", "install", "web", *where).text == f"{units}/blockbak-job-web.timer written.\n"
    assert len(place.document("timers", "remove", *where)["removed"]) == 4
    assert not list(units.iterdir())
    assert place.ok("timers", "remove", *where).text == f"{units} holds no unit of blockbak.\n"


def test_lines_for_cron(place):
    lines = place.ok("timers", "install", "--cron").text.splitlines()
    assert any(line.startswith("0 0 * * * root nice -n 10 ") and line.endswith(" web") for line in lines)
    assert place.document("timers", "show", "--cron")["cron"] == lines


@pytest.mark.parametrize(
    "words",
    [
        ["remove", "web"],
        ["remove", "--cron"],
        ["install", "--cron", "--unit-dir", "/x"],
        ["install", "--unit-dir", "/none"],
        ["failed"],
        ["start"],
    ],
)
def test_what_does_not_go_together_is_refused(place, words):
    assert place.run("timers", *words).status == 2


def test_the_only_repository_of_the_configuration_is_the_one_that_is_meant(place):
    place.ok("run")
    assert len(place.document("list")) == 1
    place.file.write_text(place.file.read_text() + f'[repositories.other]\npath = "{place.path}/other"\n')
    assert place.run("list", "--json").error["name"] == "NoRepositoryNamed"
    place.file.write_text("nonsense")
    assert place.run("list", "--json").error["name"] == "NoRepositoryNamed"


def test_a_configuration_that_others_may_write_is_not_used(place):
    place.file.chmod(0o664)
    for words in (
        ["config", "check"], ["--log", "human", "run"], ["timers", "show", "--cron"], ["list"], ["backup", place.source],
    ):  # fmt: skip
        fails(5, "UnsafeConfig", *words, env=place.env)
    place.file.chmod(0o644)
    place.configure(more='[notify]\nurls = ["json://user:secret@host"]')
    (warning,) = place.document("config", "check")["warnings"]
    assert warning.endswith(f"and others may read it: chmod 600 {place.file}")
    place.file.chmod(0o600)
    assert place.document("config", "check")["warnings"] == []


def test_status_knows_what_the_configuration_asks_of_a_volume(place):
    place.configure('schedule = "daily"\nrpo = "36h"')
    place.ok("run")
    (volume,) = place.document("status")["volumes"]
    assert (volume["job"], volume["goals"]["rpo"], volume["rpo_met"]) == ("web", 36 * 3600.0, True)
    (volume,) = place.document("status", "--rpo", "1h")["volumes"]
    assert volume["goals"]["rpo"] == 3600.0
