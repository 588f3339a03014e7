"""A device is brought to rest by a plan's steps, and all is put back in reverse, whatever happens.

Before each step stands a record in a journal: for who is killed, ``put_back`` undoes what it says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from blockbak.errors import (
    BlockbakError,
    CannotRest,
    FrozenAlready,
    HookFailed,
    HookStopped,
    NotAtRest,
    RestVoid,
    StateUnusable,
    StillInUse,
)
from blockbak.host import bootunit, guard, journal
from blockbak.host.acts import Acts, Machine, never
from blockbak.host.journal import Begun, Journal, Writer
from blockbak.host.signals import undisturbed
from blockbak.model.quiesce import Freeze, Plan, Step, Unmount

__all__ = ["Journal", "Machine", "Outcome", "Rest", "brought_to_rest", "put_back", "unfinished"]

_BY_HAND = "After a power cut 'blockbak recover' must be run by hand: {why}."


@dataclass(slots=True)
class Rest:
    """The device at rest, inside the ``with``; how it went, after it.

    ``done`` are sentences on what was stopped, ``outputs`` what hooks printed (label and text), ``notes`` are for
    people. After the ``with``: ``left`` are sentences on what could not be put back (attention: the journal stays,
    'blockbak recover' tries again), ``unlike`` on what is back and not quite as it was, ``hook_error`` is what a
    hook's end said against the point, ``in_time`` is False where the guardian had thawed before all was read.
    """

    device: str
    done: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)
    hook_error: HookStopped | HookFailed | None = None
    in_time: bool = True
    _acts: Acts | None = field(default=None, repr=False)

    def over(self) -> bool:
        """Whether a frozen file system was thawed already: whoever reads may give up. Costs one system call."""
        guardian = self._acts.guardian if self._acts is not None else None
        return not self.in_time or (guardian is not None and guardian.acted())

    def verify(self) -> None:
        """See that all is still at rest: units not running again, nothing mounted or swapped to again, not thawed.

        To be called once more after the last read. Raises UnitRestarted, UnitNotStopped, NotAtRest, RestVoid.
        """
        if self.over():
            raise RestVoid(path=self.device, reason="what was frozen was thawed at its deadline")
        for one in self._acts.begun if self._acts is not None else ():
            if what := self._acts.disturbed(one) if self._acts is not None else "":
                raise NotAtRest(path=_place(one.step) or self.device, what=what)


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
    if plan.blocked:
        who_blocks = "; ".join(f"{one.what}: {one.why}" for one in plan.blocked)
        ways = "; ".join(dict.fromkeys(one.advice for one in plan.blocked if one.advice))
        raise CannotRest(path=device, who=who_blocks, ways=f"It would take this: {ways}." if ways else "")
    rest = Rest(device)
    if not plan.steps:
        yield rest
        return
    # No signal breaks in between a step and the note of it, nor into putting back.
    with undisturbed() as through, ExitStack() as stack:
        writer = _begun_journal(plan, machine, device, run_id, rest, say, stack)
        acts = Acts(
            machine, run_id, device, machine.boot, _scratch(machine, run_id), writer, say, check, who, deadline,
        )  # fmt: skip
        rest._acts = acts  # noqa: SLF001 - one room made both
        try:
            with through():
                _do_all(plan.steps, acts, writer, rest, stack)
                yield rest
        except BaseException as error:
            _end(acts, writer, rest, machine, say)
            for line in (*rest.left, *rest.unlike, *([str(rest.hook_error)] if rest.hook_error else [])):
                error.add_note(line)
            if rest.left:
                error.add_note("'blockbak recover' tries again to put it back.")
            raise
        _end(acts, writer, rest, machine, say)


def _begun_journal(
    plan: Plan, machine: Machine, device: str, run_id: str, rest: Rest, say: Callable[[str], None], stack: ExitStack
) -> Writer:
    """A journal with its head, and what reads it at the next boot. Nothing may be stopped before both last."""
    with journal.alone(machine.state_dir, machine.kernel) as place:
        room = journal.room_for(plan.steps)
        writer = stack.enter_context(journal.written(place, run_id, room, machine.kernel))
        try:
            writer.head({"boot": machine.boot, "host": machine.host, "device": device})
            if not machine.units.running:
                rest.notes.append(_BY_HAND.format(why="systemd does not run this machine"))
                return writer
            try:
                bootunit.write(machine.unit_dir, machine.state_dir, machine.run_dir, machine.kernel)
            except OSError as error:
                rest.notes.append(_BY_HAND.format(why=f"{machine.unit_dir} cannot be written ({error.strerror})"))
                say(rest.notes[-1])
        except BaseException:
            with contextlib.suppress(OSError):
                writer.remove()
            raise
    return writer


def _do_all(steps: Sequence[Step], acts: Acts, writer: Writer, rest: Rest, stack: ExitStack) -> None:
    """Each step: looked at, noted, done."""
    numbered = list(enumerate(steps, 1))
    # Before the first goes: others may go with it, by propagation (mount_namespaces(7)).
    mounted = {number: acts.look(step) for number, step in numbered if isinstance(step, Unmount)}
    freezes = [(number, step) for number, step in numbered if isinstance(step, Freeze)]
    for number, step in numbered:
        acts.check()
        if isinstance(step, Freeze) and acts.guardian is None:
            # Who thaws is there before anything is frozen.
            stack.enter_context(acts.watched(freezes))
        # What undoes it must be on disk before it is done.
        begun = writer.begin(step, mounted[number] if number in mounted else acts.look(step))
        try:
            said = acts.act(begun)
        except FrozenAlready:
            writer.back(begun.number)
            raise
        except StillInUse as error:
            # By a unit that somebody started again meanwhile: what is to be done about it is another thing.
            if (restarted := acts.restarted()) is not None:
                raise restarted from error
            raise
        rest.done.append(said)
        acts.say(said)


def _end(acts: Acts, writer: Writer, rest: Rest, machine: Machine, say: Callable[[str], None]) -> None:
    """Put all back, and say what came of it in ``rest``."""
    acts.check = never
    done, left = _undo(acts, writer.to_undo, writer, say)
    rest.left += left
    rest.notes += acts.notes
    rest.outputs += acts.outputs
    rest.in_time = acts.in_time
    rest.hook_error = next(iter(acts.hook_errors), None)
    if not left:
        rest.left += _finish(writer, machine, acts.scratch)
    rest.unlike += [line for line in done if " quite as before" in line or " could only " in line]


def _undo(
    acts: Acts, begun: Sequence[Begun], writer: Writer, say: Callable[[str], None]
) -> tuple[list[str], list[str]]:
    """In reverse, each as far as it goes: what one cannot do must not keep the others from being put back. Gives what
    was done, and what could not be.
    """
    done: list[str] = []
    left: list[str] = []
    for one in reversed(begun):
        try:
            said = acts.undo(one)
        except Exception as error:  # noqa: BLE001 - whatever it is, the rest must be put back
            words = str(error) if isinstance(error, BlockbakError) else f"{type(error).__name__}: {error}"
            left.append(f"Not undone: {one.step}. {words}")
            say(left[-1])
            continue
        done += said
        for line in said:
            say(line)
        with contextlib.suppress(StateUnusable):  # it would only be looked at once more
            writer.back(one.number)
    return done, left


def _finish(writer: Writer, machine: Machine, scratch: str, damage: str = "") -> list[str]:
    """All is put back: the journal goes, and with the last one what reads it at boot. Gives what a person must look
    at. Where there is damage, nobody knows whether it is all.
    """
    guard.clear(scratch)
    said: list[str] = []
    try:
        with journal.alone(machine.state_dir, machine.kernel):
            # Before the journal: without one nobody would look for it.
            if journal.paths(machine.state_dir) == [writer.path]:
                bootunit.remove(machine.unit_dir, machine.state_dir, machine.kernel, said.append)
            if damage:
                kept = writer.set_aside()
                said.append(f"A journal is damaged ({damage}): not all may be back that was stopped. See {kept}.")
            else:
                writer.remove()
    except (OSError, StateUnusable) as error:
        said.append(f"All was put back, but {writer.path} cannot be removed: {error}.")
    return said


def _scratch(machine: Machine, run_id: str) -> str:
    """What a hook's end must know has to be there after a power cut too."""
    return os.path.join(journal.folder(machine.state_dir), f"{run_id}.hooks")


def _place(step: Step) -> str:
    return step.target if isinstance(step, Unmount) else str(getattr(step, "path", "") or getattr(step, "node", ""))


# --- what runs that are over have left -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """Sentences: what was put back, and what could not be (its journal stays)."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def unfinished(machine: Machine) -> list[Journal]:
    """The journals of runs that are over without having put all back. Raises StateUnusable where others than we
    could have put them there.
    """
    found = []
    for path in journal.paths(machine.state_dir):
        with journal.taken(path, machine.kernel) as held:
            if held is not None:
                found.append(held[0])
    return found


def put_back(left: Journal, machine: Machine, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Undo what a run that is over has left, as far as it is not so already. Does nothing where its journal is gone
    or somebody else is at it.

    A damaged journal is followed as far as it is whole, and then set aside for a person.
    """
    with undisturbed(), journal.taken(left.path, machine.kernel) as held:
        if held is None:
            return Outcome()
        found, writer = held
        if found.newer:
            return Outcome(left=[f"{found.path} was written by a newer blockbak, which must put back what it says."])
        done: list[str] = []
        if found.to_undo:
            of = f" on {found.host}" if found.host else ""
            done.append(f"Run {found.run}{of} was ended while {found.device} was at rest; what it stopped is put back.")
            say(done[-1])
        acts = Acts(machine, found.run, found.device, found.boot, _scratch(machine, found.run), writer)
        said, not_done = _undo(acts, found.to_undo, writer, say)
        done += said
        if not not_done:
            not_done += _finish(writer, machine, acts.scratch, found.damage)
        return Outcome(done, [*not_done, *(str(error) for error in acts.hook_errors)])
