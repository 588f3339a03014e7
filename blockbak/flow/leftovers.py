"""What killed runs left on the machine itself: volumes held back, applications at rest, snapshots."""

from __future__ import annotations

import os

from blockbak.flow.context import Context
from blockbak.host import guardian, snapshots
from blockbak.host.mapper import CONTROL
from blockbak.host.runner import which
from blockbak.host.system import System


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


def settle_known(context: Context) -> list[str]:
    """The same, for a run that has no business with LVM itself: asked only where something was noted since the
    machine started, so that it costs nothing elsewhere. Raises as ``settle``.
    """
    try:
        noted = os.listdir(context.run_dir)
    except OSError:
        return []
    return settle(context) if noted else []
