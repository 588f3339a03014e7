"""The configuration: from the text of its file to values, or to everything that is wrong with it, line by line.

``KEYS`` is the one table of all keys. What is read, what is refused, what ``config show`` prints and what
blockbak.toml(5) says come out of it.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockbak.model import tomlscan
from blockbak.model.quiesce import RestOptions
from blockbak.model.retention import Policy
from blockbak.model.schedule import DAILY, NEVER, Calendar, Kinds, parse_calendar
from blockbak.model.snapshot import parse_size as parse_store
from blockbak.model.tomlscan import Path
from blockbak.units import KIB, TIB, parse_duration, parse_size

EVENTS = ("failure", "recovery", "missed-rpo")
"""What people can be told of."""
_MODES = ("auto", "hot", "cold", "live")
_LEVELS = range(1, 20)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NAME_RULE = "at most 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"
_LEAST_RATE = 64 * KIB
_POSITION = re.compile(r" \(at (?:line (?P<line>\d+), column \d+|end of document)\)$")


# --- the values -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selector:
    """A source that is found anew at each run: block devices by what udev says of them, each property matched by a
    shell pattern, or logical volumes by a tag.
    """

    udev: tuple[tuple[str, str], ...] = ()
    lvm_tag: str = ""

    def __str__(self) -> str:
        if self.lvm_tag:
            return f"lvm_tag = {self.lvm_tag}"
        return ", ".join(f"{name} = {pattern}" for name, pattern in self.udev)

    def fits(self, properties: Mapping[str, str]) -> bool:
        """Whether a device with these properties of udev is meant."""
        return bool(self.udev) and all(
            name in properties and fnmatch.fnmatchcase(properties[name], pattern) for name, pattern in self.udev
        )


@dataclass(frozen=True, slots=True)
class Place:
    """A repository: its name in the configuration, its directory, and the file in which each run leaves how its volumes
    are, for Prometheus ("" for none).
    """

    name: str
    path: str
    textfile: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a job's sources are read; as the options of ``blockbak backup`` of the same names. Times are seconds."""

    name: str | None = None
    block_bytes: int | None = None
    compress: str = "zstd"
    snapshot_size: str | None = None
    snapshot_limit: str | None = None
    together: bool = False
    together_seconds: float = 10.0
    freeze_with: tuple[str, ...] = ()
    freeze_seconds: float = 60.0
    limit: int | None = None
    idle: bool = True
    used_only: bool = False
    retries: int = 1
    strict: bool = False
    own_repository: bool = False


@dataclass(frozen=True, slots=True)
class Drill:
    """How and when a job's newest points are restored to scratch and checked. ``target`` is a device or volume given
    for it, "" for a file; ``check`` the job's own command.
    """

    schedule: Calendar
    check: tuple[str, ...] = ()
    checker: bool = True
    boot: bool = False
    boot_pattern: str = ""
    boot_seconds: float = 600.0
    target: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What is imaged into which repository, and when. ``repository`` is its name in the configuration; ``sources`` are
    paths, ``vg/lv`` or selectors. Times are seconds, None where there is no limit.
    """

    name: str
    repository: str
    sources: tuple[str | Selector, ...]
    mode: str = "auto"
    schedule: Calendar = DAILY
    kinds: Kinds = field(default_factory=Kinds)
    random_delay: float = 600.0
    deadline: float | None = None
    wait: float = 600.0
    rpo: float | None = None
    rto: float | None = None
    reading: Reading = field(default_factory=Reading)
    rest: RestOptions = field(default_factory=RestOptions)
    verify: Calendar = NEVER
    verify_share: float = 0.05
    retention: Policy | None = None
    drill: Drill | None = None


@dataclass(frozen=True, slots=True)
class Notify:
    """Who is told, of what: a command, and addresses as apprise takes them."""

    command: tuple[str, ...] = ()
    urls: tuple[str, ...] = ()
    on: tuple[str, ...] = EVENTS


@dataclass(frozen=True, slots=True)
class Setting:
    """A key as it stands, as a person would write it, and the line of the file that says so; None for the default."""

    key: str
    value: str
    line: int | None


@dataclass(frozen=True, slots=True)
class Config:
    """A whole configuration. ``timezone`` is the name of the zone of its calendars, "" for the machine's."""

    repositories: Mapping[str, Place]
    jobs: Mapping[str, Job]
    notify: Notify = field(default_factory=Notify)
    timezone: str = ""
    settings: tuple[Setting, ...] = ()
    lines: Mapping[Path, int] = field(default_factory=dict)

    def path_of(self, job: Job) -> str:
        """The directory of a job's repository."""
        return self.repositories[job.repository].path


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that cannot stand so: where (the line from 1), at which key, and why, as a clause."""

    line: int
    key: str
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.key}: {self.reason}" if self.key else f"line {self.line}: {self.reason}"


# --- what a value may be: functions that raise Unfit ---------------------------------------------------------------


class Unfit(ValueError):
    """A value that a key does not take: why, as a clause."""


def _text(raw: object) -> str:
    if not isinstance(raw, str):
        raise Unfit(f"takes a text in quotes, not {_called(raw)}")
    if not raw or "\0" in raw:
        raise Unfit("takes a text that is not empty")
    return raw


def _called(raw: object) -> str:
    names = {
        bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table",
    }  # fmt: skip
    return names.get(type(raw), "a date or time")


def _flag(raw: object) -> bool:
    if not isinstance(raw, bool):
        raise Unfit(f"takes true or false, not {_called(raw)}")
    return raw


def _count(raw: object) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise Unfit(f"takes a whole number, not {_called(raw)}")
    if not 0 <= raw <= 100_000:
        raise Unfit("takes a number from 0 to 100000")
    return raw


def _retries(raw: object) -> int:
    if (count := _count(raw)) > 1000:
        raise Unfit("takes a number from 0 to 1000")
    return count


def _directory(raw: object) -> str:
    path = _text(raw)
    if not path.startswith("/"):
        raise Unfit(f"takes a whole path, from / on, not {path!r}")
    return path


def _duration(raw: object) -> float:
    text = _text(raw)
    try:
        return parse_duration(text)
    except ValueError as error:
        raise Unfit(f"{text!r} is no duration; take 90s, 15min, 36h, 2d, 6w or 1y") from error


def _lasting(raw: object) -> float:
    seconds = _duration(raw)
    if seconds <= 0:
        raise Unfit("takes a duration above zero")
    return seconds


def _deadline(raw: object) -> float:
    seconds = _duration(raw)
    if seconds < 1:
        raise Unfit("takes at least 1s")
    return seconds


def _together(raw: object) -> float:
    seconds = _deadline(raw)
    if seconds > 60:
        raise Unfit("takes at most 60s")
    return seconds


def _rate(raw: object) -> int:
    size = _size(raw, "50M for 50 MiB a second")
    if size < _LEAST_RATE:
        raise Unfit("takes at least 64K")
    return size


def _size(raw: object, advice: str) -> int:
    text = _text(raw)
    try:
        return parse_size(text)
    except ValueError as error:
        raise Unfit(f"{text!r} is no size; take {advice}") from error


def _block_size(raw: object) -> int:
    return _size(raw, "4K to 1M")


def _store(raw: object) -> str:
    text = _text(raw)
    try:
        size = parse_store(text, TIB, parse_size)
    except ValueError:
        size = 0
    if size <= 0:
        raise Unfit(f"{text!r} is neither a size like 20G nor a share like 15%")
    return text


def _share(raw: object) -> float:
    text = _text(raw)
    try:
        share = float(text.removesuffix("%")) / 100 if text.endswith("%") else 0.0
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise Unfit(f"{text!r} is no share; take 5%, or up to 100%")
    return share


def _compress(raw: object) -> str:
    text = _text(raw)
    codec, _, level = text.partition(":")
    if text not in ("none", "zstd") and not (codec == "zstd" and level.isdigit() and int(level) in _LEVELS):
        raise Unfit(f"{text!r} is no compression; take none, zstd or zstd:1 to zstd:19")
    return text


def _calendar(raw: object) -> Calendar:
    return parse_calendar(_text(raw))


def _mode(raw: object) -> str:
    return _one_of(_text(raw), _MODES)


def _one_of(text: str, words: Sequence[str]) -> str:
    if text not in words:
        raise Unfit(f"{text!r} is none of {', '.join(words)}{_meant(text, words)}")
    return text


def _meant(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, 1)
    return f"; is {near[0]} meant?" if near else ""


def _words(raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise Unfit(f"takes a list of texts in brackets, not {_called(raw)}")
    return tuple(_text(one) for one in raw)


def _argv(raw: object) -> tuple[str, ...]:
    words = _words(raw)
    if not words:
        raise Unfit("takes a program and its arguments, each a text of its own")
    if not words[0].startswith("/"):
        raise Unfit(f"takes the program's whole path first, from / on, not {words[0]!r}")
    return words


def _urls(raw: object) -> tuple[str, ...]:
    words = _words(raw)
    for word in words:
        if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", word):
            raise Unfit("takes addresses as apprise does, such as mailto://user:password@example.org")
    return words


def _events(raw: object) -> tuple[str, ...]:
    return tuple(_one_of(word, EVENTS) for word in _words(raw))


def _volume_name(raw: object) -> str:
    name = _text(raw)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
        raise Unfit(f"{name!r} is no name for a volume")
    return name


def _sources(raw: object) -> tuple[str | Selector, ...]:
    if not isinstance(raw, list):
        raise Unfit(f"takes a list of sources in brackets, not {_called(raw)}")
    if not raw:
        raise Unfit("takes at least one source")
    found = tuple(_selector(one) if isinstance(one, dict) else _source(one) for one in raw)
    if len(set(found)) < len(found):
        raise Unfit("names a source twice")
    return found


def _source(raw: object) -> str:
    text = _text(raw)
    if not text.startswith("/") and not re.fullmatch(r"[^/\s]+/[^/\s]+", text):
        raise Unfit(f"{text!r} is neither a whole path nor vg/lv")
    return text


def _selector(raw: dict[str, Any]) -> Selector:
    if set(raw) == {"lvm_tag"}:
        return Selector(lvm_tag=_text(raw["lvm_tag"]).removeprefix("@"))
    if set(raw) == {"udev"} and isinstance(raw["udev"], dict) and raw["udev"]:
        return Selector(udev=tuple(sorted((name, _text(pattern)) for name, pattern in raw["udev"].items())))
    raise Unfit('a source that is a table is { udev = { ID_SERIAL = "x*" } } or { lvm_tag = "backup" }')


def _zone(raw: object) -> str:
    text = _text(raw)
    if not re.fullmatch(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*", text):
        raise Unfit(f"{text!r} is no time zone; take UTC, or a name such as Europe/Berlin")
    return text


# --- the table of keys ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the file. ``section`` is the table it stands in, with ``*`` for a name that a person gives. ``takes``
    says what it takes, ``default`` what stands where it is left out, in words; ``value`` is the same for the program.
    """

    section: tuple[str, ...]
    name: str
    read: Callable[[object], Any]
    takes: str
    default: str
    about: str
    value: Any = None
    secret: bool = False

    @property
    def path(self) -> str:
        """Its full name, as the manual has it."""
        return ".".join("NAME" if part == "*" else part for part in (*self.section, self.name))


_TOP: tuple[str, ...] = ()
_REPOSITORY = ("repositories", "*")
_JOB = ("jobs", "*")
_RETENTION = ("jobs", "*", "retention")
_DRILL = ("jobs", "*", "drill")
_NOTIFY = ("notify",)

SECTIONS: dict[tuple[str, ...], str] = {
    _TOP: "The whole file.",
    _REPOSITORY: "A repository, and the name by which jobs call it.",
    _JOB: "A job: what is imaged into which repository, when, and how.",
    _RETENTION: "What of a job's points is kept. Without this table nothing is ever removed. Hours, days and all "
    "longer times are those of UTC. Of a volume that several jobs image into one repository, each keeps what it names.",
    _DRILL: "Whether the job's points can be restored: tried, checked and timed.",
    _NOTIFY: "Who is told when something goes wrong, and when it is right again.",
}
"""Every table of the file, and what it is for."""

KEYS: tuple[Key, ...] = (
    Key(_TOP, "timezone", _zone, "ZONE", "the machine's", "The time zone of all calendars, such as Europe/Berlin or "
        "UTC. Calendars of minutes and hours always count in UTC.", ""),
    Key(_REPOSITORY, "path", _directory, "DIRECTORY", "", "The repository's directory; 'blockbak init' makes it."),
    Key(_REPOSITORY, "textfile", _directory, "FILE", "none", "The file in which each run leaves what 'blockbak status' "
        "says, for the textfile collector of Prometheus's node exporter."),

    Key(_JOB, "repository", _text, "NAME", "the only one", "The repository, by its name in this file. It may be left "
        "out where there is just one."),
    Key(_JOB, "sources", _sources, "LIST", "", 'What is imaged, each at every run: "vg/lv", "/dev/disk/by-id/...", the '
        'path of an image file, { udev = { ID_SERIAL = "x*" } } for the block devices whose properties in udev all fit '
        "these shell patterns (a disk stands for its partitions, unless DEVTYPE is among them), or "
        '{ lvm_tag = "backup" } for the logical volumes with that tag.'),
    Key(_JOB, "schedule", _calendar, "CALENDAR", "the most frequent kind", "When the job's timer fires. Kinds that "
        "name no time of day are due at the time of day that this one names.", DAILY),
    Key(_JOB, "full", _calendar, "CALENDAR", "never", "When a full is due. Whatever this says, the first point of a "
        "volume is a full.", NEVER),
    Key(_JOB, "differential", _calendar, "CALENDAR", "never", "When a differential is due, where no full is.", NEVER),
    Key(_JOB, "incremental", _calendar, "CALENDAR", "as schedule", "When an incremental is due, where neither of the "
        "two is.", DAILY),
    Key(_JOB, "synthetic", _calendar, "CALENDAR", "never", "When a full is composed of the images that there are, at "
        "the newest point, without reading the source: with incrementals for ever, this keeps chains short.", NEVER),
    Key(_JOB, "random_delay", _duration, "DURATION", "10min", "How much later than its schedule the timer fires at "
        "most, by chance: so that many machines do not begin at one moment.", 600.0),
    Key(_JOB, "deadline", _deadline, "DURATION", "none", "How long a run may take. Then it ends as cleanly as with "
        "Ctrl-C, and has failed."),
    Key(_JOB, "wait", _duration, "DURATION", "10min", "How long a run waits for a volume that another run holds.",
        600.0),
    Key(_JOB, "rpo", _lasting, "DURATION", "none", "How old the newest point of a source may become. Older, and people "
        "are told."),
    Key(_JOB, "rto", _lasting, "DURATION", "none", "How long it may take until the newest point is restored. A drill "
        "that takes longer is spoken of."),
    Key(_JOB, "verify", _calendar, "CALENDAR", "never", "When a share of the job's stored bytes is checked against its "
        "digests, after the run.", NEVER),
    Key(_JOB, "verify_share", _share, "SHARE", "5%", "Which share of them, chosen by chance each time.", 0.05),

    Key(_JOB, "name", _volume_name, "VOLUME", "of host and source", "The volume's name in the repository; only for a "
        "job of one source."),
    Key(_JOB, "mode", _mode, "|".join(_MODES), "auto", "hot: a logical volume, from a snapshot. cold: its users are "
        "brought to rest first. live: as it is. auto: hot for a logical volume in use, cold for what is not in use.",
        "auto"),
    Key(_JOB, "block_size", _block_size, "4K...1M", "64K", "Unit of change detection, for volumes without points."),
    Key(_JOB, "compress", _compress, "none|zstd[:LEVEL]", "zstd", "How new frames are stored.", "zstd"),
    Key(_JOB, "limit", _rate, "SIZE", "none", "Bytes to read a second at most, such as 50M."),
    Key(_JOB, "idle", _flag, "true|false", "true", "Read only when nobody else wants the disk, as far as its scheduler "
        "can.", True),  # noqa: FBT003 - the value of a table's cell
    Key(_JOB, "used_only", _flag, "true|false", "false", "Leave out what file systems do not use, as partclone tells "
        "it.", False),  # noqa: FBT003
    Key(_JOB, "retries", _retries, "NUMBER", "1", "How often a sector that cannot be read is asked for again.", 1),
    Key(_JOB, "strict", _flag, "true|false", "false", "Make no point if a sector cannot be read.", False),  # noqa: FBT003
    Key(_JOB, "snapshot_size", _store, "SIZE|SHARE%", "10%, at least 1G", "Hot: room for what is written to a volume "
        "while it is read."),
    Key(_JOB, "snapshot_limit", _store, "SIZE|SHARE%", "none", "Hot: how far a snapshot that fills is extended."),
    Key(_JOB, "together", _flag, "true|false", "false", "Hot: snapshot all sources at one instant; thick volumes only.",
        False),  # noqa: FBT003
    Key(_JOB, "together_deadline", _together, "DURATION", "10s", "Hot: after this the volumes go on, whatever happens, "
        "and no point is made.", 10.0),
    Key(_JOB, "freeze_with", _words, "LIST", "none", "Hot: hooks that rest applications around the snapshot: whole "
        "paths, or postgresql, mariadb, mysql.", ()),
    Key(_JOB, "freeze_deadline", _deadline, "DURATION", "60s", "Hot: after this the applications go on, whatever "
        "happens, and no point is made.", 60.0),
    Key(_JOB, "holds_repository", _flag, "true|false", "false", "Hot: take a volume although the repository lies on "
        "it.", False),  # noqa: FBT003
    Key(_JOB, "stop", _words, "LIST", "none", "Cold: systemd units that are stopped meanwhile.", ()),
    Key(_JOB, "stop_users", _flag, "true|false", "false", "Cold: stop the units whose processes use the device.",
        False),  # noqa: FBT003
    Key(_JOB, "kill", _flag, "true|false", "false", "Cold: end processes that still use it; nothing starts them "
        "again.", False),  # noqa: FBT003
    Key(_JOB, "freeze", _flag, "true|false", "false", "Cold: freeze a file system that is written and cannot be "
        "unmounted.", False),  # noqa: FBT003
    Key(_JOB, "thaw_after", _deadline, "DURATION", "10min", "Cold: after this what is frozen goes on, whatever "
        "happens, and the image is void.", 600.0),
    Key(_JOB, "deactivate", _flag, "true|false", "false", "Cold: deactivate the volume groups that lie on the device.",
        False),  # noqa: FBT003
    Key(_JOB, "cold_hooks", _words, "LIST", "none", "Cold: programs that are run before anything is stopped, and when "
        "all is back.", ()),

    Key(_RETENTION, "keep_last", _count, "NUMBER", "0", "So many of the newest points.", 0),
    Key(_RETENTION, "keep_hourly", _count, "NUMBER", "0", "The newest point of each of so many hours.", 0),
    Key(_RETENTION, "keep_daily", _count, "NUMBER", "0", "The newest point of each of so many days.", 0),
    Key(_RETENTION, "keep_weekly", _count, "NUMBER", "0", "The newest point of each of so many weeks.", 0),
    Key(_RETENTION, "keep_monthly", _count, "NUMBER", "0", "The newest point of each of so many months.", 0),
    Key(_RETENTION, "keep_yearly", _count, "NUMBER", "0", "The newest point of each of so many years.", 0),
    Key(_RETENTION, "keep_within", _duration, "DURATION", "0s", "Every point that is not older than this.", 0.0),
    Key(_RETENTION, "keep_verified", _count, "NUMBER", "0", "At least so many points that were verified as a whole, "
        "or drilled, whatever else is said here. A share of their bytes does not count.", 0),
    Key(_RETENTION, "full_every", _duration, "DURATION", "90d", "How often a full is to be one of its own, which "
        "shares no blocks of the disk with others; 0s: never.", 90 * 86400.0),

    Key(_DRILL, "schedule", _calendar, "CALENDAR", "monthly", "When a drill is due; it follows the next run.",
        parse_calendar("monthly")),
    Key(_DRILL, "check", _argv, "LIST", "none", "The job's own check: a program by its whole path, and its arguments. "
        "It finds the restored file system by BLOCKBAK_MOUNT in its environment, and must end with 0.", ()),
    Key(_DRILL, "checker", _flag, "true|false", "true", "Run the file systems' own checkers.", True),  # noqa: FBT003
    Key(_DRILL, "boot", _flag, "true|false", "false", "Boot what was restored, in an emulated machine.", False),  # noqa: FBT003
    Key(_DRILL, "boot_pattern", _text, "PATTERN", "login:", "The regular expression that the serial console must show.",
        "login:"),
    Key(_DRILL, "boot_deadline", _deadline, "DURATION", "10min", "How long it may take until it does.", 600.0),
    Key(_DRILL, "target", _source, "DEVICE", "a sparse file", "The device or logical volume to restore to. All that it "
        "holds is overwritten."),

    Key(_NOTIFY, "command", _argv, "LIST", "none", "A program by its whole path, and its arguments. It is told in its "
        "environment and, as JSON, on standard input. Root must own it, and nobody else may write it.", ()),
    Key(_NOTIFY, "urls", _urls, "LIST", "none", "Addresses as apprise takes them: mail, webhooks, chats. They need the "
        "extra blockbak[notify]. Their secrets are not shown by 'config show'; keep this file to root.", (),
        secret=True),
    Key(_NOTIFY, "on", _events, "LIST", "all", "Of what: failure (a run failed, each time), recovery (the first good "
        "run after it), missed-rpo (a source has no point that is new enough; once a day).", EVENTS),
)  # fmt: skip

_BY_SECTION: dict[tuple[str, ...], dict[str, Key]] = {
    section: {key.name: key for key in KEYS if key.section == section} for section in SECTIONS
}
_LISTS = (_words, _argv, _urls, _events, _sources)
_REST = ("stop", "stop_users", "kill", "freeze", "deactivate", "cold_hooks", "thaw_after")
_HOT = (
    "snapshot_size", "snapshot_limit", "together", "together_deadline", "freeze_with", "freeze_deadline",
    "holds_repository",
)  # fmt: skip
_COUNTS = ("keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly")


# --- reading it ------------------------------------------------------------------------------------------------------


class Unusable(ValueError):
    """A text that is no usable configuration; ``problems`` are all that is wrong with it, in the order of lines."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = sorted(problems, key=lambda one: one.line)
        super().__init__("; ".join(map(str, self.problems)))


def parse(text: str) -> Config:
    """The configuration that ``text`` is. Raises Unusable, with everything that is wrong with it."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Unusable([_not_toml(str(error), text)]) from error
    except RecursionError as error:
        raise Unusable([Problem(1, "", "this is not TOML that can be read: it is nested too deeply")]) from error
    return _Reader(document, tomlscan.lines(text)).config()


def _not_toml(message: str, text: str) -> Problem:
    found = _POSITION.search(message)
    line = int(found["line"]) if found and found["line"] else len(text.splitlines()) or 1
    reason = _POSITION.sub("", message)
    return Problem(line, "", f"this is not TOML: {reason[:1].lower()}{reason[1:]}")


@dataclass(slots=True)
class _Values:
    """What a table holds: the values of its keys, defaults filled in, and which of them it names. Only of one that is
    ``sound`` it makes sense to ask whether its values go together.
    """

    path: tuple[str, ...]
    of: dict[str, Any]
    named: frozenset[str]
    sound: bool

    def __getitem__(self, name: str) -> Any:
        return self.of[name]


class _Reader:
    """Goes through a document once and gathers all that is wrong with it."""

    def __init__(self, document: dict[str, Any], lines: Mapping[Path, int]) -> None:
        self._document, self._lines = document, lines
        self._problems: list[Problem] = []
        self._settings: list[Setting] = []

    def config(self) -> Config:
        """What it says. Raises Unusable."""
        top = self._table((), (), self._document, ("repositories", "jobs", "notify"))
        repositories = {
            name: Place(name, values["path"], values["textfile"] or "")
            for name, values in self._named("repositories", ())
            if values["path"]
        }
        if not self._of(self._document.get("repositories")):
            self._problem(("repositories",), "names no repository")
        jobs = {}
        for name, values in self._named("jobs", ("retention", "drill")):
            if (job := self._job(name, values)) is not None:
                jobs[name] = job
        notify = self._table(_NOTIFY, ("notify",), self._under((), "notify") or {}, ())
        if self._problems:
            raise Unusable(self._problems)
        told = Notify(notify["command"], notify["urls"], notify["on"])
        return Config(repositories, jobs, told, top["timezone"], tuple(self._settings), self._lines)

    # --- tables ------------------------------------------------------------------------------------------

    def _line(self, path: Path) -> int:
        """Of a key, or of the nearest above it that is there."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _problem(self, path: tuple[str, ...], reason: str) -> None:
        self._problems.append(Problem(self._line(path), ".".join(path), reason))

    def _of(self, raw: object) -> dict[str, Any]:
        return raw if isinstance(raw, dict) else {}

    def _under(self, path: tuple[str, ...], name: str) -> dict[str, Any] | None:
        """The table of that name in the table at ``path``; None where there is none."""
        table: Any = self._document
        for part in path:
            table = self._of(table.get(part))
        raw = table.get(name)
        if raw is not None and not isinstance(raw, dict):
            self._problem((*path, name), f"is a table, not {_called(raw)}")
            return None
        return raw

    def _named(self, kind: str, tables: Sequence[str]) -> Iterator[tuple[str, _Values]]:
        """The tables that people have named, of one kind."""
        for name, raw in (self._under((), kind) or {}).items():
            path = (kind, name)
            if not isinstance(raw, dict):
                self._problem(path, f"is a table [{kind}.NAME], not {_called(raw)}")
            elif not _NAME.fullmatch(name):
                self._problem(path, f"{name!r} is no name here: it takes {_NAME_RULE}")
            else:
                yield name, self._table((kind, "*"), path, raw, tables)

    def _table(
        self, section: tuple[str, ...], path: tuple[str, ...], raw: Mapping[str, Any], tables: Sequence[str]
    ) -> _Values:
        """The values of one table. What is wrong is noted, and its default stands for it meanwhile."""
        keys, before = _BY_SECTION[section], len(self._problems)
        for name in raw:
            if name not in keys and name not in tables:
                self._problem((*path, name), f"there is no such key{_meant(name, [*keys, *tables])}")
        values = {}
        for name, key in keys.items():
            values[name] = key.value
            if name in raw:
                values[name] = self._read(key, (*path, name), raw[name])
            elif not key.default:
                self._problem((*path, name), "must be there")
            shown = _shown(raw[name], secret=key.secret) if name in raw else key.default
            line = self._lines.get((*path, name)) if name in raw else None
            self._settings.append(Setting(".".join((*path, name)), shown, line))
        return _Values(path, values, frozenset(raw), len(self._problems) == before)

    def _read(self, key: Key, path: tuple[str, ...], raw: object) -> Any:
        wrong = []
        for number, one in enumerate(raw) if isinstance(raw, list) and key.read in _LISTS else ():
            read = _words if key.read is _argv and number else key.read
            try:
                read([one])
            except ValueError as error:
                wrong.append(Problem(self._line((*path, number)), ".".join(path), str(error)))
        if wrong:
            # Of a list that is wrong, the elements that are.
            self._problems += wrong
            return key.value
        try:
            return key.read(raw)
        except ValueError as error:
            self._problem(path, str(error))
            return key.value

    # --- jobs ---------------------------------------------------------------------------------------------

    def _job(self, name: str, values: _Values) -> Job | None:
        before = len(self._problems)
        path = values.path
        repository = self._repository(values)
        retention, drill = self._retention(path), self._drill(path)
        if not values.sound:
            return None
        kinds, schedule = self._kinds(values)
        self._check_modes(values)
        if values["name"] is not None and (len(values["sources"]) > 1 or self._selects(values)):
            self._problem((*path, "name"), "names one volume, so it takes a job of one source")
        if values["rpo"] is not None and schedule.often > values["rpo"] and not schedule.never:
            self._problem((*path, "rpo"), f"is shorter than the time between two runs ({schedule})")
        if len(self._problems) > before or repository is None:
            return None
        return Job(
            name, repository, values["sources"], values["mode"], schedule, kinds, values["random_delay"],
            values["deadline"], values["wait"], values["rpo"], values["rto"], _reading(values), _rest(values),
            values["verify"].at_time_of(schedule), values["verify_share"], retention, drill,
        )  # fmt: skip

    def _selects(self, values: _Values) -> bool:
        return any(isinstance(source, Selector) for source in values["sources"])

    def _repository(self, values: _Values) -> str | None:
        known = self._of(self._document.get("repositories"))
        name: str | None = values["repository"]
        if name is None and "repository" not in values.named:
            if len(known) == 1:
                return next(iter(known))
            if known:
                self._problem((*values.path, "repository"), "must be there: there are several")
        elif name is not None and name not in known:
            self._problem((*values.path, "repository"), f"there is no repository {name!r}{_meant(name, list(known))}")
        return name

    def _kinds(self, values: _Values) -> tuple[Kinds, Calendar]:
        """The calendars of a job, and when its timer fires: as often as the most frequent of them, or as it is said."""
        given = [values[name] for name in ("full", "differential", "incremental") if name in values.named]
        schedule: Calendar = values["schedule"]
        if "schedule" not in values.named and given:
            schedule = min(given, key=lambda one: one.often)
        incremental: Calendar = values["incremental"] if "incremental" in values.named else schedule
        kinds = Kinds(
            values["full"].at_time_of(schedule), values["differential"].at_time_of(schedule),
            incremental.at_time_of(schedule), values["synthetic"].at_time_of(schedule),
        )  # fmt: skip
        if all(one.never for one in (kinds.full, kinds.differential, kinds.incremental)):
            self._problem(values.path, "no kind is ever due")
        for name in ("full", "differential", "incremental", "synthetic"):
            if name in values.named and values[name].often < schedule.often and not schedule.never:
                self._problem((*values.path, name), f"is due more often than the job runs ({schedule})")
        return kinds, schedule

    def _check_modes(self, values: _Values) -> None:
        mode = values["mode"]
        for name in sorted(values.named.intersection(_REST)):
            if mode != "cold":
                self._problem((*values.path, name), f'belongs to mode = "cold", and the mode is {mode}')
        for name in sorted(values.named.intersection(_HOT)):
            if mode in ("cold", "live"):
                self._problem((*values.path, name), f"belongs to snapshots, and the mode {mode} takes none")
        if "verify_share" in values.named and "verify" not in values.named:
            self._problem((*values.path, "verify_share"), "belongs to verify, which is not there")
        if "together_deadline" in values.named and not values["together"]:
            self._problem((*values.path, "together_deadline"), "belongs to together = true, which is not there")

    def _retention(self, job: tuple[str, ...]) -> Policy | None:
        path = (*job, "retention")
        raw = self._under(job, "retention")
        if raw is None:
            return None
        values = self._table(_RETENTION, path, raw, ())
        if values.sound and not any(values[name] for name in _COUNTS) and not values["keep_within"]:
            self._problem(path, "keeps nothing: give at least one keep_last, keep_hourly ... keep_within")
        return Policy(
            last=values["keep_last"], hourly=values["keep_hourly"], daily=values["keep_daily"],
            weekly=values["keep_weekly"], monthly=values["keep_monthly"], yearly=values["keep_yearly"],
            within=values["keep_within"], verified=values["keep_verified"], full_every=values["full_every"],
        )  # fmt: skip

    def _drill(self, job: tuple[str, ...]) -> Drill | None:
        path = (*job, "drill")
        raw = self._under(job, "drill")
        if raw is None:
            return None
        values = self._table(_DRILL, path, raw, ())
        for name in ("boot_pattern", "boot_deadline"):
            if name in values.named and not values["boot"]:
                self._problem((*path, name), "belongs to boot = true, which is not there")
        try:
            re.compile(values["boot_pattern"])
        except re.error as error:
            self._problem((*path, "boot_pattern"), f"is no regular expression: {error}")
        return Drill(
            values["schedule"], values["check"], values["checker"], values["boot"], values["boot_pattern"],
            values["boot_deadline"], values["target"] or "",
        )  # fmt: skip


def _reading(values: _Values) -> Reading:
    return Reading(
        name=values["name"], block_bytes=values["block_size"], compress=values["compress"],
        snapshot_size=values["snapshot_size"], snapshot_limit=values["snapshot_limit"], together=values["together"],
        together_seconds=values["together_deadline"], freeze_with=values["freeze_with"],
        freeze_seconds=values["freeze_deadline"], limit=values["limit"], idle=values["idle"],
        used_only=values["used_only"], retries=values["retries"], strict=values["strict"],
        own_repository=values["holds_repository"],
    )  # fmt: skip


def _rest(values: _Values) -> RestOptions:
    return RestOptions(
        stop=values["stop"], stop_users=values["stop_users"], kill=values["kill"], freeze=values["freeze"],
        deactivate=values["deactivate"], hooks=values["cold_hooks"], deadline=values["thaw_after"],
    )  # fmt: skip


def _shown(raw: object, *, secret: bool) -> str:
    """A value as TOML has it. Of a secret address only what kind it is."""
    if isinstance(raw, bool):
        return "true" if raw else "false"
    if isinstance(raw, str):
        text = f"{raw.partition('://')[0]}://..." if secret else raw
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(char if char.isprintable() else f"\\U{ord(char):08x}" for char in escaped) + '"'
    if isinstance(raw, list):
        return "[" + ", ".join(_shown(one, secret=secret) for one in raw) + "]"
    if isinstance(raw, dict):
        return "{ " + ", ".join(f"{_bare(name)} = {_shown(one, secret=secret)}" for name, one in raw.items()) + " }"
    return str(raw)


def _bare(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _shown(name, secret=False)
