"""The configuration: what it says, what is wrong with it and on which line, and that its table of keys is the truth."""

from __future__ import annotations

import importlib.util
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.model import config as configs
from blockbak.model.config import KEYS, SECTIONS, Selector, Unusable, parse
from blockbak.model.retention import Policy

ROOT = Path(__file__).parents[2]
LEAST = """
[repositories.main]
path = "/srv/backup"

[jobs.web]
sources = ["vg/home"]
"""


def problems(text: str) -> list[str]:
    with pytest.raises(Unusable) as caught:
        parse(text)
    return [str(one) for one in caught.value.problems]


def job(more: str = "", **tables: str):
    extra = "".join(f"\n[jobs.web.{name}]\n{text}\n" for name, text in tables.items())
    return parse(LEAST + more + "\n" + extra).jobs["web"]


# --- what it says ---------------------------------------------------------------------------------------------


def test_the_least_that_is_a_configuration():
    config = parse(LEAST)
    web = config.jobs["web"]
    assert config.path_of(web) == "/srv/backup"
    assert (web.sources, web.mode, web.deadline, web.rpo, web.retention, web.drill) == (
        ("vg/home",), "auto", None, None, None, None,
    )  # fmt: skip
    assert str(web.schedule) == str(web.kinds.incremental) == "daily"
    assert web.kinds.full.never
    assert web.kinds.synthetic.never


def test_the_example_of_the_manual_is_a_configuration():
    web = parse(man().EXAMPLE).jobs["web"]
    assert web.sources == ("vg/home", Selector(lvm_tag="backup"))
    assert web.reading.freeze_with == ("postgresql",)
    assert (web.deadline, web.rpo) == (6 * 3600.0, 36 * 3600.0)
    assert web.retention == Policy(daily=14, weekly=8, monthly=12)
    assert web.drill.check == ("/usr/local/sbin/check-web",)
    # Kinds without a time of day are due at the schedule's.
    assert {web.kinds.full.at, web.kinds.differential.at, web.kinds.incremental.at, web.verify.at} == {150}


def test_a_job_runs_as_often_as_its_most_frequent_kind():
    assert str(job('full = "monthly"\nincremental = "every 4h"').schedule) == "every 4h"
    assert str(job('full = "weekly at 03:00"\nincremental = "never"').schedule) == "weekly at 03:00"
    web = job('schedule = "weekly on sun"\nfull = "monthly"')
    assert web.kinds.incremental.weekdays == (6,)


def test_udev_patterns_must_all_fit():
    (one,) = (
        job('mode = "cold"').sources
        and parse(LEAST.replace('"vg/home"', '{ udev = { ID_SERIAL = "WD*", ID_BUS = "ata" } }')).jobs["web"].sources
    )
    assert one.fits({"ID_SERIAL": "WD-1", "ID_BUS": "ata", "X": "y"})
    assert not one.fits({"ID_SERIAL": "WD-1"})
    assert not one.fits({"ID_SERIAL": "xWD-1", "ID_BUS": "ata"})
    assert not Selector().fits({"ID_SERIAL": "WD-1"})


def test_options_of_reading_and_of_rest_arrive():
    web = job(
        'mode = "cold"\nlimit = "50M"\nidle = false\nused_only = true\nretries = 3\nstrict = true\nname = "w"\n'
        'block_size = "128K"\ncompress = "zstd:5"\nstop = ["db.service"]\nstop_users = true\nkill = true\n'
        'freeze = true\nthaw_after = "5min"\ndeactivate = true\ncold_hooks = ["/x"]\n'
    )
    assert replace(web.reading) == configs.Reading(
        name="w", block_bytes=131072, compress="zstd:5", limit=50 << 20, idle=False, used_only=True, retries=3,
        strict=True,
    )  # fmt: skip
    assert web.rest.given == ["--stop", "--stop-users", "--kill", "--freeze", "--deactivate", "--cold-hook"]
    assert web.rest.deadline == 300.0
    hot = job(
        'mode = "hot"\nsnapshot_size = "20%"\nsnapshot_limit = "40G"\ntogether = true\ntogether_deadline = "5s"\n'
        'freeze_with = ["mariadb"]\nfreeze_deadline = "30s"\nholds_repository = true\n'
    ).reading
    assert (hot.snapshot_size, hot.snapshot_limit, hot.together, hot.together_seconds) == ("20%", "40G", True, 5.0)
    assert (hot.freeze_with, hot.freeze_seconds, hot.own_repository) == (("mariadb",), 30.0, True)


# --- what is wrong with it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: repositories: names no repository"),
        ("a = ", "line 1: this is not TOML: invalid value"),
        (f"a = {'[' * 2000}", "line 1: this is not TOML that can be read: it is nested too deeply"),
        ('a = "x', "line 1: this is not TOML: unterminated string"),
        (LEAST + "\nmodus = 'hot'", "line 8: jobs.web.modus: there is no such key; is mode meant?"),
        (LEAST + "\nmode = 'warm'", "line 8: jobs.web.mode: 'warm' is none of auto, hot, cold, live"),
        (LEAST + "\n\ndeadline = 6", "line 9: jobs.web.deadline: takes a text in quotes, not a number"),
        (LEAST + "\ndeadline = '6 parsecs'", "line 8: jobs.web.deadline: '6 parsecs' is no duration; take 90s, 15min, 36h, 2d, 6w or 1y"),
        (LEAST + "\nlimit = '1K'", "line 8: jobs.web.limit: takes at least 64K"),
        (LEAST + "\nused_only = 1", "line 8: jobs.web.used_only: takes true or false, not a number"),
        (LEAST + "\nfull = 'fortnightly'", "line 8: jobs.web.full: 'fortnightly' is no calendar"),
        (LEAST + "\nrepository = 'mian'", "line 8: jobs.web.repository: there is no repository 'mian'; is main meant?"),
        (LEAST.replace('["vg/home"]', "[\n  'vg/home',\n  'home',\n]"), "line 8: jobs.web.sources: 'home' is neither a whole path nor vg/lv"),
        (LEAST.replace('["vg/home"]', "[\n 'vg/a',\n { tag = 'x' } ]"), "line 8: jobs.web.sources: a source that is a table is"),
        (LEAST.replace('["vg/home"]', "[]"), "line 6: jobs.web.sources: takes at least one source"),
        (LEAST.replace('["vg/home"]', "['/a', '/a']"), "line 6: jobs.web.sources: names a source twice"),
        (LEAST.replace('sources = ["vg/home"]', ""), "line 5: jobs.web.sources: must be there"),
        (LEAST.replace("/srv", "srv"), "line 3: repositories.main.path: takes a whole path, from / on, not 'srv/backup'"),
        (LEAST + "[repositories.other]\npath = '/x'", "line 5: jobs.web.repository: must be there: there are several"),
        (LEAST + "[jobs.'a/b']\nsources = ['/x']", "line 7: jobs.a/b: 'a/b' is no name here"),
        (LEAST + "[jobs.web.retention]\nkeep_dayly = 3", "line 8: jobs.web.retention.keep_dayly: there is no such key; is keep_daily meant?"),
        (LEAST + "[jobs.web.retention]", "line 7: jobs.web.retention: keeps nothing"),
        (LEAST + "[jobs.web.retention]\nkeep_verified = 3", "line 7: jobs.web.retention: keeps nothing"),
        (LEAST + "[jobs.web.drill]\nboot_pattern = 'x'", "line 8: jobs.web.drill.boot_pattern: belongs to boot = true"),
        (LEAST + "[jobs.web.drill]\nboot = true\nboot_pattern = '('", "line 9: jobs.web.drill.boot_pattern: is no regular expression"),
        (LEAST + "[notify]\non = ['failure',\n'succes']", "line 9: notify.on: 'succes' is none of failure, recovery, missed-rpo"),
        (LEAST + "[notify]\ncommand = ['mail', 'root']", "line 8: notify.command: takes the program's whole path first"),
        (LEAST + "[notify]\nurls = ['root@example.org']", "line 8: notify.urls: takes addresses as apprise does"),
        (LEAST + "\nstop = ['db']", 'line 8: jobs.web.stop: belongs to mode = "cold", and the mode is auto'),
        (LEAST + "\nmode = 'cold'\ntogether = true", "line 9: jobs.web.together: belongs to snapshots"),
        (LEAST + "\nverify_share = '5%'", "line 8: jobs.web.verify_share: belongs to verify"),
        (LEAST + "\nincremental = 'never'", "line 5: jobs.web: no kind is ever due"),
        (LEAST + "\nschedule = 'weekly'\nfull = 'daily'", "line 9: jobs.web.full: is due more often than the job runs (weekly)"),
        (LEAST + "\nschedule = 'weekly'\nrpo = '36h'", "line 9: jobs.web.rpo: is shorter than the time between two runs (weekly)"),
        (LEAST.replace('["vg/home"]', "['/a', '/b']") + "\nname = 'x'", "line 8: jobs.web.name: names one volume"),
        ("timezone = 'Mars City'\n" + LEAST, "line 1: timezone: 'Mars City' is no time zone"),
        (LEAST + "retention = 3", "line 7: jobs.web.retention: is a table, not a number"),
        ("jobs = 3\n[repositories.a]\npath='/a'", "line 1: jobs: is a table, not a number"),
        ("[jobs]\nweb = 3\n[repositories.a]\npath='/a'", "line 2: jobs.web: is a table [jobs.NAME], not a number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_line(text, told):
    found = problems(text)
    assert len(found) == 1, found
    assert found[0].startswith(told), found


def test_everything_that_is_wrong_is_told_at_once_in_the_order_of_lines():
    text = """timezone = 7
[repositories.main]
path = "backup"
[jobs.web]
sources = ["home"]
limit = "fast"
[jobs.db]
sources = ["vg/db"]
repository = "other"
[jobs.db.retention]
keep_daily = -1
keep_weekly = 1
"""
    assert [one.partition(": ")[0] for one in problems(text)] == [f"line {number}" for number in (1, 3, 5, 6, 9, 11)]


def test_a_key_that_is_nowhere_stands_at_the_table_that_lacks_it():
    assert problems("[repositories.a]\n[jobs.x]\n sources = ['/a']")[0].startswith("line 1: repositories.a.path: must")


# --- where each value came from -----------------------------------------------------------------------------------


def test_every_key_is_shown_with_its_line_or_as_the_default():
    config = parse(LEAST + "\nmode = 'hot'\n[jobs.web.retention]\nkeep_last = 3\n")
    shown = {one.key: (one.value, one.line) for one in config.settings}
    assert shown["jobs.web.mode"] == ('"hot"', 8)
    assert shown["jobs.web.sources"] == ('["vg/home"]', 6)
    assert shown["jobs.web.idle"] == ("true", None)
    assert shown["jobs.web.retention.keep_last"] == ("3", 10)
    assert shown["jobs.web.retention.full_every"] == ("90d", None)
    wanted = {("", "timezone"), *((key.section, key.name) for key in KEYS)}
    assert {one.key.rpartition(".")[2] for one in config.settings} >= {
        name for section, name in wanted if section[-1:] != ("drill",)
    }


def test_secrets_are_not_shown():
    config = parse(LEAST + "[notify]\nurls = ['mailto://user:secret@example.org', 'slack://T1/secret']\n")
    (shown,) = [one.value for one in config.settings if one.key == "notify.urls"]
    assert shown == '["mailto://...", "slack://..."]'
    assert config.notify.urls[1] == "slack://T1/secret"


def test_what_is_shown_is_toml_that_says_the_same():
    text = LEAST.replace('"vg/home"', "'/a b/\"c\\\\', { udev = { 'ID X' = '*' } }")
    config = parse(text)
    (shown,) = [one.value for one in config.settings if one.key == "jobs.web.sources"]
    assert tomllib.loads(f"x = {shown}")["x"] == tomllib.loads(text)["jobs"]["web"]["sources"]


# --- the table of keys ---------------------------------------------------------------------------------------------


def man():
    spec = importlib.util.spec_from_file_location("man", ROOT / "scripts" / "man.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_is_in_the_manual_page_and_no_other():
    page = (ROOT / "docs" / "man" / "blockbak.toml.5").read_text().replace("\\-", "-")
    told = []
    for part in page.split("\n.SH ")[1:]:
        title = part.splitlines()[0]
        section = () if title == "TOP" else tuple(title.strip("[]").replace("NAME", "*").split("."))
        if section in SECTIONS:
            told += [(section, line.split()[1]) for line in part.splitlines() if line.startswith(".BR ")]
    assert sorted(told) == sorted((key.section, key.name) for key in KEYS)


@pytest.mark.parametrize("key", [key for key in KEYS if key.value is not None], ids=lambda key: key.path)
def test_a_default_in_words_is_the_default_of_the_program(key):
    """Where the words are a value that could stand in the file."""
    words = {"none": (), "all": configs.EVENTS, "a sparse file": None}.get(key.default)
    if words is not None:
        assert key.value == words
        return
    try:
        raw = tomllib.loads(f"x = {key.default}")["x"]
    except tomllib.TOMLDecodeError:
        raw = key.default
    try:
        found = key.read(raw)
    except ValueError:
        assert key.name in ("schedule", "incremental", "timezone"), f"{key.path}: {key.default}"
        return
    assert found == key.value


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_no_key_takes_what_is_of_another_sort(key):
    for raw in (1.5, {"a": 1}, [[1]], "", tomllib.loads("x = 1979-05-27")["x"]):
        with pytest.raises(ValueError, match=r"\w"):
            key.read(raw)


def test_every_key_does_something(monkeypatch):
    """Of each key some value makes another configuration than its default does."""
    values = {
        "timezone": "'UTC'", "path": "'/other'", "textfile": "'/x'", "repository": "'second'", "sources": "['/other']", "schedule": "'hourly'",
        "full": "'weekly'", "differential": "'weekly'", "incremental": "'weekly'", "synthetic": "'weekly'",
        "random_delay": "'1s'", "deadline": "'1h'", "wait": "'1s'", "rpo": "'7d'", "rto": "'1h'", "verify": "'weekly'",
        "verify_share": "'7%'", "name": "'x'", "mode": "'live'", "block_size": "'4K'", "compress": "'none'",
        "limit": "'1M'", "boot_pattern": "'x'", "boot_deadline": "'1h'", "target": "'vg/scratch'", "check": "['/x']",
        "snapshot_size": "'1G'", "snapshot_limit": "'1G'", "together_deadline": "'3s'", "freeze_with": "['mysql']",
        "freeze_deadline": "'3s'", "stop": "['x']", "thaw_after": "'3s'", "cold_hooks": "['/x']", "keep_within": "'3d'",
        "full_every": "'3d'", "command": "['/x']", "urls": "['json://x']", "on": "['failure']", "retries": "7",
    }  # fmt: skip
    beside = {"verify_share": "verify = 'weekly'", "together_deadline": "together = true", "boot_pattern": "boot = true",
              "boot_deadline": "boot = true", "incremental": "full = 'daily'"}  # fmt: skip
    cold = {"stop", "stop_users", "kill", "freeze", "thaw_after", "deactivate", "cold_hooks"}
    for key in KEYS:
        value = values.get(key.name) or ("5" if key.read is configs._count else "false" if key.value else "true")
        if key.section == ("jobs", "*", "drill") and key.name == "schedule":
            value = "'weekly'"
        lines = [beside.get(key.name, "")]
        text = {"top": "", "main": "path = '/a'", "second": "path = '/b'", "web": "repository = 'main'\nsources = ['/s']",
                "retention": "keep_last = 9" if key.name != "keep_last" else "keep_daily = 1", "drill": "", "notify": ""}  # fmt: skip
        if key.name in cold:
            text["web"] += "\nmode = 'cold'"
        place = {(): "top", ("repositories", "*"): "main", ("jobs", "*"): "web"}.get(
            key.section, key.section[-1:] and key.section[-1]
        )
        text[place] += "\n" + "\n".join(lines)

        def whole(text=text):
            return (
                f"{text['top']}\n[repositories.main]\n{text['main']}\n[repositories.second]\n{text['second']}\n"
                f"[jobs.web]\n{text['web']}\n[jobs.web.retention]\n{text['retention']}\n[jobs.web.drill]\n{text['drill']}\n"
                f"[notify]\n{text['notify']}\n"
            )

        before = parse(whole())
        text[place] = (
            "\n".join(line for line in text[place].splitlines() if line.partition(" ")[0] != key.name)
            + f"\n{key.name} = {value}"
        )
        after = parse(whole())
        facts = [(one.repositories, one.jobs, one.notify, one.timezone) for one in (before, after)]
        assert facts[0] != facts[1], key.path
