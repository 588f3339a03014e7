"""A device is brought to rest by a plan's steps, and all is put back in reverse, whatever happens.

Before each step stands a record in a journal: who is killed is undone by ``put_back``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockbak.errors import HookFailed, HookStopped
from blockbak.host import runner
from blockbak.host.guardian import PROGRAM
from blockbak.host.kernel import Kernel
from blockbak.model.quiesce import Plan

UNIT_DIR = "/etc/systemd/system"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where journals lie, and how things are done. ``find`` gives the node of an ``identity`` of a step after the
    machine was started anew, or "". ``unit_dir`` is where the unit for the boot is written. The rest is for tests.
    """

    state_dir: str
    run_dir: str
    boot: str
    host: str = ""
    find: Callable[[str], str] = lambda _: ""
    unit_dir: str = UNIT_DIR
    kernel: Kernel = field(default_factory=Kernel)
    run: Callable[..., runner.Completed] = runner.run
    sleep: Callable[[float], None] = time.sleep
    program: Sequence[str] = PROGRAM


@dataclass(slots=True)
class Rest:
    """The device at rest, inside the ``with``; how it went, after it.

    ``done`` are sentences on what was stopped, ``outputs`` what hooks printed (label and text), ``notes`` are for
    people. After the ``with``: ``left`` are sentences on what could not be put back (attention: the journal stays,
    'blockbak recover' tries again), ``hook_error`` is what a hook's end said against the point, ``in_time`` is False
    where the guardian had thawed before all was read.
    """

    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    hook_error: HookStopped | HookFailed | None = None
    in_time: bool = True

    def over(self) -> bool:
        """Whether a frozen file system was thawed already: whoever reads may give up. Costs one system call."""
        raise NotImplementedError

    def verify(self) -> None:
        """See that all is still at rest: units not running again, nothing mounted or swapped to again, not thawed.

        To be called once more after the last read. Raises UnitRestarted, NotAtRest, RestVoid.
        """
        raise NotImplementedError


@contextmanager
def brought_to_rest(
    plan: Plan,
    machine: Machine,
    *,
    device: str,
    run_id: str,
    deadline: float,
    say: Callable[[str], None],
    check: Callable[[], None],
    who: Callable[[str], str] = lambda _: "",
) -> Iterator[Rest]:
    """All steps of ``plan`` in order, then the body, then everything undone in reverse: always, also after an error
    in the middle of the steps.

    ``device`` is how people call it, ``run_id`` names the journal. ``deadline`` is seconds for which file systems
    stay frozen at most. ``check`` may raise Interrupted between steps and while programs run. ``who`` is asked with
    a mount's target (or a node) when it is busy after all, and names the holders. Raises CannotRest where the plan
    is blocked, StateUnusable with nothing done, StillInUse, UnitNotStopped, UnitRestarted, ProcessStays,
    FrozenAlready, NoGuardian, HookStopped, HookFailed, CommandFailed, MissingProgram; what could not be put back is
    noted on the error, or is in ``left`` where there is none.
    """
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Journal:
    """What a run that is over has left to put back."""

    path: str
    run: str
    boot: str
    host: str
    device: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """Sentences: what was put back, and what could not be (its journal stays)."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def unfinished(state_dir: str) -> list[Journal]:
    """The journals of runs that are over without having put all back."""
    raise NotImplementedError


def put_back(journal: Journal, machine: Machine, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Undo what a run that is over has left, as far as it is not so already. Does nothing where its journal is gone
    or somebody else is at it.
    """
    raise NotImplementedError
