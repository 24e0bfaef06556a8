"""What a worker itself needs per run: many runs of the command `true`, so that the run costs next to nothing.

The runs are ordered before they are due, and no worker takes them earlier. Time counts from the first process until all
were started, as the worker logs it. Nothing else limits either worker but its own settings. The server does all it can
for either: where it has a CPU core in full, a worker cannot be faster.
"""

import argparse
import time
from pathlib import Path

import psutil

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab, wait_until
from scripts.benchmarks.processes import cpu, first_processes
from scripts.benchmarks.runs import COLD, PREFECT, PUNCTUAL, Side, alternate, deploy, order_at_once, sides
from scripts.benchmarks.throughput import server_cpu

OPTIONS = {"rounds": (2, "rounds of each side"), "runs": (500, "flow runs of each side, in all rounds together")}
OWN, RATE, SERVER = "worker's own CPU per run, s", "runs a second", "server's CPU, cores"
STARTED = " started as ", " submitted to infrastructure"
TIMES_AS_FAST, FULL_CORE = 4.0, 0.95
SETTLE_SECONDS, PATIENCE_SECONDS, PAUSE_SECONDS = 3.0, 25.0, 0.2
"""A worker that starts nothing for so long, more than two of its polls, starts no more."""


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate; one run of each side warms up."""
    with sides(lab, COLD, PREFECT, **PUNCTUAL) as opened:
        both = [side._replace(order=deploy(lab, side.pool, command="true")) for side in opened]
        for side in both:
            burst(lab, side, 1)
        number = max(1, arguments.runs // arguments.rounds)
        ours, theirs = alternate(both, arguments.rounds, lambda side: burst(lab, side, number), shown=RATE)
    rows = {row["name"]: row for row in compare(ours, theirs, {OWN: 0.10}, of="ratio")}
    fast, full = rows[RATE]["ratio"] >= TIMES_AS_FAST, rows[SERVER]["median"] >= FULL_CORE
    bounds = f"ratio >= {TIMES_AS_FAST:g}, or the server's CPU >= {FULL_CORE:g}"
    rows[RATE]["target"] = f"{bounds} {'met' if fast or full else 'MISSED'}"
    return list(rows.values())


def burst(lab: Lab, side: Side, number: int) -> Sample:
    """Let a worker do so many runs."""
    before = starts(side.worker)
    order_at_once(lab, side, number)
    own, used = cpu(side.worker), server_cpu(lab)
    wait_until(lambda: starts(side.worker) > before, "the first run", PAUSE_SECONDS / 4)
    seen, began = 0, time.time()
    ended = began
    while seen < number and time.time() - ended < PATIENCE_SECONDS:
        if (now := starts(side.worker) - before) > seen or first_processes(side.worker):
            seen, ended = now, time.time()
        time.sleep(PAUSE_SECONDS)
    seconds, used = max(ended - began, PAUSE_SECONDS), server_cpu(lab) - used
    time.sleep(SETTLE_SECONDS)  # for what each side does when a run is over
    after = cpu(side.worker)
    return {
        "runs seen to start": seen,
        OWN: (after.worker - own.worker) / seen,
        "children's CPU per run, s": (after.rest - own.rest) / seen,
        RATE: seen / seconds,
        SERVER: used / seconds,
        "server's CPU per run, s": used / seen,
    }


def starts(worker: psutil.Popen) -> int:
    """How many runs have been started: the first line about that comes when their process is there, on either side."""
    log = Path(worker.environ()["HOME"], "log").read_text(errors="replace")
    return sum(any(text in line for text in STARTED) for line in log.splitlines())
