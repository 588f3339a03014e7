"""Checks that stored bytes are what they were: whole images, or a share of their frames."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Self

from blockbak.errors import BlockbakError, Damage, DamagedImage, Failed, Gap, NewerFormat, VolumeLocked
from blockbak.flow import workers
from blockbak.flow.context import Context
from blockbak.flow.points import find, open_reader
from blockbak.flow.recording import recorded
from blockbak.image import check
from blockbak.image.reader import ImageReader, Section
from blockbak.image.view import Flaw, PointView
from blockbak.model import hashmap
from blockbak.model.chain import Image, Point, chains, plan
from blockbak.repository.local import Catalog, Repository, Volume


@dataclass(frozen=True, slots=True)
class Verdict:
    """One image, or one manifest without a usable image. ``damage`` are ranges of the volume; ``newer`` says
    that it is whole as far as it can be told, but of a version that this program does not know.
    """

    volume: str
    point: str
    kind: str
    file: str
    ok: bool
    damage: list[Flaw] = field(default_factory=list)
    checked_bytes: int = 0
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts, and the leftovers that ``recover`` would treat (they are no damage). ``locked`` is the error
    of the first volume that another run held; the others were checked all the same. ``history`` is what is wrong with
    the repository's history, which is looked at where everything is.
    """

    images: list[Verdict]
    leftovers: list[str]
    seconds: float
    locked: VolumeLocked | None = None
    history: list[Damage] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything that was to be looked at was, and is whole."""
        return self.locked is None and not self.history and all(verdict.ok for verdict in self.images)

    @property
    def damaged(self) -> bool:
        """Whether anything is not, for another reason than that this program is too old for it."""
        return bool(self.history) or any(not verdict.ok and not verdict.newer for verdict in self.images)

    @property
    def exit(self) -> int:
        """The exit status. A newer image and a volume that is held are both a plain failure."""
        return Damage.exit_code if self.damaged else 0 if self.ok else Failed.exit_code


def _walk(reader: ImageReader, look: Callable[[Section], None] | None) -> Iterator[Section]:
    """Every section of an image, its seek table compared on the way; ``look`` is shown each one."""
    table = reader.seek_table_check()
    for section in reader.all_sections():
        table.add(section)
        if look is not None:
            look(section)
        yield section
    table.finish()


def check_image(
    reader: ImageReader,
    context: Context,
    *,
    share: float = 1.0,
    pick: Callable[[], float] | None = None,
    look: Callable[[Section], None] | None = None,
) -> tuple[list[Flaw], int]:
    """Check one image, or a random ``share`` of its frames; flaws and stored bytes that were read.

    ``pick`` gives random numbers in [0, 1). Structure is always checked as a whole. ``look`` is shown every
    section, in order, so that what else must see the index needs no walk of its own. Raises Damage where
    the image cannot be walked at all.
    """
    flaws: list[Flaw] = []
    if (tail := check.check_tail(reader)) is not None:
        flaws.append(tail)
    guard = threading.Lock()
    done = 0

    def work(span: check.Span) -> None:
        nonlocal done
        found = check.check_span(reader, span)
        with guard:
            flaws.extend(found)
            done += span.stored_bytes
        context.progress.advance(span.stored_bytes)

    chosen: Iterable[check.Span] = check.spans(reader, _walk(reader, look))
    if share < 1 and pick is not None:
        chosen = _sampled(chosen, share, pick)
    workers.run(chosen, lambda: work, workers=min(context.workers, workers.cores()), check=context.check)
    return sorted(flaws, key=lambda flaw: flaw.start), done


def _sampled(spans: Iterable[check.Span], share: float, pick: Callable[[], float]) -> Iterator[check.Span]:
    """A random share of the spans, and the last one if chance would take none: every image is looked into."""
    taken, last = False, None
    for last in spans:
        if pick() < share:
            taken = True
            yield last
    if not taken and last is not None:
        yield last


def check_frames(view: PointView, context: Context) -> None:
    """Check every frame of all images of a point. Raises DamagedImage at the first that is not good."""
    context.progress.begin("verifying", sum(layer.source.size for layer in view.layers))
    try:
        for layer in view.layers:
            flaws, _ = check_image(layer, context)
            if flaws:
                raise DamagedImage(file=layer.name, reason=flaws[0])
    finally:
        context.progress.end()


def _whole_flaw(size: int, reason: object, file: str) -> Flaw:
    return Flaw(0, size, str(reason), file)


class _MapCheck:
    """Given the top image's sections in order, checks that they have the map digests it states, and its root.

    Damage is kept for ``finish``: the frames of an image are looked at even where its map, or an image that
    it stands on, is not good.
    """

    def __init__(self, open_view: Callable[[], PointView]) -> None:
        self._error: BlockbakError | None = None
        try:
            self._view = open_view()
            self._view.check_binding()
            self._digests = self._view.claimed_digests()
        except (Damage, NewerFormat) as error:
            self._error = error

    def look(self, section: Section) -> None:
        """The next section of the top image."""
        if self._error is not None:
            return
        try:
            self._view.check_section(self._view.section(section.number, section), self._digests)
        except Damage as error:
            self._error = error

    def finish(self) -> None:
        """All sections were given. Raises Damage or NewerFormat."""
        if self._error is not None:
            raise self._error
        geometry, top = self._view.geometry, self._view.top
        if hashmap.root(geometry.device_bytes, geometry.block_bytes, self._digests) != top.closing.root:
            raise DamagedImage(file=top.name, reason="its root does not match its hash map")


class _Readers:
    """The open images of a volume: those of the chain that was asked for last. The next one is mostly the
    same and one more, and opening all of it for each point would take the square of its length.
    """

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._open: dict[str, tuple[ImageReader, ExitStack]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(())

    def keep(self, files: Collection[str]) -> None:
        """Close all but these."""
        for file in self._open.keys() - set(files):
            self._open.pop(file)[1].close()

    def reader(self, image: Image) -> ImageReader:
        """One image, open until ``keep`` leaves it out. Raises Damage or NewerFormat."""
        if image.file not in self._open:
            with ExitStack() as stack:
                self._open[image.file] = open_reader(self._volume, image, stack, from_disk=True), stack.pop_all()
        return self._open[image.file][0]


def _verify_image(
    readers: _Readers,
    image: Image,
    chain: Sequence[Image] | None,
    context: Context,
    share: float,
    pick: Callable[[], float],
) -> Verdict:
    size = image.opening.device_bytes
    flaws: list[Flaw] = []
    checked, newer = 0, False

    def layers() -> PointView:
        return PointView([readers.reader(one) for one in chain or [image]])

    readers.keep([one.file for one in chain or [image]])
    try:
        reader = readers.reader(image)
        if chain is None:
            flaws, checked = check_image(reader, context, share=share, pick=pick)
            flaws.append(_whole_flaw(size, f"its parent {image.opening.parent} is missing or damaged", image.file))
        else:
            point_map = _MapCheck(layers)
            flaws, checked = check_image(reader, context, share=share, pick=pick, look=point_map.look)
            point_map.finish()
    except (Damage, NewerFormat) as error:
        newer = isinstance(error, NewerFormat) and not flaws
        flaws.append(_whole_flaw(size, error, image.file))
    kind, volume = image.opening.kind, image.opening.volume
    return Verdict(volume, image.point, kind, image.file, not flaws, flaws, checked, newer)


def _unusable(error: BlockbakError) -> Verdict:
    """The verdict on an image whose manifest cannot be used."""
    volume, point, kind, file = (str(error.fields.get(key, "")) for key in ("volume", "point", "kind", "image"))
    flaw = Flaw(0, 0, str(error), file)
    return Verdict(volume, point, kind, file, ok=False, damage=[flaw], newer=isinstance(error, NewerFormat))


def _selected(volume: Volume, catalog: Catalog, wanted: Sequence[Point] | None) -> list[Image]:
    """The images to check: all, or those that the wanted points need."""
    if wanted is None:
        return sorted(catalog.images, key=lambda image: (image.opening.sequence, image.file))
    files: dict[str, Image] = {}
    for point in wanted:
        if point.volume == volume.name:
            try:
                chain = plan(point, catalog.images)
            except Gap:
                chain = ()  # the verdict on the point's own images says so
            for image in (*chain, *point.images):
                files[image.file] = image
    return list(files.values())


def _named(repository: Repository, names: Sequence[str], verdicts: list[Verdict]) -> list[Point]:
    """The named points; one whose manifest is damaged becomes a verdict."""
    points = []
    for name in names:
        try:
            points.append(find(repository, name)[2])
        except (Damage, NewerFormat) as error:
            verdicts.append(_unusable(error))
    return points


def verify(
    repository: Repository,
    names: Sequence[str],
    context: Context,
    *,
    share: float = 1.0,
    pick: Callable[[], float],
) -> Report:
    """Check the named points with all images they need, or everything. Damage is in the report, not
    raised, and a volume that another run holds is left out; NoSuchPoint and AmbiguousPoint are raised.
    """
    with recorded(repository, "verified", context, asked=list(names), share=share) as doing:
        report = _verify(repository, names, context, share, pick)
        doing.exit = report.exit
        by_volume: dict[str, list[Verdict]] = {}
        for verdict in report.images:
            by_volume.setdefault(verdict.volume, []).append(verdict)
        for volume, verdicts in by_volume.items():
            doing.part(
                volume, list(dict.fromkeys(one.point for one in verdicts)), ok=all(one.ok for one in verdicts),
                images=[one.file for one in verdicts if one.ok],
                damaged=[one.file for one in verdicts if not one.ok], share=share,
            )  # fmt: skip
        doing.facts["ok"] = report.ok
    return report


def _verify(
    repository: Repository, names: Sequence[str], context: Context, share: float, pick: Callable[[], float]
) -> Report:
    clock = context.timer()
    verdicts: list[Verdict] = []
    points = _named(repository, names, verdicts) if names else None
    leftovers: list[str] = []
    wanted_volumes = {point.volume for point in points} if points is not None else set(repository.volume_names())
    locked: VolumeLocked | None = None
    history = repository.record.flaws() if points is None else []
    for name in sorted(wanted_volumes):
        volume = repository.volume(name)
        with ExitStack() as stack:
            try:
                lock = stack.enter_context(
                    volume.locked(exclusive=False, wait=context.wait, check=context.check, say=context.say)
                )
            except VolumeLocked as error:
                locked = locked or error
                clock += context.wait  # in vain
                continue
            clock += lock.waited
            catalog = volume.catalog()
            if points is None:
                verdicts += [_unusable(error) for error in (*catalog.damage, *volume.pins()[1])]
            leftovers += [f"{name}/{file}" for file in (*catalog.partials, *catalog.orphans, *catalog.deleted)]
            images = _selected(volume, catalog, points)
            whole = chains(catalog.images)
            context.progress.begin(f"verifying {name}", sum(image.image_bytes for image in images))
            try:
                with _Readers(volume) as readers:
                    for image in images:
                        verdicts.append(_verify_image(readers, image, whole.get(image.file), context, share, pick))
            finally:
                context.progress.end()
    return Report(verdicts, leftovers, round(context.timer() - clock, 3), locked, history)
