"""What must match for two sightings to be of one volume."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    kind: str
    value: str
    diskseq: int = 0
    boot: str = ""
