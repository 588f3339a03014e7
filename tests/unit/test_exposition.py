"""What monitoring systems are told: Prometheus's text, read by a parser that allows nothing else; a plugin's lines."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import exposition
from blockbak.model.exposition import Family, families, nagios, text
from blockbak.model.health import Drilled, Facts, Goals, Growth, Place, StoredImage, StoredPoint, judge, judge_room
from tests.expositions import parse

NOW = datetime(2026, 5, 1, 3, 0, tzinfo=UTC)
GOOD = Facts(
    "web", (StoredPoint("p", NOW - timedelta(hours=1), ("a",)),), (StoredImage("a", 1000, verified_share=0.5),),
    drilled=Drilled(NOW - timedelta(days=1), "p", ok=True, rto_seconds=12.5), job="nightly",
)  # fmt: skip
ROOM = judge_room(Place(5000, 9000), NOW)
GOALS = Goals(rpo=7200, rto=60)


def exported(*facts, goals=GOALS, room=ROOM, repository="/srv/backup"):
    return parse(text(families(repository, room, [judge(one, goals, NOW) for one in facts], NOW)))


@pytest.mark.parametrize(
    "wrong",
    [
        "a 1",
        "a 1\n",
        "# TYPE a gauge\nb 1\n",
        "# TYPE a gauge\na 1\na 2\n",
        '# TYPE a gauge\na{x="1",x="2"} 1\n',
        '# TYPE a gauge\na{x="1} 1\n',
        '# TYPE a gauge\na{x="\\q"} 1\n',
        "# TYPE a gauge\na one\n",
        "# TYPE a gauge\n",
        "# TYPE a gauge\na 1\n# TYPE a gauge\na 1\n",
        "# TYPE a gauge\n\na 1\n",
    ],
)
def test_the_parser_of_these_tests_is_strict(wrong):
    with pytest.raises(ValueError):
        parse(wrong)


def test_what_is_known_is_exported():
    found = exported(GOOD)
    here = {"repository": "/srv/backup", "volume": "web", "job": "nightly"}
    assert found["blockbak_newest_point_timestamp_seconds"].value(**here) == NOW.timestamp() - 3600
    assert found["blockbak_rpo_met"].value(**here) == 1
    assert found["blockbak_last_drill_seconds"].value(**here) == 12.5
    assert found["blockbak_verified_ratio"].value(**here) == 0.5
    assert found["blockbak_volume_ok"].value(**here) == 1
    assert found["blockbak_repository_free_bytes"].value() == 5000
    assert "blockbak_reason" not in found
    assert all(one.kind == "gauge" and one.about.endswith(".") for one in found.values())


def test_what_is_not_known_is_left_out():
    found = exported(Facts("empty"), goals=Goals())
    assert "blockbak_rpo_seconds" not in found
    assert "blockbak_newest_point_timestamp_seconds" not in found
    assert "blockbak_repository_full_timestamp_seconds" not in found
    assert found["blockbak_reason"].value(volume="empty", reason="NoGoodPoint", level="critical") == 1


def test_two_reasons_of_one_name_are_one_series():
    room = judge_room(Place(1, 1, damage=("a",), leftovers=("b",)), NOW)
    bad = replace(GOOD, damage=("x", "y"), leftovers=("z",))
    found = exported(bad, replace(bad, volume="db"), room=room)
    assert len(found["blockbak_reason"].samples) == 6


@given(st.text(min_size=1), st.text())
def test_no_name_breaks_the_format(repository, about):
    family = Family("a", about, (((("repository", repository),), 1.0),))
    ((labels, value),) = parse(text([family]))["a"].samples.items()
    assert value == 1
    assert dict(labels)["repository"] == exposition.plain(repository)


@given(st.floats(allow_nan=True))
def test_every_number_is_one(value):
    found = parse(text([Family("a", "", (((), value),))]))["a"].samples[()]
    assert found == value or found != found


# --- Nagios --------------------------------------------------------------------------------------------------


def told(*facts, goals=GOALS, room=ROOM):
    return nagios(room, [judge(one, goals, NOW) for one in facts])


def test_a_plugin_that_has_nothing_to_say():
    status, out = told(GOOD)
    head, _, measured = out.partition(" | ")
    assert status == 0
    assert head == "BLOCKBAK OK - 1 volume, the newest point of each at most 60 min old, 4.88 KiB free"
    assert measured == "free=5000B;;;0;9000 'web age'=3600s;;7200;0 'web drill'=12.500s;;60;0"


def test_a_plugin_names_the_worst_first():
    status, out = told(replace(GOOD, leftovers=("x.partial",)))
    assert (status, out.split(" - ")[0]) == (1, "BLOCKBAK WARNING")
    status, out = told(replace(GOOD, leftovers=("x|y",)), goals=Goals(rpo=60))
    first, second = out.splitlines()
    assert status == 2
    assert first.startswith("BLOCKBAK CRITICAL - web: Its newest good point is 60 min old; the RPO is 60 s. | ")
    assert "x/y" in second


def test_room_alone_is_a_warning():
    growth = (Growth(NOW - timedelta(days=3), 0), Growth(NOW, 10**9))
    assert told(GOOD, room=judge_room(Place(10, 10**9, growth), NOW))[0] == 1


def test_a_plugin_that_cannot_find_out():
    assert exposition.unknown("a|b\nc") == "BLOCKBAK UNKNOWN - a/b c"
