"""The program, with a repository of the test's own."""

from __future__ import annotations

import pytest

from blockbak.repository.local import Repository
from tests.host.stage import Program


@pytest.fixture
def program(tmp_path):
    """``program("list")`` runs the command line on a repository that is there and empty."""
    return make_program(tmp_path / "repository", tmp_path / "state")


@pytest.fixture
def program_at():
    """``program_at(directory)`` makes a repository in a new directory there, and runs on that."""
    return lambda directory: make_program(directory / "repository", directory / "state")


def make_program(repository, state):
    Repository.create(str(repository), repository_id="1f" * 16, created="2026-05-01T00:00:00.000Z")
    return Program(repository, state)
