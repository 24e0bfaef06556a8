"""The fake server judges as the real ones do."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import httpx
import pytest
from harness import Prefect

from procworker.testing.api import PrefectApi
from procworker.testing.rows import TYPES

pytestmark = pytest.mark.real

SAME_ID = {"state_details": {"transition_id": "6f4b1f0c-3f52-4d0e-9d0b-0d7f0f0c2c11"}}
CHANGES = [
    *(({"type": old}, {"type": new}) for old in sorted(TYPES) for new in sorted(TYPES)),
    ({"type": "PENDING", **SAME_ID}, {"type": "RUNNING", **SAME_ID}),
    ({"type": "PENDING"}, {"type": "PENDING", "name": "Submitting"}),
    ({"type": "PENDING", "name": "Submitting"}, {"type": "PENDING"}),
    ({"type": "CANCELLED", "name": "Cancelling"}, {"type": "CRASHED"}),
    ({"type": "RUNNING"}, {"type": "CRASHED", "name": "TimedOut"}),
    ({"type": "SCHEDULED", "state_details": {"scheduled_time": "2999-01-01T00:00:00Z"}}, {"type": "RUNNING"}),
]
RETRIES = {"retries": 1, "retry_delay": 0}


class Patient(httpx.AsyncHTTPTransport):
    """Asks again while SQLite is busy; nothing was written then."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        while (answer := await super().handle_async_request(request)).status_code == 503:
            await answer.aclose()
        return answer


async def judgements(url: str, auth: httpx.BasicAuth | None) -> dict[str, Any]:
    """What a server makes of every change, with and without infrastructure and retries, and of odd requests."""
    found: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, auth=auth, timeout=60, transport=Patient()) as api:
        pool = f"pool-{uuid4().hex[:8]}"
        created = await api.post("/work_pools/", json={"name": pool, "type": "process"})
        again = await api.post("/work_pools/", json={"name": pool, "type": "process"})
        reserved = await api.post("/work_pools/", json={"name": "Prefect-x", "type": "process"})
        found["pool"] = created.status_code, again.status_code, reserved.status_code
        flow = (await api.post("/flows/", json={"name": "flow"})).json()["id"]

        async def run(**more: Any) -> str:
            body = {"flow_id": flow, "state": {"type": "PENDING"}, **more}
            answer = await api.post("/flow_runs/", json=body)
            assert answer.is_success, answer.text
            return str(answer.json()["id"])

        async def propose(id: str, state: dict[str, Any], force: bool = False) -> httpx.Response:
            return await api.post(f"/flow_runs/{id}/set_state", json={"state": state, "force": force})

        for old, new in CHANGES:
            for pid in (None, "1") if old["type"] == "SCHEDULED" else (None,):
                id = await run()
                await api.patch(f"/flow_runs/{id}", json={"infrastructure_pid": pid})
                await propose(id, old, force=True)
                answer = await propose(id, new)
                said, now = answer.json(), (await api.get(f"/flow_runs/{id}")).json()
                state = said["state"] and (said["state"]["type"], said["state"]["name"])
                count = len((await api.get("/flow_run_states/", params={"flow_run_id": id})).json())
                found[f"{pid} {old} {new}"] = (
                    *(answer.status_code, said["status"], said["details"]["type"], state, count),
                    *(now["state_name"], now["run_count"]),
                )
                found[f"times: {pid} {old} {new}"] = now["start_time"] is None, now["end_time"] is None
        retried = await run(empirical_policy=RETRIES)
        for type in ("RUNNING", "FAILED", "RUNNING", "FAILED"):
            said = (await propose(retried, {"type": type})).json()
            found[f"retry {len(found)}"] = said["status"], said["state"]["name"]
        for name, method, path, body in odd_requests(pool, await run(), flow):
            answer = await api.request(method, path, json=body)
            found[name] = answer.status_code
    return found


def odd_requests(pool: str, run: str, flow: str) -> list[tuple[str, str, str, Any]]:
    """What a worker may get wrong, and the optional calls."""
    log = {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run}
    event = {"occurred": "2026-01-01T00:00:00Z", "event": "e", "id": str(uuid4())}
    event |= {"resource": {"prefect.resource.id": "r"}, "related": [], "payload": {}}
    half, undeclared = {"job_configuration": {"a": "{{ b }}"}}, {"variables": {"properties": {"c": {}}}}
    poll, beat = f"/work_pools/{pool}/get_scheduled_flow_runs", f"/work_pools/{pool}/workers/heartbeat"
    propose, odd = f"/flow_runs/{run}/set_state", {"x": 1}
    queues = {"work_queues": None, "limit": None, "offset": None}
    return [
        ("log", "POST", "/logs/", [log]),
        ("log of a worker", "POST", "/logs/", [{**log, "worker_id": str(uuid4())}]),
        ("events", "POST", "/events", [event]),
        ("labels", "PATCH", f"/flow_runs/{run}/labels", {"a": "b"}),
        ("late job variables", "PATCH", f"/flow_runs/{run}", {"job_variables": {}}),
        ("extra field in patch", "PATCH", f"/flow_runs/{run}", {"state": {}}),
        ("id in state", "POST", propose, {"state": {"type": "RUNNING", "id": run}}),
        ("odd type", "POST", propose, {"state": {"type": "LOST"}}),
        ("odd details", "POST", propose, {"state": {"type": "RUNNING", "state_details": odd}}),
        ("unknown run", "POST", f"/flow_runs/{uuid4()}/set_state", {"state": {"type": "RUNNING"}}),
        ("read unknown run", "GET", f"/flow_runs/{uuid4()}", None),
        ("patch unknown run", "PATCH", f"/flow_runs/{uuid4()}", {"infrastructure_pid": "1"}),
        ("states of an unknown run", "GET", f"/flow_run_states/?flow_run_id={uuid4()}", None),
        ("unknown deployment", "GET", f"/deployments/{uuid4()}", None),
        ("unknown deployment name", "GET", "/deployments/name/a/b", None),
        ("unknown flow", "GET", f"/flows/{uuid4()}", None),
        ("labels of a flow", "POST", "/flows/", {"name": "other", "labels": {}}),
        ("flow without name", "POST", "/flows/", {}),
        ("run without flow", "POST", "/flow_runs/", {}),
        ("run in a pool", "POST", "/flow_runs/", {"flow_id": flow, "work_pool_name": pool}),
        ("run with job variables", "POST", "/flow_runs/", {"flow_id": flow, "job_variables": {}}),
        ("poll", "POST", poll, {"work_queue_names": [], "scheduled_before": "2030-01-01 00:00:00+00:00"}),
        ("poll of an unknown queue", "POST", poll, {"work_queue_names": ["x"]}),
        ("poll of too many", "POST", poll, {"limit": 201}),
        ("poll of an unknown pool", "POST", poll.replace(pool, "x"), {}),
        ("beat", "POST", beat, {"name": "w", "heartbeat_interval_seconds": 30.0}),
        ("fractional beat", "POST", beat, {"name": "w", "heartbeat_interval_seconds": 30.5}),
        ("beat with return_id", "POST", beat, {"name": "w", "return_id": True}),
        ("nameless beat", "POST", beat, {}),
        ("beat in an unknown pool", "POST", beat.replace(pool, "x"), {"name": "w"}),
        ("half a template", "PATCH", f"/work_pools/{pool}", {"base_job_template": half}),
        ("undeclared", "PATCH", f"/work_pools/{pool}", {"base_job_template": half | undeclared}),
        ("extra field of a pool", "PATCH", f"/work_pools/{pool}", {"x": 1}),
        ("too many runs", "POST", "/flow_runs/filter", {"limit": 201}),
        ("queues", "POST", f"/work_pools/{pool}/queues/filter", queues),
        ("unknown variable", "GET", "/variables/name/none", None),
        ("unknown block", "GET", "/block_types/slug/none/block_documents/name/none", None),
        ("csrf", "GET", "/csrf-token?client=x", None),
        ("no such route", "GET", "/none", None),
        ("no such method", "PUT", "/flow_runs/filter", {}),
    ]


async def agree(prefect: Prefect, version: str, leave_out: str = "\0") -> None:
    """Compare all that does not start with `leave_out`."""
    secret = prefect.api.auth_string
    async with PrefectApi.running(version) as fake:
        ours = await judgements(fake.url, None)
    theirs = await judgements(prefect.api.url, httpx.BasicAuth(*secret.split(":", 1)) if secret else None)
    wrong = {name for name in ours if ours[name] != theirs[name] and not name.startswith(leave_out)}
    assert not wrong, "\n".join(f"{name}: {ours[name]}, not {theirs[name]}" for name in sorted(wrong))


async def test_the_fake_server_judges_as_prefect_3_8(prefect38: Prefect) -> None:
    await agree(prefect38, "3.8.8")


async def test_the_fake_server_judges_as_prefect_2_20(prefect220: Prefect) -> None:
    # A run that never ran has no times there.
    await agree(prefect220, "2.20.26", leave_out="times")
