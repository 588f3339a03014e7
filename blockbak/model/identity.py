"""What must match for two sightings to be of one volume."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

VALUE_MAX = 512
"""Characters, in ASCII; a longer value is replaced by its SHA-256, so that it fits every header."""

PATH = "path"
"""The kind of a device known by nothing but its node."""

WWN = "wwn"
"""The only kind that is given out once in the world."""

_WORDS = {
    "lv-uuid": "logical volume",
    WWN: "WWN",
    "serial": "serial",
    "partuuid": "partition",
    "partition": "partition",
    "dm-uuid": "device-mapper UUID",
    "md-uuid": "array",
    "file": "file",
    "gpt": "GPT disk",
    "mbr": "MBR disk",
    PATH: "node",
}


def plain(text: str) -> str:
    r"""``text`` as valid UTF-8: bytes of a path that are none are written out, as in ``tar\xffget``."""
    try:
        data = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        data = text.encode("utf-8", "backslashreplace")  # not from a path: half a pair of UTF-16
    return data.decode("utf-8", "backslashreplace")


def all_plain(value: Any) -> Any:
    """Built-in values, every text in them ``plain``."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {all_plain(key): all_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [all_plain(one) for one in value]
    return value


def _width(text: str) -> int:
    """Characters of ``text`` with all that is not ASCII, or not to be printed, written out."""
    return len(ascii(text)) - len("''")


def ending(text: str, limit: int) -> str:
    """``text``, or its last part with an ellipsis before it, of at most ``limit`` characters in ASCII."""
    if _width(text) <= limit:
        return text
    kept = text[-limit:]
    while _width(kept) > limit - _width("…"):
        kept = kept[1:]
    return f"…{kept}"


@dataclass(frozen=True, slots=True)
class Identity:
    """``kind`` says where ``value`` is from: one of 'lv-uuid', 'wwn', 'serial', 'partuuid', 'partition',
    'dm-uuid', 'md-uuid', 'file', 'gpt', 'mbr', 'path'. A value that is not UTF-8 is made ``plain``.

    ``diskseq`` is the kernel's number of this instance of a block device (0: not known, or a file), and
    ``boot`` the boot in which it was seen; the number means nothing in another boot.
    """

    kind: str
    value: str
    diskseq: int = 0
    boot: str = ""

    def __post_init__(self) -> None:
        value = plain(self.value)
        if _width(value) > VALUE_MAX:
            value = f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
        object.__setattr__(self, "value", value)

    def same_as(self, other: Identity) -> bool:
        """Whether both name one volume.

        A node such as /dev/sdb is handed on to the next disk that is plugged in: within one boot, another
        disk sequence number there means another disk. Across boots nothing more than the name is known.
        """
        if (self.kind, self.value) != (other.kind, other.value):
            return False
        comparable = self.kind == PATH and bool(self.diskseq and other.diskseq and self.boot)
        return not (comparable and self.boot == other.boot and self.diskseq != other.diskseq)

    def surely_same_as(self, other: Identity) -> bool:
        """The same, where a mistake would cost data: a name alone proves nothing beyond its boot and its disk."""
        if self.kind != PATH:
            return self.same_as(other)
        return self.same_as(other) and bool(self.boot and self.diskseq and other.diskseq) and self.boot == other.boot

    def __str__(self) -> str:
        return f"{_WORDS.get(self.kind, self.kind)} {self.value}"
