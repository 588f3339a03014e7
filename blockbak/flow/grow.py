"""Moves a GPT's backup to the end of a disk that is larger than the volume restored to it."""

from __future__ import annotations

import numpy as np

from blockbak.errors import BlockbakError, CannotGrow, Damage, VerificationFailed
from blockbak.flow.points import partition_table, reader
from blockbak.host.blockio import TargetWriter, aligned
from blockbak.image.view import PointView
from blockbak.model import gpt
from blockbak.model.gpt import Growth

_HYBRID = "The MBR is a hybrid one and is left as it is."


def plan_growth(view: PointView, target_bytes: int, path: str) -> tuple[Growth | None, list[str]]:
    """What is to be written once the volume's bytes are on the target, None where there is nothing to move; and what
    to say of it. Raises CannotGrow where it would not be safe.
    """
    met: list[Damage] = []
    table = partition_table(view, met)
    why = ""
    if table is None:
        why = "the volume has no partition table"
    elif table.scheme == "mbr":
        why = "an MBR has no backup, and does not say where the disk ends"
    elif target_bytes // table.sector_bytes <= view.geometry.device_bytes // table.sector_bytes:
        why = "the target is not larger than the volume"
    if met:
        raise CannotGrow(path=path, reason=f"its table is damaged in the repository ({met[0]})")
    if table is None or why:
        return None, [f"--grow has nothing to do: {why}."]
    growth = gpt.grown(reader(view), table.sector_bytes, view.geometry.device_bytes, target_bytes)
    if isinstance(growth, str):
        raise CannotGrow(path=path, reason=growth)
    notes = [f"The GPT's backup is moved to the end of {path}, and the whole of it can be used."]
    return growth, [*notes, _HYBRID] if growth.hybrid else notes


def offer(view: PointView, target_bytes: int) -> list[str]:
    """For a restore without ``--grow``: that there is one, where it would do something."""
    table = partition_table(view)
    if table is None or table.scheme != "gpt":
        return []
    growth = gpt.grown(reader(view), table.sector_bytes, view.geometry.device_bytes, target_bytes)
    if isinstance(growth, str):
        return []
    return ["The GPT's backup will not be at the end of the target, where it belongs: --grow moves it there."]


def grow(growth: Growth, target: TargetWriter) -> None:
    """Write it, and read it back. Raises TargetFailed, VerificationFailed; one copy of the GPT is whole even then."""
    try:
        for offset, data in growth.writes:
            target.write(offset, _memory(data))
            # Each must be on the disk before the next: after the old copy, the new one is what a crash leaves.
            target.flush()
        for offset, data in growth.writes:
            found = aligned(len(data))
            target.read(offset, found, len(data))
            if found[: len(data)].tobytes() != data:
                raise VerificationFailed(path=target.path, blocks=1, first=offset)
    except BlockbakError as error:
        error.add_note(
            f"The volume is on {target.path}; one of the two copies of its GPT is whole ('sgdisk --verify')."
        )
        raise


def _memory(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    made = aligned(len(data))[: len(data)]
    made[:] = np.frombuffer(data, np.uint8)
    return made
