"""Today's programs read what format version 1 wrote, and today's writer still writes it."""

import hashlib
import json
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockbak.image import check
from blockbak.image.reader import ImageReader
from blockbak.model.chain import plan
from blockbak.model.extent import BAD
from blockbak.repository.local import Repository
from tests.golden import make_v1
from tests.images import read_back

V1 = Path(__file__).parent / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text())
POINTS = [(volume, point) for volume, points in EXPECTED["points"].items() for point in points]
IMAGES = sorted(str(path.relative_to(V1 / "repository")) for path in (V1 / "repository").glob("*/*.zst"))
RESCUE = Path(__file__).parents[2] / "blockbak" / "repository" / "rescue.py"


def test_the_frozen_repository_is_whole():
    repository = Repository(str(V1 / "repository"))
    for volume in repository.volumes():
        catalog = volume.catalog()
        assert (catalog.damage, catalog.orphans, catalog.partials, catalog.deleted) == ([], [], [], [])
        assert {point.id for point in catalog.points} == set(EXPECTED["points"][volume.name])
    assert len(POINTS) == 13


@pytest.mark.parametrize(("volume", "point"), POINTS)
def test_every_chain_reads_as_recorded(volume, point):
    wanted = EXPECTED["points"][volume][point]
    shelf = Repository(str(V1 / "repository")).volume(volume)
    images = shelf.catalog().images
    found = next(each for each in shelf.catalog().points if each.id == point)
    chains = [plan(found, images)]
    if len(found.images) > 1:
        chains.append(plan(found, images, {chains[0][-1].file}))
    for chain in chains:
        with ExitStack() as stack:
            layers = [ImageReader(stack.enter_context(shelf.open_image(image.file))) for image in chain]
            assert hashlib.sha256(read_back(layers)).hexdigest() == wanted["sha256"]


@pytest.mark.parametrize("file", IMAGES)
def test_every_byte_is_accounted_for(file):
    volume, _, name = file.partition("/")
    shelf = Repository(str(V1 / "repository")).volume(volume)
    with shelf.open_image(name) as source:
        reader = ImageReader(source)
        table = reader.seek_table_check()
        for section in reader.all_sections():
            table.add(section)
        table.finish()
        assert check.check_tail(reader) is None
        assert [flaw for span in check.spans(reader) for flaw in check.check_span(reader, span)] == []


@pytest.mark.parametrize(("volume", "point"), POINTS)
def test_rescue_restores_it(volume, point, tmp_path):
    wanted = EXPECTED["points"][volume][point]
    repository, target = tmp_path / "repository", tmp_path / "target"
    shutil.copytree(V1 / "repository", repository)
    shutil.copy(RESCUE, repository)
    done = subprocess.run(
        [sys.executable, "-I", "-S", repository / "rescue.py", "restore", point, target],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == (3 if wanted["bad"] else 0), done.stderr
    assert hashlib.sha256(target.read_bytes()).hexdigest() == wanted["sha256"]
    for start, end in wanted["bad"]:
        assert f"bytes {start} to {end}." in done.stderr


def test_bad_and_hole_are_in_the_frozen_index():
    shelf = Repository(str(V1 / "repository")).volume("disk")
    image = next(image for image in shelf.catalog().images if image.closing.hole_bytes)
    with shelf.open_image(image.file) as source:
        (section,) = ImageReader(source).all_sections()
    bad = section.extents[section.extents["kind"] == BAD]
    ranges = [[int(row["start"]), int(row["start"] + row["length"])] for row in bad]
    assert ranges == EXPECTED["points"]["disk"][image.point]["bad"]


def test_the_writer_writes_the_same_bytes():
    for name, data in make_v1.stored().files.items():
        assert data == (V1 / "repository" / "stored" / name).read_bytes(), name


def test_stored_images_are_the_same_to_the_byte():
    assert make_v1.digests(make_v1.volumes("none")) == EXPECTED["stored_files"]


def test_what_is_made_today_restores_to_the_same():
    assert make_v1.expected(make_v1.volumes("zstd"))["points"] == EXPECTED["points"]
