"""A worker's slots, whatever happens at any of its awaits: free + live == limit, and no run is lost or run twice.

Server, journal and infrastructure are in memory, and time is the loop's own: where a loop would wait, its clock moves
on. So every case is repeatable, and an hour of a worker's life takes milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import selectors
import sys
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock
from uuid import UUID

import anyio
import anyio.lowlevel
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from procworker import run as run_module
from procworker import worker as worker_module
from procworker.configuration import BaseJobConfiguration, BaseVariables, BaseWorkerResult
from procworker.errors import InfrastructureNotFound, ObjectNotFound, Rejected, Unauthorized, Unreachable
from procworker.outcome import ExitUnknown
from procworker.server import models
from procworker.settings import Settings
from procworker.testing.model import Model
from procworker.testing.rows import FINAL
from procworker.testing.rows import State as ModelState
from procworker.worker import BaseWorker

pytestmark = pytest.mark.slow

STEPS = int(os.environ.get("PROCWORKER_TEST_STEPS", "400"))
STEPS_PER_LIFE = 50
TICKS = 50_000
"""More turns of the loop than anything here takes without a wait: beyond, something spins."""
ENOUGH = 1000.0
"""Seconds after which whatever was going to happen has happened."""
ENDINGS = ("complete", "fail", "nothing", "code", "raise", "none")
ERRORS: dict[str, Callable[[], Exception]] = {
    "unreachable": lambda: Unreachable("scripted: away"),
    "unauthorized": lambda: Unauthorized("scripted: refused credentials", 401),
    "rejected": lambda: Rejected("scripted: rejected", 422),
    "not found": lambda: ObjectNotFound("scripted: gone", 404),
    "exception": lambda: RuntimeError("scripted: a bug"),
}
MISFORTUNES = (*ERRORS, "hang", "cancel", "answer lost")
REFUSALS = ("rejected", "not found", "exception")
"""A report that meets one of these is given up: asking again would not help."""
CALLS = (
    "read_work_pool",
    "read_work_queues",
    "read_late_flow_runs",
    "send_worker_heartbeat",
    "get_scheduled_flow_runs_for_work_pool",
    "set_flow_run_state",
    "read_flow_run_states",
    "read_flow_run",
    "read_deployment",
    "read_flow",
    "update_flow_run",
    "update_flow_run_labels",
    "read_flow_runs_by_state",
    "create_logs",
    "create_events",
)
POINTS = (*CALLS, "thread", "before start", "after start", "after exit", "kill", "announce", "reattach", "journal")


class Clock(selectors.DefaultSelector):
    """A loop's time. It moves on to the next timer, up to `until`; there, or when all wait for ever, the loop stops."""

    loop: asyncio.SelectorEventLoop

    def __init__(self) -> None:
        super().__init__()
        self.now = self.until = 0.0
        self.turns = self.busy = 0
        self.each_turn: Callable[[], None] = lambda: None

    def select(self, timeout: float | None = None) -> Any:
        self.turns += 1
        self.busy += 1
        assert self.busy < TICKS, "the loop spins"
        self.each_turn()
        if timeout is None or timeout > 0:
            if timeout is None or self.now + timeout > self.until:
                self.now = self.until
                self.loop.stop()
            else:
                self.now += timeout
        return super().select(0)


class Infrastructure:
    """What runs one flow run, and lives on when its worker dies hard."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        self.name = f"infra-{run_id}"
        self.ended = anyio.Event()
        self.code: int | None = 0
        self.error: Exception | None = None

    @property
    def alive(self) -> bool:
        return not self.ended.is_set()

    def end(self, code: int | None, error: Exception | None = None) -> None:
        if self.alive:
            self.code, self.error = code, error
            self.ended.set()


class World(Model):
    """A server, a disk and a host, and the misfortunes that wait in them."""

    def __init__(self) -> None:
        super().__init__("3.8.8")
        self.disk: dict[UUID, str] = {}
        self.infrastructure: list[Infrastructure] = []
        self.starts: Counter[UUID] = Counter()
        self.walking: set[UUID] = set()
        self.claims: set[str] = set()
        self.reports: defaultdict[UUID, set[str]] = defaultdict(set)
        self.excused: set[UUID] = set()
        """Runs whose report was refused."""
        self.planned: defaultdict[str, list[str]] = defaultdict(list)
        self.struck: Counter[str] = Counter()
        self.released = anyio.Event()
        self.lives: list[Life] = []
        self.clock = Clock()
        self.loop = self.clock.loop = asyncio.SelectorEventLoop(self.clock)
        self.loop.time = lambda: self.clock.now  # type: ignore[method-assign]
        self.add_pool(type="marionette", base_job_template=Puppet.get_default_base_job_template())
        self.deployment = self.add_deployment()

    # Time

    def pass_time(self, seconds: float = 0.0) -> None:
        """Let happen what can happen within so many seconds."""
        self.clock.busy = 0
        self.clock.until = self.clock.now + seconds
        self.loop.run_forever()

    def do(self, work: Callable[[], Any]) -> Any:
        """Call this within the loop, wait until all is quiet again, and return what it returned."""

        async def call() -> Any:
            answer = work()
            return await answer if isinstance(answer, Awaitable) else answer

        task = self.loop.create_task(call())
        self.pass_time()
        assert task.done(), "nothing that a test calls may wait"
        return task.result()

    # Misfortune

    def heal(self) -> None:
        """From now on nothing goes wrong, and what hangs goes on."""
        self.planned.clear()
        released, self.released = self.released, anyio.Event()
        released.set()

    async def gate(self, life: Life, point: str, run_id: UUID | None = None) -> bool:
        """One await of a worker: whatever is planned for it happens. Was it that the answer gets lost?"""
        await anyio.lowlevel.checkpoint()
        if life.dead:
            raise Unreachable("the dead reach nobody")
        how = self.planned[point].pop(0) if self.planned[point] else None
        if how is None:
            return False
        self.struck[how] += 1
        if how in REFUSALS and run_id is not None and life.worker.is_reporting(run_id):
            self.excused.add(run_id)
        if how == "hang":
            await self.released.wait()
        elif how == "cancel":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)
        elif how in ERRORS:
            raise ERRORS[how]()
        return how == "answer lost"

    # Host

    def live(self, run_id: UUID | None = None) -> list[Infrastructure]:
        return [one for one in self.infrastructure if one.alive and run_id in (None, one.run_id)]

    def start_infrastructure(self, run_id: UUID) -> Infrastructure:
        self.starts[run_id] += 1
        self.infrastructure.append(Infrastructure(run_id))
        if run_id in self.runs:
            self.set_state(run_id, "RUNNING", force=False)
        return self.infrastructure[-1]

    # Expectation

    def check_history(self) -> None:
        """Nothing is run twice, and no claim is reported twice."""
        assert not [id for id, count in self.starts.items() if count > 1], "executed twice"
        assert not [id for id, proposals in self.reports.items() if len(proposals) > 1], "reported twice"

    def lost(self) -> list[UUID]:
        """Runs that were claimed, and that nobody has ended or remembers."""
        claimed = [run for run in self.runs.values() if any(self._is_claim(state) for state in run.states)]
        unended = {run.id for run in claimed if run.state.type not in FINAL}
        return sorted(unended - self.disk.keys() - self.excused)

    def _is_claim(self, state: ModelState) -> bool:
        return state.state_details.get("transition_id") in self.claims


class MemoryClient:
    """The API client of one worker, with the world's misfortunes at each of its awaits."""

    http = SimpleNamespace(clock_offset=None, maintenance_ends_at=None)

    def __init__(self, life: Life) -> None:
        self.life, self.world = life, life.world

    async def __aenter__(self) -> MemoryClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await anyio.lowlevel.checkpoint()

    def __getattr__(self, name: str) -> Any:
        if name not in CALLS:
            raise AttributeError(name)

        async def call(*args: Any, **options: Any) -> Any:
            run_id = args[0] if args and isinstance(args[0], UUID) else None
            lost = await self.world.gate(self.life, name, run_id)
            options = {key: value for key, value in options.items() if key not in ("retries", "deadline")}
            answer = getattr(self, f"_{name}", lambda *args, **options: None)(*args, **options)
            await anyio.lowlevel.checkpoint()  # the server has done it, and nobody here knows yet
            if lost:
                raise Unreachable("scripted: the answer is lost")
            return answer

        return call

    def _find(self, table: Any, id: UUID, shape: Any) -> Any:
        if id not in table:
            raise ObjectNotFound("gone", 404)
        return shape.model_validate(table[id].row())

    def _read_work_pool(self, name: str) -> models.WorkPool:
        return models.WorkPool.model_validate(self.world.pools[name].row())

    def _read_work_queues(self, name: str) -> list[models.WorkQueue]:
        return [models.WorkQueue.model_validate(queue.row()) for queue in self.world.queues_of(self.world.pools[name])]

    def _read_late_flow_runs(self, name: str) -> list[models.FlowRun]:
        return []

    def _get_scheduled_flow_runs_for_work_pool(self, name: str, queues: Any, before: Any, limit: int) -> Any:
        pool = self.world.pools[name]
        due = self.world.due(pool, self.world.queues_of(pool), before)[:limit]
        return [models.WorkerFlowRunResponse.model_validate({"flow_run": run.row()}) for run in due]

    def _set_flow_run_state(self, id: UUID, state: Any, force: bool = False) -> models.OrchestrationResult:
        if id not in self.world.runs:
            raise ObjectNotFound("gone", 404)
        run = self.world.runs[id]
        before, details = len(run.states), state["state_details"]
        proposed = ModelState(type=state["type"], name=state["name"], message=state["message"])
        proposed.state_details = dict(details)
        verdict = self.world.propose(run, proposed, force)
        known = [(old.type, old.message) for old in run.states[:before]]  # what is put back stood there before
        if len(run.states) > before and state["type"] in FINAL and (state["type"], state["message"]) not in known:
            self.world.reports[id].add(details["transition_id"])
        if state["type"] == "PENDING":
            self.world.claims.add(details["transition_id"])
        answer = {"state": vars(run.state), "status": verdict.status, "details": {"reason": verdict.reason}}
        return models.OrchestrationResult.model_validate(answer)

    def _read_flow_run_states(self, id: UUID) -> list[models.State]:
        run = self.world.runs.get(id)
        return [models.State.model_validate(vars(state)) for state in run.states] if run else []

    def _read_flow_run(self, id: UUID) -> models.FlowRun:
        found: models.FlowRun = self._find(self.world.runs, id, models.FlowRun)
        return found

    def _read_deployment(self, id: UUID) -> models.Deployment:
        found: models.Deployment = self._find(self.world.deployments, id, models.Deployment)
        return found

    def _read_flow(self, id: UUID) -> models.Flow:
        found: models.Flow = self._find(self.world.flows, id, models.Flow)
        return found

    def _read_flow_runs_by_state(self, ids: Any, types: Any) -> list[models.FlowRun]:
        found = [self.world.runs[id] for id in ids if id in self.world.runs]
        return [models.FlowRun.model_validate(run.row()) for run in found if run.state.type in types]


class MemoryPage:
    """One run's record on the world's disk, which a dead worker cannot reach any more."""

    kept = True

    def __init__(self, life: Life, id: UUID, data: Any) -> None:
        self.life, self.id, self.data = life, id, data
        self.write()

    def write(self, **changes: Any) -> None:
        self.data |= changes
        if not self.life.dead:
            self.life.world.disk[self.id] = json.dumps(self.data)

    def remove(self) -> None:
        if not self.life.dead:
            self.life.world.disk.pop(self.id, None)


class MemoryJournal:
    """The world's disk as one worker sees it."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def page(self, flow_run_id: UUID, **facts: Any) -> MemoryPage:
        if self.life.world.planned["journal"]:
            self.life.world.planned["journal"].pop()
            raise OSError("scripted: no space left on device")
        return MemoryPage(self.life, flow_run_id, {"flow_run_id": str(flow_run_id), **facts})

    def take_over(self, api: str, pool: str | None) -> list[MemoryPage]:
        return [MemoryPage(self.life, id, json.loads(text)) for id, text in self.life.world.disk.items()]

    def tell(self, state: dict[str, Any]) -> None:
        pass

    def wishes(self) -> list[Any]:
        return []


class PuppetConfiguration(BaseJobConfiguration):
    """With a time limit of a run of its own."""

    timeout_seconds: float | None = 300.0


class PuppetResult(BaseWorkerResult):
    """How infrastructure of the world ended."""


class Puppet(BaseWorker[PuppetConfiguration, BaseVariables, PuppetResult]):
    """A worker whose infrastructure ends with its `run`, as processes do."""

    type = "marionette"
    job_configuration = PuppetConfiguration
    kept_fields = frozenset({"timeout_seconds"})
    ends_with_run = True
    life: Life

    @classmethod
    @cache
    def get_default_base_job_template(cls) -> dict[str, Any]:  # quick: there are thousands of worlds
        return super().get_default_base_job_template()

    def _let_go(self) -> None:
        with suppress(RuntimeError):  # it has none yet
            self.life.limiter = self.limiter
        super()._let_go()

    def is_reporting(self, run_id: UUID) -> bool:
        run = self.runs.get(run_id)
        return run is not None and run.page.data.get("phase") == "ended"

    async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any:
        world = self.life.world
        await world.gate(self.life, "before start", flow_run.id)
        one = world.start_infrastructure(flow_run.id)
        self.runs[flow_run.id].page.write(phase="running")
        with self._ending(one):
            await world.gate(self.life, "after start", flow_run.id)
            task_status.started(one.name)
            await one.ended.wait()
            await world.gate(self.life, "after exit", flow_run.id)
            if one.error is not None:
                raise one.error
            return None if one.code is None else PuppetResult(identifier=one.name, status_code=one.code)

    async def _reattach(self, flow_run: Any, configuration: Any, task_status: Any) -> Any:
        world = self.life.world
        for one in world.live(flow_run.id):
            with self._ending(one):
                await world.gate(self.life, "reattach", flow_run.id)
                task_status.started(one.name)
                await one.ended.wait()
        raise ExitUnknown("It ended while nobody watched it.")

    @contextmanager
    def _ending(self, one: Infrastructure) -> Iterator[None]:
        """End it with whoever watches it, unless that is a dead worker."""
        try:
            yield
        finally:
            if not self.life.dead:
                one.end(-9)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: Any, grace_seconds: float = 30.0
    ) -> None:
        await self.life.world.gate(self.life, "kill")
        found = [one for one in self.life.world.live() if one.name == infrastructure_pid]
        if not found:
            raise InfrastructureNotFound(infrastructure_pid)
        found[0].end(-15)

    async def _announce_cancel(self, identifier: str) -> None:
        await self.life.world.gate(self.life, "announce")


class Life:
    """One worker, from its start to its end."""

    def __init__(self, world: World, limit: int, kind: type[Puppet] = Puppet, orphans: Any = "adopt") -> None:
        self.world, self.limit, self.dead = world, limit, False
        self.client, self.journal = MemoryClient(self), MemoryJournal(self)
        environ = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_WORKER_QUERY_SECONDS": "5"}
        options: Any = {"settings": Settings.load(environ), "journal": self.journal, "orphans": orphans}
        self.worker = kind("pool", limit=limit, name="marionette", **options)
        self.worker.life = self
        self.limiter: anyio.CapacityLimiter | None = None
        self.scope = anyio.CancelScope()
        self.error: BaseException | None = None
        self.asked_to_end = False
        world.lives.append(self)
        self.task = world.loop.create_task(self._live())

    async def _live(self) -> None:
        with self.scope:
            try:
                await self.worker.start(printer=lambda *line: None)
            except Exception as error:
                self.error = error

    def kill(self) -> None:
        """Die hard: from now on nothing that it does has any effect."""
        self.dead = self.asked_to_end = True
        self.scope.cancel()

    def check_slots(self) -> None:
        """What holds whenever all is quiet."""
        worker = self.worker
        limiter = worker.limiter if worker.is_setup else self.limiter
        if limiter is None:
            assert not worker.runs
            return
        seen = limiter.statistics()
        walking = self.world.walking
        assert set(seen.borrowers) == walking, "a slot without a run, or a run without a slot"
        assert len(worker.runs) == len(walking) + seen.tasks_waiting, "worker.runs holds what is over, or lacks a run"
        assert walking <= worker.runs.keys()
        assert limiter.available_tokens + len(walking) == max(self.limit, len(walking)), "a slot is lost or made up"
        assert not seen.tasks_waiting or not limiter.available_tokens > 0, "a run waits beside a free slot"


@contextmanager
def in_memory() -> Iterator[World]:
    """A world to live in; at the end nothing of it may be left in the loop."""
    world = World()

    async def thread(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        await world.gate(world.lives[-1], "thread")
        return work(*args)

    def client(settings: Settings, headers: Any) -> MemoryClient:
        return world.lives[-1].client

    walk = run_module.Run.walk

    async def watched(run: Any) -> None:
        world.walking.add(run.id)
        try:
            await walk(run)
        finally:
            world.walking.discard(run.id)

    state = random.getstate()
    random.seed(0)
    with (
        mock.patch.object(worker_module, "Client", client),
        mock.patch.object(run_module.anyio.to_thread, "run_sync", thread),
        mock.patch.object(run_module.Run, "walk", watched),
    ):
        try:
            yield world
        finally:
            random.setstate(state)
            world.heal()
            for life in world.lives:
                world.do(life.kill)
            world.pass_time(ENOUGH)
            left = asyncio.all_tasks(world.loop)
            world.loop.run_until_complete(world.loop.shutdown_asyncgens())
            world.loop.close()
    assert not left


class Lives(RuleBasedStateMachine):
    """A worker after another, in a world in which everything goes wrong sooner or later."""

    kind = Puppet
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self.world = self._stack.enter_context(in_memory())

    @property
    def life(self) -> Life:
        return self.world.lives[-1]

    @property
    def worker(self) -> Puppet:
        return self.life.worker

    def works(self) -> bool:
        return self.worker.is_setup

    def is_over(self) -> bool:
        return self.life.task.done()

    @initialize(limit=st.integers(1, 3))
    def begin(self, limit: int) -> None:
        self.world.do(lambda: Life(self.world, limit, self.kind) and None)

    @rule(count=st.integers(1, 3))
    def schedule(self, count: int) -> None:
        for _ in range(count):
            self.world.schedule(self.world.deployment)

    @rule(seconds=st.sampled_from([0.5, 3, 11, 70]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule()
    def poll(self) -> None:
        self.world.do(self.worker._poll_loop.wake)

    @rule(point=st.sampled_from(POINTS), how=st.sampled_from(MISFORTUNES), times=st.integers(1, 3))
    def plan(self, point: str, how: str, times: int) -> None:
        self.world.planned[point] += [how] * times

    @rule()
    def heal(self) -> None:
        self.world.do(self.world.heal)

    @precondition(lambda self: self.world.live())
    @rule(number=st.integers(0, 9), how=st.sampled_from(ENDINGS))
    def end_infrastructure(self, number: int, how: str) -> None:
        living = self.world.live()
        one = living[number % len(living)]
        if how in ("complete", "fail") and one.run_id in self.world.runs:
            self.world.set_state(one.run_id, "COMPLETED" if how == "complete" else "FAILED", force=False)
        code = {"code": 3, "fail": 1, "none": None}.get(how, 0)
        self.world.do(lambda: one.end(code, RuntimeError("infrastructure broke") if how == "raise" else None))

    @precondition(lambda self: self.world.runs)
    @rule(number=st.integers(0, 99), how=st.sampled_from(["server", "worker", "delete", "execute"]))
    def touch(self, number: int, how: str) -> None:
        """Do something to a run, old or new: cancel it, delete it, or ask the worker to run it now."""
        run = list(self.world.runs.values())[number % len(self.world.runs)]
        if how == "server":
            self.world.request_cancel(run.id)
        elif how == "delete":
            self.world.delete_run(run.id)
        elif not self.works():
            return
        elif how == "worker":
            self.world.do(lambda: self.worker._in_background(self.worker.cancel_run, models.FlowRun(id=run.id)))
        elif run.id not in self.worker.runs:
            flow_run = models.FlowRun.model_validate(run.row())
            self.world.do(lambda: self.worker._in_background(self.worker.execute, flow_run))

    @precondition(works)
    @rule(grace=st.sampled_from([None, 0.0]))
    def cancel_all(self, grace: float | None) -> None:
        self.world.do(lambda: self.worker.cancel_all(grace))

    @precondition(works)
    @rule(how=st.sampled_from(["stop", "tear down", "die"]))
    def end(self, how: str) -> None:
        self.life.asked_to_end = True
        self.world.do({"stop": self.worker.stop, "tear down": self.life.scope.cancel, "die": self.life.kill}[how])
        if how == "die":
            self.world.pass_time(ENOUGH)
            assert self.is_over()

    @precondition(is_over)
    @rule(limit=st.integers(1, 3), orphans=st.sampled_from(["adopt", "kill"]))
    def start_again(self, limit: int, orphans: str) -> None:
        self.world.do(lambda: Life(self.world, limit, self.kind, orphans) and None)

    @invariant()
    def slots_are_right_and_nothing_happens_twice(self) -> None:
        type(self).steps += 1
        if self.world.lives:
            self.life.check_slots()
            self.world.check_history()
            self.check_that_it_lives()

    def check_that_it_lives(self) -> None:
        """Nothing but a stop, a cancel, or a refusal at the very start ends a worker."""
        if self.is_over() and not self.life.asked_to_end and not self.world.struck["cancel"]:
            assert self.life.limiter is None, self.life.error

    def teardown(self) -> None:
        with self._stack:
            if self.world.lives and sys.exc_info()[1] is None:
                self.end_well()

    def end_well(self) -> None:
        """With everything in order again, what was claimed is ended or remembered, and the next start ends the rest."""
        self.world.do(self.world.heal)
        for _ in range(2):
            self.world.do(self.worker.stop)
        self.world.pass_time(ENOUGH)
        if not self.is_over():  # it was still setting up when it was told to stop
            self.world.do(self.life.scope.cancel)
        self.world.pass_time(ENOUGH)
        assert self.is_over()
        self.life.check_slots()
        assert self.world.lost() == []
        self.world.pools["pool"].is_paused = True  # the next start goes on with what was begun, and begins nothing
        self.start_again(1, "adopt")
        for one in self.world.live():
            self.world.do(lambda one=one: one.end(0))
        self.world.pass_time(ENOUGH)
        self.slots_are_right_and_nothing_happens_twice()
        assert self.world.lost() == []
        assert self.world.disk == {}
        assert self.world.live() == []


def settings_of(lives: int, **more: Any) -> settings:
    quiet = {
        "phases": [Phase.generate],
        "deadline": None,
        "suppress_health_check": list(HealthCheck),
        "report_multiple_bugs": False,
    }
    return settings(
        max_examples=lives, stateful_step_count=STEPS_PER_LIFE, derandomize=True, database=None, **quiet, **more
    )


def test_no_slot_and_no_run_is_lost_whatever_goes_wrong_at_any_await() -> None:
    Lives.steps = 0
    run_state_machine_as_test(Lives, settings=settings_of(STEPS // STEPS_PER_LIFE * 2))
    assert Lives.steps >= STEPS


class Leaky(Puppet):
    """One that keeps the slot of a run that went wrong."""

    async def _walk(self, run: Any) -> None:
        await super()._walk(run)
        if run.error is not None:
            await self.limiter.acquire_on_behalf_of(run.id)


class Forgetful(Puppet):
    """One that keeps a run that was ended on purpose in its list."""

    async def _walk(self, run: Any) -> None:
        await super()._walk(run)
        if run.reason is not None:
            self.runs[run.id] = run


@pytest.mark.parametrize("kind", [Leaky, Forgetful])
def test_a_worker_with_a_leak_would_be_found(kind: type[Puppet]) -> None:
    """The negative control."""
    machine = type("Leaking", (Lives,), {"kind": kind})
    with pytest.raises(AssertionError, match=r"slot|worker\.runs|asyncio"):
        run_state_machine_as_test(machine, settings=settings_of(20))


def begun(world: World) -> tuple[Life, UUID]:
    """A worker at work, with one run due and nothing wrong so far."""
    life: list[Life] = []
    world.do(lambda: life.append(Life(world, 1)))
    world.pass_time(1)
    return life[0], world.schedule(world.deployment)


def complete(world: World) -> None:
    """Have all that runs report Completed and exit with 0."""
    for one in world.live():
        world.set_state(one.run_id, "COMPLETED", force=False)
        world.do(lambda one=one: one.end(0))


RARE = ("reattach", "journal", "read_work_queues", "read_late_flow_runs")
"""Not met on the way of a run: after a death, or while a worker has nothing to do."""


@pytest.mark.parametrize("how", [how for how in MISFORTUNES if how != "cancel"])
@pytest.mark.parametrize("point", [point for point in POINTS if point not in RARE])
def test_one_error_at_one_await_costs_one_run_at_most(point: str, how: str) -> None:
    with in_memory() as world:
        life, first = begun(world)
        world.planned[point] += [how]
        world.pass_time(15)
        if point in ("kill", "announce", "read_flow_runs_by_state"):
            world.request_cancel(first)
        elif point == "read_flow_run":  # which a report needs where an engine waits for its retry
            world.run(first).empirical_policy = {"retry_type": "in_process"}
            world.set_state(first, "SCHEDULED", "AwaitingRetry")
            world.do(lambda: world.live()[0].end(1))
        world.pass_time(15)
        for _ in range(3):  # a run that was refused is asked for again
            complete(world)
            world.pass_time(40)
            world.do(world.heal)
        assert world.struck[how] == 1
        assert not life.task.done()
        life.check_slots()
        assert not life.worker.runs

        second = world.schedule(world.deployment)
        world.pass_time(15)
        complete(world)
        world.pass_time(15)
        assert world.run(second).state.type == "COMPLETED"
        world.check_history()
        assert world.lost() == []
        assert world.disk == {}


@pytest.mark.parametrize("how", [how for how in MISFORTUNES if how != "cancel"])
def test_an_error_while_the_server_is_told_of_a_cancel_does_not_stop_the_cancel(how: str) -> None:
    with in_memory() as world:
        life, run = begun(world)
        world.pass_time(15)
        world.planned["set_flow_run_state"] += [how]
        world.do(life.worker.cancel_all)
        world.pass_time(15)
        assert world.struck[how] == 1
        assert world.run(run).state.type == "CANCELLED"
        assert not life.task.done()
        assert not life.worker.runs
        life.check_slots()


SCENES = ("complete", "code", "raise", "cancel", "stop", "away")
"""What happens to the one run whose worker's scope is cancelled at every point."""


def play(world: World, scene: str) -> Life:
    life, run = begun(world)
    world.pass_time(10)
    if scene == "away":  # nobody hears the report any more
        world.planned["read_flow_run_states"] += ["unreachable"] * 999
    if scene == "cancel":
        world.request_cancel(run)
    elif scene == "stop":
        world.do(life.worker.stop)
    elif scene == "complete":
        complete(world)
    for one in world.live() if scene in ("code", "raise", "away") else ():
        world.do(lambda one=one: one.end(3, RuntimeError("it broke") if scene == "raise" else None))
    world.pass_time(30)
    world.do(life.worker.stop)
    world.pass_time(ENOUGH)
    return life


def cancelled_at(turn: int, scene: str) -> int:
    """Cancel the worker's scope at this turn of the loop; returns how many turns there were."""
    with in_memory() as world:

        def each_turn() -> None:
            if world.clock.turns == turn and world.lives:
                world.lives[0].scope.cancel()

        world.clock.each_turn = each_turn
        life = play(world, scene)
        assert life.task.done()
        assert not asyncio.all_tasks(world.loop)
        life.check_slots()
        assert not life.worker.runs
        assert world.live() == []
        world.check_history()
        assert world.lost() == []
        assert scene == "away" or world.disk == {}
        assert all(world.run(id).state.type not in FINAL for id in world.disk)
        return world.clock.turns


@pytest.mark.parametrize("scene", SCENES)
def test_a_worker_that_is_cancelled_at_any_await_leaves_nothing(scene: str) -> None:
    turn, turns = 0, 1
    while turn <= turns:
        turn += 1
        turns = cancelled_at(turn, scene)
    assert turns > 30, "the last pass was not touched"
