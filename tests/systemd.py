"""systemd played with a file: units, what they need, and how they behave when they are stopped or started.

Run as a program it is the ``systemctl`` of that machine; ``FakeSystemd.install`` puts it into a directory for PATH.
"""

from __future__ import annotations

import json
import os
import sys

RUNS = ("active", "activating", "reloading")
STOPPED_WITH = ("RequiredBy", "RequisiteOf", "BoundBy", "ConsistsOf", "PropagatesStopTo")
STARTED_WITH = ("Wants", "Requires", "BindsTo", "Upholds")

REFUSALS = {
    "meanwhile": "Job for {name} canceled.",
    "refuse": "Failed to stop {name}: Operation refused, unit {name} may be requested by dependency only (it is configured "
    "to refuse manual start/stop).",
}


class FakeSystemd:
    """``units`` by name: ``state``, properties as systemctl shows them, and ``when_stopped`` (``restart``: it is
    active again at once; ``meanwhile``: it is started before the stop is through; ``refuse``: it stays),
    ``when_started`` (``fail``).
    """

    def __init__(self, directory: object) -> None:
        self.directory = str(directory)
        self._file = os.path.join(self.directory, "units.json")
        self._log = os.path.join(self.directory, "systemctl.log")

    # --- for tests ---------------------------------------------------------------------------------------

    def install(self) -> str:
        """A directory with a ``systemctl`` in it; also makes the machine one that systemd runs (``root``)."""
        os.makedirs(os.path.join(self.root, "run/systemd/system"), exist_ok=True)
        place = os.path.join(self.directory, "bin")
        os.makedirs(place, exist_ok=True)
        program = os.path.join(place, "systemctl")
        with open(program, "w") as file:
            file.write(
                f'#!/bin/sh\nexec "{sys.executable}" -I -S "{os.path.abspath(__file__)}" "{self.directory}" "$@"\n'
            )
        os.chmod(program, 0o755)
        return place

    @property
    def root(self) -> str:
        return os.path.join(self.directory, "root")

    def add(self, name: str, state: str = "active", **more: str) -> None:
        units = self.units
        units[name] = {"state": state, **more}
        self.units = units

    @property
    def units(self) -> dict[str, dict[str, str]]:
        try:
            with open(self._file) as file:
                found: dict[str, dict[str, str]] = json.load(file)
        except FileNotFoundError:
            return {}
        return found

    @units.setter
    def units(self, units: dict[str, dict[str, str]]) -> None:
        partial = f"{self._file}.partial"
        with open(partial, "w") as file:
            json.dump(units, file)
        os.replace(partial, self._file)

    def states(self) -> dict[str, str]:
        return {name: unit["state"] for name, unit in self.units.items()}

    def log(self) -> list[str]:
        try:
            with open(self._log) as file:
                return file.read().splitlines()
        except FileNotFoundError:
            return []

    # --- the program -------------------------------------------------------------------------------------

    def _real(self, name: str) -> str:
        found = (one for one, unit in self.units.items() if name in unit.get("Names", "").split())
        return name if name in self.units else next(found, name)

    def show(self, properties: list[str], names: list[str]) -> int:
        blocks = []
        for name in names:
            real = self._real(name)
            unit = self.units.get(real, {"state": "inactive", "LoadState": "not-found"})
            shown = {"LoadState": "loaded", "TimeoutStopUSec": "1s", **unit, "Id": real, "ActiveState": unit["state"]}
            blocks.append("".join(f"{key}={shown.get(key, '')}\n" for key in properties if key in shown or key != "Id"))
        print("\n".join(blocks), end="")
        return 0

    def stop(self, names: list[str]) -> int:
        status = 0
        units = self.units
        pending = [self._real(name) for name in names]
        for name in pending:  # grows as it is walked
            unit = units.get(name)
            if unit is None:
                print(f"Failed to stop {name}: Unit {name} not loaded.", file=sys.stderr)
                status = 5
                continue
            if unit["state"] not in RUNS:
                continue
            how = unit.get("when_stopped", "")
            if how in REFUSALS:
                print(REFUSALS[how].format(name=name), file=sys.stderr)
                status = 1
                continue
            unit["state"] = "active" if how == "restart" else "inactive"
            pending += [one for key in STOPPED_WITH for one in unit.get(key, "").split() if one not in pending]
        self.units = units
        return status

    def start(self, names: list[str], *, alone: bool = False) -> int:
        status = 0
        units = self.units
        pending = [self._real(name) for name in names]
        for name in pending:  # grows as it is walked
            if not alone and units[name]["state"] not in RUNS:
                pending += [one for key in STARTED_WITH for one in units[name].get(key, "").split()]
            failed = units[name].get("when_started") == "fail"
            units[name]["state"] = "failed" if failed else "active"
            status = 1 if failed else status
        self.units = units
        return status

    def main(self, words: list[str]) -> int:
        with open(self._log, "a") as file:
            file.write(" ".join(words) + "\n")
        at = words.index("--")
        verb, names = words[0], words[at + 1 :]
        if verb == "show":
            wanted = next(one for one in words if one.startswith("--property=")).partition("=")[2]
            return self.show(wanted.split(","), names)
        if verb == "stop":
            return self.stop(names)
        return self.start(names, alone="--job-mode=ignore-dependencies" in words)


if __name__ == "__main__":
    sys.exit(FakeSystemd(sys.argv[1]).main(sys.argv[2:]))
