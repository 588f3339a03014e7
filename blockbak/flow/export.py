"""Writes a point as a file for other programs."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

from blockbak.errors import BadTarget, CommandFailed, TargetExists
from blockbak.flow import restore
from blockbak.flow.context import Context
from blockbak.host import runner
from blockbak.host.blockio import sync_directory
from blockbak.repository.local import Repository

FORMATS = ("raw", "qcow2")
_CONVERT_SECONDS = 24 * 3600


@dataclass(frozen=True, slots=True)
class Report:
    """A file that was written; sizes in bytes."""

    point: str
    volume: str
    file: str
    format: str
    device_bytes: int
    file_bytes: int
    seconds: float
    attention: bool


def export(
    repository: Repository, name: str, path: str, file_format: str, context: Context, *, overwrite: bool
) -> Report:
    """Write a point to ``path`` as ``raw`` or ``qcow2``; the file appears when it is complete.

    Raises TargetExists unless ``overwrite``, MissingProgram, CommandFailed, and what a restore raises.
    """
    clock = context.timer()
    path = os.path.abspath(path)
    if os.path.lexists(path):
        if not os.path.isfile(path) or os.path.islink(path):
            raise BadTarget(path=path, reason="it is not a regular file")
        if not overwrite:
            raise TargetExists(path=path)
    # Refuse what must not be written before the long part, and before anything lies beside it.
    planned = restore.restore(repository, restore.Request(name, path), context, dry_run=True)
    with tempfile.TemporaryDirectory(prefix=".blockbak-", dir=os.path.dirname(path)) as folder:
        raw = os.path.join(folder, "raw")
        done = restore.restore(repository, restore.Request(name, raw), context)
        made = raw if file_format == "raw" else _convert(raw, os.path.join(folder, "image"), file_format, context)
        _publish(made, path, context)
    assert isinstance(done, restore.Report)  # noqa: S101 - only a dry run gives a plan
    assert isinstance(planned, restore.Plan)  # noqa: S101 - the same
    return Report(
        planned.point, planned.volume, path, file_format, planned.device_bytes, os.stat(path).st_size,
        round(context.timer() - clock, 3), done.attention,
    )  # fmt: skip


def _convert(raw: str, image: str, file_format: str, context: Context) -> str:
    """Let qemu-img make the other format of a raw file; where it is."""
    argv = ["qemu-img", "convert", "-f", "raw", "-O", file_format, raw, image]
    try:
        runner.run(argv, deadline=_CONVERT_SECONDS)
    except CommandFailed:
        context.check()  # a signal may have reached qemu-img too: then that is the reason
        raise
    os.chmod(image, 0o600)
    return image


def _publish(made: str, path: str, context: Context) -> None:
    """Make a finished file durable under the name that was asked for."""
    try:
        fd = context.kernel.open(made, os.O_RDONLY)
        try:
            context.kernel.fsync(fd)
        finally:
            context.kernel.close(fd)
        os.replace(made, path)
        sync_directory(os.path.dirname(path), context.kernel)
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error
