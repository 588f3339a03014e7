"""Devices that end in the middle of one of their sectors: the kernel hands out nothing of what is left over."""

from __future__ import annotations

import os

import pytest

from tests.host.stage import KIB, MIB, put, sha

SECTOR = 4 * KIB
SIZE = MIB + 512
"""An image file of sectors of 512 bytes, shown in sectors of 4096."""


@pytest.fixture
def disk(loop):
    device = loop(SIZE, sector_size=SECTOR)
    put(device, 0, b"x" * (MIB - SECTOR))
    assert os.stat(device.file).st_size == SIZE
    return device


def test_what_is_past_the_last_whole_sector_of_a_source_is_said_to_be_unreadable(program, disk, tmp_path):
    done = program("backup", disk, expect=3)
    (point,) = done.document["points"]
    assert "went away" not in done.said
    assert (point["device_bytes"], 0 < point["bad_bytes"] <= SECTOR) == (SIZE, True)
    assert program("verify").document["ok"]
    program("restore", point["point"], tmp_path / "out.img", expect=3)
    assert sha(tmp_path / "out.img") == sha(disk.file)
    # The next point is no worse.
    put(disk, 0, b"y" * 512)
    program("backup", disk, expect=3)


def test_a_target_counts_as_far_as_its_last_whole_sector(program, disk, tmp_path):
    held = sha(disk.file)
    for size in (SIZE, MIB + 1):
        file = tmp_path / f"{size}.img"
        file.write_bytes(os.urandom(size))
        point = program.backup(file)["point"]
        for options in ([], ["--dry-run"]):
            assert program.restore(point, disk, *options, expect=5).error["name"] == "TargetTooSmall"
        assert sha(disk.file) == held
    whole = tmp_path / "whole.img"
    whole.write_bytes(os.urandom(MIB))
    program.restore(program.backup(whole)["point"], disk)
    assert disk.file.read_bytes()[:MIB] == whole.read_bytes()
