"""Signals that ask to end, kept waiting while something is taken or given back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a person, a supervisor and a terminal that goes away send."""


@contextmanager
def undisturbed() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """No signal that asks to end breaks into the ``with``; those that came arrive when it is over.

    What it gives is called for a ``with`` inside, in which they come through as before: for the work
    between taking a thing and giving it back. Ignored signals stay ignored. Handlers are exchanged and
    signals not blocked: a blocked one would be taken by another thread (a library's, a progress bar's),
    and Python would run its handler in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext  # handlers run in the main thread only
        return
    before: dict[int, Any] = {}
    waiting: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        waiting.append(number)

    def hold() -> None:
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, note, None):
                before[number] = handler
                signal.signal(number, note)

    def release() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        while waiting:
            signal.raise_signal(waiting.pop(0))

    @contextmanager
    def through() -> Iterator[None]:
        try:
            release()
            yield
        finally:
            hold()

    try:
        hold()
        yield through
    finally:
        release()
