"""The only module that prints: documents on standard output, messages and progress on standard error.

Printing never ends the work: a message that nobody can receive is dropped, and an answer that cannot be
written is noted, for ``main`` to say so in the end.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from blockbak.errors import BlockbakError
from blockbak.model.identity import plain
from blockbak.units import format_seconds, format_size

if TYPE_CHECKING:
    from tqdm import tqdm

_ESCAPED = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS = {code: text for code, text in _ESCAPED.items() if chr(code) not in "\n\t"}
"""Characters that would steer a terminal: a name that holds them is shown, not obeyed."""

_LOOK_SECONDS = 0.2
"""Between two looks at what a person types."""

_lost: list[OSError] = []


def lost() -> OSError | None:
    """Why the answer, or a part of it, could not be written; None if all of it was."""
    return _lost[0] if _lost else None


def lose(error: OSError) -> None:
    """Standard output takes no more: from now on nothing is written there."""
    _lost.append(error)
    _drop(sys.stdout)


def _drop(stream: TextIO) -> None:
    """Send what a stream still holds, and what follows, nowhere: Python would try again at exit."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _fit(text: str, stream: TextIO) -> str:
    """``text`` in what the stream can carry."""
    encoding = stream.encoding or "utf-8"
    return plain(text).encode(encoding, "backslashreplace").decode(encoding)


def _answer(data: str | bytes) -> None:
    if _lost:
        return
    try:
        click.echo(data)
    except OSError as error:
        lose(error)


def _message(text: str) -> None:
    try:
        click.echo(_fit(text, sys.stderr), err=True)
    except OSError:
        _drop(sys.stderr)


def _encodable(value: Any) -> Any:
    """Built-in values, every text in them valid UTF-8."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(one) for one in value]
    return value


def document(value: object) -> None:
    """One JSON document on standard output."""
    import msgspec

    _answer(msgspec.json.format(msgspec.json.encode(_encodable(msgspec.to_builtins(value))), indent=2))


def say(sentence: str) -> None:
    """A message for people, on standard error."""
    _message(f"blockbak: {sentence.translate(_CONTROLS)}")


def line(text: str = "") -> None:
    """A line of what was asked for, on standard output."""
    _answer(_fit(text.translate(_CONTROLS), sys.stdout))


def ask(question: str) -> str | None:
    """What a person types on one line, as the kernel would have it in a path; None at the end of input."""
    typed = b""
    try:
        click.echo(_fit(f"{question.translate(_CONTROLS)}: ", sys.stderr), nl=False, err=True)
        # In short waits: of a signal that comes just before one begins, Python hears only after it.
        waiting = select.poll()
        waiting.register(sys.stdin.fileno(), select.POLLIN)
        while not waiting.poll(_LOOK_SECONDS * 1000):
            pass
        typed = sys.stdin.buffer.readline()
    except OSError:
        return None  # the terminal is gone
    finally:
        if not typed.endswith(b"\n"):
            _message("")  # what is said next has a line of its own
    return os.fsdecode(typed.removesuffix(b"\n")) if typed else None


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
    text = io.StringIO()
    error.show(text)
    _message(text.getvalue().translate(_CONTROLS).removesuffix("\n"))


def unknown(error: Exception, *, as_json: bool) -> None:
    """An error that no one foresaw: a fault of blockbak's own."""
    message = f"blockbak met an error it does not know: {type(error).__name__}: {error}."
    if as_json:
        document({"error": {"name": "Unknown", "message": message, "exit": 1}})
    say(message)
    say("Please report it; BLOCKBAK_DEBUG=1 shows where it happened.")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    numeric: Sequence[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """A table for people on standard output; plain columns, a line a row, where it is not a terminal.

    Where a terminal is too narrow, ``spare`` columns are left out, the first one first, and then cells are
    broken between words. No word ever is, for it may be an id or a device to copy: the line rather runs over.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    terminal = sys.stdout.isatty()
    cells = [list(columns), *([plain(str(cell)).translate(_ESCAPED) for cell in row] for row in rows)]
    by_name = dict(zip(columns, zip(*cells, strict=True), strict=True))
    text = io.StringIO()
    room = Console(file=text).width if terminal else sys.maxsize
    left_out = list(spare)
    while left_out and _table_width(_widest(column) for column in by_name.values()) > room:
        by_name.pop(left_out.pop(0))
    least = [_widest(column if name in numeric else _words(column)) for name, column in by_name.items()]
    widths = _narrowed([_widest(column) for column in by_name.values()], least, room)
    view = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in zip(by_name, widths, strict=True):
        view.add_column(name, justify="right" if name in numeric else "left", width=width)
    for row in list(zip(*by_name.values(), strict=True))[1:]:
        view.add_row(*row)
    whole = _table_width(widths)
    console = Console(file=text, force_terminal=terminal, width=whole, highlight=False, markup=False, emoji=False)
    console.print(view)
    _answer(_fit(text.getvalue().removesuffix("\n"), sys.stdout))


_GAP = 2
"""Cells between two columns: one of padding, one of the box."""


def _widest(texts: Iterable[str]) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, texts), default=0)


def _table_width(widths: Iterable[int]) -> int:
    every = list(widths)
    return sum(every) + _GAP * (len(every) - 1)


def _words(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in text.split(" ")]


def _narrowed(widths: list[int], least: Sequence[int], room: int) -> list[int]:
    """Widths of a table that fits into ``room``, as far as the ``least`` allow: the widest column gives first."""
    while _table_width(widths) > room and (wide := [at for at in range(len(widths)) if widths[at] > least[at]]):
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def size(value: object) -> str:
    """Bytes for people."""
    return format_size(int(str(value)))


def count(number: int, thing: str) -> str:
    """So many things, for people: ``1 image``, ``2 images``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def seconds(value: float) -> str:
    """A duration for people."""
    return format_seconds(value)


def _bar_size() -> dict[str, Any]:
    """A serial console may report no columns or no rows, which tqdm takes for no room."""
    columns, rows = os.get_terminal_size(sys.stderr.fileno())
    if columns and rows:
        return {"dynamic_ncols": True}
    return {"ncols": columns or 80, "nrows": rows or 24}


class Bar:
    """Progress on a terminal: bytes, rate, time left, changed so far. Quiet elsewhere, and from the moment
    on when the terminal is gone.
    """

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

        tqdm.monitor_interval = 0  # no thread of its own: bytes arrive all the time
        self._changed = 0
        try:
            self._bar = tqdm(
                total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False,
                file=sys.stderr, **_bar_size(),
            )  # fmt: skip
        except OSError:
            self._stop()

    def advance(self, done: int, changed: int | None = None) -> None:
        """Move on; any thread may call."""
        if self._bar is None:
            return
        with self._guard:
            self._changed += changed or 0
            try:
                if self._bar is not None:
                    if changed is not None:
                        self._bar.set_postfix_str(f"{format_size(self._changed)} changed", refresh=False)
                    self._bar.update(done)
            except OSError:
                self._stop()

    def end(self) -> None:
        """The stage is over."""
        if self._bar is not None:
            try:
                self._bar.close()
            except OSError:
                self._stop()
            self._bar = None

    def _stop(self) -> None:
        """Nobody watches any more."""
        self._shown = False
        if self._bar is not None:
            self._bar.disable = True  # else it says good-bye when it is collected
            self._bar = None
        _drop(sys.stderr)
