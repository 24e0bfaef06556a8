"""The client says what endpoints expect and believes only answers of the right shape."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from test_http import settings

from procworker.errors import ObjectNotFound, Rejected, Unauthorized, Unreachable
from procworker.server.client import Client
from procworker.server.models import Deployment, FlowRun, State, WorkPool, new_state
from procworker.testing.api import PrefectApi

TEMPLATE = {"job_configuration": {"command": "{{ command }}"}, "variables": {"properties": {"command": {}}}}


@asynccontextmanager
async def speaking(server: PrefectApi, **values: str) -> AsyncIterator[Client]:
    """A client of this server that does not take its time between attempts."""
    async with Client(settings(server.url, **values)) as client:
        client.http.first_pause = 0.01
        yield client


@pytest.fixture
async def client(server: PrefectApi) -> AsyncIterator[Client]:
    async with speaking(server) as client:
        yield client


@pytest.fixture
async def old_server() -> AsyncIterator[PrefectApi]:
    async with PrefectApi.running("2.20.26") as server:
        yield server


# Work pools


async def test_a_pool_is_created_filled_and_read(server: PrefectApi, client: Client) -> None:
    with pytest.raises(ObjectNotFound):
        await client.read_work_pool("p")
    assert (await client.create_work_pool("p", "process")).base_job_template == {}
    await client.update_work_pool("p", TEMPLATE)
    pool = await client.read_work_pool("p")
    assert (pool.name, pool.type, pool.base_job_template) == ("p", "process", TEMPLATE)
    assert server.seen("POST", "^/work_pools")[0].json == {"name": "p", "type": "process"}


async def test_a_pool_that_somebody_else_created_meanwhile_is_read(server: PrefectApi, client: Client) -> None:
    theirs = server.add_pool("p", type="docker")
    pool = await client.create_work_pool("p", "process", TEMPLATE)
    assert (pool.id, pool.type) == (theirs.id, "docker")


async def test_a_refused_pool_is_an_error(client: Client) -> None:
    with pytest.raises(Unauthorized, match="reserved"):
        await client.create_work_pool("Prefect-x", "process")
    with pytest.raises(Rejected):
        await client.create_work_pool("p", "process", {"job_configuration": {"a": "{{ b }}"}})


@pytest.mark.parametrize("name", ["a b", "ü é", "?x=1#y", "{}", "a+b"])
async def test_names_arrive_as_they_are(server: PrefectApi, client: Client, name: str) -> None:
    server.add_pool(name)
    assert (await client.read_work_pool(name)).name == name


@pytest.mark.parametrize("slash", ["", "/", "//"])
async def test_a_name_is_one_path_segment_and_no_slash_is_doubled(slash: str) -> None:
    paths: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(404, json={"detail": "Not Found"})

    async with Client(settings(f"http://x.test/api{slash}"), httpx.MockTransport(answer)) as client:
        with pytest.raises(ObjectNotFound):
            await client.read_work_pool("a/../%2F&b")
    assert paths == [b"/api/work_pools/a%2F..%2F%252F%26b"]


async def test_a_heartbeat_sends_whole_seconds_and_asks_only_cloud_for_an_id(
    server: PrefectApi, client: Client
) -> None:
    server.add_pool("p")
    assert await client.send_worker_heartbeat("p", "w", 30.5, get_worker_id=True) is None
    assert await client.send_worker_heartbeat("p", "w") is None
    first, second = (request.json for request in server.seen("POST", "heartbeat"))
    assert first == {"name": "w", "heartbeat_interval_seconds": 30}
    assert second == {"name": "w", "heartbeat_interval_seconds": None}


@pytest.mark.parametrize("text", ["{}", '"{}"', " {}\n"])
async def test_cloud_tells_the_id_of_the_worker(text: str) -> None:
    worker_id = uuid4()
    async with PrefectApi.running(cloud=True) as server, speaking(server, cloud_api_url="http") as client:
        server.add_pool("p")
        server.fault("POST", "heartbeat", body=text.format(worker_id), commit=True)
        assert await client.send_worker_heartbeat("p", "w", 30, get_worker_id=True) == worker_id
        assert server.seen("POST", "heartbeat")[0].json["return_id"] is True


async def test_cloud_may_refuse_to_tell_the_id() -> None:
    async with PrefectApi.running(cloud=True) as server, speaking(server, cloud_api_url="http") as client:
        server.add_pool("p")
        server.fault("POST", "heartbeat", status=422)
        assert await client.send_worker_heartbeat("p", "w", 30, get_worker_id=True) is None
        assert server.workers["p", "w"]["heartbeats"] == 1
        server.fault("POST", "heartbeat", body="<html>", times=2)
        with pytest.raises(Unreachable):
            await client.send_worker_heartbeat("p", "w", 30, get_worker_id=True)
        server.fault("POST", "heartbeat", status=404, body="{}")
        with pytest.raises(ObjectNotFound):
            await client.send_worker_heartbeat("p", "w", 30, get_worker_id=True)


async def test_queues_are_listed_all_or_by_name(server: PrefectApi, client: Client) -> None:
    server.add_pool("p", queues=("a", "b"))
    assert [queue.name for queue in await client.read_work_queues("p")] == ["a", "b"]
    assert [queue.name for queue in await client.read_work_queues("p", {"b"})] == ["b"]


async def test_a_poll_lists_what_is_due_in_the_servers_order(server: PrefectApi, client: Client) -> None:
    late, soon = server.schedule(due_in=8), server.schedule(due_in=3)
    server.schedule(due_in=60)
    # A zone of its own: the server compares instants.
    horizon = datetime.now(timezone(timedelta(hours=5))) + timedelta(seconds=10)
    rows = await client.get_scheduled_flow_runs_for_work_pool("pool", ["default"], horizon, limit=999)
    assert [row.flow_run.id for row in rows] == [soon, late]
    sent = server.seen("POST", "get_scheduled")[0].json
    assert sent["work_queue_names"] == ["default"]
    assert sent["limit"] == 200
    assert sent["scheduled_before"].endswith("+00:00")
    await client.get_scheduled_flow_runs_for_work_pool("pool")
    assert server.seen("POST", "get_scheduled")[1].json == {"work_queue_names": []}


async def test_a_poll_of_an_unknown_pool_or_queue_says_so(server: PrefectApi, client: Client) -> None:
    server.add_pool("p")
    for pool, queues in (("nope", []), ("p", ["nope"])):
        with pytest.raises(ObjectNotFound, match="nope"):
            await client.get_scheduled_flow_runs_for_work_pool(pool, queues)


# Flow runs


async def test_runs_are_asked_for_by_state_in_portions(server: PrefectApi, client: Client) -> None:
    runs = [server.schedule() for _ in range(3)]
    server.set_state(runs[0], "CANCELLING")
    server.set_state(runs[1], "CANCELLED", "Cancelling")
    strangers = [uuid4() for _ in range(397)]
    found = await client.read_flow_runs_by_state([*strangers, *runs], ["CANCELLING", "CANCELLED"])
    assert [run.id for run in found] == runs[:2]
    assert all(run.state and run.state.is_cancelling() for run in found)
    asked = [request.json["flow_runs"]["id"]["any_"] for request in server.seen("POST", "filter")]
    assert [len(ids) for ids in asked] == [200, 200]
    assert await client.read_flow_runs_by_state([], ["CANCELLING"]) == []
    assert len(server.seen("POST", "filter")) == 2


async def test_a_proposal_is_sent_identically_and_can_be_found_again(server: PrefectApi, client: Client) -> None:
    run, transition_id = server.schedule(), uuid4()
    server.fault("POST", "set_state", commit=True)
    answer = await client.set_flow_run_state(run, new_state("PENDING", transition_id=transition_id))
    assert answer.state is not None
    assert answer.state.type == "PENDING"
    first, second = server.seen("POST", "set_state")
    assert first.body == second.body
    assert first.json["state"]["state_details"] == {
        "transition_id": str(transition_id),
        "flow_run_id": str(run),
    }
    states = await client.read_flow_run_states(run)
    assert [state.type for state in states] == ["SCHEDULED", "PENDING"]
    assert states[-1].state_details["transition_id"] == str(transition_id)


async def test_states_come_oldest_first_whatever_the_server_does(server: PrefectApi, client: Client) -> None:
    body = """[{"type": "B", "timestamp": "2026-01-02T00:00:00Z"},
               {"type": "A", "timestamp": "2026-01-02T00:30:00+01:00"}, {"type": "0"}]"""
    server.fault("GET", body=body)
    assert [state.type for state in await client.read_flow_run_states(uuid4())] == ["0", "A", "B"]


async def test_a_forced_state_is_forced_and_a_deleted_run_is_not_found(server: PrefectApi, client: Client) -> None:
    run = server.schedule()
    server.set_state(run, "COMPLETED")
    assert (await client.set_flow_run_state(run, new_state("CRASHED"))).status == "ABORT"
    assert (await client.set_flow_run_state(run, new_state("CANCELLED"), force=True)).status == "ACCEPT"
    server.delete_run(run)
    with pytest.raises(ObjectNotFound):
        await client.set_flow_run_state(run, new_state("CANCELLED"), force=True)


async def test_nothing_but_the_pid_of_a_run_is_changed(server: PrefectApi, client: Client) -> None:
    run = server.schedule()
    await client.update_flow_run(run, "17")
    assert server.seen("PATCH")[0].json == {"infrastructure_pid": "17"}
    assert (await client.read_flow_run(run)).infrastructure_pid == "17"


async def test_labels_are_merged(server: PrefectApi, client: Client) -> None:
    run = server.schedule()
    await client.update_flow_run_labels(run, {"a": "1"})
    await client.update_flow_run_labels(run, {"b": "2"})
    assert (await client.read_flow_run(run)).labels == {"a": "1", "b": "2"}


@pytest.mark.parametrize("status", [404, 405])
async def test_a_server_without_labels_is_asked_once(old_server: PrefectApi, status: int) -> None:
    old_server.fault("PATCH", "labels", status=status, body='{"detail":"Not Found"}')
    async with speaking(old_server) as client:
        for _ in range(3):
            await client.update_flow_run_labels(uuid4(), {"a": "1"})
    assert len(old_server.seen("PATCH")) == 1


async def test_a_deleted_run_does_not_end_the_labels_of_others(server: PrefectApi, client: Client) -> None:
    server.fault("PATCH", "labels", status=404, body='{"exception_message":"Flow run with id x not found"}')
    await client.update_flow_run_labels(uuid4(), {"a": "1"})
    run = server.schedule()
    await client.update_flow_run_labels(run, {"a": "1"})
    assert server.run(run).labels == {"a": "1"}


async def test_other_trouble_with_labels_is_an_error(server: PrefectApi, client: Client) -> None:
    server.fault("PATCH", "labels", status=500)
    with pytest.raises(Unreachable):
        await client.update_flow_run_labels(server.schedule(), {})


async def test_a_run_without_a_deployment_is_created_once_even_if_the_answer_is_lost(
    server: PrefectApi, client: Client
) -> None:
    server.fault("POST", "/flow_runs", commit=True)
    flow = await client.create_flow("f", ["t"])
    assert await client.create_flow("f") == flow
    run = await client.create_flow_run(flow, name="n", parameters={"x": None}, state=new_state("PENDING"))
    assert (run.name, run.flow_id, run.state and run.state.type) == ("n", flow, "PENDING")
    assert [*server.runs] == [run.id]
    assert server.run(run.id).parameters == {"x": None}
    assert "job_variables" not in server.seen("POST", "/flow_runs")[0].json
    assert (await client.read_flow(flow)).tags == ["t"]


async def test_a_run_of_a_deployment_is_created(server: PrefectApi, client: Client) -> None:
    deployment = server.add_deployment("d", flow="f", tags=["a"])
    assert (await client.read_deployment_by_name("f/d")).id == deployment
    run = await client.create_flow_run_from_deployment(
        deployment, parameters={}, tags=["b"], job_variables={"env": {}}, state=new_state("SCHEDULED")
    )
    assert (run.deployment_id, run.tags, run.job_variables) == (deployment, ["a", "b"], {"env": {}})


# Deployments, blocks, variables


@pytest.mark.parametrize("version", ["2.20.26", "3.8.8"])
async def test_a_deployments_variables_are_found_under_either_name(version: str) -> None:
    async with PrefectApi.running(version) as server, speaking(server) as client:
        id = server.add_deployment(job_variables={"command": "x"})
        assert (await client.read_deployment(id)).job_variables == {"command": "x"}


@pytest.mark.parametrize("variables", [{}, {"job_variables": None}, {"job_variables": {}, "infra_overrides": None}])
def test_a_deployment_may_have_no_variables(variables: dict[str, Any]) -> None:
    assert Deployment.model_validate({"id": uuid4(), **variables}).job_variables == {}


async def test_blocks_come_with_their_secrets(server: PrefectApi, client: Client) -> None:
    id = server.add_block("b", "secret", {"value": "hush"})
    assert (await client.read_block_document_by_name("b", "secret")).data == {"value": "hush"}
    assert (await client.read_block_document(str(id))).data == {"value": "hush"}
    assert (await client.read_block_document(id, include_secrets=False)).data == {"value": "********"}
    with pytest.raises(ObjectNotFound):
        await client.read_block_document_by_name("nope", "secret")


async def test_a_missing_variable_is_none(server: PrefectApi, client: Client) -> None:
    server.add_variable("v", {"a": [1]})
    variable = await client.read_variable_by_name("v")
    assert variable is not None
    assert variable.value == {"a": [1]}
    assert await client.read_variable_by_name("nope") is None


# The server itself, logs and events


async def test_the_version_is_told_unless_the_server_has_no_such_route(server: PrefectApi, client: Client) -> None:
    assert await client.api_version() == "3.8.8"
    server.fault("GET", "version", status=404, body="{}")
    assert await client.api_version() is None


async def test_the_health_check_returns_what_is_wrong_at_once(server: PrefectApi, client: Client) -> None:
    assert await client.api_healthcheck() is None
    fault = server.fault("GET", "/health", status=503, times=9)
    assert isinstance(await client.api_healthcheck(), Unreachable)
    assert fault.count == 1


@pytest.mark.parametrize("status", [403, 404, 405])
async def test_a_server_that_takes_no_events_is_asked_once(server: PrefectApi, status: int) -> None:
    server.fault("POST", "/events", status=status)
    async with speaking(server) as client:
        await client.create_events([{"id": "1"}])
        await client.create_events([{"id": "2"}])
    assert len(server.seen("POST", "/events")) == 1


async def test_events_that_cannot_be_delivered_now_are_an_error(server: PrefectApi, client: Client) -> None:
    server.fault("POST", "/events", status=500)
    with pytest.raises(Unreachable):
        await client.create_events([{"id": "1"}])


# Answers of the wrong shape


@pytest.mark.parametrize(
    "body",
    ["[]", "null", '"x"', "7", '{"id": "no uuid"}', '{"name": "p"}', "", "<html>", '{"id": [[[', "{" * 9999],
)
async def test_an_answer_of_the_wrong_shape_is_unreachable_and_names_the_route(
    server: PrefectApi, client: Client, body: str
) -> None:
    server.fault("GET", body=body, status=200, times=9)
    with pytest.raises(Unreachable, match=r"^GET /work_pools/p: 200, but the body is no use: ") as caught:
        await client.read_work_pool("p")
    assert len(str(caught.value)) < 500


async def test_the_complaint_names_the_field(server: PrefectApi, client: Client) -> None:
    server.fault("POST", body='[{"flow_run": {"id": 5}}]', times=9)
    with pytest.raises(Unreachable, match=r"no use: 0\.flow_run\.id: "):
        await client.get_scheduled_flow_runs_for_work_pool("p")


async def test_a_list_where_an_object_belongs_does_no_harm_to_any_method(server: PrefectApi) -> None:
    arguments: dict[str, Any] = {
        "state": new_state("PENDING"),
        "labels": {},
        "base_job_template": {},
        "names": [],
        "flow_run_ids": [uuid4()],
    }
    async with speaking(server, client_max_retries="0") as client:
        server.fault(body='[{"id": 7}, 7]', status=200, times=999)
        for name, method in inspect.getmembers(client, inspect.iscoroutinefunction):
            if name.startswith(("read_", "get_", "create_", "set_", "api_version")):
                needed = inspect.signature(method).parameters.values()
                given = {
                    p.name: arguments.get(p.name, "x/y")
                    for p in needed
                    if p.default is p.empty and p.kind is not p.VAR_KEYWORD
                }
                if name in ("create_logs", "create_events"):
                    continue
                with pytest.raises(Unreachable):
                    await method(**given)


def test_what_is_unknown_is_kept_and_what_is_null_is_the_default() -> None:
    nulls = dict.fromkeys([*FlowRun.model_fields, "brand_new"])
    run = FlowRun.model_validate({**nulls, "id": str(uuid4()), "state": {"type": "DREAMING", "name": "Odd"}})
    assert run.state is not None
    assert (run.state.is_final(), run.state.is_cancelling()) == (False, False)
    assert (run.tags, run.parameters, run.run_count) == ([], {}, 0)
    assert run.model_extra == {"brand_new": None}
    assert WorkPool(id=uuid4(), status="SLEEPY").status == "SLEEPY"


@pytest.mark.parametrize(
    ("type", "name", "final", "cancelling"),
    [
        ("COMPLETED", None, True, False),
        ("FAILED", None, True, False),
        ("CRASHED", "TimedOut", True, False),
        ("CANCELLED", "Cancelled", True, False),
        ("CANCELLED", "Cancelling", True, True),
        ("CANCELLING", "Cancelling", False, True),
        ("PENDING", "Submitting", False, False),
    ],
)
def test_states_tell_whether_they_are_final(type: str, name: str | None, final: bool, cancelling: bool) -> None:
    state = State(type=type, name=name)
    assert (state.is_final(), state.is_cancelling()) == (final, cancelling)


def test_a_proposal_has_an_identity_of_its_own_even_if_it_copies_details() -> None:
    first = new_state("CANCELLED", message="m", state_details={"transition_id": "old", "lease": "x"})
    second = new_state("CANCELLED")
    details = first.pop("state_details")
    assert first == {"type": "CANCELLED", "name": "Cancelled", "message": "m", "data": None}
    assert details["lease"] == "x"
    assert UUID(details["transition_id"]) != UUID(second["state_details"]["transition_id"])


async def test_options_reach_the_request(server: PrefectApi, client: Client) -> None:
    fault = server.fault(status=503, times=9)
    with anyio.fail_after(5), pytest.raises(Unreachable):
        await client.read_flow_run(uuid4(), retries=0)
    client.http.first_pause = 60
    with anyio.fail_after(5), pytest.raises(Unreachable):
        await client.read_flow_run(uuid4(), deadline=anyio.current_time() + 1)
    assert fault.count == 2
