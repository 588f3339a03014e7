"""The guardian: a process of its own that lets go of what is held still, whatever becomes of blockbak.

It is started as ``python3 -I -S guard.py`` with a socket to blockbak as its standard input, and speaks lines of
JSON over it. First come its orders (the fields of a journal, a deadline, where the journal lies); it answers
``ready`` or ``failed``. Then it waits for ``release``, for its deadline, or for the socket to close because
blockbak died: whichever is first, it resumes its devices, runs the end commands, and reports.

While devices are suspended nothing may have to be read from a disk. So it needs the standard library only, has
locked its memory before it says ``ready``, and imports nothing after that.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import time

TYPE_CHECKING = False  # `typing` itself is not needed here, and would be one more thing in locked memory
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, Protocol

    class State(Protocol):
        """What is known of a device."""

        @property
        def uuid(self) -> str: ...
        @property
        def suspended(self) -> bool: ...
        @property
        def unready(self) -> bool: ...

    class Resumer(Protocol):
        """What can say whether a device is suspended, and resume it. ``host.mapper.Mapper`` is one."""

        def info(self, name: str, /) -> State | None: ...
        def resume(self, name: str, /) -> None: ...


VERSION = 1
"""Of the journal."""
OUTPUT_BYTES = 64 << 10
"""What is kept of a command's standard output; the rest is dropped."""
MESSAGE_BYTES = 2000
"""What is kept of its messages, from their end."""
RESUME_TRIES = 5
RESUME_PAUSE_SECONDS = 0.2
GRACE_SECONDS = 2.0
"""Between asking a late command to end and killing it, and between that and giving up on it."""
RUNNING = "running"
"""A directory in the scratch directory: each link in it names a process group that works on blockbak's behalf."""
WATCH_SECONDS = 0.2
"""After the deadline: between two looks at whether blockbak, late itself, suspended a device once more."""

_CONTROL = "/dev/mapper/control"
# linux/dm-ioctl.h, as in host.mapper, which cannot be had here; a test compares the two.
_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7s")
_DM_VERSION = (4, 0, 0)
_SUSPEND, _STATUS = 6, 7
_FLAG_SUSPENDED = 1 << 1
_FLAG_TABLE, _FLAG_LOADED = 1 << 5, 1 << 6
_MCL_CURRENT, _MCL_FUTURE = 1, 2  # bits/mman-linux.h


class _Info:
    def __init__(self, uuid: str, *, suspended: bool, unready: bool) -> None:
        self.uuid, self.suspended, self.unready = uuid, suspended, unready


class Control:
    """Device-mapper's control device: just what a guardian needs. All of it raises OSError."""

    def __init__(self) -> None:
        self._fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)

    def info(self, name: str) -> _Info | None:
        """A device's uuid and whether it is suspended; None where there is none of that name."""
        try:
            answer = _HEADER.unpack(self._call(_STATUS, name))
        except OSError as error:
            if error.errno == 6:  # ENXIO; `errno` is not worth an import
                return None
            raise
        flags = answer[7]
        return _Info(
            _text(answer[12]),
            suspended=bool(flags & _FLAG_SUSPENDED),
            unready=flags & (_FLAG_TABLE | _FLAG_LOADED) == _FLAG_LOADED,
        )

    def resume(self, name: str) -> None:
        """Let it go on."""
        self._call(_SUSPEND, name)

    def _call(self, number: int, name: str) -> bytearray:
        size = _HEADER.size
        buffer = bytearray(
            _HEADER.pack(*_DM_VERSION, size, size, 0, 0, 0, 0, 0, 0, os.fsencode(name), b"", b""),
        )
        # _IOWR(DM_IOCTL, number, struct dm_ioctl), asm-generic/ioctl.h.
        fcntl.ioctl(self._fd, (3 << 30) | (size << 16) | (0xFD << 8) | number, buffer)
        return buffer


def _text(raw: bytes) -> str:
    return os.fsdecode(raw.split(b"\0", 1)[0])


# --- letting go, which blockbak does itself where a guardian is dead too ---------------------


def resume_all(
    mapper: Resumer, devices: Iterable[tuple[str, str]], sleep: Callable[[float], None] = time.sleep
) -> tuple[list[str], list[tuple[str, str]]]:
    """Resume every device (name, uuid) that is suspended, each in turn, whatever happens to the others.

    One that cannot be resumed is tried again. Gives sentences about those that are not as they should be, and
    the devices that may still be suspended.
    """
    left = list(devices)
    said: dict[str, str] = {}
    for attempt in range(RESUME_TRIES):
        if attempt:
            sleep(RESUME_PAUSE_SECONDS)
        left = [device for device in left if not _resumed(mapper, *device, said)]
        if not left:
            break
    return [*said.values()], left


def _resumed(mapper: Resumer, name: str, uuid: str, said: dict[str, str]) -> bool:
    """Whether nothing is left to be done for this device."""
    try:
        info = mapper.info(name)
        if info is None:
            said[name] = f"Device {name} is no longer there."
        elif info.uuid != uuid:
            said[name] = f"Device {name} is another one now ({info.uuid}, not {uuid}); it was left alone."
        # Never one that runs: with a table loaded by somebody else, resuming would exchange the tables.
        elif info.suspended:
            _resume_below(mapper, name, uuid)
            mapper.resume(name)
            said.pop(name, None)
    except Exception as error:  # noqa: BLE001 - the other devices must be resumed all the same
        said[name] = f"Device {name} could not be resumed: {getattr(error, 'strerror', None) or error}."
        return False
    return True


def _resume_below(mapper: Resumer, name: str, uuid: str) -> None:
    """What an lvcreate that came half-way has made below a volume goes on first: the volume may have a table loaded
    that leads there, and a device without a table in force answers with errors.
    """
    part = mapper.info(f"{name}-real")
    if part is not None and part.uuid == f"{uuid}-real" and (part.suspended or part.unready):
        mapper.resume(f"{name}-real")


def run_ending(end: Mapping[str, Any], meanwhile: Callable[[], object] | None = None) -> dict[str, Any]:
    """Run an end command (``argv``, ``env``, ``timeout``, ``label``) to its end or its timeout; ``meanwhile`` is
    called now and then while it runs.

    Gives ``label``; ``status`` (negative: a signal; None: it did not end by itself, and ``reason`` says why);
    ``output``, the beginning of its standard output; ``stderr``, the end of its messages.
    """
    status, reason = None, ""
    with contextlib.ExitStack() as undo:
        files = []
        for name in ("stdout", "stderr"):
            # Memory files, not pipes: what a command leaves running keeps its output open.
            files.append(os.memfd_create(name, os.MFD_CLOEXEC))
            undo.callback(os.close, files[-1])
        try:
            process = subprocess.Popen(
                end["argv"],
                stdin=subprocess.DEVNULL,
                stdout=files[0],
                stderr=files[1],
                env=dict(end["env"]),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            reason = f"it could not be started: {error.strerror}"
        else:
            status = _wait(process, end["timeout"], meanwhile)
            if status is None:
                reason = f"it was still running after {end['timeout']:g} s"
                _end_group(process)
        output = os.pread(files[0], OUTPUT_BYTES, 0)
        size = os.fstat(files[1]).st_size
        stderr = os.pread(files[1], MESSAGE_BYTES, max(0, size - MESSAGE_BYTES))
    return {
        "label": end["label"],
        "status": status,
        "reason": reason,
        "output": output.decode("utf-8", "replace"),
        "stderr": stderr.decode("utf-8", "replace").strip(),
    }


def _wait(
    process: subprocess.Popen[bytes], seconds: float, meanwhile: Callable[[], object] | None = None
) -> int | None:
    until = time.monotonic() + seconds
    while True:
        left = until - time.monotonic()
        try:
            return process.wait(left if meanwhile is None else min(left, WATCH_SECONDS))
        except subprocess.TimeoutExpired:
            if meanwhile is None or left <= WATCH_SECONDS:
                return None
            meanwhile()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started. One that not even SIGKILL ends is left behind."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        _wait(process, GRACE_SECONDS)


def stop_running(scratch: str, sleep: Callable[[float], None] = time.sleep) -> None:
    """End every process group that is noted in ``scratch``, and see that none begins any more.

    A begin that outlives blockbak would else bring to rest what its end has just let go.
    """
    over = os.path.join(scratch, "over")
    try:
        # Who notes itself after this finds no directory, and does not begin. A link has its content from the start.
        os.rename(os.path.join(scratch, RUNNING), over)
        groups = [int(os.readlink(os.path.join(over, name))) for name in os.listdir(over)]
    except (OSError, ValueError):  # none was ever noted
        return
    for group in groups:
        tries = 10
        # Its number may be another's by now; what it was started with is its own.
        while tries and _mentions(group, scratch):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            sleep(0.05)
            tries -= 1


def _mentions(pid: int, text: str) -> bool:
    """Whether the process was started with ``text`` in its environment; an ended one was not."""
    try:
        fd = os.open(f"/proc/{pid}/environ", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        data = b""
        while more := os.read(fd, 1 << 16):
            data += more
    except OSError:
        pass
    finally:
        os.close(fd)
    return os.fsencode(text) in data


def clear(scratch: str) -> None:
    """Remove the directory ``scratch`` with all in it, as far as that goes; "" is none."""
    if scratch:
        for directory, folders, files in os.walk(scratch, topdown=False):
            for name in (*files, *folders):
                path = os.path.join(directory, name)
                with contextlib.suppress(OSError):
                    # A link to a directory is among the folders, and is only a link.
                    if name in folders and not os.path.islink(path):
                        os.rmdir(path)
                    else:
                        os.unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(scratch)


def unsafe_directory(path: str) -> str:
    """Why nothing is run that a journal in this directory asks for; "" if it is safe."""
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        return "it is not a directory"
    if info.st_uid != os.geteuid():
        return "it belongs to somebody else"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "others may write in it"
    return ""


# --- the guardian's own life ------------------------------------------------------------------


class _Channel:
    """Lines of JSON, one a message, to and from blockbak."""

    def __init__(self, fd: int) -> None:
        self._fd, self._received, self._unsent, self.gone = fd, b"", b"", False
        os.set_blocking(fd, False)

    def next(self, until: float) -> dict[str, Any] | None:
        """The next message; None at ``until`` (of the monotonic clock), or when the other end is ``gone``."""
        while b"\n" not in self._received:
            left = until - time.monotonic()
            poll = select.poll()
            poll.register(self._fd, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            ready = poll.poll(max(0.0, left) * 1000)
            if not ready and left <= 0:
                return None
            if ready and not self._exchange(ready[0][1]):
                self.gone = True
                return None
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _exchange(self, events: int) -> bool:
        """Receive, and send what is waiting; whether the other end is still there."""
        try:
            if events & select.POLLOUT:
                self._unsent = self._unsent[os.write(self._fd, self._unsent) :]
            if events & ~select.POLLOUT:
                data = os.read(self._fd, 1 << 16)
                self._received += data
                return bool(data)
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def say(self, message: Mapping[str, Any]) -> None:
        """Send a message as far as it goes at once; the rest follows in ``next``."""
        self._unsent += json.dumps(message).encode() + b"\n"
        if not self._exchange(select.POLLOUT):
            self.gone = True

    def finish(self) -> None:
        """Send the rest, while somebody reads it."""
        while self._unsent and not self.gone:
            self.next(time.monotonic() + WATCH_SECONDS)


def main(open_mapper: Callable[[], Resumer] = Control) -> int:
    """A guardian's life, from its orders to its end. Gives its exit status."""
    score = _detach()
    channel = _Channel(0)
    orders = channel.next(time.monotonic() + 10)
    if orders is None:
        return 1
    deadline = time.monotonic() + orders["deadline"]
    made: list[str] = []
    try:
        devices = [(str(name), str(uuid)) for name, uuid in orders["devices"]]
        mapper = open_mapper() if devices else None
        # Kept open, and locked with it, until this process ends: who finds it unlocked knows that it is dead.
        held = _keep_journal(orders, made)
        if orders["scratch"]:
            os.mkdir(orders["scratch"], 0o700)
            os.mkdir(os.path.join(orders["scratch"], RUNNING))
        # Last, so that all that was loaded until here is locked.
        _lock_memory(needed=bool(devices))
    except OSError as error:
        for path in made:
            os.unlink(path)
        clear(orders["scratch"])
        where = f" ({error.filename})" if error.filename else ""
        channel.say({"failed": f"{error.strerror or error}{where}"})
        return 1
    channel.say({"ready": True})
    in_time, reason = _wait_for_release(channel, deadline)
    reasons = [reason] if reason else []
    left: list[tuple[str, str]] = []
    if mapper is not None:
        said, left = resume_all(mapper, devices)
        reasons += said
    again = None
    if not in_time:
        # blockbak is not to begin anything more. It may be in the middle of suspending a device, which it then is
        # while the end commands run, and these may wait for it.
        channel.say({"late": True})
        again = None if mapper is None else functools.partial(resume_all, mapper, devices, sleep=lambda _: None)
    # Programs are loaded from disks: only now, when all that can run runs.
    _score(score)
    stop_running(orders["scratch"])
    ended = [run_ending(end, again) for end in orders["ends"]]
    clear(orders["scratch"])
    channel.say({"in_time": in_time, "reasons": reasons, "ended": ended})
    if not in_time and mapper is not None:
        _watch(channel, mapper, devices)
        left = resume_all(mapper, devices)[1]
    channel.finish()
    with contextlib.suppress(OSError):
        if left:
            # For 'blockbak recover', which then has nothing else to do.
            _rewrite(held, orders | {"ends": [], "scratch": ""})
        else:
            os.unlink(orders["journal"])
    return 0


def _detach() -> str:
    """Nothing of whoever started it can end it, be kept busy by it, or be stopped with it.

    Gives what ``_score`` must set before other programs are run: they would inherit what is set here.
    """
    # Handlers, not SIG_IGN: an end command starts with the defaults again.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    os.chdir("/")
    os.umask(0o077)
    with contextlib.suppress(OSError):  # it is a session's first process already when started so
        os.setsid()
    return _score("-1000")


def _score(score: str) -> str:
    """Set how readily the kernel kills this process when memory is short (-1000: never); gives what it was."""
    before = score
    with contextlib.suppress(OSError):  # only root may, and not in every container
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR | os.O_CLOEXEC)
        try:
            before = os.read(fd, 16).decode().strip()
            os.pwrite(fd, score.encode(), 0)
        finally:
            os.close(fd)
    return before


def _lock_memory(*, needed: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0 and needed:
        raise OSError(f"its memory cannot be locked: {os.strerror(ctypes.get_errno())}")


def _keep_journal(orders: Mapping[str, Any], made: list[str]) -> int:
    """Write the journal, locked and durable before it has its name; ``made`` holds what must be removed."""
    path = orders["journal"]
    directory = os.path.dirname(path)
    os.makedirs(directory, 0o700, exist_ok=True)
    if reason := unsafe_directory(directory):
        raise OSError(f"{directory} is not safe: {reason}")
    partial = path + ".partial"
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    made.append(partial)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _rewrite(fd, orders)
    os.rename(partial, path)
    made[:] = [path]
    return fd


def _rewrite(fd: int, orders: Mapping[str, Any]) -> None:
    fields = ("boot", "devices", "ends", "scratch")
    text = json.dumps({"version": VERSION, "pid": os.getpid()} | {name: orders[name] for name in fields}).encode()
    os.ftruncate(fd, 0)
    done = 0
    while done < len(text):
        done += os.pwrite(fd, text[done:], done)
    os.fsync(fd)


def _wait_for_release(channel: _Channel, deadline: float) -> tuple[bool, str]:
    """Whether it was asked to let go in time; if not, a sentence says what came instead."""
    while True:
        message = channel.next(deadline)
        if channel.gone:
            return False, "blockbak died before it let go."
        if message is None:
            return False, "The deadline passed."
        if "within" in message:
            deadline = min(deadline, time.monotonic() + message["within"])
        if "release" in message:
            return True, ""


def _watch(channel: _Channel, mapper: Resumer, devices: Sequence[tuple[str, str]]) -> None:
    """Until blockbak is done too: it may have been about to suspend a device when the deadline passed."""
    while not channel.gone:
        message = channel.next(time.monotonic() + WATCH_SECONDS)
        resume_all(mapper, devices, sleep=lambda _: None)
        if message is not None and "release" in message:
            return


if __name__ == "__main__":
    sys.exit(main())
