"""What killed runs left on the machine itself: volumes held back, applications at rest, snapshots."""

from __future__ import annotations

import os
from collections.abc import Sequence

from blockbak.flow.context import Context
from blockbak.host import guardian, snapshots
from blockbak.host.mapper import CONTROL
from blockbak.host.runner import which
from blockbak.host.system import System
from blockbak.model import snapshot as plan


def settle(context: Context, *, restores: bool = False) -> list[str]:
    """Let go of all that no living run holds, and remove its snapshots, and with ``restores`` also the volumes of
    unfinished restores; sentences about it.

    Only root can, and only root leaves such things. What is not ours is never touched. Raises NoGuardian,
    MapperFailed, CommandFailed.
    """
    if os.geteuid() != 0:
        return []
    boot = System().boot
    said = [line for journal in guardian.leftovers(context.run_dir, boot) for line in guardian.settle(journal)]
    if os.path.exists(CONTROL) and which("lvs") is not None:
        said += snapshots.sweep(context.run_dir, context.host, boot, restores=restores)
    return said


def settle_known(context: Context, sources: Sequence[str] = ()) -> list[str]:
    """The same, for a run that need not have to do with LVM: it is asked only where something was noted since the
    machine started, where a snapshot of ours is active, or where one of the ``sources`` is a logical volume (a thin
    snapshot of it may lie there inactive). So it costs nothing elsewhere. Raises as ``settle``.
    """
    system = System()
    noted = os.path.isdir(context.run_dir) and bool(os.listdir(context.run_dir))
    active = any(plan.is_our_mapping(name) for name in system.mapped)
    return settle(context) if noted or active or any(_is_volume(one, system) for one in sources) else []


def _is_volume(path: str, system: System) -> bool:
    group, _, name = path.partition("/")
    return system.attribute(system.name_at(path) or system.volume(group, name), "dm/uuid").startswith("LVM-")
