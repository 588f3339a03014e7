"""``blockbak cold --at-next-boot``: the root disk, imaged before the system starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from blockbak.flow.context import Context
    from blockbak.flow.nextboot import Ordered
    from blockbak.repository.local import Repository

F = TypeVar("F", bound=Callable[..., Any])


def options(function: F) -> F:
    """The options of ``--at-next-boot``."""
    for option in reversed(
        (
            click.option(
                "--at-next-boot",
                is_flag=True,
                help="Image the disk, also the root disk, into the repository (-r) at the next boot, before it is "
                "mounted.",
            ),
            click.option("--cancel", is_flag=True, help="With --at-next-boot: take it back, also after the boot."),
            click.option(
                "--time-limit",
                type=click.IntRange(min=1),
                metavar="SECONDS",
                help="With --at-next-boot: after this the system starts, whatever happens, and no point is made "
                "[an hour].",
            ),
            click.option(
                "--name",
                callback=common.volume_name,
                metavar="VOLUME",
                help="With --at-next-boot: the volume's name in the repository.",
            ),
        )
    ):
        function = option(function)
    return function


_MINE = ("device", "at_next_boot", "cancel", "time_limit", "name", "dry_run", "repository", "as_json")


def check_alone(context: click.Context) -> None:
    """Raise UsageError for whatever belongs to an image that is made now."""
    given = click.core.ParameterSource.COMMANDLINE
    others = [name for name in context.params if name not in _MINE and context.get_parameter_source(name) is given]
    if others:
        names = ", ".join(one.get_error_hint(context) for one in context.command.params if one.name in others)
        raise click.UsageError(f"--at-next-boot images into the repository, and does not take {names}.")


def run(
    device: str | None,
    repository: str | None,
    *,
    cancel: bool,
    name: str | None,
    limit: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Order an image at the next boot, or take the order back."""
    from blockbak.flow import nextboot
    from blockbak.model.nextboot import LIMIT_SECONDS

    if cancel and (device is not None or dry_run or name is not None or limit is not None):
        raise click.UsageError("--cancel takes back what is ordered in a repository: it takes nothing else.")
    if not cancel and device is None:
        raise click.UsageError("--at-next-boot needs the DEVICE.")
    opened = common.open_repository(repository)
    with common.world() as world:
        if cancel:
            said = nextboot.cancel(opened, world)
            if as_json:
                render.document({"cancelled": opened.path})
            else:
                render.line(said)
            return
        made = nextboot.order(opened, device or "", world, name=name, limit=limit or LIMIT_SECONDS, dry_run=dry_run)
    for note in made.notes:
        render.say(note)
    if as_json:
        from dataclasses import asdict

        render.document({**asdict(made), "dry_run": dry_run})
    else:
        render.line(_told(made, dry_run=dry_run))


def _told(made: Ordered, *, dry_run: bool) -> str:
    limit = render.seconds(made.limit)
    what = f"{made.source} ({made.identity}), {render.size(made.device_bytes)}"
    if dry_run:
        return f"{made.volume}: would image {what} at the next boot, for at most {limit}."
    return (
        f"{made.volume}: {what} is imaged at the next boot, for at most {limit}, and is a point once the system is up. "
        f"'blockbak cold --at-next-boot --cancel -r {made.repository}' takes it back."
    )


def finish(repository: Repository, world: Context) -> tuple[list[str], list[str]]:
    """Make a point of what a boot left, if it left anything; sentences on what was done, and what must be looked at."""
    from blockbak.flow import nextboot

    told = nextboot.finish(repository, world)
    return told.done, told.left
