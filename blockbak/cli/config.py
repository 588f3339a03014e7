"""``blockbak config``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from blockbak.cli import common, render
from blockbak.errors import BadConfig

if TYPE_CHECKING:
    from blockbak.model.config import Config


@click.command(
    epilog="\b\nExamples:\n"
    "  blockbak config check\n"
    "  blockbak config show\n"
    "  blockbak config check --config ./blockbak.toml"
)
@click.argument("action", type=click.Choice(["check", "show"]), metavar="check|show")
@common.config_option
@common.json_option
@click.pass_context
def command(context: click.Context, action: str, config_file: str | None, as_json: bool) -> None:
    """Check the configuration as a whole, or show it with all that it leaves out filled in.

    check: everything that is wrong, with the lines where it stands, exit status 1; and what would go wrong on this
    machine now, which is no error. show: every key, its value, and where that comes from: the line of the file, or the
    default. Secrets of addresses are not shown. blockbak.toml(5) tells of all keys.
    """
    from blockbak.flow.jobs import load

    path = common.config_path(config_file)
    try:
        config = load(path)
    except BadConfig as error:
        if not as_json or action == "show":
            raise
        render.document({"ok": False, "file": path, "warnings": [], "error": error.as_dict()})
        render.failure(error, as_json=False)
        context.exit(error.exit_code)
    if action == "show":
        _show(config, path, as_json=as_json)
    else:
        _checked(config, path, as_json=as_json)


def _checked(config: Config, path: str, *, as_json: bool) -> None:
    from blockbak.flow.jobs import doubts

    found = doubts(config, path)
    if as_json:
        render.document({"ok": True, "file": path, "warnings": found})
    for sentence in found:
        render.say(sentence)
    if not as_json:
        places = "1 repository" if len(config.repositories) == 1 else f"{len(config.repositories)} repositories"
        render.line(f"{path} can be used: {render.count(len(config.jobs), 'job')}, {places}.")


def _show(config: Config, path: str, *, as_json: bool) -> None:
    if as_json:
        settings = [
            {"key": one.key, "value": one.value, "from": "default" if one.line is None else "file", "line": one.line}
            for one in config.settings
        ]
        render.document({"file": path, "settings": settings})
        return
    rows = [(one.key, one.value, "default" if one.line is None else f"line {one.line}") for one in config.settings]
    render.table(("key", "value", "from"), rows)
