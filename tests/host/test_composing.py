"""Synthetic images in repositories on real file systems: blocks shared, the source left alone, damage found."""

from __future__ import annotations

import contextlib
import os
import time

import pytest

from blockbak.flow import backup, synthesize
from tests.doubles import context, new_repository
from tests.host.stage import (
    KIB,
    MIB,
    Oracle,
    attached,
    damage_frame,
    dirty,
    file_extents,
    image_at,
    mounted,
    noticing_opens,
    sha,
)

WINDOW = 256 * KIB
SIZE = 24 * MIB
BLOCK = 4096
"""Of the file systems that repositories lie on here."""


@pytest.fixture
def store(request, loop, tmp_path):
    """``store(kind)`` is a directory on a file system of that kind."""
    with contextlib.ExitStack() as undo:

        def make(kind):
            if kind == "tmpfs":
                return undo.enter_context(mounted("none", tmp_path / "store", "-t", "tmpfs", "-o", "size=200m"))
            return request.getfixturevalue(kind)(loop(400 * MIB), *(["-b", "4096"] if kind == "ext4" else [])).where

        yield make


class Chain:
    """A stamped image file, and the points made of it."""

    def __init__(self, program, source, seed):
        self.program, self.source, self.seed = program, source, seed
        source.write_bytes(bytes(SIZE))
        self.oracle = Oracle(source, SIZE, seed)
        self.points, self.held = [], []

    def point(self, *, write=(), zero=(), kind="auto"):
        self.oracle.write(*write)
        self.oracle.zero(*zero)
        self.points.append(self.program.backup(self.source, "--kind", kind))
        self.held.append(self.oracle.now())
        return self.points[-1]

    def grow(self):
        """A full and three increments: whole windows, parts of windows, zeros."""
        self.point(write=[(0, 20 * MIB)])
        self.point(write=[(MIB, 2 * MIB), (5 * MIB + 64 * KIB, 5 * MIB + 128 * KIB)])
        self.point(write=[(10 * MIB, 10 * MIB + 512), (21 * MIB, 22 * MIB)], zero=[(3 * MIB, 4 * MIB)])
        self.point(write=[(5 * MIB, 6 * MIB), (3 * MIB, 3 * MIB + 512)])
        return self

    @property
    def volume(self):
        return self.points[0]["volume"]

    def check(self, target, *numbers):
        """The points of these numbers restore to what was there."""
        for number in numbers:
            self.program.restore(self.points[number]["point"], target)
            assert self.held[number].wrong(target) is None, f"point {number}, seed {self.seed}"


@pytest.fixture
def chain(program, tmp_path, seed):
    return Chain(program, tmp_path / "source.img", seed).grow()


@pytest.fixture
def target(tmp_path):
    """A file that holds something else."""
    file = tmp_path / "target.img"
    file.write_bytes(b"")
    dirty(file, SIZE)
    return file


# --- shared blocks ----------------------------------------------------------------------------------------


def free_bytes(where):
    descriptor = os.open(where, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.sync()
        info = os.fstatvfs(descriptor)
    finally:
        os.close(descriptor)
    return info.f_bfree * info.f_frsize


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_synthetic_full_shares_its_blocks(store, tmp_path, seed, kind):
    where = store(kind)
    repository = new_repository(where / "repository")
    world = context(tmp_path / "state")
    source = tmp_path / "source.img"
    source.write_bytes(bytes(SIZE))
    oracle = Oracle(source, SIZE, seed)
    for ranges in (
        [(0, SIZE)],
        [(MIB, 2 * MIB), (5 * MIB + 64 * KIB, 5 * MIB + 128 * KIB)],
        [(12 * MIB, 12 * MIB + 512), (18 * MIB, 20 * MIB)],
    ):
        oracle.write(*ranges)
        made = backup.backup(repository, backup.Request(str(source)), world)
    before = free_bytes(where)
    report = synthesize.synthesize(repository, made.volume, world)
    taken = before - free_bytes(where)

    file = where / "repository" / made.volume / report.point.file
    with image_at(file) as reader:
        size = reader.source.size
        own = len(reader.header) + int(reader.sections["length"].sum()) + size - reader.closing_offset
    assert report.clones >= 4
    # Two windows were written in part; everything else is some image's own frame.
    assert 0 < report.encoded_bytes <= 2 * (WINDOW + 4 * KIB)
    allowed = own + report.encoded_bytes + report.clones * (2 * BLOCK + BLOCK + 8)
    assert report.cloned_bytes >= size - allowed
    # The file system's own trees and the manifest take a few blocks beside the image.
    assert taken <= allowed + 48 * BLOCK, f"{taken} bytes were taken, {allowed} are allowed; seed {seed}"
    alone = sum(length for _, length, shared in file_extents(file) if not shared)
    assert alone <= allowed + 2 * BLOCK, f"{alone} bytes are not shared, {allowed} are allowed; seed {seed}"
    shared = sum(length for _, length, shared in file_extents(file) if shared)
    assert shared >= report.cloned_bytes


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4", "tmpfs"])
def test_the_bytes_of_a_composed_image_are_all_accounted_for(store, program_at, tmp_path, target, seed, kind):
    """Shared where the file system can, copied where not; restored and verified in both cases."""
    program = program_at(store(kind))
    chain = Chain(program, tmp_path / "source.img", seed).grow()
    done = program("synthesize", chain.volume).document
    assert done["written"] is True
    assert (done["kind"], done["synthetic"], done["change_source"], done["read_bytes"]) == ("full", True, "images", 0)
    assert (done["point"], done["root"]) == (chain.points[-1]["point"], chain.points[-1]["root"])
    stored = program.image(done).stat().st_size
    assert done["stored_bytes"] == stored
    if kind in ("xfs", "btrfs"):
        assert done["cloned_bytes"] > 15 * MIB
        assert any(shared for _, _, shared in file_extents(program.image(done)))
    else:
        assert done["cloned_bytes"] == 0
    assert done["encoded_bytes"] > 0
    assert program.restore(chain.points[-1]["point"], target).document["plan"]["images"] == [done["file"]]
    chain.check(target, 3, 0, 3, 1, 2)
    assert program("verify").document["ok"]
    assert done["cloned_bytes"] + done["copied_bytes"] + done["encoded_bytes"] == stored


# --- older images go --------------------------------------------------------------------------------------


def test_points_live_on_when_the_images_below_a_synthetic_full_go(store, program_at, tmp_path, target, seed):
    program = program_at(store("xfs"))
    chain = Chain(program, tmp_path / "source.img", seed).grow()
    points = [one["point"] for one in chain.points]
    # The point after the next still stands on these.
    error = program("delete", points[0], points[1], expect=5).error
    assert (error["name"], error["fields"]["point"], points[2] in error["message"]) == ("PointNeeded", points[1], True)
    program("synthesize", chain.volume, "--at", points[2])
    gone = program("delete", points[0], points[1]).document
    assert gone["points"] == points[:2]
    assert program.points() == points[2:]
    chain.check(target, 3, 2, 3)
    verdicts = program("verify").document
    assert verdicts["ok"]
    assert {one["point"] for one in verdicts["images"]} == set(points[2:])
    chain.point(write=[(7 * MIB, 7 * MIB + 512)])
    assert (chain.points[-1]["kind"], chain.points[-1]["parent"]) == ("incremental", points[3])
    chain.check(target, 4, 2)
    assert program("list").document[-1]["sequence"] == 5


@pytest.mark.parametrize("kind", ["xfs", "btrfs", "ext4", "tmpfs"])
def test_what_is_told_as_freed_comes_back(store, program_at, tmp_path, seed, kind):
    """Below a synthetic full that shares its blocks, next to nothing does."""
    where = store(kind)
    program = program_at(where)
    chain = Chain(program, tmp_path / "source.img", seed).grow()
    program("synthesize", chain.volume)
    points = [one["point"] for one in chain.points]
    # The last increment stands on those that go, and goes with them.
    stored = sum(one["stored_bytes"] for one in chain.points)
    everything = program("delete", *points, "--dry-run").document
    would = program("delete", *points[:3], "--dry-run").document
    before = free_bytes(where)
    gone = program("delete", *points[:3]).document
    assert (gone["freed_bytes"], gone["shared_bytes"]) == (would["freed_bytes"], would["shared_bytes"])
    if kind in ("xfs", "btrfs"):
        assert gone["shared_bytes"] > 15 * MIB
        assert stored <= gone["freed_bytes"] + gone["shared_bytes"] <= stored + 64 * BLOCK
    else:
        assert gone["shared_bytes"] == 0
        assert stored <= gone["freed_bytes"] <= stored + 64 * BLOCK
    # The manifests and the file system's own trees come back too; btrfs keeps an extent while part of it is used.
    slack = 2 * MIB if kind == "btrfs" else 64 * BLOCK
    deadline = time.monotonic() + 45  # what is unlinked is freed in the background
    while abs((freed := free_bytes(where) - before) - gone["freed_bytes"]) > slack:
        assert time.monotonic() < deadline, f"{freed} bytes came back, {gone['freed_bytes']} were told"
        time.sleep(0.2)
    # Images that share with each other alone, and go together, leave nothing.
    assert everything["shared_bytes"] == 0
    alone = 0 if kind in ("xfs", "btrfs") else 15 * MIB
    assert stored + alone <= everything["freed_bytes"] <= stored + alone + 8 * MIB


def test_a_synthetic_differential_holds_what_several_increments_held(chain, program, target):
    points = [one["point"] for one in chain.points]
    done = program("synthesize", chain.volume, "--kind", "differential").document
    assert (done["kind"], done["synthetic"], done["parent"]) == ("differential", True, points[0])
    # 1 MiB at 1, one window's part and 1 MiB at 5 and 21, zeros at 3, one block at 10.
    assert done["changed_bytes"] == 4 * MIB + 64 * KIB
    assert done["root"] == chain.points[3]["root"]
    chain.check(target, 3)
    program("delete", points[1], points[2])
    assert program.points() == [points[0], points[3]]
    chain.check(target, 0, 3, 0, 3)
    assert program("verify").document["ok"]
    chain.point(write=[(0, 512)], kind="incremental")
    chain.check(target, 4)


def test_any_point_can_be_composed(chain, program, target):
    for number in (2, 0, 1, 3):
        point = chain.points[number]["point"]
        done = program("synthesize", chain.volume, "--at", point).document
        assert (done["point"], done["written"]) == (point, number != 0)
        plan = program.restore(point, target).document["plan"]
        assert plan["images"] == [done["file"]]
        assert chain.held[number].wrong(target) is None
    assert program("verify").document["ok"]
    files = [[image["kind"] for image in one["images"]] for one in program("list").document]
    assert [sorted(kinds) for kinds in files] == [["full"], *[["full", "incremental"]] * 3]


@pytest.mark.parametrize("kind", ["full", "differential"])
def test_composing_what_is_composed_writes_nothing(chain, program, kind):
    first = program("synthesize", chain.volume, "--kind", kind).document
    before = program.contents()
    again = program("synthesize", chain.volume, "--kind", kind).document
    assert (first["written"], again["written"]) == (True, False)
    assert (again["point"], again["file"]) == (first["point"], first["file"])
    assert (again["cloned_bytes"], again["copied_bytes"], again["encoded_bytes"]) == (0, 0, 0)
    assert program.contents() == before


# --- the source is not needed -----------------------------------------------------------------------------


@pytest.mark.parametrize("now", ["there", "a pipe"])
def test_composing_does_not_open_the_source(chain, program, target, now):
    if now == "a pipe":
        # Whoever opens it to read waits for a writer that never comes.
        chain.source.unlink()
        os.mkfifo(chain.source)
    with noticing_opens(chain.source) as opened:
        assert program("synthesize", chain.volume).document["written"]
        assert not opened()
        # So that the watch is known to see.
        os.close(os.open(chain.source, os.O_RDONLY | os.O_NONBLOCK))
        assert opened()
    chain.check(target, 3)


def test_composing_works_where_the_source_is_no_more(chain, program, target):
    chain.source.unlink()
    assert program("synthesize", chain.volume).document["written"]
    chain.check(target, 3)


def test_composing_works_where_the_device_is_detached(loop, program, target, tmp_path, seed):
    file = tmp_path / "disk.img"
    file.write_bytes(bytes(SIZE))
    held = []
    with attached(file) as node:
        oracle = Oracle(node, SIZE, seed)
        for ranges in ([(0, 4 * MIB)], [(MIB, 2 * MIB)], [(2 * MIB, 2 * MIB + 512)]):
            oracle.write(*ranges)
            made = program.backup(node)
            held.append((made, oracle.now()))
    done = program("synthesize", made["volume"]).document
    assert (done["written"], done["source"]) == (True, node)
    for point, then in held:
        program.restore(point["point"], target)
        assert then.wrong(target) is None, f"seed {seed}"


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "differential"])
def test_damage_in_what_must_be_encoded_anew_commits_nothing(chain, program, target, kind):
    # Of the window at 10 MiB the third image holds one block, the full the rest; another delta brings one more.
    damaged, whole = (0, 0) if kind == "full" else (2, 1)
    if kind == "differential":
        chain.point(write=[(10 * MIB + 128 * KIB, 10 * MIB + 128 * KIB + 512)])
    damage_frame(program.image(chain.points[damaged]), 10 * MIB // WINDOW)
    before = program.contents()
    error = program("synthesize", chain.volume, "--kind", kind, expect=4).error
    assert error["name"] == "DamagedImage"
    assert program.image(chain.points[damaged]).name in error["message"]
    assert program.contents() == before
    if whole:
        chain.check(target, whole)


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_damage_that_was_taken_over_is_found_before_anything_is_deleted(store, program_at, tmp_path, seed, kind):
    program = program_at(store(kind))
    chain = Chain(program, tmp_path / "source.img", seed).grow()
    points = [one["point"] for one in chain.points]
    damage_frame(program.image(chain.points[0]), 15 * MIB // WINDOW)
    # To compose it no frame is decoded that can be taken over as it is.
    program("synthesize", chain.volume)
    before = program.contents()
    error = program("delete", *points[:3], expect=4).error
    assert error["name"] == "DamagedImage"
    assert program.contents() == before
    verdicts = program("verify", expect=4).document
    damaged = {one["file"]: one["damage"] for one in verdicts["images"] if not one["ok"]}
    assert len(damaged) == 2
    assert all([(flaw["start"], flaw["length"])] == [(15 * MIB, WINDOW)] for (flaw,) in damaged.values())


def test_a_composed_image_is_not_disturbed_by_damage_to_those_it_came_from(store, program_at, tmp_path, target, seed):
    program = program_at(store("btrfs"))
    chain = Chain(program, tmp_path / "source.img", seed).grow()
    program("synthesize", chain.volume)
    # A write to a shared block goes to a block of its own.
    damage_frame(program.image(chain.points[0]), 15 * MIB // WINDOW)
    chain.check(target, 3)
    program("delete", *[one["point"] for one in chain.points[:3]])
    assert program("verify").document["ok"]
    assert sha(target) == sha(chain.source)
