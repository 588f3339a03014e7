"""Jobs run over days that pass as the test says: what is made when, and what people are told of."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from blockbak.errors import BlockbakError, DeadlinePassed, Interrupted, JobRuns
from blockbak.flow import run as runs
from blockbak.flow.context import Quiet
from blockbak.flow.jobs import chosen, doubts, load
from blockbak.host import jobstate
from blockbak.repository.record import HISTORY
from tests.machine import BEGIN, SECTORS, Machine
from tests.patterns import stamp


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.slow
def test_forty_days_of_fulls_differentials_and_incrementals(machine):
    machine.configure('schedule = "daily at 02:00"\nfull = "monthly"\ndifferential = "weekly on sun"')
    expected = []
    for day in range(40):
        machine.write(day)
        report = machine.once()
        assert report.exit == 0, report.errors
        # A second look on the same day, and one before the schedule of the next, find nothing to do.
        for hours in (1, 23):
            machine.now += timedelta(hours=hours)
            machine.now -= timedelta(minutes=20 if hours == 23 else 0)
            again = machine.once()
            assert (again.state, again.points) == (runs.NOT_DUE, [])
        machine.now += timedelta(minutes=20)
        today = BEGIN + timedelta(days=day)
        expected.append("full" if today.day == 1 else "differential" if today.weekday() == 6 else "incremental")
    assert machine.kinds() == expected


def test_days_on_which_the_machine_was_off_are_made_up_for_once(machine):
    machine.configure('schedule = "daily at 02:00"\nfull = "monthly"')
    machine.once()
    machine.now += timedelta(days=9, hours=7)
    report = machine.once()
    assert [point.kind for point in report.points] == ["incremental"]
    assert machine.once().state == runs.NOT_DUE
    machine.now += timedelta(days=40)
    assert [point.kind for point in machine.once().points] == ["full"]


def test_a_clock_that_was_years_ahead_and_is_right_again_does_not_stop_the_job(machine):
    machine.configure('schedule = "daily at 02:00"')
    machine.once()
    machine.now = BEGIN + timedelta(days=3650)
    machine.once()
    machine.now = BEGIN + timedelta(days=1)
    report = machine.once()
    assert "the clock was set back" in report.wanted[0].due.reason
    assert len(report.points) == 1
    assert machine.once().state == runs.NOT_DUE
    machine.now += timedelta(days=1)
    assert len(machine.once().points) == 1


def test_incrementals_for_ever_with_a_synthetic_full_each_week(machine):
    machine.configure('incremental = "daily at 02:00"\nsynthetic = "weekly"')
    composed = []
    for day in range(15):
        machine.write(day)
        report = machine.once()
        assert report.exit == 0, report.errors
        composed += [BEGIN + timedelta(days=day) for one in report.synthetic if one.written]
        machine.now += timedelta(days=1)
    assert [f"{day:%a}" for day in composed] == ["Mon", "Mon"]
    assert machine.kinds() == ["full", *["incremental"] * 14]


def test_a_differential_without_a_full_that_can_be_its_parent_becomes_a_full(machine):
    machine.configure('schedule = "daily"\ndifferential = "daily"')
    assert [point.kind for point in machine.once().points] == ["full"]
    machine.now += timedelta(days=1)
    assert [point.kind for point in machine.once().points] == ["differential"]
    machine.source.write_bytes(stamp(0, SECTORS + 8, 1, 7))
    machine.now += timedelta(days=1)
    assert [point.kind for point in machine.once().points] == ["full"]


def test_one_source_that_fails_is_due_again_and_the_others_are_not(machine):
    other = machine.place / "db.img"
    machine.configure('schedule = "daily at 02:00"', sources=f'"{machine.source}", "{other}"')
    report = machine.once()
    assert report.exit == 1
    assert [point.source for point in report.points] == [str(machine.source)]
    assert [error.name for error in report.errors] == ["NoSuchSource"]
    other.write_bytes(stamp(0, SECTORS, 1, 8))
    report = machine.once()
    assert [point.source for point in report.points] == [str(other)]
    assert report.exit == 0


def test_forced_it_is_run_although_nothing_is_due(machine):
    machine.configure('schedule = "daily"')
    machine.once()
    report = machine.once(force=True)
    assert [point.kind for point in report.points] == ["incremental"]
    assert report.wanted[0].due.reason.startswith("forced: the newest point is of 2026-05-01 02:17")


def test_a_dry_run_tells_what_and_why_and_does_nothing(machine):
    machine.configure('schedule = "daily"\nverify = "weekly"')
    before = {path: path.stat().st_mtime_ns for path in machine.place.rglob("*")}
    report = machine.once(dry_run=True)
    assert (report.state, report.extra) == (runs.PLANNED, {"verify": "never yet"})
    assert report.wanted[0].due.reason == "the volume has no point yet"
    assert [point.kind for point in report.points] == ["full"]
    assert {path: path.stat().st_mtime_ns for path in machine.place.rglob("*")} == before


def test_a_share_is_verified_when_it_is_due_and_damage_is_a_failure(machine):
    machine.configure('schedule = "daily"\nverify = "weekly on sat"\nverify_share = "100%"')
    assert machine.once().verified.ok
    machine.now += timedelta(days=1)
    assert machine.once().verified.ok
    machine.now += timedelta(days=1)
    assert machine.once().verified is None
    (volume,) = machine.repository.volumes()
    image = Path(volume.path, volume.catalog().points[0].images[0].file)
    data = bytearray(image.read_bytes())
    data[9000] ^= 1
    image.write_bytes(data)
    machine.now += timedelta(days=6)
    report = machine.once()
    assert report.exit == 4
    assert [error.name for error in report.errors] == ["DamagedImage"]
    # A day later nothing is looked at, and all is not well again: nobody is told of a recovery.
    machine.now += timedelta(days=1)
    report = machine.once()
    assert [point.kind for point in report.points] == ["full"]
    assert (report.exit, report.errors) == (3, [])
    assert "found damaged" in report.attention[0]
    assert machine.state().failing


def test_what_the_policy_lets_go_is_pruned_but_not_of_what_failed(machine):
    machine.configure('schedule = "daily"', "[jobs.web.retention]\nkeep_last = 3\nfull_every = '0s'")
    for day in range(5):
        machine.write(day)
        report = machine.once()
        assert report.exit == 0, report.errors
        machine.now += timedelta(days=1)
    assert len(machine.kinds()) == 3
    assert [len(one.removed) > 0 for one in report.pruned] == [True]
    moved = machine.source.rename(machine.place / "moved")
    machine.configure('schedule = "daily"', "[jobs.web.retention]\nkeep_last = 1\nfull_every = '0s'")
    report = machine.once()
    assert (report.exit, report.pruned) == (1, [])
    assert len(machine.kinds()) == 3
    moved.rename(machine.source)
    assert machine.once().exit == 0
    assert len(machine.kinds()) == 1


def test_what_one_job_keeps_of_a_volume_no_other_job_prunes(machine):
    other = f'[jobs.slow]\nsources = ["{machine.source}"]\nschedule = "weekly"\n'
    one = "[jobs.web.retention]\nkeep_last = 1\n"
    machine.configure('schedule = "daily"', f"{one}{other}[jobs.slow.retention]\nkeep_weekly = 10")
    # The first of May 2026 is a Friday: this is the end of one week, a whole one, and the beginning of a third.
    for _ in range(12):
        assert [report.exit for report in machine.run("slow", "web")] == [0, 0]
        machine.now += timedelta(days=1)
    assert len(machine.kinds()) == 3
    # What the state directory told, the history tells as well.
    shutil.rmtree(machine.place / "state")
    machine.once()
    assert len(machine.kinds()) == 3
    # A job without retention never lets anything go.
    machine.configure('schedule = "daily"', f"{one}{other}")
    machine.now += timedelta(days=1)
    machine.once()
    assert len(machine.kinds()) == 4
    assert any("nothing of it may go" in sentence for sentence in machine.said)
    machine.configure('schedule = "daily"', one)
    machine.now += timedelta(days=1)
    machine.once()
    assert len(machine.kinds()) == 1


def test_a_full_of_its_own_is_made_as_often_as_the_policy_wants(machine):
    machine.configure('schedule = "daily"', "[jobs.web.retention]\nkeep_last = 2\nfull_every = '10d'")
    fulls = []
    for day in range(21):
        fulls += [day for point in machine.once().points if point.kind == "full"]
        machine.now += timedelta(days=1)
    assert fulls == [0, 10, 20]


def test_a_full_that_was_merged_is_not_made_again_before_its_time(machine):
    """The policy lets its image go within days; the history knows of it all the same."""
    machine.configure('schedule = "daily"\nfull = "monthly"', "[jobs.web.retention]\nkeep_last = 2\nfull_every = '0s'")
    fulls = []
    for day in range(35):
        fulls += [day for point in machine.once().points if point.kind == "full"]
        machine.now += timedelta(days=1)
    assert fulls == [0, 31]


def test_without_a_history_a_full_is_due_by_the_points_and_nothing_is_pruned(machine):
    machine.configure('schedule = "daily"', "[jobs.web.retention]\nkeep_last = 1\nfull_every = '10d'")
    machine.once()
    history = Path(machine.repository.path) / HISTORY
    history.unlink()
    history.mkdir()
    kinds = []
    for _ in range(11):
        machine.now += timedelta(days=1)
        report = machine.once()
        kinds += [point.kind for point in report.points]
        assert [error.name for error in report.errors] == ["DamagedHistory"]
        assert report.pruned == []
    assert kinds == [*["incremental"] * 9, "full", "incremental"]


def test_what_each_run_leaves_for_prometheus(machine):
    machine.configure('schedule = "daily"\nrpo = "30h"')
    machine.file.write_text(
        machine.file.read_text().replace("[jobs.web]", f'textfile = "{machine.place}/b.prom"\n[jobs.web]')
    )
    machine.once()
    text = (machine.place / "b.prom").read_text()
    assert "rpo" in text
    assert str(30 * 3600) in text


def test_a_repository_that_is_not_there_is_a_failure_and_the_next_job_is_run(machine):
    machine.configure(
        'schedule = "daily"\nrepository = "main"',
        f'[repositories.gone]\npath = "{machine.place}/gone"\n'
        f'[jobs.aside]\nrepository = "gone"\nsources = ["{machine.source}"]\n',
    )
    aside, web = sorted(machine.run(), key=lambda report: report.job)
    assert (aside.exit, [error.name for error in aside.errors]) == (1, ["NotARepository"])
    assert web.exit == 0
    assert [sentence for sentence in doubts(load(str(machine.file)), str(machine.file)) if "gone" in sentence]


def test_what_a_run_would_not_find_is_told_before_it_is_needed(machine):
    machine.configure(
        'schedule = "daily"\nmode = "cold"\ncold_hooks = ["/nowhere/hook"]',
        f'[jobs.web.drill]\ncheck = ["/nowhere/check"]\ntarget = "/dev/nowhere"\n'
        f'[jobs.hot]\nsources = ["{machine.source}"]\nmode = "hot"\nfreeze_with = ["/nowhere/freeze"]\n',
    )
    machine.file.write_text(
        machine.file.read_text().replace("[jobs.web]", 'textfile = "/nowhere/blockbak.prom"\n[jobs.web]')
    )
    told = "\n".join(doubts(load(str(machine.file)), str(machine.file)))
    for named in ("hook", "check", "freeze"):
        assert f"/nowhere/{named}" in told
    assert "/dev/nowhere does not exist" in told
    assert "no directory /nowhere" in told


# --- two at a time, and too long ---------------------------------------------------------------------------------


def test_a_second_run_of_a_job_says_so_and_is_done_and_forced_it_fails(machine):
    machine.configure('schedule = "daily"')
    nothing = machine.context
    with jobstate.alone(nothing.state_dir, "web", wait=0, check=nothing.check, say=nothing.say, kernel=nothing.kernel):
        report = machine.once()
        assert (report.state, report.exit, report.points) == (runs.RUNNING, 0, [])
        report = machine.once(force=True)
        assert isinstance(report.errors[0], JobRuns)
        assert report.exit == 1
    assert len(machine.once().points) == 1


def test_a_run_that_is_late_is_ended_and_leaves_nothing_half_made(machine):
    machine.configure('schedule = "daily"\ndeadline = "90s"')
    reading = []

    class Hanging(Quiet):
        def begin(self, label, total):
            reading.append(label)

    machine.context = replace(machine.context, timer=lambda: 1000.0 if reading else 0.0, progress=Hanging())
    report = machine.once()
    assert reading
    assert [type(error) for error in report.errors] == [DeadlinePassed]
    assert report.exit == 1
    assert "within its deadline of 90 seconds" in str(report.errors[0])
    assert not list(Path(machine.repository.path).rglob("*.zst*"))
    assert machine.state().error == "DeadlinePassed"
    machine.context = replace(machine.context, timer=lambda: 0.0)
    assert len(machine.once().points) == 1


# --- telling people ---------------------------------------------------------------------------------------------------


@pytest.fixture
def told(machine, as_root):
    """What the command of the configuration was told; as documents."""
    folder = Path(tempfile.mkdtemp(prefix="blockbak-test-", dir="/run"))
    tell = folder / "tell"
    tell.write_text(f"#!/bin/sh\ncat >>{folder}/told\n")
    tell.chmod(0o755)
    machine.notify = f'[notify]\ncommand = ["{tell}"]\n'

    def found() -> list[tuple[str, str]]:
        file = folder / "told"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [(one["event"], one["job"]) for one in map(json.loads, lines)]

    yield found
    shutil.rmtree(folder)


def test_failures_are_told_each_time_and_the_recovery_once(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    machine.once()
    assert told() == []
    moved = machine.source.rename(machine.place / "moved")
    for _ in range(2):
        machine.now += timedelta(days=1)
        assert machine.once().exit == 1
        assert told() == [("failure", "web")]
    moved.rename(machine.source)
    assert machine.once().exit == 0
    assert told() == [("recovery", "web")]
    machine.now += timedelta(days=1)
    machine.once()
    assert told() == []


def test_a_point_that_is_too_old_is_told_once_a_day_by_whichever_job_runs(machine, told):
    machine.configure(
        'schedule = "daily"\nrpo = "36h"\nrepository = "main"',
        f'[jobs.other]\nsources = ["{machine.source}"]\n{machine.notify}',
    )
    machine.run()
    assert told() == []
    machine.now += timedelta(hours=37)
    # The other job's run makes a point of the very volume, so this one is not too old either.
    machine.run("other")
    assert told() == []
    machine.now += timedelta(hours=37)
    machine.source.rename(machine.place / "moved")
    machine.run("other")
    assert told() == [("failure", "other"), ("missed-rpo", "web")]
    machine.now += timedelta(hours=1)
    machine.run("other")
    assert told() == [("failure", "other")]
    machine.now += timedelta(hours=24)
    machine.run("other")
    assert told() == [("failure", "other"), ("missed-rpo", "web")]
    (machine.place / "moved").rename(machine.source)
    machine.run("other")
    assert told() == [("recovery", "other"), ("recovery", "web")]


def test_a_notifier_that_is_broken_changes_nothing(machine):
    machine.configure(
        'schedule = "daily"', '[notify]\ncommand = ["/nonexistent/tell"]\nurls = ["json://127.0.0.1:1/x"]'
    )
    machine.once()
    machine.source.rename(machine.place / "moved")
    machine.now += timedelta(days=1)
    report = machine.once()
    assert [error.name for error in report.errors] == ["NoSuchSource"]
    assert report.exit == 1
    assert sum("People could not be told of this" in sentence for sentence in machine.said) == 2


def test_only_what_was_asked_for_is_told(machine, told):
    machine.configure('schedule = "daily"', machine.notify + 'on = ["recovery"]\n')
    machine.once()
    moved = machine.source.rename(machine.place / "moved")
    machine.now += timedelta(days=1)
    machine.once()
    moved.rename(machine.source)
    machine.once()
    assert told() == [("recovery", "web")]


def test_a_run_that_was_killed_is_told_by_the_one_who_notices(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    machine.once()
    config = load(str(machine.file))
    assert not runs.tell_unfinished(config, config.jobs["web"], machine.context)
    state = machine.state()
    state.ended = ""
    jobstate.save(machine.context.state_dir, "web", state, machine.context.kernel)
    assert runs.tell_unfinished(config, config.jobs["web"], machine.context)
    assert told() == [("failure", "web")]
    assert not runs.tell_unfinished(config, config.jobs["web"], machine.context)
    machine.now += timedelta(days=1)
    machine.once()
    assert told() == [("recovery", "web")]


def test_a_run_that_systemd_asked_to_end_is_told_by_what_it_starts_then(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    usual = machine.context

    def end() -> None:
        raise Interrupted(state="nothing is left half-made")

    machine.context = replace(usual, check=end)
    assert machine.once().exit == 130
    machine.context = usual
    # Who pressed Ctrl-C knows, so the run itself tells nobody.
    assert told() == []
    config = load(str(machine.file))
    assert runs.tell_unfinished(config, config.jobs["web"], machine.context)
    assert told() == [("failure", "web")]
    assert not runs.tell_unfinished(config, config.jobs["web"], machine.context)
    assert machine.once().exit == 0
    assert told() == [("recovery", "web")]


def test_where_nobody_noticed_that_a_run_was_killed_the_next_one_tells(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    machine.once()
    state = machine.state()
    state.ended = ""
    jobstate.save(machine.context.state_dir, "web", state, machine.context.kernel)
    machine.now += timedelta(days=1)
    assert machine.once().exit == 0
    assert told() == [("failure", "web"), ("recovery", "web")]


def test_a_configuration_that_cannot_be_used_is_told_to_those_of_the_last_one(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    runs.remember(load(str(machine.file)), machine.context)
    machine.configure('schedule = "dayly"')
    with pytest.raises(BlockbakError) as caught:
        load(str(machine.file))
    runs.tell_unusable(caught.value, machine.context)
    assert told() == [("failure", "")]
    machine.configure('schedule = "daily"', machine.notify)
    for _ in range(2):
        runs.remember(load(str(machine.file)), machine.context)
    assert told() == [("recovery", "")]


def test_a_job_that_is_not_in_the_configuration_is_told_by_its_name(machine, told):
    machine.configure('schedule = "daily"', machine.notify)
    config = load(str(machine.file))
    runs.remember(config, machine.context)
    with pytest.raises(BlockbakError) as caught:
        chosen(config, ["gone"])
    runs.tell_unusable(caught.value, machine.context)
    runs.remember(config, machine.context)
    assert told() == [("failure", "gone")]


def test_a_state_directory_that_cannot_be_written_costs_no_point(machine):
    machine.configure('schedule = "daily"')
    (machine.place / "state").write_text("in the way")
    report = machine.once()
    assert report.exit == 0
    assert len(report.points) == 1
    assert [sentence for sentence in machine.said if str(machine.place / "state") in sentence]
