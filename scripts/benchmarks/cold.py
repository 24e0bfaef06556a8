"""One no-op flow run from creation to exit, under a worker of each side in turn.

Each polls a pool of its own, at its default settings or as often as --query-seconds says; who goes first changes.
Spawn and exit are seen from outside: when the kernel started the first process of the run, and when that has ended,
which comes after Completed. Created -> Running is the server's own account.
"""

import argparse

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab
from scripts.benchmarks.runs import COLD, PREFECT, Side, alternate, sides, watch

OPTIONS = {"runs": (7, "runs of each side"), "query-seconds": (None, "poll interval, else each side's default")}
WALL, CPU = "wall: created -> Completed and gone, s", "children CPU, s"


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate runs of both sides; the first of each only warms up."""
    interval = arguments.query_seconds
    poll = {} if interval is None else {"PREFECT_WORKER_QUERY_SECONDS": str(interval)}
    with sides(lab, COLD, PREFECT, **poll) as both:
        for side in both:
            run(lab, side)
        ours, theirs = alternate(both, arguments.runs, lambda side: run(lab, side), shown=WALL)
    return compare(ours, theirs, {WALL: 0.6, CPU: 0.6}, of="ratio")


def run(lab: Lab, side: Side) -> Sample:
    """Take the times of one run."""
    seen = watch(lab, side)
    return {
        "created -> spawn, s": seen.spawned - seen.created,
        "created -> Running, s": seen.until_running,
        "spawn -> exit, s": seen.gone - seen.spawned,
        WALL: seen.gone - seen.created,
        CPU: seen.rest_cpu,
        "worker's own CPU, s": seen.worker_cpu,
    }
