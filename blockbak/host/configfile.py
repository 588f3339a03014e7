"""The configuration's file. It is read only where nobody else could have written it."""

from __future__ import annotations

import os
import stat

from blockbak.errors import NoConfig, UnsafeConfig

_MOST_CHARACTERS = 4 << 20
"""A configuration of thousands of jobs has less; whatever goes on for longer may never end."""


def read(path: str) -> str:
    """Its text. Raises NoConfig, UnsafeConfig."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reason = _unsafe(os.fstat(file.fileno()))
            text = file.read(_MOST_CHARACTERS + 1)
    except OSError as error:
        raise NoConfig(path=path, reason=(error.strerror or str(error)).lower()) from error
    except UnicodeDecodeError as error:
        raise NoConfig(path=path, reason="it is not UTF-8") from error
    if len(text) > _MOST_CHARACTERS:
        raise NoConfig(path=path, reason="it is longer than any configuration")
    if reason:
        raise UnsafeConfig(path=path, reason=reason)
    return text


def _unsafe(info: os.stat_result) -> str:
    if info.st_uid not in (0, os.geteuid()):
        return f"it belongs to user {info.st_uid}"
    return "others than its owner may write it" if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else ""
