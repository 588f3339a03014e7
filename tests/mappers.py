"""Device-mapper played with files: a directory holds one for each device, and a journal of what was done.

Run as a program, ``mappers.py GUARD DIRECTORY``, it is the guardian of ``blockbak/host/guard.py`` with such devices:
it is given as ``program`` where the real one would be started. So it needs the standard library only.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path


class Info:
    def __init__(self, uuid: str, suspended: bool, unready: bool) -> None:
        self.uuid, self.suspended, self.unready = uuid, suspended, unready


class FileMapper:
    """``info``, ``suspend`` and ``resume`` as ``host.mapper.Mapper`` has them; ``failing`` says how often a
    resume of a device fails.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = str(directory)

    def add(self, name: str, uuid: str, *, failing: int = 0, unready: bool = False) -> tuple[str, str]:
        self._set(name, {"uuid": uuid, "suspended": False, "failing": failing, "unready": unready})
        return name, uuid

    def info(self, name: str) -> Info | None:
        state = self._get(name)
        return state and Info(state["uuid"], state["suspended"], state["unready"])

    def suspend(self, name: str) -> None:
        self._set(name, self._get(name) | {"suspended": True})
        self.note(f"suspend {name}")

    def resume(self, name: str) -> None:
        state = self._get(name)
        if state["failing"]:
            self._set(name, state | {"failing": state["failing"] - 1})
            raise OSError(5, os.strerror(5))
        self._set(name, state | {"suspended": False, "unready": False})
        self.note(f"resume {name}")

    def note(self, what: str) -> None:
        with open(f"{self.directory}/log", "a") as file:
            file.write(what + "\n")

    def log(self) -> list[str]:
        try:
            with open(f"{self.directory}/log") as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    def _get(self, name):
        try:
            with open(f"{self.directory}/{name}") as file:
                return json.load(file)
        except FileNotFoundError:
            return None

    def _set(self, name, state) -> None:
        # Exchanged as a whole: two processes look at it.
        with open(f"{self.directory}/{name}.new", "w") as file:
            json.dump(state, file)
        os.rename(f"{self.directory}/{name}.new", f"{self.directory}/{name}")


def main(path: str, directory: str) -> int:
    source = {"__name__": "guard"}
    with open(path) as file:
        exec(compile(file.read(), path, "exec"), source)
    mapper = FileMapper(directory)
    late = []

    def watch(event, arguments):
        # What is imported after "ready" would have to be read from a disk that may be suspended.
        if event == "import" and late:
            mapper.note(f"import {arguments[0]}")

    sys.addaudithook(watch)
    say = source["_Channel"].say

    def said(channel, message):
        say(channel, message)
        late.append(message)

    source["_Channel"].say = said
    return source["main"](lambda: mapper)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
