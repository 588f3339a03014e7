"""Why goals are missed that are known to be: what was measured of it, in sentences."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from benchmarks.contests import Bench
from benchmarks.goals import Row
from benchmarks.measure import Series


def _cores(ours: Series) -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{ours.median('cpu'):.2f} s of processor time in {ours.median():.2f} s on {cores} cores"


def _full(bench: Bench) -> str:
    ours, pipe = bench.get("full, zstd 1", "blockbak"), bench.get("full, zstd 1", "dd | zstd -1 -T2")
    return (
        f"Full: bound by zstd and BLAKE3: {_cores(ours)}, where the pipe, which makes no digests, takes "
        f"{pipe.median('cpu'):.2f} s. To that come start-up, and the hand-over of the interpreter's lock between the "
        "threads."
    )


def _still(bench: Bench) -> str:
    ours = bench.get("changes", "nothing changed")
    started = f" of which start-up takes {bench.get('start-up', 'list').median('cpu'):.2f} s," if bench.has(
        "start-up", "list"
    ) else ""  # fmt: skip
    return (
        f"Nothing changed, CPU: {ours.median('cpu'):.2f} s for the device,{started} whatever its size; what is left is "
        "direct reads, the search for zeros and BLAKE3."
    )


def _clones(_: Bench) -> str:
    return (
        "A thousand clones: the time is that of the kernel's calls as the threads see them, with the wait for the "
        "interpreter's lock after each."
    )


def _copied(_: Bench) -> str:
    return (
        "A synthetic full where the file system cannot clone: every byte is copied into one file, and writes to one "
        "inode go one after the other, however many threads ask."
    )


def _restore(bench: Bench) -> str:
    ours, dd = bench.get("restore", "blockbak"), bench.get("restore", "dd of the raw image")
    return (
        f"Restore: {_cores(ours)}, where dd takes {dd.median('cpu'):.2f} s. Frames are decoded and every block is "
        "checked by BLAKE3; the zstd binding cannot decode into a buffer that is there, so each frame costs the page "
        "faults of a new one and a copy."
    )


def _verify(bench: Bench) -> str:
    ours, peer = bench.get("verify", "blockbak"), bench.get("verify", "zstd -t")
    return (
        f"Verify: bound by decoding, and by BLAKE3 of the stored bytes and of the blocks: {_cores(ours)}, start-up and "
        f"the hand-over of the interpreter's lock included; zstd -t decodes in {peer.median('cpu'):.2f} s and checks "
        "neither digest."
    )


_KNOWN = {
    r"full, zstd 1": _full,
    r"nothing changed, CPU per GiB": _still,
    r"synthetic full on \w+, a thousand clones": _clones,
    r"synthetic full on \w+": _copied,
    r"restore, .*": _restore,
    r"verify": _verify,
}


def reasons(bench: Bench, rows: Sequence[Row]) -> list[str]:
    """A sentence or two for each missed goal of which it is known why it is."""
    told: list[str] = []
    for row in rows:
        tell = next((tell for name, tell in _KNOWN.items() if re.fullmatch(name, row.work)), None)
        if row.met is False and tell is not None and (text := tell(bench)) not in told:
            told.append(text)
    return told
