"""What file systems leave unused, told by partclone, which only reads; and how XFS says that its log is empty."""

from __future__ import annotations

import os
from collections.abc import Callable

from blockbak.errors import MissingProgram
from blockbak.host import runner
from blockbak.host.kernel import Kernel
from blockbak.host.marks import reading
from blockbak.model import btrfs, usedmap
from blockbak.model.clean import unclean
from blockbak.model.extent import Extents

KINDS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "ntfs")
"""The file systems that it is asked for, by blkid's names."""
MAP_SECONDS = 3600.0
"""How long it may take: it reads all that a file system keeps about its space."""
_LOG_SECONDS = 600.0


def require() -> None:
    """Raises MissingProgram unless partclone is installed."""
    for kind in KINDS:
        program = f"partclone.{kind}"
        if runner.which(program) is None:
            raise MissingProgram(program=program, package=runner.package_of(program))


def doubt(node: str, kind: str, *, frozen: bool, check: Callable[[], None]) -> str:
    """Why a map of the file system on ``node`` would not be complete, as a clause; empty if nothing speaks against
    it. ``frozen``: it is a copy of one that was frozen, whose log says no more than its other places. Raises
    CommandFailed, MissingProgram, and what ``check`` does.
    """
    with reading(node) as read:
        found = unclean(kind, read)
    if found or kind != "xfs" or frozen:
        return found
    # xfsprogs, logprint/log_misc.c: "log tail: 8 head: 8 state: <CLEAN>".
    told = runner.run(["xfs_logprint", "-t", node], deadline=_LOG_SECONDS, check=check)
    return "" if "state: <CLEAN>" in told.stdout else "its log is still to be replayed"


def unused(node: str, kind: str, size: int, check: Callable[[], None]) -> Extents:
    """The bytes of the ``size`` of ``node`` that its file system does not use, as HOLE extents.

    Raises CommandFailed where partclone refuses it, UnusableMap, btrfs.Unclear, and what ``check`` does.
    """
    forget_cached(node)
    twice: list[tuple[int, int, int]] = []
    if kind == "btrfs":
        with reading(node) as read:
            twice = btrfs.copies(read)
    argv = [f"partclone.{kind}", "-D", "--offset_domain=0", "-q", "-L", "/dev/null", "-s", node, "-o", "-"]
    holes = usedmap.unused(runner.run(argv, deadline=MAP_SECONDS, check=check).output, size)
    return usedmap.with_copies(holes, twice) if kind == "btrfs" else holes


def forget_cached(node: str) -> None:
    """Have the page cache of a node forgotten: it may be older than what was written past it. Raises OSError."""
    kernel = Kernel()
    fd = kernel.open(node, os.O_RDONLY)
    try:
        kernel.drop_cache(fd, block=False)
    finally:
        kernel.close(fd)
