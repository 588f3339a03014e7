"""The plan by which a device comes to rest: from who uses it to steps, in order, and what stands against it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model.quiesce import (
    Blocked,
    Deactivate,
    DetachLoop,
    EndProcess,
    Freeze,
    ReadOnly,
    RestOptions,
    RunHook,
    StopUnits,
    SwapOff,
    Unexport,
    Unmount,
    plan,
    remaining,
)
from blockbak.model.scene import Export, Layer, Loop, MountPoint, Occupant, Scene, SwapArea, Unit

NOTHING = RestOptions()


def mount(number, target, device="sdb1", parent=1, root="/", fstype="ext4", writable=True, sb=None):
    mode = "rw" if writable else "ro"
    return MountPoint(
        number, parent, device, target, root, fstype, f"/dev/{device}" if device else "tmpfs",
        (mode, "relatime", mode), writable, sb or f"8:{device or target}", f"id of {device}",
    )  # fmt: skip


def process(pid=100, mounts=(), writes=(), unit="", raw=(), protected="", elsewhere=()):
    return Occupant(
        pid, 7, "postgres", unit, frozenset(mounts), frozenset(writes), frozenset(raw), frozenset(raw),
        frozenset(elsewhere), ("working directory /srv",), protected,
    )  # fmt: skip


SRV = mount(10, "/srv")
BOUND = mount(11, "/mnt", root="/data")
INNER = mount(12, "/srv/cache", device="", parent=10, fstype="tmpfs")
DISK = Scene("/dev/sdb", "sdb", (Layer("sdb1", "/dev/sdb1", "partition", below=("sdb",)),), (SRV, BOUND, INNER))


def kinds(made):
    return [type(step) for step in made.steps]


def targets(made):
    return [step.target for step in made.steps if isinstance(step, Unmount)]


# --- mounts -------------------------------------------------------------------------------------------------


def test_an_idle_device_needs_nothing():
    made = plan(Scene("/dev/sdb", "sdb"), RestOptions(stop_users=True, kill=True, freeze=True, deactivate=True))
    assert (made.steps, made.blocked, made.staying, made.layers) == ((), (), {}, frozenset())


def test_mounts_go_children_first_and_a_bind_mount_knows_what_it_showed():
    made = plan(DISK, NOTHING)
    assert targets(made) == ["/srv/cache", "/mnt", "/srv"]
    assert [step.origin for step in made.steps] == ["", "/srv/data", ""]
    assert made.blocked == ()


def test_a_mount_where_somebody_sits_stays_read_only_with_all_it_stands_on():
    made = plan(replace(DISK, occupants=(process(mounts=[12]),)), NOTHING)
    assert targets(made) == ["/mnt"]
    assert [step.target for step in made.steps if isinstance(step, ReadOnly)] == ["/srv"]
    # The other mount of the file system is unmounted, but it is the same file system.
    assert made.staying["/srv"] == "read-only"
    assert made.blocked == ()


def test_what_is_read_only_already_is_left_so():
    scene = replace(DISK, mounts=(mount(10, "/srv", writable=False),), occupants=(process(mounts=[10]),))
    made = plan(scene, NOTHING)
    assert made.steps == ()
    assert made.staying == {"/srv": "read-only"}


def test_a_writer_stands_against_it_unless_it_may_be_frozen():
    scene = replace(DISK, occupants=(process(mounts=[10], writes=[10]),))
    (blocked,) = plan(scene, NOTHING).blocked
    assert blocked.what == "/srv"
    assert "process 100 (postgres)" in blocked.why
    assert "--freeze" in blocked.advice
    made = plan(scene, RestOptions(freeze=True))
    assert made.blocked == ()
    assert [step.target for step in made.frozen] == ["/srv"]
    assert made.staying == {"/srv": "frozen", "/mnt": "frozen"}


def test_what_cannot_be_frozen_is_not():
    scene = replace(
        DISK, mounts=(mount(10, "/srv", fstype="vfat"),), occupants=(process(mounts=[10], writes=[10]),)
    )  # fmt: skip
    (blocked,) = plan(scene, RestOptions(freeze=True)).blocked
    assert "freeze" not in blocked.advice


def test_what_holds_blockbak_or_its_repository_is_never_touched():
    made = plan(replace(DISK, kept={10: "the repository"}), RestOptions(freeze=True, kill=True, stop_users=True))
    assert Blocked("/srv", "it holds the repository", "keep that on another disk") in made.blocked
    assert "/srv" not in targets(made)
    assert not [step for step in made.steps if isinstance(step, (Freeze, ReadOnly)) and step.target == "/srv"]


def test_the_root_disk_is_told_the_ways_that_work():
    root = mount(10, "/")
    made = plan(replace(DISK, mounts=(root,), kept={10: "the running system"}, system=frozenset({10})), NOTHING)
    assert "--at-next-boot" in made.blocked[0].advice
    assert "hot" in made.blocked[0].advice


def test_what_a_program_serves_is_not_taken_off():
    """Nobody knows how it was started; and ended with its program, it would not come back."""
    scene = replace(DISK, mounts=(mount(10, "/srv", fstype="fuseblk"),))
    for asked in (NOTHING, RestOptions(kill=True, freeze=True, stop_users=True)):
        (blocked,) = plan(scene, asked).blocked
        assert (blocked.what, "program" in blocked.why) == ("/srv", True)


# --- processes and units ------------------------------------------------------------------------------------


UNIT = Unit("db.service", active=True, also=("db.socket",))


def test_a_unit_that_was_named_is_stopped_with_what_would_start_it_again():
    scene = replace(DISK, occupants=(process(mounts=[10], writes=[10], unit="db.service"),),
                    units={"db.service": UNIT})  # fmt: skip
    made = plan(scene, RestOptions(stop=("db.service",)))
    assert made.steps[0] == StopUnits(("db.service", "db.socket"), ("db.service",))
    assert targets(made) == ["/srv/cache", "/mnt", "/srv"]
    assert made.blocked == ()


def test_users_are_stopped_only_where_that_was_asked_for():
    scene = replace(DISK, occupants=(process(mounts=[10], writes=[10], unit="db.service"),),
                    units={"db.service": UNIT})  # fmt: skip
    assert plan(scene, NOTHING).blocked
    assert kinds(plan(scene, RestOptions(stop_users=True)))[0] is StopUnits


@pytest.mark.parametrize("also", [(), ("ssh.service",)])
def test_sshd_is_never_stopped_not_even_on_the_way(also):
    ssh = Unit("ssh.service", active=True, protected="people log in by it")
    units = {"ssh.service": ssh, "x.service": Unit("x.service", active=True, also=also)}
    named = "x.service" if also else "ssh.service"
    made = plan(replace(DISK, units=units), RestOptions(stop=(named,)))
    assert StopUnits not in kinds(made)
    assert "never stopped" in made.blocked[0].why


def test_a_unit_that_does_not_run_is_not_stopped_and_so_not_started():
    made = plan(
        replace(DISK, units={"db.service": Unit("db.service", active=False)}), RestOptions(stop=("db.service",))
    )
    assert StopUnits not in kinds(made)


def test_only_processes_that_may_be_ended_are():
    shell = process(pid=1, mounts=[10], protected="it is the first process")
    made = plan(replace(DISK, occupants=(shell, process(pid=7, mounts=[10], writes=[10]))), RestOptions(kill=True))
    assert [step.pid for step in made.steps if isinstance(step, EndProcess)] == [7]
    assert made.staying["/srv"] == "read-only"


def test_a_node_open_for_writing_stands_against_it_and_one_that_is_read_does_not():
    made = plan(Scene("/dev/sdb", "sdb", occupants=(process(raw=["sdb"]),)), NOTHING)
    assert made.blocked[0].what == "sdb"
    reader = Occupant(5, 1, "smartd", nodes=frozenset({"sdb"}))
    made = plan(Scene("/dev/sdb", "sdb", occupants=(reader,)), NOTHING)
    assert made.blocked == ()
    assert "smartd" in made.notes[0]


def test_a_mount_in_another_namespace_only_stands_against_it():
    made = plan(Scene("/dev/sdb", "sdb", occupants=(process(elsewhere=["/inner"]),)), NOTHING)
    assert made.blocked[0].what == "/inner"
    assert (
        plan(Scene("/dev/sdb", "sdb", occupants=(process(elsewhere=["/inner"]),)), RestOptions(kill=True)).blocked == ()
    )


# --- swap, loops, exports, groups ---------------------------------------------------------------------------


def test_swap_goes_where_memory_allows():
    scene = Scene(
        "/dev/sdb", "sdb", swaps=(SwapArea("/dev/sdb2", -2, 1 << 30, "id", 0, ("/dev/sdc",)),), memory=4 << 30
    )
    made = plan(scene, NOTHING)
    assert made.steps == (SwapOff("/dev/sdb2", -2, "id", ("/dev/sdc",)),)
    assert made.blocked == ()
    (blocked,) = plan(replace(scene, memory=1 << 30), NOTHING).blocked
    assert "1073741824 bytes" in blocked.why


def test_a_loop_device_goes_after_what_is_mounted_from_it_and_before_its_file():
    loop = Loop("loop7", "/dev/loop7", "/srv/x.img", 10, 512, 4096, 512)
    inner = mount(20, "/inner", device="loop7", sb="7:7")
    scene = Scene("/dev/sdb", "sdb", (Layer("loop7", "/dev/loop7", "loop"),), (SRV, inner), loops=(loop,))
    made = plan(scene, NOTHING)
    assert kinds(made) == [Unmount, DetachLoop, Unmount]
    assert targets(made) == ["/inner", "/srv"]
    assert made.layers == frozenset()


def test_a_busy_file_system_on_a_loop_device_keeps_the_one_below():
    loop = Loop("loop7", "/dev/loop7", "/srv/x.img", 10)
    inner = mount(20, "/inner", device="loop7", sb="7:7")
    scene = Scene("/dev/sdb", "sdb", (Layer("loop7", "/dev/loop7", "loop"),), (SRV, inner), loops=(loop,),
                  occupants=(process(mounts=[20], writes=[20]),))  # fmt: skip
    made = plan(scene, RestOptions(freeze=True))
    # What lies on top is frozen first: to be frozen it writes to what is below.
    assert [step.target for step in made.frozen] == ["/inner", "/srv"]
    assert made.layers == {"loop7"}


def test_exports_go_before_their_file_system():
    made = plan(replace(DISK, exports=(Export("10.0.0.0/8", "/srv", "rw", 10),)), NOTHING)
    assert kinds(made)[0] is Unexport


def test_a_group_is_deactivated_only_where_that_was_asked_for():
    layers = (Layer("dm-0", "vg/a", "volume", "vg", ("sdb",)), Layer("dm-1", "vg/b", "volume", "vg", ("sdb",)))
    scene = Scene("/dev/sdb", "sdb", layers)
    made = plan(scene, NOTHING)
    assert made.steps == ()
    assert made.layers == {"dm-0", "dm-1"}
    made = plan(scene, RestOptions(deactivate=True))
    assert made.steps == (Deactivate("vg", ("vg/a", "vg/b")),)
    assert made.layers == frozenset()


def test_hooks_come_first_of_all():
    hook = RunHook("db", "/etc/blockbak/cold.d/db")
    scene = replace(DISK, units={"db.service": UNIT})
    assert plan(scene, RestOptions(stop=("db.service",)), [hook]).steps[0] is hook


# --- always -------------------------------------------------------------------------------------------------


@st.composite
def scenes(draw):
    """Trees of mounts on one disk, with processes here and there."""
    # What a file system is, all of its mounts are.
    systems = {name: (draw(st.sampled_from(["ext4", "vfat"])), draw(st.booleans())) for name in ("", "sdb1", "sdb2")}
    mounts = []
    for number in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from([1, *[one.id for one in mounts]]))
        device = draw(st.sampled_from(["", "sdb1", "sdb2"]))
        fstype, writable = systems[device]
        mounts.append(mount(10 + number, f"/m{number}", device, parent, "/", fstype, writable))
    ids = [one.id for one in mounts]
    occupants = []
    for number in range(draw(st.integers(0, 3))):
        at = draw(st.sets(st.sampled_from(ids)))
        occupants.append(process(number + 2, at, draw(st.sets(st.sampled_from(sorted(at)))) if at else ()))
    kept = dict.fromkeys(draw(st.sets(st.sampled_from(ids), max_size=1)), "the repository")
    return Scene("/dev/sdb", "sdb", mounts=tuple(mounts), occupants=tuple(occupants), kept=kept)


options = st.builds(RestOptions, kill=st.booleans(), freeze=st.booleans())


@given(scenes(), options)
def test_nothing_is_unmounted_under_something_that_stays(scene, asked):
    made = plan(scene, asked)
    off = set(targets(made))
    for one in scene.mounts:
        below = scene.mount(one.parent)
        if one.target not in off and below is not None:
            assert below.target not in off


@given(scenes(), options)
def test_each_mount_goes_or_stays_still_or_is_told(scene, asked):
    made = plan(scene, asked)
    told = {one.what for one in made.blocked}
    still = {step.target for step in made.steps if isinstance(step, (ReadOnly, Freeze))}
    for one in scene.mounts:
        if not one.is_own or one.target in targets(made) or not one.writable:
            continue
        same = {other.target for other in scene.mounts if other.number == one.number}
        kept = {other.target for other in scene.mounts if other.id in scene.kept}
        assert same & (still | told | kept), (one, made)


@given(scenes(), options)
def test_a_plan_that_was_carried_out_leaves_nothing_to_object_to(scene, asked):
    made = plan(scene, asked)
    if made.blocked:
        return
    ended = {step.pid for step in made.steps if isinstance(step, EndProcess)}
    quiet = {step.target for step in made.steps if isinstance(step, ReadOnly)}
    numbers = {one.number for one in scene.mounts if one.target in quiet}
    mounts = tuple(
        replace(one, writable=one.writable and one.number not in numbers)
        for one in scene.mounts
        if one.target not in targets(made)
    )
    after = replace(scene, mounts=mounts, occupants=tuple(one for one in scene.occupants if one.pid not in ended))
    assert remaining(after, made) == []


def test_what_came_back_meanwhile_is_told():
    made = plan(DISK, NOTHING)
    assert [one.what for one in remaining(DISK, made)] == ["/srv", "/mnt"]
