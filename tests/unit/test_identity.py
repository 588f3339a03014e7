"""Identities, and the names they are taken from, on recorded trees of machines this one is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.host import device, usage
from blockbak.host.proc import parse_locks, parse_mountinfo, unescape
from blockbak.host.system import System, lv_uuid, lvm_names
from blockbak.model.identity import Identity, ending, plain
from tests.points import image

KINDS = (
    "lv-uuid", "wwn", "serial", "partuuid", "partition", "dm-uuid", "md-uuid", "file", "gpt", "mbr", "path",
)  # fmt: skip
VG, LV = "A" * 32, "abcdefGHIJklmnOPQRstuvWXyz012345"


class Tree:
    """A sysfs and a /proc of our own, with the same links as the kernel's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.numbers = 0
        (root / "sys/class/block").mkdir(parents=True)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/sys/kernel/random").mkdir(parents=True)
        (root / "proc/sys/kernel/random/boot_id").write_text("b007\n")
        self.mounts: list[str] = []

    def add(self, name, parent="", over=(), sectors=20480, **files):
        where = self.root / "sys/devices" / parent / name
        where.mkdir(parents=True)
        (self.root / "sys/class/block" / name).symlink_to(where)
        self.numbers += 1
        facts = {
            "dev": f"8:{self.numbers}",
            "size": str(sectors),
            "uevent": f"DEVNAME={name.replace('!', '/')}",
        }
        facts |= {"stat": "1 0 8 0 2 0 16 0 0 0 0 0 0 0 0 0 0"} | {
            key.replace("__", "/"): value for key, value in files.items()
        }
        for path, text in facts.items():
            (where / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(text, bytes):
                (where / path).write_bytes(text)
            else:
                (where / path).write_text(text + "\n")
        for folder in ("holders", "slaves"):
            (where / folder).mkdir()
        for lower in over:
            (where / "slaves" / lower).symlink_to(self.root / "sys/class/block" / lower)
            (self.root / "sys/class/block" / lower / "holders" / name).symlink_to(where)
        return name

    def mount(self, number, target, fstype="ext4", source="none", options="rw"):
        self.mounts.append(f"{30 + len(self.mounts)} 1 {number} / {target} rw - {fstype} {source} {options}")
        (self.root / "proc/self/mountinfo").write_text("\n".join(self.mounts) + "\n")

    def swap(self, *paths):
        lines = ["Filename Type Size Used Priority", *(f"{path} partition 1 0 -2" for path in paths)]
        (self.root / "proc/swaps").write_text("\n".join(lines) + "\n")

    def system(self, **udev):
        root = self.root

        class Recorded(System):
            def __init__(self):
                super().__init__(root)

            def udev(self, name):
                return udev.get(name, {})

        return Recorded()

    def number(self, name):
        return (self.root / "sys/class/block" / name / "dev").read_text().strip()


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def identity(name, system):
    return device.identity(device.block(name, system), system)


def details(name, system):
    return [str(use) for use in usage.users(device.block(name, system), system)]


# --- the value ------------------------------------------------------------------------------------------


def test_an_identity_reads_like_a_sentence():
    assert str(Identity("serial", "ABC123")) == "serial ABC123"
    assert str(Identity("file", "/srv/disk.img")) == "file /srv/disk.img"


def test_kind_and_value_must_match():
    one = Identity("serial", "A")
    assert one.same_as(Identity("serial", "A"))
    assert not one.same_as(Identity("wwn", "A"))
    assert not one.same_as(Identity("serial", "B"))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((3, "x"), (3, "x"), True),
        ((3, "x"), (4, "x"), False),
        ((3, "x"), (4, "y"), True),
        ((3, "x"), (0, "x"), True),
        ((3, ""), (4, ""), True),
    ],
)
def test_a_node_is_another_disk_when_its_sequence_number_is(first, second, same):
    assert Identity("path", "/dev/sdb", *first).same_as(Identity("path", "/dev/sdb", *second)) is same
    # What has a name of its own does not depend on when it was plugged in.
    assert Identity("serial", "A", *first).same_as(Identity("serial", "A", *second))


@pytest.mark.parametrize(
    ("first", "second", "sure"),
    [
        ((3, "x"), (3, "x"), True),
        ((3, "x"), (4, "x"), False),
        ((3, "x"), (3, "y"), False),
        ((3, "x"), (4, "y"), False),
        ((0, "x"), (0, "x"), False),
        ((3, "x"), (0, "x"), False),
        ((3, ""), (3, ""), False),
    ],
)
def test_a_node_is_surely_the_same_disk_only_within_its_boot(first, second, sure):
    one, other = Identity("path", "/dev/sdb", *first), Identity("path", "/dev/sdb", *second)
    assert one.surely_same_as(other) is other.surely_same_as(one) is sure
    assert one.same_as(other) or not sure
    assert not one.surely_same_as(Identity("path", "/dev/sdc", *second))
    # A name of its own proves as much as ever.
    assert Identity("serial", "A", *first).surely_same_as(Identity("serial", "A", *second))
    assert not Identity("serial", "A", *first).surely_same_as(Identity("serial", "B", *first))


@pytest.mark.parametrize("kind", KINDS)
def test_on_another_host_only_what_is_given_out_once_in_the_world_is_the_same(kind):
    """A path there is another file, and clones of one machine have all their ids in common."""
    identity = Identity(kind, "one", 3, "boot")
    opening = replace(image(1).opening, identity=identity, host="here")
    for same in (opening.is_of, opening.surely_of):
        assert same(identity, "here")
        assert same(identity, "elsewhere") is (kind == "wwn")
        assert not same(Identity(kind, "other", 3, "boot"), "here")
    # After a reboot a node may be the same one; that is not enough where a mistake would cost data.
    later = Identity(kind, "one", 4, "another boot")
    assert opening.is_of(later, "here")
    assert opening.surely_of(later, "here") is (kind != "path")


@given(st.text(min_size=513), st.text(min_size=513))
def test_a_long_value_is_replaced_by_its_digest(one, other):
    made = Identity("file", one)
    assert len(made.value) == 71
    assert made.same_as(Identity("file", one))
    assert made.same_as(Identity("file", other)) is (one == other)


@given(st.binary())
def test_any_path_is_made_text_once_and_for_all(path):
    given_by_the_kernel = path.decode("utf-8", "surrogateescape")
    text = plain(given_by_the_kernel)
    text.encode("utf-8")
    assert plain(text) == text
    assert Identity("file", given_by_the_kernel).same_as(Identity("file", text))


@given(st.text(st.characters()))
def test_any_string_is_made_text(text):
    plain(text).encode("utf-8")


def test_text_is_left_alone_and_odd_bytes_are_written_out():
    assert plain("ümläut 日本\n\x1b \\xff") == "ümläut 日本\n\x1b \\xff"
    assert plain("tar\udcffget") == "tar\\xffget"
    assert plain("\ud800") == "\\ud800"


def test_512_characters_are_kept_and_odd_bytes_survive():
    assert Identity("file", "x" * 512).value == "x" * 512
    assert Identity("file", "\udcff" * 600).value.startswith("sha256:")


# --- names from the kernel ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("vg-lv", ("vg", "lv")),
        ("my--vg-s--1", ("my-vg", "s-1")),
        ("vg---lv", ("vg-", "lv")),
        ("a----b-c", ("a--b", "c")),
        ("vg--lv", ("", "")),
        ("vg", ("", "")),
        ("vg-lv-real", ("", "")),
    ],
)
def test_hyphens_inside_lvm_names_are_doubled(name, names):
    assert lvm_names(name) == names


def test_only_a_volume_of_its_own_has_an_lv_uuid():
    assert lv_uuid(f"LVM-{VG}{LV}") == "abcdef-GHIJ-klmn-OPQR-stuv-WXyz-012345"
    assert lv_uuid(f"LVM-{VG}{LV}-cow") == ""
    assert lv_uuid("CRYPT-LUKS2-0123-name") == ""


def test_proc_tables_are_unescaped_and_odd_lines_left_out():
    text = "36 35 0:45 /a /mnt/with\\040space rw,noatime shared:1 - btrfs /dev/sda\\011x rw,subvol=/a\\054b\nbroken\n"
    (line,) = parse_mountinfo(text)
    assert (line.id, line.major, line.minor, line.target) == (36, 0, 45, "/mnt/with space")
    assert (line.fstype, line.source, line.option("subvol")) == ("btrfs", "/dev/sda\tx", "/a,b")
    assert unescape(r"a\134b") == "a\\b"


def test_locks_are_read_and_waiters_and_leases_left_out():
    text = (
        "1: FLOCK  ADVISORY  WRITE 123 fe:00:456 0 EOF\n"
        "1: -> FLOCK  ADVISORY  WRITE 124 fe:00:456 0 EOF\n"
        "2: OFDLCK ADVISORY  READ  -1 00:2d:7 100 101\n"
        "3: LEASE  ACTIVE    READ  9 fe:00:1 0 EOF\n"
    )
    first, second = parse_locks(text)
    assert (first.pid, first.major, first.minor, first.inode) == (123, 254, 0, 456)
    assert (second.pid, second.major, second.minor, second.inode) == (0, 0, 45, 7)


# --- what identifies a disk ---------------------------------------------------------------------------


def test_the_strongest_name_wins_in_its_order(tree):
    tree.add("sda", wwid="naa.5000c500a1b2c3d4", serial="S1")
    tree.add("vda", serial="S2")
    tree.add("sdb", diskseq="7")
    tree.add("dm-0", dm__name="vg-data", dm__uuid=f"LVM-{VG}{LV}")
    system = tree.system()
    assert str(identity("sda", system)) == "WWN naa.5000c500a1b2c3d4"
    assert str(identity("vda", system)) == "serial S2"
    assert identity("dm-0", system) == Identity("lv-uuid", "abcdef-GHIJ-klmn-OPQR-stuv-WXyz-012345")
    assert identity("sdb", system) == Identity("path", "/dev/sdb", 7, "b007")
    assert device.block("dm-0", system).label == "vg/data"


def test_udev_and_the_kernel_name_a_disk_alike(tree):
    tree.add("sda", device__wwid="naa.5000c500a1b2c3d4")
    tree.add("sdb")
    tree.add("sdc")
    system = tree.system(
        sdb={"ID_WWN": "0x5000c500a1b2c3d4"}, sdc={"ID_SERIAL": "ACME_Disk_77", "ID_SERIAL_SHORT": "77"}
    )
    assert identity("sda", system).same_as(identity("sdb", system))
    assert str(identity("sdc", system)) == "serial 77"


@pytest.mark.parametrize(
    ("files", "identity_of"),
    [
        (
            {
                "device__wwid": "t10.ATA     QEMU HARDDISK   QM00001",
                "device__vpd_pg80": b"\0\x80\0\x14   QM00001\0",
            },
            "serial QM00001",
        ),
        ({"device__serial": "  S3Z9NB0K  "}, "serial S3Z9NB0K"),
        ({"wwid": "eui.0025385b71b0a1c4", "device__serial": "S3Z9NB0K"}, "WWN eui.0025385b71b0a1c4"),
        ({"wwid": "eui.0000000000000000", "device__serial": "S"}, "serial S"),
        ({"serial": "00000000"}, "node /dev/sda"),
        ({"serial": ""}, "node /dev/sda"),
    ],
)
def test_serials_and_wwns_as_different_buses_tell_them(tree, files, identity_of):
    tree.add("sda", **files)
    assert str(identity("sda", tree.system())) == identity_of


def test_a_partition_is_known_by_its_uuid_and_its_disk(tree):
    tree.add("sda", wwid="naa.5000c500a1b2c3d4")
    tree.add("sda1", parent="sda", partition="1", start="2048", uevent="DEVNAME=sda1\nPARTUUID=AB-01")
    tree.add("sda2", parent="sda", partition="2", start="4096")
    # udev gives a partition its disk's WWN and serial: they are not the partition's.
    told = {"ID_WWN": "0x5000c500a1b2c3d4", "ID_SERIAL": "S1", "ID_PART_ENTRY_UUID": "CD-02"}
    system = tree.system(sda2=told)
    assert str(identity("sda1", system)) == "partition ab-01 on WWN naa.5000c500a1b2c3d4"
    assert str(identity("sda2", system)) == "partition cd-02 on WWN naa.5000c500a1b2c3d4"
    assert identity("sda2", tree.system()).value == "2 at 2097152 on WWN naa.5000c500a1b2c3d4"


def test_a_partition_of_a_nameless_disk_is_its_node(tree):
    tree.add("sda", diskseq="5")
    tree.add("sda1", parent="sda", partition="1", start="2048")
    assert identity("sda1", tree.system()) == Identity("path", "/dev/sda1", 5, "b007")


def test_a_disk_without_a_serial_is_known_by_its_table(tree):
    tree.add("sda")
    tree.add("sdb")
    system = tree.system(
        sda={"ID_PART_TABLE_UUID": "1A2B3C4D"},
        sdb={"ID_PART_TABLE_UUID": "1" * 8 + "-2222" * 3 + "-" + "3" * 12},
    )
    assert str(identity("sda", system)) == "MBR disk 1a2b3c4d"
    assert identity("sdb", system).kind == "gpt"


def test_mapped_devices_and_arrays_have_names_that_outlive_their_nodes(tree):
    tree.add("dm-0", dm__name="secret", dm__uuid="CRYPT-LUKS2-0123-secret")
    tree.add("dm-1", dm__name="plain", diskseq="9")
    tree.add("md127", md__uuid="01020304-0506-0708-090a-0b0c0d0e0f10")
    system = tree.system()
    assert str(identity("dm-0", system)) == "device-mapper UUID CRYPT-LUKS2-0123-secret"
    assert identity("dm-1", system).value == "/dev/mapper/plain"
    told = tree.system(md127={"MD_UUID": "01020304:05060708:090a0b0c:0d0e0f10"})
    assert identity("md127", system).same_as(identity("md127", told))


def test_udev_is_asked_where_it_keeps_its_data(tree):
    """The real libudev, which knows what this machine's kernel says of its own devices."""
    name = System().names[0]
    assert System(tree.root).udev(name) == {}
    (tree.root / "run/udev/data").mkdir(parents=True)
    system = System(tree.root)
    assert system.udev(name)["DEVNAME"] == System().node(name)
    assert system.udev("sda-of-nobody") == {}


# --- twins ----------------------------------------------------------------------------------------------


def test_two_disks_with_one_name_are_twins(tree):
    tree.add("sda", serial="0123456789ABCDEF")
    tree.add("sdb", serial="0123456789ABCDEF")
    tree.add("sdc", serial="other")
    system = tree.system()
    assert device.find_twin(device.block("sda", system), system).kname == "sdb"
    assert device.find_twin(device.block("sdc", system), system) is None


def test_the_paths_of_a_multipath_device_are_not_twins(tree):
    for name in ("sda", "sdb", "sdc"):
        tree.add(name, device__wwid="naa.600140500000000000000000000000aa")
    tree.add("dm-0", over=("sda", "sdb"), dm__name="mpatha", dm__uuid="mpath-3600140500000000000000000000000aa")
    system = tree.system()
    assert identity("dm-0", system).same_as(identity("sda", system))
    # A path that multipath does not hold is another matter.
    for name in ("dm-0", "sda"):
        assert device.find_twin(device.block(name, system), system).kname == "sdc"
    (tree.root / "sys/class/block/sdc").unlink()
    system = tree.system()
    for name in ("dm-0", "sda"):
        assert device.find_twin(device.block(name, system), system) is None


# --- what is offered ------------------------------------------------------------------------------------


def test_what_can_be_backed_up(tree):
    tree.add("sda")
    tree.add("sda2", parent="sda", partition="2", sectors=2)
    tree.add("sda10", parent="sda", partition="10")
    tree.add("sda3", parent="sda", partition="3")
    tree.add("sdb", sectors=0)
    tree.add("ram0")
    tree.add("zram1")
    tree.add("loop0", sectors=0)
    tree.add("loop1")
    tree.add("loop2", loop__backing_file="/srv/disk.img")
    tree.add("nvme0c0n1", hidden="1")
    tree.add("dm-0", dm__name="vg-data", dm__uuid=f"LVM-{VG}{LV}")
    tree.add("dm-1", dm__name="vg-data-real", dm__uuid=f"LVM-{VG}{LV}-real")
    tree.add("cciss!c0d0")
    found = device.devices(tree.system())
    assert [one.path for one in found] == [
        "/dev/cciss/c0d0",
        "/dev/dm-0",
        "/dev/loop2",
        "/dev/sda",
        "/dev/sda3",
        "/dev/sda10",
    ]
    assert [one.kind for one in found] == ["disk", "dm", "loop", "disk", "partition", "partition"]


# --- a server: LVM on md on two disks -------------------------------------------------------------------


@pytest.fixture
def server(tree):
    for disk in ("sda", "sdb"):
        tree.add(disk)
        tree.add(f"{disk}1", parent=disk, partition="1", start="2048")
        tree.add(f"{disk}2", parent=disk, partition="2", start="9000")
    tree.add("md0", over=("sda2", "sdb2"), md__level="raid1")
    tree.add("dm-0", over=("md0",), dm__name="vg-root", dm__uuid=f"LVM-{VG}{LV}")
    tree.add("dm-1", over=("md0",), dm__name="vg-swap", dm__uuid=f"LVM-{VG}{LV[::-1]}")
    tree.add("dm-2", over=("md0",), dm__name="vg-free", dm__uuid=f"LVM-{VG}{LV[1:]}x")
    tree.mount(tree.number("dm-0"), "/")
    tree.mount(tree.number("sda1"), "/boot")
    tree.swap("/dev/dm-1")
    return tree


def test_a_disk_is_used_by_all_that_stands_on_it(server):
    system = server.system()
    assert details("sda", system) == [
        "mounted at /boot (sda1)",
        "part of /dev/md0",
        "held by dm-0 (vg-root)",
        "held by dm-1 (vg-swap)",
        "held by dm-2 (vg-free)",
        "mounted at / (vg-root)",
        "swap (vg-swap)",
    ]
    assert details("sda1", system) == ["mounted at /boot"]
    assert "mounted at / (vg-root)" in details("sdb2", system)
    assert details("sdb1", system) == []
    assert details("dm-1", system) == ["swap"]
    assert details("dm-2", system) == []


def test_what_the_system_needs_is_found_on_every_layer(server):
    system = server.system()

    def carries(name, path):
        return usage.carries(device.block(name, system), path, system)

    for name in ("dm-0", "md0", "sda2", "sdb2", "sda", "sdb"):
        assert carries(name, "/var/lib/blockbak")
    for name in ("dm-1", "dm-2", "sda1", "sdb1"):
        assert not carries(name, "/var/lib/blockbak")
    assert carries("sda", "/boot/vmlinuz")
    assert not carries("sdb", "/boot/vmlinuz")

    def held(name):
        return usage.holds_running_system(device.block(name, system), system)

    assert [held(name) for name in ("sda", "sda1", "dm-1", "dm-2", "sdb1")] == [
        "/",
        "/boot",
        "swap",
        None,
        None,
    ]


def test_a_logical_volume_in_use_is_taken_hot(server):
    system = server.system()
    used, idle = device.block("dm-0", system), device.block("dm-2", system)
    mode, reason = usage.decide_mode(used, usage.users(used, system))
    assert (mode, reason.startswith("in use: ")) == ("hot", True)
    assert usage.decide_mode(idle, usage.users(idle, system)) == ("cold", "not in use")


def test_a_volume_is_found_by_its_names_without_anybodys_links(server):
    system = server.system()
    assert system.volume("vg", "root") == "dm-0"
    assert system.volume("vg", "nothing") == ""
    assert system.name_at("/dev/mapper/vg-root") == "dm-0"
    assert system.name_at("/dev/vg/root") == "dm-0"
    assert system.name_at("/dev/sda1") == "sda1"


def test_an_array_on_the_whole_disk_uses_its_partitions(tree):
    tree.add("sda")
    tree.add("sda1", parent="sda", partition="1", start="2048")
    tree.add("md0", over=("sda",), md__level="raid1")
    assert details("sda1", tree.system()) == ["part of /dev/md0"]


def test_a_file_system_on_several_devices_uses_each(tree):
    tree.add("sda")
    tree.add("sdb")
    tree.add("sdc")
    tree.mount("0:45", "/data", "btrfs", "/dev/sda")
    for name in ("sda", "sdb"):
        (tree.root / "sys/fs/btrfs/1111/devices" / name).mkdir(parents=True)
    system = tree.system()
    assert [details(name, system) for name in ("sda", "sdb", "sdc")] == [
        ["mounted at /data"],
        ["mounted at /data"],
        [],
    ]
    assert usage.carries(device.block("sdb", system), "/data/repo", system)
    assert not usage.carries(device.block("sdc", system), "/data/repo", system)


def test_an_external_log_is_in_use(tree):
    tree.add("sda")
    tree.add("sdb")
    tree.mount(tree.number("sda"), "/data", "xfs", "/dev/sda", "rw,logdev=/dev/sdb")
    assert details("sdb", tree.system()) == ["mounted at /data"]


def test_a_mount_nobody_here_sees_is_in_use(tree):
    tree.add("sda")
    (tree.root / "sys/fs/ext4/sda").mkdir(parents=True)
    assert details("sda", tree.system()) == ["mounted in another namespace or not yet let go (ext4)"]


@pytest.mark.parametrize(
    ("fstype", "source", "options"),
    [
        ("tmpfs", "/dev/sda", "rw"),
        ("nfs4", "server:/export", "rw,addr=10.0.0.1"),
        ("overlay", "overlay", "rw,lowerdir=/lower:/x,upperdir=/upper,workdir=/work"),
        ("fuse.sshfs", "root@host:/", "rw"),
        ("9p", "share", "rw,trans=virtio"),
        ("btrfs", "/dev/gone", "rw"),
    ],
)
def test_a_root_without_a_device_of_its_own_is_carried_by_none(tree, fstype, source, options):
    tree.add("sda")
    tree.mount("0:45", "/", fstype, source, options)
    system = tree.system()
    assert not usage.carries(device.block("sda", system), "/", system)
    assert usage.holds_running_system(device.block("sda", system), system) is None


def test_the_layers_of_an_overlay_are_followed(tree):
    tree.add("sda")
    tree.mount("0:45", "/", "overlay", "overlay", "rw,lowerdir=/lower,upperdir=/upper/root,workdir=/upper/work")
    tree.mount(tree.number("sda"), "/upper", "ext4", "/dev/sda")
    system = tree.system()
    assert usage.carries(device.block("sda", system), "/etc", system)


# --- write counters ---------------------------------------------------------------------------------


def stat_line(writes=0, written=0, discards=0, discarded=0):
    return f"9 0 9 0 {writes} 0 {written} 0 0 9 9 {discards} 0 {discarded} 0 7 0"


@pytest.mark.parametrize("change", [{"writes": 1, "written": 8}, {"discards": 1}, {"discarded": 8}])
@pytest.mark.parametrize("name", ["sda", "sda1"])
def test_every_write_shows_in_the_counters(tree, name, change):
    tree.add("sda", stat=stat_line())
    tree.add("sda1", parent="sda", partition="1", stat=stat_line())
    disk = device.block("sda", tree.system())
    before = usage.write_counters(disk, tree.system())
    assert before == usage.write_counters(disk, tree.system())
    (tree.root / "sys/class/block" / name / "stat").write_text(stat_line(**change))
    assert usage.write_counters(disk, tree.system()) != before


def test_a_flush_is_no_write(tree):
    """The kernel counts it as one of no sectors; partclone flushes what it only reads."""
    tree.add("sda", stat=stat_line(writes=1, written=8))
    disk = device.block("sda", tree.system())
    before = usage.write_counters(disk, tree.system())
    (tree.root / "sys/class/block/sda/stat").write_text(stat_line(writes=4, written=8))
    assert usage.write_counters(disk, tree.system()) == before


def test_old_kernels_count_no_discards(tree):
    tree.add("sda", stat="1 0 8 0 2 0 16 0 0 0 0")
    assert usage.write_counters(device.block("sda", tree.system()), tree.system()) == (8, 1, 16, 0, 0)


def test_statistics_switched_off_count_nothing(tree):
    tree.add("sda", queue__iostats="0", mq__0__cpu_list="0")
    tree.add("dm-0", queue__iostats="0", dm__name="x", dm__uuid="")
    system = tree.system()
    assert usage.write_counters(device.block("sda", system), system) is None
    # A driver without request queues counts whatever the switch says.
    assert usage.write_counters(device.block("dm-0", system), system) is not None


def test_a_device_that_went_away_counts_nothing(tree):
    tree.add("sda")
    disk = device.block("sda", tree.system())
    (tree.root / "sys/class/block/sda").unlink()
    assert usage.write_counters(disk, tree.system()) is None


@pytest.mark.parametrize("text", ["/short", "/" + "a" * 5000, "/" + "\u65e5" * 900, "/\x01" * 700])
def test_a_long_path_keeps_its_ending_within_the_limit(text):
    made = ending(text, 1000)
    assert len(ascii(made)) - 2 <= 1000
    assert text.endswith(made.removeprefix("…"))
    assert (made == text) == (len(ascii(text)) - 2 <= 1000)
