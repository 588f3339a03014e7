"""What can only be measured inside a blockbak process; prints one JSON object on standard error's end.

inside.py clones BLOCKBAK ARGUMENT...   runs blockbak; seconds and number of its clone calls
inside.py compare                       CPU seconds to compare the hash maps of a 16 TiB volume
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NoReturn

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_ROWS = 1 << 24
_PASSES = 16
"""2^28 rows of 64 KiB are 16 TiB; a sixteenth of them is held and gone over sixteen times."""
_PIECE = 8192


def clones(arguments: list[str]) -> NoReturn:
    """Run blockbak with a kernel whose clone calls are timed."""
    from blockbak.cli.main import main
    from blockbak.host.kernel import Kernel

    real = Kernel.clone_range
    spent, count = 0.0, 0

    def clone_range(self: Kernel, source_fd: int, source_offset: int, length: int, fd: int, offset: int) -> None:
        nonlocal spent, count
        start = time.perf_counter()
        real(self, source_fd, source_offset, length, fd, offset)
        spent += time.perf_counter() - start
        count += 1

    Kernel.clone_range = clone_range  # type: ignore[method-assign]
    sys.argv = ["blockbak", *arguments]
    try:
        main()
    finally:
        print(json.dumps({"clones": count, "seconds": spent}))


def compare() -> None:
    """Two maps of which 1 % of the rows differ, compared in pieces, and the changed extents found."""
    import numpy as np

    from blockbak.model.extent import true_runs
    from blockbak.model.hashmap import changed_rows

    dice = np.random.default_rng(1)
    old = dice.integers(0, 1 << 63, (_ROWS, 4), np.int64).view("<u8")
    new = old.copy()
    new[dice.integers(0, _ROWS, _ROWS // 100), 3] ^= np.uint64(1)
    found = 0
    start = time.process_time()
    for _ in range(_PASSES):
        for low in range(0, _ROWS, _PIECE):
            starts, ends = true_runs(changed_rows(new[low : low + _PIECE], old[low : low + _PIECE]))
            found += int((ends - starts).sum())
    seconds = time.process_time() - start
    print(json.dumps({"rows": _ROWS * _PASSES, "changed": found, "cpu": seconds}))


if __name__ == "__main__":
    if sys.argv[1] == "clones":
        clones(sys.argv[2:])
    compare()
