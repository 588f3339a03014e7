"""systemd's units: what they are, what goes with them, stopped and started again, through systemctl."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from blockbak.host import runner
from blockbak.model.quiesce import Unit


class Units:
    """What systemd says, and what it is told. ``root`` is ``/`` or a recorded tree, ``run`` runs programs."""

    def __init__(self, root: Path = Path("/"), run: Callable[..., runner.Completed] = runner.run) -> None:
        self._root, self._run = root, run

    @property
    def running(self) -> bool:
        """Whether systemd runs this machine (sd_booted(3))."""
        return (self._root / "run/systemd/system").is_dir()

    def look(self, names: Iterable[str], *, strict: bool = False) -> Mapping[str, Unit]:
        """The units of these names with what goes with each, and all of these too, by their full names.

        Empty where systemd does not run. With ``strict``, raises NoSuchUnit for a name that systemd does not know,
        and NoSystemd where it does not run; else such names are left out. Raises CommandFailed.
        """
        raise NotImplementedError
