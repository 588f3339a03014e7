"""A repository that the program itself made, as a value."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.cli.program import document
from tests.patterns import SECTOR, stamp

SEED = 3
SECTORS = 4001
"""Of the volume `web`: not a whole number of blocks."""


@dataclass(frozen=True)
class Stock:
    """A repository with the volume `web` (full, incremental, differential; the last also as a synthetic full)
    and `db` (one full). ``held`` is what each point must restore to; ``source`` is `web`'s, ``raw`` a raw image of it.
    """

    path: Path
    source: Path
    web: tuple[str, ...]
    db: str
    held: dict[str, bytes] = field(repr=False)

    @property
    def raw(self) -> Path:
        return self.source.with_name("web.raw")

    @property
    def oldest(self) -> str:
        return self.web[0]

    @property
    def newest(self) -> str:
        return self.web[-1]

    def points(self) -> list[dict[str, Any]]:
        return document("-r", self.path, "list")


def overwrite(path: Path, start_sector: int, count: int, sequence: int) -> None:
    """Write sectors that carry their number and ``sequence``."""
    with path.open("r+b") as file:
        file.seek(start_sector * SECTOR)
        file.write(stamp(start_sector, count, sequence, SEED))


def copied(stock: Stock, place: Path) -> Stock:
    """A copy in ``place``; its source is shared, and only to be read."""
    shutil.copytree(stock.path, place / "repo")
    return replace(stock, path=place / "repo")
