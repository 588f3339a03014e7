"""Stored bytes that are not what they were: verify names the file, a restore gives the right bytes or none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blockbak.errors import Damage
from blockbak.flow import recover, restore, verify
from blockbak.host.kernel import Kernel
from blockbak.image import format as fmt
from blockbak.image.reader import ImageReader
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB
from tests import children
from tests.doubles import context, new_repository
from tests.images import DIFFERENTIAL, INCREMENTAL, REPOSITORY, Memory, Shelf, State, state
from tests.volumes import SECTION

VOLUME = "vol"
POINTS = [f"20260301T0000{number:02d}Z-0{number:03x}" for number in range(5)]

# Name: size, block, compression. The large ones cross a section's end; most of them is zeros.
KINDS = {
    "small": (200 * KIB + 512, 4 * KIB, "zstd"),
    "raw": (1500 * KIB + 1536, 4 * KIB, "none"),
    "middle": (3 * MIB + 513, 16 * KIB, "zstd:3"),
    "large blocks": (3 * MIB + 7, 256 * KIB, "zstd"),
    "two sections": (SECTION + 700 * KIB + 3, 4 * KIB, "zstd"),
}


class Unsynced(Kernel):
    """Nobody pulls the plug in these tests, and a thousand restores would wait for the disk."""

    def fsync(self, fd: int) -> None:
        pass


def make(kind: str, dice: random.Random) -> Shelf:
    """A full, an incremental, a differential, two incrementals on it (one with holes and unreadable
    sectors), and synthetic fulls of two.
    """
    size, block, compress = KINDS[kind]
    shelf = Shelf(VOLUME, block, compress)
    now = bytearray(size)

    def scribble(times: int, longest: int, until: int = size) -> None:
        for _ in range(times):
            length = min(dice.randrange(1, longest + 2), until)
            start = dice.randrange(until - length + 1)
            data = dice.choice([bytes(length), dice.randbytes(length), dice.randbytes(length), b"%07d" % start])
            now[start : start + length] = (data * (length // len(data) + 1))[:length]

    # The end of the volume stays zeros in the full: frames of zeros, and blocks that a delta fills.
    scribble(14, min(size // 6, 400 * KIB), size * 2 // 3)
    shelf.add(POINTS[0], state(now))
    scribble(6, min(size // 30, 60 * KIB))
    shelf.add(POINTS[1], state(now), INCREMENTAL, POINTS[0])
    scribble(6, min(size // 20, 60 * KIB))
    shelf.add(POINTS[2], state(now), DIFFERENTIAL, POINTS[0])
    scribble(6, min(size // 40, 60 * KIB))
    middle = size // 1024 * 512
    bad = [(middle, min(middle + 1024, size))]
    holes = [(0, min(3 * block, middle))]
    shelf.add(POINTS[3], state(now, holes, bad), INCREMENTAL, POINTS[2])
    scribble(6, min(size // 40, 60 * KIB))
    shelf.add(POINTS[4], state(now, [], bad), INCREMENTAL, POINTS[3])
    shelf.add_synthetic(POINTS[1])
    shelf.add_synthetic(POINTS[3])
    return shelf


# --- the parts of an image ------------------------------------------------------------------------

Part = tuple[str, int, int]


def parts(data: bytes) -> list[Part]:
    """Every byte of an image by what it belongs to: name, first byte, one past the last."""
    reader = ImageReader(Memory(data))
    found, at = [("header", 0, fmt.HEADER_BYTES)], fmt.HEADER_BYTES
    for number, section in enumerate(reader.all_sections()):
        for frame in section.frames:
            start, end = int(frame["offset"]), int(frame["offset"]) + int(frame["stored"])
            if start > at:
                found.append(("padding", at, start))
            zeros = data[start:end] == fmt.zero_frame(int(frame["content"]))
            found.append(("zeros" if zeros else "data", start, end))
            at = end
        start = int(reader.sections["offset"][number])
        if start > at:
            found.append(("padding", at, start))
        at = start + int(reader.sections["length"][number])
        found.append(("section", start, at))
    found.append(("closing", reader.closing_offset, reader.closing_offset + reader.closing_bytes))
    found.append(("seek table", reader.seek_offset, len(data)))
    assert sum(end - start for _, start, end in found) == len(data)
    return found


# --- a repository to hurt ---------------------------------------------------------------------------


@dataclass
class Patient:
    """A repository on disk, with the right bytes of every file and every point."""

    shelf: Shelf
    path: Path
    repository: Repository
    others: Shelf
    dice: random.Random
    restores: int
    tally: dict[str, int] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        return self.shelf.files

    @property
    def states(self) -> dict[str, State]:
        return self.shelf.states

    @property
    def images(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(".zst"))

    def at(self, name: str) -> Path:
        return self.path / VOLUME / name

    @contextmanager
    def with_file(self, name: str, data: bytes) -> Iterator[None]:
        """One file holds other bytes for a while."""
        self.at(name).write_bytes(data)
        try:
            yield
        finally:
            self.at(name).write_bytes(self.files[name])

    # --- what must be so while a file is damaged ----------------------------------------------------

    def verified(self) -> verify.Report:
        return verify.verify(self.repository, [], self.world, pick=lambda: 0.0)

    @property
    def world(self):
        return context(self.path.parent / "state", kernel=Unsynced())

    def accused(self, names: Sequence[str], what: object) -> None:
        """Verify finds damage and names one of the files: as the image of a verdict, or as the manifest in the
        reason that the verdict on its image gives.
        """
        report = self.verified()
        assert not report.ok, what
        assert report.damaged, what
        bad = [verdict for verdict in report.images if not verdict.ok]
        told = {verdict.file for verdict in bad}
        told |= {name for name in names for verdict in bad for flaw in verdict.damage if name in flaw.reason}
        assert told & set(names), (what, bad)

    def restored(self, point: str, what: object) -> bool:
        """The point comes back right, or not at all; whether it did."""
        target = self.path.parent / "target"
        wanted = self.states[point]
        try:
            done = restore.restore(self.repository, restore.Request(point, str(target)), self.world)
        except Damage:
            assert not target.exists(), what
            return False
        finally:
            assert not target.with_name("target.partial").exists(), what
        assert target.read_bytes() == wanted.content, what
        assert [(row["start"], row["start"] + row["length"]) for row in done.unreadable] == list(wanted.bad), what
        target.unlink()
        return True

    def salvaged(self, point: str, what: object) -> None:
        """With keep_going, what is not named is right."""
        target = self.path.parent / "salvaged"
        request = restore.Request(point, str(target), keep_going=True)
        try:
            done = restore.restore(self.repository, request, self.world)
        except Damage:
            assert not target.exists(), what
            return
        found, wanted = bytearray(target.read_bytes()), bytearray(self.states[point].content)
        # Where only the seek table or a manifest is damaged, there may be none.
        for flaw in done.flaws:
            for side in (found, wanted):
                side[flaw.start : flaw.start + flaw.length] = bytes(flaw.length)
        assert found == wanted, what
        for path in target.parent.glob("salvaged*"):
            path.unlink()

    def rescued(self, point: str, what: object) -> bool:
        """The rescue script, which knows no BLAKE3, delivers the right bytes too, or none."""
        target = self.path.parent / "rescued"
        done = children.rescue(self.path, "restore", point, target)
        assert "Traceback" not in done.err, (what, done.err)
        if done.code == 4:
            assert not target.exists(), what
            return False
        wanted = self.states[point]
        assert done.code == (3 if wanted.bad else 0), (what, done)
        assert target.read_bytes() == wanted.content, what
        target.unlink()
        return True

    def commanded(self, names: Sequence[str], point: str, what: object) -> None:
        """The same through the command line: verify 4, restore 0, 3 or 4."""
        done = children.run(self.path, "verify", "--json")
        assert done.code == 4, (what, done)
        bad = [image for image in done.document["images"] if not image["ok"]]
        assert any(name in json.dumps(image) for name in names for image in bad), what
        target = self.path.parent / "commanded"
        done = children.run(self.path, "restore", point, target, "--json")
        if done.code == 4:
            assert not target.exists(), what
            assert done.document["error"]["exit"] == 4
            return
        wanted = self.states[point]
        assert done.code == (3 if wanted.bad else 0), (what, done)
        assert target.read_bytes() == wanted.content, what
        target.unlink()

    @property
    def some_points(self) -> list[str]:
        """As many as there is time for."""
        return self.dice.sample(POINTS, self.restores)

    def count(self, what: str) -> None:
        self.tally[what] = self.tally.get(what, 0) + 1


@pytest.fixture
def patient(rng, tmp_path, request, times) -> Patient:
    path = tmp_path / "repository"
    repository = new_repository(path, repository_id=REPOSITORY)
    shelf, others = make(request.param, rng), make(request.param, rng)
    shelf.write(path)
    found = Patient(shelf, path, repository, others, rng, times(2, len(POINTS)))
    assert found.verified().ok
    for point in POINTS:
        assert found.restored(point, "before anything was done")
    return found


every_kind = pytest.mark.parametrize("patient", KINDS, indirect=True)


# --- one bit --------------------------------------------------------------------------------------


PARTS = ("header", "data", "section", "closing", "seek table", "manifest")
"""Those that every kind above has, in some image at least."""


def pick(patient: Patient, dice: random.Random) -> tuple[str, str, int]:
    """A file, what the byte belongs to, and its place; each part of an image as often as the others."""
    if dice.random() < 0.2:
        return place_in(patient, dice, "manifest")
    name = dice.choice(patient.images)
    if dice.random() < 0.3:
        return name, "anywhere", dice.randrange(len(patient.files[name]))
    known = parts(patient.files[name])
    what = dice.choice(sorted({part[0] for part in known}))
    _, start, end = dice.choice([part for part in known if part[0] == what])
    return name, what, dice.randrange(start, end)


def place_in(patient: Patient, dice: random.Random, what: str) -> tuple[str, str, int]:
    """A byte of that part, of any image that has it."""
    if what == "manifest":
        name = dice.choice(patient.images).removesuffix(".zst") + ".json"
        return name, what, dice.randrange(len(patient.files[name]))
    name, (_, start, end) = dice.choice(
        [(name, part) for name in patient.images for part in parts(patient.files[name]) if part[0] == what]
    )
    return name, what, dice.randrange(start, end)


@pytest.mark.slow
@every_kind
def test_one_flipped_bit_is_found_and_never_restored(patient, rng, times, tell):
    for number in range(times(24, 1500)):
        # Through all parts in turn first: dice alone would leave one out in every third run.
        name, part, place = place_in(patient, rng, PARTS[number]) if number < len(PARTS) else pick(patient, rng)
        data = bytearray(patient.files[name])
        bit = rng.randrange(8)
        data[place] ^= 1 << bit
        what = f"try {number}: bit {bit} of byte {place} ({part}) of {name}"
        with patient.with_file(name, bytes(data)):
            patient.accused([name], what)
            lost = [point for point in patient.some_points if not patient.restored(point, what)]
            if lost:
                patient.count("points lost")
                patient.salvaged(rng.choice(lost), what)
            if number % 8 == 0:
                patient.rescued(rng.choice(POINTS), what)
            if number % 20 == 7:
                patient.commanded([name], rng.choice(POINTS), what)
        patient.count(part)
    for part, count in sorted(patient.tally.items()):
        tell(part, count)
    assert set(PARTS) <= patient.tally.keys()
    assert patient.verified().ok


def test_the_parts_that_are_flipped_are_of_every_sort(rng):
    """Frames of zeros, padding and raw frames are in the images above."""
    found = set()
    for kind in KINDS:
        shelf = make(kind, rng)
        for name, data in shelf.files.items():
            if name.endswith(".zst"):
                found |= {part for part, _, _ in parts(data)}
        assert any(then.bad and then.holes for then in shelf.states.values())
    assert found == {"header", "padding", "zeros", "data", "section", "closing", "seek table"}


# --- larger damage ----------------------------------------------------------------------------------


def both(name: str) -> list[str]:
    """An image and its manifest: where the two disagree, either may be named."""
    stem = name.rpartition(".")[0]
    return [f"{stem}.zst", f"{stem}.json"]


def examine(patient: Patient, name: str, data: bytes, what: str, dice: random.Random, *, rescue: bool) -> None:
    """All that must be so while ``name`` holds ``data``."""
    if data == patient.files[name]:
        return
    with patient.with_file(name, data):
        patient.accused(both(name), what)
        for point in patient.some_points:
            patient.restored(point, what)
        if rescue:
            patient.rescued(dice.choice(POINTS), what)
    patient.count("damages")


@pytest.mark.slow
@every_kind
def test_a_cut_image_is_found_at_every_frame_border(patient, rng, times, tell):
    for name in rng.sample(patient.images, times(3, len(patient.images))):
        data = patient.files[name]
        ends = sorted({end for _, _, end in parts(data)} - {len(data)})
        borders = rng.sample(ends, min(len(ends), times(5, 10_000)))
        for cut in [0, *borders, *(rng.randrange(len(data)) for _ in range(times(2, 60)))]:
            examine(patient, name, data[:cut], f"{name} cut to {cut}", rng, rescue=rng.random() < 0.1)
    tell("cuts", patient.tally["damages"])


@pytest.mark.slow
@pytest.mark.parametrize("patient", [kind for kind in KINDS if kind != "small"], indirect=True)
def test_exchanged_frames_are_found(patient, rng, times, tell):
    """Each alone is good, and zstd would decode the whole."""
    for name in rng.sample(patient.images, times(4, len(patient.images))):
        data = patient.files[name]
        frames = [(start, end) for part, start, end in parts(data) if part in ("data", "zeros")]
        equal = [
            (one, two) for one in frames for two in frames if one[0] < two[0] and one[1] - one[0] == two[1] - two[0]
        ]
        pairs = rng.sample(equal, min(len(equal), times(2, 100)))
        if len(frames) > 1:
            pairs += [tuple(sorted(rng.sample(frames, 2))) for _ in range(times(2, 40))]
        for (a, b), (c, d) in pairs:
            changed = data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]
            examine(patient, name, changed, f"{name}: {a}-{b} and {c}-{d} exchanged", rng, rescue=rng.random() < 0.2)
    tell("exchanges", patient.tally["damages"])


@pytest.mark.slow
@every_kind
def test_a_file_in_the_place_of_another_is_found(patient, rng, times, tell):
    """Of another point, of the same name out of another history, and without its other half."""
    for name in rng.sample(sorted(patient.files), times(6, len(patient.files))):
        end = name.rpartition(".")[2]
        others = [other for other in sorted(patient.files) if other.endswith(end) and other != name]
        for other in rng.sample(others, times(2, len(others))):
            examine(patient, name, patient.files[other], f"{other} as {name}", rng, rescue=rng.random() < 0.1)
        examine(patient, name, patient.others.files[name], f"{name} of another history", rng, rescue=True)
    tell("exchanges", patient.tally["damages"])


@pytest.mark.slow
@every_kind
def test_bytes_too_many_or_none_at_all_are_found(patient, rng, times, tell):
    for name in rng.sample(sorted(patient.files), times(4, len(patient.files))):
        data = patient.files[name]
        examine(patient, name, b"", f"{name} is empty", rng, rescue=rng.random() < 0.3)
        examine(patient, name, data + b"\0", f"{name} with a byte more", rng, rescue=rng.random() < 0.3)
        examine(patient, name, data + b"\n", f"{name} with a line more", rng, rescue=False)
        tails = [rng.randrange(len(data)) for _ in range(3)]
        if name.endswith(".zst"):
            tails += [start for part, start, _ in parts(data) if part in ("closing", "seek table")]
        for start in tails:
            what = f"{name}, bytes from {start} on twice"
            examine(patient, name, data + data[start:], what, rng, rescue=rng.random() < 0.3)
    tell("damages", patient.tally["damages"])


@pytest.mark.slow
@every_kind
def test_a_lost_sector_is_found(patient, rng, times, tell):
    """Zeros, or another sector's bytes, where a disk or a controller mislaid a write."""
    for _ in range(times(8, 400)):
        name = rng.choice(sorted(patient.files))
        data = patient.files[name]
        unit = rng.choice([512, 4096])
        at = rng.randrange(len(data)) // unit * unit
        other = rng.randrange(len(data)) // unit * unit
        length = min(unit, len(data) - at)
        piece = rng.choice([bytes(length), data[other : other + length].ljust(length, b"\0")])
        what = f"{name}: {length} bytes at {at} lost"
        examine(patient, name, data[:at] + piece + data[at + length :], what, rng, rescue=rng.random() < 0.2)
    tell("damages", patient.tally["damages"])


@every_kind
def test_a_missing_file_is_told_and_the_others_serve(patient, rng):
    for name in patient.images:
        path = patient.at(name)
        path.unlink()
        patient.accused(both(name), f"{name} is gone")
        for point in POINTS:
            patient.restored(point, f"{name} is gone")
        path.write_bytes(patient.files[name])
    assert patient.verified().ok


@every_kind
def test_a_damaged_orphan_is_not_adopted(patient, rng, times):
    """Without its manifest an image is believed only after every byte of it was checked."""
    for _ in range(times(8, 400)):
        name, part, place = pick(patient, rng)
        if part == "manifest":
            continue
        data = bytearray(patient.files[name])
        data[place] ^= 1 << rng.randrange(8)
        damaged = bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        if damaged == patient.files[name]:
            continue
        manifest = patient.at(name).with_suffix(".json")
        manifest.unlink()
        with patient.with_file(name, damaged):
            report = recover.recover(patient.repository, patient.world)
            assert not report.adopted, (name, part, place)
            assert any(name in line for line in report.left), (name, part, place)
            assert not manifest.exists()
            assert patient.at(name).read_bytes() == damaged, "an orphan is never changed or deleted"
        manifest.write_bytes(patient.files[manifest.name])
    assert patient.verified().ok


LIES = {
    "a negative size": {"image_bytes": -1}, "a size beyond all files": {"image_bytes": 2**70},
    "another closing record": {"closing_sha256": "00" * 32}, "more sections": {"sections": 10**9},
    "no opening": {"opening": {}}, "no closing": {"closing": None},
    "a file elsewhere": {"image_file": "../../etc/passwd"}, "itself as the image": {"image_file": f"{POINTS[0]}.full.json"},
    "a longer volume": {"opening.device_bytes": 10**6}, "no block": {"opening.block_bytes": 0},
    "an odd window": {"opening.window_bytes": 12345}, "another kind": {"opening.kind": "differential"},
    "a negative sequence": {"opening.sequence": -5}, "another root": {"closing.root": "00" * 32},
    "another volume": {"opening.volume": "vil"}, "another repository": {"opening.repository": "0" * 32},
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("patient", ["small"], indirect=True)
def test_a_manifest_that_is_whole_but_lies_is_damage(patient, lie, rng):
    """Its digest is right, what it says is not what its image says: damage, and no crash."""
    name = f"{POINTS[0]}.full.json"
    document = json.loads(patient.files[name])
    for place, value in LIES[lie].items():
        *above, last = place.split(".")
        (document[above[0]] if above else document)[last] = value
    text = json.dumps({**document, "sha256": "0" * 64}, indent=2).encode() + b"\n"
    text = text[:-68] + fmt.sha256(text).hex().encode() + text[-4:]
    with patient.with_file(name, text):
        patient.accused(both(name), lie)
        for point in POINTS:
            patient.restored(point, lie)
        patient.rescued(POINTS[0], lie)
        patient.rescued(POINTS[4], lie)
