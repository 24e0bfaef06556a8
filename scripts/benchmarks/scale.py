"""Many runs at once: 500 sleeping children of our worker, and the memory of ten sleeping flows under either side.

A child is the command `sleep 3600`, nothing limits how many there are, and the worker's growth counts from its first
idle moment; CPU is that of half a minute in which nothing happens. MB and KB are 10^6 and 10^3 bytes. In the end the
worker gets SIGTERM twice, which ends all that runs under it. Ten flow runs sleep in Python, ours are forks of a warm
interpreter; PSS is that of worker, zygote and runs.
"""

import argparse
import time

import psutil

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab, marked, wait_until
from scripts.benchmarks.processes import first_processes, memory, tree
from scripts.benchmarks.runs import (
    COLD,
    PREFECT,
    PUNCTUAL,
    WARM,
    count,
    deploy,
    job_variables,
    order,
    order_at_once,
    sides,
)

OPTIONS = {
    "children": (500, "sleeping children"),
    "seconds": (30.0, "how long to look at the worker's CPU"),
    "flows": (10, "sleeping flow runs under either side"),
}
MOST: Sample = {"worker's growth per child, KB": 60, "worker's RSS, MB": 80, "worker's CPU, %": 3, "processes left": 0}
TREE = "worker, zygote and runs: PSS, MB"
SETTLE_SECONDS, LONGEST_SECONDS, STOP_SECONDS, SIGNAL_PAUSE_SECONDS = 5.0, 600.0, 120.0, 1.1
SLEEP = "\n    import time\n    time.sleep(600)"


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """One after the other: nothing here depends on a moment."""
    rows = compare([crowd(lab, arguments.children, arguments.seconds)], [], MOST)
    ours, theirs = ([sleepers(lab, kind, arguments.flows)] for kind in (WARM, PREFECT))
    return rows + compare(ours, theirs, {TREE: 0.5}, of="ratio")


def crowd(lab: Lab, number: int, window: float) -> Sample:
    """Give our worker so many children that sleep."""
    with sides(lab, COLD, **PUNCTUAL) as (side,):
        side = side._replace(order=deploy(lab, side.pool, command="sleep 3600"))
        worker = side.worker
        time.sleep(SETTLE_SECONDS)
        before = worker.memory_info().rss
        due = order_at_once(lab, side, number)
        what = f"{number} children"
        wait_until(lambda: len(worker.children()) >= number, what, 0.5, LONGEST_SECONDS)
        seconds = time.time() - due
        time.sleep(SETTLE_SECONDS)
        used = sum(worker.cpu_times()[:2])
        time.sleep(window)
        used, rss = sum(worker.cpu_times()[:2]) - used, worker.memory_info().rss
        sample = {
            "children": len(worker.children()),
            "due -> all children, s": seconds,
            "worker's growth per child, KB": (rss - before) / number / 1e3,
            "worker's RSS, MB": rss / 1e6,
            "worker's CPU, %": used / window * 100,
        }
        return sample | stop(worker)


def stop(worker: psutil.Popen) -> Sample:
    """End it as a person would who does not want to wait."""
    mark, began = worker.environ()["HOME"], time.time()
    worker.terminate()
    time.sleep(SIGNAL_PAUSE_SECONDS)  # signals within a second count once
    worker.terminate()
    worker.wait(STOP_SECONDS)
    return {"SIGTERM twice -> gone, s": time.time() - began, "processes left": len(marked(mark))}


def sleepers(lab: Lab, kind: str, number: int) -> Sample:
    """Have so many flow runs sleep at once, and look at what they take."""
    with sides(lab, kind, code=SLEEP, name="-flows") as (side,):
        if kind == WARM:  # a worker that has been up for a while has learnt from a run that has ended
            first = side._replace(order=deploy(lab, side.pool, **job_variables(kind)))
            order(lab, first)
            wait_until(lambda: count(lab, first, "COMPLETED"), "the first run")
        for _ in range(number):
            order(lab, side)
        wait_until(lambda: count(lab, side, "RUNNING") >= number, "the runs", 0.5, LONGEST_SECONDS)
        time.sleep(SETTLE_SECONDS)
        whole = memory(tree(side.worker))
        return {TREE: whole, "processes": len(tree(side.worker)), "runs": len(first_processes(side.worker))}
