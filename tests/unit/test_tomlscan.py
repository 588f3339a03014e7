"""Where each key of a TOML document stands, against documents as odd as TOML allows."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model.tomlscan import lines


def paths(value, path=()):
    """Every path of a parsed document: what the scanner must have found, no more and no less."""
    found = {path} if path else set()
    if isinstance(value, dict):
        for key, one in value.items():
            found |= paths(one, (*path, key))
    elif isinstance(value, list):
        for number, one in enumerate(value):
            found |= paths(one, (*path, number))
    return found


def agree(text: str) -> dict:
    found = lines(text)
    assert set(found) == paths(tomllib.loads(text)), text
    return found


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("a = 1\nb = 2", ("b",), 2),
        ("\r\n# a = 1\r\nb = 2\r\n", ("b",), 3),
        ("a = '''\nb = 1\n'''\nc = 2", ("c",), 4),
        ('a = """\n\\"""\nb = 1\n"""""\nc = 2', ("c",), 5),
        ('a = """ends in a backslash \\\\"""\nb = 2', ("b",), 2),
        ("a = '\\'\nb = '#'\nc = 3", ("c",), 3),
        ('a = "# [t]"  # [t]\n[t]\n', ("t",), 2),
        ("a = [ # ]\n  1,\n  [2,\n 3], ]\nb = 1", ("a", 1, 1), 4),
        ("a = [\n{ b = '}' },\n{ 'c d' = ']' }\n]\ne = 1", ("a", 1, "c d"), 3),
        ("a.b.c = 1\na.d = 2", ("a", "d"), 2),
        ("a.b.c = 1\na.d = 2", ("a", "b"), 1),
        ("a . 'b.c' . \"d\\u0065\" = 1", ("a", "b.c", "de"), 1),
        ("[ a . b ]\nc = 1", ("a", "b", "c"), 2),
        ("[[a]]\nb = 1\n[[a]]\nb = 2\n[a.c]\nd = 1", ("a", 1, "c", "d"), 6),
        ("[[a]]\n[[a.b]]\n[[a.b]]\nc = 1\n[[a]]\n[[a.b]]\nc = 2", ("a", 1, "b", 0, "c"), 7),
        ("[a.b]\nc = 1\n[a]\nd = 2", ("a",), 3),
        ("a = 1979-05-27 07:32:00Z # later\nb = 07:32:00", ("b",), 2),
        ("a = +1_000\nb = inf\nc = 0x1F", ("c",), 3),
        ("a = {}\nb = []\nc = ''\nd = \"\"\"\"\"\"\ne = ''''''\nf = 1", ("f",), 6),
        ("a = { b.c = 1, d = { e = [ 1, 2 ] } }", ("a", "d", "e", 1), 1),
        ("'' = 1\n\"\".a = 2", ("",), 1),
    ],
)
def test_a_key_stands_where_it_stands(text, path, line):
    if text.startswith("''"):
        text = text.splitlines()[0]
    assert agree(text)[path] == line


def test_an_empty_document_has_no_keys():
    for text in ("", "\n\n", "# only a comment", "   "):
        assert agree(text) == {}


names = st.text(st.characters(codec="utf-8", exclude_characters="\r\0", exclude_categories=["Cc", "Cs"]), max_size=6)
scalars = st.sampled_from(["1", "-2.5", "true", "1979-05-27T07:32:00", "''", "'#]}'", '"a\\"#\\\\"', "'''x\n# y = 1\n'''",
                           '"""a\n\\"""\n[b]\n"""', '""" "" """', "''' ''\n'''"])  # fmt: skip
blanks = st.sampled_from(["", " ", "\t ", "  "])
breaks = st.sampled_from(["\n", "\n\n", " # = [ { ' \"\n", "\r\n"])


def quoted(name: str, how: int) -> str:
    """A key in one of the ways in which it can be written."""
    if how == 0 and name and all(char.isascii() and (char.isalnum() or char in "_-") for char in name):
        return name
    if how == 1 and "'" not in name:
        return f"'{name}'"
    return '"' + "".join(f"\\U{ord(char):08x}" if char in '\\"' or how == 2 else char for char in name) + '"'


@st.composite
def values(draw, depth=2):
    kind = draw(st.sampled_from(["scalar", "scalar", "array", "inline"] if depth else ["scalar"]))
    if kind == "scalar":
        return draw(scalars)
    if kind == "array":
        parts = [draw(values(depth=depth - 1)) for _ in range(draw(st.integers(0, 3)))]
        text = "["
        for part in parts:
            text += draw(breaks | blanks) + part + draw(breaks | blanks) + ","
        return text + draw(breaks | blanks) + "]"
    inner = draw(st.lists(names, unique=True, max_size=3))
    pairs = [f"{quoted(name, draw(st.integers(0, 2)))} = {draw(values(depth=depth - 1))}" for name in inner]
    return "{" + draw(blanks) + ", ".join(pairs) + "}"


@st.composite
def documents(draw):
    """A document, and the line of each of its tables and of each key in them."""
    text, expected = "", {}

    def line():
        return text.count("\n") + 1

    tables = draw(st.lists(names, unique=True, max_size=3))
    for number, table in enumerate(["", *tables]):
        path = ()
        if number:
            text += draw(blanks)
            times = draw(st.integers(0, 2))
            if times:
                for time in range(times):
                    expected[(table, time)] = line()
                    text += f"[[{draw(blanks)}{quoted(table, draw(st.integers(0, 2)))}{draw(blanks)}]]" + draw(breaks)
                path = (table, times - 1)
            else:
                expected[(table,)] = line()
                text += f"[{draw(blanks)}{quoted(table, draw(st.integers(0, 2)))}{draw(blanks)}]" + draw(breaks)
                path = (table,)
        for name in draw(st.lists(names, unique=True, max_size=4)):
            if not number and name in tables:
                continue
            text += draw(blanks)
            expected[(*path, name)] = line()
            key = quoted(name, draw(st.integers(0, 2))) + draw(blanks)
            text += f"{key}={draw(blanks)}{draw(values())}" + draw(breaks)
    return text, expected


@given(documents())
def test_any_document_is_followed_to_the_line(made):
    text, expected = made
    found = agree(text)
    for path, line in expected.items():
        assert found[path] == line, (path, text)
