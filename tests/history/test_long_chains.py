"""Many incrementals, one on the other."""

from __future__ import annotations

import time

import pytest

from blockbak.flow import backup, delete, synthesize, verify
from blockbak.units import KIB, MIB
from tests import children
from tests.doubles import context, new_repository
from tests.volumes import Volume, difference, fingerprint, restored

NAME = "vol"


@pytest.mark.slow
def test_a_long_chain(tmp_path, rng, times, tell):
    length = times(120, 200)
    world = context(tmp_path / "state")
    path = tmp_path / "repository"
    repository = new_repository(path)
    volume = Volume(tmp_path / "source", 2 * MIB + 777, rng)
    volume.fill(0.5)
    held = {}
    took: dict[int, float] = {}

    def add() -> float:
        begin = time.monotonic()
        request = backup.Request(str(volume.path), name=NAME, block_bytes=4 * KIB)
        made = backup.backup(repository, request, world)
        assert made.kind == ("incremental" if held else "full")
        held[made.point] = volume.fingerprint
        return time.monotonic() - begin

    while len(held) < length + 1:
        took[len(held)] = add()
        volume.scribble(1)
        # With the descriptors that a plain shell gives a tight container: no image may hold one for long.
        if len(held) - 1 in (50, length):
            limited = ("prlimit", "--nofile=256:256")
            tell(f"backup on {len(held) - 1}: seconds", round(took[len(held) - 1], 3))
            for words in (("list",), ("verify",), ("show", "latest")):
                begin = time.monotonic()
                done = children.run(path, *words, prefix=limited)
                assert done.code == 0, done
                tell(f"{words[0]} of {len(held) - 1}: seconds", round(time.monotonic() - begin, 3))
            begin = time.monotonic()
            target = tmp_path / f"target-{len(held)}"
            done = children.run(path, "restore", "latest", target, prefix=limited)
            assert done.code == 0, done
            tell(f"restore through {len(held) - 1}: seconds", round(time.monotonic() - begin, 3))
            assert difference(fingerprint(target), held[max(held)]) is None

    for point in rng.sample(sorted(held), 25):
        found = restored(repository, point, tmp_path / "target", world, verify=False)
        assert difference(found, held[point]) is None, point
    done = children.run(path, "backup", volume.path, "--name", NAME, "--json", prefix=("prlimit", "--nofile=256:256"))
    assert done.code == 0, done
    assert done.document["points"][0]["kind"] == "incremental"
    held[done.document["points"][0]["point"]] = volume.fingerprint

    # Merged, the chain is short again, and most of it may go.
    made = synthesize.synthesize(repository, NAME, world).point
    delete.delete(repository, [point for point in held if point != made.point], world)
    assert verify.verify(repository, [], world, pick=lambda: 0.0).ok
    assert difference(restored(repository, "latest", tmp_path / "target", world), held[made.point]) is None


def test_too_few_descriptors_are_no_damage(tmp_path, rng):
    """A chain that cannot be opened all at once is not a damaged one: nobody may be told to distrust it, and
    no full may be made in its place.
    """
    world = context(tmp_path / "state")
    path = tmp_path / "repository"
    repository = new_repository(path)
    volume = Volume(tmp_path / "source", 40 * KIB + 7, rng)
    for _ in range(40):
        backup.backup(repository, backup.Request(str(volume.path), name=NAME, block_bytes=4 * KIB), world)
        volume.scribble(1)
    few = ("prlimit", "--nofile=32:32")
    done = children.run(path, "verify", prefix=few)
    assert done.code in (0, 1), done
    done = children.run(path, "restore", "latest", tmp_path / "target", prefix=few)
    assert done.code in (0, 1), done
    done = children.run(path, "backup", volume.path, "--name", NAME, "--json", prefix=few)
    assert done.code in (0, 1), done
    assert all(point["kind"] == "incremental" for point in done.document["points"]), done
    # The soft limit alone is a default that a program may raise.
    done = children.run(path, "verify", prefix=("prlimit", "--nofile=32:4096"))
    assert done.code in (0, 1), done
