"""One no-op flow run from creation to exit, under a worker of each side in turn.

Each polls a pool of its own once a second, so both idle while the other works; who goes first changes.
Spawn and exit are seen from outside: we look for a new child of the worker every 10 ms and wait for its
end. Running and Completed are the server's times. All on one clock.
"""

import argparse
import time
from datetime import datetime

import psutil

from procworker.errors import ProcworkerError
from scripts.benchmarks.figures import Row, Sample, compare
from scripts.benchmarks.lab import Lab, note, wait_until

FLOW = "from prefect import flow\n\n\n@flow\ndef nothing():\n    pass\n"
RUN_SECONDS, SETTLE_SECONDS = 120.0, 1.5
WALL, CPU = "wall: created -> Completed and gone, s", "children CPU, s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="runs of each side (7)")


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """Alternate runs of both sides; the first of each only warms up."""
    poll = {"PREFECT_WORKER_QUERY_SECONDS": "1"}
    with lab.worker(lab.ours, "ours", **poll) as ours, lab.worker(lab.theirs, "theirs", **poll) as theirs:
        subjects = [(ours, deploy(lab, "ours")), (theirs, deploy(lab, "theirs"))]
        samples: list[list[Sample]] = [[], []]
        for number in range(arguments.runs + 1):
            for side in (0, 1) if number % 2 else (1, 0):
                samples[side].append(run(lab, *subjects[side]))
            note(f"pair {number} of {arguments.runs}: wall {[round(side[-1][WALL], 2) for side in samples]}")
    return compare(samples[0][1:], samples[1][1:], most_ratio={WALL: 0.6, CPU: 0.6})


def deploy(lab: Lab, pool: str) -> str:
    """Give a pool a deployment of the no-op flow."""
    (lab.place / "flows.py").write_text(FLOW)
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(lab.place)}}
    flow = lab.api("POST", "/flows/", {"name": "nothing"})["id"]
    body = {"name": pool, "flow_id": flow, "work_pool_name": pool, "entrypoint": "flows.py:nothing"}
    return str(lab.api("POST", "/deployments/", {**body, "pull_steps": [step], "path": str(lab.place)})["id"])


def run(lab: Lab, worker: psutil.Popen, deployment: str) -> Sample:
    """Let a worker run one flow run, and look on."""
    before, bystanders, created = worker.cpu_times(), worker.children(), time.time()
    order = f"/deployments/{deployment}/create_flow_run"
    flow_run = lab.api("POST", order, {"state": {"type": "SCHEDULED"}})["id"]
    found: list[psutil.Process] = []
    times: dict[str, float] = {}

    def is_spawned() -> bool:
        found.extend(child for child in worker.children() if child not in bystanders)
        return bool(found)

    def is_final() -> bool:
        for state in lab.api("GET", f"/flow_run_states/?flow_run_id={flow_run}"):
            moment = datetime.fromisoformat(state["timestamp"].replace("Z", "+00:00"))
            times[state["type"]] = moment.timestamp()
        return bool(times.keys() & {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})

    wait_until(is_spawned, "a child of the worker", RUN_SECONDS, pause=0.01)
    spawned = time.time()
    psutil.wait_procs(found, RUN_SECONDS)
    gone = time.time()
    wait_until(is_final, "a final state", RUN_SECONDS)
    if "COMPLETED" not in times:
        raise ProcworkerError(f"the flow run did not complete: {', '.join(times)}")
    time.sleep(SETTLE_SECONDS)  # each side tidies up in its own way; that is the worker's own CPU, too
    used = [after - start for after, start in zip(worker.cpu_times(), before, strict=True)]
    return {
        "created -> spawn, s": spawned - created,
        "created -> Running, s": times["RUNNING"] - created,
        "spawn -> exit, s": gone - spawned,
        WALL: max(gone, times["COMPLETED"]) - created,
        CPU: used[2] + used[3],
        "worker's own CPU, s": used[0] + used[1],
    }
