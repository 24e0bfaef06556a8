"""The worker around its runs: setup, sync, poll, limits, stopping, health, and what subclasses touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from workers import LocalWorker, ScriptResult, ScriptWorker, settings_for, working

from procworker.configuration import BaseJobConfiguration, BaseVariables
from procworker.errors import ConfigurationError, Unauthorized
from procworker.process import ProcessWorker
from procworker.server.models import FlowRun
from procworker.settings import Settings
from procworker.testing.api import PrefectApi
from procworker.worker import BaseWorker


def completing(server: PrefectApi) -> Any:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        server.set_state(flow_run.id, "COMPLETED")
        return 0

    return script


def waiting(server: PrefectApi, until: anyio.Event) -> Any:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await until.wait()
        server.set_state(flow_run.id, "COMPLETED")
        return 0

    return script


def make(server: PrefectApi, script: Any = None, **options: Any) -> ScriptWorker:
    return ScriptWorker("pool", settings=settings_for(server), script=script, **options)


async def test_a_missing_pool_is_created_with_the_default_template(server: PrefectApi) -> None:
    async with make(server) as worker:
        assert worker.work_pool.name == "pool"

    assert server.pools["pool"].type == "process"
    assert server.pools["pool"].base_job_template == ScriptWorker.get_default_base_job_template()


async def test_a_template_of_ones_own_is_used_for_a_new_pool(server: PrefectApi) -> None:
    template = {"job_configuration": {"command": "{{ command }}"}, "variables": {"properties": {"command": {}}}}
    async with make(server, base_job_template=template):
        pass

    assert server.pools["pool"].base_job_template == template


async def test_a_missing_pool_is_not_created_when_that_is_not_wanted(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    async with make(server, create_pool_if_not_found=False) as worker:
        assert await worker.get_and_submit_flow_runs() == []
        with pytest.raises(RuntimeError, match="not correctly initialized"):
            _ = worker.work_pool

    assert "pool" not in server.pools
    assert "does not exist" in caplog.text


async def test_a_heartbeat_says_name_and_whole_seconds(server: PrefectApi) -> None:
    async with make(server, name="w1", heartbeat_interval_seconds=12.5):
        pass

    assert server.workers["pool", "w1"]["interval"] == 12


async def test_a_pool_of_another_type_is_refused_at_the_start(server: PrefectApi) -> None:
    server.add_pool(type="kubernetes")

    with pytest.raises(ConfigurationError, match=r"'kubernetes'.*'process'"):
        async with make(server):
            pass


async def test_a_pool_that_changes_its_type_later_is_only_warned_about(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    async with make(server) as worker:
        server.pools["pool"].type = "kubernetes"
        await worker.sync_with_backend()
        await worker.sync_with_backend()

    assert caplog.text.count("is of type 'kubernetes'") == 1


async def test_wrong_credentials_are_fatal_at_the_start() -> None:
    async with PrefectApi.running(api_key="right") as server:
        with pytest.raises(Unauthorized):
            async with make(server):
                pass


async def test_a_server_that_is_away_is_waited_for(server: PrefectApi, caplog: pytest.LogCaptureFixture) -> None:
    id = server.schedule(server.add_deployment())
    await server.down()
    async with working(make(server, completing(server), heartbeat_interval_seconds=0.1)) as worker:
        while not worker.is_setup:  # noqa: ASYNC110 - it tells nobody
            await anyio.sleep(0.01)
        await server.up()
        await server.wait_state(id, "COMPLETED")

    assert "does not answer yet" in caplog.text


async def test_no_more_runs_than_the_limit_at_once_and_every_slot_comes_back(server: PrefectApi) -> None:
    release = anyio.Event()
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(3)]
    worker = make(server, waiting(server, release), limit=2)
    async with working(worker):
        await server.wait_for(lambda: sum(run.state.type == "RUNNING" for run in server.runs.values()) == 2)
        assert (len(worker.started), worker.limiter.borrowed_tokens) == (2, 2)
        release.set()
        for id in ids:
            await server.wait_state(id, "COMPLETED")
        await worker._moved.until(lambda: not worker.runs)
        assert worker.limiter.borrowed_tokens == 0


async def test_the_limiter_is_held_on_behalf_of_the_run(server: PrefectApi) -> None:
    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    worker = make(server, waiting(server, release), limit=1)
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        assert worker.limiter.statistics().borrowers == (id,)
        release.set()


async def test_only_the_queues_asked_for_are_polled(server: PrefectApi) -> None:
    server.add_pool(queues=("default", "gpu"))
    other = server.schedule(server.add_deployment("a"))
    mine = server.schedule(server.add_deployment("b", queue="gpu"))
    async with working(make(server, completing(server), work_queues=["gpu"])):
        await server.wait_state(mine, "COMPLETED")

    assert server.run(other).state.type == "SCHEDULED"


async def test_an_unknown_queue_is_a_warning(server: PrefectApi, caplog: pytest.LogCaptureFixture) -> None:
    async with make(server, work_queues=["nope"]) as worker:
        assert await worker.get_and_submit_flow_runs() == []

    assert "a queue does not exist" in caplog.text


async def test_runs_are_taken_prefetch_seconds_early(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    soon, later = server.schedule(deployment, due_in=5), server.schedule(deployment, due_in=60)
    async with working(make(server, completing(server), prefetch_seconds=10)):
        await server.wait_state(soon, "COMPLETED")
        await server.wait_request("POST", "get_scheduled_flow_runs", count=3)

    assert server.run(later).state.type == "SCHEDULED"


async def test_run_once_takes_all_that_is_due_and_returns(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(7)]
    worker = make(server, completing(server))
    with anyio.fail_after(20):
        await worker.start(run_once=True, printer=lambda *line: None)

    assert {server.run(id).state.type for id in ids} == {"COMPLETED"}
    assert worker.outcomes == {"COMPLETED": 7}


async def test_a_worker_that_is_open_can_be_started_and_stays_open(server: PrefectApi) -> None:
    first = server.schedule()
    async with make(server, completing(server)) as worker:
        await worker.start(run_once=True, printer=lambda *line: None)
        assert server.run(first).state.type == "COMPLETED"
        second = server.schedule()
        await worker.get_and_submit_flow_runs()
        await server.wait_state(second, "COMPLETED")
        assert worker.is_setup
    assert not worker.is_setup


async def test_a_hiccup_while_something_runs_does_not_end_run_once(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(30)]
    polls = 0

    def second(request: Any) -> bool:
        nonlocal polls
        polls += 1
        return polls == 2

    server.fault("POST", "get_scheduled_flow_runs", times=1, status=503, when=second)
    release = anyio.Event()
    worker = make(server, waiting(server, release))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(run_once=True, printer=lambda *line: None))
        await server.wait_for(lambda: polls >= 2)
        release.set()

    assert {server.run(id).state.type for id in ids} == {"COMPLETED"}


async def test_runs_that_cannot_be_claimed_do_not_starve_the_others(server: PrefectApi) -> None:
    blocked = server.add_deployment("blocked", concurrency_limit=0)
    for _ in range(6):
        server.schedule(blocked, due_in=-60)
    good = server.schedule(server.add_deployment("good"))
    worker = make(server, completing(server))
    async with working(worker):
        await server.wait_state(good, "COMPLETED", timeout=10)

    claims = [request for request in server.requests if request.path.endswith("set_state")]
    assert len(claims) <= 7


@pytest.mark.parametrize(("fresh", "polls"), [(1.0, range(1, 6)), (0.0, range(6, 40))], ids=["kept", "not kept"])
async def test_one_poll_serves_several_starts(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch, fresh: float, polls: range
) -> None:
    monkeypatch.setattr("procworker.intake.FRESH_SECONDS", fresh)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one start at a time
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(20)]
    worker = make(server, completing(server))
    await worker.start(run_once=True, printer=lambda *line: None)

    assert worker.started == [str(id) for id in ids]
    assert {server.run(id).state.type for id in ids} == {"COMPLETED"}
    assert len(server.seen("POST", "get_scheduled_flow_runs")) in polls


async def test_who_was_too_late_for_one_run_asks_again_for_the_others(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the answer is as old."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    server.schedule(server.add_deployment("blocked", concurrency_limit=0), due_in=-60)
    deployment = server.add_deployment("good")
    for _ in range(2):
        server.schedule(deployment)
    async with make(server, completing(server)) as worker:
        await worker.get_and_submit_flow_runs()
        assert worker._intake.knows_more
        await worker._moved.until(lambda: not worker.runs)
        assert not worker._intake.knows_more


async def test_an_old_answer_starts_nothing(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was shown by it and then moved is gone from the next one."""
    monkeypatch.setattr("procworker.intake.FRESH_SECONDS", 0.2)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    deployment, release = server.add_deployment(), anyio.Event()
    first, second = server.schedule(deployment), server.schedule(deployment)
    async with make(server, waiting(server, release)) as worker:
        await worker.get_and_submit_flow_runs()
        assert worker._intake.knows_more
        await server.wait_state(first, "RUNNING")
        await anyio.sleep(0.2)
        assert not worker._intake.knows_more
        server.set_state(second, "CANCELLED")
        await worker.get_and_submit_flow_runs()
        release.set()

    assert worker.started == [str(first)]


async def test_the_same_run_is_not_executed_twice_at_once(server: PrefectApi) -> None:
    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    async with make(server, waiting(server, release)) as worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        await worker.execute(rows[0].flow_run)
        with pytest.raises(ConfigurationError, match="already"):
            await worker.execute(rows[0].flow_run)
        release.set()

    assert worker.started == [str(id)]


async def test_a_cancelled_wait_for_the_end_still_closes_everything(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = LocalWorker("pool", settings=settings_for(server), script=waiting(server, anyio.Event()))
    with anyio.move_on_after(0.5) as scope:
        async with worker:
            await worker.get_and_submit_flow_runs()
            await server.wait_state(id, "RUNNING")

    assert scope.cancelled_caught
    assert server.run(id).state.type == "CRASHED"
    assert not worker.runs


async def test_run_once_takes_no_more_than_the_limit(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    for _ in range(5):
        server.schedule(deployment)
    worker = make(server, completing(server), limit=2)
    await worker.start(run_once=True, printer=lambda *line: None)

    assert len(worker.started) == 2


async def test_the_printer_hears_start_and_stop(server: PrefectApi) -> None:
    lines: list[str] = []
    await make(server, name="w1").start(run_once=True, printer=lines.append)

    assert lines == ["Worker 'w1' started!", "Worker 'w1' stopped!"]


async def test_the_first_stop_lets_runs_finish(server: PrefectApi) -> None:
    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    worker = make(server, waiting(server, release))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
        await server.wait_state(id, "RUNNING")
        worker.stop()
        late = server.schedule(next(iter(server.deployments)))
        release.set()
        await server.wait_state(id, "COMPLETED")

    assert server.run(late).state.type == "SCHEDULED"


async def test_after_the_drain_time_runs_are_ended_and_reported(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = LocalWorker("pool", settings=settings_for(server), script=waiting(server, anyio.Event()), name="w1")
    worker._shift.drain_seconds = 0.1
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
        await server.wait_state(id, "RUNNING")
        worker.stop()

    assert server.run(id).state.type == "CRASHED"
    assert server.run(id).state.message == "The worker 'w1' was stopped, and the flow run with it."


async def test_the_third_stop_kills_without_grace(server: PrefectApi) -> None:
    class Stubborn(ScriptWorker):
        async def kill_infrastructure(
            self, infrastructure_pid: str, configuration: Any, grace_seconds: float = 30
        ) -> None:
            self.killed.append((infrastructure_pid, grace_seconds))
            if grace_seconds == 0:
                release.set()

    release = anyio.Event()
    id = server.schedule(server.add_deployment())
    worker = Stubborn("pool", settings=settings_for(server), script=waiting(server, release))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
        await server.wait_state(id, "RUNNING")
        for _ in range(3):
            worker.stop()

    assert [grace for _, grace in worker.killed] == [10.0, 0.0]


@pytest.mark.slow
async def test_stopping_without_a_server_is_bounded(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("procworker.shift.STOP_GRACE_SECONDS", 0.2)
    monkeypatch.setattr("procworker.shift.LAST_REPORT_SECONDS", 0.2)
    id = server.schedule(server.add_deployment())
    worker = make(server, waiting(server, anyio.Event()))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
        await server.wait_state(id, "RUNNING")
        await server.down()
        worker.stop()
        worker.stop()
        with anyio.fail_after(20):
            await worker._moved.until(lambda: not worker.runs)

    assert worker.outcomes == {"UNKNOWN": 1}


async def test_health_and_readiness_are_told_apart(server: PrefectApi) -> None:
    server.add_pool(type="process")
    lines: list[str] = []
    settings = settings_for(server, PREFECT_WORKER_WEBSERVER_PORT="0")
    worker = ScriptWorker("pool", settings=settings)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(with_healthcheck=True, printer=lines.append))
        await server.wait_request("POST", "get_scheduled_flow_runs", count=2)
        url = lines[0].partition(" ")[2].partition(" ")[2].removesuffix("/health")
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).json() == {"message": "OK"}
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/else")).status_code == 404
            assert (await client.post("/health")).status_code == 405
            server.pools["pool"].is_paused = True
            await worker.sync_with_backend()
            ready = await client.get("/ready")
            assert (ready.status_code, ready.json()["message"]) == (503, "Work pool 'pool' is paused")
            worker._vitals.polled_at -= 3600
            worker._poll_loop._interval = lambda: 1000
        worker.stop()


async def test_a_health_port_that_is_taken_is_a_clear_error(server: PrefectApi) -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as taken:
        port = str(taken.extra(anyio.abc.SocketAttribute.local_port))
        worker = ScriptWorker("pool", settings=settings_for(server, PREFECT_WORKER_WEBSERVER_PORT=port))
        with pytest.raises(ConfigurationError, match="PREFECT_WORKER_WEBSERVER_PORT"):
            await worker.start(with_healthcheck=True, printer=lambda *line: None)


async def test_still_polling_means_within_thirty_intervals(server: PrefectApi) -> None:
    worker = make(server)
    assert worker.is_worker_still_polling(10)

    worker._vitals.polled_at -= 301

    assert not worker.is_worker_still_polling(10)
    assert worker.is_worker_still_polling(11)


async def test_polling_quickens_after_activity(server: PrefectApi) -> None:
    settings = Settings.load({"PREFECT_API_URL": server.url})
    async with ScriptWorker("pool", settings=settings) as worker:
        assert worker._intake.poll_seconds() == 10
        worker._intake.active_at = anyio.current_time()
        assert worker._intake.poll_seconds() == 1


def test_outside_its_context_a_worker_says_so(server_less: Callable[..., ScriptWorker]) -> None:
    worker = server_less()
    for member in ("client", "work_pool", "limiter"):
        with pytest.raises(RuntimeError, match="not correctly initialized"):
            getattr(worker, member)


@pytest.fixture
def server_less() -> Callable[..., ScriptWorker]:
    def build(**options: Any) -> ScriptWorker:
        settings = Settings.load({"PREFECT_API_URL": "http://127.0.0.1:9/api"})
        return ScriptWorker("pool", settings=settings, **options)

    return build


def test_names_and_limits_that_cannot_work_are_refused(server_less: Callable[..., ScriptWorker]) -> None:
    for name in ("a/b", "a%b"):
        with pytest.raises(ValueError, match="must not contain"):
            server_less(name=name)
    for limit in (0, -1):
        with pytest.raises(ConfigurationError, match="at least 1"):
            server_less(limit=limit)


def test_the_plain_facts_of_a_worker(server_less: Callable[..., ScriptWorker]) -> None:
    worker = server_less(name="Grüße, Wörker 1", prefetch_seconds=0)

    assert repr(worker) == "Worker(pool='pool', name='Grüße, Wörker 1')"
    assert worker.get_name_slug() == "grusse-worker-1" or worker.get_name_slug() == "grue-worker-1"
    assert worker.get_status() == {
        "name": "Grüße, Wörker 1",
        "work_pool": None,
        "settings": {"prefetch_seconds": 0},
    }
    assert server_less().name.startswith("ScriptWorker ")
    assert ProcessWorker.get_description()
    assert ProcessWorker.get_logo_url() == ""
    assert ProcessWorker.get_documentation_url().startswith("https://")


def test_worker_types_are_known_by_definition_and_by_entry_point() -> None:
    class Special(ScriptWorker):
        type = "special-for-this-test"

    assert BaseWorker.get_worker_class_from_type("special-for-this-test") is Special
    assert BaseWorker.get_worker_class_from_type("process") is ProcessWorker
    assert BaseWorker.get_worker_class_from_type("no-such-type") is None
    assert {"process", "special-for-this-test"} <= set(BaseWorker.get_all_available_worker_types())


async def test_without_an_api_url_nothing_starts() -> None:
    with pytest.raises(ConfigurationError, match="PREFECT_API_URL"):
        async with ScriptWorker("pool", settings=Settings.load({})):
            pass


async def test_a_worker_written_for_prefect_2_works(server: PrefectApi) -> None:
    """Three-argument prepare_for_flow_run, a started value that is no int, task_status left alone."""
    seen: dict[str, Any] = {}

    class OldConfiguration(BaseJobConfiguration):
        def prepare_for_flow_run(self, flow_run: Any, deployment: Any = None, flow: Any = None) -> None:  # type: ignore[override]
            super().prepare_for_flow_run(flow_run, deployment, flow)
            seen["flow"] = flow.name

    class OldWorker(BaseWorker[OldConfiguration, BaseVariables, ScriptResult]):
        type = "process"
        job_configuration = OldConfiguration

        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> ScriptResult:
            task_status.started("host:42")
            task_status.started("again")
            await server.wait_for(lambda: server.run(id).infrastructure_pid)
            seen["client"] = self._client.read_flow_run
            seen["pool"] = (self._work_pool.name, self._work_pool_name)
            self._logger.info("at work")
            server.set_state(flow_run.id, "COMPLETED")
            return ScriptResult(identifier="host:42", status_code=0)

    BaseWorker._known["process"] = ProcessWorker
    id = server.schedule(server.add_deployment(flow="my-flow"))
    async with working(OldWorker("pool", settings=settings_for(server))):
        await server.wait_state(id, "COMPLETED")

    assert server.run(id).infrastructure_pid == "host:42"
    assert seen["flow"] == "my-flow"
    assert seen["pool"] == ("pool", "pool")


async def test_an_exception_in_the_body_comes_out_as_itself(server: PrefectApi) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with make(server):
            raise KeyError("mine")


async def test_cancelling_a_run_that_is_not_here_is_only_noted(server: PrefectApi) -> None:
    async with make(server) as worker:
        await worker.cancel_run(FlowRun.model_validate({"id": UUID(int=1)}))
        await worker.check_for_cancelled_flow_runs()

    assert not [request for request in server.requests if request.path == "/flow_runs/filter"]


async def test_cloud_gives_a_worker_its_id(server: PrefectApi) -> None:
    server.cloud = True
    settings = settings_for(server, PREFECT_CLOUD_API_URL=server.url)
    async with ScriptWorker("pool", settings=settings) as worker:
        assert worker.backend_id is not None
        assert worker.get_flow_run_logger(FlowRun(id=uuid4())).extra["worker_id"]  # type: ignore[index]
