"""How often a failing disk is asked, in what order, and when it is enough: a failing read may take seconds."""

import errno

import pytest

from blockbak.errors import SourceUnreadable, SourceVanished
from blockbak.host.blockio import PIECE_BYTES, ROUND_SECONDS, SourceReader, aligned
from blockbak.units import KIB
from tests.faults import BadMedium
from tests.patterns import stamp

SECTOR = 512
PIECE = PIECE_BYTES
STEPS = (64 * KIB, 4 * KIB, SECTOR)


class SlowMedium(BadMedium):
    """Each failing read takes ``seconds`` on a clock of its own; sectors of ``healing`` can be read the second
    time they are asked for by themselves.
    """

    def __init__(self, path, bad, *, seconds=0.0, healing=(), number=errno.EIO):
        super().__init__(path, bad, number=number)
        self.now, self.seconds, self.failed = 0.0, seconds, []
        self._healing = set(healing)

    def preadv(self, fd, buffers, offset):
        try:
            return super().preadv(fd, buffers, offset)
        except OSError:
            length = sum(len(memoryview(part).cast("B")) for part in buffers)
            self.failed.append((offset, length))
            self.now += self.seconds
            if offset in self._healing and length == SECTOR:
                self.bad = [part for part in self.bad if part != (offset, offset + SECTOR)]
            raise


@pytest.fixture
def disk(tmp_path, seed):
    file = tmp_path / "disk.img"
    file.write_bytes(stamp(0, PIECE // SECTOR, 1, seed))
    return file


def reader_of(medium, retries=0, *, strict=False):
    reader = SourceReader(medium.path, exclusive=True, kernel=medium, clock=lambda: medium.now)
    reader.retries, reader.strict = retries, strict
    assert reader.direct, "the page cache would answer for the disk"
    return reader


def read(medium, retries=0):
    """What could not be read of the piece, and the piece."""
    with reader_of(medium, retries) as reader:
        into = aligned(PIECE)
        into[:] = 0xA5
        found = reader.read(0, into, PIECE)
    return [(int(row["start"]), int(row["start"] + row["length"])) for row in found], into.tobytes()


def zeroed(content, bad):
    right = bytearray(content)
    for start, end in bad:
        right[start:end] = bytes(end - start)
    return bytes(right)


def test_one_bad_sector_costs_four_failing_reads_and_few_others(disk):
    """The piece, a part of 64 KiB, one of 4 KiB, the sector. Halved, it would lie in thirteen failing reads."""
    bad = [(1000 * SECTOR, 1001 * SECTOR)]
    medium = SlowMedium(disk, bad)
    assert read(medium) == (bad, zeroed(disk.read_bytes(), bad))
    assert [length for _, length in medium.failed] == [PIECE, *STEPS]
    assert len(medium.reads) == 1 + 32 + 16 + 8


def test_a_piece_of_which_nothing_can_be_read_is_asked_for_each_sector_once_by_a_quick_disk(disk):
    medium = SlowMedium(disk, [(0, PIECE)])
    assert read(medium) == ([(0, PIECE)], bytes(PIECE))
    assert len(medium.failed) == 1 + 32 + 512 + 4096


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_a_slow_disk_is_not_asked_for_ever(retries, disk):
    """Sector by sector, at five seconds each, two mebibytes would take six hours."""
    medium = SlowMedium(disk, [(0, PIECE)], seconds=5)
    assert read(medium, retries) == ([(0, PIECE)], bytes(PIECE))
    rounds = 1 + retries
    assert medium.now <= 33 * 5 + rounds * (ROUND_SECONDS + 5)
    assert len(medium.failed) <= 33 + rounds * (ROUND_SECONDS / 5 + 1)


def test_what_time_did_not_suffice_for_is_named_and_no_more(disk):
    """The parts of 64 KiB are all asked for, so the good ones among them are read, however slow the bad ones are."""
    medium = SlowMedium(disk, [(64 * KIB, 64 * KIB + SECTOR), (320 * KIB, 321 * KIB)], seconds=2 * ROUND_SECONDS)
    bad, content = read(medium)
    assert bad == [(64 * KIB, 128 * KIB), (320 * KIB, 384 * KIB)]
    assert content == zeroed(disk.read_bytes(), bad)


def test_all_that_is_good_is_read_before_anything_is_asked_for_again(disk):
    bad = [(40 * SECTOR, 41 * SECTOR), (3000 * SECTOR, 3002 * SECTOR)]
    medium = SlowMedium(disk, bad)
    assert read(medium, retries=2)[0] == bad
    sizes = [length for _, length in medium.reads]
    assert sizes == sorted(sizes, reverse=True), "larger parts first, each kind to the end of the piece"
    again = [offset for offset, _ in medium.reads[-6:]]
    assert again == 2 * [40 * SECTOR, 3000 * SECTOR, 3001 * SECTOR]


def test_a_sector_that_can_be_read_the_second_time_is_no_bad_one(disk):
    at = 77 * SECTOR
    bad = [(at, at + SECTOR), (90 * SECTOR, 91 * SECTOR)]
    assert read(SlowMedium(disk, bad, healing=[at]), retries=0)[0] == bad
    found = read(SlowMedium(disk, bad, healing=[at]), retries=1)
    assert found == (bad[1:], zeroed(disk.read_bytes(), bad[1:]))


MEDIUM = (errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.EBADMSG, errno.ETIMEDOUT)
"""What kernels have answered for a medium that does not deliver: block/blk-core.c, blk_errors."""


@pytest.mark.parametrize("number", MEDIUM, ids=errno.errorcode.get)
def test_every_error_of_the_medium_is_alike(number, disk):
    bad = [(7 * SECTOR, 9 * SECTOR)]
    assert read(SlowMedium(disk, bad, number=number), retries=1) == (bad, zeroed(disk.read_bytes(), bad))
    with reader_of(SlowMedium(disk, bad, number=number), strict=True) as reader, pytest.raises(SourceUnreadable):
        reader.read(0, aligned(PIECE), PIECE)


def test_a_severed_link_is_no_bad_sector(disk):
    """It says nothing of the medium: the sectors are good, and an image must not say otherwise."""
    with pytest.raises(SourceVanished):
        read(SlowMedium(disk, [(0, SECTOR)], number=errno.ENOLINK))


@pytest.mark.parametrize("retries", [0, 2])
def test_strictly_the_first_bad_sector_is_the_end_and_is_named(retries, disk):
    bad = [(1000 * SECTOR, 1001 * SECTOR), (1002 * SECTOR, 4000 * SECTOR)]
    medium = SlowMedium(disk, bad)
    with reader_of(medium, retries, strict=True) as reader, pytest.raises(SourceUnreadable) as raised:
        reader.read(0, aligned(PIECE), PIECE)
    assert raised.value.exit_code == 1
    assert raised.value.fields == {
        "path": str(disk), "byte": 1000 * SECTOR, "sector": 1000, "sector_bytes": SECTOR,
        "reason": "Input/output error",
    }  # fmt: skip
    assert [length for _, length in medium.failed] == [PIECE, *STEPS, *[SECTOR] * retries]


def test_strictly_a_sector_that_can_be_read_after_all_is_none_to_stop_at(disk):
    at = 1000 * SECTOR
    medium = SlowMedium(disk, [(at, at + SECTOR)], healing=[at])
    with reader_of(medium, 1, strict=True) as reader:
        into = aligned(PIECE)
        assert len(reader.read(0, into, PIECE)) == 0
    assert into.tobytes() == disk.read_bytes()
