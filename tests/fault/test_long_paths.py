"""A source may lie as deep as a path goes, and a header has only so much room."""

import os
import shutil

import pytest

from blockbak.flow import backup, restore, verify
from tests.doubles import context, new_repository
from tests.faults import QuickKernel

PARTS = {
    "ASCII": "x" * 200,
    "two bytes each": "ä" * 100,
    "four bytes each": "🙂" * 60,
    "control characters": "\x01" * 200,
    "no UTF-8": os.fsdecode(b"\xff" * 200),
}


def deep(folder, part):
    """Directories down to where a path is nearly as long as the kernel takes it."""
    while len(os.fsencode(folder)) + len(os.fsencode(part)) < 4050:
        folder = f"{folder}/{part}"
        os.mkdir(folder)
    return folder


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_path_of_any_length_fits_an_image(part, memory):
    """JSON may write six characters for one byte of it. What is too long is cut or digested, and still told apart."""
    kernel = QuickKernel()
    world = context(memory / "state", kernel=kernel)
    repository = new_repository(memory / "repo")
    folder = deep(str(memory), part)
    source, other = f"{folder}/a.img", f"{folder}/b.img"
    with open(source, "xb") as file:
        file.write(b"disk" * 3000)
    shutil.copy(source, other)
    made = [backup.backup(repository, backup.Request(path), world) for path in (source, source, other)]
    assert [one.kind for one in made] == ["full", "incremental", "full"]
    assert made[0].volume == made[1].volume != made[2].volume
    for image in (image for volume in repository.volumes() for image in volume.catalog().images):
        assert image.opening.source.endswith(("a.img", "b.img"))
    assert verify.verify(repository, [], world, pick=lambda: 0.0).ok
    target = f"{folder}/out.img"
    if len(os.fsencode(target)) + len(".partial") > 4095:
        target = str(memory / "out.img")
    restore.restore(repository, restore.Request(made[1].point, target), world)
    with open(target, "rb") as file:
        assert file.read() == b"disk" * 3000
