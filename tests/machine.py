"""Jobs of the configuration on a machine whose clock the test turns."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from blockbak.flow import run as runs
from blockbak.flow.jobs import chosen, load, past
from blockbak.flow.run import Options
from blockbak.host import jobstate
from tests.doubles import context, new_repository
from tests.patterns import stamp

SECTORS = 2000
BEGIN = datetime(2026, 5, 1, 2, 17, tzinfo=UTC)


class Machine:
    """A machine with a source, a repository and a configuration, whose clock the test turns."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.source = place / "web.img"
        self.source.write_bytes(stamp(0, SECTORS, 1, 7))
        self.repository = new_repository(place / "repo")
        self.now = BEGIN
        self.said: list[str] = []
        self.told: list[tuple[str, object]] = []
        base = context(place / "state", say=self.said.append)
        self.context = replace(base, now=lambda: self.now, run="ab" * 16)
        self.file = place / "blockbak.toml"

    def configure(self, job: str, more: str = "", sources: str | None = None) -> None:
        named = sources or f'"{self.source}"'
        self.file.write_text(
            f'timezone = "UTC"\n[repositories.main]\npath = "{self.repository.path}"\n'
            f"[jobs.web]\nsources = [{named}]\n{job}\n{more}\n"
        )

    def run(self, *names: str, **options: object) -> list[runs.JobReport]:
        config = load(str(self.file))
        return runs.run_jobs(
            config, chosen(config, names), Options(**options), self.context,
            lambda report, step: self.told.append((report.job, step)), pick=lambda: 0.0,
        )  # fmt: skip

    def once(self, **options: object) -> runs.JobReport:
        (report,) = self.run("web", **options)
        return report

    def write(self, number: int) -> None:
        with self.source.open("r+b") as file:
            file.seek(number * 37 % SECTORS * 512)
            file.write(stamp(number * 37 % SECTORS, 1, number + 2, 7))

    def state(self) -> jobstate.State:
        return jobstate.load(str(self.place / "state"), "web")

    def kinds(self) -> list[str]:
        (volume,) = self.repository.volumes()
        return [made.kind for made in past(volume.catalog())]
