"""A mirror has the source's bytes whatever the two are, and by whatever way they are brought together."""

import json
import os
import random
from dataclasses import replace

import numpy as np
import pytest

from blockbak.errors import TargetExists
from blockbak.flow.mirror import Request, mirror
from tests.conftest import Loop
from tests.doubles import context
from tests.host.stage import sha
from tests.mirrors import BLOCK, PIECE, mirrored, over_pipes
from tests.patterns import SECTOR, explain, stamp

MIB = 1 << 20
SIZE = 9 * MIB + 3 * SECTOR
"""Not a whole number of pieces, nor of blocks."""
SEED = 5

pytestmark = pytest.mark.root

ways = pytest.mark.parametrize("way", ["here", "over pipes"])
SECTORS = {"file": 512, "loop 512": 512, "loop 4096": 4096}
kinds = pytest.mark.parametrize("kind", SECTORS)


def content(size=SIZE, sequence=1):
    """Stamped sectors, with zeros in between: a whole piece, and single blocks."""
    data = bytearray(stamp(0, size // SECTOR, sequence, SEED))
    data[3 * MIB : 6 * MIB] = bytes(3 * MIB)
    data[7 * MIB : 7 * MIB + BLOCK] = bytes(BLOCK)
    return data


@pytest.fixture
def place(request, tmp_path, loop):
    """``place(kind, name, data)``: a file, or a device over one; its size is that of the data, in whole sectors."""

    def make(kind, name, data=b"", size=None):
        file = tmp_path / name
        size = len(data) if size is None else size
        if kind != "file":
            size -= size % SECTORS[kind]
        with file.open("wb") as made:
            made.write(data[:size])
            made.truncate(size)
        if kind == "file":
            return Loop(str(file), file, size, 512)
        return loop(size, SECTORS[kind], file=file)

    return make


def held(of, size):
    with open(of.path if isinstance(of, Loop) else of, "rb") as file:
        return file.read(size)


def change(place, at, data):
    """Write to a source as somebody else does, through its node."""
    fd = os.open(place.path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, at)
        os.fsync(fd)
    finally:
        os.close(fd)


# --- every pair of places ---------------------------------------------------------------------------------


@ways
@kinds
@pytest.mark.parametrize("target_kind", ["new file", *SECTORS])
def test_the_copy_is_the_source_and_stays_in_step(way, kind, target_kind, place, tmp_path):
    source = place(kind, "source", content())
    size = source.size
    if target_kind == "new file":
        target = Loop(str(tmp_path / "copy"), tmp_path / "copy", size, 512)
    else:
        target = place(target_kind, "target", b"\x5a" * size, size=SIZE + 8192)
    report = mirrored(way, source, target, tmp_path / "state")
    right = held(source, size)
    assert held(target, size) == right
    assert report.method == ("create" if target_kind == "new file" else "differ")
    assert (report.device_bytes, report.read_bytes, report.consistency) == (size, size, "cold")
    assert report.written_bytes + report.zeroed_bytes == report.differing_bytes
    assert report.verified_bytes >= report.written_bytes
    if target_kind in ("new file", "file"):
        assert os.stat(target.path).st_size == size, "a file gets exactly the source's size"
        assert os.stat(target.path).st_blocks * 512 <= size - 3 * MIB, "and its zeros take no room"
    else:
        assert held(target, target.size)[size:] == b"\0" * (target.size - size), "what lies past it is left alone"
    if target_kind == "new file":
        assert report.zeroed_bytes == 0
        assert not os.path.exists(f"{target.path}.partial")
        assert os.stat(target.path).st_mode & 0o777 == 0o600

    again = mirrored(way, source, target, tmp_path / "state")
    assert (again.differing_bytes, again.written_bytes, again.zeroed_bytes, again.verified_bytes) == (0, 0, 0, 0)
    assert again.root == report.root
    assert held(target, size) == right

    change(source, 5 * BLOCK + 4096, stamp(8, 8, 2, SEED))
    change(source, 8 * MIB, bytes(2 * BLOCK))
    third = mirrored(way, source, target, tmp_path / "state")
    assert (third.differing_bytes, third.written_bytes, third.zeroed_bytes) == (3 * BLOCK, BLOCK, 2 * BLOCK)
    assert third.root != report.root
    assert held(target, size) == held(source, size)


@ways
def test_a_thousand_random_changes_each_time(way, place, tmp_path, seed):
    dice = random.Random(seed)
    source, target = place("file", "source", content()), place("file", "target", content(sequence=3))
    mirrored(way, source, target, tmp_path / "state")
    for _ in range(4):
        with source.file.open("r+b") as file:
            for _ in range(dice.randrange(1, 60)):
                at = dice.randrange(SIZE)
                file.seek(at)
                file.write(
                    dice.choice([b"\0", dice.randbytes(1)]) * min(dice.choice([1, 511, BLOCK, 3 * BLOCK]), SIZE - at)
                )
        mirrored(way, source, target, tmp_path / "state", block_bytes=dice.choice([4096, BLOCK, MIB]))
        assert sha(target.path) == sha(source.path)


@ways
@pytest.mark.parametrize("at", [0, BLOCK - 1, BLOCK, PIECE - 1, PIECE, 4 * MIB, SIZE - 1])
def test_a_block_of_zeros_but_for_one_byte_is_no_zeros(way, at, place, tmp_path):
    source, target = place("file", "source", bytes(SIZE)), place("file", "target", bytes(SIZE))
    change(source, at, b"\1")
    report = mirrored(way, source, target, tmp_path / "state")
    assert (report.differing_bytes, report.zeroed_bytes) == (min(BLOCK, SIZE - at // BLOCK * BLOCK), 0)
    assert held(target, SIZE) == held(source, SIZE)
    change(source, at, b"\0")
    report = mirrored(way, source, target, tmp_path / "state")
    assert (report.written_bytes, report.zeroed_bytes) == (0, min(BLOCK, SIZE - at // BLOCK * BLOCK))
    assert held(target, SIZE) == bytes(SIZE)


@ways
@pytest.mark.parametrize("size", [1, 511, 4096, BLOCK, BLOCK + 1, PIECE, PIECE + 1])
def test_any_size(way, size, place, tmp_path):
    source = place("file", "source", bytes(range(256)) * (size // 256 + 1), size=size)
    target = tmp_path / "copy"
    mirrored(way, source, target, tmp_path / "state")
    assert target.read_bytes() == held(source, size)


@ways
def test_a_longer_file_is_cut_and_a_shorter_one_grows(way, place, tmp_path):
    source = place("file", "source", content())
    for size in (100, SIZE + 3 * MIB):
        target = place("file", f"target-{size}", b"\xa5" * size)
        report = mirrored(way, source, target, tmp_path / "state")
        assert held(target, SIZE + 1) == held(source, SIZE)
        assert any("longer" in note for note in report.notes) == (size > SIZE)


@ways
def test_holes_on_both_sides_are_not_read(way, tmp_path):
    """A section and more of nothing: it would take its time."""
    size = 2 << 30
    source, target = tmp_path / "source", tmp_path / "target"
    for file in (source, target):
        with file.open("wb") as made:
            made.truncate(size)
    with source.open("r+b") as made:
        made.seek(size - 5000)
        made.write(b"end")
    report = mirrored(way, source, target, tmp_path / "state")
    assert report.read_bytes <= PIECE
    assert report.differing_bytes == BLOCK
    with target.open("rb") as made:
        made.seek(size - 5000)
        assert made.read(3) == b"end"


# --- what travels ------------------------------------------------------------------------------------------------


def test_what_travels_is_what_changed_and_little_more(place, tmp_path, rng):
    """One block in a hundred, anywhere: at most 5 % more than their bytes."""
    size = 64 * MIB
    data = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()
    source, target = place("file", "source", data), place("file", "target", data)
    blocks = rng.sample(range(size // BLOCK), size // BLOCK // 100)
    for block in blocks:
        change(source, block * BLOCK + rng.randrange(BLOCK), b"changed!"[:7])
    report = mirrored("over pipes", source, target, tmp_path / "state")
    changed = report.differing_bytes
    assert len(blocks) * BLOCK <= changed <= (len(blocks) + 2) * BLOCK
    assert changed <= report.moved_bytes <= 1.05 * changed
    assert sha(target.path) == sha(source.path)


# --- dry runs, and what is not overwritten ----------------------------------------------------------------------


@ways
def test_a_dry_run_says_how_much_differs_and_writes_nothing(way, place, tmp_path):
    source, target = place("file", "source", content()), place("loop 512", "target", content(SIZE - SIZE % 512))
    change(source, 2 * MIB, b"x" * (BLOCK + 1))
    before = target.file.read_bytes()
    report = mirrored(way, source, target, tmp_path / "state", dry_run=True)
    assert (report.differing_bytes, report.written_bytes, report.zeroed_bytes) == (2 * BLOCK, 0, 0)
    assert target.file.read_bytes() == before
    new = tmp_path / "new"
    report = mirrored(way, source, new, tmp_path / "state", dry_run=True)
    assert report.differing_bytes == SIZE - 3 * MIB - BLOCK
    assert sorted(path.name for path in tmp_path.iterdir() if "new" in path.name) == []


@ways
def test_what_is_there_is_overwritten_only_when_told_so(way, place, tmp_path):
    source, target = place("file", "source", content()), place("file", "target", b"mine")
    request = Request(source.path, target.path)
    if way == "here":
        with pytest.raises(TargetExists):
            mirror(request, context(tmp_path / "state"))
    else:
        ended = over_pipes(request, target, tmp_path / "state", overwrite=False)
        assert isinstance(ended.receiver, TargetExists)
        assert ended.sender.exit_code == 5
        assert "overwritten only when told so" in str(ended.sender)
    assert target.file.read_bytes() == b"mine"


@ways
def test_the_source_is_never_opened_for_writing(way, place, tmp_path):
    from tests.faults import FaultyKernel

    source, target = place("loop 512", "source", content()), place("file", "target", b"old")
    opened = []

    class Noting(FaultyKernel):
        def open(self, path, flags, mode=0o600):
            opened.append((path, flags & os.O_ACCMODE))
            return super().open(path, flags, mode)

    world = context(tmp_path / "state", kernel=Noting())
    request = Request(source.path, target.path, overwrite=True)
    if way == "here":
        mirror(request, world)
    else:
        assert over_pipes(request, target, tmp_path / "state", here=world, there=world).report
    modes = {mode for path, mode in opened if path == source.path}
    assert modes == {os.O_RDONLY}
    assert {mode for path, mode in opened if path == target.path} >= {os.O_RDWR}


# --- signs of what is wrong ---------------------------------------------------------------------------------------


def test_a_source_that_is_written_meanwhile_is_told(place, tmp_path):
    source, target = place("file", "source", content()), tmp_path / "copy"

    class Writing:
        def begin(self, label, total):
            change(source, 0, b"now!")

        def advance(self, done, changed=None):
            pass

        def end(self):
            pass

    world = replace(context(tmp_path / "state"), progress=Writing())
    report = mirror(Request(source.path, str(target)), world)
    assert (report.consistency, report.attention) == ("none", True)
    assert any("written while it was read" in note for note in report.notes)


def test_two_ends_agree_on_roots_that_images_have_too(place, tmp_path):
    """The root is that of a raw image of the same bytes: one way to say what is where."""
    from blockbak.flow import raw

    source = place("file", "source", content())
    report = mirrored("over pipes", source, tmp_path / "copy", tmp_path / "state")
    raw.make(raw.Request(source.path, str(tmp_path / "raw")), context(tmp_path / "state"))
    assert json.loads((tmp_path / "raw.json").read_text())["root"] == report.root
    assert explain(held(source, SIZE)[: 2 * MIB], 0, 1, SEED) is None
