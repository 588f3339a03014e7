"""What a use-case does goes into the repository's history, however it ends. A process that is killed writes nothing:
its points tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from blockbak.errors import BlockbakError
from blockbak.flow.context import Context
from blockbak.repository.local import Repository


@dataclass(slots=True)
class Doing:
    """What is being done, as far as it is known by now: it becomes the line, or a line for each of its ``parts``.
    ``exit`` is the exit status where no error ends it; ``quiet`` says that nothing was done: there is no line then.
    """

    volume: str = ""
    points: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    exit: int = 0
    quiet: bool = False
    parts: list[Doing] = field(default_factory=list)

    def part(self, volume: str, points: Sequence[str], **facts: object) -> None:
        """What was done to one volume of several."""
        self.parts.append(Doing(volume, list(points), facts))


def ending(error: Exception) -> tuple[int, str]:
    """Exit status and name of what ended a use-case."""
    return (error.exit_code, error.name) if isinstance(error, BlockbakError) else (1, type(error).__name__)


def from_root(name: str) -> str:
    """A file or node as the history calls it: who reads that years later does not know where the person was. What is no
    path, as ``vg/lv`` is, stays as it is.
    """
    path = os.path.abspath(name)
    return path if name and os.path.isdir(os.path.dirname(path)) else name


@contextmanager
def recorded(
    repository: Repository, event: str, context: Context, *, volume: str = "", **facts: object
) -> Iterator[Doing]:
    """A line of ``event`` for what happens inside the ``with``, once it ended well or by an error."""
    clock = context.timer()
    doing = Doing(volume=volume, facts=dict(facts))

    def note(code: int, name: str) -> None:
        seconds = context.timer() - clock
        for one in doing.parts or [doing]:
            repository.record.append(
                event, context, volume=one.volume, points=one.points, exit=code, error=name, seconds=seconds,
                facts=one.facts,
            )  # fmt: skip

    try:
        yield doing
    except Exception as error:
        note(*ending(error))
        raise
    if not doing.quiet:
        note(doing.exit, "")
