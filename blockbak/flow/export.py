"""Writes a point as a file for other programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from blockbak.errors import BadTarget, TargetExists
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
    raw = f"{path}.raw" if file_format != "raw" else path
    request = restore.Request(name, raw, overwrite=overwrite)
    if file_format == "raw":
        done = restore.restore(repository, request, context)
    else:
        # Refuse what must not be written before the long part, and before anything lies beside it.
        restore.restore(repository, replace(request, target=path), context, dry_run=True)
        with _scratch(raw, context):
            done = restore.restore(repository, request, context)
            _convert(raw, path, file_format, context)
    assert isinstance(done, restore.Report)  # noqa: S101 - only a dry run gives a plan
    plan = done.plan
    return Report(
        plan.point, plan.volume, path, file_format, plan.device_bytes, os.stat(path).st_size,
        round(context.timer() - clock, 3), done.attention,
    )  # fmt: skip


@contextlib.contextmanager
def _scratch(raw: str, context: Context) -> Iterator[None]:
    """The raw file that qemu-img reads: sparse, beside the result, gone afterwards."""
    if os.path.lexists(raw):
        raise TargetExists(path=raw)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            context.kernel.unlink(raw)


def _convert(raw: str, path: str, file_format: str, context: Context) -> None:
    partial = f"{path}.partial"
    try:
        runner.run(["qemu-img", "convert", "-f", "raw", "-O", file_format, raw, partial], deadline=_CONVERT_SECONDS)
        fd = context.kernel.open(partial, os.O_RDONLY)
        try:
            os.fchmod(fd, 0o600)
            context.kernel.fsync(fd)
        finally:
            context.kernel.close(fd)
        os.replace(partial, path)
        sync_directory(os.path.dirname(path), context.kernel)
    except OSError as error:
        raise BadTarget(path=path, reason=error.strerror) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            context.kernel.unlink(partial)
