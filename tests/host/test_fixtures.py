"""The fixtures promise real devices and a clean machine; here they are held to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patterns import explain, stamp

MIB = 1 << 20


def sysfs(device, name):
    return Path("/sys/block", Path(device).name, name).read_text().strip()


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_loop_device_is_as_asked(loop, sector_size):
    device = loop(8 * MIB, sector_size=sector_size)
    assert sysfs(device, "size") == str(8 * MIB // 512)
    assert sysfs(device, "queue/logical_block_size") == str(sector_size)
    assert sysfs(device, "loop/dio") == "1"


def test_what_is_written_to_a_device_is_in_its_file(loop):
    device = loop(MIB)
    data = stamp(0, 2048, 1, 7)
    with Path(device).open("r+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    assert explain(device.file.read_bytes(), 0, 1, 7) is None


@pytest.mark.parametrize(("kind", "size"), [("ext4", 16 * MIB), ("xfs", 300 * MIB), ("btrfs", 128 * MIB)])
def test_a_file_system_keeps_files_over_a_remount(loop, request, kind, size):
    made = request.getfixturevalue(kind)(loop(size))
    (made.where / "file").write_bytes(b"kept")
    made.unmount()
    assert not (made.where / "file").exists()
    made.mount()
    assert (made.where / "file").read_bytes() == b"kept"


LEAKS = {
    "loop device": 'subprocess.run(["losetup", "--find", IMAGE], check=True)',
    "mount": 'subprocess.run(["mount", "-t", "tmpfs", "left", HERE], check=True)',
    "process": 'subprocess.Popen(["sleep", "60"], start_new_session=True)',
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_test_that_leaves_something_behind_fails(as_root, tmp_path, what):
    """A run of pytest within the run: its one test leaks, fails for it, and is cleaned up after."""
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "conftest.py").write_bytes((Path(__file__).parent.parent / "conftest.py").read_bytes())
    (inner / "test_leak.py").write_text(
        "import subprocess\n"
        "def test_leak(tmp_path):\n"
        "    HERE, IMAGE = tmp_path, tmp_path / 'image'\n"
        "    IMAGE.write_bytes(bytes(1 << 20))\n"
        f"    {LEAKS[what]}\n"
        "def test_after():\n"
        "    pass\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", inner, "-c", os.devnull),
            *("--basetemp", tmp_path / "base", "-o", "markers=", inner),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert f"left behind: {what}" in done.stdout
