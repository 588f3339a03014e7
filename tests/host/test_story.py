"""From the first full to the last restore, on real file systems and on stamped sectors."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.host.stage import KIB, MIB, Oracle, attached, dirty, mounted, partitioned, put, run, settle, sha

SIZES = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 144 * MIB}
CHECKERS = {
    "ext4": ("e2fsck", "-f", "-n"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
MOUNT = {"ext4": "ro", "xfs": "ro,nouuid", "btrfs": "ro"}


# --- files on file systems --------------------------------------------------------------------------------


def make_files(where, rng):
    """Texts and noise, small and large, with holes and links."""
    for number in range(24):
        folder = where / f"folder-{number % 5}"
        folder.mkdir(exist_ok=True)
        size = rng.choice([0, 1, 700, 4096, 70_000, 300_000, 1_000_000])
        data = rng.randbytes(size) if number % 2 else b"line of a text file\n" * (size // 20)
        (folder / f"file-{number}").write_bytes(data)
    with (where / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    (where / "link").symlink_to("folder-1/file-1")
    os.link(where / "sparse", where / "second-name")


def edit_files(where, rng):
    """Some are written anew, some grow, some change in the middle, some go, one comes."""
    files = sorted(path for path in where.rglob("file-*") if path.is_file())
    for path in rng.sample(files, 8):
        match rng.randrange(4):
            case 0:
                path.write_bytes(rng.randbytes(rng.choice([10, 5000, 200_000])))
            case 1:
                with path.open("ab") as file:
                    file.write(rng.randbytes(9000))
            case 2:
                if path.stat().st_size:
                    with path.open("r+b") as file:
                        file.seek(path.stat().st_size // 2)
                        file.write(rng.randbytes(100))
            case 3:
                path.unlink()
    (where / f"file-new-{rng.randrange(10**9)}").write_bytes(rng.randbytes(100_000))


def tree(where):
    """Every name below a directory, with what it is and what it holds."""
    found = {}
    for path in sorted(where.rglob("*")):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            held = str(path.readlink())
        elif path.is_dir():
            held = ""
        else:
            held = f"{info.st_nlink} {sha(path)}"
        found[str(path.relative_to(where))] = (stat.filemode(info.st_mode), held)
    return found


def check_file_system(kind, device, where, expected):
    """Its own checker is content with a restored device, and the files are those that were there."""
    checked = subprocess.run([*CHECKERS[kind], device], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with mounted(device, where, "-o", MOUNT[kind]):
        assert tree(where) == expected
    assert settle(lambda: not Path(f"/sys/fs/{kind}", Path(device).name).exists())


@pytest.mark.parametrize(("kind", "sector_size"), [("ext4", 512), ("ext4", 4096), ("xfs", 4096), ("btrfs", 512)])
def test_every_point_of_a_file_system_comes_back(loop, request, tmp_path, program, rng, kind, sector_size):
    size = SIZES[kind]
    source, target = loop(size, sector_size=sector_size), loop(size, sector_size=sector_size)
    options = ("-b", "4096") if kind == "ext4" else ()
    made = request.getfixturevalue(kind)(source, *options)
    digests, trees = {}, {}

    def point(asked):
        files = tree(made.where)
        made.unmount()
        report = program.backup(source, "--kind", asked)
        assert (report["mode"], report["consistency"], report["bad_bytes"]) == ("cold", "cold", 0)
        assert report["device_bytes"] == size
        digests[report["point"]], trees[report["point"]] = sha(source), files
        return report

    make_files(made.where, rng)
    points = [point("full")]
    for kind_of_image in ("auto", "differential", "incremental"):
        made.mount()
        edit_files(made.where, rng)
        points.append(point(kind_of_image))
    full, incremental, differential, last = points
    assert [one["kind"] for one in points] == ["full", "incremental", "differential", "incremental"]
    assert (incremental["parent"], differential["parent"]) == (full["point"], full["point"])
    assert last["parent"] == differential["point"]
    assert len(set(digests.values())) == 4
    assert all(0 < delta["changed_bytes"] < full["changed_bytes"] for delta in points[1:])

    # The synthetic full serves the last point from here on.
    composed = program("synthesize", full["volume"]).document
    assert (composed["point"], composed["synthetic"], composed["root"]) == (last["point"], True, last["root"])
    dirty(target, size)
    for name in reversed(digests):
        done = program.restore(name, target).document
        assert (len(done["plan"]["images"]) == 1) is (name in (full["point"], last["point"]))
        assert sha(target) == digests[name]
        if kind == "btrfs":
            # The kernel knows one device of each identity, and the source's is the newer one.
            run("btrfs", "device", "scan", "--forget")
        check_file_system(kind, target.path, tmp_path / "restored", trees[name])
    assert program("verify").document["ok"]
    assert sha(source) == digests[last["point"]]


def test_a_trimmed_file_system_makes_a_small_increment(loop, ext4, program, tmp_path, rng):
    source, target = loop(64 * MIB), loop(64 * MIB)
    made = ext4(source, "-b", "4096")
    make_files(made.where, rng)
    (made.where / "large").write_bytes(rng.randbytes(24 * MIB))
    made.unmount()
    full = program.backup(source)
    made.mount()
    (made.where / "large").unlink()
    os.sync()
    trimmed = run("fstrim", "--verbose", made.where)
    assert " 0 B" not in trimmed
    kept = tree(made.where)
    made.unmount()
    delta = program.backup(source, "--kind", "incremental")
    # What was trimmed became zeros: a change to be told, not one to be stored.
    assert delta["changed_bytes"] >= 20 * MIB
    assert delta["stored_bytes"] < MIB < full["stored_bytes"]
    dirty(target, 64 * MIB)
    for point in (delta, full):
        program.restore(point["point"], target)
        if point is delta:
            assert sha(target) == sha(source)
            check_file_system("ext4", target.path, tmp_path / "restored", kept)
    program.restore(full["point"], target)
    assert sha(target) != sha(source)


# --- stamped sectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "sector_size", "size"),
    [("4K", 512, 20 * MIB + 3 * 512), ("64K", 4096, 20 * MIB + 4096), ("1M", 512, 20 * MIB + 3 * 512)],
)
def test_every_sector_of_every_point_comes_back(loop, program, seed, block, sector_size, size):
    source, target = loop(size, sector_size=sector_size), loop(size, sector_size=sector_size)
    oracle = Oracle(source, size, seed)
    held = {}

    def point(kind="auto"):
        report = program.backup(source, "--kind", kind, *(["--block-size", block] if not held else []))
        held[report["point"]] = oracle.now()
        return report

    oracle.write((0, 7 * MIB), (9 * MIB, size))
    full = point()
    # Inside a block; over the border of blocks and windows; the short block at the end alone.
    oracle.write((sector_size, 2 * sector_size), (MIB - sector_size, MIB + sector_size), (size - sector_size, size))
    oracle.zero((5 * MIB, 6 * MIB))
    first = point()
    oracle.write((5 * MIB + 4 * sector_size, 5 * MIB + 8 * sector_size), (8 * MIB, 8 * MIB + 64 * KIB))
    second = point("differential")
    run("blkdiscard", "--offset", 12 * MIB, "--length", 4 * MIB, source)
    oracle.zeroed(12 * MIB, 16 * MIB)
    third = point("incremental")
    oracle.zero((size - sector_size, size))
    fourth = point()
    assert [one["kind"] for one in (full, first, second, third, fourth)] == [
        "full", "incremental", "differential", "incremental", "incremental",
    ]  # fmt: skip
    assert third["stored_bytes"] < 64 * KIB
    program("synthesize", full["volume"], "--at", third["point"])
    dirty(target, size)
    for name, state in [*held.items(), *reversed(held.items())]:
        program.restore(name, target)
        assert state.wrong(target) is None, f"seed {seed}"
    assert program("verify").document["ok"]


LAST = 16 * MIB - 1


@pytest.mark.parametrize(("place", "byte"), [(0, 0xFF), (LAST, 0x01), (0, 0x80), (5 * MIB + 65535, 0x10)])
def test_one_byte_in_a_block_of_zeros_is_a_change(loop, program, place, byte):
    source, target = loop(16 * MIB), loop(16 * MIB)
    empty = program.backup(source)
    assert empty["stored_bytes"] < 64 * KIB
    put(source, place // 4096 * 4096, bytes(place % 4096) + bytes([byte]) + bytes(4095 - place % 4096))
    one = program.backup(source)
    assert (one["kind"], one["changed_bytes"]) == ("incremental", 64 * KIB)
    put(source, place // 4096 * 4096, bytes(4096))
    none = program.backup(source)
    assert (none["kind"], none["changed_bytes"]) == ("incremental", 64 * KIB)
    program("synthesize", one["volume"], "--at", one["point"])
    dirty(target, 16 * MIB)
    for point, expected in ((one, {place: byte}), (none, {}), (one, {place: byte}), (empty, {})):
        program.restore(point["point"], target)
        data = Path(target.path).read_bytes()
        assert data.count(0) == len(data) - len(expected)
        assert all(data[at] == value for at, value in expected.items())


def test_a_file_of_odd_length_comes_back_to_the_byte(program, tmp_path, rng):
    source, target = tmp_path / "disk.img", tmp_path / "restored.img"
    data = bytearray(rng.randbytes(2 * MIB + 12345))
    held = {}
    for change in (0, 2 * MIB + 12344, 64 * KIB - 1):
        data[change] ^= 0xFF
        source.write_bytes(data)
        held[program.backup(source)["point"]] = bytes(data)
    for name, expected in held.items():
        program.restore(name, target)
        assert target.read_bytes() == expected


# --- disks with partitions --------------------------------------------------------------------------------


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_disk_comes_back_with_both_its_tables(loop, program, tmp_path, sector_size, rng, seed):
    size = 64 * MIB
    disk, target = loop(size, sector_size=sector_size), loop(size, sector_size=sector_size)
    with partitioned(disk, "size=40M", "size=16M") as (first, second):
        run("mkfs.ext4", "-q", "-F", "-b", "4096", first)
        with mounted(first, tmp_path / "first"):
            make_files(tmp_path / "first", rng)
            files = tree(tmp_path / "first")
        Oracle(second, 16 * MIB, seed).write((0, 16 * MIB))
    full = program.backup(disk)
    shown = program("show", full["point"]).document
    assert [one["length"] for one in shown["partition_table"]["partitions"]] == [40 * MIB, 16 * MIB]
    dirty(target, size)
    program.restore(full["point"], target)
    assert sha(target) == sha(disk)
    assert "No problems found" in run("sgdisk", "--verify", target)
    run("partx", "--update", target)
    try:
        check_file_system("ext4", f"{target}p1", tmp_path / "restored", files)
    finally:
        run("partx", "--delete", target)


# --- without blockbak -------------------------------------------------------------------------------------


def test_every_point_comes_back_with_the_tools_that_lie_in_the_repository(loop, program, seed):
    size = 12 * MIB + 512
    source, target = loop(size), loop(size)
    oracle = Oracle(source, size, seed)
    oracle.write((0, 3 * MIB), (4 * MIB, size))
    full, then = program.backup(source), oracle.now()
    oracle.write((2 * MIB, 2 * MIB + 512), (3 * MIB, 3 * MIB + 512))
    oracle.zero((6 * MIB, 7 * MIB))
    delta, now = program.backup(source), oracle.now()

    dirty(target, size)
    run("sh", "-c", f"zstd -dc '{program.image(full)}' | dd of={target} bs=4M conv=fsync status=none")
    assert then.wrong(target) is None, f"seed {seed}"
    dirty(target, size)
    script = program.repository / "rescue.py"
    run(sys.executable, script, "restore", delta["point"], target, "--yes")
    assert now.wrong(target) is None, f"seed {seed}"
    run(sys.executable, script, "restore", full["point"], target, "--yes")
    assert then.wrong(target) is None, f"seed {seed}"


def test_a_device_is_restored_wherever_its_file_is_attached(loop, program, seed, tmp_path):
    """What was taken of one node comes back on another, and through the plain file."""
    size = 8 * MIB
    source = loop(size)
    oracle = Oracle(source, size, seed)
    oracle.write((0, size))
    point, then = program.backup(source), oracle.now()
    plain = tmp_path / "plain.img"
    program("restore", point["point"], plain)
    assert then.wrong(plain) is None
    with attached(plain) as node:
        put(node, MIB, bytes(MIB))
        program.restore(point["point"], node)
        assert then.wrong(node) is None
    assert then.wrong(plain) is None
