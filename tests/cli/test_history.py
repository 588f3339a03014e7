"""``blockbak history``. What other tests did with the stock comes after its first five lines."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from blockbak.repository.record import HISTORY
from tests.cli.program import document, ok, run


def test_what_was_done_is_listed(repo):
    every = document("-r", repo.path, "history")["entries"]
    found = every[:5]
    assert [one["event"] for one in found] == ["made", "made", "made", "merged", "made"]
    assert [one["points"] for one in found] == [[point] for point in (*repo.web, repo.newest, repo.db)]
    assert {one["volume"] for one in found} == {"web", "db"}
    runs = {one["run"] for one in found}
    assert len(runs) == 5
    assert all(len(bytes.fromhex(one)) == 16 for one in runs)
    assert all(one["user"] and one["host"] and one["exit"] == 0 for one in found)
    text = ok("-r", repo.path, "history").text.splitlines()
    assert text[0].split()[:4] == ["line", "when", "(UTC)", "what"]
    assert len(text) == 2 + len(every)
    assert repo.db in text[6]


def test_since_and_volume_choose(repo):
    def entries(*words):
        return document("-r", repo.path, "history", *words)["entries"]

    every = entries()
    assert entries("--volume", "db")[0] == every[4]
    assert {one["volume"] for one in entries("--volume", "web")} == {"web"}
    assert entries("--since", "1y") == entries("--since", f"{datetime.now(UTC).year - 1}-01-01") == every
    assert entries("--since", "2999-01-01") == []
    assert ok("-r", repo.path, "history", "--since", "2999-01-01").text == "Nothing is noted.\n"
    assert entries("--since", every[2]["time"]) == every[2:]
    assert run("-r", repo.path, "history", "--since", "yesterday").status == 2


def test_a_failed_restore_is_noted(repo, tmp_path):
    assert run("-r", repo.path, "restore", "nothing", tmp_path / "out.img").status == 1
    last = document("-r", repo.path, "history")["entries"][-1]
    assert (last["event"], last["exit"], last["error"]) == ("restored", 1, "NoSuchPoint")
    assert "1 NoSuchPoint" in ok("-r", repo.path, "history").text.splitlines()[-1]


def test_who_reads_of_a_file_later_need_not_know_where_the_person_was(repo, tmp_path):
    def noted(*words, status):
        assert run("-r", repo.path.absolute(), *words, cwd=tmp_path).status == status
        return document("-r", repo.path, "history")["entries"][-1]["facts"]

    assert noted("restore", "nothing", "out.img", status=1)["target"] == str(tmp_path / "out.img")
    assert noted("restore", "nothing", "no-vg/no-lv", status=1)["target"] == "no-vg/no-lv"
    (tmp_path / "in.img").write_bytes(b"x" * 65536)
    for status in (0, 5):  # made, and refused because it is there
        facts = noted("mirror", "in.img", "copy.img", status=status)
        assert (facts["source"], facts["target"]) == (str(tmp_path / "in.img"), str(tmp_path / "copy.img"))


def test_an_altered_line_is_damage_for_both_verbs(repo):
    path = repo.path / HISTORY
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"exit":0', b'"exit":1')
    path.write_bytes(b"".join(lines))
    shown = run("-r", repo.path, "history", "--json")
    assert shown.status == 4
    assert shown.error["name"] == "DamagedHistory"
    assert "line 2 is not what it was" in shown.error["message"]
    assert len(shown.document["entries"]) == len(lines)
    checked = run("-r", repo.path, "verify", "--json")
    assert (checked.status, checked.document["ok"]) == (4, False)
    assert [one["name"] for one in checked.document["history"]] == ["DamagedHistory"]
    assert all(one["ok"] for one in checked.document["images"])
    told = run("-r", repo.path, "verify")
    assert told.status == 4
    assert "the history damaged" in told.text
    # A point by its name is another matter.
    assert run("-r", repo.path, "verify", repo.newest).status == 0


def test_each_line_is_an_object_for_jq(repo):
    for number, line in enumerate((repo.path / HISTORY).read_text().splitlines(), 1):
        assert json.loads(line)["number"] == number
