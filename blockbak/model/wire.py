"""What the two ends of a mirror say to each other: preamble, messages, and what each may be.

``docs/mirror.md`` describes it byte for byte. Nothing here reads or writes: a message is checked by its header alone
before a byte of it is taken, so that nobody makes room for a length that somebody else made up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from blockbak.errors import PeerNotUnderstood, PeerVersion
from blockbak.model.hashmap import BLOCKS_PER_SECTION, DIGEST_WORDS, Mask, Rows
from blockbak.units import KIB, MIB

PREAMBLE_MAGIC = b"BLKMIRR1"
PROTOCOL_VERSION = 1

ROLE_SENDER = 1
ROLE_RECEIVER = 2

PREAMBLE = np.dtype([("magic", "S8"), ("version", "<u4"), ("role", "<u4")])
"""The first bytes from either end. They stay what they are in every version, so that a newer one can be named."""
HEADER = np.dtype(
    [
        ("kind", "<u4"), ("blocks", "<u4"), ("head_bytes", "<u4"), ("data_bytes", "<u4"), ("start", "<u8"),
        ("seal", "V8"), ("checksum", "V16"),
    ]
)  # fmt: skip
RECORDS = {"PREAMBLE": PREAMBLE, "HEADER": HEADER}

OPEN = 1
READY = 2
ROWS = 3
SAME = 4
BLOCKS = 5
END = 6
DONE = 7
FAILED = 8
KINDS = {
    "OPEN": OPEN, "READY": READY, "ROWS": ROWS, "SAME": SAME, "BLOCKS": BLOCKS, "END": END, "DONE": DONE,
    "FAILED": FAILED,
}  # fmt: skip

HEAD_MAX = 64 * KIB
"""Bytes of a head: a JSON document, or rows and bit rows."""
DATA_MAX = 2 * MIB
BLOCKS_MAX = BLOCKS_PER_SECTION
"""Blocks that one message speaks of: those of a section, where none of them holds anything."""
AHEAD_MAX = 256
"""Messages of rows that are not answered yet. More than two sections of pieces, or the ends could wait for each
other.
"""
ROW_BYTES = 16
"""Of each digest so much is sent: it decides only what need not move, and the root is over the whole digests."""
SEAL_BYTES = 8
CHECKSUM_BYTES = 16
_SAID_BYTES = HEADER.itemsize - SEAL_BYTES - CHECKSUM_BYTES
_JSON = (OPEN, READY, END, DONE, FAILED)


@dataclass(frozen=True, slots=True)
class Message:
    """A message without its data. ``start`` is a byte of the volume."""

    kind: int
    start: int = 0
    blocks: int = 0
    head: bytes = b""


# --- preamble ----------------------------------------------------------------------------------------------


def preamble(role: int) -> bytes:
    """The first bytes of an end."""
    return np.array((PREAMBLE_MAGIC, PROTOCOL_VERSION, role), PREAMBLE).tobytes()


def check_preamble(data: bytes, role: int) -> None:
    """Raises PeerNotUnderstood unless ``data`` is the preamble of an end in ``role``, PeerVersion where it is one of
    another version.
    """
    if len(data) < PREAMBLE.itemsize or data[: len(PREAMBLE_MAGIC)] != PREAMBLE_MAGIC:
        raise PeerNotUnderstood(reason=f"it begins with {data[:64]!a}")
    record = np.frombuffer(data, PREAMBLE, 1)[0]
    if record["version"] != PROTOCOL_VERSION:
        raise PeerVersion(theirs=int(record["version"]), ours=PROTOCOL_VERSION)
    if record["role"] != role:
        raise PeerNotUnderstood(reason="both ends send" if role == ROLE_RECEIVER else "both ends receive")


# --- messages ------------------------------------------------------------------------------------------------


def header(number: int, message: Message, data: Sequence[memoryview] = ()) -> bytes:
    """The header of the ``number``-th message of its end, from 0, with ``data`` to follow its head."""
    length = sum(map(len, data))
    record = message.kind, message.blocks, len(message.head), length, message.start, b"", b""
    said = np.array(record, HEADER).tobytes()[:_SAID_BYTES]
    return said + _seal(number, said) + checksum(number, message.head, data)


def _seal(number: int, said: bytes) -> bytes:
    """By itself, so that nobody waits for bytes that an altered length promises. A message's number is not sent: one
    that is lost, twice there or out of turn is noticed too.
    """
    return blake3(number.to_bytes(8, "little") + said).digest(SEAL_BYTES)


def checksum(number: int, head: bytes, data: Sequence[memoryview]) -> bytes:
    """Of what follows a header."""
    hasher = blake3(number.to_bytes(8, "little") + head)
    for part in data:
        hasher.update(part)
    return hasher.digest(CHECKSUM_BYTES)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that promises no more than it may."""

    kind: int
    blocks: int
    head_bytes: int
    data_bytes: int
    start: int
    checksum: bytes


def parse_header(number: int, data: bytes, allowed: Sequence[int]) -> Header:
    """The header of the ``number``-th message. Raises PeerNotUnderstood for one that was altered, that is not of the
    ``allowed`` kinds, or longer than one may be.
    """
    if _seal(number, data[:_SAID_BYTES]) != data[_SAID_BYTES : _SAID_BYTES + SEAL_BYTES]:
        raise PeerNotUnderstood(reason=f"what should be the header of message {number} is none")
    kind, blocks, head, length, start, _, _ = np.frombuffer(data, HEADER, 1)[0].tolist()
    if kind not in allowed:
        raise PeerNotUnderstood(reason=f"a message of kind {kind} comes out of turn")
    if head > HEAD_MAX or length > (DATA_MAX if kind == BLOCKS else 0):
        raise PeerNotUnderstood(reason=f"a message of {head} and {length} bytes is too long")
    if kind in _JSON and (blocks or start):
        raise PeerNotUnderstood(reason="a document that speaks of blocks")
    if kind not in _JSON and not 0 < blocks <= BLOCKS_MAX:
        raise PeerNotUnderstood(reason=f"a message about {blocks} blocks")
    return Header(kind, blocks, head, length, start, data[-CHECKSUM_BYTES:])


# --- documents -----------------------------------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True):
    """What is to be mirrored. Sizes are bytes; ``table_sector`` is the sector size that a partition table in it is
    made for (0: there is none), ``members`` what lays claim to it or a partition of it, with its UUID.
    """

    program: str
    host: str
    source: str
    device_bytes: int
    block_bytes: int
    logical_sector: int
    physical_sector: int
    table_sector: int
    members: list[str]
    verify: bool
    dry_run: bool


class Ready(msgspec.Struct, frozen=True):
    """What it is mirrored to, and how (``create``, ``continue``, ``differ``)."""

    program: str
    host: str
    target: str
    target_bytes: int
    method: str
    notes: list[str]


class End(msgspec.Struct, frozen=True):
    """All was sent: the source's root, empty for a dry run."""

    root: str


class Done(msgspec.Struct, frozen=True):
    """What became of the target, in bytes, and its root."""

    read_bytes: int
    written_bytes: int
    zeroed_bytes: int
    verified_bytes: int
    root: str


class Failure(msgspec.Struct, frozen=True):
    """Why this end gives up: an error's name, sentence, exit status and advice."""

    name: str
    message: str
    exit: int
    advice: str


DOCUMENTS = {OPEN: Open, READY: Ready, END: End, DONE: Done, FAILED: Failure}

D = TypeVar("D", Open, Ready, End, Done, Failure)


def document(kind: int, said: Open | Ready | End | Done | Failure) -> Message:
    """The message that carries a document."""
    return Message(kind, head=msgspec.json.encode(said)[:HEAD_MAX])


def parse_document(message: Message, wanted: type[D]) -> D:
    """The document of a message. Raises PeerNotUnderstood."""
    try:
        return msgspec.json.decode(message.head, type=wanted)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PeerNotUnderstood(reason=f"a document that cannot be read: {error}") from error


# --- rows and bit rows ---------------------------------------------------------------------------------------


def _bits_bytes(blocks: int) -> int:
    return -(-blocks // 8)


def pack_bits(mask: Mask) -> bytes:
    """A bit a block, the first one lowest in the first byte."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_bits(data: bytes, blocks: int) -> Mask:
    """The same back; ``data`` has the right length. Raises PeerNotUnderstood where bits beyond the last are set."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    if bits[blocks:].any():
        raise PeerNotUnderstood(reason="bits are set that stand for nothing")
    return bits[:blocks].astype(bool)


def pack_rows(rows: Rows, nonzero: Mask) -> bytes:
    """The head of ROWS: which blocks hold anything, and the beginnings of their digests; nothing where none does."""
    if not nonzero.any():
        return b""
    return pack_bits(nonzero) + np.ascontiguousarray(rows[nonzero, : ROW_BYTES // 8]).tobytes()


def unpack_rows(head: bytes, blocks: int) -> tuple[npt.NDArray[np.uint64], Mask]:
    """Beginnings of digests (n, 2), zeros for a block of zeros, and which blocks hold anything. Raises
    PeerNotUnderstood.
    """
    rows = np.zeros((blocks, ROW_BYTES // 8), "<u8")
    if not head:
        return rows, np.zeros(blocks, bool)
    count = _bits_bytes(blocks)
    if len(head) < count:
        raise PeerNotUnderstood(reason="rows that end too soon")
    nonzero = unpack_bits(head[:count], blocks)
    if len(head) != count + int(np.count_nonzero(nonzero)) * ROW_BYTES:
        raise PeerNotUnderstood(reason="not as many rows as blocks")
    rows[nonzero] = np.frombuffer(head[count:], "<u8").reshape(-1, ROW_BYTES // 8)
    return rows, nonzero


def differing(rows: Rows, nonzero: Mask, theirs: npt.NDArray[np.uint64], their_nonzero: Mask) -> Mask:
    """Which blocks are not equal, by ``rows`` of whole digests and ``theirs`` of their beginnings."""
    assert rows.shape[1] == DIGEST_WORDS  # noqa: S101 - a map's own rows, not what came from outside
    unequal = (rows[:, : ROW_BYTES // 8] != theirs).any(axis=1)
    return np.where(nonzero & their_nonzero, unequal, nonzero != their_nonzero)


@dataclass(frozen=True, slots=True)
class Changes:
    """What of a piece is another now: blocks with ``data``, that are ``zero``, and that are ``left`` as they are
    because the source could not be read there.
    """

    data: Mask
    zero: Mask
    left: Mask

    def pack(self) -> bytes:
        """The head of BLOCKS."""
        return pack_bits(self.data) + pack_bits(self.zero) + pack_bits(self.left)


def unpack_changes(head: bytes, blocks: int) -> Changes:
    """Raises PeerNotUnderstood."""
    count = _bits_bytes(blocks)
    if len(head) != 3 * count:
        raise PeerNotUnderstood(reason="changes that are not told of each block")
    data, zero, left = (unpack_bits(head[at : at + count], blocks) for at in (0, count, 2 * count))
    if (data & zero).any() or (left & (data | zero)).any():
        raise PeerNotUnderstood(reason="a block that is two things at once")
    return Changes(data, zero, left)
