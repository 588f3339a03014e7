"""Cold images: a disk with all that can be on one is brought to rest, imaged, and everything is as it was before."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockbak.host import bootunit
from tests.conftest import Loop
from tests.vm.cluster import NEW, PROGRAMS, by_server
from tests.vm.conftest import LIMIT_SECONDS, MIB, Blockbak, run
from tests.vm.hot import killed, noise, start, write
from tests.volumes import difference, fingerprint

UNITS = Path("/run/systemd/system")
SERVICE = "blockbaktest-db.service"
COLD = ("backup", "--mode", "cold", "--json")
BLOCK = 64 * 1024


# --- what a machine is like ---------------------------------------------------------------------------------


def state(place: Path) -> dict[str, object]:
    """Mounts with their options, swap with its priorities, the tests' units, active volumes, loop devices."""
    mounts = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        _, _, number, root, target, options, *tags = fields.split()
        if target.startswith(str(place)):
            kinds = sorted(tag.partition(":")[0] for tag in tags)
            mounts.append((target, number, root, *rest.split()[:2], set(options.split(",")),
                           set(rest.split()[2].split(",")), kinds))  # fmt: skip
    units = run("systemctl", "list-units", "--plain", "--no-legend", "--state=active", "blockbaktest-*")
    return {
        # Which of them was made first is nobody's affair.
        "mounts": sorted(mounts, key=lambda one: one[0]),
        "swaps": [" ".join(line.split()[::4]) for line in Path("/proc/swaps").read_text().splitlines()[1:]],
        "units": sorted(line.split()[0] for line in units.splitlines()),
        "volumes": sorted(path.read_text() for path in Path("/sys/block").glob("dm-*/dm/name")),
        "loops": sorted(
            (path.parts[3], *(path.joinpath(what).read_text() for what in ("loop/backing_file", "loop/offset", "ro")))
            for path in Path("/sys/block").glob("loop*")
            if (path / "loop").exists()
        ),
    }


def reads(pid: int, path: str) -> bool:
    """Whether a process has the device open past the page cache, as a source is read."""
    wanted = os.stat(path).st_rdev
    try:
        for entry in os.listdir(f"/proc/{pid}/fd"):
            flags = Path(f"/proc/{pid}/fdinfo/{entry}").read_text().partition("flags:")[2].split()[0]
            if os.stat(f"/proc/{pid}/fd/{entry}").st_rdev == wanted and int(flags, 8) & os.O_DIRECT:
                return True
    except (OSError, IndexError):
        pass
    return False


@contextmanager
def unit(name: str, text: str) -> Iterator[str]:
    """A unit that runs, stopped and gone afterwards."""
    path = UNITS / name
    path.write_text(text)
    try:
        # It was not there before, so nobody needs to be told that it changed.
        run("systemctl", "start", name)
        yield name
    finally:
        subprocess.run(["systemctl", "stop", name], check=False)
        path.unlink()
        run("systemctl", "daemon-reload")
        subprocess.run(["systemctl", "reset-failed", name], check=False, stderr=subprocess.DEVNULL)


@contextmanager
def sitting(where: Path, code: str = "pass", prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process whose working directory is ``where``."""
    text = f"import os, sys; {code}; print('ready', flush=True); sys.stdin.read()"
    argv = [*prefix, sys.executable, "-c", text]
    with subprocess.Popen(
        argv, cwd=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.communicate("") if process.poll() is None else process.wait()


@dataclass(frozen=True)
class Stage:
    """A disk with partitions, mounted below ``place``."""

    place: Path
    disk: Loop
    group: str

    def node(self, number: int) -> str:
        return f"{self.disk.path}p{number}"

    def start_of(self, number: int) -> int:
        return int(Path(f"/sys/class/block/{Path(self.node(number)).name}/start").read_text()) * 512


@pytest.fixture
def stage(loop: Callable[..., Loop]) -> Iterator[Callable[..., Stage]]:
    """``stage(parts, sector=512)``: a GPT disk; each part is what it holds and its MiB. The last takes the rest."""
    with ExitStack() as undo:
        place = Path(tempfile.mkdtemp(prefix="blockbak-", dir="/var/tmp"))
        undo.callback(shutil.rmtree, place)

        def make(parts: list[tuple[str, int]], sector: int = 512) -> Stage:
            disk = loop((sum(size for _, size in parts) + 4) * MIB, sector_size=sector)
            words = [word for number, (_, size) in enumerate(parts, 1) for word in ("-n", f"{number}:0:+{size}M")]
            run("sgdisk", *words, disk)
            run("partx", "--add", disk)
            undo.callback(run, "partx", "--delete", disk)
            made = Stage(place, disk, f"bbcold{os.getpid():x}")
            for number, (what, _) in enumerate(parts, 1):
                node = made.node(number)
                if what == "ext4":
                    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", node)
                elif what == "xfs":
                    # Of less than 300 MiB, which is as good for this.
                    run("mkfs.xfs", "-q", "-f", "--unsupported", node)
                elif what == "swap":
                    run("mkswap", node)
                elif what == "lvm":
                    run("vgcreate", "--quiet", "--yes", made.group, node)
                    undo.callback(run, "vgremove", "--force", "--yes", made.group)
            return made

        def mounted(what: str, where: Path, *options: str) -> Path:
            where.mkdir(exist_ok=True)
            run("mount", *options, what, where)
            undo.callback(run, "umount", where)
            return where

        def swapping(node: str, priority: int) -> None:
            run("swapon", "-p", priority, node)
            undo.callback(run, "swapoff", node)

        make.mounted, make.swapping = mounted, swapping  # type: ignore[attr-defined]
        yield make


def done_in(error: dict[str, object]) -> str:
    return f"{error['message']} {error['notes']}"


# --- all of it at once --------------------------------------------------------------------------------------


def test_a_disk_with_everything_on_it(stage, loop, repository, run_blockbak):
    made = stage([("ext4", 8), ("xfs", 64), ("swap", 8), ("lvm", 80)])
    run("lvcreate", "--quiet", "--yes", "-n", "db", "-L", "64M", made.group)
    run("lvcreate", "--quiet", "--yes", "-n", "spare", "-L", "8M", made.group)
    run("mkfs.ext4", "-q", "-F", f"/dev/{made.group}/db")
    plain = stage.mounted(made.node(1), made.place / "a", "-o", "noatime,nodev")
    (plain / "sub").mkdir()
    bound = stage.mounted(str(plain / "sub"), made.place / "b", "--bind")
    shelf = stage.mounted(made.node(2), made.place / "x", "-o", "noexec")
    (shelf / "file").write_bytes(noise(1, MIB))
    stage.swapping(made.node(3), 7)
    data = stage.mounted(f"/dev/{made.group}/db", made.place / "db")
    cluster = data / "cluster"
    shutil.chown(data, "postgres", "postgres")
    shutil.chown(made.place, "postgres", "postgres")
    made.place.chmod(0o755)
    run("cp", "--archive", NEW, cluster)
    text = (
        f"[Service]\nType=notify\nUser=postgres\nTimeoutSec={LIMIT_SECONDS}\n"
        f"ExecStart={PROGRAMS}/postgres -D {cluster} -k {made.place} -c listen_addresses=\n"
    )
    with unit(SERVICE, text), sitting(shelf) as shell:

        def ask(sql: str) -> str:
            return by_server(PROGRAMS / "psql", "-h", made.place, "-XAtq", "-d", "postgres", "-c", sql).strip()

        ask("CREATE TABLE kept AS SELECT 42 AS answer")
        before = state(made.place)
        (planned,) = run_blockbak.json(*COLD, "--stop-users", "--dry-run", made.disk)["points"]
        told = "\n".join(planned["notes"])
        order = [f"stop {SERVICE}", f"swapoff {made.node(3)}", f"unmount {data}", f"unmount {bound}",
                 f"unmount {plain}", f"remount {shelf} read-only"]  # fmt: skip
        at = [told.index(step) for step in order]
        assert at == sorted(at), told
        assert f"stays: {shelf} (read-only)" in told
        assert state(made.place) == before
        # Without leave to stop its server there is no image, and the plan says what is in the way.
        refused = run_blockbak(*COLD, made.disk, expect=5).document["errors"][0]
        assert refused["name"] == "CannotRest"
        assert SERVICE in done_in(refused)
        assert state(made.place) == before

        with start(run_blockbak, *COLD, "--stop-users", made.disk) as running:
            running.until("it reads the disk", lambda: reads(running.pid, made.disk.path)).pause()
            held = fingerprint(made.disk.path)
            assert run("systemctl", "is-active", SERVICE, expect=3) == "inactive"
            assert [one[0] for one in state(made.place)["mounts"]] == [str(shelf)]
            assert state(made.place)["swaps"] == [one for one in before["swaps"] if made.disk.path not in one]
            running.go_on()
            ended = running.end()
        assert ended.status == 0, str(ended)
        (point,) = ended.document["points"]
        assert (point["consistency"], point["mode"]) == ("cold", "cold")
        assert state(made.place) == before
        assert shell.poll() is None
        assert ask("SELECT answer FROM kept") == "42"

    target = loop(made.disk.size)
    run_blockbak("restore", point["point"], target, "--yes")
    assert difference(fingerprint(target.path), held) is None
    for number, check in ((1, ("e2fsck", "-fn")), (2, ("xfs_repair", "-n"))):
        size = int(Path(f"/sys/class/block/{Path(made.node(number)).name}/size").read_text()) * 512
        part = run("losetup", "--find", "--show", "--offset", made.start_of(number), "--sizelimit", size, target)
        try:
            run(*check, part)
        finally:
            run("losetup", "--detach", part)


# --- killed on the way --------------------------------------------------------------------------------------

STEPS = [
    ("systemctl", "stop"), ("swapoff", ""), ("umount", ""), ("lvchange", "--activate n"),
    ("lvchange", "--activate y"), ("mount", "-o"), ("swapon", ""), ("systemctl", "start"),
]  # fmt: skip


def at_step(folder: Path, program: str, word: str, *, after: bool) -> dict[str, str]:
    """A script in the place of a program that kills blockbak before or after it did what ``word`` says."""
    real = shutil.which(program)
    where = folder / f"bin-{program}"
    where.mkdir(exist_ok=True)
    script = where / program
    kill = "kill -KILL $PPID"
    then = f'{real} "$@"\n{kill}' if after else kill
    passed = f'case " $* " in *" {word} "*) ;; *) exec {real} "$@" ;; esac\n' if word else ""
    script.write_text(f"#!/bin/sh\n{passed}{then}\nexit 1\n")
    script.chmod(0o755)
    return {"PATH": f"{where}:{os.environ['PATH']}"}


def test_killed_at_each_step_all_is_put_back(stage, repository, run_blockbak, tmp_path, seed):
    made = stage([("ext4", 8), ("swap", 8), ("lvm", 16)])
    run("lvcreate", "--quiet", "--yes", "-n", "data", "-L", "8M", made.group)
    run("mkfs.ext4", "-q", "-F", f"/dev/{made.group}/data")
    plain = stage.mounted(made.node(1), made.place / "a", "-o", "noatime,nosuid")
    stage.mounted(f"/dev/{made.group}/data", made.place / "db", "-o", "sync")
    stage.swapping(made.node(2), 3)
    text = f"[Service]\nWorkingDirectory={plain}\nExecStart=/bin/sleep infinity\n"
    words = (*COLD, "--stop-users", "--deactivate", made.disk)
    with unit(SERVICE, text):
        before = state(made.place)
        for number, (program, word) in enumerate(STEPS):
            # Before it or after it, by the run's seed: where nothing is emulated, each moment has its turn.
            after = bool(seed >> number & 1)
            killed(run_blockbak, *words, env=at_step(tmp_path, program, word, after=after))
            told = run_blockbak.json("recover", "--machine")
            assert told["left"] == [], (program, word, after, told)
            now = state(made.place)
            assert now == before, (program, word, after, told)
        # While it reads, and this time it is the next run that puts it back.
        killed_reading(run_blockbak, *words)
        assert state(made.place) != before
        (point,) = run_blockbak.json(*words)["points"]
        assert point["consistency"] == "cold"
        assert state(made.place) == before
    assert not Path("/etc/systemd/system/blockbak-recover.service").exists()


def test_a_frozen_file_system_is_thawed_when_blockbak_dies(stage, repository, run_blockbak):
    made = stage([("ext4", 16)])
    plain = stage.mounted(made.node(1), made.place / "a")
    with sitting(plain, "f = open('log', 'w')"):
        before = state(made.place)
        with start(run_blockbak, *COLD, "--freeze", "--limit", "64K", made.disk) as running:
            running.until("it reads the disk", lambda: reads(running.pid, made.disk.path))
            with subprocess.Popen(["touch", plain / "late"]) as writer:
                time.sleep(1)
                assert writer.poll() is None, "it could write to what should be frozen"
                os.kill(running.pid, signal.SIGKILL)
                assert writer.wait(LIMIT_SECONDS) == 0
        run_blockbak("recover", "--machine")
        assert state(made.place) == before
        # At its deadline it goes on too, and there is no point of it.
        ended = run_blockbak(*COLD, "--freeze", "--limit", "64K", "--thaw-after", "3", made.disk, expect=1)
        assert ended.document["errors"][0]["name"] == "RestVoid"
        assert ended.document["points"] == []
        (plain / "later").touch()
        (point,) = run_blockbak.json(*COLD, "--freeze", made.disk)["points"]
        assert point["consistency"] == "cold"
        assert state(made.place) == before


# --- what is in the way -------------------------------------------------------------------------------------


def refused(blockbak: Blockbak, name: str, *words: object, status: int) -> str:
    ended = blockbak(*COLD, *words, expect=status)
    (error,) = ended.document["errors"]
    assert error["name"] == name, str(ended)
    return done_in(error)


def test_what_cannot_be_stopped_is_told_and_all_is_as_it_was(stage, tmpfs, repository, run_blockbak):
    made = stage([("ext4", 16)])
    plain = stage.mounted(made.node(1), made.place / "a")
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); f = open('log', 'w')"
    before = state(made.place)
    with sitting(plain, stubborn) as process:
        assert f"process {process.pid}" in refused(run_blockbak, "CannotRest", made.disk, status=5)
        assert state(made.place) == before
        # With leave to end it, it is asked first, and then not asked.
        (point,) = run_blockbak.json(*COLD, "--kill", made.disk)["points"]
        assert point["consistency"] == "cold"
        assert process.wait(LIMIT_SECONDS) == -signal.SIGKILL
    private = ("unshare", "--mount", "--propagation", "private")
    with sitting(Path("/"), prefix=private) as process:
        # Nothing here reaches that mount: the file system stays, and takes no writes.
        told = run_blockbak.json(*COLD, "--dry-run", made.disk)["points"][0]["notes"]
        assert f"stays: {plain} (read-only)" in told
    with sitting(Path("/"), f"import subprocess; subprocess.run(['umount', '{plain}'], check=True)", private):
        pass
    assert state(made.place) == before
    # No room for the journal: nothing is stopped without one.
    full = tmpfs(64 * 1024)
    (full / "filler").write_bytes(bytes(60 * 1024))
    here = dict(run_blockbak.exported)
    run_blockbak.exported["BLOCKBAK_STATE_DIR"] = str(full)
    try:
        assert str(full) in refused(run_blockbak, "StateUnusable", made.disk, status=1)
    finally:
        run_blockbak.exported.update(here)
    assert state(made.place) == before


def test_a_unit_that_others_start_again_is_told(stage, repository, run_blockbak):
    made = stage([("ext4", 16)])
    plain = stage.mounted(made.node(1), made.place / "a")
    text = f"[Service]\nWorkingDirectory={plain}\nExecStart=/bin/sleep infinity\n"
    again = f"[Service]\nExecStart=/bin/sh -c 'while :; do systemctl start {SERVICE}; sleep 0.1; done'\n"
    with unit(SERVICE, text), unit("blockbaktest-again.service", again):
        before = state(made.place)
        assert SERVICE in refused(run_blockbak, "UnitRestarted", "--stop", SERVICE, made.disk, status=1)
        assert state(made.place) == before


# --- a disk that fails --------------------------------------------------------------------------------------


def test_unreadable_sectors_are_named_and_read_again_once_they_can_be(loop, repository, run_blockbak, tmp_path):
    below = loop(32 * MIB)
    name = f"blockbak-bad-{os.getpid()}"
    node = f"/dev/mapper/{name}"
    at, length = 9 * MIB + 4096, 8 * 512
    sectors = 32 * MIB // 512

    def table(*, healthy: bool) -> str:
        if healthy:
            return f"0 {sectors} linear {below} 0"
        end = (at + length) // 512
        return (f"0 {at // 512} linear {below} 0\n{at // 512} {length // 512} error\n"
                f"{end} {sectors - end} linear {below} {end}")  # fmt: skip

    write(below.path, 0, noise(1, 16 * MIB))
    subprocess.run(["dmsetup", "create", name], input=table(healthy=False), text=True, check=True)
    try:
        (point,) = run_blockbak.json(*COLD, node, expect=3)["points"]
        assert point["bad_bytes"] == length
        target = tmp_path / "restored"
        done = run_blockbak.json("restore", point["point"], target, expect=3)
        assert done["unreadable"] == [{"start": at, "length": length}]
        run("dmsetup", "suspend", name)
        subprocess.run(["dmsetup", "load", name], input=table(healthy=True), text=True, check=True)
        run("dmsetup", "resume", name)
        (healed,) = run_blockbak.json(*COLD, node)["points"]
        assert (healed["kind"], healed["changed_bytes"], healed["bad_bytes"]) == ("incremental", BLOCK, 0)
        held = fingerprint(node)
        run_blockbak("restore", healed["point"], target, "--yes")
        assert difference(fingerprint(target), held) is None
    finally:
        run("dmsetup", "remove", "--retry", name)


# --- the machine is switched off meanwhile ------------------------------------------------------------------

WISH = Path("/var/tmp/blockbak-boot")
KEPT = Path("/tmp/blockbak-cold")
"""On the disk that nothing of the system lies on, and that is there after the boot."""
LASTING = Path("/etc/systemd/system")

READING = ("", "", False)
# A boot under emulation takes minutes, so all moments share one, each with a disk of its own; a soak has them all.
MOMENTS = [READING]
if os.environ.get("BLOCKBAK_SOAK"):
    MOMENTS += [(program, word, after) for program, word in STEPS for after in (False, True)]


@dataclass(frozen=True)
class Kept:
    """One disk that is there after the boot, under another number; its state directory and its repository."""

    number: int

    @property
    def place(self) -> Path:
        return KEPT / f"{self.number:02}"

    @property
    def mender(self) -> str:
        return bootunit.name_for(str(self.place / "state"))

    @property
    def service(self) -> str:
        return f"blockbaktest-kept{self.number:02}.service"

    @property
    def attach(self) -> str:
        return f"blockbaktest-attach{self.number:02}.service"

    @property
    def group(self) -> str:
        return f"bbkept{self.number:02}"

    @property
    def later(self) -> str:
        return f"/dev/loop{40 + self.number}"

    def own(self, run_blockbak: Blockbak) -> None:
        run_blockbak.exported["BLOCKBAK_STATE_DIR"] = str(self.place / "state")

    def state(self) -> dict[str, object]:
        """What of the disk is in use: mounts, its swap's priority, its service, its volume."""
        now = state(self.place)
        nodes = run("lsblk", "--noheadings", "--raw", "--paths", "--output", "NAME", *self.disks()).split()
        priorities = [line.split()[1] for line in now["swaps"] if line.split()[0] in nodes]
        mounts = [
            [target, root, fstype, sorted(own), sorted(its)]
            for target, _, root, fstype, _, own, its, _ in now["mounts"]
        ]
        return {
            "mounts": mounts,
            "priorities": priorities,
            "units": [name for name in now["units"] if name == self.service],
            "volumes": [name for name in now["volumes"] if name.startswith(self.group)],
        }

    def disks(self) -> list[str]:
        return run("losetup", "--noheadings", "--output", "NAME", "--associated", self.place / "disk").split()

    def set_up(self) -> str:
        self.place.mkdir()
        image = self.place / "disk"
        with image.open("xb") as made:
            made.truncate(56 * MIB)
        run("sgdisk", "-n", "1:0:+16M", "-n", "2:0:+8M", "-n", "3:0:0", image)
        node = run("losetup", "--find", "--show", "--partscan", image)
        run("udevadm", "settle")
        run("mkfs.ext4", "-q", "-F", f"{node}p1")
        run("mkswap", f"{node}p2")
        run("vgcreate", "--quiet", "--yes", self.group, f"{node}p3")
        run("lvcreate", "--quiet", "--yes", "-n", "data", "-L", "12M", self.group)
        run("mkfs.ext4", "-q", "-F", f"/dev/{self.group}/data")
        for what, name, options in ((f"{node}p1", "a", "noatime,nodev"), (f"/dev/{self.group}/data", "db", "sync")):
            (self.place / name).mkdir()
            run("mount", "-o", options, what, self.place / name)
        run("swapon", "-p", 7, f"{node}p2")
        # It runs now, and nothing but whoever stopped it would start it at boot.
        text = f"[Service]\nWorkingDirectory={self.place}/a\nExecStart=/bin/sleep infinity\n"
        (LASTING / self.service).write_text(text)
        # A disk of iron is there at boot; this one has to be attached.
        attach = (
            f"[Unit]\nBefore={self.mender}\nRequiresMountsFor={KEPT}\n"
            f"[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/sbin/losetup --partscan {self.later} {image}\n"
            f"ExecStart=/bin/udevadm settle\nExecStart=/sbin/vgchange --activate ay {self.group}\n"
            "[Install]\nWantedBy=multi-user.target\n"
        )
        (LASTING / self.attach).write_text(attach)
        run("systemctl", "daemon-reload")
        run("systemctl", "enable", "--quiet", self.attach)
        run("systemctl", "start", self.service)
        return node

    def take_down(self) -> None:
        run("systemctl", "stop", self.service)
        if self.state()["priorities"]:
            run("swapoff", f"{self.later}p2")
        for mount in self.state()["mounts"]:
            run("umount", mount[0])
        run("vgchange", "--quiet", "--activate", "n", self.group)
        run("losetup", "--detach", self.later)
        run("systemctl", "disable", "--quiet", self.attach)
        for name in (self.service, self.attach):
            (LASTING / name).unlink()


def killed_reading(blockbak: Blockbak, *words: object) -> None:
    """A cold run of the last word's device that is killed once the device is read."""
    with start(blockbak, *words) as running:
        running.until("it reads the disk", lambda: reads(running.pid, str(words[-1])))
        os.kill(running.pid, signal.SIGKILL)


@pytest.mark.before_boot
def test_the_machine_goes_off_while_disks_are_at_rest(run_blockbak, tmp_path):
    KEPT.mkdir()
    for number, (program, word, after) in enumerate(MOMENTS):
        kept = Kept(number)
        node = kept.set_up()
        before = kept.state()
        kept.own(run_blockbak)
        run_blockbak("init", kept.place / "repository")
        words = ("-r", kept.place / "repository", *COLD, "--stop-users", "--deactivate")
        if program:
            killed(run_blockbak, *words, node, env=at_step(tmp_path, program, word, after=after))
        else:
            killed_reading(run_blockbak, *words, "--limit", "1M", node)
            assert kept.state() == {"mounts": [], "priorities": [], "units": [], "volumes": []}
        with (kept.place / "then.json").open("w") as file:
            json.dump([before, kept.state()], file)
            # The power may be cut next.
            file.flush()
            os.fsync(file.fileno())
        assert (LASTING / kept.mender).exists(), (program, word, after)
    WISH.touch()


@pytest.mark.after_boot
def test_what_was_at_rest_is_put_back_at_boot(run_blockbak):
    for number, moment in enumerate(MOMENTS):
        kept = Kept(number)
        deadline = time.monotonic() + LIMIT_SECONDS
        while (LASTING / kept.mender).exists():
            told = run("journalctl", "--no-pager", "--unit", kept.mender)
            assert time.monotonic() < deadline, (moment, told)
            time.sleep(1)
        told = run("journalctl", "--no-pager", "--unit", kept.mender)
        before, live = json.loads((kept.place / "then.json").read_text())
        now = kept.state()
        for kind, things in before.items():
            # What was not yet stopped, or back already, went with the power, and is no affair of blockbak's.
            assert [one for one in things if one not in live[kind] and one not in now[kind]] == [], (moment, told)
            assert [one for one in now[kind] if one not in things] == [], (moment, told)
        for mount in now["mounts"]:
            source = run("findmnt", "-n", "-o", "SOURCE", mount[0])
            assert source in (f"{kept.later}p1", f"/dev/mapper/{kept.group}-data")
        kept.own(run_blockbak)
        assert run_blockbak.json("recover", "--machine") == {"done": [], "left": [], "adopted": []}
        kept.take_down()
    run("systemctl", "daemon-reload")
    shutil.rmtree(KEPT)
