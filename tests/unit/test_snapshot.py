"""What is decided about snapshots, as functions of values: whether, how large, when to extend, what is ours."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import replace
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from blockbak.flow.hot import _RUN_DIGITS
from blockbak.host.scanners import RULE_PATH
from blockbak.host.system import lvm_names
from blockbak.model import snapshot as plan
from blockbak.model.snapshot import LogicalVolume, PoolUse, ThickUse
from blockbak.units import GIB, KIB, MIB, TIB, parse_size

HOST, BOOT, RUN = "host.example", "6c8b2f3a-0000-4000-8000-000000000001", "0badc0de"

VOLUME = LogicalVolume(
    group="vg", group_uuid="G", free=64 * GIB, lvm_extent=4 * MIB, name="data", uuid="U", attr="owi-aos---",
    size=20 * GIB, origin="", pool="", tags=(), layout=("linear",), role=("public",), active=True,
    data_percent=None, metadata_percent=None,
)  # fmt: skip
THIN = replace(VOLUME, pool="pool", layout=("thin", "sparse"))

extents = st.sampled_from([64 * KIB, MIB, 4 * MIB, 32 * MIB])
sizes = st.integers(1, 4 * TIB // MIB).map(lambda count: count * MIB)
names = st.text("abz09+_.-", min_size=1, max_size=12).filter(lambda name: name[0] not in "-." and name[-1] != "-")


@st.composite
def volumes(draw):
    """A thick volume of whole LVM extents in a group with some room."""
    extent = draw(extents)
    size, free = draw(st.integers(1, 1 << 16)) * extent, draw(st.integers(0, 1 << 16)) * extent
    return replace(VOLUME, size=size, free=free, lvm_extent=extent)


# --- names and what cannot be snapshotted -------------------------------------------------------------------


@given(group=names, name=names)
@example(group="my-vg", name="a--b")
def test_a_mapped_name_leads_back_to_its_volume(group, name):
    assert lvm_names(plan.dm_name(group, name)) == (group, name)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, ""),
        ({"role": ("public", "origin", "thickorigin")}, ""),
        ({"layout": ("thin", "sparse"), "pool": "pool"}, ""),
        ({"layout": ("thin", "sparse"), "pool": "pool", "role": ("public", "snapshot", "thinsnapshot")}, ""),
        ({"role": ("public", "snapshot", "thicksnapshot")}, "LVM makes none"),
        ({"layout": ("thin", "pool"), "role": ("private",)}, "inner part"),
        ({"role": ("private", "thin", "pool", "data")}, "inner part"),
        ({"name": "blockbak-0badc0de", "tags": ("blockbak",)}, "for one run"),
        ({"partial": True}, "misses a physical volume"),
        ({"name": "blockbak-mine"}, ""),
        ({"tags": ("blockbak",)}, ""),
    ],
)
def test_what_cannot_be_snapshotted(changes, why):
    reason = plan.unfit(replace(VOLUME, **changes))
    assert why in reason
    assert bool(reason) == bool(why)


def test_an_lvcreate_that_met_a_frozen_file_system_is_told_from_others():
    said = """device-mapper: suspend ioctl on  (253:35) failed: Device or resource busy
  Unable to suspend vgb-o (253:35)
  Failed to suspend logical volume vgb/o.
  Aborting. Manual intervention required."""
    assert plan.met_frozen(said)
    assert not plan.met_frozen("device-mapper: create ioctl on vgb-o failed: Device or resource busy")
    assert not plan.met_frozen("device-mapper: suspend ioctl on  (253:35) failed: No such device or address")


# --- how large ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bytes_"), [("20%", 2 * GIB), ("100%", 10 * GIB), ("0.5%", 10 * GIB // 200), ("3G", 3 * GIB)]
)
def test_a_size_or_a_share(text, bytes_):
    assert plan.parse_size(text, 10 * GIB, parse_size) == bytes_


@pytest.mark.parametrize("text", ["0%", "101%", "-5%", "nan%", "inf%", "%", "x%", "5 G%", "much", ""])
def test_what_is_neither_a_size_nor_a_share(text):
    with pytest.raises(ValueError, match=r"."):
        plan.parse_size(text, 10 * GIB, parse_size)


def chunks_that_fit(store_bytes, chunk_bytes=4 * KIB):
    """How many exceptions the kernel puts into a store (drivers/md/dm-snap-persistent.c)."""
    stride = chunk_bytes // 16 + 1
    # A header, then area 0; skip_metadata() passes over the chunk of each further area.
    following, held = 2, 0
    while store_bytes >= (following + 1) * chunk_bytes:
        held += 1
        following += 1
        if following % stride == 1:
            following += 1
    return held


@given(chunks=st.integers(1, 6000))
@example(chunks=255)
@example(chunks=256)
@example(chunks=257)
@example(chunks=512)
def test_a_full_size_snapshot_cannot_overflow(chunks):
    full = plan.full_size(chunks * 4 * KIB, 4 * KIB)
    assert chunks_that_fit(full) >= chunks
    # And wastes no more than an area.
    assert chunks_that_fit(full - 8 * KIB) < chunks


@given(volume=volumes(), asked=st.one_of(st.none(), st.integers(0, 1 << 42)), beside=st.integers(0, 1 << 40))
def test_a_thick_snapshot_fits_or_is_refused(volume, asked, beside):
    size, needed = plan.thick_size(volume, asked, beside)
    room, full = max(0, volume.free - beside), plan.full_size(volume.size, volume.lvm_extent)
    assert size % volume.lvm_extent == needed % volume.lvm_extent == 0
    assert 0 < needed <= full
    if size:
        assert needed <= size <= min(full, room)
    else:
        assert needed > room // volume.lvm_extent * volume.lvm_extent
    if asked is not None and size:
        assert size >= min(asked, full)


@pytest.mark.parametrize(
    ("origin", "free", "size", "needed"),
    [
        (100 * GIB, 64 * GIB, 10 * GIB, 2 * GIB),
        (100 * GIB, 3 * GIB, 3 * GIB, 2 * GIB),
        (100 * GIB, 1 * GIB, 0, 2 * GIB),
        (5 * GIB, 64 * GIB, GIB, 104 * MIB),
        (64 * MIB, 64 * GIB, 68 * MIB, 32 * MIB),
        (16 * MIB, 64 * GIB, 20 * MIB, 20 * MIB),
    ],
)
def test_what_nobody_asked_for(origin, free, size, needed):
    assert plan.thick_size(replace(VOLUME, size=origin, free=free), None) == (size, needed)


# --- while it fills ---------------------------------------------------------------------------------------------


@given(
    volume=volumes(), stored=st.integers(1, 1 << 12), used=st.floats(0, 1),
    limit=st.one_of(st.none(), st.integers(0, 1 << 40)),
)  # fmt: skip
def test_an_extension_is_whole_and_fits(volume, stored, used, limit):
    total = stored * volume.lvm_extent
    use = ThickUse(int(total * used), total)
    more = plan.extension(use, volume.size, volume.lvm_extent, volume.free, limit)
    assert more % volume.lvm_extent == 0
    assert 0 <= more <= min(volume.free, total)
    if more:
        assert use.percent >= plan.EXTEND_AT
        assert total + more <= plan.full_size(volume.size, volume.lvm_extent)
        assert limit is None or total + more <= limit


@given(volume=volumes())
def test_extensions_come_to_their_end_in_few_steps(volume):
    total, free, steps = volume.lvm_extent, volume.free, 0
    full = plan.full_size(volume.size, volume.lvm_extent)
    while more := plan.extension(ThickUse(total, total), volume.size, volume.lvm_extent, free, None):
        total, free, steps = total + more, free - more, steps + 1
    assert free == 0 or total >= full
    assert steps <= math.log2(full // volume.lvm_extent) + 1


@pytest.mark.parametrize(
    ("kind", "parameters", "found"),
    [
        ("snapshot", "16/2097152 16", ThickUse(16 * 512, 2097152 * 512)),
        ("snapshot", "Invalid", "overflowed"),
        ("snapshot", "Overflow", "overflowed"),
        ("snapshot", "Merge failed", "overflowed"),
        ("error", "", "lost"),
        ("linear", "", "lost"),
        ("snapshot-origin", "", "lost"),
    ],
)
def test_the_status_of_a_thick_snapshot(kind, parameters, found):
    assert plan.parse_thick(kind, parameters) == found


def store(chunks, held, chunk_bytes=4 * KIB):
    """An exception store of so many chunks with so many exceptions, as far as anybody reads of it."""
    each = chunk_bytes // 16
    table = bytearray(chunks * chunk_bytes)
    struct.pack_into("<4I", table, 0, 0x70416E53, 0, 1, chunk_bytes // 512)
    for number in range(held):
        area, entry = divmod(number, each)
        struct.pack_into("<QQ", table, (1 + area * (each + 1)) * chunk_bytes + entry * 16, number, 2 + number)
    return bytes(table)


@pytest.mark.parametrize(
    ("chunks", "held", "room"),
    [(3000, 0, True), (3000, 255, True), (3000, 256, True), (3000, 257, True), (3000, 945, True), (3000, 946, False),
     (3000, 2980, False), (2048, 0, False)],
)  # fmt: skip
def test_a_store_that_was_not_full_did_not_overflow(chunks, held, room):
    content = store(chunks, held)
    assert plan.surely_not_full(lambda at, length: content[at : at + length], len(content)) is room


@pytest.mark.parametrize("spoiled", [b"", b"SnAq", b"SnAp" + bytes(4) + b"\2"])
def test_what_is_no_store_tells_nothing(spoiled):
    content = spoiled + store(3000, 1)[len(spoiled) :] if spoiled else bytes(3000 * 4 * KIB)
    assert not plan.surely_not_full(lambda at, length: content[at : at + length], len(content))


@pytest.mark.parametrize(
    ("kind", "parameters", "found"),
    [
        ("thin-pool", "1 12/1024 100/2048 - rw discard_passdown queue_if_no_space - 1024 ",
         PoolUse(12, 1024, 100, 2048, writable=True)),
        ("thin-pool", "7 12/1024 2048/2048 - out_of_data_space discard_passdown error_if_no_space - 1024",
         PoolUse(12, 1024, 2048, 2048, writable=False)),
        ("thin-pool", "7 12/1024 3/2048 91 ro discard_passdown queue_if_no_space needs_check 1024",
         PoolUse(12, 1024, 3, 2048, writable=False)),
        ("thin-pool", "Fail", None),
        ("thin-pool", "Error", None),
        ("error", "", None),
    ],
)  # fmt: skip
def test_the_status_of_a_pool(kind, parameters, found):
    assert plan.parse_pool(kind, parameters) == found


@given(pool_mib=st.integers(4, 1 << 22), data=st.floats(0, 1), metadata=st.floats(0, 1), needed=sizes)
def test_what_is_begun_is_not_given_up_at_once(pool_mib, data, metadata, needed):
    blocks = pool_mib * MIB // (64 * KIB)
    use = PoolUse(int(1000 * metadata), 1000, int(blocks * data), blocks, writable=True)
    if not plan.pool_short(use, pool_mib * MIB, needed):
        assert plan.pool_gives_out(use, pool_mib * MIB) == ""


@pytest.mark.parametrize(
    ("used", "metadata", "short", "gives_out"),
    [(0, 10, "", ""), (898, 10, "", ""), (900, 10, "data", ""), (990, 10, "data", ""), (991, 10, "data", "data"),
     (0, 91, "metadata", ""), (0, 95, "metadata", "metadata")],
)  # fmt: skip
def test_when_a_pool_is_too_full(used, metadata, short, gives_out):
    """Of 100 GiB, one per cent is kept for the others; the snapshot may take 9 GiB and some."""
    use = PoolUse(metadata, 100, used, 1000, writable=True)
    assert plan.pool_short(use, 100 * GIB, 9 * GIB + GIB // 10) == short
    assert plan.pool_gives_out(use, 100 * GIB) == gives_out


@pytest.mark.parametrize(
    ("mib", "used", "short"), [(4, 0.74, ""), (4, 0.76, "metadata"), (64, 0.89, ""), (32, 0.86, ""), (32, 0.88, "metadata")]
)  # fmt: skip
def test_lvm_wants_some_metadata_free_before_it_makes_a_snapshot(mib, used, short):
    """A quarter, or 4 MiB where that is less: it would refuse what we had promised."""
    total = mib * MIB // (4 * KIB)
    use = PoolUse(int(total * used), total, 0, 1000, writable=True)
    assert plan.pool_short(use, 100 * GIB, GIB) == short


@pytest.mark.parametrize(("asked", "needed"), [(None, 20 * GIB // 50), (3 * GIB, 3 * GIB), (30 * GIB, 20 * GIB)])
def test_what_a_thin_snapshot_may_take(asked, needed):
    assert plan.thin_need(THIN, asked) == needed


# --- whose it is ------------------------------------------------------------------------------------------------


@given(host=st.text(max_size=80))
def test_a_tag_holds_what_lvm_takes(host):
    once = plan.tag_text(host)
    assert plan.tag_text(once) == once
    assert len(once) == len(host)
    assert all(char.isascii() and (char.isalnum() or char in "_+.-") for char in once)


OURS = replace(VOLUME, name=f"blockbak-{RUN}", tags=plan.tags(RUN, HOST, BOOT))


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({}, True),
        ({"tags": plan.tags(RUN, HOST, "another-boot")}, True),
        ({"tags": plan.tags(RUN, "elsewhere", BOOT)}, False),
        ({"tags": plan.tags("feedbeef", HOST, BOOT)}, False),
        # Another boot's run cannot be alive, whatever is.
        ({"tags": plan.tags("feedbeef", HOST, "another-boot")}, True),
        ({"tags": ()}, False),
        ({"tags": ("blockbak",)}, False),
        ({"tags": OURS.tags[1:]}, False),
        ({"name": "data"}, False),
        ({"name": "blockbak"}, False),
        ({"name": "data", "tags": (*OURS.tags, plan.RESTORE_TAG)}, True),
    ],
)
def test_what_a_run_left(changes, left):
    one = replace(OURS, **changes)
    assert plan.leftovers([VOLUME, one], HOST, BOOT, {"feedbeef"}) == [one] * left


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, False),
        ({"tags": plan.tags(RUN, "elsewhere", BOOT)}, True),
        ({"tags": plan.tags(RUN, "elsewhere", "another-boot")}, True),
        ({"tags": plan.tags(RUN, "elsewhere", BOOT)[1:]}, False),
        ({"name": "data", "tags": plan.tags(RUN, "elsewhere", BOOT)}, False),
        ({"tags": ("blockbak",)}, False),
    ],
)
def test_what_another_host_left_is_told(changes, told):
    """Or this one, when it had another name: it is never removed, so somebody must know of it."""
    one = replace(OURS, **changes)
    assert plan.strangers([VOLUME, one], HOST) == [one] * told


def test_our_tags_are_told_from_a_persons():
    assert all(map(plan.is_of_ours, (*plan.tags(RUN, HOST, BOOT), plan.RESTORE_TAG)))
    assert not any(map(plan.is_of_ours, ("blockbak-repository", "blockbak_", "blockbak_runs", "daily")))


def test_a_host_whose_name_no_tag_can_hold_knows_its_own():
    host = "höst:1"
    one = replace(OURS, tags=plan.tags(RUN, host, BOOT))
    assert plan.leftovers([one], host, BOOT, ()) == [one]
    assert plan.strangers([one], host) == []


def test_where_lvm_writes_is_read_from_its_settings():
    told = '\tarchive_dir="/srv/lvm archive"\nbackup_dir="/etc/lvm/backup"\nfile=""\nlocking_dir="/run/lock/lvm"\n'
    assert plan.parse_places(told) == ["/srv/lvm archive", "/etc/lvm/backup", "/run/lock/lvm"]
    assert plan.parse_places("") == []


# --- hidden from scanners ---------------------------------------------------------------------------------


def hidden(group, name, part=""):
    """Whether the rule of udev hides a device; its patterns are those of fnmatch(3)."""
    patterns = re.findall(r'dm/name}=="([^"]+)"', RULE_PATH.read_text())
    assert len(patterns) == 2
    return any(fnmatchcase(plan.dm_name(group, name) + part, pattern) for pattern in patterns)


@pytest.mark.parametrize("group", ["vg", "my-group", "g-"])
@pytest.mark.parametrize("number", ["", "-1", "-12"])
@pytest.mark.parametrize("part", ["", "-cow"])
def test_our_snapshots_are_hidden(group, number, part):
    assert hidden(group, f"{plan.PREFIX}{'0badc0de'[:_RUN_DIGITS]}{number}", part)


def test_a_mapping_of_ours_is_known_by_its_name():
    ours = [plan.dm_name("my-vg", f"blockbak-0badc0de{number}") for number in ("", "-1", "-12")]
    assert all(plan.is_our_mapping(name) for name in ours)
    others = ("blockbak", "blockbak-data", "blockbak-cafe", "blockbak-0badc0de2", "x-blockbak-0badc0de")
    assert not any(plan.is_our_mapping(plan.dm_name("vg", name)) for name in others)
    assert not any(plan.is_our_mapping(f"{name}-cow") for name in ours)


@pytest.mark.parametrize(
    ("group", "name"),
    [("vg", "blockbak"), ("vg", "blockbak-data"), ("vg", "old-blockbak-store"), ("vg", "blockbak-cafe"),
     ("my-blockbak-group", "root"), ("blockbak-group", "root"), ("vg", "blockbak-0badc0de2")],
)  # fmt: skip
def test_what_a_person_named_after_us_is_not_hidden(group, name):
    """systemd would never mount it."""
    assert not hidden(group, name)
    assert not hidden(group, name, "-real")
