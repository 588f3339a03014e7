"""Any history of a volume, with an oracle that keeps the bytes of every point.

A rule is what a person, a timer or an accident does. After each, every point that the repository lists
must be one the oracle knows; restoring shows that it holds the right bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockbak.errors import NothingToMerge, NoUsableParent, PointNeeded
from blockbak.flow import backup, delete, recover, restore, synthesize, verify
from blockbak.flow.context import Context
from blockbak.host.kernel import Kernel
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB
from tests.doubles import Killed, MortalKernel, context, new_repository
from tests.volumes import SECTION

BLOCK = 4 * KIB
VOLUME = "vol"

# On both sides of a section's end.
sizes = st.sampled_from(
    [1, 511, BLOCK, BLOCK + 1, 256 * KIB, 300_001, MIB + 513, 4 * MIB + 4097, SECTION - 7, SECTION + 9 * BLOCK + 3]
)
# Where things happen: anywhere, but more often at the edges of blocks, windows, pieces and sections.
edges = [0, BLOCK, 256 * KIB, MIB, 4 * MIB, SECTION]
places = st.one_of(
    st.integers(0, SECTION + 10 * BLOCK),
    st.builds(lambda edge, off: max(edge + off, 0), st.sampled_from(edges), st.integers(-3, 3)),
)
lengths = st.sampled_from([1, 2, 511, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 256 * KIB, 300 * KIB + 5])


class Histories(RuleBasedStateMachine):
    """One source file, one repository, one target."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp(prefix="history-")
        self.source = os.path.join(self.folder, "source.img")
        self.target = os.path.join(self.folder, "target.img")
        self.held: dict[str, bytes] = {}
        self.maybe: dict[str, bytes] = {}
        self.kinds: dict[str, str] = {}
        self.world = context(os.path.join(self.folder, "state"))

    def teardown(self) -> None:
        for point in self.held:
            self.restored(point, self.world)
        shutil.rmtree(self.folder)

    # --- the source ----------------------------------------------------------------------------------

    @initialize(size=sizes, seed=st.integers(0, 2**32))
    def begin(self, size, seed):
        with open(self.source, "xb") as file:
            file.truncate(size)
        self.seed = seed
        self.repository = new_repository(os.path.join(self.folder, "repo"))

    def bytes_now(self) -> bytes:
        with open(self.source, "rb") as file:
            return file.read()

    def put(self, at, data):
        size = os.path.getsize(self.source)
        at %= size
        with open(self.source, "r+b") as file:
            file.seek(at)
            file.write(data[: size - at])

    @rule(at=places, length=lengths, letter=st.integers(1, 255))
    def write(self, at, length, letter):
        """Bytes that compress well."""
        self.put(at, bytes([letter]) * length)

    @rule(at=places, length=lengths)
    def write_noise(self, at, length):
        """Bytes that do not compress."""
        self.seed += 1
        self.put(at, __import__("random").Random(self.seed).randbytes(length))

    @rule(at=places, bit=st.integers(0, 7))
    def flip(self, at, bit):
        """One bit."""
        at %= os.path.getsize(self.source)
        with open(self.source, "r+b") as file:
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            file.write(bytes([old ^ 1 << bit]))

    @rule(at=places, length=lengths)
    def zero(self, at, length):
        self.put(at, bytes(length))

    @rule(at=places, length=lengths)
    def discard(self, at, length):
        with open(self.source, "r+b") as file:
            at %= os.path.getsize(self.source)
            Kernel().punch(file.fileno(), at, length)

    @rule(size=sizes)
    def resize(self, size):
        os.truncate(self.source, size)

    # --- points --------------------------------------------------------------------------------------

    def request(self, kind, compress="zstd"):
        return backup.Request(self.source, kind=kind, name=VOLUME, block_bytes=BLOCK, compress=compress)

    @rule(kind=st.sampled_from(["auto", "full"]), compress=st.sampled_from(["none", "zstd"]))
    def back_up(self, kind, compress):
        made = backup.backup(self.repository, self.request(kind, compress), self.world)
        assert made.kind == "full" or kind == "auto"
        self.made(made)

    @rule(kind=st.sampled_from(["incremental", "differential"]), compress=st.sampled_from(["none", "zstd"]))
    def back_up_a_delta(self, kind, compress):
        """Refused where nothing can be its parent, and only there."""
        points = self.points()
        size = os.path.getsize(self.source)
        wanted = [point for point in points if kind == "incremental" or point.has_full]
        possible = bool(wanted) and len(self.held[wanted[-1].id]) == size
        try:
            made = backup.backup(self.repository, self.request(kind, compress), self.world)
        except NoUsableParent:
            assert not possible
        else:
            assert possible
            assert made.kind == kind
            assert made.parent == wanted[-1].id
            self.made(made)

    def made(self, made):
        self.held[made.point] = self.bytes_now()
        assert made.device_bytes == len(self.held[made.point])
        assert made.sequence > max(self.sequences or [0])
        self.sequences.append(made.sequence)
        assert made.consistency == "cold"
        assert not made.attention

    sequences: list[int]

    @initialize()
    def no_sequence_yet(self):
        self.sequences = []

    @precondition(lambda self: self.held)
    @rule(data=st.data(), kind=st.sampled_from(["full", "full", "differential"]))
    def synthesize(self, data, kind):
        point = data.draw(st.sampled_from(self.points()))
        try:
            made = synthesize.synthesize(self.repository, VOLUME, self.world, at=point.id, kind=kind)
        except NothingToMerge:
            assert kind == "differential"
            return
        assert made.point.kind == kind
        assert made.point.point == point.id
        assert made.written or any(image.opening.kind == kind for image in point.images)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def delete(self, data):
        """Refused only where a kept point would be lost, and then nothing is gone."""
        names = [point.id for point in self.points()]
        gone = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
        refusal = None
        try:
            delete.delete(self.repository, sorted(gone), self.world)
        except PointNeeded as error:
            refusal = error
        if refusal is None:
            for point in gone:
                del self.held[point]
            return
        assert refusal.fields["point"] in gone
        assert refusal.fields["needed_by"] not in gone
        assert {point.id for point in self.points()} == set(names)

    # --- accidents -----------------------------------------------------------------------------------

    def dying(self, at) -> Context:
        from dataclasses import replace

        return replace(self.world, kernel=MortalKernel(at))

    def as_killed(self, kernel_context) -> Repository:
        return Repository(self.repository.path, kernel_context.kernel)

    @rule(at=st.integers(2, 60), kind=st.sampled_from(["auto", "full"]))
    def killed_in_a_backup(self, at, kind):
        """It left a point, an orphan, a partial or nothing: never half a point."""
        world = self.dying(at)
        before = {point.id for point in self.points()}
        try:
            made = backup.backup(self.as_killed(world), self.request(kind), world)
        except Killed:
            now = {point.id for point in self.points()} - before
            assert len(now) <= 1
            for point in now:
                self.held[point] = self.bytes_now()
            orphans = self.catalog().orphans if os.path.isdir(os.path.join(self.repository.path, VOLUME)) else []
            for file in orphans:
                self.maybe.setdefault(file[:21], self.bytes_now())
        else:
            self.made(made)

    @precondition(lambda self: self.held)
    @rule(at=st.integers(2, 60), data=st.data())
    def killed_in_a_synthesis(self, at, data):
        world = self.dying(at)
        point = data.draw(st.sampled_from(self.points()))
        try:
            synthesize.synthesize(self.as_killed(world), VOLUME, world, at=point.id)
        except Killed:
            assert {one.id for one in self.points()} == set(self.held)

    @precondition(lambda self: self.held)
    @rule(at=st.integers(2, 40), data=st.data())
    def killed_in_a_deletion(self, at, data):
        """Points are gone or there; those that were to stay are there."""
        world = self.dying(at)
        names = [point.id for point in self.points()]
        gone = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
        try:
            delete.delete(self.as_killed(world), sorted(gone), world)
        except PointNeeded:
            return
        except Killed:
            pass
        left = {point.id for point in self.points()}
        assert set(names) - gone <= left
        for point in set(names) - left:
            del self.held[point]

    @precondition(lambda self: self.held)
    @rule(at=st.integers(2, 40), data=st.data())
    def killed_in_a_restore(self, at, data):
        """The target is worth nothing then; the repository is as it was."""
        world = self.dying(at)
        point = data.draw(st.sampled_from(self.points()))
        request = restore.Request(point.id, self.target, overwrite=True)
        existed = os.path.exists(self.target)
        try:
            restore.restore(self.as_killed(world), request, world)
        except Killed:
            # A new file gets its name only when it is whole.
            if not existed and os.path.exists(self.target):
                self.same(point.id)

    @rule()
    def recover(self):
        report = recover.recover(self.repository, self.world)
        assert report.left == []
        for point in report.adopted:
            self.held.setdefault(point, self.maybe.get(point, b""))
        if os.path.isdir(os.path.join(self.repository.path, VOLUME)):
            assert self.catalog().leftovers == 0

    # --- what must be so -----------------------------------------------------------------------------

    def catalog(self):
        return self.repository.volume(VOLUME).catalog()

    def points(self):
        return self.catalog().points if VOLUME in self.repository.volume_names() else []

    def same(self, point):
        with open(self.target, "rb") as file:
            assert file.read() == self.held[point], f"{point} was restored with other bytes"

    def restored(self, point, world):
        done = restore.restore(self.repository, restore.Request(point, self.target, overwrite=True), world)
        assert not done.attention
        self.same(point)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def restore_to_a_new_file(self, data):
        if os.path.exists(self.target):
            os.unlink(self.target)
        self.restored(data.draw(st.sampled_from(sorted(self.held))), self.world)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def restore_onto_what_is_there(self, data):
        """Another point, half a restore, or nothing."""
        self.restored(data.draw(st.sampled_from(sorted(self.held))), self.world)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=sizes)
    def restore_onto_noise(self, data, size):
        with open(self.target, "wb") as file:
            file.write(b"\xa5" * size)
        self.restored(data.draw(st.sampled_from(sorted(self.held))), self.world)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def roll_back(self, data):
        """The source becomes what it was."""
        point = data.draw(st.sampled_from(sorted(self.held)))
        restore.restore(self.repository, restore.Request(point, self.source, overwrite=True), self.world)
        assert self.bytes_now() == self.held[point]

    @rule()
    def everything_verifies(self):
        report = verify.verify(self.repository, [], self.world, pick=lambda: 0.0)
        assert [verdict for verdict in report.images if not verdict.ok] == []
        assert {verdict.point for verdict in report.images} == set(self.held)

    @invariant()
    def the_points_are_those_made(self):
        if not hasattr(self, "repository"):
            return
        assert [point.id for point in self.points()] == sorted(self.held)
        if VOLUME in self.repository.volume_names():
            assert self.catalog().damage == []


@pytest.mark.slow
def test_histories():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
