"""The exit status of ``list`` is that of the worst it found, whatever it found first."""

from __future__ import annotations

import hashlib

from tests.cli.program import run
from tests.cli.stock import Stock


def test_damage_decides_though_another_volume_is_only_of_a_newer_program(repo: Stock) -> None:
    """Volumes are looked at by name: `db` comes before `web`."""
    newer = repo.path / "db" / f"{repo.db}.full.json"
    data = newer.read_bytes().replace(b'"blockbak_manifest": 1', b'"blockbak_manifest": 2')
    blank = data[: -64 - 4] + b"0" * 64 + data[-4:]
    newer.write_bytes(data[: -64 - 4] + hashlib.sha256(blank).hexdigest().encode() + data[-4:])
    assert run("-r", repo.path, "list").status == 1
    damaged = next((repo.path / "web").glob("*.incremental.json"))
    damaged.write_bytes(damaged.read_bytes()[:-9])
    ended = run("-r", repo.path, "list")
    assert ended.status == 4, str(ended)
    assert "newer blockbak" in ended.said
    assert "damaged" in ended.said
