"""What was shown at the prompt is what is restored, whatever a name means by the time it was answered."""

from __future__ import annotations

import os
from pathlib import Path

from tests.cli.program import Terminal, document, ok
from tests.patterns import stamp


def test_the_point_that_was_shown_is_the_one_that_is_restored(tmp_path: Path) -> None:
    """A timer makes a point while somebody reads the question."""
    repo, source, target = tmp_path / "repo", tmp_path / "v.img", tmp_path / "target.img"
    shown = stamp(0, 1000, 1, 5)
    source.write_bytes(shown)
    target.write_bytes(b"old")
    ok("init", repo)
    first = document("-r", repo, "backup", source)["points"][0]["point"]
    with Terminal("-r", repo, "restore", "latest", target) as screen:
        screen.until(b"Type its name to go on")
        source.write_bytes(stamp(0, 1000, 2, 5))
        ok("-r", repo, "backup", source)
        ended = screen.type(os.fsencode(target) + b"\n").end()
    assert ended.status == 0, str(ended)
    assert first in ended.said
    assert target.read_bytes() == shown
