"""What the initramfs and systemd are told of an order."""

import subprocess
from pathlib import Path

from blockbak.host import nextboot
from blockbak.model.nextboot import PROGRAMS, Fact, Marks, Order, Place, programs, stage_order, unit, ways
from blockbak.units import SECTOR

ORDER = Order(
    id="0d" * 16, boot="b", created=1, host="web", volume="web-sda", source="/dev/sda", path="/dev/sda",
    identity_kind="serial", identity_value="S1", diskseq=0, length=8 << 30, logical=512, physical=4096, limit=1200,
)  # fmt: skip
FACTS = (Fact("text", "device/serial", 'it\'s $HOME "x"'), Fact("content", "440", "d15cd15c"))
MARKS = Marks(disk_bytes=8 << 30, sector=512, partition=0, start=0, length=8 << 30, facts=FACTS)
PLACE = Place("ext4", "1-2-3", "", "/back ups/it's here/.next-boot", "/dev/sdb1")


def as_shell_reads(text, *names):
    shown = " ".join(f'"${name}"' for name in names)
    script = f"set -u\n{text}\nprintf '%s\\0' {shown}"
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_the_stage_reads_the_order_as_it_was_meant():
    text = stage_order(ORDER, MARKS, PLACE, ["/dev/sda", "/dev/sdb1"], "/srv/back ups")
    names = ("ORDER", "REPOSITORY_PATH", "DISK_SECTORS", "SECTORS", "PARTITION", "FACTS", "LIMIT", "NODES")
    assert as_shell_reads(text, *names) == [
        ORDER.id, PLACE.path, str((8 << 30) // SECTOR), str((8 << 30) // SECTOR), "",
        "text device/serial it's $HOME \"x\"\ncontent 440 4 d15cd15c", "1200", "/dev/sda /dev/sdb1",
    ]  # fmt: skip


def test_a_partition_is_found_on_its_disk():
    marks = Marks(disk_bytes=8 << 30, sector=512, partition=3, start=1 << 20, length=1 << 30, facts=FACTS)
    text = stage_order(ORDER, marks, PLACE, [], "/srv")
    assert as_shell_reads(text, "PARTITION", "START", "SECTORS") == ["3", "2048", str((1 << 30) // SECTOR)]


def test_every_variable_of_the_stage_is_in_the_order():
    stage = (Path(nextboot.__file__).with_name("initramfs") / "stage").read_text()
    wanted = {
        word.strip('"${}:?') for line in stage.splitlines() if line.startswith(': "${') for word in line.split()[1:]
    }
    text = stage_order(ORDER, MARKS, PLACE, [], "/srv")
    assert wanted
    assert wanted <= {line.partition("=")[0] for line in text.splitlines()}


def test_programs_of_file_systems_and_volumes():
    assert programs(PLACE) == list(PROGRAMS)
    assert set(programs(Place("xfs", "1", "vg/store", "/", "/dev/dm-0"))) - set(PROGRAMS) == {"lvm", "xfs_logprint"}


def test_the_unit_quotes_what_systemd_would_take_for_its_own():
    text = unit(ORDER, '/srv/100%/a "b" $c', "/opt/blockbak/bin/python")
    assert 'RequiresMountsFor="/srv/100%%/a \\"b\\" $$c"' in text
    assert 'ExecStart="/opt/blockbak/bin/python" -I -m blockbak -r "/srv/100%%/a \\"b\\" $$c" recover' in text


def test_the_ways_that_there_are():
    assert ways("/dev/sda", []) == "'blockbak cold --at-next-boot /dev/sda' takes the disk before the system starts."
    assert ways("/dev/sda", ["vg/root"]).startswith("'blockbak backup vg/root' takes vg/root from a snapshot; ")
