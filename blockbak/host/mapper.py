"""Device-mapper by its own ioctls: state and status of a device, suspend, resume.

``dmsetup`` would do the same, but reading a status costs a process each time, and while devices are
suspended nothing may have to be loaded from a disk. Structures and numbers are those of linux/dm-ioctl.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import Self

from blockbak.errors import MapperFailed

CONTROL = "/dev/mapper/control"

_HEADER = struct.Struct("=3IIIIiIIIQ128s129s7s")
"""``struct dm_ioctl``: version, data_size, data_start, target_count, open_count, flags, event_nr, padding,
dev, name, uuid, data.
"""
_TARGET = struct.Struct("=QQiI16s")
"""``struct dm_target_spec``: sector_start, length, status, next, target_type."""
_VERSION = (4, 0, 0)
_LIST, _SUSPEND, _STATUS, _TABLE_STATUS = 2, 6, 7, 12
_FLAG_READ_ONLY, _FLAG_SUSPENDED, _FLAG_BUFFER_FULL, _FLAG_NO_FLUSH = 1 << 0, 1 << 1, 1 << 8, 1 << 11
_FLAG_TABLE, _FLAG_LOADED = 1 << 5, 1 << 6
_BUFFER_BYTES = 16 << 10
_BUFFER_MOST = 16 << 20


@dataclass(frozen=True, slots=True)
class Info:
    """What device-mapper knows of one device. ``opens`` counts who has it open, devices above it included.

    ``unready``: a table was loaded for it but is not in force, and no other is. It answers with errors until it
    is resumed, though it is not suspended.
    """

    name: str
    uuid: str
    major: int
    minor: int
    opens: int
    suspended: bool
    read_only: bool
    unready: bool


@dataclass(frozen=True, slots=True)
class Target:
    """One line of a device's table. ``start`` and ``length`` are in units of 512 bytes; ``parameters`` is the
    target's own text, its status or its table.
    """

    start: int
    length: int
    kind: str
    parameters: str


class Mapper:
    """An open control device. Devices go by name (``vg-lv``, hyphens inside a name doubled).

    Raises MapperFailed where there is no device-mapper or no permission; so do all methods where the kernel
    refuses, with its reason.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MapperFailed(action="open", device=CONTROL, reason=error.strerror, errno=error.errno) from error

    def close(self) -> None:
        """Release the control device; closing twice is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self, name: str) -> Info | None:
        """State of a device; None where there is none of that name."""
        try:
            return _info(self._call(_STATUS, name, 0, "ask about"))
        except MapperFailed as error:
            if error.fields["errno"] == errno.ENXIO:
                return None
            raise

    def devices(self) -> list[Info]:
        """Every mapped device, by name. One that vanishes meanwhile is left out."""
        answer = self._call(_LIST, "", 0, "list")
        start = _HEADER.unpack_from(answer)[4]
        found, at = [], start
        # struct dm_name_list: u64 dev, u32 next, name; the first has dev 0 if there is none.
        while at + 12 <= len(answer):
            number, following = struct.unpack_from("=QI", answer, at)
            if number == 0:
                break
            end = answer.index(b"\0", at + 12)
            found.append(os.fsdecode(bytes(answer[at + 12 : end])))
            if following == 0:
                break
            at += following
        return sorted((info for name in found if (info := self.info(name)) is not None), key=lambda one: one.name)

    def status(self, name: str) -> list[Target]:
        """The status of each target, as ``dmsetup status --noflush`` prints it."""
        answer = self._call(_TABLE_STATUS, name, _FLAG_NO_FLUSH, "read the status of")
        header = _HEADER.unpack_from(answer)
        start, count = header[4], header[5]
        targets, at = [], start
        for _ in range(count):
            sector, length, _status, following, kind = _TARGET.unpack_from(answer, at)
            text = bytes(answer[at + _TARGET.size :]).split(b"\0", 1)[0]
            targets.append(Target(sector, length, _text(kind), text.decode("ascii", "replace").strip()))
            # Offsets to the next target count from the first (dm-ioctl.c, retrieve_status).
            at = start + following
        return targets

    def suspend(self, name: str) -> None:
        """Freeze the file system on it, wait for what is in flight, and hold back all that follows.

        Blocks until both are done. Resume it in every case, also after an error.
        """
        self._call(_SUSPEND, name, _FLAG_SUSPENDED, "suspend")

    def resume(self, name: str) -> None:
        """Let it go on, with a new table where one is loaded. A device that is not suspended stays as it is."""
        self._call(_SUSPEND, name, 0, "resume")

    def _call(self, number: int, name: str, flags: int, action: str) -> bytearray:
        size = _BUFFER_BYTES
        while True:
            buffer = bytearray(size)
            _HEADER.pack_into(
                buffer, 0, *_VERSION, size, _HEADER.size, 0, 0, flags, 0, 0, 0, os.fsencode(name), b"", b""
            )
            try:
                fcntl.ioctl(self._fd, _request(number), buffer)
            except OSError as error:
                raise MapperFailed(
                    action=action, device=name or "devices", reason=error.strerror, errno=error.errno
                ) from error
            if not _HEADER.unpack_from(buffer)[7] & _FLAG_BUFFER_FULL or size >= _BUFFER_MOST:
                return buffer
            size *= 4


def _request(number: int) -> int:
    # _IOWR(DM_IOCTL, number, struct dm_ioctl), asm-generic/ioctl.h.
    return (3 << 30) | (_HEADER.size << 16) | (0xFD << 8) | number


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _info(answer: bytearray) -> Info:
    fields = _HEADER.unpack_from(answer)
    number = fields[10]
    # The kernel's huge_encode_dev: 12 bits of major above 8 of minor, the rest of the minor above them.
    return Info(
        name=_text(fields[11]),
        uuid=_text(fields[12]),
        major=(number >> 8) & 0xFFF,
        minor=(number & 0xFF) | ((number >> 12) & 0xFFF00),
        opens=fields[6],
        suspended=bool(fields[7] & _FLAG_SUSPENDED),
        read_only=bool(fields[7] & _FLAG_READ_ONLY),
        unready=fields[7] & (_FLAG_TABLE | _FLAG_LOADED) == _FLAG_LOADED,
    )
