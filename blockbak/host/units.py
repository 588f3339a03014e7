"""systemd's units: what they are, what goes with them, stopped and started again, through systemctl."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockbak.errors import CommandFailed, NoSuchUnit, NoSystemd, UnitNotStopped, UnitRestarted
from blockbak.host import runner
from blockbak.model.scene import Unit

SHOW_SECONDS = 30.0
STOP_SECONDS = 90.0
"""Beside the longest TimeoutStopUSec of those that are stopped."""
START_SECONDS = 180.0
JOB_PAUSE_SECONDS = 0.5

_SUFFIXES = (
    ".automount", ".device", ".mount", ".path", ".scope", ".service", ".slice", ".socket", ".swap", ".target", ".timer",
)  # fmt: skip
_TRIGGERS = ("TriggeredBy",)
_STOPPED_WITH = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
"""What systemd stops with a unit (systemd, unit-dependency-atom.c, UNIT_ATOM_PROPAGATE_STOP)."""
_STARTED_WITH = ("Wants", "Requires", "BindsTo", "Upholds")
_PROPERTIES = ("Id", "LoadState", "ActiveState", "Job", "TimeoutStopUSec", *_TRIGGERS, *_STOPPED_WITH, *_STARTED_WITH)
_RUNS = frozenset({"active", "activating", "reloading", "refreshing"})
_CANCELED = "canceled"
"""Said where a start took the place of the stop (systemd, bus-wait-for-jobs.c)."""
_FIRST = (".path", ".socket", ".timer")
"""Started before the rest: a service that has its socket already would be refused it."""

_CORE = re.compile(
    r"init\.scope|-\.slice|(sshd?|dbus|dbus-broker)(@.*)?\.(service|socket)"
    r"|systemd-(journald|udevd|logind|networkd|resolved)[a-z-]*(@.*)?\.(service|socket)"
)
_OF_SESSIONS = re.compile(r"session-.*\.scope|user(-runtime-dir)?@.*\.service|user-.*\.slice|user\.slice")
_SPANS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SPAN = re.compile(r"([\d.]+)(us|ms|min|s|h|d|w)")


@dataclass(frozen=True, slots=True)
class Failure:
    """A unit that does not run after it was started, and what systemd calls its state."""

    name: str
    state: str


class Units:
    """What systemd says, and what it is told. ``root`` is ``/`` or a recorded tree, ``run`` and ``sleep`` are for
    tests.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        run: Callable[..., runner.Completed] = runner.run,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root, self._run, self._sleep = root, run, sleep

    @property
    def running(self) -> bool:
        """Whether systemd runs this machine (sd_booted(3))."""
        return (self._root / "run/systemd/system").is_dir()

    @property
    def stamps(self) -> str:
        """Where systemd keeps when a persistent timer last fired (systemd.timer(5)); ``systemctl clean`` needs D-Bus,
        which not every machine has.
        """
        return str(self._root / "var/lib/systemd/timers")

    # --- what they are ---------------------------------------------------------------------------------

    def look(self, names: Iterable[str], *, strict: bool = False) -> Mapping[str, Unit]:
        """The units of these names with what goes with each, and all of these too, by their full names; one that
        was asked for by an alias is there under that as well.

        Empty where systemd does not run. With ``strict``, raises NoSuchUnit for a name that systemd does not know,
        and NoSystemd where it does not run; else such names are left out. Raises CommandFailed.
        """
        asked = {name: full_name(name) for name in names}
        if not asked:
            return {}
        if not self.running:
            if strict:
                raise NoSystemd(unit=next(iter(asked)))
            return {}
        shown: dict[str, dict[str, str]] = {}
        pending = [full for full in dict.fromkeys(asked.values()) if is_name(full)]
        while pending:
            shown |= self._show(pending)
            # What does not run takes nothing with it; what was asked for is looked at all the same.
            some = [one for name, one in shown.items() if name in asked.values() or _runs(one)]
            near = [other for one in some for other in _near(one)]
            pending = [name for name in dict.fromkeys(near) if name not in shown]
        if strict:
            for name, full in asked.items():
                if full not in shown or not _is_known(shown[full]):
                    raise NoSuchUnit(unit=name)
        own = self.own
        found = {
            one["Id"]: Unit(one["Id"], _runs(one), _also(one["Id"], shown), protected(one["Id"], own))
            for one in shown.values()
            if _is_known(one)
        }
        by_alias = {name: found[shown[full]["Id"]] for name, full in asked.items() if _is_known(shown.get(full, {}))}
        return found | by_alias

    def _show(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The properties of units, by the name asked for; one call for all of them."""
        done = self._run(
            ["systemctl", "show", f"--property={','.join(_PROPERTIES)}", "--", *names], deadline=SHOW_SECONDS
        )
        blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in _blocks(done)]
        # One block a name, in their order (systemctl-show.c); not so, nothing could be told from it.
        if len(blocks) != len(names) or not all(block.get("Id") for block in blocks):
            raise CommandFailed(program="systemctl", status=done.status, stderr="its answer is not to be understood")
        found = dict(zip(names, blocks, strict=True))
        return found | {block["Id"]: block for block in blocks}

    @property
    def own(self) -> frozenset[str]:
        """The units that blockbak and those who started it run in."""
        found: set[str] = set()
        pid, seen = "self", 0
        while pid not in ("", "0") and seen < 1000:
            found |= units_of(self._text(f"proc/{pid}/cgroup"))
            status = self._text(f"proc/{pid}/status")
            pid = next((line.split()[1] for line in status.splitlines() if line.startswith("PPid:")), "")
            seen += 1
        return frozenset(found)

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return ""

    def states(self, names: Sequence[str]) -> dict[str, str]:
        """What systemd calls each unit's state (``active``, ``inactive``, ``failed``, …). Raises CommandFailed."""
        shown = self._show(names) if names else {}
        return {name: shown[name].get("ActiveState", "") for name in names}

    def active(self, names: Sequence[str]) -> list[str]:
        """Those that run, or are about to. Raises CommandFailed."""
        return [name for name, state in self.states(names).items() if state in _RUNS]

    def pulled(self, names: Sequence[str]) -> list[str]:
        """What does not run, and would be started together with any of these. Raises CommandFailed."""
        shown = self._show(names) if names else {}
        near = dict.fromkeys(
            name for one in shown.values() for key in _STARTED_WITH for name in one.get(key, "").split()
        )
        states = self.states([name for name in near if name not in names])
        return [name for name, state in states.items() if state not in _RUNS]

    # --- what they are told ----------------------------------------------------------------------------

    def stop(self, names: Sequence[str], check: Callable[[], None] = lambda: None) -> None:
        """Stop them all in one go and see that they are. Raises UnitNotStopped, UnitRestarted, MissingProgram,
        CommandFailed, and what ``check`` raises.
        """
        shown = self._show(names)
        limit = STOP_SECONDS + max((seconds(shown[name].get("TimeoutStopUSec", "")) for name in names), default=0.0)
        try:
            self._run(["systemctl", "stop", "--", *names], deadline=limit, check=check)
        except CommandFailed as error:
            states = self.states(names)
            left = next((name for name in names if states[name] not in ("inactive", "failed")), names[0])
            if _CANCELED in _reason(error) and states[left] in _RUNS:
                # Somebody's start came while systemd was still stopping it.
                raise UnitRestarted(unit=left, reason=f"it is {states[left]}") from error
            raise UnitNotStopped(unit=left, reason=_reason(error)) from error
        self.check_stopped(names)

    def check_stopped(self, names: Sequence[str]) -> None:
        """See that none of them runs. Raises UnitRestarted, UnitNotStopped, CommandFailed."""
        for name, state in self.states(names).items():
            if state in _RUNS:
                raise UnitRestarted(unit=name, reason=f"it is {state}")
            if state not in ("inactive", "failed"):
                raise UnitNotStopped(unit=name, reason=f"it is {state}")

    def _wait_for_jobs(self, names: Sequence[str]) -> None:
        """Who was killed while it had them stopped leaves jobs that go on: what runs still may be about to end."""
        for _ in range(int(STOP_SECONDS / JOB_PAUSE_SECONDS)):
            if not any(one.get("Job", "0") not in ("", "0") for one in (self._show(names) if names else {}).values()):
                return
            self._sleep(JOB_PAUSE_SECONDS)

    def start(self, names: Sequence[str]) -> tuple[list[str], list[Failure]]:
        """Start those that do not run. Gives those that were started, and those that do not run even so.

        Raises MissingProgram, CommandFailed.
        """
        self._wait_for_jobs(names)
        running = set(self.active(names))
        missing = [name for name in names if name not in running]
        first = [name for name in missing if name.endswith(_FIRST)]
        targets = [name for name in missing if name.endswith(".target")]
        others = [name for name in missing if name not in first and name not in targets]
        # One after the other: the jobs of one call are begun before all of them are known. A target would start
        # whatever it wants, also what did not run before.
        for words, some in (((), first), ((), others), (("--job-mode=ignore-dependencies",), targets)):
            if some:
                # Any status: what came of it is asked for below, for each.
                self._run(["systemctl", "start", *words, "--", *some], deadline=START_SECONDS, accept=range(256))
        states = self.states(missing)
        failed = [Failure(name, state) for name, state in states.items() if state not in _RUNS]
        return [name for name in missing if states[name] in _RUNS], failed


# --- names and words ---------------------------------------------------------------------------------------


def full_name(name: str) -> str:
    """A unit's name with its suffix: ``postgresql`` is ``postgresql.service``."""
    return name if name.endswith(_SUFFIXES) else f"{name}.service"


def is_name(name: str) -> bool:
    """Whether it can be the name of one unit, and is neither a pattern nor an option."""
    return re.fullmatch(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*|-\.(mount|slice)", name) is not None


def protected(name: str, own: Collection[str]) -> str:
    """Why a unit is never stopped; "" where it may be. ``own`` are those that blockbak runs in."""
    if name in own:
        return "blockbak itself runs in it, or who started it"
    if _CORE.fullmatch(name):
        return "the system and the way into it need it"
    if _OF_SESSIONS.fullmatch(name):
        return "it is somebody's session"
    if name.endswith(".slice"):
        return "it is a group of other units"
    return ""


def units_of(cgroup: str) -> set[str]:
    """The units in a /proc/PID/cgroup: all of those that are nested there."""
    found = set()
    for line in cgroup.splitlines():
        # "0::" is the unified tree, "N:name=systemd:" systemd's own in the older arrangement (cgroups(7)).
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers in ("", "name=systemd"):
            found |= {part for part in path.split("/") if part.endswith((".service", ".scope", ".slice"))}
    return found


def seconds(span: str) -> float:
    """A time span as systemctl prints it (``1min 30s``); 0 for ``infinity``, for which there is no waiting."""
    return sum(float(number) * _SPANS[unit] for number, unit in _SPAN.findall(span))


def _blocks(done: runner.Completed) -> list[str]:
    return [block for block in done.stdout.split("\n\n") if block.strip()]


def _is_known(shown: Mapping[str, str]) -> bool:
    return bool(shown) and (shown.get("LoadState") != "not-found" or _runs(shown))


def _runs(shown: Mapping[str, str]) -> bool:
    return shown.get("ActiveState") in _RUNS


def _near(shown: Mapping[str, str]) -> list[str]:
    return [name for key in (*_TRIGGERS, *_STOPPED_WITH) for name in shown.get(key, "").split()]


def _also(name: str, shown: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """The active units that go with one, however far away."""
    found = {name: None}
    pending = [name]
    for one in pending:  # grows as it is walked
        for other in _near(shown[one]):
            if other not in shown:
                continue  # beyond a unit that does not run, and takes nothing with it
            full = shown[other]["Id"]
            if full not in found and _runs(shown[full]):
                found[full] = None
                pending.append(full)
    return tuple(found)[1:]


def _reason(error: CommandFailed) -> str:
    said = str(error.fields["stderr"]).splitlines()
    return said[0].rstrip(".") if said else f"systemctl: {error.fields['status']}"
