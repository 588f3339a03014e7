"""What blockbak asks of systemd, put to systemd itself and to the one that is played with a file.

systemd itself is a user's manager in a mount namespace of its own, where it finds that systemd runs the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from blockbak.errors import NoSuchUnit, UnitNotStopped, UnitRestarted
from blockbak.host import runner
from blockbak.host.units import Units
from tests.systemd import FakeSystemd

SLEEPS = "[Service]\nExecStart=/bin/sleep infinity\nTimeoutStopSec=5\n"
FILES = {
    "db.service": "[Unit]\nDescription=db\n" + SLEEPS,
    "db.socket": "[Socket]\nListenStream=%t/db.sock\n",
    "web.service": "[Unit]\nRequires=db.service\nAfter=db.service\n" + SLEEPS,
    "worker.service": "[Unit]\nPartOf=web.service\n" + SLEEPS,
    "report.service": "[Unit]\nBindsTo=worker.service\nAfter=worker.service\n" + SLEEPS,
    "other.service": "[Unit]\nWants=db.service\n" + SLEEPS,
    "off.service": "[Unit]\nRequires=db.service\n" + SLEEPS,
    "idle.timer": "[Timer]\nOnCalendar=2037-01-01\nUnit=db.service\n",
    "puller.service": "[Unit]\nWants=extra.service\n" + SLEEPS,
    "extra.service": SLEEPS,
    "broken.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/false\n",
    "stubborn.service": SLEEPS,
    "manual.service": "[Unit]\nRefuseManualStop=yes\n" + SLEEPS,
    "nanny.service": "[Service]\nExecStart=/bin/sh -c 'while :; do systemctl --user start stubborn; sleep 0.05; done'\n",
    "hooked.target": "[Unit]\nRequires=db.service\nWants=off.service\n",
}  # fmt: skip
RUNNING = ("db.socket", "db.service", "web.service", "worker.service", "report.service", "other.service", "idle.timer")

_START = """
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0/systemd/user
chmod 700 /run/user/0
cp "$1"/* /run/user/0/systemd/user/
exec env XDG_RUNTIME_DIR=/run/user/0 /lib/systemd/systemd --user --unit=basic.target
"""


class Real:
    """systemd, with these units."""

    def __init__(self, directory):
        files = directory / "files"
        files.mkdir()
        for name, text in FILES.items():
            (files / name).write_text(text)
        self._log = (directory / "log").open("wb")
        # What is unmounted outside is not to be held in there.
        argv = ["unshare", "--mount", "--propagation", "slave", "sh", "-ec", _START, "sh", str(files)]
        self._process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while "running" not in self.run(["systemctl", "is-system-running"], accept=range(256)).stdout:
            assert time.monotonic() < deadline, (directory / "log").read_text()
            time.sleep(0.1)
        root = directory / "root"
        (root / "run/systemd/system").mkdir(parents=True)
        self.units = Units(root, self.run)
        for name in RUNNING:
            self.run(["systemctl", "start", name])

    def run(self, argv, **how):
        inside = ["nsenter", f"--target={self._process.pid}", "--mount", "env", "XDG_RUNTIME_DIR=/run/user/0"]
        return runner.run([*inside, argv[0], "--user", *argv[1:]], **how)

    def nanny(self):
        self.run(["systemctl", "start", "stubborn.service", "nanny.service"])

    def close(self):
        try:
            self.run(["systemctl", "stop", "nanny.service", *FILES], accept=range(256))
            # It refuses that, and would outlive its manager.
            self.run(["systemctl", "kill", "--signal=KILL", "manual.service"], accept=range(256))
            self._process.send_signal(signal.SIGRTMIN + 24)  # systemd(1): exit at once
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()


class Played:
    """The same units, played."""

    def __init__(self, directory, monkeypatch):
        self._systemd = FakeSystemd(directory)
        monkeypatch.setenv("PATH", f"{self._systemd.install()}{os.pathsep}{os.environ['PATH']}")
        facts = {
            "db.service": {
                "TriggeredBy": "db.socket idle.timer",
                "RequiredBy": "web.service off.service hooked.target",
            },
            "web.service": {"ConsistsOf": "worker.service"},
            "puller.service": {"Wants": "extra.service"},
            "hooked.target": {"Wants": "off.service"},
            "worker.service": {"BoundBy": "report.service"},
            "broken.service": {"when_started": "fail"},
            "manual.service": {"when_stopped": "refuse"},
        }
        for name in FILES:
            self._systemd.add(name, "active" if name in RUNNING else "inactive", **facts.get(name, {}))
        self.units = Units(Path(self._systemd.root))

    def nanny(self):
        self._systemd.add("stubborn.service", when_stopped="restart")

    def close(self):
        pass


@pytest.fixture(params=["played", "real"])
def systemd(request, tmp_path, monkeypatch):
    if request.param == "real":
        request.getfixturevalue("as_root")
    made = Real(tmp_path) if request.param == "real" else Played(tmp_path, monkeypatch)
    yield made
    made.close()


def test_units_are_told_stopped_and_started(systemd):
    units = systemd.units
    found = units.look(["db"], strict=True)
    # All that would start it again, and all that is stopped with it; not who only wants it, nor what does not run.
    with_it = {"db.socket", "idle.timer", "web.service", "worker.service", "report.service"}
    assert set(found["db"].also) == with_it
    assert set(found["worker.service"].also) == {"report.service"}
    assert found["db"].active
    assert not units.look(["off"])["off"].active
    for name in ("nope", "nope.socket"):
        with pytest.raises(NoSuchUnit):
            units.look([name], strict=True)
        assert units.look([name]) == {}

    names = ["db.service", *sorted(with_it)]
    before = units.states(sorted(FILES))
    units.stop(names)
    stopped = units.states(sorted(FILES))
    assert {name for name, state in stopped.items() if state == "active"} == {"other.service"}
    started, failed = units.start(names)
    assert (sorted(started), failed) == (sorted(names), [])
    assert units.states(sorted(FILES)) == before
    assert units.start(names) == ([], [])

    # A target alone: what it wants did not run before.
    assert units.start(["hooked.target"]) == (["hooked.target"], [])
    assert units.states(["off.service"]) == {"off.service": "inactive"}

    assert units.pulled(["puller.service", "web.service"]) == ["extra.service"]
    units.start(["puller.service"])
    assert units.active(["extra.service"]) == ["extra.service"]
    assert units.pulled(["puller.service"]) == []

    started, failed = units.start(["broken.service"])
    assert (started, [(one.name, one.state) for one in failed]) == ([], [("broken.service", "failed")])

    systemd.nanny()
    with pytest.raises(UnitRestarted, match=r"stubborn\.service was stopped, and runs again"):
        stopped_for_long(units, "stubborn.service")

    units.start(["manual.service"])
    with pytest.raises(UnitNotStopped, match=r"manual\.service could not be stopped: .*Operation refused"):
        units.stop(["manual.service"])
    assert units.active(["manual.service"]) == ["manual.service"]


def stopped_for_long(units, name):
    """Whoever starts it again may come a moment later."""
    units.stop([name])
    for _ in range(50):
        units.check_stopped([name])
        time.sleep(0.1)
