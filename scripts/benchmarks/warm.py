"""One no-op flow run as a fork of a warm interpreter (start_method fork), beside Prefect's worker and a cold start.

Three workers, each with a pool of its own, run in turn at their default settings; then two of them with both polling
every second. What a wall time depends on most is how often a worker polls; "wall per run" leaves that out: it goes from
when the kernel started the first process of the run until that has ended. CPU is that of the run's processes, of the
zygote that they were forked from, and, where it says so, of the worker; what a zygote uses once, until it is warm and
has learnt from the first run, is a row of its own. A proxy before the server sees the first time that a run calls the
API; "asked" is when our worker logs that it submits the run, just before it spawns or forks.

Prefect's engine keeps a flow that is over waiting for its own heartbeat thread, for up to a second, unless the flow is
async; so there are rows of an async one, too.
"""

import argparse
from datetime import datetime
from typing import NamedTuple

from scripts.benchmarks.figures import Row, Sample, compare, prefixed
from scripts.benchmarks.lab import Lab, wait_until
from scripts.benchmarks.processes import calm
from scripts.benchmarks.proxy import Proxy
from scripts.benchmarks.runs import COLD, PREFECT, WARM, Side, alternate, deploy, job_variables, sides, watch

OPTIONS = {"runs": (7, "runs of each side, in each of three series")}
RUNNING, WALL, TOTAL = "created -> Running, s", "wall per run: process starts -> gone, s", "created -> gone, s"
CPU, ALL_CPU = "CPU per run: run and zygote, s", "CPU per run: run, zygote and worker, s"
CALL, ASKED, ONCE = (
    "process starts -> first API call, s",
    "asked -> first API call, s",
    "CPU of the zygote until warm, once, s",
)
OF_COLD = "asked -> first API call, warm / cold"
RATIOS = {RUNNING: 0.15, WALL: 0.12, CPU: 0.11, ALL_CPU: 0.11}
NOOP, ASYNC_NOOP = "pass", "\n    import asyncio\n    await asyncio.sleep(0)"


def measure(lab: Lab, arguments: argparse.Namespace) -> list[Row]:
    """At both ways of polling, and an async flow."""
    with Proxy(lab.client.base_url) as proxy:
        bench = Bench(lab, proxy, arguments.runs)
        with sides(lab, WARM, COLD, PREFECT) as opened:
            told = bench.warmed(opened)
            once = calm(told[0].worker)
            warm, cold, theirs = bench.take(told)
        with sides(lab, WARM, PREFECT, name="-often", PREFECT_WORKER_QUERY_SECONDS="1") as opened:
            often, theirs_often = (only(side, RUNNING, TOTAL) for side in bench.take(bench.warmed(opened)))
            swift, theirs_swift = (
                only(side, WALL, CPU, ALL_CPU) for side in bench.take(bench.warmed(opened, ASYNC_NOOP))
            )
    calls = [{ASKED: one[ASKED], OF_COLD: one[ASKED] / other[ASKED]} for one, other in zip(warm, cold, strict=True)]
    return [
        *compare(only(warm, *theirs[0]), theirs, RATIOS, of="ratio"),
        *compare(calls, [], {ASKED: 0.12, OF_COLD: 0.06}),
        *compare([{ONCE: once}], [], {}),
        *prefixed("both polling every second: ", compare(often, theirs_often, {})),
        *prefixed("async flow: ", compare(swift, theirs_swift, RATIOS, of="ratio")),
        *prefixed("cold: ", compare(cold, theirs, {})),
    ]


class Bench(NamedTuple):
    """What all series have in common."""

    lab: Lab
    proxy: Proxy
    runs: int

    def warmed(self, opened: list[Side], code: str = NOOP) -> list[Side]:
        """Give each side a flow whose runs go by way of the proxy, and run it once."""
        env = {"PREFECT_API_URL": self.proxy.url()}
        told = []
        for side in opened:
            order = deploy(self.lab, side.pool, code, **job_variables(side.kind, env=env))
            told.append(side._replace(order=order))
            watch(self.lab, told[-1])
            calm(side.worker)
        return told

    def take(self, told: list[Side]) -> list[list[Sample]]:
        return alternate(told, self.runs, self.run, shown=WALL)

    def run(self, side: Side) -> Sample:
        """Take the times of one run."""
        self.proxy.requests.clear()
        seen = watch(self.lab, side)
        called = self.proxy.requests[0].at
        sample = {
            RUNNING: seen.until_running,
            TOTAL: seen.gone - seen.created,
            WALL: seen.gone - seen.spawned,
            CPU: seen.rest_cpu,
            ALL_CPU: seen.rest_cpu + seen.worker_cpu,
            CALL: called - seen.spawned,
        }
        return sample if side.kind == PREFECT else sample | {ASKED: called - asked(self.lab, seen.flow_run)}


def asked(lab: Lab, flow_run: str) -> float:
    """When our worker was about to start a run, by the run's log on the server."""
    query = {"logs": {"flow_run_id": {"any_": [flow_run]}}}

    def said() -> list[str]:
        lines = lab.api("POST", "/logs/filter", query)
        return [line["timestamp"] for line in lines if "submitting flow run" in line["message"]]

    return datetime.fromisoformat(wait_until(said, "the worker's log")[0].replace("Z", "+00:00")).timestamp()


def only(samples: list[Sample], *names: str) -> list[Sample]:
    return [{name: sample[name] for name in names} for sample in samples]
