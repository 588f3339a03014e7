"""Times whole processes, and keeps what was measured round by round."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.place import ToolFailed


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. ``cpu`` is user and system time of all its processes, ``rss`` the peak of the largest one,
    in bytes; ``facts`` is what else is known of it.
    """

    wall: float
    cpu: float
    rss: int
    stored: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def timed(*commands: Sequence[str], env: Mapping[str, str], into: str | None = None) -> tuple[Sample, bytes]:
    """Run a command, or several as a pipe, from the first's start to the last's end; and what the last one
    printed, unless it went ``into`` a file. Raises ToolFailed if any ends with another status than 0.
    """
    with tempfile.TemporaryFile() as errors, open(into, "wb") if into else tempfile.TemporaryFile() as out:
        running: list[subprocess.Popen[bytes]] = []
        cpu, rss, statuses = 0.0, 0, []
        start = time.monotonic()
        try:
            for number, argv in enumerate(commands):
                last = number == len(commands) - 1
                child = subprocess.Popen(
                    argv, stdin=running[-1].stdout if running else subprocess.DEVNULL,
                    stdout=out if last else subprocess.PIPE, stderr=errors, env=env,
                )  # fmt: skip
                if running and running[-1].stdout:
                    running[-1].stdout.close()
                running.append(child)
            for child in running:
                _, status, usage = os.wait4(child.pid, 0)
                child.returncode = os.waitstatus_to_exitcode(status)
                statuses.append(child.returncode)
                cpu += usage.ru_utime + usage.ru_stime
                rss = max(rss, usage.ru_maxrss * 1024)
            wall = time.monotonic() - start
        finally:
            for child in running:
                if child.returncode is None:
                    child.send_signal(signal.SIGKILL)
                    child.wait()
        for argv, status in zip(commands, statuses, strict=True):
            if status:
                errors.seek(0)
                raise ToolFailed(list(argv), status, errors.read().decode(errors="replace"))
        told = b""
        if not into:
            out.seek(0)
            told = out.read()
    return Sample(wall, cpu, rss), told


@dataclass(slots=True)
class Series:
    """All runs of one contestant, by round."""

    contest: str
    name: str
    samples: dict[int, Sample] = field(default_factory=dict)

    def _all(self, key: str) -> list[float]:
        return [float(getattr(sample, key)) for sample in self.samples.values()]

    def median(self, key: str = "wall") -> float:
        return statistics.median(self._all(key))

    def least(self, key: str = "wall") -> float:
        return min(self._all(key))

    def most(self, key: str) -> float:
        return max(self._all(key))

    def fact(self, key: str) -> Any:
        """What the last run said of itself."""
        return self.samples[max(self.samples)].facts[key]


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the ratios of pairs that ran in one round, the smallest and the largest."""

    median: float
    least: float
    most: float


def ratio(ours: Series, yardstick: Series | Callable[[int], float | None], key: str = "wall") -> Ratio:
    """Pair by pair. ``yardstick`` may compute a round's value; None leaves the round out."""
    pairs = []
    for number, sample in ours.samples.items():
        if isinstance(yardstick, Series):
            other = yardstick.samples.get(number)
            value = None if other is None else float(getattr(other, key))
        else:
            value = yardstick(number)
        if value:
            pairs.append(float(getattr(sample, key)) / value)
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))
