"""Finishes or undoes what a crash left in a repository."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from blockbak.errors import ATTENTION, Damage, DamagedImage, DamagedManifest, NewerFormat, VolumeLocked
from blockbak.flow.context import Context
from blockbak.flow.points import open_reader
from blockbak.flow.recording import recorded
from blockbak.flow.verify import check_image
from blockbak.image.reader import ImageReader
from blockbak.model.chain import Image, chains
from blockbak.repository.local import Catalog, Repository, Volume


@dataclass(slots=True)
class Report:
    """Sentences on what was done, and on what a person must look at. ``locked`` is the first volume's error
    that another run holds; the others were treated all the same.
    """

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    locked: VolumeLocked | None = None


def recover(repository: Repository, context: Context) -> Report:
    """Sweep partials, finish deletions, give orphans their manifests and write damaged ones anew. Raises
    NoSpace, StoreFailed, Interrupted; a damaged image is reported and left as it is.
    """
    report = Report()
    with recorded(repository, "recovered", context, done=report.done, left=report.left) as doing:
        doing.points = report.adopted
        _recover_all(repository, context, report)
        doing.exit = report.locked.exit_code if report.locked else ATTENTION if report.left else 0
    return report


def _recover_all(repository: Repository, context: Context, report: Report) -> None:
    for volume in repository.volumes():
        try:
            with volume.locked(exclusive=True, wait=context.wait, check=context.check, say=context.say):
                _recover(volume, repository.id, context, report)
        except VolumeLocked as error:
            report.locked = report.locked or error
    # After the volumes: what is swept there may be the only room there is.
    report.done += [f"{name} was missing or another one, and is there again." for name in repository.refresh()]


def _recover(volume: Volume, repository_id: str, context: Context, report: Report) -> None:
    catalog = volume.catalog()
    report.done += [f"{volume.name}: {line}" for line in volume.tidy(catalog)]
    without = (*catalog.orphans, *_damaged(volume, catalog))
    for file in without:
        context.check()
        _adopt(volume, file, repository_id, context, report)
    if without:
        catalog = volume.catalog()
    whole = chains(catalog.images)
    report.left += [f"{volume.name}: {error}" for error in catalog.damage]
    report.left += [
        f"{volume.name}: {image.file} has no parent here ({image.opening.parent})."
        for image in catalog.images
        if image.file not in whole
    ]


def _damaged(volume: Volume, catalog: Catalog) -> list[str]:
    """The images that are there while their manifest is damaged, or does not say what they do. The manifest
    of a newer program, or one that may not be read, is not damaged.
    """
    files = [str(error.fields["image"]) for error in catalog.damage if isinstance(error, DamagedManifest)]
    for image in catalog.images:
        with ExitStack() as stack:
            try:
                open_reader(volume, image, stack)
            except DamagedManifest:
                files.append(image.file)
            except (Damage, NewerFormat):
                continue  # not the manifest's fault; what verify is for
    return files


def _adopt(volume: Volume, file: str, repository_id: str, context: Context, report: Report) -> None:
    """Write the manifest of a sealed image anew, once every byte of it has been checked."""
    try:
        with ExitStack() as stack:
            source = stack.enter_context(volume.open_image(file))
            source.drop_cache()
            reader = ImageReader(source)
            opening = reader.opening
            if (opening.repository, opening.volume) != (repository_id, volume.name):
                raise DamagedImage(file=file, reason=f"it belongs to volume {opening.volume} of another place")
            if not file.startswith(f"{opening.point}.{opening.kind}."):
                raise DamagedImage(file=file, reason="it is of another point or kind than its name says")
            context.progress.begin(f"checking {file}", reader.source.size)
            try:
                flaws, _ = check_image(reader, context)
            finally:
                context.progress.end()
            if flaws:
                raise DamagedImage(file=file, reason=flaws[0].reason)
            image = Image(
                file, reader.source.size, reader.closing_sha256, opening, reader.closing, len(reader.sections)
            )
            volume.renew(image)
    except (Damage, NewerFormat) as error:
        report.left.append(f"{volume.name}: {file} has no usable manifest and was left alone: {error}")
    else:
        report.adopted.append(opening.point)
        report.done.append(f"{volume.name}: {file} was checked and has its manifest again.")
