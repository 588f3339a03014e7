"""Which kind of image is made of which volume: parents that fit, parents that do not, and who is who."""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import NoUsableParent
from blockbak.flow import backup, restore
from blockbak.image import format as fmt
from blockbak.model.chain import Image
from blockbak.model.identity import Identity
from blockbak.repository import manifest
from blockbak.repository.local import Repository
from tests import images
from tests.doubles import REPOSITORY_ID, context, new_repository
from tests.host.stage import (
    KIB,
    MIB,
    Oracle,
    attached,
    dirty,
    flip,
    frame_at,
    partitioned,
    partitions,
    put,
    record_at,
    run,
    sha,
    spare_node,
)

SIZE = 8 * MIB


@pytest.fixture
def source(tmp_path, seed):
    """A stamped image file; its path."""
    return stamped(tmp_path / "source.img", seed)


def stamped(file, seed, size=SIZE):
    file.write_bytes(bytes(size))
    Oracle(file, size, seed).write((0, size))
    return file


def must_be_full(program, source, reason, *options, explicit=("incremental", "differential")):
    """Explicit deltas fail with the reason and make nothing; ``auto`` gives it and makes a full."""
    before = program.contents()
    for kind in explicit:
        done = program("backup", source, "--kind", kind, *options, expect=1)
        assert (done.error["name"], done.document["points"]) == ("NoUsableParent", [])
        assert reason in done.error["message"], done.error["message"]
        assert kind in done.error["message"]
        planned = program("backup", source, "--kind", kind, "--dry-run", *options, expect=1)
        assert planned.error["message"] == done.error["message"]
    (planned,) = program("backup", source, "--dry-run", *options).document["points"]
    # A volume's first run makes its directory; nothing else comes of a run that fails.
    assert {name: what for name, what in program.contents().items() if what[2]} == {
        name: what for name, what in before.items() if what[2]
    }
    made = program.backup(source, *options)
    assert (planned["kind"], made["kind"], made["parent"]) == ("full", "full", None)
    assert any(reason in note for note in made["notes"]), made["notes"]
    assert made["notes"] == planned["notes"]
    after = program.backup(source, *options)
    assert (after["kind"], after["parent"], after["notes"]) == ("incremental", made["point"], [])
    return made


# --- no parent that fits ----------------------------------------------------------------------------------


def test_the_first_image_of_a_volume_is_a_full(program, source):
    made = must_be_full(program, source, "the volume has no point yet")
    assert made["sequence"] == 1


@pytest.mark.parametrize("by", [MIB, -MIB, 512, -512])
def test_another_size_makes_a_full(program, tmp_path, seed, by):
    file = stamped(tmp_path / "disk.img", seed)
    with attached(file) as node:
        first = program.backup(node)
        os.truncate(file, SIZE + by)
        run("losetup", "--set-capacity", node)
        made = must_be_full(program, node, f"the source has {SIZE + by} bytes, the last point {SIZE}")
        assert (made["device_bytes"], made["volume"]) == (SIZE + by, first["volume"])
        assert Path(node).exists()
        target = tmp_path / "target.img"
        program("restore", made["point"], target)
        assert sha(target) == sha(file)
    assert program.restore(first["point"], target).document["plan"]["device_bytes"] == SIZE
    assert target.stat().st_size == SIZE


def test_another_block_size_makes_a_full(program, source):
    first = program.backup(source, "--block-size", "64K")
    must_be_full(program, source, "the block size is now 16384, it was 65536", "--block-size", "16K")
    # Where none is asked for, the volume keeps the one it has.
    put(source, MIB, b"x" * 512)
    kept = program.backup(source)
    assert (kept["kind"], kept["changed_bytes"]) == ("incremental", 16 * KIB)
    assert program("show", first["point"]).document["block_bytes"] == 64 * KIB


def test_another_window_size_makes_a_full(program, source):
    """Such a point comes from a program that chose windows otherwise, or from a larger volume."""
    state = images.state(source.read_bytes())
    point = "20260101T000000Z-abcd"
    folder = program.repository / "vol"
    folder.mkdir()
    opening = images.opening(
        "vol", point, 1, state, 64 * KIB, None,
        repository=REPOSITORY_ID, identity=Identity("file", str(source)), window_bytes=fmt.WINDOW_MAX,
        host=socket.gethostname(),
    )  # fmt: skip
    memory = images.Memory(name=f"{point}.full.zst")
    reader = images.build(memory, opening, state)
    (folder / memory.name).write_bytes(memory.data)
    image = Image(memory.name, memory.size, reader.closing_sha256, reader.opening, reader.closing, len(reader.sections))
    (folder / f"{point}.full.json").write_bytes(manifest.encode(image))
    assert program("verify").document["ok"]
    made = must_be_full(program, source, "the window size is another one now")
    assert made["volume"] == "vol"


# --- the newest point cannot be used ----------------------------------------------------------------------


def flip_index(image):
    flip(image, sum(record_at(image, 0)) - 5)


def flip_manifest(image):
    flip(image.with_suffix(".json"), 300)


def cut(image):
    os.truncate(image, image.stat().st_size - 100)


HARMS = {
    "its index is damaged": flip_index,
    "it is cut short": cut,
    "it is missing": Path.unlink,
    "its manifest is damaged": flip_manifest,
    "its header is damaged": lambda image: flip(image, 2000),
    "its closing record is damaged": lambda image: flip(image, image.stat().st_size - 200),
}


@pytest.mark.parametrize("newest", ["full", "incremental"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_newest_point_that_is_not_whole_makes_a_full(program, source, harm, newest):
    first = program.backup(source)
    put(source, MIB, b"x" * 512)
    last = program.backup(source, "--kind", newest)
    image = program.image(last)
    HARMS[harm](image)
    put(source, 2 * MIB, b"y" * 512)
    # A differential stands on the last full, which may be another one.
    made = must_be_full(program, source, image.stem, explicit=["incremental"])
    assert made["sequence"] == 3
    target = source.with_suffix(".restored")
    program.restore(made["point"], target)
    assert sha(target) == sha(source)
    # Nothing was tidied away: the damage is there to be looked at.
    assert image.exists() is (harm != "it is missing")
    assert image.with_suffix(".json").exists()
    program("verify", expect=4)
    program.restore(first["point"], target)


def test_content_of_a_frame_is_no_reason_for_a_full(program, source):
    """An increment is compared with the index; finding damage in content is what verifying is for."""
    full = program.image(program.backup(source))
    offset, stored = frame_at(full, 3)
    flip(full, offset + stored // 2)
    assert program.backup(source)["kind"] == "incremental"
    program("verify", expect=4)


def test_a_parent_with_another_root_is_no_parent(tmp_path, source, program, seed):
    """A full was exchanged for one of the same point with other content: deltas are bound to the root."""
    other = stamped(tmp_path / "other.img", seed + 1)
    made = {}
    for folder, content in (("one", source), ("two", other)):
        repository = new_repository(tmp_path / folder)
        world = context(tmp_path / "state")
        shutil.copy(content, tmp_path / "disk.img")
        for _ in range(2):
            made[folder] = backup.backup(repository, backup.Request(str(tmp_path / "disk.img"), name="vol"), world)
            put(tmp_path / "disk.img", MIB, b"x" * 512)
    assert made["one"].point == made["two"].point
    assert made["one"].parent == made["two"].parent
    (program.repository / "vol").mkdir()
    for folder, point, kind in (("one", made["one"].parent, "full"), ("two", made["two"].point, "incremental")):
        for end in ("zst", "json"):
            shutil.copy(tmp_path / folder / "vol" / f"{point}.{kind}.{end}", program.repository / "vol")
    error = program.restore(made["two"].point, tmp_path / "target.img", expect=4).error
    assert error["name"] == "Gap"
    must_be_full(program, tmp_path / "disk.img", made["one"].parent, "--name", "vol", explicit=["incremental"])


# --- what a delta holds -----------------------------------------------------------------------------------


def test_a_differential_holds_what_changed_since_the_full(program, source, seed):
    full = program.backup(source)
    oracle = Oracle(source, SIZE, seed + 1)
    for start in (MIB, 2 * MIB, 2 * MIB + 256 * KIB):
        oracle.write((start, start + 512))
        last = program.backup(source)
        assert (last["kind"], last["changed_bytes"]) == ("incremental", 64 * KIB)
    made = program.backup(source, "--kind", "differential")
    assert (made["parent"], made["sequence"], made["changed_bytes"]) == (full["point"], 5, 3 * 64 * KIB)
    after = program.backup(source)
    assert (after["kind"], after["parent"], after["changed_bytes"]) == ("incremental", made["point"], 0)
    # The increments may go; the differential does not need them.
    program("delete", *program.points()[1:4])
    target = source.with_suffix(".restored")
    for point in (made, after):
        program.restore(point["point"], target)
        assert sha(target) == sha(source)


def test_a_differential_stands_on_a_synthetic_full_too(program, source, seed):
    program.backup(source)
    oracle = Oracle(source, SIZE, seed + 1)
    oracle.write((MIB, MIB + 512))
    second = program.backup(source)
    program("synthesize", second["volume"])
    oracle.write((2 * MIB, 2 * MIB + 512))
    made = program.backup(source, "--kind", "differential")
    assert (made["parent"], made["changed_bytes"]) == (second["point"], 64 * KIB)


def test_nothing_changed_makes_a_point_all_the_same(program, source):
    points = [program.backup(source) for _ in range(3)]
    assert [one["kind"] for one in points] == ["full", "incremental", "incremental"]
    assert [one["changed_bytes"] for one in points[1:]] == [0, 0]
    assert [one["sequence"] for one in points] == [1, 2, 3]
    assert len({one["root"] for one in points}) == 1
    assert points[2]["parent"] == points[1]["point"]
    assert max(one["stored_bytes"] for one in points[1:]) < 8 * KIB
    target = source.with_suffix(".restored")
    program("restore", points[2]["point"], target)
    assert sha(target) == sha(source)


# --- who is who -------------------------------------------------------------------------------------------


def test_a_file_is_one_volume_by_its_path_by_links_and_by_a_loop_device(program, source, tmp_path):
    first = program.backup(source)
    (tmp_path / "link").symlink_to(source)
    second = program.backup(tmp_path / "link")
    with attached(source) as node:
        third = program.backup(node)
        (tmp_path / "node").symlink_to(node)
        fourth = program.backup(tmp_path / "node")
    fifth = program.backup(source)
    made = [first, second, third, fourth, fifth]
    assert {one["volume"] for one in made} == {first["volume"]}
    assert [one["kind"] for one in made] == ["full", *["incremental"] * 4]
    assert [one["changed_bytes"] for one in made[1:]] == [0] * 4


def test_two_loop_devices_on_one_file_are_refused_and_both_named(program, source):
    with attached(source) as first, attached(source) as second:
        before = program.contents()
        for node in (first, second):
            error = program("backup", node, expect=1).error
            assert error["name"] == "DuplicateIdentity"
            assert first in error["message"]
            assert second in error["message"]
            program("backup", node, "--mode", "live", expect=1)
        error = program("backup", source, expect=5).error
        assert first in error["message"]
        assert second in error["message"]
        assert program.contents() == before
    assert program.backup(source)["kind"] == "full"


@pytest.mark.parametrize("named", [False, True])
def test_another_file_under_the_same_node_is_another_volume(program, source, tmp_path, seed, named):
    options = ("--name", "disk") if named else ()
    other = stamped(tmp_path / "other.img", seed + 1)
    with spare_node() as node:
        with attached(source, node=node):
            first = program.backup(node, *options)
            program.backup(node, *options)
        with attached(other, node=node):
            if named:
                made = must_be_full(program, node, f"the source is file {other}", *options)
                assert str(source) in str(made["notes"])
                assert (made["volume"], made["sequence"]) == ("disk", 3)
            else:
                before = f"{node} was file {source}, volume {first['volume']}, the last time"
                made = must_be_full(program, node, f"the volume has no point yet; {before}")
                assert made["volume"] != first["volume"]
                assert made["sequence"] == 1
        with attached(source, node=node):
            # With one name for both, the newest point is of the other file.
            back = program.backup(node, *options)
            assert (back["volume"], back["kind"]) == (first["volume"], "full" if named else "incremental")
        target = tmp_path / "target.img"
        for point, file in ((first, source), (made, other), (back, source)):
            program.restore(point["point"], target)
            assert sha(target) == sha(file)


def test_a_device_keeps_its_chain_under_another_node(program, source, tmp_path):
    with attached(source) as first:
        full = program.backup(first)
    put(source, MIB, b"x" * 512)
    with spare_node() as node, attached(source, node=node):
        assert node != first
        delta = program.backup(node)
    assert (delta["volume"], delta["kind"], delta["parent"]) == (full["volume"], "incremental", full["point"])
    assert delta["changed_bytes"] == 64 * KIB
    assert delta["source"] == node


@pytest.mark.parametrize("label", ["gpt", "dos"])
def test_a_partition_is_known_by_its_uuid_wherever_its_disk_turns_up(program, tmp_path, label, seed):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(32 * MIB))
    with attached(file) as disk, partitioned(disk, "size=8M", "size=8M", label=label) as (first, second):
        uuid = run("blkid", "-p", "-o", "value", "-s", "PART_ENTRY_UUID", second).strip()
        oracle = Oracle(second, 8 * MIB, seed)
        oracle.write((0, 8 * MIB))
        full = program.backup(second)
        beside = program.backup(first)
        assert beside["volume"] != full["volume"]
        known = program("show", full["point"]).document["identity"]
        assert known["kind"] == "partuuid"
        assert known["value"].startswith(f"{uuid} on ")
    with spare_node() as node, attached(file, node=node), partitions(node, 2) as (_, second):
        assert not second.startswith(f"{disk}p")
        oracle.path = second
        oracle.write((MIB, MIB + 512))
        delta = program.backup(second)
        assert (delta["volume"], delta["parent"]) == (full["volume"], full["point"])
        assert (delta["kind"], delta["changed_bytes"]) == ("incremental", 64 * KIB)
        dirty(second, 8 * MIB)
        program.restore(delta["point"], second)
        assert oracle.now().wrong(second) is None, f"seed {seed}"
        # The disk around it is a volume of its own.
        assert program.backup(node)["volume"] not in (full["volume"], beside["volume"])


def test_a_partition_made_anew_in_the_same_place_is_another_volume(program, tmp_path):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(32 * MIB))
    with attached(file) as disk:
        with partitioned(disk, "size=8M") as (first,):
            old = program.backup(first)
        with partitioned(disk, "size=8M") as (first,):
            new = program.backup(first)
            assert (new["kind"], new["volume"] != old["volume"]) == ("full", True)
            made = must_be_full(program, first, "the source is partition", "--name", old["volume"])
            assert made["volume"] == old["volume"]


def test_volumes_with_one_name_get_names_of_their_own(program, tmp_path, seed):
    made = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        made.append(program.backup(stamped(tmp_path / folder / "disk.img", seed, MIB)))
    assert len({one["volume"] for one in made}) == 3
    again = [program.backup(tmp_path / folder / "disk.img") for folder in ("c", "a", "b")]
    assert [one["volume"] for one in again] == [made[2]["volume"], made[0]["volume"], made[1]["volume"]]
    assert {one["kind"] for one in again} == {"incremental"}


def test_one_path_on_two_hosts_is_two_volumes(program, source):
    """They may share a repository on a network file system; each has a file of that name, and they are not alike."""
    repository = Repository(str(program.repository))

    def backed_up(host, **more):
        world = replace(context(program.state), host=host)
        return backup.backup(repository, backup.Request(str(source), **more), world)

    one, other = backed_up("one"), backed_up("other")
    assert (one.kind, other.kind, one.volume != other.volume) == ("full", "full", True)
    for host, first in (("other", other), ("one", one)):
        again = backed_up(host)
        assert (again.volume, again.kind, again.parent) == (first.volume, "incremental", first.point)
    # Asked for by its name, the other host's volume takes a full, and says why.
    with pytest.raises(NoUsableParent):
        backed_up("other", name=one.volume, kind="incremental")
    named = backed_up("other", name=one.volume)
    assert (named.kind, named.parent) == ("full", None)
    assert any("on other, the last point is of one" in note for note in named.notes), named.notes
    # Nothing is rolled back that another host calls by that name.
    for host, itself in (("one", True), ("other", False)):
        request = restore.Request(one.point, str(source), overwrite=True)
        world = replace(context(program.state), host=host)
        plan = restore.restore(repository, request, world, dry_run=True)
        assert any("the volume itself" in note for note in plan.notes) is itself, plan.notes
