"""``blockbak devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from blockbak.host.device import Device


def _as_dict(device: Device) -> dict[str, Any]:
    from dataclasses import asdict

    from blockbak.host.device import identity
    from blockbak.host.usage import decide_mode, users

    uses = users(device)
    mode, reason = decide_mode(device, uses)
    known = identity(device)
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
    from blockbak.host.device import devices

    found = [_as_dict(device) for device in devices()]
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
