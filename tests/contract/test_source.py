"""What is backed up reads the same whatever it is: a file, a sparse file, a loop device of either sector size."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from blockbak.errors import NoSuchSource, NotABlockSource, SourceInUse, SourceNotOpened, SourceVanished
from blockbak.host.blockio import PAGE, SourceReader, aligned
from blockbak.host.kernel import Kernel
from blockbak.units import KIB, MIB, align_up
from tests.conftest import Loop
from tests.faults import BadMedium, FaultyKernel, ShortKernel
from tests.patterns import explain, stamp

DEVICES = {"loop device, 512": 512, "loop device, 4096": 4096}
FILES = ["file", "sparse file"]
# Whole sectors of the device; a file may have any size.
SIZES = {
    "file": [1, 511, 512, 4095, 4097, 64 * KIB + 1, 300_001],
    "sparse file": [1, 513, 4096 * 3 + 7, 2 * MIB + 300_001],
    "loop device, 512": [512, 512 * 7, 64 * KIB + 512, 300_032],
    "loop device, 4096": [4096, 4096 * 7, 64 * KIB + 4096, 303_104],
}
CASES = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]
cases = pytest.mark.parametrize(("kind", "size"), CASES)
kinds = pytest.mark.parametrize("kind", SIZES)


def content(kind, size, seed):
    """Sectors that know their place; a sparse file has holes, some of them at its ends."""
    data = bytearray(stamp(0, size // 512 + 1, 1, seed)[:size])
    if kind == "sparse file":
        for start, end in ((0, 8 * KIB), (20 * KIB, 200 * KIB), (size - 5 * KIB, size)):
            low, high = max(start, 0), max(min(end, size), 0)
            data[low:high] = bytes(max(high - low, 0))
    return bytes(data)


@pytest.fixture
def make(request, tmp_path, seed):
    """``make(kind, size)``: a source, and the bytes it holds."""

    def made(kind, size):
        data, file = content(kind, size, seed), tmp_path / f"source-{size}.img"
        with file.open("xb") as out:
            out.truncate(size)
            for at in range(0, size, 4 * KIB):
                if kind != "sparse file" or any(data[at : at + 4 * KIB]):
                    out.seek(at)
                    out.write(data[at : at + 4 * KIB])
            os.fsync(out.fileno())
        if kind in FILES:
            return Loop(str(file), file, size, 512), data
        return request.getfixturevalue("loop")(size, DEVICES[kind], file=file), data

    return made


# Root is needed for the devices only; the fixture cannot say so, for it asks for the loop when it needs one.
pytestmark = pytest.mark.root


def read(reader, offset, length):
    """What the reader says is there, in memory of just the size it asks for."""
    into = aligned(align_up(length, PAGE))
    into[:] = 0xA5
    assert len(reader.read(offset, into, length)) == 0
    return into[:length].tobytes()


@cases
def test_every_byte_is_right(kind, size, make, seed):
    source, data = make(kind, size)
    with SourceReader(source.path, exclusive=True) as reader:
        assert reader.size == size
        found = read(reader, 0, size)
    whole = size - size % 512
    assert kind == "sparse file" or explain(found[:whole], 0, 1, seed) is None
    assert found == data


@cases
def test_every_alignment_reads_right(kind, size, make, rng):
    """Pieces begin at any sector and end at any sector, or at the end, wherever that is."""
    source, data = make(kind, size)
    sector = source.sector_size
    starts = {0, (size - 1) // sector * sector}
    starts |= {rng.randrange(size) // sector * sector for _ in range(30)}
    with SourceReader(source.path, exclusive=True) as reader:
        for start in sorted(starts):
            sectors = rng.randint(1, (size - start) // sector + 1)
            for end in {min(start + sector, size), min(start + sectors * sector, size), size}:
                assert read(reader, start, end - start) == data[start:end], f"{start} to {end}"


@kinds
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_short_reads_are_read_on(kind, direct, make, rng):
    """The kernel may give less than was asked for: whole sectors past the page cache, any number through it."""
    size = SIZES[kind][-1]
    source, data = make(kind, size)
    kernel = ShortKernel(rng, direct=direct)
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        assert reader.direct == direct
        for _ in range(20):
            start = rng.randrange(size) // source.sector_size * source.sector_size
            assert read(reader, start, size - start) == data[start:]
    assert kernel.shortened > 0


@kinds
def test_it_is_read_past_the_page_cache(kind, make):
    """What lies in the page cache is not what is on the disk: reading through it would also evict all else."""
    source, _ = make(kind, SIZES[kind][-1])
    kernel = FaultyKernel()
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        assert reader.direct
        told = Path(f"/proc/self/fdinfo/{reader.fd}").read_text(encoding="ascii")
    flags = next(line.split()[1] for line in told.splitlines() if line.startswith("flags:"))
    assert int(flags, 8) & os.O_DIRECT


@kinds
def test_it_is_opened_for_reading_only(kind, make):
    source, data = make(kind, SIZES[kind][-1])
    with SourceReader(source.path, exclusive=True) as reader:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(reader.fd, bytes(4096), 0)
        assert read(reader, 0, 512 if kind in FILES else source.sector_size) == data[: source.sector_size]


@kinds
def test_the_descriptor_is_not_inherited_and_is_closed_once(kind, make):
    source, _ = make(kind, SIZES[kind][-1])
    kernel = FaultyKernel()
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        assert not os.get_inheritable(reader.fd)
        reader.close()
    assert kernel.wrongs == []
    assert [call for call, _ in kernel.log].count("close") == 1


@pytest.mark.parametrize("kind", DEVICES)
def test_exclusive_use_is_exclusive(kind, make):
    """Nobody else who asks for exclusive use (mount, mkfs, another run) gets it, nor does it where somebody has it."""
    source, _ = make(kind, SIZES[kind][-1])
    with SourceReader(source.path, exclusive=True):
        with pytest.raises(SourceInUse):
            SourceReader(source.path, exclusive=True)
        with SourceReader(source.path, exclusive=False) as second:
            assert second.size == source.size
    with SourceReader(source.path, exclusive=True) as again:
        assert again.size == source.size


@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_tells_its_sectors(kind, make):
    source, _ = make(kind, SIZES[kind][-1])
    with SourceReader(source.path, exclusive=True) as reader:
        assert reader.logical == source.sector_size
        assert reader.physical % reader.logical == 0
        assert reader.next_data(4096) == 4096


def test_a_file_tells_its_holes(make):
    source, data = make("sparse file", SIZES["sparse file"][-1])
    with SourceReader(source.path, exclusive=True) as reader:
        for at in range(0, source.size, 4 * KIB):
            after = reader.next_data(at)
            assert after >= at
            assert not any(data[at:after])
        assert reader.next_data(24 * KIB) > 24 * KIB, "the file system keeps no holes: nothing was tested"


@kinds
@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO, errno.EBADMSG, errno.ETIMEDOUT]
)
def test_unreadable_sectors_are_exactly_those(kind, number, make):
    """They are zeros and BAD; the neighbours in the same page are neither."""
    size = SIZES[kind][-1]
    source, data = make(kind, size)
    sector = source.sector_size
    bad = [(0, sector), (9 * sector, 10 * sector), (24 * sector, 33 * sector), ((size - 1) // sector * sector, size)]
    kernel = BadMedium(source.path, bad, number=number, logical=sector)
    right = bytearray(data)
    for start, end in bad:
        right[start:end] = bytes(end - start)
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        into = aligned(align_up(size, PAGE))
        into[:] = 0xA5
        found = reader.read(0, into, size)
    assert [(int(row["start"]), int(row["start"] + row["length"])) for row in found] == bad
    assert into[:size].tobytes() == right


@kinds
@pytest.mark.parametrize("retries", [0, 1, 3])
def test_each_unreadable_sector_is_asked_for_as_often_as_told(kind, retries, make):
    """A failing disk takes seconds for each try: asking again and again takes days."""
    size = SIZES[kind][-1]
    source, _ = make(kind, size)
    sector = source.sector_size
    kernel = BadMedium(source.path, [(8 * sector, 16 * sector)], logical=sector)
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        reader.retries = retries
        into = aligned(align_up(size, PAGE))
        reader.read(0, into, size)
    alone = [offset for offset, length in kernel.reads if length == sector and 8 * sector <= offset < 16 * sector]
    step = 1 if sector < 4 * KIB else 0
    assert alone == [number * sector for _ in range(1 + retries) for number in range(8, 16)]
    # The piece, its parts of 64 KiB, those of 4 KiB where sectors are smaller, and a sector or a page at the end.
    assert len(kernel.reads) <= 1 + -(-size // (64 * KIB)) + 16 * step + 8 * (1 + retries) + 8


def test_a_bad_sector_in_a_file_on_large_sectors_is_bad_and_no_more(tmp_path, loop, ext4, seed):
    """The file system below it takes direct reads of 4096 bytes only."""
    where = ext4(loop(32 * MIB, 4096)).where
    data = stamp(0, 600, 1, seed)
    file = where / "image"
    file.write_bytes(data)
    kernel = BadMedium(file, [(40 * KIB, 40 * KIB + 512)], logical=4096)
    with SourceReader(str(file), exclusive=True, kernel=kernel) as reader:
        into = aligned(align_up(len(data), PAGE))
        found = reader.read(0, into, len(data))
    assert [(int(row["start"]), int(row["length"])) for row in found] == [(40 * KIB, 4096)]
    right = bytearray(data)
    right[40 * KIB : 44 * KIB] = bytes(4096)
    assert into[: len(data)].tobytes() == right


@kinds
@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENODEV, errno.ESHUTDOWN])
def test_a_source_that_went_away_ends_the_reading(kind, number, make):
    """Its sectors are not bad, it is gone: no image must claim otherwise."""
    source, _ = make(kind, SIZES[kind][-1])
    kernel = BadMedium(source.path, [(0, source.size)], number=number, logical=source.sector_size)
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader, pytest.raises(SourceVanished):
        reader.read(0, aligned(64 * KIB), 64 * KIB)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_device_that_lost_its_size_is_gone_and_not_bad(kind, make):
    """A disk that was pulled out may give EIO for everything, and has no size any more."""

    class Pulled(BadMedium):
        pulled = False

        def device_size(self, fd):
            return 0 if self.pulled else super().device_size(fd)

    source, _ = make(kind, SIZES[kind][-1])
    kernel = Pulled(source.path, [(0, source.size)], logical=source.sector_size)
    with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
        kernel.pulled = True
        with pytest.raises(SourceVanished):
            reader.read(0, aligned(64 * KIB), 64 * KIB)


@kinds
def test_a_source_that_shrinks_ends_the_reading(kind, make):
    """Its end came earlier than it said: neither zeros nor bad sectors are made of that."""
    size = SIZES[kind][-1]
    source, _ = make(kind, size)
    with SourceReader(source.path, exclusive=True) as reader:
        os.truncate(source.file, 16 * KIB)
        if kind in DEVICES:
            _set_capacity(source.path)
        assert reader.current_size() == 16 * KIB
        into = aligned(align_up(size, PAGE))
        assert len(reader.read(0, into, 16 * KIB)) == 0
        for offset, length in ((0, size), (8 * KIB, 16 * KIB), (16 * KIB, 4 * KIB), (32 * KIB, 4 * KIB)):
            with pytest.raises(SourceVanished):
                reader.read(offset, into, length)


def _set_capacity(device):
    """Tell a loop device that its file has another size (linux/loop.h, LOOP_SET_CAPACITY)."""
    import fcntl

    fd = os.open(device, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x4C07, 0)
    finally:
        os.close(fd)


@kinds
def test_errors_of_the_machine_are_no_bad_sectors(kind, make):
    """EINVAL or ENOMEM says nothing about the medium."""
    source, _ = make(kind, SIZES[kind][-1])
    for number in (errno.ENOMEM, errno.EFAULT, errno.EPERM):
        kernel = FaultyKernel("preadv", number, 1)
        with SourceReader(source.path, exclusive=True, kernel=kernel) as reader, pytest.raises(SourceVanished):
            reader.read(0, aligned(64 * KIB), 64 * KIB)


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize("call", ["sector_sizes", "device_size"])
def test_an_opening_that_fails_halfway_leaves_nothing_open(kind, call, make):
    source, _ = make(kind, SIZES[kind][-1])
    kernel = FaultyKernel(call, errno.EIO, 1)
    try:
        with pytest.raises((NotABlockSource, SourceNotOpened, SourceVanished)):
            SourceReader(source.path, exclusive=True, kernel=kernel)
    finally:
        left = kernel.close_left()
    assert left == []


def test_what_is_no_source_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(NoSuchSource):
        SourceReader(str(tmp_path / "nothing"), exclusive=True)
    with pytest.raises(NoSuchSource):
        SourceReader(str(tmp_path / "no" / "directory"), exclusive=True)


@pytest.mark.parametrize("kind", DEVICES)
def test_the_doubles_of_this_suite_read_as_the_kernel_does(kind, make, rng):
    """Where no fault is armed, each of them gives the same bytes."""
    source, data = make(kind, SIZES[kind][-1])
    for kernel in (Kernel(), FaultyKernel(), BadMedium(source.path, [], logical=source.sector_size), ShortKernel(rng)):
        with SourceReader(source.path, exclusive=True, kernel=kernel) as reader:
            assert read(reader, 0, source.size) == data
            assert stat.S_ISBLK(os.fstat(reader.fd).st_mode)


def test_memory_for_direct_reads_is_aligned():
    for size in (0, 1, PAGE, PAGE + 1, 4 * MIB):
        made = aligned(size)
        assert len(made) >= max(size, 1)
        assert made.ctypes.data % PAGE == 0
        assert made.dtype == np.uint8
