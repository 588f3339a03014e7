"""A disk, booted in QEMU for as long as it takes to say on its serial console that it is up."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from blockbak.errors import CommandFailed
from blockbak.host.apart import Apart

PROGRAM = "qemu-system-x86_64"
MEMORY_MIB = 1024
TAIL = 4000
"""Characters of the console that are kept."""
_SILENT_SHARE = 1 / 3
"""Of the time that a disk has to boot: after that much without a word on the console KVM is given up."""
_FIRMWARE = ("/usr/share/ovmf/OVMF.fd", "/usr/share/OVMF/OVMF.fd", "/usr/share/qemu/OVMF.fd")
"""Where Debian's package ovmf, and others, put UEFI for QEMU."""


@dataclass(frozen=True, slots=True)
class Booted:
    """Whether the pattern came, what the console said at the end, and why there was no more of it, a clause."""

    seen: bool
    console: str
    reason: str = ""


class _SeenError(Exception):
    """The pattern came: QEMU is no longer needed."""


class _SilentError(Exception):
    """Nothing came for so long that it may be KVM's fault."""


def firmware_file() -> str:
    """UEFI for QEMU; empty where it is not installed."""
    return next((path for path in _FIRMWARE if os.path.exists(path)), "")


def boot(
    place: Apart,
    disk: str,
    *,
    pattern: str,
    seconds: float,
    firmware: Literal["bios", "uefi"],
    overlay_dir: str,
    check: Callable[[], None],
) -> Booted:
    """Boot ``disk`` until its console has ``pattern`` (a regular expression), for at most ``seconds``. What it writes
    goes to an overlay in ``overlay_dir`` that QEMU makes without a name, never to the disk. It has no network.

    KVM comes first. Where there is none, or one on which the disk says nothing at all (in a virtual machine it may be
    there and not work), QEMU emulates the processor for the rest of the time.

    Raises MissingProgram, and what ``check`` raises.
    """
    console = _Console(place, f"{place.base}/console", re.compile(pattern))
    machine = ["-machine", "q35", "-m", str(MEMORY_MIB)]
    if firmware == "uefi":
        if not (file := firmware_file()):
            return Booted(seen=False, console="", reason="it wants UEFI, and the package ovmf is not installed")
        machine += ["-bios", file]
    # Nothing of it is written anywhere: with snapshot=on QEMU puts a qcow2 without a name on top.
    drive = f"file={disk},format=raw,if=ide,snapshot=on,cache=unsafe"
    quiet = ["-no-user-config", "-display", "none", "-monitor", "none", "-parallel", "none", "-nic", "none"]
    argv = [PROGRAM, *machine, *quiet, "-no-reboot", "-serial", f"file:{console.path}", "-drive", drive]
    begun = time.monotonic()

    def look(patience: float) -> None:
        check()
        if console.look():
            raise _SeenError
        if not console.tail and time.monotonic() - begun > patience:
            raise _SilentError

    reason = ""
    for accel, patience in (("kvm", seconds * _SILENT_SHARE), ("tcg", seconds)):
        left = max(begun + seconds - time.monotonic(), 0.0)
        reason = "it ended by itself"
        try:
            place.run(
                [*argv, "-accel", accel], deadline=left, check=partial(look, patience), env={"TMPDIR": overlay_dir}
            )
        except _SeenError:
            return Booted(seen=True, console=console.tail)
        except _SilentError:
            reason = _late(seconds)
        except CommandFailed as error:
            late = str(error.fields["status"]).startswith("still running")
            reason = _late(seconds) if late else str(error).removesuffix(".")
        # It may have come since the last look.
        if console.look():
            return Booted(seen=True, console=console.tail)
        if console.tail:
            break
    return Booted(seen=False, console=console.tail, reason=reason)


def _late(seconds: float) -> str:
    return f"it did not come within {seconds:g} s"


class _Console:
    """What the disk says: read as it comes, of which only the end is kept, so that it may say anything."""

    def __init__(self, place: Apart, path: str, wanted: re.Pattern[str]) -> None:
        self.path, self.tail = path, ""
        self._seen = place.seen(path)
        self._wanted = wanted
        self._offset = 0

    def look(self) -> bool:
        """Whether what has come since the last look, or it and what came before, is what is wanted."""
        with contextlib.suppress(OSError), open(self._seen, "rb") as file:
            file.seek(self._offset)
            new = file.read()
            self._offset += len(new)
            self.tail += new.decode("utf-8", "replace").replace("\r", "")
        found = bool(self._wanted.search(self.tail))
        self.tail = self.tail[-TAIL:]
        return found
