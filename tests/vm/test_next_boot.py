"""The machine's own root disk, imaged before it is mounted.

The first test has it ordered and the machine started anew (``scripts/vm``: off, and on with the initramfs that was made
in here). The second comes after that boot, in which the root disk as it was when the machine was off is there to read,
as a disk of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.vm.conftest import MIB, run

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

WISH = Path("/var/tmp/blockbak-boot")
REPOSITORY = Path("/tmp/blockbak-boot/repository")
SPOOL = REPOSITORY / ".next-boot"
UNIT = "blockbak-next-boot.service"
INSTALLED = (
    "/etc/initramfs-tools/hooks/blockbak", "/etc/initramfs-tools/scripts/local-premount/blockbak",
    "/etc/initramfs-tools/blockbak", f"/etc/systemd/system/{UNIT}",
    f"/etc/systemd/system/multi-user.target.wants/{UNIT}",
)  # fmt: skip
# One byte after the other through the emulated processor.
POINT_SECONDS = 600


def disk(serial):
    """The node of the disk that QEMU was given under that name."""
    (found,) = (path for path in Path("/sys/block").glob("vd*") if (path / "serial").read_text().strip() == serial)
    return f"/dev/{found.name}"


def first_difference(image, disk):
    """The first piece, in bytes, in which an image's content is not a disk's; None if it is that, to the end."""
    # What zstd and cmp would do together, without a pipe between them, which takes minutes here.
    with zstd.open(image) as packed, open(disk, "rb") as file:
        at = 0
        while (piece := packed.read(4 * MIB)) == file.read(len(piece) or 1):
            if not piece:
                return None
            at += len(piece)
        return at


def there(paths):
    return [path for path in paths if os.path.lexists(path)]


@pytest.fixture
def store(run_blockbak):
    """A repository on the second disk, which is mounted at each boot, and unmounted when the machine is off."""
    REPOSITORY.parent.mkdir()
    assert run("findmnt", "-n", "-o", "SOURCE", "-T", REPOSITORY.parent) == disk("blockbak-spare")
    run_blockbak("init", REPOSITORY)
    run_blockbak.exported["BLOCKBAK_REPO"] = str(REPOSITORY)


@pytest.fixture
def initramfs():
    """The machine has none of its own yet: as if Debian had just made one, which is only to be brought up to date."""
    release = os.uname().release
    image = Path(f"/boot/initrd.img-{release}")
    image.write_bytes(b"none yet")
    state = Path("/var/lib/initramfs-tools")
    state.mkdir(exist_ok=True)
    (state / release).write_text(f"{run('sha1sum', image).split()[0]}  {image}\n")
    Path("/etc/initramfs-tools/update-initramfs.conf").write_text("update_initramfs=yes\nbackup_initramfs=no\n")
    return image


@pytest.mark.before_boot
def test_the_root_disk_is_ordered(store, initramfs, run_blockbak):
    root = run("findmnt", "-n", "-o", "SOURCE", "/")
    assert root == disk("blockbak-root")
    refused = run_blockbak("backup", root, expect=5)
    assert "cannot be unmounted while that runs" in refused.err.decode()
    assert f"blockbak cold --at-next-boot {root}" in refused.err.decode()

    told = run_blockbak.json("cold", "--at-next-boot", root, "--dry-run")
    assert (told["source"], told["identity"], told["dry_run"]) == (root, "serial blockbak-root", True)
    assert not there(INSTALLED)
    assert not SPOOL.exists()

    # What was deleted is nothing that an image would have to hold.
    run("fstrim", "/")
    made = run_blockbak.json("cold", "--at-next-boot", root, "--name", "root", "--time-limit", "900")
    assert made["images"] == [str(initramfs)]
    assert there(INSTALLED) == list(INSTALLED)
    again = run_blockbak("cold", "--at-next-boot", root, expect=1)
    assert "ordered already" in again.err.decode()
    WISH.touch()


@pytest.mark.after_boot
def test_the_root_disk_was_imaged_before_it_was_mounted(run_blockbak):
    said = Path("/run/initramfs/blockbak/said").read_text()
    assert "was imaged in" in said, said
    deadline = time.monotonic() + POINT_SECONDS
    while there([SPOOL, *INSTALLED]):
        state = run("systemctl", "show", "-p", "ActiveState,Result", UNIT)
        assert "failed" not in state, run("journalctl", "--no-pager", "-u", UNIT)
        assert time.monotonic() < deadline, there([SPOOL, *INSTALLED])
        time.sleep(1)

    run_blockbak.exported["BLOCKBAK_REPO"] = str(REPOSITORY)
    (point,) = run_blockbak.json("list")
    shown = json.loads(next((REPOSITORY / "root").glob("*.json")).read_text())
    assert point["volume"] == "root"
    assert (shown["closing"]["mode"], shown["closing"]["consistency"]) == ("cold", "cold")

    # By nothing of blockbak's: its image, unpacked, beside the disk as it was while the machine was off.
    then = disk("blockbak-then")
    (image,) = (REPOSITORY / "root").glob("*.full.zst")
    assert first_difference(image, then) is None
    # And it is not the disk as it is now, on which the system has started since.
    with open(then, "rb") as file, open(disk("blockbak-root"), "rb") as now:
        # Of an ext4 that is in use (fs/ext4/ext4.h): when it was mounted last, in the superblock.
        assert file.read(2048)[1068:1072] != now.read(2048)[1068:1072]

    # Gone from the initramfs, too.
    release = os.uname().release
    assert "usr/lib/blockbak/stage" not in run("lsinitramfs", f"/boot/initrd.img-{release}").split()
    WISH.unlink()
    shutil.rmtree(REPOSITORY.parent)
