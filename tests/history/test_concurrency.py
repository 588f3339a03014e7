"""Everything at once on one repository: results are right, and nobody mistakes another's work for damage."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blockbak.flow import backup, recover, verify
from blockbak.repository.local import Repository
from blockbak.units import KIB, MIB
from tests import children
from tests.doubles import context, new_repository
from tests.volumes import Volume, difference, restored

NAMES = ("one", "two")

# Each child is one person's loop: it calls the command's own entry point again and again, and writes a line
# for each call: the words, the exit status, the JSON, and what else the parent must compare.
_LOOP = """
import contextlib, io, json, random, sys, time
from pathlib import Path

from blockbak.cli.main import main
from tests.volumes import Volume, fingerprint

role, repository, folder, seed, seconds, *names = sys.argv[1:]
dice = random.Random(seed)
until = time.monotonic() + float(seconds)
log = open(Path(folder, f"{role}.log"), "a")


def stream():
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8")


def said(stream):
    stream.flush()
    return stream.buffer.getvalue().decode()


def call(*words, **more):
    sys.argv = ["blockbak", "-r", repository, *words, "--json"]
    out, err, code = stream(), stream(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    try:
        document = json.loads(said(out))
    except ValueError:
        document = None
    note = {"words": words, "code": code, "document": document, "err": said(err), **more}
    return code, document, note


def tell(note):
    print(json.dumps(note), file=log, flush=True)


def listed():
    code, document, note = call("list")
    tell(note)
    return document if code == 0 else []


def backup(volume):
    volume.scribble(dice.randrange(4))
    kind = dice.choices(["auto", "differential", "full"], [6, 2, 1])[0]
    now = [digest.hex() for digest in volume.fingerprint]
    wait = dice.choice(["0", "0", "20"])
    note = call("backup", str(volume.path), "--name", volume.path.name, "--kind", kind, "--wait", wait)[2]
    tell({**note, "fingerprint": now})


def delete():
    # All before a full that stays: nothing that is kept can need them.
    name = dice.choice(names)
    points = [point for point in listed() if point["volume"] == name]
    bases = [at for at, point in enumerate(points) if any(one["kind"] == "full" for one in point["images"])]
    if bases and bases[-1]:
        tell(call("delete", *(point["point"] for point in points[: bases[-1]]))[2])


def show():
    points = listed()
    if points:
        tell(call("show", dice.choice(points)["point"])[2])


def restore():
    points = listed()
    target = Path(folder, "restored")
    if points:
        point = dice.choice(points)["point"]
        code, _, note = call("restore", point, str(target), "--no-verify", *(["--yes"] if target.exists() else []))
        found = [digest.hex() for digest in fingerprint(target)] if code == 0 else None
        tell({**note, "point": point, "fingerprint": found})


def verify():
    chosen = [dice.choice(listed() or [{"point": "latest"}])["point"]] if dice.random() < 0.3 else []
    tell(call("verify", *chosen)[2])


def synthesize():
    tell(call("synthesize", dice.choice(names), "--wait", dice.choice(["0", "5"]))[2])


if role.startswith("backup"):
    name = names[int(role[-1])]
    path = Path(folder, name)
    volume = Volume(path, path.stat().st_size, dice, make=False)
    work = lambda: backup(volume)
else:
    work = {"delete": delete, "show": show, "restore": restore, "verify": verify, "synthesize": synthesize,
            "list": listed}[role]
while time.monotonic() < until:
    work()
"""

ROLES = ("backup0", "backup1", "verify", "delete", "list", "show", "synthesize", "restore")


@dataclass
class Office:
    """The repository and the people who work on it."""

    folder: Path
    seed: int
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / "repository"

    def work(self, seconds: float) -> None:
        """Everyone at once; raises if a child fails as a program."""
        running = {}
        for role in ROLES:
            words = [role, self.path, self.folder, f"{self.seed} {role}", seconds, *NAMES]
            running[role] = subprocess.Popen(
                [sys.executable, "-c", _LOOP, *map(str, words)], env=children.environment(self.path), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[2],
            )  # fmt: skip
        said = {role: child.communicate()[0] for role, child in running.items()}
        assert all(child.returncode == 0 for child in running.values()), said
        for role in ROLES:
            for line in (self.folder / f"{role}.log").read_text().splitlines():
                self.calls.append({**json.loads(line), "role": role})


def wrong(call: dict[str, Any]) -> str | None:
    """Why a call should not have ended as it did, or None."""
    words, code, document = call["words"], call["code"], call["document"]
    if code == 0:
        return None
    names = []
    if isinstance(document, dict):
        errors = document.get("errors") or [document.get("error")]
        names = [error["name"] for error in errors if error]
    # A lock that another holds, or a point that is deleted since it was listed.
    if code == 1 and names and set(names) <= {"VolumeLocked", "NoSuchPoint"}:
        return None
    return f"{' '.join(words)}: exit {code}, {names}, {call['err'].strip()}"


@pytest.mark.slow
def test_all_at_once(tmp_path, rng, seed, times, tell):
    world = context(tmp_path / "state")
    office = Office(tmp_path, seed)
    repository = new_repository(office.path)
    known = {}
    for name in NAMES:
        volume = Volume(tmp_path / name, 3 * MIB + 513, rng)
        volume.fill(0.6)
        made = backup.backup(repository, backup.Request(str(volume.path), name=name, block_bytes=4 * KIB), world)
        known[made.point] = [digest.hex() for digest in volume.fingerprint]
    office.work(times(6, 240))
    bad = [reason for call in office.calls if (reason := wrong(call))]
    counts = Counter((call["words"][0], call["code"]) for call in office.calls)
    for (verb, code), count in sorted(counts.items()):
        tell(f"{verb}, exit {code}", count)
    assert not bad, f"{len(bad)} of {len(office.calls)} calls: " + "\n".join(sorted(set(bad))[:12])
    for verb in ("backup", "verify", "delete", "list", "show", "synthesize", "restore"):
        assert counts[verb, 0], f"{verb} never came to its turn"

    for call in office.calls:
        if call["words"][0] == "backup" and call["code"] == 0:
            (point,) = call["document"]["points"]
            known[point["point"]] = call["fingerprint"]
    for call in office.calls:
        if call["words"][0] == "restore" and call["code"] == 0:
            assert call["fingerprint"] == known[call["point"]], call["point"]

    # What is left of it all is whole.
    assert verify.verify(repository, [], world, pick=lambda: 0.0).ok
    assert recover.recover(repository, world) == recover.Report()
    for name in NAMES:
        points = repository.volume(name).catalog().points
        sequences = [point.sequence for point in points]
        assert sequences == sorted(set(sequences))
        for point in points:
            wanted = tuple(bytes.fromhex(digest) for digest in known[point.id])
            found = restored(repository, point.id, tmp_path / "target", world)
            assert difference(found, wanted) is None, point.id


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["list", "show", "verify", "restore"])
def test_who_looks_while_points_go_sees_no_damage(verb, tmp_path, rng, times, tell):
    """One deletes and makes points as fast as it can; the other looks, with and without a lock."""
    world = context(tmp_path / "state")
    path = tmp_path / "repository"
    repository = new_repository(path)
    volume = Volume(tmp_path / "source", 20_001, rng)
    request = backup.Request(str(volume.path), "full", name="vol", block_bytes=4 * KIB)
    kept = backup.backup(repository, request, world).point
    script = """
import sys
sys.path.insert(0, "")
from blockbak.errors import VolumeLocked
from blockbak.flow import backup, delete
from blockbak.repository.local import Repository
from tests.doubles import context
repository, source, state = sys.argv[1:]
world = context(state)
print("ready", flush=True)
while True:
    try:
        opened = Repository(repository)
        points = [backup.backup(opened, backup.Request(source, "full", name="vol"), world).point for _ in range(3)]
        delete.delete(opened, points, world)
    except VolumeLocked:
        pass
"""
    busy = subprocess.Popen(
        [sys.executable, "-c", script, str(path), str(volume.path), str(tmp_path / "state")],
        env=children.environment(path), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    looks, bad = 0, []
    try:
        assert busy.stdout
        assert busy.stdout.readline() == "ready\n"
        until = time.monotonic() + times(2, 60)
        while time.monotonic() < until:
            assert busy.poll() is None, "the one that deletes has failed"
            looks += 1
            bad += look(verb, path, kept, tmp_path, world)
    finally:
        busy.kill()
        busy.communicate()
    tell("looks", looks)
    assert not bad, f"{len(bad)} of {looks} looks: {sorted(set(bad))[:6]}"


def look(verb: str, path: Path, kept: str, folder: Path, world) -> list[str]:
    """What is wrong with one look, made in this process: starting another would take most of the time."""
    from blockbak.errors import BlockbakError, NoSuchPoint, VolumeLocked
    from blockbak.flow import show

    repository = Repository(str(path))
    try:
        if verb == "list":
            catalog = repository.volume("vol").catalog()
            assert kept in {point.id for point in catalog.points}
            return [str(error) for error in (*catalog.damage, *catalog.gaps)]
        points = [point.id for point in repository.volume("vol").catalog().points]
        if verb == "show":
            show.show(repository, points[-1], world, extents_max=10)
        elif verb == "verify":
            names = [points[-1]] if int(world.timer()) % 2 else []
            report = verify.verify(repository, names, world, pick=lambda: 0.0)
            return [flaw.reason for verdict in report.images for flaw in verdict.damage]
        else:
            restored(repository, points[-1], folder / "target", world, verify=False)
    except (NoSuchPoint, VolumeLocked):
        return []
    except (BlockbakError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]
    return []
