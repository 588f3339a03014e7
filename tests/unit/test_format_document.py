"""docs/format.md and the code say the same: its tables are read and compared."""

import dataclasses
import inspect
import re
import struct
from pathlib import Path
from types import NoneType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
from blake3 import blake3

from blockbak.image import format as fmt
from blockbak.image import sidecar
from blockbak.image.codec import StoreEncoder
from blockbak.model import extent, hashmap
from blockbak.model.events import EVENTS, Entry
from blockbak.model.facts import Closing, Opening
from blockbak.model.identity import Identity
from blockbak.model.pin import PinFile
from blockbak.repository import manifest, rescue

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()


def tables(text: str) -> list[list[dict[str, str]]]:
    """The tables of a part of the document, a row a dict."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.strip().split("\n")]
        found.append([dict(zip(rows[0], row, strict=True)) for row in rows[2:]])
    return found


def part(heading: str) -> str:
    """From a heading to the next of the same or a higher level."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{level}}} |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def code(cell: str) -> str:
    return cell.strip("`")


RECORDS = {
    heading: tables(part(f"### `{heading}`")) for heading in re.findall(r"^### `([A-Z_]+)`$", TEXT, re.MULTILINE)
}
KINDS = {"u": "integer", "S": "text", "V": "bytes"}


def test_every_record_has_its_table():
    assert set(RECORDS) == set(fmt.RECORDS)


@pytest.mark.parametrize("name", fmt.RECORDS)
def test_a_record_is_described_field_by_field(name):
    dtype = fmt.RECORDS[name]
    described = [(code(row["field"]), int(row["offset"]), int(row["bytes"]), row["type"]) for row in RECORDS[name][0]]
    actual = [
        (field, offset, kind.itemsize, KINDS[kind.kind])
        for field, (kind, offset) in ((field, dtype.fields[field][:2]) for field in dtype.names)
    ]
    assert described == actual
    assert sum(size for _, _, size, _ in described) == dtype.itemsize, "packed"


@pytest.mark.parametrize("name", fmt.RECORDS)
def test_integers_are_little_endian(name):
    dtype = fmt.RECORDS[name]
    assert all(dtype[field].str[0] in "<|" for field in dtype.names)


def test_the_parts_after_a_record_have_the_sizes_that_are_told():
    assert {count: int(size) for size, count in re.findall(r"(\d+) \u00d7 `(\w+)`", TEXT)} == {
        "rows": fmt.ROW_BYTES,
        "extents": extent.EXTENT.itemsize,
        "frames": fmt.FRAME.itemsize,
        "sections": fmt.SECTION_ENTRY.itemsize,
    }
    assert f"up to byte {fmt.HEADER_BYTES - fmt.SHA256_BYTES} of the file" in TEXT


@pytest.mark.parametrize("heading", ["### Magics", "### Limits"])
def test_constants_have_the_values_that_are_told(heading):
    (rows,) = tables(part(heading))
    for row in rows:
        name = code(row["name"])
        home = hashmap if name == "BLOCKS_PER_SECTION" else fmt
        assert getattr(home, name) == int(row["value"], 0), name


def test_no_magic_or_limit_is_left_out():
    told = {code(row["name"]) for heading in ("### Magics", "### Limits") for row in tables(part(heading))[0]}
    ending = ("_MAGIC", "_MIN", "_MAX", "_BYTES", "_DEFAULT", "_FEATURES", "_VERSION")
    names = {name for name in vars(fmt) if name.isupper() and name.endswith(ending) and not name.startswith("_")}
    assert names <= told


@pytest.mark.parametrize("record", ["HEADER", "SECTION", "CLOSING"])
def test_signatures_and_magics_stand_in_the_tables(record):
    told = {code(row["field"]): code(row["meaning"]) for row in RECORDS[record][0]}
    assert told["signature"].encode() == getattr(fmt, f"SIGNATURE_{record}")
    assert told["magic"] == f"{record}_MAGIC"


def test_kinds_of_extents():
    rows = tables(part("## 5. Extents and stored blocks"))[0]
    told = {code(row["name"]).lower(): int(row["value"]) for row in rows}
    assert told == {name: kind for kind, name in extent.KIND_NAMES.items()}


# --- JSON -----------------------------------------------------------------------------------------

WORDS = {
    str: "text", int: "integer", bool: "true or false", float: "number", list[str]: "list of texts",
    list[sidecar.Range]: "list of objects",
}  # fmt: skip


def word(hint: object) -> str:
    if get_origin(hint) is Literal:
        return "text"
    if get_origin(hint) is Union or isinstance(hint, type(str | None)):
        (inner,) = set(get_args(hint)) - {NoneType}
        return f"{word(inner)} or null"
    return WORDS.get(hint, "object")


@pytest.mark.parametrize("kind", [Opening, Identity, Closing, manifest.Manifest, sidecar.Sidecar, Entry, PinFile])
def test_keys_and_types_of_json(kind):
    (rows,) = tables(part(f"### `{kind.__name__}`"))
    hints = get_type_hints(kind)
    names = (
        [each.name for each in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind.__struct_fields__
    )
    assert [(code(row["key"]), row["type"]) for row in rows] == [(name, word(hints[name])) for name in names]


def test_events_are_all_named():
    (rows,) = tables(part("### `Entry`"))
    (told,) = [row["meaning"] for row in rows if code(row["key"]) == "event"]
    assert tuple(re.findall(r"`(\w+)`", told)) == EVENTS


def test_kinds_of_images_and_identities_are_all_named():
    (rows,) = tables(part("### `Opening`"))
    (kind,) = [row["meaning"] for row in rows if code(row["key"]) == "kind"]
    assert set(re.findall(r"`([\w-]+)`", kind)) == set(get_args(get_type_hints(Opening)["kind"]))
    (rows,) = tables(part("### `Identity`"))
    (kind,) = [row["meaning"] for row in rows if code(row["key"]) == "kind"]
    told = set(re.findall(r"`([\w-]+)`", kind)) - {"value"}
    assert told == set(re.findall(r"'([\w-]+)'", inspect.getdoc(Identity).split("``diskseq``")[0]))


# --- bytes that are told --------------------------------------------------------------------------


def test_the_frame_of_zeros_is_the_one_shown():
    (shown,) = re.findall(r"^    ((?:[0-9a-f]{2} ?)+)$", part("### Frames of zeros"), re.MULTILINE)
    assert bytes.fromhex(shown) == fmt.zero_frame(fmt.WINDOW_MIN)
    rows = tables(part("### Frames of zeros"))[0]
    assert sum(int(row["bytes"]) for row in rows) == len(fmt.zero_frame(fmt.WINDOW_MIN))


@pytest.mark.parametrize("length", [1, 511, 512, 131072, 131073, 262144, 3 * 131072 + 7, fmt.ZERO_FRAME_MAX])
def test_frames_of_zeros_follow_the_description(length):
    pieces = [131072] * ((length - 1) // 131072)
    last = length - sum(pieces)
    told = struct.pack("<IBBI", fmt.ZSTD_MAGIC, 0x80, 0x38, length)
    told += bytes.fromhex("02001000") * len(pieces) + (last * 8 + 3).to_bytes(3, "little") + b"\0"
    assert fmt.zero_frame(length) == told == rescue.zero_frame(length)


def test_the_store_frame_begins_as_told():
    (row,) = [row for row in tables(part("### Frames of data"))[0] if row["value"].startswith("0x")]
    frame = b"".join(StoreEncoder().encode(memoryview(b"content")))
    assert frame[4] == int(row["value"][:4], 16)
    assert frame[9:12] == (7 * 8 + 1).to_bytes(3, "little")


def test_the_root_is_computed_as_told():
    digests = bytes(range(64))
    told = blake3(b"blockbak root 1" + struct.pack("<QI", 10**9, 65536) + digests).hexdigest()
    assert hashmap.root(10**9, 65536, np.frombuffer(digests, np.uint8).reshape(2, 32)) == told
    rows = np.arange(8, dtype="<u8").reshape(2, 4)
    bad = extent.table([512, 4096], [1024, 8192], [extent.BAD, extent.ZERO])
    assert hashmap.section_digest(rows, bad) == blake3(rows.tobytes() + struct.pack("<QQ", 512, 512)).digest()


def test_padding_is_as_told():
    for length in (fmt.PADDING_MIN, 100):
        assert fmt.padding(length) == struct.pack("<II", fmt.PADDING_MAGIC, length - 8) + bytes(length - 8)


def test_windows_grow_as_told():
    tib = 1 << 40
    sizes = [fmt.window_for(size, 4096) >> 10 for size in (1, 16 * tib, 16 * tib + 1, 32 * tib, 32 * tib + 1)]
    assert sizes == [256, 256, 512, 512, 1024]
    assert fmt.window_for(1, 1 << 20) == 1 << 20


# --- rescue.py has the same facts a second time ------------------------------------------------------


@pytest.mark.parametrize("name", fmt.RECORDS)
def test_rescue_has_the_same_records(name):
    dtype, packed = fmt.RECORDS[name], getattr(rescue, name)
    assert packed.size == dtype.itemsize
    offsets = [
        struct.calcsize("<" + "".join(fields[:count]))
        for fields in [re.findall(r"\d*[A-Za-z]", packed.format)]
        for count in range(len(fields))
    ]
    assert offsets == [dtype.fields[field][1] for field in dtype.names]


def test_rescue_has_the_same_constants():
    for name, value in vars(rescue).items():
        if name.isupper() and name.endswith(("_MAGIC", "_BYTES", "_VERSION")):
            assert getattr(fmt, name) == value, name
    assert (rescue.DATA, rescue.BAD) == (extent.DATA, extent.BAD)
    assert rescue.BLOCKS_PER_SECTION == hashmap.BLOCKS_PER_SECTION
