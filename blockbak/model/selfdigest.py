"""JSON files that end in the SHA-256 of their own bytes, so that no byte of them can change unnoticed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

import msgspec

BLANK = "0" * 64
"""What stands in place of the digest while it is computed: its member must come last."""
_DIGEST = re.compile(rb'"sha256": "([0-9a-f]{64})"\n}\n\Z')


def encoded(members: Mapping[str, object]) -> bytes:
    """The file of ``members``, the last of which is ``sha256`` with the value ``BLANK``."""
    blank = msgspec.json.format(msgspec.json.encode(members), indent=2) + b"\n"
    digest = hashlib.sha256(blank).hexdigest().encode()
    return blank[: -len(BLANK) - 4] + digest + blank[-4:]


def flaw(data: bytes) -> str:
    """Why the bytes of such a file are not what they were; an empty string if they are."""
    found = _DIGEST.search(data)
    if not found:
        return "it does not end with its digest"
    blank = data[: found.start(1)] + BLANK.encode() + data[found.end(1) :]
    return "" if hashlib.sha256(blank).hexdigest().encode() == found[1] else "its digest does not match"
