"""Where each key of a TOML document stands: tomllib tells what a document says, not on which line.

Only for a document that tomllib has read: nothing is checked here, and what is not TOML gives lines of no worth.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from collections.abc import Iterator
from typing import TypeAlias

Path: TypeAlias = tuple[str | int, ...]
"""A key from the top: names of keys, and numbers of an array's elements from 0."""

_BLANK = " \t"
_SPACE = " \t\r\n"
_ENDS = ",]}#\r\n"
"""What ends a value that is no string, array or table: dates may hold a blank."""
_QUOTES_IN_END = 2
"""Quotes of its own with which a string of several lines may end, before the three that end it."""


def lines(text: str) -> dict[Path, int]:
    """The line, from 1, on which each key, table and element of an array begins.

    A table that is only implied (``a`` of ``[a.b]``) stands where it is first implied.
    """
    scan = _Scan(text)
    scan.document()
    return scan.found


class _Scan:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._starts = [0, *(at + 1 for at, char in enumerate(text) if char == "\n")]
        self._lasts: dict[Path, int] = {}
        self.found: dict[Path, int] = {}

    # --- steps through the text -----------------------------------------------------------------------------

    def _peek(self, count: int = 1) -> str:
        return self._text[self._at : self._at + count]

    def _skip(self, chars: str) -> None:
        while self._at < len(self._text) and self._text[self._at] in chars:
            self._at += 1

    def _skip_all(self) -> None:
        """White space, line ends and comments."""
        while True:
            self._skip(_SPACE)
            if self._peek() != "#":
                return
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end

    def _note(self, path: Path, at: int) -> None:
        line = bisect_right(self._starts, at)
        for length in range(1, len(path) + 1):
            self.found.setdefault(path[:length], line)

    # --- the parts of a document ----------------------------------------------------------------------------

    def document(self) -> None:
        """All of it."""
        table: Path = ()
        while True:
            self._skip_all()
            if self._at >= len(self._text):
                return
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Path:
        """``[table]`` or ``[[one of an array of tables]]``; gives its path."""
        begun, double = self._at, self._peek(2) == "[["
        self._at += 2 if double else 1
        path: Path = ()
        names = list(self._key())
        for number, name in enumerate(names):
            path = (*path, name)
            if double and number == len(names) - 1:
                self._note(path, begun)
                self._lasts[path] = self._lasts.get(path, -1) + 1
            if path in self._lasts:
                path = (*path, self._lasts[path])
        self._at += 2 if double else 1
        self._note(path, begun)
        # It may have been implied by a table inside it that stands further up.
        self.found[path] = bisect_right(self._starts, begun)
        return path

    def _pair(self, table: Path) -> None:
        """``key = value``."""
        begun = self._at
        path = (*table, *self._key())
        self._note(path, begun)
        self._at += 1  # the equals sign
        self._skip_all()
        self._value(path)

    def _key(self) -> Iterator[str]:
        """The names of a dotted key; what follows it is next."""
        while True:
            self._skip(_BLANK)
            if self._peek() in ('"', "'"):
                begun = self._at
                self._string()
                yield tomllib.loads(f"key = {self._text[begun : self._at]}")["key"]
            else:
                begun = self._at
                while self._peek().isalnum() or self._peek() in ("-", "_"):
                    self._at += 1
                yield self._text[begun : self._at]
            self._skip(_BLANK)
            if self._peek() != ".":
                return
            self._at += 1

    def _value(self, path: Path) -> None:
        if self._peek() in ('"', "'"):
            self._string()
        elif self._peek() == "[":
            self._array(path)
        elif self._peek() == "{":
            self._inline(path)
        else:
            while self._at < len(self._text) and self._text[self._at] not in _ENDS:
                self._at += 1

    def _array(self, path: Path) -> None:
        self._at += 1
        number = 0
        while True:
            self._skip_all()
            if self._peek() in ("]", ""):
                self._at += 1
                return
            self._note((*path, number), self._at)
            self._value((*path, number))
            number += 1
            self._skip_all()
            if self._peek() == ",":
                self._at += 1

    def _inline(self, path: Path) -> None:
        self._at += 1
        while True:
            self._skip_all()
            if self._peek() in ("}", ""):
                self._at += 1
                return
            self._pair(path)
            self._skip_all()
            if self._peek() == ",":
                self._at += 1

    def _string(self) -> None:
        """A string of any of the four forms."""
        quote = self._peek()
        mark = quote * 3 if self._peek(3) == quote * 3 else quote
        self._at += len(mark)
        while self._at < len(self._text) and self._peek(len(mark)) != mark:
            self._at += 2 if quote == '"' and self._peek() == "\\" else 1
        self._at += len(mark)
        if len(mark) > 1:
            for _ in range(_QUOTES_IN_END):
                self._at += self._peek() == quote
