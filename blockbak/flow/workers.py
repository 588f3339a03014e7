"""Threads that take jobs in order and run each to completion.

The heavy calls (read, hash, compress, write) release the interpreter's lock, so threads are enough; the
job's buffer stays in the cache of the core that works on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from blockbak.image.writer import Stopped

Job = TypeVar("Job")


def cores() -> int:
    """The best number of workers where little is waited for: more only take the interpreter's lock from each
    other, which cost a third of the time of a verify.
    """
    return len(os.sched_getaffinity(0))


def run(
    jobs: Iterable[Job],
    make: Callable[[], Callable[[Job], None]],
    *,
    workers: int,
    check: Callable[[], None],
    stop: Callable[[], None] = lambda: None,
) -> None:
    """Call ``make()`` once per thread, and what it returns with each job.

    The first error ends all workers and is raised; ``stop`` is called then, so that workers waiting for
    each other wake up. ``check`` runs before the first job, and then now and then, in the calling thread, and may raise
    too.
    """
    pending = iter(jobs)
    guard = threading.Lock()
    errors: list[BaseException] = []
    over = threading.Event()

    def fail(error: BaseException) -> None:
        with guard:
            if not isinstance(error, Stopped) or not errors:
                errors.append(error)
        over.set()
        stop()

    def loop() -> None:
        try:
            work = make()
            while not over.is_set():
                with guard:
                    job = next(pending, None)
                if job is None:
                    return
                work(job)
        except BaseException as error:  # noqa: BLE001 - it is raised again in the calling thread
            fail(error)

    threads: list[threading.Thread] = []
    try:
        check()  # small work may be done before anybody would look again
        for number in range(workers):
            thread = threading.Thread(target=loop, name=f"worker-{number}", daemon=True)
            thread.start()
            threads.append(thread)
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                if not over.is_set():
                    check()
    except BaseException as error:  # noqa: BLE001 - raised again below, once the workers have ended
        fail(error)
        for thread in threads:
            thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, Stopped)), errors[0])
