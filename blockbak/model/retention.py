"""What of a volume's points is kept: the policy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """How many points are kept: the newest of so many hours, days, ... that have one. Times are seconds."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float = 0.0
    verified: int = 0
    full_every: float = 90 * 86400.0
