"""What killed runs left on the machine itself: volumes held back, applications at rest, what a cold backup stopped,
snapshots.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockbak.errors import BlockbakError
from blockbak.flow.context import Context
from blockbak.host import guardian, journal, occupants, quiesce, snapshots
from blockbak.host.mapper import CONTROL
from blockbak.host.quiesce import Machine
from blockbak.host.runner import which
from blockbak.host.system import System
from blockbak.model import snapshot as plan


@dataclass(frozen=True, slots=True)
class Remains:
    """Sentences on what was settled, and on what could not be, which a person must look at."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def told(self) -> list[str]:
        """All of them."""
        return [*self.done, *self.left]


def machine(context: Context) -> Machine:
    """Where rests are noted, and how their devices are found again."""
    return Machine(context.state_dir, context.run_dir, System().boot, context.host, occupants.find)


def settle(context: Context, *, restores: bool = False) -> Remains:
    """Let go of all that no living run holds, put back what it had stopped, and remove its snapshots, and with
    ``restores`` also the volumes of unfinished restores.

    Only root can, and only root leaves such things. What is not ours is never touched. Raises NoGuardian,
    StateUnusable, MapperFailed, CommandFailed.
    """
    if os.geteuid() != 0:
        return Remains()
    boot = System().boot
    # A mount may need a device that is suspended; so does LVM.
    done = [line for one in guardian.leftovers(context.run_dir, boot) for line in guardian.settle(one)]
    left: list[str] = []
    here = machine(context)
    for one in quiesce.unfinished(here):
        outcome = quiesce.put_back(one, here)
        done += outcome.done
        left += outcome.left
    if os.path.exists(CONTROL) and which("lvs") is not None:
        done += snapshots.sweep(context.run_dir, context.host, boot, restores=restores)
    return Remains(done, left)


def remaining(context: Context) -> list[str]:
    """What ``settle`` would let go of, put back or remove, as clauses; nothing is done. Only root can tell."""
    if os.geteuid() != 0:
        return []
    boot = System().boot
    try:
        left = [f"what a run held back or at rest ({one.path})" for one in guardian.leftovers(context.run_dir, boot)]
        left += [f"what a cold backup stopped ({one.path})" for one in quiesce.unfinished(machine(context))]
        if os.path.exists(CONTROL) and which("lvs") is not None:
            found = snapshots.remaining(context.run_dir, context.host, boot)
            left += [f"volume {label} of a run that is over" for label in found]
    except BlockbakError as error:
        return [str(error)]
    return left


def settle_known(context: Context, sources: Sequence[str] = ()) -> Remains:
    """The same, for a run that need not have to do with any of it: done only where something was noted since the
    machine started, a cold backup was not put back, a snapshot of ours is active, or one of the ``sources`` is a
    logical volume (a thin snapshot of it may lie there inactive). So it costs nothing elsewhere. Raises as ``settle``.
    """
    if os.geteuid() != 0:
        return Remains()
    system = System()
    noted = os.path.isdir(context.run_dir) and bool(os.listdir(context.run_dir))
    active = any(plan.is_our_mapping(name) for name in system.mapped)
    wanted = noted or active or bool(journal.paths(context.state_dir))
    return settle(context) if wanted or any(_is_volume(one, system) for one in sources) else Remains()


def _is_volume(path: str, system: System) -> bool:
    group, _, name = path.partition("/")
    return system.attribute(system.name_at(path) or system.volume(group, name), "dm/uuid").startswith("LVM-")
