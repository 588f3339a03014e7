"""``blockbak status``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import ATTENTION, BlockbakError

if TYPE_CHECKING:
    from blockbak.flow.status import Report
    from blockbak.model.health import Health, Room

FORMATS = ("text", "json", "prometheus", "nagios")


def _goal(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    seconds = common.duration(context, parameter, value)
    if seconds is not None and seconds <= 0:
        raise click.BadParameter("take more than nothing")
    return seconds


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup status\n"
    "  blockbak -r /srv/backup status web --rpo 26h --rto 1h\n"
    "  blockbak -r /srv/backup status --format nagios\n"
    "  blockbak -r /srv/backup status --textfile /var/lib/prometheus/node-exporter/blockbak.prom",
)
@click.argument("volume", required=False)
@click.option("--rpo", callback=_goal, metavar="DURATION", help="How old the newest good point may be, as in 26h.")
@click.option("--rto", callback=_goal, metavar="DURATION", help="How long a drill may take, as in 1h.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True,
              help="For people, for scripts, or for a monitoring system.")  # fmt: skip
@click.option("--textfile", type=common.PATH, metavar="FILE",
              help="Write the text for Prometheus to FILE as well, all of it at once.")  # fmt: skip
@common.config_option
@common.repository_option
@common.json_option
@click.pass_context
def command(
    context: click.Context, volume: str | None, rpo: float | None, rto: float | None, form: str, textfile: str | None,
    config_file: str | None, repository: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Whether every volume, or VOLUME, can be relied on: how old its newest good point is, when it was last drilled and
    how long that took, how much of it was verified, how long the room lasts, and what killed runs left.

    A point is good if all images that restore it are there and none was found damaged when last verified. Nothing is
    locked or changed. RPO and RTO are those of the volume's job, by the configuration; --rpo and --rto stand for all.

    Exit status 0, or 3 with the reasons. With --format nagios it is that of a plugin: 0 OK, 1 WARNING, 2 CRITICAL,
    3 UNKNOWN, where it could not be found out.
    """
    from blockbak.flow.status import exported, goals, jobs_into, status, write_textfile
    from blockbak.model import exposition
    from blockbak.model.health import Goals

    form = "json" if as_json else form
    try:
        config = common.known_config(config_file)
        opened = common.open_repository(repository, config)
        only, jobs = ([volume], []) if volume is not None else ([], jobs_into(config, opened))
        with common.world() as world:
            report = status(opened, world, goals(config, Goals(rpo, rto)), only=only, jobs=jobs)
        if textfile is not None:
            write_textfile(report, textfile)
    except BlockbakError as error:
        if form != "nagios":
            raise
        render.line(exposition.unknown(str(error)))
        context.exit(exposition.NAGIOS_UNKNOWN)
    if form == "nagios":
        code, told = exposition.nagios(report.room, report.volumes)
        render.line(told)
        context.exit(code)
    if form == "json":
        render.document(as_document(report))
    elif form == "prometheus":
        render.line(exported(report).removesuffix("\n"))
    else:
        _show(report)
    for name, reason in report.reasons:
        render.say(f"{name}: {reason.text}" if name else reason.text)
    context.exit(0 if report.ok else ATTENTION)


def as_document(report: Report) -> dict[str, object]:
    """The report as it stands in ``--json`` output."""
    return {
        "ok": report.ok,
        "repository": report.repository,
        "at": report.at,
        "room": {**asdict(report.room), "ok": report.room.ok},
        "volumes": [_volume(health) for health in report.volumes],
        "reasons": [{"volume": name, **asdict(reason)} for name, reason in report.reasons],
    }


def _volume(health: Health) -> dict[str, object]:
    return {**asdict(health), "ok": health.ok, "rpo_met": health.rpo_met, "rto_met": health.rto_met}


def _show(report: Report) -> None:
    if report.volumes:
        columns = [
            "volume",
            "newest good point",
            "age",
            "RPO",
            "chain",
            "last drill",
            "took",
            "RTO",
            "verified",
            "stored",
        ]
        render.table(
            columns, [_row(one) for one in report.volumes], numeric=["age", "RPO", "chain", "took", "RTO", "stored"],
            spare=["stored", "chain"],
        )  # fmt: skip
    else:
        render.line("No volume yet.")
    render.line(_room(report.room))


def _row(health: Health) -> list[object]:
    from blockbak.model.health import duration

    drilled = health.drilled
    verified = f"{100 * health.verified_share:.0f} %"
    if health.verified_at is not None:
        verified += f", {health.verified_at:%Y-%m-%d}"
    return [
        health.volume,
        health.newest or "none",
        duration(health.age_seconds) if health.age_seconds is not None else "",
        duration(health.goals.rpo) if health.goals.rpo is not None else "",
        health.chain_images or "",
        f"{drilled.at:%Y-%m-%d}{'' if drilled.ok else ' failed'}" if drilled else "never",
        render.seconds(drilled.rto_seconds) if drilled else "",
        duration(health.goals.rto) if health.goals.rto is not None else "",
        verified,
        render.size(health.stored_bytes),
    ]


def _room(room: Room) -> str:
    free = f"Room: {render.size(room.free_bytes)} of {render.size(room.total_bytes)} free"
    if room.growth is None:
        return f"{free}; how fast that is used up is not known before a day has gone by."
    if room.full_at is None:
        return f"{free}; the repository does not grow."
    return f"{free}, until {room.full_at:%Y-%m-%d} at {render.size(round(room.growth * 86400))} a day."
