"""What images are read from and written to: the real files of a repository, on several file systems, and their doubles."""

import errno
import os
import shutil
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from blockbak.errors import DamagedImage, NoSpace, StoreFailed, UnreadableStore
from blockbak.host.blockio import PartialFile, StoredFile, write_durably
from blockbak.units import MIB
from tests.doubles import MemorySink, MemorySource
from tests.faults import FaultyKernel, ShortKernel
from tests.images import Memory

pytestmark = pytest.mark.root
CLONING = {
    "xfs": True,
    "btrfs": True,
    "ext4": False,
    "tmpfs": False,
    "memory": False,
    "sharing memory": True,
    "shelf": True,
}
FILES = ["ext4", "tmpfs", "xfs", "btrfs"]
sorts = pytest.mark.parametrize("sort", CLONING)
file_sorts = pytest.mark.parametrize("sort", FILES)
UNIT = 4096


@dataclass
class Place:
    """Where sources and sinks of one sort are made; files are closed with ``made``, or nothing could be unmounted."""

    sort: str
    where: Any
    made: ExitStack

    def path(self, name):
        return os.path.join(self.where, name)

    def source(self, data, name="source", kernel=None):
        if self.sort in FILES:
            with open(self.path(name), "xb") as file:
                file.write(data)
                os.fsync(file.fileno())
            return self.made.enter_context(StoredFile(self.path(name), name, kernel))
        return Memory(data, name) if self.sort == "shelf" else MemorySource(data, name)

    def sink(self, name="sink", kernel=None):
        if self.sort in FILES:
            return self.made.enter_context(PartialFile(self.path(name), name, kernel))
        if self.sort == "shelf":
            return Memory(name=name)
        return MemorySink(name, UNIT if self.sort == "sharing memory" else 0)

    def written(self, sink):
        """All that is in the sink, also what nobody has asked it for."""
        return sink.read(0, sink.size)


MKFS = {"ext4": (64, "-q", "-F"), "xfs": (300, "-q", "-f"), "btrfs": (128, "-q", "-f"), "tmpfs": (64,)}


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """A file system of each sort, for the whole module; where they are mounted."""
    folder, made = tmp_path_factory.mktemp("streams"), {}

    def run(*argv):
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    with ExitStack() as undo:
        for sort, (size, *options) in MKFS.items():
            made[sort] = folder / sort
            made[sort].mkdir()
            if sort == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", made[sort])
            else:
                file = folder / f"{sort}.img"
                with file.open("xb") as image:
                    image.truncate(size * MIB)
                device = run("losetup", "--find", "--show", "--direct-io=on", file)
                undo.callback(run, "losetup", "--detach", device)
                run(f"mkfs.{sort}", *options, device)
                run("mount", device, made[sort])
            undo.callback(run, "umount", made[sort])
        yield made


@pytest.fixture
def place(sort, mounted, tmp_path):
    where = mounted.get(sort, tmp_path) / "place"
    where.mkdir()
    with ExitStack() as made:
        yield Place(sort, where, made)
    shutil.rmtree(where)


# --- sources -------------------------------------------------------------------------------------------


@sorts
def test_a_source_gives_any_range(sort, place, rng):
    data = rng.randbytes(300_001)
    source = place.source(data)
    assert (source.name, source.size) == ("source", len(data))
    ranges = [(0, 0), (0, 1), (0, len(data)), (len(data) - 1, 1), (len(data), 0)]
    ranges += [(start, rng.randint(0, len(data) - start)) for start in rng.sample(range(len(data)), 50)]
    for offset, length in ranges:
        assert bytes(source.read(offset, length)) == data[offset : offset + length]


@sorts
def test_a_source_is_read_by_several_threads_at_once(sort, place, rng):
    data = rng.randbytes(1 * MIB)
    source = place.source(data)
    wrong = []

    def look(start):
        offsets = range(start, len(data) - 5000, 40_000)
        wrong.extend(at for at in offsets if bytes(source.read(at, 5000)) != data[at : at + 5000])

    threads = [threading.Thread(target=look, args=(start,)) for start in range(0, 40_000, 5000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("sort", [sort for sort in CLONING if sort != "shelf"])
@pytest.mark.parametrize(("offset", "length"), [(0, 101), (100, 1), (99, 2), (5000, 1), (-1, 1), (-5, 5)])
def test_past_the_end_of_a_source_is_damage(sort, offset, length, place):
    """Never fewer bytes, never zeros."""
    source = place.source(b"x" * 100)
    with pytest.raises(DamagedImage, match="source"):
        source.read(offset, length)


@file_sorts
def test_a_source_that_was_cut_short_meanwhile_is_damage(sort, place):
    source = place.source(b"x" * 10_000)
    os.truncate(place.path("source"), 4096)
    assert bytes(source.read(0, 4096)) == b"x" * 4096
    with pytest.raises(DamagedImage):
        source.read(4000, 200)


@file_sorts
def test_an_unreadable_source_says_where(sort, place):
    kernel = FaultyKernel("preadv", errno.EIO, 1)
    source = place.source(b"x" * 10_000, kernel=kernel)
    with pytest.raises(UnreadableStore) as failed:
        source.read(5000, 100)
    assert (failed.value.exit_code, failed.value.fields["offset"], failed.value.fields["file"]) == (4, 5000, "source")
    source.close()
    assert kernel.wrongs == []


@file_sorts
def test_a_source_cannot_be_written(sort, place):
    source = place.source(b"x" * 100)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(source.fd, b"y", 0)


# --- sinks -----------------------------------------------------------------------------------------------


@sorts
def test_a_sink_holds_what_was_written(sort, place, rng):
    """One buffer or many, empty ones between them, of bytes or of memory, and anywhere."""
    sink = place.sink()
    right = bytearray()
    for _ in range(40):
        offset = rng.choice((len(right), rng.randint(0, len(right)), len(right) + rng.randint(1, 5000)))
        parts = [rng.randbytes(rng.choice((0, 1, 511, 4096, 10_000))) for _ in range(rng.randint(1, 6))]
        joined = b"".join(parts)
        sink.write(offset, [part if rng.random() < 0.5 else memoryview(part) for part in parts])
        if joined:
            right.extend(bytes(max(0, offset + len(joined) - len(right))))
            right[offset : offset + len(joined)] = joined
    assert place.written(sink) == right
    for _ in range(20):
        offset = rng.randrange(len(right))
        length = rng.randint(0, len(right) - offset)
        assert bytes(sink.read(offset, length)) == right[offset : offset + length]


@sorts
def test_a_sink_takes_more_buffers_than_one_call_of_the_kernel(sort, place, rng):
    sink = place.sink()
    parts = [rng.randbytes(rng.randint(1, 9)) for _ in range(3000)]
    sink.write(7, parts)
    assert place.written(sink) == bytes(7) + b"".join(parts)


@pytest.mark.parametrize("sort", [sort for sort in CLONING if sort != "shelf"])
def test_a_sink_is_written_by_several_threads_at_once(sort, place, rng):
    data = rng.randbytes(1 * MIB)
    sink = place.sink()

    def put(start):
        for offset in range(start, len(data), 80_000):
            sink.write(offset, [data[offset : min(offset + 10_000, len(data))]])

    threads = [threading.Thread(target=put, args=(start,)) for start in range(0, 80_000, 10_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.written(sink) == data


@file_sorts
def test_short_writes_and_reads_of_a_file_are_gone_on_with(sort, place, rng):
    kernel = ShortKernel(rng)
    sink = place.sink(kernel=kernel)
    parts = [rng.randbytes(rng.choice((1, 4096, 70_000))) for _ in range(20)]
    data = b"".join(parts)
    sink.write(3, parts)
    assert sink.read(3, len(data)) == data
    source = place.source(data, kernel=kernel)
    assert bytes(source.read(0, len(data))) == data
    sink.copy(source, 11, 5, len(data) - 11)
    assert sink.read(5, len(data) - 11) == data[11:]
    assert kernel.shortened > 0


@sorts
def test_copies_are_copies(sort, place, rng):
    data = rng.randbytes(200_000)
    source, sink = place.source(data), place.sink()
    right = bytearray(250_000)
    sink.write(0, [bytes(right)])
    for length in (0, 1, 4095, 4096, 100_001):
        start, at = rng.randint(0, len(data) - length), rng.randint(0, len(right) - length)
        sink.copy(source, start, at, length)
        right[at : at + length] = data[start : start + length]
        assert place.written(sink) == right


@sorts
def test_clones_are_copies_where_they_can_be_had(sort, place, rng):
    """What ``clone_unit`` promises, ``clone`` keeps; where it promises nothing, nothing is written."""
    data = rng.randbytes(40 * UNIT + 17)
    source, sink = place.source(data), place.sink()
    unit = sink.clone_unit(source)
    assert bool(unit) == CLONING[sort]
    if not unit:
        sink.write(0, [b"before" * 1000])
        assert not sink.clone(source, 0, 0, UNIT)
        assert place.written(sink) == b"before" * 1000
        return
    sink.write(0, [bytes(100 * unit)])
    right = bytearray(100 * unit)
    blocks = len(data) // unit
    for start, at, count in ((0, 0, 1), (1, 50, blocks - 1), (blocks - 1, 3, 1), (0, 60, blocks)):
        assert sink.clone(source, start * unit, at * unit, count * unit)
        right[at * unit : (at + count) * unit] = data[start * unit : (start + count) * unit]
    assert place.written(sink) == right
    # What was shared is not changed by writing to one of the two.
    sink.write(60 * unit, [b"changed"])
    assert bytes(source.read(0, len(data))) == data


@sorts
def test_asking_for_the_unit_leaves_the_sink_as_it_was(sort, place):
    """It is tried out on the sink: what is written then may be less than a unit, which can be 64 KiB."""
    source, sink = place.source(b"x" * 300_000), place.sink()
    sink.clone_unit(source)
    assert (sink.size, place.written(sink)) == (0, b"")
    sink.write(0, [b"short"])
    assert place.written(sink) == b"short"


@pytest.mark.parametrize("sort", [sort for sort in CLONING if CLONING[sort] and sort != "shelf"])
def test_a_source_of_less_than_a_block_is_not_cloned(sort, place):
    source, sink = place.source(b"x" * 100), place.sink()
    assert sink.clone_unit(source) == 0


@file_sorts
def test_nothing_is_cloned_from_what_is_no_file_beside_it(sort, place, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"x" * 100_000)
    sink = place.sink()
    with StoredFile(str(tmp_path / "elsewhere"), "elsewhere") as foreign:
        for source in (MemorySource(b"x" * 100_000), foreign):
            assert sink.clone_unit(source) == 0
            sink.copy(source, 10, 0, 50_000)
            assert place.written(sink) == b"x" * 50_000


# --- files that become durable ----------------------------------------------------------------------------


@file_sorts
def test_a_sealed_file_has_its_name_and_only_then(sort, place):
    with place.sink("image", FaultyKernel()) as sink:
        sink.write(0, [b"content"])
        assert _names(place) == ["image.partial"]
        sink.seal()
        assert _names(place) == ["image"]
    assert _names(place) == ["image"]
    assert os.stat(place.path("image")).st_mode & 0o777 == 0o600


def _names(place):
    return sorted(os.listdir(place.where))


@file_sorts
def test_a_file_that_is_not_sealed_goes(sort, place):
    with place.sink("image") as sink:
        sink.write(0, [b"content"])
    assert _names(place) == []


@file_sorts
def test_sealing_never_replaces(sort, place):
    with open(place.path("image"), "xb") as file:
        file.write(b"first")
    with place.sink("image") as sink:
        sink.write(0, [b"second"])
        with pytest.raises(StoreFailed):
            sink.seal()
    assert _names(place) == ["image"]
    with open(place.path("image"), "rb") as file:
        assert file.read() == b"first"


@file_sorts
def test_a_partial_of_that_name_is_not_taken_over(sort, place):
    with open(place.path("image.partial"), "xb") as file:
        file.write(b"another run's")
    with pytest.raises(StoreFailed):
        place.sink("image")
    with open(place.path("image.partial"), "rb") as file:
        assert file.read() == b"another run's"


@file_sorts
@pytest.mark.parametrize(
    ("call", "at"), [("open", 1), ("pwritev", 1), ("fsync", 1), ("close", 1), ("rename", 1), ("open", 2), ("fsync", 2)]
)
@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, StoreFailed), (errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace)]
)
def test_a_step_that_fails_is_final(sort, call, at, number, error, place):
    """What was not flushed or not closed gets no name; nothing is tried twice. Once it has its name it stays."""
    kernel = FaultyKernel(call, number, at)
    with pytest.raises(error, match="image"):
        write_durably(place.path("image"), "image", b"content", kernel)
    assert kernel.fired
    assert kernel.wrongs == []
    assert _names(place) == (["image"] if at == 2 else [])
    calls = [call for call, _ in kernel.log]
    assert calls.count("fsync") <= 2
    opened = calls.count("open") - (call == "open")
    assert opened == calls.count("close")
