"""File systems imaged while they are written: whole after their journal's replay, and what was written is there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.patterns import SECTOR, explain, stamp
from tests.vm.conftest import MIB, run
from tests.vm.writers import Writer, find_least, take

SIZE = 64 * MIB
KEPT = 4
"""So many files beside the records; an older one is removed for each new one."""


@dataclass(frozen=True)
class Kind:
    """A file system, what it lies on, and how a copy is mounted and checked."""

    make: tuple[str, ...]
    check: tuple[str, ...]
    options: str = "defaults"
    sector: int = 512
    thin: bool = False
    consistency: str = "filesystem"


KINDS = {
    "ext4": Kind(
        ("mkfs.ext4", "-q", "-F", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
        ("e2fsck", "-f", "-n"),
        thin=True,
    ),
    # A copy has the UUID of its origin, which stays mounted.
    "xfs": Kind(("mkfs.xfs", "-q", "-f", "--unsupported"), ("xfs_repair", "-n"), options="nouuid", sector=4096),
    "btrfs": Kind(("mkfs.btrfs", "-q", "-f", "-m", "single"), ("btrfs", "check"), consistency="crash"),
}


class Scribe:
    """Appends stamped records to a file; makes, renames and removes files beside it. All of it is synced."""

    def __init__(self, where: Path, seed: int) -> None:
        self._where, self._seed = where, seed
        self._records = os.open(where / "records", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def close(self) -> None:
        os.close(self._records)

    def step(self, number: int) -> None:
        os.write(self._records, stamp(number - 1, 1, 1, self._seed))
        os.fsync(self._records)
        new = self._where / f"{number}.new"
        file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, stamp(number, 1, 2, self._seed))
        os.fsync(file)
        os.close(file)
        new.rename(self._where / str(number))
        if number > KEPT:
            (self._where / str(number - KEPT)).unlink()


def beside(records: int) -> set[str]:
    """The files beside so many records, once a step is over."""
    return {str(number) for number in range(max(1, records - KEPT + 1), records + 1)}


def check_content(where: Path, least: int, most: int, seed: int, consistency: str) -> None:
    """All that was synced is there, and each file is whole. Where the file system was frozen, it is exactly what was
    there between two calls of the scribe; what a crash would leave may have names that were just exchanged.
    """
    data = (where / "records").read_bytes()
    records, rest = divmod(len(data), SECTOR)
    assert rest == 0
    assert explain(data, 0, 1, seed) is None
    assert least <= records <= most
    names = {path.name for path in where.iterdir()} - {"records", "lost+found"}
    told = f"{sorted(names)} beside {records} records, {least} to {most}"
    before = beside(records - 1)
    if consistency == "filesystem":
        made = [before, before | {f"{records}.new"}, before | {str(records)}, beside(records)]
        assert names in made, told
    else:
        numbers = {int(name.removesuffix(".new")) for name in names}
        # The last step that was begun may have removed its file already.
        synced = {int(name) for name in beside(least) & beside(records)}
        assert synced <= numbers <= set(range(least - KEPT + 1, records + 1)), told
    for name in names:
        content = (where / name).read_bytes()
        wanted = stamp(int(name.removesuffix(".new")), 1, 2, seed)
        assert content == wanted or (name.endswith(".new") and content == b""), f"{name}: {content[:64]!r}"


@contextmanager
def mounted(device: str, where: Path, options: str = "defaults") -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", "-o", options, device, where)
    try:
        yield where
    finally:
        run("umount", where)


def twins() -> list[str]:
    """What the kernel says of two devices with one file system on them."""
    return [line for line in run("dmesg").splitlines() if "duplicate" in line]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_system_under_a_writer(name, make_group, run_blockbak, repository, tmp_path, seed):
    kind = KINDS[name]
    group = make_group(kind.sector, 384 * MIB)
    origin = group.thin(group.pool("pool", 160 * MIB), "files", SIZE) if kind.thin else group.volume("files", SIZE)
    copy = group.volume("copy", SIZE)
    run(*kind.make, origin)
    said = twins()
    with ExitStack() as undo:
        origin_place = undo.enter_context(mounted(origin, tmp_path / "origin"))
        scribe = Scribe(origin_place, seed)
        undo.callback(scribe.close)
        with Writer(scribe.step) as writer:
            writer.go_on(KEPT + 1)
            runs = [take(run_blockbak, writer, f"{group.name}/files") for _ in range(2)]
        if name == "btrfs":
            # Two of one UUID are never mounted beside each other, nor may the kernel know of both.
            undo.close()
            run("lvchange", "--activate", "n", f"{group.name}/files")
            run("btrfs", "device", "scan", "--forget")
        kinds = [document["kind"] for one in runs for document in one.documents]
        assert kinds == ["full", "incremental"]
        assert {document["consistency"] for one in runs for document in one.documents} == {kind.consistency}
        find_least(run_blockbak, writer, runs)
        for one in runs:
            assert one.least > KEPT
            (point,) = one.points.values()
            run_blockbak("restore", point, copy, "--yes")
            with mounted(copy, tmp_path / "copy", kind.options) as where:
                check_content(where, one.least, one.most, seed, kind.consistency)
            run(*kind.check, copy)
    # The snapshots carried the UUID of a mounted file system too, and nobody looked at them.
    assert twins() == said
