"""Who uses a device, as it was seen at one moment. ``host.occupants`` looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class MountPoint:
    """A mount that is to go. ``device`` is the kernel name of what it lies on, empty where that is none of the
    device's (something mounted on top). ``root`` is what of the file system is seen, ``options`` are the mount's
    and the file system's, ``writable`` says whether the file system itself takes writes. ``identity`` is how the
    source is found again after the machine was started anew. Not ``again``: it could not be mounted once more, or not
    with what is in it. ``layers`` are ids of mounts whose files it shows (overlay).
    """

    id: int
    parent: int
    device: str
    target: str
    root: str
    fstype: str
    source: str
    options: tuple[str, ...]
    writable: bool
    number: str
    identity: str = ""
    propagation: str = ""
    again: bool = True
    layers: tuple[int, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether it lies on the device, and not only on one of its mounts."""
        return bool(self.device)


@dataclass(frozen=True, slots=True)
class SwapArea:
    """Swap on the device, or in a file of one of its mounts. ``used`` is bytes. ``mount`` is that file's, 0 for a
    device. A negative ``priority`` was given by the kernel, and ``below`` are the areas whose own come after it.
    """

    path: str
    priority: int
    used: int
    identity: str = ""
    mount: int = 0
    below: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop device over a file of the mount ``mount``, with all that ``losetup`` needs to make it anew; not ``again``
    where that could not be, for the file has lost its name.
    """

    name: str
    node: str
    file: str
    mount: int
    offset: int = 0
    size_limit: int = 0
    sector: int = 512
    read_only: bool = False
    direct: bool = False
    partitions: bool = False
    again: bool = True


@dataclass(frozen=True, slots=True)
class Export:
    """A directory of a mount that NFS exports to a client."""

    client: str
    path: str
    options: str
    mount: int


@dataclass(frozen=True, slots=True)
class Occupant:
    """A process that keeps mounts or nodes busy. ``started`` (clock ticks since boot) tells it from a later one of
    its number. ``mounts`` are ids of mounts, ``writes`` those it has files open for writing on, ``nodes`` are
    devices it has open, ``raw_writes`` those of them for writing. ``elsewhere`` is where its own mount namespace, and
    not ours, has file systems of the device mounted. ``own`` is blockbak itself. ``reasons`` are for people.
    """

    pid: int
    started: int
    name: str
    unit: str = ""
    mounts: frozenset[int] = frozenset()
    writes: frozenset[int] = frozenset()
    nodes: frozenset[str] = frozenset()
    raw_writes: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    reasons: tuple[str, ...] = ()
    protected: str = ""
    own: bool = False

    def __str__(self) -> str:
        where = f" of {self.unit}" if self.unit else ""
        why = f": {', '.join(self.reasons[:3])}" if self.reasons else ""
        return f"process {self.pid} ({self.name}){where}{why}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit. ``also`` are active units that go with it: what would start it again (sockets, timers,
    paths), and what systemd stops because it needs it. ``protected`` says why it is never stopped.
    """

    name: str
    active: bool
    also: tuple[str, ...] = ()
    protected: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """A device stacked on the one to be read: a partition, LV, LUKS mapping, array, loop device."""

    name: str
    label: str
    kind: str
    group: str = ""
    below: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scene:
    """All that uses a device, as it was seen at one moment. ``mounts`` are in the order of the kernel's list:
    what lies on a mount comes after it. ``kept`` says of mounts (by id) what they hold that must go on.
    ``memory`` is bytes that are available without swap.
    """

    device: str
    name: str
    layers: tuple[Layer, ...] = ()
    mounts: tuple[MountPoint, ...] = ()
    swaps: tuple[SwapArea, ...] = ()
    loops: tuple[Loop, ...] = ()
    exports: tuple[Export, ...] = ()
    occupants: tuple[Occupant, ...] = ()
    units: Mapping[str, Unit] = field(default_factory=dict)
    kept: Mapping[int, str] = field(default_factory=dict)
    system: frozenset[int] = frozenset()
    memory: int = 0

    def mount(self, number: int) -> MountPoint | None:
        """A mount by its id."""
        return next((one for one in self.mounts if one.id == number), None)
