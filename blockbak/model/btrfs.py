"""Where a btrfs on one device keeps the same bytes twice (profile DUP), read from its chunk tree.

Numbers and structures: kernel, uapi/linux/btrfs_tree.h; all are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blockbak.model.filesystem import Read
from blockbak.units import KIB

_SUPER, _SUPER_BYTES = 64 * KIB, 4 * KIB
_KEY = struct.Struct("<QBQ")
_CHUNK = struct.Struct("<QQQQIIIHH")
"""length, owner, stripe length, type, alignment, width, sector size, stripes, sub-stripes."""
_STRIPE = struct.Struct("<QQ16s")
_HEADER_BYTES, _ITEM_BYTES, _POINTER_BYTES = 101, 25, 33
_CHUNK_ITEM = 228
_DUP, _PROFILES = 1 << 5, 0x7F8
"""Of a chunk's type: the bit of DUP, and all that say how its bytes are spread; none of them is SINGLE."""
_NODES_MAX, _LEVELS_MAX = 100_000, 8


class Unclear(ValueError):
    """It cannot be told; the text says why, as a clause."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    logical: int
    length: int
    type: int
    stripes: tuple[tuple[int, int], ...]


def copies(read: Read) -> list[tuple[int, int, int]]:
    """First byte, second byte and length of what is kept twice. Raises Unclear: for a btrfs on several devices,
    with a log that is to be replayed, or whose chunk tree cannot be followed.
    """
    block = read(_SUPER, _SUPER_BYTES)
    if len(block) < _SUPER_BYTES or block[64:72] != b"_BHRfS_M":
        raise Unclear("its superblock is not readable")
    chunk_root, log_root = struct.unpack_from("<QQ", block, 88)
    devices, node_bytes = struct.unpack_from("<Q4xI", block, 136)
    if devices != 1:
        raise Unclear("it is on several devices")
    if log_root:
        # The log's blocks are in no other tree: to a map they are unused.
        raise Unclear("its log is still to be replayed")
    if not 4 * KIB <= node_bytes <= 64 * KIB or node_bytes & (node_bytes - 1):
        raise Unclear("its superblock makes no sense")
    chunks = list(_system_chunks(block))
    tree = _Tree(read, node_bytes, block[32:48], chunks)
    chunks = list(tree.chunks(chunk_root, block[199]))
    found = []
    for chunk in chunks:
        if chunk.type & _PROFILES == _DUP and len(chunk.stripes) == 2:
            found.append((chunk.stripes[0][1], chunk.stripes[1][1], chunk.length))
        elif chunk.type & _PROFILES or len(chunk.stripes) != 1:
            raise Unclear("it spreads its data over devices")
    if not found and not chunks:
        raise Unclear("it has no chunks")
    return found


def _system_chunks(block: bytes) -> Iterator[_Chunk]:
    """Those the superblock repeats, so that the chunk tree itself can be found."""
    (size,) = struct.unpack_from("<I", block, 160)
    at, end = 811, 811 + size
    if size > 2 * KIB:
        raise Unclear("its superblock makes no sense")
    while at < end:
        _, kind, logical = _KEY.unpack_from(block, at)
        if kind != _CHUNK_ITEM:
            raise Unclear("its superblock makes no sense")
        chunk, used = _chunk(block, at + _KEY.size, logical)
        yield chunk
        at += _KEY.size + used


def _chunk(data: bytes, at: int, logical: int) -> tuple[_Chunk, int]:
    """A chunk, and the bytes it takes."""
    try:
        length, _, _, kind, _, _, _, count, _ = _CHUNK.unpack_from(data, at)
        stripes = tuple(
            _STRIPE.unpack_from(data, at + _CHUNK.size + number * _STRIPE.size)[:2] for number in range(count)
        )
    except struct.error as error:
        raise Unclear("its chunk tree is damaged") from error
    return _Chunk(logical, length, kind, stripes), _CHUNK.size + count * _STRIPE.size


class _Tree:
    """The chunk tree. Checksums are not looked at: each node says whose it is, and where."""

    def __init__(self, read: Read, node_bytes: int, fsid: bytes, chunks: list[_Chunk]) -> None:
        self._read, self._node_bytes, self._fsid, self._chunks = read, node_bytes, fsid, chunks
        self._seen = 0

    def chunks(self, logical: int, level: int) -> Iterator[_Chunk]:
        """All chunks below the node at ``logical``."""
        self._seen += 1
        if level > _LEVELS_MAX or self._seen > _NODES_MAX:
            raise Unclear("its chunk tree is damaged")
        node = self._node(logical)
        count, found = struct.unpack_from("<IB", node, 96)
        room = (self._node_bytes - _HEADER_BYTES) // (_POINTER_BYTES if level else _ITEM_BYTES)
        if found != level or count > room:
            raise Unclear("its chunk tree is damaged")
        for number in range(count):
            if level:
                (below,) = struct.unpack_from("<Q", node, _HEADER_BYTES + number * _POINTER_BYTES + _KEY.size)
                yield from self.chunks(below, level - 1)
                continue
            at = _HEADER_BYTES + number * _ITEM_BYTES
            _, kind, place = _KEY.unpack_from(node, at)
            (start,) = struct.unpack_from("<I", node, at + _KEY.size)
            if kind == _CHUNK_ITEM:
                yield _chunk(node, _HEADER_BYTES + start, place)[0]

    def _node(self, logical: int) -> bytes:
        for chunk in self._chunks:
            if chunk.logical <= logical < chunk.logical + chunk.length:
                for _, physical in chunk.stripes:
                    node = self._read(physical + logical - chunk.logical, self._node_bytes)
                    whole = len(node) == self._node_bytes
                    if whole and node[32:48] == self._fsid and struct.unpack_from("<Q", node, 48)[0] == logical:
                        return node
        raise Unclear("its chunk tree cannot be found")
