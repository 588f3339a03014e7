"""What an order puts onto the machine, and that it goes again; with an initramfs-tools that only writes down."""

from __future__ import annotations

import os
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import (
    InitramfsFailed,
    NextBootOrdered,
    NotAtNextBoot,
    NothingOrdered,
    SourceHoldsRepository,
)
from blockbak.flow import nextboot as flow
from blockbak.flow.nextboot import FOLDER
from blockbak.host import nextboot
from blockbak.host.device import block, look
from blockbak.host.nextboot import Installation
from blockbak.host.system import System
from blockbak.units import MIB
from tests.doubles import context, new_repository
from tests.unit.test_next_boot import MARKS, ORDER, PLACE

_UPDATE = """#!/bin/sh
echo "update $*" >>{log}
[ ! -e {root}/broken ] || exit 1
for release in 6.1.0-1-amd64 6.1.0-2-amd64; do
    [ -e {root}/none ] || echo "update-initramfs: Generating {root}/boot/initrd.img-$release"
    cp {root}/etc/initramfs-tools/hooks/blockbak {root}/boot/initrd.img-$release 2>/dev/null || : >{root}/boot/initrd.img-$release
done
"""
_LIST = """#!/bin/sh
if [ -s "$1" ] && [ ! -e {root}/empty ]; then echo usr/lib/blockbak/stage; fi
echo init
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A root with an initramfs-tools of its own, and systemd."""
    root, programs = tmp_path / "machine", tmp_path / "programs"
    for folder in ("boot", "run/systemd/system", "usr/share/initramfs-tools"):
        (root / folder).mkdir(parents=True)
    (root / "usr/share/initramfs-tools/hook-functions").touch()
    log = tmp_path / "log"
    log.touch()
    programs.mkdir()
    scripts = {
        "update-initramfs": _UPDATE,
        "lsinitramfs": _LIST,
        "systemctl": '#!/bin/sh\necho "systemctl $*" >>{log}\n',
    }
    for name, script in scripts.items():
        (programs / name).write_text(script.format(root=root, log=log))
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return types.SimpleNamespace(root=root, log=log, made=Installation(str(root)))


def files(machine):
    return {str(path.relative_to(machine.root)) for path in (machine.root / "etc").rglob("*") if not path.is_dir()}


INSTALLED = {
    "etc/initramfs-tools/hooks/blockbak", "etc/initramfs-tools/scripts/local-premount/blockbak",
    "etc/initramfs-tools/blockbak/stage", "etc/initramfs-tools/blockbak/order",
    "etc/systemd/system/blockbak-next-boot.service",
    "etc/systemd/system/multi-user.target.wants/blockbak-next-boot.service",
}  # fmt: skip


def test_it_is_put_in_and_taken_out(machine):
    made = machine.made.install("ORDER=7f REPOSITORY='/back ups'\n", "[Unit]\n")
    assert made == [str(machine.root / f"boot/initrd.img-6.1.0-{n}-amd64") for n in (1, 2)]
    assert files(machine) == INSTALLED
    assert os.access(machine.root / "etc/initramfs-tools/hooks/blockbak", os.X_OK)
    assert machine.made.ordered() == ("7f", "/back ups")
    assert (
        machine.root / "etc/systemd/system/multi-user.target.wants/blockbak-next-boot.service"
    ).read_text() == "[Unit]\n"
    assert machine.made.remove()
    assert files(machine) == set()
    assert machine.made.ordered() == ("", "")
    assert not machine.made.remove()
    assert machine.log.read_text().splitlines() == [
        "update -u -k all", "systemctl daemon-reload", "update -u -k all", "systemctl daemon-reload",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flaw", "said"),
    [("broken", "update-initramfs failed"), ("none", "update-initramfs made none"), ("empty", "does not hold it")],
)
def test_an_initramfs_without_it_is_nothing_ordered(machine, flaw, said):
    (machine.root / flaw).touch()
    with pytest.raises(InitramfsFailed, match=said):
        machine.made.install("ORDER=7f\n", "")
    left = files(machine)
    # Where the initramfs cannot be made at all, the order stays there for the next run to know of it.
    assert left == ({"etc/initramfs-tools/blockbak/order"} if flaw == "broken" else set())
    (machine.root / flaw).unlink()
    machine.made.remove()
    assert files(machine) == set()


def test_a_system_without_initramfs_tools_is_refused_with_the_ways(machine):
    (machine.root / "usr/share/initramfs-tools/hook-functions").unlink()
    with pytest.raises(NotAtNextBoot, match="not made by initramfs-tools") as caught:
        machine.made.check_tools("/dev/sda", PLACE)
    assert "rescue system" in caught.value.hint


# --- where it cannot be -------------------------------------------------------------------------------------------


def test_a_repository_that_the_initramfs_cannot_reach_is_refused(loop, ext4, tmpfs):
    store = ext4(loop(64 * MIB))
    with pytest.raises(NotAtNextBoot, match="neither a disk, a partition nor a logical volume"):
        nextboot.place(str(store.where / "repository"))
    with pytest.raises(NotAtNextBoot, match="the repository's file system is tmpfs"):
        nextboot.place(str(tmpfs("1M") / "repository"))


LV = "LVM-" + "g" * 32 + "v" * 32


@pytest.fixture
def stacked(tmp_path):
    """Disks, a partition, and what is stacked on them, as sysfs shows it."""
    classes = tmp_path / "sys/class/block"
    classes.mkdir(parents=True)

    def add(path, uuid="", slaves=()):
        place = tmp_path / "sys/devices" / path
        (place / "slaves").mkdir(parents=True)
        (place / "size").write_text("4096\n")
        if "/" in path:
            (place / "partition").write_text("1\n")
        if uuid:
            (place / "dm").mkdir()
            (place / "dm/uuid").write_text(f"{uuid}\n")
        for slave in slaves:
            (place / "slaves" / slave).touch()
        (classes / place.name).symlink_to(place)

    add("sda")
    add("sda/sda1")
    add("dm-0", LV, ["sda1"])
    add("dm-1", "CRYPT-LUKS2-1-x", ["sda1"])
    add("dm-2", LV, ["dm-1"])
    add("dm-3", LV, ["dm-0"])
    add("md0", slaves=["sda1"])
    add("loop0")
    return System(tmp_path)


@pytest.mark.parametrize("name", ["sda", "sda1", "dm-0"])
def test_disks_partitions_and_plain_volumes_are_there_at_the_boot(stacked, name):
    assert nextboot._unreachable(name, stacked) == ""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dm-1", "neither a disk, a partition nor a logical volume"), ("dm-2", "not simply on disks"),
        ("dm-3", "not simply on disks"), ("md0", "neither a disk"), ("loop0", "neither a disk"), ("sdz", "no block device"),
    ],
)  # fmt: skip
def test_what_is_stacked_higher_is_not(stacked, name, why):
    assert why in nextboot._unreachable(name, stacked)


def test_by_what_a_disk_is_known_again(stacked):
    about = stacked.root / "sys/devices/sda"
    (about / "device").mkdir()
    (about / "device/model").write_text("Disk of many\n")
    with pytest.raises(NotAtNextBoot, match="nothing tells its disk from another one"):
        nextboot.marks(block("sda", stacked), stacked)
    # What a shell would not read as it is does not count.
    (about / "serial").write_text("back\\slash\n")
    (about / "device/wwid").write_text("  naa.5000c500a1b2c3d4 \n")
    (about / "device/vpd_pg80").write_bytes(b"\0\x80\0\4S\0\1 ")
    known = nextboot.marks(block("sda1", stacked), stacked)
    assert [(fact.kind, fact.place, fact.value) for fact in known.facts] == [
        ("text", "device/wwid", "naa.5000c500a1b2c3d4"), ("text", "device/model", "Disk of many"),
        ("raw", "device/vpd_pg80", "0080000453000120"),
    ]  # fmt: skip
    assert (known.partition, known.disk_bytes) == (1, 4096 * 512)


def test_what_is_no_disk_is_refused(loop):
    with pytest.raises(NotAtNextBoot, match="it is a loop device"):
        nextboot.marks(look(loop(MIB).path))


def test_a_disk_that_holds_the_repository_is_refused(loop, ext4, tmp_path, machine):
    store = ext4(loop(64 * MIB))
    repository = new_repository(store.where / "repository")
    with pytest.raises(SourceHoldsRepository):
        flow.order(repository, store.device.path, context(tmp_path), limit=60, installation=machine.made)


# --- orders in repositories ---------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path):
    return new_repository(tmp_path / "repository")


def given(repository, machine, order=ORDER):
    flow._write_order(repository, os.path.join(repository.path, FOLDER), order)
    from blockbak.model.nextboot import stage_order

    machine.made.install(stage_order(order, MARKS, PLACE, [], repository.path), "")


def test_an_order_is_taken_back(repository, machine, tmp_path):
    given(repository, machine)
    said = flow.cancel(repository, context(tmp_path), installation=machine.made)
    assert said == "The image of /dev/sda at the next boot is not wanted any more."
    assert files(machine) == set()
    assert not Path(repository.path, FOLDER).exists()
    with pytest.raises(NothingOrdered):
        flow.cancel(repository, context(tmp_path), installation=machine.made)


def test_an_order_that_cannot_be_understood_can_be_taken_back(repository, machine, tmp_path):
    given(repository, machine)
    Path(repository.path, FOLDER, "order.json").write_text("{")
    flow.cancel(repository, context(tmp_path), installation=machine.made)
    assert files(machine) == set()


def test_there_is_one_order_a_machine(repository, machine, tmp_path):
    given(repository, machine)
    with pytest.raises(NextBootOrdered):
        flow._check_none(repository, machine.made)
    other = new_repository(tmp_path / "other")
    with pytest.raises(NextBootOrdered, match="into /"):
        flow._check_none(other, machine.made)
    # What is left of one whose repository is gone is no hindrance.
    Path(repository.path, FOLDER, "id").unlink()
    flow._check_none(other, machine.made)


def test_a_stage_that_could_not_be_removed_is_removed_later(repository, machine, tmp_path):
    given(repository, machine)
    (machine.root / "broken").touch()
    world = replace(context(tmp_path), host="web")
    told = flow.finish(repository, world, installation=machine.made)
    assert told.left[0].startswith("The stage stays in the initramfs, where it does nothing any more: ")
    assert not Path(repository.path, FOLDER).exists()
    (machine.root / "broken").unlink()
    told = flow.finish(repository, world, installation=machine.made)
    assert told.done == ["What was in the initramfs for one boot was removed."]
    assert files(machine) == set()
    assert flow.finish(repository, world, installation=machine.made).done == []


def test_after_a_boot_without_the_stage_all_is_taken_away(repository, machine, tmp_path):
    order = type(ORDER)(**{name: getattr(ORDER, name) for name in ORDER.__struct_fields__} | {"host": "here"})
    given(repository, machine, order)
    world = replace(context(tmp_path), host="here")
    told = flow.finish(repository, world, installation=machine.made)
    assert told.left == ["No image of /dev/sda was made at the boot: the system started without the initramfs."]
    assert files(machine) == set()
    assert not Path(repository.path, FOLDER).exists()


def test_the_reason_that_the_stage_gave_is_told(repository, machine, tmp_path):
    given(repository, machine)
    said = machine.root / "run/initramfs/blockbak/said"
    said.parent.mkdir(parents=True)
    said.write_text("blockbak: no image is made: a hibernated system is on /dev/sda3\n")
    told = flow.finish(repository, replace(context(tmp_path), host="web"), installation=machine.made)
    assert told.left == ["No image of /dev/sda was made at the boot: a hibernated system is on /dev/sda3."]


def test_another_machines_order_is_left_to_it(repository, machine, tmp_path):
    given(repository, machine)
    told = flow.finish(repository, replace(context(tmp_path), host="elsewhere"), installation=machine.made)
    assert told.left == ["An image of /dev/sda at the next boot is ordered on web, not here."]
    assert files(machine) == INSTALLED


@pytest.mark.parametrize("script", ["hook", "premount", "stage"])
@pytest.mark.parametrize("shell", [["dash"], ["busybox", "sh"], ["bash", "--posix"]], ids=lambda words: words[0])
def test_the_scripts_are_those_of_any_shell(script, shell):
    path = Path(nextboot.__file__).with_name("initramfs") / script
    subprocess.run([*shell, "-n", path], check=True)
