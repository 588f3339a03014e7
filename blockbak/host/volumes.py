"""Logical volumes that are restored to: made for it, or watched so that their pool does not fill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from blockbak.errors import BlockbakError, PoolFilling
from blockbak.host.device import Device
from blockbak.host.lvm import by_uuid, command, named, remove
from blockbak.host.mapper import Mapper
from blockbak.host.runs import Run
from blockbak.host.system import System, lvm_names
from blockbak.model import snapshot as plan
from blockbak.units import SECTOR


@contextmanager
def new_volume(run_now: Run, group: str, name: str, size: int, pool: str = "") -> Iterator[str]:
    """Make a logical volume of ``size`` bytes (whole LVM extents); its node, for as long as the ``with`` lasts.

    It carries the tags of the run until the ``with`` ends well, and is removed where it does not. A volume of
    another's that has the name is never touched. Raises CommandFailed.
    """
    label = f"{group}/{name}"
    tags = (*run_now.tags, plan.RESTORE_TAG)
    added = [word for tag in tags for word in ("--addtag", tag)]
    # A thin volume reads as zeros; of a thick one only the old signatures go, which udev would act upon.
    own = ["--virtualsize", f"{size}b", "--thinpool", pool] if pool else ["--wipesignatures", "y", "--zero", "y"]
    if not pool:
        own += ["--size", f"{size}b"]
    try:
        command("lvcreate", "-q", "-q", "-y", "--name", name, *added, *own, group)
        yield f"/dev/mapper/{plan.dm_name(group, name)}"
        _untag(label, tags)
    except BaseException as error:
        try:
            made = named(group, name)
            if made is not None and made.run == run_now.id:
                remove(label)
        except BlockbakError as failed:
            error.add_note(f"{label} could not be removed ({failed}); 'blockbak recover' tries again.")
        raise


def _untag(label: str, tags: Sequence[str]) -> None:
    command("lvchange", "-q", "-q", *(word for tag in tags for word in ("--deltag", tag)), label)


def adopt(uuid: str) -> None:
    """Make an ordinary volume of one that an unfinished restore left: it would be removed at the next sweep.

    Any other stays as it is. Raises MissingProgram, CommandFailed.
    """
    found = by_uuid(uuid)
    if found is not None and plan.RESTORE_TAG in found.tags:
        _untag(found.label, [tag for tag in found.tags if plan.is_of_ours(tag)])


def thin_pool(device: Device, system: System | None = None) -> str:
    """The kernel name of the thin pool that a volume comes out of; empty for any other device."""
    system = system or System()
    below = system.links(device.kname, "slaves") if device.is_lv else []
    return next((name for name in below if system.attribute(name, "dm/uuid").endswith("-tpool")), "")


def thin_pool_label(device: Device, system: System | None = None) -> str:
    """``vg/pool`` of a thin volume; empty for any other device."""
    system = system or System()
    name = system.attribute(thin_pool(device, system), "dm/name") if device.is_lv else ""
    return "/".join(lvm_names(name.removesuffix("-tpool"))) if name else ""


class PoolWatch:
    """A thin pool, looked at while one of its volumes is written. ``beside`` bytes at most are on their way to it
    while somebody looks. Its methods raise MapperFailed.
    """

    def __init__(self, device: Device, beside: int) -> None:
        system = System()
        pool = thin_pool(device, system)
        self._device, self._beside = device, beside
        self._dm_name = system.attribute(pool, "dm/name")
        self._bytes = system.size(pool)
        self.label = thin_pool_label(device, system)

    @property
    def unit(self) -> int:
        """Bytes that the pool gives at a time."""
        use = self._use()
        return self._bytes // use.data_total if use and use.data_total else SECTOR

    def short(self, stored: int) -> tuple[int, int] | None:
        """Free bytes and those needed, if there is surely no room for ``stored`` bytes of content in the volume: it
        takes at least what it does not hold yet.
        """
        with Mapper() as mapper:
            targets = mapper.status(self._device.dm_name)
        held = plan.parse_thin(targets[0].kind, targets[0].parameters) if targets else 0
        use, needed = self._use(), max(0, stored - held) + self._beside
        return plan.surely_short(use, self._bytes, needed) if use else (0, needed)

    def check(self) -> None:
        """Raise PoolFilling before the pool is full, when writes of all its volumes would hang or fail."""
        use = self._use()
        what = plan.pool_gives_out(use, self._bytes, self._beside) if use else "data"
        if what:
            percent = 100.0 if use is None else use.metadata_percent if what == "metadata" else use.data_percent
            raise PoolFilling(pool=self.label, used=round(percent, 1), what=what, volume=self._device.label)

    def _use(self) -> plan.PoolUse | None:
        with Mapper() as mapper:
            targets = mapper.status(self._dm_name)
        return plan.parse_pool(targets[0].kind, targets[0].parameters) if targets else None
