"""The README's commands, in its order, on loop devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cli.program import LIMIT_SECONDS, ROOT, document, environment, ok
from tests.cli.stock import overwrite

SIZE = 8 << 20
INSTALLING = ["uv tool install ."]
"""It would change the machine; what it installs is the program under test."""


def use_it() -> list[str]:
    """The command lines under "Use it", comments included."""
    part = (ROOT / "README.md").read_text().partition("## Use it")[2].partition("\n## ")[0]
    return [line.strip() for line in part.splitlines() if line.startswith("    ")]


def test_every_command_of_the_readme_works_in_its_order(loop, tmp_path: Path) -> None:
    source, target = loop(SIZE), loop(SIZE)
    overwrite(source.file, 0, SIZE // 512, 1)
    repo = tmp_path / "backup"
    known = {"/dev/sdb": source.path, "/dev/sdc": target.path, "/srv/backup": str(repo)}
    env = environment({"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    said: dict[str, str] = {}
    held = b""
    for line in use_it():
        words = line.partition("#")[0].strip()
        if words in INSTALLING:
            continue
        assert re.match(r"(blockbak|export) ", words), f"not a command that this test knows: {line}"
        for name, mine in known.items():
            words = words.replace(name, mine)
        points = document("-r", repo, "list") if repo.exists() else []
        if points:
            words = words.replace("web1-sdb", points[-1]["volume"]).replace("OLDEST…", points[0]["point"])
        if words.startswith("export "):
            name, _, value = words.removeprefix("export ").partition("=")
            env[name] = value
            continue
        assert "sdb" not in words
        assert "…" not in words
        done = subprocess.run(
            ["bash", "-c", words], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env,
            timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        said[words] = done.stdout + done.stderr
        if words.startswith("blockbak backup"):
            held = source.file.read_bytes()
            overwrite(source.file, 100, 3, len(said))
    kinds = [[image["kind"] for image in point["images"]] for point in document("-r", repo, "list")]
    # A full and a differential were made; the full at the newest point let the oldest go.
    assert kinds == [["full"]]
    assert source.path in said["blockbak devices"]
    assert target.file.read_bytes() == held


def test_the_manual_tells_how_to_go_back_in_time(loop, tmp_path: Path) -> None:
    """To go back in time on the volume itself, restore onto it: only what differs is written."""
    source = loop(SIZE)
    overwrite(source.file, 0, SIZE // 512, 1)
    ok("init", tmp_path / "repo")
    ok("-r", tmp_path / "repo", "backup", source)
    before = source.file.read_bytes()
    overwrite(source.file, 100, 3, 2)
    done = document("-r", tmp_path / "repo", "restore", "latest", source, "--yes")
    assert done["written_bytes"] == 65536
    assert source.file.read_bytes() == before


def test_a_device_in_use_is_refused_or_taken_as_it_is(loop, ext4, tmp_path: Path) -> None:
    files = ext4(loop(16 << 20))
    ok("init", tmp_path / "repo")
    words = ["-r", tmp_path / "repo", "backup", files.device]
    refused = document(*words, status=5)["error"]
    assert refused["name"] == "SourceInUse"
    assert str(files.where) in refused["message"]
    assert "--mode live" in refused["advice"]
    (point,) = document(*words, "--mode", "cold")["points"]
    assert (point["mode"], point["consistency"], files.where.is_mount()) == ("cold", "cold", True)
    (point,) = document(*words, "--mode", "live")["points"]
    assert (point["mode"], point["consistency"]) == ("live", "none")
    files.unmount()
    (point,) = document(*words)["points"]
    assert (point["mode"], point["consistency"]) == ("cold", "cold")
