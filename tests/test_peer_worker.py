"""What authors and operators of workers rely on, beyond test_worker.py and test_run.py."""

from __future__ import annotations

import logging
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from workers import LocalWorker, ScriptResult, ScriptWorker, settings_for, working

from procworker.configuration import BaseJobConfiguration
from procworker.errors import (
    ConfigurationError,
    InfrastructureNotAvailable,
    InfrastructureNotFound,
    Unauthorized,
    Unreachable,
)
from procworker.process import ProcessJobConfiguration, ProcessWorker
from procworker.server.models import FlowRun
from procworker.settings import Settings
from procworker.testing import PrefectApi
from procworker.worker import BaseWorker


def make(server: PrefectApi, script: Any = None, **options: Any) -> ScriptWorker:
    return ScriptWorker("pool", settings=settings_for(server), script=script, **options)


def reporting(server: PrefectApi, type: str = "COMPLETED", code: int = 0) -> Any:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        server.set_state(flow_run.id, type)
        return code

    return script


def held(server: PrefectApi, until: anyio.Event) -> Any:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await until.wait()
        server.set_state(flow_run.id, "COMPLETED")
        return 0

    return script


async def until_idle(worker: BaseWorker[Any, Any, Any]) -> None:
    with anyio.fail_after(20):
        await worker._moved.until(lambda: not worker.runs)


# The pool and the heartbeat


async def test_the_status_tells_the_pool_as_the_server_has_it(server: PrefectApi) -> None:
    worker = make(server, name="w1", prefetch_seconds=3)
    assert worker.get_status()["work_pool"] is None
    async with worker:
        status = worker.get_status()

    assert status["work_pool"]["id"] == str(server.pools["pool"].id)
    assert (status["name"], status["work_pool"]["name"]) == ("w1", "pool")
    assert status["settings"] == {"prefetch_seconds": 3}


async def test_without_a_pool_there_is_no_heartbeat_and_no_poll(server: PrefectApi) -> None:
    async with make(server, create_pool_if_not_found=False) as worker:
        await worker.sync_with_backend()
        assert await worker.get_and_submit_flow_runs() == []
        assert worker.get_status()["work_pool"] is None
        assert not server.seen("POST")
        server.add_pool(type="process")
        await worker.sync_with_backend()
        await worker.get_and_submit_flow_runs()

    assert len(server.seen("POST", "/heartbeat")) == len(server.seen("POST", "/get_scheduled_flow_runs")) == 1


async def test_two_workers_that_create_the_pool_at_once_share_it(server: PrefectApi) -> None:
    """The loser's answer is 409; it reads what the winner made."""

    def somebody_is_first(request: Any) -> bool:
        server.add_pool(type="process", description="the winner's")
        return False

    server.fault(
        "POST",
        "/work_pools",
        status=500,
        when=lambda request: request.path.strip("/") == "work_pools" and somebody_is_first(request),
    )
    async with make(server) as worker:
        assert worker.work_pool.id == server.pools["pool"].id

    assert server.pools["pool"].description == "the winner's"


async def test_a_pool_without_a_template_gets_that_of_its_type(server: PrefectApi) -> None:
    server.add_pool(type="process")
    async with make(server) as worker:
        assert worker.work_pool.base_job_template == ScriptWorker.get_default_base_job_template()

    assert server.pools["pool"].base_job_template == ScriptWorker.get_default_base_job_template()


async def test_a_pools_own_template_is_left_alone_whatever_the_worker_brings(server: PrefectApi) -> None:
    own = {"job_configuration": {"command": "{{ command }}"}, "variables": {"properties": {"command": {}}}}
    server.add_pool(type="process", base_job_template=own)
    async with make(server, base_job_template={"job_configuration": {"x": "y"}, "variables": {"a": 1}}) as worker:
        assert worker.work_pool.base_job_template == own

    assert server.pools["pool"].base_job_template == own


async def test_every_sync_beats_and_sees_what_the_pool_is_now(server: PrefectApi) -> None:
    async with make(server, name="w1") as worker:
        first = server.workers["pool", "w1"]["time"]
        server.pools["pool"].is_paused = True
        await worker.sync_with_backend()

        assert worker.work_pool.is_paused
        assert server.workers["pool", "w1"]["heartbeats"] == 2
        assert server.workers["pool", "w1"]["time"] > first


async def test_cloud_is_asked_for_the_workers_id_only_once(server: PrefectApi) -> None:
    server.cloud = True
    async with ScriptWorker("pool", settings=settings_for(server, PREFECT_CLOUD_API_URL=server.url)) as worker:
        id = worker.backend_id
        await worker.sync_with_backend()

    asked = ["return_id" in request.json for request in server.seen("POST", "/heartbeat")]
    assert (isinstance(id, UUID), worker.backend_id, asked) == (True, id, [True, False])


async def test_nothing_is_polled_before_the_pool_is_known_and_a_lost_heartbeat_is_no_reason_to_wait(
    server: PrefectApi,
) -> None:
    server.add_pool(type="process")
    id = server.schedule(server.add_deployment())
    server.fault("GET", "/work_pools/pool", times=1, status=503)
    server.fault("POST", "/heartbeat", times=1, status=503)
    async with make(server, reporting(server)) as worker:
        assert await worker.get_and_submit_flow_runs() == []
        assert not server.seen("POST", "/get_scheduled_flow_runs")
        with pytest.raises(Unreachable, match="heartbeat"):
            await worker.sync_with_backend()
        await worker.get_and_submit_flow_runs()
        await until_idle(worker)

    assert server.run(id).state.type == "COMPLETED"


async def test_what_is_refused_while_it_starts_ends_it_and_what_fails_does_not(server: PrefectApi) -> None:
    server.fault("GET", "/work_pools/pool", times=1, status=401)
    with pytest.raises(Unauthorized):
        async with make(server):
            pass
    server.fault("GET", "/work_pools/pool", times=1, status=500)
    async with make(server) as worker:
        assert worker.is_setup
        with pytest.raises(RuntimeError, match="not correctly initialized"):
            _ = worker.work_pool


async def test_one_client_serves_everything_and_is_gone_afterwards(server: PrefectApi) -> None:
    clients = set()

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        clients.add(worker.client)
        return int(await reporting(server)(flow_run, configuration))

    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(3)]
    worker = make(server, script)
    async with working(worker):
        for id in ids:
            await server.wait_state(id, "COMPLETED")
        clients.add(worker.client)

    assert len(clients) == 1
    with pytest.raises(RuntimeError, match="not correctly initialized"):
        _ = worker.client


async def test_setup_and_teardown_may_be_called_and_extended(server: PrefectApi) -> None:
    """Workers with helpers of their own do both: one entered beside the base, one closed after it."""
    told: list[str] = []

    class Helped(ScriptWorker):
        async def setup(self) -> None:
            await super().setup()
            told.append(f"set up {self.work_pool.name}")

        async def teardown(self, *exc_info: Any) -> None:
            await super().teardown(*exc_info)
            told.append(f"torn down {self.is_setup}")

    async with Helped("pool", settings=settings_for(server)):
        told.append("inside")
    worker = Helped("pool", settings=settings_for(server))
    await worker.setup()
    await worker.teardown(None, None, None)

    assert told == ["set up pool", "inside", "torn down False", "set up pool", "torn down False"]


# What is taken


async def test_a_poll_takes_what_is_due_or_nearly_and_nothing_else(server: PrefectApi, monkeypatch: Any) -> None:
    monkeypatch.setattr("procworker.intake.os.cpu_count", lambda: 8)
    deployment = server.add_deployment()
    due = [server.schedule(deployment, due_in=seconds) for seconds in (-86400, 5, 5)]
    other = [server.schedule(deployment, due_in=60), server.schedule(deployment), server.schedule(deployment)]
    server.set_state(other[1], "RUNNING")
    server.set_state(other[2], "COMPLETED")
    other.append(server.schedule(pool="another-pool"))
    worker = make(server, reporting(server), prefetch_seconds=10)
    async with worker:
        taken = await worker.get_and_submit_flow_runs()
        await until_idle(worker)

    assert {flow_run.id for flow_run in taken} == set(due)
    assert set(worker.started) == set(map(str, due))


async def test_with_one_place_the_more_urgent_queue_comes_before_the_later_run(server: PrefectApi) -> None:
    server.add_pool(type="process", queues=("urgent", "slow"))
    late = server.schedule(server.add_deployment("a", queue="slow"), due_in=-86400)
    soon = server.schedule(server.add_deployment("b", queue="urgent"), due_in=5)
    release = anyio.Event()
    async with make(server, held(server, release), limit=1) as worker:
        taken = await worker.get_and_submit_flow_runs()
        await server.wait_state(soon, "RUNNING")
        assert [flow_run.id for flow_run in taken] == [soon]
        assert await worker.get_and_submit_flow_runs() == []
        release.set()

    assert server.run(late).state.type == "SCHEDULED"


async def test_a_run_that_waits_for_its_own_retry_is_its_own_affair(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment(), empirical_policy={"retries": 2})
    server.set_state(id, "RUNNING")
    server.set_state(id, "FAILED", force=False)
    assert server.run(id).state.name == "AwaitingRetry"
    async with make(server) as worker:
        assert await worker.get_and_submit_flow_runs() == []

    assert worker.started == []


async def test_a_place_comes_back_however_a_run_fails(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    refused = server.schedule(server.add_deployment("full", concurrency_limit=0), due_in=-60)

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        raise RuntimeError("the cluster is away")

    ids = [server.schedule(deployment) for _ in range(3)]
    worker = LocalWorker("pool", settings=settings_for(server), script=script, limit=1)
    async with working(worker):
        for id in ids:
            await server.wait_state(id, "CRASHED")
        await until_idle(worker)
        assert worker.limiter.borrowed_tokens == 0
        assert worker.limiter.total_tokens == 1

    assert server.run(refused).state.type == "SCHEDULED"


async def test_what_is_starting_is_returned_until_it_has_started(server: PrefectApi) -> None:
    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    server.fault("GET", "/deployments/", times=1, delay=0.2)
    async with make(server, held(server, release)) as worker:
        for _ in range(2):
            assert [flow_run.id for flow_run in await worker.get_and_submit_flow_runs()] == [id]
        await server.wait_state(id, "RUNNING")
        assert await worker.get_and_submit_flow_runs() == []
        release.set()

    assert worker.started == [str(id)]


# What `run` is given and gives


async def test_run_is_called_by_name(server: PrefectApi) -> None:
    given: dict[str, Any] = {}

    class Named(ScriptWorker):
        async def run(self, **named: Any) -> ScriptResult:
            given.update(named)
            named["task_status"].started("box-1")
            server.set_state(named["flow_run"].id, "COMPLETED")
            return ScriptResult(identifier="box-1", status_code=0)

    id = server.schedule(server.add_deployment(flow="etl"), name="lucky-lynx")
    async with working(Named("pool", settings=settings_for(server))):
        await server.wait_state(id, "COMPLETED")

    assert set(given) == {"flow_run", "configuration", "task_status"}
    assert (given["flow_run"].id, given["flow_run"].name) == (id, "lucky-lynx")
    assert given["configuration"].env["PREFECT__FLOW_NAME"] == "etl"
    assert given["configuration"].command == "prefect flow-run execute"


async def test_infrastructure_is_ended_by_name_with_whole_seconds(server: PrefectApi) -> None:
    """What a worker hands the grace to, a container engine or a cluster, may take nothing but an integer."""
    given: dict[str, Any] = {}
    ended = anyio.Event()

    class Named(ScriptWorker):
        async def kill_infrastructure(self, *args: Any, **named: Any) -> None:
            given.update(named, args=args)
            ended.set()

    id = server.schedule(server.add_deployment())
    worker = Named("pool", settings=settings_for(server), script=held(server, ended))
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        await worker.check_for_cancelled_flow_runs()
        await until_idle(worker)

    assert given.pop("args") == ()
    assert set(given) == {"infrastructure_pid", "configuration", "grace_seconds"}
    assert given["infrastructure_pid"] == f"infra-{id}"
    assert isinstance(given["configuration"], BaseJobConfiguration)
    assert (given["grace_seconds"], type(given["grace_seconds"])) == (30, int)


@pytest.mark.parametrize("error", [InfrastructureNotFound("gone"), InfrastructureNotAvailable("elsewhere")])
async def test_infrastructure_that_cannot_be_ended_costs_no_worker(server: PrefectApi, error: Exception) -> None:
    release, asked = anyio.Event(), anyio.Event()

    class Away(LocalWorker):
        async def kill_infrastructure(self, *args: Any, **named: Any) -> None:
            asked.set()
            raise error

    id = server.schedule(server.add_deployment())
    worker = Away("pool", settings=settings_for(server), script=held(server, release))
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        await worker.check_for_cancelled_flow_runs()
        await asked.wait()
        assert server.run(id).state.type == "CANCELLING"
        release.set()
        await until_idle(worker)

    assert server.run(id).state.type == "COMPLETED"


async def test_a_worker_that_cannot_end_anything_says_so(server: PrefectApi) -> None:
    worker = make(server)
    with pytest.raises(NotImplementedError, match="'process'"):
        await worker.kill_infrastructure("1", BaseJobConfiguration(), 30)


@pytest.mark.parametrize("code", [0, 7])
async def test_infrastructure_that_never_said_it_started_is_judged_by_its_end(server: PrefectApi, code: int) -> None:
    class Silent(ScriptWorker):
        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> ScriptResult:
            return ScriptResult(identifier="box", status_code=code)

    id = server.schedule(server.add_deployment())
    async with Silent("pool", settings=settings_for(server), limit=1) as worker:
        await worker.get_and_submit_flow_runs()
        await until_idle(worker)
        assert worker.limiter.borrowed_tokens == 0

    # With 0 it may have handed the work elsewhere.
    assert server.run(id).state.type == ("PENDING" if code == 0 else "CRASHED")
    assert server.run(id).infrastructure_pid is None


@pytest.mark.parametrize(("code", "hint"), [(137, "memory"), (125, "image"), (-15, "SIGTERM"), (99, "last lines")])
async def test_what_an_exit_code_means_is_told_for_every_kind_of_infrastructure(
    server: PrefectApi, code: int, hint: str
) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        return code

    id = server.schedule(server.add_deployment())
    async with working(make(server, script)):
        state = await server.wait_state(id, "CRASHED")

    assert f"status code {code}." in str(state.message)
    assert hint in str(state.message)
    assert any(hint in log["message"] for log in server.logs if log["flow_run_id"] == str(id))


@pytest.mark.parametrize("code", [0, 1])
async def test_what_a_flow_reported_itself_stays(server: PrefectApi, code: int) -> None:
    id = server.schedule(server.add_deployment())
    async with working(make(server, reporting(server, "FAILED", code))) as worker:
        await server.wait_state(id, "FAILED")
        await until_idle(worker)

    assert [state.type for state in server.run(id).states][-2:] == ["RUNNING", "FAILED"]


async def test_infrastructure_that_does_not_come_up_crashes_the_run_with_the_kind_of_error(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(ScriptWorker):
        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> ScriptResult:
            raise KeyError("image")

    id = server.schedule(server.add_deployment(), name="lucky-lynx")
    async with working(Broken("pool", settings=settings_for(server))):
        state = await server.wait_state(id, "CRASHED")

    assert "could not be submitted to infrastructure. KeyError: 'image'" in str(state.message)
    assert any("'lucky-lynx'" in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


async def test_infrastructure_that_is_lost_sight_of_keeps_its_run(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        raise RuntimeError("connection lost")

    id = server.schedule(server.add_deployment(), name="lucky-lynx")
    async with working(make(server, script)) as worker:
        await server.wait_state(id, "RUNNING")
        await until_idle(worker)

    assert server.run(id).state.type == "RUNNING"
    assert any("lucky-lynx" in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


async def test_a_pid_that_cannot_be_recorded_costs_no_run(server: PrefectApi) -> None:
    server.fault("PATCH", r"/flow_runs/[^/]+$", times=99, status=422)
    id = server.schedule(server.add_deployment())
    release = anyio.Event()
    async with working(make(server, held(server, release))) as worker:
        await server.wait_for(lambda: any("could not be recorded" in log["message"] for log in server.logs))
        release.set()
        await server.wait_state(id, "COMPLETED")
        await until_idle(worker)

    assert server.run(id).infrastructure_pid is None


async def test_labels_tell_pool_and_worker(server: PrefectApi) -> None:
    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    async with working(make(server, held(server, release), name="w1")):
        labels = await server.wait_for(lambda: server.run(id).labels)
        release.set()
        await server.wait_state(id, "COMPLETED")

    assert labels == {
        "prefect.worker.name": "w1",
        "prefect.worker.type": "process",
        "prefect.work-pool.name": "pool",
        "prefect.work-pool.id": str(server.pools["pool"].id),
    }


async def test_a_pool_that_changes_while_a_run_is_prepared_changes_the_next_run_only(server: PrefectApi) -> None:
    """What was read before stays as it was, to its end."""

    def pool_template(word: str) -> dict[str, Any]:
        return {"job_configuration": {"env": {"WORD": word}}, "variables": {"properties": {"env": {}}}}

    class Slow(BaseJobConfiguration):
        @classmethod
        async def from_template_and_values(cls, base_job_template: Any, values: Any, client: Any = None) -> Any:
            server.pools["pool"].base_job_template = pool_template("later")
            await worker.sync_with_backend()
            return await super().from_template_and_values(base_job_template, values, client)

        def prepare_for_flow_run(self, flow_run: Any, *others: Any, **named: Any) -> None:
            super().prepare_for_flow_run(flow_run, *others, **named)
            seen.append((self.env["WORD"], named["work_pool"].base_job_template["job_configuration"]["env"]["WORD"]))

    class SlowWorker(ScriptWorker):
        job_configuration = Slow

    seen: list[tuple[str | None, str]] = []
    server.add_pool(type="process", base_job_template=pool_template("first"))
    deployment = server.add_deployment()
    worker = SlowWorker("pool", settings=settings_for(server), script=reporting(server))
    async with worker:
        for _ in range(2):
            server.schedule(deployment)
            await worker.get_and_submit_flow_runs()
            await until_idle(worker)

    assert seen == [("first", "first"), ("later", "later")]


async def test_start_syncs_and_runs_what_is_due(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = make(server, reporting(server))
    assert worker.get_status()["work_pool"] is None
    await worker.start(run_once=True, printer=lambda *line: None)

    assert worker.started == [str(id)]
    assert server.run(id).state.type == "COMPLETED"


# What a worker tells of itself


async def test_a_runs_logger_carries_what_prefects_does(server: PrefectApi) -> None:
    flow_run = FlowRun(id=uuid4(), name="lucky-lynx")
    plain = {"flow_run_name": "lucky-lynx", "flow_run_id": str(flow_run.id), "flow_name": "<unknown>"}
    async with make(server, name="w1") as worker:
        logger = worker.get_flow_run_logger(flow_run)
        pool = {"work_pool_name": "pool", "work_pool_id": str(server.pools["pool"].id)}
        assert logger.logger.name == "prefect.flow_runs.worker"
        assert logger.extra == {**plain, "worker_name": "w1", **pool}
        worker.backend_id = uuid4()
        assert worker.get_flow_run_logger(flow_run).extra == {
            **plain,
            "worker_name": "w1",
            **pool,
            "worker_id": str(worker.backend_id),
        }


def test_prefetching_follows_the_settings_unless_it_is_given() -> None:
    def prefetch(**options: Any) -> Any:
        settings = Settings.load({"PREFECT_WORKER_PREFETCH_SECONDS": "42"})
        return ScriptWorker("pool", settings=settings, **options).get_status()["settings"]["prefetch_seconds"]

    assert [prefetch(), prefetch(prefetch_seconds=0), prefetch(prefetch_seconds=7)] == [42, 0, 7]


@pytest.mark.parametrize(("interval", "idle", "polling"), [(10, 299, True), (10, 301, False), (60, 1799, True)])
def test_a_worker_counts_as_polling_for_thirty_intervals(interval: float, idle: float, polling: bool) -> None:
    worker = ScriptWorker("pool", settings=Settings.load({}))
    worker._vitals.polled_at -= idle

    assert worker.is_worker_still_polling(query_interval_seconds=interval) is polling


def test_a_worker_that_stood_still_for_a_day_is_not_polling() -> None:
    """Also when the seconds beyond the whole days are few."""
    worker = ScriptWorker("pool", settings=Settings.load({}))
    worker._vitals.polled_at -= 86400 + 30

    assert not worker.is_worker_still_polling(query_interval_seconds=10)


async def test_every_poll_counts_also_one_that_finds_nothing(server: PrefectApi) -> None:
    async with make(server) as worker:
        worker._vitals.polled_at -= 3600
        assert not worker.is_worker_still_polling(10)
        await worker.get_and_submit_flow_runs()
        assert worker.is_worker_still_polling(10)


def test_a_type_defined_again_is_the_newer_one_and_types_are_listed_once() -> None:
    class First(ScriptWorker):
        type = "defined-twice-for-peer-tests"

    class Second(ScriptWorker):
        type = "defined-twice-for-peer-tests"

    assert BaseWorker.get_worker_class_from_type("defined-twice-for-peer-tests") is Second
    assert First.type == Second.type
    known = BaseWorker.get_all_available_worker_types()
    assert known.count("defined-twice-for-peer-tests") == 1
    assert BaseWorker.get_worker_class_from_type("process") is ProcessWorker


def test_a_worker_without_a_run_cannot_be_made() -> None:
    class Abstract(BaseWorker[Any, Any, Any]):
        type = "abstract-for-peer-tests"

    with pytest.raises(TypeError, match="run"):
        Abstract("pool", settings=Settings.load({}))  # type: ignore[abstract]


# Submitting


def a_flow() -> None:
    """Stands for the function of a flow in a file."""


class FlowObject:
    """As much of Prefect's flow as is looked at."""

    fn = staticmethod(a_flow)
    name = "a-flow"
    tags: frozenset[str] = frozenset()


@pytest.mark.parametrize("how", ["raises", "exits"])
async def test_a_submitted_flow_that_fails_to_run_is_crashed_in_its_future(server: PrefectApi, how: str) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        if how == "raises":
            raise RuntimeError("no room")
        return 1

    async with LocalWorker("pool", settings=settings_for(server), script=script) as worker:
        future = await worker.submit(FlowObject())
        await future.wait_async(10)

    assert future.state.type == "CRASHED"
    assert server.run(future.flow_run_id).state.type == "CRASHED"
    assert server.run(future.flow_run_id).work_pool_name == "pool"


async def test_a_submitted_flow_gets_the_workers_name_and_id(server: PrefectApi) -> None:
    seen: dict[str, Any] = {}

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        seen.update(configuration.env)
        return int(await reporting(server)(flow_run, configuration))

    async with make(server, script, name="w1") as worker:
        worker.backend_id = uuid4()
        await (await worker.submit(FlowObject())).wait_async(10)

    assert (seen["PREFECT__WORKER_NAME"], seen["PREFECT__WORKER_ID"]) == ("w1", str(worker.backend_id))


async def test_outside_of_its_context_a_worker_submits_nothing(server: PrefectApi) -> None:
    worker = make(server)
    with pytest.raises(RuntimeError, match="not correctly initialized"):
        await worker.submit(FlowObject())
    assert not server.runs


async def test_a_flow_of_no_file_is_refused_before_anything_is_created(server: PrefectApi) -> None:
    class Typed(FlowObject):
        fn = staticmethod(eval("lambda: None"))

    async with make(server) as worker:
        with pytest.raises(ConfigurationError, match="not in a file"):
            await worker.submit(Typed())
    assert not server.runs


def test_the_process_workers_configuration_is_the_bases_and_more() -> None:
    assert issubclass(ProcessJobConfiguration, BaseJobConfiguration)
    assert set(BaseJobConfiguration.json_template().items()) <= set(ProcessJobConfiguration.json_template().items())
