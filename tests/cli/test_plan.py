"""``plan`` as a person runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cli.program import document, fails, ok, run
from tests.cli.stock import Stock


def test_a_source_without_a_configuration(stock: Stock, tmp_path: Path) -> None:
    found = document("plan", "--source", stock.source, "--keep-daily", "7", "--change", "2%")
    (plan,) = found["plans"]
    assert (plan["basis"], plan["change"], plan["job"]) == ("sample", "told", "")
    assert plan["device_bytes"] == stock.source.stat().st_size
    assert 0 < plan["full_bytes"]["low"] <= plan["full_bytes"]["likely"] <= plan["full_bytes"]["high"]
    assert [one["days"] for one in plan["growth"]] == [30, 365]
    text = ok("plan", "--source", stock.source, "--keep-daily", "7").text
    assert "by a sample" in text
    assert "in 365 days" in text


def test_a_job_of_the_configuration(stock: Stock, tmp_path: Path) -> None:
    config = tmp_path / "blockbak.toml"
    config.write_text(
        f'[repositories.main]\npath = "{stock.path}"\n'
        f'[jobs.web]\nsources = ["{stock.source}", "/no/such/source"]\n[jobs.web.retention]\nkeep_daily = 7\n'
    )
    ended = run("plan", "web", "--config", config, "--json")
    assert ended.status == 1, str(ended)
    (plan,) = ended.document["plans"]
    assert (plan["job"], plan["volume"]) == ("web", "web")
    assert plan["free_bytes"] > 0
    assert [error["name"] for error in ended.document["errors"]] == ["NoSuchSource"]
    fails(1, "NoSuchJob", "plan", "other", "--config", config)
    fails(1, "NoConfig", "plan", "web", "--config", tmp_path / "none")


def test_the_repository_of_the_command_line_goes_before_that_of_the_job(stock: Stock, tmp_path: Path) -> None:
    config = tmp_path / "blockbak.toml"
    config.write_text(
        f'[repositories.main]\npath = "{tmp_path}/none"\n'
        f'[jobs.web]\nsources = ["{stock.source}"]\n[jobs.web.retention]\nkeep_daily = 7\n'
    )
    (plan,) = document("-r", stock.path, "plan", "web", "--config", config)["plans"]
    assert plan["free_bytes"] > 0
    ended = ok("plan", "web", "--config", config)
    assert "What there is already is not known" in ended.said


def test_too_little_room_is_something_to_look_at(stock: Stock, tmpfs: Callable[..., Path]) -> None:
    repository = tmpfs(1 << 20) / "repo"
    ok("init", repository)
    assert run("-r", repository, "plan", "--source", stock.source, "--keep-daily", "7").status == 3
