"""Where fault tests put their repositories."""

import os
import tempfile
from pathlib import Path

import pytest

MEMORY = "/dev/shm"


@pytest.fixture(scope="module")
def memory_for_module(tmp_path_factory):
    """A directory in memory, where there is such a place: thousands of small runs need no disk to be right."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(prefix="blockbak-fault-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def memory(memory_for_module):
    """One for the test alone."""
    with tempfile.TemporaryDirectory(dir=memory_for_module) as folder:
        yield Path(folder)
