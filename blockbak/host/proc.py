"""Tables of /proc, parsed: mounts and locks. Pure: text in, values out."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ESCAPE = re.compile(r"\\([0-7]{3})")


def unescape(text: str) -> str:
    r"""Undo the ``\040`` of /proc's tables (kernel, fs/seq_file.c, mangle_path)."""
    return _ESCAPE.sub(lambda found: chr(int(found[1], 8)), text)


@dataclass(frozen=True, slots=True)
class MountLine:
    """A line of /proc/self/mountinfo (proc(5)); ``options`` are the mount's and, after them, the file system's.

    ``parent`` is the id of the mount below, ``root`` what of the file system is seen, ``tags`` are the optional
    fields (``shared:7``, ``master:3``).
    """

    id: int
    major: int
    minor: int
    target: str
    fstype: str
    source: str
    options: tuple[str, ...]
    parent: int = 0
    root: str = "/"
    tags: tuple[str, ...] = ()

    @property
    def writable(self) -> bool:
        """Whether the file system itself takes writes, whatever this mount of it does."""
        return "ro" not in self.options[1:]

    def option(self, name: str) -> str:
        """The value of ``name=value``, or an empty string."""
        return next((text.partition("=")[2] for text in self.options if text.startswith(f"{name}=")), "")


@dataclass(frozen=True, slots=True)
class LockLine:
    """A lock of /proc/locks; ``pid`` is 0 where the kernel names none (open file description locks)."""

    pid: int
    major: int
    minor: int
    inode: int


def parse_mountinfo(text: str) -> tuple[MountLine, ...]:
    """All lines of a mountinfo table; one that is not understood is left out."""
    found = []
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        left, right = fields.split(" "), rest.split(" ")
        if len(left) < 6 or len(right) < 2:
            continue
        major, _, minor = left[2].partition(":")
        options = (*left[5].split(","), *(right[2].split(",") if len(right) > 2 else ()))
        found.append(
            MountLine(
                id=int(left[0]),
                major=int(major),
                minor=int(minor),
                target=unescape(left[4]),
                fstype=right[0],
                source=unescape(right[1]),
                options=tuple(unescape(option) for option in options),
                parent=int(left[1]),
                root=unescape(left[3]),
                tags=tuple(left[6:]),
            )
        )
    return tuple(found)


def parse_locks(text: str) -> tuple[LockLine, ...]:
    """Held POSIX, flock and open-file-description locks of a /proc/locks table; who waits is left out."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 6 or fields[1] not in ("POSIX", "FLOCK", "OFDLCK"):
            continue
        place = fields[5].split(":")
        if len(place) == 3:
            major, minor, inode = int(place[0], 16), int(place[1], 16), int(place[2])
            found.append(LockLine(max(int(fields[4]), 0), major, minor, inode))
    return tuple(found)
