"""The kernel, and the doubles that stand for it: where no fault is armed, they do the same."""

import errno
import os
import random
import stat

import pytest

from blockbak.host.kernel import Kernel
from blockbak.units import KIB, MIB
from tests.doubles import Killed, MortalKernel
from tests.faults import BadMedium, FaultyKernel, PowerCut, QuickKernel, QuickMortal, ShortKernel
from tests.moments import AtOpening, Once

KERNELS = {
    "the kernel": Kernel,
    "MortalKernel": MortalKernel,
    "QuickMortal": QuickMortal,
    "PowerCut": PowerCut,
    "QuickKernel": QuickKernel,
    "FaultyKernel": FaultyKernel,
    "ShortKernel": lambda: ShortKernel(random.Random(1)),
    "BadMedium": lambda: BadMedium("/nothing", []),
    "AtOpening": lambda: AtOpening("/nothing", Once(lambda: None)),
}


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]()


@pytest.fixture
def opened(kernel, tmp_path):
    """A file of 100 000 bytes, open for reading and writing through the kernel; its path, descriptor and bytes."""
    path, data = str(tmp_path / "file"), bytes(range(250)) * 400
    with open(path, "xb") as file:
        file.write(data)
    fd = kernel.open(path, os.O_RDWR)
    yield path, fd, data
    kernel.close(fd)


def read(kernel, fd, offset, length):
    """All of a range, as callers do it: fewer bytes than asked for is not the end."""
    out, done = bytearray(length), 0
    while done < length:
        count = kernel.preadv(fd, [memoryview(out)[done:]], offset + done)
        if not count:
            break
        done += count
    return bytes(out[:done])


def write(kernel, fd, offset, data):
    done = 0
    while done < len(data):
        count = kernel.pwritev(fd, [memoryview(data)[done:]], offset + done)
        assert 0 < count <= len(data) - done
        done += count


def test_open_makes_a_file_of_the_owners_that_no_child_inherits(kernel, tmp_path):
    path = str(tmp_path / "new")
    fd = kernel.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert not os.get_inheritable(fd)
    assert os.fstat(fd).st_mode & 0o077 == 0
    kernel.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(FileExistsError):
        kernel.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    with pytest.raises(FileNotFoundError):
        kernel.open(str(tmp_path / "missing"), os.O_RDONLY)


def test_reads_and_writes_go_where_they_are_told(kernel, opened):
    path, fd, data = opened
    assert read(kernel, fd, 0, len(data)) == data
    assert read(kernel, fd, 99_990, 100) == data[-10:]
    assert read(kernel, fd, 200_000, 10) == b""
    write(kernel, fd, 50_000, b"changed")
    kernel.fsync(fd)
    with open(path, "rb") as file:
        assert file.read() == data[:50_000] + b"changed" + data[50_007:]


def test_several_buffers_are_one_range(kernel, opened):
    _, fd, data = opened
    first, second = bytearray(1000), bytearray(3000)
    count = kernel.preadv(fd, [first, second], 500)
    assert 0 < count <= 4000
    assert (bytes(first) + bytes(second))[:count] == data[500 : 500 + count]
    count = kernel.pwritev(fd, [b"ab", b"", memoryview(b"cdef")], 0)
    assert 0 < count <= 6
    assert read(kernel, fd, 0, count) == b"abcdef"[:count]


def test_more_buffers_than_one_call_takes_are_cut_and_not_refused(kernel, opened):
    _, fd, _ = opened
    count = kernel.pwritev(fd, [b"x"] * 5000, 0)
    assert 0 < count <= 1024
    assert read(kernel, fd, 0, count) == b"x" * count


def test_truncate_sets_the_size_either_way(kernel, opened):
    path, fd, _ = opened
    for size in (10, 0, 5000):
        kernel.truncate(fd, size)
        assert os.stat(path).st_size == size
    assert read(kernel, fd, 0, 5000) == bytes(5000)


def test_room_is_taken_and_what_is_there_stays(kernel, opened):
    path, fd, _ = opened
    kernel.truncate(fd, 0)
    write(kernel, fd, 0, b"here")
    kernel.allocate(fd, 1 << 16)
    assert os.stat(path).st_size == 1 << 16
    assert os.stat(path).st_blocks * 512 >= 1 << 16
    assert read(kernel, fd, 0, 1 << 16) == b"here".ljust(1 << 16, b"\0")


def test_rename_never_replaces(kernel, tmp_path):
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    for path, content in ((old, "old"), (new, "new")):
        with open(path, "x", encoding="ascii") as file:
            file.write(content)
    with pytest.raises(FileExistsError):
        kernel.rename(old, new)
    with open(new, encoding="ascii") as file:
        assert file.read() == "new"
    kernel.unlink(new)
    kernel.rename(old, new)
    assert os.listdir(tmp_path) == ["new"]
    with pytest.raises(FileNotFoundError):
        kernel.rename(old, str(tmp_path / "third"))
    os.symlink("nowhere", old)
    with pytest.raises(FileExistsError):
        kernel.rename(new, old)


def test_a_directory_is_its_owners_whatever_the_umask(kernel, tmp_path):
    for mask in (0, 0o777):
        path, before = str(tmp_path / f"made-{mask}"), os.umask(mask)
        try:
            kernel.mkdir(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    with pytest.raises(FileExistsError):
        kernel.mkdir(path)
    fd = kernel.open(path, os.O_RDONLY | os.O_DIRECTORY)
    kernel.fsync(fd)
    kernel.close(fd)


def test_unlink_removes_one_name(kernel, opened):
    path, _, _ = opened
    os.link(path, path + ".second")
    kernel.unlink(path)
    assert os.path.exists(path + ".second")
    with pytest.raises(FileNotFoundError):
        kernel.unlink(path)


def test_copies_inside_the_kernel_are_copies(kernel, opened, tmp_path):
    _, fd, data = opened
    other = kernel.open(str(tmp_path / "other"), os.O_RDWR | os.O_CREAT)
    done = 0
    while done < 70_000:
        count = kernel.copy_range(fd, 11 + done, 70_000 - done, other, 5 + done)
        assert 0 < count <= 70_000 - done
        done += count
    assert read(kernel, other, 0, 100_000) == bytes(5) + data[11:70_011]
    kernel.close(other)


def test_a_punched_hole_reads_as_zeros_and_keeps_the_size(kernel, opened):
    path, fd, data = opened
    kernel.punch(fd, 10_000, 50_001)
    assert read(kernel, fd, 0, 100_000) == data[:10_000] + bytes(50_001) + data[60_001:]
    assert os.stat(path).st_size == len(data)


def test_the_page_cache_of_a_file_is_forgotten(kernel, opened):
    _, fd, data = opened
    kernel.fsync(fd)
    kernel.drop_cache(fd, block=False)
    assert read(kernel, fd, 0, len(data)) == data


def test_locks_keep_others_out_until_they_are_let_go(kernel, opened):
    path, fd, _ = opened
    other = kernel.open(path, os.O_RDWR)
    kernel.lock(fd, exclusive=True)
    for exclusive in (True, False):
        with pytest.raises(BlockingIOError):
            kernel.lock(other, exclusive=exclusive)
    kernel.lock(fd, exclusive=False)
    kernel.lock(other, exclusive=False)
    with pytest.raises(BlockingIOError):
        kernel.lock(other, exclusive=True)
    kernel.close(other)
    kernel.lock(fd, exclusive=True)


def test_closing_twice_is_an_error(kernel, tmp_path):
    fd = kernel.open(str(tmp_path), os.O_RDONLY | os.O_DIRECTORY)
    kernel.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        kernel.close(fd)


@pytest.mark.parametrize("sort", ["xfs", "btrfs"])
def test_clones_share_blocks(sort, request, loop):
    """All kernels on one file system: making it takes longer than the test."""
    size = {"xfs": 300 * MIB, "btrfs": 128 * MIB}[sort]
    where = request.getfixturevalue(sort)(loop(size)).where
    data = os.urandom(64 * KIB)
    (where / "source").write_bytes(data)
    for name, make in KERNELS.items():
        kernel = make()
        source = kernel.open(str(where / "source"), os.O_RDONLY)
        target = kernel.open(str(where / name), os.O_RDWR | os.O_CREAT)
        kernel.clone_range(source, 4 * KIB, 32 * KIB, target, 8 * KIB)
        assert read(kernel, target, 0, 64 * KIB) == bytes(8 * KIB) + data[4 * KIB : 36 * KIB]
        with pytest.raises(OSError, match="Invalid argument"):
            kernel.clone_range(source, 1, 4 * KIB, target, 0)
        kernel.close(source)
        kernel.close(target)


def test_clones_are_refused_where_blocks_are_not_shared(kernel, loop, ext4):
    where = ext4(loop(16 * MIB)).where
    (where / "source").write_bytes(bytes(8 * KIB))
    source = kernel.open(str(where / "source"), os.O_RDONLY)
    target = kernel.open(str(where / "target"), os.O_RDWR | os.O_CREAT)
    with pytest.raises(OSError, match="not supported") as failed:
        kernel.clone_range(source, 0, 4 * KIB, target, 0)
    assert failed.value.errno == errno.EOPNOTSUPP
    kernel.close(source)
    kernel.close(target)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device_tells_its_size_and_sectors_and_zeroes_ranges(kernel, sector, loop):
    device = loop(1 * MIB, sector)
    fd = kernel.open(device.path, os.O_RDWR | os.O_EXCL)
    assert kernel.device_size(fd) == 1 * MIB
    assert kernel.sector_sizes(fd) == (sector, sector)
    write(kernel, fd, 0, b"x" * MIB)
    kernel.fsync(fd)
    kernel.zero_out(fd, 8 * KIB, 64 * KIB)
    kernel.drop_cache(fd, block=True)
    assert read(kernel, fd, 0, MIB) == b"x" * 8 * KIB + bytes(64 * KIB) + b"x" * (MIB - 72 * KIB)
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.zero_out(fd, 100, 512)
    with pytest.raises(OSError, match="busy"):
        kernel.open(device.path, os.O_RDONLY | os.O_EXCL)
    kernel.close(fd)


@pytest.mark.parametrize("make", [MortalKernel, QuickMortal, PowerCut])
def test_a_dead_kernel_does_nothing_more(make, tmp_path):
    """What stands for SIGKILL has no effect from the moment it is hit."""
    path = str(tmp_path / "file")
    kernel = make(2)
    fd = kernel.open(path, os.O_RDWR | os.O_CREAT)
    with pytest.raises(Killed):
        kernel.truncate(fd, 100)
    for call in (
        lambda: kernel.rename(path, path + ".new"),
        lambda: kernel.unlink(path),
        lambda: kernel.mkdir(path + ".d"),
        lambda: kernel.close(fd),
    ):
        with pytest.raises(Killed):
            call()
    assert os.listdir(tmp_path) == ["file"]
    assert os.stat(path).st_size == 0


def test_a_faulty_kernel_fails_once_and_notices_what_must_not_follow(tmp_path):
    path = str(tmp_path / "file")
    kernel = FaultyKernel("fsync", errno.EIO, 2)
    fd = kernel.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    kernel.fsync(fd)
    with pytest.raises(OSError, match="Input/output"):
        kernel.fsync(fd)
    assert (kernel.fired, kernel.wrongs) == (True, [])
    kernel.fsync(fd)
    kernel.close(fd)
    kernel.rename(path, path + ".new")
    with pytest.raises(OSError, match="Bad file"):
        kernel.close(fd)
    assert len(kernel.wrongs) == 3


def test_a_power_cut_takes_what_was_not_flushed(tmp_path):
    def run(keep, *, flushed):
        folder = tmp_path / f"{keep}-{flushed}"
        folder.mkdir()
        kernel = PowerCut()
        path = str(folder / "file")
        fd = kernel.open(path, os.O_RDWR | os.O_CREAT)
        kernel.pwritev(fd, [b"content"], 0)
        if flushed:
            kernel.fsync(fd)
        kernel.close(fd)
        kernel.rename(path, path + ".new")
        kernel.lose(keep)
        return {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    assert run(0, flushed=True) == run(0, flushed=False) == {}
    assert run(1, flushed=True) == {"file": b"content"}
    assert run(1, flushed=False) == {"file": b""}
    assert run(2, flushed=True) == {"file.new": b"content"}
    assert run(2, flushed=False) == {"file.new": b""}
