"""The fake server keeps Prefect's rules, speaks HTTP properly, and breaks exactly as told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest

from procworker.testing.api import PrefectApi
from procworker.testing.messages import Request

BROKEN = (httpx.ReadError, httpx.RemoteProtocolError)


def client_of(server: PrefectApi, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, trust_env=False, **options)


@pytest.fixture
async def client(server: PrefectApi) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(server) as client:
        yield client


async def propose(client: httpx.AsyncClient, id: UUID, type: str, force: bool = False, **state: Any) -> Any:
    body = {"state": {"type": type, **state}, "force": force}
    return (await client.post(f"/flow_runs/{id}/set_state", json=body)).json()


async def poll(client: httpx.AsyncClient, pool: str = "pool", **body: Any) -> list[UUID]:
    answer = await client.post(f"/work_pools/{pool}/get_scheduled_flow_runs", json=body)
    assert answer.status_code == 200, answer.text
    return [UUID(row["flow_run"]["id"]) for row in answer.json()]


# States


async def test_a_run_goes_from_scheduled_to_completed_with_its_history_kept(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id, transition = server.schedule(name="a"), str(uuid4())
    await propose(client, id, "PENDING", state_details={"transition_id": transition})
    assert await poll(client) == []
    await propose(client, id, "RUNNING")
    await propose(client, id, "COMPLETED", message="fine")
    run = server.run(id)
    assert [state.name for state in run.states] == ["Scheduled", "Pending", "Running", "Completed"]
    assert (run.run_count, run.state.message) == (1, "fine")
    assert all(one.timestamp < other.timestamp for one, other in pairwise(run.states))
    assert len({state.id for state in run.states}) == 4
    history = (await client.get("/flow_run_states/", params={"flow_run_id": str(id)})).json()
    assert [state["state_details"].get("transition_id") for state in history] == [None, transition, None, None]
    read = (await client.get(f"/flow_runs/{id}")).json()
    assert (read["state_type"], read["state"]["id"], read["name"]) == ("COMPLETED", str(run.state.id), "a")


@pytest.mark.parametrize("final", ["COMPLETED", "FAILED", "CRASHED"])
async def test_a_stale_claim_of_a_run_that_ended_is_accepted(
    server: PrefectApi, client: httpx.AsyncClient, final: str
) -> None:
    id = server.schedule()
    server.set_state(id, final)
    assert (await propose(client, id, "PENDING"))["status"] == "ACCEPT"
    assert (await propose(client, id, "RUNNING"))["status"] == "ACCEPT"
    assert (await propose(client, id, "CRASHED"))["status"] == "ACCEPT"


@pytest.mark.parametrize("version", ["3.8.8", "2.20.26"])
@pytest.mark.parametrize("old", ["PENDING", "RUNNING"])
async def test_a_second_claim_is_aborted_and_shows_the_current_state(version: str, old: str) -> None:
    async with PrefectApi.running(version) as server, client_of(server) as client:
        id = server.schedule()
        server.set_state(id, old)
        answer = await propose(client, id, "PENDING")
        assert (answer["status"], answer["state"]["type"]) == ("ABORT", old)
        assert len(server.run(id).states) == 2


async def test_a_repeated_proposal_is_rejected_with_the_state_it_made(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id, details = server.schedule(), {"transition_id": uuid4().hex}
    first = await propose(client, id, "PENDING", state_details=details)
    again = await propose(client, id, "PENDING", state_details=details)
    assert (first["status"], again["status"]) == ("ACCEPT", "REJECT")
    assert first["state"]["id"] == again["state"]["id"]


async def test_the_cancel_button_ends_a_run_without_infrastructure_at_once(server: PrefectApi) -> None:
    waiting, running = server.schedule(), server.schedule()
    server.set_state(running, "RUNNING")
    server.request_cancel(waiting)
    server.request_cancel(running)
    assert [server.run(id).state.type for id in (waiting, running)] == ["CANCELLED", "CANCELLING"]


async def test_a_cancelling_run_becomes_nothing_but_cancelled_unless_forced(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id = server.schedule()
    server.set_state(id, "CANCELLING")
    answer = await propose(client, id, "CRASHED")
    assert (answer["status"], answer["state"]["type"]) == ("REJECT", "CANCELLING")
    assert (await propose(client, id, "CRASHED", force=True))["status"] == "ACCEPT"
    assert (await propose(client, id, "CANCELLING"))["status"] == "ABORT"


async def test_running_waits_for_the_scheduled_time(server: PrefectApi, client: httpx.AsyncClient) -> None:
    id = server.schedule(due_in=30)
    await propose(client, id, "PENDING")
    answer = await propose(client, id, "RUNNING")
    assert answer["status"] == "WAIT"
    assert 25 < answer["details"]["delay_seconds"] <= 30


async def test_a_failed_attempt_with_retries_left_awaits_its_retry_unseen_by_pollers(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id = server.schedule(empirical_policy={"retries": 1})
    await propose(client, id, "RUNNING")
    assert (await propose(client, id, "FAILED"))["state"]["name"] == "AwaitingRetry"
    assert await poll(client) == []
    await propose(client, id, "RUNNING")
    assert (await propose(client, id, "FAILED"))["status"] == "ACCEPT"
    assert server.run(id).run_count == 2


@pytest.mark.parametrize(
    ("options", "status", "state"),
    [
        ({"concurrency_limit": 0}, "ABORT", "Scheduled"),
        ({"concurrency_limit": 1}, "REJECT", "AwaitingConcurrencySlot"),
        (
            {"concurrency_limit": 1, "concurrency_options": {"collision_strategy": "CANCEL_NEW"}},
            "REJECT",
            "Cancelled",
        ),
    ],
)
async def test_a_deployment_limits_its_runs(
    server: PrefectApi, client: httpx.AsyncClient, options: dict[str, Any], status: str, state: str
) -> None:
    deployment = server.add_deployment(**options)
    busy, id = server.schedule(deployment), server.schedule(deployment)
    server.set_state(busy, "RUNNING")
    assert (await propose(client, id, "PENDING"))["status"] == status
    assert server.run(id).state.name == state


# Polling


async def test_a_poll_returns_what_is_due_by_priority_then_time(server: PrefectApi, client: httpx.AsyncClient) -> None:
    server.add_pool("pool", queues=("high", "low"))
    low, later = server.schedule(queue="low"), server.schedule(queue="high", due_in=5)
    soon, far = server.schedule(queue="high", due_in=2), server.schedule(queue="high", due_in=99)
    horizon = datetime.now(timezone.utc) + timedelta(seconds=10)
    for spelling in (str(horizon), horizon.isoformat().replace("+00:00", "Z")):
        assert await poll(client, scheduled_before=spelling) == [soon, later, low]
    assert await poll(client, scheduled_before=str(horizon), limit=1) == [soon]
    assert await poll(client, work_queue_names=["low"]) == [low]
    assert await poll(client) == [soon, later, far, low]


async def test_nothing_is_due_where_it_is_paused_or_full(server: PrefectApi, client: httpx.AsyncClient) -> None:
    pool = server.add_pool("pool", queues=("a", "b"), concurrency_limit=1)
    first, second = server.schedule(queue="a"), server.schedule(queue="b")
    assert await poll(client) == [first]
    next(queue for queue in server.queues.values() if queue.name == "a").is_paused = True
    assert await poll(client) == [second]
    server.set_state(first, "RUNNING")
    assert await poll(client) == []
    pool.concurrency_limit = None
    pool.is_paused = True
    assert await poll(client) == []


async def test_runs_of_deployments_inherit_and_what_is_deleted_is_gone(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    deployment = server.add_deployment("d", flow="f", parameters={"a": 1, "b": 1}, tags=["t"], job_variables={"x": 1})
    named = (await client.get("/deployments/name/f/d")).json()
    assert (named["id"], named["job_variables"]) == (str(deployment), {"x": 1})
    body = {"parameters": {"b": 2}, "state": {"type": "PENDING"}, "idempotency_key": "once"}
    made = [(await client.post(f"/deployments/{deployment}/create_flow_run", json=body)).json() for _ in "ab"]
    assert made[0]["id"] == made[1]["id"]
    assert (made[0]["parameters"], made[0]["tags"], made[0]["state_type"]) == ({"a": 1, "b": 2}, ["t"], "PENDING")
    id = UUID(made[0]["id"])
    server.delete_deployment(deployment)
    server.delete_run(id)
    server.delete_pool("pool")
    for path in (f"/deployments/{deployment}", f"/flow_runs/{id}", "/work_pools/pool"):
        assert (await client.get(path)).status_code == 404


async def test_the_old_generation_knows_less() -> None:
    async with PrefectApi.running("2.20.26") as server, client_of(server) as client:
        deployment = server.add_deployment(job_variables={"x": 1})
        read = (await client.get(f"/deployments/{deployment}")).json()
        assert read["infra_overrides"] == {"x": 1}
        assert "job_variables" not in read
        assert (await client.patch(f"/flow_runs/{server.schedule()}/labels", json={})).status_code == 404
        assert (await client.post("/events", json=[])).status_code == 404
        assert (await client.get("/admin/version")).json() == "2.20.26"


async def test_filters_select_by_id_state_and_pool(server: PrefectApi, client: httpx.AsyncClient) -> None:
    one, two, other = server.schedule(), server.schedule(), server.schedule(pool="other")
    for id in (one, two, other):
        server.set_state(id, "CANCELLING")

    async def found(**body: Any) -> set[UUID]:
        return {UUID(row["id"]) for row in (await client.post("/flow_runs/filter", json=body)).json()}

    cancelling = {"type": {"any_": ["CANCELLING"]}}
    assert await found(flow_runs={"id": {"any_": [str(one), str(other)]}, "state": cancelling}) == {one, other}
    assert await found(flow_runs={"id": {"not_any_": [str(one)]}}, work_pools={"name": {"any_": ["pool"]}}) == {two}
    assert await found(flow_runs={"id": {"any_": []}}) == set()
    assert await found(flow_runs={"state": {"name": {"any_": ["Cancelled"]}}}, sort=None) == set()


# Credentials, secrets, logs


async def test_credentials_are_asked_for_everywhere_but_at_the_health_routes() -> None:
    for options, header in (
        ({"api_key": "k"}, "Bearer k"),
        ({"auth_string": "admin:pass"}, "Basic YWRtaW46cGFzcw=="),
    ):
        async with PrefectApi.running(**options) as server, client_of(server) as client:
            assert (await client.get("/admin/version")).status_code == 401
            assert (await client.get("/health")).json() is True
            assert (await client.get("/ready")).status_code == 200
            assert (await client.get("/version", headers={"authorization": header})).status_code == 200


async def test_csrf_is_off_with_422_and_demands_a_fresh_token_when_on(server: PrefectApi) -> None:
    async with client_of(server) as client:
        off = await client.get("/csrf-token", params={"client": "c"})
        assert (off.status_code, off.json()["detail"]) == (422, "CSRF protection is disabled.")
        server.csrf = True
        assert (await client.post("/flow_runs/filter", json={})).status_code == 403
        token = (await client.get("/csrf-token", params={"client": "c"})).json()["token"]
        headers = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": "c"}
        assert (await client.post("/flow_runs/filter", json={}, headers=headers)).status_code == 200
        server.csrf_tokens.clear()
        stale = await client.post("/flow_runs/filter", json={}, headers=headers)
        assert (stale.status_code, "Invalid CSRF token" in stale.text) == (403, True)


async def test_versions_and_content_types_are_checked(client: httpx.AsyncClient) -> None:
    for version, status in (("0.8.4", 200), ("0.7.9", 400), ("x", 400)):
        answer = await client.get("/version", headers={"X-PREFECT-API-VERSION": version})
        assert answer.status_code == status
    assert (await client.post("/flow_runs/filter", content=b"{}")).status_code == 422
    assert (await client.post("/flow_runs/filter", content=b"{", headers={"content-type": "application/json"})).is_error


async def test_blocks_hide_their_secrets_and_variables_are_found_by_name(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id = server.add_block("b", "secret", {"value": "hush"})
    server.add_variable("v", [1])
    by_name, shown = "/block_types/slug/secret/block_documents/name/b", {"include_secrets": "true"}
    assert (await client.get(by_name, params=shown)).json()["data"] == {"value": "hush"}
    assert (await client.get(f"/block_documents/{id}")).json()["data"] == {"value": "********"}
    assert (await client.get("/variables/name/v")).json()["value"] == [1]


async def test_a_worker_id_in_a_log_loses_the_batch_except_on_the_cloud(client: httpx.AsyncClient) -> None:
    record = {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "worker_id": "w"}
    assert (await client.post("/logs/", json=[record])).status_code == 422
    async with PrefectApi.running(cloud=True) as cloud, client_of(cloud) as of_cloud:
        assert (await of_cloud.post("/logs/", json=[record])).status_code == 201
        assert cloud.logs == [record]
        cloud.add_pool("p")
        beat = {"name": "w", "heartbeat_interval_seconds": 30, "return_id": True}
        answer = await of_cloud.post("/work_pools/p/workers/heartbeat", json=beat)
        assert UUID(answer.json()) == cloud.workers["p", "w"]["id"]


# HTTP and faults


async def test_connections_are_kept_and_served_side_by_side(server: PrefectApi, client: httpx.AsyncClient) -> None:
    first = await client.get("/health")
    again = await client.get("/health")
    ports = [answer.extensions["network_stream"].get_extra_info("client_addr")[1] for answer in (first, again)]
    assert ports[0] == ports[1]
    held = server.fault("GET", "/ready", hang=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.get, "/ready")
        await server.wait_request("GET", "/ready")
        assert (await client.get("/health")).json() is True
        held.release()
    assert server.requests[-2].status == 200


async def test_a_request_is_remembered_as_it_came(server: PrefectApi, client: httpx.AsyncClient) -> None:
    await client.post("/work_pools/a%20b/queues/filter", params={"x": "1"}, json={"limit": None}, headers={"A": "b"})
    seen = server.requests[0]
    assert (seen.method, seen.path, seen.query, seen.json) == (
        *("POST", "/work_pools/a b/queues/filter"),
        *({"x": "1"}, {"limit": None}),
    )
    assert (seen.headers["a"], seen.status, seen.time <= anyio.current_time()) == ("b", 404, True)


async def test_a_fault_strikes_as_often_as_told_and_only_where_told(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    def second(request: Request) -> bool:
        return request.query.get("n") == "2"

    fault = server.fault("GET", "^/health$", status=503, headers={"Retry-After": "7"}, body="busy", when=second)
    answers = [await client.get(path) for path in ("/health", "/ready?n=2", "/health?n=2", "/health?n=2")]
    assert [answer.status_code for answer in answers] == [200, 200, 503, 200]
    assert (answers[2].text, answers[2].headers["retry-after"], fault.count) == ("busy", "7", 1)
    endless = server.fault(path="/health", times=99, status=500)
    assert [(await client.get("/health")).status_code for _ in range(3)] == [500] * 3
    endless.times = 0
    assert (await client.get("/health")).status_code == 200


@pytest.mark.parametrize("how", [{"reset": True}, {"commit": True}, {"truncate": 5}, {"truncate": 0}])
async def test_a_dropped_or_cut_reply_is_a_transport_error(
    server: PrefectApi, client: httpx.AsyncClient, how: dict[str, Any]
) -> None:
    server.fault("POST", "set_state", **how)
    id = server.schedule()
    with pytest.raises(BROKEN):
        await propose(client, id, "PENDING")
    applied = "reset" not in how
    assert server.run(id).state.type == ("PENDING" if applied else "SCHEDULED")
    assert (await client.get("/health")).status_code == 200


async def test_an_error_may_hide_that_the_request_was_applied(server: PrefectApi, client: httpx.AsyncClient) -> None:
    ids = server.schedule(), server.schedule()
    for id, commit in zip(ids, (True, False), strict=True):
        server.fault("POST", "set_state", status=503, commit=commit)
        answer = await client.post(f"/flow_runs/{id}/set_state", json={"state": {"type": "PENDING"}})
        assert answer.status_code == 503
    assert [server.run(id).state.type for id in ids] == ["PENDING", "SCHEDULED"]


async def test_a_delay_and_extra_headers_leave_the_true_reply(server: PrefectApi, client: httpx.AsyncClient) -> None:
    server.fault("GET", "/health", delay=0.05, headers={"Prefect-Maintenance": "true"})
    begin = anyio.current_time()
    answer = await client.get("/health")
    assert (answer.json(), answer.headers["prefect-maintenance"]) == (True, "true")
    assert anyio.current_time() - begin >= 0.05


async def test_a_hanging_request_is_not_applied_when_the_client_gives_up(server: PrefectApi) -> None:
    id, fault = server.schedule(), server.fault("POST", "set_state", hang=True)
    async with client_of(server, timeout=0.1) as client:
        with pytest.raises(httpx.ReadTimeout):
            await propose(client, id, "PENDING")
    async with client_of(server) as client:
        await client.get("/health")
        fault.release()
        await client.get("/health")
    assert server.run(id).state.type == "SCHEDULED"


async def test_an_outage_refuses_and_the_same_address_comes_back(server: PrefectApi, client: httpx.AsyncClient) -> None:
    held = server.fault("GET", "/ready", hang=True)
    async with anyio.create_task_group() as tasks:

        async def broken() -> None:
            with pytest.raises(BROKEN):
                await client.get("/ready")

        tasks.start_soon(broken)
        await server.wait_request("GET", "/ready")
        async with server.outage():
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")
    assert (await client.get("/health")).json() is True
    assert held.count == 1


async def test_waiting_is_bounded_and_tells_what_happened_instead(
    server: PrefectApi, client: httpx.AsyncClient
) -> None:
    id = server.schedule(name="lazy")
    server.set_state(id, "FAILED", message="because")
    await client.get("/health")
    with pytest.raises(AssertionError, match=r"(?s)COMPLETED.*lazy: Scheduled, Failed \(because\).*GET /health -> 200"):
        await server.wait_state(id, "COMPLETED", timeout=0.01)
    assert (await server.wait_state(id, "CRASHED", "Failed")).message == "because"
    with pytest.raises(AssertionError, match="2 x GET /health"):
        await server.wait_request("GET", "/health", count=2, timeout=0.01)


async def test_a_wait_wakes_when_the_fact_is_there(server: PrefectApi) -> None:
    id = server.schedule()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.wait_state, id, "RUNNING")
        await anyio.lowlevel.checkpoint()
        server.set_state(id, "RUNNING")


async def test_a_failed_assert_comes_out_bare_and_a_bug_in_an_answer_comes_out_at_the_end() -> None:
    async def fail() -> None:
        async with PrefectApi.running():
            raise AssertionError("bare")

    async def meet_a_bug() -> None:
        async with PrefectApi.running() as server, client_of(server) as client:
            server.logs = None  # type: ignore[assignment]
            assert (await client.post("/logs", json=[])).status_code == 500

    with pytest.raises(AssertionError, match="bare"):
        await fail()
    with pytest.raises(TypeError):
        await meet_a_bug()
