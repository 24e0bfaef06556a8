"""One flow run from claim to report, against a server that keeps Prefect's rules."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import anyio
import pytest
from workers import LocalWorker, ScriptWorker, settings_for, working

from procworker.configuration import BaseJobConfiguration
from procworker.errors import ProcworkerError
from procworker.outcome import Facts, Reason
from procworker.server.client import Client
from procworker.server.http import Http
from procworker.server.models import FlowRun
from procworker.testing.api import PrefectApi


@pytest.fixture(autouse=True)
def tries_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Http, "first_pause", 0.2)


def script_worker(server: PrefectApi, script: Any = None, **options: Any) -> ScriptWorker:
    return ScriptWorker("pool", settings=settings_for(server), script=script, **options)


def finishing(server: PrefectApi, type: str, code: int = 0) -> Any:
    """A script that reports like an engine, then exits with this code."""

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        server.set_state(flow_run.id, type)
        return code

    return script


def types(server: PrefectApi, id: UUID) -> list[str]:
    return [state.type for state in server.run(id).states]


async def test_a_run_goes_from_scheduled_to_its_end_with_one_claim_and_no_report_of_ours(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())

    async with working(script_worker(server, finishing(server, "COMPLETED"))):
        await server.wait_state(id, "COMPLETED")

    assert types(server, id) == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]
    assert sum(request.path.endswith("set_state") for request in server.requests) == 1


async def test_pid_and_labels_are_recorded_and_the_run_log_tells_the_story(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        await server.wait_for(lambda: server.run(id).labels)
        return int(await finishing(server, "COMPLETED")(flow_run, configuration))

    id = server.schedule(server.add_deployment())
    worker = script_worker(server, script, name="w1")
    async with working(worker):
        await server.wait_state(id, "COMPLETED")

    assert server.run(id).infrastructure_pid == f"infra-{id}"
    labels = server.run(id).labels
    assert labels["prefect.worker.name"] == "w1"
    assert labels["prefect.work-pool.name"] == "pool"
    messages = [log["message"] for log in server.logs if log["flow_run_id"] == str(id)]
    assert any("submitting flow run" in message for message in messages)
    events = [event["event"] for event in server.events]
    expected = ["worker.started", "worker.submitted-flow-run", "worker.executed-flow-run", "worker.stopped"]
    assert events == [f"prefect.{name}" for name in expected]
    submitted, executed = server.events[1:3]
    assert executed["follows"] == submitted["id"]


async def test_labels_that_the_server_refuses_cost_no_run(server: PrefectApi) -> None:
    server.fault("PATCH", "/labels", times=99, status=500)
    id = server.schedule(server.add_deployment())

    async with working(script_worker(server, finishing(server, "COMPLETED"))):
        await server.wait_state(id, "COMPLETED")

    assert types(server, id)[-1] == "COMPLETED"


async def test_a_non_zero_exit_without_a_state_is_reported_as_crashed(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        return 3

    id = server.schedule(server.add_deployment())
    async with working(script_worker(server, script)):
        state = await server.wait_state(id, "CRASHED")

    assert "status code 3" in str(state.message)


@pytest.mark.parametrize("ended", ["COMPLETED", "FAILED", "CRASHED"])
async def test_a_claim_from_an_old_answer_is_taken_back(server: PrefectApi, ended: str) -> None:
    """The server accepts PENDING on a run that has ended since the poll; the run must not execute twice."""
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        server.set_state(id, "PENDING")
        server.set_state(id, "RUNNING")
        server.set_state(id, ended, message="the other attempt's word")
        await worker.execute(rows[0].flow_run)
        await worker._moved.until(lambda: not worker.runs)

    assert worker.started == []
    assert types(server, id)[-2:] == ["PENDING", ended]
    assert server.run(id).state.message == "the other attempt's word"


async def claiming(server: PrefectApi, rivals: Any) -> tuple[ScriptWorker, UUID]:
    """Let a worker claim a run while `rivals(id)` happens between its claim and its look back."""
    id = server.schedule(server.add_deployment())
    server.fault("GET", "/flow_run_states", times=1, status=503, when=lambda request: bool(rivals(id) or True))
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        await (await worker.execute(rows[0].flow_run)).wait_async(20)
    return worker, id


async def test_of_two_accepted_claims_the_earlier_one_runs(server: PrefectApi) -> None:
    """A busy SQLite server accepts two: the later is seen by both, and its owner gives way."""
    worker, id = await claiming(server, lambda id: server.set_state(id, "PENDING", transition_id="a-rival"))

    assert worker.started == [str(id)]
    assert server.run(id).state.type == "COMPLETED"


async def test_of_two_accepted_claims_the_later_one_gives_way(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        server.fault("POST", "set_state", times=1, when=lambda request: bool(accept_over_rival(server, id, request)))
        await (await worker.execute(rows[0].flow_run)).wait_async(20)

    assert worker.started == []
    assert types(server, id) == ["SCHEDULED", "PENDING", "PENDING"]


def accept_over_rival(server: PrefectApi, id: UUID, request: Any) -> bool:
    """Claim the run for a rival, and then take the worker's claim all the same."""
    server.set_state(id, "PENDING", transition_id="a-rival")
    details = request.json["state"]["state_details"]
    server.set_state(id, "PENDING", transition_id=details["transition_id"])
    return False


async def test_a_claim_over_a_running_attempt_is_dropped_and_left_to_its_engine(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        server.set_state(id, "PENDING", transition_id="a-rival")
        server.set_state(id, "RUNNING")
        server.fault("POST", "set_state", times=1, when=lambda request: bool(accept(server, id, request)))
        await (await worker.execute(rows[0].flow_run)).wait_async(20)

    assert worker.started == []
    assert types(server, id) == ["SCHEDULED", "PENDING", "RUNNING", "PENDING"]


def accept(server: PrefectApi, id: UUID, request: Any) -> bool:
    server.set_state(id, "PENDING", transition_id=request.json["state"]["state_details"]["transition_id"])
    return False


async def test_a_claim_that_was_stamped_early_and_written_late_is_taken_back_too(server: PrefectApi) -> None:
    """A state's time is when the server began to wait for its database; the later one in time may be overwritten."""
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        server.set_state(id, "PENDING", transition_id="a-rival")
        server.set_state(id, "CRASHED", message="the rival's word")
        server.fault("POST", "set_state", times=1, when=lambda request: bool(accept(server, id, request)))
        server.fault("GET", "/flow_run_states", times=1, status=503, when=lambda request: stamped_early(server, id))
        await (await worker.execute(rows[0].flow_run)).wait_async(20)

    assert worker.started == []
    assert server.run(id).state.type == "CRASHED"
    assert server.run(id).state.message == "the rival's word"


def stamped_early(server: PrefectApi, id: UUID) -> bool:
    _, rival, crashed, ours = server.run(id).states
    ours.timestamp = rival.timestamp + (crashed.timestamp - rival.timestamp) / 2
    return False


async def test_a_run_that_is_scheduled_again_after_the_claim_is_not_started(server: PrefectApi) -> None:
    worker, id = await claiming(server, lambda id: server.set_state(id, "SCHEDULED"))

    assert worker.started == []
    assert types(server, id) == ["SCHEDULED", "PENDING", "SCHEDULED"]


async def test_a_run_that_is_ended_by_hand_after_the_claim_is_not_started(server: PrefectApi) -> None:
    worker, id = await claiming(server, lambda id: server.set_state(id, "CANCELLED"))

    assert worker.started == []
    assert server.run(id).state.type == "CANCELLED"


async def test_without_the_look_back_the_same_run_would_execute_twice(server: PrefectApi) -> None:
    """The negative control: the server of this test really has the trap."""
    id = server.schedule(server.add_deployment())
    server.set_state(id, "PENDING")
    server.set_state(id, "COMPLETED")

    async with Client(settings_for(server)) as client:
        answer = await client.set_flow_run_state(id, {"type": "PENDING", "state_details": {"transition_id": str(id)}})

    assert answer.status == "ACCEPT"


async def test_an_old_answer_is_not_even_used_for_a_claim(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with worker:
        future = await worker.execute(FlowRun.model_validate({"id": id}))
        run = worker.runs[id]
        run.answered_at = anyio.current_time() - 3
        await future.wait_async(10)

    assert worker.started == []
    assert types(server, id) == ["SCHEDULED"]


async def test_a_lost_answer_to_the_claim_is_recognised_as_our_own(server: PrefectApi) -> None:
    server.fault("POST", "set_state", times=1, reset=True, commit=True)
    id = server.schedule(server.add_deployment())

    async with working(script_worker(server, finishing(server, "COMPLETED"))):
        await server.wait_state(id, "COMPLETED")

    assert types(server, id) == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]


async def test_a_claim_that_another_worker_won_is_dropped_and_frees_its_slot(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    worker = script_worker(server, finishing(server, "COMPLETED"), limit=1)
    async with worker:
        rows = await worker.client.get_scheduled_flow_runs_for_work_pool("pool")
        server.set_state(id, "PENDING")
        await worker.execute(rows[0].flow_run)
        await worker._moved.until(lambda: not worker.runs)
        assert worker.limiter.available_tokens == 1

    assert worker.started == []
    assert types(server, id) == ["SCHEDULED", "PENDING"]


async def test_a_cancel_between_claim_and_start_starts_nothing(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    server.fault("GET", "/flow_run_states", times=1, status=503, when=lambda request: bool(cancel(server, id)))

    worker = script_worker(server, finishing(server, "COMPLETED"))
    async with working(worker):
        await server.wait_state(id, "CANCELLED")

    assert worker.started == []


def cancel(server: PrefectApi, id: UUID) -> bool:
    server.set_state(id, "CANCELLING")
    return True


async def test_a_deployment_that_is_gone_cancels_its_runs(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    id = server.schedule(deployment)
    server.delete_deployment(deployment)

    worker = script_worker(server)
    async with working(worker):
        state = await server.wait_state(id, "CANCELLED")

    assert str(deployment) in str(state.message)
    assert worker.started == []


async def test_a_deployment_that_goes_after_the_claim_cancels_the_run_too() -> None:
    async with PrefectApi.running("2.20.26") as server:  # which claims for deployments that are gone
        deployment = server.add_deployment()
        id = server.schedule(deployment)
        server.delete_deployment(deployment)
        async with working(script_worker(server)):
            state = await server.wait_state(id, "CANCELLED")

    assert str(deployment) in str(state.message)


async def test_a_cancel_while_running_ends_the_infrastructure_first(server: PrefectApi) -> None:
    ended = anyio.Event()

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await ended.wait()
        assert server.run(flow_run.id).state.type == "CANCELLING"
        return -15

    class Killing(ScriptWorker):
        async def kill_infrastructure(
            self, infrastructure_pid: str, configuration: Any, grace_seconds: float = 30
        ) -> None:
            self.killed.append((infrastructure_pid, grace_seconds))
            ended.set()

    id = server.schedule(server.add_deployment())
    worker = Killing("pool", settings=settings_for(server), script=script)
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        await worker.check_for_cancelled_flow_runs()
        await server.wait_state(id, "CANCELLED")
        await worker._moved.until(lambda: not worker.runs)  # else stopping kills it once more

    assert worker.killed == [(f"infra-{id}", 30.0)]


async def test_a_worker_that_cannot_kill_has_its_run_cancelled(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await anyio.sleep_forever()
        return 0

    id = server.schedule(server.add_deployment())
    worker = script_worker(server, script)
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        await worker.check_for_cancelled_flow_runs()
        await server.wait_state(id, "CANCELLED")


@pytest.mark.slow
async def test_an_outage_at_the_end_delays_the_report_but_does_not_lose_it(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.fault("*", "/flow_run", times=4, status=503)
        return 3

    id = server.schedule(server.add_deployment())
    async with working(script_worker(server, script)):
        await server.wait_state(id, "CRASHED", timeout=40)


async def test_a_late_report_does_not_touch_a_newer_attempt(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "SCHEDULED")
        server.set_state(flow_run.id, "PENDING", transition_id="somebody-elses")
        server.set_state(flow_run.id, "RUNNING")
        return -9

    id = server.schedule(server.add_deployment())
    worker = script_worker(server, script)
    async with worker:
        await worker.get_and_submit_flow_runs()
        await worker._moved.until(lambda: not worker.runs)

    assert types(server, id)[-1] == "RUNNING"
    assert worker.outcomes == {"UNKNOWN": 1}


async def test_a_run_that_is_deleted_on_the_way_is_dropped(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.delete_run(flow_run.id)
        return 1

    server.schedule(server.add_deployment())
    worker = script_worker(server, script)
    async with worker:
        await worker.get_and_submit_flow_runs()
        await worker._moved.until(lambda: not worker.runs)

    assert worker.outcomes == {"UNKNOWN": 1}


async def test_an_exception_in_run_ends_this_run_alone(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        if flow_run.parameters["bad"]:
            raise RuntimeError("infrastructure broke")
        return await finishing(server, "COMPLETED")(flow_run, configuration)

    deployment = server.add_deployment()
    bad, good = (server.schedule(deployment, parameters={"bad": bad}) for bad in (True, False))
    worker = script_worker(server, script)
    async with working(worker):
        await server.wait_state(good, "COMPLETED")
        await server.wait_for(lambda: any("infrastructure broke" in log["message"] for log in server.logs))

    assert types(server, bad)[-1] == "PENDING"  # started, so its own engine has the last word


async def test_a_configuration_that_cannot_be_built_crashes_with_its_place(server: PrefectApi) -> None:
    server.add_pool(type="process", base_job_template=ScriptWorker.get_default_base_job_template())
    id = server.schedule(server.add_deployment(job_variables={"labels": ["x"]}))

    async with working(script_worker(server)):
        state = await server.wait_state(id, "CRASHED")

    assert "labels: Input should be a valid dictionary" in str(state.message)


async def test_a_timeout_ends_the_run_and_is_named(server: PrefectApi) -> None:
    class Timed(BaseJobConfiguration):
        timeout_seconds: float = 0.1

    class TimedWorker(ScriptWorker):
        job_configuration = Timed

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        await anyio.sleep_forever()
        return 0

    id = server.schedule(server.add_deployment())
    async with working(TimedWorker("pool", settings=settings_for(server), script=script)):
        state = await server.wait_state(id, "CRASHED")

    assert state.name == "TimedOut"
    assert "timeout of 0.1 s" in str(state.message)


async def test_deployment_and_flow_are_read_once_for_all_runs_of_a_poll(server: PrefectApi) -> None:
    deployment = server.add_deployment()
    ids = [server.schedule(deployment) for _ in range(2)]

    async with working(script_worker(server, finishing(server, "COMPLETED"))):
        for id in ids:
            await server.wait_state(id, "COMPLETED")

    reads = [request.path for request in server.requests if request.method == "GET"]
    assert sum(path.startswith("/deployments/") for path in reads) == 1
    assert sum(path.startswith("/flows/") for path in reads) == 1


async def test_a_torn_down_worker_reports_what_it_ends(server: PrefectApi) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await anyio.sleep_forever()
        return 0

    id = server.schedule(server.add_deployment())
    with anyio.CancelScope() as scope:
        async with LocalWorker("pool", settings=settings_for(server), script=script, name="w1") as worker:
            await worker.get_and_submit_flow_runs()
            await server.wait_state(id, "RUNNING")
            scope.cancel()
            await anyio.sleep_forever()

    assert server.run(id).state.type == "CRASHED"
    assert "'w1' was stopped" in str(server.run(id).state.message)


async def test_a_stop_while_a_run_is_prepared_without_a_server_ends_it(server: PrefectApi) -> None:
    id = server.schedule(server.add_deployment())
    server.fault("GET", "/deployments/", times=99, hang=True)
    worker = script_worker(server)
    async with working(worker):
        await server.wait_state(id, "PENDING")
        await server.wait_request("GET", "/deployments/")

    assert worker.started == []
    assert server.run(id).state.type == "CRASHED"


async def test_a_worker_that_names_nothing_to_end_is_cancelled_itself(server: PrefectApi) -> None:
    class Silent(LocalWorker):
        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any:
            self.started.append(str(flow_run.id))
            await anyio.sleep_forever()

    id = server.schedule(server.add_deployment())
    worker = Silent("pool", settings=settings_for(server))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
        await server.wait_state(id, "PENDING")
        await server.wait_for(lambda: any("submitting" in log["message"] for log in server.logs))
        for _ in range(3):
            worker.stop()

    assert server.run(id).state.type == "CRASHED"


async def test_a_run_that_returns_nothing_says_so(server: PrefectApi) -> None:
    class Nothing(LocalWorker):
        async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> Any:
            return None

    id = server.schedule(server.add_deployment())
    async with working(Nothing("pool", settings=settings_for(server))):
        state = await server.wait_state(id, "CRASHED")

    assert "Nothing.run() returned nothing" in str(state.message)


async def test_an_end_that_failed_is_tried_again(server: PrefectApi) -> None:
    ended = anyio.Event()

    class Flaky(LocalWorker):
        async def kill_infrastructure(
            self, infrastructure_pid: str, configuration: Any, grace_seconds: float = 30
        ) -> None:
            self.killed.append((infrastructure_pid, grace_seconds))
            if len(self.killed) == 1:
                raise OSError("not now")
            ended.set()

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.set_state(flow_run.id, "RUNNING")
        await ended.wait()
        return -15

    id = server.schedule(server.add_deployment())
    worker = Flaky("pool", settings=settings_for(server), script=script)
    async with working(worker):
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        for _ in range(2):
            await worker.check_for_cancelled_flow_runs()
            await worker._moved.until(lambda: not worker.runs or not worker.runs[id].ending or ended.is_set())
            await anyio.wait_all_tasks_blocked()
        await server.wait_state(id, "CANCELLED")

    assert len(worker.killed) == 2


@pytest.mark.parametrize("status", [404, 405, 413, 422])
async def test_a_server_that_refuses_to_tell_the_history_for_once_costs_no_outcome(
    server: PrefectApi, status: int
) -> None:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.fault("GET", "flow_run_states", times=1, status=status, body='{"detail": "Not Found"}')
        return 3

    id = server.schedule(server.add_deployment())
    async with working(script_worker(server, script)):
        await server.wait_state(id, "CRASHED", timeout=40)


async def test_a_stop_does_not_replace_the_reason_of_a_run_that_has_failed_already(server: PrefectApi) -> None:
    """Its record, too, goes on to say what was wrong: whoever reports it later has nothing else."""
    reporting = anyio.Event()

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        server.fault("GET", "flow_run", times=2, status=503, when=lambda request: reporting.set() is None)
        raise ProcworkerError("The command 'x' was not found")

    id = server.schedule(server.add_deployment())
    worker = LocalWorker("pool", settings=settings_for(server), script=script)
    async with working(worker):
        await reporting.wait()
        run = worker.runs[id]
        await run.stop(Reason.STOPPED, "The worker was stopped")
        state = await server.wait_state(id, "CRASHED", timeout=40)

    assert "was not found" in str(state.message)
    recorded = Facts.model_validate(run.page.data["facts"])
    assert recorded.reason is None
    assert "was not found" in str(recorded.failure)
