"""An image file that random hands write to, and fingerprints that say where two volumes differ."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from blockbak.flow import restore
from blockbak.flow.context import Context
from blockbak.host.kernel import Kernel
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB

PIECE = 64 * KIB
SECTION = 4096 * 4 * KIB
"""What a section of the index covers at the smallest block size."""

Fingerprint = tuple[bytes, ...]

# Where things go wrong: next to a block, a window, a piece of the scan, a section.
_EDGES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, SECTION)
_LENGTHS = (1, 2, 511, 512, 4 * KIB - 1, 4 * KIB, 4 * KIB + 1, 20 * KIB, 64 * KIB, 256 * KIB, 300 * KIB + 5, 2 * MIB)


def fingerprint(path: str | os.PathLike[str], length: int | None = None) -> Fingerprint:
    """The digests of a file's (or device's) first ``length`` bytes, one for each 64 KiB; of all by default."""
    digests, left = [], length
    # Most of most volumes, and found out much more quickly than it is digested, where the processor is emulated.
    zeros = bytes(PIECE)
    of_zeros = hashlib.sha256(zeros).digest()
    with open(path, "rb") as file:
        while data := file.read(PIECE if left is None else min(PIECE, left)):
            digests.append(of_zeros if data == zeros else hashlib.sha256(data).digest())
            left = None if left is None else left - len(data)
    return tuple(digests)


def difference(found: Fingerprint, wanted: Fingerprint) -> str | None:
    """The first place where two volumes differ, or None."""
    if found == wanted:
        return None
    if len(found) != len(wanted):
        return f"there are {len(found)} pieces of 64 KiB instead of {len(wanted)}"
    at = next(index for index, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1])
    return f"bytes {at * PIECE} to {(at + 1) * PIECE} differ"


def restored(
    repository: Repository, point: str, target: str | os.PathLike[str], world: Context, *, verify: bool = True
) -> Fingerprint:
    """What a restore of a point makes of a file, whatever lies there."""
    request = restore.Request(point, os.fspath(target), overwrite=True, verify=verify)
    restore.restore(repository, request, world)
    return fingerprint(target)


class Volume:
    """A source: ``path`` is a file or a block device of ``size`` bytes; ``make`` makes the file, sparse. All
    that happens to it follows from the dice.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        dice: random.Random,
        *,
        device: bool = False,
        make: bool = True,
    ) -> None:
        self.path, self.size, self._dice, self._device = Path(path), size, dice, device
        if make and not device:
            with self.path.open("xb") as made:
                made.truncate(size)

    @property
    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.path, self.size)

    def scribble(self, times: int) -> None:
        """So many random changes."""
        with self._open() as file:
            for _ in range(times):
                self._change(file)
            file.flush()
            if self._device:
                os.fsync(file.fileno())

    def fill(self, share: float, stride: int = 64 * KIB) -> None:
        """Put noise into a share of the ``stride`` long pieces."""
        with self._open() as file:
            for start in range(0, self.size, stride):
                if self._dice.random() < share:
                    file.seek(start)
                    file.write(self._dice.randbytes(min(stride, self.size - start)))

    @contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        with self.path.open("r+b") as file:
            yield file

    def _range(self) -> tuple[int, int]:
        """First byte and length of a random range, of which half begin or end at an edge."""
        dice = self._dice
        length = min(dice.choice(_LENGTHS), self.size)
        at = dice.randrange(self.size - length + 1)
        edges = [edge for edge in _EDGES if edge < self.size]
        if edges and dice.random() < 0.5:
            unit = dice.choice(edges)
            at = dice.randrange(self.size // unit + 1) * unit + dice.randint(-1, 1) - dice.choice((0, length))
        elif dice.random() < 0.2:
            at = self.size - length
        at = max(0, min(at, self.size - length))
        return at, length

    def _change(self, file: IO[bytes]) -> None:
        at, length = self._range()
        what = self._dice.choice(["noise", "noise", "text", "letter", "zero", "zero", "discard", "flip", "move"])
        if what == "discard" and not self._device:
            file.flush()
            Kernel().punch(file.fileno(), at, length)
            return
        file.seek(at)
        file.write(self._data(file, what, at, length))

    def _data(self, file: IO[bytes], what: str, at: int, length: int) -> bytes:
        dice = self._dice
        if what == "noise":
            return dice.randbytes(length)
        if what == "text":
            words = b"".join(b"%d blocks of %d; " % (dice.randrange(99), dice.randrange(9)) for _ in range(64))
            return (words * (length // len(words) + 1))[:length]
        if what == "letter":
            return bytes([dice.randrange(1, 256)]) * length
        if what == "flip":
            old = file.read(1)[0]
            file.seek(at)
            return bytes([old ^ 1 << dice.randrange(8)])
        if what == "move":
            file.seek(dice.randrange(self.size - length + 1))
            data = file.read(length)
            file.seek(at)
            return data
        return bytes(length)
