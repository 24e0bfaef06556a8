"""Runs that cannot go well: whatever the server refuses or has lost, the worker goes on and runs the next good run.

Real processes, the mini engine, and a limit of one: a slot that a poison run kept would stop everything.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import anyio
import pytest
from workers import engine_command, settings_for, working

from procworker.process import ProcessWorker
from procworker.testing.api import PrefectApi
from procworker.testing.messages import Request

pytestmark = pytest.mark.slow

REFUSALS = (404, 409, 422)
TEMPLATE = {
    "job_configuration": {
        name: f"{{{{ {name} }}}}" for name in ("command", "env", "labels", "working_dir", "stream_output")
    },
    "variables": {
        "properties": {"command": {"default": engine_command()}, "env": {}, "labels": {}, "working_dir": {}}
        | {"stream_output": {"default": False}}
    },
}
GONE = '{"exception_message": "scripted"}'
ALWAYS = float("inf")
CRASHES = {"do": "exit", "code": 3}
SECONDS = 40.0


@dataclass
class Scene:
    """A server and a worker with a single slot; every poison run has a deployment and a flow of its own."""

    server: PrefectApi
    worker: ProcessWorker
    poison: list[UUID] = field(default_factory=list)

    def schedule(self, parameters: Any = None, **deployment: Any) -> UUID:
        name = f"poison-{len(self.poison)}"
        source = self.server.add_deployment(name, flow=name, **deployment)
        self.poison.append(self.server.schedule(source, parameters=parameters or {}))
        return self.poison[-1]

    def spoil(self, run: UUID, method: str, path: str, skip: int = 0, **how: Any) -> None:
        """Spoil what the worker asks about this run, its deployment and its flow, after the first `skip` times."""
        row, seen = self.server.run(run), 0
        about = {str(run), str(row.deployment_id), str(row.flow_id)}

        def strikes(request: Request) -> bool:
            nonlocal seen
            words = {*request.path.split("/"), *request.query.values()}
            mine = bool(words & about) and "x-prefect-worker-name" in request.headers
            seen += mine
            return mine and seen > skip

        self.server.fault(method, path, when=strikes, **{"times": ALWAYS, **how})

    async def at_rest(self) -> None:
        """Wait until the worker has nothing in hand."""
        with anyio.fail_after(SECONDS):
            await self.worker._moved.until(lambda: not self.worker.runs)

    async def goes_on(self) -> None:
        """The next good run is run, and the slot comes back."""
        good = self.server.schedule(self.server.add_deployment("good", flow="good"))
        await self.server.wait_state(good, "COMPLETED", timeout=SECONDS)
        await self.at_rest()
        assert self.worker.limiter.borrowed_tokens == 0
        assert self.worker.limiter.total_tokens == 1
        assert [state.type for state in self.server.run(good).states].count("RUNNING") == 1


@asynccontextmanager
async def at_work(server: PrefectApi, **options: Any) -> AsyncIterator[Scene]:
    server.add_pool(base_job_template=TEMPLATE)
    fast = {"heartbeat_interval_seconds": 0.1, "base_job_template": TEMPLATE, "sink": lambda *line: None}
    worker = ProcessWorker("pool", settings=settings_for(server), limit=1, name="taster", **{**fast, **options})
    async with working(worker):
        yield Scene(server, worker)


@pytest.fixture(autouse=True)
def nothing_is_left(clean_environment: None, no_survivors: Callable[[str], None]) -> None:
    no_survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}")


@dataclass
class Call:
    """One request in the line of a run, and the state in which its refusal leaves the run."""

    method: str
    path: str
    final: str
    parameters: dict[str, Any] = field(default_factory=dict)
    skip: int = 0
    times: float = ALWAYS


LINE = {
    "claim": Call("POST", "/set_state", "SCHEDULED"),
    "look back, and every later one": Call("GET", "/flow_run_states", "PENDING"),
    "look back, once": Call("GET", "/flow_run_states", "CRASHED", times=1),
    "deployment": Call("GET", "/deployments/", "CRASHED"),
    "flow": Call("GET", "/flows/", "CRASHED"),
    "pid": Call("PATCH", "/flow_runs/[^/]+$", "COMPLETED"),
    "labels": Call("PATCH", "/labels", "COMPLETED"),
    "history for the report": Call("GET", "/flow_run_states", "RUNNING", CRASHES, skip=1),
    "report": Call("POST", "/set_state", "RUNNING", CRASHES, skip=1),
}
"""What a server that goes on refusing a report is told cannot be told by anybody: such a run stays as it is."""


@pytest.mark.parametrize("name", LINE)
async def test_a_refused_call_in_the_line_of_a_run_costs_this_run_alone(server: PrefectApi, name: str) -> None:
    call = LINE[name]
    async with at_work(server) as scene:
        for status in REFUSALS:
            run = scene.schedule(call.parameters)
            scene.spoil(run, call.method, call.path, skip=call.skip, times=call.times, status=status, body=GONE)
        await server.wait_for(lambda: all(fault.count for fault in server.faults), SECONDS, "every refusal")
        await scene.goes_on()

        gone = "CANCELLED" if name == "deployment" else call.final  # a 404 says that the deployment is no more
        assert [server.run(run).state.type for run in scene.poison] == [gone, call.final, call.final]


BESIDE = {
    "poll": ("POST", "/get_scheduled_flow_runs"),
    "work pool": ("GET", "/work_pools/pool$"),
    "heartbeat": ("POST", "/heartbeat"),
    "logs": ("POST", "/logs"),
    "events": ("POST", "/events"),
}


@pytest.mark.parametrize("name", BESIDE)
async def test_a_refused_call_beside_the_runs_costs_none(server: PrefectApi, name: str) -> None:
    async with at_work(server, create_pool_if_not_found=False) as scene:
        await server.wait_request("POST", "/get_scheduled_flow_runs")
        faults = [server.fault(*BESIDE[name], times=1, status=status, body=GONE) for status in REFUSALS]
        if name == "logs":
            scene.schedule({"do": "exit", "code": 3})  # there is something to say about it
        else:
            scene.schedule()
        await server.wait_for(lambda: all(server.run(run).end_time for run in scene.poison), SECONDS)
        await scene.goes_on()

    assert faults[0].count == 1


async def test_a_refused_look_for_cancels_only_delays_the_cancel(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("procworker.cancels.CANCEL_POLL_SECONDS", 0.1)
    faults = [server.fault("POST", "/flow_runs/filter", times=1, status=status, body=GONE) for status in REFUSALS]
    async with at_work(server) as scene:
        run = scene.schedule({"do": "sleep"})
        await server.wait_state(run, "RUNNING", timeout=SECONDS)
        server.request_cancel(run)
        await server.wait_state(run, "CANCELLED", timeout=SECONDS)
        await scene.goes_on()

    assert [fault.count for fault in faults] == [1, 1, 1]


Spoiling = Callable[[Scene], Awaitable[set[str] | None]]


async def run_deleted_before_the_claim(scene: Scene) -> None:
    run = scene.schedule()
    scene.spoil(run, "POST", "/set_state", status=404, body=GONE)
    await scene.server.wait_request("POST", f"/flow_runs/{run}/set_state")
    scene.server.delete_run(run)


async def run_deleted_after_the_claim(scene: Scene) -> None:
    run = scene.schedule()
    scene.spoil(run, "GET", "/flow_run_states", times=1, hang=True)
    await scene.server.wait_state(run, "PENDING", timeout=SECONDS)
    scene.server.delete_run(run)
    scene.server.faults[-1].release()


async def run_deleted_while_it_runs(scene: Scene) -> None:
    run = scene.schedule({"do": "sleep", "seconds": 0.5})
    await scene.server.wait_state(run, "RUNNING", timeout=SECONDS)
    scene.server.delete_run(run)


async def run_deleted_before_the_report(scene: Scene) -> None:
    run = scene.schedule(CRASHES)
    scene.spoil(run, "GET", "/flow_run_states", skip=1, times=1, hang=True)
    await scene.server.wait_for(lambda: scene.server.faults[-1].count, SECONDS)
    scene.server.delete_run(run)
    scene.server.faults[-1].release()


async def deployment_deleted_before_the_poll(scene: Scene) -> set[str]:
    run = scene.schedule()
    scene.server.delete_deployment(scene.server.run(run).deployment_id)  # type: ignore[arg-type]
    await scene.server.wait_state(run, "CANCELLED", timeout=SECONDS)
    return {"CANCELLED"}


async def deployment_deleted_after_the_claim(scene: Scene) -> set[str]:
    run = scene.schedule()
    scene.spoil(run, "GET", "/deployments/", times=1, hang=True)
    await scene.server.wait_request("GET", "/deployments/")
    scene.server.delete_deployment(scene.server.run(run).deployment_id)  # type: ignore[arg-type]
    scene.server.faults[-1].release()
    return {"CANCELLED"}


async def flow_deleted(scene: Scene) -> set[str]:
    run = scene.schedule()
    del scene.server.flows[scene.server.run(run).flow_id]
    return {"CRASHED"}


async def pool_deleted_while_it_runs(scene: Scene) -> set[str]:
    run = scene.schedule({"do": "sleep", "seconds": 0.5})
    await scene.server.wait_state(run, "RUNNING", timeout=SECONDS)
    scene.server.delete_pool("pool")
    await scene.server.wait_for(lambda: "pool" in scene.server.pools, SECONDS, "the pool is made again")
    return {"COMPLETED"}


async def pool_paused(scene: Scene) -> set[str]:
    scene.server.pools["pool"].is_paused = True
    run = scene.schedule()
    polls = len(scene.server.seen("POST", "/get_scheduled_flow_runs"))
    await scene.server.wait_request("POST", "/get_scheduled_flow_runs", polls + 3)
    assert scene.server.run(run).state.type == "SCHEDULED"
    scene.server.pools["pool"].is_paused = False
    return {"COMPLETED"}


async def pool_of_another_type(scene: Scene) -> set[str]:
    run = scene.schedule({"do": "sleep", "seconds": 0.5})
    await scene.server.wait_state(run, "RUNNING", timeout=SECONDS)
    scene.server.pools["pool"].type = "kubernetes"
    beats = len(scene.server.seen("POST", "/heartbeat"))
    await scene.server.wait_request("POST", "/heartbeat", beats + 2)
    return {"COMPLETED"}


async def job_variables_of_the_wrong_shape(scene: Scene) -> set[str]:
    scene.schedule(job_variables={"labels": ["no", "mapping"]})
    return {"CRASHED"}


async def command_that_does_not_exist(scene: Scene) -> set[str]:
    scene.schedule(job_variables={"command": "no-such-command"})
    return {"CRASHED"}


async def directory_that_does_not_exist(scene: Scene) -> set[str]:
    scene.schedule(job_variables={"working_dir": "/no/such/directory"})
    return {"CRASHED"}


async def engine_that_dies(scene: Scene) -> set[str]:
    scene.schedule({"do": "raise"})
    return {"CRASHED"}


@pytest.mark.parametrize(
    "spoil",
    [
        run_deleted_before_the_claim,
        run_deleted_after_the_claim,
        run_deleted_while_it_runs,
        run_deleted_before_the_report,
        deployment_deleted_before_the_poll,
        deployment_deleted_after_the_claim,
        flow_deleted,
        pool_deleted_while_it_runs,
        pool_paused,
        pool_of_another_type,
        job_variables_of_the_wrong_shape,
        command_that_does_not_exist,
        directory_that_does_not_exist,
        engine_that_dies,
    ],
    ids=lambda spoil: spoil.__name__.replace("_", "-"),
)
async def test_the_worker_outlives_it_and_runs_the_next_run(server: PrefectApi, spoil: Spoiling) -> None:
    async with at_work(server) as scene:
        await server.wait_request("POST", "/get_scheduled_flow_runs")
        final = await spoil(scene)
        await scene.goes_on()
        for run in scene.poison:
            if final is None:
                assert run not in server.runs
            else:
                assert {server.run(run).state.type} == final


async def test_a_worker_that_stumbled_over_a_poison_run_would_be_found(server: PrefectApi) -> None:
    """The negative control: with the only slot taken, the next good run is not run."""
    async with at_work(server) as scene:
        await server.wait_request("POST", "/get_scheduled_flow_runs")
        await scene.worker.limiter.acquire_on_behalf_of("a run that never ends")
        good = scene.schedule()
        with pytest.raises(AssertionError, match="not seen"):
            await server.wait_state(good, "COMPLETED", timeout=2)
        scene.worker.limiter.release_on_behalf_of("a run that never ends")
        await scene.goes_on()
