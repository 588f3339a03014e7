"""A process that has imported the program, and forks a child for each run of it that it is asked for.

Starting Python and importing numpy takes longer than what most of these runs do. A request is a line of JSON on
standard input; the answer is a line with the request's number and the child's exit status. What the child says goes
to the files named.
"""

from __future__ import annotations

import importlib
import json
import os
import sys


def serve() -> None:
    """Answer requests until standard input ends."""
    from blockbak.cli.main import MODULES, VERBS

    for verb in VERBS:
        importlib.import_module(f"blockbak.cli.{MODULES.get(verb, verb)}")
    for module in ("backup", "restore", "verify", "synthesize", "delete", "export", "show"):
        importlib.import_module(f"blockbak.flow.{module}")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        _, status = os.waitpid(child, 0)
        print(request["number"], os.waitstatus_to_exitcode(status), flush=True)


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
