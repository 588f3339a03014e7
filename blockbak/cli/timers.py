"""``blockbak timers``."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from blockbak.model.timers import Call, Unit


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak timers show\n"
    "  blockbak timers install\n"
    "  blockbak timers install --cron\n"
    "  blockbak timers remove",
)
@click.argument(
    "action", type=click.Choice(["install", "show", "remove", "failed"]), metavar="install|show|remove|failed"
)
@click.argument("jobs", nargs=-1, metavar="[JOB...]")
@click.option("--cron", is_flag=True, help="install, show: print lines for /etc/cron.d instead; nothing is installed.")
@click.option(
    "--unit-dir", type=common.PATH, metavar="DIRECTORY",
    help="Write the units there, and tell systemd nothing [/etc/systemd/system].",
)  # fmt: skip
@common.config_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, action: str, jobs: tuple[str, ...], cron: bool, unit_dir: str | None,
    config_file: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Have the jobs of the configuration run by themselves: by systemd, or by cron where that does not run.

    install: writes a timer and a service for each job, or for those that are named, a service that tells people where
    blockbak could not do so itself, and one that runs 'recover --machine' at boot; removes those of jobs that are gone,
    and switches the timers on. What a machine that was off has missed is made up for. To be done again when the
    configuration, the program or its place changes. show: the units as they would be written, which of them are
    there, and when they fire next. remove: all units of blockbak, and nothing else.

    failed: what OnFailure= runs for a JOB: tells people of a run that did not come to its end.

    Services are nice, read idly, and are sandboxed as far as raw devices allow; only jobs of mode hot and live have a
    mount namespace of their own, for others may have to unmount.
    """
    if jobs and action == "remove":
        raise click.UsageError("remove takes all units of blockbak, no JOB.")
    if cron and action not in ("install", "show"):
        raise click.UsageError("--cron goes with install and show.")
    if cron and unit_dir is not None:
        raise click.UsageError("--cron writes no units, so --unit-dir does not go with it.")
    if action == "install" and unit_dir is not None and not os.path.isdir(unit_dir):
        raise click.BadParameter(f"{unit_dir} is not a directory.", param_hint="'--unit-dir'")
    if action == "failed":
        context.exit(_failed(jobs, config_file, as_json=as_json))
    if action == "remove":
        _remove(unit_dir, as_json=as_json)
        return
    from datetime import UTC, datetime

    from blockbak.flow.jobs import chosen, load
    from blockbak.host import clock
    from blockbak.model import timers

    path = common.config_path(config_file)
    config = load(path)
    names = [job.name for job in chosen(config, jobs)]
    call = _call(path)
    if cron:
        same = clock.alike(clock.zone(config.timezone), clock.zone(), datetime.now(UTC))
        lines = timers.crontab(config, call, names, same_zone=same)
        if as_json:
            render.document({"cron": lines})
        for line in lines if not as_json else ():
            render.line(line)
        return
    units = timers.units(config, call, names)
    known = {unit.name for unit in timers.units(config, call, list(config.jobs))}
    if action == "show":
        _show(units, known, unit_dir, as_json=as_json)
    else:
        _install(units, known, unit_dir, as_json=as_json)


def _call(path: str) -> Call:
    """How a unit starts this very program, with the directories that it has now."""
    from blockbak.model.timers import Call

    named = ("BLOCKBAK_STATE_DIR", "BLOCKBAK_RUN_DIR")
    environment = tuple((name, os.path.abspath(os.environ[name])) for name in named if os.environ.get(name))
    return Call((os.path.abspath(sys.executable), "-I", "-m", "blockbak"), path, common.state_dir(), environment)


def _install(units: Sequence[Unit], known: Collection[str], unit_dir: str | None, *, as_json: bool) -> None:
    from blockbak.host import unitfiles
    from blockbak.host.kernel import Kernel
    from blockbak.host.units import Units

    place = unit_dir or unitfiles.UNIT_DIR
    changes = unitfiles.install(place, units, known, Kernel(), Units() if unit_dir is None else None)
    if as_json:
        render.document({"directory": place, "written": changes.written, "removed": changes.removed})
        return
    for name in changes.written:
        render.line(f"{place}/{name} written.")
    for name in changes.removed:
        render.line(f"{place}/{name} removed.")
    if not changes.written and not changes.removed:
        render.line("All units are there as they should be.")


def _remove(unit_dir: str | None, *, as_json: bool) -> None:
    from blockbak.host import unitfiles
    from blockbak.host.kernel import Kernel
    from blockbak.host.units import Units

    place = unit_dir or unitfiles.UNIT_DIR
    changes = unitfiles.remove(place, Kernel(), Units() if unit_dir is None else None)
    if as_json:
        render.document({"directory": place, "removed": changes.removed})
        return
    for name in changes.removed:
        render.line(f"{place}/{name} removed.")
    if not changes.removed:
        render.line(f"{place} holds no unit of blockbak.")


def _show(units: Sequence[Unit], known: Collection[str], unit_dir: str | None, *, as_json: bool) -> None:
    from blockbak.host import unitfiles
    from blockbak.host.units import Units

    place = unit_dir or unitfiles.UNIT_DIR
    states = {unit.name: unitfiles.state(place, unit) for unit in units}
    timers = [unit.name for unit in units if unit.name.endswith(".timer")]
    following = unitfiles.next_times(timers, Units()) if unit_dir is None else {}
    stale = [name for name in unitfiles.present(place) if name not in known]
    if as_json:
        document = [
            {"name": unit.name, "state": states[unit.name], "next": following.get(unit.name, ""), "text": unit.text}
            for unit in units
        ]
        render.document({"directory": place, "units": document, "stale": stale})
        return
    for unit in units:
        render.line(f"# {place}/{unit.name}")
        render.line(unit.text)
    said = {"missing": "not installed", "other": "installed, but not as above", "same": "installed"}
    rows = [(unit.name, said[states[unit.name]], following.get(unit.name, "")) for unit in units]
    rows += [(name, "installed, but not wanted any more", "") for name in stale]
    render.table(("unit", "state", "next"), rows)


def _failed(jobs: tuple[str, ...], config_file: str | None, *, as_json: bool) -> int:
    if len(jobs) != 1:
        raise click.UsageError("failed takes one JOB.")
    from blockbak.cli import log
    from blockbak.errors import JobError, UnsafeConfig
    from blockbak.flow import run
    from blockbak.flow.jobs import chosen, load

    log.begin_unless_begun()
    with common.world() as world:
        try:
            config = load(common.config_path(config_file))
            (job,) = chosen(config, jobs)
        except (JobError, UnsafeConfig) as error:
            run.tell_unusable(error, world)
            raise
        told = run.tell_unfinished(config, job, world)
    if as_json:
        render.document({"job": job.name, "unfinished": told})
    else:
        render.line(f"{job.name}: {'people were told of its last run' if told else 'its last run came to its end'}.")
    return 0
