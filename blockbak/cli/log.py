"""Messages as lines of a log: with the run's id, and the job, volume and point that they are about."""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import click

from blockbak.cli import common, render

_PRIORITIES = {"error": "3", "info": "6"}
"""Of syslog(3)."""
_SUBJECTS = ("job", "volume", "point")
_forms: list[str] = []


def begin(form: str) -> None:
    """From now on messages are lines of that form: ``human``, ``json`` or ``journal``."""
    import structlog

    forms: dict[str, structlog.typing.Processor] = {
        "human": _human, "json": structlog.processors.JSONRenderer(), "journal": _journal,
    }  # fmt: skip
    logger = structlog.wrap_logger(
        _Lines(),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.EventRenamer("message"),
            forms[form],
        ],
        wrapper_class=structlog.BoundLogger,
    ).bind(run=common.run_id())

    def voice(level: str, sentence: str, facts: Mapping[str, str]) -> None:
        known = {name: value for name, value in facts.items() if value}
        getattr(logger, level)(sentence, **known)

    _forms[:] = [form]
    render.log_with(voice)


def for_people() -> bool:
    """Whether people read the messages: then answers are on standard output, and not in the log."""
    return _forms in ([], ["human"])


def begin_unless_begun() -> None:
    """The same, in the form that suits where messages go, if nobody has chosen one."""
    if render.logs():
        return
    from blockbak.host.journald import reads_stream

    if sys.stderr.isatty():
        begin("human")
    else:
        begin("journal" if reads_stream(sys.stderr.fileno()) else "json")


class _Lines:
    """Where structlog leaves a line."""

    def info(self, text: str) -> None:
        """Write it."""
        render.log_line(text)

    error = info


def _human(_: object, __: str, line: MutableMapping[str, Any]) -> str:
    about = [f"run {line['run'][:8]}", *(str(line[name]) for name in _SUBJECTS if name in line)]
    mark = click.style("error: ", fg="red") if line["level"] == "error" else ""
    return f"blockbak: {mark}{line['message']} {click.style('[' + ', '.join(about) + ']', dim=True)}"


def _journal(_: object, __: str, line: MutableMapping[str, Any]) -> str:
    """Hand it to the journal; where that does not take it, a line that it would understand on standard error."""
    from structlog import DropEvent

    from blockbak.host import journald

    priority = _PRIORITIES[line["level"]]
    fields = {"MESSAGE": line["message"], "PRIORITY": priority, "SYSLOG_IDENTIFIER": "blockbak"}
    fields |= {f"BLOCKBAK_{name.upper()}": str(line[name]) for name in ("run", *_SUBJECTS, "error") if name in line}
    if journald.send(fields):
        raise DropEvent
    return f"<{priority}>{line['message']}"
