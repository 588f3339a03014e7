"""The systemd units and cron lines that start jobs: their names and their text."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from blockbak.model.config import Config, Job

MARK = "# Written by 'blockbak timers install'; removed by 'blockbak timers remove'."
"""The first line of every unit of ours. What does not begin with it is somebody else's."""
PREFIX = "blockbak-job-"
BOOT = "blockbak-boot.service"
FAILED = "blockbak-failed@.service"
GRACE_SECONDS = 900
"""Beyond a job's own deadline, before systemd ends it: for what a run puts back, and for one that hangs where it does
not see its deadline.
"""
_STOP_SECONDS = 300
_NOT_NEEDED = (
    "CAP_AUDIT_CONTROL CAP_BPF CAP_MAC_ADMIN CAP_MAC_OVERRIDE CAP_NET_ADMIN CAP_NET_RAW CAP_SYSLOG CAP_SYS_BOOT "
    "CAP_SYS_PACCT CAP_SYS_TIME CAP_WAKE_ALARM"
)
_NO_NAMESPACE = frozenset({"cold", "auto"})
"""Modes that need the machine's own mounts: what is unmounted in a namespace of one's own stays mounted elsewhere, and
such a namespace would keep busy what another job brings to rest.
"""


@dataclass(frozen=True, slots=True)
class Call:
    """How blockbak is started: the words before its verb, and what its environment needs."""

    program: tuple[str, ...]
    config: str
    state_dir: str
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: its file's name, its text, and which target or timer list wants it; "" where something else starts it."""

    name: str
    text: str
    wanted_by: str = ""


def timer_name(job: str) -> str:
    """The unit that wakes a job."""
    return f"{PREFIX}{job}.timer"


def service_name(job: str) -> str:
    """The unit that runs a job."""
    return f"{PREFIX}{job}.service"


def units(config: Config, call: Call, jobs: Sequence[str]) -> list[Unit]:
    """Every unit of these jobs, and what all of them need."""
    made = []
    for name in jobs:
        job = config.jobs[name]
        made.append(Unit(service_name(name), _service(job, config, call)))
        if not job.schedule.never:
            made.append(Unit(timer_name(name), _timer(job, config), "timers.target"))
    made.append(Unit(FAILED, _failed(call)))
    made.append(Unit(BOOT, _boot(call), "multi-user.target"))
    return made


def _text(*lines: str) -> str:
    return "\n".join([MARK, *lines, ""])


def _timer(job: Job, config: Config) -> str:
    return _text(
        "[Unit]",
        f"Description=When blockbak runs job {job.name} ({job.schedule})",
        "",
        "[Timer]",
        *(f"OnCalendar={moment}" for moment in job.schedule.on_calendar(config.timezone)),
        "# What was missed while the machine was off is made up for.",
        "Persistent=true",
        f"RandomizedDelaySec={job.random_delay:g}",
        "AccuracySec=1min",
        "",
        "[Install]",
        "WantedBy=timers.target",
    )


def _service(job: Job, config: Config, call: Call) -> str:
    return _text(
        "[Unit]",
        f"Description=blockbak job {job.name}",
        "Documentation=man:blockbak-run(8) man:blockbak.toml(5)",
        "After=local-fs.target remote-fs.target network-online.target blockbak-boot.service",
        "Wants=network-online.target",
        f"OnFailure={FAILED.replace('@', f'@{job.name}')}",
        "",
        "[Service]",
        "Type=oneshot",
        *_environment(call),
        f"ExecStart={_command(call, 'run', job.name)}",
        "# The log has the answers as well, with what they are about.",
        "StandardOutput=null",
        "# Else it would go where the answers go.",
        "StandardError=journal",
        "# 3: there is a point, and something to look at; people were told.",
        "SuccessExitStatus=3",
        "Nice=10",
        "IOSchedulingClass=idle",
        "CPUSchedulingPolicy=batch",
        f"TimeoutStartSec={'infinity' if job.deadline is None else f'{job.deadline + GRACE_SECONDS:g}'}",
        f"TimeoutStopSec={_STOP_SECONDS}",
        "# The guardian lets go of what is held, whatever becomes of blockbak, so it must outlive it.",
        "KillMode=process",
        *_sandbox(job, config, call),
    )


def _sandbox(job: Job, config: Config, call: Call) -> list[str]:
    """As far as whole disks, LVM, device-mapper and hooks allow."""
    lines = [
        "UMask=0077",
        "DevicePolicy=closed",
        "DeviceAllow=block-* rwm",
        "# device-mapper, loop devices, FUSE.",
        "DeviceAllow=char-misc rwm",
        f"CapabilityBoundingSet=~{_NOT_NEEDED}",
        "# Not NoNewPrivileges: sudo in a hook would refuse to run.",
        "LockPersonality=yes",
        "RestrictAddressFamilies=AF_UNIX AF_NETLINK AF_INET AF_INET6",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "SystemCallArchitectures=native",
    ]
    if job.mode in _NO_NAMESPACE:
        return [
            *lines,
            f"# Mode {job.mode} needs the machine's own mounts: no mount namespace.",
        ]
    places = sorted({config.path_of(job), call.state_dir})
    return [
        *lines,
        "# /etc stays writable: LVM archives there.",
        "ProtectSystem=yes",
        "ProtectHome=read-only",
        *(f"ReadWritePaths=-{_word(place)}" for place in places),
    ]


def _failed(call: Call) -> str:
    return _text(
        "[Unit]",
        "Description=Tell people that blockbak job %i failed, if it could not do so itself",
        "",
        "[Service]",
        "Type=oneshot",
        *_environment(call),
        # The instance is the job's name: it holds nothing that would have to be escaped.
        f"ExecStart={_command(call, 'timers', 'failed')} %i",
        "TimeoutStartSec=300",
    )


def _boot(call: Call) -> str:
    """Started as soon as its process is: units that it starts in turn, and that come after a target which wants it,
    would else wait for it while it waits for them.
    """
    return _text(
        "[Unit]",
        "Description=Put right what a crash of blockbak left on this machine",
        "Documentation=man:blockbak-recover(8)",
        "After=local-fs.target remote-fs.target swap.target",
        "",
        "[Service]",
        "Type=exec",
        *_environment(call),
        f"ExecStart={_words((*call.program, 'recover', '--machine'))}",
        "KillMode=process",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )


def _environment(call: Call) -> list[str]:
    return [f"Environment={_word(f'{name}={value}')}" for name, value in call.environment]


def _command(call: Call, verb: str, *words: str) -> str:
    return _words((*call.program, verb, "--config", call.config, *words))


def _words(words: Sequence[str]) -> str:
    """A command line: in it a dollar sign stands for a variable, but not in the program (systemd.service(5))."""
    program, *others = map(_word, words)
    return " ".join([program, *(word.replace("$", "$$") for word in others)])


def _word(text: str) -> str:
    """A word of a unit file, in quotes where it needs them, with what stands for something else in there
    (systemd.syntax(7)).
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if escaped and all(char.isalnum() or char in "/._-=:@" for char in escaped) else f'"{escaped}"'


# --- without systemd ------------------------------------------------------------------------------------------------


def crontab(config: Config, call: Call, jobs: Sequence[str], *, same_zone: bool) -> list[str]:
    """Lines for /etc/cron.d, a comment before each job. What fires too often finds that nothing is due. ``same_zone``
    says that calendars are in the zone in which cron reads its lines, the machine's.
    """
    lines = ["# Made by 'blockbak timers install --cron', for a file in /etc/cron.d."]
    lines += [f"{name}={value}" for name, value in call.environment]
    run = shlex.join(["nice", "-n", "10", *call.program])
    for name in jobs:
        job = config.jobs[name]
        lines.append(f"# {name}: {job.schedule}")
        words = f"{run} run --config {shlex.quote(call.config)} {shlex.quote(name)}"
        # cron takes a percent sign for the end of a line.
        lines += [f"{fields} root {words}".replace("%", "\\%") for fields in job.schedule.crontab(same_zone=same_zone)]
    recover = shlex.join([*call.program, "recover", "--machine"])
    lines.append(f"@reboot root {recover}".replace("%", "\\%"))
    return lines


def is_ours(name: str) -> bool:
    """Whether a unit file of this name may be one of ours; its first line tells."""
    own = name.startswith(PREFIX) and os.path.splitext(name)[1] in (".service", ".timer")
    return own or name in (BOOT, FAILED)
