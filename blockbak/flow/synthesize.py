"""Composes existing images into one: a full (or a differential) at a point, without the source."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blockbak.errors import ComposeFailed, Damage, DamagedImage, NoSuchPoint, NothingToMerge
from blockbak.flow import workers
from blockbak.flow.backup import Report as PointReport
from blockbak.flow.backup import report
from blockbak.flow.context import Context, iso
from blockbak.flow.points import find, open_chain, open_point, open_reader
from blockbak.flow.recording import recorded
from blockbak.flow.verify import check_image
from blockbak.host.blockio import PartialFile
from blockbak.image import codec
from blockbak.image.compose import Composer, Tally
from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter
from blockbak.model.chain import Image, Point
from blockbak.model.facts import FULL, Closing, Kind, Opening
from blockbak.repository.local import Repository, Volume


@dataclass(frozen=True, slots=True)
class Report:
    """The composed image, and how its bytes came to be: shared with older images, copied, encoded."""

    point: PointReport
    cloned_bytes: int
    copied_bytes: int
    encoded_bytes: int
    clones: int
    written: bool

    @property
    def facts(self) -> dict[str, object]:
        """What the history says of it."""
        return {
            "file": self.point.file, "stored_bytes": self.point.stored_bytes, "cloned_bytes": self.cloned_bytes,
            "copied_bytes": self.copied_bytes, "encoded_bytes": self.encoded_bytes,
        }  # fmt: skip


def synthesize(
    repository: Repository,
    name: str,
    context: Context,
    *,
    at: str | None = None,
    kind: Kind = FULL,
    compress: str = "zstd",
) -> Report:
    """Compose an image of ``kind`` at a volume's newest point, or at the point ``at``.

    If the point is held that way already, nothing is written and that image is reported. Raises
    NoSuchVolume, NoSuchPoint, Damage, ComposeFailed, NoSpace, StoreFailed.
    """
    with recorded(repository, "merged", context, volume=name, kind=kind) as doing:
        made = _synthesize(repository, name, context, at, kind, compress)
        doing.points, doing.quiet = [made.point.point], not made.written
        doing.facts |= made.facts
    return made


def _synthesize(
    repository: Repository, name: str, context: Context, at: str | None, kind: Kind, compress: str
) -> Report:
    volume = repository.volume(name)
    with volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say), ExitStack() as stack:
        catalog = volume.catalog()
        for line in volume.tidy(catalog):
            context.say(line)
        point = _point(repository, name, at)
        opened = open_point(volume, catalog, point, stack)
        view = opened.view
        bad = volume.found_damaged(context.say)
        known = next((one for one in point.images if one.opening.kind == kind and one.file not in bad), None)
        if known is not None and _usable(volume, known, opened.chain):
            return Report(report(known), 0, 0, 0, 0, written=False)
        if kind != FULL and len(view.layers) == 1:
            raise NothingToMerge(volume=name, point=point.id)
        _check_frames(volume, [one for one in opened.chain if one.file in bad], context)
        image, tally = compose(volume, view, 0 if kind == FULL else 1, kind, compress, context)
        return Report(
            report(image),
            tally.cloned_bytes,
            tally.copied_bytes,
            tally.encoded_bytes,
            tally.clones,
            written=True,
        )


def _check_frames(volume: Volume, doubtful: Sequence[Image], context: Context) -> None:
    """Read images that were found damaged once more, before anything is made of them: frames are taken over as they are
    stored, and under a new name nobody would know of the damage. Raises DamagedImage.
    """
    for image in doubtful:
        with ExitStack() as stack:
            flaws, _ = check_image(open_reader(volume, image, stack, from_disk=True), context)
        if flaws:
            raise DamagedImage(file=image.file, reason=f"{flaws[0].reason}; nothing is composed of it")


def _point(repository: Repository, name: str, at: str | None) -> Point:
    """The newest point of a volume, or the one named; of this volume in any case."""
    point = find(repository, at if at and "@" in at else f"{name}@{at or 'latest'}")[2]
    if point.volume != name:
        raise NoSuchPoint(point=f"{at} in {name}")
    return point


def _usable(volume: Volume, image: Image, chain: list[Image]) -> bool:
    """Is an image that holds the point already in order? Its own chain may not be the one in use."""
    if chain[-1].file == image.file:
        return True
    if image.opening.kind != FULL:
        return False
    with ExitStack() as stack:
        try:
            open_chain(volume, [image], stack).check()
        except Damage:
            return False
    return True


def compose(
    volume: Volume, whole: PointView, below: int, kind: Kind, compress: str, context: Context
) -> tuple[Image, Tally]:
    """An image of the point ``whole`` without its first ``below`` layers: a full, if that is none of them, else a delta
    on the point of the last of them. It is sealed and committed, and its map, read back, is the point's.

    The volume must be held. Raises Damage, ComposeFailed, NoSpace, StoreFailed, Interrupted.
    """
    started, clock = context.now(), context.timer()
    layers = PointView(whole.layers[below:])
    top, base = whole.top.opening, whole.layers[max(below - 1, 0)]
    opening = Opening(
        repository=top.repository, image=context.hex_id(32), volume=top.volume, point=top.point,
        sequence=top.sequence, kind=kind, synthetic=True,
        parent=None if kind == FULL else base.opening.point,
        parent_root=None if kind == FULL else base.closing.root,
        identity=top.identity, device_bytes=top.device_bytes, block_bytes=top.block_bytes,
        window_bytes=top.window_bytes, logical_sector=top.logical_sector, physical_sector=top.physical_sector,
        created=top.created, source=top.source, host=top.host,
    )  # fmt: skip
    file = volume.free_name(top.point, kind)
    with volume.begin(file) as partial:
        # Tried out on the empty file, so before the header is written.
        unit = partial.clone_unit(layers.layers[0].source)
        writer = ImageWriter(partial, opening, whole.claimed_digests() if kind != FULL else None)
        composer = Composer(layers, writer, partial, unit)
        context.progress.begin(f"composing {top.point}", top.device_bytes)
        try:
            workers.run(
                composer.pieces(),
                lambda: composer.worker(codec.encoder(compress), context.progress.advance),
                workers=context.workers,
                check=context.check,
                stop=composer.stop,
            )
            composer.finish()
        finally:
            context.progress.end()
        context.check()
        counts, said = writer.counts, whole.top.closing
        closing = Closing(
            root=writer.root, mode=said.mode, consistency=said.consistency, change_source="images", read_bytes=0,
            changed_bytes=counts.changed_bytes, **counts.by_name(), frames=counts.frames,
            started=iso(started), finished=iso(context.now()), seconds=round(context.timer() - clock, 3),
            program=context.program, notes=list(said.notes), set_id=said.set_id,
            lvm_metadata=said.lvm_metadata, hooks=dict(said.hooks),
        )  # fmt: skip
        size, digest = writer.finish(closing)
        _check_composed(partial, layers, whole)
        partial.seal()
        image = Image(file, size, digest, opening, closing, writer.listed)
        volume.commit(image)
        # The header, the closing record and the seek table are written beside the composer.
        composer.tally.copied_bytes = size - composer.tally.cloned_bytes - composer.tally.encoded_bytes
    return image, composer.tally


def _check_composed(partial: PartialFile, layers: PointView, whole: PointView) -> None:
    """Read the composed image's index back from the file: its map must be the point's, or it is void.

    Raises ComposeFailed.
    """
    below = whole.layers[: len(whole.layers) - len(layers.layers)]
    try:
        reader = ImageReader(partial)
        PointView([*below, reader]).check()
    except Damage as error:
        raise ComposeFailed(point=whole.top.opening.point) from error
    if reader.closing.root != whole.top.closing.root:
        raise ComposeFailed(point=whole.top.opening.point)
