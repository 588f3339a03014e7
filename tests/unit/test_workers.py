"""Threads that share jobs: what ends them, and which error is told."""

from __future__ import annotations

import threading
import time

import pytest

from blockbak.errors import Interrupted
from blockbak.flow import workers
from blockbak.flow.context import never
from blockbak.image.writer import Stopped


class Boom(Exception):
    pass


@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_job_is_done_once(count):
    done = []
    workers.run(iter(range(500)), lambda: done.append, workers=count, check=never)
    assert sorted(done) == list(range(500))


def test_one_thread_takes_jobs_in_order():
    done = []
    workers.run(range(100), lambda: done.append, workers=1, check=never)
    assert done == list(range(100))


def test_each_thread_has_hands_of_its_own():
    made = []
    together = threading.Barrier(3)

    def make():
        mine = []
        made.append(mine)

        def work(job):
            together.wait(10)
            mine.append(job)

        return work

    workers.run(range(3), make, workers=3, check=never)
    assert sorted(map(len, made)) == [1, 1, 1]


def test_the_first_error_is_raised_and_ends_all():
    failed = threading.Event()
    done = []

    def work(job):
        if job == 3:
            failed.set()
            raise Boom("first")
        if job > 3:
            failed.wait(10)
            time.sleep(0.05)
            raise Boom("later")
        done.append(job)

    with pytest.raises(Boom, match="first"):
        workers.run(range(10_000), lambda: work, workers=2, check=never)
    assert len(done) <= 3


def test_stop_wakes_those_that_wait_for_each_other():
    """A worker that waits for its turn gets Stopped; the cause is what is raised."""
    condition = threading.Condition()
    stopped = []

    def stop():
        with condition:
            stopped.append(True)
            condition.notify_all()

    def work(job):
        if job == 0:
            time.sleep(0.05)
            raise Boom("cause")
        with condition:
            assert condition.wait_for(lambda: stopped, 20), "nobody woke it"
        raise Stopped

    with pytest.raises(Boom, match="cause"):
        workers.run(range(4), lambda: work, workers=4, check=never, stop=stop)


def test_stopped_before_the_cause_does_not_hide_it():
    both = threading.Barrier(2)

    def work(job):
        both.wait(10)
        if job == 0:
            raise Stopped
        time.sleep(0.05)
        raise Boom("cause")

    with pytest.raises(Boom, match="cause"):
        workers.run(range(2), lambda: work, workers=2, check=never)


def test_a_wish_to_stop_ends_the_workers():
    asked = threading.Event()
    busy = threading.Event()

    def check():
        if busy.is_set():
            raise Interrupted(state="nothing is left")

    def work(job):
        busy.set()
        time.sleep(0.01)

    def jobs():
        number = 0
        while True:
            yield number
            number += 1

    before = threading.active_count()
    with pytest.raises(Interrupted):
        workers.run(jobs(), lambda: work, workers=3, check=check, stop=asked.set)
    assert asked.is_set()
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [Boom("make"), KeyboardInterrupt("make"), SystemExit(3)])
def test_an_error_of_any_sort_comes_back(error):
    def make():
        raise error

    with pytest.raises(type(error)) as raised:
        workers.run(range(3), make, workers=2, check=never)
    assert raised.value is error


def test_an_error_of_the_jobs_themselves_comes_back():
    def jobs():
        yield 1
        raise Boom("no more")

    with pytest.raises(Boom, match="no more"):
        workers.run(jobs(), lambda: lambda job: None, workers=3, check=never)


def test_a_wish_to_stop_that_came_before_is_seen_before_the_first_job():
    done = []

    def asked():
        raise Interrupted(state="it was a test")

    with pytest.raises(Interrupted):
        workers.run(range(3), lambda: done.append, workers=2, check=asked)
    assert done == []
