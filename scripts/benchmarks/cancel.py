"""From the request to cancel a flow run, as the UI makes it, to Cancelled, under a worker of each side in turn.

Each serves a pool of its own at its default settings, and who goes first changes. The flow sleeps, and so does a child
process of its. The request comes at a random moment of its sleep, for both workers look for cancels only now and then.
Gone is when the last process of the run has ended.
"""

import argparse
import random
import time

import psutil

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab, wait_until
from scripts.benchmarks.runs import COLD, PREFECT, Side, alternate, order, sides

OPTIONS = {"runs": (7, "runs of each side")}
CANCELLED, GONE = "request -> Cancelled, s", "request -> Cancelled and gone, s"
LONGEST_LOOK_SECONDS = 10.0
"""No worker looks less often, so that a wait of up to this long hits every moment between two looks."""
SLEEP = """
    import os, subprocess, time
    subprocess.Popen(["sleep", "600"])
    open(os.environ["PREFECT__FLOW_RUN_ID"], "w").close()
    time.sleep(600)
"""


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate runs of both sides; the first of each only warms up."""
    with sides(lab, COLD, PREFECT, code=SLEEP) as both:
        for side in both:
            cancel(lab, side)
        ours, theirs = alternate(both, arguments.runs, lambda side: cancel(lab, side), shown=CANCELLED)
    return compare(ours, theirs, {CANCELLED: 4})


def cancel(lab: Lab, side: Side) -> Sample:
    """Let a worker start one flow run, cancel it at some moment when it is running, and look on."""
    bystanders = set(side.worker.children(recursive=True))
    flow_run = order(lab, side)

    def is_cancelled() -> bool:
        return bool(lab.api("GET", f"/flow_runs/{flow_run}")["state_type"] == "CANCELLED")

    wait_until((lab.place / flow_run).exists, "the flow's child")
    time.sleep(random.uniform(0, LONGEST_LOOK_SECONDS))
    processes = set(side.worker.children(recursive=True)) - bystanders
    requested = time.time()
    lab.api("POST", f"/flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    wait_until(is_cancelled, "Cancelled", pause=0.05)
    cancelled = time.time()
    psutil.wait_procs(processes, timeout=120)
    return {CANCELLED: cancelled - requested, GONE: time.time() - requested}
