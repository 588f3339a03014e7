"""What is known of a job from one run to the next: how the last one went, and whether people know.

Losing it costs a message too many, never a point: what is due is told by the points themselves.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from blockbak.errors import JobRuns, StoreFailed, VolumeLocked
from blockbak.host import lock
from blockbak.host.blockio import replace_durably
from blockbak.host.kernel import Kernel
from blockbak.model.config import Notify

FOLDER = "jobs"
_NOTIFY = ".notify"
"""No job's name begins so."""
NO_JOB = ""
"""In place of a job's name: what is kept of this machine's jobs together, which is whether none could be run."""


class State(msgspec.Struct):
    """Times are ISO 8601 in UTC, empty for never. ``ended`` is empty while a run lasts, and stays so if it was killed.
    ``failing`` says that the last run that ended had failed, and that people were told; ``told_missing`` when they
    were last told of points that are not new enough. ``stopped`` says that the last run was asked to end before it was
    done, which people were not told. ``volumes`` are the names in the repository of what a source was.
    """

    run: str = ""
    started: str = ""
    ended: str = ""
    exit: int = 0
    error: str = ""
    failing: bool = False
    stopped: bool = False
    told_missing: str = ""
    verified: str = ""
    drilled: str = ""
    volumes: dict[str, str] = msgspec.field(default_factory=dict)


def _folder(state_dir: str) -> str:
    return os.path.join(os.path.abspath(state_dir), FOLDER)


def load(state_dir: str, job: str) -> State:
    """What is known; an empty state where nothing is, or what there is cannot be read."""
    try:
        with open(os.path.join(_folder(state_dir), f"{job}.json"), "rb") as file:
            return msgspec.json.decode(file.read(), type=State)
    except (OSError, ValueError):  # msgspec's errors are ValueErrors
        return State()


def save(state_dir: str, job: str, state: State, kernel: Kernel) -> None:
    """Exchange it for what is there, durably, all or nothing. Raises StoreFailed."""
    _write(_folder(state_dir), f"{job}.json", msgspec.json.format(msgspec.json.encode(state)) + b"\n", kernel)


def load_notify(state_dir: str) -> Notify:
    """Who was to be told by the last configuration that could be used; nobody where that is not known."""
    try:
        with open(os.path.join(_folder(state_dir), _NOTIFY), "rb") as file:
            return msgspec.json.decode(file.read(), type=Notify)
    except (OSError, ValueError):
        return Notify()


def save_notify(state_dir: str, notify: Notify, kernel: Kernel) -> None:
    """Keep it, with its secrets, for root alone: so that people can be told that the configuration is broken. Raises
    StoreFailed.
    """
    if load_notify(state_dir) != notify:
        _write(_folder(state_dir), _NOTIFY, msgspec.json.encode(notify), kernel)


def _write(folder: str, name: str, text: bytes, kernel: Kernel) -> None:
    path = os.path.join(folder, name)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        replace_durably(path, text, kernel)
    except OSError as error:
        raise StoreFailed(path=path, action="written", reason=(error.strerror or str(error)).lower()) from error


@contextmanager
def alone(
    state_dir: str, job: str, *, wait: float, check: Callable[[], None], say: Callable[[str], None], kernel: Kernel
) -> Iterator[None]:
    """Be the only run of the job until the ``with`` is over. ``wait`` seconds are spent for another one to end.

    Raises JobRuns, naming who runs it, and StoreFailed or NoPermission where that cannot be tried.
    """
    folder = _folder(state_dir)
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise StoreFailed(path=folder, action="made", reason=(error.strerror or str(error)).lower()) from error
    with contextlib.ExitStack() as stack:
        try:
            path = os.path.join(folder, f"{job}.lock")
            clock, sleep = time.monotonic, time.sleep
            held = lock.held(
                path, job, exclusive=True, wait=wait, check=check, say=say, clock=clock, sleep=sleep, kernel=kernel
            )
            stack.enter_context(held)
        except VolumeLocked as error:
            raise JobRuns(job=job, pid=error.fields["pid"], host=error.fields["host"]) from error
        yield
