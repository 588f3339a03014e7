"""A configuration for the program, in a directory of the test's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cli.program import Running, document, ok, run
from tests.patterns import stamp

SECTORS = 2000


@dataclass
class Place:
    """A repository ``main``, a source, a configuration with one job ``web``, and a state directory."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.repository, self.source = self.path / "repo", self.path / "web.img"
        self.file, self.state = self.path / "blockbak.toml", self.path / "state"
        self.env = {"BLOCKBAK_CONFIG": str(self.file), "BLOCKBAK_STATE_DIR": str(self.state)}
        self.source.write_bytes(stamp(0, SECTORS, 1, 7))
        ok("init", self.repository)
        self.configure()

    def configure(self, job: str = 'schedule = "daily"', more: str = "", source: Path | None = None) -> None:
        self.file.write_text(
            f'[repositories.main]\npath = "{self.repository}"\n'
            f'[jobs.web]\nsources = ["{source or self.source}"]\n{job}\n{more}\n'
        )

    def run(self, *words: str, **options: Any) -> Any:
        return run(*words, env=self.env, **options)

    def ok(self, *words: str, **options: Any) -> Any:
        return ok(*words, env=self.env, **options)

    def document(self, *words: str, **options: Any) -> Any:
        return document(*words, env=self.env, **options)

    def running(self, *words: str, **options: Any) -> Running:
        return Running(*words, env=self.env, **options)
