"""What every use-case is given from outside: clock, ids, progress, the wish to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
    history, ``user`` who runs it, ``job`` the job of the configuration that it is for ("" without one). ``voice`` takes
    sentences with what they are ``facts`` of, for logs; None where nobody asks for that.
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
    voice: Callable[[str, Mapping[str, str]], None] | None = None
    facts: Mapping[str, str] = field(default_factory=dict)

    def about(self, **facts: str) -> Context:
        """The same, but what is said is said of these (``volume``, ``point``) as well."""
        if (voice := self.voice) is None:
            return self
        known = {**self.facts, **facts}
        return replace(self, facts=known, say=lambda sentence: voice(sentence, known))


iso = units.iso
"""ISO 8601 in UTC with milliseconds."""
