"""Several runs at once: one has the volume, the others wait or say who has it; nothing is damaged."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.program import Ended, Running, both, document, fails, grown, ok, opened, run
from tests.cli.stock import Stock, copied


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    ok("init", tmp_path / "repo")
    return tmp_path / "repo"


def backing_up(repo: Path, source: Path, *words: str) -> Running:
    return Running("-r", repo, "backup", source, "--compress", "zstd:15", *words, "--json")


def in_its_middle(run: Running, repo: Path, volume: str) -> Running:
    """A backup that was stopped while its image grew: it holds the volume's lock."""
    return run.until("the image grew", grown(repo, f"{volume}/*.zst.partial")).pause()


def check_holder(found: Ended, holder: Running) -> None:
    """The error names who has the volume."""
    assert (found.error["fields"]["pid"], found.error["fields"]["host"]) == (holder.pid, socket.gethostname())


def test_a_held_volume_is_a_failure_that_names_process_and_host(repo: Path, slow: Path, stock: Stock) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        for words in (["backup", stock.source, "--name", "v"], ["synthesize", "v"]):
            found = fails(1, "VolumeLocked", "-r", repo, *words)
            check_holder(found, first)
            assert f"process {first.pid} on {socket.gethostname()}" in found.said
            assert "--wait" in found.error["advice"]
        # It goes on to the next volume, and says in the end what it could not do.
        assert document("-r", repo, "recover", status=1)["error"]["fields"]["pid"] == first.pid
        ended = first.go_on().end()
    assert ended.status == 0, str(ended)
    assert document("-r", repo, "verify")["ok"] is True


def test_waiting_for_less_than_it_takes_is_a_failure(repo: Path, slow: Path) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        fails(1, "VolumeLocked", "-r", repo, "backup", slow, "--name", "v", "--wait", "0.3")


def test_who_waits_goes_on_when_the_volume_is_free(repo: Path, slow: Path) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        with backing_up(repo, slow, "--name", "v", "--wait", "50") as second:
            second.until("it stood before the lock", opened(second, repo / "v" / ".lock"))
            one, two = first.go_on().end(), second.end()
    assert (one.status, two.status) == (0, 0), f"{one}\n{two}"
    ((older,), (newer,)) = one.document["points"], two.document["points"]
    assert (newer["parent"], newer["sequence"], newer["kind"]) == (older["point"], 2, "incremental")
    assert document("-r", repo, "verify")["ok"] is True


@pytest.mark.parametrize(
    "words",
    [["backup", "SOURCE", "--name", "web"], ["verify", "web@latest"], ["restore", "web@latest", "OUT"],
     ["export", "web@latest", "OUT"], ["synthesize", "web"]],
    ids=lambda words: words[0],
)  # fmt: skip
def test_waiting_is_told_and_is_no_work(words: list[str], stock: Stock, tmp_path: Path) -> None:
    """Whoever waits learns for whom, and the seconds are those of the work."""
    copy = copied(stock, tmp_path)
    places = {"SOURCE": copy.source, "OUT": tmp_path / "out"}
    with (copy.path / "web" / ".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = time.monotonic()
        named = [places.get(word, word) for word in words]
        with Running("-r", copy.path, *named, "--wait", "50", "--json") as second:
            second.until("it said something", lambda: second.said().endswith("\n"))
            said = second.said()
            time.sleep(5)
            fcntl.flock(lock, fcntl.LOCK_UN)
            ended = second.end()
    elapsed = time.monotonic() - begun
    assert ended.status == 0, str(ended)
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert said == f"blockbak: Volume web is in use by {holder}; waiting for it to end.\n"
    report = ended.document["points"][0] if "points" in ended.document else ended.document
    assert report["seconds"] <= elapsed - 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_waits_can_be_told_to_stop(number: int, repo: Path, slow: Path) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        with backing_up(repo, slow, "--name", "v", "--wait", "5000") as second:
            second.until("it stood before the lock", opened(second, repo / "v" / ".lock"))
            ended = second.signal(number).end()
        assert ended.status == 130, str(ended)
        assert first.go_on().end().status == 0


def test_many_at_once_each_make_a_point_or_say_who_holds_the_volume(repo: Path, stock: Stock) -> None:
    with ExitStack() as stack:
        runs = [
            stack.enter_context(
                Running("-r", repo, "backup", stock.source, "--name", "v", "--wait", wait, "--json")
            )
            for wait in ("0", "50", "50", "0")
        ]  # fmt: skip
        pids = {one.pid for one in runs}
        ended = [one.end() for one in runs]
    assert [one.status for one in ended[1:3]] == [0, 0], "\n".join(map(str, ended))
    for one in (ended[0], ended[3]):
        assert one.status == 0 or (one.error["name"] == "VolumeLocked" and one.error["fields"]["pid"] in pids), str(one)
    made = [one.document["points"][0]["point"] for one in ended if one.status == 0]
    points = document("-r", repo, "list")
    assert sorted(point["point"] for point in points) == sorted(made)
    assert [point["sequence"] for point in points] == list(range(1, len(made) + 1))
    assert [point["parent"] for point in points] == [None, *[point["point"] for point in points[:-1]]]
    assert document("-r", repo, "verify")["ok"] is True


def test_other_volumes_are_not_held(repo: Path, slow: Path, stock: Stock) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        ok("-r", repo, "backup", stock.source, "--name", "w")
        ok("-r", repo, "verify", "w@latest")
        # What could not be looked at is a failure, and no damage.
        for_people, for_scripts = both("-r", repo, "verify")
        assert (for_people.status, for_scripts.status) == (1, 1), f"{for_people}\n{for_scripts}"
        found = for_scripts.document
        assert (found["ok"], [image["volume"] for image in found["images"]]) == (False, ["w"])
        assert found["error"]["name"] == "VolumeLocked"
        assert f"process {first.pid}" in for_people.said
        ended = first.go_on().end()
    assert ended.status == 0, str(ended)
    assert {point["volume"] for point in document("-r", repo, "list")} == {"v", "w"}
    assert document("-r", repo, "verify")["ok"] is True


def of_one_name(folder: Path, *contents: bytes) -> list[Path]:
    """Files in directories of their own, all called alike."""
    made = [folder / str(number) / "disk.img" for number in range(len(contents))]
    for path, content in zip(made, contents, strict=True):
        path.parent.mkdir()
        path.write_bytes(content)
    return made


def test_two_files_of_one_name_backed_up_at_once_become_two_volumes(repo: Path, slow: Path, tmp_path: Path) -> None:
    """The first has no point yet when the second looks for a name."""
    one, two = of_one_name(tmp_path, slow.read_bytes(), b"two" * 3000)
    with backing_up(repo, one) as first:
        in_its_middle(first, repo, "*")
        second = run("-r", repo, "backup", two, "--json")
        assert second.status == 0, str(second)
        ended = first.go_on().end()
    assert ended.status == 0, str(ended)
    volumes = [found.document["points"][0]["volume"] for found in (ended, second)]
    assert volumes[0] != volumes[1]
    for source, volume in zip((one, two), volumes, strict=True):
        (point,) = document("-r", repo, "backup", source)["points"]
        assert (point["volume"], point["kind"]) == (volume, "incremental")


def test_two_files_of_one_name_stay_two_volumes_though_the_second_waited(
    repo: Path, slow: Path, tmp_path: Path
) -> None:
    one, two = of_one_name(tmp_path, slow.read_bytes(), b"two" * 3000)
    with backing_up(repo, one) as first:
        in_its_middle(first, repo, "*")
        with backing_up(repo, two, "--wait", "50") as second:
            # Either it waits for the name that is in use, or it takes another and is done.
            held = next(repo.glob("*/.lock"))
            second.until(
                "it waited or was done",
                lambda: opened(second, held)() or len(list(repo.glob("*/*.full.json"))) > 0,
            )
            ended = first.go_on().end(), second.end()
    assert [found.status for found in ended] == [0, 0], "\n".join(map(str, ended))
    volumes = [found.document["points"][0]["volume"] for found in ended]
    assert volumes[0] != volumes[1]


def test_list_and_show_need_no_lock(repo: Path, slow: Path, stock: Stock) -> None:
    ok("-r", repo, "backup", stock.source, "--name", "v")
    (point,) = document("-r", repo, "list")
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
        assert document("-r", repo, "list") == [point]
        assert point["point"] in ok("-r", repo, "list").text
        assert document("-r", repo, "show", "latest")["point"] == point["point"]
        ended = first.go_on().end()
    assert ended.status == 0, str(ended)


def test_readers_share_a_volume_and_keep_writers_out(large: Stock, tmp_path: Path) -> None:
    image = next(large.path.glob("large/*.zst"))
    with Running("-r", large.path, "verify") as reader:
        reader.until("the image was opened", opened(reader, image)).pause()
        ok("-r", large.path, "restore", "latest", tmp_path / "out", "--dry-run")
        found = fails(1, "VolumeLocked", "-r", large.path, "backup", large.source)
        check_holder(found, reader)  # not the last writer, which is long gone
        ended = reader.go_on().end()
    assert ended.status == 0, str(ended)


def test_a_lock_dies_with_its_process(repo: Path, slow: Path, stock: Stock) -> None:
    with backing_up(repo, slow, "--name", "v") as first:
        in_its_middle(first, repo, "v")
    ended = run("-r", repo, "backup", stock.source, "--name", "v")
    assert ended.status == 0, str(ended)
    assert re.search("Swept .*partial", ended.said), str(ended)
    assert not list(repo.rglob("*.partial"))
    assert document("-r", repo, "verify")["ok"] is True
