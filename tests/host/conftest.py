"""The program, with a repository of the test's own."""

from __future__ import annotations

import pytest

from tests.doubles import new_repository
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
        new_repository(repository)
        return Program(forks, repository, directory / "state")

    return make


@pytest.fixture
def program(program_at, tmp_path):
    """``program("list")`` runs the command line on a repository that is there and empty."""
    return program_at(tmp_path)
