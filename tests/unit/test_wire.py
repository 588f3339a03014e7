"""What two ends of a mirror say: documented byte for byte, back as it went, and nothing else taken for it."""

import contextlib
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import PeerNotUnderstood, PeerVersion
from blockbak.model import hashmap, wire
from blockbak.model.wire import BLOCKS, KINDS, ROWS, Changes, Message

TEXT = (Path(__file__).parents[2] / "docs" / "mirror.md").read_text()
KINDS_OF_BYTES = {"u": "integer", "S": "text", "V": "bytes"}
PIECE = wire.DATA_MAX
DOCUMENT_KINDS = [name for name in KINDS if KINDS[name] in wire.DOCUMENTS]


def table(heading):
    found = re.search(rf"^{re.escape(heading)}\n.*?((?:^\|[^\n]*\n)+)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, heading
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in found[1].strip().split("\n")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


# --- the document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", wire.RECORDS)
def test_a_record_is_described_field_by_field(name):
    dtype = wire.RECORDS[name]
    told = [(row["field"], int(row["offset"]), int(row["bytes"]), row["type"]) for row in table(f"### `{name}`")]
    actual = [
        (field, offset, kind.itemsize, KINDS_OF_BYTES[kind.kind])
        for field, (kind, offset) in ((field, dtype.fields[field][:2]) for field in dtype.names)
    ]
    assert told == actual
    assert sum(size for _, _, size, _ in told) == dtype.itemsize, "packed"
    assert all(dtype[field].str[0] in "<|" for field in dtype.names), "little-endian"


def test_kinds_and_limits_have_the_values_that_are_told():
    assert {row["name"]: int(row["value"]) for row in table("### Kinds")} == KINDS
    told = {row["name"]: int(row["value"], 0) for row in table("### Limits")}
    assert told == {name: getattr(wire, name) for name in told}
    ending = ("_MAX", "_BYTES", "_VERSION")
    names = {name for name in vars(wire) if name.isupper() and name.endswith(ending) and name[0] != "_"}
    assert names <= set(told)
    assert table("### `PREAMBLE`")[0]["meaning"].encode() == wire.PREAMBLE_MAGIC


@pytest.mark.parametrize("name", DOCUMENT_KINDS)
def test_documents_have_the_members_that_are_told(name):
    (row,) = [row for row in table("### Documents") if row["kind"] == name]
    assert re.findall(r"\w+", row["members"]) == [
        one.name for one in msgspec.structs.fields(wire.DOCUMENTS[KINDS[name]])
    ]


# --- preambles ------------------------------------------------------------------------------------------------


def test_two_ends_know_each_other():
    wire.check_preamble(wire.preamble(wire.ROLE_SENDER), wire.ROLE_SENDER)
    with pytest.raises(PeerNotUnderstood, match="both ends send"):
        wire.check_preamble(wire.preamble(wire.ROLE_SENDER), wire.ROLE_RECEIVER)
    with pytest.raises(PeerNotUnderstood, match="both ends receive"):
        wire.check_preamble(wire.preamble(wire.ROLE_RECEIVER), wire.ROLE_SENDER)


def test_another_version_is_named_with_both():
    other = np.array((wire.PREAMBLE_MAGIC, 7, wire.ROLE_SENDER), wire.PREAMBLE).tobytes()
    with pytest.raises(PeerVersion) as failed:
        wire.check_preamble(other, wire.ROLE_SENDER)
    assert failed.value.fields == {"theirs": 7, "ours": wire.PROTOCOL_VERSION}


@given(st.binary(max_size=40))
def test_a_greeting_shell_is_no_end(data):
    with pytest.raises(PeerNotUnderstood, match="begins with"):
        wire.check_preamble(b"Welcome to " + data, wire.ROLE_SENDER)


# --- messages ---------------------------------------------------------------------------------------------------

masks = st.lists(st.booleans(), min_size=1, max_size=70).map(lambda bits: np.array(bits, bool))


@given(masks, st.integers(0, 2**40), st.integers(0, 1000))
def test_a_message_comes_back_as_it_went(mask, start, number):
    data = [memoryview(b"ab" * 100), memoryview(b"c")]
    message = Message(BLOCKS, start, len(mask), wire.pack_bits(mask))
    raw = wire.header(number, message, data)
    assert len(raw) == wire.HEADER.itemsize
    said = wire.parse_header(number, raw, (BLOCKS,))
    assert (said.kind, said.blocks, said.start) == (BLOCKS, len(mask), start)
    assert (said.head_bytes, said.data_bytes) == (len(message.head), 201)
    assert said.checksum == wire.checksum(number, message.head, data)
    assert said.checksum != wire.checksum(number + 1, message.head, data)
    assert said.checksum != wire.checksum(number, message.head, data[:1])
    with pytest.raises(PeerNotUnderstood, match="is none"):
        wire.parse_header(number + 1, raw, (BLOCKS,))


@given(st.integers(0, wire.HEADER.itemsize * 8 - 1))
def test_a_header_with_a_flipped_bit_promises_nothing(bit):
    raw = bytearray(wire.header(3, Message(ROWS, PIECE, 32, b"\0" * 4)))
    raw[bit // 8] ^= 1 << bit % 8
    try:
        said = wire.parse_header(3, bytes(raw), tuple(KINDS.values()))
    except PeerNotUnderstood:
        return
    assert (said.kind, said.blocks, said.head_bytes, said.data_bytes, said.start) == (ROWS, 32, 4, 0, PIECE)
    assert said.checksum != wire.checksum(3, b"\0" * 4, ())


@pytest.mark.parametrize(
    ("kind", "blocks", "head", "data", "start"),
    [
        (9, 1, 0, 0, 0), (0, 1, 0, 0, 0), (ROWS, 0, 0, 0, 0), (ROWS, wire.BLOCKS_MAX + 1, 0, 0, 0),
        (ROWS, 1, wire.HEAD_MAX + 1, 0, 0), (ROWS, 1, 0, 1, 0), (BLOCKS, 1, 3, wire.DATA_MAX + 1, 0),
        (BLOCKS, 1, 2**32 - 1, 2**32 - 1, 0), (wire.END, 1, 10, 0, 0), (wire.END, 0, 10, 0, 1), (wire.END, 0, 10, 9, 0),
    ],
)  # fmt: skip
def test_a_header_that_promises_too_much_is_refused_by_itself(kind, blocks, head, data, start):
    raw = np.array((kind, blocks, head, data, start, b"", b""), wire.HEADER).tobytes()
    said = raw[: -wire.SEAL_BYTES - wire.CHECKSUM_BYTES]
    raw = said + wire._seal(0, said) + bytes(wire.CHECKSUM_BYTES)
    with pytest.raises(PeerNotUnderstood, match=r"out of turn|too long|speaks of blocks|a message about"):
        wire.parse_header(0, raw, tuple(KINDS.values()))


def test_a_message_out_of_turn_is_refused():
    raw = wire.header(0, Message(ROWS, 0, 1))
    with pytest.raises(PeerNotUnderstood, match="out of turn"):
        wire.parse_header(0, raw, (BLOCKS,))


@given(masks, st.integers(0, 2**32))
def test_rows_come_back_as_far_as_they_are_sent(nonzero, seed):
    rows = np.random.default_rng(seed).integers(1, 2**63, (len(nonzero), 4)).astype("<u8")
    rows[~nonzero] = hashmap.zero_row(65536)
    theirs, their_nonzero = wire.unpack_rows(wire.pack_rows(rows, nonzero), len(nonzero))
    assert (their_nonzero == nonzero).all()
    assert not wire.differing(rows, nonzero, theirs, their_nonzero).any()
    other = rows.copy()
    other[0, 1] ^= np.uint64(1)
    expected = np.zeros(len(nonzero), bool)
    expected[0] = nonzero[0]
    assert (wire.differing(other, nonzero, theirs, their_nonzero) == expected).all()
    flipped = ~nonzero
    assert wire.differing(rows, flipped, theirs, their_nonzero).all(), "zeros and not zeros are never equal"


@given(masks, masks)
def test_changes_come_back(one, two):
    size = min(len(one), len(two))
    data, zero = one[:size], two[:size] & ~one[:size]
    left = ~(data | zero)
    back = wire.unpack_changes(Changes(data, zero, left).pack(), size)
    assert (back.data == data).all()
    assert (back.zero == zero).all()
    assert (back.left == left).all()


def test_a_block_is_one_thing():
    both = np.array([True, False])
    none = np.zeros(2, bool)
    for changes in (Changes(both, both, none), Changes(both, none, both), Changes(none, both, both)):
        with pytest.raises(PeerNotUnderstood, match="two things"):
            wire.unpack_changes(changes.pack(), 2)


@given(st.binary(max_size=300), st.integers(1, wire.BLOCKS_MAX))
def test_any_bytes_are_understood_or_refused(data, blocks):
    for read in (wire.unpack_rows, wire.unpack_changes):
        with contextlib.suppress(PeerNotUnderstood):
            read(data, blocks)
    for kind in wire.DOCUMENTS.values():
        with contextlib.suppress(PeerNotUnderstood):
            wire.parse_document(Message(wire.OPEN, head=data), kind)
    with contextlib.suppress(PeerNotUnderstood):
        wire.parse_header(0, data[: wire.HEADER.itemsize].ljust(wire.HEADER.itemsize, b"\0"), tuple(KINDS.values()))


@given(st.integers(1, 70000), st.sampled_from([4096, 8192, 65536]), st.integers(0, 2**32))
def test_unequal_blocks_are_found_by_any_byte(size, block, seed):
    dice = np.random.default_rng(seed)
    one = dice.integers(0, 256, size, dtype=np.uint8)
    other = one.copy()
    assert not hashmap.unequal_blocks(one, other, block).any()
    at = int(dice.integers(0, size))
    other[at] ^= 1 << int(dice.integers(0, 8))
    expected = np.zeros(-(-size // block), bool)
    expected[at // block] = True
    assert (hashmap.unequal_blocks(one, other, block) == expected).all()
