"""Whether file systems were unmounted cleanly, told from real ones: after that, and from a copy of one in use."""

import os
import re
import shutil
import subprocess

import pytest

from blockbak.model.unmounted import unclean
from blockbak.units import MIB, SECTOR

SIZE = 400 * MIB


def told(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return unclean(lambda at, length: os.pread(descriptor, length, at), SECTOR, os.stat(path).st_size)
    finally:
        os.close(descriptor)


def work(store, number):
    """Enough for the log to go round, and some of it still to be replayed."""
    for name in range(300):
        (store.where / f"{number}-{name}").write_bytes(os.urandom(2000))
    os.sync()
    for _ in range(2):
        safely(store.where / "safe")


def safely(path):
    with path.open("ab") as file:
        file.write(os.urandom(100))
        file.flush()
        os.fsync(file.fileno())


@pytest.mark.parametrize("name", ["ext4", "xfs", "btrfs"])
def test_in_use_and_not_any_more(loop, request, tmp_path, name):
    device = loop(SIZE)
    store = request.getfixturevalue(name)(device)
    store.unmount()
    assert told(device.file) == []
    copy = tmp_path / "copy.img"
    for number in range(3):
        store.mount()
        work(store, number)
        shutil.copyfile(device.file, copy)
        assert told(copy) == [f"the file system on it ({name}) was not unmounted cleanly"], number
        store.unmount()
        assert told(device.file) == [], number


def test_xfs_is_judged_as_its_own_program_does_once_round_the_log(loop, xfs):
    device = loop(SIZE)
    # Each record fills 256 KiB of the log's 64 MiB.
    store = xfs(device, "-l", "su=256k")
    heads = []
    while heads == sorted(heads):
        for number in range(60):
            safely(store.where / f"{number}")
        store.unmount()
        said = subprocess.run(["xfs_logprint", "-t", device.file], capture_output=True, text=True, check=True).stdout
        assert "<CLEAN>" in said
        assert told(device.file) == [], heads
        heads.append(int(re.search(r"head: (\d+)", said)[1]))
        assert len(heads) < 30
        store.mount()


def test_a_vfat_in_use(tmp_path):
    image = tmp_path / "fat.img"
    for bits, at in ((16, 37), (32, 65)):
        image.unlink(missing_ok=True)
        subprocess.run(["mkfs.vfat", "-C", "-F", str(bits), image, "65536"], check=True, capture_output=True)
        assert told(image) == []
        with image.open("r+b") as file:
            file.seek(at)
            file.write(b"\1")
        assert told(image) == ["the file system on it (vfat) was not unmounted cleanly"]


def test_an_ext4_with_errors(tmp_path):
    image = tmp_path / "ext.img"
    subprocess.run(["mkfs.ext4", "-q", image, "20M"], check=True)
    subprocess.run(["debugfs", "-w", "-R", "ssv state 3", image], check=True, capture_output=True)
    assert told(image) == ["the file system on it (ext4) was not unmounted cleanly"]


def test_each_partition_by_itself(tmp_path):
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    table = "label: gpt\nstart=2048,size=2048,type=21686148-6449-6E6F-744E-656564454649\n"
    table += "start=4096,size=40960\nstart=45056,size=20480\nstart=65536,size=2048\nstart=67584,size=2048\n"
    subprocess.run(["sfdisk", "-q", image], input=table, text=True, check=True)
    part = tmp_path / "part.img"
    subprocess.run(["mkfs.ext4", "-q", part, "20M"], check=True)
    subprocess.run(["debugfs", "-w", "-R", "feature needs_recovery", part], check=True, capture_output=True)
    with image.open("r+b") as file:
        file.seek(MIB)
        file.write(b"code of a boot loader")
        file.seek(2 * MIB)
        file.write(part.read_bytes())
        file.seek(65536 * SECTOR)
        file.write(b"what nobody knows")
    swap = tmp_path / "swap.img"
    swap.write_bytes(bytes(10 * MIB))
    subprocess.run(["mkswap", "-q", swap], check=True)
    with image.open("r+b") as file:
        file.seek(45056 * SECTOR)
        file.write(swap.read_bytes())
    assert told(image) == [
        "partition 2 (ext4) was not unmounted cleanly", "partition 4 holds something that is not known",
    ]  # fmt: skip


def test_what_cannot_be_looked_into_is_not_known(tmp_path):
    image = tmp_path / "luks.img"
    image.write_bytes(b"LUKS\xba\xbe\0\2".ljust(MIB, b"\0"))
    assert told(image) == ["the file system on it (crypto_LUKS) cannot be looked into"]
