"""A process that has imported the program, and forks a child for each run of it that it is asked for.

Starting Python and importing numpy takes longer than what most of these runs do. A request is a line of JSON on
standard input; the answer is a line with the request's number and the child's exit status. What the child says goes
to the files named. A request with ``beside`` is answered at once, with the child's pid; what became of that one a
request with ``of`` asks, and may ``wait`` for.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import sys

# What a run imports only when it comes to it.
OTHERS = (
    "click._textwrap", "difflib", "encodings.ascii", "importlib.resources.readers", "numpy.ma", "psutil", "pyudev",
    "rich.console", "rich.table", "tomllib",
)  # fmt: skip


def serve() -> None:
    """Answer requests until standard input ends."""
    from blockbak import cli, flow

    for package in (cli, flow):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    for name in OTHERS:
        importlib.import_module(name)
    # No child's collector looks at, and thereby copies, what they share.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        print(request["number"], answer(request), flush=True)


def answer(request: dict[str, object]) -> int | str:
    """The exit status of a run that is over, the pid of one that was begun, or a word for one that goes on."""
    if "of" in request:
        ended, status = os.waitpid(request["of"], 0 if request["wait"] else os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else "runs"
    child = os.fork()
    if child == 0:
        run(request)
    if request.get("beside"):
        return child
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def run(request: dict[str, object]) -> None:
    """Become one run of the program."""
    from blockbak.cli.main import main

    for number, (path, flags) in enumerate(
        [(os.devnull, os.O_RDONLY), (request["out"], os.O_WRONLY), (request["err"], os.O_WRONLY)]
    ):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    status = 70
    try:
        os.chdir(request["where"])
        os.environ.update(request["environment"])
        sys.argv = ["blockbak", *request["argv"]]
        main()
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve()
