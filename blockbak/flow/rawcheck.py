"""A raw image and its sidecar: opened, and checked against each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from blockbak.errors import (
    BlockbakError,
    DamagedRawImage,
    DamagedSidecar,
    NewerFormat,
    NoSidecar,
    NoSuchImage,
    SourceError,
    UnreadableStore,
)
from blockbak.flow.context import Context
from blockbak.flow.rawmap import MapSum, ranges, survey, told
from blockbak.flow.scan import Job, jobs
from blockbak.flow.verify import Verdict
from blockbak.host.blockio import Bytes, SourceReader, StoredFile, aligned, read_error
from blockbak.image import sidecar
from blockbak.image.sidecar import Sidecar
from blockbak.image.view import Flaw
from blockbak.model.hashmap import BLOCKS_PER_SECTION
from blockbak.units import KIB, align_down, align_up

RAW = "raw"
"""What stands for the kind of a raw image in reports."""
_LARGEST = 1 << 30
"""Bytes of a sidecar that is still read: one of the largest volume, with the smallest blocks, has a fifth of it."""


def is_raw(word: str) -> bool:
    """Whether a word on the command line is a raw image's name and no point's."""
    return "/" in word or (os.path.isfile(word) and os.path.isfile(beside(word)))


def beside(path: str) -> str:
    """Where the sidecar of an image lies: beside the name that was given, or beside the file that it leads to."""
    named = path + sidecar.ENDING
    return (
        named if os.path.lexists(named) else os.path.realpath(path) + sidecar.ENDING if os.path.islink(path) else named
    )


def read_sidecar(path: str, context: Context, *, image: str = "") -> Sidecar:
    """The sidecar at ``path``, of ``image`` where there is one. Raises NoSidecar, DamagedSidecar, NewerFormat,
    NoPermission, UnreadableStore.
    """
    try:
        with StoredFile(path, path, context.kernel) as file:
            if file.size > _LARGEST:
                raise DamagedSidecar(file=path, reason="it is too large to be one")
            data = bytes(file.read(0, file.size))
    except FileNotFoundError as error:
        raise NoSidecar(path=image or path, sidecar=path if image else "there") from error
    except OSError as error:
        raise read_error(error, path, path) from error
    return sidecar.decode(data, path)


@dataclass(frozen=True, slots=True)
class RawImage:
    """A raw image, open, and what its sidecar says."""

    path: str
    said: Sidecar
    source: SourceReader

    def read(self, offset: int, into: Bytes, length: int) -> None:
        """As ``SourceReader.read``. Raises UnreadableStore where the disk below cannot deliver it."""
        try:
            bad = self.source.read(offset, into, length)
        except SourceError as error:
            raise UnreadableStore(file=self.path, offset=offset, reason=str(error).removesuffix(".")) from error
        if len(bad):
            raise UnreadableStore(file=self.path, offset=int(bad[0]["start"]), reason="the disk gives an error")

    def peek(self, offset: int, length: int) -> bytes:
        """For parsers of partition tables and file systems; nothing where nothing can be read."""
        return peek(self.source, offset, length)


def peek(source: SourceReader, offset: int, length: int) -> bytes:
    """A few bytes of a source, wherever they lie; what cannot be read is zeros, what is not there is left out."""
    length = max(0, min(length, source.size - offset))
    if offset < 0 or not length:
        return b""
    start = align_down(offset, 4 * KIB)
    end = min(align_up(offset + length, 4 * KIB), source.size)
    buffer = aligned(end - start)
    with contextlib.suppress(SourceError):
        source.read(start, buffer, end - start)
    return buffer[offset - start : offset - start + length].tobytes()


@contextlib.contextmanager
def opened(path: str, context: Context) -> Iterator[RawImage]:
    """A raw image with its sidecar. Raises NoSuchImage, NoSidecar, DamagedSidecar, NewerFormat, NoPermission."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise NoSuchImage(path=path, reason=error.strerror) from error
    if not os.path.isfile(path):
        what = "it is a directory" if os.path.isdir(path) else "it is not a file"
        raise NoSuchImage(path=path, reason=what)
    said = read_sidecar(beside(path), context, image=path)
    with SourceReader(path, exclusive=False, kernel=context.kernel) as source:
        if not source.is_of(path, (info.st_dev, info.st_ino)):
            raise NoSuchImage(path=path, reason="another one has its name now")
        yield RawImage(path, said, source)


@dataclass(slots=True)
class Checked:
    """What a check found: ``flaws`` in order, bytes that were read, bytes of blocks that are not zeros."""

    flaws: list[Flaw]
    read_bytes: int
    data_bytes: int


def check(raw: RawImage, context: Context, *, share: float = 1.0, pick: Callable[[], float] | None = None) -> Checked:
    """Compute the map of a raw image anew, or of a random ``share`` of its sections, and compare. Flaws are told
    by whole sections, as far as the sidecar can tell.
    """
    said, geometry, source = raw.said, raw.said.geometry, raw.source
    flaws: list[Flaw] = []
    chosen = np.ones(geometry.sections, bool)
    if source.size != said.device_bytes:
        flaws.append(_wrong_length(raw))
        # What is missing needs no reading to be known.
        chosen[source.size // geometry.section_bytes :] &= source.size > said.device_bytes
    if share < 1 and pick is not None and chosen.any():
        chosen &= np.array([pick() < share for _ in range(geometry.sections)])
        chosen[0] |= not chosen.any()
    lost = np.zeros(geometry.sections, bool)

    def read(offset: int, into: Bytes, length: int) -> None:
        try:
            raw.read(offset, into, length)
        except UnreadableStore:
            lost[offset // geometry.section_bytes] = True

    known = MapSum(geometry)
    wanted = (job for job in _within(jobs(geometry, source), chosen))
    context.progress.begin(f"checking {os.path.basename(raw.path)}", geometry.device_bytes)
    try:
        read_bytes = survey(known, wanted, read, said.unread, context)
    finally:
        context.progress.end()
    expected = sidecar.packed(said.sections)
    differ = (known.digests != expected).any(axis=1) & chosen & ~lost
    for mask, reason in ((lost, "the disk below it gives an error"), (differ, "its bytes are not what they were")):
        flaws += [Flaw(start, end - start, reason, raw.path) for start, end in ranges(geometry, mask)]
    return Checked(sorted(flaws, key=lambda flaw: flaw.start), read_bytes, known.data_bytes)


def _within(pieces: Iterator[Job], chosen: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[Job]:
    for job in pieces:
        if chosen[job.first_block // BLOCKS_PER_SECTION]:
            yield job


def _wrong_length(raw: RawImage) -> Flaw:
    have, want = raw.source.size, raw.said.device_bytes
    if have < want:
        return Flaw(have, want - have, f"it has {have} bytes instead of {want}", raw.path)
    return Flaw(want, 0, f"it has {have} bytes instead of {want}", raw.path)


def check_whole(raw: RawImage, context: Context) -> Checked:
    """The same for whoever is about to use all of it. Raises DamagedRawImage."""
    found = check(raw, context)
    if found.flaws:
        raise damage(raw.path, found.flaws)
    return found


def damage(path: str, flaws: Sequence[Flaw]) -> DamagedRawImage:
    """The error that names what a check found."""
    reason = flaws[0].reason
    places = told((flaw.start, flaw.start + flaw.length) for flaw in flaws if flaw.length)
    return DamagedRawImage(file=path, reason=f"{reason}, at bytes {places}" if places else reason)


def verify_raw(
    paths: Sequence[str], context: Context, *, share: float = 1.0, pick: Callable[[], float]
) -> list[Verdict]:
    """A verdict on each raw image. Damage is in it, not raised; NoSuchImage and NoSidecar are, before anything is
    read.
    """
    verdicts: list[Verdict | None] = []
    for path in paths:
        try:
            with opened(path, context):
                verdicts.append(None)
        except (DamagedSidecar, NewerFormat, UnreadableStore) as error:
            verdicts.append(_unusable(path, error))
    return [verdict or _verdict(path, context, share, pick) for path, verdict in zip(paths, verdicts, strict=True)]


def _verdict(path: str, context: Context, share: float, pick: Callable[[], float]) -> Verdict:
    try:
        with opened(path, context) as raw:
            found = check(raw, context, share=share, pick=pick)
    except (DamagedSidecar, NewerFormat, UnreadableStore) as error:
        return _unusable(path, error)
    return Verdict("", "", RAW, path, not found.flaws, found.flaws, found.read_bytes)


def _unusable(path: str, error: BlockbakError) -> Verdict:
    flaw = Flaw(0, 0, str(error), path)
    return Verdict("", "", RAW, path, ok=False, damage=[flaw], newer=isinstance(error, NewerFormat))
