"""Writes a point as a file for other programs."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field, replace
from stat import S_ISREG

from blockbak.errors import ATTENTION, BadTarget, BlockbakError, CommandFailed, NoPermission, NoSpace, TargetExists
from blockbak.flow import restore
from blockbak.flow.context import Context
from blockbak.flow.points import find, newer_orphans
from blockbak.flow.recording import recorded
from blockbak.host import runner, scratch
from blockbak.host.blockio import sync_directory
from blockbak.repository.local import Repository

_CONVERT_SECONDS = 24 * 3600
_PREFIX = ".blockbak-"


@dataclass(frozen=True, slots=True)
class Report:
    """A file that was written; sizes in bytes. ``notes`` are what a restore of the point would say of it, ``partition``
    is the number of the one that was written (0: the whole volume), and ``device_bytes`` then its size.
    """

    point: str
    volume: str
    file: str
    format: str
    device_bytes: int
    file_bytes: int
    seconds: float
    attention: bool
    notes: list[str] = field(default_factory=list)
    partition: int = 0


def export(
    repository: Repository, name: str, path: str, file_format: str, context: Context, *, overwrite: bool,
    partition: int = 0,
) -> Report:  # fmt: skip
    """Write a point, or the ``partition`` of that number, to ``path`` as ``raw`` or ``qcow2``; the file appears when
    it is complete.

    Raises TargetExists unless ``overwrite``, NoPermission, NoSpace, BadTarget, MissingProgram,
    CommandFailed, and what a restore raises.
    """
    path = os.path.abspath(path)
    with recorded(repository, "exported", context, asked=name, file=path, format=file_format) as doing:
        done = _locked_export(repository, name, path, file_format, context, overwrite=overwrite, partition=partition)
        doing.volume, doing.points, doing.exit = done.volume, [done.point], ATTENTION if done.attention else 0
        doing.facts |= {"device_bytes": done.device_bytes, "file_bytes": done.file_bytes, "partition": partition}
    return done


def _locked_export(
    repository: Repository, name: str, path: str, file_format: str, context: Context, *, overwrite: bool,
    partition: int,
) -> Report:  # fmt: skip
    _check_file(path, overwrite=overwrite)
    volume, _, _ = find(repository, name)
    # Held all along: the restores below wait for nobody, and so it is not in the seconds.
    with volume.locked(exclusive=False, wait=context.wait, check=context.check, say=context.say):
        request = restore.Request(name, path, partition=partition)
        return _export(repository, request, path, file_format, context, overwrite=overwrite)


def _export(
    repository: Repository, asked: restore.Request, path: str, file_format: str, context: Context, *, overwrite: bool
) -> Report:
    clock = context.timer()
    # Refuse what must not be written before the long part, and before anything lies beside it.
    planned = restore.restore(repository, asked, context, dry_run=True)
    assert isinstance(planned, restore.Plan)  # noqa: S101 - a dry run gives one
    # By its id: what a name such as latest means may change on the way.
    request = replace(asked, point=f"{planned.volume}@{planned.point}")
    for left in scratch.sweep(os.path.dirname(path), _PREFIX, ("raw", "raw.partial", "image")):
        context.say(f"Removed {left}, which an export that was killed had left.")
    try:
        with scratch.folder(os.path.dirname(path), _PREFIX) as folder:
            raw = os.path.join(folder, "raw")
            done = restore.bring_back(repository, replace(request, target=raw), context)
            made = raw if file_format == "raw" else _convert(raw, os.path.join(folder, "image"), file_format, context)
            file_bytes = os.stat(made).st_size
            _publish(made, path, context, overwrite=overwrite)
    except OSError as error:
        raise _sentence(error, path) from error
    assert isinstance(done, restore.Report)  # noqa: S101 - only a dry run gives a plan
    notes = [*done.plan.notes, *newer_orphans(*find(repository, request.point), asked.point)]
    return Report(
        planned.point, planned.volume, path, file_format, planned.device_bytes, file_bytes,
        round(context.timer() - clock, 3), done.attention, notes, asked.partition,
    )  # fmt: skip


def _check_file(path: str, *, overwrite: bool) -> None:
    """Raises TargetExists or BadTarget for a path that may not be written."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise _sentence(error, path) from error
    if not S_ISREG(mode):
        raise BadTarget(path=path, reason="it is not a regular file")
    if not overwrite:
        raise TargetExists(path=path)


def _sentence(error: OSError, path: str) -> BlockbakError:
    """Why a file cannot be made at ``path``."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return NoPermission(action="write", path=path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(path=path)
    return BadTarget(path=path, reason=error.strerror or str(error))


def _convert(raw: str, image: str, file_format: str, context: Context) -> str:
    """Let qemu-img make the other format of a raw file; where it is."""
    argv = ["qemu-img", "convert", "-f", "raw", "-O", file_format, raw, image]
    try:
        runner.run(argv, deadline=_CONVERT_SECONDS, check=context.check)
    except CommandFailed:
        context.check()  # a signal may have reached qemu-img too: then that is the reason
        raise
    os.chmod(image, 0o600)
    return image


def _publish(made: str, path: str, context: Context, *, overwrite: bool) -> None:
    """Make a finished file durable under the name that was asked for. Raises OSError, TargetExists."""
    fd = context.kernel.open(made, os.O_RDONLY)
    try:
        context.kernel.fsync(fd)
    finally:
        context.kernel.close(fd)
    context.check()
    if overwrite:
        os.replace(made, path)
    else:
        try:
            context.kernel.rename(made, path)
        except FileExistsError as error:
            raise TargetExists(path=path) from error  # somebody made it meanwhile
    sync_directory(os.path.dirname(path), context.kernel)
