"""Images and repositories out of bytes held in memory, for tests: no device, no clock, no dice.

``build`` writes one image of a volume's bytes; ``Shelf`` puts images with their manifests into a directory
as a repository does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blockbak.image import codec
from blockbak.image import format as fmt
from blockbak.image.compose import Composer
from blockbak.image.reader import ImageReader
from blockbak.image.view import PointView
from blockbak.image.writer import ImageWriter, Piece, encode_windows
from blockbak.model import extent, hashmap
from blockbak.model.chain import Image
from blockbak.model.extent import ABSENT, BAD, DATA, HOLE, ZERO
from blockbak.model.facts import DIFFERENTIAL, FULL, INCREMENTAL, Closing, Kind, Opening
from blockbak.model.hashmap import BLOCKS_PER_SECTION
from blockbak.model.identity import Identity
from blockbak.repository import manifest

REPOSITORY = "7f3a1c52e0d94b6f8a21c4d5e6f70819"
_CLONE_UNIT = 4096

Range = tuple[int, int]


class Memory:
    """A file in memory: what a writer fills and a reader reads. It can "clone", by copying."""

    def __init__(self, data: bytes = b"", name: str = "memory") -> None:
        self.data = bytearray(data)
        self.name = name

    @property
    def size(self) -> int:
        return len(self.data)

    def write(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        for part in buffers:
            end = offset + len(part)
            self.data.extend(bytes(max(0, end - len(self.data))))
            self.data[offset:end] = part
            offset = end

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    def clone_unit(self, source: Memory) -> int:
        return _CLONE_UNIT

    def clone(self, source: Memory, source_offset: int, offset: int, length: int) -> bool:
        assert [value % _CLONE_UNIT for value in (source_offset, offset, length)] == [0, 0, 0]
        self.copy(source, source_offset, offset, length)
        return True

    def copy(self, source: Memory, source_offset: int, offset: int, length: int) -> None:
        self.write(offset, [source.read(source_offset, length)])


@dataclass(frozen=True)
class State:
    """A volume at one moment. ``holes`` and ``bad`` are byte ranges that ``content`` has zeros in."""

    content: bytes
    holes: Sequence[Range] = ()
    bad: Sequence[Range] = ()


def state(content: bytes | bytearray, holes: Sequence[Range] = (), bad: Sequence[Range] = ()) -> State:
    """``content`` with zeros where nothing is claimed or could be read: what a restore yields."""
    clean = bytearray(content)
    for start, end in (*holes, *bad):
        clean[start:end] = bytes(end - start)
    return State(bytes(clean), holes, bad)


def opening(volume: str, point: str, sequence: int, state: State, block: int, parent: ImageReader | None, **more):
    """The opening of an image; ``more`` replaces fields."""
    fields = {
        "repository": REPOSITORY, "image": f"{sequence:032x}", "volume": volume, "point": point,
        "sequence": sequence, "kind": INCREMENTAL if parent else FULL, "synthetic": False,
        "parent": parent.opening.point if parent else None,
        "parent_root": parent.closing.root if parent else None,
        "identity": Identity("file", f"/srv/{volume}.img"),
        "device_bytes": len(state.content), "block_bytes": block,
        "window_bytes": fmt.window_for(len(state.content), block),
        "logical_sector": 512, "physical_sector": 4096, "created": "2026-01-02T03:04:05Z",
        "source": f"/srv/{volume}.img", "host": "server",
    }  # fmt: skip
    return Opening(**{**fields, **more})


def _closing(writer: ImageWriter, source: str = "scan", read: int = 0) -> Closing:
    return Closing(
        root=writer.root, mode="cold", consistency="cold", change_source=source, read_bytes=read,
        changed_bytes=writer.counts.changed_bytes, **writer.counts.by_name(), frames=writer.counts.frames,
        started="2026-01-02T03:04:05Z", finished="2026-01-02T03:04:06Z", seconds=1.25, program="blockbak 0.1.0",
    )  # fmt: skip


def build(
    sink: Memory, about: Opening, state: State, layers: Sequence[ImageReader] = (), compress: str = "zstd"
) -> ImageReader:
    """Write one image of ``state`` into ``sink``; ``layers`` is the parent's chain, empty for a full."""
    geometry = about.geometry
    view = PointView(list(layers)) if layers else None
    writer = ImageWriter(sink, about, view.claimed_digests() if view else None)
    encoder, block = codec.encoder(compress), geometry.block_bytes
    content = np.frombuffer(state.content, np.uint8)
    bad = extent.table([start for start, _ in state.bad], [end for _, end in state.bad], BAD)
    hole = extent.table([start for start, _ in state.holes], [end for _, end in state.holes], HOLE)
    step = 4 * 1024 * 1024 // block
    number = 0
    for section in range(geometry.sections):
        known = view.section(section) if view else None
        for low in range(0, geometry.section_blocks(section), step):
            first = section * BLOCKS_PER_SECTION + low
            count = min(step, geometry.section_blocks(section) - low)
            start, end = first * block, min((first + count) * block, geometry.device_bytes)
            data = content[start:end]
            nonzero = hashmap.nonzero_blocks(data, block)
            rows = hashmap.digest_blocks(data, block, nonzero)
            kinds = np.where(nonzero, np.uint8(DATA), np.uint8(ZERO))
            kinds[extent.touched(extent.clip(hole, start, end), start, block, count) & ~nonzero] = HOLE
            here = extent.clip(bad, start, end)
            if known is not None:
                changed = hashmap.changed_rows(rows, known.rows[low : low + count])
                for table in (here, extent.of_kind(known.extents, BAD)):
                    changed |= extent.touched(table, start, block, count)
                changed |= kinds == HOLE
                kinds[~changed] = ABSENT
            frames = encode_windows(data, kinds, first, geometry, encoder, whole=view is None)
            writer.add(Piece(number, first, kinds, here, rows, frames))
            number += 1
    writer.finish(_closing(writer, read=geometry.device_bytes))
    return ImageReader(sink)


def compose(sink: Memory, about: Opening, layers: Sequence[ImageReader], compress: str = "zstd") -> ImageReader:
    """A synthetic full of the chain ``layers``, cloning its frames."""
    writer = ImageWriter(sink, about)
    view = PointView(list(layers))
    composer = Composer(view, writer, sink, _CLONE_UNIT)
    work = composer.worker(codec.encoder(compress), lambda _: None)
    for piece in composer.pieces():
        work(piece)
    composer.finish()
    writer.finish(_closing(writer, source="images"))
    return ImageReader(sink)


@dataclass
class Shelf:
    """The images of one volume, in the order they were made, with what each point must restore to."""

    volume: str
    block: int
    compress: str = "zstd"
    files: dict[str, bytes] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    _chains: dict[str, list[ImageReader]] = field(default_factory=dict)

    def add(self, point: str, state: State, kind: Kind = FULL, parent: str | None = None) -> ImageReader:
        """One image more."""
        layers = self._chains[parent] if parent else []
        sequence = len(self.states) + 1
        sink = Memory(name=f"{point}.{kind}.zst")
        about = opening(self.volume, point, sequence, state, self.block, layers[-1] if layers else None, kind=kind)
        reader = build(sink, about, state, layers, self.compress)
        self._chains[point] = [*layers, reader]
        self.states[point] = state
        self._keep(reader, f"{point}.{kind}")
        return reader

    def add_synthetic(self, point: str) -> ImageReader:
        """A synthetic full of a point that is there."""
        layers = self._chains[point]
        top = layers[-1].opening
        about = opening(
            self.volume, point, top.sequence, self.states[point], self.block, None,
            synthetic=True, image=f"{top.sequence + 0x1000:032x}",
        )  # fmt: skip
        reader = compose(Memory(name=f"{point}.full.zst"), about, layers, self.compress)
        assert reader.closing.root == layers[-1].closing.root
        self._keep(reader, f"{point}.full")
        return reader

    def _keep(self, reader: ImageReader, stem: str) -> None:
        data = bytes(reader.source.data)
        image = Image(
            f"{stem}.zst", len(data), reader.closing_sha256, reader.opening, reader.closing, len(reader.sections)
        )
        self.files[f"{stem}.zst"] = data
        self.files[f"{stem}.json"] = manifest.encode(image)

    def write(self, repository: Path) -> Path:
        """Put everything into ``repository``; the volume's directory."""
        where = repository / self.volume
        where.mkdir(parents=True)
        for name, data in self.files.items():
            (where / name).write_bytes(data)
        return where


def read_back(layers: Sequence[ImageReader]) -> bytes:
    """The point that a chain holds, through the reader."""
    view = PointView(list(layers))
    view.check()
    geometry = view.geometry
    out = np.empty(geometry.device_bytes, np.uint8)
    for number in range(geometry.sections):
        section = view.section(number)
        start, end = geometry.section_range(number)
        flaws = view.read(section, 0, out[start:end])
        assert not flaws, flaws
    return out.tobytes()


# --- images of other programs ------------------------------------------------------------------------


def rewrite_manifest(path: Path, **more: object) -> None:
    """A manifest that says something else, with the right digest of itself."""
    blank = re.sub(rb'"sha256": "[0-9a-f]{64}"', b'"sha256": "' + b"0" * 64 + b'"', path.read_bytes())
    for key, value in more.items():
        blank, count = re.subn(rb'"%b": [^,\n]+' % key.encode(), b'"%b": %b' % (key.encode(), value), blank)
        assert count == 1, (key, blank)
    digest = hashlib.sha256(blank).hexdigest().encode()
    path.write_bytes(blank.replace(b'"' + b"0" * 64 + b'"\n}\n', b'"' + digest + b'"\n}\n'))


def rewrite_header(path: Path, version: int) -> None:
    """An image whose header is of another version, with the right digest of the header."""
    with path.open("r+b") as file:
        header = bytearray(file.read(fmt.HEADER_BYTES))
        head = np.frombuffer(header, fmt.HEADER, 1)
        head["version"] = version
        body = bytes(header[: -fmt.SHA256_BYTES])
        file.seek(0)
        file.write(body + hashlib.sha256(body).digest())


__all__ = [
    "DIFFERENTIAL",
    "FULL",
    "INCREMENTAL",
    "Memory",
    "Shelf",
    "State",
    "build",
    "compose",
    "opening",
    "read_back",
    "rewrite_header",
    "rewrite_manifest",
    "state",
]
