"""``blockbak devices``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from blockbak.flow.offer import Offer

_NAMED_MOST = 3
"""Of what uses a device, and of who keeps it busy, in the table; the document has all."""


def _as_dict(offer: Offer) -> dict[str, Any]:
    from dataclasses import asdict

    from blockbak.host.device import identity

    known = identity(offer.device)
    return {
        **asdict(offer.device),
        "label": offer.device.label,
        "identity": {"kind": known.kind, "value": known.value},
        "uses": [str(use) for use in offer.uses],
        "occupants": list(offer.occupants),
        "thin_pool": offer.thin_pool,
        "snapshot_room": offer.snapshot_room,
        "mode": offer.mode,
        "reason": offer.reason,
    }


def _room(one: dict[str, Any]) -> str:
    if one["snapshot_room"] is None:
        return "-"
    return f"{render.size(one['snapshot_room'])} in {one['thin_pool'] or one['vg']}"


def _users(one: dict[str, Any]) -> str:
    who = _some(one["occupants"])
    return ", ".join(part for part in (_some(one["uses"]), f"by {who}" if who else "") if part) or "-"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED_MOST} more" if len(names) > _NAMED_MOST + 1 else ""
    return ", ".join(names[:_NAMED_MOST] if more else names) + more


@click.command(epilog="Example: blockbak devices")
@common.json_option
def command(as_json: bool) -> None:
    """What can be backed up: size, identity, what uses it, and which mode 'auto' would take.

    What uses it are mounts, swap and devices stacked on it, and then the systemd units and processes that keep them
    busy: these are what '--mode cold' has to stop ('blockbak backup --mode cold --dry-run' tells all of it).
    For a logical volume also the room for a snapshot: what its volume group, or its thin pool, has free. Only root
    is told that by LVM.
    """
    from blockbak.flow.offer import offers

    found = [_as_dict(offer) for offer in offers()]
    if as_json:
        render.document(found)
        return
    render.table(
        ["device", "kind", "size", "identity", "mode", "room for a snapshot", "in use by"],
        [
            [
                one["label"],
                one["kind"] if not one["lv"] else "thin lv" if one["thin_pool"] else "lv",
                render.size(one["size"]),
                f"{one['identity']['kind']} {one['identity']['value']}",
                one["mode"],
                _room(one),
                _users(one),
            ]
            for one in found
        ],
        numeric=["size"],
    )
    for one in found:
        if one["lv"] and one["mode"] == "refused":
            render.say(f"{one['label']}: {one['reason']}.")
