"""A repository in a directory: volumes, their images and manifests, and the order in which they change.

What must be durable before what is written down in docs/format.md; each step here names its reason.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Self

import msgspec

from blockbak.errors import (
    BlockbakError,
    Damage,
    DamagedManifest,
    DamagedRepository,
    Gap,
    Misplaced,
    MissingImage,
    NewerFormat,
    NoPermission,
    NoSuchVolume,
    NotARepository,
    RepositoryExists,
    VolumeExists,
)
from blockbak.host import lock
from blockbak.host.blockio import (
    PartialFile,
    Space,
    StoredFile,
    read_error,
    space_of,
    store_error,
    sync_directory,
    write_durably,
)
from blockbak.host.kernel import Kernel
from blockbak.model import pin
from blockbak.model.chain import Image, Point, chains, plan, points
from blockbak.model.pin import Pin
from blockbak.model.retention import checks
from blockbak.repository import manifest
from blockbak.repository.record import HEAD, HISTORY, Record

VERSION = 1
FILE = "repository.json"
_SHIPPED = ("rescue.py", "RESTORE.txt")
_OWN = {FILE, *_SHIPPED, HISTORY, HEAD}
"""No volume can have these names, whether the file is there yet or not."""
NAME_MAX = 200
NAME_RULE = f"at most {NAME_MAX} letters, digits, '.', '_' and '-', not beginning with '.' or '-'"
_LOOKS = 10
"""How often a directory is read anew because something went from it meanwhile."""
_VOLUME = re.compile(r"[A-Za-z0-9._-]+")
_NAME = re.compile(
    r"(?P<point>\d{8}T\d{6}Z-[0-9a-f]{4})\.(?P<kind>full|incremental|differential)(?:\.(?P<number>[1-9]\d*))?"
    r"\.(?P<end>zst|json|json\.deleted|zst\.partial|json\.partial)"
)

_PIN = re.compile(r"(?P<point>\d{8}T\d{6}Z-[0-9a-f]{4})\.(?P<number>[1-9]\d*)\.pin")


class _Repository(msgspec.Struct):
    blockbak_repository: int
    id: str
    created: str


@dataclass(slots=True)
class Catalog:
    """What a volume's directory holds. ``damage`` names manifests that cannot be used and images that are
    missing, each with ``volume``, ``point``, ``kind``, ``image`` (a file name) and, where the manifest tells
    it, ``sequence`` in its fields; ``orphans`` are sealed images without manifest, ``hidden`` those whose
    manifest cannot be used, ``partials`` files that were never finished, ``deleted`` half-done deletions (file
    names).
    """

    images: list[Image] = field(default_factory=list)
    damage: list[BlockbakError] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    partials: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)

    @property
    def points(self) -> list[Point]:
        """Its points, oldest first."""
        return points(self.images)

    @property
    def gaps(self) -> list[Gap]:
        """A Gap for each point that no whole chain restores."""
        found = []
        whole = chains(self.images)
        for point in self.points:
            if not any(image.file in whole for image in point.images):
                try:
                    plan(point, self.images)
                except Gap as gap:
                    found.append(gap)
        return found

    @property
    def leftovers(self) -> int:
        """How many files ``recover`` would treat."""
        return len(self.orphans) + len(self.partials) + len(self.deleted)


class Volume:
    """One volume's directory."""

    def __init__(self, repository: Repository, name: str) -> None:
        self.name = name
        self.path = os.path.join(repository.path, name)
        self._repository = repository
        self._kernel = repository.kernel

    def _at(self, file: str) -> str:
        return os.path.join(self.path, file)

    def locked(
        self,
        *,
        exclusive: bool,
        wait: float = 0,
        check: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda _: None,
    ) -> AbstractContextManager[lock.Lock]:
        """Hold the volume; ``say`` is told who is waited for. Raises VolumeLocked."""
        return lock.held(
            self._at(".lock"),
            self.name,
            exclusive=exclusive,
            wait=wait,
            check=check,
            say=say,
            clock=time.monotonic,
            sleep=time.sleep,
            kernel=self._kernel,
        )

    def names(self) -> set[str]:
        """The files in its directory. Raises NoPermission, UnreadableStore."""
        return _names_in(self.path)

    def holder(self) -> lock.Holder | None:
        """The process that holds the volume right now, as far as it can be told; None if it is free."""
        return lock.holder(self._at(".lock"))

    def claimed_by_another(self, identity: str) -> bool:
        """Whether a run holds the volume right now that images something else than ``identity``."""
        return lock.claimed_by_another(self._at(".lock"), identity)

    def catalog(self) -> Catalog:
        """Read all manifests. Damage is collected, not raised; UnreadableStore is damage too.

        Safe without a lock: what a run makes or deletes meanwhile is there or not, but never damage. Raises
        NoPermission, or UnreadableStore where the directory itself cannot be read.
        """
        for _ in range(_LOOKS):
            found = Catalog()
            names = self.names()
            self._read_catalog(found, names)
            # What was deleted meanwhile had children, which were deleted before it: some of them may have been
            # read as still there.
            if names <= self.names():
                break
        return found

    def _read_catalog(self, found: Catalog, names: set[str]) -> None:
        for name in sorted(names):
            parts = _NAME.fullmatch(name)
            if not parts or not self._is_there(name):
                continue
            stem = name[: -len(parts["end"]) - 1]
            if self._is_foreign(name) and not (parts["end"] == "json" and self._is_image(stem + ".zst")):
                continue
            if parts["end"].endswith("partial"):
                found.partials.append(name)
            elif parts["end"] == "json.deleted":
                found.deleted.append(name)
            elif parts["end"] == "json":
                self._catalog_manifest(found, name, parts["point"], parts["kind"])
            elif self._is_orphan(name, stem):
                found.orphans.append(name)

    def _is_there(self, name: str) -> bool:
        """Whether anything has that name. What the disk cannot tell of is there: damage, and never absence."""
        try:
            os.lstat(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            pass
        return True

    def _is_foreign(self, name: str) -> bool:
        """What somebody else put here under a name of ours: a pipe, a link, a directory."""
        try:
            return not stat.S_ISREG(os.lstat(self._at(name)).st_mode)
        except OSError:
            return False  # whoever reads it will be told

    def _is_image(self, name: str) -> bool:
        return self._is_there(name) and not self._is_foreign(name)

    def _is_orphan(self, name: str, stem: str) -> bool:
        if any(self._is_there(stem + end) for end in (".json", ".json.deleted")):
            return False
        # A deletion that ended meanwhile took the image too.
        return self._is_there(name)

    def _catalog_manifest(self, found: Catalog, name: str, point: str, kind: str) -> None:
        file = name.removesuffix(".json") + ".zst"
        about: dict[str, object] = {"volume": self.name, "point": point, "kind": kind, "image": file}
        try:
            if self._is_foreign(name):
                raise DamagedManifest(file=name, reason="it is not a file")
            data = self._read_small(name)
            if data is None:
                return  # a deletion has taken it since the directory was read
            image = manifest.decode(data, name)
            opening = image.opening
            about["sequence"] = opening.sequence
            size = self._size_of(file, name)
            if size is None:
                return  # the same
            if (opening.point, opening.kind) != (point, kind):
                raise DamagedManifest(file=name, reason="it is of another point or kind than its name says")
            if (opening.repository, opening.volume) != (self._repository.id, self.name):
                other = "" if opening.repository == self._repository.id else " of another repository"
                raise Misplaced(file=name, belongs=f"{opening.volume}{other}", here=self.name)
            if size != image.image_bytes:
                raise DamagedManifest(file=name, reason=f"its image has {size} bytes instead of {image.image_bytes}")
        except (Damage, NewerFormat, NoPermission) as error:
            error.fields.update({key: value for key, value in about.items() if key not in error.fields})
            found.damage.append(error)
            if not isinstance(error, MissingImage):
                found.hidden.append(file)
        else:
            found.images.append(image)

    def _size_of(self, file: str, manifest_name: str) -> int | None:
        """Bytes of an image; None if its manifest is gone too. Raises MissingImage, UnreadableStore."""
        try:
            return os.stat(self._at(file)).st_size
        except FileNotFoundError as error:
            if not self._is_there(manifest_name):
                return None
            raise MissingImage(file=file) from error
        except OSError as error:
            raise read_error(error, self._at(file), file) from error

    def _read_small(self, name: str) -> bytes | None:
        """A small file as a whole; None if it is not there. Raises NoPermission, UnreadableStore."""
        try:
            with StoredFile(self._at(name), f"{self.name}/{name}", self._kernel) as file:
                return bytes(file.read(0, file.size))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise read_error(error, self._at(name), f"{self.name}/{name}") from error

    # --- images --------------------------------------------------------------------------------

    def open_image(self, file: str) -> StoredFile:
        """A sealed image, for reading. Raises MissingImage or UnreadableStore."""
        try:
            return StoredFile(self._at(file), f"{self.name}/{file}", self._kernel)
        except FileNotFoundError as error:
            raise MissingImage(file=f"{self.name}/{file}") from error
        except OSError as error:
            raise read_error(error, self._at(file), f"{self.name}/{file}") from error

    def free_name(self, point: str, kind: str) -> str:
        """An image file name that nothing has; a second image of a point and kind gets a number."""
        taken = self.names()
        number = 1
        while True:
            stem = f"{point}.{kind}" + (f".{number}" if number > 1 else "")
            if not any(name.startswith(stem + end) for name in taken for end in (".zst", ".json")):
                return stem + ".zst"
            number += 1

    def begin(self, file: str) -> PartialFile:
        """A new image, to be written and sealed. Raises NoSpace or StoreFailed."""
        return PartialFile(self._at(file), f"{self.name}/{file}", self._kernel)

    def commit(self, image: Image) -> None:
        """Make a sealed image visible: its manifest must only name what is durable, so it comes last."""
        name = image.file.removesuffix(".zst") + ".json"
        data = manifest.encode(image)
        try:
            write_durably(self._at(name), f"{self.name}/{name}", data, self._kernel)
        except BlockbakError as error:
            error.add_note(f"The image {image.file} itself is whole: 'blockbak recover' makes it a point.")
            raise

    def renew(self, image: Image) -> None:
        """Write the manifest of a sealed image anew where one is there that cannot be used.

        The old one is moved away first, for a rename never replaces: a crash in between leaves an orphan.
        """
        name = image.file.removesuffix(".zst") + ".json"
        number = 1
        while self._is_there(aside := f"{name}.damaged.{number}"):
            number += 1
        try:
            if self._is_there(name):
                self._kernel.rename(self._at(name), self._at(aside))
                sync_directory(self.path, self._kernel)
            self.commit(image)
            if self._is_there(aside) and not self._is_foreign(aside):
                self._kernel.unlink(self._at(aside))
        except OSError as error:
            raise store_error(error, f"{self.name}/{name}", "written anew") from error

    # --- pins ----------------------------------------------------------------------------------

    def _pin_files(self) -> dict[str, list[str]]:
        """The files of each pinned point, the one that counts last."""
        found: dict[str, list[tuple[int, str]]] = {}
        for name in self.names():
            if parts := _PIN.fullmatch(name):
                found.setdefault(parts["point"], []).append((int(parts["number"]), name))
        return {point: [name for _, name in sorted(numbered)] for point, numbered in found.items()}

    def found_damaged(self, say: Callable[[str], None] = lambda _: None) -> set[str]:
        """The image files that were damaged when last verified, as the history tells; none where it cannot be read, and
        ``say`` is told so.
        """
        try:
            return checks(self._repository.record.entries(), self.name).bad
        except BlockbakError as error:
            say(f"{self.name}: what was found damaged cannot be told: {error}")
            return set()

    def pins(self) -> tuple[dict[str, Pin], list[BlockbakError]]:
        """The pins by point, also those whose time is over; and what is wrong with pins. A point whose pin cannot be
        read counts as immutable without end. Raises NoPermission, UnreadableStore for the directory.
        """
        pins: dict[str, Pin] = {}
        flaws: list[BlockbakError] = []
        for point, names in self._pin_files().items():
            name = names[-1]
            try:
                data = self._read_small(name)
                if data is not None:  # else taken back since the directory was read
                    pins[point] = pin.decode(data, name, point)
            except (Damage, NewerFormat, NoPermission) as error:
                error.fields.update({"volume": self.name, "point": point, "kind": "pin", "image": name})
                flaws.append(error)
                pins[point] = Pin(point, f"its pin {name} cannot be read", "", "unknown", "", immutable=True)
        return pins, flaws

    def pin(self, made: Pin) -> None:
        """Pin a point, or pin it otherwise. Needs the exclusive lock. Raises NoSpace, StoreFailed.

        The old pin must not go before the new one is durable.
        """
        old = self._pin_files().get(made.point, [])
        match = _PIN.fullmatch(old[-1]) if old else None
        name = f"{made.point}.{int(match['number']) + 1 if match else 1}.pin"
        try:
            if self._is_there(name + ".partial"):
                self._kernel.unlink(self._at(name + ".partial"))
        except OSError as error:
            raise store_error(error, f"{self.name}/{name}", "written") from error
        write_durably(self._at(name), f"{self.name}/{name}", pin.encode(made), self._kernel)
        self._unlink_pins(old)

    def unpin(self, point: str) -> None:
        """Take a point's pin away, if it has one. Needs the exclusive lock. Raises StoreFailed.

        The one that counts goes last: whatever is left of them after a crash still pins.
        """
        self._unlink_pins(self._pin_files().get(point, []))

    def _unlink_pins(self, names: Sequence[str]) -> None:
        try:
            for name in names:
                self._kernel.unlink(self._at(name))
            if names:
                sync_directory(self.path, self._kernel)
        except OSError as error:
            raise store_error(error, f"{self.name}/{names[0]}", "removed") from error

    def space_of(self, files: Collection[str]) -> Space:
        """The disk space of images, and how much of it other images of the volume share."""
        others = [name for name in self.names() if name.endswith((".zst", ".zst.partial")) and name not in files]
        return space_of([self._at(name) for name in sorted(files)], [self._at(name) for name in others], self._kernel)

    def remove(self, file: str) -> None:
        """Delete an image so that a crash on the way can be told from loss.

        The marker must be durable before the image goes: without it, a missing image is damage.
        """
        name = file.removesuffix(".zst") + ".json"
        try:
            if self._is_there(name):
                self._kernel.rename(self._at(name), self._at(name + ".deleted"))
                sync_directory(self.path, self._kernel)
            self._finish(name + ".deleted")
        except OSError as error:
            raise store_error(error, f"{self.name}/{file}", "deleted") from error

    def _finish(self, marker: str) -> str:
        """Do what a deletion's marker says; what was done, for people."""
        stem = marker.removesuffix(".json.deleted")
        if self._is_there(f"{stem}.json"):
            # A deletion renames the manifest to its marker: somebody has put it back since, and wants the image.
            done = f"{stem}.zst has its manifest again; the mark of its deletion was removed."
        else:
            done = f"Finished the deletion of {stem}.zst."
            if self._is_there(f"{stem}.zst"):
                self._kernel.unlink(self._at(f"{stem}.zst"))
            sync_directory(self.path, self._kernel)
        if self._is_there(marker):
            self._kernel.unlink(self._at(marker))
        return done

    def tidy(self, catalog: Catalog) -> list[str]:
        """Finish deletions and sweep partials; what was done, for people. Needs the exclusive lock."""
        try:
            done = [self._finish(marker) for marker in catalog.deleted]
            for name in catalog.partials:
                self._kernel.unlink(self._at(name))
                done.append(f"Swept {name}, which an earlier run did not finish.")
        except OSError as error:
            raise store_error(error, self.name, "tidied") from error
        catalog.deleted, catalog.partials = [], []
        return done


class Repository:
    """An open repository. Raises NotARepository, NewerFormat, NoPermission, DamagedRepository."""

    def __init__(self, path: str, kernel: Kernel | None = None) -> None:
        self.path = os.path.abspath(path)
        self.kernel = kernel or Kernel()
        file = os.path.join(self.path, FILE)
        try:
            with StoredFile(file, FILE, self.kernel) as stored:
                data = bytes(stored.read(0, stored.size))
        except (FileNotFoundError, NotADirectoryError) as error:
            reason = f"it has no {FILE}" if os.path.isdir(self.path) else "it is not a directory"
            raise NotARepository(path=path, reason=reason) from error
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR):
                raise NotARepository(path=path, reason=error.strerror) from error
            raise read_error(error, file, file) from error
        try:
            about = msgspec.json.decode(data, type=_Repository)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DamagedRepository(file=file, reason=str(error)) from error
        if about.blockbak_repository > VERSION:
            raise NewerFormat(what=f"The repository {path}", detail=f"version {about.blockbak_repository}")
        self.id = about.id

    @property
    def record(self) -> Record:
        """What was done with it."""
        return Record(self.path, self.id, self.kernel)

    @classmethod
    def create(cls, path: str, *, repository_id: str, created: str, kernel: Kernel | None = None) -> Self:
        """Make a repository in a new or empty directory. Raises RepositoryExists, NoSpace, StoreFailed.

        ``repository.json`` comes last: before it, the directory is none yet and can be made one again.
        """
        kernel = kernel or Kernel()
        if not path:
            raise RepositoryExists(path="''", reason="an empty name names no directory")
        path = os.path.abspath(path)
        if (outer := repository_above(os.path.realpath(path))) is not None:
            raise RepositoryExists(path=path, reason=f"it lies in the repository {outer}")
        if not os.path.isdir(os.path.dirname(path)):
            raise RepositoryExists(path=path, reason=f"there is no directory {os.path.dirname(path)}")
        shipped = _shipped()
        try:
            if os.path.lexists(path):
                _check_empty(path)
                os.chmod(path, stat.S_IRWXU)
            else:
                kernel.mkdir(path)
                sync_directory(os.path.dirname(path), kernel)
            about = msgspec.json.format(msgspec.json.encode(_Repository(VERSION, repository_id, created)), indent=2)
            for name, data in (*shipped.items(), (FILE, about + b"\n")):
                target = os.path.join(path, name)
                if os.path.lexists(target):
                    kernel.unlink(target)
                write_durably(target, name, data, kernel)
        except OSError as error:
            raise store_error(error, path, "made") from error
        return cls(path, kernel)

    def refresh(self) -> list[str]:
        """Put RESTORE.txt and rescue.py back as this program has them; the names of those it wrote.

        Raises NoSpace, StoreFailed, NoPermission.
        """
        written = []
        for name, data in _shipped().items():
            path = os.path.join(self.path, name)
            try:
                with open(path, "rb") as file:
                    if file.read() == data:
                        continue
            except OSError:
                pass  # not there, or not to be read: written anew
            try:
                self._put(path, name, data)
            except OSError as error:
                raise store_error(error, path, "written") from error
            written.append(name)
        return written

    def _put(self, path: str, name: str, data: bytes) -> None:
        """Make ``data`` the content of a file that may be there, or may be left over half-written."""
        if os.path.lexists(path + ".partial"):
            self.kernel.unlink(path + ".partial")
        with PartialFile(path, name, self.kernel) as partial:
            partial.write(0, [data])
            # The old one goes only once there was room for the new one, for a rename never replaces.
            if os.path.lexists(path):
                self.kernel.unlink(path)
            partial.seal()

    def volume_names(self) -> list[str]:
        """The volumes, by name. Raises NoPermission, UnreadableStore."""
        names = _names_in(self.path) - {FILE, *_SHIPPED}
        return sorted(name for name in names if usable_name(name) and _is_directory(os.path.join(self.path, name)))

    def volume(self, name: str) -> Volume:
        """An existing volume. Raises NoSuchVolume."""
        if not usable_name(name) or not _is_directory(os.path.join(self.path, name)):
            raise NoSuchVolume(volume=name)
        return Volume(self, name)

    def volumes(self) -> list[Volume]:
        """All volumes."""
        return [Volume(self, name) for name in self.volume_names()]

    def make_volume(self, name: str) -> Volume:
        """A volume, made if it is not there; its directory must be durable before anything in it is."""
        if not usable_name(name):
            raise VolumeExists(volume=name, reason=f"it takes {NAME_RULE}")
        path = os.path.join(self.path, name)
        if name in _OWN and not _is_directory(path):
            raise VolumeExists(volume=name, reason="a file of the repository is called so")
        try:
            if not _is_directory(path):
                self.kernel.mkdir(path)
            sync_directory(self.path, self.kernel)
        except FileExistsError as error:
            if not _is_directory(path):
                raise VolumeExists(
                    volume=name, reason="something in the repository that is no volume has it"
                ) from error
            # Another run made it a moment ago.
        except OSError as error:
            raise store_error(error, path, "made") from error
        return Volume(self, name)


def _names_in(path: str) -> set[str]:
    try:
        return set(os.listdir(path))
    except OSError as error:
        raise read_error(error, path, path) from error


def _shipped() -> dict[str, bytes]:
    """What every repository carries, so that it can be restored from without blockbak."""
    return {name: files("blockbak.repository").joinpath(name).read_bytes() for name in _SHIPPED}


def repository_above(path: str) -> str | None:
    """The repository that ``path`` lies in, if it does."""
    while path != os.path.dirname(path):
        path = os.path.dirname(path)
        if os.path.isfile(os.path.join(path, FILE)):
            return path
    return None


def _is_directory(path: str) -> bool:
    """A real one: a link would lead out of the repository. What the disk cannot tell of counts: whoever reads it
    will be told.
    """
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def usable_name(name: str) -> bool:
    """Whether a volume may be called that: no path, nothing hidden, nothing like an option."""
    return bool(_VOLUME.fullmatch(name)) and name[0] not in ".-" and len(name) <= NAME_MAX


def _check_empty(path: str) -> None:
    try:
        names = set(os.listdir(path))
    except NotADirectoryError as error:
        raise RepositoryExists(path=path, reason="it is not a directory") from error
    if FILE in names:
        raise RepositoryExists(path=path, reason="it is one already")
    # What an interrupted `init` leaves is no content; mkfs puts lost+found into every new ext4.
    allowed = {*_SHIPPED, "lost+found", *(f"{name}.partial" for name in (*_SHIPPED, FILE))}
    if names - allowed:
        raise RepositoryExists(path=path, reason="it is not empty")
    for name in names:
        if name.endswith(".partial"):
            os.unlink(os.path.join(path, name))
