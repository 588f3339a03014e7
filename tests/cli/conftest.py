"""Repositories that the program itself made, for tests that look at them or change a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cli.program import document, forked, ok
from tests.cli.stock import SECTORS, SEED, Stock, copied, overwrite
from tests.patterns import stamp


@pytest.fixture(scope="session", autouse=True)
def _forked(temporary_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with forked(tmp_path_factory.mktemp("forks")):
        yield


@pytest.fixture(scope="session")
def stock(temporary_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """To be looked at only; who changes something takes ``repo``."""
    folder = tmp_path_factory.mktemp("stock")
    path, source, other = folder / "repo", folder / "web.img", folder / "db.img"
    source.write_bytes(stamp(0, SECTORS, 1, SEED))
    other.write_bytes(stamp(0, 600, 1, SEED + 1))
    ok("init", path)
    held: dict[str, bytes] = {}

    def point(image: Path, volume: str, kind: str) -> str:
        made = document("-r", path, "backup", image, "--name", volume, "--kind", kind)["points"][0]["point"]
        held[made] = image.read_bytes()
        return made

    web = [point(source, "web", "full")]
    overwrite(source, 300, 40, 2)
    web.append(point(source, "web", "incremental"))
    overwrite(source, SECTORS - 9, 9, 3)
    web.append(point(source, "web", "differential"))
    ok("-r", path, "synthesize", "web")
    ok("cold", source, source.with_name("web.raw"))
    return Stock(path, source, tuple(web), point(other, "db", "full"), held)


@pytest.fixture
def repo(stock: Stock, tmp_path: Path) -> Stock:
    """A copy of ``stock`` that the test may change; its source is shared, and only to be read."""
    return copied(stock, tmp_path)


@pytest.fixture(scope="session")
def slow(temporary_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of 6 MiB that no level of compression shrinks: at a high one, its backup takes a second."""
    path = tmp_path_factory.mktemp("slow") / "slow.img"
    path.write_bytes(stamp(0, 3 << 12, 1, SEED))
    return path


@pytest.fixture(scope="session")
def large(temporary_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """A volume `large` that takes a while to read, write and check: 128 MiB that do not shrink."""
    folder = tmp_path_factory.mktemp("large")
    path, source = folder / "repo", folder / "large.img"
    part = bytearray(stamp(0, 1 << 14, 1, SEED))
    with source.open("xb") as file:
        for number in range(16):
            part[:8] = number.to_bytes(8, "little")
            file.write(part)
    ok("init", path)
    made = document("-r", path, "backup", source, "--name", "large")["points"][0]["point"]
    yield Stock(path, source, (made,), "", {})
    shutil.rmtree(folder)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach; pytest's own are the user's alone."""
    with TemporaryDirectory(dir="/var/tmp", prefix="blockbak-tests-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
