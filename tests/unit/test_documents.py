"""The documents say what the code does."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from blockbak import errors
from blockbak.cli.main import VERBS, cli

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "STYLE.md")]
DOCUMENTS += [*sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]


def command(verb: str) -> click.Command:
    found = cli.get_command(click.Context(cli), verb)
    assert found is not None
    return found


def shown_commands() -> list[str]:
    """Every blockbak command line in an indented block of a document or in a verb's examples."""
    found = []
    for document in DOCUMENTS:
        lines = document.read_text().splitlines()
        found += [line.strip() for line in lines if re.match(r" {4,}blockbak ", line)]
    for verb in VERBS:
        found += re.findall(r"blockbak .*", command(verb).epilog or "")
    return found


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_line_shown_can_be_parsed(line: str) -> None:
    words = shlex.split(line.replace("…", "").partition(" | ")[0], comments=True)[1:]
    if words[:1] == ["-r"]:
        words = words[2:]
    verb = command(words[0])
    verb.make_context(words[0], words[1:], resilient_parsing=False)


def test_every_verb_has_an_example_and_a_page() -> None:
    for verb in VERBS:
        assert "blockbak" in (command(verb).epilog or ""), verb
        assert (ROOT / "docs" / "man" / f"blockbak-{verb}.8").exists()


def test_manual_pages_are_those_the_command_line_gives() -> None:
    spec = importlib.util.spec_from_file_location("man", ROOT / "scripts" / "man.py")
    man = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(man)
    for name, text in man.pages().items():
        assert (ROOT / "docs" / "man" / name).read_text() == text, f"{name}: run scripts/man.py"


def test_architecture_names_every_module() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "blockbak").glob("*/*.py"):
        if path.stem == "__init__" or path.parent.name == "cli":
            continue
        assert f"`{path.stem}`" in text or f"`{path.name}`" in text, f"{path.parent.name}/{path.name} is nowhere"


def test_architecture_is_one_screen() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 60


def avoided_words() -> list[str]:
    rows = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    words = []
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 3 and cells[2] and cells[2] not in ("not", "---"):
            words += [word.split("(")[0].strip() for word in cells[2].split(",")]
    return [word for word in words if word and " " not in word and word != "snapshot"]


def messages() -> list[str]:
    found = []
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.BlockbakError):
            found += [kind.message, kind.advice]
    for verb in VERBS:
        one = command(verb)
        found += [one.help or "", *(str(getattr(option, "help", "")) for option in one.params)]
    return found


def test_messages_use_the_words_of_the_glossary() -> None:
    words = avoided_words()
    assert {"chunk", "archive", "forget"} <= set(words)
    pattern = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)
    for message in messages():
        assert not pattern.search(message), message


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_readme_opens_with_the_two_commands() -> None:
    head = (ROOT / "README.md").read_text().split("##")[0]
    assert "sudo scripts/demo" in head
    assert "sudo scripts/test" in head
    for script in ("demo", "test", "setup", "bench"):
        assert (ROOT / "scripts" / script).exists(), script
