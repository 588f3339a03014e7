"""What the disk below a repository does not give back, though the page cache, or a directory, still has it."""

from __future__ import annotations

import os

import pytest

from blockbak.errors import DamagedImage
from blockbak.flow import delete, verify
from blockbak.units import KIB, MIB
from tests.host.stage import frame_at, run
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
