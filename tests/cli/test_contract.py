"""What every verb keeps: its help, its answer to a wrong command line, to a repository that cannot be used,
to points that are not there, to outputs that nobody reads. A new verb is one line in ``VERBS`` here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from blockbak.cli.main import VERBS as BUILT
from blockbak.cli.main import cli
from blockbak.image import format as fmt
from tests.cli.program import (
    LIMIT_SECONDS,
    PLAIN,
    PLAIN_UID,
    PROGRAM,
    ROOT,
    Ended,
    Running,
    Terminal,
    both,
    document,
    environment,
    fails,
    must_hold,
    ok,
    parsed,
    run,
    tree,
)
from tests.cli.stock import Stock, copied
from tests.host.stage import flip
from tests.images import rewrite_header, rewrite_manifest


@dataclass(frozen=True)
class Verb:
    """``good`` are words that must succeed on ``Stock``, in a directory where anything may be made.

    ``missing`` is a command line without a word it needs, ``surplus`` one with a word too many. ``point`` are
    words with a point in place of ``{}``, ``volume`` the same with a volume.
    """

    name: str
    good: Callable[[Stock, Path], list[str]]
    missing: list[str] | None = None
    surplus: list[str] | None = None
    point: list[str] | None = None
    volume: list[str] | None = None
    on_repository: bool = True
    needs_root: bool = field(default=False)

    def __str__(self) -> str:
        return self.name


def configured(stock: Stock, place: Path) -> list[str]:
    """A configuration with one job, whose repository and source are those of the stock."""
    file = place / "blockbak.toml"
    file.write_text(
        f'[repositories.main]\npath = "{stock.path}"\n[jobs.web]\nsources = ["{stock.source}"]\nname = "web"\n'
    )
    return ["--config", str(file)]


VERBS = [
    Verb("devices", lambda stock, place: [], surplus=["x"], on_repository=False),
    Verb("init", lambda stock, place: [str(place / "new")], missing=[], surplus=["a", "b"], on_repository=False),
    Verb("backup", lambda stock, place: [str(stock.source), "--name", "web"], missing=[]),
    Verb(
        "cold", lambda stock, place: [str(stock.source), str(place / "out")],
        missing=["x"], surplus=["x", "b", "c"], on_repository=False,
    ),
    Verb("adopt", lambda stock, place: [str(stock.raw), "--name", "web"], missing=[], surplus=["x", "b"]),
    Verb("list", lambda stock, place: [], surplus=["web", "b"], volume=["{}"]),
    Verb("show", lambda stock, place: [stock.newest], missing=[], surplus=["a", "b"], point=["{}"]),
    Verb(
        "restore", lambda stock, place: ["web@latest", str(place / "out")],
        missing=["latest"], surplus=["latest", "b", "c"], point=["{}", "out"],
    ),
    Verb("verify", lambda stock, place: [], point=["{}"]),
    Verb(
        "synthesize", lambda stock, place: ["web", "--at", stock.web[1]],
        missing=[], surplus=["web", "b"], point=["web", "--at", "{}"], volume=["{}"],
    ),
    Verb("delete", lambda stock, place: [stock.db], missing=[], point=["{}"]),
    Verb(
        "mirror", lambda stock, place: [str(stock.source), str(place / "out")],
        missing=["x"], surplus=["x", "b", "c"], on_repository=False,
    ),
    Verb(
        "pin", lambda stock, place: [stock.newest, "--why", "before the move"],
        missing=["--why", "x"], surplus=["a", "b", "--why", "x"], point=["{}", "--why", "x"],
    ),
    Verb("unpin", lambda stock, place: [stock.newest], missing=[], point=["{}"]),
    Verb(
        "prune", lambda stock, place: ["web", "--keep-last", "2"],
        surplus=["web", "b", "--keep-last", "1"], volume=["{}", "--keep-last", "1"],
    ),
    Verb(
        "export", lambda stock, place: ["web@latest", str(place / "out")],
        missing=["latest"], surplus=["latest", "b", "c"], point=["{}", "out"],
    ),
    Verb("run", configured, on_repository=False),
    Verb(
        "config", lambda stock, place: ["check", *configured(stock, place)],
        missing=[], surplus=["check", "x"], on_repository=False,
    ),
    Verb(
        "timers", lambda stock, place: ["install", "--cron", *configured(stock, place)],
        missing=[], on_repository=False,
    ),
    Verb("history", lambda stock, place: [], surplus=["x"]),
    Verb(
        "drill", lambda stock, place: [stock.newest, "--scratch", str(place)], surplus=["a", "b"], point=["{}"],
        needs_root=True,
    ),
    Verb("status", lambda stock, place: [], surplus=["web", "b"], volume=["{}"]),
    Verb("recover", lambda stock, place: [], surplus=["x"]),
    Verb(
        "plan", lambda stock, place: ["--source", str(stock.source), "--keep-daily", "7"], surplus=["x", "y"],
        on_repository=False,
    ),
    Verb("demo", lambda stock, place: [], surplus=["x"], on_repository=False, needs_root=True),
]  # fmt: skip

every_verb = pytest.mark.parametrize("verb", VERBS, ids=str)


def verbs(*, but: str = "", where: Callable[[Verb], object] = lambda verb: True) -> pytest.MarkDecorator:
    found = [verb for verb in VERBS if where(verb) and verb.name not in but.split()]
    return pytest.mark.parametrize("verb", found, ids=str)


def on(stock: Stock | Path, verb: Verb, *words: str | Path) -> list[str]:
    """The words of a verb on a repository, where it takes one."""
    path = stock.path if isinstance(stock, Stock) else stock
    return [*(["-r", str(path)] if verb.on_repository else []), verb.name, *map(str, words)]


def test_every_verb_that_is_built_keeps_the_contract() -> None:
    assert [verb.name for verb in VERBS] == list(BUILT)


def test_the_program_that_runs_is_the_one_of_this_checkout() -> None:
    code = "import blockbak; print(blockbak.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, check=True, text=True, env=environment()
    )
    assert Path(done.stdout.strip()) == ROOT / "blockbak" / "__init__.py"


def test_the_script_and_the_module_are_one_program() -> None:
    script = Path(sys.executable).with_name("blockbak")
    assert ok("--version", program=[str(script)]).text == ok("--version").text
    as_script, as_module = ok("--help", program=[str(script)]).text, ok("--help").text
    assert as_script.splitlines()[1:] == as_module.splitlines()[1:]


# --- help ------------------------------------------------------------------------------------------------


def options(command: click.Command) -> list[str]:
    context = click.Context(command, help_option_names=["-h", "--help"])
    found = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option):
            found += [*parameter.opts, *parameter.secondary_opts]
    return found


@every_verb
def test_help_tells_every_option_and_gives_an_example(verb: Verb) -> None:
    ended = ok(verb.name, "--help")
    assert ended.err == b""
    assert ended.text == ok(verb.name, "-h").text
    assert re.search(r"^ *Examples?:", ended.text, re.MULTILINE), ended.text
    command = cli.get_command(click.Context(cli), verb.name)
    words = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", ended.text))
    assert words >= set(options(command))
    for word in ended.text.split():
        assert word != "TODO"


@every_verb
def test_help_and_manual_page_name_the_same_options(verb: Verb) -> None:
    page = (ROOT / "docs" / "man" / f"blockbak-{verb}.8").read_text().replace("\\-", "-")
    heads = re.findall(r"^\.TP\n\.B (.+)$", page.partition(".SH OPTIONS")[2].partition(".SH EXAMPLES")[0], re.MULTILINE)
    named = {word for head in heads for word in re.findall(r"--[a-z-]+", head)}
    told = set(re.findall(r"--[a-z][a-z-]*", ok(verb.name, "--help").text))
    assert named, page
    assert named <= told
    assert {f"--{option}" for option in ("json", "help")} <= named


def test_help_of_the_program_names_every_verb() -> None:
    ended = ok("--help")
    assert ended.err == b""
    assert "Examples:" in ended.text
    assert set(BUILT) <= set(ended.text.split())


def test_the_version_is_the_packages_own() -> None:
    from blockbak import __version__

    assert ok("--version").text.split()[-1] == __version__


# --- a wrong command line --------------------------------------------------------------------------------


def wrong(*words: str) -> str:
    """A command line that cannot be understood: usage on standard error, or a document; the message."""
    with Running(*words) as for_people, Running(*words, "--json") as for_scripts:
        text, scripted = for_people.end(), for_scripts.end()
    assert (text.status, scripted.status) == (2, 2), f"{text}\n{scripted}"
    assert text.out == b"", str(text)
    assert "Usage:" in text.said, str(text)
    error = scripted.error
    assert (error["name"], error["exit"]) == ("WrongUsage", 2)
    assert error["message"], str(scripted)
    return error["message"]


@every_verb
def test_an_unknown_option_is_a_wrong_command_line(verb: Verb) -> None:
    assert "--no-such-option" in wrong(verb.name, "--no-such-option")


@verbs(where=lambda verb: verb.missing is not None)
def test_a_missing_argument_is_a_wrong_command_line(verb: Verb) -> None:
    assert "Missing argument" in wrong(verb.name, *verb.missing)


@verbs(where=lambda verb: verb.surplus is not None)
def test_a_surplus_argument_is_a_wrong_command_line(verb: Verb) -> None:
    assert "unexpected extra argument" in wrong(verb.name, *verb.surplus)


@pytest.mark.parametrize(
    "words",
    [
        ["cold", "--at-next-boot", "x", "y"], ["cold", "--at-next-boot", "--idle", "x"], ["cold", "--at-next-boot"],
        ["cold", "--at-next-boot", "--cancel", "x"], ["cold", "--at-next-boot", "--cancel", "--dry-run"],
        ["cold", "--at-next-boot", "--time-limit", "0", "x"], ["cold", "--name", "a", "x", "y"],
        ["cold", "--cancel", "x", "y"], ["cold", "--time-limit", "9", "x", "y"],
        [], ["-r"], ["-r", "x"], ["nosuchverb"], ["prune"], ["mount", "latest", "x"], ["backup", "--mode", "warm", "x"],
        ["backup", "--kind", "partial", "x"], ["backup", "--block-size", "3000", "x"],
        ["backup", "--block-size", "2M", "x"], ["backup", "--compress", "zstd:99", "x"],
        ["backup", "--compress", "lz4", "x"], ["backup", "--name", "one", "x", "y"], ["backup", "--wait", "-1", "x"],
        ["backup", "--wait", "soon", "x"], ["backup", "--wait", "nan", "x"], ["export", "--format", "vmdk", "p", "f"],
        ["verify", "--sample", "0%"], ["verify", "--sample", "101%"], ["verify", "--sample", "few"],
        ["verify", "--sample", "nan%"], ["show", "--extents", "-1", "p"], ["synthesize", "--kind", "incremental", "v"],
        ["demo", "--size", "1M"], ["demo", "--size", "much"], ["demo", "--dir", "/no/such/place"],
        ["list", "--wait", "1"], ["cold", "x", "y", "--sidecar", "z"],
        ["cold", "x", "y", "--limit", "1K"], ["adopt", "x", "--name", "../y"], ["restore", "-", "--create-lv", "v/l"],
        ["plan"], ["plan", "x", "--source", "y"], ["plan", "x", "--keep-daily", "3"], ["plan", "--source", "y", "--change", "no"],
        ["plan", "--source", "y", "--change", "200%"], ["plan", "--source", "y", "--schedule", "soon"],
        ["mirror", "x", "y", "--through", "ssh z"], ["mirror", "x", "--through", "'"], ["mirror", "x", "--through", ""],
        ["mirror", "x", "--through", "ssh z", "--yes"], ["mirror", "x", "y", "--block-size", "5000"],
        ["mirror", "x", "y", "--freeze-with", "z"], ["mirror", "x", "y", "--freeze-deadline", "9"],
        ["mirror", "--receive", "y", "--limit", "9M"], ["mirror", "--receive", "y", "--no-verify"],
        ["mirror", "--receive", "y", "x"], ["mirror", "x", "-", "--yes"],
        ["restore", "./x", "y", "--keep-going"], ["restore", "./x", "y", "--sidecar", "z"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_value_that_makes_no_sense_is_a_wrong_command_line(words: list[str]) -> None:
    ended = run(*words)
    assert (ended.status, ended.out) == (2, b""), str(ended)
    assert "Usage:" in ended.said or "requires an argument" in ended.said, str(ended)


# --- a repository that cannot be used --------------------------------------------------------------------

on_repository = verbs(where=lambda verb: verb.on_repository)
some_on_repository = verbs(where=lambda verb: verb.name in ("backup", "list", "restore", "recover"))
"""All open it in one way, which the tests of every verb show."""


@on_repository
def test_no_repository_named(verb: Verb, stock: Stock, tmp_path: Path) -> None:
    fails(1, "NoRepositoryNamed", verb.name, *verb.good(stock, tmp_path), cwd=tmp_path, env={"BLOCKBAK_REPO": ""})
    assert not os.listdir(tmp_path)


def not_a_repository(place: Path, what: str) -> Path:
    if what == "directory":
        place.mkdir()
        (place / "letters").write_text("mine")
    elif what != "nothing":
        place.write_text("mine")
    return place / "deeper" if what == "inside a file" else place


@on_repository
def test_a_failure_is_a_document_for_scripts_and_only_a_sentence_for_people(
    verb: Verb, stock: Stock, tmp_path: Path
) -> None:
    path = not_a_repository(tmp_path / "place", "directory")
    before = tree(tmp_path)
    text, scripted = both(*on(path, verb, *verb.good(stock, tmp_path)))
    assert (text.status, scripted.status) == (1, 1)
    assert text.out == b""
    assert text.said == scripted.said
    assert scripted.error["name"] == "NotARepository"
    assert str(path) in scripted.error["message"]
    assert scripted.error["message"] in text.said
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "nothing", "inside a file"])
def test_not_a_repository(what: str, tmp_path: Path) -> None:
    fails(1, "NotARepository", "-r", not_a_repository(tmp_path / "place", what), "list")


@on_repository
def test_a_repository_newer_than_the_program(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    file = repo.path / "repository.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"blockbak_repository": 2, "something": "new"}))
    before = tree(tmp_path)
    found = fails(1, "NewerFormat", *on(repo, verb, *verb.good(repo, tmp_path)))
    assert "newer blockbak" in found.error["message"]
    assert tree(tmp_path) == before


@some_on_repository
def test_a_damaged_repository_file_is_damage(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    (repo.path / "repository.json").write_bytes(b'{"blockbak_repository": 1,')
    fails(4, "DamagedRepository", *on(repo, verb, *verb.good(repo, tmp_path)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b'{"blockbak_repository": "one"}', b"\xff\xfe", b"\0" * 100,
     b'{"blockbak_repository": 1, "id": "\xff", "created": ""}'],
    ids=ascii,
)  # fmt: skip
def test_any_damage_to_the_repository_file_is_told(content: bytes, repo: Stock) -> None:
    (repo.path / "repository.json").write_bytes(content)
    fails(4, "DamagedRepository", "-r", repo.path, "list")


@some_on_repository
def test_a_repository_that_may_not_be_read(verb: Verb, stock: Stock, public: Path) -> None:
    ok("init", public / "repo")
    os.chown(public / "repo", PLAIN_UID, -1)
    (public / "repo").chmod(0)
    found = fails(1, "NoPermission", *on(public / "repo", verb, *verb.good(stock, public)), program=PLAIN)
    assert "No permission" in found.error["message"]


def given_away(folder: Path) -> None:
    """To whom the program without powers runs as."""
    for path in (folder, *folder.rglob("*")):
        os.chown(path, PLAIN_UID, -1)


@pytest.mark.parametrize(
    ("verb", "what"),
    [(verb, what) for verb in VERBS if verb.name in ("list", "show") for what in ("volume", "manifest", "image")]
    + [(verb, "manifest") for verb in VERBS if verb.name in ("restore", "verify", "export")],
    ids=str,
)
def test_a_part_of_a_repository_that_may_not_be_read_is_no_damage(
    verb: Verb, what: str, stock: Stock, public: Path
) -> None:
    """A plain user must not be told that the backups are broken."""
    copy = copied(stock, public)
    hidden = copy.path / "db"
    if what != "volume":
        hidden /= f"{stock.db}.full.{'json' if what == 'manifest' else 'zst'}"
    out = public / "out"
    out.mkdir()
    given_away(public)
    hidden.chmod(0)
    ended = run(*(at(verb, copy, stock.db, out) if verb.point else on(copy, verb)), program=PLAIN)
    if (verb.name, what) == ("list", "image"):
        assert ended.status == 0, str(ended)  # it reads manifests only
        return
    assert ended.status == 1, str(ended)
    assert "No permission" in ended.said, str(ended)
    assert not os.listdir(out)


@pytest.mark.parametrize("verb", ["restore", "export"])
def test_a_place_that_may_not_be_written_is_a_failure(verb: str, stock: Stock, public: Path) -> None:
    copy, out = copied(stock, public), public / "out"
    out.mkdir()
    given_away(public)
    out.chmod(0o500)
    fails(1, "NoPermission", "-r", copy.path, verb, stock.newest, out / "file", program=PLAIN)
    assert not os.listdir(out)


def test_a_repository_that_may_not_be_written_can_be_restored_from(stock: Stock, public: Path) -> None:
    copy, out = copied(stock, public), public / "out"
    out.mkdir()
    given_away(public)
    for path in (copy.path, *copy.path.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    words = ["-r", copy.path]
    ok(*words, "restore", stock.newest, out / "file", program=PLAIN)
    assert (out / "file").read_bytes() == stock.held[stock.newest]
    assert document(*words, "verify", program=PLAIN)["ok"] is True
    found = fails(1, "NoPermission", *words, "delete", stock.db, program=PLAIN)
    assert "db" in found.error["message"]


# --- newer and damaged manifests and images ----------------------------------------------------------------


def test_what_rewrites_a_manifest_and_a_header_writes_them_whole(repo: Stock) -> None:
    manifest = repo.path / "db" / f"{repo.db}.full.json"
    before = manifest.read_bytes()
    rewrite_manifest(manifest, blockbak_manifest=b"1")
    assert manifest.read_bytes() == before
    rewrite_header(manifest.with_suffix(".zst"), fmt.FORMAT_VERSION)
    ok("-r", repo.path, "verify", repo.db)


with_a_point = verbs(where=lambda verb: verb.point)
asked_of_a_point = verbs(where=lambda verb: verb.point, but="delete")
"""Not ``delete``: it may be what a person does about damage."""


def at(verb: Verb, stock: Stock, point: str, place: Path) -> list[str]:
    """The words of a verb asked of a point of `db`."""
    words = [word.format(point) for word in verb.point]
    return on(stock, verb, *[{"out": str(place / "out"), "web": "db"}.get(word, word) for word in words])


@asked_of_a_point
def test_a_manifest_of_a_newer_program_is_no_damage(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    rewrite_manifest(repo.path / "db" / f"{repo.db}.full.json", blockbak_manifest=b"2")
    ended = run(*at(verb, repo, repo.db, tmp_path))
    assert ended.status == 1, str(ended)
    assert "newer blockbak" in ended.said, str(ended)


# A pin is of the point, whatever its images are: they are not opened.
@verbs(where=lambda verb: verb.point, but="delete pin unpin")
def test_an_image_of_a_newer_program_is_no_damage(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    rewrite_header(repo.path / "db" / f"{repo.db}.full.zst", fmt.FORMAT_VERSION + 1)
    ended = run(*at(verb, repo, repo.db, tmp_path))
    if verb.name == "synthesize" and ended.status == 0:
        pytest.fail(f"the image was not even looked at: {ended}")
    assert ended.status == 1, str(ended)
    assert "newer" in ended.said, str(ended)


@verbs(where=lambda verb: verb.name in ("show", "restore", "verify"))
def test_a_flipped_version_of_a_manifest_is_damage(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    manifest = repo.path / "db" / f"{repo.db}.full.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"blockbak_manifest": 1', b'"blockbak_manifest": 2'))
    ended = run(*at(verb, repo, repo.db, tmp_path))
    assert ended.status == 4, str(ended)
    assert "damaged" in ended.said, str(ended)


@verbs(where=lambda verb: verb.name in ("show", "restore", "verify"))
def test_a_flipped_version_of_an_image_is_damage(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    flip(repo.path / "db" / f"{repo.db}.full.zst", fmt.HEADER.fields["version"][1], 0x02)
    ended = run(*at(verb, repo, repo.db, tmp_path))
    assert ended.status == 4, str(ended)
    assert "damaged" in ended.said or "digest" in ended.said, str(ended)


def test_list_names_a_newer_manifest_and_a_damaged_one_with_their_exits(repo: Stock) -> None:
    manifest = repo.path / "db" / f"{repo.db}.full.json"
    rewrite_manifest(manifest, blockbak_manifest=b"2")
    for words in ((), ("--json",)):
        ended = run("-r", repo.path, "list", *words)
        assert ended.status == 1, str(ended)
        assert "newer blockbak" in ended.said
        assert repo.newest in ended.text
    flip(manifest, 10)
    ended = run("-r", repo.path, "list", "--json")
    assert ended.status == 4, str(ended)
    assert [point["point"] for point in ended.document] == list(repo.web)


def test_no_byte_of_a_manifest_can_be_flipped_unnoticed(repo: Stock, rng, seed: int) -> None:
    manifest = repo.path / "db" / f"{repo.db}.full.json"
    place, bits = rng.randrange(manifest.stat().st_size), 1 << rng.randrange(8)
    flip(manifest, place, bits)
    ended = run("-r", repo.path, "verify", repo.db)
    assert ended.status == 4, f"seed {seed}: byte {place} ^ {bits}: {ended}"


# --- points and volumes that are not there -----------------------------------------------------------------


@with_a_point
def test_no_such_point(verb: Verb, stock: Stock, tmp_path: Path) -> None:
    words = [word.format("web@nothing") for word in verb.point]
    found = fails(1, "NoSuchPoint", *on(stock, verb, *words), cwd=tmp_path)
    assert "nothing" in found.error["message"]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["20990101T000000Z-0000", "nothing", "web", "web@", "@", "", "latest@x"])
def test_what_names_no_point(name: str, stock: Stock) -> None:
    ended = run("-r", stock.path, "show", name, "--json")
    assert ended.status == 1, str(ended)
    assert ended.error["name"] == ("NoSuchVolume" if name in ("@", "latest@x") else "NoSuchPoint"), str(ended)


@with_a_point
def test_an_ambiguous_prefix_names_the_candidates(verb: Verb, stock: Stock, tmp_path: Path) -> None:
    words = [word.format("20") for word in verb.point]
    found = fails(1, "AmbiguousPoint", *on(stock, verb, *words), cwd=tmp_path)
    assert stock.newest in found.error["message"]
    assert not os.listdir(tmp_path)


@verbs(where=lambda verb: verb.point, but="synthesize")
def test_no_such_volume_before_the_at_sign(verb: Verb, stock: Stock, tmp_path: Path) -> None:
    words = [word.format("nobody@latest") for word in verb.point]
    fails(1, "NoSuchVolume", *on(stock, verb, *words), cwd=tmp_path)


@verbs(where=lambda verb: verb.volume)
def test_no_such_volume(verb: Verb, stock: Stock) -> None:
    fails(1, "NoSuchVolume", *on(stock, verb, *[word.format("nobody") for word in verb.volume]))


@pytest.mark.parametrize("name", ["..", "web/..", ".", "repository.json", "/etc", "we\nb"], ids=ascii)
def test_what_names_no_volume(name: str, stock: Stock) -> None:
    fails(1, "NoSuchVolume", "-r", stock.path, "list", name)


# --- success, and what comes out where -----------------------------------------------------------------------

that_end_well = verbs(but="demo")


def made_ready(verb: Verb, stock: Stock) -> Stock:
    """The same, with what a verb takes away."""
    if verb.name == "unpin":
        ok("-r", stock.path, "pin", stock.newest, "--why", "before the move")
    return stock


@that_end_well
def test_success_is_one_document_for_scripts_and_words_for_people(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    copy = copied(made_ready(verb, repo), tmp_path / "two")
    words = ok(*on(repo, verb, *verb.good(repo, tmp_path / "one")))
    assert words.text.strip(), str(words)
    with pytest.raises(ValueError):
        parsed(words.out)
    for_scripts = run(*on(copy, verb, *verb.good(copy, tmp_path / "two")), "--json")
    assert for_scripts.status == 0, str(for_scripts)
    assert for_scripts.document is not None
    assert for_scripts.out.endswith(b"\n")


@pytest.mark.parametrize(
    ("verb", "form"),
    [(verb, []) for verb in VERBS if verb.name != "demo"]
    + [(verb, ["--json"]) for verb in VERBS if verb.name == "show"],
    ids=str,
)
def test_a_reader_that_has_enough_is_left_in_peace(verb: Verb, form: list[str], repo: Stock, tmp_path: Path) -> None:
    """The other end of the pipe is closed before the first byte: `blockbak … | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = run(*on(repo, verb, *verb.good(repo, tmp_path)), *form, stdout=writer)
    finally:
        os.close(writer)
    assert "Broken pipe" not in ended.said
    assert "BrokenPipe" not in ended.said, str(ended)
    assert "Exception ignored" not in ended.said, str(ended)


def test_head_takes_one_line_and_nobody_complains(stock: Stock, tmp_path: Path) -> None:
    script = 'set -o pipefail; "$@" | head -n 1; echo "${PIPESTATUS[0]}"'
    done = subprocess.run(
        ["bash", "-c", script, "_", *PROGRAM, "-r", stock.path, "list", "--json"],
        capture_output=True, env=environment(), timeout=LIMIT_SECONDS, check=False, text=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "["
    assert done.stderr == ""


CLOSED = [("backup", "2>&-"), ("list", ">&-"), ("restore", "<&-")]
"""One alone, where something would be said there or asked for."""


@pytest.mark.parametrize(
    ("verb", "closed"),
    [(verb, "<&- >&- 2>&-") for verb in VERBS if verb.name != "demo"]
    + [(verb, one) for verb in VERBS for name, one in CLOSED if verb.name == name],
    ids=str,
)
def test_a_closed_descriptor_changes_nothing(verb: Verb, closed: str, repo: Stock, tmp_path: Path) -> None:
    """A daemon may start it with fewer than three; the next file opened must not take their place."""
    words = on(made_ready(verb, repo), verb, *verb.good(repo, tmp_path))
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {closed}', "_", *PROGRAM, *words],
        capture_output=True, env=environment(), timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    ended = must_hold(Ended(tuple(words), done.returncode, done.stdout, done.stderr))
    assert ended.status == 0, str(ended)
    if verb.name in ("backup", "synthesize"):
        ok("-r", repo.path, "verify")


@verbs(but="devices init list demo delete recover")
def test_at_a_terminal_standard_output_stays_clean(verb: Verb, repo: Stock, tmp_path: Path) -> None:
    with Terminal(*on(made_ready(verb, repo), verb, *verb.good(repo, tmp_path), "--json")) as screen:
        ended = screen.end()
    assert ended.status == 0, str(ended)
    assert isinstance(ended.document, dict | list)
    if verb.name in ("backup", "restore", "verify", "synthesize", "export", "cold", "adopt", "mirror"):
        assert b"%|" in ended.err, f"no progress: {ended}"


def test_progress_tells_bytes_rate_time_left_and_what_changed(slow: Path, tmp_path: Path) -> None:
    ok("init", tmp_path / "repo")
    with Terminal("-r", tmp_path / "repo", "backup", slow, "--name", "v", "--compress", "zstd:19") as screen:
        ended = screen.end()
    assert ended.status == 0, str(ended)
    shown = [line for line in re.split(rb"[\r\n]", ended.err) if b"%|" in line]
    told = rb"v full: +\d+%\|.*\d[kM]?/6\.00M \[\d\d:\d\d<\d\d:\d\d, .*B/s, .*B changed\]"
    assert any(re.search(told, line) for line in shown), shown
    # The bar goes when it is done; the summary is what stays.
    assert b"v: full" in ended.out
    assert b"%|" not in ended.out
