"""Health as monitoring systems read it: Prometheus's text format (version 0.0.4), and a Nagios plugin's lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from blockbak.model.health import Health, Reason, Room, duration
from blockbak.model.identity import plain
from blockbak.units import format_size

NAGIOS_OK, NAGIOS_WARNING, NAGIOS_CRITICAL, NAGIOS_UNKNOWN = 0, 1, 2, 3
"""Monitoring Plugins' guidelines: the exit status of a plugin."""
_WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric, all of them gauges: its name, what it is, and its samples by their labels."""

    name: str
    about: str
    samples: tuple[tuple[Labels, float], ...]


def _escaped(text: str) -> str:
    return plain(text).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def text(families: Iterable[Family]) -> str:
    """The exposition of metrics; those without a sample are left out."""
    lines = []
    for one in families:
        if not one.samples:
            continue
        about = plain(one.about).replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {one.name} {about}", f"# TYPE {one.name} gauge"]
        for labels, value in one.samples:
            named = ",".join(f'{name}="{_escaped(word)}"' for name, word in labels)
            lines.append(f"{one.name}{{{named}}} {value!r}" if named else f"{one.name} {value!r}")
    return "".join(f"{line}\n" for line in lines)


def families(repository: str, room: Room, volumes: Sequence[Health], now: datetime) -> Iterator[Family]:
    """All that is known of a repository and its volumes."""
    place: Labels = (("repository", repository),)

    def one(name: str, about: str, value: float | None) -> Family:
        return Family(f"blockbak_{name}", about, () if value is None else ((place, float(value)),))

    yield one("status_timestamp_seconds", "When this was found out.", now.timestamp())
    yield one("repository_free_bytes", "Room left on the repository's file system.", room.free_bytes)
    yield one("repository_size_bytes", "All of the repository's file system.", room.total_bytes)
    yield one("repository_growth_bytes_per_second", "How fast the repository grew lately.", room.growth)
    full = room.full_at.timestamp() if room.full_at is not None else None
    yield one("repository_full_timestamp_seconds", "When the room will be used up at that rate.", full)
    yield one("repository_leftovers", "What killed runs left on the machine.", len(room.leftovers))
    yield one("repository_ok", "Whether nothing of the repository itself needs a person.", room.ok)

    def each(name: str, about: str, values: Iterable[float | None]) -> Family:
        samples = tuple(
            ((*place, ("volume", health.volume), ("job", health.job)), float(value))
            for health, value in zip(volumes, values, strict=True)
            if value is not None
        )
        return Family(f"blockbak_{name}", about, samples)

    yield each("volume_ok", "Whether nothing of the volume needs a person.", (one.ok for one in volumes))
    yield each("points", "Restore points.", (one.points for one in volumes))
    yield each("stored_bytes", "Bytes of all images.", (one.stored_bytes for one in volumes))
    newest = (_seconds(one.newest_at) for one in volumes)
    yield each("newest_point_timestamp_seconds", "When the newest good point was made.", newest)
    yield each("chain_images", "Images that restore the newest good point.", (one.chain_images for one in volumes))
    yield each("rpo_seconds", "How old it may be.", (one.goals.rpo for one in volumes))
    yield each("rpo_met", "Whether it is not older.", (one.rpo_met for one in volumes))
    drills = [one.drilled for one in volumes]
    at = (_seconds(one.at) if one else None for one in drills)
    yield each("last_drill_timestamp_seconds", "When the volume was last drilled.", at)
    yield each("last_drill_ok", "Whether that went well.", (one.ok if one else None for one in drills))
    yield each("last_drill_seconds", "How long that took.", (one.rto_seconds if one else None for one in drills))
    yield each("rto_seconds", "How long it may take.", (one.goals.rto for one in volumes))
    yield each(
        "verified_ratio", "Share of the stored bytes that was verified.", (one.verified_share for one in volumes)
    )
    verified = (_seconds(one.verified_at) for one in volumes)
    yield each("last_verify_timestamp_seconds", "When any of them last was.", verified)
    yield each("leftovers", "Files that runs left which did not end.", (len(one.leftovers) for one in volumes))
    reasons = tuple(
        ((*place, ("volume", volume), ("reason", one.name), ("level", one.level)), 1.0)
        for volume, one in _each_reason(room, volumes)
    )
    yield Family("blockbak_reason", "Each thing that needs a person.", reasons)


def _seconds(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment is not None else None


def _each_reason(room: Room, volumes: Sequence[Health]) -> Iterator[tuple[str, Reason]]:
    """Volume (empty: the repository itself) and reason, each pair once by its name."""
    known = set()
    for volume, reasons in [("", room.reasons), *((one.volume, one.reasons) for one in volumes)]:
        for reason in reasons:
            if (volume, reason.name) not in known:
                known.add((volume, reason.name))
                yield volume, reason


# --- Nagios --------------------------------------------------------------------------------------------------


def nagios(room: Room, volumes: Sequence[Health]) -> tuple[int, str]:
    """Exit status and output of a plugin: a line, what it measured, and a line for each further reason."""
    found = [(volume, reason) for volume, reason in _all_reasons(room, volumes)]
    levels = {reason.level for _, reason in found}
    status = NAGIOS_CRITICAL if "critical" in levels else NAGIOS_WARNING if found else NAGIOS_OK
    found.sort(key=lambda one: one[1].level != "critical")
    told = [f"{volume}: {reason.text}" if volume else reason.text for volume, reason in found]
    head = told[0] if told else _all_well(room, volumes)
    measured = " ".join(_measured(room, volumes))
    return status, "\n".join([_line(f"BLOCKBAK {_WORDS[status]} - {head}") + f" | {measured}", *map(_line, told[1:])])


def unknown(message: str) -> str:
    """What a plugin says that could not find out."""
    return _line(f"BLOCKBAK UNKNOWN - {message}")


def _all_reasons(room: Room, volumes: Sequence[Health]) -> Iterator[tuple[str, Reason]]:
    for volume, reasons in [("", room.reasons), *((one.volume, one.reasons) for one in volumes)]:
        for reason in reasons:
            yield volume, reason


def _line(text: str) -> str:
    """What follows a bar would be taken for a measure."""
    return " ".join(plain(text).replace("|", "/").split())


def _all_well(room: Room, volumes: Sequence[Health]) -> str:
    ages = [one.age_seconds for one in volumes if one.age_seconds is not None]
    oldest = f", the newest point of each at most {duration(max(ages))} old" if ages else ""
    count = "1 volume" if len(volumes) == 1 else f"{len(volumes)} volumes"
    return f"{count}{oldest}, {format_size(room.free_bytes)} free"


def _measured(room: Room, volumes: Sequence[Health]) -> Iterator[str]:
    yield f"free={room.free_bytes}B;;;0;{room.total_bytes}"
    for one in volumes:
        if one.age_seconds is not None:
            limit = f"{one.goals.rpo:.0f}" if one.goals.rpo is not None else ""
            yield f"'{one.volume} age'={one.age_seconds:.0f}s;;{limit};0"
        if one.drilled is not None:
            limit = f"{one.goals.rto:.0f}" if one.goals.rto is not None else ""
            yield f"'{one.volume} drill'={one.drilled.rto_seconds:.3f}s;;{limit};0"
