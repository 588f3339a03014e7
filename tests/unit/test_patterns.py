from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.patterns import SECTOR, explain, stamp

WORD = st.integers(0, 2**64 - 1)


@given(start=st.integers(0, 2**40), count=st.integers(0, 20), sequence=WORD, seed=WORD)
def test_what_was_stamped_is_accepted(start, count, sequence, seed):
    data = stamp(start, count, sequence, seed)
    assert len(data) == count * SECTOR
    assert explain(data, start, sequence, seed) is None


@given(start=st.integers(0, 2**40), sequence=WORD, seed=WORD)
def test_the_checksum_is_the_one_zlib_makes(start, sequence, seed):
    data = stamp(start, 1, sequence, seed)
    assert int.from_bytes(data[32:36], "little") == zlib.crc32(data[:32])


def test_a_sector_does_not_depend_on_how_many_are_made_with_it():
    whole = stamp(100, 8, 3, 9)
    pieces = b"".join(stamp(100 + n, 1, 3, 9) for n in range(8))
    assert whole == pieces


def test_no_two_sectors_share_their_noise():
    noise = {stamp(s, 1, q, k)[40:] for s in range(8) for q in range(4) for k in range(4)}
    assert len(noise) == 8 * 4 * 4


def test_it_does_not_compress():
    data = stamp(0, 1024, 1, 1)
    assert len(zlib.compress(data)) > 0.9 * len(data)


@given(at=st.integers(0, 4 * SECTOR - 1), flip=st.integers(1, 255))
def test_any_flipped_byte_is_found_in_its_sector(at, flip):
    data = bytearray(stamp(8190, 4, 5, 7))
    data[at] ^= flip
    told = explain(bytes(data), 8190, 5, 7)
    assert told is not None
    assert told.startswith(f"sector {8190 + at // SECTOR} ")


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (stamp(8192, 1, 3, 7), "sector 8192 holds sequence 3, expected 5"),
        (stamp(17, 1, 5, 7), "sector 8192 holds sector 17, sequence 5"),
        (stamp(8192, 1, 5, 6), "sector 8192 belongs to seed 6, expected seed 7"),
        (bytes(SECTOR), "sector 8192 is all zeros, expected sequence 5"),
        (b"\xeb" * SECTOR, "carries no stamp (it begins eb eb eb eb eb eb eb eb)"),
        (stamp(8192, 1, 5, 7)[:-1] + b"\x00", "sector 8192 differs at byte 511: 0x00, expected 0x"),
        (stamp(8192, 1, 5, 7)[:9] + stamp(8192, 1, 5, 7)[8:-1], "has a damaged stamp"),
    ],
)
def test_it_says_what_is_there_instead(found, told):
    data = stamp(8190, 2, 5, 7) + found + stamp(8193, 3, 5, 7)
    assert told in explain(data, 8190, 5, 7)


def test_sequences_may_differ_from_sector_to_sector():
    sequences = np.array([1, 1, 4, 2], dtype=np.uint64)
    data = stamp(50, 4, sequences, 7)
    assert explain(data, 50, sequences, 7) is None
    assert explain(data, 50, 1, 7) == "sector 52 holds sequence 4, expected 1"


def test_a_torn_sector_is_named():
    assert explain(stamp(0, 2, 1, 1)[:-1], 0, 1, 1) == "1023 bytes are not whole sectors"
