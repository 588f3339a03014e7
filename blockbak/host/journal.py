"""What a run has done to bring a device to rest, noted durably before it is done: so that it can be undone by
somebody else.

A journal is a file of lines: the CRC-32 of a line's text, and the text, which is JSON. Room for all of it is taken
when it is made; a zero follows the last line. The run holds its lock (flock) for as long as it lives.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from blockbak.errors import StateUnusable
from blockbak.host.blockio import sync_directory
from blockbak.host.guard import unsafe_directory
from blockbak.host.kernel import Kernel
from blockbak.model.quiesce import STEPS, Step

VERSION = 1
FOLDER = "rest"
SUFFIX = ".journal"
DAMAGED = ".damaged"
ROOM_LEAST = 256 << 10
_SEEN_ROOM = 4096
"""Bytes for what is found out at one step, beside the step itself."""
_KINDS = {kind.__name__: kind for kind in STEPS}


@dataclass(frozen=True, slots=True)
class Begun:
    """A step that was begun, and what was seen just before it: what undoing it needs to know beside its fields."""

    number: int
    step: Step
    seen: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """What a run that is over has left to put back; ``begun`` in the order in which it was done.

    ``damage`` says from where on it cannot be read, ``newer`` that only a newer blockbak understands it.
    """

    path: str
    run: str
    boot: str = ""
    host: str = ""
    device: str = ""
    begun: tuple[Begun, ...] = ()
    back: frozenset[int] = frozenset()
    damage: str = ""
    newer: bool = False

    @property
    def to_undo(self) -> tuple[Begun, ...]:
        """What has not been put back, in the order in which it was done."""
        return tuple(one for one in self.begun if one.number not in self.back)


class Writer:
    """A journal that is written, and its lock with it. ``begun`` are the steps that may have been done so far,
    ``to_undo`` those that were not put back since.
    """

    def __init__(self, fd: int, path: str, kernel: Kernel, at: int = 0, begun: Sequence[Begun] = ()) -> None:
        self._fd, self.path, self._kernel, self._at = fd, path, kernel, at
        self.begun = list(begun)
        self._back: set[int] = set()

    def head(self, facts: Mapping[str, str]) -> None:
        """Who writes it. Raises StateUnusable."""
        self._write({"version": VERSION, **facts})

    def begin(self, step: Step, seen: Mapping[str, Any]) -> Begun:
        """Note a step, durably, before it is done. Raises StateUnusable."""
        made = Begun(len(self.begun) + 1, step, seen)
        # Whatever comes of the writing: undoing what was not done does no harm.
        self.begun.append(made)
        facts = {"step": type(step).__name__, "facts": dataclasses.asdict(step), "seen": dict(seen)}
        self._write({"begin": made.number, **facts})
        return made

    def back(self, number: int) -> None:
        """Note that a step was put back, or not done after all. Raises StateUnusable."""
        self._back.add(number)
        self._write({"back": number})

    @property
    def to_undo(self) -> list[Begun]:
        """In the order in which they were done."""
        return [one for one in self.begun if one.number not in self._back]

    def _write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record).encode("ascii")
        # The zero ends the journal here: behind may be what is left of a longer line that could not be made durable.
        line = memoryview(b"%08x %s\n\0" % (zlib.crc32(text), text))
        try:
            done = 0
            while done < len(line):
                done += self._kernel.pwritev(self._fd, [line[done:]], self._at + done)
            self._kernel.fsync(self._fd)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._at += len(line) - 1

    def remove(self) -> None:
        """All is put back: nothing of it may be found after a power cut. Raises OSError."""
        self._kernel.unlink(self.path)
        sync_directory(os.path.dirname(self.path), self._kernel)

    def set_aside(self) -> str:
        """Keep a damaged one for a person to look at, where nobody acts on it; gives its new path. Raises OSError."""
        path = self.path.removesuffix(SUFFIX) + DAMAGED
        os.replace(self.path, path)
        sync_directory(os.path.dirname(path), self._kernel)
        return path


def folder(state_dir: str) -> str:
    """Where journals lie."""
    return os.path.join(os.path.abspath(state_dir), FOLDER)


def room_for(steps: Sequence[Step]) -> int:
    """Bytes that a journal of these steps may take."""
    needed = sum(len(json.dumps(dataclasses.asdict(step))) + _SEEN_ROOM for step in steps)
    return -(-max(ROOM_LEAST, needed) // 4096) * 4096


@contextmanager
def alone(state_dir: str, kernel: Kernel) -> Iterator[str]:
    """Be the only one who makes or removes journals; gives their directory, which is made. Raises StateUnusable."""
    place = folder(state_dir)
    try:
        _made(place, kernel)
        if reason := unsafe_directory(place):
            raise StateUnusable(path=place, reason=reason)
        fd = kernel.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unusable(place, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield place
    finally:
        kernel.close(fd)


def _made(path: str, kernel: Kernel) -> None:
    """A directory with those above it, all of them durable."""
    if os.path.isdir(path):
        return
    above = os.path.dirname(path)
    _made(above, kernel)
    with contextlib.suppress(FileExistsError):
        kernel.mkdir(path)
    sync_directory(above, kernel)


@contextmanager
def written(place: str, run_id: str, room: int, kernel: Kernel) -> Iterator[Writer]:
    """A new journal in the directory ``place``, with its room taken, durable and locked. Raises StateUnusable, with
    nothing left of it. It stays after the ``with`` unless it was removed.
    """
    path = os.path.join(place, run_id + SUFFIX)
    try:
        fd = kernel.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            kernel.lock(fd, exclusive=True)
            kernel.allocate(fd, room)
            kernel.fsync(fd)
            sync_directory(place, kernel)
        except OSError as error:
            with contextlib.suppress(OSError):
                kernel.unlink(path)
            raise _unusable(path, error) from error
        yield Writer(fd, path, kernel)
    finally:
        kernel.close(fd)


@contextmanager
def taken(path: str, kernel: Kernel) -> Iterator[tuple[Journal, Writer] | None]:
    """The journal of a run that is over, held so that nobody else undoes it; None where it is gone, or its run
    lives, or somebody is at it.
    """
    try:
        fd = kernel.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        try:
            kernel.lock(fd, exclusive=True)
        except BlockingIOError:
            yield None
            return
        info = os.fstat(fd)
        # Removed by whoever held the lock until now; or nothing that we have written.
        if not info.st_nlink or not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            yield None
            return
        with open(fd, "rb", closefd=False) as stream:
            data = stream.read()
        journal, end = parse(path, data)
        yield journal, Writer(fd, path, kernel, end, journal.begun)
    finally:
        kernel.close(fd)


def paths(state_dir: str) -> list[str]:
    """The journals that are there, of runs that live or are over. Raises StateUnusable where others could have put
    them there.
    """
    place = folder(state_dir)
    try:
        if reason := unsafe_directory(place):
            raise StateUnusable(path=place, reason=reason)
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(place, error) from error
    return [os.path.join(place, name) for name in names if name.endswith(SUFFIX)]


def parse(path: str, data: bytes) -> tuple[Journal, int]:
    """A journal out of its bytes, and where its next line goes. A last line without its end was never acted on, and
    is as if it were not there.
    """
    run = os.path.basename(path).removesuffix(SUFFIX)
    text = data.split(b"\0", 1)[0]
    end = text.rfind(b"\n") + 1
    lines = text[:end].split(b"\n")[:-1]
    head: dict[str, Any] = {}
    begun: dict[int, Begun] = {}
    back: set[int] = set()
    damage = ""
    for number, line in enumerate(lines, 1):
        try:
            record = _record(line)
            if number == 1:
                head = record
                if head["version"] != VERSION:
                    return Journal(path, run, newer=True), end
            elif "back" in record:
                back.add(record["back"])
            else:
                step = msgspec.convert(record["facts"], _KINDS[record["step"]])
                begun[record["begin"]] = Begun(record["begin"], step, record["seen"])
        except (ValueError, KeyError, TypeError):
            damage = f"its line {number} is not what was written"
            break
    else:
        if not lines and data.strip(b"\0"):
            # A first line that never came to its end: nothing had been done.
            damage = "" if _may_be_torn(data) else "it has no first line"
    made = tuple(begun[number] for number in sorted(begun))
    facts = {name: str(head.get(name, "")) for name in ("boot", "host", "device")}
    return Journal(path, run, facts["boot"], facts["host"], facts["device"], made, frozenset(back), damage), end


def _record(line: bytes) -> dict[str, Any]:
    crc, _, text = line.partition(b" ")
    if int(crc, 16) != zlib.crc32(text):
        raise ValueError("checksum")
    record: dict[str, Any] = json.loads(text)
    return record


def _may_be_torn(data: bytes) -> bool:
    """Whether a file without one whole line is a first one that was cut short: nothing follows it."""
    return b"\n" not in data


def _unusable(path: str, error: OSError) -> StateUnusable:
    return StateUnusable(path=path, reason=(error.strerror or str(error)).lower())
