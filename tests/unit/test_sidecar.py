"""The sidecar of a raw image: what it says comes back, and no byte of it changes unnoticed."""

from __future__ import annotations

import dataclasses
import json

import msgspec
import numpy as np
import pytest

from blockbak.errors import DamagedSidecar, NewerFormat
from blockbak.image import sidecar
from blockbak.image.sidecar import Range, Sidecar
from blockbak.model import extent, hashmap, selfdigest
from blockbak.model.filesystem import Filesystem
from blockbak.model.identity import Identity
from blockbak.model.partition import Partition, PartitionTable
from blockbak.units import KIB, MIB

SIZE = 300 * MIB + 3 * 512
BLOCK = 64 * KIB


def made(**other: object) -> Sidecar:
    digests = np.arange(64, dtype=np.uint8).reshape(2, 32)
    values: dict[str, object] = {
        "blockbak_sidecar": 1, "program": "blockbak test", "host": "web1", "source": "vg/home",
        "identity": Identity("lv-uuid", "x" * 38), "device_bytes": SIZE, "logical_sector": 512,
        "physical_sector": 4096, "created": "2026-05-01T00:00:00.000Z", "seconds": 1.5, "mode": "cold",
        "consistency": "cold", "read_bytes": SIZE, "stopped": ["unit web.service", "mount /home"],
        "notes": ["A note."],
        "partition_table": PartitionTable("gpt", "id", 512, (Partition(1, MIB, MIB, "type", name="root"),), ("odd",)),
        "filesystems": {"1": Filesystem("ext4", "root", "uuid")}, "lvm_metadata": "contents = 1\n",
        "hooks": {"db": "said\n"}, "block_bytes": BLOCK, "bad": [Range(4096, 512), Range(MIB, 1024)],
        "root": hashmap.root(SIZE, BLOCK, digests), "sections": [row.tobytes().hex() for row in digests],
    }  # fmt: skip
    return Sidecar(**(values | other))


def rewritten(**other: object) -> bytes:
    """A sidecar whose digest is right, whatever it says."""
    members = json.loads(sidecar.encode(made())) | other
    del members["sha256"]
    return selfdigest.encoded(members | {"sha256": selfdigest.BLANK})


def test_what_is_written_is_read() -> None:
    said = sidecar.decode(sidecar.encode(made()), "x.json")
    assert msgspec.structs.asdict(said) | {"sha256": ""} == msgspec.structs.asdict(made()) | {"sha256": ""}
    assert said.sha256 != selfdigest.BLANK
    assert said.geometry.sections == 2
    assert extent.total(said.unread, extent.BAD) == 512 + 1024
    assert sidecar.ranges(said.unread) == said.bad


def test_it_is_json_for_people_and_ends_in_its_digest() -> None:
    data = sidecar.encode(made())
    document = json.loads(data)
    assert list(document) == list(Sidecar.__struct_fields__)
    assert data.endswith(b'"\n}\n')
    assert data.startswith(b'{\n  "blockbak_sidecar": 1,\n')


def test_the_opening_is_that_of_a_full_of_the_same_device() -> None:
    opening = made().opening
    assert (opening.kind, opening.device_bytes, opening.block_bytes) == ("full", SIZE, BLOCK)
    assert (opening.identity, opening.host, opening.source) == (made().identity, "web1", "vg/home")
    assert opening.is_of(made().identity, "web1")
    assert not opening.is_of(made().identity, "web2")


def test_a_flipped_bit_of_any_byte_is_found() -> None:
    data = sidecar.encode(made())
    for place in range(len(data)):
        other = bytearray(data)
        other[place] ^= 1 << place % 8
        with pytest.raises(DamagedSidecar):
            sidecar.decode(bytes(other), "x.json")


def test_every_cut_is_found() -> None:
    data = sidecar.encode(made())
    for length in range(len(data)):
        with pytest.raises(DamagedSidecar):
            sidecar.decode(data[:length], "x.json")


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"{}\n", b'"sha256": "' + b"0" * 64 + b'"\n}\n', b"\xff" * 99])
def test_what_is_no_sidecar_is_damage(content: bytes) -> None:
    with pytest.raises(DamagedSidecar):
        sidecar.decode(content, "x.json")


def test_a_newer_one_is_refused_with_a_sentence() -> None:
    data = rewritten(blockbak_sidecar=2, something="new")
    with pytest.raises(NewerFormat, match="version 2"):
        sidecar.decode(data, "x.json")


def test_a_flipped_version_is_damage_and_no_newer_program() -> None:
    data = sidecar.encode(made()).replace(b'"blockbak_sidecar": 1', b'"blockbak_sidecar": 2')
    with pytest.raises(DamagedSidecar, match="digest does not match"):
        sidecar.decode(data, "x.json")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("device_bytes", 0, "sizes are impossible"),
        ("device_bytes", 1 << 60, "sizes are impossible"),
        ("device_bytes", 10, "a digest for each section"),
        ("block_bytes", 65535, "sizes are impossible"),
        ("block_bytes", 512, "sizes are impossible"),
        ("logical_sector", 0, "sectors are impossible"),
        ("logical_sector", 513, "sectors are impossible"),
        ("physical_sector", 0, "sectors are impossible"),
        ("created", "2026-05-01T00:00:00", "its moment is none"),
        ("created", "yesterday", "its moment is none"),
        ("created", "0001-01-01T00:00:00+23:59", "its moment is none"),
        ("sections", ["00" * 32], "a digest for each section"),
        ("sections", ["00" * 32, "zz" * 32], "a digest of it is none"),
        ("sections", ["00" * 32, "00" * 31], "a digest of it is none"),
        ("sections", ["00" * 32, "00" * 32], "root is not that of"),
        ("root", "00" * 32, "root is not that of"),
        ("bad", [{"start": SIZE, "length": 512}], "outside of the device"),
        ("bad", [{"start": -512, "length": 512}], "outside of the device"),
        ("bad", [{"start": 0, "length": 1 << 70}], "outside of the device"),
        ("bad", [{"start": 0, "length": 0}], "outside of the device"),
        ("bad", [{"start": 1024, "length": 512}, {"start": 0, "length": 512}], "contradict each other"),
        ("bad", [{"start": 0, "length": 1024}, {"start": 512, "length": 1024}], "contradict each other"),
        ("bad", "none", "Expected"),
        ("identity", {"kind": "wwn"}, "missing required field"),
        ("stopped", [1], "Expected"),
    ],
)
def test_what_cannot_be_true_is_damage_whoever_computed_the_digest(key: str, value: object, reason: str) -> None:
    with pytest.raises(DamagedSidecar, match=reason):
        sidecar.decode(rewritten(**{key: value}), "x.json")


def test_a_larger_physical_sector_than_any_today_is_believed() -> None:
    assert sidecar.decode(rewritten(physical_sector=4 * MIB), "x.json").physical_sector == 4 * MIB


def test_a_value_is_not_changed() -> None:
    with pytest.raises(AttributeError):
        made().root = ""  # type: ignore[misc]
    assert dataclasses.is_dataclass(made().identity)
