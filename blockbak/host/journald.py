"""Lines for systemd's journal, each with fields of its own (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
_MESSAGE_MOST = 64 << 10
"""Bytes of one field: a datagram has to hold all of them."""


def reads_stream(number: int) -> bool:
    """Whether what is written to this descriptor goes to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    named = os.environ.get("JOURNAL_STREAM", "")
    try:
        info = os.fstat(number)
    except OSError:
        return False
    return named == f"{info.st_dev}:{info.st_ino}"


def encode(fields: Mapping[str, str]) -> bytes:
    """One entry. A value of several lines has its length before it."""
    parts = []
    for name, value in fields.items():
        data = value.encode("utf-8", "backslashreplace")[:_MESSAGE_MOST]
        if b"\n" in data:
            parts.append(name.encode("ascii") + b"\n" + struct.pack("<Q", len(data)) + data + b"\n")
        else:
            parts.append(name.encode("ascii") + b"=" + data + b"\n")
    return b"".join(parts)


def send(fields: Mapping[str, str], path: str = SOCKET) -> bool:
    """Hand an entry to the journal; whether it took it."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(path)
            connection.send(encode(fields))
    except OSError:
        return False
    return True
