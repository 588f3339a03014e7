"""The program, with a repository of the test's own."""

from __future__ import annotations

import pytest

from blockbak.repository.local import Repository
from tests.host.stage import Forks, Program


@pytest.fixture(scope="session")
def forks(temporary_files):
    folder = temporary_files / "forks"
    folder.mkdir()
    made = Forks(folder)
    yield made
    made.end()


@pytest.fixture
def program_at(forks):
    """``program_at(directory)`` makes a repository in a new directory there, and runs on that."""

    def make(directory):
        repository = directory / "repository"
        Repository.create(str(repository), repository_id="1f" * 16, created="2026-05-01T00:00:00.000Z")
        return Program(forks, repository, directory / "state")

    return make


@pytest.fixture
def program(program_at, tmp_path):
    """``program("list")`` runs the command line on a repository that is there and empty."""
    return program_at(tmp_path)
