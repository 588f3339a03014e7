"""Who does what against whom. Each contest is some contestants that take turns, round after round."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks import place
from benchmarks.measure import Sample, Series, timed
from benchmarks.place import GIB, MIB, PIECE
from benchmarks.work import BLOCK, Change, Work, write_blocks

_BIN = os.path.dirname(sys.executable)
_INSIDE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "inside.py")
_DD = f"bs={PIECE}"
_ZSTD = ("zstd", "-1", "-T2", "-q", "-c")
_START_UPS = 5
_HUGE = 16 << 40

Contestant = Callable[[], Sample]


def _blockbak(*arguments: str) -> list[str]:
    return [os.path.join(_BIN, "blockbak"), *arguments]


def _link_or_copy(source: str, target: str) -> str:
    """Images never change, so copies of a repository may share them."""
    if source.endswith(".zst"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)
    return target


@dataclass(slots=True)
class Bench:
    """The place, the work, and all that was measured. ``on`` holds the devices, ``to`` what is stored."""

    work: Work
    on: str
    to: str
    rounds: int
    say: Callable[[str], None]
    series: dict[tuple[str, str], Series] = field(default_factory=dict)
    direct_writes: bool = True
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.direct_writes = place.takes_direct_writes(self.to)
        home = os.path.join(self.to, "home")
        os.makedirs(home, exist_ok=True)
        self.env = {
            "PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": home, "TMPDIR": home,
            "BLOCKBAK_STATE_DIR": os.path.join(home, "state"),
            "BORG_BASE_DIR": home, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "RESTIC_PASSWORD": "bench", "RESTIC_CACHE_DIR": os.path.join(home, "restic"),
        }  # fmt: skip

    def path(self, name: str) -> str:
        return os.path.join(self.to, name)

    def has(self, contest: str, name: str) -> bool:
        return (contest, name) in self.series

    def get(self, contest: str, name: str) -> Series:
        return self.series[contest, name]

    # --- running ---------------------------------------------------------------------------------

    def contest(self, name: str, contestants: Mapping[str, Contestant], once: Sequence[str] = ()) -> None:
        """Let the contestants take turns. Those named in ``once`` are slow: they run in the first round."""
        order = list(contestants)
        for number in range(self.rounds):
            turn = number % len(order)
            for label in order[turn:] + order[:turn]:
                if number and label in once:
                    continue
                place.run("sync", "--file-system", self.to)
                place.forget(self.work.device)
                sample = contestants[label]()
                series = self.series.setdefault((name, label), Series(name, label))
                series.samples[number] = sample
                self.say(
                    f"{name}, round {number + 1} of {self.rounds}: {label}: {sample.wall:.2f} s, "
                    f"{sample.cpu:.2f} s of CPU, {sample.rss / MIB:.0f} MiB"
                )

    def timed(self, *commands: Sequence[str], into: str | None = None) -> Sample:
        return timed(*commands, env=self.env, into=into)[0]

    def blockbak(self, *arguments: str) -> Sample:
        """Run a verb with ``--json``; its document is in the facts."""
        sample, told = timed(_blockbak(*arguments, "--json"), env=self.env)
        return replace(sample, facts=json.loads(told))

    def run(self, *argv: str) -> str:
        """A step beside the clock, in the contestants' environment."""
        return timed(argv, env=self.env)[1].decode(errors="replace")

    # --- repositories ----------------------------------------------------------------------------

    def fresh_repository(self, name: str) -> str:
        path = self.path(name)
        shutil.rmtree(path, ignore_errors=True)
        self.run(*_blockbak("init", path))
        return path

    def base_repository(self) -> str:
        """A repository with a full of the base state; made once."""
        path = self.path("base")
        if not os.path.exists(path):
            self.fresh_repository("base")
            self.backup(path, "full")
        return path

    def chain_repository(self) -> str:
        """The same with an incremental of C1 on top; made once."""
        path = self.path("chain")
        if not os.path.exists(path):
            self.linked(self.base_repository(), path)
            with self.work.state("C1"):
                self.backup(path, "incremental")
        return path

    @staticmethod
    def linked(repository: str, path: str) -> str:
        """A repository of its own with the images of another."""
        shutil.rmtree(path, ignore_errors=True)
        return str(shutil.copytree(repository, path, copy_function=_link_or_copy))

    @contextlib.contextmanager
    def copy(self, repository: str) -> Iterator[str]:
        """The same for one run."""
        path = self.linked(repository, self.path("run"))
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def backup(self, repository: str, kind: str, compress: str = "zstd", source: str = "") -> Sample:
        sample = self.blockbak(
            "-r", repository, "backup", "--kind", kind, "--compress", compress, source or self.work.device
        )
        point = sample.facts["points"][0]
        return replace(sample, stored=point["stored_bytes"], facts=point)

    def forget_images(self, repository: str) -> None:
        for base, _, names in os.walk(repository):
            for name in names:
                place.forget(os.path.join(base, name))

    def image(self, repository: str, kind: str) -> str:
        """The path of a repository's image of a kind."""
        for base, _, names in os.walk(repository):
            for name in names:
                if name.endswith(f".{kind}.zst"):
                    return os.path.join(base, name)
        raise FileNotFoundError(repository)


# --- full ----------------------------------------------------------------------------------------


def _full_blockbak(bench: Bench, compress: str) -> Sample:
    repository = bench.fresh_repository("run")
    try:
        return bench.backup(repository, "full", compress)
    finally:
        shutil.rmtree(repository)


def _to_file(bench: Bench, *commands: Sequence[str], name: str = "", pipe: bool = True) -> Sample:
    """Commands that make one file; its size is what they store."""
    path = name or bench.path("peer.out")
    try:
        sample = bench.timed(*commands, into=path if pipe else None)
        return replace(sample, stored=os.stat(path).st_blocks * 512)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _read_source(bench: Bench) -> tuple[str, ...]:
    return ("dd", f"if={bench.work.device}", "iflag=direct", _DD, "status=none")


def _borg(bench: Bench, *, fresh: bool) -> Sample:
    path = bench.path("borg")
    if fresh:
        shutil.rmtree(path, ignore_errors=True)
        bench.run("borg", "init", "--encryption", "none", path)
    before = place.stored_bytes(path)
    archive = f"{path}::{random.SystemRandom().getrandbits(64):016x}"
    sample = bench.timed(
        ("borg", "create", "--read-special", "--chunker-params", "fixed,4194304", "--compression", "lz4",
         archive, bench.work.device)
    )  # fmt: skip
    return replace(sample, stored=place.stored_bytes(path) - before)


def _restic(bench: Bench, *, fresh: bool) -> Sample:
    path = bench.path("restic")
    if fresh:
        shutil.rmtree(path, ignore_errors=True)
        bench.run("restic", "init", "--repo", path, "--repository-version", "2")
    before = place.stored_bytes(path)
    sample = bench.timed(
        _read_source(bench),
        ("restic", "backup", "--repo", path, "--stdin", "--quiet", "--compression", "auto"),
    )
    return replace(sample, stored=place.stored_bytes(path) - before)


def full(bench: Bench) -> None:
    """A full, zstd 1, against everything that compresses."""
    source, out = bench.work.device, bench.path("peer.out")
    bench.base_repository()
    qemu = ("qemu-img", "convert", "-f", "raw", "-T", "none", "-m", "4", "-W",
            "-O", "qcow2", "-c", "-o", "compression_type=zstd", source, out)  # fmt: skip
    partclone = ("partclone.ext4", "-c", "-s", source, "-o", "-", "-L", bench.path("partclone.log"))
    bench.contest(
        "full, zstd 1",
        {
            "blockbak": lambda: _full_blockbak(bench, "zstd:1"),
            "dd | zstd -1 -T2": lambda: _to_file(bench, _read_source(bench), _ZSTD),
            "borg, 4 MiB, lz4": lambda: _borg(bench, fresh=True),
            "partclone | zstd -1 -T2": lambda: _to_file(bench, partclone, _ZSTD),
            "qemu-img, qcow2, zstd": lambda: _to_file(bench, qemu, pipe=False),
            "restic, stdin": lambda: _restic(bench, fresh=True),
        },
        once=["restic, stdin"],
    )


def none(bench: Bench) -> None:
    """A full without compression, against the plainest copy."""
    flags = ["iflag=direct", "conv=sparse", *(["oflag=direct"] if bench.direct_writes else [])]
    dd = ("dd", f"if={bench.work.device}", f"of={bench.path('peer.out')}", _DD, *flags, "status=none")
    bench.contest(
        "full, none",
        {
            "blockbak": lambda: _full_blockbak(bench, "none"),
            "dd conv=sparse": lambda: _to_file(bench, dd, pipe=False),
        },
    )


def _raw_blockbak(bench: Bench) -> Sample:
    path = bench.path("cold.img")
    try:
        sample = bench.blockbak("cold", bench.work.device, path)
        return replace(sample, stored=sample.facts["stored_bytes"])
    finally:
        for end in ("", ".json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + end)


def raw(bench: Bench) -> None:
    """A raw file with a sidecar, against the plainest copy."""
    flags = ["iflag=direct", "conv=sparse", *(["oflag=direct"] if bench.direct_writes else [])]
    dd = ("dd", f"if={bench.work.device}", f"of={bench.path('peer.out')}", _DD, *flags, "status=none")
    bench.contest(
        "full, raw",
        {
            "blockbak": lambda: _raw_blockbak(bench),
            "dd conv=sparse": lambda: _to_file(bench, dd, pipe=False),
            "dd of=/dev/null": lambda: _read_once(bench),
        },
    )


# --- changed little or nothing ---------------------------------------------------------------------


def _incremental(bench: Bench, state: str) -> Sample:
    with bench.work.state(state), bench.copy(bench.base_repository()) as repository:
        return bench.backup(repository, "incremental")


def _in_state(bench: Bench, state: str, run: Contestant) -> Sample:
    with bench.work.state(state):
        return run()


def _read_once(bench: Bench) -> Sample:
    return bench.timed((*_read_source(bench), "of=/dev/null"))


def _compress_change(bench: Bench, change: Change) -> Sample:
    """What compressing the changed bytes alone takes, one thread, no files."""
    return bench.timed(("cat", change.after), ("zstd", "-1", "-q", "-c"), into=os.devnull)


def changes(bench: Bench) -> None:
    """C0, C1 and C5 on top of a full."""
    bench.base_repository()
    for path, make in (("borg", _borg), ("restic", _restic)):
        if not os.path.exists(bench.path(path)):
            make(bench, fresh=True)
    contestants: dict[str, Contestant] = {
        "nothing changed": lambda: _incremental(bench, "C0"),
        "dd of=/dev/null": lambda: _read_once(bench),
        "1 % changed": lambda: _incremental(bench, "C1"),
        "zstd -1 of the 1 %": lambda: _compress_change(bench, bench.work.changes["C1"]),
        "files changed": lambda: _incremental(bench, "C5"),
        "borg, nothing changed": lambda: _borg(bench, fresh=False),
        "restic, nothing changed": lambda: _restic(bench, fresh=False),
    }
    once = ["restic, nothing changed"]
    for name, make in (("borg", _borg), ("restic", _restic)):
        for label, state in (("1 % changed", "C1"), ("files changed", "C5")):
            # Once: the second time they know the change already.
            once.append(f"{name}, {label}")
            contestants[once[-1]] = partial(_in_state, bench, state, partial(make, bench, fresh=False))
    bench.contest("changes", contestants, once=once)
    for path in ("borg", "restic"):
        shutil.rmtree(bench.path(path), ignore_errors=True)


# --- composing -------------------------------------------------------------------------------------


def _composed(bench: Bench, where: str, *inside: str) -> Sample:
    """One synthetic full of C1 in a copy of the repository; what it took of the file system."""
    path = bench.linked(os.path.join(where, "chain"), os.path.join(where, "run"))
    volume = next(name for name in os.listdir(path) if os.path.isdir(os.path.join(path, name)))
    try:
        before = place.free_bytes(where)
        if inside:
            _, told = timed(
                [sys.executable, _INSIDE, "clones", "-r", path, "synthesize", volume, "--json"], env=bench.env
            )
            return Sample(0, 0, 0, facts=json.loads(told.splitlines()[-1]))
        sample = bench.blockbak("-r", path, "synthesize", volume)
        taken = before - place.free_bytes(where)
        facts = {**sample.facts, "taken_bytes": taken}
        return replace(sample, stored=sample.facts["stored_bytes"], facts=facts)
    finally:
        shutil.rmtree(path)


def _copied(bench: Bench, where: str) -> Sample:
    image = bench.image(os.path.join(where, "chain"), "full")
    target = os.path.join(where, "copy")
    return _to_file(bench, ("cp", "--reflink=never", "--sparse=never", image, target), name=target, pipe=False)


def compose(bench: Bench) -> None:
    """A synthetic full of full and C1, where blocks can be shared and where not."""
    chain = bench.chain_repository()
    room = max(GIB, bench.work.size + bench.work.size // 4)
    for kind in ("xfs", "btrfs", "ext4", "here"):
        with ExitStack() as stack:
            where = bench.to if kind == "here" else stack.enter_context(place.file_system(kind, bench.to, room))
            if kind != "here":
                shutil.copytree(chain, os.path.join(where, "chain"))
            label = place.kind_of(where) if kind == "here" else kind
            if bench.has(f"synthetic full on {label}", "blockbak"):
                continue
            bench.contest(
                f"synthetic full on {label}",
                {
                    "blockbak": partial(_composed, bench, where),
                    "cp of the full": partial(_copied, bench, where),
                },
            )
            if kind in ("xfs", "btrfs"):
                series = Series("clone calls", kind)
                series.samples[0] = _composed(bench, where, "inside")
                bench.series["clone calls", kind] = series


# --- bringing back ---------------------------------------------------------------------------------


def _scrub(bench: Bench, target: str) -> None:
    """Zeros all over the target: a target that mostly matches would be restored in another way."""
    bench.run("dd", "if=/dev/zero", f"of={target}", _DD, f"count={bench.work.size // PIECE}", "oflag=direct",
              "conv=fsync", "status=none")  # fmt: skip
    place.forget(target)


def _restored(bench: Bench, repository: str, target: str, expected: str, *options: str) -> Sample:
    """One restore onto a blank target, compared byte by byte afterwards."""
    _scrub(bench, target)
    bench.forget_images(repository)
    sample = bench.blockbak("-r", repository, "restore", "latest", target, "--yes", *options)
    place.forget(target)
    with bench.work.state(expected):
        bench.run("cmp", bench.work.device, target)
    return sample


def _raw_restored(bench: Bench, target: str) -> Sample:
    _scrub(bench, target)
    place.forget(bench.work.raw)
    return bench.timed(("dd", f"if={bench.work.raw}", f"of={target}", _DD, "oflag=direct", "status=none"))


def restore(bench: Bench) -> None:
    """A full, and a chain, onto a device."""
    base, chain = bench.base_repository(), bench.chain_repository()
    with place.allocated_device(bench.on, "target.img", bench.work.size) as target:
        bench.contest(
            "restore",
            {
                "blockbak": lambda: _restored(bench, base, target, "C0", "--no-verify"),
                "dd of the raw image": lambda: _raw_restored(bench, target),
                "blockbak, chain": lambda: _restored(bench, chain, target, "C1", "--no-verify"),
                "blockbak, read back": lambda: _restored(bench, base, target, "C0"),
            },
        )


def _rolled_back(bench: Bench) -> Sample:
    """C1 on the device itself undone by a restore of the full."""
    work, base = bench.work, bench.base_repository()
    with work.state("C1"):
        before = place.sectors_read(work.device)
        sample = bench.blockbak("-r", base, "restore", "latest", work.device, "--yes", "--no-verify")
        read = (place.sectors_read(work.device) - before) * 512
    bench.run("cmp", work.device, work.raw)
    return replace(sample, facts={**sample.facts, "source_read": read})


def rollback(bench: Bench) -> None:
    """A restore where most matches."""
    bench.base_repository()
    bench.contest(
        "rollback of 1 %",
        {"blockbak": lambda: _rolled_back(bench), "dd of=/dev/null": lambda: _read_once(bench)},
    )


def verify(bench: Bench) -> None:
    """All checks of an image, against zstd's own."""
    base = bench.base_repository()
    image = bench.image(base, "full")

    def checked() -> Sample:
        bench.forget_images(base)
        return bench.blockbak("-r", base, "verify")

    def tested() -> Sample:
        bench.forget_images(base)
        return bench.timed(("zstd", "-t", "-q", image))

    bench.contest("verify", {"blockbak": checked, "zstd -t": tested})


def _mirrored(bench: Bench, target: str, run: Callable[[], Sample]) -> Sample:
    """One run with C1 on the source and C0 on the target, compared byte by byte; the target is C0 again afterwards."""
    change = bench.work.changes["C1"]
    with bench.work.state("C1"):
        place.forget(target)
        sample = run()
        place.forget(target)
        bench.run("cmp", bench.work.device, target)
    write_blocks(target, change.offsets, change.before)
    return sample


def mirror(bench: Bench) -> None:
    """A copy brought in step after 1 % has changed; bdsync does so where it is on the PATH: Debian has no package."""
    source = bench.work.device
    with place.allocated_device(bench.on, "target.img", bench.work.size) as target:
        bench.run("dd", f"if={source}", f"of={target}", _DD, "oflag=direct", "conv=fsync", "status=none")
        end = shlex.join(_blockbak("mirror", "--receive", target, "--yes"))
        runs: dict[str, Contestant] = {
            "blockbak": lambda: bench.blockbak("mirror", source, target, "--yes", "--no-verify"),
            "blockbak, read back": lambda: bench.blockbak("mirror", source, target, "--yes"),
            "blockbak, two ends": lambda: bench.blockbak("mirror", source, "--no-verify", "--through", end),
        }
        if shutil.which("bdsync"):
            same = "bdsync", f"--blocksize={BLOCK}"
            runs["bdsync"] = lambda: bench.timed(
                (*same, "bdsync --server", source, target), ("bdsync", f"--patch={target}")
            )
        contestants = {name: partial(_mirrored, bench, target, run) for name, run in runs.items()}
        bench.contest("mirror of 1 %", contestants, once=("bdsync",))


# --- small and huge --------------------------------------------------------------------------------


def start(bench: Bench) -> None:
    """How long nothing takes."""
    chain = bench.chain_repository()
    for argv in (("--help",), ("-r", chain, "list")):
        samples = [bench.timed(_blockbak(*argv)) for _ in range(_START_UPS * bench.rounds)]
        series = Series("start-up", argv[-1])
        series.samples.update(enumerate(samples))
        bench.series["start-up", argv[-1]] = series
        bench.say(f"start-up: {argv[-1]}: {series.median():.3f} s")


def huge(bench: Bench) -> None:
    """A volume of 16 TiB with almost nothing in it: memory, and the cost of an index that large."""
    with place.file_system("xfs", bench.to, 4 * GIB) as where:
        path, dice = os.path.join(where, "huge.img"), random.Random(1)
        with open(path, "wb") as file:
            file.truncate(_HUGE)
            for offset in (0, _HUGE // 3, _HUGE // 2 + 4096, _HUGE - MIB):
                file.seek(offset)
                file.write(dice.randbytes(MIB))
        repository = bench.fresh_repository("huge")
        runs: dict[str, Contestant] = {
            "full": lambda: bench.backup(repository, "full", source=path),
            "nothing changed": lambda: bench.backup(repository, "incremental", source=path),
            "verify": lambda: bench.blockbak("-r", repository, "verify"),
        }
        try:
            for label, run in runs.items():
                series = Series("16 TiB, sparse", label)
                series.samples[0] = run()
                bench.series["16 TiB, sparse", label] = series
                bench.say(f"16 TiB, sparse: {label}: {series.median():.1f} s, {series.most('rss') / MIB:.0f} MiB")
        finally:
            shutil.rmtree(repository)


def hash_map(bench: Bench) -> None:
    """The compare alone."""
    series = Series("hash map of 16 TiB", "compare")
    for number in range(bench.rounds):
        sample, told = timed([sys.executable, _INSIDE, "compare"], env=bench.env)
        facts = json.loads(told)
        series.samples[number] = replace(sample, cpu=facts["cpu"], facts=facts)
    bench.series[series.contest, series.name] = series
    bench.say(f"hash map of 16 TiB: compare: {series.median('cpu'):.2f} s of CPU")


CONTESTS: dict[str, Callable[[Bench], None]] = {
    "full": full,
    "none": none,
    "raw": raw,
    "changes": changes,
    "synthesize": compose,
    "restore": restore,
    "rollback": rollback,
    "verify": verify,
    "mirror": mirror,
    "start": start,
    "huge": huge,
    "map": hash_map,
}
