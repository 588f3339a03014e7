"""The history of a repository as lines: each has the digest of what stands before it, so that what is altered or
missing is noticed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

EVENTS = (
    "made", "merged", "removed", "restored", "exported", "verified", "drilled", "mirrored", "pinned", "unpinned",
    "recovered", "adopted",
)  # fmt: skip
TORN = "torn_bytes"
"""The fact by which a line witnesses how many bytes before it are what a crash left of another one."""
_SLOT_BYTES = 512
"""One sector: it is written as a whole, or not at all."""


class Entry(msgspec.Struct, frozen=True):
    """One line: what was done, to which points of which volume (empty: to all, or to none in particular), and how it
    ended. ``time`` is when, in UTC; ``run`` is 32 hex digits that all lines of one process share. ``exit`` is the
    exit status, ``error`` the name of the error ("" without one). ``previous`` is the SHA-256 of all bytes from the
    start of the line before up to this one; of the repository's id before the first.
    """

    number: int
    time: str
    host: str
    user: str
    run: str
    event: str
    job: str
    volume: str
    points: list[str]
    exit: int
    error: str
    seconds: float
    facts: dict[str, Any]
    previous: str

    @property
    def moment(self) -> datetime:
        """When, of a line that was read."""
        return datetime.fromisoformat(self.time)


class Head(msgspec.Struct, frozen=True):
    """The number of the last line, and the SHA-256 of its bytes; of the repository's id before the first."""

    number: int
    sha256: str


def digest(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def encoded(entry: Entry) -> bytes:
    """The line of an entry, its line feed included."""
    return msgspec.json.encode(entry) + b"\n"


def decoded(line: bytes) -> Entry | None:
    """The entry of a line, with or without its line feed; None where it is none, as one is that tells no moment."""
    try:
        entry = msgspec.json.decode(line, type=Entry)
        return entry if entry.moment.tzinfo is not None else None
    except (msgspec.DecodeError, ValueError):
        return None


# --- the head --------------------------------------------------------------------------------------


def encode_slot(head: Head) -> bytes:
    """Half of the head file: the other half stays as it is, whatever happens while this one is written."""
    text = f"{head.number} {head.sha256} "
    return (text + digest(text.encode())).encode().ljust(_SLOT_BYTES - 1) + b"\n"


def _decoded_slot(data: bytes) -> Head | None:
    text, _, check = data.rstrip(b" \n").rpartition(b" ")
    number, _, sha256 = text.partition(b" ")
    if digest(text + b" ").encode() != check or not number.isdigit():
        return None
    return Head(int(number), sha256.decode("ascii"))


def decode_head(data: bytes) -> tuple[Head | None, int]:
    """What the head file says, None where neither half can be used; and at which byte the next one is to be written."""
    slots = [_decoded_slot(data[at : at + _SLOT_BYTES]) for at in (0, _SLOT_BYTES)]
    usable = [(slot.number, at) for at, slot in enumerate(slots) if slot is not None]
    if not usable:
        return None, 0
    newest = max(usable)[1]
    return slots[newest], (1 - newest) * _SLOT_BYTES


# --- the next line ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where the next line goes: its number and ``previous``, the bytes to write before it, and how many bytes it
    witnesses as torn.
    """

    number: int
    previous: str
    prefix: bytes
    torn: int


def next_place(ending: bytes, head: Head | None, origin: bytes) -> Place | None:
    """The place after ``ending``, the last bytes of the file, beginning with a line's first or with the file's own.
    None if more of the file is needed: there is no whole line in them. ``origin`` is the repository's id.

    A line that only its line feed lacks is one. What else stands after the last whole line was torn by a crash.
    """
    pieces = ending.split(b"\n")
    rest = len(pieces[-1])
    at = len(ending) - rest
    if rest and decoded(pieces[-1]) is not None:
        return _after(pieces[-1] + b"\n", b"", b"\n", head, origin)
    for piece in reversed(pieces[:-1]):
        start = at - len(piece) - 1
        if decoded(piece) is not None:
            return _after(ending[start:at], ending[at:], b"", head, origin)
        at = start
    return None


def first_place(torn: bytes, head: Head | None, origin: bytes) -> Place:
    """The place in a file that has no whole line."""
    return _after(b"", torn, b"", head, origin)


def _after(line: bytes, torn: bytes, prefix: bytes, head: Head | None, origin: bytes) -> Place:
    entry = decoded(line)
    number = entry.number if entry is not None else 0
    if torn and not torn.endswith(b"\n"):
        prefix = b"\n"
    torn += prefix if torn else b""
    witnessed = len(torn)
    if head is not None and head.number > number:
        # Lines are missing, and so they stay: the new one does not take the number of another.
        return Place(head.number + 1, head.sha256, prefix, witnessed)
    if head is not None and head.number == number and head.sha256 != digest(line or origin):
        # The last line was altered: the new one must not hold what it is now.
        return Place(number + 1, head.sha256, prefix, witnessed)
    return Place(number + 1, digest((line or origin) + torn), prefix, witnessed)


# --- all of them -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Reading:
    """The entries of a history, and a clause for each thing that is wrong with it."""

    entries: list[Entry] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)


def read(data: bytes, head: Head | None, origin: bytes) -> Reading:
    """All entries of a history's bytes, and what was altered or is missing. ``head`` was read before ``data``; None
    if the head file is missing or cannot be used. What a crash tore is no flaw: not at the end, and not before a line
    that witnesses it.
    """
    found = Reading()
    last, number, torn, known = origin, 0, b"", ""
    pieces = data.split(b"\n")
    if decoded(pieces[-1]) is None:
        pieces.pop()  # nothing, or torn by a crash; a line that only its line feed lacks is one
    for piece in pieces:
        line = piece + b"\n"
        entry = decoded(piece)
        if entry is None:
            torn += line
            continue
        found.flaws += _between(entry, number, last, torn)
        found.entries.append(entry)
        last, number, torn = line, max(number, entry.number), b""
        if head is not None and entry.number == head.number:
            known = digest(line)
    found.flaws += _at_end(head, number, known, bool(data))
    return found


def _between(entry: Entry, number: int, last: bytes, torn: bytes) -> Sequence[str]:
    """What is wrong between the line ``number``, which is ``last``, and the one that follows it."""
    witnessed = not torn or entry.facts.get(TORN) == len(torn)
    if entry.number == number + 1:
        if not witnessed:
            return [f"what stands between the lines {number} and {entry.number} is no line"]
        if entry.previous != digest(last + torn):
            return [f"line {number} is not what it was" if number else "its first line is of another repository"]
        return []
    if entry.number <= number:
        return [f"line {entry.number} stands after line {number}"]
    return [_missing(number + 1, entry.number - 1)]


def _missing(first: int, last: int) -> str:
    return f"line {first} is missing" if first == last else f"the lines {first} to {last} are missing"


def _at_end(head: Head | None, number: int, known: str, has_lines: bool) -> Sequence[str]:
    """What is wrong with the last line ``number``, or after it."""
    if head is None:
        return ["the file that tells its end is missing or damaged"] if has_lines else []
    if head.number > number:
        return [_missing(number + 1, head.number)]
    if known and known != head.sha256:
        return [f"line {head.number} is not what it was"]
    return []
