"""Which parts of a source no file system uses, so that they need not be read (``--used-only``)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from blockbak.errors import CommandFailed, MissingProgram
from blockbak.host import device as devices
from blockbak.host import partclone
from blockbak.host.marks import reading
from blockbak.host.system import System
from blockbak.model import extent, usedmap
from blockbak.model.btrfs import Unclear
from blockbak.model.extent import HOLE, Extents
from blockbak.model.filesystem import signs
from blockbak.model.partition import parse
from blockbak.model.usedmap import UnusableMap
from blockbak.units import SECTOR, format_size

require = partclone.require


@dataclass(frozen=True, slots=True)
class Unused:
    """Unused ranges as HOLE extents (volume bytes, sorted, disjoint), and sentences about them: what was left out,
    and why something was not.
    """

    extents: Extents = field(default_factory=extent.empty)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file system may lie: a node, its first byte on the source, and its size."""

    node: str
    label: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """What was said of a place: the kind of its file system, why it was not asked, else what is unused (bytes of the
    source).
    """

    place: _Place
    kind: str
    reason: str
    holes: Extents

    def without_others(self, answers: Sequence[_Answer]) -> Extents:
        """What is unused here and by all that lie over it: the kernel takes a table whose partitions overlap."""
        mine, holes = self.place, self.holes
        for answer in answers:
            place = answer.place
            end = place.start + place.size
            if answer is not self and place.start < mine.start + mine.size and mine.start < end:
                used = extent.subtract(extent.table([place.start], [end], HOLE), answer.holes)
                holes = extent.subtract(holes, used)
        return holes


def find_unused(path: str, label: str, check: Callable[[], None], *, frozen: bool = False) -> Unused:
    """What is unused on ``path``, a node or image file that nobody writes; ``label`` is its name for people.

    Of a disk each partition is asked. What cannot be asked, or whose answer cannot be believed, counts as used;
    a note says so. ``frozen``: it is the snapshot of a file system that was frozen. ``check`` may raise while
    partclone runs.
    """
    system = System()
    answers: list[_Answer] = []
    for place in _places(path, label, system):
        check()
        kind, reason = _kind(place, system)
        holes = extent.empty()
        if not reason:
            holes, reason = _ask(place, kind, check, frozen=frozen)
        answers.append(_Answer(place, kind, reason, usedmap.within(holes, place.start)))
    found: list[Extents] = []
    notes: list[str] = []
    for answer in answers:
        found.append(answer.without_others(answers))
        place, kind = answer.place, answer.kind
        what = f"{place.label} ({kind})" if kind else place.label
        if answer.reason:
            notes.append(f"All of {what} is read: {answer.reason}.")
        else:
            notes.append(f"{format_size(extent.total(found[-1]))} of {what} are not in use, and not read.")
    joined = np.concatenate([extent.empty(), *found])
    return Unused(extent.align_out(joined[np.argsort(joined["start"])], 1, sys.maxsize), notes)


def _places(path: str, label: str, system: System) -> Iterator[_Place]:
    device = devices.look(path, system)
    names = system.partitions(device.kname) if device.kname else []
    if not names:
        yield _Place(device.path, label, 0, device.size)
    for name in names:
        size = system.size(name)
        # The kernel shows an extended partition as two sectors (block/partitions/msdos.c).
        if size > 2 * SECTOR:
            node = system.node(name)
            yield _Place(node, node, system.number(name, "start") * SECTOR, size)


def _kind(place: _Place, system: System) -> tuple[str, str]:
    """What lies there, and why it cannot be asked."""
    with reading(place.node) as read:
        found = list(signs(read, place.size))
        table = parse(read, SECTOR, place.size, guess=True)
    if not found:
        return "", "no file system is known there"
    known, *others = found
    if known.type not in partclone.KINDS:
        return known.type, "there is no map of it"
    # One of them was there before, and knows nothing of what is in use now.
    if others:
        return known.type, f"there are signs of others too ({', '.join(map(str, others))})"
    if table is not None:
        return known.type, "there is a partition table too, whose partitions the kernel does not show"
    if devices.look(place.node, system).mounts:
        return known.type, "it is mounted"
    return known.type, ""


def _ask(place: _Place, kind: str, check: Callable[[], None], *, frozen: bool) -> tuple[Extents, str]:
    try:
        reason = partclone.doubt(place.node, kind, frozen=frozen, check=check)
        if not reason:
            return partclone.unused(place.node, kind, place.size, check), ""
    except CommandFailed as error:
        reason = f"{error.fields['program']} does not take it: {_last_line(str(error.fields['stderr']))}"
    except MissingProgram as error:
        reason = str(error).removesuffix(".")
    except (UnusableMap, Unclear) as error:
        reason = str(error)
    except OSError as error:
        reason = f"{place.node} cannot be opened: {error.strerror}"
    return extent.empty(), reason


def _last_line(text: str) -> str:
    """What a program said last, as a clause."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].rstrip(".!") if lines else "it does not say why"
