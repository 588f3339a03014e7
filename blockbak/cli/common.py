"""What all verbs share: the options for repository, JSON and waiting, and the world they run in."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockbak.errors import BadBlockSize, Interrupted, NoConfig, NoRepositoryNamed, NotARepository, NotConfirmed

if TYPE_CHECKING:
    from datetime import datetime

    from blockbak.flow.context import Context
    from blockbak.model.config import Config, Job
    from blockbak.repository.local import Repository

F = TypeVar("F", bound=Callable[..., Any])
R = TypeVar("R")

CONFIG = "/etc/blockbak/blockbak.toml"
"""Where the configuration lies, if nobody says otherwise."""
WORKERS_MAX = 10
"""More would take more memory than the promise allows, for devices faster than any seen so far."""
WORKERS_WAITING = 4
"""Beyond one a core: while some wait for the device or for their turn to append, the others have work."""


class _Path(click.types.StringParamType):
    """The name of a device, a file or a directory. An empty one (a variable that is not set) would else be
    the current directory.
    """

    name = "path"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it was given. Fails, as click does, for an empty one and where it leads nowhere."""
        path: str = super().convert(value, param, ctx)
        if not path:
            self.fail("an empty name names nothing", param, ctx)
        if not _has_place(path):
            self.fail("the current directory is gone; give the whole path", param, ctx)
        return path


def _has_place(path: str) -> bool:
    """Whether ``path`` can be made absolute."""
    try:
        os.path.abspath(path)
    except FileNotFoundError:
        return False
    return True


def _seconds(_: click.Context, __: click.Parameter, value: float) -> float:
    if math.isnan(value):
        raise click.BadParameter("take a number of seconds")
    return value


def duration(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """Seconds, of a duration as people write it; None where none is given."""
    from blockbak.units import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no duration like 90min, 36h, 30d or 2y") from error


def last_moment(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    """The end of a day, minute or second; None where none is given."""
    from blockbak.model import when

    if value is None:
        return None
    moment = when.last_moment(value)
    if moment is None:
        raise click.BadParameter(f"{value!r} is not a time like 2027-12-31 or 2027-12-31T18:00")
    return moment


PATH = _Path()
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
repository_option = click.option(
    "-r",
    "--repository",
    type=PATH,
    metavar="REPO",
    help="The repository's directory (or BLOCKBAK_REPO, or the only one of the configuration).",
)
config_option = click.option(
    "--config", "config_file", type=PATH, metavar="FILE",
    help="The configuration (or BLOCKBAK_CONFIG) [/etc/blockbak/blockbak.toml].",
)  # fmt: skip
wait_option = click.option(
    "--wait", type=click.FloatRange(min=0), callback=_seconds, default=0, metavar="SECONDS",
    help="Wait so long for a volume that another run holds.",
)  # fmt: skip


def _compress(_: click.Context, __: click.Parameter, value: str) -> str:
    from blockbak.image.codec import encoder

    try:
        encoder(value)
    except ValueError as error:
        raise click.BadParameter(f"{error}; take none, zstd or zstd:1 to zstd:19") from error
    return value


compress_option = click.option(
    "--compress", callback=_compress, default="zstd", show_default=True, metavar="none|zstd[:LEVEL]",
    help="How new frames are stored; zstd alone is level 1.",
)  # fmt: skip


_retries_option = click.option(
    "--retries", type=click.IntRange(0, 1000), default=1, show_default=True, metavar="N",
    help="Ask so often again for a sector that cannot be read, once the rest around it is read.",
)  # fmt: skip
_strict_option = click.option(
    "--strict", is_flag=True, help="End at the first sector that cannot be read [finish, name it, exit 3]."
)
_used_only_option = click.option(
    "--used-only", is_flag=True,
    help="Leave out what ext2 to ext4, XFS, btrfs, vfat and NTFS file systems do not use, as partclone tells it. "
    "Restored, it is zeros. The default is every byte.",
)  # fmt: skip


def reading_options(function: F) -> F:
    """How a source is read: the arguments ``retries``, ``strict`` and ``used_only``."""
    return retrying_options(_used_only_option(function))


def retrying_options(function: F) -> F:
    """What is done about unreadable sectors: the arguments ``retries`` and ``strict``."""
    return _retries_option(_strict_option(function))


_REST = (
    click.option("--stop", multiple=True, metavar="UNIT", help="Cold: stop this systemd unit meanwhile; repeatable."),
    click.option("--stop-users", is_flag=True, help="Cold: stop the units whose processes use the device."),
    click.option("--kill", is_flag=True, help="Cold: end processes that still use it; nothing starts them again."),
    click.option(
        "--freeze", is_flag=True,
        help="Cold: freeze a file system that is written and cannot be unmounted, while it is read.",
    ),
    click.option(
        "--thaw-after", type=click.FloatRange(min=1), default=600, show_default=True, metavar="SECONDS",
        help="Cold: after this what is frozen goes on, whatever happens, and the image is void.",
    ),
    click.option("--deactivate", is_flag=True, help="Cold: deactivate the volume groups that lie on the device."),
    click.option(
        "--cold-hook", multiple=True, metavar="HOOK",
        help="Cold: a program that is run before anything is stopped, and when all is back; repeatable.",
    ),
)  # fmt: skip


def rest_options(function: Callable[..., R]) -> Callable[..., R]:
    """What may be done to bring a device to rest: comes as ``rest``, a RestOptions."""

    @functools.wraps(function)
    def gathered(
        *args: object, stop: tuple[str, ...], stop_users: bool, kill: bool, freeze: bool, thaw_after: float,
        deactivate: bool, cold_hook: tuple[str, ...], **others: object,
    ) -> R:  # fmt: skip
        from blockbak.model.quiesce import RestOptions

        rest = RestOptions(stop, stop_users, kill, freeze, deactivate, cold_hook, thaw_after)
        return function(*args, rest=rest, **others)

    made: Callable[..., R] = gathered
    for option in reversed(_REST):
        made = option(made)
    return made


def repository_options(function: F) -> F:
    """The options of a verb that works on a repository."""
    return repository_option(json_option(wait_option(function)))


def parsed_bytes(value: str, advice: str) -> int:
    """Bytes named by a word; ``advice`` is what to take instead of one that names none."""
    from blockbak.units import parse_size

    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not a size; take {advice}") from error


def block_size(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """A power of two from 4K to 1M."""
    if value is None:
        return None
    from blockbak.flow.backup import check_block_size

    size = parsed_bytes(value, "4K to 1M")
    try:
        check_block_size(size)
    except BadBlockSize as error:
        raise click.BadParameter("take a power of two from 4K to 1M") from error
    return size


def store_size(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A size, or a share of the volume."""
    from blockbak.model.snapshot import parse_size as parse_store
    from blockbak.units import parse_size

    if value is None:
        return None
    try:
        size = parse_store(value, 1 << 40, parse_size)
    except ValueError:
        size = 0
    if size <= 0:
        raise click.BadParameter(f"{value!r} is neither a size like 20G nor a share like 15%")
    return value


_SNAPSHOT = (
    click.option(
        "--snapshot-size",
        callback=store_size,
        metavar="SIZE|SHARE%",
        help="Room for what is written to the volume while it is read [10%, at least 1G, as far as there is room]. "
        "Of a thin pool it must be free.",
    ),
    click.option(
        "--snapshot-limit",
        callback=store_size,
        metavar="SIZE|SHARE%",
        help="How far a snapshot that fills is extended [until it cannot overflow].",
    ),
    click.option(
        "--freeze-with",
        multiple=True,
        metavar="HOOK",
        help="A program that rests an application around the snapshot, or postgresql, mariadb, mysql; may be repeated.",
    ),
    click.option(
        "--freeze-deadline",
        type=click.FloatRange(min=1),
        default=60,
        show_default=True,
        metavar="SECONDS",
        help="After this the application goes on, whatever happens, and the snapshot is void.",
    ),
)


def snapshot_options(function: F) -> F:
    """How a snapshot is made: ``snapshot_size``, ``snapshot_limit``, ``freeze_with`` and ``freeze_deadline``."""
    for option in reversed(_SNAPSHOT):
        function = option(function)
    return function


def rate(_: click.Context, __: click.Parameter, value: str | None) -> int | None:
    """Bytes a second."""
    if value is None:
        return None
    rate = parsed_bytes(value, "50M for 50 MiB a second")
    if rate < 64 << 10:
        raise click.BadParameter("take at least 64K")
    return rate


def volume_name(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """A word that may be a volume's name."""
    from blockbak.repository.local import NAME_RULE, usable_name

    if value is not None and not usable_name(value):
        raise click.BadParameter(f"{value!r} is no name for a volume: it takes {NAME_RULE}")
    return value


def confirm(target: str) -> None:
    """A person at a terminal may type the target's name instead of ``--yes``. Raises NotConfirmed, Interrupted."""
    from blockbak.cli import render

    try:
        typed = render.ask(f"Everything on {target} will be overwritten. Type its name to go on")
    except KeyboardInterrupt:
        raise Interrupted(state="nothing was changed") from None
    if typed != target:
        raise NotConfirmed(action=f"Overwriting {target}")


def known_repository(named: str | None) -> Repository | None:
    """The repository as ``open_repository`` finds it, for a verb that can do without; None where none is named, or
    where the one of BLOCKBAK_REPO is not there now.
    """
    if named or click.get_current_context().obj:
        return open_repository(named)
    if not os.environ.get("BLOCKBAK_REPO"):
        return None
    try:
        return open_repository(None)
    except NotARepository:
        return None


def open_repository(named: str | None, config: Config | None = None, job: Job | None = None) -> Repository:
    """The repository named here, before the verb, or by BLOCKBAK_REPO; else that of ``job``, or the only one of
    ``config``, or of the usual configuration where none is given. Raises NoRepositoryNamed, UnsafeConfig and what
    opening it raises.
    """
    from blockbak.repository.local import Repository

    path = named or click.get_current_context().obj or os.environ.get("BLOCKBAK_REPO")
    if not path and (config := config or _usable_config()):
        path = config.path_of(job) if job else _only_path(config)
    if not path:
        raise NoRepositoryNamed
    if not _has_place(path):
        raise NotARepository(path=path, reason="the current directory is gone")
    return Repository(path)


def config_path(named: str | None) -> str:
    """The file of the configuration: the one named, that of BLOCKBAK_CONFIG, or the usual one."""
    return os.path.abspath(named or os.environ.get("BLOCKBAK_CONFIG") or CONFIG)


def known_config(named: str | None) -> Config | None:
    """The configuration, for a verb that can do without; None where none is named and there is none. Raises NoConfig,
    BadConfig.
    """
    path = config_path(named)
    if not named and not os.environ.get("BLOCKBAK_CONFIG") and not os.path.exists(path):
        return None
    from blockbak.flow.jobs import load

    return load(path)


def _only_path(config: Config) -> str | None:
    places = list(config.repositories.values())
    return places[0].path if len(places) == 1 else None


def _usable_config() -> Config | None:
    """The usual configuration, where it can be read and used: what is wrong with it is no reason to do without a
    restore. Raises UnsafeConfig: others could have named a repository of theirs.
    """
    from blockbak.host import configfile
    from blockbak.model.config import Unusable, parse

    try:
        text = configfile.read(config_path(None))
    except NoConfig:
        return None

    try:
        return parse(text)
    except Unusable:
        return None


@functools.cache
def run_id() -> str:
    """32 hex digits that name this process."""
    import secrets

    return secrets.token_hex(16)


def state_dir() -> str:
    """Where blockbak keeps what it can do without: BLOCKBAK_STATE_DIR, /var/lib/blockbak for root, the XDG
    state directory for others.
    """
    if named := os.environ.get("BLOCKBAK_STATE_DIR"):
        return named
    if os.geteuid() == 0:
        return "/var/lib/blockbak"
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "blockbak")


def _listen(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """SIGINT, SIGTERM and SIGHUP come to ``handler`` from now on. Gives what they came to before."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # under nohup it stays ignored
    return {number: signal.signal(number, handler) for number in numbers}


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = _listen(handler)
    try:
        yield
    finally:
        for number, one in before.items():
            signal.signal(number, one)


def end_at_once() -> None:
    """Where there is nothing to undo, each of them is what Ctrl-C is to Python: a KeyboardInterrupt."""

    def end(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    _listen(end)


def deaf() -> None:
    """SIGINT, SIGTERM and SIGHUP change nothing any more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def world(wait: float = 0) -> Iterator[Context]:
    """The clock, the dice, the screen; and SIGINT, SIGTERM and SIGHUP turned into a wish to stop.

    The use-case stops at the next place where nothing is left half-made. No signal breaks in: what is in the
    middle of a lock or of clearing away gets through it, however often Ctrl-C is pressed.
    """
    import secrets
    import socket
    import time
    from datetime import UTC, datetime

    from blockbak import __version__
    from blockbak.cli import render
    from blockbak.flow.context import Context
    from blockbak.host.kernel import Kernel, allow_many_files, keep_memory
    from blockbak.host.system import user_name

    caught: list[int] = []

    def wish(number: int, _: FrameType | None) -> None:
        caught.append(number)

    def check() -> None:
        if caught:
            raise Interrupted(state="nothing is left half-made")

    keep_memory()
    allow_many_files()
    with _handled(wish):
        yield Context(
            now=lambda: datetime.now(UTC),
            timer=time.monotonic,
            hex_id=lambda digits: secrets.token_hex((digits + 1) // 2)[:digits],
            say=render.say,
            progress=render.Bar(),
            check=check,
            workers=min(WORKERS_MAX, len(os.sched_getaffinity(0)) + WORKERS_WAITING),
            host=socket.gethostname(),
            program=f"blockbak {__version__}",
            state_dir=state_dir(),
            kernel=Kernel(),
            wait=wait,
            run_dir=os.environ.get("BLOCKBAK_RUN_DIR") or "/run/blockbak",
            run=run_id(),
            user=user_name(),
            voice=render.say_about if render.logs() else None,
        )
