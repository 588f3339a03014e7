"""The journal of what is stopped: what any damage and any power cut leave of it, and the unit that reads it at boot."""

from __future__ import annotations

import contextlib
import errno
import os
from contextlib import ExitStack
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import StateUnusable
from blockbak.host import bootunit, journal
from blockbak.host.kernel import Kernel
from blockbak.model import quiesce as plans
from tests.doubles import Killed
from tests.faults import FaultyKernel, PowerCut, ShortKernel

STEPS = (
    plans.RunHook("shop", "/usr/local/sbin/shop", (("BLOCKBAK_MODE", "cold"),)),
    plans.StopUnits(("db.service", "db.socket"), ("db.service",)),
    plans.EndProcess(77, 12345, "sh"),
    plans.Unexport("10.0.0.0/8", "/srv/a b", "rw,sync"),
    plans.SwapOff("/dev/sda3", -2, "id", ("/dev/sdb1",)),
    plans.Unmount("/srv/\udce4", "/dev/sda1", "ext4", ("rw", "noatime", "rw"), "/", "", "id", "shared:3"),
    plans.DetachLoop("/dev/loop0", "/srv/disk.img", 4096, 1 << 20, 4096, read_only=True),
    plans.ReadOnly("/var", "/dev/sda5", "id"),
    plans.Freeze("/home", "/dev/sda6"),
    plans.Deactivate("vg", ("vg/a", "vg/b")),
)
FACTS = {"boot": "this", "host": "here", "device": "/dev/sda"}


def written_to(directory, steps=STEPS, back=(), kernel=None, run_id="5a4e"):
    kernel = kernel or Kernel()
    with journal.alone(str(directory), kernel) as place, ExitStack() as stack:
        writer = stack.enter_context(journal.written(place, run_id, 1 << 16, kernel))
        writer.head(FACTS)
        for step in steps:
            writer.begin(step, {"count": 1})
        for number in back:
            writer.back(number)
        return writer.path


def test_it_gives_back_every_kind_of_step(tmp_path):
    assert {type(step) for step in STEPS} == set(plans.STEPS)
    path = written_to(tmp_path, back=(10, 9))
    with journal.taken(path, Kernel()) as held:
        found, writer = held
        assert tuple(one.step for one in found.begun) == STEPS
        assert [one.number for one in found.to_undo] == list(range(1, 9))
        assert (found.boot, found.host, found.device, found.run) == ("this", "here", "/dev/sda", "5a4e")
        assert (found.damage, found.newer) == ("", False)
        assert all(one.seen == {"count": 1} for one in found.begun)
        writer.back(8)
    with journal.taken(path, Kernel()) as held:
        assert [one.number for one in held[0].to_undo] == list(range(1, 8))
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700


def test_short_writes_are_whole_in_the_end(tmp_path, rng):
    path = written_to(tmp_path, kernel=ShortKernel(rng))
    with journal.taken(path, Kernel()) as held:
        assert tuple(one.step for one in held[0].begun) == STEPS


@given(st.data())
def test_of_damaged_bytes_only_whole_records_are_followed(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("journal")
    path = written_to(directory, back=(10,))
    with open(path, "rb") as file:
        good = file.read()
    end = good.index(b"\0")
    broken = bytearray(good)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, end - 1), st.integers(1, 255)), max_size=3)):
        broken[at] ^= value
    cut = data.draw(st.integers(0, end))
    broken[cut:] = bytes(len(broken) - cut)
    found, _ = journal.parse(path, bytes(broken))
    assert tuple(one.step for one in found.begun) == STEPS[: len(found.begun)]
    if bytes(broken[:cut]) == good[:cut]:
        assert found.damage == ""
        assert len(found.begun) >= good[:cut].count(b"\n") - 2


def test_any_flipped_bit_in_the_middle_is_told(tmp_path):
    path = written_to(tmp_path)
    with open(path, "rb") as file:
        good = file.read()
    last = good.rindex(b"\n", 0, good.index(b"\0") - 1)
    for at in range(0, last, 3):
        broken = bytearray(good)
        broken[at] ^= 1
        found, _ = journal.parse(path, bytes(broken))
        assert found.damage or found.newer or len(found.begun) == len(STEPS) - 1, at
        assert tuple(one.step for one in found.begun) == STEPS[: len(found.begun)]


def test_a_line_that_could_not_be_made_durable_leaves_nothing_behind_the_next(tmp_path):
    kernel = FaultyKernel()
    with (
        journal.alone(str(tmp_path), kernel) as place,
        journal.written(place, "a", 8192, kernel) as writer,
    ):
        writer.head({"boot": "b", "host": "h", "device": "/dev/sdb"})
        writer.begin(STEPS[0], {})
        kernel.call, kernel.number, kernel.at = "fsync", errno.EIO, kernel.count + 1
        with pytest.raises(StateUnusable):
            writer.begin(STEPS[1], {"active": ["db.service"] * 9})
        writer.back(2)
        with open(writer.path, "rb") as file:
            found, _ = journal.parse(writer.path, file.read())
        assert (found.damage, [one.number for one in found.to_undo]) == ("", [1])


def test_a_journal_is_nobody_elses_while_it_is_written(tmp_path):
    with (
        journal.alone(str(tmp_path), Kernel()) as place,
        journal.written(place, "a", 4096, Kernel()) as writer,
        journal.taken(writer.path, Kernel()) as held,
    ):
        assert held is None
    with journal.taken(writer.path, Kernel()) as held:
        assert held is not None
        held[1].remove()
        with journal.taken(writer.path, Kernel()) as second:
            assert second is None


def test_a_link_or_another_ones_file_is_no_journal(tmp_path):
    path = written_to(tmp_path)
    os.rename(path, tmp_path / "real")
    os.symlink(tmp_path / "real", path)
    with journal.taken(path, Kernel()) as held:
        assert held is None


@pytest.mark.parametrize("call", ["open", "mkdir", "lock", "allocate", "pwritev", "fsync"])
def test_what_fails_is_told_and_nothing_is_left_of_it(tmp_path, call):
    at = 1
    while True:
        place = tmp_path / f"{call}-{at}"
        place.mkdir()
        kernel = FaultyKernel(call, errno.ENOSPC, at)
        with contextlib.suppress(StateUnusable):
            written_to(place / "state", STEPS[:1], kernel=kernel)
            break
        at += 1
    assert at > 1


def test_after_a_power_cut_each_step_that_was_begun_is_known(tmp_path):
    at = 1
    while True:
        place = tmp_path / str(at)
        place.mkdir()
        kernel = PowerCut(at)
        known = 0
        try:
            with journal.alone(str(place), kernel) as folder, journal.written(folder, "a", 4096, kernel) as writer:
                writer.head(FACTS)
                for step in STEPS:
                    writer.begin(step, {})
                    known += 1
        except Killed:
            pass
        else:
            break
        kernel.lose(0)
        paths = journal.paths(str(place))
        if known:
            with journal.taken(paths[0], Kernel()) as held:
                assert held[0].damage == ""
                assert tuple(one.step for one in held[0].begun)[:known] == STEPS[:known]
        at += 1
    assert at > len(STEPS)


def test_room_is_for_all_steps():
    many = [plans.Unmount(f"/srv/{number:0200}", "/dev/sda1", "ext4", ("rw",)) for number in range(1000)]
    assert journal.room_for(STEPS) == journal.ROOM_LEAST
    assert journal.room_for(many) > sum(2 * 200 for _ in many) + journal.ROOM_LEAST
    assert journal.room_for(many) % 4096 == 0


# --- the unit for the boot -----------------------------------------------------------------------------------


def test_the_unit_runs_this_program_with_these_directories(tmp_path):
    state, run = str(tmp_path / 'st"a 100%'), str(tmp_path / "run")
    bootunit.write(str(tmp_path), state, run, ShortKernel(Random(1)))
    name = bootunit.name_for(state)
    assert os.readlink(tmp_path / "multi-user.target.wants" / name) == f"../{name}"
    text = (tmp_path / name).read_text()
    assert text == bootunit.text(state, run)
    assert '\\"a 100%%"' in text
    assert "recover --machine" in text
    # A oneshot would be waited for by units that it starts.
    assert "Type=exec" in text
    assert os.stat(tmp_path / name).st_mode & 0o777 == 0o644
    bootunit.write(str(tmp_path), state, run, Kernel())
    bootunit.remove(str(tmp_path), state, Kernel(), pytest.fail)
    assert sorted(os.listdir(tmp_path)) == ["multi-user.target.wants"]
    assert os.listdir(tmp_path / "multi-user.target.wants") == []
    bootunit.remove(str(tmp_path), state, Kernel(), pytest.fail)


def test_no_dollar_sign_is_doubled_in_the_program():
    unit = bootunit.text("/var/$a", "/run/b", "/opt/$c/python").splitlines()
    assert 'ExecStart="/opt/$c/python" -I -m blockbak recover --machine' in unit
    assert 'Environment="BLOCKBAK_STATE_DIR=/var/$a" "BLOCKBAK_RUN_DIR=/run/b"' in unit


def test_only_the_usual_state_directory_has_the_usual_name():
    assert bootunit.name_for("/var/lib/blockbak") == "blockbak-recover.service"
    assert bootunit.name_for("/var/lib/blockbak/") == "blockbak-recover.service"
    assert bootunit.name_for("/srv/one") != bootunit.name_for("/srv/two") != "blockbak-recover.service"
