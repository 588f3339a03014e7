"""How often, and what came of it: a share of each measure in every run, all of it in ``scripts/soak``."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

SOAK = os.environ.get("BLOCKBAK_SOAK") == "1"


@pytest.fixture
def times() -> Callable[[int, int], int]:
    """``times(share, all)``: how often to try, here a share of it, in a soak all."""
    return lambda share, full: full if SOAK else share


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """``tell(what, number)`` puts a number into the report that ``scripts/soak`` prints."""

    def note(what: str, number: object) -> None:
        record_property(what, number)
        print(f"{what}: {number}")

    return note
