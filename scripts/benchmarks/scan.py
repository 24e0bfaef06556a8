"""One look for the members of a run on a host with many more processes: older than the run, as usual, or all younger.

Needs no Prefect. The younger are strangers with an environment of their own, so each of them is asked for its mark.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from procworker.system.processes import COOKIE, identify
from procworker.system.tree import Family
from scripts.benchmarks.figures import Row, Sample, compare

OPTIONS: dict[str, tuple[float, str]] = {}
PROCESSES, MOST_SECONDS, LOOKS = 2000, 0.15, 20
CROWD = """
import os, signal, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        signal.pause()
print("ready", flush=True)
sys.stdin.read()
os.killpg(0, signal.SIGKILL)
"""


@contextmanager
def crowd(number: int) -> Iterator[None]:
    """That many sleeping processes."""
    command = [sys.executable, "-S", "-E", "-c", CROWD, str(number)]
    leader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout
    assert leader.stdin
    try:
        leader.stdout.readline()
        yield
    finally:
        leader.stdin.close()
        leader.wait()


@contextmanager
def run() -> Iterator[Family]:
    """A run of one process."""
    root = subprocess.Popen(["sleep", "600"], env={**os.environ, COOKIE: "bench"}, start_new_session=True)
    process = identify(root.pid)
    assert process
    try:
        yield Family(process, "bench")
    finally:
        root.send_signal(signal.SIGKILL)
        root.wait()


def measure(lab: object, arguments: argparse.Namespace) -> list[Row]:
    """Look many times at each crowd."""
    number = PROCESSES - len(psutil.pids())
    samples: dict[str, list[float]] = {}
    with crowd(number), run() as family:
        samples["2,000 older processes, s"] = [look(family) for _ in range(LOOKS)]
    with run() as family:
        time.sleep(0.05)  # start times are counted in hundredths of a second
        with crowd(number):
            samples["2,000 younger processes, s"] = [look(family) for _ in range(LOOKS)]
    ours: list[Sample] = [dict(zip(samples, values, strict=True)) for values in zip(*samples.values(), strict=True)]
    return compare(ours, [], dict.fromkeys(samples, MOST_SECONDS))


def look(family: Family) -> float:
    """Seconds of one scan."""
    began = time.perf_counter()
    assert family.members() == {family.root}
    return time.perf_counter() - began
