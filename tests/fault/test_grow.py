"""The machine stops, or the disk fails, at any write or flush that moves a GPT: one of its copies is whole."""

from __future__ import annotations

import errno
import os
import subprocess

import numpy as np
import pytest

from blockbak.errors import TargetFailed, VerificationFailed
from blockbak.flow.grow import grow
from blockbak.host.blockio import TargetWriter
from blockbak.model import gpt
from blockbak.model.partition import parse
from tests.doubles import Killed
from tests.faults import FaultyKernel, QuickKernel
from tests.host.stage import MIB, put, run, sha
from tests.unit.test_gpt import disk_of

pytestmark = pytest.mark.root
OLD, NEW = 4 * MIB, 9 * MIB
MOST = 40


@pytest.fixture(params=[512, 4096])
def larger(request, loop):
    """A larger disk that a smaller one was restored to; its sectors; the way."""
    sector = request.param
    disk = disk_of(OLD // sector, sector, [(100, 300), (301, 900)])
    made = loop(NEW, sector_size=sector)
    put(made, 0, bytes(disk))
    put(made, 400 * sector, b"of a partition" * 100)
    growth = gpt.grown(lambda offset, length: bytes(disk[offset : offset + length]), sector, OLD, NEW)
    assert isinstance(growth, gpt.Growth)
    return made, sector, growth


def table(device, sector):
    """What is on the disk."""
    fd = os.open(device, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return parse(lambda offset, length: os.pread(fd, length, offset), sector, NEW)
    finally:
        os.close(fd)


def check(device, sector, *, mend):
    """One copy is whole, and sgdisk, which takes a second each time, brings the rest back from it."""
    found = table(device, sector)
    assert found.valid_primary or found.valid_backup
    assert [(one.number, one.start, one.length) for one in found.partitions] == [
        (1, 100 * sector, 201 * sector), (2, 301 * sector, 600 * sector),
    ]  # fmt: skip
    if not mend:
        return
    # It asks for no word of anybody, reads what there is and writes both copies anew.
    mended = subprocess.run(["sgdisk", "--move-second-header", device], capture_output=True, text=True, check=False)
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert "No problems found" in run("sgdisk", "--verify", device)
    assert [(one.start, one.length) for one in table(device, sector).partitions] == [
        (100 * sector, 201 * sector), (301 * sector, 600 * sector),
    ]  # fmt: skip


class Mortal(QuickKernel):
    """The machine stops at the n-th write or flush: a write is done whole, in part or not at all."""

    def __init__(self, at, share):
        self.at, self.share, self.calls = at, share, 0

    def _stops(self):
        self.calls += 1
        return self.calls >= self.at

    def pwritev(self, fd, buffers, offset):
        if self._stops():
            data = memoryview(buffers[0]).cast("B")
            whole = len(data) if self.share == "whole" else len(data) // 2 // 4096 * 4096
            if self.share != "nothing" and whole and self.calls == self.at:
                super().pwritev(fd, [data[:whole]], offset)
            raise Killed
        return super().pwritev(fd, buffers, offset)

    def fsync(self, fd):
        if self._stops():
            raise Killed


@pytest.mark.parametrize("share", ["nothing", "half", "whole"])
def test_whenever_the_machine_stops_one_copy_is_whole(larger, share):
    device, sector, growth = larger
    before = device.file.read_bytes()
    for at in range(1, MOST):
        put(device, 0, before)
        kernel = Mortal(at, share)
        try:
            with TargetWriter(str(device), kernel=kernel) as target:
                grow(growth, target)
        except Killed:
            check(device, sector, mend=share == "half")
        else:
            assert at > 2 * len(growth.writes)
            break
    else:
        pytest.fail("it never ended")


@pytest.mark.parametrize("call", ["pwritev", "fsync", "preadv"])
def test_whichever_call_fails_one_copy_is_whole_and_the_error_says_so(larger, call):
    device, sector, growth = larger
    before = device.file.read_bytes()
    for at in range(1, MOST):
        put(device, 0, before)
        kernel = FaultyKernel(call, errno.EIO, at)
        failed = None
        try:
            with TargetWriter(str(device), kernel=kernel) as target:
                grow(growth, target)
        except TargetFailed as error:
            failed = error
        assert kernel.fired is (failed is not None)
        if failed is None:
            assert at > len(growth.writes)
            return
        assert any("one of the two copies" in note for note in failed.__notes__)
        assert not kernel.wrongs
        check(device, sector, mend=False)
    pytest.fail("it never ended")


def test_each_write_is_durable_before_the_next_begins(larger):
    device, _, growth = larger
    kernel = FaultyKernel()
    with TargetWriter(str(device), kernel=kernel) as target:
        grow(growth, target)
    calls = [call for call, _ in kernel.log if call in ("pwritev", "fsync")]
    assert calls == ["pwritev", "fsync"] * len(growth.writes)


class Forgetful(QuickKernel):
    """A disk that says it has written, and has not."""

    def pwritev(self, fd, buffers, offset):
        if offset == 0:
            return sum(len(memoryview(one).cast("B")) for one in buffers)
        return super().pwritev(fd, buffers, offset)


def test_a_disk_that_does_not_keep_it_is_noticed(larger):
    device, _, growth = larger
    with pytest.raises(VerificationFailed), TargetWriter(str(device), kernel=Forgetful()) as target:
        grow(growth, target)


def test_only_what_it_says_is_written(larger):
    device, _, growth = larger
    before = np.frombuffer(device.file.read_bytes(), np.uint8).copy()
    for offset, data in growth.writes:
        before[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    with TargetWriter(str(device)) as target:
        grow(growth, target)
    assert device.file.read_bytes() == before.tobytes()
    assert sha(device) == sha(device.file)
