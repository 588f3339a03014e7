"""The n-th call of each kind fails, for n = 1, 2, 3 … until a run comes through without meeting the fault.

Each time: it ends with an error of blockbak's own, or well; earlier points are what they were; nothing half-made
is listed; no descriptor is left open; nothing that could not be flushed is used; and the same deed, without the
fault, succeeds by itself.
"""

import contextlib
import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak import repository
from blockbak.errors import BlockbakError, Damage, Interrupted, Refused
from blockbak.flow import backup, delete, restore, synthesize
from blockbak.host.kernel import Kernel
from blockbak.repository.local import FILE, Repository
from blockbak.repository.record import HEAD, HISTORY
from blockbak.units import KIB, MIB
from tests.conftest import SEED
from tests.faults import CALLS, FaultyKernel
from tests.scene import BLOCK, DEEDS, VOLUME, Scene, open_descriptors

SMALL, ROOMY = 75 * BLOCK + 3, 3 * 256 * KIB + 3
MOST = 200
"""A loop that goes on for longer does not end."""

# What each call may well say. ENOSPC of an fsync is a file system with delayed allocation.
NUMBERS = {
    "open": (errno.EMFILE, errno.EACCES, errno.EIO),
    "close": (errno.EIO,),
    "preadv": (errno.EIO,),
    "pwritev": (errno.EIO, errno.ENOSPC),
    "fsync": (errno.EIO, errno.ENOSPC),
    "truncate": (errno.EIO,),
    "rename": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "mkdir": (errno.ENOSPC,),
    "clone_range": (errno.EIO, errno.ENOSPC, errno.EOPNOTSUPP),
    "copy_range": (errno.EIO, errno.ENOSPC, errno.EXDEV),
    "punch": (errno.EIO, errno.EOPNOTSUPP),
    "zero_out": (errno.EIO, errno.EOPNOTSUPP),
    "device_size": (errno.EIO,),
    "sector_sizes": (errno.EIO,),
    "drop_cache": (errno.EIO,),
    "lock": (errno.ENOLCK,),
    "extents": (errno.EIO, errno.EOPNOTSUPP),
}
ALWAYS = ("open", "close", "preadv", "lock")
WRITES = ("pwritev", "fsync", "rename")
MET = {
    "backup-full": (*ALWAYS, *WRITES),
    "backup-incremental": (*ALWAYS, *WRITES),
    "synthesize": (*ALWAYS, *WRITES),
    "delete": (*ALWAYS, "fsync", "rename", "unlink", "extents"),
    "recover": (*ALWAYS, *WRITES, "unlink"),
    "prune": ("preadv", *WRITES, "unlink", "extents"),
    "restore-to-a-new-file": (*ALWAYS, *WRITES, "truncate", "drop_cache"),
    "restore-to-an-old-file": (*ALWAYS, "pwritev", "fsync", "truncate", "punch", "drop_cache"),
    "restore-to-a-device": (*ALWAYS, "pwritev", "fsync", "zero_out", "drop_cache", "device_size", "sector_sizes"),
    "restore-what-differs": (*ALWAYS, "pwritev", "fsync", "drop_cache"),
}
"""The calls that each deed makes: a loop that never meets its fault fails."""


def test_every_call_of_a_kernel_can_fail():
    methods = {name for name, value in vars(Kernel).items() if callable(value) and not name.startswith("_")}
    # The journal of a rest, which alone allocates, has a loop of its own.
    assert set(CALLS) == methods == {*NUMBERS, "allocate"}
    assert {name for name in methods if name in vars(FaultyKernel)} == methods


@pytest.fixture(scope="module")
def history(memory_for_module):
    """Three points in a small volume; the seed is always the same, for here it is the calls that vary."""
    return Scene.make(memory_for_module / "history", seed=1, size=SMALL)


@pytest.fixture(scope="module")
def roomy(memory_for_module):
    """The same with a run of zeros that is long enough for a device to be asked for zeros."""
    return Scene.make(memory_for_module / "roomy", seed=1, size=ROOMY)


def attempt(run, kernel):
    """Run it; what is wrong with the way it ended."""
    before = open_descriptors()
    wrong = []
    try:
        run(kernel)
    except Refused as error:
        wrong.append(f"it was refused, though it was the machine that failed: {error}")
    except BlockbakError as error:
        if error.exit_code not in (1, 4):
            wrong.append(f"exit {error.exit_code}: {error}")
        if error.exit_code == 4 and kernel.call not in ("open", "preadv", "close"):
            wrong.append(f"called damage, though only writing failed: {error}")
        if not kernel.fired:
            wrong.append(f"it failed without a fault: {error}")
    except Exception as error:  # noqa: BLE001 - whatever else it is, it is the finding
        wrong.append(f"{type(error).__name__} escaped: {error}")
    wrong += kernel.wrongs
    left = {fd: path for fd, path in open_descriptors().items() if before.get(fd) != path}
    for fd, path in left.items():
        wrong.append(f"{path} was left open")
        os.close(fd)
    return wrong


def after(deed, scene, kernel, before):
    """What is wrong with what was left."""
    try:
        scene.check_points(also=deed.also(scene), gone=deed.gone(scene), before=before)
        assert not scene.partial.exists()
        deed.repeat(scene)
        deed.done(scene)
        assert deed.name in ("delete", "prune") or before.items() <= scene.files().items(), "an older point was changed"
    except (AssertionError, BlockbakError, OSError) as error:
        return [f"afterwards: {type(error).__name__}: {error}"]
    return []


def throw(deed, history, folder, call, numbers):
    """Fail the n-th ``call`` for every n, with one error after the other; all that was wrong, and how often the fault
    was met.
    """
    template = history.copy(folder / "template")
    deed.ready(template)
    before = template.files()
    wrong = []
    for at in range(1, MOST):
        scene, number = template.copy(folder / str(at)), numbers[at % len(numbers)]
        deed.fresh(scene)
        kernel = FaultyKernel(call, number, at)
        found = attempt(
            lambda kernel, scene=scene: deed.run(scene, scene.repository(kernel), scene.world(kernel)), kernel
        )
        found += after(deed, scene, kernel, before)
        name = f"{call} {at} ({os.path.basename(kernel.what)}) fails with {errno.errorcode[number]}"
        wrong += [f"{name}: {text}" for text in found]
        shutil.rmtree(scene.folder)
        if not kernel.fired:
            break
    else:
        wrong.append(f"after {MOST} calls of {call} there was still one more")
    shutil.rmtree(template.folder)
    return wrong, at - 1


def in_turn(call):
    """The errors that the call may give: in a soak each of them by itself at every call, else one after the other."""
    numbers = NUMBERS[call]
    if os.environ.get("BLOCKBAK_SOAK"):
        return [(number,) for number in numbers]
    first = SEED % len(numbers)
    return [(*numbers[first:], *numbers[:first])]


def all_numbers(deed, history, folder, call):
    """Throw the errors that the call may give; what was wrong."""
    wrong = []
    for numbers in in_turn(call):
        place = folder / errno.errorcode[numbers[0]]
        place.mkdir()
        found, met = throw(deed, history, place, call, numbers)
        assert met > 0, f"{deed} makes no call of {call}"
        wrong += found
    return "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "call"),
    [(name, call) for name, calls in MET.items() for call in calls if name != "restore-to-a-device"],
)
def test_a_failing_call_costs_no_more_than_the_run(name, call, history, memory):
    assert all_numbers(DEEDS[name], history, memory, call) == ""


@pytest.mark.parametrize("call", MET["restore-to-a-device"])
def test_a_failing_call_costs_no_more_than_the_restore_to_a_device(call, roomy, memory, loop):
    history = Scene(roomy.folder, roomy.seed, roomy.held, roomy.names, {"target": loop(ROOMY + 509).path})
    assert all_numbers(DEEDS["restore-to-a-device"], history, memory, call) == ""


@pytest.mark.parametrize("call", ["clone_range", "pwritev"])
def test_a_failing_call_costs_no_more_than_the_synthesis_where_blocks_are_shared(call, loop, xfs):
    where = xfs(loop(300 * MIB)).where
    history = Scene.make(where / "history", seed=1, size=5 * 256 * KIB + 700, noise=True)
    assert all_numbers(DEEDS["synthesize"], history, where, call) == ""


def test_a_failing_copy_costs_no_more_than_the_synthesis_where_no_blocks_are_shared(loop, ext4):
    where = ext4(loop(64 * MIB)).where
    history = Scene.make(where / "history", seed=1, size=5 * 256 * KIB + 700, noise=True)
    assert all_numbers(DEEDS["synthesize"], history, where, "copy_range") == ""


# --- the beginnings: a repository, and a volume's first point -----------------------------------------


def loops(call, numbers, folder, run, check):
    """``run(kernel, place)`` with the n-th call failing, for every n, each in a place of its own; what was
    wrong with how it ended, or with what ``check(place)`` saw.
    """
    wrong = []
    for at in range(1, MOST):
        number = numbers[at % len(numbers)]
        place = folder / f"{errno.errorcode[numbers[0]]}-{at}"
        place.mkdir()
        kernel = FaultyKernel(call, number, at)
        found = attempt(lambda kernel, place=place: run(kernel, place), kernel)
        try:
            check(place)
        except (AssertionError, BlockbakError, OSError) as error:
            found.append(f"afterwards: {type(error).__name__}: {error}")
        name = f"{call} {at} ({os.path.basename(kernel.what)}) fails with {errno.errorcode[number]}"
        wrong += [f"{name}: {text}" for text in found]
        if not kernel.fired:
            break
    assert at > 1, f"no call of {call} was made"
    return wrong


@pytest.mark.parametrize("call", [*ALWAYS[:3], *WRITES, "mkdir"])
def test_a_failing_call_costs_no_more_than_the_init(call, memory):
    """What is left is a whole repository, or a directory that can become one."""

    def run(kernel, place):
        Scene(place, 1).create(kernel)

    def check(place):
        scene = Scene(place, 1)
        if not (scene.place / FILE).exists():
            scene.create()
        assert Repository(str(scene.place)).volume_names() == []
        package = Path(repository.__file__).parent
        for name in ("rescue.py", "RESTORE.txt"):
            assert (scene.place / name).read_bytes() == (package / name).read_bytes()
        assert set(os.listdir(scene.place)) == {FILE, "rescue.py", "RESTORE.txt"}

    wrong = [line for numbers in in_turn(call) for line in loops(call, numbers, memory, run, check)]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("call", [*ALWAYS, *WRITES, "mkdir"])
def test_a_failing_call_costs_no_more_than_the_first_backup(call, memory):
    """The volume is made on the way."""
    source = memory / "source.img"
    source.write_bytes(b"first" * 5000)

    def scene_at(place):
        return Scene(place, 1)

    def run(kernel, place):
        scene = scene_at(place)
        os.symlink(source, scene.source)
        scene.create()
        backup.backup(scene.repository(kernel), scene.request(), scene.world(kernel))

    def check(place):
        scene = scene_at(place)
        scene.check_points(also=source.read_bytes())
        made = scene.back_up()
        assert scene.restored(made.point) == source.read_bytes()
        assert scene.catalog().partials == []

    wrong = [line for numbers in in_turn(call) for line in loops(call, numbers, memory, run, check)]
    assert wrong == [], "\n".join(wrong)


# --- a person asks to stop --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MET if name != "restore-to-a-device"])
def test_a_run_that_is_interrupted_leaves_nothing_half_made(name, history, memory):
    """At every place where it looks whether it shall stop: exit 130, no partial, no descriptor, and it can be done again."""
    deed = DEEDS[name]
    template = history.copy(memory / "template")
    deed.ready(template)
    before = template.files()
    for at in range(1, MOST):
        scene, kernel, looks = template.copy(memory / str(at)), FaultyKernel(), itertools.count(1)
        deed.fresh(scene)

        def check(looks=looks, at=at):
            if next(looks) >= at:
                raise Interrupted(state="it was a test")

        world = replace(scene.world(kernel), check=check)
        try:
            deed.run(scene, scene.repository(kernel), world)
        except Interrupted as error:
            assert error.exit_code == 130  # noqa: PT017
        else:
            assert at > 1, "it never looks whether it shall stop"
            break
        assert (kernel.wrongs, kernel.close_left()) == ([], [])
        assert name in ("delete", "recover") or scene.catalog().partials == []
        assert not scene.partial.exists()
        assert (name != "restore-to-a-new-file") or not scene.target.exists()
        assert after(deed, scene, kernel, before) == [], f"interrupted at look {at}"


# --- what a failure must not be taken for ----------------------------------------------------------------


def test_running_out_of_descriptors_is_no_damage(history, memory):
    """EMFILE says nothing about the repository, and no full is made because of it."""
    before = history.files()
    for at in range(2, MOST):
        scene = history.copy(memory / str(at))
        kernel = FaultyKernel("open", errno.EMFILE, at)
        repository = scene.repository(kernel)
        said: list[str] = []
        try:
            made = backup.backup(repository, scene.request("auto"), scene.world(kernel, said.append))
        except BlockbakError as failed:
            assert (failed.exit_code, kernel.fired) == (1, True), f"open {at} of {kernel.what}: {failed}"  # noqa: PT017
            scene.check_points(also=scene.source.read_bytes(), before=before)
        else:
            assert made.kind == "incremental"
            if not kernel.fired:
                break
            # The point is there, and only its line in the history is not, or what that told of damage was not known.
            assert os.path.basename(kernel.what) in (HISTORY, HEAD), f"open of {kernel.what} failed without a word"
            assert made.attention or any("what was found damaged cannot be told" in sentence for sentence in said)


@pytest.mark.parametrize("what", ["restore", "synthesize"])
def test_the_newest_point_is_never_silently_an_older_one(what, history, memory):
    """Where the newest manifest cannot be read, ``latest`` is not the one before it."""
    scene = history.copy(memory / "scene")
    newest = scene.where / f"{scene.names[-1]}.incremental.json"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    deeds = {
        "restore": lambda: restore.restore(
            scene.repository(), restore.Request(f"{VOLUME}@latest", str(scene.target)), scene.world()
        ),
        "synthesize": lambda: synthesize.synthesize(scene.repository(), VOLUME, scene.world()),
    }
    with pytest.raises(Damage):
        deeds[what]()
    assert scene.restored(scene.names[1]) == scene.held[scene.names[1]]


def test_a_parent_is_not_deleted_while_its_child_cannot_be_read(history, memory):
    """For a moment the child's manifest gives EIO: its bytes are whole, and must stay restorable."""
    scene = history.copy(memory / "scene")
    for at in range(2, MOST):
        kernel = FaultyKernel("preadv", errno.EIO, at)
        repository = scene.repository(kernel)
        with contextlib.suppress(BlockbakError):
            delete.delete(repository, [scene.names[0]], scene.world(kernel))
        assert scene.listed() == scene.names, f"read {at}, of {kernel.what}, failed"
        if not kernel.fired:
            break
    scene.check_points()


def test_a_sequence_is_not_used_again_because_a_manifest_cannot_be_read(history, memory):
    scene = history.copy(memory / "scene")
    newest = scene.where / f"{scene.names[-1]}.incremental.json"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    made = scene.back_up()
    newest.write_bytes(whole)
    sequences = [point.sequence for point in scene.catalog().points]
    assert sequences == sorted(set(sequences))
    assert made.sequence == sequences[-1]
    scene.check_points()
