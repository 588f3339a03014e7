"""Sources that are found anew at each run: by what is known of a device, and by a tag of LVM's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from blockbak.host import selection
from blockbak.host.system import System
from blockbak.model.config import Selector
from blockbak.model.snapshot import VOLUME_FIELDS

MIB = 1 << 20


@pytest.fixture
def disk(loop):
    """A loop device with two partitions."""
    device = loop(64 * MIB)
    table = "label: gpt\nsize=8MiB\nsize=8MiB\n"
    subprocess.run(["sfdisk", "--quiet", device.path], input=table.encode(), check=True, capture_output=True)
    subprocess.run(["partx", "--update", device.path], check=True, capture_output=True)
    yield device
    subprocess.run(["partx", "--delete", device.path], check=False, capture_output=True)


def test_a_disk_stands_for_its_partitions_unless_partitions_are_asked_for(disk):
    name = Path(disk.path).name
    diskseq = selection.properties(name, System())["DISKSEQ"]
    assert selection.found(Selector(udev=(("DISKSEQ", diskseq),))) == [disk.path]
    parts = selection.found(Selector(udev=(("DEVTYPE", "partition"), ("DISKSEQ", diskseq))))
    assert parts == [f"{disk.path}p1", f"{disk.path}p2"]
    assert selection.found(Selector(udev=(("DEVNAME", f"{name}*"), ("PARTN", "2")))) == [f"{disk.path}p2"]


def test_all_properties_must_fit_and_nothing_is_not_everything(disk):
    name = Path(disk.path).name
    assert selection.found(Selector(udev=(("DEVNAME", name), ("ID_SERIAL", "*")))) == []
    assert selection.found(Selector()) == []


def lvs(folder: Path, *volumes: dict[str, str]) -> None:
    """An `lvs` that tells of these volumes."""
    rows = [
        dict.fromkeys(VOLUME_FIELDS, "") | {"vg_free": "0", "vg_extent_size": "4194304", "lv_size": "4194304"} | one
        for one in volumes
    ]
    (folder / "report.json").write_text(json.dumps({"report": [{"lv": rows}]}))
    program = folder / "lvs"
    program.write_text(f"#!/bin/sh\ncat {folder}/report.json\n")
    program.chmod(0o755)


def test_the_volumes_with_a_tag_but_not_our_snapshots_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    lvs(
        tmp_path,
        {"vg_name": "vg", "lv_name": "home", "lv_tags": "backup,web"},
        {"vg_name": "vg", "lv_name": "db", "lv_tags": "backups"},
        {"vg_name": "aside", "lv_name": "srv", "lv_tags": "backup"},
        {"vg_name": "vg", "lv_name": "blockbak-1234abcd", "lv_tags": "backup"},
    )
    assert selection.found(Selector(lvm_tag="backup")) == ["aside/srv", "vg/home"]
    assert selection.found(Selector(lvm_tag="other")) == []
