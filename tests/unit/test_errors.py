"""Every error: a sentence, its fields, an exit code, advice; and every place that raises one gives its fields."""

from __future__ import annotations

import ast
import json
import string
from pathlib import Path

import pytest

import blockbak
from blockbak import errors

PACKAGE = Path(blockbak.__file__).parent


def tree(top):
    return [top, *(found for child in top.__subclasses__() for found in tree(child))]


CLASSES = {one.__name__: one for one in tree(errors.BlockbakError)}
# These group others and say nothing of their own.
GROUPS = {
    "RestError",
    "MirrorError",
    "JobError",
    "BlockbakError",
    "Failed",
    "SourceError",
    "RepositoryError",
    "SnapshotError",
    "Damage",
    "Refused",
}


def fields_of(one):
    """The fields that sentence and advice ask for."""
    formatter = string.Formatter()
    return {name for text in (one.message, one.advice) for _, name, _, _ in formatter.parse(text) if name is not None}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - GROUPS))
def test_an_error_is_a_sentence_with_its_fields(name):
    one = CLASSES[name]
    given = {field: f"<{field}> with {{braces}}" for field in fields_of(one)}
    error = one(**given)
    assert error.fields == given
    for value in given.values():
        assert value in str(error) + error.hint
    assert str(error) == one.message.format(**given)
    assert error.hint == one.advice.format(**given)
    assert str(error)[0].isupper() or str(error)[0] == "<"
    # A sentence ends as one, unless another program's own words end it.
    assert one.message.endswith((".", "{stderr}"))
    assert not one.advice or one.advice[-1] not in " ,;"
    assert "message" in vars(one), "the sentence is inherited"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_error_as_json(name):
    one = CLASSES[name]
    given = dict.fromkeys(fields_of(one), 5) | {"reason": OSError("why"), "path": "/a", "flag": None}
    document = json.loads(json.dumps(one(**given).as_dict()))
    assert document["name"] == name
    assert document["exit"] == one.exit_code
    assert document["message"] == one.message.format(**given)
    assert document["fields"]["reason"] == "why"
    assert document["fields"]["flag"] is None


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_exit_codes_follow_the_tree(name):
    one = CLASSES[name]
    expected = {errors.Damage: 4, errors.Refused: 5, errors.Interrupted: 130}
    assert one.exit_code == next((code for top, code in expected.items() if issubclass(one, top)), 1)
    assert one.exit_code not in (errors.DONE, errors.USAGE, errors.ATTENTION)


def raised():
    """Every place in the package that makes an error: file, line, class, the fields it gives."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "rescue.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in CLASSES:
                yield path.relative_to(PACKAGE), node.lineno, called, node


def test_whoever_raises_an_error_gives_its_fields():
    wrong = []
    for path, line, name, node in raised():
        given = {keyword.arg for keyword in node.keywords}
        if node.args or (None not in given and not fields_of(CLASSES[name]) <= given):
            wrong.append(f"{path}:{line}: {name} lacks {sorted(fields_of(CLASSES[name]) - given)}")
    assert not wrong


def test_every_error_is_raised_somewhere():
    # `raise X` without a call makes one too, and some are chosen before they are made.
    named = {
        node.id if isinstance(node, ast.Name) else node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name | ast.Attribute)
    }
    assert CLASSES.keys() - GROUPS - named == set()
