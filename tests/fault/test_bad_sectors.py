"""Real read errors: a file served through FUSE, of which chosen ranges give EIO, and a loop device on it."""

import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.host.device import look
from blockbak.units import KIB, MIB
from tests import children
from tests.conftest import Loop
from tests.doubles import new_repository

SECTOR, BLOCK = 512, 4 * KIB
SIZE = 2 * MIB + 3 * SECTOR
# One sector; a run over the edge of a block, and of a page; the first; the last, in a short block.
BAD = [
    (0, SECTOR),
    (5 * BLOCK + SECTOR, 5 * BLOCK + 2 * SECTOR),
    (MIB - 2 * SECTOR, MIB + 3 * SECTOR),
    (SIZE - SECTOR, SIZE),
]

# nbdkit gives a script the number of bytes as $3 and the offset as $4.
_READ = """
while read start end; do
    if [ $4 -lt $end ] && [ $start -lt $(($4 + $3)) ]; then echo "EIO a bad sector" >&2; exit 1; fi
done < "{bad}"
exec dd if="{disk}" iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none
"""


@dataclass
class SickDisk:
    """A read-only file of which reads fail where ``hurt`` said; ``backing`` is what lies below, writable."""

    file: Path
    backing: Path
    list: Path

    def hurt(self, ranges):
        self.list.write_text("".join(f"{start} {end}\n" for start, end in ranges))


@pytest.fixture
def sick_disk(as_root, no_leftovers, tmp_path):
    backing, bad, file = tmp_path / "disk.img", tmp_path / "bad", tmp_path / "sick"
    backing.write_bytes(os.urandom(SIZE))
    bad.touch()
    file.touch()
    script = [
        "nbdkit", "--exit-with-parent", "eval", f"get_size=echo {SIZE}",
        "pread=" + _READ.format(bad=bad, disk=backing),
    ]  # fmt: skip
    with subprocess.Popen(
        ["nbdfuse", "--readonly", file, "[", *script, "]"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        deadline = time.monotonic() + 20
        while not os.path.ismount(file):
            assert server.poll() is None, "nbdfuse ended"
            assert time.monotonic() < deadline, "nbdfuse did not mount within 20 s"
            time.sleep(0.02)
        try:
            yield SickDisk(file, backing, bad)
        finally:
            subprocess.run(["umount", file], check=True)
            server.wait(20)


@pytest.fixture(params=["loop device", "image file"])
def source(request, sick_disk, loop):
    """What is backed up: the file itself, or a device on it."""
    if request.param == "image file":
        return Loop(str(sick_disk.file), sick_disk.file, SIZE, SECTOR)
    return loop(SIZE, file=sick_disk.file, read_only=True)


@pytest.fixture
def blockbak(tmp_path):
    """The program as a person runs it: exit status, document, messages."""
    new_repository(tmp_path / "repo")

    def run(*words):
        done = children.run(tmp_path / "repo", *words, "--json")
        assert "Traceback" not in done.err
        return done.code, done.document, done.err

    return run


def ranges(rows):
    return [(row["start"], row["start"] + row["length"]) for row in rows]


def zeroed(content, holes):
    content = bytearray(content)
    for start, end in holes:
        content[start:end] = bytes(end - start)
    return bytes(content)


def bad_extents(document):
    return ranges(row for row in document["extents"] if row["kind"] == "bad")


def test_the_sick_disk_is_sick_where_it_was_told(source, sick_disk):
    """What the tests below rest on."""
    assert look(source.path).size == SIZE
    with open(source.path, "rb", buffering=0) as file:
        assert os.pread(file.fileno(), BLOCK, 4 * BLOCK) == sick_disk.backing.read_bytes()[4 * BLOCK : 5 * BLOCK]
        sick_disk.hurt(BAD)
        with pytest.raises(OSError, match="Input/output"):
            os.pread(file.fileno(), SECTOR, 0)


@pytest.mark.slow
def test_unreadable_sectors_are_named_from_the_backup_to_the_restore_and_healed(source, sick_disk, blockbak, tmp_path):
    sick_disk.hurt(BAD)
    content = sick_disk.backing.read_bytes()
    lost = sum(end - start for start, end in BAD)
    options = ("--name", "sick", "--block-size", "4K")

    # A full: exactly the bad sectors, and the exit status says that somebody should look.
    status, document, told = blockbak("backup", source.path, *options)
    assert (status, document["errors"]) == (3, [])
    first = document["points"][0]
    assert (first["kind"], first["bad_bytes"]) == ("full", lost)
    assert f"{lost} bytes could not be read" in told
    assert bad_extents(blockbak("show", first["point"])[1]) == BAD

    # Restored, they are zeros, and named.
    target = tmp_path / "target.img"
    status, document, told = blockbak("restore", first["point"], target)
    assert status == 3
    assert ranges(document["unreadable"]) == BAD
    assert all(f"{start} to {end}" in told for start, end in BAD)
    assert target.read_bytes() == zeroed(content, BAD)
    rescued = tmp_path / "rescued.img"
    done = children.rescue(tmp_path / "repo", "restore", first["point"], rescued, "--yes")
    assert done.code == 3, done.err
    assert rescued.read_bytes() == zeroed(content, BAD)

    # Still sick, and other sectors too: a bad block equals nothing, so it is read again.
    worse = sorted([*BAD[:2], (MIB + 100 * SECTOR, MIB + 101 * SECTOR), BAD[3]])
    sick_disk.hurt(worse)
    status, document, _ = blockbak("backup", source.path, *options)
    second = document["points"][0]
    assert (status, second["kind"], second["parent"]) == (3, "incremental", first["point"])
    assert bad_extents(blockbak("show", second["point"])[1]) == worse
    status, document, _ = blockbak("synthesize", "sick")
    assert status in (0, 3)
    assert document["kind"] == "full"
    target.unlink()
    status, document, _ = blockbak("restore", second["point"], target)
    assert (status, ranges(document["unreadable"])) == (3, worse)
    assert target.read_bytes() == zeroed(content, worse)

    # Well again: the next run heals it, without being told.
    sick_disk.hurt([])
    status, document, _ = blockbak("backup", source.path, *options)
    third = document["points"][0]
    assert (status, third["kind"], third["bad_bytes"]) == (0, "incremental", 0)
    touched = {at // BLOCK for start, end in worse for at in range(start, end, SECTOR)}
    short = BLOCK * ((SIZE - 1) // BLOCK + 1) - SIZE
    assert third["changed_bytes"] in (len(touched) * BLOCK, len(touched) * BLOCK - short)
    target.unlink()
    status, document, _ = blockbak("restore", third["point"], target)
    assert (status, document["unreadable"]) == (0, [])
    assert target.read_bytes() == content
    assert blockbak("verify")[0] == 0


def test_ddrescue_is_told_what_could_not_be_read(source, sick_disk, blockbak, tmp_path):
    """``show --mapfile`` renders the index, and ddrescuelog reads it; a healed disk leaves nothing in it."""
    sick_disk.hurt(BAD)
    status, document, told = blockbak("backup", source.path, "--name", "sick", "--block-size", "4K", "--retries", "0")
    assert status == 3
    assert "--mapfile" in told
    point = document["points"][0]["point"]
    assert bad_sectors(blockbak("show", point, "--mapfile"), tmp_path) == [
        sector for start, end in BAD for sector in range(start // SECTOR, -(-end // SECTOR))
    ]
    sick_disk.hurt([])
    _, document, _ = blockbak("backup", source.path, "--name", "sick")
    assert bad_sectors(blockbak("show", document["points"][0]["point"], "--mapfile"), tmp_path) == []
    assert blockbak("show", point, "--mapfile", "--lvm-metadata")[0] == 2


def bad_sectors(shown, tmp_path):
    """What GNU ddrescue's own tool makes of it."""
    status, document, _ = shown
    assert status == 0
    file = tmp_path / "map"
    file.write_text(document["mapfile"])
    command = ["ddrescuelog", f"--block-size={SECTOR}", "--list-blocks=-", file]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [int(line) for line in lines.split()]


def test_strictly_no_point_is_made_and_earlier_ones_stay(source, sick_disk, blockbak):
    options = ("--name", "sick", "--block-size", "4K", "--strict", "--retries", "2")
    status, document, _ = blockbak("backup", source.path, *options)
    assert status == 0
    first = document["points"][0]["point"]
    start, end = 100 * BLOCK + SECTOR, 100 * BLOCK + 3 * SECTOR
    sick_disk.hurt([(start, end)])
    status, document, told = blockbak("backup", source.path, *options)
    assert (status, document["points"]) == (1, [])
    (error,) = document["errors"]
    assert (error["name"], error["exit"]) == ("SourceUnreadable", 1)
    assert (error["fields"]["byte"], error["fields"]["sector"]) == (start, start // SECTOR)
    assert error["fields"]["path"] == source.path
    assert f"byte {start}, sector {start // SECTOR} of {SECTOR} bytes" in told
    assert [point["point"] for point in blockbak("list")[1]] == [first]
    assert blockbak("verify")[0] == 0
    # Without it, the same disk gives all but those two sectors.
    status, document, _ = blockbak("backup", source.path, *options[:4])
    assert (status, document["points"][0]["bad_bytes"]) == (3, end - start)
