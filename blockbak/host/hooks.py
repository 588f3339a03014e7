"""Application hooks: programs that bring an application to rest around the moment of a snapshot, and back.

A hook is run twice, with ``BLOCKBAK_PHASE=begin`` before the snapshot and ``=end`` after it. The end is not
blockbak's to run but the guardian's, which is ready before any begin: so it comes at the deadline whatever
happens, and when blockbak is killed. docs/hooks.md tells people how to write one.
"""

from __future__ import annotations

import enum
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blockbak.errors import CommandFailed, HookFailed, HookStopped, NoSuchHook, UnsafeHook
from blockbak.host import runner
from blockbak.host.guard import OUTPUT_BYTES
from blockbak.host.guardian import PROGRAM, Ended, Ending, Guardian, guarded
from blockbak.host.mapper import Mapper

FOLDER = "/etc/blockbak/hooks.d"
READY = {"mariadb": "mariadb", "mysql": "mariadb", "postgresql": "postgresql"}
"""Ready-made hooks: the name they go by, and their file."""
SKIP, STOP = 62, 63
"""Exit statuses as those of Barman's retry hooks."""
TRIES = 3
PAUSE_SECONDS = 1.0
END_SECONDS = 60.0
"""What the end of one hook may take."""

_READY_FOLDER = Path(__file__).with_name("ready")
# As run-parts(8) names them: a backup, a package manager's .dpkg-old, an editor's file~ do not count.
_HOOK_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LINKS_MOST = 40  # the kernel's own limit, MAXSYMLINKS


@dataclass(frozen=True, slots=True)
class Hook:
    """A program that was found safe to run. ``name`` is how people call it."""

    name: str
    path: str


@dataclass(frozen=True, slots=True)
class Step:
    """A directory, link or file on the way to a hook, and who may exchange what it leads to."""

    path: str
    owner: int
    mode: int


class Next(enum.Enum):
    """What follows from how a begin ended."""

    GO_ON = enum.auto()
    SKIP = enum.auto()
    STOP = enum.auto()
    AGAIN = enum.auto()
    FAIL = enum.auto()


@dataclass(slots=True)
class Rest:
    """The applications at rest, inside the ``with``; what came of it, after it.

    ``outputs`` is what hooks printed (label and text), to be kept with the point; ``notes`` are sentences for
    people. ``in_time`` is only known after the ``with``: False means that all was let go before the body was
    done, for ``reasons``, so that nothing made in it may be used.
    """

    guardian: Guardian | None
    applied: bool = False
    notes: list[str] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    in_time: bool = True
    reasons: list[str] = field(default_factory=list)

    def over(self) -> bool:
        """Whether all was let go already: whoever is at work inside may give up."""
        return self.guardian is not None and self.guardian.acted()

    def within(self, seconds: float) -> None:
        """Bring the deadline forward to ``seconds`` from now, where it is later: before volumes are suspended."""
        if self.guardian is not None:
            self.guardian.within(seconds)


# --- finding them --------------------------------------------------------------------------------


def find(named: Sequence[str], folder: str = FOLDER) -> list[Hook]:
    """The hooks to run, in their order: those of ``folder`` by name, then those named.

    ``named`` are paths or names of ready-made hooks. In the folder, what is not executable or not named as
    run-parts(8) wants it is passed over. Raises NoSuchHook, and UnsafeHook for one that others than root can
    exchange.
    """
    found = [Hook(name, os.path.join(folder, name)) for name in _names(folder)]
    for one in map(_named, named):
        # Two of one name could not be told apart in what is said of them.
        found.append(Hook(one.path, one.path) if one.name in {hook.name for hook in found} else one)
    for hook in found:
        try:
            steps = way_to(hook.path)
        except OSError as error:
            raise UnsafeHook(path=hook.path, reason=f"it cannot be looked at: {error.strerror}") from error
        if reason := unsafe(steps):
            raise UnsafeHook(path=hook.path, reason=reason)
    return found


def _names(folder: str) -> list[str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnsafeHook(path=folder, reason=f"it cannot be looked at: {error.strerror}") from error
    return sorted(name for name in names if is_hook_name(name) and _is_program(os.path.join(folder, name)))


def _is_program(path: str) -> bool:
    return os.access(path, os.X_OK) and not os.path.isdir(path)


def is_hook_name(name: str) -> bool:
    """Whether a file of that name in the folder is meant to be a hook."""
    return _HOOK_NAME.fullmatch(name) is not None


def _named(name: str) -> Hook:
    if "/" not in name:
        if name not in READY:
            raise NoSuchHook(hook=name, ready=", ".join(READY))
        return Hook(name, str(_READY_FOLDER / READY[name]))
    path = os.path.abspath(name)
    if not os.path.exists(path):
        raise NoSuchHook(hook=path, ready=", ".join(READY))
    return Hook(os.path.basename(path), path)


def way_to(path: str) -> list[Step]:
    """Every directory and link that leads to ``path``, and at last what it is. Raises OSError."""
    todo = [part for part in reversed(os.path.abspath(path).split("/")) if part]
    info = os.lstat("/")
    here, steps, links = "/", [Step("/", info.st_uid, info.st_mode)], 0
    while todo:
        part = todo.pop()
        if part == "..":  # only in a link's target; what it leads to is resolved by now
            here = os.path.dirname(here)
            continue
        at = os.path.join(here, part)
        info = os.lstat(at)
        steps.append(Step(at, info.st_uid, info.st_mode))
        if not stat.S_ISLNK(info.st_mode):
            here = at
            continue
        links += 1
        if links > _LINKS_MOST:
            raise OSError(40, os.strerror(40), path)  # ELOOP
        target = os.readlink(at)
        if target.startswith("/"):
            here = "/"
        todo += [one for one in reversed(target.split("/")) if one not in ("", ".")]
    return steps


def unsafe(steps: Sequence[Step]) -> str:
    """Why the program at the end of the way is not run as root; "" if it is safe."""
    last = steps[-1]
    if not stat.S_ISREG(last.mode):
        return "it is not a regular file"
    if not last.mode & 0o111:
        return "it is not executable"
    for step in steps:
        what = "it" if step is last else step.path
        if step.owner != 0:
            return f"{what} belongs to user {step.owner}, not to root"
        # Sticky does not help: whoever may write in /tmp can be there first. A link has no mode of its own.
        if step.mode & (stat.S_IWGRP | stat.S_IWOTH) and not stat.S_ISLNK(step.mode):
            return f"others than root may write {what}"
    return ""


# --- running them --------------------------------------------------------------------------------


def after_begin(status: int | None, tried: int, left: float) -> Next:
    """What follows a begin that ended with ``status`` (None: not by itself) at its ``tried``-th time, with
    ``left`` seconds until the deadline.
    """
    if status == 0:
        return Next.GO_ON
    if status == SKIP:
        return Next.SKIP
    if status == STOP:
        return Next.STOP
    return Next.AGAIN if tried < TRIES and left > PAUSE_SECONDS else Next.FAIL


def begin_seconds(deadline: float, left: float) -> float:
    """How long a begin may run: late enough before the deadline that a late one is gone before its end is run."""
    return left - min(runner.GRACE_SECONDS + 0.5, deadline / 4)


def troubles(ended: Sequence[Ended], skipped: frozenset[str]) -> tuple[list[HookStopped | HookFailed], list[str]]:
    """The errors and the notes that follow from how the ends went.

    A failed end is an error although the snapshot is made: a hook that held something until its end (a lock, a
    backup mode) learns there whether it was held. From a hook that was left out nothing was expected.
    """
    errors: list[HookStopped | HookFailed] = []
    notes = []
    for one in ended:
        if one.status in (0, SKIP):
            continue
        reason = _why(one.status, one.reason, one.stderr)
        if one.label in skipped:
            notes.append(f"Hook {one.label}, which was left out, failed in its phase end: {reason}.")
        elif one.status == STOP:
            errors.append(HookStopped(hook=one.label, phase="end"))
        else:
            errors.append(HookFailed(hook=one.label, phase="end", reason=reason))
    return errors, notes


def _why(status: int | None, reason: str, stderr: str) -> str:
    if status is not None:
        reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{reason} ({stderr})" if stderr else reason


@contextmanager
def at_rest(
    hooks: Sequence[Hook],
    facts: Mapping[str, str],
    *,
    deadline: float,
    run_dir: str,
    boot: str,
    devices: Sequence[tuple[str, str]] = (),
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda _: None,
    environ: Mapping[str, str] = os.environ,
    program: Sequence[str] = PROGRAM,
    mapper: Mapper | None = None,
) -> Iterator[Rest]:
    """The begin of every hook, then the body, then every end in reverse, all within ``deadline`` seconds.

    ``facts`` are the variables that tell a hook of the backup: all those of docs/hooks.md that are not set here.
    ``devices`` (name and uuid in device-mapper) are resumed before the ends, where the body suspended them. The
    ends are always run, once, by the guardian: also that of a hook whose begin failed half-way, or of one that
    was never begun because an earlier one failed. ``say`` is called with each note as it comes.

    Raises NoGuardian (nothing was begun), HookStopped and HookFailed; where the body raised, what went wrong at
    the end is noted on its error. It does not raise for lateness: look at ``in_time`` after the ``with``.
    """
    if not hooks and not devices:
        yield Rest(None)
        return
    scratch = os.path.join(os.path.abspath(run_dir), f"hooks-{secrets.token_hex(8)}")
    env = _environment(environ) | dict(facts) | {"BLOCKBAK_HOOK_DIR": os.path.join(scratch, "hook")}
    endings = [_ending(hook, env) for hook in reversed(hooks)]
    until = clock() + deadline
    skipped: set[str] = set()
    with guarded(
        devices,
        endings,
        deadline=deadline,
        run_dir=run_dir,
        boot=boot,
        scratch=scratch,
        program=program,
        mapper=mapper,
    ) as guardian:
        rest = Rest(guardian)
        if hooks:
            os.mkdir(env["BLOCKBAK_HOOK_DIR"], 0o700)
        try:
            for hook in hooks:
                if _begun(hook, env, rest, guardian, deadline=deadline, until=until, clock=clock, sleep=sleep, say=say):
                    continue
                skipped.add(hook.name)
            rest.applied = bool(hooks) and not skipped
            yield rest
        except BaseException as error:
            for one in _let_go(rest, guardian, frozenset(skipped), say):
                error.add_note(str(one))
            raise
        errors = _let_go(rest, guardian, frozenset(skipped), say)
        for one in errors[1:]:
            errors[0].add_note(str(one))
        if errors:
            raise errors[0]


def _let_go(
    rest: Rest, guardian: Guardian, skipped: frozenset[str], say: Callable[[str], None]
) -> list[HookStopped | HookFailed]:
    outcome = guardian.release()
    rest.in_time = outcome.in_time
    rest.reasons += outcome.reasons
    for one in outcome.endings:
        _keep(rest, one.label, "end", one.output)
    errors, notes = troubles(outcome.endings, skipped)
    for note in notes:
        _note(rest, say, note)
    return errors


def _begun(
    hook: Hook,
    env: Mapping[str, str],
    rest: Rest,
    guardian: Guardian,
    *,
    deadline: float,
    until: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    say: Callable[[str], None],
) -> bool:
    """Run a begin, as often as it takes; whether its application is at rest. Raises HookStopped, HookFailed."""
    tried = 0
    while True:
        seconds = begin_seconds(deadline, until - clock())
        if seconds <= 0 or rest.over():
            raise HookFailed(hook=hook.name, phase="begin", reason=f"no time was left of its {deadline:g} s")
        tried += 1
        status, why, output = _run_begin(hook, env, guardian, seconds, until - clock())
        then = after_begin(status, tried, begin_seconds(deadline, until - clock()))
        if then is Next.GO_ON:
            _keep(rest, hook.name, "begin", output)
            return True
        if then is Next.SKIP:
            _note(rest, say, f"Hook {hook.name} was left out: it said so (exit status {SKIP}){_told(why)}.")
            return False
        if then is Next.STOP:
            stopped = HookStopped(hook=hook.name, phase="begin")
            if why:
                stopped.add_note(why)
            raise stopped
        if then is Next.FAIL:
            raise HookFailed(hook=hook.name, phase="begin", reason=why)
        say(f"Hook {hook.name} failed in its phase begin ({why}); it is tried again.")
        sleep(PAUSE_SECONDS)


def _run_begin(
    hook: Hook, env: Mapping[str, str], guardian: Guardian, seconds: float, left: float
) -> tuple[int | None, str, str]:
    """Exit status (None: it did not end by itself), why or what it said, and what it printed."""
    given = dict(env) | {"BLOCKBAK_PHASE": "begin", "BLOCKBAK_DEADLINE": str(int(left) + 1)}
    try:
        with guardian.minding([hook.path]) as argv:
            done = runner.run(argv, deadline=seconds, env=given, accept=range(256))
    except CommandFailed as error:
        said = str(error.fields["stderr"])
        return None, f"{error.fields['status']}" + (f" ({said})" if said else ""), ""
    said = done.stderr[-runner.STDERR_TAIL :]
    why = said if done.status in (0, SKIP, STOP) else _why(done.status, "", said)
    return done.status, why, done.output[:OUTPUT_BYTES].decode("utf-8", "replace")


def _ending(hook: Hook, env: Mapping[str, str]) -> Ending:
    given = dict(env) | {"BLOCKBAK_PHASE": "end", "BLOCKBAK_DEADLINE": f"{END_SECONDS:g}"}
    return Ending((hook.path,), tuple(sorted(given.items())), END_SECONDS, hook.name)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What both phases see: the person's own settings, with the runner's locale and places of programs."""
    kept = {name: value for name, value in environ.items() if name not in ("LANGUAGE", "LANG")}
    return kept | {"LC_ALL": "C", "PATH": runner.search_path()}


def _keep(rest: Rest, label: str, phase: str, output: str) -> None:
    if output:
        rest.outputs.append((f"{label} {phase}", output))


def _note(rest: Rest, say: Callable[[str], None], note: str) -> None:
    rest.notes.append(note)
    say(note)


def _told(why: str) -> str:
    return f": {why}" if why else ""
