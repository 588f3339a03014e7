"""The sidecar of a raw image: all that is known of ``FILE`` beside its bytes, in ``FILE.json``.

A raw image is the device's bytes and nothing else; what tells whether it is whole lies beside it. Its digests
are those of a hash map, so that the image can become a point without another look at the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
import numpy.typing as npt

from blockbak.errors import DamagedSidecar, NewerFormat
from blockbak.image.format import BLOCK_MAX, BLOCK_MIN, DEVICE_MAX, window_for
from blockbak.model import extent, hashmap, selfdigest
from blockbak.model.extent import BAD, Extents
from blockbak.model.facts import FULL, Opening
from blockbak.model.filesystem import Filesystem
from blockbak.model.hashmap import Geometry
from blockbak.model.identity import Identity
from blockbak.model.partition import PartitionTable
from blockbak.units import SECTOR

VERSION = 1
ENDING = ".json"
"""What the sidecar's name has after its image's."""


class _Version(msgspec.Struct):
    blockbak_sidecar: int


class Range(msgspec.Struct, frozen=True):
    """A range of the volume, in bytes."""

    start: int
    length: int


class Sidecar(msgspec.Struct, frozen=True):
    """The members of a sidecar file, in their order. Sizes are bytes, times ISO 8601 in UTC.

    ``identity`` to ``physical_sector`` tell of the device, ``sections`` are the digests of the map's sections
    (hex), ``bad`` what could not be read. ``filesystems`` maps partition numbers (``0``: the device itself) to
    what lies there; ``stopped`` names what was stopped for the image, in order.
    """

    blockbak_sidecar: int
    program: str
    host: str
    source: str
    identity: Identity
    device_bytes: int
    logical_sector: int
    physical_sector: int
    created: str
    seconds: float
    mode: str
    consistency: str
    read_bytes: int
    stopped: list[str]
    notes: list[str]
    partition_table: PartitionTable | None
    filesystems: dict[str, Filesystem]
    lvm_metadata: str
    hooks: dict[str, str]
    block_bytes: int
    bad: list[Range]
    root: str
    sections: list[str]
    sha256: str = selfdigest.BLANK

    @property
    def geometry(self) -> Geometry:
        """How the device divides into blocks and sections."""
        return Geometry(self.device_bytes, self.block_bytes, window_for(self.device_bytes, self.block_bytes))

    @property
    def unread(self) -> Extents:
        """What could not be read, as a table of extents."""
        return extent.table([one.start for one in self.bad], [one.start + one.length for one in self.bad], BAD)

    @property
    def opening(self) -> Opening:
        """What the header of a full of the same bytes would say, but for its place in a repository."""
        geometry = self.geometry
        return Opening(
            repository="", image="", volume="", point="", sequence=0, kind=FULL, synthetic=False, parent=None,
            parent_root=None, identity=self.identity, device_bytes=self.device_bytes, block_bytes=self.block_bytes,
            window_bytes=geometry.window_bytes, logical_sector=self.logical_sector,
            physical_sector=self.physical_sector, created=self.created, source=self.source, host=self.host,
        )  # fmt: skip


def ranges(bad: Extents) -> list[Range]:
    """Extents as a sidecar keeps them."""
    return [Range(int(row["start"]), int(row["length"])) for row in bad]


def encode(sidecar: Sidecar) -> bytes:
    """The sidecar file."""
    members = {name: getattr(sidecar, name) for name in Sidecar.__struct_fields__}
    return selfdigest.encoded({**members, "sha256": selfdigest.BLANK})


def decode(data: bytes, file: str) -> Sidecar:
    """What a sidecar file says. The digest is checked first: a flipped version byte is damage, not a newer program.

    Raises DamagedSidecar or NewerFormat.
    """
    if reason := selfdigest.flaw(data):
        raise DamagedSidecar(file=file, reason=reason)
    try:
        version = msgspec.json.decode(data, type=_Version).blockbak_sidecar
        if version != VERSION:
            raise NewerFormat(what=f"The sidecar {file}", detail=f"version {version}")
        sidecar = msgspec.json.decode(data, type=Sidecar)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedSidecar(file=file, reason=str(error)) from error
    if reason := _contradiction(sidecar):
        raise DamagedSidecar(file=file, reason=reason)
    return sidecar


def _contradiction(said: Sidecar) -> str:
    """What cannot be true of any raw image, whoever computed the digest anew."""
    block = said.block_bytes
    if not 0 < said.device_bytes <= DEVICE_MAX or not BLOCK_MIN <= block <= BLOCK_MAX or block & (block - 1):
        return "its sizes are impossible"
    sector = said.logical_sector
    if not SECTOR <= sector <= BLOCK_MAX or sector & (sector - 1) or said.physical_sector < SECTOR:
        return "its sectors are impossible"
    if not _is_moment(said.created):
        return "its moment is none"
    if len(said.sections) != said.geometry.sections:
        return "it does not have a digest for each section"
    limit = said.device_bytes
    if any(one.start < 0 or one.length <= 0 or one.start + one.length > limit for one in said.bad):
        return "an unreadable range lies outside of the device"
    if len(said.bad) and extent.flaw(said.unread, 0, limit, tiling=False):
        return "its unreadable ranges contradict each other"
    try:
        digests = packed(said.sections)
    except ValueError:
        return "a digest of it is none"
    if hashmap.root(said.device_bytes, block, digests) != said.root:
        return "its root is not that of its section digests"
    return ""


def _is_moment(text: str) -> bool:
    """Whether it names a moment, without a guess at the zone, that UTC has a year for."""
    try:
        moment = datetime.fromisoformat(text)
        moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return False
    return moment.tzinfo is not None


def packed(sections: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Hex section digests as ``(n, 32)`` uint8. Raises ValueError."""
    return np.frombuffer(bytes.fromhex("".join(sections)), np.uint8).reshape(len(sections), hashmap.DIGEST_BYTES)
