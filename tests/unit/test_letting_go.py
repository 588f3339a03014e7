"""What is decided about hooks and devices, as functions of values."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.errors import HookFailed, HookStopped
from blockbak.host import guard, hooks, mapper
from blockbak.host.guardian import Ended
from blockbak.host.hooks import Next, Step

PACKAGE = Path(guard.__file__).parent


# --- hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "tried", "left", "then"),
    [
        (0, 1, 10, Next.GO_ON),
        (0, 3, 0, Next.GO_ON),
        (62, 1, 10, Next.SKIP),
        (63, 1, 10, Next.STOP),
        (1, 1, 10, Next.AGAIN),
        (1, 2, 10, Next.AGAIN),
        (1, 3, 10, Next.FAIL),
        (1, 1, 0.5, Next.FAIL),
        (None, 1, 10, Next.AGAIN),
        (None, 1, -1, Next.FAIL),
        (64, 3, 10, Next.FAIL),
    ],
)
def test_what_follows_a_begin(status, tried, left, then):
    assert hooks.after_begin(status, tried, left) is then


@given(status=st.one_of(st.none(), st.integers(0, 255)), left=st.floats(-1e3, 1e3))
def test_no_begin_is_tried_for_ever(status, left):
    assert hooks.after_begin(status, hooks.TRIES, left) is not Next.AGAIN


@given(deadline=st.floats(0.1, 1e4), share=st.floats(0, 1))
def test_a_begin_ends_before_the_deadline(deadline, share):
    left = deadline * share
    assert hooks.begin_seconds(deadline, left) < left
    assert hooks.begin_seconds(deadline, deadline) > deadline / 2


def ended(label, status, reason="", stderr=""):
    return Ended(label, status, reason, "", stderr)


def test_what_follows_the_ends():
    errors, notes = hooks.troubles([ended("a", 0), ended("b", 62)], frozenset())
    assert (errors, notes) == ([], [])
    errors, notes = hooks.troubles(
        [ended("a", 1, stderr="why"), ended("b", 63), ended("c", None, "too late")], frozenset()
    )
    assert [type(one) for one in errors] == [HookFailed, HookStopped, HookFailed]
    assert str(errors[0]) == "Hook a failed in its phase end: exit status 1 (why)."
    assert str(errors[2]) == "Hook c failed in its phase end: too late."
    assert notes == []


def test_the_end_of_a_hook_that_was_left_out_is_no_error():
    errors, notes = hooks.troubles([ended("a", -9)], frozenset({"a"}))
    assert errors == []
    assert notes == ["Hook a, which was left out, failed in its phase end: killed by signal 9."]


@pytest.mark.parametrize("name", ["10-flush", "a", "A_b-1"])
def test_names_that_count(name):
    assert hooks.is_hook_name(name)


@pytest.mark.parametrize("name", ["a~", "a.bak", "a.dpkg-old", ".a", "a.sh", "", "a b", "a\n"])
def test_names_that_do_not_count(name):
    assert not hooks.is_hook_name(name)


ROOT = Step("/", 0, stat.S_IFDIR | 0o755)
FOLDER = Step("/etc", 0, stat.S_IFDIR | 0o755)
FILE = Step("/etc/hook", 0, stat.S_IFREG | 0o755)
LINK = Step("/etc/link", 0, stat.S_IFLNK | 0o777)


@pytest.mark.parametrize("way", [[ROOT, FOLDER, FILE], [ROOT, FOLDER, LINK, FILE]])
def test_safe(way):
    assert hooks.unsafe(way) == ""


@pytest.mark.parametrize(
    ("way", "why"),
    [
        ([ROOT, FOLDER], "it is not a regular file"),
        ([ROOT, Step("/x", 0, stat.S_IFREG | 0o644)], "it is not executable"),
        ([ROOT, Step("/x", 5, stat.S_IFREG | 0o755)], "it belongs to user 5, not to root"),
        ([ROOT, Step("/x", 0, stat.S_IFREG | 0o775)], "others than root may write it"),
        ([ROOT, Step("/x", 0, stat.S_IFREG | 0o757)], "others than root may write it"),
        ([ROOT, Step("/tmp", 0, stat.S_IFDIR | 0o1777), FILE], "others than root may write /tmp"),
        ([ROOT, Step("/home/a", 7, stat.S_IFDIR | 0o755), FILE], "/home/a belongs to user 7, not to root"),
        ([ROOT, Step("/etc/link", 7, stat.S_IFLNK | 0o777), FILE], "/etc/link belongs to user 7, not to root"),
    ],
)
def test_unsafe(way, why):
    assert hooks.unsafe(way) == why


def test_the_way_to_a_file_leads_through_its_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "hook").touch()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "hook").symlink_to(f"{tmp_path}/real/../folder/./hook")
    steps = [step.path for step in hooks.way_to(f"{tmp_path}/hook")]
    assert steps[0] == "/"
    for path in (tmp_path, tmp_path / "hook", tmp_path / "folder", tmp_path / "real"):
        assert str(path) in steps
    assert steps[-1] == f"{tmp_path}/real/hook"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        hooks.way_to(f"{tmp_path}/loop")


# --- letting go -----------------------------------------------------------------------------------


class Devices:
    """A mapper of which each device fails as often as it is told."""

    def __init__(self, **failing):
        self.failing, self.suspended, self.resumed = failing, dict.fromkeys(failing, True), []

    def info(self, name):
        if name not in self.suspended:
            return None
        return type("Info", (), {"uuid": f"LVM-{name}", "suspended": self.suspended[name], "unready": False})

    def resume(self, name):
        if self.failing[name]:
            self.failing[name] -= 1
            raise OSError(5, "broken")
        self.suspended[name] = False
        self.resumed.append(name)


@given(failing=st.dictionaries(st.text("abc", min_size=1), st.integers(0, 2 * guard.RESUME_TRIES)))
def test_all_that_can_be_resumed_is(failing):
    devices = Devices(**failing)
    pauses = []
    said, left = guard.resume_all(devices, [(name, f"LVM-{name}") for name in failing], pauses.append)
    stuck = [name for name, times in failing.items() if times >= guard.RESUME_TRIES]
    assert [name for name, _ in left] == stuck
    assert sorted(said) == sorted(f"Device {name} could not be resumed: broken." for name in stuck)
    assert sorted(devices.resumed) == sorted(set(failing) - set(stuck))
    assert len(pauses) < guard.RESUME_TRIES


def test_a_device_that_runs_is_not_resumed():
    """With a table loaded by somebody else, resuming would exchange the tables."""
    devices = Devices(a=0)
    devices.suspended["a"] = False
    assert guard.resume_all(devices, [("a", "LVM-a")], lambda _: None) == ([], [])
    assert devices.resumed == []


class HalfWay(Devices):
    """Volume a, below which a killed lvcreate has put a device whose table is not in force yet."""

    def info(self, name):
        if name == "a-real":
            return type("Info", (), {"uuid": "LVM-a-real", "suspended": False, "unready": self.suspended[name]})
        return super().info(name)


def test_what_lies_below_goes_on_first():
    """The volume's own table may lead there by now, and would answer with errors."""
    devices = HalfWay(**{"a": 0, "a-real": 0})
    assert guard.resume_all(devices, [("a", "LVM-a")], lambda _: None) == ([], [])
    assert devices.resumed == ["a-real", "a"]


def test_both_ends_know_device_mapper_alike():
    assert guard._HEADER.format == mapper._HEADER.format
    assert (guard._SUSPEND, guard._STATUS, guard._FLAG_SUSPENDED, guard._FLAG_TABLE, guard._FLAG_LOADED) == (
        mapper._SUSPEND,
        mapper._STATUS,
        mapper._FLAG_SUSPENDED,
        mapper._FLAG_TABLE,
        mapper._FLAG_LOADED,
    )
    assert (guard._DM_VERSION, guard._CONTROL) == (mapper._VERSION, mapper.CONTROL)


# --- the document ---------------------------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text()


def variables(text):
    return set(re.findall(r"\bBLOCKBAK_[A-Z_]+\b", text))


def test_the_document_names_the_variables_that_there_are():
    settings = {name for path in (PACKAGE / "ready").iterdir() for name in variables(path.read_text())}
    said = variables((PACKAGE / "hooks.py").read_text()) | variables((PACKAGE.parent / "flow" / "hot.py").read_text())
    assert said | settings == variables(DOCUMENT)
    # What the ready-made hooks ask for is told them, or is a setting of theirs.
    ready = {name for name in variables(DOCUMENT) if name.startswith(("BLOCKBAK_PG_", "BLOCKBAK_MYSQL_"))}
    assert settings - said == ready


def test_the_document_gives_the_numbers_that_hold():
    for number in (hooks.SKIP, hooks.STOP):
        assert f"`{number}`" in DOCUMENT
    assert f"{hooks.TRIES} times" in DOCUMENT
    assert f"{hooks.END_SECONDS:g} seconds" in DOCUMENT
    assert hooks.FOLDER in DOCUMENT
    for name in hooks.READY:
        assert f"`{name}`" in DOCUMENT
    assert len(DOCUMENT.splitlines()) <= 80
