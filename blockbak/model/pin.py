"""Pins: a person said that a point stays."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import msgspec

from blockbak.errors import DamagedPin, NewerFormat
from blockbak.model import selfdigest

VERSION = 1


class Pin(msgspec.Struct, frozen=True):
    """Who said why that a point stays, and until when ("" for as long as nobody takes it back). Moments are ISO 8601
    in UTC. ``immutable``: until then nobody takes it back, and nothing that the point is made of is touched.
    """

    point: str
    why: str
    user: str
    host: str
    since: str
    until: str = ""
    immutable: bool = False

    def stands(self, now: datetime) -> bool:
        """Whether it holds at that moment."""
        return not self.until or now < datetime.fromisoformat(self.until)

    @property
    def reason(self) -> str:
        """It, as a clause."""
        who = f"{self.user}@{self.host}" if self.user else self.host
        until = f" until {self.until[:16].replace('T', ' ')}" if self.until else ""
        return f"{'immutable' if self.immutable else 'pinned'}{until}, by {who}: {self.why}"


class _Version(msgspec.Struct):
    blockbak_pin: int


class PinFile(msgspec.Struct):
    """The members of a pin's file, in their order; ``until`` is null for a pin without end."""

    blockbak_pin: int
    point: str
    why: str
    user: str
    host: str
    since: str
    until: str | None
    immutable: bool
    sha256: str = selfdigest.BLANK


def encode(pin: Pin) -> bytes:
    """The file of a pin."""
    file = PinFile(
        VERSION, pin.point, pin.why, pin.user, pin.host, pin.since, pin.until or None, pin.immutable
    )  # fmt: skip
    return selfdigest.encoded({name: getattr(file, name) for name in PinFile.__struct_fields__})


def decode(data: bytes, file: str, point: str) -> Pin:
    """The pin of ``point`` that a file holds; its digest comes before its version. Raises DamagedPin, NewerFormat."""
    if reason := selfdigest.flaw(data):
        raise DamagedPin(file=file, reason=reason)
    try:
        version = msgspec.json.decode(data, type=_Version).blockbak_pin
        if version != VERSION:
            raise NewerFormat(what=f"The pin {file}", detail=f"version {version}")
        found = msgspec.json.decode(data, type=PinFile)
        if found.until:
            datetime.fromisoformat(found.until)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise DamagedPin(file=file, reason=str(error)) from error
    if found.point != point:
        raise DamagedPin(file=file, reason=f"it is of point {found.point}")
    return Pin(
        found.point, found.why, found.user, found.host, found.since, found.until or "", found.immutable
    )  # fmt: skip


def standing(pins: Iterable[Pin], now: datetime) -> dict[str, Pin]:
    """The pins that hold at a moment, by point."""
    return {pin.point: pin for pin in pins if pin.stands(now)}
