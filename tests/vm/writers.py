"""Somebody who writes while a backup runs, and knows from outside how far he got at any moment."""

from __future__ import annotations

import bisect
import itertools
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

from tests.host.servers import environment
from tests.vm.conftest import LIMIT_SECONDS, Blockbak


class Writer:
    """Takes one numbered step after the other in a thread of its own, for as long as the ``with`` lasts.

    ``step(number)`` comes back once what it wrote is safe; numbers start at 1. What goes wrong in it is raised when
    the ``with`` is left.
    """

    def __init__(self, step: Callable[[int], None], pause: float = 0.25) -> None:
        self.begun = 0
        self._step, self._pause = step, pause
        self._safe: list[float] = []
        self._error: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer")

    def _work(self) -> None:
        try:
            while not self._over.wait(self._pause):
                self.begun += 1
                self._step(self.begun)
                # Noted late rather than early: what was safe before a moment is not too much then.
                self._safe.append(time.time())
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join(LIMIT_SECONDS)
        if kind is None:
            assert not self._thread.is_alive(), f"step {self.begun} hangs"
            if self._error is not None:
                raise self._error

    def safe_before(self, moment: float) -> int:
        """The number of the last step that was over at that time."""
        return bisect.bisect_right(self._safe, moment)

    def go_on(self, steps: int) -> None:
        """Wait for further steps."""
        wanted, deadline = len(self._safe) + steps, time.monotonic() + LIMIT_SECONDS
        while len(self._safe) < wanted:
            assert self._error is None, f"step {self.begun} failed: {self._error}"
            assert time.monotonic() < deadline, f"step {self.begun} hangs"
            time.sleep(0.02)

    def longest_gap(self, start: float, end: float) -> float:
        """How long it was held up at most, between two times."""
        inside = [start, *(one for one in self._safe if start < one < end), end]
        return max(after - before for before, after in itertools.pairwise(inside))


class Client:
    """A database client that is told a line at a time, and has done it when it says the number."""

    def __init__(self, argv: Sequence[str], line: str) -> None:
        """``line`` has ``{n}`` where the number belongs, and makes the client print it at the end."""
        self._line = line
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", env=environment()
        )  # fmt: skip

    def step(self, number: int) -> None:
        """Do it. Fails where the client says anything else."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._line.format(n=number) + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        assert said == f"{number}\n", f"step {number}: {said!r}, status {self._process.poll()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


@dataclass
class Taken:
    """The points of one run, by volume's label, and how far the writer was before and after the snapshots.

    ``least`` steps were safe at the moment that the points tell, no more than ``most`` were begun when it was over.
    """

    points: dict[str, str]
    documents: list[dict[str, Any]]
    most: int
    least: int = 0
    words: tuple[str, ...] = field(default=())


def take(blockbak: Blockbak, writer: Writer, *words: object) -> Taken:
    """Back up while the writer writes."""
    documents = blockbak.json("backup", *words)["points"]
    points = {one["source"]: one["point"] for one in documents}
    assert {one["mode"] for one in documents} == {"hot"}
    taken = Taken(points, documents, writer.begun, words=tuple(map(str, words)))
    # It goes on before the next one.
    writer.go_on(3)
    return taken


def find_least(blockbak: Blockbak, writer: Writer, runs: Sequence[Taken]) -> None:
    """Ask the repository for the points' moments, and fill in ``least``."""
    created = {one["point"]: datetime.fromisoformat(one["created"]).timestamp() for one in blockbak.json("list")}
    for run in runs:
        run.least = writer.safe_before(min(created[point] for point in run.points.values()))
