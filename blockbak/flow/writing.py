"""Writes content to an open target, piece by piece, and reads a point back from there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from blockbak.errors import Damage, DamagedImage, TargetFailed, VerificationFailed
from blockbak.flow import workers
from blockbak.flow.context import Context, never
from blockbak.host.blockio import PIECE_BYTES, TargetWriter, aligned
from blockbak.host.placed import PlacedTarget
from blockbak.image.view import Flaw, PointView, SectionView
from blockbak.model import extent, hashmap
from blockbak.model.extent import BAD
from blockbak.model.hashmap import Geometry, Mask, Rows
from blockbak.model.part import Part
from blockbak.units import KIB, MIB

_ZERO_RUN = 256 * KIB
"""On a device, shorter runs of zeros are written with their neighbours: one request instead of three."""
_SAMPLED_SECTIONS, _SAMPLED_BLOCKS = 8, 8


def mostly_equal(view: PointView, part: Part, target: TargetWriter) -> bool:
    """Does a sample of the target already hold the part? Then reading it first is the quicker way."""
    geometry, equal, seen = view.geometry, 0, 0
    placed = PlacedTarget(target, part)
    buffer = aligned(geometry.block_bytes)
    cut = [at // geometry.block_bytes for at in part.cut(geometry.block_bytes, geometry.device_bytes)]
    first, last = part.start // geometry.section_bytes, max(part.end - 1, part.start) // geometry.section_bytes
    for number in np.unique(np.linspace(first, last, _SAMPLED_SECTIONS).astype(int)).tolist():
        try:
            section = view.section(number)
        except Damage:
            continue  # only where the restore goes on without it
        begin = number * geometry.section_bytes
        belongs = part.blocks(begin, geometry.block_bytes, len(section.kinds))
        stored = np.flatnonzero(section.stored & belongs)
        # A block that lies on the target in part has no row that it could be compared with.
        stored = stored[~np.isin(stored + number * hashmap.BLOCKS_PER_SECTION, cut)]
        if not len(stored):
            continue
        picks = np.unique(np.linspace(0, len(stored) - 1, _SAMPLED_BLOCKS).astype(int))
        for index in stored[picks].tolist():
            block = number * hashmap.BLOCKS_PER_SECTION + index
            length = geometry.block_length(block)
            start = block * geometry.block_bytes
            if start + length > placed.end:
                return False
            try:
                placed.read(start, buffer, length)
            except TargetFailed:
                return False  # a sector that cannot be read may well be written
            row = np.frombuffer(hashmap.digest(buffer[:length]), "<u8")
            equal += bool((row == section.rows[index]).all())
            seen += 1
    return seen > 0 and equal * 2 > seen


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of the content, in volume bytes: at most ``PIECE_BYTES``, from a multiple of it. ``part`` is what the
    content itself knows of it.
    """

    start: int
    length: int
    blocks: int
    part: Any


class Hand(Protocol):
    """One worker's way to the content."""

    def look(self, job: Job) -> tuple[Mask, Rows]:
        """Which blocks of a piece have bytes to be fetched, the others being zeros; and the map rows of all."""

    def fetch(self, job: Job, wanted: Mask, data: npt.NDArray[np.uint8]) -> list[Flaw]:
        """Fill the wanted blocks of ``data`` (the piece's bytes); others may be filled too. What was not good is
        zeros there, and told.
        """


class Content(Protocol):
    """What is written. With ``keep_going`` what is damaged of it is zeros, and ``flaws`` are told by ``pieces``."""

    keep_going: bool
    flaws: list[Flaw]

    @property
    def geometry(self) -> Geometry:
        """How it divides."""

    def pieces(self) -> Iterator[Job]:
        """All of it in address order. Called once."""

    def hand(self) -> Hand:
        """For one more worker."""

    def stop(self) -> None:
        """Give no more pieces, and wait for none: another worker failed."""


class PointContent:
    """A point, cut into pieces, those that hold something of the part. With ``keep_going`` a section whose index is
    damaged in one image is what newer images hold of it, and the rest a flaw.
    """

    def __init__(self, view: PointView, part: Part, *, keep_going: bool) -> None:
        self._view, self._part, self.keep_going = view, part, keep_going
        self.flaws: list[Flaw] = []

    @property
    def geometry(self) -> Geometry:
        """That of the point."""
        return self._view.geometry

    def again(self) -> PointContent:
        """The same from the beginning."""
        return PointContent(self._view, self._part, keep_going=self.keep_going)

    def hand(self) -> Hand:
        """What reads its frames."""
        return _PointHand(self._view)

    def stop(self) -> None:
        """Nothing is waited for."""

    def pieces(self, wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[Job]:
        """The pieces in address order, or those of which ``wanted`` (bool per piece) is set."""
        geometry, block = self._view.geometry, self._view.geometry.block_bytes
        step = PIECE_BYTES // block
        per_section = geometry.section_bytes // PIECE_BYTES
        for number in range(geometry.sections):
            begin, end = geometry.section_range(number)
            if not self._holds(begin, end):
                continue
            if wanted is not None and not wanted[number * per_section : (number + 1) * per_section].any():
                continue
            section, damage = self._section(number)
            if wanted is None and (damage is not None or not self._view.complete):
                self._name_missing(section, begin, damage)
            blocks = geometry.section_blocks(number)
            for low in range(0, blocks, step):
                start = begin + low * block
                if not self._holds(start, min(start + PIECE_BYTES, end)):
                    continue
                if wanted is None or wanted[start // PIECE_BYTES]:
                    count = min(step, blocks - low)
                    yield Job(start, min(PIECE_BYTES, end - start), count, _Part(section, low))

    def _holds(self, start: int, end: int) -> bool:
        low, high = self._part.within(start, end)
        return low < high

    def _section(self, number: int) -> tuple[SectionView, Damage | None]:
        """A section, as far as it can be had, and the damage that was met. Raises it without ``keep_going``."""
        damage: Damage | None = None
        for above in range(len(self._view.layers)):
            try:
                return self._view.section(number, above=above), damage
            except Damage as error:
                if not self.keep_going:
                    raise
                damage = error
        return self._view.section(number, above=len(self._view.layers)), damage

    def _name_missing(self, section: SectionView, begin: int, damage: Damage | None) -> None:
        """Without the base, or with a damaged image, blocks that no newer image holds become zeros; each run of them
        is a flaw.
        """
        block, size = self._view.geometry.block_bytes, self._view.geometry.device_bytes
        lowest = self._view.layers[0].opening
        missing = f"{lowest.volume}/{lowest.parent}"
        reason = "an image that is missing or damaged, or one below it, holds what was there"
        if damage is not None:
            missing, reason = str(damage.fields.get("file", missing)), str(damage)
        for low, high in _pairs(section.kinds == extent.ABSENT):
            start, end = self._part.within(begin + low * block, min(begin + high * block, size))
            if start < end:
                self.flaws.append(Flaw(start, end - start, reason, missing))


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a piece of a point lies: its section, and the piece's first block in it."""

    section: SectionView
    low: int


class _PointHand:
    """Reads the frames of a point; every block is checked against its row."""

    def __init__(self, view: PointView) -> None:
        self._view = view
        self._block = view.geometry.block_bytes

    def look(self, job: Job) -> tuple[Mask, Rows]:
        """From the index."""
        part: _Part = job.part
        blocks = slice(part.low, part.low + job.blocks)
        return part.section.stored[blocks], part.section.rows[blocks]

    def fetch(self, job: Job, wanted: Mask, data: npt.NDArray[np.uint8]) -> list[Flaw]:
        """Fill the windows of ``data`` that hold wanted blocks."""
        view, part, found = self._view, job.part, []
        per_window = view.geometry.window_bytes // self._block
        held = np.logical_or.reduceat(wanted, np.arange(0, len(wanted), per_window))
        for low, high in _pairs(held):
            piece = data[low * per_window * self._block : high * per_window * self._block]
            flaws = view.read(part.section, part.low + low * per_window, piece)
            # What the target holds already needs nothing of a damaged frame.
            found += [one for flaw in flaws for one in _wanted_of(flaw, wanted, job.start, self._block)]
        return found


class Writing:
    """What the workers of one restore share. ``permit`` is asked before each piece is written, and may raise.
    Of a content that is ``endless`` nobody knows how long it will be. ``part`` is what of it is written (None: all),
    and ``flaws`` are of that alone, in the volume's bytes.
    """

    def __init__(
        self, content: Content, target: TargetWriter, method: str, context: Context, *, part: Part | None = None,
        permit: Callable[[], None] = never, endless: bool = False,
    ) -> None:  # fmt: skip
        self.part = part or Part(0, content.geometry.device_bytes)
        self.content, self.method, self.context = content, method, context
        self.target = PlacedTarget(target, self.part)
        self.permit = permit
        self.size = content.geometry.device_bytes
        self.flaws: list[Flaw] = []
        self.written_bytes = 0
        self.done = np.zeros(1 if endless else -(-self.size // PIECE_BYTES), bool)
        self.touched = np.zeros(len(self.done), bool)
        self._guard = threading.Lock()

    def account(self, job: Job, written: int) -> None:
        """A piece is on the target."""
        index = job.start // PIECE_BYTES
        with self._guard:
            if index >= len(self.done):
                more = np.zeros(index + 1, bool)
                self.done = np.concatenate((self.done, more))
                self.touched = np.concatenate((self.touched, more))
            self.done[index] = True
            # What was not written into a new file, or thin volume, is a hole; what did not differ was just read.
            self.touched[index] |= written > 0 or self.method == "write"
            self.written_bytes += written
        self.context.progress.advance(self.bytes_of(job), written)

    def bytes_of(self, job: Job) -> int:
        """How many bytes of a piece belong to the part."""
        low, high = self.part.within(job.start, job.start + job.length)
        return high - low

    def belongs(self, job: Job) -> Mask:
        """The blocks of a piece that hold something of the part."""
        return self.part.blocks(job.start, self.content.geometry.block_bytes, job.blocks)

    def completed(self, hand: Hand, job: Job, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """``data``, read from the target, with what lies outside of the part put to its blocks: the rows are of whole
        ones. Where the content is damaged there they will differ.
        """
        geometry, end = self.content.geometry, job.start + job.length
        for at in self.part.cut(geometry.block_bytes, geometry.device_bytes):
            if not job.start <= at < end:
                continue
            block_end = min(at + geometry.block_bytes, end)
            wanted = np.zeros(job.blocks, bool)
            wanted[(at - job.start) // geometry.block_bytes] = True
            whole = np.zeros(job.length, np.uint8)
            hand.fetch(job, wanted, whole)
            low, high = self.part.within(at, block_end)
            whole[low - job.start : high - job.start] = data[low - job.start : high - job.start]
            data[at - job.start : block_end - job.start] = whole[at - job.start : block_end - job.start]
        return data

    def damaged(self, flaws: list[Flaw]) -> None:
        """Content that is not good: noted with ``keep_going``, else the end."""
        ranges = [(*self.part.within(flaw.start, flaw.start + flaw.length), flaw) for flaw in flaws]
        flaws = [Flaw(low, high - low, flaw.reason, flaw.file) for low, high, flaw in ranges if low < high]
        if not flaws:
            return
        with self._guard:
            self.flaws += flaws
        if not self.content.keep_going:
            raise DamagedImage(file=flaws[0].file, reason=f"{flaws[0]} of the volume")

    def written_ranges(self) -> str:
        """The ranges of the target that are complete, for people."""
        starts, ends = extent.true_runs(self.done)
        pairs = []
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            low, high = self.part.within(start * PIECE_BYTES, end * PIECE_BYTES)
            pairs.append(f"{low - self.part.start} to {high - self.part.start}")
        return ", ".join(pairs) or "nothing"


class _Writer:
    """One worker of a restore."""

    def __init__(self, shared: Writing) -> None:
        self._shared = shared
        self._hand = shared.content.hand()
        self._buffer = aligned(PIECE_BYTES)
        self._block = shared.content.geometry.block_bytes

    def __call__(self, job: Job) -> None:
        stored, rows = self._hand.look(job)
        wanted = self._shared.belongs(job)
        if self._shared.method == "differ":
            wanted &= self._differing(job, rows)
        self._shared.account(job, self._write(job, stored, wanted) if wanted.any() else 0)

    def _differing(self, job: Job, known: Rows) -> Mask:
        """Blocks of the piece that the target does not hold already. BAD ranges hold no promise, but
        their row is that of the zeros a restore puts there.
        """
        data = self._buffer[: job.length]
        try:
            self._shared.target.read(job.start, self._buffer, job.length)
            self._shared.completed(self._hand, job, data)
        except TargetFailed:
            # A disk gives a sector that it cannot read another place when it is written.
            return np.ones(job.blocks, bool)
        nonzero = hashmap.nonzero_blocks(data, self._block)
        rows = hashmap.digest_blocks(data, self._block, nonzero)
        return hashmap.changed_rows(rows, known)

    def _write(self, job: Job, stored: Mask, wanted: Mask) -> int:
        """Write the wanted blocks; bytes that now hold the point because of it."""
        block, target = self._block, self._shared.target
        data = self._buffer[: job.length]
        if (stored & wanted).any():
            self._shared.damaged(self._hand.fetch(job, wanted & stored, data))
        zero = wanted & ~stored
        if target.is_block and self._shared.method != "create":
            # Short runs of zeros go with the data around them.
            for low, high in _pairs(zero):
                if (high - low) * block < min(_ZERO_RUN, job.length):
                    zero[low:high] = False
                    data[low * block : high * block] = 0
        self._shared.permit()
        written = 0
        for low, high in _pairs(wanted & ~zero):
            part = data[low * block : high * block]
            written += target.write(job.start + low * block, part)
        if self._shared.method != "create":
            for low, high in _pairs(zero):
                length = min(high * block, job.length) - low * block
                written += target.zero(job.start + low * block, length)
        return written


def _wanted_of(flaw: Flaw, wanted: npt.NDArray[np.bool_], first_byte: int, block: int) -> Iterator[Flaw]:
    """The parts of a flaw that lie in wanted blocks, which begin at ``first_byte``."""
    for low, high in _pairs(wanted):
        start = max(flaw.start, first_byte + low * block)
        end = min(flaw.start + flaw.length, first_byte + high * block)
        if start < end:
            yield Flaw(start, end - start, flaw.reason, flaw.file)


def _pairs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    starts, ends = extent.true_runs(mask)
    return zip(starts.tolist(), ends.tolist(), strict=True)


def write_all(shared: Writing, context: Context) -> None:
    """Bring every piece to the target; with ``keep_going`` what cannot be had is in ``shared.flaws`` then.

    Raises DamagedImage, TargetFailed, TargetFull, Interrupted, and what the content raises.
    """
    content = shared.content
    context.progress.begin("restoring", min(shared.part.length, shared.size))
    try:
        workers.run(
            content.pieces(),
            lambda: _Writer(shared),
            workers=context.workers,
            check=context.check,
            stop=content.stop,
        )
    except DamagedImage as error:
        # Known only now that all threads have ended.
        reason = f"{error.fields['reason']}; written so far: {shared.written_ranges()}"
        raise DamagedImage(file=error.fields["file"], reason=reason) from error
    finally:
        context.progress.end()
    shared.flaws += content.flaws


def read_back(content: PointContent, shared: Writing, context: Context) -> int:
    """Read what was written past the page cache and compare; bytes compared. Raises VerificationFailed."""
    target, block = shared.target, content.geometry.block_bytes
    damaged = extent.table([f.start for f in shared.flaws], [f.start + f.length for f in shared.flaws], BAD)
    differing: list[int] = []
    compared: list[int] = []

    def make() -> Callable[[Job], None]:
        buffer, hand = aligned(PIECE_BYTES), content.hand()

        def compare(job: Job) -> None:
            target.read(job.start, buffer, job.length)
            data = shared.completed(hand, job, buffer[: job.length])
            rows = hashmap.digest_blocks(data, block, hashmap.nonzero_blocks(data, block))
            unequal = hashmap.changed_rows(rows, hand.look(job)[1])
            unequal &= shared.belongs(job) & ~extent.touched(damaged, job.start, block, job.blocks)
            differing.extend((np.flatnonzero(unequal) * block + job.start).tolist())
            compared.append(shared.bytes_of(job))
            context.progress.advance(shared.bytes_of(job))

        return compare

    context.progress.begin("reading back", int(shared.touched.sum()) * PIECE_BYTES)
    try:
        workers.run(content.again().pieces(shared.touched), make, workers=context.workers, check=context.check)
    finally:
        context.progress.end()
    if differing:
        first = max(min(differing), shared.part.start)
        raise VerificationFailed(path=target.path, blocks=len(differing), first=first - shared.part.start)
    return sum(compared)


assert PIECE_BYTES % MIB == 0  # noqa: S101 - a piece is whole windows, a section whole pieces
