"""What mount(8) is told, so that a mount comes back as it was."""

from __future__ import annotations

import pytest

from blockbak.errors import CommandFailed
from blockbak.host import mounts
from blockbak.model import mounting
from blockbak.model.quiesce import Unmount, _origin
from blockbak.model.scene import MountPoint, Scene


@pytest.mark.parametrize(
    ("line", "own", "of_filesystem"),
    [
        ("rw,relatime,rw,errors=remount-ro", ("rw", "relatime"), ("rw", "errors=remount-ro")),
        ("ro,nosuid,noexec,rw", ("ro", "nosuid", "noexec"), ("rw",)),
        ("rw,ro,norecovery", ("rw",), ("ro", "norecovery")),
        ("rw,noatime", ("rw", "noatime"), ()),
    ],
)
def test_a_mounts_own_options_come_first(line, own, of_filesystem):
    assert mounting.parts(line.split(",")) == (own, of_filesystem)


@pytest.mark.parametrize(
    ("fstype", "line", "userspace", "told"),
    [
        ("ext4", "rw,nosuid,noatime,rw,data=journal", (), "rw,data=journal,nosuid,noatime"),
        # The mount alone is read-only: the file system is mounted for writing, and bound so afterwards.
        ("ext4", "ro,nosuid,relatime,rw", (), "rw,nosuid,relatime"),
        ("xfs", "ro,noatime,ro,norecovery,inode64", (), "ro,norecovery,inode64,noatime"),
        # Each access is noted: the kernel shows that by showing nothing.
        ("xfs", "rw,nodev,rw,inode64", (), "rw,inode64,nodev,strictatime"),
        ("ext4", "rw,relatime,rw,seclabel", ("_netdev", "x-systemd.automount"), "rw,relatime,_netdev,x-systemd.automount"),
        ("ext4", "rw,noatime,rw,seclabel,stripe=4", ("loop=/dev/loop3", "uhelper=udisks2"), "rw,stripe=4,noatime,uhelper=udisks2"),
        ("fuseblk", "rw,relatime,rw,user_id=0,group_id=0,allow_other,blksize=4096", (), "rw,allow_other,relatime"),
        ("btrfs", "rw,relatime,rw,subvolid=256,subvol=/a b", (), "rw,subvolid=256,relatime"),
    ],
)  # fmt: skip
def test_a_mount_is_told_what_it_was_and_takes(fstype, line, userspace, told):
    assert ",".join(mounting.to_mount(fstype, line.split(","), userspace)) == told


def test_a_bind_is_told_its_own_flags_alone():
    assert mounting.to_bind(["ro", "nodev", "relatime", "rw", "data=ordered"]) == (
        "remount",
        "bind",
        "ro",
        "nodev",
        "relatime",
    )


def test_differences_are_told_either_way():
    before, after = ["rw", "noatime", "rw", "commit=30"], ["rw", "relatime", "ro", "commit=30"]
    assert mounting.differences(before, before) == []
    assert mounting.differences(before, after) == [
        "noatime before, not now", "relatime now, not before", "file system rw before, not now",
        "file system ro now, not before",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tags", "kinds"),
    [
        ("", ("private",)), ("shared:7", ("shared",)), ("master:2", ("slave",)), ("unbindable", ("unbindable",)),
        ("shared:3 master:1", ("slave", "shared")), ("master:1 propagate_from:4", ("slave",)),
    ],
)  # fmt: skip
def test_how_a_mount_propagates(tags, kinds):
    assert mounting.kinds(tags) == kinds


def mount(number, target, root="/", fstype="ext4", options=("rw", "rw")):
    return MountPoint(number, 1, "sda1", target, root, fstype, "/dev/sda1", options, writable=True, number="8:1")


@pytest.mark.parametrize(
    ("one", "origin"),
    [
        (mount(3, "/b", "/sub"), "/m/sub"),
        (mount(3, "/b", "/"), ""),
        (mount(3, "/b", "/@home", "btrfs", ("rw", "rw", "subvol=/@home")), ""),
        (mount(3, "/b", "/@home/ann", "btrfs", ("rw", "rw", "subvol=/@home")), "/m/@home/ann"),
    ],
)
def test_a_bind_is_one_of_a_directory_that_an_earlier_mount_shows(one, origin):
    assert _origin(one, Scene("sda", "/dev/sda", mounts=(mount(2, "/m", fstype=one.fstype), one))) == origin


def test_what_is_mounted_aside_goes_though_it_is_busy_and_the_first_error_stays(tmp_path):
    """A part of a file system that is mounted nowhere as a whole."""
    argvs: list[list[str]] = []
    answers = {"--bind": ["no such file or directory"], "umount": ["target is busy", "not mounted"]}

    def run(argv, **_):
        argvs.append(list(argv))
        for word, said in answers.items():
            if word in argv and said:
                raise CommandFailed(program=argv[0], status=32, stderr=said.pop(0))

    step = Unmount(str(tmp_path / "target"), "/dev/sdz1", "ext4", ("rw",), root="/inner")
    with pytest.raises(CommandFailed, match="no such file") as raised:
        mounts.mount_again(step, {"count": 1}, "/dev/sdz1", run, str(tmp_path))
    assert [argv[0] for argv in argvs] == ["mount", "mount", "umount", "umount"]
    assert "not mounted" in raised.value.__notes__[0]
