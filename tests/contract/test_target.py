"""What is restored to takes the same bytes whatever it is: a new file, an old one, a loop device of either sector size."""

import errno
import os

import pytest

from blockbak.errors import BadTarget, TargetFailed, TargetFull, TargetInUse, VerificationFailed
from blockbak.flow import restore
from blockbak.host.blockio import PAGE, PIECE_BYTES, TargetWriter, aligned
from blockbak.host.kernel import Kernel
from blockbak.units import KIB, MIB, align_up
from tests.conftest import Loop
from tests.faults import BadMedium, FaultyKernel, ShortKernel
from tests.host.stage import put
from tests.scene import Scene

SIZE = 3 * MIB + 5 * 4096
KINDS = ["new file", "old file", "loop device, 512", "loop device, 4096"]
DEVICES = {"loop device, 512": 512, "loop device, 4096": 4096}
kinds = pytest.mark.parametrize("kind", KINDS)
OLD = 0xA5

pytestmark = pytest.mark.root


@pytest.fixture
def target(request, kind, tmp_path):
    """Somewhere to write, full of something else; a new file has nothing yet."""
    file = tmp_path / "target.img"
    if kind != "new file":
        file.write_bytes(bytes([OLD]) * SIZE)
    if kind in DEVICES:
        return request.getfixturevalue("loop")(SIZE, DEVICES[kind], file=file)
    return Loop(str(file), file, SIZE, 512)


def opened(target, kernel=None):
    """The target as ``restore`` opens it; a file has the volume's size from the beginning."""
    made = TargetWriter(target.path, create=not os.path.exists(target.path), kernel=kernel)
    if not made.is_block:
        made.resize(SIZE)
    return made


def old(kind):
    return bytearray(SIZE) if kind == "new file" else bytearray([OLD]) * SIZE


def memory(data):
    """Page-aligned memory, as all buffers are."""
    into = aligned(align_up(len(data), PAGE))
    into[: len(data)] = memoryview(data)
    return into[: len(data)]


def held(target):
    """What is on the medium: the page cache of the device and of its file are both set aside."""
    fd = os.open(target.path, os.O_RDONLY)
    try:
        Kernel().drop_cache(fd, block=target.path.startswith("/dev/"))
        os.fsync(fd)
        return os.pread(fd, SIZE + 1, 0)
    finally:
        os.close(fd)


def back(writer, offset, length):
    into = aligned(align_up(length, PAGE))
    writer.read(offset, into, length)
    return into[:length].tobytes()


# Places are blocks; lengths are blocks, and at the volume's end whatever is left of it.
WRITES = [
    (0, 4096), (4096, 64 * KIB), (256 * KIB, 1), (512 * KIB, 511), (516 * KIB, 513), (600 * KIB, 4097),
    (1 * MIB, 1 * MIB + 4096 * 3 + 7), (SIZE - 4096, 4096),
]  # fmt: skip


@kinds
def test_what_is_written_is_there(kind, target, rng):
    right = old(kind)
    with opened(target) as writer:
        for offset, length in WRITES:
            data = rng.randbytes(length)
            right[offset : offset + length] = data
            writer.write(offset, memory(data))
            assert back(writer, offset, length) == data
        writer.flush()
        assert back(writer, 0, SIZE) == right
    assert held(target) == right


@kinds
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_short_writes_are_written_on_and_short_reads_read_on(kind, direct, target, rng):
    kernel = ShortKernel(rng, direct=direct)
    right = old(kind)
    with opened(target, kernel) as writer:
        for offset, length in WRITES:
            data = rng.randbytes(length)
            right[offset : offset + length] = data
            writer.write(offset, memory(data))
            assert back(writer, offset, length) == data
        writer.flush()
        assert back(writer, 0, SIZE) == right
    assert kernel.shortened > 0
    assert held(target) == right


ZEROS = [
    (0, 4096), (8192, 512), (16 * KIB, 511), (32 * KIB, 4096 + 1), (64 * KIB, 300_001), (512 * KIB, 256 * KIB),
    (1 * MIB, 1 * MIB + 513), (SIZE - 4096, 4096), (SIZE - 8192, 4095),
]  # fmt: skip


@kinds
@pytest.mark.parametrize("refused", [0, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS])
def test_zeroed_ranges_are_zeros_and_their_neighbours_are_not(kind, refused, target):
    """By the device's or the file system's own means, or by writing where they have none."""

    class Without(Kernel):
        def punch(self, fd, offset, length):
            raise OSError(refused, "no")

        zero_out = punch

    right = bytearray(b"\x5a" * SIZE)
    with opened(target, Without() if refused else None) as writer:
        writer.write(0, memory(right))
        for offset, length in ZEROS:
            right[offset : offset + length] = bytes(length)
            writer.zero(offset, length)
            assert back(writer, offset, length) == bytes(length)
        writer.flush()
        assert back(writer, 0, SIZE) == right
    assert held(target) == right


@pytest.mark.parametrize("kind", ["new file", "old file"])
def test_a_zeroed_range_of_a_file_takes_no_room(kind, target):
    with opened(target) as writer:
        writer.write(0, memory(b"\x5a" * SIZE))
        writer.flush()
        full = os.stat(target.path).st_blocks * 512
        writer.zero(0, 2 * MIB)
        writer.flush()
        assert os.stat(target.path).st_blocks * 512 <= full - 2 * MIB


@kinds
def test_another_error_of_zeroing_is_not_passed_over(kind, target):
    for call in ("zero_out", "punch"):
        kernel = FaultyKernel(call, errno.EIO, 1)
        with opened(target, kernel) as writer:
            if call == ("zero_out" if writer.is_block else "punch"):
                with pytest.raises(TargetFailed):
                    writer.zero(0, 64 * KIB)
                assert kernel.fired


@pytest.mark.parametrize("kind", DEVICES)
def test_reading_back_sees_the_medium_and_not_the_page_cache(kind, target, rng):
    """Something wrote under the page cache: a disk that forgets, a second initiator."""
    data = rng.randbytes(SIZE)
    with opened(target) as writer:
        writer.write(0, memory(data))
        writer.flush()
        # Fill the page cache with the right bytes, then change what lies below.
        with open(target.path, "rb") as file:
            assert file.read() == data
        put(target.file, 1 * MIB, b"\x00\x01\x02\x03" * 128)
        changed = bytearray(data)
        changed[1 * MIB : 1 * MIB + 512] = b"\x00\x01\x02\x03" * 128
        assert back(writer, 0, SIZE) == changed


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_restore_notices_what_was_written_under_the_page_cache(sector, loop, tmp_path):
    """A device that loses a write between the flush and the reading back: exit 1, not "done"."""
    scene = Scene.make(tmp_path / "scene", seed=1, points=1, size=1 * MIB, noise=True)
    device = loop(1 * MIB, sector)

    class Forgetful(Kernel):
        """After the flush, the medium has something else in one place; who reads through a cache sees it not."""

        done = False

        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            if block and not self.done:
                self.done = True
                with open(device.path, "rb") as file:
                    file.read()
                put(device.file, 512 * KIB, bytes(512))

    kernel = Forgetful()
    request = restore.Request(scene.names[0], device.path, overwrite=True)
    with pytest.raises(VerificationFailed) as failed:
        restore.restore(scene.repository(kernel), request, scene.world(kernel))
    assert kernel.done
    assert failed.value.exit_code == 1
    assert (failed.value.fields["blocks"], failed.value.fields["first"]) == (1, 512 * KIB)


class Reallocating(BadMedium):
    """A disk gives a sector that it cannot read another place once the sector is written; ``heals`` or not."""

    def __init__(self, target, bad, *, heals):
        super().__init__(target.path, bad, logical=target.sector_size)
        self._heals = heals

    def pwritev(self, fd, buffers, offset):
        count = super().pwritev(fd, buffers, offset)
        if self._heals:
            self.bad = [(start, end) for start, end in self.bad if not offset <= start < end <= offset + count]
        return count


BAD_PLACES = {"where it is sampled": 0, "elsewhere": 1 * MIB + 3 * 4096}


@pytest.fixture
def nearly(request, kind, tmp_path):
    """A scene, and a target that holds its newer point, while the older one is wanted."""
    scene = Scene.make(tmp_path / "scene", seed=1, points=2, size=SIZE, noise=True)
    file = tmp_path / "target.img"
    file.write_bytes(scene.held[scene.names[1]])
    if kind in DEVICES:
        return scene, request.getfixturevalue("loop")(SIZE, DEVICES[kind], file=file)
    return scene, Loop(str(file), file, SIZE, 512)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("place", BAD_PLACES)
def test_a_sector_of_the_target_that_cannot_be_read_is_written(kind, place, nearly):
    """Whether it holds the point is not to be known; a restore that reads first does not end there."""
    scene, target = nearly
    at = BAD_PLACES[place]
    kernel = Reallocating(target, [(at, at + target.sector_size)], heals=True)
    request = restore.Request(scene.names[0], target.path, overwrite=True)
    done = restore.restore(scene.repository(kernel), request, scene.world(kernel))
    assert done.plan.method == ("write" if at == 0 else "differ")
    assert kernel.bad == []
    assert held(target) == scene.held[scene.names[0]]


def test_a_volume_is_rolled_back_over_a_sector_that_cannot_be_read(tmp_path):
    """It is read first, whatever a sample would say; only the piece around that sector is written whole."""
    scene = Scene.make(tmp_path / "scene", seed=1, points=2, size=SIZE, noise=True)
    target = Loop(str(scene.source), scene.source, SIZE, 512)
    for at in BAD_PLACES.values():
        kernel = Reallocating(target, [(at, at + 512)], heals=True)
        request = restore.Request(scene.names[0], target.path, overwrite=True)
        done = restore.restore(scene.repository(kernel), request, scene.world(kernel))
        assert (done.plan.method, kernel.bad) == ("differ", [])
        assert PIECE_BYTES <= done.written_bytes < PIECE_BYTES + 64 * KIB
        assert held(target) == scene.held[scene.names[0]]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_sector_of_the_target_that_stays_unreadable_fails_the_restore(kind, nearly):
    scene, target = nearly
    kernel = Reallocating(target, [(1 * MIB, 1 * MIB + target.sector_size)], heals=False)
    request = restore.Request(scene.names[0], target.path, overwrite=True)
    with pytest.raises(TargetFailed) as failed:
        restore.restore(scene.repository(kernel), request, scene.world(kernel))
    assert failed.value.exit_code == 1
    assert any("not to be used" in note for note in failed.value.__notes__)


@kinds
def test_flush_makes_all_of_it_durable_then_forgets_the_cache(kind, target):
    """Both descriptors, where a tail went through the page cache."""
    kernel = FaultyKernel()
    with opened(target, kernel) as writer:
        writer.write(0, memory(b"x" * 4096))
        writer.write(8192, memory(b"x" * 100))
        kernel.log.clear()
        writer.flush()
        assert [call for call, _ in kernel.log] == ["fsync", "fsync", "drop_cache"]
    assert kernel.wrongs == []


@kinds
@pytest.mark.parametrize("call", ["fsync", "drop_cache"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failed_flush_is_told_and_not_tried_again(kind, call, number, target):
    for at in (1, 2) if call == "fsync" else (1,):
        kernel = FaultyKernel(call, number, at)
        writer = opened(target, kernel)
        writer.write(8192, memory(b"x" * 100))
        with pytest.raises(TargetFull if number == errno.ENOSPC else TargetFailed):
            writer.flush()
        writer.close()
        assert kernel.fired
        assert kernel.wrongs == []


@kinds
@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, TargetFailed), (errno.ENOSPC, TargetFull), (errno.EDQUOT, TargetFull)]
)
def test_a_failed_write_names_the_target(kind, number, error, target):
    kernel = FaultyKernel("pwritev", number, 2)
    with opened(target, kernel) as writer:
        writer.write(0, memory(b"x" * 4096))
        with pytest.raises(error, match=r"target\.img|/dev/loop") as failed:
            writer.write(64 * KIB, memory(b"y" * 4096))
    assert failed.value.exit_code == 1


@kinds
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_close_is_told_and_closes_all_the_same(kind, at, target):
    """A network file system may say only now that something was not written. The other descriptor must not stay."""
    kernel = FaultyKernel("close", errno.EIO, at)
    writer = opened(target, kernel)
    writer.write(0, memory(b"x" * 100))
    try:
        with pytest.raises(TargetFailed):
            writer.__exit__(None, None, None)
    finally:
        left = kernel.close_left()
    assert left == kernel.wrongs == []


@pytest.mark.parametrize("kind", DEVICES)
def test_exclusive_use_is_exclusive(kind, target):
    with opened(target), pytest.raises(TargetInUse):
        TargetWriter(target.path)
    with opened(target) as again:
        assert again.size == SIZE


@pytest.mark.parametrize("kind", ["new file", "old file"])
def test_a_file_gets_exactly_the_size_it_is_told(kind, target):
    with opened(target) as writer:
        writer.write(0, memory(b"x" * 8192))
        for size in (SIZE + 1, 4097, 4096, 0, 12345):
            writer.resize(size)
            assert writer.size == writer.current_size() == os.stat(target.path).st_size == size
        assert back(writer, 0, 12345) == bytes(12345)


@pytest.mark.parametrize("kind", ["new file"])
def test_a_new_file_is_its_owners_and_never_an_old_one(kind, target):
    old_mask = os.umask(0)
    try:
        opened(target).close()
    finally:
        os.umask(old_mask)
    assert os.stat(target.path).st_mode & 0o777 == 0o600
    with pytest.raises(BadTarget):
        TargetWriter(target.path, create=True)


@kinds
def test_a_target_that_ends_too_soon_is_told(kind, target):
    """It shrank after it was opened."""
    with opened(target) as writer:
        writer.write(0, memory(b"x" * SIZE))
        with pytest.raises(TargetFailed):
            writer.read(SIZE - 4096, aligned(8192), 8192)
        with pytest.raises(TargetFailed):
            writer.read(SIZE, aligned(4096), 4096)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_is_not_written_past_its_end(kind, target):
    with opened(target) as writer, pytest.raises((TargetFailed, TargetFull)):
        writer.write(SIZE - 4096, memory(b"x" * 8192))
    with open(target.path, "rb") as file:
        assert len(file.read()) == SIZE


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("call", ["sector_sizes", "device_size"])
def test_an_opening_that_fails_halfway_leaves_nothing_open(kind, call, target):
    kernel = FaultyKernel(call, errno.EIO, 1)
    try:
        with pytest.raises((BadTarget, TargetFailed)):
            TargetWriter(target.path, kernel=kernel)
    finally:
        left = kernel.close_left()
    assert left == []
