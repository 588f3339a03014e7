"""What others make of our files: stock zstd, seekable readers, and rescue.py without blockbak."""

import ast
import io
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import pyzstd

from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView
from tests.host.stage import attached, mounted, run
from tests.images import DIFFERENTIAL, INCREMENTAL, Memory, Shelf, rewrite_manifest, state

KIB, MIB = 1024, 1024 * 1024
RESCUE = Path(__file__).parents[2] / "blockbak" / "repository" / "rescue.py"
FIRST, SECOND, THIRD = (f"20260301T00000{number}Z-00a{number}" for number in range(3))
COMPRESS = ["none", "zstd", "zstd:3"]


def zstd(*options: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["zstd", *options], input=data, capture_output=True, check=False)


def make(volume: str, size: int, block: int, compress: str, seed: int) -> Shelf:
    """A full, a differential and an incremental with holes and unreadable sectors."""
    dice = np.random.default_rng(seed)

    def scribble(content: bytearray, times: int, longest: int) -> bytearray:
        for _ in range(times):
            start = int(dice.integers(0, size))
            length = min(size - start, int(dice.integers(1, longest)))
            kind = int(dice.integers(0, 3))
            content[start : start + length] = (
                bytes(length)
                if kind == 0
                else dice.bytes(length)
                if kind == 1
                else b"blockbak "[:9] * (length // 9) + b"." * (length % 9)
            )
        return content

    shelf = Shelf(volume, block, compress)
    now = scribble(bytearray(size), 12, size // 6 + 2)
    shelf.add(FIRST, state(now))
    shelf.add(SECOND, state(scribble(now, 5, size // 40 + 2)), DIFFERENTIAL, FIRST)
    sector = size // 512 // 2 * 512
    bad = [(sector, min(sector + 1024, size))]
    hole = [(0, min(3 * block, sector))]
    shelf.add(THIRD, state(scribble(now, 5, size // 40 + 2), hole, bad), INCREMENTAL, SECOND)
    return shelf


def images(shelf: Shelf) -> dict[str, bytes]:
    return {name: data for name, data in shelf.files.items() if name.endswith(".zst")}


# --- stock readers --------------------------------------------------------------------------------

SIZES = [(512, 4 * KIB), (5 * MIB + 512, 4 * KIB), (21 * MIB + 1536, 64 * KIB), (9 * MIB, 1 * MIB)]


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_zstd_yields_the_device(size, block, compress, seed):
    shelf = make("volume", size, block, compress, seed)
    full = shelf.files[f"{FIRST}.full.zst"]
    assert zstd("-dc", data=full).stdout == shelf.states[FIRST].content
    for data in images(shelf).values():
        assert zstd("-tq", data=data).returncode == 0


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_zstd_yields_the_changed_extents_of_a_delta_in_order(size, block, compress, seed):
    shelf = make("volume", size, block, compress, seed)
    for point, kind in ((SECOND, "differential"), (THIRD, "incremental")):
        data = shelf.files[f"{point}.{kind}.zst"]
        reader = ImageReader(Memory(data))
        wanted = []
        for section in reader.all_sections():
            for index in np.flatnonzero(section.stored).tolist():
                start = reader.geometry.section_range(section.number)[0] + index * block
                wanted.append(shelf.states[point].content[start : start + block])
        assert zstd("-dc", data=data).stdout == b"".join(wanted)


@pytest.mark.parametrize("compress", COMPRESS)
def test_zstd_counts_the_frames_of_the_index(compress, seed, tmp_path):
    shelf = make("volume", 5 * MIB + 512, 4 * KIB, compress, seed)
    for name, data in images(shelf).items():
        path = tmp_path / name
        path.write_bytes(data)
        listing = subprocess.run(["zstd", "-lv", path], capture_output=True, text=True, check=True).stdout
        reader = ImageReader(Memory(data))
        sections = len(reader.sections)
        counted = {
            words: int(re.search(rf"{words}: (\d+)", listing)[1])
            for words in ("# Zstandard Frames", "# Skippable Frames")
        }
        frames = sum(len(section.frames) for section in reader.all_sections())
        assert counted == {"# Zstandard Frames": frames, "# Skippable Frames": sections + 3}
        assert reader.closing.frames == frames


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_a_seekable_reader_reads_any_range_of_a_full(size, block, compress, seed, rng):
    shelf = make("volume", size, block, compress, seed)
    content = shelf.states[FIRST].content
    with pyzstd.SeekableZstdFile(io.BytesIO(shelf.files[f"{FIRST}.full.zst"]), "rb") as file:
        assert file.seek(0, os.SEEK_END) == size
        for _ in range(40):
            start, length = rng.randrange(size), rng.randrange(1, 300 * KIB)
            file.seek(start)
            assert file.read(length) == content[start : start + length]


def test_a_composed_full_is_as_good_as_any(seed):
    shelf = make("volume", 5 * MIB + 512, 4 * KIB, "zstd", seed)
    shelf.add_synthetic(THIRD)
    data = shelf.files[f"{THIRD}.full.zst"]
    assert zstd("-dc", data=data).stdout == shelf.states[THIRD].content
    with pyzstd.SeekableZstdFile(io.BytesIO(data), "rb") as file:
        file.seek(2 * MIB)
        assert file.read(MIB) == shelf.states[THIRD].content[2 * MIB : 3 * MIB]
    PointView([ImageReader(Memory(data))]).check()


# --- rescue.py --------------------------------------------------------------------------------------


@dataclass
class Rescue:
    """A repository with rescue.py in it, on a machine that has no blockbak."""

    repository: Path
    shelf: Shelf

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """`python3 -I -S` finds neither installed packages nor the working directory."""
        return subprocess.run(
            [sys.executable, "-I", "-S", self.repository / "rescue.py", *map(str, arguments)],
            capture_output=True, text=True, check=False, cwd=self.repository.parent,
        )  # fmt: skip

    def restore(self, point: str, target: object, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("restore", point, target, *options)

    def file(self, name: str) -> Path:
        return self.repository / self.shelf.volume / name


def shelve(shelf: Shelf, repository: Path) -> Rescue:
    shelf.write(repository)
    shutil.copy(RESCUE, repository)
    return Rescue(repository, shelf)


@pytest.fixture
def rescue(tmp_path, seed) -> Rescue:
    return shelve(make("volume", 3 * MIB + 1536, 4 * KIB, "zstd", seed), tmp_path / "repository")


def test_rescue_needs_nothing_but_the_standard_library():
    text = RESCUE.read_text()
    tree = ast.parse(text, feature_version=(3, 6))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", "import blockbak"], capture_output=True, check=False, cwd="/"
    )
    assert done.returncode, "blockbak must not be within reach of these tests"


@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize(("size", "block"), SIZES)
def test_rescue_restores_every_point(size, block, compress, seed, tmp_path):
    rescue = shelve(make("volume", size, block, compress, seed), tmp_path / "repository")
    for point, then in rescue.shelf.states.items():
        target = tmp_path / point
        done = rescue.restore(point, target)
        assert done.returncode == (3 if then.bad else 0), done.stderr
        assert target.read_bytes() == then.content
        assert all(f"bytes {start} to {end}." in done.stderr for start, end in then.bad)
    assert rescue.run("list").returncode == 0


def test_rescue_lists_points_and_takes_the_beginning_of_an_id(rescue, tmp_path):
    done = rescue.run("list")
    assert [line.split()[1:3] for line in done.stdout.splitlines()] == [
        [FIRST, "full"], [SECOND, "differential"], [THIRD, "incremental"],
    ]  # fmt: skip
    done = rescue.restore("20260301T00000", tmp_path / "target")
    assert done.returncode == 1
    assert SECOND in done.stderr
    assert rescue.restore("20260301T000001", tmp_path / "target").returncode == 0
    assert (tmp_path / "target").read_bytes() == rescue.shelf.states[SECOND].content


@pytest.mark.parametrize("volume", ["volume", "db.example.org"])
@pytest.mark.parametrize("part", ["json", "zst"])
def test_rescue_takes_no_other_point_for_one_that_cannot_be_read(volume, part, seed, tmp_path):
    rescue = shelve(make(volume, 300 * KIB, 4 * KIB, "zstd", seed), tmp_path / "repository")
    for path in (rescue.file(f"{SECOND}.differential.{part}"), rescue.file(f"{THIRD}.incremental.{part}")):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if part == "json" else 100] ^= 0x10
        path.write_bytes(data)
    for name in ("20260301", f"{volume}/20260301", SECOND[:15], SECOND):
        done = rescue.restore(name, tmp_path / "target")
        assert done.returncode in (1, 4), (name, done.stderr)
        assert not (tmp_path / "target").exists()
    # Its whole id is clear, and so is a beginning that no other has.
    for name in (FIRST, FIRST[:16], f"{volume}/{FIRST}"):
        assert rescue.restore(name, tmp_path / "target").returncode == 0, name
        assert (tmp_path / "target").read_bytes() == rescue.shelf.states[FIRST].content
        (tmp_path / "target").unlink()


def test_rescue_tells_wrong_usage_and_unknown_points(rescue, tmp_path):
    assert rescue.run().returncode == 2
    assert rescue.run("restore", FIRST).returncode == 2
    assert rescue.restore("20990101", tmp_path / "target").returncode == 1
    assert rescue.restore("", tmp_path / "target").returncode == 1
    assert rescue.restore(FIRST, tmp_path / "nowhere" / "target").returncode == 1
    assert rescue.restore(FIRST, tmp_path).returncode == 1
    assert rescue.restore(FIRST, "/dev/no-such-device", "--yes").returncode == 1
    assert not Path("/dev/no-such-device").exists()


def test_rescue_does_without_an_image_when_another_holds_the_point(rescue, tmp_path):
    rescue.shelf.add_synthetic(SECOND)
    for name in (f"{SECOND}.full.zst", f"{SECOND}.full.json"):
        rescue.file(name).write_bytes(rescue.shelf.files[name])
    done = rescue.restore(SECOND, tmp_path / "short")
    assert done.returncode == 0
    assert done.stderr.count("Writing") == 1, "the shortest chain serves"
    data = bytearray(rescue.shelf.files[f"{SECOND}.full.zst"])
    data[5000] ^= 0x10
    rescue.file(f"{SECOND}.full.zst").write_bytes(data)
    done = rescue.restore(SECOND, tmp_path / "long")
    assert done.returncode == 0, done.stderr
    assert f"{SECOND}.full.zst" in done.stderr
    assert (tmp_path / "long").read_bytes() == rescue.shelf.states[SECOND].content
    # The synthetic full serves the child, although the full below it is gone.
    rescue.file(f"{SECOND}.full.zst").write_bytes(rescue.shelf.files[f"{SECOND}.full.zst"])
    rescue.file(f"{FIRST}.full.zst").unlink()
    assert rescue.restore(THIRD, tmp_path / "child").returncode == 3
    assert (tmp_path / "child").read_bytes() == rescue.shelf.states[THIRD].content


def test_rescue_passes_over_images_that_are_newer_than_it(rescue, tmp_path):
    """A repository outlives programs: what this one understands is no worse for what it does not."""
    rewrite_manifest(rescue.file(f"{THIRD}.incremental.json"), blockbak_manifest=b"2")
    done = rescue.run("list")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == [FIRST, SECOND]
    assert f"{THIRD}.incremental.zst is of a newer blockbak" in done.stderr
    for point in (FIRST, SECOND):
        done = rescue.restore(point, tmp_path / point)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / point).read_bytes() == rescue.shelf.states[point].content
    done = rescue.restore(THIRD, tmp_path / "target")
    assert done.returncode == 1, "no damage: another rescue.py can restore it"
    assert "use a newer rescue.py" in done.stderr
    assert not list(tmp_path.glob("target*"))


def test_rescue_overlooks_what_is_not_committed(rescue, tmp_path):
    rescue.file(f"{SECOND}.full.zst.partial").write_bytes(b"half")
    rescue.file(f"{SECOND}.full.json.partial").write_bytes(b"half")
    rescue.file(f"{THIRD}.incremental.json").rename(rescue.file(f"{THIRD}.incremental.json.deleted"))
    assert rescue.run("list").returncode == 0
    assert rescue.restore(THIRD, tmp_path / "target").returncode == 1
    assert rescue.restore(SECOND, tmp_path / "target").returncode == 0


# --- damage -----------------------------------------------------------------------------------------


def frame_borders(data: bytes) -> list[int]:
    """Every place in a file where a zstd frame or a skippable frame begins."""
    reader = ImageReader(Memory(data))
    borders = {0, reader.closing_offset, reader.closing_offset + reader.closing_bytes}
    for at, section in enumerate(reader.all_sections()):
        borders |= {int(reader.sections["offset"][at]), *section.frames["offset"].tolist()}
    return sorted(borders)


def test_a_cut_image_is_noticed_at_every_frame_border(rescue, tmp_path):
    for name, data in images(rescue.shelf).items():
        path = rescue.file(name)
        for border in frame_borders(data):
            path.write_bytes(data[:border])
            done = rescue.restore(THIRD, tmp_path / "target")
            assert done.returncode == 4, (name, border, done.stderr)
            assert not list(tmp_path.glob("target*"))
        path.write_bytes(data)


def test_bytes_that_were_added_are_noticed(rescue, tmp_path):
    for name in images(rescue.shelf):
        with rescue.file(name).open("ab") as file:
            file.write(b"\0")
        assert rescue.restore(THIRD, tmp_path / "target").returncode == 4
        rescue.file(name).write_bytes(rescue.shelf.files[name])


@pytest.mark.parametrize("compress", COMPRESS)
def test_exchanged_frames_are_noticed(compress, seed, tmp_path):
    """Also those of equal length, as frames of what cannot be compressed are."""
    rescue = shelve(make("volume", 3 * MIB + 1536, 4 * KIB, compress, seed), tmp_path / "repository")
    name = f"{FIRST}.full.zst"
    data = rescue.shelf.files[name]
    (section,) = ImageReader(Memory(data)).all_sections()
    pairs = [
        (one, two)
        for one, two in zip(section.frames, section.frames[1:], strict=False)
        if data[int(one["offset"]) :][: int(one["stored"])] != data[int(two["offset"]) :][: int(two["stored"])]
    ]
    assert pairs
    for one, two in pairs:
        first, second = int(one["offset"]), int(two["offset"])
        end = second + int(two["stored"])
        rescue.file(name).write_bytes(data[:first] + data[second:end] + data[first:second] + data[end:])
        done = rescue.restore(FIRST, tmp_path / "target")
        assert done.returncode == 4, done.stderr


def test_a_missing_parent_and_a_foreign_one_are_noticed(rescue, tmp_path, seed):
    for end in (".zst", ".json"):
        rescue.file(f"{SECOND}.differential{end}").unlink()
    done = rescue.restore(THIRD, tmp_path / "target")
    assert done.returncode == 4, done.stderr
    assert rescue.run("list").returncode == 4
    # The same point, another root: another history of the volume.
    other = make("volume", 3 * MIB + 1536, 4 * KIB, "zstd", seed + 1)
    for end in (".zst", ".json"):
        name = f"{SECOND}.differential{end}"
        rescue.file(name).write_bytes(other.files[name])
    assert rescue.restore(THIRD, tmp_path / "target").returncode == 4


def test_an_image_under_the_name_of_another_is_noticed(rescue, tmp_path):
    rescue.file(f"{SECOND}.differential.zst").write_bytes(rescue.shelf.files[f"{THIRD}.incremental.zst"])
    assert rescue.restore(SECOND, tmp_path / "target").returncode == 4
    text = rescue.shelf.files[f"{THIRD}.incremental.json"]
    rescue.file(f"{SECOND}.differential.json").write_bytes(text)
    assert rescue.restore(SECOND, tmp_path / "target").returncode == 4


@pytest.mark.slow
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_flipped_bit_never_gives_wrong_bytes(compress, seed, rng, tmp_path):
    """Some bits say nothing to zstd, so that the bytes are still right; all others are noticed."""
    shelf = make("volume", 200 * KIB + 512, 4 * KIB, compress, seed)
    rescue = shelve(shelf, tmp_path / "repository")
    wanted = shelf.states[THIRD].content
    noticed = 0
    picks = [(name, place) for name, data in shelf.files.items() for place in structure(name, data, rng)]
    tries = 150 if os.environ.get("BLOCKBAK_SOAK") else 50
    for name, place in rng.sample(picks, tries):
        data = bytearray(shelf.files[name])
        data[place] ^= 1 << rng.randrange(8)
        rescue.file(name).write_bytes(data)
        target = tmp_path / "target"
        done = rescue.restore(THIRD, target)
        assert done.returncode in {3, 4}, (name, place, done.stderr)
        assert "Traceback" not in done.stderr, (name, place, done.stderr)
        if done.returncode == 3:
            assert target.read_bytes() == wanted, (name, place)
            target.unlink()
        else:
            noticed += 1
        rescue.file(name).write_bytes(shelf.files[name])
    assert noticed > tries * 0.4


def structure(name: str, data: bytes, rng: random.Random) -> list[int]:
    """Places of a file, those where something other than content lies more often than their share."""
    places = [rng.randrange(len(data)) for _ in range(200)]
    if name.endswith(".zst"):
        borders = frame_borders(data)
        places += [min(border + rng.randrange(24), len(data) - 1) for border in borders for _ in range(6)]
        places += [rng.randrange(borders[-3], len(data)) for _ in range(60)]
    return places


# --- targets ------------------------------------------------------------------------------------------


def test_what_exists_is_overwritten_only_with_yes(rescue, tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"\xff" * (4 * MIB))
    assert rescue.restore(THIRD, target).returncode == 5
    assert target.read_bytes() == b"\xff" * (4 * MIB)
    assert rescue.restore(THIRD, target, "--yes").returncode == 3
    assert target.read_bytes() == rescue.shelf.states[THIRD].content


def test_a_target_in_a_repository_is_refused(rescue, tmp_path):
    inside = rescue.repository / "target"
    assert rescue.restore(FIRST, inside).returncode == 5
    (tmp_path / "link").symlink_to(rescue.file(f"{SECOND}.differential.zst"))
    assert rescue.restore(FIRST, tmp_path / "link", "--yes").returncode == 5
    other = tmp_path / "other"
    other.mkdir()
    (other / "repository.json").write_text("{}")
    assert rescue.restore(FIRST, other / "target").returncode == 5
    assert not list(rescue.repository.glob("target*")) + list(other.glob("target*"))


@pytest.mark.parametrize("name", [f"volume/{FIRST}.full.zst", f"volume/{FIRST}.full.json", "rescue.py"])
def test_another_name_of_a_file_in_the_repository_is_refused(rescue, tmp_path, name):
    """It would be cut before anything of it was read."""
    stored = rescue.repository / name
    held = stored.read_bytes()
    os.link(stored, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(tmp_path / "hard")
    for target in ("hard", "soft"):
        assert rescue.restore(FIRST, tmp_path / target, "--yes").returncode == 5
        assert stored.read_bytes() == held
    assert rescue.restore(FIRST, tmp_path / "target").returncode == 0


def test_a_partial_of_an_earlier_run_is_left_alone(rescue, tmp_path):
    (tmp_path / "target.partial").write_bytes(b"someone's")
    assert rescue.restore(FIRST, tmp_path / "target").returncode == 5
    assert (tmp_path / "target.partial").read_bytes() == b"someone's"


def test_a_device_gets_zeros_where_the_point_has_them(rescue, loop):
    device = loop(4 * MIB)
    Path(device.path).write_bytes(b"\xff" * (4 * MIB))
    assert rescue.restore(THIRD, device).returncode == 5
    done = rescue.restore(THIRD, device, "--yes")
    assert done.returncode == 3, done.stderr
    content = Path(device.path).read_bytes()
    wanted = rescue.shelf.states[THIRD].content
    assert content[: len(wanted)] == wanted
    assert content[len(wanted) :] == b"\xff" * (4 * MIB - len(wanted))


def test_a_device_in_use_or_too_small_is_refused(rescue, loop, ext4):
    small = loop(2 * MIB)
    assert rescue.restore(FIRST, small, "--yes").returncode == 5
    assert rescue.restore(FIRST, small.file, "--yes").returncode == 5
    mounted = ext4(loop(64 * MIB))
    before = mounted.device.file.read_bytes()
    done = rescue.restore(FIRST, mounted.device, "--yes")
    assert done.returncode == 5
    assert "in use" in done.stderr
    assert mounted.device.file.read_bytes() == before


def test_a_device_over_a_file_that_is_mounted_by_another_is_refused(rescue, loop, tmp_path):
    """The kernel grants exclusive use of one loop device, whatever the other ones over its file are used for."""
    disk = loop(64 * MIB)
    with attached(disk.file) as other:
        run("mkfs.ext4", "-q", "-F", other)
        with mounted(other, tmp_path / "used"):
            os.sync()
            before = disk.file.read_bytes()
            done = rescue.restore(FIRST, disk, "--yes")
            assert done.returncode == 5, done.stderr
            assert disk.file.read_bytes() == before
    assert rescue.restore(FIRST, disk, "--yes").returncode == 0


def test_a_device_over_a_file_of_the_repository_is_refused(loop, rng, tmp_path):
    """The image is larger than the point, so nothing but what it is speaks against it."""
    shelf = Shelf("volume", 4 * KIB, "none")
    shelf.add(FIRST, state(rng.randbytes(256 * KIB)))
    rescue = shelve(shelf, tmp_path / "repository")
    stored = rescue.file(f"{FIRST}.full.zst")
    held = stored.read_bytes()
    assert len(held) > 256 * KIB + 512
    assert rescue.restore(FIRST, loop(len(held), file=stored), "--yes").returncode == 5
    assert stored.read_bytes() == held


@pytest.mark.slow
def test_a_restore_stays_small(tmp_path, seed):
    """The size of the volume is not that of the memory."""
    shelf = Shelf("volume", 64 * KIB)
    dice = np.random.default_rng(seed)
    content = bytearray(512 * MIB)
    for start in range(0, len(content), 16 * MIB):
        content[start : start + MIB] = dice.bytes(MIB)
    shelf.add(FIRST, state(content))
    del content
    rescue = shelve(shelf, tmp_path / "repository")
    shelf.files.clear()
    process = psutil.Popen(
        [sys.executable, "-I", "-S", rescue.repository / "rescue.py", "restore", FIRST, tmp_path / "target"],
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0
    assert peak < 64 * MIB
    assert (tmp_path / "target").stat().st_blocks * 512 < 100 * MIB
