"""A node is handed on to another disk, or a disk is resized or put to use, between the look at it and its opening:
what is read and written is what was looked at, or nothing.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import ExitStack
from dataclasses import replace

import pytest

from blockbak.errors import BadTarget, Refused, SourceError, SourceInUse, TargetInUse
from blockbak.flow import backup, restore
from blockbak.host import device as devices
from blockbak.host import usage
from blockbak.repository.local import Repository
from tests.doubles import context
from tests.host.stage import MIB, Oracle, attached, mounted, run, settle, sha, spare_node
from tests.moments import SOURCE_MOMENTS, TARGET_MOMENTS, Once, WhileWaiting

SIZE = 16 * MIB


@pytest.fixture
def node(as_root):
    """A loop node that no other finds."""
    with spare_node() as name:
        yield name


@pytest.fixture
def files(tmp_path, seed):
    """``files(*sizes)`` makes image files of stamped sectors, no two alike."""

    def make(*sizes):
        made = []
        for number, size in enumerate(sizes):
            file = tmp_path / f"disk-{number}.img"
            file.write_bytes(bytes(size))
            Oracle(file, size, seed + number).write((0, size))
            made.append(file)
        return made

    return make


class Exchange:
    """A node that shows one file, and another one once ``now`` is called."""

    def __init__(self, node, undo, first):
        self._node, self._undo, self._shown = node, undo, undo.enter_context(ExitStack())
        self._shown.enter_context(attached(first, node=node))

    def now(self, other, *options):
        self._shown.close()
        self._undo.enter_context(attached(other, *options, node=self._node))


@pytest.fixture
def exchange(node):
    with ExitStack() as undo:
        yield lambda first: Exchange(node, undo, first)


# --- sources ----------------------------------------------------------------------------------------------


@pytest.fixture
def backed_up_once(program, node):
    """A repository with one point of the node, and how to make the next one at a moment of one's choice."""

    class Ready:
        repository = Repository(str(program.repository))
        first = ""

        def begin(self):
            self.first = program.backup(node, "--name", "disk")["point"]

        def again(self, moment, act):
            # The same host as the first point's, or everything would be another volume.
            host = program("show", self.first).document["host"]
            world = replace(
                context(program.state), host=host, **SOURCE_MOMENTS[moment](self.repository.volume("disk"), node, act)
            )
            return backup.backup(self.repository, backup.Request(node, name="disk"), world)

    return Ready()


@pytest.mark.parametrize("moment", SOURCE_MOMENTS)
def test_another_disk_under_the_same_node_is_never_stored_as_the_first_one(
    moment, program, node, files, exchange, backed_up_once, tmp_path
):
    first, second = files(SIZE, SIZE)
    disk = exchange(first)
    backed_up_once.begin()
    act = Once(lambda: disk.now(second))
    try:
        made = backed_up_once.again(moment, act)
    except SourceError:
        made = None
    assert act.done
    assert (made is None) == (moment == "before the source is opened")
    if made is not None:
        assert (made.kind, made.parent) == ("full", None)
        assert program("show", made.point).document["identity"]["value"] == str(second)
        program("restore", made.point, tmp_path / "out.img")
        assert sha(tmp_path / "out.img") == sha(second)
    else:
        assert program.points() == [backed_up_once.first]
    program("restore", backed_up_once.first, tmp_path / "first.img")
    assert sha(tmp_path / "first.img") == sha(first)


@pytest.mark.parametrize("size", [SIZE - 5 * MIB, SIZE + 5 * MIB])
@pytest.mark.parametrize("moment", SOURCE_MOMENTS)
def test_a_device_that_is_resized_gives_a_point_that_restores_or_none(
    moment, size, program, node, files, exchange, backed_up_once, tmp_path
):
    (first,) = files(max(SIZE, size))
    with attached(first, f"--sizelimit={SIZE}", node=node):
        backed_up_once.begin()
        act = Once(lambda: resize(node, size))
        try:
            made = backed_up_once.again(moment, act)
        except SourceError:
            made = None
        assert act.done
        assert (made is None) == (moment == "before the source is opened")
        if made is not None:
            assert (made.kind, made.device_bytes) == ("full", size)
            program("restore", made.point, tmp_path / "out.img")
            assert sha(tmp_path / "out.img") == sha(node)
        assert program("verify").document["ok"]


def resize(node, size):
    """As ``lvextend`` and ``lvreduce`` do while the volume is open elsewhere."""
    descriptor = os.open(node, os.O_RDWR)
    try:
        # linux/loop.h: LOOP_GET_STATUS64, LOOP_SET_STATUS64; lo_sizelimit is the fifth u64.
        status = bytearray(fcntl.ioctl(descriptor, 0x4C05, bytes(232)))
        struct.pack_into("=Q", status, 32, size)
        fcntl.ioctl(descriptor, 0x4C04, bytes(status))
    finally:
        os.close(descriptor)


def test_a_device_that_is_mounted_while_it_was_waited_for_is_not_read(loop, program, tmp_path):
    disk = loop(SIZE)
    run("mkfs.ext4", "-q", "-F", disk)
    point = program.backup(disk, "--name", "disk")["point"]
    repository = Repository(str(program.repository))
    with ExitStack() as others:
        act = Once(lambda: others.enter_context(mounted(disk, tmp_path / "used")))
        world = replace(context(program.state), check=WhileWaiting(repository.volume("disk"), act), wait=60)
        with pytest.raises(SourceInUse):
            backup.backup(repository, backup.Request(disk.path, name="disk"), world)
        assert act.done
    assert program.points() == [point]


# --- targets ----------------------------------------------------------------------------------------------


def attempt(program, point, target, moment, act):
    world = replace(context(program.state), **TARGET_MOMENTS[moment](target, act))
    request = restore.Request(point, str(target), overwrite=True, verify_first=True)
    return restore.restore(Repository(str(program.repository)), request, world)


@pytest.mark.parametrize("size", [SIZE, SIZE - 5 * MIB, SIZE + 5 * MIB])
@pytest.mark.parametrize("moment", TARGET_MOMENTS)
def test_another_disk_under_the_targets_node_is_not_written(moment, size, program, node, files, exchange):
    source, target, precious = files(SIZE, SIZE, size)
    point = program.backup(source)["point"]
    disk, held = exchange(target), (sha(target), sha(precious))
    act = Once(lambda: disk.now(precious))
    with pytest.raises((BadTarget, Refused)):
        attempt(program, point, node, moment, act)
    assert act.done
    assert (sha(target), sha(precious)) == held
    # Looked at anew, it is a target as any other.
    if size >= SIZE:
        program.restore(point, node)


@pytest.mark.parametrize("kind", ["file", "device"])
@pytest.mark.parametrize("moment", TARGET_MOMENTS)
def test_a_target_that_is_mounted_meanwhile_is_not_written(moment, kind, loop, program, files, tmp_path):
    source, image = files(SIZE, SIZE)
    point = program.backup(source)["point"]
    run("mkfs.ext4", "-q", "-F", image)
    target = loop(SIZE, file=image).path if kind == "device" else image
    held = sha(image)
    with ExitStack() as others:

        def use():
            device = others.enter_context(attached(image)) if kind == "file" else target
            others.enter_context(mounted(device, tmp_path / "used", "-o", "ro,noload"))

        act = Once(use)
        with pytest.raises(TargetInUse):
            attempt(program, point, target, moment, act)
        assert act.done
    assert sha(image) == held
    assert settle(lambda: not usage.users(devices.look(str(target))))
    program.restore(point, target)
    assert sha(image) == sha(source)
