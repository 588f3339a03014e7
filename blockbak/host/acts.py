"""The steps that bring a device to rest, one by one: looked at, done, undone.

What is seen before a step is done goes into the journal with it. Undoing looks first, and does only what is not so
already: it may be the second who undoes, or the machine may have been started anew in between.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockbak.errors import (
    BlockbakError,
    CommandFailed,
    FrozenAlready,
    HookFailed,
    HookStopped,
    NotPutBack,
    ProcessStays,
    StateUnusable,
    StillInUse,
    UnitRestarted,
)
from blockbak.host import guard, hooks, mounts, runner
from blockbak.host.guardian import MINDED, PROGRAM, Ending, Guardian, guarded
from blockbak.host.hooks import Next
from blockbak.host.journal import Begun, Writer
from blockbak.host.kernel import Kernel
from blockbak.host.proc import unescape
from blockbak.host.system import System
from blockbak.host.units import Units
from blockbak.model.quiesce import (
    MEMORY_SPARE,
    Deactivate,
    DetachLoop,
    EndProcess,
    Freeze,
    ReadOnly,
    RunHook,
    Step,
    StopUnits,
    SwapOff,
    Unexport,
    Unmount,
)

END_SECONDS = 10.0
"""Between asking a process to end and killing it, and between that and giving up on it."""
LOOP_SECONDS = 3.0
"""How long a loop device may take to go: udev looks at devices whenever they change."""
SWAP_SECONDS = 3600.0
FREEZE_SECONDS = 120.0
THAW_SECONDS = 30.0
VOLUME_SECONDS = 600.0
PAUSE_SECONDS = 0.1

_ETAB = "var/lib/nfs/etab"
_LVM = {"LVM_SUPPRESS_FD_WARNINGS": "1"}
_LOOP_GET_STATUS64, _LOOP_SET_STATUS64 = 0x4C05, 0x4C04
_LO_FLAGS_AUTOCLEAR = 4
_LOOP_INFO = struct.Struct("=52xI176x")
"""linux/loop.h, struct loop_info64: of its 232 bytes, lo_flags."""
# The mark says that the file system may be ours to thaw: it goes again where somebody else had frozen it.
_THAW_MARKED = '[ -e "$1" ] || exit 0; exec "$2" --unfreeze "$3"'


def never() -> None:
    """Nobody asks to stop."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where journals lie, and how things are done. ``find`` gives the node of an ``identity`` of a step after the
    machine was started anew, or "". ``unit_dir`` is where the unit for the boot is written. The rest is for tests.
    """

    state_dir: str
    run_dir: str
    boot: str
    host: str = ""
    find: Callable[[str], str] | None = None
    unit_dir: str = "/etc/systemd/system"
    kernel: Kernel = field(default_factory=Kernel)
    run: Callable[..., runner.Completed] = runner.run
    sleep: Callable[[float], None] = time.sleep
    program: Sequence[str] = PROGRAM
    root: Path = Path("/")

    @property
    def units(self) -> Units:
        """systemd, as it is reached from here."""
        return Units(self.root, self.run)


@dataclass(slots=True)
class Acts:
    """All steps of one run, which ``writer`` notes; ``boot`` is the one they were done in.

    ``scratch`` is for hooks. ``outputs`` is what they printed, ``hook_errors`` what their ends said.
    """

    machine: Machine
    run_id: str
    device: str
    boot: str
    scratch: str
    writer: Writer
    say: Callable[[str], None] = lambda _: None
    check: Callable[[], None] = never
    who: Callable[[str], str] = lambda _: ""
    deadline: float = 0.0
    guardian: Guardian | None = None
    in_time: bool = True
    notes: list[str] = field(default_factory=list)
    outputs: list[tuple[str, str]] = field(default_factory=list)
    hook_errors: list[HookStopped | HookFailed] = field(default_factory=list)
    _places_lost: bool = False

    @property
    def begun(self) -> Sequence[Begun]:
        """The steps that may have been done so far."""
        return self.writer.begun

    # --- looked at -------------------------------------------------------------------------------------

    def look(self, step: Step) -> dict[str, Any]:
        """What undoing the step will need to know. Raises CommandFailed."""
        machine = self.machine
        match step:
            case StopUnits():
                active = machine.units.active(step.units)
                return {"active": active, "pulled": machine.units.pulled(active)}
            case Unexport():
                return {"exported": (step.path, step.client) in _exported(machine.root)}
            case SwapOff():
                return {"on": step.path in _swaps(), "instance": mounts.instance(step.path, System())}
            case Unmount():
                return mounts.look(step)
            case DetachLoop():
                name = os.path.basename(step.node)
                # It may have gone with the mount that was on it.
                gone = any(
                    isinstance(one.step, Unmount) and one.step.source == step.node and one.seen["autoclear"]
                    for one in self.begun
                )
                return {
                    "attached": gone or _loop_of(step) == step.node,
                    "autoclear": System().attribute(name, "loop/autoclear") == "1",
                }
            case ReadOnly():
                return mounts.look_read_only(step)
            case Deactivate():
                return {"active": _active(step, System(machine.root))}
            case _:
                return {}

    # --- done ------------------------------------------------------------------------------------------

    def act(self, begun: Begun) -> str:
        """Do it; a sentence. Where it was so already nothing is done. Raises what says why it could not be."""
        step, seen = begun.step, begun.seen
        machine = self.machine
        match step:
            case RunHook():
                return self._begin_hook(step)
            case StopUnits():
                machine.units.stop(step.units, self.check)
                return f"Stopped {', '.join(seen['active']) or 'nothing: no unit ran any more'}."
            case EndProcess():
                return self._end(step)
            case Unexport():
                if seen["exported"]:
                    machine.run(["exportfs", "-u", _client(step)])
                return f"{step.path} is no longer exported to {step.client}."
            case SwapOff():
                if seen["on"]:
                    machine.run(["swapoff", "--", step.path], deadline=SWAP_SECONDS, check=self.check)
                return f"{step.path} is no longer swapped to."
            case Unmount():
                mounts.unmount(step, machine.run, self.check, self.who, machine.sleep)
                return f"{step.target} is unmounted."
            case DetachLoop():
                self._detach(step)
                return f"{step.node} is detached from {step.file}."
            case ReadOnly():
                mounts.make_read_only(step, machine.run, self.check, self.who, machine.sleep)
                return f"{step.target} takes no writes."
            case Freeze():
                self._freeze(step, self._mark(begun.number))
                return f"{step.target} is frozen."
            case Deactivate():
                self._deactivate(step, seen)
                return f"{', '.join(seen['active']) or step.group} is no longer active."

    def _begin_hook(self, step: RunHook) -> str:
        os.makedirs(os.path.join(self.scratch, guard.RUNNING), mode=0o700, exist_ok=True)
        tried = 0
        while True:
            tried += 1
            status, why, output = self._run_hook(step, "begin", self.deadline)
            then = hooks.after_begin(status, tried, self.deadline)
            if output:
                self.outputs.append((f"{step.name} begin", output))
            if then is Next.GO_ON:
                return f"Hook {step.name} was run."
            if then is Next.SKIP:
                note = f"Hook {step.name} was left out: it said so (exit status {hooks.SKIP})."
                self.notes.append(note)
                return note
            if then is Next.STOP:
                raise HookStopped(hook=step.name, phase="begin")
            if then is Next.FAIL:
                raise HookFailed(hook=step.name, phase="begin", reason=why)
            self.say(f"Hook {step.name} failed in its phase begin ({why}); it is tried again.")
            self.machine.sleep(hooks.PAUSE_SECONDS)
            self.check()

    def _run_hook(self, step: RunHook, phase: str, limit: float) -> tuple[int | None, str, str]:
        """Exit status (None: it did not end by itself), why, and what it printed."""
        env = {
            **dict(step.environment), "BLOCKBAK_PHASE": phase, "BLOCKBAK_RUN": self.run_id,
            "BLOCKBAK_HOOK_DIR": os.path.join(self.scratch, "hook"), "BLOCKBAK_DEADLINE": str(int(limit)),
        }  # fmt: skip
        os.makedirs(env["BLOCKBAK_HOOK_DIR"], mode=0o700, exist_ok=True)
        argv, check = [step.path], never
        link = os.path.join(self.scratch, guard.RUNNING, "process")
        if phase == "begin":
            argv, check = ["/bin/sh", "-c", MINDED, "sh", link, step.path], self.check
        try:
            done = self.machine.run(argv, deadline=limit, env=env, accept=range(256), check=check)
        except CommandFailed as error:
            return None, f"{error.fields['status']} {error.fields['stderr']}".strip(), ""
        finally:
            with contextlib.suppress(OSError):
                os.unlink(link)
        said = done.stderr[-runner.STDERR_TAIL :]
        why = f"exit status {done.status}" + (f" ({said})" if said else "")
        return done.status, why, done.output[: guard.OUTPUT_BYTES].decode("utf-8", "replace")

    def _end(self, step: EndProcess) -> str:
        try:
            descriptor = os.pidfd_open(step.pid)
        except ProcessLookupError:
            return f"Process {step.pid} ({step.name}) had ended."
        try:
            # Looked at once it is held: its number cannot become another's any more.
            if _started(step.pid) != step.started:
                return f"Process {step.pid} ({step.name}) had ended."
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, number)
                if self._ended(descriptor):
                    how = "ended" if number == signal.SIGTERM else "killed: it did not end when it was asked to"
                    return f"Process {step.pid} ({step.name}) was {how}."
        finally:
            os.close(descriptor)
        raise ProcessStays(pid=step.pid, name=step.name)

    def _ended(self, descriptor: int) -> bool:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        until = time.monotonic() + END_SECONDS
        while (left := until - time.monotonic()) > 0:
            if poll.poll(min(left, PAUSE_SECONDS) * 1000):
                return True
            self.check()
        return False

    def _detach(self, step: DetachLoop) -> None:
        if _loop_of(step) != step.node:
            return
        self.machine.run(["losetup", "--detach", step.node])
        until = time.monotonic() + LOOP_SECONDS
        # It is only marked to go while anybody has it open.
        while _loop_of(step) == step.node:
            if time.monotonic() >= until:
                raise StillInUse(path=step.node, holders=self.who(step.node) or "nobody was found who does")
            self.check()
            self.machine.sleep(PAUSE_SECONDS)

    def _freeze(self, step: Freeze, mark: str) -> None:
        with open(mark, "xb"):
            pass
        try:
            self.machine.run(["fsfreeze", "--freeze", step.target], deadline=FREEZE_SECONDS)
        except CommandFailed as error:
            if "busy" not in str(error.fields["stderr"]):
                raise
            os.unlink(mark)
            raise FrozenAlready(path=step.target) from error

    @property
    def _marks(self) -> str:
        return os.path.join(os.path.abspath(self.machine.run_dir), f"rest-{self.run_id}")

    def _mark(self, number: int) -> str:
        return os.path.join(self._marks, str(number))

    @contextmanager
    def watched(self, freezes: Sequence[tuple[int, Freeze]]) -> Iterator[None]:
        """A guardian that thaws what these steps freeze: at the deadline, or when blockbak dies. Raises NoGuardian,
        MissingProgram.
        """
        program = runner.which("fsfreeze") or "fsfreeze"
        env = (("LC_ALL", "C"), ("PATH", runner.search_path()))
        endings = [
            Ending(
                ("/bin/sh", "-c", _THAW_MARKED, "sh", self._mark(number), program, step.target),
                env, THAW_SECONDS, f"thaw {step.target}",
            )
            for number, step in reversed(freezes)
        ]  # fmt: skip
        machine = self.machine
        with guarded(
            (), endings, deadline=self.deadline, run_dir=machine.run_dir, boot=machine.boot, scratch=self._marks,
            program=machine.program,
        ) as self.guardian:  # fmt: skip
            yield

    def _deactivate(self, step: Deactivate, seen: Mapping[str, Any]) -> None:
        if not seen["active"]:
            return
        argv = ["lvchange", "--activate", "n", "--", *seen["active"]]
        try:
            self.machine.run(argv, deadline=VOLUME_SECONDS, env=_LVM)
        except CommandFailed as error:
            if "in use" not in str(error.fields["stderr"]):
                raise
            holders = self.who(step.group) or str(error.fields["stderr"]).splitlines()[0].strip()
            raise StillInUse(path=step.group, holders=holders) from error

    # --- undone ----------------------------------------------------------------------------------------

    def undo(self, begun: Begun) -> list[str]:
        """Undo it as far as it is not undone; sentences. Raises NotPutBack, CommandFailed, and other errors that say
        why it could not be.
        """
        step, seen = begun.step, dict(begun.seen)
        try:
            return self._undo(begun, step, seen)
        except Exception:
            # Whatever lies there must not be started on an empty directory.
            self._places_lost |= isinstance(step, Unmount | DetachLoop | ReadOnly | Deactivate)
            raise

    def _undo(self, begun: Begun, step: Step, seen: dict[str, Any]) -> list[str]:
        match step:
            case RunHook():
                return self._end_hook(step)
            case StopUnits():
                return self._start(seen)
            case EndProcess():
                return [f"Process {step.pid} ({step.name}) was ended; nothing starts it again."]
            case Unexport():
                return self._export(step, seen)
            case SwapOff():
                return self._swap_on(begun, step, seen)
            case Unmount():
                return self._mount(step, seen)
            case DetachLoop():
                return self._attach(step, seen)
            case ReadOnly():
                return mounts.make_writable(step, seen, self.machine.run)
            case Freeze():
                return self._thaw(step)
            case Deactivate():
                return self._activate(seen)

    def _end_hook(self, step: RunHook) -> list[str]:
        try:
            reason = hooks.unsafe(hooks.way_to(step.path))
        except OSError as error:
            reason = f"it cannot be looked at: {error.strerror}"
        if reason:
            raise NotPutBack(what=f"what hook {step.name} began", reason=f"{step.path} is not run: {reason}")
        # A begin that outlived who began it would bring to rest what its end lets go.
        guard.stop_running(self.scratch)
        status, why, output = self._run_hook(step, "end", hooks.END_SECONDS)
        if output:
            self.outputs.append((f"{step.name} end", output))
        if status in (0, hooks.SKIP):
            return [f"Hook {step.name} was run once more, for its end."]
        # An end that says no says it every time: it is not tried again.
        stopped = HookStopped(hook=step.name, phase="end")
        self.hook_errors.append(
            stopped if status == hooks.STOP else HookFailed(hook=step.name, phase="end", reason=why)
        )
        return []

    def _start(self, seen: Mapping[str, Any]) -> list[str]:
        names = list(seen.get("active", ()))
        if not names:
            return []
        units = self.machine.units
        if self._places_lost:
            waiting = [name for name in names if name not in units.active(names)]
            if not waiting:
                return []
            raise NotPutBack(what=", ".join(waiting), reason="not all that lies below was put back")
        started, failed = units.start(names)
        if failed:
            said = ", ".join(f"{one.name} ({one.state})" for one in failed)
            raise NotPutBack(what=said, reason="started, it does not run")
        more = units.active(seen.get("pulled", ())) if started else []
        beside = [f"{name} was started with them: not all is quite as before." for name in more]
        return [f"Started {', '.join(started)}.", *beside] if started else []

    def _export(self, step: Unexport, seen: Mapping[str, Any]) -> list[str]:
        if not seen.get("exported") or (step.path, step.client) in _exported(self.machine.root):
            return []
        options = ["-o", step.options] if step.options else []
        self.machine.run(["exportfs", *options, _client(step)])
        return [f"{step.path} is exported to {step.client} again."]

    def _swap_on(self, begun: Begun, step: SwapOff, seen: Mapping[str, Any]) -> list[str]:
        path = self._source(step.path, step.identity, seen)
        said = []
        if seen.get("on") and path not in _swaps():
            priority = [f"--priority={step.priority}"] if step.priority >= 0 else []
            mounts.patiently(["swapon", *priority, "--", path], self.machine.run, SWAP_SECONDS)
            said.append(f"{path} is swapped to again.")
        # Once all are back: each that comes back goes behind those that are there.
        off = [one for one in self.begun if isinstance(one.step, SwapOff) and not one.seen.get("moved")]
        if off and off[0].number == begun.number and self.boot == self.machine.boot:
            said += self._in_order([one.step for one in off if isinstance(one.step, SwapOff)])
        return said

    def _in_order(self, areas: Sequence[SwapOff]) -> list[str]:
        """Have areas whose priority the kernel gave come in the order they had."""
        now = _swaps()
        order = _swap_order([one for one in areas if one.priority < 0 and one.path in now], now)
        given = [now[path].priority for path in order]
        first = next((at for at in range(1, len(given)) if given[at] >= given[at - 1]), len(order))
        for path in order[first:]:
            used = now[path].used
            if used and used + MEMORY_SPARE > _available():
                return [f"{path} comes before other swap now: {used} bytes are swapped to it, too much to move it."]
            # It is none of those that were given up: who is killed in between must leave word of it. A journal that
            # cannot be written any more must not keep things from being put back.
            with contextlib.suppress(StateUnusable):
                self.writer.begin(SwapOff(path, now[path].priority), {"on": True, "moved": True})
            self.machine.run(["swapoff", "--", path], deadline=SWAP_SECONDS)
            mounts.patiently(["swapon", "--", path], self.machine.run, SWAP_SECONDS)
            with contextlib.suppress(StateUnusable):
                self.writer.back(self.writer.begun[-1].number)
        return []

    def _mount(self, step: Unmount, seen: dict[str, Any]) -> list[str]:
        if not seen.get("count") or step.fstype == "autofs":
            return []  # what mounts by itself comes back with its unit
        said = self._mounted_by_unit(step)
        source = self._source(step.source, step.identity, seen) if step.source.startswith("/") else step.source
        said += mounts.mount_again(step, seen, source, self.machine.run, self.machine.run_dir)
        if seen.get("autoclear"):
            _set_autoclear(source, on=True)
        return said

    def _mounted_by_unit(self, step: Unmount) -> list[str]:
        """A mount that systemd makes at its first use: its automount cannot be started once it is mounted."""
        stopped = {name for one in self.begun for name in one.seen.get("active", ()) if name.endswith(".automount")}
        if not stopped:
            return []
        name = self.machine.run(["systemd-escape", "--path", step.target]).stdout.strip()
        if f"{name}.automount" not in stopped:
            return []
        units = self.machine.units
        started, failed = units.start([f"{name}.automount"])
        units.start([f"{name}.mount"])
        if failed:
            raise NotPutBack(what=failed[0].name, reason=f"started, it is {failed[0].state}")
        return [f"Started {one}." for one in started]

    def _source(self, path: str, identity: str, seen: Mapping[str, Any]) -> str:
        """The device of a step by its name of now. Raises NotPutBack."""
        for one in self.begun:
            # Its number may be taken, so that it came back under another.
            if isinstance(one.step, DetachLoop) and (path == one.step.node or path.startswith(f"{one.step.node}p")):
                node = _loop_of(one.step)
                if node is None:
                    raise NotPutBack(what=path, reason=f"{one.step.file} is not attached to a loop device")
                return node + path.removeprefix(one.step.node)
        if not identity or self.machine.find is None:
            return path
        if self.boot == self.machine.boot and seen.get("instance") in (None, mounts.instance(path, System())):
            return path
        # Another device may have its name, since the machine was started or since a disk was plugged in again.
        found = self.machine.find(identity)
        if not found:
            raise NotPutBack(what=path, reason=f"its device ({identity}) is not there any more")
        return found

    def _attach(self, step: DetachLoop, seen: Mapping[str, Any]) -> list[str]:
        if not seen.get("attached"):
            return []
        node = _loop_of(step)
        if node is not None:
            # It may have been told to go, and still be held by somebody.
            _set_autoclear(node, on=bool(seen.get("autoclear")))
            return []
        wanted = step.node if not System().attribute(os.path.basename(step.node), "loop/backing_file") else ""
        argv = [
            "losetup", f"--offset={step.offset}", f"--sector-size={step.sector}",
            *([f"--sizelimit={step.size_limit}"] if step.size_limit else []),
            *(["--read-only"] if step.read_only else []),
            *(["--direct-io=on"] if step.direct else []),
            *(["--partscan"] if step.partitions else []),
            *([wanted] if wanted else ["--find", "--show"]), step.file,
        ]  # fmt: skip
        done = self.machine.run(argv)
        node = wanted or done.stdout.strip()
        said = [f"{node} is attached to {step.file} again."]
        return said if wanted else [*said, f"{step.node} had been taken by something else."]

    def _thaw(self, step: Freeze) -> list[str]:
        outcome = self.guardian.release() if self.guardian is not None else None
        if outcome is not None:
            self.in_time = self.in_time and outcome.in_time
        try:
            self.machine.run(["fsfreeze", "--unfreeze", step.target], deadline=THAW_SECONDS)
        except CommandFailed as error:
            # The guardian, who comes first, has done it (fs/super.c: what is not frozen is EINVAL).
            if "Invalid argument" not in str(error.fields["stderr"]) and os.path.ismount(step.target):
                raise
        return [f"{step.target} is no longer frozen."]

    def _activate(self, seen: Mapping[str, Any]) -> list[str]:
        system = System(self.machine.root)
        missing = [label for label in seen.get("active", ()) if not system.volume(*_label(label))]
        if not missing:
            return []
        # Those that are never activated by themselves too: they were active.
        argv = ["lvchange", "--activate", "y", "--ignoreactivationskip", "--", *missing]
        self.machine.run(argv, deadline=VOLUME_SECONDS, env=_LVM)
        return [f"{', '.join(missing)} is active again."]

    # --- looked at again -------------------------------------------------------------------------------

    def restarted(self) -> UnitRestarted | None:
        """The unit that was stopped and runs again, if there is one."""
        for one in self.begun:
            if isinstance(one.step, StopUnits):
                try:
                    self.machine.units.check_stopped(one.step.units)
                except UnitRestarted as error:
                    return error
                except BlockbakError:
                    continue
        return None

    def disturbed(self, begun: Begun) -> str:
        """What is no longer as the step left it, in words; "" where all is. Raises UnitRestarted, UnitNotStopped."""
        step, seen = begun.step, begun.seen
        match step:
            case StopUnits():
                self.machine.units.check_stopped(step.units)
            case SwapOff() if step.path in _swaps():
                return "it is swapped to again"
            case Unmount() if seen.get("count") and mounts.present(step, step.source, System()) >= seen["count"]:
                return "it was mounted again"
            case DetachLoop() if _loop_of(step) is not None:
                return f"it is attached to {step.file} again"
            case Deactivate() if _active(step, System(self.machine.root)):
                return "it is active again"
            case _:
                pass
        return ""


# --- what the machine says -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Swap:
    used: int
    priority: int


def _swaps() -> dict[str, _Swap]:
    """Swap in use: bytes, priority (proc(5))."""
    rows = [row.split() for row in Path("/proc/swaps").read_text(encoding="utf-8").splitlines()[1:]]
    return {unescape(row[0]): _Swap(int(row[3]) << 10, int(row[4])) for row in rows if len(row) >= 5}


def _swap_order(areas: Sequence[SwapOff], now: Mapping[str, _Swap]) -> list[str]:
    """Areas that had been given up, and those that came after any of them, in the order they all had."""
    ranked = sorted(areas, key=lambda area: area.priority, reverse=True)
    own = {one.path for one in ranked}
    after = {path: at for at, one in enumerate(ranked) for path in one.below if path in now and path not in own}
    order = []
    for at, one in enumerate(ranked):
        # Among themselves they are still as they were.
        kept = sorted((path for path in after if after[path] == at), key=lambda path: -now[path].priority)
        order += [one.path, *kept]
    return order


def _available() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _exported(root: Path) -> set[tuple[str, str]]:
    """Path and client of what NFS exports (exportfs(8))."""
    from blockbak.host.occupants import parse_exports

    try:
        text = (root / _ETAB).read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return set()
    return {(path, client) for path, client, _ in parse_exports(text)}


def _client(step: Unexport) -> str:
    """Client and path as exportfs(8) takes them."""
    client = f"[{step.client}]" if ":" in step.client and not step.client.startswith("[") else step.client
    return f"{client}:{step.path}"


def _started(pid: int) -> int:
    """When a process was started, in clock ticks since boot; -1 where it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1
    # A name may hold anything, also blanks and brackets (proc(5)).
    return int(text.rpartition(")")[2].split()[19])


def _loop_of(step: DetachLoop) -> str | None:
    """The node of the loop device that shows just this part of the file now; the step's own if it is several."""
    system = System()
    found = [
        system.node(name)
        for name, file in system.loops.items()
        if file == step.file
        and system.number(name, "loop/offset") == step.offset
        and system.number(name, "loop/sizelimit") == step.size_limit
    ]
    return step.node if step.node in found else next(iter(found), None)


def _set_autoclear(node: str, *, on: bool) -> None:
    """Whether a loop device goes by itself with its last user, where it is not so already. Raises OSError."""
    if System().attribute(os.path.basename(node), "loop/autoclear") == str(int(on)):
        return
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = bytearray(fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO.size)))
        flags = _LOOP_INFO.unpack(info)[0]
        flags = flags | _LO_FLAGS_AUTOCLEAR if on else flags & ~_LO_FLAGS_AUTOCLEAR
        struct.pack_into("=I", info, 52, flags)
        fcntl.ioctl(fd, _LOOP_SET_STATUS64, bytes(info))
    finally:
        os.close(fd)


def _label(label: str) -> tuple[str, str]:
    group, _, volume = label.partition("/")
    return group, volume


def _active(step: Deactivate, system: System) -> list[str]:
    """Those of its volumes that are active."""
    return [label for label in step.volumes if system.volume(*_label(label))]
