"""Raw images of real devices: sectors of 512 and 4096 bytes, odd sizes, pipes, refusals, and back into a chain."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cli.program import LIMIT_SECONDS, PROGRAM, Terminal, environment
from tests.host.stage import (
    MIB,
    Oracle,
    attached,
    counters,
    dirty,
    flip,
    mounted,
    partitioned,
    put,
    settle,
    sha,
    writing,
)
from tests.patterns import SECTOR

SECTION = 256 * MIB
SIZE = 40 * MIB + 4096

sectors = pytest.mark.parametrize("sector", [512, 4096])


@pytest.fixture
def source(loop, seed):
    """A device of stamped sectors with a run of zeros, and its oracle."""

    def make(size=SIZE, sector=512):
        device = loop(size, sector_size=sector)
        oracle = Oracle(device.path, device.size, seed)
        whole = device.size // sector * sector
        oracle.write((0, 3 * MIB), (20 * MIB, 21 * MIB + sector), (whole - sector, whole))
        return device, oracle

    return make


def digest_of(device) -> str:
    return sha(device.path)


def run(*words, data=None, stdout=subprocess.PIPE, expect=0):
    """The program with bytes on its standard input."""
    done = subprocess.run(
        [*PROGRAM, *map(str, words)], input=data, stdin=None if data is not None else subprocess.DEVNULL, stdout=stdout,
        stderr=subprocess.PIPE, env=environment(), timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.returncode == expect, (words, done.returncode, done.stdout, done.stderr)
    return done


# --- a file, and back -----------------------------------------------------------------------------------


@sectors
@pytest.mark.parametrize("more", [0, 1, 7], ids=["whole blocks", "an odd sector", "seven"])
def test_a_raw_image_is_the_devices_bytes_and_comes_back(sector, more, source, loop, program, tmp_path):
    device, oracle = source(40 * MIB + more * sector, sector)
    image = tmp_path / "disk.img"
    made = program("cold", device, image).document
    assert (made["consistency"], made["mode"], made["bad_bytes"]) == ("cold", "cold", 0)
    assert made["device_bytes"] == made["read_bytes"] == device.size == image.stat().st_size
    assert sha(image) == digest_of(device)
    assert made["stored_bytes"] == image.stat().st_blocks * 512 < 8 * MIB, "zeros take no room"
    assert os.stat(image).st_mode & 0o777 == 0o600
    said = json.loads(image.with_name("disk.img.json").read_text())
    assert (said["logical_sector"], said["device_bytes"], said["root"]) == (sector, device.size, made["root"])
    assert program("verify", image).document["ok"]

    target = loop(device.size, sector_size=sector)
    dirty(target.path, target.size)
    done = program("restore", image, target, "--yes").document
    assert (done["plan"]["method"], done["verified_bytes"]) == ("write", device.size)
    assert oracle.now().wrong(target.path) is None
    again = program("restore", image, target, "--yes").document
    assert (again["plan"]["method"], again["written_bytes"]) == ("differ", 0)

    copy = tmp_path / "copy.img"
    program("restore", image, copy)
    assert sha(copy) == sha(image)
    assert copy.stat().st_blocks <= image.stat().st_blocks + 64


@sectors
def test_an_adopted_image_is_the_base_of_a_chain(sector, source, program, tmp_path):
    device, oracle = source(sector=sector)
    image = tmp_path / "disk.img"
    made = program("cold", device, image).document
    before = oracle.now()
    full = program("adopt", image).document
    assert (full["kind"], full["root"], full["consistency"], full["mode"]) == ("full", made["root"], "cold", "cold")
    assert full["device_bytes"] == device.size
    about = program("show", full["point"]).document
    said = json.loads(image.with_name("disk.img.json").read_text())
    assert (about["identity"], about["host"], about["created"]) == (said["identity"], said["host"], said["created"])
    assert (about["logical_sector"], about["physical_sector"]) == (said["logical_sector"], said["physical_sector"])
    image.unlink()  # it is not needed any more

    oracle.write((5 * MIB, 5 * MIB + 3 * sector))
    point = program.backup(device)
    assert (point["kind"], point["parent"], point["volume"]) == ("incremental", full["point"], full["volume"])
    assert point["changed_bytes"] == 64 << 10
    out = tmp_path / "out.img"
    for name, held in ((full["point"], before), (point["point"], oracle.now())):
        program.restore(name, out)
        assert held.wrong(out) is None
    assert program("verify").document["ok"]


def test_it_is_adopted_under_a_name_that_is_asked_for(source, program, tmp_path):
    device, _ = source()
    program("cold", device, tmp_path / "disk.img")
    assert program("adopt", tmp_path / "disk.img", "--name", "web").document["volume"] == "web"
    # The volume is known by its identity from now on.
    assert program.backup(device)["volume"] == "web"


def test_an_image_that_is_older_than_the_newest_point_is_the_latest_and_says_so(source, program, tmp_path):
    device, _ = source()
    image = tmp_path / "disk.img"
    program("cold", device, image)
    point = program.backup(device)
    done = program("adopt", image)
    told = f"The image is older than {point['point']}, the newest point so far; 'latest' is the image from now on."
    assert told in done.said
    assert told in done.document["notes"]
    assert program("show", f"{point['volume']}@latest").document["point"] == done.document["point"]


def test_an_image_of_another_host_is_no_parent_of_this_hosts_device(source, program, tmp_path):
    import msgspec

    from blockbak.image import sidecar

    device, _ = source()
    image = tmp_path / "disk.img"
    program("cold", device, image)
    path = image.with_name("disk.img.json")
    said = sidecar.decode(path.read_bytes(), "x")
    path.write_bytes(sidecar.encode(msgspec.structs.replace(said, host="elsewhere")))
    point = program("adopt", image).document
    assert point["volume"].startswith("elsewhere-")
    assert program.backup(device)["kind"] == "full"


def test_partitions_and_file_systems_stand_in_the_sidecar(loop, program, tmp_path):
    disk = loop(64 * MIB)
    with partitioned(disk, "start=2048, size=32768, name=root", "start=40960, size=32768, name=data") as (root, data):
        subprocess.run(["mkfs.ext4", "-q", "-L", "system", root], check=True)
        subprocess.run(["mkfs.vfat", data], check=True, capture_output=True)
    program("cold", disk, tmp_path / "disk.img")
    said = json.loads((tmp_path / "disk.img.json").read_text())
    assert said["partition_table"]["scheme"] == "gpt"
    assert [one["name"] for one in said["partition_table"]["partitions"]] == ["root", "data"]
    assert (said["filesystems"]["1"]["type"], said["filesystems"]["1"]["label"]) == ("ext4", "system")
    assert said["filesystems"]["2"]["type"] == "vfat"


def test_an_image_file_is_a_source_too(program, tmp_path):
    source = tmp_path / "vm.img"
    source.write_bytes(b"content" * 100_000)
    program("cold", source, tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == source.read_bytes()


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_device_in_use_is_refused(loop, ext4, program, tmp_path):
    device = ext4(loop(64 * MIB))
    with writing(device.device.path):
        error = program("cold", device.device, tmp_path / "disk.img", expect=5).error
    assert error["name"] == "CannotRest"
    assert os.listdir(tmp_path / "repository") != []
    assert not (tmp_path / "disk.img.partial").exists()


def test_an_image_is_not_written_onto_its_own_device(loop, ext4, program, tmp_path):
    """Nothing uses the file that is imaged, but the image would come to lie in it."""
    outer = loop(128 * MIB)
    with mounted_in(outer, tmp_path / "inside") as inside:
        error = program("cold", outer.file, inside / "disk.img", expect=5).error
        assert error["name"] in ("SourceHoldsImage", "SourceInUse")
        assert list(inside.glob("disk*")) == []


def mounted_in(device, where):
    subprocess.run(["mkfs.ext4", "-q", str(device)], check=True)
    return mounted(device, where)


def test_an_image_that_is_its_own_source_is_refused(program, tmp_path):
    source = tmp_path / "vm.img"
    source.write_bytes(b"x" * 5000)
    error = program("cold", source, source, "--yes", expect=5).error
    assert error["name"] == "SourceHoldsImage"
    assert source.read_bytes() == b"x" * 5000


@pytest.mark.parametrize("place", ["", "volume", "volume/deeper"])
def test_an_image_does_not_belong_into_a_repository(place, source, program):
    device, _ = source()
    folder = program.repository / place
    folder.mkdir(parents=True, exist_ok=True)
    error = program("cold", device, folder / "disk.img", expect=5).error
    assert error["name"] == "ImageInRepository"
    assert not (folder / "disk.img").exists()


def test_a_device_that_holds_the_repository_is_refused(loop, program_at, tmp_path):
    outer = loop(128 * MIB)
    with mounted_in(outer, tmp_path / "inside") as inside:
        program = program_at(inside)
        error = program("cold", outer.file, tmp_path / "disk.img", expect=5).error
        assert error["name"] in ("SourceHoldsRepository", "SourceInUse")


@pytest.mark.parametrize("there", ["disk.img", "disk.img.json", "disk.img.partial", "disk.img.mapfile"])
def test_what_is_there_is_replaced_only_when_told_so(there, source, program, tmp_path):
    device, _ = source()
    (tmp_path / there).write_bytes(b"mine")
    error = program("cold", device, tmp_path / "disk.img", expect=5).error
    assert error["name"] == "TargetExists"
    assert error["fields"]["path"] == str(tmp_path / there)
    assert (tmp_path / there).read_bytes() == b"mine"
    told = program("cold", device, tmp_path / "disk.img", "--dry-run").document["plan"]
    assert told["replaces"] == [str(tmp_path / there)]
    assert (tmp_path / there).read_bytes() == b"mine"
    program("cold", device, tmp_path / "disk.img", "--yes")
    assert sorted(path.name for path in tmp_path.glob("disk.img*")) == ["disk.img", "disk.img.json"]
    assert sha(tmp_path / "disk.img") == digest_of(device)


def test_a_file_in_use_is_not_replaced(source, program, tmp_path):
    device, _ = source()
    other = tmp_path / "disk.img"
    other.write_bytes(bytes(MIB))
    with attached(other):
        error = program("cold", device, other, "--yes", expect=5).error
    assert error["name"] == "TargetInUse"
    assert other.stat().st_size == MIB


def test_what_is_no_file_is_not_written(source, loop, program, tmp_path):
    device, _ = source()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "folder",
        tmp_path / "pipe",
        loop(MIB),
        "/dev/no-such-disk",
        tmp_path / "none" / "disk.img",
    ):
        assert program("cold", device, path, "--yes", expect=1).error["name"] == "BadTarget"


def test_a_dry_run_writes_nothing(source, program, tmp_path):
    device, _ = source()
    told = program("cold", device, tmp_path / "disk.img", "--dry-run").document["plan"]
    assert (told["device_bytes"], told["mode"], told["replaces"]) == (device.size, "cold", [])
    assert list(tmp_path.glob("disk*")) == []


def test_a_source_written_meanwhile_makes_the_image_torn(source, program, tmp_path):
    device, _ = source()

    def write():
        assert settle((tmp_path / "disk.img.partial").exists, 30)
        put(device.path, 0, bytes(512))

    with ThreadPoolExecutor() as beside:
        done = beside.submit(write)
        made = program("cold", device, tmp_path / "disk.img", "--limit", "16M", expect=3).document
        done.result()
    assert (made["consistency"], made["attention"]) == ("none", True)
    assert "written while it was read" in made["notes"][0]
    assert json.loads((tmp_path / "disk.img.json").read_text())["consistency"] == "none"
    # What was read is what lies there, torn or not.
    assert program("verify", tmp_path / "disk.img").document["ok"]


def test_a_limit_is_kept(source, program, tmp_path):
    device, _ = source()
    clock = time.monotonic()
    program("cold", device, tmp_path / "disk.img", "--limit", "20M", "--idle")
    assert time.monotonic() - clock > 1.5


def test_the_source_is_not_written(source, program, tmp_path):
    device, _ = source()
    os.sync()
    before = counters(device.path)[1]
    program("cold", device, tmp_path / "disk.img")
    assert counters(device.path)[1] == before


# --- damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def long_image(program, tmp_path):
    """A raw image of two sections and a bit, mostly holes."""
    source = tmp_path / "vm.img"
    with source.open("xb") as file:
        file.truncate(2 * SECTION + 5 * SECTOR)
    for at in (0, SECTION - 100, SECTION + 5 * MIB, 2 * SECTION + 7):
        put(source, at, b"content" * 100)
    image = tmp_path / "disk.img"
    program("cold", source, image)
    return image


def test_no_flipped_bit_of_an_image_is_missed(long_image, program, rng, seed):
    size = long_image.stat().st_size
    places = [0, SECTION - 1, SECTION, size - 1, *(rng.randrange(size) for _ in range(8))]
    for place in places:
        bits = 1 << rng.randrange(8)
        flip(long_image, place, bits)
        (found,) = program("verify", long_image, expect=4).document["images"]
        start = place // SECTION * SECTION
        expected = {"start": start, "length": min(SECTION, size - start)}
        told = [{key: flaw[key] for key in expected} for flaw in found["damage"]]
        assert told == [expected], f"seed {seed}: byte {place} ^ {bits}"
        flip(long_image, place, bits)
    assert program("verify", long_image).document["ok"]


def test_no_flipped_bit_of_a_sidecar_is_missed(long_image, program, rng, seed):
    path = long_image.with_name("disk.img.json")
    for _ in range(12):
        place, bits = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        flip(path, place, bits)
        (found,) = program("verify", long_image, expect=4).document["images"]
        assert "sidecar" in found["damage"][0]["reason"], f"seed {seed}: byte {place} ^ {bits}"
        assert program("restore", long_image, long_image.with_name("out"), expect=4).error["name"] == "DamagedSidecar"
        assert program("adopt", long_image, expect=4).error["name"] == "DamagedSidecar"
        flip(path, place, bits)
    assert program("verify", long_image).document["ok"]


@pytest.mark.parametrize("size", [0, 1, SECTION, SECTION + 1, 2 * SECTION + 4 * SECTOR, 2 * SECTION + 9 * SECTOR])
def test_an_image_that_is_cut_or_longer_is_damage(size, long_image, program):
    right = long_image.stat().st_size
    os.truncate(long_image, size)
    (found,) = program("verify", long_image, expect=4).document["images"]
    assert any(f"{size} bytes instead of {right}" in flaw["reason"] for flaw in found["damage"])
    assert program("restore", long_image, long_image.with_name("out"), expect=4).error["name"] == "DamagedRawImage"
    assert program("adopt", long_image, expect=4).error["name"] == "DamagedRawImage"
    assert program("list").document == []


def test_damage_is_named_before_the_first_byte_is_written(long_image, program, loop):
    target = loop(2 * SECTION + MIB)
    before = sha(target.path)
    flip(long_image, SECTION + 5 * MIB)
    for options in ((), ("--dry-run",)):
        error = program("restore", long_image, target, "--yes", *options, expect=4).error
        assert f"{SECTION} to {2 * SECTION}" in error["message"]
    assert sha(target.path) == before
    error = program("adopt", long_image, expect=4).error
    assert f"{SECTION} to {2 * SECTION}" in error["message"]
    assert program("list").document == []


def test_an_image_beside_another_ones_sidecar_is_damage(long_image, program, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(long_image.read_bytes()[: 5 * MIB])
    program("cold", other, tmp_path / "second.img")
    (tmp_path / "second.img.json").replace(tmp_path / "disk.img.json")
    assert not program("verify", long_image, expect=4).document["ok"]


def test_an_image_without_its_sidecar_is_told_as_unfinished(long_image, program):
    long_image.with_name("disk.img.json").unlink()
    for words in (("verify", long_image), ("adopt", long_image), ("restore", long_image, long_image.with_name("out"))):
        error = program(*words, expect=1).error
        assert error["name"] == "NoSidecar"
        assert "never finished" in error["message"]


def test_a_sidecar_of_a_newer_program_is_no_damage(long_image, program):
    from blockbak.model import selfdigest

    path = long_image.with_name("disk.img.json")
    members = json.loads(path.read_text()) | {"blockbak_sidecar": 2, "sha256": selfdigest.BLANK}
    path.write_bytes(selfdigest.encoded(members))
    (found,) = program("verify", long_image, expect=1).document["images"]
    assert found["newer"]
    assert program("adopt", long_image, expect=1).error["name"] == "NewerFormat"


def test_an_image_that_moves_with_its_sidecar_stays_whole(long_image, program, tmp_path):
    (tmp_path / "moved").mkdir()
    for name in ("disk.img", "disk.img.json"):
        (tmp_path / name).rename(tmp_path / "moved" / name.replace("disk", "other"))
    assert program("verify", tmp_path / "moved" / "other.img").document["ok"]
    # Where a file has a sidecar beside it, its bare name will do.
    assert program("verify", "other.img", where=tmp_path / "moved").document["ok"]


def test_a_link_leads_to_the_image_and_what_lies_beside_it(long_image, program, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.img"
    link.symlink_to(long_image)
    assert program("verify", link).document["ok"]
    made = program("cold", tmp_path / "vm.img", link, "--yes").document
    assert (made["path"], made["sidecar"]) == (str(long_image), f"{long_image}.json")
    assert link.is_symlink()
    assert os.listdir(tmp_path / "links") == ["link.img"]
    assert program("verify", link).document["ok"]


def test_points_and_raw_images_are_verified_in_one_go(long_image, program, source):
    device, _ = source()
    point = program.backup(device)
    told = program("verify", long_image, point["point"]).document
    assert [one["kind"] for one in told["images"]] == ["raw", "full"]
    assert program("verify", "--sample", "1%", long_image).document["ok"]


def test_a_name_that_leads_nowhere(program, tmp_path):
    for words in (("verify", tmp_path / "no.img"), ("adopt", "no.img"), ("restore", tmp_path, tmp_path / "out")):
        assert program(*words, expect=1).error["name"] == "NoSuchImage"


# --- restoring: every refusal of a point's ------------------------------------------------------------------


@pytest.fixture
def image(source, program, tmp_path):
    device, oracle = source()
    program("cold", device, tmp_path / "disk.img")
    return tmp_path / "disk.img", device, oracle


def test_a_target_that_must_not_be_written_is_refused(image, loop, ext4, program, tmp_path):
    path, _, _ = image
    busy = ext4(loop(64 * MIB))
    cases = [
        (busy.device, "TargetInUse"), (loop(MIB), "TargetTooSmall"), (path, "TargetHolds"),
        (path.with_name("disk.img.json"), "TargetHolds"), (program.repository / "x.img", "TargetHolds"),
    ]  # fmt: skip
    for target, name in cases:
        for options in (("--yes",), ("--yes", "--dry-run")):
            assert program("restore", path, target, *options, expect=5).error["name"] == name
    target = loop(SIZE)
    assert program("restore", path, target, expect=5).error["name"] == "TargetExists"
    assert program("verify", path).document["ok"]


def test_a_target_with_other_sectors_is_refused_where_there_is_a_table(loop, program, tmp_path):
    disk, other = loop(64 * MIB), loop(64 * MIB, sector_size=4096)
    with partitioned(disk, "start=2048, size=32768"):
        pass
    program("cold", disk, tmp_path / "disk.img")
    assert program("restore", tmp_path / "disk.img", other, "--yes", expect=5).error["name"] == "TargetSectorSize"


def test_a_rollback_writes_only_what_differs(image, program):
    path, device, oracle = image
    before = oracle.now()
    oracle.write((2 * MIB, 2 * MIB + SECTOR))
    oracle.zero((MIB, MIB + 65536))
    done = program("restore", path, device, "--yes").document
    assert (done["plan"]["method"], done["written_bytes"]) == ("differ", 2 * 65536)
    assert any("rolled back" in note for note in done["plan"]["notes"])
    assert before.wrong(device.path) is None


def test_a_dry_run_of_a_restore_checks_and_writes_nothing(image, loop, program):
    path, _, _ = image
    target = loop(SIZE + MIB)
    plan = program("restore", path, target, "--dry-run").document["plan"]
    assert (plan["device_bytes"], plan["target_bytes"], plan["method"]) == (SIZE, SIZE + MIB, "write")
    assert any("longer by" in note for note in plan["notes"])


def test_a_longer_file_is_cut(image, program, tmp_path):
    path, _, oracle = image
    old = tmp_path / "old.img"
    old.write_bytes(b"\xa5" * (SIZE + 5000))
    program("restore", path, old, "--yes")
    assert old.stat().st_size == SIZE
    assert oracle.now().wrong(old) is None


# --- pipes -----------------------------------------------------------------------------------------------------


@sectors
def test_a_device_goes_through_a_pipe_and_comes_back(sector, source, loop, tmp_path):
    device, oracle = source(sector=sector)
    said, target = tmp_path / "disk.json", loop(device.size + sector, sector_size=sector)
    dirty(target.path, target.size)
    made = run("cold", device, "-", "--sidecar", said)
    assert made.stdout == Path(device.path).read_bytes()
    assert b"written" in made.stderr
    # Without a sidecar nobody knows whether what comes short of the target is all there was.
    for options, status in (((), 3), (("--sidecar", said), 0)):
        run("restore", "-", target, "--yes", *options, data=made.stdout, expect=status)
        assert oracle.now().wrong(target.path) is None
        out = tmp_path / f"out-{len(options)}"
        run("restore", "-", out, *options, data=made.stdout)
        assert out.read_bytes() == made.stdout
        assert out.stat().st_blocks * 512 < 8 * MIB, "zeros take no room"


def test_both_ends_at_once(source, tmp_path):
    device, oracle = source()
    script = 'set -o pipefail; "$@" cold "$D" - | "$@" restore - "$O"'
    subprocess.run(
        ["bash", "-c", script, "_", *PROGRAM], env=environment({"D": device.path, "O": str(tmp_path / "out")}), check=True,
        timeout=LIMIT_SECONDS, capture_output=True,
    )  # fmt: skip
    assert oracle.now().wrong(tmp_path / "out") is None


@pytest.mark.parametrize("size", [1, 511, 65536, 65537, 2 * MIB, 2 * MIB + 1, 5 * MIB - 3])
def test_a_stream_of_any_length_becomes_a_file_of_it(size, tmp_path):
    data = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
    run("restore", "-", tmp_path / "out", data=data)
    assert (tmp_path / "out").read_bytes() == data


def test_an_image_file_is_standard_input_too(source, tmp_path):
    device, oracle = source()
    with open(device.path, "rb") as file:
        done = subprocess.run(
            [*PROGRAM, "restore", "-", tmp_path / "out"], stdin=file, env=environment(), timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert oracle.now().wrong(tmp_path / "out") is None


def test_a_closed_pipe_is_a_failure_with_a_sentence(source):
    device, _ = source()
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = run("cold", device, "-", stdout=writer, expect=1)
    finally:
        os.close(writer)
    assert b"Standard output took 0 bytes" in done.stderr


def test_a_pipe_that_nobody_empties_can_be_interrupted(source):
    device, _ = source()
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*PROGRAM, "cold", device.path, "-"], stdout=writer, stderr=subprocess.PIPE, env=environment()
    ) as child:
        os.close(writer)
        assert os.read(reader, 100)
        child.terminate()
        said = child.communicate(timeout=LIMIT_SECONDS)[1]
    os.close(reader)
    assert child.returncode == 130, said


def test_a_pipe_that_nobody_fills_can_be_interrupted(tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [*PROGRAM, "restore", "-", out], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as child:
        child.stdin.write(b"x" * 100_000)
        child.stdin.flush()
        deadline = time.monotonic() + LIMIT_SECONDS
        while not out.with_name("out.partial").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.terminate()
        child.wait(LIMIT_SECONDS)
        said = child.stderr.read()
    assert child.returncode == 130, said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [0, 2 * MIB, SIZE - 1, SIZE + 1])
def test_a_stream_of_another_length_than_its_sidecars_is_damage(size, source, tmp_path):
    device, _ = source()
    said = tmp_path / "disk.json"
    data = run("cold", device, "-", "--sidecar", said).stdout
    other = (data + b"more")[:size]
    done = run("restore", "-", tmp_path / "out", "--sidecar", said, data=other, expect=4)
    assert b"not what the sidecar" in done.stderr
    assert list(tmp_path.glob("out*")) == []


def test_a_flipped_bit_in_a_stream_is_damage(source, tmp_path, rng):
    device, _ = source()
    said, old = tmp_path / "disk.json", tmp_path / "old"
    data = bytearray(run("cold", device, "-", "--sidecar", said).stdout)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    old.write_bytes(b"old")
    done = run("restore", "-", old, "--yes", "--sidecar", said, data=bytes(data), expect=4)
    assert f"bytes 0 to {SIZE} are others".encode() in done.stderr
    assert old.read_bytes() == b"old", "what was there stays until the new one is whole"
    assert not (tmp_path / "old.partial").exists()


def test_a_target_that_is_too_small_for_a_stream_says_how_much_was_written(loop):
    target = loop(4 * MIB)
    done = run("restore", "-", target, "--yes", data=b"x" * (5 * MIB), expect=1)
    assert b"the target has 4194304 bytes, and there are more to come" in done.stderr
    assert b"written: 0 to 4194304" in done.stderr
    done = run("restore", "-", target, "--yes", data=b"x" * (4 * MIB))
    assert Path(target.path).read_bytes() == b"x" * (4 * MIB)


def test_a_stream_is_refused_for_what_its_sidecar_says(loop, tmp_path):
    disk, said = loop(64 * MIB), tmp_path / "disk.json"
    with partitioned(disk, "start=2048, size=32768"):
        pass
    data = run("cold", disk, "-", "--sidecar", said).stdout
    for target, reason in ((loop(64 * MIB, sector_size=4096), b"4096-byte sectors"), (loop(MIB), b"1048576 bytes")):
        before = sha(target.path)
        done = run("restore", "-", target, "--yes", "--sidecar", said, data=data, expect=5)
        assert reason in done.stderr
        assert sha(target.path) == before


def test_an_empty_stream_is_a_failure(tmp_path):
    done = run("restore", "-", tmp_path / "out", data=b"", expect=1)
    assert b"holds no bytes" in done.stderr
    assert os.listdir(tmp_path) == []


def test_standard_output_holds_an_image_or_a_document_but_not_both(source):
    device, _ = source()
    done = run("cold", device, "-", "--json", expect=2)
    assert json.loads(done.stdout)["error"]["name"] == "WrongUsage"


def test_a_terminal_takes_no_image(source):
    device, _ = source()
    with Terminal("cold", device.path, "-", answers=True) as screen:
        ended = screen.end()
    assert ended.status == 2
    assert b"not written to a terminal" in ended.err


def test_an_image_to_a_file_on_standard_output_is_flushed_and_whole(source, tmp_path):
    device, oracle = source()
    with (tmp_path / "out").open("wb") as file:
        run("cold", device, "-", stdout=file)
    assert oracle.now().wrong(tmp_path / "out") is None


def test_standard_output_on_the_source_itself_is_refused(program, tmp_path):
    source = tmp_path / "vm.img"
    source.write_bytes(b"x" * 5000)
    with source.open("r+b") as file:
        done = run("cold", source, "-", stdout=file, expect=5)
    assert b"would contain itself" in done.stderr
    assert source.read_bytes() == b"x" * 5000


def test_a_sidecar_that_is_there_is_replaced_only_when_told_so(source, tmp_path):
    device, _ = source()
    said = tmp_path / "disk.json"
    said.write_text("mine")
    run("cold", device, "-", "--sidecar", said, expect=5)
    assert said.read_text() == "mine"
    run("cold", device, "-", "--sidecar", said, "--yes")
    assert json.loads(said.read_text())["blockbak_sidecar"] == 1
