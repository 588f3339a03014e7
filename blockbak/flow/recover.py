"""Finishes or undoes what a crash left in a repository."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field

from blockbak.errors import BlockbakError, DamagedImage
from blockbak.flow.context import Context
from blockbak.flow.verify import check_image
from blockbak.image.reader import ImageReader
from blockbak.model.chain import Image, chains
from blockbak.repository.local import Repository, Volume


@dataclass(slots=True)
class Report:
    """Sentences on what was done, and on what a person must look at."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)


def recover(repository: Repository, context: Context) -> Report:
    """Sweep partials, finish deletions, give orphans their manifests. Raises VolumeLocked, NoSpace,
    StoreFailed, Interrupted; a damaged orphan is reported and left as it is.
    """
    report = Report()
    for volume in repository.volumes():
        with volume.locked(exclusive=True, wait=context.wait, check=context.check):
            catalog = volume.catalog()
            report.done += [f"{volume.name}: {line}" for line in volume.tidy(catalog)]
            for file in catalog.orphans:
                context.check()
                _adopt(volume, file, repository.id, context, report)
            if catalog.orphans:
                catalog = volume.catalog()
            whole = chains(catalog.images)
            report.left += [f"{volume.name}: {error}" for error in catalog.damage]
            report.left += [
                f"{volume.name}: {image.file} has no parent here ({image.opening.parent})."
                for image in catalog.images
                if image.file not in whole
            ]
    return report


def _adopt(volume: Volume, file: str, repository_id: str, context: Context, report: Report) -> None:
    """Write the manifest of a sealed image anew, once every byte of it has been checked."""
    try:
        with ExitStack() as stack:
            reader = ImageReader(stack.enter_context(volume.open_image(file)))
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
            image = Image(file, reader.source.size, reader.closing_sha256, opening, reader.closing)
            volume.commit(image, len(reader.sections))
    except BlockbakError as error:
        if error.exit_code != DamagedImage.exit_code:
            raise
        report.left.append(f"{volume.name}: the orphan {file} was left alone: {error}")
    else:
        report.adopted.append(opening.point)
        report.done.append(f"{volume.name}: {file} was checked and has its manifest again.")
