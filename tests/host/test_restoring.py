"""Restores onto targets of every sort, from chains that are whole and chains that are not."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from blockbak.errors import VerificationFailed
from blockbak.flow import backup, restore
from blockbak.host.kernel import Kernel
from blockbak.repository.local import Repository
from tests.doubles import context, new_repository
from tests.host.stage import (
    KIB,
    MIB,
    Oracle,
    counters,
    damage_frame,
    dirty,
    flip,
    put,
    record_at,
    run,
    sha,
)
from tests.patterns import SECTOR

SIZE = 40 * MIB
WINDOW = 256 * KIB
PIECE = 4 * MIB


class Chain:
    """Three points of a stamped device with blocks of 4 KiB, so that it has three sections of index."""

    def __init__(self, program, source, seed):
        self.program, self.source, self.seed = program, source, seed
        self.oracle = Oracle(source, SIZE, seed)
        self.points, self.held = [], []
        self._world = context(program.state)
        self._point([(0, 3 * MIB), (9 * MIB, 13 * MIB), (19 * MIB, 22 * MIB), (30 * MIB, 35 * MIB)])
        self._point([(2 * MIB, 3 * MIB), (20 * MIB, 20 * MIB + 4 * KIB)])
        self.oracle.zero((30 * MIB, 31 * MIB))
        self._point([(2 * MIB + 512 * KIB, 2 * MIB + 768 * KIB), (33 * MIB, 34 * MIB)])
        self.last = self.points[-1]["point"]

    def _point(self, ranges):
        """In this process: what these tests are about comes afterwards."""
        self.oracle.write(*ranges)
        request = backup.Request(str(self.source), block_bytes=4 * KIB)
        self.points.append(asdict(backup.backup(Repository(str(self.program.repository)), request, self._world)))
        self.held.append(self.oracle.now())

    def image(self, number):
        return self.program.image(self.points[number])


@pytest.fixture
def chain(program, loop, seed):
    made = Chain(program, loop(SIZE), seed)
    assert [one["kind"] for one in made.points] == ["full", "incremental", "incremental"]
    return made


# --- targets of every sort --------------------------------------------------------------------------------


def test_the_rest_of_a_larger_device_is_left_alone(chain, program, loop):
    target = loop(SIZE + 8 * MIB)
    dirty(target, SIZE + 8 * MIB)
    tail = Path(target.path).read_bytes()[SIZE:]
    done = program.restore(chain.last, target).document
    assert chain.held[2].wrong(target) is None, f"seed {chain.seed}"
    assert Path(target.path).read_bytes()[SIZE:] == tail
    assert any(str(8 * MIB) in note for note in done["plan"]["notes"])
    assert done["verified_bytes"] == SIZE


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_file_of_odd_length_touches_nothing_behind_its_end(program, loop, tmp_path, rng, sector_size):
    size = 5 * MIB + 4096 + 1234
    source, target = tmp_path / "disk.img", loop(8 * MIB, sector_size=sector_size)
    held = []
    for data in (rng.randbytes(size), bytes(size), rng.randbytes(size)):
        source.write_bytes(data)
        held.append((program.backup(source)["point"], data))
    dirty(target, 8 * MIB)
    tail = Path(target.path).read_bytes()[size:]
    for point, data in (held[1], held[0], held[2], held[1], held[2]):
        program.restore(point, target)
        now = Path(target.path).read_bytes()
        assert (now[:size] == data, now[size:] == tail) == (True, True)


def test_links_are_followed_to_what_they_name(chain, program, loop, tmp_path):
    target, file = loop(SIZE), tmp_path / "file.img"
    file.touch()
    for name, real in (("device-link", target.path), ("file-link", file), ("new-link", tmp_path / "new.img")):
        (tmp_path / name).symlink_to(real)
        program.restore(chain.last, tmp_path / name)
        assert (tmp_path / name).readlink() == Path(real)
        assert chain.held[2].wrong(real) is None, f"seed {chain.seed}"


@pytest.mark.parametrize("kind", ["device", "file"])
def test_a_point_of_zeros_wipes_a_target(program, loop, tmp_path, kind):
    source = tmp_path / "zeros.img"
    source.write_bytes(bytes(16 * MIB + 512))
    point = program.backup(source)["point"]
    target = loop(16 * MIB + 512).path if kind == "device" else tmp_path / "target.img"
    if kind == "file":
        target.touch()
    dirty(target, 16 * MIB + 512)
    program.restore(point, target)
    assert sha(target) == sha(source)


@pytest.mark.parametrize("length", [0, 512, SIZE - 512, SIZE, SIZE + 5 * MIB + 3])
def test_an_existing_file_gets_exactly_the_size_of_the_volume(chain, program, tmp_path, length):
    target = tmp_path / "target.img"
    target.touch()
    dirty(target, length)
    os.link(target, tmp_path / "other-name")
    program.restore(chain.last, target)
    assert target.stat().st_size == SIZE
    assert chain.held[2].wrong(target) is None, f"seed {chain.seed}"
    # It is the same file still: whoever has another name for it sees the point too.
    assert target.samefile(tmp_path / "other-name")
    assert not Path(f"{target}.partial").exists()


def test_a_new_file_is_sparse_and_private(program, loop, tmp_path, seed):
    source = loop(64 * MIB)
    oracle = Oracle(source, 64 * MIB, seed)
    oracle.write((10 * MIB, 11 * MIB), (63 * MIB, 64 * MIB))
    point = program.backup(source)["point"]
    target = tmp_path / "target.img"
    program("restore", point, target)
    assert oracle.now().wrong(target) is None, f"seed {seed}"
    assert target.stat().st_size == 64 * MIB
    assert target.stat().st_blocks * 512 <= 2 * MIB + 256 * KIB
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_partial_that_was_not_named_is_somebody_elses(chain, program, tmp_path):
    target, partial = tmp_path / "target.img", tmp_path / "target.img.partial"
    partial.write_bytes(b"mine")
    error = program("restore", chain.last, target, expect=5).error
    assert (error["name"], str(partial) in error["message"]) == ("TargetExists", True)
    assert partial.read_bytes() == b"mine"
    assert not target.exists()
    program.restore(chain.last, target)
    assert chain.held[2].wrong(target) is None
    assert not partial.exists()
    # A restore that was killed leaves one that says whose it is: nobody has to be asked again.
    target.unlink()
    partial.write_bytes(b"half of it")
    os.setxattr(partial, "user.blockbak", b"unfinished")
    program("restore", chain.last, target)
    assert chain.held[2].wrong(target) is None
    assert os.listxattr(target) == []
    assert not partial.exists()
    # An existing target is written as it is, so a partial beside it is none of its business.
    partial.write_bytes(b"mine")
    program.restore(chain.points[0]["point"], target)
    assert partial.read_bytes() == b"mine"


def test_a_restore_that_fails_leaves_no_new_file(chain, program, tmp_path):
    damage_frame(chain.image(0), 40)
    before = sorted(tmp_path.iterdir())
    program.restore(chain.last, tmp_path / "target.img", expect=4)
    assert sorted(tmp_path.iterdir()) == before


def test_a_dry_run_writes_nothing(chain, program, loop, tmp_path):
    target, file = loop(SIZE), tmp_path / "target.img"
    file.touch()
    for path in (target, file):
        dirty(path, SIZE)
    held, kept = [sha(target), sha(file), sha(chain.source)], program.contents()
    written, names = [counters(one)[1] for one in (target, chain.source)], sorted(tmp_path.iterdir())
    for path, method in ((target, "write"), (file, "write"), (chain.source, "differ"), (tmp_path / "new", "create")):
        plan = program("restore", chain.points[1]["point"], path, "--yes", "--dry-run").document["plan"]
        assert (plan["method"], plan["device_bytes"], len(plan["images"])) == (method, SIZE, 2)
    assert [sha(target), sha(file), sha(chain.source)] == held
    assert [counters(one)[1] for one in (target, chain.source)] == written
    assert (program.contents(), sorted(tmp_path.iterdir())) == (kept, names)


# --- rolling back -----------------------------------------------------------------------------------------


def test_a_rollback_writes_only_what_differs(chain, program):
    before = counters(chain.source)[1]
    done = program.restore(chain.last, chain.source).document
    assert (done["plan"]["method"], done["written_bytes"], done["verified_bytes"]) == ("differ", 0, 0)
    assert counters(chain.source)[1] == before
    assert any("rolled back" in note for note in done["plan"]["notes"])

    chain.oracle.write((7 * MIB, 7 * MIB + 512), (25 * MIB - 512, 25 * MIB + 512))
    chain.oracle.zero((12 * MIB, 12 * MIB + 4 * KIB))
    before = counters(chain.source)[1]
    done = program.restore(chain.last, chain.source).document
    assert done["written_bytes"] == 4 * 4 * KIB
    assert (counters(chain.source)[1] - before) * 512 == 4 * 4 * KIB
    assert chain.held[2].wrong(chain.source) is None, f"seed {chain.seed}"
    assert done["verified_bytes"] <= 3 * PIECE


def test_after_a_rollback_the_next_increment_holds_what_it_undid(chain, program, tmp_path):
    done = program.restore(chain.points[0]["point"], chain.source).document
    # 1 MiB at 2, one block at 20, the zeros at 30, 1 MiB at 33.
    assert done["written_bytes"] == 3 * MIB + 4 * KIB
    assert chain.held[0].wrong(chain.source) is None
    after = program.backup(chain.source)
    assert (after["kind"], after["parent"]) == ("incremental", chain.last)
    assert after["changed_bytes"] == 3 * MIB + 4 * KIB
    assert after["root"] == chain.points[0]["root"]
    target = tmp_path / "target.img"
    for name, held in ((after["point"], chain.held[0]), (chain.last, chain.held[2])):
        program.restore(name, target)
        assert held.wrong(target) is None, f"seed {chain.seed}"


def test_a_copy_that_is_nearly_right_is_brought_in_step(chain, program, loop):
    target = loop(SIZE)
    dirty(target, SIZE)
    assert program.restore(chain.points[0]["point"], target).document["plan"]["method"] == "write"
    done = program.restore(chain.last, target).document
    assert (done["plan"]["method"], done["written_bytes"]) == ("differ", 3 * MIB + 4 * KIB)
    assert chain.held[2].wrong(target) is None, f"seed {chain.seed}"


# --- reading back -----------------------------------------------------------------------------------------


class Falsifying(Kernel):
    """After a target was flushed, and is in the page cache as it should be, a bit below it turns over."""

    def __init__(self, node, file, place):
        self.node, self.file, self.place = node, file, place

    def drop_cache(self, fd, *, block):
        super().drop_cache(fd, block=block)
        if os.path.samestat(os.fstat(fd), os.stat(self.node)):
            with open(self.node, "rb", buffering=0) as file:
                file.seek(self.place)
                file.read(4096)
            flip(self.file, self.place)


@pytest.fixture
def small(tmp_path, seed):
    """A repository with one point of 8 MiB, made in this process; what it holds, and the world."""
    repository = new_repository(tmp_path / "small")
    world = context(tmp_path / "state")
    source = tmp_path / "source.img"
    source.write_bytes(bytes(8 * MIB))
    Oracle(source, 8 * MIB, seed).write((0, 6 * MIB))
    made = backup.backup(repository, backup.Request(str(source)), world)
    return repository, made.point, source, world


@pytest.mark.parametrize("place", [0, 5 * MIB + 4096 * 3 + 17, 7 * MIB])
@pytest.mark.parametrize("direct", [True, False])
def test_what_reads_back_otherwise_than_it_was_written_is_found(loop, small, place, direct):
    repository, point, _, world = small
    target = loop(8 * MIB, direct=direct)
    dirty(target, 8 * MIB)
    request = restore.Request(point, target.path, overwrite=True)
    world = replace(world, kernel=Falsifying(target.path, target.file, place))
    with pytest.raises(VerificationFailed) as found:
        restore.restore(repository, request, world)
    assert found.value.exit_code == 1
    assert (found.value.fields["blocks"], found.value.fields["first"]) == (1, place // (64 * KIB) * 64 * KIB)
    assert target.path in str(found.value)
    # Whoever does not ask is not told, and the second time it is put right.
    restore.restore(repository, replace(request, verify=False), world)
    done = restore.restore(repository, request, replace(world, kernel=Kernel()))
    assert done.written_bytes == 64 * KIB


def test_a_file_that_reads_back_otherwise_is_found_and_gets_no_name(small, tmp_path):
    repository, point, _, world = small
    target = tmp_path / "target.img"
    partial = f"{target}.partial"

    class Flipping(Kernel):
        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            flip(partial, 3 * MIB)

    with pytest.raises(VerificationFailed):
        restore.restore(repository, restore.Request(point, str(target)), replace(world, kernel=Flipping()))
    assert not target.exists()
    assert not Path(partial).exists()


def test_reading_back_can_be_left_out(chain, program, loop):
    target = loop(SIZE)
    read = counters(target)[0]
    done = program.restore(chain.last, target, "--no-verify").document
    assert done["verified_bytes"] == 0
    # A sample tells whether the target is nearly right already; identities are looked for in its first sectors.
    assert (counters(target)[0] - read) * 512 < 4 * MIB
    assert chain.held[2].wrong(target) is None, f"seed {chain.seed}"
    read = counters(target)[0]
    done = program.restore(chain.points[0]["point"], target).document
    assert (counters(target)[0] - read) * 512 >= SIZE


# --- chains that are not whole ----------------------------------------------------------------------------


def lost_ranges(mapfile):
    """The ranges that ddrescue takes for bad, from its own tool and from the text."""
    run("ddrescuelog", "--show-status", mapfile)
    sectors = [int(line) for line in run("ddrescuelog", "--block-size=512", "--list-blocks=-", mapfile).split()]
    lines = [line.split() for line in Path(mapfile).read_text().splitlines() if not line.startswith("#")][1:]
    rows = [(int(start, 16), int(start, 16) + int(length, 16), status) for start, length, status in lines]
    assert [rows[0][0], *(end for _, end, _ in rows)] == [*(start for start, _, _ in rows), SIZE], rows
    assert {status for _, _, status in rows} <= {"+", "-"}
    bad = [(start, end) for start, end, status in rows if status == "-"]
    assert sectors == [sector for start, end in bad for sector in range(start // SECTOR, end // SECTOR)]
    return bad


def frame(number, window):
    return lambda chain: damage_frame(chain.image(number), window)


def record(number, section):
    return lambda chain: flip(chain.image(number), record_at(chain.image(number), section)[0] + 100)


def without(number, *ends):
    def remove(chain):
        for end in ends:
            chain.image(number).with_suffix(end).unlink()

    return remove


def inside(ranges, low, high):
    return [(max(start, low), min(end, high)) for start, end in ranges if start < high and end > low]


SECTION = 16 * MIB
HELD_BY_THE_LAST = [(0, 2 * MIB + 512 * KIB), (2 * MIB + 768 * KIB, 30 * MIB), (31 * MIB, 33 * MIB), (34 * MIB, SIZE)]
HELD_BY_DELTAS = [(0, 2 * MIB), (3 * MIB, 20 * MIB), (20 * MIB + 4 * KIB, 30 * MIB), *HELD_BY_THE_LAST[2:]]

# What happened to the repository, and the ranges of the last point that nobody can know any more.
CONTENT = {
    "a frame of the full": (frame(0, 40), [(10 * MIB, 10 * MIB + WINDOW)]),
    "a frame of the full that is partly outdated": (frame(0, 80), [(20 * MIB + 4 * KIB, 20 * MIB + WINDOW)]),
    "a frame of one block": (frame(1, 80), [(20 * MIB, 20 * MIB + 4 * KIB)]),
    "a frame of the last": (frame(2, 133), [(33 * MIB + WINDOW, 33 * MIB + 2 * WINDOW)]),
}
STRUCTURE = {
    "an index section of the full": (record(0, 1), inside(HELD_BY_DELTAS, SECTION, 2 * SECTION)),
    "the first index section of an increment": (record(1, 0), inside(HELD_BY_THE_LAST, 0, SECTION)),
    "an index section of the last": (record(2, 2), [(2 * SECTION, SIZE)]),
    "the middle image": (without(1, ".zst"), HELD_BY_THE_LAST),
    "the middle image and its manifest": (without(1, ".zst", ".json"), HELD_BY_THE_LAST),
    "the base": (without(0, ".zst"), HELD_BY_DELTAS),
    "the base and its manifest": (without(0, ".zst", ".json"), HELD_BY_DELTAS),
}


SOME = ("a frame of the full", "an index section of the last", "the middle image", "the base and its manifest")


@pytest.mark.parametrize(
    ("harm", "onto"),
    [(harm, "a dirty device") for harm in (*CONTENT, *STRUCTURE)]
    + [
        (harm, onto)
        for harm in SOME
        for onto in ("a new file", "a dirty file", "the point before", "the volume itself")
    ],
)
def test_what_can_be_is_restored_and_the_rest_is_named(chain, program, loop, tmp_path, harm, onto):
    break_it, lost = {**CONTENT, **STRUCTURE}[harm]
    target = tmp_path / "target.img" if "file" in onto else chain.source if "itself" in onto else loop(SIZE)
    if onto == "a dirty file":
        target.touch()
    if "dirty" in onto:
        dirty(target, SIZE)
    if onto in ("the point before", "the volume itself"):
        # Most of it is right already; what is lost must not be left as it was, for nobody can know.
        put(target, 0, chain.held[1].data())
        for start, end in lost:
            put(target, start, b"\xdd" * (end - start))
    break_it(chain)
    done = program.restore(chain.last, target, "--keep-going", "--mapfile", tmp_path / "map", expect=3)
    assert done.document["mapfile"] == str(tmp_path / "map")
    assert lost_ranges(tmp_path / "map") == lost
    flaws = [(flaw["start"], flaw["start"] + flaw["length"]) for flaw in done.document["flaws"]]
    assert flaws[0][0] == lost[0][0]
    assert flaws[-1][1] == lost[-1][1]
    assert chain.held[2].wrong(target, lost) is None, f"seed {chain.seed}"
    assert os.stat(target).st_size in (SIZE, 0)


def test_the_mapfile_lies_beside_a_file_and_where_one_stands_for_a_device(chain, program, loop, tmp_path):
    CONTENT["a frame of the full"][0](chain)
    target = loop(SIZE)
    where = tmp_path / "somewhere"
    where.mkdir()
    done = program("restore", chain.last, tmp_path / "file.img", "--keep-going", expect=3).document
    assert done["mapfile"] == str(tmp_path / "file.img.mapfile")
    done = program("restore", chain.last, target, "--yes", "--keep-going", expect=3, where=where).document
    assert done["mapfile"] == str(where / f"{chain.last}.mapfile")
    assert lost_ranges(tmp_path / "file.img.mapfile") == lost_ranges(done["mapfile"]) != []


def test_other_sectors_do_not_keep_what_is_left_from_being_restored(chain, program, loop, tmp_path):
    """Whether the point has a partition table is not to be known any more: its first section is damaged."""
    record(1, 0)(chain)
    target = loop(SIZE, sector_size=4096)
    program.restore(chain.last, target, "--keep-going", "--mapfile", tmp_path / "map", expect=3)
    lost = inside(HELD_BY_THE_LAST, 0, SECTION)
    assert lost_ranges(tmp_path / "map") == lost
    assert chain.held[2].wrong(target, lost) is None, f"seed {chain.seed}"


def test_a_mapfile_that_cannot_be_written_is_told_in_a_sentence(chain, program, tmp_path):
    CONTENT["a frame of the full"][0](chain)
    target, mapfile = tmp_path / "target.img", tmp_path / "not/there/map"
    error = program("restore", chain.last, target, "--keep-going", "--mapfile", mapfile, expect=1).error
    assert error["name"] != "Unknown"
    assert str(mapfile) in error["message"]


def test_keeping_on_with_a_whole_chain_is_an_ordinary_restore(chain, program, tmp_path):
    target = tmp_path / "target.img"
    done = program("restore", chain.last, target, "--keep-going").document
    assert (done["flaws"], done["mapfile"]) == ([], "")
    assert not Path(f"{target}.mapfile").exists()
    assert chain.held[2].wrong(target) is None


def test_damage_where_the_target_is_right_already_costs_nothing(chain, program):
    """A rollback reads only what differs; damage elsewhere is for ``verify`` to find."""
    CONTENT["a frame of the full"][0](chain)
    chain.oracle.write((35 * MIB, 35 * MIB + 512))
    assert program.restore(chain.last, chain.source).document["written_bytes"] == 4 * KIB
    assert chain.held[2].wrong(chain.source) is None


@pytest.mark.parametrize("harm", STRUCTURE)
def test_a_chain_that_is_not_whole_stops_before_the_first_byte(chain, program, loop, tmp_path, harm):
    target = loop(SIZE)
    dirty(target, SIZE)
    held, written = sha(target), counters(target)[1]
    STRUCTURE[harm][0](chain)
    names = sorted(tmp_path.iterdir())
    for path in (target, tmp_path / "new.img"):
        error = program.restore(chain.last, path, expect=4).error
        assert error["name"] in ("DamagedImage", "MissingImage", "Gap")
        program("restore", chain.last, path, "--dry-run", expect=4)
    assert (sha(target), counters(target)[1]) == (held, written)
    assert sorted(tmp_path.iterdir()) == names
    # The points that do not need what is broken are whole.
    if harm.startswith(("the middle", "the first index section of an", "an index section of the last")):
        program.restore(chain.points[0]["point"], target)
        assert chain.held[0].wrong(target) is None


@pytest.mark.parametrize("harm", CONTENT)
def test_damage_to_content_stops_the_restore_and_tells_what_was_written(chain, program, loop, harm):
    break_it, lost = CONTENT[harm]
    target = loop(SIZE)
    dirty(target, SIZE)
    old, new = Path(target.path).read_bytes(), chain.held[2].data()
    break_it(chain)
    error = program.restore(chain.last, target, expect=4).error
    assert error["name"] == "DamagedImage"
    (start, end), *_ = re.findall(r"at bytes (\d+) to (\d+)", error["message"])
    assert lost[0][0] <= int(start) < int(end) <= lost[0][1]
    now = Path(target.path).read_bytes()
    told = error["message"].partition("written so far: ")[2]
    ranges = [(int(low), int(high)) for low, high in re.findall(r"(\d+) to (\d+)", told)]
    assert ranges or "nothing" in told
    for low, high in ranges:
        assert now[low:high] == new[low:high]
    for low in range(0, SIZE, SECTOR):
        sector = slice(low, low + SECTOR)
        if now[sector] != old[sector]:
            assert now[sector] == new[sector], f"sector {low // SECTOR} is neither old nor new; seed {chain.seed}"
    assert now[lost[0][0] : lost[0][1]] == old[lost[0][0] : lost[0][1]]


@pytest.mark.parametrize("harm", CONTENT)
def test_images_can_be_verified_before_the_first_byte(chain, program, loop, tmp_path, harm):
    target = loop(SIZE)
    dirty(target, SIZE)
    program.restore(chain.points[0]["point"], target, "--verify-first")
    held, written = sha(target), counters(target)[1]
    CONTENT[harm][0](chain)
    for path in (target, tmp_path / "new.img"):
        error = program.restore(chain.last, path, "--verify-first", expect=4).error
        assert error["name"] == "DamagedImage"
    assert (sha(target), counters(target)[1]) == (held, written)
    assert not (tmp_path / "new.img").exists()


def test_a_synthetic_full_restores_what_the_broken_chain_cannot(chain, program, loop):
    program("synthesize", chain.points[0]["volume"])
    STRUCTURE["the middle image and its manifest"][0](chain)
    STRUCTURE["an index section of the full"][0](chain)
    target = loop(SIZE)
    done = program.restore(chain.last, target).document
    assert len(done["plan"]["images"]) == 1
    assert chain.held[2].wrong(target) is None, f"seed {chain.seed}"
    assert np.count_nonzero(np.frombuffer(Path(target.path).read_bytes(), np.uint8)[36 * MIB :]) == 0
