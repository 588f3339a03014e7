"""The last entry of the seek table leads to the closing record: nothing is believed of it, nor read for it."""

import struct

import pytest

from blockbak.errors import DamagedImage
from blockbak.host.blockio import StoredFile
from blockbak.image import format as fmt
from blockbak.image.reader import ImageReader
from tests import children
from tests.scene import BLOCK, Scene


class Counted(StoredFile):
    """Notes the longest read."""

    longest = 0

    def read(self, offset, length):
        self.longest = max(self.longest, length)
        return super().read(offset, length)


@pytest.fixture
def scene(memory, seed):
    return Scene.make(memory / "scene", seed, points=1, size=75 * BLOCK + 3, noise=True)


@pytest.mark.parametrize("stored", [0, 1, 7, 8, 9, 55, 56, 0x20000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_a_wrong_length_of_the_closing_record_is_damage_before_so_much_is_read(scene, stored):
    """On a large image one bit decides about gigabytes of memory."""
    path = scene.where / f"{scene.names[0]}.full.zst"
    place = path.stat().st_size - fmt.SEEK_FOOTER.itemsize - fmt.SEEK_ENTRY.itemsize
    with path.open("r+b") as file:
        file.seek(place)
        file.write(struct.pack("<I", stored))
    with Counted(str(path), "image") as source:
        with pytest.raises(DamagedImage):
            ImageReader(source)
        assert source.longest <= fmt.HEADER_BYTES
    done = children.rescue(scene.place, "restore", scene.names[0], scene.target)
    assert (done.code, scene.target.exists()) == (4, False), done
    assert "Traceback" not in done.err
