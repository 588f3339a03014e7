"""Mirrors for tests: both ends in one process over two pipes, and with somebody between them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from blockbak.errors import BlockbakError
from blockbak.flow import peers
from blockbak.flow.context import Context
from blockbak.flow.mirror import Report, Request, mirror
from tests.doubles import context

BLOCK = 64 << 10
PIECE = 2 << 20
LIMIT_SECONDS = 60


class Last(bytes):
    """What goes over a line before it is cut."""


class Tap:
    """Carries bytes from one end to the other; ``change(offset, data)`` may give others, or None to cut the line."""

    def __init__(self, change: Callable[[int, bytes], bytes | None]) -> None:
        self.read_fd, self._into = os.pipe()
        self._from, self.write_fd = os.pipe()
        self._change = change
        self.carried = 0
        self.thread = threading.Thread(target=self._carry, daemon=True)

    def _carry(self) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(self._from, 1 << 16):
                sent = self._change(self.carried, data)
                self.carried += len(data)
                if sent is None:
                    break
                rest = memoryview(sent)
                while rest:
                    rest = rest[os.write(self._into, rest) :]
                if isinstance(sent, Last):
                    break
        os.close(self._into)
        os.close(self._from)


def unchanged(_: int, data: bytes) -> bytes:
    return data


@dataclass
class Ended:
    """How the two ends came out of it."""

    report: Report | None = None
    sender: BaseException | None = None
    receiver: BaseException | None = None
    done: Any = None
    said: list[str] = field(default_factory=list)


def over_pipes(
    request: Request,
    target: object,
    state: object,
    *,
    overwrite: bool = True,
    there: Context | None = None,
    here: Context | None = None,
    to_receiver: Callable[[int, bytes], bytes | None] = unchanged,
    to_sender: Callable[[int, bytes], bytes | None] = unchanged,
) -> Ended:
    """Mirror with both ends here. ``here`` and ``there`` are the contexts of the ends with source and target."""
    ended = Ended()
    out, back = Tap(to_receiver), Tap(to_sender)
    for tap in (out, back):
        tap.thread.start()

    def receive() -> None:
        try:
            world = there or context(state)
            ended.done = peers.receive(
                os.fspath(target), world, overwrite=overwrite, fds=(out.read_fd, back.write_fd)
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            ended.receiver = error
        finally:
            os.close(back.write_fd)
            os.close(out.read_fd)

    other = threading.Thread(target=receive, daemon=True)
    other.start()
    try:
        world = here or context(state, say=ended.said.append)
        ended.report = peers.send(request, (), world, fds=(back.read_fd, out.write_fd))
    except BaseException as error:  # noqa: BLE001 - the same
        ended.sender = error
    finally:
        os.close(out.write_fd)
        other.join(LIMIT_SECONDS)
        assert not other.is_alive(), "the receiver hangs"
        os.close(back.read_fd)
        for tap in (out, back):
            tap.thread.join(LIMIT_SECONDS)
    return ended


def mirrored(way: str, source: object, target: object, state: object, **options: Any) -> Report:
    """A mirror ``here`` or ``over pipes`` that must come to its end."""
    request = Request(os.fspath(source), os.fspath(target), overwrite=True, **options)
    if way == "here":
        return mirror(request, context(state))
    ended = over_pipes(request, target, state)
    for error in (ended.sender, ended.receiver):
        if error is not None:
            raise error
    assert ended.report is not None
    return ended.report


def failed(error: BaseException | None) -> BlockbakError:
    """It is one of blockbak's own, with a sentence."""
    assert isinstance(error, BlockbakError), repr(error)
    assert str(error)
    return error
