"""What is known of one image: the values that header, closing record and manifest share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from blockbak.model.hashmap import Geometry
from blockbak.model.identity import WWN, Identity

Kind: TypeAlias = Literal["full", "incremental", "differential"]

FULL: Kind = "full"
INCREMENTAL: Kind = "incremental"
DIFFERENTIAL: Kind = "differential"


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known when an image is begun; written in its header.

    ``point`` is the restore point's id, ``parent`` and ``parent_root`` what a delta stands on (None for
    a full). ``created`` is the point's moment, ISO 8601 in UTC. Sizes are bytes.
    """

    repository: str
    image: str
    volume: str
    point: str
    sequence: int
    kind: Kind
    synthetic: bool
    parent: str | None
    parent_root: str | None
    identity: Identity
    device_bytes: int
    block_bytes: int
    window_bytes: int
    logical_sector: int
    physical_sector: int
    created: str
    source: str = ""
    host: str = ""

    def is_of(self, identity: Identity, host: str) -> bool:
        """Whether it is of the volume that has ``identity`` on ``host``.

        On another host the same path is another file, and the same id may be that of a machine made from the
        same template.
        """
        return self.identity.same_as(identity) and (identity.kind == WWN or self.host == host)

    def surely_of(self, identity: Identity, host: str) -> bool:
        """The same, where a mistake would cost data."""
        return self.identity.surely_same_as(identity) and self.is_of(identity, host)

    @property
    def geometry(self) -> Geometry:
        """How the volume divides into blocks, windows and sections."""
        return Geometry(self.device_bytes, self.block_bytes, self.window_bytes)


@dataclass(frozen=True, slots=True)
class Closing:
    """What is known when an image is complete; written in its closing record.

    ``root`` is the hex root of the point's hash map. ``read_bytes`` were read from the source,
    ``changed_bytes`` are claimed by this image, by kind in ``data_bytes`` … ``bad_bytes``. ``frames``
    counts the zstd frames. ``started`` and ``finished`` are ISO 8601 in UTC; ``notes`` are sentences
    for people (why a full was made, what was wrong with the source). Points taken at one instant share
    ``set_id``; ``lvm_metadata`` is the volume group's, as vgcfgbackup writes it; ``hooks`` is what each hook
    said, which a restore may need. All three are empty where there is nothing to say.
    """

    root: str
    mode: str
    consistency: str
    change_source: str
    read_bytes: int
    changed_bytes: int
    data_bytes: int
    zero_bytes: int
    hole_bytes: int
    bad_bytes: int
    frames: int
    started: str
    finished: str
    seconds: float
    program: str
    notes: list[str] = field(default_factory=list)
    set_id: str = ""
    lvm_metadata: str = ""
    hooks: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """As it is stored: what was added to the first release's keys is left out where it is empty."""
        stored = asdict(self)
        return {key: value for key, value in stored.items() if value or key not in _LATER}


_LATER = ("set_id", "lvm_metadata", "hooks")
