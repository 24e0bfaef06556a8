"""One no-op flow run from creation to exit, under a worker of each side in turn.

Each polls a pool of its own, at its default settings or as often as --query-seconds says; who goes first changes.
Spawn and exit are seen from outside: we look for a new child of the worker every 10 ms and wait for its
end, which comes after Completed. Created -> Running is the server's own account.
"""

import argparse
import time

import psutil

from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab, wait_until

WALL, CPU = "wall: created -> Completed and gone, s", "children CPU, s"
SETTLE_SECONDS = 1.5


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate runs of both sides; the first of each only warms up."""
    poll = {} if arguments.query_seconds is None else {"PREFECT_WORKER_QUERY_SECONDS": str(arguments.query_seconds)}
    with lab.worker(lab.ours, "ours", **poll) as ours, lab.worker(lab.theirs, "theirs", **poll) as theirs:
        subjects = [(ours, deploy(lab, "ours")), (theirs, deploy(lab, "theirs"))]
        samples: list[list[Sample]] = [[], []]
        for number in range(arguments.runs + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                samples[side].append(run(lab, *subjects[side]))
            print(f"pair {number} of {arguments.runs}: wall {[round(side[-1][WALL], 2) for side in samples]}")
    return compare(samples[0][1:], samples[1][1:], {WALL: 0.6, CPU: 0.6}, of="ratio")


def deploy(lab: Lab, pool: str, code: str = "pass") -> str:
    """Give a pool a deployment of a flow with this code; return the path that orders a run."""
    (lab.place / "flows.py").write_text(f"from prefect import flow\n@flow\ndef example(): {code}\n")
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(lab.place)}}
    flow = lab.api("POST", "/flows/", {"name": "example"})["id"]
    body = {"name": pool, "flow_id": flow, "work_pool_name": pool, "entrypoint": "flows.py:example"}
    return f"/deployments/{lab.api('POST', '/deployments/', body | {'pull_steps': [step]})['id']}/create_flow_run"


def run(lab: Lab, worker: psutil.Popen, order: str) -> Sample:
    """Let a worker run one flow run, and look on."""
    before, bystanders, created = worker.cpu_times(), set(worker.children()), time.time()
    flow_run = lab.api("POST", order, {"state": {"type": "SCHEDULED"}})["id"]
    completed = {"flow_runs": {"id": {"any_": [flow_run]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
    children = wait_until(lambda: set(worker.children()) - bystanders, "a child", pause=0.01)
    spawned = time.time()
    psutil.wait_procs(children, timeout=120)
    gone = time.time()
    (row,) = wait_until(lambda: lab.api("POST", "/flow_runs/filter", completed), "Completed")
    time.sleep(SETTLE_SECONDS)  # each side tidies up in its own way; that is the worker's own CPU, too
    used = [after - start for after, start in zip(worker.cpu_times(), before, strict=True)]
    return {
        "created -> spawn, s": spawned - created,
        "created -> Running, s": row["estimated_start_time_delta"],
        "spawn -> exit, s": gone - spawned,
        WALL: gone - created,
        CPU: used[2] + used[3],
        "worker's own CPU, s": used[0] + used[1],
    }
