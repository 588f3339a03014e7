"""Drills of a job, when they are due. Their namespaces hold the mounts of others, so they are not in ``history``."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from tests.machine import Machine


def test_a_drill_when_it_is_due(as_root, tmp_path):
    machine = Machine(tmp_path)
    machine.configure('schedule = "daily"\nrto = "1h"', '[jobs.web.drill]\nschedule = "weekly"')
    report = machine.once()
    assert report.exit == 0, (report.errors, report.attention)
    assert [one.ok for one in report.drilled] == [True]
    machine.now += timedelta(days=1)
    assert machine.once().drilled == []
    machine.now += timedelta(days=6)
    machine.configure('schedule = "daily"\nrto = "1s"', '[jobs.web.drill]\nschedule = "weekly"')
    timer = iter(range(0, 1 << 30, 5))
    machine.context = replace(machine.context, timer=lambda: float(next(timer)))
    report = machine.once()
    assert report.exit == 3
    assert "the RTO is 1.0 s" in report.attention[0]
