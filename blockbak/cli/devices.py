"""``blockbak devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from blockbak.host.device import Device
    from blockbak.model.identity import Identity


def _as_dict(device: Device, known: Identity, *, alone: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from blockbak.host.device import find_twin
    from blockbak.host.usage import decide_mode, users

    uses = users(device)
    mode, reason = decide_mode(device, uses)
    if not alone and (twin := find_twin(device)) is not None:
        # Whatever the mode: which of the two is meant cannot be told.
        mode, reason = "refused", f"{twin.path} carries the same identity; detach one of them"
    return {
        **asdict(device),
        "label": device.label,
        "identity": {"kind": known.kind, "value": known.value},
        "uses": [str(use) for use in uses],
        "mode": mode,
        "reason": reason,
    }


@click.command(epilog="Example: blockbak devices")
@common.json_option
def command(as_json: bool) -> None:
    """What can be backed up: size, identity, what uses it, and which mode 'auto' would take."""
    from blockbak.host.device import devices, identity

    known = [(device, identity(device)) for device in devices()]
    found = [
        _as_dict(device, mine, alone=sum(other.same_as(mine) for _, other in known) == 1) for device, mine in known
    ]
    if as_json:
        render.document(found)
        return
    render.table(
        ["device", "kind", "size", "identity", "mode", "in use by"],
        [
            [
                one["label"],
                one["kind"],
                render.size(one["size"]),
                f"{one['identity']['kind']} {one['identity']['value']}",
                one["mode"],
                ", ".join(one["uses"]) or "-",
            ]
            for one in found
        ],
        numeric=["size"],
    )
