"""A thread that cannot be started, in a process of its own: the limit would hold for all tests after it."""

import subprocess
import sys

SCRIPT = """
import resource, threading, time
from blockbak.flow import workers

def jobs():
    while True:
        time.sleep(0.005)
        yield 1

with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
done = []
try:
    workers.run(jobs(), lambda: done.append, workers=1000, check=lambda: None)
except RuntimeError as error:
    print(error, threading.active_count() - 1)
"""


def test_where_a_thread_cannot_be_started_none_goes_on_working():
    """What they work on is closed by whoever called: a late write would go wherever the number leads by then."""
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.stdout, ended.returncode) == ("can't start new thread 0\n", 0), ended.stderr
