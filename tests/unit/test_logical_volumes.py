"""What is decided about logical volumes, from recorded reports of LVM: how they are listed, made and told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from blockbak.errors import DamagedImage, NoPoolRoom, NotSnapshotable
from blockbak.flow.into_lvm import taken
from blockbak.flow.offer import offer
from blockbak.flow.source import activation_needed
from blockbak.host import snapshots, usage
from blockbak.host.device import Device, block, is_inner
from blockbak.host.usage import Use
from blockbak.host.volumes import thin_pool_label
from blockbak.model import snapshot, twins
from blockbak.model.filesystem import PhysicalVolume, physical_volume
from blockbak.model.hashmap import BLOCKS_PER_SECTION, Geometry
from blockbak.model.part import Part
from tests.unit.test_identity import Tree
from tests.unit.test_partition import lvm, reader

KIB, MIB = 1 << 10, 1 << 20
RECORDED = Path(__file__).parents[1] / "golden" / "lvm"
VOLUMES = {one.name: one for one in snapshot.parse_volumes((RECORDED / "lvs.json").read_text())}
MOUNTED = [Use("mounted", "mounted at /srv")]


def known(name, **changed):
    """A recorded volume, with facts changed."""
    return replace(VOLUMES[name], **changed)


# --- how they are listed ------------------------------------------------------------------------------------


def offered(name, uses, pool=None, **changed):
    one = known(name, **changed)
    device = Device(
        "/dev/dm-9", "", is_block=True, size=one.size, kind="dm", lv_uuid=one.uuid, vg=one.group, lv=one.name
    )
    return offer(device, uses, one, pool, f"{one.group}/{one.pool}" if one.pool else "")


def test_a_thick_volume_is_taken_hot_while_its_group_has_room():
    found = offered("two-x.y", MOUNTED)
    assert (found.mode, found.snapshot_room, found.thin_pool) == ("hot", 188743680, "")
    assert found.reason == "in use: mounted at /srv"
    assert offered("two-x.y", []).mode == "cold"


def test_without_room_it_is_refused_with_the_numbers():
    found = offered("two-x.y", MOUNTED, free=4 * MIB)
    assert (found.mode, found.snapshot_room) == ("refused", 4 * MIB)
    assert "data-a.b has 4194304 bytes free, a snapshot needs 33554432" in found.reason
    # Without a snapshot there is nothing that could be short.
    assert offered("two-x.y", [], free=4 * MIB).mode == "cold"


def test_a_thick_snapshot_cannot_be_snapshotted():
    found = offered("snap", MOUNTED)
    assert (found.mode, found.snapshot_room) == ("refused", None)
    assert "it is itself a snapshot" in found.reason
    assert offered("snap", []).mode == "cold"


@pytest.mark.parametrize(
    ("percents", "mode", "words"),
    [
        ((2.5, 10.94), "hot", ""),
        ((95.0, 10.94), "refused", "data-a.b/pool is 95 % full (data)"),
        ((2.5, 97.25), "refused", "data-a.b/pool is 97.25 % full (metadata)"),
        ((None, None), "refused", "data-a.b/pool is not active"),
    ],
)
def test_a_thin_volume_takes_its_room_from_its_pool(percents, mode, words):
    pool = known("pool", data_percent=percents[0], metadata_percent=percents[1])
    found = offered("th", MOUNTED, pool)
    assert (found.mode, found.thin_pool) == (mode, "data-a.b/pool")
    assert words in found.reason
    free = None if percents[0] is None else int(200 * MIB * (100 - percents[0]) / 100)
    assert found.snapshot_room == free


def test_without_lvm_the_kernels_word_has_to_do():
    one = known("th")
    device = Device(
        "/dev/dm-9", "", is_block=True, size=one.size, kind="dm", lv_uuid=one.uuid, vg=one.group, lv=one.name
    )
    found = offer(device, MOUNTED, None, None, "data-a.b/pool")
    assert (found.mode, found.thin_pool, found.snapshot_room) == ("hot", "data-a.b/pool", None)


class PoolStatus:
    """What the kernel tells of a thin pool."""

    def __init__(self, parameters):
        self._told = SimpleNamespace(kind="thin-pool", parameters=parameters)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def status(self, _):
        return [self._told]


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ("1 117/1024 1024/1024 - out_of_data_space discard_passdown error_if_no_space - 256", NoPoolRoom),
        ("1 117/1024 100/1024 - ro discard_passdown error_if_no_space needs_check 256", NotSnapshotable),
    ],
)
def test_a_pool_that_takes_no_writes_needs_room_only_where_it_is_full(monkeypatch, parameters, error):
    monkeypatch.setattr(snapshots, "Mapper", lambda: PoolStatus(parameters))
    monkeypatch.setattr(snapshots, "pool_bytes", lambda *_: 64 * MIB)
    with pytest.raises(error):
        snapshots.planned_size(known("th"), None)


# --- what the kernel shows of them ----------------------------------------------------------------------------


@pytest.fixture
def stack(tmp_path):
    """An origin with a snapshot, a thin volume with its pool, a plain volume and a mirror, as sysfs shows them."""
    tree = Tree(tmp_path)
    vg, uuids = "V" * 32, (letter * 32 for letter in "abcdefgh")
    tree.add("sda")

    def mapped(number, name, over, uuid, suffix=""):
        tree.add(f"dm-{number}", over=over, **{"dm/name": name, "dm/uuid": f"LVM-{vg}{uuid}{suffix}"})

    origin, copy, pool, thin, plain = (next(uuids) for _ in range(5))
    mapped(0, "a--b-ori.g-real", ["sda"], origin, "-real")
    mapped(1, "a--b-ori.g", ["dm-0"], origin)
    mapped(2, "a--b-sn--ap-cow", ["sda"], copy, "-cow")
    mapped(3, "a--b-sn--ap", ["dm-0", "dm-2"], copy)
    mapped(4, "a--b-po--ol-tpool", ["sda"], pool, "-tpool")
    mapped(5, "a--b-po--ol", ["dm-4"], pool, "-pool")
    mapped(6, "a--b-thin", ["dm-4"], thin)
    mapped(7, "a--b-plain", ["sda"], plain)
    # One leg of a mirror, and a volume that holds another group's.
    mapped(8, "a--b-mir_mimage_0", ["sda"], next(uuids))
    mapped(9, "a--b-mir", ["dm-8"], next(uuids))
    tree.add("dm-10", over=["dm-7"], **{"dm/name": "guest-root", "dm/uuid": "LVM-" + "W" * 32 + "a" * 32})
    return tree.system()


def test_what_depends_on_a_volume_is_seen(stack):
    found = {name: usage.snapshots(block(name, stack), stack) for name in (f"dm-{number}" for number in range(8))}
    assert found["dm-1"] == "its snapshot a-b/sn-ap would overflow and be lost"
    assert found["dm-3"].startswith("it is a snapshot")
    assert not any(found[name] for name in ("dm-0", "dm-2", "dm-4", "dm-5", "dm-6", "dm-7"))


def test_inner_parts_are_told_from_volumes(stack):
    inner = [name for name in stack.names if is_inner(name, stack)]
    assert sorted(inner) == ["dm-0", "dm-2", "dm-4", "dm-5", "dm-8"]


def test_a_thin_volume_is_known_by_what_it_lies_on(stack):
    labels = {name: thin_pool_label(block(name, stack), stack) for name in ("dm-6", "dm-7", "dm-1", "sda")}
    assert labels == {"dm-6": "a-b/po-ol", "dm-7": "", "dm-1": "", "sda": ""}


# --- how they are made ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("vg/lv", ("vg", "lv")),
        ("/dev/v-g.1/l+v_2.x-y", ("v-g.1", "l+v_2.x-y")),
        *((path, ("", "")) for path in ("lv", "vg/", "/lv", "vg/a/b", "-vg/lv", "vg/-lv", "vg/.", "vg/..", "vg/l v")),
    ],
)
def test_names_are_taken_apart(path, names):
    assert snapshot.as_label(path) == names


def test_a_group_is_read_from_a_line_for_each_disk():
    group = snapshot.parse_group((RECORDED / "vgs.json").read_text())
    assert group == snapshot.Group("data-a.b", 197132288, 4 * MIB, ("/dev/loop1", "/dev/loop2"))
    assert snapshot.parse_group('{"report": [{"vg": []}]}') is None


def test_a_pool_tells_its_unit_and_whether_it_zeroes():
    recorded = (RECORDED / "pool.json").read_text()
    assert snapshot.parse_pool_blocks(recorded) == (64 * KIB, True)
    assert snapshot.parse_pool_blocks(recorded.replace('"zero":"zero"', '"zero":""')) == (64 * KIB, False)


class View:
    """A point of which only the stored blocks are known; None stands for a damaged section."""

    def __init__(self, block, *sections):
        self.geometry = Geometry(len(sections) * BLOCKS_PER_SECTION * block - 100, block, max(block, 256 * KIB))
        self._sections = sections

    def section(self, number):
        blocks = self._sections[number]
        if blocks is None:
            raise DamagedImage(file="v.zst", reason="of a test")
        stored = np.zeros(self.geometry.section_blocks(number), bool)
        stored[list(blocks)] = True
        return SimpleNamespace(stored=stored)


@pytest.mark.parametrize(
    ("unit", "sections", "units"),
    [
        (64, [[0, 1, 5], []], 3),
        (128, [[0, 1, 5], []], 2),
        (192, [[2, 3], []], 2),
        (32, [[0], []], 2),
        (96, [[1], []], 2),  # it begins in one unit and ends in the next
        (1 << 20, [[0, 4095], [0], [9]], 1),  # larger than a section
        (128, [None, [0]], 1),
        (64, [[]], 0),
    ],
)
def test_content_takes_whole_units_each_once(unit, sections, units):
    view = View(64 * KIB, *sections)
    assert taken(view, unit * KIB, Part(0, view.geometry.device_bytes)) == units * unit * KIB


def test_the_shorter_last_block_takes_no_more_than_it_holds():
    # 64 KiB less 100 bytes: the last 4 KiB unit is begun.
    view = View(64 * KIB, [BLOCKS_PER_SECTION - 1])
    assert taken(view, 4 * KIB, Part(0, view.geometry.device_bytes)) == 64 * KIB


def test_a_pool_is_short_only_where_that_is_sure():
    use = snapshot.PoolUse(10, 1000, 600, 1000, writable=True)
    reserve = snapshot.pool_reserve(1000 * MIB)
    assert snapshot.surely_short(use, 1000 * MIB, 400 * MIB - reserve) is None
    assert snapshot.surely_short(use, 1000 * MIB, 400 * MIB) == (400 * MIB, 400 * MIB + reserve)


def test_what_is_on_its_way_to_a_pool_counts_before_it_is_full():
    use = snapshot.PoolUse(10, 1000, 900, 1000, writable=True)
    reserve = snapshot.pool_reserve(1000 * MIB)
    assert snapshot.pool_gives_out(use, 1000 * MIB) == ""
    assert snapshot.pool_gives_out(use, 1000 * MIB, 100 * MIB - reserve) == ""
    assert snapshot.pool_gives_out(use, 1000 * MIB, 100 * MIB - reserve + 1) == "data"


@pytest.mark.parametrize(
    ("kind", "status", "mapped"),
    [("thin", "35584 409599", 35584 * 512), ("thin", "0 -", 0), ("thin", "Fail", 0), ("error", "", 0)],
)
def test_a_thin_volume_tells_what_it_holds(kind, status, mapped):
    assert snapshot.parse_thin(kind, status) == mapped


@pytest.mark.parametrize(("attr", "flags"), [("-wi-------", "-ay"), ("Vwi---tz-k", "-ay -K")])
def test_how_to_activate_depends_on_the_flag_that_skips_it(attr, flags):
    error = activation_needed(known("off", attr=attr))
    assert "data-a.b/off is inactive" in str(error)
    assert f"lvchange {flags} data-a.b/off" in error.hint


# --- physical volumes twice -----------------------------------------------------------------------------------


POINT = PhysicalVolume("pv-1", "vg", "vg-1")


@pytest.mark.parametrize(
    ("point", "present", "words"),
    [
        (POINT, [], ""),
        (POINT, [PhysicalVolume("pv-2", "other", "vg-2"), PhysicalVolume("pv-3", "")], ""),
        (POINT, [PhysicalVolume("pv-2", "other", "vg-2"), POINT], "physical volume pv-1 of volume group vg, and so is"),
        (PhysicalVolume("pv-1", ""), [PhysicalVolume("pv-1", "")], "physical volume pv-1, and so is"),
        (POINT, [PhysicalVolume("pv-2", "vg", "vg-2")], "another one of that name"),
        (POINT, [PhysicalVolume("pv-2", "vg", "vg-1")], "missing physical volume"),
        (PhysicalVolume("pv-1", "(named on another disk)"), [PhysicalVolume("pv-2", "(named on another disk)")], ""),
    ],
)
def test_twins_are_told_with_what_to_do(point, present, words):
    found = twins.warnings(point, [(f"/dev/sd{letter}", one) for letter, one in zip("bc", present, strict=False)], "T")
    assert len(found) == bool(words)
    for line in found:
        assert words in line
        assert "vgimportclone T" in line
        assert "lvmdevices" in line


def test_a_label_tells_the_groups_uuid():
    data = lvm("vg-data")
    assert physical_volume(reader(data)) == PhysicalVolume("abcdef-ghij-klmn-opqr-stuv-wxyz-012345", "vg-data")
    uuid = "azLLK4-qRI2-jYQZ-kX0g-MWJA-tLe3-rymEc4"
    text = f'vg-data {{\nid = "{uuid}"\n'.encode()
    data[4096 + 512 : 4096 + 512 + len(text)] = text
    assert physical_volume(reader(data)).group_uuid == uuid
    assert physical_volume(reader(bytes(MIB))) is None
