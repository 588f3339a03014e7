"""Prometheus's text format, read strictly: what its documentation allows, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
_LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
_SAMPLE = re.compile(rf"({_NAME})(?:\{{((?:{_LABEL})(?:,(?:{_LABEL}))*)\}})? (\S+)")
_TYPES = ("counter", "gauge", "histogram", "summary", "untyped")


@dataclass
class Metric:
    """A metric: its type, its help, its samples by their labels."""

    kind: str
    about: str
    samples: dict[tuple[tuple[str, str], ...], float] = field(default_factory=dict)

    def value(self, **labels: str) -> float:
        """Of the one sample that has these labels among its own."""
        (found,) = [value for own, value in self.samples.items() if set(labels.items()) <= set(own)]
        return found


def unescaped(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: {"n": "\n"}.get(found[1], found[1]), text)


def parse(text: str) -> dict[str, Metric]:
    """Every metric. Raises ValueError, with the line, for whatever the format does not have: a line without its line
    feed, a sample before its TYPE, a metric in two places, a label or a series twice, what is no number.
    """
    if not text.endswith("\n"):
        raise ValueError("the last line has no line feed")
    found: dict[str, Metric] = {}
    helps: dict[str, str] = {}
    current = ""
    for line in text[:-1].split("\n"):
        if told := re.fullmatch(rf"# HELP ({_NAME}) (.*)", line):
            if told[1] in helps:
                raise ValueError(f"help twice: {line}")
            if re.search(r"\\(?![\\n])", told[2].replace("\\\\", "")):
                raise ValueError(f"a backslash that says nothing: {line}")
            helps[told[1]] = unescaped(told[2])
        elif told := re.fullmatch(rf"# TYPE ({_NAME}) (\w+)", line):
            if told[1] in found or told[2] not in _TYPES:
                raise ValueError(f"type twice, or none: {line}")
            current = told[1]
            found[current] = Metric(told[2], helps.get(current, ""))
        elif told := _SAMPLE.fullmatch(line):
            if told[1] != current:
                raise ValueError(f"a sample outside of its metric: {line}")
            pairs = [(one[1], unescaped(one[2])) for one in re.finditer(_LABEL, told[2] or "")]
            labels = tuple(sorted(pairs))
            if len({name for name, _ in pairs}) < len(pairs) or labels in found[current].samples:
                raise ValueError(f"a label or a series twice: {line}")
            found[current].samples[labels] = float(told[told.lastindex])
        else:
            raise ValueError(f"no line of the format: {line!r}")
    for name, metric in found.items():
        if not metric.samples:
            raise ValueError(f"a metric without samples: {name}")
    return found
