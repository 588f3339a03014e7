"""Cold sources: a device whose users were brought to rest, read, and given back to them.

Nothing is done before the whole plan is known to be possible, and nothing is read before the device is seen to be
at rest: held exclusively where nothing is left on it, and with exactly what the plan left on it where something is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from blockbak.errors import BlockbakError, CannotRest, NotAtRest, RestVoid, SourceInUse
from blockbak.flow.context import Context
from blockbak.flow.leftovers import machine
from blockbak.flow.source import AtRest, Request, Seen, Settled
from blockbak.host import hooks, occupants, quiesce, usage
from blockbak.host.blockio import SourceReader
from blockbak.host.device import Device
from blockbak.host.quiesce import Rest
from blockbak.host.system import System
from blockbak.host.units import Units
from blockbak.model import quiesce as plans
from blockbak.model.quiesce import Blocked, Plan, RestOptions, RunHook
from blockbak.model.scene import Scene

HOOKS_FOLDER = "/etc/blockbak/cold.d"
_RUN_DIGITS = 8
_LOOKS, _PAUSE_SECONDS = 30, 0.1
"""How often a device is asked for: whoever only looks whether it is free holds it for a moment."""
_UNSEEN = "something holds it that no process shows, such as a mount namespace which only a file keeps"
_FOREIGN = frozenset({"locked", "backing"})
"""Uses that no plan takes away: a lock of another process, or a device over the same bytes."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A device, and how it is brought to rest. ``kept`` says of paths what they hold that must go on."""

    device: Device
    options: RestOptions
    kept: dict[str, str]
    plan: Plan

    @property
    def idle(self) -> bool:
        """Whether nothing uses it: then there is nothing to do, and nothing to put back."""
        return not self.plan.steps and not self.plan.staying and not self.plan.layers


# --- decisions ------------------------------------------------------------------------------------------------


def kept(context: Context, others: dict[str, str]) -> dict[str, str]:
    """What must go on while a device is at rest, by its path: blockbak, its directories, and ``others``."""
    own = {
        context.state_dir: "blockbak's state directory",
        context.run_dir: "blockbak's run directory",
        HOOKS_FOLDER: "blockbak's hooks",
        **dict.fromkeys(usage.program_places(), "blockbak itself"),
    }
    return own | others


def prepare(device: Device, options: RestOptions, keep: dict[str, str], context: Context) -> Prepared:
    """Look at who uses a device and plan its rest. Raises NoSuchUnit, NoSuchHook, UnsafeHook."""
    found = hooks.find(options.hooks, HOOKS_FOLDER) if options.hooks or os.path.isdir(HOOKS_FOLDER) else []
    scene = _scene(device, options, keep | {hook.path: f"hook {hook.name}" for hook in found})
    # A hook prepares an application for being stopped: where nothing is done, it is not run.
    made = plans.plan(scene, options)
    if made.steps:
        made = plans.plan(scene, options, [_hook(hook, device, context) for hook in found])
    foreign = tuple(Blocked(device.label, use.detail) for use in usage.users(device) if use.what in _FOREIGN)
    foreign = tuple(one for one in foreign if not _is_planned(one, made))
    return Prepared(device, options, keep, replace(made, blocked=(*made.blocked, *foreign)))


def _is_planned(one: Blocked, made: Plan) -> bool:
    """Whether it is a loop device that the plan detaches."""
    return any(isinstance(step, plans.DetachLoop) and step.node in one.why.split() for step in made.steps)


def _scene(device: Device, options: RestOptions, keep: dict[str, str]) -> Scene:
    manager = Units()
    named = manager.look(options.stop, strict=True) if options.stop else {}
    return occupants.look(device, keep, units=manager.look, named=list(named))


def _hook(hook: hooks.Hook, device: Device, context: Context) -> RunHook:
    facts = {"BLOCKBAK_MODE": "cold", "BLOCKBAK_SOURCES": device.label, "BLOCKBAK_HOST": context.host}
    return RunHook(hook.name, hook.path, tuple(sorted(facts.items())))


def check(prepared: Prepared) -> None:
    """Raises CannotRest, with the whole plan noted on it, where something cannot be brought to rest."""
    if not prepared.plan.blocked:
        return
    first = prepared.plan.blocked[0]
    ways = first.advice or "Stop by hand what uses it, then run again."
    error = CannotRest(path=prepared.device.label, who=f"{first.what}: {first.why}", ways=_sentence(ways))
    for line in told(prepared.plan):
        error.add_note(line)
    raise error


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:].removesuffix(".") + "."


def told(made: Plan) -> list[str]:
    """A plan for people: the steps in their order, what stays, what stands against it."""
    lines = [f"{number}. {step}" for number, step in enumerate(made.told(), 1)]
    lines += [f"stays: {target} ({how})" for target, how in made.staying.items()]
    return [*lines, *(f"cannot: {one}" for one in made.blocked), *made.notes]


# --- doing it -------------------------------------------------------------------------------------------------


class RestedSource(AtRest):
    """A device at rest. It is given back as soon as the last byte was read."""

    def __init__(self, seen: Seen, request: Request, prepared: Prepared, context: Context) -> None:
        self._prepared, self._context = prepared, context
        self._rest: Rest | None = None
        self._settled = False
        self._stack = ExitStack()
        made = prepared.plan
        try:
            if not prepared.idle:
                self._rest = self._stack.enter_context(_brought(prepared, context))
                self._settle_down(made)
            held = bool(made.staying or made.layers)
            for again in reversed(range(_LOOKS)):
                try:
                    super().__init__(seen, request, context, exclusive=not held)
                    break
                except SourceInUse as error:
                    if not again:
                        what = f"{_UNSEEN} ({error.fields['holders']})"
                        raise NotAtRest(path=seen.device.label, what=what) from error
                context.check()
                time.sleep(_PAUSE_SECONDS)
            self._stack.callback(self.reader.__exit__, None, None, None)
            if held:
                _check(prepared)
        except BaseException as error:
            self._give_back(error)
            raise

    @property
    def stopped(self) -> list[str]:
        """What was done to bring it to rest, in sentences."""
        return list(self._rest.done) if self._rest is not None else []

    def _settle_down(self, made: Plan) -> None:
        """Everything that was written is on the device, and whatever nothing holds any more is held."""
        system = System()
        family = [name for name in system.above(self._prepared.device.kname) if system.size(name)]
        for name in reversed(family):
            _flush(system.node(name))
        if not made.staying and not made.layers:
            return  # the device itself is held, and with it all that is on it
        for name in family:
            idle = not system.links(name, "holders") and not any(
                name in system.devices_of(line) for line in system.mounts
            )
            if idle and name != self._prepared.device.kname and not system.partitions(name):
                self._stack.enter_context(SourceReader(system.node(name), exclusive=True))

    def check(self) -> None:
        """Raise RestVoid once what was frozen has been let go before all was read."""
        if self._rest is not None and not self._settled and self._rest.over():
            raise RestVoid(path=self._prepared.device.label, reason="it was thawed at its deadline")

    def settle(self) -> Settled:
        """Whether it was at rest to the end; then it is given back. Raises as ``AtRest.settle``, and RestVoid,
        NotAtRest.
        """
        settled = super().settle()
        self.check()
        if self._rest is not None:
            _check(self._prepared)
            self._rest.verify()
        self._settled = True
        notes = list(settled.notes)
        attention = settled.attention
        self._stack.close()
        if self._rest is not None:
            if not self._rest.in_time:
                raise RestVoid(path=self._prepared.device.label, reason="it was thawed at its deadline")
            # The image is good; what could not be put back must be heard of all the same.
            left = [
                *self._rest.left,
                *self._rest.unlike,
                *([str(self._rest.hook_error)] if self._rest.hook_error else []),
            ]
            notes += [*self._rest.notes, *left]
            attention = attention or bool(left)
        return Settled(settled.consistency, notes, attention)

    def close(self) -> None:
        """Put everything back; harmless when that was done."""
        self._stack.close()

    def _give_back(self, error: BaseException) -> None:
        try:
            self._stack.close()
        except BlockbakError as failed:
            error.add_note(str(failed))
            for note in getattr(failed, "__notes__", ()):
                error.add_note(note)
        # The steps were over: what could not be put back is on no error of theirs.
        for line in self._rest.left if self._rest is not None else ():
            error.add_note(line)


@contextmanager
def resting(
    seen: Seen, request: Request, keep: dict[str, str], context: Context, options: RestOptions
) -> Iterator[RestedSource]:
    """A device that is brought to rest, open for reading; everything is put back in every case.

    Raises CannotRest with nothing done, NotAtRest and what the steps raise with all of it undone.
    """
    prepared = prepare(seen.device, options, kept(context, keep), context)
    check(prepared)
    source = RestedSource(seen, request, prepared, context)
    try:
        yield source
    except BaseException as error:
        source._give_back(error)  # noqa: SLF001 - the first error is kept
        raise
    source.close()


@contextmanager
def _brought(prepared: Prepared, context: Context) -> Iterator[Rest]:
    with quiesce.brought_to_rest(
        prepared.plan,
        machine(context),
        device=prepared.device.label,
        run_id=context.hex_id(_RUN_DIGITS),
        deadline=prepared.options.deadline,
        say=context.say,
        check=context.check,
        who=lambda target: _who(prepared, target),
    ) as rest:
        yield rest


def _who(prepared: Prepared, target: str) -> str:
    """Who keeps a mount busy, in words."""
    scene = occupants.look(prepared.device, {})
    ids = {one.id for one in scene.mounts if one.target == target}
    return "; ".join(str(one) for one in scene.occupants if one.mounts & ids)


def _check(prepared: Prepared) -> None:
    """Raises NotAtRest where anything but what the plan left uses the device."""
    scene = occupants.look(prepared.device, {})
    left = plans.remaining(scene, prepared.plan)
    if left:
        error = NotAtRest(path=prepared.device.label, what=str(left[0]))
        for one in left[1:]:
            error.add_note(str(one))
        raise error


def _flush(node: str) -> None:
    """Have what was written to a device on it. Raises NotAtRest."""
    try:
        descriptor = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise NotAtRest(path=node, what=f"it cannot be flushed ({error.strerror})") from error


def planned(device: Device, options: RestOptions, keep: Sequence[tuple[str, str]], context: Context) -> list[str]:
    """What would be done, for people. Raises CannotRest."""
    prepared = prepare(device, options, kept(context, dict(keep)), context)
    check(prepared)
    return told(prepared.plan)
