"""The whole story on a loop device: images made, merged, restored, and each proven equal."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from blockbak.errors import BlockbakError, DemoFailed, NoSpace
from blockbak.flow import backup, restore, synthesize
from blockbak.flow.context import Context, iso
from blockbak.flow.source import Request
from blockbak.host import runner, scratch
from blockbak.host.blockio import store_error
from blockbak.host.signals import undisturbed
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB, format_size

VOLUME = "demo"
_SOURCES = ("/usr/lib", "/usr/bin", "/usr/share", "/etc")
_FILE_MAX = 8 * MIB
_SHARE = 0.45
"""Of the device that is filled with files; ext4 and the edits need the rest."""
_SEED = 20
_ROOM = 3
"""Devices that the demo's files take together, at most: source, target, images, a copy."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the demo's table. Sizes in bytes, times in seconds; None where it does not apply."""

    step: str
    changed_bytes: int | None
    stored_bytes: int | None
    seconds: float
    proof: str = ""


@dataclass(slots=True)
class Report:
    """All that the demo did and proved."""

    rows: list[Row] = field(default_factory=list)
    restores: int = 0
    proven: str = ""


class _Stage:
    """The devices, the repository and what the device held at each point."""

    def __init__(self, device: str, target: str, folder: str, repository: Repository, context: Context) -> None:
        self.device, self.target, self.folder = device, target, folder
        self.repository, self.context = repository, context
        self.mount_at = os.path.join(folder, "mnt")
        self.report = Report()
        self.held: dict[str, str] = {}
        self.dice = random.Random(_SEED)  # noqa: S311 - content for a demo

    @contextmanager
    def files(self) -> Iterator[str]:
        """The device's file system, mounted."""
        with scratch.mounted(self.device, self.mount_at) as where:
            yield where

    def digest(self, path: str) -> str:
        """SHA-256 of a device or file, read by nothing of blockbak's."""
        hasher = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while data := file.read(MIB):
                hasher.update(data)
                self.context.check()
        return hasher.hexdigest()

    def point(self, kind: str) -> str:
        """Make a point and remember what the device held."""
        request = Request(self.device, kind=kind, name=VOLUME)
        made = backup.backup(self.repository, request, self.context)
        self.held[made.point] = self.digest(self.device)
        changed = None if made.kind == "full" else made.changed_bytes
        self.report.rows.append(Row(made.kind, changed, made.stored_bytes, made.seconds))
        return made.point

    def prove(self, what: str, point: str, digest: str, seconds: float) -> None:
        """One restored copy is what the device was. Raises DemoFailed."""
        if digest != self.held[point]:
            raise DemoFailed(what=f"{what} of {point} differs from what the device held")
        self.report.restores += 1
        self.report.rows.append(Row(what, None, None, seconds, "equal"))

    def restored(self, what: str, point: str) -> None:
        """Restore a point onto the dirty target and compare."""
        request = restore.Request(point, self.target, overwrite=True)
        done = restore.restore(self.repository, request, self.context)
        assert isinstance(done, restore.Report)  # noqa: S101 - only a dry run gives a plan
        self.prove(what, point, self.digest(self.target), done.seconds)


def _fill(stage: _Stage, folder: str, room: int) -> None:
    """Copy real files until ``room`` bytes are there, and some that no compressor can shrink."""
    used = 0
    for top in _SOURCES:
        for directory, names, files in os.walk(top):
            names.sort()
            for name in sorted(files):
                stage.context.check()
                used += _copy(os.path.join(directory, name), folder, room * 4 // 5 - used)
    with open(os.path.join(folder, "random"), "wb") as file:
        for _ in range(room // 5 // MIB):
            stage.context.check()
            file.write(stage.dice.randbytes(MIB))


def _copy(source: str, folder: str, room: int) -> int:
    """Copy a real file into ``folder`` if it is small enough; the bytes it took."""
    try:
        if os.path.islink(source) or not os.path.isfile(source):
            return 0
        size = os.path.getsize(source)
        if size > min(_FILE_MAX, room):
            return 0
        target = folder + source
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copyfile(source, target)
    except (FileNotFoundError, PermissionError):
        return 0  # it went away meanwhile, or is not even root's to read
    return size


def _edit(stage: _Stage, folder: str) -> None:
    """What people do to files: overwrite, append, delete, copy, move."""
    files = sorted(os.path.join(top, name) for top, _, names in os.walk(folder) for name in names)
    chosen = stage.dice.sample(files, min(60, len(files)))
    for number, path in enumerate(chosen):
        match number % 5:
            case 0:
                os.unlink(path)
            case 1:
                with open(path, "r+b") as file:
                    file.write(stage.dice.randbytes(4 * KIB))
            case 2:
                with open(path, "ab") as file:
                    file.write(stage.dice.randbytes(64 * KIB))
            case 3:
                shutil.copyfile(path, f"{path}.copy")
            case _:
                os.rename(path, f"{path}.moved")


def demo(context: Context, *, size: int, directory: str) -> Report:
    """Tell the story on a device of ``size`` bytes under ``directory``. Everything made is removed again,
    also after an error or an interruption. Raises DemoFailed, NoSpace, and what its steps raise.
    """
    try:
        if shutil.disk_usage(directory).free < _ROOM * size:
            raise NoSpace(path=f"the demo's files, up to {format_size(_ROOM * size)}, in {directory}")
        return _staged(context, size, directory)
    except OSError as error:
        raise store_error(error, error.filename or directory, "used") from error


def _staged(context: Context, size: int, directory: str) -> Report:
    """The story on its stage. Signals break in while it is told, not while the stage is built or taken down."""
    with undisturbed() as through, ExitStack() as stack:
        folder = stack.enter_context(scratch.folder(directory, "blockbak-demo-"))
        inside = replace(context, state_dir=os.path.join(folder, "state"))
        device = stack.enter_context(scratch.loop_device(os.path.join(folder, "disk"), size))
        target = stack.enter_context(scratch.loop_device(os.path.join(folder, "target"), size))
        repository = Repository.create(
            os.path.join(folder, "repository"), repository_id=context.hex_id(32), created=iso(context.now())
        )
        stage = _Stage(device, target, folder, repository, inside)
        try:
            with through():
                _story(stage, size)
        except (BlockbakError, OSError):
            # A signal may have reached a program we were waiting for: then that is the reason.
            context.check()
            raise
    return stage.report


def _story(stage: _Stage, size: int) -> None:
    say = stage.context.say
    say(f"{stage.device} gets an ext4 of real files.")
    scratch.make_ext4(stage.device, stage.context.check)
    with stage.files() as folder:
        _fill(stage, folder, int(size * _SHARE))
    full = stage.point("full")
    with stage.files() as folder:
        _edit(stage, folder)
    incremental = stage.point("incremental")
    with stage.files() as folder:
        _edit(stage, folder)
    differential = stage.point("differential")
    stage.restored("restore of the full", full)
    stage.restored("restore of full + incremental", incremental)
    stage.restored("restore of full + differential", differential)
    composed = synthesize.synthesize(stage.repository, VOLUME, stage.context)
    stage.report.rows.append(Row("synthetic full", None, composed.point.stored_bytes, composed.point.seconds))
    stage.restored("restore of the synthetic full", differential)
    _without_blockbak(stage, full, incremental)
    stage.report.proven = (
        f"Proven: 3 points, each equal to what the device held, byte for byte, in {stage.report.restores} restores; "
        "one of them with zstd alone and one with rescue.py alone."
    )


def _without_blockbak(stage: _Stage, full: str, incremental: str) -> None:
    """The same with nothing but the zstd program, and with the script that lies in every repository."""
    copy = os.path.join(stage.folder, "copy")
    volume = stage.repository.volume(VOLUME)
    timer, check = stage.context.timer, stage.context.check
    began = timer()
    image = os.path.join(volume.path, f"{full}.full.zst")
    runner.run(["zstd", "-q", "-d", "--no-sparse", "-o", copy, image], deadline=600, check=check)
    seconds = timer() - began
    stage.prove("zstd -dc of the full", full, stage.digest(copy), seconds)
    os.unlink(copy)
    began = timer()
    script = os.path.join(stage.repository.path, "rescue.py")
    runner.run(["python3", "-I", "-S", script, "restore", incremental, copy], deadline=600, check=check)
    seconds = timer() - began
    stage.prove("rescue.py, full + incremental", incremental, stage.digest(copy), seconds)
    os.unlink(copy)
