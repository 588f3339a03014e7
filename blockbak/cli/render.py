"""The only module that prints: documents on standard output, messages and progress on standard error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from blockbak.errors import BlockbakError
from blockbak.units import format_seconds, format_size

if TYPE_CHECKING:
    from tqdm import tqdm


def document(value: object) -> None:
    """One JSON document on standard output."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2)
    click.echo(text.decode())


def say(sentence: str) -> None:
    """A message for people, on standard error."""
    click.echo(f"blockbak: {sentence}", err=True)


def line(text: str = "") -> None:
    """A line of what was asked for, on standard output."""
    click.echo(text)


def failure(error: BlockbakError, *, as_json: bool) -> None:
    """Why nothing came of it."""
    if as_json:
        document({"error": error.as_dict()})
    say(str(error))
    if error.hint:
        say(error.hint)
    for note in getattr(error, "__notes__", ()):
        say(note)


def wrong_usage(error: click.ClickException, *, as_json: bool) -> None:
    """A command line that cannot be understood."""
    if as_json:
        document({"error": {"name": "WrongUsage", "message": error.format_message(), "exit": error.exit_code}})
    error.show()


def unknown(error: Exception, *, as_json: bool) -> None:
    """An error that no one foresaw: a fault of blockbak's own."""
    message = f"blockbak met an error it does not know: {type(error).__name__}: {error}."
    if as_json:
        document({"error": {"name": "Unknown", "message": message, "exit": 1}})
    say(message)
    say("Please report it; BLOCKBAK_DEBUG=1 shows where it happened.")


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, numeric: Sequence[str] = ()) -> None:
    """A table for people on standard output; plain columns where it is not a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    width = None if sys.stdout.isatty() else 200
    view = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        view.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    for row in rows:
        view.add_row(*(str(cell) for cell in row))
    Console(width=width, highlight=False, markup=False).print(view)


def size(value: object) -> str:
    """Bytes for people."""
    return format_size(int(str(value)))


def seconds(value: float) -> str:
    """A duration for people."""
    return format_seconds(value)


class Bar:
    """Progress on a terminal: bytes, rate, time left, changed so far. Quiet elsewhere."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._changed = 0
        self._guard = threading.Lock()

    def begin(self, label: str, total: int) -> None:
        """A stage of ``total`` bytes starts."""
        if not self._shown:
            return
        from tqdm import tqdm

        self._changed = 0
        self._bar = tqdm(
            total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False,
            dynamic_ncols=True, file=sys.stderr,
        )  # fmt: skip

    def advance(self, done: int, changed: int = 0) -> None:
        """Move on; any thread may call."""
        if self._bar is None:
            return
        with self._guard:
            self._changed += changed
            if self._changed:
                self._bar.set_postfix_str(f"{format_size(self._changed)} changed", refresh=False)
            self._bar.update(done)

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
