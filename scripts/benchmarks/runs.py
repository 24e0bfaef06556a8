"""Flow runs under workers of several kinds: order them, and look on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from typing import Any, NamedTuple
from uuid import uuid4

import psutil

from procworker.errors import ProcworkerError
from scripts.benchmarks.figures import Sample
from scripts.benchmarks.lab import Lab, wait_until
from scripts.benchmarks.processes import born, cpu, first_processes

PREFECT, COLD, WARM = "Prefect", "cold", "warm"
"""Prefect's worker, and ours with a new interpreter per run, or a fork of a warm one."""
PUNCTUAL = {"PREFECT_WORKER_PREFETCH_SECONDS": "0"}
SETTLE_SECONDS, ORDER_SECONDS, PAUSE_SECONDS = 1.5, 0.15, 10.0
"""An order takes much less, but now and then the server pauses."""
OVER = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED"]


class Side(NamedTuple):
    """A worker with a pool of its own, and the path that orders a run of its deployment."""

    kind: str
    worker: psutil.Popen
    pool: str
    order: str


class Seen(NamedTuple):
    """One run, as it was seen; moments are those of time.time()."""

    flow_run: str
    created: float
    spawned: float
    gone: float
    until_running: float
    """From creation on, by the server's account."""
    worker_cpu: float
    rest_cpu: float


@contextmanager
def sides(
    lab: Lab, *kinds: str, code: str = "pass", options: Sequence[str] = (), name: str = "", **variables: str
) -> Iterator[list[Side]]:
    """Run a worker of each kind, with these options and variables; `name` makes their pools unique."""
    with ExitStack() as stack:
        opened = []
        for kind in kinds:
            command, pool = lab.theirs if kind == PREFECT else lab.ours, f"of-{kind.lower()}{name}"
            worker = stack.enter_context(lab.worker(command, pool, *options, **variables))
            opened.append(Side(kind, worker, pool, deploy(lab, pool, code, **job_variables(kind))))
        yield opened


def job_variables(kind: str, **others: Any) -> dict[str, Any]:
    return {"start_method": "fork", **others} if kind == WARM else others


def deploy(lab: Lab, pool: str, code: str = "pass", **job_variables: Any) -> str:
    """Give a pool a deployment of a flow with this code; return the path that orders a run."""
    module = f"example_{uuid4().hex}"
    kind = "async def" if "await " in code else "def"
    (lab.place / f"{module}.py").write_text(f"from prefect import flow\n@flow\n{kind} example(): {code}\n")
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(lab.place)}}
    flow = lab.api("POST", "/flows/", {"name": "example"})["id"]
    body = {"name": module, "flow_id": flow, "work_pool_name": pool}
    body |= {"entrypoint": f"{module}.py:example", "pull_steps": [step], "job_variables": job_variables}
    return f"/deployments/{lab.api('POST', '/deployments/', body)['id']}/create_flow_run"


def order(lab: Lab, side: Side, due: float | None = None) -> str:
    """Order a run that is due now, or at a moment (of time.time()); return its id."""
    details = {} if due is None else {"scheduled_time": datetime.fromtimestamp(due, timezone.utc).isoformat()}
    return str(lab.api("POST", side.order, {"state": {"type": "SCHEDULED", "state_details": details}})["id"])


def order_at_once(lab: Lab, side: Side, number: int) -> float:
    """Order that many runs, all due at one moment that is still to come; wait for it, and return it.

    The worker must not take runs before they are due (PUNCTUAL). Moments are those of time.time().
    """
    due = time.time() + PAUSE_SECONDS + ORDER_SECONDS * number
    for _ in range(number):
        order(lab, side, due)
    if (left := due - time.time()) < 0:
        raise ProcworkerError(f"the server took {-left:.1f} s too long to take {number} orders")
    time.sleep(left)
    return due


def count(lab: Lab, side: Side, *states: str) -> int:
    """How many runs of a side are in one of these states."""
    found = lab.api("POST", "/flow_runs/count", of(side, *states))
    return int(found)


def of(side: Side, *states: str) -> dict[str, Any]:
    """The filter for the runs of a side in one of these states."""
    deployment = side.order.split("/")[2]
    return {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": list(states)}}}}


def watch(lab: Lab, side: Side) -> Seen:
    """Let a worker run one flow run, and look on."""
    before, bystanders, created = cpu(side.worker), first_processes(side.worker), time.time()
    flow_run = order(lab, side)
    over = {"flow_runs": {"id": {"any_": [flow_run]}, "state": {"type": {"any_": OVER}}}}
    started = wait_until(lambda: first_processes(side.worker) - bystanders, "a process of the run", pause=0.03)
    spawned = min(map(born, started))
    psutil.wait_procs(started, timeout=120)
    gone = time.time()
    (row,) = wait_until(lambda: lab.api("POST", "/flow_runs/filter", over), "the end of the run")
    if row["state_type"] != "COMPLETED":
        raise ProcworkerError(f"a run of {side.pool} is {row['state_type']}: {row['state']['message']}")
    time.sleep(SETTLE_SECONDS)  # each side tidies up in its own way; that is the worker's own CPU, too
    used = [after - start for after, start in zip(cpu(side.worker), before, strict=True)]
    return Seen(flow_run, created, spawned, gone, row["estimated_start_time_delta"], *used)


def alternate(
    sides: Sequence[Side], rounds: int, sample: Callable[[Side], Sample], shown: str = ""
) -> list[list[Sample]]:
    """Take that many samples of each side in turns; in each round another side goes first."""
    samples: list[list[Sample]] = [[] for _ in sides]
    for number in range(rounds):
        for place in range(len(sides)):
            turn = (number + place) % len(sides)
            samples[turn].append(sample(sides[turn]))
        values = [f"{side.kind} {taken[-1][shown]:.3g}" for side, taken in zip(sides, samples, strict=True)]
        print(f"round {number + 1} of {rounds}: {shown}: {', '.join(values)}")
    return samples
