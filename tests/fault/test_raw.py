"""Raw images when something fails: a call, the power, the room, the medium. Nothing half-made stays, or it is told."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from blockbak.errors import (
    BlockbakError,
    Damage,
    Interrupted,
    NoSidecar,
    NotReadBack,
    Refused,
    TargetExists,
    TargetFailed,
    TargetFull,
)
from blockbak.flow import adopt, raw, rawcheck, rawrestore
from blockbak.flow.source import Settled
from blockbak.image import sidecar
from blockbak.units import KIB, MIB
from tests.doubles import Killed, context, new_repository
from tests.faults import BadMedium, FaultyKernel, PowerCut, QuickKernel, QuickMortal
from tests.patterns import SECTOR, stamp
from tests.scene import open_descriptors, write_at

BLOCK = 64 * KIB
SIZE = 40 * BLOCK + 3 * SECTOR
SEED = 7
KEPT = (0, 1, 99)
CUTS = [(kept,) for kept in KEPT] if os.environ.get("BLOCKBAK_SOAK") else [KEPT]
"""How many of the names that were not flushed a power cut leaves: one number after the other, in a soak each by itself."""
MOST = 200


def volume(path: Path, sequence: int = 1) -> Path:
    """A source whose sectors name themselves, with zeros in the middle and an odd end."""
    with path.open("xb") as file:
        file.truncate(SIZE)
    for start, count in ((0, 300), (20 * BLOCK // SECTOR, 5), (SIZE // SECTOR - 9, 9)):
        write_at(path, start * SECTOR, stamp(start, count, sequence, SEED))
    return path


class Place:
    """A directory with a source, or with an image that was there before."""

    def __init__(self, folder: Path, *, old: bool = False) -> None:
        folder.mkdir()
        self.folder, self.old = folder, old
        self.source = volume(folder / "source.img")
        self.image = folder / "disk.img"
        if old:
            other = volume(folder / "other.img", 9)
            raw.make(raw.Request(str(other), str(self.image)), self.world())
            other.unlink()

    def world(self, kernel=None):
        return context(self.folder / "state", kernel=kernel or QuickKernel())

    def make(self, kernel=None, *, overwrite: bool | None = None):
        wanted = self.old if overwrite is None else overwrite
        return raw.make(raw.Request(str(self.source), str(self.image), overwrite=wanted), self.world(kernel))

    def names(self) -> set[str]:
        return {name for name in os.listdir(self.folder) if name.startswith("disk.img")}

    def verdict(self):
        (found,) = rawcheck.verify_raw([str(self.image)], self.world(), pick=lambda: 0.0)
        return found

    def check_made(self) -> None:
        """The image and its sidecar are those of the source."""
        assert self.image.read_bytes() == self.source.read_bytes()
        assert self.verdict().ok
        assert self.names() == {"disk.img", "disk.img.json"}


def attempt(run, kernel) -> list[str]:
    """Run it; what is wrong with the way it ended."""
    before, wrong = open_descriptors(), []
    try:
        run(kernel)
    except Refused as error:
        wrong.append(f"it was refused, though it was the machine that failed: {error}")
    except BlockbakError as error:
        if error.exit_code not in (1, 4) or not kernel.fired:
            wrong.append(f"exit {error.exit_code}: {error}")
    except Exception as error:  # noqa: BLE001 - whatever else it is, it is the finding
        wrong.append(f"{type(error).__name__} escaped: {error}")
    wrong += kernel.wrongs
    for fd, path in open_descriptors().items():
        if before.get(fd) != path:
            wrong.append(f"{path} was left open")
            os.close(fd)
    return wrong


NUMBERS = {
    "open": (errno.EMFILE, errno.EIO), "close": (errno.EIO,), "preadv": (errno.EIO,),
    "pwritev": (errno.EIO, errno.ENOSPC), "fsync": (errno.EIO, errno.ENOSPC), "truncate": (errno.EIO,),
    "rename": (errno.EIO, errno.ENOSPC), "unlink": (errno.EIO,), "lock": (errno.ENOLCK,), "drop_cache": (errno.EIO,),
    "punch": (errno.EIO,),
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "old"),
    [
        (call, old)
        for call in NUMBERS
        for old in (False, True)
        if call not in ("punch", "lock") and (old or call != "unlink")
    ],
)
def test_a_failing_call_costs_no_more_than_the_image(call: str, old: bool, memory: Path) -> None:
    """Whatever is left is a whole image with its sidecar, an image that is told as unfinished, or nothing."""
    wrong = []
    for number in NUMBERS[call]:
        for at in range(1, MOST):
            place = Place(memory / f"{number}-{at}", old=old)
            before = place.image.read_bytes() if old else b""
            kernel = FaultyKernel(call, number, at)
            found = attempt(place.make, kernel)
            names = place.names()
            if {name for name in names if name.endswith(".partial")} and call != "unlink":
                found.append(f"a partial stays: {names}")
            if "disk.img.json" in names and not place.verdict().ok and call != "preadv":
                found.append("an image beside another one's sidecar")
            if names == {"disk.img", "disk.img.json"} and place.image.read_bytes() not in (
                before, place.source.read_bytes(),
            ) and call != "preadv":  # fmt: skip
                found.append("the image is neither the old one nor the new one")
            place.make(overwrite=True)
            place.check_made()
            wrong += [f"{call} {at} of {kernel.what}, {errno.errorcode[number]}: {text}" for text in found]
            shutil.rmtree(place.folder)
            if not kernel.fired:
                break
        assert at > 1, f"no call of {call} was made"
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("old", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("cut", [None, *CUTS], ids=["kill", *(f"cut {kept[0]}" for kept in CUTS)])
def test_a_crash_at_any_call_leaves_a_whole_image_or_an_unfinished_one(
    old: bool, cut: tuple[int, ...] | None, memory: Path
) -> None:
    """A new sidecar never lies beside other bytes than its own, and the next run with --yes succeeds."""
    unfinished = 0
    for at in range(1, MOST):
        place = Place(memory / str(at), old=old)
        before_bytes = place.image.read_bytes() if old else b""
        kernel = QuickMortal(at) if cut is None else PowerCut(at)
        before = open_descriptors()
        try:
            place.make(kernel)
        except Killed:
            pass
        else:
            assert at > 10
            break
        finally:
            for fd, path in open_descriptors().items():
                if before.get(fd) != path:
                    os.close(fd)
        if cut is not None:
            kernel.lose(cut[at % len(cut)])
        names = place.names()
        if "disk.img" in names and "disk.img.json" in names:
            assert place.verdict().ok, f"killed at {at}, {kernel.log[-1]}"
            assert place.image.read_bytes() in (before_bytes, place.source.read_bytes())
        elif "disk.img" in names:
            unfinished += 1
            with pytest.raises(NoSidecar, match="never finished"):
                place.verdict()
        if names - {"disk.img.partial"}:  # one that says itself whose it is may go unasked
            with pytest.raises(TargetExists):
                place.make(overwrite=False)
        place.make(overwrite=True)
        place.check_made()
        shutil.rmtree(place.folder)
    assert unfinished or cut == (0,), "it was never killed between the image and its sidecar"


def test_an_interrupted_run_leaves_nothing_half_made(memory: Path) -> None:
    for at in range(1, MOST):
        place, looks = Place(memory / str(at)), iter(range(1, MOST))

        def check(looks=looks, at=at):
            if next(looks) >= at:
                raise Interrupted(state="it was a test")

        world = replace(place.world(), check=check)
        try:
            raw.make(raw.Request(str(place.source), str(place.image)), world)
        except Interrupted:
            assert place.names() == set()
        else:
            assert at > 2
            place.check_made()
            break


def test_a_full_disk_leaves_nothing(tmp_path: Path, tmpfs) -> None:
    """The room grows a page at a time until it is enough: it ends at each place where it can."""
    where = tmpfs(8 * MIB)
    source, image, filler = volume(tmp_path / "source.img"), where / "disk.img", where / "filler"
    filler.touch()
    failures = 0
    for pages in range(0, 200, 3):
        with filler.open("r+b") as file:
            stats = os.fstatvfs(file.fileno())
            size = file.seek(0, os.SEEK_END) + (stats.f_bfree - pages) * stats.f_bsize
            file.truncate(size)
            os.posix_fallocate(file.fileno(), 0, size)
        try:
            raw.make(raw.Request(str(source), str(image)), context(tmp_path / "state"))
        except TargetFull:
            failures += 1
            assert os.listdir(where) == ["filler"]
        else:
            break
    assert failures > 3
    assert image.read_bytes() == source.read_bytes()


def test_an_old_image_outlives_a_run_that_finds_no_room(tmp_path: Path, tmpfs) -> None:
    where = tmpfs(6 * MIB)
    small, large = tmp_path / "small.img", tmp_path / "large.img"
    small.write_bytes(stamp(0, 200, 1, SEED))
    large.write_bytes(stamp(0, 16 * MIB // SECTOR, 1, SEED))
    image, world = where / "disk.img", context(tmp_path / "state")
    raw.make(raw.Request(str(small), str(image)), world)
    with pytest.raises(TargetFull):
        raw.make(raw.Request(str(large), str(image), overwrite=True), world)
    assert image.read_bytes() == small.read_bytes()
    assert sorted(os.listdir(where)) == ["disk.img", "disk.img.json"]
    assert rawcheck.verify_raw([str(image)], world, pick=lambda: 0.0)[0].ok


# --- what cannot be read ---------------------------------------------------------------------------

BAD = [(3 * SECTOR, 4 * SECTOR), (BLOCK - SECTOR, BLOCK + SECTOR), (SIZE - SECTOR, SIZE)]


@pytest.fixture
def hurt(memory: Path) -> Place:
    """A raw image of a medium with bad sectors."""
    place = Place(memory / "hurt")
    place.report = place.make(BadMedium(str(place.source), BAD))
    return place


def expected(place: Place) -> bytes:
    data = bytearray(place.source.read_bytes())
    for start, end in BAD:
        data[start:end] = bytes(end - start)
    return bytes(data)


def test_bad_sectors_are_named_and_are_zeros(hurt: Place) -> None:
    report = hurt.report
    assert report.attention
    assert [(one.start, one.start + one.length) for one in report.unreadable] == BAD
    assert hurt.image.read_bytes() == expected(hurt)
    said = json.loads((hurt.folder / "disk.img.json").read_text())
    assert [(one["start"], one["start"] + one["length"]) for one in said["bad"]] == BAD
    lines = (hurt.folder / "disk.img.mapfile").read_text().splitlines()
    assert report.mapfile == str(hurt.image) + ".mapfile"
    assert [int(line.split()[0], 16) for line in lines if line.endswith("  -")] == [start for start, _ in BAD]
    assert hurt.verdict().ok


def test_a_bad_sector_is_never_content(hurt: Place) -> None:
    """Whoever forgets in the sidecar that a sector could not be read has another image."""
    path = hurt.folder / "disk.img.json"
    said = sidecar.decode(path.read_bytes(), "x")
    healed = replace_said(said, bad=said.bad[1:])
    path.write_bytes(sidecar.encode(healed))
    assert not hurt.verdict().ok


def replace_said(said, **other):
    import msgspec

    return msgspec.structs.replace(said, **other)


def test_a_later_image_without_bad_sectors_has_no_mapfile(hurt: Place) -> None:
    hurt.make(overwrite=True)
    hurt.check_made()


def test_bad_sectors_are_told_when_restored_and_adopted(hurt: Place) -> None:
    world, out = hurt.world(), hurt.folder / "out.img"
    done = rawrestore.restore(rawrestore.Request(str(hurt.image), str(out)), world)
    assert done.attention
    assert [(one.start, one.start + one.length) for one in done.unreadable] == BAD
    assert out.read_bytes() == expected(hurt)
    repository = new_repository(hurt.folder / "repo")
    point = adopt.adopt(repository, adopt.Wish(str(hurt.image), "v"), world)
    assert (point.bad_bytes, point.attention) == (sum(end - start for start, end in BAD), True)
    assert point.root == hurt.report.root


def test_a_bad_run_that_is_all_of_a_section_of_holes_stays_bad_when_adopted(memory: Path) -> None:
    """The file has a hole there, and the sidecar says what it is."""
    place = Place(memory / "place")
    low, high = 20 * BLOCK + 5 * SECTOR, 30 * BLOCK
    report = place.make(BadMedium(str(place.source), [(low, high)]))
    # Sparse files are read only where they hold data: the hole of the source was never asked for.
    assert report.bad_bytes in (0, high - low)
    point = adopt.adopt(new_repository(place.folder / "repo"), adopt.Wish(str(place.image), "v"), place.world())
    assert (point.root, point.bad_bytes) == (report.root, report.bad_bytes)


def test_an_error_of_the_images_own_disk_is_damage_and_no_bad_sector(memory: Path) -> None:
    place = Place(memory / "place")
    place.make()
    sick = place.world(BadMedium(str(place.image), [(5 * SECTOR, 6 * SECTOR)]))
    (verdict,) = rawcheck.verify_raw([str(place.image)], sick, pick=lambda: 0.0)
    assert not verdict.ok
    assert "disk below it" in verdict.damage[0].reason
    repository = new_repository(place.folder / "repo")
    for run in (
        lambda: adopt.adopt(repository, adopt.Wish(str(place.image), "v"), sick),
        lambda: rawrestore.restore(rawrestore.Request(str(place.image), str(place.folder / "out")), sick),
    ):
        with pytest.raises(Damage):
            run()
    assert repository.volume("v").catalog().points == []
    assert not (place.folder / "out").exists()


# --- restoring and adopting ------------------------------------------------------------------------------


def test_an_image_that_changes_between_its_check_and_its_writing_is_damage(memory: Path) -> None:
    place = Place(memory / "place")
    place.make()

    class Meddling(QuickKernel):
        def open(self, path, flags, mode=0o600):
            if path.endswith("out.partial") and flags & os.O_CREAT:
                write_at(place.image, 100, b"another")
            return super().open(path, flags, mode)

    out = place.folder / "out"
    with pytest.raises(Damage, match="changed while it was read"):
        rawrestore.restore(rawrestore.Request(str(place.image), str(out)), place.world(Meddling()))
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_what_does_not_read_back_is_told(memory: Path) -> None:
    place = Place(memory / "place")
    place.make()
    out = place.folder / "out"

    class Forgetful(QuickKernel):
        def drop_cache(self, fd, *, block):
            super().drop_cache(fd, block=block)
            write_at(out.with_name("out.partial"), 100, b"another")

    with pytest.raises(NotReadBack, match=f"0 to {SIZE}"):
        rawrestore.restore(rawrestore.Request(str(place.image), str(out)), place.world(Forgetful()))
    assert not out.exists()


@pytest.mark.parametrize("call", ["open", "close", "preadv", "pwritev", "fsync", "truncate", "rename", "drop_cache"])
def test_a_failing_call_costs_no_more_than_the_restore(call: str, memory: Path) -> None:
    place = Place(memory / "place")
    place.make()
    out, wrong = place.folder / "out", []
    for number in NUMBERS[call]:
        for at in range(1, MOST):
            kernel = FaultyKernel(call, number, at)
            wanted = rawrestore.Request(str(place.image), str(out))
            found = attempt(lambda kernel, wanted=wanted: rawrestore.restore(wanted, place.world(kernel)), kernel)
            if out.with_name("out.partial").exists():
                found.append("a partial stays")
            if out.exists():
                if out.read_bytes() != place.source.read_bytes():
                    found.append("another file has the name")
                out.unlink()
            wrong += [f"{call} {at} of {kernel.what}, {errno.errorcode[number]}: {text}" for text in found]
            if not kernel.fired:
                break
        assert at > 1
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("call", ["open", "preadv", "pwritev", "fsync", "rename", "mkdir"])
def test_a_failing_call_costs_no_more_than_the_adoption(call: str, memory: Path) -> None:
    place, wrong = Place(memory / "place"), []
    made = place.make()
    for number in NUMBERS.get(call, (errno.ENOSPC,)):
        for at in range(1, MOST):
            repository = new_repository(memory / f"repo-{number}-{at}", kernel=QuickKernel())
            kernel = FaultyKernel(call, number, at)
            repository.kernel = kernel

            def run(kernel, repository=repository):
                adopt.adopt(repository, adopt.Wish(str(place.image), "v"), place.world(kernel))

            found = attempt(run, kernel)
            repository.kernel = QuickKernel()
            points = repository.volume("v").catalog().points if repository.volume_names() else []
            for point in points:
                if point.images[0].closing.root != made.root:
                    found.append("a point of other bytes")
            wrong += [f"{call} {at} of {kernel.what}, {errno.errorcode[number]}: {text}" for text in found]
            if not kernel.fired:
                break
        assert at > 1
    assert wrong == [], "\n".join(wrong)


# --- brought to rest, and put back ----------------------------------------------------------------------


def test_what_was_stopped_and_how_it_ended_is_kept(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, order = Place(memory / "place"), []
    request = raw.Request(str(place.source), str(place.image))

    class Torn:
        def __init__(self, inner):
            self.inner = inner
            self.reader, self.circumstances, self.moment = inner.reader, inner.circumstances, inner.moment

        def check(self):
            order.append("check")

        def settle(self):
            order.append("settle")
            return Settled("none", ["It was written."], attention=True)

    free = raw.at_rest

    @contextlib.contextmanager
    def rest(*asked):
        order.append("rest")
        with free(*asked) as rested:
            yield raw.Rested(rested.seen, Torn(rested.source), ["unit web.service", "mount /srv"])
        order.append("back")

    monkeypatch.setattr(raw, "at_rest", rest)
    report = raw.make(request, place.world())
    assert (order[0], order[-1]) == ("rest", "back")
    assert {"check", "settle"} <= set(order)
    assert (report.consistency, report.attention) == ("none", True)
    said = json.loads((place.folder / "disk.img.json").read_text())
    assert said["stopped"] == report.stopped == ["unit web.service", "mount /srv"]
    assert said["notes"] == ["It was written."]


def test_everything_is_put_back_when_it_fails(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, order = Place(memory / "place"), []
    request = raw.Request(str(place.source), str(place.image))
    free = raw.at_rest

    @contextlib.contextmanager
    def rest(*asked):
        try:
            with free(*asked) as rested:
                yield rested
        finally:
            order.append("back")

    monkeypatch.setattr(raw, "at_rest", rest)
    with pytest.raises(TargetFailed):
        raw.make(request, place.world(FaultyKernel("pwritev", errno.EIO, 1)))
    assert order == ["back"]
    assert place.names() == set()
