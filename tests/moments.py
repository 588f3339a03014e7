"""Something happens in the middle of a use-case, at a moment of the test's choice: nobody sleeps, nobody races."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from blockbak.flow.context import Quiet, never
from blockbak.repository.local import Volume
from tests.faults import QuickKernel

Act = Callable[[], object]


class Once:
    """Calls ``act`` the first time it is called itself; ``done`` says that it was."""

    def __init__(self, act: Act) -> None:
        self._act, self.done = act, False

    def __call__(self) -> None:
        if not self.done:
            self.done = True
            self._act()


class AtStage(Quiet):
    """Progress that calls ``act`` when a stage begins of which the label has ``word`` in it."""

    def __init__(self, word: str, act: Once) -> None:
        self._word, self._act = word, act

    def begin(self, label: str, total: int) -> None:
        if self._word in label:
            self._act()


class AtOpening(QuickKernel):
    """The real kernel, but ``act`` is called before ``path`` is opened for the ``number``-th time."""

    def __init__(self, path: object, act: Once, number: int = 1) -> None:
        self._path, self._act, self._left = os.path.realpath(str(path)), act, number

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        if os.path.realpath(path) == self._path:
            self._left -= 1
            if self._left == 0:
                self._act()
        return super().open(path, flags, mode)


class WhileWaiting:
    """Holds a volume, and is the ``check`` of a run that waits for it: then it acts, and lets the volume go."""

    def __init__(self, volume: Volume, act: Once) -> None:
        self._held, self._act = ExitStack(), act
        self._held.enter_context(volume.locked(exclusive=True, wait=0, check=never))

    def __call__(self) -> None:
        self._act()
        self._held.close()


# When something may happen to a source (a ``volume`` that a run waits for, the path that it opens), and to a target:
# what of the context brings about that ``act`` is called then.
SOURCE_MOMENTS: dict[str, Callable[[Volume, object, Once], dict[str, Any]]] = {
    "while it waits for the volume": lambda volume, source, act: {"check": WhileWaiting(volume, act), "wait": 60},
    "before the source is opened": lambda volume, source, act: {"kernel": AtOpening(source, act)},
}
TARGET_MOMENTS: dict[str, Callable[[object, Once], dict[str, Any]]] = {
    "before it is opened": lambda target, act: {"kernel": AtOpening(target, act, 1)},
    "before it is opened again": lambda target, act: {"kernel": AtOpening(target, act, 2)},
    "while the point is verified": lambda target, act: {"progress": AtStage("verifying", act)},
}
