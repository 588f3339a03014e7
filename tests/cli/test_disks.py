"""Whole disks on the command line: what show prints, and how a partition is asked for."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.cli.program import document, fails, ok, run
from tests.cli.stock import Stock
from tests.unit.test_gpt import disk_of

MIB = 1 << 20
SECTOR = 512


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a GPT disk, `gpt`, and an MBR one, `mbr`, each with a file system in the second partition."""
    folder = tmp_path_factory.mktemp("disks")
    gpt = disk_of(4 * MIB // SECTOR, SECTOR, [(63, 100), (2048, 4095)])
    mbr = bytearray(4 * MIB)
    for number, row in enumerate([(0x80, 0x07, 63, 100), (0, 0x83, 2048, 2048)]):
        struct.pack_into("<B3xB3xII", mbr, 446 + 16 * number, *row)
    mbr[510:512] = b"\x55\xaa"
    luks = b"LUKS\xba\xbe\0\2" + b"\0" * 16 + b"vault".ljust(48, b"\0")
    for name, data in (("gpt", gpt), ("mbr", mbr)):
        data[MIB : MIB + len(luks)] = luks
        data[63 * SECTOR : 64 * SECTOR] = name.encode() * 170 + b"\0\0"
        (folder / f"{name}.img").write_bytes(data)
    ok("init", folder / "repo")
    for name in ("gpt", "mbr"):
        ok("-r", folder / "repo", "backup", folder / f"{name}.img", "--name", name)
    return folder


def test_show_lists_partitions_for_people(disks: Path) -> None:
    lines = ok("-r", disks / "repo", "show", "mbr@latest").text.splitlines()
    (head,) = [line for line in lines if line.startswith("partitions:")]
    assert head.split() == ["partitions:", "mbr,", "512-byte", "sectors"]
    rows = lines[lines.index(head) + 3 :]
    assert rows[0].split()[:6] == ["1", "32256", "50.0", "KiB", "HPFS/NTFS/exFAT"][:6]
    assert rows[1].split() == ["2", "1048576", "1.00", "MiB", "Linux", "crypto_LUKS", "vault"]


def test_show_gives_partitions_to_programs(disks: Path) -> None:
    found = document("-r", disks / "repo", "show", "gpt@latest")
    table = found["partition_table"]
    assert {key: table[key] for key in ("scheme", "sector_bytes", "hybrid", "notes", "valid_primary", "valid_backup")} == {
        "scheme": "gpt", "sector_bytes": 512, "hybrid": False, "notes": [], "valid_primary": True, "valid_backup": True,
    }  # fmt: skip
    second = table["partitions"][1]
    assert second.keys() == {"number", "start", "length", "type", "uuid", "name", "bootable", "type_name"}
    assert (second["number"], second["start"], second["length"]) == (2, MIB, MIB)
    assert found["filesystems"] == {"2": {"type": "crypto_LUKS", "label": "vault", "uuid": ""}}


def test_show_says_what_is_wrong_with_a_table(disks: Path, tmp_path: Path) -> None:
    data = bytearray((disks / "gpt.img").read_bytes())
    data[SECTOR + 60] ^= 1
    data[446 + 16 : 446 + 32] = struct.pack("<B3xB3xII", 0, 0x83, 2048, 2048)
    (tmp_path / "hurt.img").write_bytes(data)
    ok("init", tmp_path / "repo")
    ok("-r", tmp_path / "repo", "backup", tmp_path / "hurt.img")
    text = ok("-r", tmp_path / "repo", "show", "latest").text
    assert "partitions:    gpt with a hybrid MBR 6464" in text
    assert "table note:    The primary table is damaged (its header does not have its checksum)" in text


def test_one_partition_is_restored_and_said_so(disks: Path, tmp_path: Path) -> None:
    plan = ok("-r", disks / "repo", "restore", "gpt@latest", tmp_path / "p", "--partition", "1", "--dry-run")
    assert plan.text.startswith("partition 1 of ")
    assert not (tmp_path / "p").exists()
    done = ok("-r", disks / "repo", "restore", "gpt@latest", tmp_path / "p", "--partition", "1")
    assert done.text.startswith("Restored partition 1 of ")
    assert (tmp_path / "p").read_bytes() == (disks / "gpt.img").read_bytes()[63 * SECTOR : 101 * SECTOR]
    found = document("-r", disks / "repo", "restore", "gpt@latest", tmp_path / "q", "--partition", "2")
    assert found["plan"]["partition"]["number"] == 2
    assert (found["plan"]["device_bytes"], found["plan"]["grow"], found["verified_bytes"]) == (MIB, False, MIB)
    done = ok("-r", disks / "repo", "export", "gpt@latest", tmp_path / "e", "--partition", "1")
    assert done.text.startswith("Exported partition 1 of ")
    assert (tmp_path / "e").read_bytes() == (tmp_path / "p").read_bytes()


def test_without_partition_the_plan_names_none(stock: Stock, tmp_path: Path) -> None:
    plan = document("-r", stock.path, "restore", stock.newest, tmp_path / "o", "--dry-run")["plan"]
    assert (plan["partition"], plan["grow"]) == (None, False)


@pytest.mark.parametrize("verb", ["restore", "export"])
def test_a_partition_that_is_not_there(verb: str, disks: Path, stock: Stock, tmp_path: Path) -> None:
    ended = fails(1, "NoSuchPartition", "-r", disks / "repo", verb, "mbr@latest", tmp_path / "p", "--partition", "5")
    assert "it has: 1, 2." in ended.error["message"]
    ended = fails(1, "NoSuchPartition", "-r", stock.path, verb, stock.db, tmp_path / "p", "--partition", "1")
    assert "no partition table" in ended.error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [("--partition", "0"), ("--partition", "two"), ("--partition", "-1"), ("--grow", "--partition", "1")],
    ids=" ".join,
)
def test_what_makes_no_sense_is_a_wrong_command_line(words: tuple[str, ...], disks: Path, tmp_path: Path) -> None:
    ended = run("-r", disks / "repo", "restore", "gpt@latest", tmp_path / "p", *words, "--json")
    assert ended.status == 2, str(ended)
    assert ended.error["name"] == "WrongUsage"
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_grown(disks: Path, tmp_path: Path) -> None:
    ended = fails(1, "BadTarget", "-r", disks / "repo", "restore", "gpt@latest", tmp_path / "p", "--grow")
    assert "just the volume's size" in ended.error["message"]
    assert list(tmp_path.iterdir()) == []
