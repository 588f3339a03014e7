"""Names what could not be read, or restored, in a form that GNU ddrescue and its tools read."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from blockbak.errors import BadTarget, TargetHolds
from blockbak.flow.target import is_stored
from blockbak.image.view import Flaw
from blockbak.model import extent
from blockbak.model.extent import BAD, HOLE, Extents
from blockbak.repository.local import Repository, repository_above

_BEGINS = "# Mapfile."
_STATUS = {BAD: "-", HOLE: "?"}


class Mapfile:
    """A file for what could not be restored, open before the first byte is."""

    def __init__(self, path: str, fd: int) -> None:
        self.path, self._fd = path, fd
        self.written = False

    def write(self, flaws: Sequence[Flaw], bad: Extents, size: int) -> None:
        """Put everything that was lost into it. Raises BadTarget."""
        lost = extent.empty()
        for flaw in flaws:
            lost = extent.overlay(lost, extent.table([flaw.start], [flaw.start + flaw.length], BAD))
        self.written = True
        try:
            os.ftruncate(self._fd, 0)
            with os.fdopen(os.dup(self._fd), "w", encoding="ascii") as file:
                file.write(text(extent.overlay(lost, bad), size))
        except OSError as error:
            raise BadTarget(path=self.path, reason=error.strerror) from error


@contextlib.contextmanager
def mapfile(named: str | None, target: str, beside: str, repository: Repository) -> Iterator[Mapfile]:
    """The mapfile that was named; else ``beside``, or the next name like it that nothing has. It goes again if
    nothing was lost. Raises BadTarget, TargetHolds.
    """
    place = base = os.path.realpath(named or beside)
    number = 1
    while not named and os.path.lexists(place):
        number += 1
        place = f"{base}.{number}"
    known = os.path.lexists(place)
    _check(place, target, repository, known=known)
    try:
        fd = os.open(
            place, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if known else os.O_EXCL), 0o600
        )
    except OSError as error:
        raise BadTarget(path=place, reason=error.strerror) from error
    made = Mapfile(place, fd)
    try:
        yield made
    finally:
        os.close(fd)
        if not known and not made.written:
            os.unlink(place)


def _check(place: str, target: str, repository: Repository, *, known: bool) -> None:
    """It must not be the target, nor in a repository, nor any file but an older mapfile."""
    names = (target, f"{target}.partial")
    if place in names or (known and os.path.lexists(target) and os.path.samefile(place, target)):
        raise BadTarget(path=place, reason="it is the target of the restore")
    if repository_above(place) or is_stored(place, repository):
        raise TargetHolds(path=place, what="a part of a repository")
    if not known:
        return
    if not os.path.isfile(place):
        raise BadTarget(path=place, reason="it exists, and is no mapfile")
    try:
        with open(place, "rb") as file:
            is_one = file.read(len(_BEGINS)) == _BEGINS.encode()
    except OSError as error:
        raise BadTarget(path=place, reason=error.strerror) from error
    if not is_one:
        raise BadTarget(path=place, reason="it exists, and is no mapfile")


def text(lost: Extents, size: int) -> str:
    """A mapfile as GNU ddrescue reads it (its manual, "Mapfile structure"): ``-`` for BAD, ``?`` for HOLE, which
    nobody tried to read, ``+`` for all else.
    """
    lines = [f"{_BEGINS} Created by blockbak", "# current_pos  current_status  current_pass", "0x0  +  1"]
    lines.append("#      pos        size  status")
    whole = extent.table([0], [size], extent.DATA)
    for row in extent.overlay(whole, lost):
        status = _STATUS.get(int(row["kind"]), "+")
        lines.append(f"0x{int(row['start']):08X}  0x{int(row['length']):08X}  {status}")
    return "\n".join(lines) + "\n"
