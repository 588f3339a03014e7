"""The lines of a history hold each other: whatever is altered, lost or cut off is told, and a crash is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockbak.model import events
from blockbak.model.events import Entry, Head, decode_head, digest, encode_slot, encoded, first_place, next_place, read

ORIGIN = b"1f" * 16


def entry(place, event="made", **facts):
    return Entry(
        number=place.number, time="2026-05-01T03:00:00.000Z", host="web", user="root", run="ab" * 16, event=event,
        job="", volume="disk", points=["20260501T030000Z-0001"], exit=0, error="", seconds=1.5,
        facts=facts | ({events.TORN: place.torn} if place.torn else {}), previous=place.previous,
    )  # fmt: skip


class File:
    """A history and its head in memory, written as the record does."""

    def __init__(self):
        self.data, self.head, self.slots = b"", Head(0, digest(ORIGIN)), b""
        self.write_head(0)

    def write_head(self, at):
        slots = bytearray(self.slots.ljust(1024, b"\0"))
        slots[at : at + 512] = encode_slot(self.head)
        self.slots = bytes(slots)

    def append(self, torn_at=None, **facts):
        """With ``torn_at`` the process dies when so many bytes are written."""
        head, free = decode_head(self.slots)
        place = next_place(self.data, head, ORIGIN) or first_place(self.data, head, ORIGIN)
        line = encoded(entry(place, **facts))
        written = place.prefix + line
        self.data += written[:torn_at]
        if torn_at is None or torn_at >= len(written):
            self.head = Head(place.number, digest(line))
            if torn_at is None:
                self.write_head(free)

    def read(self):
        return read(self.data, decode_head(self.slots)[0], ORIGIN)


def history(count):
    file = File()
    for number in range(count):
        file.append(number=number)
    return file


def test_each_line_has_the_digest_of_the_one_before():
    file = history(3)
    found = file.read()
    lines = file.data.splitlines(keepends=True)
    assert found.flaws == []
    assert [one.number for one in found.entries] == [1, 2, 3]
    assert [one.previous for one in found.entries] == [digest(ORIGIN), digest(lines[0]), digest(lines[1])]
    assert decode_head(file.slots)[0] == Head(3, digest(lines[2]))


def test_nothing_is_no_damage():
    assert read(b"", None, ORIGIN) == events.Reading([], [])
    assert File().read() == events.Reading([], [])


@given(st.integers(1, 6), st.data())
def test_a_changed_byte_is_always_told(count, data):
    file = history(count)
    at = data.draw(st.integers(0, len(file.data) - 1))
    changed = bytearray(file.data)
    changed[at] ^= data.draw(st.integers(1, 255))
    file.data = bytes(changed)
    assert file.read().flaws


@given(st.integers(1, 6), st.data())
def test_a_lost_line_is_told_wherever_it_stood(count, data):
    file = history(count)
    lines = file.data.splitlines(keepends=True)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    file.data = b"".join(lines[:first] + lines[last + 1 :])
    wanted = f"line {first + 1} is" if first == last else f"lines {first + 1} to {last + 1} are"
    assert [wanted in flaw for flaw in file.read().flaws] == [True]
    # Nor is it forgotten with what is written next.
    file.append()
    assert [wanted in flaw for flaw in file.read().flaws] == [True]
    assert file.read().entries[-1].number == count + 1


@given(st.lists(st.one_of(st.none(), st.integers(0, 700)), max_size=8))
def test_what_crashes_tear_is_witnessed_and_no_damage(steps):
    """None is a line that is written whole, a number one of which so many bytes are."""
    file = File()
    for number, torn_at in enumerate(steps):
        file.append(torn_at, number=number)
        assert file.read().flaws == []
    file.append(number=len(steps))
    found = file.read()
    assert found.flaws == []
    written = [number for number, torn_at in enumerate(steps) if torn_at is None]
    numbers = [one.facts["number"] for one in found.entries]
    assert set(written) <= set(numbers)
    assert numbers == sorted(numbers)
    assert [one.number for one in found.entries] == list(range(1, len(numbers) + 1))


@given(st.integers(1, 300), st.data())
def test_torn_bytes_cannot_be_changed_unnoticed(torn_at, data):
    file = history(2)
    end = len(file.data)
    file.append(torn_at)
    file.append()
    # Also the last whole line before them is held by the line after them.
    at = data.draw(st.integers(0, end + torn_at - 1))
    changed = bytearray(file.data)
    changed[at] ^= 1
    file.data = bytes(changed)
    assert file.read().flaws


def test_bytes_that_no_line_witnesses_are_damage():
    file = history(2)
    cut = file.data.index(b"\n") + 1
    file.data = file.data[:cut] + b"something else\n" + file.data[cut:]
    assert file.read().flaws == ["what stands between the lines 1 and 2 is no line"]


def test_lines_of_another_repository_are_told():
    file = history(1)
    found = read(file.data, decode_head(file.slots)[0], b"another")
    assert found.flaws == ["its first line is of another repository"]


def test_the_last_line_is_held_by_the_head():
    file = history(2)
    file.data = file.data.replace(b'"number":1}', b'"number":9}')
    assert file.read().flaws == ["line 2 is not what it was"]
    # Nor does the next line hold what it is now.
    file.append()
    assert file.read().flaws == ["line 2 is not what it was"]


def test_a_head_that_is_gone_is_told_and_stays_so():
    file = history(2)
    file.slots = b""
    assert file.read().flaws == ["the file that tells its end is missing or damaged"]


@pytest.mark.parametrize("half", [0, 512])
def test_either_half_of_the_head_may_be_lost(half):
    """A crash tears the one that is written; what it would have told is then one line old."""
    for count in (4, 5):
        file = history(count)
        torn = bytearray(file.slots)
        torn[half : half + 512] = b"\0" * 512
        file.slots = bytes(torn)
        assert decode_head(file.slots)[0].number in (count, count - 1)
        assert file.read().flaws == []
        file.append()
        assert decode_head(file.slots)[0].number == count + 1


@given(st.integers(0, 1023), st.integers(1, 255))
def test_a_changed_head_never_tells_of_another_line(at, bits):
    file = history(3)
    changed = bytearray(file.slots)
    changed[at] ^= bits
    head = decode_head(bytes(changed))[0]
    assert head in (Head(3, file.head.sha256), decode_head(history(2).slots)[0])


def test_a_tail_without_a_whole_line_asks_for_more():
    file = history(1)
    assert next_place(file.data[40:], None, ORIGIN) is None
    assert next_place(file.data, None, ORIGIN).number == 2


def test_an_entry_has_a_line_of_its_own():
    """A line feed in what is noted would else be one of the file."""
    line = encoded(entry(first_place(b"", None, ORIGIN), note="two\nlines \u2028 and \x85"))
    assert line.count(b"\n") == 1
    assert events.decoded(line).facts["note"] == "two\nlines \u2028 and \x85"


@pytest.mark.parametrize(
    "time", ["r026-05-01T03:00:00.000Z", "2026-05-01T03:00:00.000", "2026-13-01T03:00:00.000Z", ""]
)
def test_a_line_that_tells_no_moment_is_none(time):
    file = history(3)
    lines = file.data.splitlines(keepends=True)
    altered = lines[1].replace(b'"2026-05-01T03:00:00.000Z"', f'"{time}"'.encode())
    assert altered != lines[1]
    file.data = lines[0] + altered + lines[2]
    found = file.read()
    assert [one.number for one in found.entries] == [1, 3]
    assert found.flaws
    # The next line counts on, and what was altered stays told.
    file.append()
    assert [one.number for one in file.read().entries] == [1, 3, 4]
    assert file.read().flaws == found.flaws
