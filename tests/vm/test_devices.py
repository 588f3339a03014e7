"""Logical volumes as ``devices`` lists them, and as sources by whatever name they have."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

from tests.vm.conftest import MIB, run


@contextmanager
def mounted(path, where):
    where.mkdir()
    run("mkfs.ext4", "-q", path)
    run("mount", path, where)
    try:
        yield
    finally:
        run("umount", where)


def test_volumes_are_listed_with_their_room_and_their_mode(make_group, run_blockbak, tmp_path):
    group, full = make_group(size=128 * MIB, disks=2), make_group(size=20 * MIB)
    wide = group.volume("wi-de.x", 132 * MIB)  # more than one disk has
    pool = group.pool("pool", 48 * MIB)
    thin = group.thin(pool, "thin", 24 * MIB)
    group.volume("free", 8 * MIB)
    group.snapshot("free", "snap", 8 * MIB)
    run("lvcreate", "--quiet", "--yes", "-s", "-pr", "-n", "blockbak-feed", "-L", "4m", "--addtag", "blockbak",
        f"{group.name}/free")  # fmt: skip
    tight = full.volume("tight", 16 * MIB)
    with ExitStack() as stack:
        for path in (wide, thin, tight, group.path("snap")):
            # A snapshot of an empty volume is a device like any other.
            stack.enter_context(mounted(path, tmp_path / path.rpartition("/")[2]))
        found = {one["label"]: one for one in run_blockbak.json("devices")}
        table = run_blockbak("devices").text
    run("lvremove", "--quiet", "--yes", f"{group.name}/blockbak-feed")

    free = int(run("vgs", "--noheadings", "--units", "b", "--nosuffix", "-o", "vg_free", group.name)) - 4 * MIB
    one = found[f"{group.name}/wi-de.x"]
    assert (one["vg"], one["lv"], one["thin_pool"], one["mode"]) == (group.name, "wi-de.x", "", "hot")
    assert one["snapshot_room"] == free
    assert one["mounts"][0]["target"] == str(tmp_path / "wi-de.x")
    one = found[f"{group.name}/thin"]
    assert (one["thin_pool"], one["mode"]) == (f"{group.name}/pool", "hot")
    assert 24 * MIB < one["snapshot_room"] < 48 * MIB
    one = found[f"{group.name}/free"]
    assert (one["mode"], one["snapshot_room"]) == ("cold", free)
    one = found[f"{group.name}/snap"]
    assert (one["mode"], one["snapshot_room"]) == ("refused", None)
    assert "it is itself a snapshot" in one["reason"]
    one = found[f"{full.name}/tight"]
    assert (one["mode"], one["snapshot_room"]) == ("refused", 0)
    assert f"volume group {full.name} has 0 bytes free" in one["reason"]
    assert f"{group.name}/blockbak-feed" not in found
    assert "blockbak-feed" not in table
    assert f"{group.name}/wi-de.x" in table


def test_a_volume_is_known_by_its_uuid_whatever_lies_below_and_is_called(loop, run_blockbak, repository, tmp_path):
    disk, name = loop(64 * MIB), "bb-on-luks"
    key = tmp_path / "key"
    key.write_bytes(b"the key of a test")
    format_words = ("--batch-mode", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
    run("cryptsetup", "luksFormat", *format_words, disk, key)
    run("cryptsetup", "open", "--key-file", key, disk, name)
    try:
        run("vgcreate", "--quiet", name, f"/dev/mapper/{name}")
        run("lvcreate", "--quiet", "--yes", "--setautoactivation", "n", "-L", "8m", "-n", "a-b.c", name)
        first = run_blockbak.json("backup", f"{name}/a-b.c")["points"][0]
        run("lvrename", "--quiet", name, "a-b.c", "z")
        second = run_blockbak.json("backup", f"/dev/{name}/z")["points"][0]
        assert (second["volume"], second["kind"]) == (first["volume"], "incremental")
        run("lvchange", "-an", f"{name}/z")
        inactive = run_blockbak.json("backup", f"{name}/z", expect=1)["errors"][0]
        assert inactive["name"] == "VolumeInactive"
        assert f"lvchange -ay {name}/z" in inactive["advice"]

        listed = run_blockbak.json("list")
        assert [one["set_id"] for one in listed] == ["", ""]
        text = run_blockbak("show", second["point"], "--lvm-metadata").text
        (tmp_path / "group").write_text(text)
        run("vgcfgrestore", "--test", "--force", "--file", tmp_path / "group", name)
        assert "--lvm-metadata" in run_blockbak("show", second["point"]).text
    finally:
        run("vgremove", "--quiet", "--force", "--yes", name)
        run("cryptsetup", "close", name)
