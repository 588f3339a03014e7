"""Another file system id for a copy of a btrfs, so that the kernel never takes it for the original.

The kernel knows a btrfs by its id alone: a copy with the same one is taken for a device of the original, and once the
copy was written to, the original is refused. Since kernel 5.0 the id in the superblock may differ from that in the
tree blocks, which then stands in ``metadata_uuid``: so only superblocks need to be changed.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

from blockbak.model.filesystem import Read
from blockbak.units import GIB, KIB, MIB

SUPER_BYTES = 4 * KIB
_COPIES = (64 * KIB, 64 * MIB, 256 * GIB)
"""kernel, fs/btrfs/disk-io.h, btrfs_sb_offset."""
_MAGIC = b"_BHRfS_M"
_CSUM_BYTES = 32
_METADATA_UUID = 0x400
"""uapi/linux/btrfs.h, BTRFS_FEATURE_INCOMPAT_METADATA_UUID."""
# uapi/linux/btrfs_tree.h, btrfs_super_block.
_FSID, _BYTENR, _MAGIC_AT, _DEVICES, _INCOMPAT, _CSUM_TYPE, _METADATA_ID = 32, 48, 64, 136, 188, 196, 571


def devices(read: Read) -> int:
    """How many devices a btrfs has; 0 where that cannot be read."""
    block = read(_COPIES[0], SUPER_BYTES)
    return int(struct.unpack_from("<Q", block, _DEVICES)[0]) if len(block) == SUPER_BYTES else 0


def renamed(read: Read, length: int, fsid: bytes) -> Iterator[tuple[int, bytes]]:
    """The superblocks of a btrfs of ``length`` bytes with ``fsid`` (16 bytes) for its id, and where each lies.

    Raises ValueError where a superblock is not whole, or has a checksum that cannot be computed here.
    """
    for place in _COPIES:
        if place + SUPER_BYTES > length:
            return
        block = read(place, SUPER_BYTES)
        if block[_MAGIC_AT : _MAGIC_AT + 8] == _MAGIC and struct.unpack_from("<Q", block, _BYTENR)[0] == place:
            yield place, _renamed(block, fsid)
        elif place == _COPIES[0]:
            raise ValueError("its first superblock is not whole")


def _renamed(block: bytes, fsid: bytes) -> bytes:
    new = bytearray(block)
    kind, incompatible = struct.unpack_from("<H", block, _CSUM_TYPE)[0], struct.unpack_from("<Q", block, _INCOMPAT)[0]
    digest = checksum(kind, block[_CSUM_BYTES:])
    if block[: len(digest)] != digest:
        raise ValueError("a superblock does not have its checksum")
    if not incompatible & _METADATA_UUID:
        new[_METADATA_ID : _METADATA_ID + 16] = block[_FSID : _FSID + 16]
        struct.pack_into("<Q", new, _INCOMPAT, incompatible | _METADATA_UUID)
    new[_FSID : _FSID + 16] = fsid
    new[:_CSUM_BYTES] = checksum(kind, bytes(new[_CSUM_BYTES:])).ljust(_CSUM_BYTES, b"\0")
    return bytes(new)


def checksum(kind: int, data: bytes) -> bytes:
    """kernel, uapi/linux/btrfs_tree.h, btrfs_csum_type. Raises ValueError for one that is not known."""
    if kind == 0:
        return struct.pack("<I", crc32c(data))
    if kind == 1:
        import xxhash

        return struct.pack("<Q", xxhash.xxh64_intdigest(data))
    if kind == 2:
        return hashlib.sha256(data).digest()
    if kind == 3:
        return hashlib.blake2b(data, digest_size=32).digest()
    raise ValueError(f"its checksums are of the unknown type {kind}")


def _table() -> tuple[int, ...]:
    found = []
    for number in range(256):
        for _ in range(8):
            number = number >> 1 ^ (0x82F63B78 if number & 1 else 0)  # noqa: PLW2901 - eight steps of one register
        found.append(number)
    return tuple(found)


_TABLE = _table()


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720, B.4)."""
    register = 0xFFFFFFFF
    for byte in data:
        register = register >> 8 ^ _TABLE[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF
