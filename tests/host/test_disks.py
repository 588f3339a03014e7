"""Whole disks: tables made by other tools, one partition brought back alone, a GPT moved to a larger disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.host.stage import (
    KIB,
    MIB,
    attached,
    damage_frame,
    dirty,
    flip,
    mounted,
    partitions,
    put,
    pv_label,
    run,
    sha,
)

SIZE = 24 * MIB
EXTENDED = "5"
UUID = "11111111-2222-3333-4444-55555555555{}"


def by_sfdisk(disk, *lines):
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, stdin="\n".join(lines) + "\n")


def make_gpt(disk):
    run(
        *("sgdisk", f"--disk-guid={UUID.format(0)}", "--set-alignment=1", "--new=1:63:4095", "--change-name=1:Grüße"),
        *("--typecode=1:ef00", "--new=2:4096:+8M", "--typecode=2:8e00", "--new=5:30001:40000", "--typecode=5:8200"),
        disk,
    )


def make_gpt_of_4096(disk):
    """A loop device has the sectors; the tool is another one."""
    lines = ["start=9, size=500, name=odd", "start=512, size=1024", "size=1001, type=linux-raid"]
    by_sfdisk(disk, "label: gpt", "first-lba: 6", *lines)


def make_mbr(disk):
    by_sfdisk(
        *(disk, "label: dos", "label-id: 0x1a2b3c4d", "1: start=63, size=4001, type=c, bootable"),
        *("2: start=4096, size=36864, type=5", "5: start=4159, size=8001, type=83", "6: size=4M, type=82"),
        "7: size=2M, type=8e",
    )


def make_hybrid(disk):
    make_gpt(disk)
    run("sgdisk", "--hybrid=1:5", disk)


TABLES = {
    "gpt": (make_gpt, 512),
    "gpt of 4096": (make_gpt_of_4096, 4096),
    "mbr": (make_mbr, 512),
    "hybrid": (make_hybrid, 512),
}


def told_by_sfdisk(disk, sector):
    """``number: (start, size, type, uuid, name)`` in bytes."""
    table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
    assert table.get("sectorsize", 512) == sector
    found = {}
    for one in table["partitions"]:
        number = int(one["node"].removeprefix(str(disk)).lstrip("p"))
        place = one["start"] * sector, one["size"] * sector
        found[number] = (*place, one["type"].lower(), one.get("uuid", "").lower(), one.get("name", ""))
    return table["label"].replace("dos", "mbr"), found


def piece(disk, start, length):
    with open(disk, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(length)


def fill(disk, spans, rng):
    """Random bytes in each span, a run of zeros in its middle."""
    for start, length in spans:
        put(disk, start, rng.randbytes(length // 3))
        put(disk, start + length - length // 3, rng.randbytes(length // 3))


@pytest.fixture(params=TABLES)
def disk(request, loop, rng):
    """A disk with one of the tables; its partitions are full of random bytes."""
    make, sector = TABLES[request.param]
    made = loop(SIZE, sector_size=sector)
    make(made)
    label, known = told_by_sfdisk(made, sector)
    fill(made, [(start, length) for start, length, kind, *_ in known.values() if kind != EXTENDED], rng)
    return made, label, known, request.param


# --- show ---------------------------------------------------------------------------------------------------


def test_show_tells_what_sfdisk_tells(disk, program):
    made, label, known, name = disk
    shown = program("show", program.backup(made)["point"]).document["partition_table"]
    assert (shown["scheme"], shown["sector_bytes"]) == (label, TABLES[name][1])
    assert shown["hybrid"] is (name == "hybrid")
    assert shown["notes"] == (["A hybrid MBR repeats some partitions."] if name == "hybrid" else [])
    found = {}
    for one in shown["partitions"]:
        kind = one["type"] if label == "gpt" else one["type"].removeprefix("0x").lstrip("0")
        uuid = one["uuid"] if label == "gpt" else ""
        found[one["number"]] = (one["start"], one["length"], kind, uuid, one["name"])
        assert one["type_name"], f"the type of partition {one['number']} has no name"
    assert found == known


def test_show_names_what_lies_in_partitions(loop, program, tmp_path):
    made = loop(SIZE)
    make_gpt(made)
    _, known = told_by_sfdisk(made, 512)
    for number, argv in (
        (1, ["mkfs.vfat", "-n", "BOOT", "-i", "1A2B3C4D"]),
        (5, ["mkswap", "-L", "sw", "-U", UUID.format(1)]),
    ):
        start, length, *_ = known[number]
        file = tmp_path / "part.img"
        file.write_bytes(bytes(length))
        run(*argv, file)
        put(made, start, file.read_bytes())
    put(made, known[2][0], pv_label("vg-data"))
    shown = program("show", program.backup(made)["point"]).document["filesystems"]
    assert shown["1"] == {"type": "vfat", "label": "BOOT", "uuid": "1A2B-3C4D"}
    assert shown["2"]["type"] == "LVM2_member"
    assert shown["2"]["label"] == "vg-data"
    assert shown["5"] == {"type": "swap", "label": "sw", "uuid": UUID.format(1)}


def test_show_says_that_a_table_is_damaged_and_reads_the_backup(loop, program):
    made = loop(SIZE)
    make_gpt(made)
    _, known = told_by_sfdisk(made, 512)
    flip(made, 512 + 60)
    os.sync()
    shown = program("show", program.backup(made)["point"]).document["partition_table"]
    assert (shown["valid_primary"], shown["valid_backup"]) == (False, True)
    assert {one["number"] for one in shown["partitions"]} == set(known)
    (note,) = shown["notes"]
    assert "its header does not have its checksum" in note
    assert "the backup is used" in note


def test_an_image_file_of_a_disk_with_large_sectors_is_understood(loop, program):
    """The file does not say which sectors its table was made for."""
    made = loop(SIZE, sector_size=4096)
    make_gpt_of_4096(made)
    _, known = told_by_sfdisk(made, 4096)
    copy, target = made.file.with_suffix(".copy"), loop(SIZE, sector_size=4096)
    copy.write_bytes(Path(made.path).read_bytes())
    point = program.backup(copy)["point"]
    shown = program("show", point).document["partition_table"]
    assert shown["sector_bytes"] == 4096
    assert [one["start"] for one in shown["partitions"]] == [one[0] for one in known.values()]
    # So it is readable there, and nowhere else.
    program.restore(point, target)
    assert sha(target) == sha(copy)
    error = program.restore(point, loop(SIZE), expect=5).error
    assert error["name"] == "TargetSectorSize"
    assert "4096-byte sectors" in error["message"]


# --- one partition ---------------------------------------------------------------------------------------------


def test_each_partition_comes_back_alone_from_every_kind_of_point(disk, program, tmp_path, rng):
    made, _, known, _ = disk
    held = {}
    for kind in ("full", "incremental", "differential"):
        point = program.backup(made, "--kind", kind)["point"]
        held[point] = {number: piece(made, start, length) for number, (start, length, *_) in known.items()}
        for start, length, partition_type, *_ in known.values():
            if partition_type == EXTENDED:
                continue  # the others lie in it
            # A sector at each edge, and one anywhere: the neighbours' bytes lie in the same blocks.
            for at in (start, start + length - 4096, start + rng.randrange(length // 4096) * 4096):
                put(made, at, rng.randbytes(4096))
    for point, parts in held.items():
        for number, expected in parts.items():
            file = tmp_path / f"{point}-{number}.img"
            done = program("restore", point, file, "--partition", number).document
            assert file.read_bytes() == expected, f"partition {number} of {point}"
            assert done["plan"]["partition"]["number"] == number
            assert done["plan"]["device_bytes"] == len(expected)
            file.unlink()


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_partition_on_a_device_is_written_and_nothing_else_is(disk, loop, program, sector, rng):
    made, _, known, _ = disk
    point = program.backup(made)["point"]
    # The extended one begins with a table of its own.
    known = {number: one for number, one in known.items() if one[2] != EXTENDED}
    number, (start, length, *_) = rng.choice(sorted(known.items()))
    expected = piece(made, start, length)
    room = -(-length // 4096) * 4096 + MIB
    target = loop(room, sector_size=sector)
    dirty(target, room)
    rest = piece(target, length, room - length)
    done = program.restore(point, target, "--partition", number).document
    assert piece(target, 0, length) == expected
    assert piece(target, length, room - length) == rest
    assert done["verified_bytes"] == length
    # Once more: it is all there, so nothing is written, and a byte at each edge is found.
    assert program.restore(point, target, "--partition", number).document["written_bytes"] == 0
    for at in (0, length - 1):
        flip(target, at)
    os.sync()
    done = program.restore(point, target, "--partition", number).document
    assert 0 < done["written_bytes"] <= 2 * 64 * KIB
    assert piece(target, 0, room) == expected + rest


@pytest.mark.parametrize("where", ["file", "device"])
def test_a_file_system_that_began_at_sector_63_is_whole_and_can_be_mounted(loop, program, tmp_path, where):
    made = loop(SIZE)
    by_sfdisk(made, "label: dos", "1: start=63, size=32001, type=83", "2: type=83")
    start, length = 63 * 512, 32001 * 512
    with attached(made.file, "--offset", start, "--sizelimit", length) as node:
        run("mkfs.ext4", "-q", "-F", "-L", "odd", node)
        with mounted(node, tmp_path / "there"):
            (tmp_path / "there/file").write_bytes(b"of the partition" * 4000)
    point = program.backup(made)["point"]
    assert program("show", point).document["filesystems"]["1"]["label"] == "odd"
    target = tmp_path / "part.img" if where == "file" else loop(length)
    program.restore(point, target, "--partition", 1)
    run("e2fsck", "-fn", target)
    with mounted(target, tmp_path / "back", *(("-o", "loop,ro") if where == "file" else ("-o", "ro"))):
        assert (tmp_path / "back/file").read_bytes() == b"of the partition" * 4000


def test_what_is_refused_of_a_disk_is_refused_of_a_partition(loop, program, tmp_path):
    made, small, used = loop(SIZE), loop(8 * MIB - 512), loop(SIZE)
    make_gpt(made)
    put(made, 4096 * 512, pv_label("vg-data"))
    point = program.backup(made)["point"]
    error = program.restore(point, small, "--partition", 2, expect=5).error
    assert (error["name"], error["fields"]["need"]) == ("TargetTooSmall", 8 * MIB)
    run("mkfs.ext4", "-q", "-F", used)
    with mounted(used, tmp_path / "mounted"):
        assert program.restore(point, used, "--partition", 2, expect=5).error["name"] == "TargetInUse"
    held = sha(used)
    assert program("restore", point, used, "--partition", 2, expect=5).error["name"] == "TargetExists"
    plan = program("restore", point, used, "--partition", 2, "--dry-run").document["plan"]
    assert (plan["partition"]["number"], plan["device_bytes"], plan["target_bytes"]) == (2, 8 * MIB, SIZE)
    # The disk that it was taken of is not its own partition: what is in use there is not lost to it.
    assert "vg-data" in program.restore(point, made, "--partition", 2, expect=5).error["message"]
    assert sha(used) == held


def test_a_partition_that_is_not_there_is_named_with_those_that_are(loop, program, tmp_path):
    made, plain = loop(SIZE), tmp_path / "plain.img"
    make_gpt(made)
    plain.write_bytes(b"x" * MIB)
    error = program.restore(program.backup(made)["point"], tmp_path / "p.img", "--partition", 3, expect=1).error
    assert (error["name"], error["fields"]["there"]) == ("NoSuchPartition", "1, 2, 5")
    error = program.restore(program.backup(plain)["point"], tmp_path / "p.img", "--partition", 1, expect=1).error
    assert error["fields"]["there"] == "no partition table"
    for header in (512, SIZE - 512):
        put(made, header + 20, b"harm")
    error = program.restore(program.backup(made)["point"], tmp_path / "p.img", "--partition", 2, expect=1).error
    assert error["fields"]["there"] == "a GPT of which both copies are damaged"
    assert not (tmp_path / "p.img").exists()


def test_a_partition_goes_back_to_where_it_was(loop, program):
    """Onto the same partition of the same disk: that is a roll-back, also for a member of a group."""
    made = loop(SIZE)
    make_gpt(made)
    put(made, 4096 * 512, pv_label("vg-data") + b"x" * MIB)
    point = program.backup(made)["point"]
    before = sha(made)
    with partitions(made, 5) as nodes:
        put(nodes[1], MIB + 4096, b"y" * 512)
        done = program.restore(point, nodes[1], "--partition", 2).document
        assert done["plan"]["method"] == "differ"
        assert any("the partition itself" in note for note in done["plan"]["notes"])
        assert done["written_bytes"] == 64 * KIB
        # Its neighbour's place is another one's.
        assert program.restore(point, nodes[1], "--partition", 1, expect=5).error["name"] == "TargetInUse"
    assert sha(made) == before


def test_damage_costs_only_the_partition_that_it_is_in(loop, program, tmp_path):
    made = loop(SIZE)
    by_sfdisk(made, "label: gpt", "first-lba: 34", "start=1000, size=8000", "start=9000, size=20000")
    put(made, 1000 * 512, os.urandom(28000 * 512))
    taken = program.backup(made)
    point, image = taken["point"], program.image(taken)
    # Byte 4608000 is in window 17: both have a piece of it, and of one block in it.
    edge, window = 9000 * 512, 9000 * 512 // (256 * KIB)
    damage_frame(image, window)
    first, second = piece(made, 1000 * 512, 8000 * 512), piece(made, edge, 20000 * 512)
    for number in (1, 2):
        error = program.restore(point, tmp_path / f"{number}.img", "--partition", number, expect=4).error
        assert error["name"] == "DamagedImage"
    done = program.restore(point, tmp_path / "1.img", "--partition", 1, "--keep-going", expect=3).document
    (flaw,) = done["flaws"]
    lost = window * 256 * KIB - 1000 * 512
    assert (flaw["start"], flaw["start"] + flaw["length"]) == (lost, len(first))
    assert (tmp_path / "1.img").read_bytes() == first[:lost] + bytes(len(first) - lost)
    told = Path(done["mapfile"]).read_text()
    assert f"0x{lost:08X}  0x{len(first) - lost:08X}  -" in told
    done = program.restore(point, tmp_path / "2.img", "--partition", 2, "--keep-going", expect=3).document
    (flaw,) = done["flaws"]
    end = (window + 1) * 256 * KIB - edge
    assert (flaw["start"], flaw["length"]) == (0, end)
    assert (tmp_path / "2.img").read_bytes() == bytes(end) + second[end:]


def test_damage_elsewhere_costs_a_partition_nothing(loop, program, tmp_path):
    made = loop(SIZE)
    by_sfdisk(made, "label: gpt", "start=2048, size=8000", "start=20480, size=20000")
    put(made, 0 + MIB, os.urandom(20 * MIB))
    taken = program.backup(made)
    damage_frame(program.image(taken), 50)
    program.restore(taken["point"], tmp_path / "1.img", "--partition", 1)
    assert (tmp_path / "1.img").read_bytes() == piece(made, MIB, 8000 * 512)
    program.restore(taken["point"], tmp_path / "2.img", "--partition", 2, expect=4)
    # Where the table itself is gone, that is damage, and not a disk without partitions.
    damage_frame(program.image(taken), 0)
    assert (
        program.restore(taken["point"], tmp_path / "3.img", "--partition", 1, expect=4).error["name"] == "DamagedImage"
    )


def test_a_partition_is_exported_for_other_programs(loop, program, tmp_path):
    made = loop(SIZE)
    make_gpt(made)
    put(made, 63 * 512, os.urandom(MIB))
    point = program.backup(made)["point"]
    done = program("export", point, tmp_path / "p.img", "--partition", 1).document
    expected = piece(made, 63 * 512, 4033 * 512)
    assert (done["partition"], done["device_bytes"]) == (1, len(expected))
    assert (tmp_path / "p.img").read_bytes() == expected
    program("export", point, tmp_path / "p.qcow2", "--partition", 1, "--format", "qcow2")
    run("qemu-img", "convert", "-O", "raw", tmp_path / "p.qcow2", tmp_path / "raw.img")
    assert (tmp_path / "raw.img").read_bytes()[: len(expected)] == expected
    assert program("export", point, tmp_path / "x.img", "--partition", 9, expect=1).error["name"] == "NoSuchPartition"


# --- a larger disk ------------------------------------------------------------------------------------------------


GROWN = [
    ("gpt", SIZE + 512),
    ("gpt", SIZE + 20 * 512),
    ("gpt", 64 * MIB),
    ("gpt of 4096", SIZE + 8192),
    ("gpt of 4096", 64 * MIB),
]


@pytest.mark.parametrize(("name", "size"), GROWN)
def test_a_gpt_grows_with_the_disk_and_other_tools_find_it_whole(loop, program, tmp_path, rng, name, size):
    make, sector = TABLES[name]
    made, target = loop(SIZE, sector_size=sector), loop(size, sector_size=sector)
    make(made)
    _, known = told_by_sfdisk(made, sector)
    fill(made, [(start, length) for start, length, *_ in known.values()], rng)
    dirty(target, size)
    point = program.backup(made)["point"]
    offered = program.restore(point, target, "--dry-run").document["plan"]
    assert offered["grow"] is False
    assert any("--grow" in note for note in offered["notes"])
    for _ in range(2):  # the second time onto a disk that has grown already
        done = program.restore(point, target, "--grow").document
        assert done["plan"]["grow"] is True
        assert not any("left alone" in note for note in done["plan"]["notes"])
        assert "No problems found" in run("sgdisk", "--verify", target)
        assert "No errors detected" in run("sfdisk", "--verify", target)
        assert told_by_sfdisk(target, sector)[1] == known
        for start, length, *_ in known.values():
            assert piece(target, start, length) == piece(made, start, length)
        # What was the backup is none any more, for whoever looks for lost tables.
        assert piece(target, SIZE - sector, 8) != b"EFI PART" or size - SIZE < 33 * 512
        assert piece(target, size - sector, 8) == b"EFI PART"
    # The kernel reads it too, and the space can be used.
    with partitions(target, max(known)):
        assert Path(f"/sys/class/block/{Path(target.path).name}p1/start").read_text().strip() == str(known[1][0] // 512)
    if size > SIZE + MIB:
        run("sgdisk", "--new=9:0:0", target)
        last = told_by_sfdisk(target, sector)[1][9]
        assert last[0] + last[1] > size - MIB


def test_without_grow_the_backup_stays_where_it_was(loop, program):
    made, target = loop(SIZE), loop(2 * SIZE)
    make_gpt(made)
    point = program.backup(made)["point"]
    program.restore(point, target)
    assert piece(target, 0, SIZE) == piece(made, 0, SIZE)
    shown = program("show", program.backup(target)["point"]).document["partition_table"]
    assert any("not at the end" in note for note in shown["notes"])
    # On a target of the same size there is nothing to offer.
    same = loop(SIZE)
    assert not any("--grow" in note for note in program.restore(point, same, "--dry-run").document["plan"]["notes"])
    done = program.restore(point, same, "--grow").document
    assert done["plan"]["grow"] is False
    assert any("not larger" in note for note in done["plan"]["notes"])
    assert sha(same) == sha(made)


@pytest.mark.parametrize("name", ["mbr", "none"])
def test_a_disk_without_a_gpt_has_nothing_to_move(loop, program, name):
    made, target = loop(SIZE), loop(2 * SIZE)
    if name == "mbr":
        make_mbr(made)
    put(made, 8 * MIB, b"x" * 4096)
    dirty(target, 2 * SIZE)
    rest = piece(target, SIZE, SIZE)
    done = program.restore(program.backup(made)["point"], target, "--grow").document
    (note,) = [note for note in done["plan"]["notes"] if "--grow" in note]
    assert ("an MBR has no backup" if name == "mbr" else "no partition table") in note
    assert piece(target, 0, 2 * SIZE) == piece(made, 0, SIZE) + rest


def test_a_hybrid_mbr_comes_back_as_it_was_also_on_a_larger_disk(loop, program):
    made, target = loop(SIZE), loop(2 * SIZE)
    make_hybrid(made)
    mbr = piece(made, 0, 512)
    assert mbr[446:510].count(b"\0" * 16) < 3
    done = program.restore(program.backup(made)["point"], target, "--grow").document
    assert any("hybrid" in note and "left as it is" in note for note in done["plan"]["notes"])
    assert piece(target, 0, 512) == mbr
    assert "No problems found" in run("sgdisk", "--verify", target)


def hurt_primary(disk):
    flip(disk, 512 + 60)


def move_backup(disk):
    """As on a disk that has grown, and whose table has not."""
    half = SIZE // 2
    small = disk.file.with_suffix(".small")
    small.write_bytes(bytes(half))
    run("sgdisk", "--new=1:2048:+1M", small)
    put(disk, 0, small.read_bytes())


@pytest.mark.parametrize(("hurt", "words"), [(hurt_primary, "primary table is damaged"), (move_backup, "another size")])
def test_a_table_that_is_not_sound_is_not_grown_and_nothing_is_written(loop, program, hurt, words):
    made, target = loop(SIZE), loop(2 * SIZE)
    make_gpt(made)
    hurt(made)
    os.sync()
    dirty(target, 2 * SIZE)
    held = sha(target)
    point = program.backup(made)["point"]
    for options in ([], ["--dry-run"]):
        error = program.restore(point, target, "--grow", *options, expect=5).error
        assert error["name"] == "CannotGrow"
        assert words in error["message"]
    assert sha(target) == held


def test_a_file_has_no_end_to_grow_to(loop, program, tmp_path):
    made = loop(SIZE)
    make_gpt(made)
    error = program.restore(program.backup(made)["point"], tmp_path / "f.img", "--grow", expect=1).error
    assert error["name"] == "BadTarget"
    assert "a file gets just the volume's size" in error["message"]
    assert not (tmp_path / "f.img").exists()
