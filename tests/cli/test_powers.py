"""What a run may do and hold: without root's powers, and with few files open at once."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cli.program import PLAIN, PLAIN_UID, PROGRAM, document, ok, run
from tests.cli.stock import SECTORS, Stock, copied
from tests.patterns import SECTOR
from tests.scene import BLOCK, Scene

# --- powers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--no-verify"]])
def test_who_may_write_a_device_may_restore_to_it(options: list[str], stock: Stock, public: Path, loop) -> None:
    """As a member of the group that owns it; to flush the kernel's buffers takes more than that."""
    copy = copied(stock, public)
    device = loop(SECTORS * SECTOR)
    with ExitStack() as undo:
        owner = os.stat(device).st_uid
        undo.callback(os.chown, device, owner, -1)
        for path in (public, copy.path, *copy.path.rglob("*"), device):
            os.chown(path, PLAIN_UID, -1)
        state = {"BLOCKBAK_STATE_DIR": str(public / "state")}
        words = ("-r", copy.path, "restore", copy.newest, device, "--yes", *options)
        ended = run(*words, "--json", program=PLAIN, env=state)
        assert ended.status == 0, str(ended)
        assert ended.document["written_bytes"] > 0
    assert device.file.read_bytes()[: SECTORS * SECTOR] == stock.held[stock.newest]


# --- files ------------------------------------------------------------------------------------------------

FEW = ("prlimit", "--nofile=32:1024", "--", *PROGRAM)


def test_a_chain_may_be_longer_than_the_number_of_files_a_login_may_open(tmp_path: Path, seed: int) -> None:
    """The limit that may be raised is; without that this many images could not be open at once."""
    scene = Scene.make(tmp_path / "scene", seed, points=36, size=20 * BLOCK)
    newest = scene.names[-1]
    ok("-r", scene.place, "restore", newest, tmp_path / "out.img", program=FEW)
    assert (tmp_path / "out.img").read_bytes() == scene.held[newest]
    assert document("-r", scene.place, "verify", program=FEW)["ok"] is True
