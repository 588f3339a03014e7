"""What every use-case is given from outside: clock, ids, progress, the wish to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from blockbak import units
from blockbak.host.kernel import Kernel


class Progress(Protocol):
    """Where a use-case says how far it is."""

    def begin(self, label: str, total: int) -> None:
        """A stage of ``total`` bytes starts."""

    def advance(self, done: int, changed: int | None = None) -> None:
        """``done`` more bytes, of which ``changed`` were stored or written (None: that is not asked). Any thread may
        call.
        """

    def end(self) -> None:
        """The stage is over."""


class Quiet:
    """Progress that nobody watches."""

    def begin(self, label: str, total: int) -> None:
        """Nothing."""

    def advance(self, done: int, changed: int | None = None) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def never() -> None:
    """Nobody asked to stop."""


@dataclass(frozen=True, slots=True)
class Context:
    """``now`` is the wall clock in UTC, ``timer`` a monotonic one in seconds. ``hex_id(n)`` gives n random
    hex digits. ``check`` raises Interrupted once someone asked to stop; it is called where stopping leaves
    nothing half-made. ``say`` takes sentences for people. ``workers`` is a number of threads,
    ``run_dir`` a place that does not outlive the boot. ``run`` are 32 hex digits that name this process in the
    history, ``user`` who runs it, ``job`` the job of the configuration that it is for ("" without one).
    """

    now: Callable[[], datetime]
    timer: Callable[[], float]
    hex_id: Callable[[int], str]
    say: Callable[[str], None]
    progress: Progress
    check: Callable[[], None]
    workers: int
    host: str
    program: str
    state_dir: str
    kernel: Kernel
    wait: float = 0
    run_dir: str = "/run/blockbak"
    run: str = ""
    job: str = ""
    user: str = ""


iso = units.iso
"""ISO 8601 in UTC with milliseconds."""
