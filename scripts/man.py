"""Writes the manual pages from the command line itself, docs/man/blockbak*.8, and from the table of the
configuration's keys, docs/man/blockbak.toml.5.

``scripts/man.py`` writes them; ``scripts/man.py --check`` says which are not what they would be.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from blockbak import __version__, errors
from blockbak.cli.main import VERBS, cli
from blockbak.model import config, schedule

PAGES = Path(__file__).parent.parent / "docs" / "man"
FILES = [
    ("REPO/VOLUME/POINT.KIND.zst", "An image. A full is a plain zstd stream of the whole volume."),
    ("REPO/VOLUME/POINT.KIND.json", "Its manifest: the commit record, readable by people and by jq."),
    ("REPO/history.jsonl", "What was done with the repository, a line each; see blockbak-history(8)."),
    ("FILE.json", "Beside a raw image FILE: its sidecar, which tells whether it is whole."),
    ("FILE.mapfile", "Beside a raw image, or a restored file: what could not be read or restored, for ddrescue."),
    ("REPO/RESTORE.txt, REPO/rescue.py", "How to restore without blockbak, and the script that does."),
    ("/etc/blockbak/blockbak.toml", "The configuration of jobs, see blockbak.toml(5)."),
    (
        "/var/lib/blockbak",
        "The state directory, for other users the XDG one: how the last run of each job went, and what is at rest.",
    ),
]
ENVIRONMENT = [
    ("BLOCKBAK_REPO", "The repository, where -r names none; else it is the only one of the configuration."),
    ("BLOCKBAK_CONFIG", "The configuration, where --config names none."),
    ("BLOCKBAK_LOG", "The form of messages, where --log names none."),
    ("BLOCKBAK_STATE_DIR", "The state directory, where it shall be another."),
    ("BLOCKBAK_DEBUG", "Set to 1, lets an error nobody foresaw show where it happened."),
]


def escaped(text: str) -> str:
    """``text`` as roff takes it literally."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in text.splitlines())


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a help text; one that begins with a backspace mark keeps its lines."""
    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith("\b"):
            yield ".nf"
            yield escaped(part.removeprefix("\b").strip("\n"))
            yield ".fi"
        else:
            yield ".PP"
            yield escaped(" ".join(part.split()))


def options(command: click.Command) -> Iterator[str]:
    """Each option with what it takes, its help and its default."""
    context = click.Context(command)
    # click adds the option for help itself, and names it as the context in which it was first asked for.
    records = [one.get_help_record(context) for one in command.params if isinstance(one, click.Option)]
    for record in (*records, ("-h, --help", "Show this message and exit.")):
        if record is not None:
            yield f".TP\n.B {escaped(record[0])}\n{escaped(record[1])}"


def head(name: str, about: str, section: int = 8) -> Iterator[str]:
    """Title and name."""
    title = name.upper().replace("-", "\\-")
    kind = "System administration" if section == 8 else "File formats"
    yield f'.TH {title} {section} "" "blockbak {__version__}" "{kind}"'
    yield f".SH NAME\n{escaped(name)} \\- {escaped(about[0].lower() + about[1:].rstrip('.'))}"


def codes() -> Iterator[str]:
    """The exit statuses, and the error classes that carry each: taken from the classes."""
    said = {0: "Done.", 2: "Wrong command line.", 3: "Done, with something a person must look at."}
    lead = {1: "Failed", 4: "Damage found in a repository", 5: "Refused for safety", 130: "Interrupted"}
    for code in sorted({*said, *lead}):
        text = said.get(code) or f"{lead[code]}: {', '.join(names(code))}."
        yield f".TP\n.B {code}\n{escaped(text)}"


def names(code: int) -> list[str]:
    """The error classes of an exit status that have a message of their own."""
    return sorted(
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type)
        and issubclass(kind, errors.BlockbakError)
        and kind.exit_code == code
        and "message" in vars(kind)
        and kind is not errors.BlockbakError
    )


def pairs(title: str, rows: list[tuple[str, str]]) -> Iterator[str]:
    """A section of words and what they mean."""
    yield f".SH {title}"
    for word, meaning in rows:
        yield f".TP\n.B {escaped(word)}\n{escaped(meaning)}"


def epilogue(command: click.Command) -> Iterator[str]:
    """The examples of a verb."""
    if command.epilog:
        text = inspect.cleandoc(command.epilog.replace("\b\n", ""))
        lines = [line.strip() for line in text.removeprefix("Examples:").removeprefix("Example:").splitlines()]
        yield ".SH EXAMPLES\n.nf"
        yield escaped("\n".join(line for line in lines if line))
        yield ".fi"


def main_page() -> str:
    """blockbak(8)."""
    parts = [
        *head("blockbak", "Images of disks, partitions and logical volumes"),
        ".SH SYNOPSIS\n.B blockbak\n[\\-r REPO] VERB \\&...",
        ".SH DESCRIPTION",
        *paragraphs(cli.help or ""),
        ".SH OPTIONS",
        *options(cli),
        *pairs("VERBS", [(f"blockbak-{verb}(8)", about) for verb, about in VERBS.items()]),
        ".SH EXIT STATUS",
        *codes(),
        *pairs("ENVIRONMENT", ENVIRONMENT),
        *pairs("FILES", FILES),
        ".SH SEE ALSO\n" + escaped(", ".join(f"blockbak-{verb}(8)" for verb in VERBS) + ", blockbak.toml(5), zstd(1)"),
    ]
    return "\n".join(parts) + "\n"


def verb_page(verb: str) -> str:
    """The page of one verb."""
    command = cli.get_command(click.Context(cli), verb)
    if command is None:
        raise KeyError(verb)
    pieces = " ".join(command.collect_usage_pieces(click.Context(command)))
    parts = [
        *head(f"blockbak-{verb}", VERBS[verb]),
        f".SH SYNOPSIS\n.B blockbak {escaped(verb)}\n{escaped(pieces)}",
        ".SH DESCRIPTION",
        *paragraphs(command.help or ""),
        ".SH OPTIONS",
        *options(command),
        *epilogue(command),
        ".SH EXIT STATUS\n.PP\nAs in\n.BR blockbak (8).",
        ".SH SEE ALSO\n.BR blockbak (8)",
    ]
    return "\n".join(parts) + "\n"


CALENDARS = f"""When something comes again: {schedule.FORMS}. Times of day are those of the time zone. Without a time a
day begins at 00:00, a week on Monday, and the rest on the first. A month that is too short for its day has its last day
instead. A time that summer time leaves out comes an hour later."""
FORMS = [
    ("CALENDAR", " ".join(CALENDARS.split())),
    ("DURATION", "90s, 15min (or 15m), 36h, 2d, 6w, or 1y, which is 365 days."),
    ("SIZE", "64K, 50M, 20G or 1T, in powers of 1024; a bare number is bytes."),
    ("SHARE", "5%."),
    ("LIST", 'Texts in brackets: ["vg/home", "vg/db"].'),
    ("PATTERN", "A regular expression of Python."),
]
EXAMPLE = """
[repositories.main]
path = "/srv/backup"

[jobs.web]
sources = ["vg/home", { lvm_tag = "backup" }]
schedule = "daily at 02:30"
full = "monthly"
differential = "weekly on sun"
freeze_with = ["postgresql"]
deadline = "6h"
rpo = "36h"
verify = "weekly"

[jobs.web.retention]
keep_daily = 14
keep_weekly = 8
keep_monthly = 12

[jobs.web.drill]
schedule = "monthly"
check = ["/usr/local/sbin/check-web"]

[notify]
command = ["/usr/local/sbin/tell-admin"]
urls = ["mailto://user:password@example.org"]
"""


def config_page() -> str:
    """blockbak.toml(5), from the table of keys."""
    parts = [
        *head("blockbak.toml", "The configuration of blockbak's jobs", 5),
        ".SH SYNOPSIS\n.I /etc/blockbak/blockbak.toml",
        ".SH DESCRIPTION",
        *paragraphs(
            """What blockbak images by itself, when, into which repository; what of it is kept; how it is checked; and
            who is told. 'blockbak run' does what is due, 'blockbak timers install' sees to it that it is run.

            The file is TOML. It is checked as a whole, with the line of everything that is wrong, before anything is
            done: see 'blockbak config check'. A key that is not told of here is an error. 'blockbak config show' fills
            in what is left out. Another file is named with --config, or in BLOCKBAK_CONFIG."""
        ),
    ]
    for section, about in config.SECTIONS.items():
        name = ".".join("NAME" if part == "*" else part for part in section)
        parts += [f".SH {escaped(f'[{name}]' if name else 'TOP')}", f".PP\n{escaped(about)}"]
        for key in config.KEYS:
            if key.section == section:
                default = f" Default: {key.default}." if key.default else " It must be there."
                parts.append(
                    f'.TP\n.BR {escaped(key.name)} " = " \\fI{escaped(key.takes)}\\fR\n{escaped(key.about + default)}'
                )
    parts += [
        *pairs("VALUES", FORMS),
        ".SH WHAT PEOPLE ARE TOLD",
        *paragraphs(
            """The command finds BLOCKBAK_EVENT (failure, recovery or missed-rpo), BLOCKBAK_MESSAGE, BLOCKBAK_JOB,
            BLOCKBAK_RUN, BLOCKBAK_HOST, BLOCKBAK_TIME, BLOCKBAK_EXIT, BLOCKBAK_ERROR, BLOCKBAK_SECONDS,
            BLOCKBAK_VOLUMES, BLOCKBAK_POINTS and BLOCKBAK_REPOSITORY in its environment, and the same and more on
            standard input, as one JSON document with a subject. It may run for a minute. Whatever becomes of it, the
            run ends as it would have ended."""
        ),
        ".SH EXAMPLES\n.nf",
        escaped(EXAMPLE.strip()),
        ".fi",
        ".SH SEE ALSO\n"
        + escaped("blockbak(8), blockbak-config(8), blockbak-run(8), blockbak-timers(8), systemd.timer(5)"),
    ]
    return "\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """File name and text of each page."""
    verbs = {f"blockbak-{verb}.8": verb_page(verb) for verb in VERBS}
    return {"blockbak.8": main_page(), "blockbak.toml.5": config_page()} | verbs


def main() -> int:
    """Write the pages, or compare them."""
    wrong = []
    for name, text in pages().items():
        path = PAGES / name
        if "--check" in sys.argv:
            if not path.exists() or path.read_text() != text:
                wrong.append(name)
        else:
            path.write_text(text)
    for name in wrong:
        print(f"docs/man/{name} is not what the command line says; run scripts/man.py")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
