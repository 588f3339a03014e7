"""A spool gives the disk's bytes, from anywhere, by any number of threads, or an error."""

import random
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import DamagedImage, SpoolDamaged
from blockbak.host.blockio import aligned
from blockbak.image import codec
from blockbak.image.spool import SpoolReader, parse_index
from blockbak.model.extent import BAD
from blockbak.units import KIB, MIB
from tests.doubles import MemorySource
from tests.patterns import SECTOR, stamp

PIECE = 256 * KIB
DISK = stamp(0, (3 * PIECE + 5 * SECTOR) // SECTOR, 1, seed=11)


def packed(disk=DISK, piece=PIECE):
    """The spool of a disk: its file, and its index."""
    pieces = [memoryview(disk)[start : start + piece] for start in range(0, len(disk), piece)]
    frames = [b"".join(codec.encoder("zstd").encode(one)) for one in pieces]
    return b"".join(frames), "".join(f"{number} {len(frame)}\n" for number, frame in enumerate(frames))


FILE, INDEX = packed()


def reader(file=FILE, index=INDEX, bad="", size=0):
    size = size or len(DISK)
    found = parse_index("spool", index, bad, size, PIECE)
    return SpoolReader(MemorySource(file), found, size=size, logical=SECTOR, physical=SECTOR, path="/dev/sda")


def read(spool, offset, length):
    into = aligned(length)
    bad = spool.read(offset, into, length)
    return bytes(into[:length]), bad


@given(st.lists(st.tuples(st.integers(0, len(DISK) - 1), st.integers(1, PIECE), st.booleans()), max_size=12))
def test_any_reads_and_looks_in_any_order(steps):
    spool = reader()
    for offset, length, is_look in steps:
        end = min(offset + length, len(DISK))
        found = spool.peek(offset, length) if is_look else read(spool, offset, end - offset)[0]
        assert found == DISK[offset:end]


def test_looks_beyond_the_disk():
    assert reader().peek(len(DISK), 1) == b""
    assert reader().peek(-1, 1) == b""
    assert reader().peek(len(DISK) - 1, 100) == DISK[-1:]


def test_threads_that_take_turns_read_it_all():
    piece = 4 * MIB
    disk = stamp(0, 41 * MIB // SECTOR, 1, seed=12)
    file, index = packed(disk, piece)
    found = parse_index("spool", index, "", len(disk), piece)
    spool = SpoolReader(MemorySource(file), found, size=len(disk), logical=SECTOR, physical=SECTOR, path="/dev/sda")
    starts, result, guard = iter(range(0, len(disk), 2 * MIB)), bytearray(len(disk)), threading.Lock()

    def work():
        while True:
            with guard:
                start = next(starts, None)
            if start is None:
                return
            length = min(2 * MIB, len(disk) - start)
            result[start : start + length] = read(spool, start, length)[0]

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(result) == disk
    assert spool._kept == {}


def test_what_could_not_be_read_is_said():
    bad = f"{PIECE} {SECTOR}\n{2 * SECTOR} {SECTOR}\n{3 * SECTOR} {SECTOR}\n"
    spool = reader(bad=bad)
    assert read(spool, 0, SECTOR)[1].tolist() == []
    assert read(spool, SECTOR, 3 * SECTOR)[1].tolist() == [(2 * SECTOR, 2 * SECTOR, BAD)]
    assert read(spool, PIECE, PIECE)[1].tolist() == [(PIECE, SECTOR, BAD)]


@pytest.mark.parametrize(
    ("index", "bad"),
    [
        ("", ""),
        (INDEX + "4 10\n", ""),
        (INDEX.replace("1 ", "2 ", 1), ""),
        (INDEX.replace("\n", " x\n", 1), ""),
        (INDEX, f"{len(DISK)} 512\n"),
        (INDEX, "0\n"),
        (INDEX, "-512 512\n"),
    ],
)
def test_an_index_that_does_not_fit(index, bad):
    with pytest.raises(SpoolDamaged):
        parse_index("spool", index, bad, len(DISK), PIECE)


def test_a_file_of_another_length():
    with pytest.raises(SpoolDamaged, match=f"has {len(FILE) - 1} bytes instead of {len(FILE)}"):
        reader(FILE[:-1])


def test_no_flipped_bit_is_read_as_data():
    dice = random.Random(5)
    for _ in range(200):
        at = dice.randrange(len(FILE))
        damaged = bytearray(FILE)
        damaged[at] ^= 1 << dice.randrange(8)
        spool = reader(bytes(damaged))
        try:
            found = read(spool, 0, len(DISK))[0]
        except (SpoolDamaged, DamagedImage):
            continue
        # Some bits of a frame's header mean nothing to its content.
        assert found == DISK


def test_frames_that_are_longer_or_shorter_than_their_piece():
    for disk in (DISK[:-SECTOR], DISK + bytes(SECTOR)):
        file, index = packed(disk)
        with pytest.raises(SpoolDamaged):
            read(reader(file, index), 0, len(DISK))


def test_two_frames_in_the_place_of_one():
    halves = packed(DISK, PIECE // 2)
    sizes = [int(line.split()[1]) for line in halves[1].splitlines()]
    pairs = [sum(sizes[at : at + 2]) for at in range(0, len(sizes), 2)]
    index = "".join(f"{number} {size}\n" for number, size in enumerate(pairs))
    with pytest.raises(SpoolDamaged):
        read(reader(halves[0], index), 0, len(DISK))


def test_the_piece_is_that_of_the_stage():
    from pathlib import Path

    from blockbak.host import nextboot
    from blockbak.image.spool import PIECE_BYTES

    stage = (Path(nextboot.__file__).with_name("initramfs") / "stage").read_text()
    assert f"\nPIECE={PIECE_BYTES} " in stage
    assert np.log2(PIECE_BYTES).is_integer()
