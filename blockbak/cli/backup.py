"""``blockbak backup``."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import click

from blockbak.cli import common, nextboot, render
from blockbak.errors import ATTENTION, BlockbakError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blockbak.flow.backup import Report
    from blockbak.model.quiesce import RestOptions


def summary(report: Report) -> str:
    """A sentence that a person can read aloud."""
    what = f"{report.volume}: {report.kind} {report.point}"
    of = f" of {render.size(report.device_bytes)}" if report.read_bytes < report.device_bytes else ""
    told = [f"{render.size(report.read_bytes)}{of} read"]
    if report.bad_bytes:
        told[0] += f" but for {render.size(report.bad_bytes)} that could not be"
    if report.hole_bytes and report.kind == "full":
        told.append(f"{render.size(report.hole_bytes)} left out as unused")
    if report.kind != "full":
        told.append(f"{render.size(report.changed_bytes)} changed")
    told += [f"{render.size(report.stored_bytes)} stored", f"consistency {report.consistency}"]
    return f"{what} made in {render.seconds(report.seconds)}: {', '.join(told)}."


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak -r /srv/backup backup /dev/sdb\n"
    "  blockbak -r /srv/backup backup --kind differential --name web /dev/sdb1\n"
    "  blockbak -r /srv/backup backup vg/root\n"
    "  blockbak -r /srv/backup backup --together --freeze-with postgresql vg/data vg/wal\n"
    "  blockbak -r /srv/backup backup --dry-run /var/lib/images/vm.img",
)
@click.argument("sources", nargs=-1, required=True, type=common.PATH, metavar="SOURCE...")
@click.option(
    "--kind",
    type=click.Choice(["auto", "full", "incremental", "differential"]),
    default="auto",
    show_default=True,
    help="auto: an incremental where a point can be its parent, else a full.",
)
@click.option(
    "--mode",
    type=click.Choice(["auto", "hot", "cold", "live"]),
    default="auto",
    show_default=True,
    help="hot: a logical volume, from a snapshot. cold: its users are brought to rest first, and everything is put "
    "back. live: as it is, consistency none. auto: hot for a logical volume in use, cold for what is not in use.",
)
@click.option("--name", callback=common.volume_name, metavar="VOLUME", help="The volume's name in the repository.")
@click.option(
    "--block-size",
    "block_bytes",
    callback=common.block_size,
    metavar="4K…1M",
    help="Unit of change detection [64K].",
)
@common.compress_option
@common.snapshot_options
@click.option("--together", is_flag=True, help="Snapshot all volumes at one instant; thick ones only.")
@click.option(
    "--together-deadline",
    type=click.FloatRange(min=1, max=60),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="After this the volumes go on, whatever happens, and no point is made.",
)
@click.option("--limit", callback=common.rate, metavar="SIZE", help="Read at most so many bytes a second.")
@click.option("--idle", is_flag=True, help="Read only when nobody else wants the disk, as far as its scheduler can.")
@common.reading_options
@click.option(
    "--holds-repository",
    is_flag=True,
    help="Take a volume hot although the repository lies on it: what is written there fills its snapshot.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
@common.rest_options
@common.repository_options
@click.pass_context
def command(
    context: click.Context, sources: tuple[str, ...], kind: str, mode: str, name: str | None,
    block_bytes: int | None, compress: str, snapshot_size: str | None, snapshot_limit: str | None,
    freeze_with: tuple[str, ...], freeze_deadline: float, together: bool, together_deadline: float, limit: int | None,
    idle: bool, retries: int, strict: bool, used_only: bool, holds_repository: bool, dry_run: bool, rest: RestOptions,
    repository: str | None, as_json: bool, wait: float,
) -> None:  # fmt: skip
    """Make a restore point of each SOURCE: a disk, partition, logical volume or image file.

    All sources are tried; the exit status is that of the first error.
    """
    from dataclasses import replace

    from blockbak.flow.backup import backup_all
    from blockbak.flow.hot import HotOptions
    from blockbak.flow.source import Request
    from blockbak.host.system import read_idly

    if name is not None and len(sources) > 1:
        raise click.UsageError("--name names one volume, so it takes one SOURCE.")
    if mode != "cold" and rest.given:
        raise click.UsageError(f"{rest.given[0]} belongs to --mode cold.")
    if together and mode in ("cold", "live"):
        raise click.UsageError(f"--together takes snapshots; --mode {mode} takes none.")
    opened = common.open_repository(repository)
    told = _Told(as_json, dry_run)
    resting = rest if mode == "cold" else None
    requests = [
        Request(
            source, kind, mode, name, block_bytes, compress, limit, holds_repository, resting,
            retries=retries, strict=strict, used_only=used_only,
        )
        for source in sources
    ]  # fmt: skip
    hot = HotOptions(
        size=snapshot_size, limit=snapshot_limit, freeze_with=freeze_with, freeze_seconds=freeze_deadline,
        together=together, together_seconds=together_deadline,
    )  # fmt: skip
    if idle:
        read_idly()
    with common.world(wait) as world:
        if not dry_run:
            for sentence in itertools.chain(*nextboot.finish(opened, world)):
                render.say(sentence)
        voice = told.voice if world.voice is not None else None
        speaking = replace(world, say=told.say, voice=voice)
        backup_all(opened, requests, speaking, told, hot=hot, dry_run=dry_run)
    context.exit(told.end())


class _Told:
    """What is told of each source as soon as it is done, and of all of them at the end."""

    def __init__(self, as_json: bool, dry_run: bool) -> None:
        self._as_json, self._dry_run = as_json, dry_run
        self._reports: list[Report] = []
        self._errors: list[BlockbakError] = []
        self._said: set[str] = set()

    def say(self, sentence: str) -> None:
        self.voice(sentence, {})

    def voice(self, sentence: str, facts: Mapping[str, str]) -> None:
        self._said.add(sentence)
        render.say_about(sentence, facts)

    def __call__(self, result: Report | BlockbakError) -> None:
        if isinstance(result, BlockbakError):
            self._errors.append(result)
            render.failure(result, as_json=False)
            return
        self._reports.append(result)
        for note in result.notes:
            if (result.attention or self._dry_run) and note not in self._said:
                render.say(note)
        if result.bad_bytes:
            named = f"'blockbak show {result.volume}@{result.point}' names what could not be read"
            render.say(f"{named}; --mapfile puts it in ddrescue's form.")
        if not self._as_json:
            render.line(would(result) if self._dry_run else summary(result))

    def end(self) -> int:
        """The exit status, once the document is printed."""
        from dataclasses import asdict

        if self._as_json:
            document: dict[str, object] = {
                "points": [asdict(report) for report in self._reports],
                "errors": [error.as_dict() for error in self._errors],
            }
            if self._errors:
                document["error"] = self._errors[0].as_dict()
            render.document(document)
        if self._errors:
            return self._errors[0].exit_code
        return ATTENTION if any(report.attention for report in self._reports) else 0


def would(report: Report) -> str:
    """What a dry run tells of a source."""
    parent = f" on {report.parent}" if report.parent else ""
    article = "an" if report.kind[0] == "i" else "a"
    return (
        f"{report.volume}: would make {article} {report.kind}{parent} of {report.source}, "
        f"{render.size(report.device_bytes)} to read, mode {report.mode}."
    )
