"""The ``blockbak`` command: finds the verb, runs it, turns what happened into an exit status."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import NoReturn

# numpy's own threads would idle beside ours and still cost time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click

from blockbak import __version__
from blockbak.cli import common, render
from blockbak.errors import BlockbakError, Interrupted, OutputFailed

VERBS = {
    "devices": "What can be backed up, and what uses it.",
    "init": "Make a repository.",
    "backup": "Make a restore point of each source.",
    "cold": "Make a raw image of a device, or image the root disk at the next boot.",
    "adopt": "Make a raw image a restore point.",
    "list": "The restore points of a repository.",
    "show": "One restore point, with its extents and partitions.",
    "restore": "Bring a point back onto a device or into a file.",
    "verify": "Check that stored bytes are what they were.",
    "synthesize": "Compose a full from existing images, without the source.",
    "delete": "Remove points that nothing needs.",
    "mirror": "Bring a copy of a device in step with it, here or on another host.",
    "pin": "Say that a point stays.",
    "unpin": "Take pins back.",
    "prune": "Keep what a policy says; merge and remove the rest.",
    "export": "Write a point as a raw or qcow2 file.",
    "run": "Run the jobs of the configuration that are due.",
    "config": "Check or show the configuration of jobs.",
    "timers": "Have systemd or cron run the jobs.",
    "history": "What was done with a repository, by whom, with which result.",
    "drill": "Restore a point to scratch, check it, and time it.",
    "status": "Whether every volume can be relied on; why not.",
    "recover": "Finish or undo what a crash left behind.",
    "plan": "What a policy will cost, before it is used.",
    "demo": "The whole story on a loop device, in a minute.",
}
"""Each verb lives in a module of its name and is imported when used."""

MODULES = {"list": "list_"}
"""Where the module's name is another: it would hide a built-in's."""


class Verbs(click.Group):
    """Loads a verb's module only when that verb is asked for: ``--help`` stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs in the order of ``VERBS``, not of the alphabet."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, its module imported; None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"blockbak.cli.{MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs from ``VERBS`` alone: nothing is imported for it."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 failed, 2 wrong command line, 3 done with something to look at, "
    "4 damage found, 5 refused for safety, 130 interrupted.",
)
@click.version_option(__version__, prog_name="blockbak")
@common.repository_option
@click.option(
    "--log",
    "log_form",
    type=click.Choice(["human", "json", "journal"]),
    envvar="BLOCKBAK_LOG",
    help="Messages as lines of a log that say which run, volume and point they are about (or BLOCKBAK_LOG). "
    "'run' logs in any case: for people on a terminal, else to the journal or as JSON.",
)
@click.pass_context
def cli(context: click.Context, repository: str | None, log_form: str | None) -> None:
    """Images of disks, partitions and logical volumes: full, incremental, restorable to the byte.

    \b
    Examples:
      blockbak init /srv/backup
      blockbak -r /srv/backup backup /dev/sdb
      blockbak -r /srv/backup list
      blockbak -r /srv/backup restore latest /dev/sdc
    """
    context.obj = repository
    if log_form is not None:
        from blockbak.cli import log

        log.begin(log_form)


def _stand_in() -> None:
    """Put /dev/null where standard input, output or error is closed: else the next file that is opened, an
    image or a target, would take its number and what is printed would go there.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 - until the end


def main() -> NoReturn:
    """Run the command line of this process. Never shows a traceback: an unknown error is a sentence too,
    and BLOCKBAK_DEBUG=1 lets it through for those who look for its cause.
    """
    _stand_in()
    as_json = "--json" in sys.argv
    try:
        common.end_at_once()
        code = _run(as_json=as_json)
        if error := render.lost():
            code = code or 1
            # Whoever read a pipe has enough of it, and knows.
            if not isinstance(error, BrokenPipeError):
                render.failure(OutputFailed(reason=error.strerror), as_json=False)
    except KeyboardInterrupt:
        code = Interrupted.exit_code  # once more, while the answer was given
    # It is over: a signal that comes while Python clears up would else be told in place of what came of it.
    common.deaf()
    sys.exit(code)


def _is_clicks(error: OSError) -> bool:
    """Whether it comes from click's own printing, of --help or --version: only standard output fails there."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("click.")


def _run(*, as_json: bool) -> int:
    """The exit status of what the command line asks for, once it is done and said."""
    try:
        # In this mode click hands the status of ctx.exit() back instead of ending the process.
        code = cli(standalone_mode=False)
    except BlockbakError as error:
        render.failure(error, as_json=as_json)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        render.wrong_usage(error, as_json=as_json)
        return 2
    except click.ClickException as error:
        render.wrong_usage(error, as_json=as_json)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        interrupted = Interrupted(state="what was under way may be unfinished")
        for note in getattr(error, "__notes__", ()):
            interrupted.add_note(note)
        render.failure(interrupted, as_json=as_json)
        return interrupted.exit_code
    except Exception as error:
        if isinstance(error, OSError) and _is_clicks(error):
            render.lose(error)
            return 1
        if os.environ.get("BLOCKBAK_DEBUG"):
            raise
        render.unknown(error, as_json=as_json)
        return 1
    return code if isinstance(code, int) else 0
