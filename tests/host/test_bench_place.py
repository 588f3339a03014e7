"""Where ``scripts/bench`` measures: file systems by their right name, and room that is really free."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchmarks import place

MIB = 1 << 20


def test_a_file_system_has_its_own_name(loop, ext4, xfs, tmpfs):
    assert place.kind_of(str(ext4(loop(16 * MIB)).where)) == "ext4"
    assert place.kind_of(str(xfs(loop(320 * MIB)).where)) == "xfs"
    assert place.kind_of(str(tmpfs("1M"))) == "tmpfs"


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_what_was_unlinked_is_free(loop, xfs, btrfs, kind):
    """Also where the file system frees it in the background."""
    where = {"xfs": xfs, "btrfs": btrfs}[kind](loop(512 * MIB)).where
    for number in range(200):
        (where / str(number)).write_bytes(os.urandom(MIB))
    before = place.free_bytes(str(where))
    for file in where.iterdir():
        file.unlink()
    assert place.free_bytes(str(where)) - before >= 199 * MIB
