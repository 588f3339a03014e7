"""``--used-only``: what file systems do not use is not read, and what they use is all there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from blockbak.flow import backup, used
from blockbak.flow.used import find_unused
from blockbak.model import extent
from blockbak.units import KIB, MIB, SECTOR
from tests import children
from tests.doubles import context, new_repository
from tests.faults import BadMedium
from tests.host.stage import partitioned, run

SIZES = {"xfs": 96 * MIB, "btrfs": 240 * MIB}
"""All else of a btrfs but its metadata twice takes no less than this."""
SIZE = 64 * MIB
NOISE = MIB
MAKE = {
    "ext2": ("mkfs.ext2", "-q", "-F", "-E", "nodiscard", "-b", "4096"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-b", "4096"),
    "ext4, 1 KiB": ("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-b", "1024"),
    "xfs": ("mkfs.xfs", "-q", "-f", "-K", "--unsupported"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "-K"),
    "btrfs, all twice": ("mkfs.btrfs", "-q", "-f", "-K", "-d", "dup", "-m", "dup"),
    "btrfs, nodes of 4 KiB": ("mkfs.btrfs", "-q", "-f", "-K", "-n", "4096"),
    "vfat": ("mkfs.vfat", "-F", "32"),
    "vfat, 16 bits": ("mkfs.vfat", "-F", "16"),
    "ntfs": ("mkfs.ntfs", "-Q", "-F"),
}
CHECK = {
    "ext2": ("e2fsck", "-fn"),
    "ext4": ("e2fsck", "-fn"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly", "--check-data-csum"),
    "vfat": ("fsck.vfat", "-n"),
    "ntfs": ("ntfsfix", "-n"),
}
kinds = pytest.mark.parametrize("what", MAKE)


@dataclass
class Content:
    """A file system on a device, filled and read as its kind allows: this kernel need not have each."""

    what: str
    device: str
    where: Path

    @property
    def kind(self):
        return self.what.split(",")[0]

    @contextmanager
    def mounted(self, device=None):
        device = str(device or self.device)
        self.where.mkdir(exist_ok=True)
        if self.kind == "ntfs":
            run("ntfs-3g", device, self.where)
        else:
            run("mount", *(["-o", "nouuid"] if self.kind == "xfs" else []), device, self.where)
        try:
            yield self.where
        finally:
            run("umount", self.where)

    def put(self, files):
        if self.kind == "vfat":
            for name, data in files.items():
                subprocess.run(["mcopy", "-o", "-i", self.device, "-", f"::{name}"], input=data, check=True)
            run("sync")
            return
        with self.mounted() as where:
            for name, data in files.items():
                (where / name).write_bytes(data)

    def remove(self, names):
        if self.kind == "vfat":
            run("mdel", "-i", self.device, *[f"::{name}" for name in names])
            run("sync")
            return
        with self.mounted() as where:
            for name in names:
                (where / name).unlink()

    def files(self, device=None):
        """Digests of all files."""
        device = str(device or self.device)
        if self.kind == "vfat":
            names = run("mdir", "-b", "-i", device).split()
            return {name[3:]: _digest(_output("mtype", "-i", device, name)) for name in names}
        with self.mounted(device) as where:
            return {path.name: _digest(path.read_bytes()) for path in where.iterdir() if path.is_file()}

    def check(self, device):
        """What its own tool says of a copy; what it keeps twice must be there twice."""
        run(*CHECK[self.kind], device)
        if self.kind == "btrfs":
            with self.mounted(device) as where:
                assert "no errors found" in run("btrfs", "scrub", "start", "-B", "-r", where)


def _output(*command):
    return subprocess.run(command, check=True, capture_output=True).stdout


def _digest(data):
    return hashlib.sha256(data).hexdigest()


def noisy(file, size, seed):
    """A file without one zero block: what is left out of an image of it shows."""
    noise = hashlib.shake_256(f"noise {seed}".encode()).digest(NOISE)
    with file.open("xb") as out:
        for _ in range(size // NOISE):
            out.write(noise)


def some(first, count, seed):
    """Files of odd sizes."""
    return {
        f"file{number}": hashlib.shake_256(f"{seed} {number}".encode()).digest(100_001 + 7919 * number)
        for number in range(first, first + count)
    }


@pytest.fixture
def noise(loop, tmp_path, seed):
    """``noise()``: a loop device of noise."""

    def make(size):
        file = tmp_path / f"noise-{sum(1 for _ in tmp_path.glob('noise-*'))}.img"
        noisy(file, size, seed)
        return loop(size, file=file)

    return make


def holes(program, point):
    """What the point left out."""
    done = program("show", point)
    return [(row["start"], row["start"] + row["length"]) for row in done.document["extents"] if row["kind"] == "hole"]


def is_copy(file, content, left_out):
    """Whether a file holds ``content`` with zeros for what was left out. (To show the difference of so many bytes
    would take minutes.)
    """
    right = bytearray(content)
    for start, end in left_out:
        right[start:end] = bytes(end - start)
    return file.read_bytes() == right


@kinds
@pytest.mark.slow
def test_what_is_in_use_is_read_and_restored_and_the_rest_is_neither(what, noise, program, tmp_path, seed):
    size = SIZES.get(what.split(",")[0], SIZE)
    device, target = noise(size), noise(size)
    run(*MAKE[what], device)
    content = Content(what, device.path, tmp_path / "mount")
    content.put(some(0, 40, seed))
    content.remove([f"file{number}" for number in range(0, 40, 2)])

    before = device.file.read_bytes()
    full = program.backup(device, "--used-only", "--name", "used")
    assert (full["kind"], full["consistency"]) == ("full", "cold")
    assert full["read_bytes"] + full["hole_bytes"] == size
    assert full["hole_bytes"] > size // 3
    assert any("are not in use, and not read" in note for note in full["notes"])
    left = holes(program, full["point"])
    assert sum(end - start for start, end in left) == full["hole_bytes"]

    program("restore", full["point"], target, "--yes")
    assert is_copy(target.file, before, left)
    assert content.files(target) == content.files(device)
    content.check(target)

    # Used now and not before is read; not used now and used before is a change.
    content.put(some(40, 20, seed))
    content.remove([f"file{number}" for number in range(1, 20, 2)])
    before = device.file.read_bytes()
    second = program.backup(device, "--used-only", "--name", "used")
    assert (second["kind"], second["parent"]) == ("incremental", full["point"])
    assert second["read_bytes"] < size * 2 // 3
    after = holes(program, second["point"])
    assert after != left
    rescued = tmp_path / "rescued.img"
    done = children.rescue(program.repository, "restore", second["point"], rescued, "--yes")
    assert done.code == 0, done.err
    assert is_copy(rescued, before, after)
    program("restore", second["point"], target, "--yes")
    assert is_copy(target.file, before, after)

    # Every byte again, on a parent that did not claim them all.
    third = program.backup(device, "--name", "used")
    assert (third["kind"], third["read_bytes"]) == ("incremental", size)
    assert holes(program, third["point"]) == []
    program("synthesize", "used")
    restored = tmp_path / "restored.img"
    program("restore", third["point"], restored)
    assert is_copy(restored, before, [])
    program("verify")

    assert content.files(target) == content.files(device)
    content.check(target)


# --- what is not believed, or not asked ------------------------------------------------------------


def reading_all(made, reason):
    """The point holds every byte, and says why."""
    assert (made["read_bytes"], made["hole_bytes"]) == (made["device_bytes"], 0)
    assert any("is read: " in note and reason in note for note in made["notes"]), made["notes"]


def left_mounted(device, copy, where, options):
    """A copy of a file system in the middle of its work, whose last files are in its journal at best; and one made
    while it was frozen.
    """
    frozen = copy.with_suffix(".frozen")
    run("mount", *options, device, where)
    try:
        (where / "first").write_bytes(b"first" * 100_000)
        run("fsfreeze", "--freeze", where)
        try:
            run("cp", "--sparse=never", device.file, frozen)
        finally:
            run("fsfreeze", "--unfreeze", where)
        for number in range(4):
            with (where / f"second{number}").open("wb") as file:
                file.write(b"second" * 50_000)
                file.flush()
                os.fsync(file.fileno())
        run("cp", "--sparse=never", device.file, copy)
    finally:
        run("umount", where)
    return frozen


@pytest.mark.parametrize(
    ("kind", "reason"), [("ext4", "not cleanly unmounted"), ("xfs", "log is still to be replayed")]
)
def test_the_map_of_a_file_system_that_crashed_is_not_believed(kind, reason, noise, program, tmp_path):
    """partclone takes it; what the journal would bring back is not in its map. A frozen one has it all in place."""
    device = noise(SIZES.get(kind, SIZE))
    run(*MAKE[kind], device)
    copy, where = tmp_path / "crashed", tmp_path / "mount"
    where.mkdir()
    frozen = left_mounted(device, copy, where, ["-o", "nouuid"] if kind == "xfs" else [])
    run(f"partclone.{kind}", "-D", "-q", "-L", "/dev/null", "-s", copy, "-o", tmp_path / "map")
    reading_all(program.backup(copy, "--used-only"), reason)
    found = find_unused(str(frozen), "vg/lv", lambda: None, frozen=True)
    assert extent.total(found.extents) > device.size // 2, found.notes
    whole = bytearray(frozen.read_bytes())
    for start, end in zip(
        extent.starts_of(found.extents).tolist(), extent.ends_of(found.extents).tolist(), strict=True
    ):
        whole[start:end] = bytes(end - start)
    restored = tmp_path / "restored"
    restored.write_bytes(whole)
    content = Content(kind, str(restored), where)
    assert content.files() == {"first": _digest(b"first" * 100_000)}
    run(*CHECK[kind], restored)


def test_partclone_refuses_what_it_does_not_know(noise, program):
    device = noise(SIZE)
    run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", "-b", "4096", "-O", "bigalloc", "-C", "65536", device)
    reading_all(program.backup(device, "--used-only"), "partclone.ext4 does not take it: ")


def test_a_disk_is_asked_partition_by_partition(noise, program, tmp_path, seed):
    """Gaps and tables count as used, and so does what has no map."""
    disk = noise(96 * MIB)
    with partitioned(disk, "size=40MiB", "size=20MiB", "size=20MiB") as nodes:
        first, second, third = nodes
        run(*MAKE["ext4"], first)
        run("mkswap", second)
        content = Content("ext4", first, tmp_path / "mount")
        content.put(some(0, 5, seed))
        before = disk.file.read_bytes()
        made = program.backup(disk, "--used-only", "--name", "disk")
    left = holes(program, made["point"])
    assert left
    assert all(MIB <= start < end <= 41 * MIB + SECTOR for start, end in left), left
    assert made["read_bytes"] + made["hole_bytes"] == disk.size
    notes = [note for note in made["notes"] if "/dev/" in note]
    assert any(f"of {first} (ext4) are not in use" in note for note in notes), notes
    assert f"All of {second} (swap) is read: there is no map of it." in notes
    assert f"All of {third} is read: no file system is known there." in notes
    restored = tmp_path / "restored"
    program("restore", made["point"], restored)
    assert is_copy(restored, before, left)


def test_a_source_that_may_be_written_is_read_as_a_whole(noise, program):
    device = noise(SIZE)
    run(*MAKE["ext4"], device)
    reading_all(program.backup(device, "--used-only", "--mode", "live"), "it may be written meanwhile")


def test_without_partclone_nothing_is_read(noise, tmp_path):
    """A person who asked for less must not get everything, hours later."""
    device = noise(SIZE)
    run(*MAKE["ext4"], device)
    new_repository(tmp_path / "repo")
    hidden = ["unshare", "--mount", "sh", "-c"]
    done = subprocess.run(
        [*hidden, 'mount -t tmpfs none /usr/sbin && exec "$@"', "sh", sys.executable, "-m", "blockbak",
         "-r", str(tmp_path / "repo"), "backup", device.path, "--used-only", "--json"],
        env=children.environment(tmp_path / "repo"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert '"name": "MissingProgram"' in done.stdout
    assert "apt-get install partclone" in done.stderr
    assert not list((tmp_path / "repo").glob("*/*.zst*"))


def test_a_bad_sector_that_nobody_uses_is_not_asked_for(noise, tmp_path, seed):
    """It is no loss, and a failing disk is spared."""
    device = noise(SIZE)
    run(*MAKE["ext4"], device)
    content = Content("ext4", device.path, tmp_path / "mount")
    content.put(some(0, 5, seed))
    found = find_unused(device.path, device.path, lambda: None)
    start, end = max(
        zip(extent.starts_of(found.extents).tolist(), extent.ends_of(found.extents).tolist(), strict=True),
        key=lambda pair: pair[1] - pair[0],
    )
    assert end - start > 4 * MIB
    middle = (start + end) // 2 // (64 * KIB) * 64 * KIB
    kernel = BadMedium(device.path, [(middle, middle + 64 * KIB)])
    repository = new_repository(tmp_path / "repo")
    world = context(tmp_path / "state", kernel=kernel)
    request = backup.Request(device.path, name="disk", used_only=True, strict=True)
    made = backup.backup(repository, request, world)
    assert (made.bad_bytes, made.attention) == (0, False)
    for low, length in kernel.reads:
        assert low + length <= middle or low >= middle + 64 * KIB
    request = replace(request, used_only=False, strict=False, retries=0)
    assert backup.backup(repository, request, world).bad_bytes == 64 * KIB


# --- what was there before, and what lies over each other --------------------------------------------


def test_a_file_system_below_a_partition_table_is_not_believed(noise, program):
    """It was there before; its bitmaps may be whole and say that the partitions of today are unused. The kernel
    shows none of an image file, nor of a virtual machine's volume.
    """
    disk = noise(SIZE)
    run(*MAKE["ext4"], disk)
    assert find_unused(str(disk.file), "disk", lambda: None).extents.size
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--wipe", "never", disk,
        stdin="label: dos\n2048,+,83\n")  # fmt: skip
    reading_all(program.backup(disk, "--used-only"), "there is a partition table too")


def test_two_file_systems_on_one_device_are_not_asked(noise, program):
    """The superblock of a btrfs lies where another's mkfs may leave it."""
    device = noise(SIZE)
    run(*MAKE["ext4"], device)
    with device.file.open("r+b") as file:
        file.seek(64 * KIB + 64)
        file.write(b"_BHRfS_M")
    run("blockdev", "--flushbufs", device)
    reading_all(program.backup(device, "--used-only"), "there are signs of others too (btrfs)")


def test_what_one_of_two_partitions_over_each_other_uses_is_used(monkeypatch):
    """The kernel takes such a table when it scans a disk, though not from partx."""
    size, left = 100 * MIB, {"a": [(10, 90)], "b": [(0, 20), (30, 40)], "c": [(0, 5)]}
    places = [used._Place("a", "a", 0, size), used._Place("b", "b", 50 * MIB, 50 * MIB)]
    places.append(used._Place("c", "c", 2 * size, size))

    def ask(place, *_, **__):
        pairs = [(start * MIB, end * MIB) for start, end in left[place.node]]
        return extent.table([start for start, _ in pairs], [end for _, end in pairs], extent.HOLE), ""

    monkeypatch.setattr(used, "_places", lambda *_: places)
    monkeypatch.setattr(used, "_kind", lambda *_: ("ext4", ""))
    monkeypatch.setattr(used, "_ask", ask)
    found = find_unused("disk", "disk", lambda: None)
    ranges = zip(extent.starts_of(found.extents).tolist(), extent.ends_of(found.extents).tolist(), strict=True)
    assert [(start // MIB, end // MIB) for start, end in ranges] == [(10, 70), (80, 90), (200, 205)]
    assert extent.flaw(found.extents, 0, 3 * size, tiling=False) is None
