"""What the disk below a repository does not give back, though the page cache, or a directory, still has it."""

from __future__ import annotations

import errno
import os
import re

import pytest

from blockbak.errors import DamagedImage, UnreadableStore
from blockbak.flow import backup, delete, restore, verify
from blockbak.units import KIB, MIB
from tests import children
from tests.host.stage import frame_at, run, settle
from tests.scene import BLOCK, Scene


@pytest.fixture
def disk(loop, ext4):
    """A file system whose medium, a file, can be changed behind the kernel's back."""
    return ext4(loop(64 * MIB), "-b", "4096", "-I", "256")


@pytest.fixture
def scene(disk, seed):
    return Scene.make(disk.where / "scene", seed, points=2, size=75 * BLOCK + 3, noise=True)


def change_medium(disk, place, data):
    with disk.device.file.open("r+b") as file:
        file.seek(place)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# --- bits that turned over ------------------------------------------------------------------------------------


def rot(path, disk):
    """Turn a bit over in a frame of an image that the page cache holds."""
    run("sync", "-f", path)
    offset, stored = frame_at(path, 0)
    frame = path.read_bytes()[offset : offset + stored]
    place = disk.device.file.read_bytes().index(frame[: 4 * KIB])
    change_medium(disk, place + 300, bytes([frame[300] ^ 0x10]))
    assert path.read_bytes()[offset : offset + stored] == frame, "the page cache should still have it"


def test_verify_reads_the_disk_and_not_the_page_cache(scene, disk):
    rot(scene.where / f"{scene.names[0]}.full.zst", disk)
    report = verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0)
    assert [verdict.ok for verdict in report.images] == [False, True]


def test_an_image_that_is_to_take_over_is_read_from_the_disk(scene, disk):
    made = scene.synthesize()
    rot(scene.where / made.point.file, disk)
    with pytest.raises(DamagedImage):
        delete.delete(scene.repository(), [scene.names[0]], scene.world())
    assert scene.listed() == scene.names


# --- inodes that are gone ---------------------------------------------------------------------------------


def lose_inodes(disk, paths):
    """Spoil inodes: their checksum no longer matches, and the kernel refuses whatever needs them."""
    numbers = [os.stat(path).st_ino for path in paths]
    disk.unmount()
    for number in numbers:
        told = run("debugfs", "-R", f"imap <{number}>", disk.device.path)
        block, offset = re.search(r"block (\d+), offset 0x([0-9a-f]+)", told).groups()
        change_medium(disk, int(block) * 4096 + int(offset, 16) + 16, b"\xff\xff")
    run("blockdev", "--flushbufs", disk.device.path)
    disk.mount()
    assert settle(lambda: forgotten(disk, paths), 10), (
        "the kernel still has them: who else has the file system mounted?"
    )


def forgotten(disk, paths):
    """Whether the kernel has to read the inodes, and cannot; else it is made to forget them."""
    for path in paths:
        try:
            os.lstat(path)
        except OSError as error:
            assert error.errno in (errno.EBADMSG, errno.EUCLEAN), error  # noqa: PT017 - it may also be there
        else:
            disk.unmount()
            run("blockdev", "--flushbufs", disk.device.path)
            disk.mount()
            return False
    return True


def test_a_point_whose_inodes_cannot_be_read_is_damage_and_never_absence(scene, disk):
    """They lie side by side in one sector of the inode table: an image is mostly lost with its manifest."""
    newest = f"{scene.names[-1]}.incremental"
    lose_inodes(disk, [scene.where / f"{newest}.json", scene.where / f"{newest}.zst"])
    (damage,) = scene.catalog().damage
    assert damage.fields["point"] == scene.names[-1]
    assert not verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0).ok
    for target in ("new.img", "old.img"):
        path = scene.folder / target
        if target == "old.img":
            path.write_bytes(b"\xa5" * 5000)
        request = restore.Request("latest", str(path), overwrite=True)
        with pytest.raises(UnreadableStore):
            restore.restore(scene.repository(), request, scene.world())
    made = backup.backup(scene.repository(), scene.request(), scene.world())
    assert made.kind == "full"


def test_an_older_point_is_restored_beside_one_whose_inodes_are_gone(scene, disk):
    """Over an existing file, too: what cannot be looked at is not that file."""
    newest = f"{scene.names[-1]}.incremental"
    lose_inodes(disk, [scene.where / f"{newest}.json", scene.where / f"{newest}.zst"])
    scene.target.write_bytes(b"\xa5" * 5000)
    request = restore.Request(scene.names[0], str(scene.target), overwrite=True)
    restore.restore(scene.repository(), request, scene.world())
    assert scene.target.read_bytes() == scene.held[scene.names[0]]
    assert scene.target.stat().st_size == 75 * BLOCK + 3


def test_an_image_whose_inode_is_gone_is_an_orphan_without_its_manifest(scene, disk):
    newest = scene.where / f"{scene.names[-1]}.incremental.json"
    newest.unlink()
    lose_inodes(disk, [newest.with_suffix(".zst")])
    assert scene.catalog().orphans == [f"{scene.names[-1]}.incremental.zst"]


def test_a_volume_whose_directory_cannot_be_looked_at_is_not_passed_over(scene, disk):
    """Else 'latest' would be clear: that of the other volume."""
    request = backup.Request(os.path.realpath(scene.source), name="other", block_bytes=BLOCK)
    other = backup.backup(scene.repository(), request, scene.world()).point
    lose_inodes(disk, [scene.where])
    with pytest.raises(UnreadableStore):
        verify.verify(scene.repository(), [], scene.world(), pick=lambda: 0.0)
    with pytest.raises(UnreadableStore):
        restore.restore(scene.repository(), restore.Request("latest", str(scene.target)), scene.world())
    assert not scene.target.exists()
    listed = children.rescue(scene.place, "list")
    assert listed.code == 4, listed
    assert children.rescue(scene.place, "restore", other[:8], scene.target).code == 1
    assert not scene.target.exists()
    for name in (other, f"other/{other[:8]}"):
        assert children.rescue(scene.place, "restore", name, scene.target).code == 0
        assert scene.target.read_bytes() == scene.source.read_bytes()
        scene.target.unlink()
    restore.restore(scene.repository(), restore.Request("other@latest", str(scene.target)), scene.world())
    assert scene.target.read_bytes() == scene.source.read_bytes()


def test_rescue_names_a_point_whose_inodes_are_gone(scene, disk):
    newest = f"{scene.names[-1]}.incremental"
    lose_inodes(disk, [scene.where / f"{newest}.json", scene.where / f"{newest}.zst"])
    listed = children.rescue(scene.place, "list")
    assert listed.code == 4, listed
    assert newest in listed.err
    scene.target.write_bytes(b"old")
    done = children.rescue(scene.place, "restore", scene.names[0], scene.target, "--yes")
    assert done.code == 0, done
    assert scene.target.read_bytes() == scene.held[scene.names[0]]
