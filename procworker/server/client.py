"""One method per endpoint of the Prefect API, named as PrefectClient names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar
from urllib.parse import quote
from uuid import UUID, uuid4

import httpx
from pydantic import TypeAdapter

from procworker.errors import ApiError, ObjectNotFound, Rejected
from procworker.server import models
from procworker.server.http import Http
from procworker.settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

JSON = dict[str, Any]
T = TypeVar("T")

PAGE = 200  # no server returns more rows at once
GONE = "exception_message"  # in a 404 that is about the object and not about the route


class Options(TypedDict, total=False):
    """How long one call may go on: see Http.request."""

    retries: int | None
    deadline: float | None


class NewRun(TypedDict, total=False):
    """What a new flow run may be given."""

    name: str | None
    parameters: Mapping[str, Any] | None
    tags: Sequence[str]
    job_variables: Mapping[str, Any] | None
    work_pool_name: str | None
    state: Mapping[str, Any]


class Client:
    """Speak to the API; an answer of the wrong shape is Unreachable, as any answer that is no use."""

    def __init__(
        self,
        settings: Settings,
        transport: httpx.AsyncBaseTransport | None = None,
        headers: Mapping[str, str] = {},
    ) -> None:
        self.http = Http(settings, transport, headers)
        self._is_cloud = settings.is_cloud
        self._refused: set[str] = set()

    async def __aenter__(self) -> Self:
        await self.http.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.http.__aexit__(*error)

    async def _read(self, shape: type[T], method: str, path: str, **content: Any) -> T:
        """Make a call and insist on the shape of its answer."""
        adapter = _adapter(shape)  # type: ignore[arg-type]
        answer: T = await self.http.request(method, path, parse=adapter.validate_json, **content)
        return answer

    async def _try(self, what: str, refusals: set[int], method: str, path: str, **content: Any) -> None:
        """Make a call that this server may not know; when it does not, never make such a call again."""
        if what in self._refused:
            return
        try:
            await self.http.request(method, path, **content)
        except ApiError as error:
            if error.status_code not in refusals:
                raise
            if GONE not in str(error):
                self._refused.add(what)

    async def read_work_pool(self, work_pool_name: str, **options: Unpack[Options]) -> models.WorkPool:
        return await self._read(models.WorkPool, "GET", _path("work_pools", work_pool_name), **options)

    async def create_work_pool(self, name: str, type: str, base_job_template: JSON | None = None) -> models.WorkPool:
        """Create a pool, or return the one that somebody else has created meanwhile."""
        body = _given(name=name, type=type, base_job_template=base_job_template)
        try:
            return await self._read(models.WorkPool, "POST", "/work_pools/", json=body)
        except Rejected as error:
            if error.status_code != 409:
                raise
            return await self.read_work_pool(name)

    async def update_work_pool(self, work_pool_name: str, base_job_template: JSON) -> None:
        path = _path("work_pools", work_pool_name)
        await self.http.request("PATCH", path, json={"base_job_template": base_job_template})

    async def send_worker_heartbeat(
        self,
        work_pool_name: str,
        worker_name: str,
        heartbeat_interval_seconds: float | None = None,
        get_worker_id: bool = False,
        **options: Unpack[Options],
    ) -> UUID | None:
        """Say that the worker lives; Cloud, if asked, tells the worker's id."""
        path = _path("work_pools", work_pool_name, "workers", "heartbeat")
        seconds = None if heartbeat_interval_seconds is None else int(heartbeat_interval_seconds)
        body: JSON = {"name": worker_name, "heartbeat_interval_seconds": seconds}
        if get_worker_id and self._is_cloud:
            asking = {**body, "return_id": True}
            try:
                worker_id: UUID = await self.http.request("POST", path, json=asking, parse=_uuid, **options)
                return worker_id
            except Rejected as error:
                if error.status_code != 422:
                    raise
        await self.http.request("POST", path, json=body, **options)
        return None

    async def read_work_queues(
        self, work_pool_name: str, names: Iterable[str] | None = None, **options: Unpack[Options]
    ) -> list[models.WorkQueue]:
        path = _path("work_pools", work_pool_name, "queues", "filter")
        body = {"work_queues": None if names is None else {"name": {"any_": list(names)}}}
        return await self._read(list[models.WorkQueue], "POST", path, json=body, **options)

    async def read_workers_for_work_pool(self, work_pool_name: str, **options: Unpack[Options]) -> list[models.Worker]:
        path = _path("work_pools", work_pool_name, "workers", "filter")
        return await self._read(list[models.Worker], "POST", path, json={}, **options)

    async def read_late_flow_runs(self, work_pool_name: str, **options: Unpack[Options]) -> list[models.FlowRun]:
        """List runs of a pool that nobody has taken in time; unlike a poll this leaves no trace on the server."""
        late = {"state": {"name": {"any_": ["Late"]}}}
        body = {"flow_runs": late, "work_pools": {"name": {"any_": [work_pool_name]}}, "limit": PAGE}
        return await self._read(list[models.FlowRun], "POST", "/flow_runs/filter", json=body, **options)

    async def get_scheduled_flow_runs_for_work_pool(
        self,
        work_pool_name: str,
        work_queue_names: Iterable[str] | None = None,
        scheduled_before: datetime | None = None,
        limit: int | None = None,
        **options: Unpack[Options],
    ) -> list[models.WorkerFlowRunResponse]:
        """List due flow runs in the order to run them; ObjectNotFound if the pool or a queue is unknown."""
        path = _path("work_pools", work_pool_name, "get_scheduled_flow_runs")
        body = _given(
            work_queue_names=list(work_queue_names or ()),
            scheduled_before=scheduled_before and scheduled_before.astimezone(timezone.utc).isoformat(),
            limit=limit and min(limit, PAGE),
        )
        return await self._read(list[models.WorkerFlowRunResponse], "POST", path, json=body, **options)

    async def read_flow_run(self, flow_run_id: UUID, **options: Unpack[Options]) -> models.FlowRun:
        return await self._read(models.FlowRun, "GET", _path("flow_runs", flow_run_id), **options)

    async def read_flow_runs_by_state(
        self, flow_run_ids: Iterable[UUID], types: Iterable[str], **options: Unpack[Options]
    ) -> list[models.FlowRun]:
        """List those of the given runs whose state has one of the types."""
        ids, state = [str(id) for id in flow_run_ids], {"type": {"any_": list(types)}}
        found: list[models.FlowRun] = []
        for start in range(0, len(ids), PAGE):
            body = {"flow_runs": {"id": {"any_": ids[start : start + PAGE]}, "state": state}}
            found += await self._read(list[models.FlowRun], "POST", "/flow_runs/filter", json=body, **options)
        return found

    async def read_flow_runs_by_name(self, name: str, limit: int) -> list[models.FlowRun]:
        """List runs of this name, as many as the limit says."""
        body = {"flow_runs": {"name": {"any_": [name]}}, "limit": limit}
        return await self._read(list[models.FlowRun], "POST", "/flow_runs/filter", json=body)

    async def read_logs(
        self,
        flow_run_id: UUID,
        limit: int = PAGE,
        offset: int = 0,
        after: datetime | None = None,
        newest_first: bool = False,
    ) -> list[models.Log]:
        """List lines of a run's log by their time, from a time on; at most PAGE of them."""
        only: JSON = {"flow_run_id": {"any_": [str(flow_run_id)]}}
        if after is not None:
            only["timestamp"] = {"after_": after.astimezone(timezone.utc).isoformat()}
        sort = "TIMESTAMP_DESC" if newest_first else "TIMESTAMP_ASC"
        body = {"logs": only, "sort": sort, "limit": min(limit, PAGE), "offset": offset}
        return await self._read(list[models.Log], "POST", "/logs/filter", json=body)

    async def read_flow_run_states(self, flow_run_id: UUID, **options: Unpack[Options]) -> list[models.State]:
        """List the states that a run went through, oldest first."""
        params = {"flow_run_id": str(flow_run_id)}
        states = await self._read(list[models.State], "GET", "/flow_run_states/", params=params, **options)
        return sorted(states, key=lambda state: state.timestamp.timestamp() if state.timestamp else 0)

    async def set_flow_run_state(
        self, flow_run_id: UUID, state: Mapping[str, Any], force: bool = False, **options: Unpack[Options]
    ) -> models.OrchestrationResult:
        """Propose a state from new_state(); retries send the same bytes, so that it cannot count twice."""
        details = {**state.get("state_details", {}), "flow_run_id": str(flow_run_id)}
        body = {"state": {**state, "state_details": details}, "force": force}
        path = _path("flow_runs", flow_run_id, "set_state")
        return await self._read(models.OrchestrationResult, "POST", path, json=body, **options)

    async def update_flow_run(self, flow_run_id: UUID, infrastructure_pid: str, **options: Unpack[Options]) -> None:
        body = {"infrastructure_pid": infrastructure_pid}
        await self.http.request("PATCH", _path("flow_runs", flow_run_id), json=body, **options)

    async def update_flow_run_labels(
        self, flow_run_id: UUID, labels: Mapping[str, Any], **options: Unpack[Options]
    ) -> None:
        """Add labels to a run; servers before 3.1.7 have none, which is found out once."""
        path = _path("flow_runs", flow_run_id, "labels")
        await self._try("labels", {404, 405}, "PATCH", path, json=dict(labels), **options)

    async def create_flow_run(self, flow_id: UUID, **run: Unpack[NewRun]) -> models.FlowRun:
        """Create a run of no deployment; 2.20 knows neither its job_variables nor its work_pool_name."""
        body = _given(flow_id=str(flow_id), idempotency_key=str(uuid4()), **run)
        return await self._read(models.FlowRun, "POST", "/flow_runs/", json=body)

    async def create_flow_run_from_deployment(self, deployment_id: UUID, **run: Unpack[NewRun]) -> models.FlowRun:
        path = _path("deployments", deployment_id, "create_flow_run")
        body = _given(idempotency_key=str(uuid4()), **run)
        return await self._read(models.FlowRun, "POST", path, json=body)

    async def count_task_runs(
        self, flow_run_id: UUID, types: Iterable[str] | None = None, **options: Unpack[Options]
    ) -> int:
        """Count the task runs of a run, or those whose state has one of the types."""
        body: JSON = {"flow_runs": {"id": {"any_": [str(flow_run_id)]}}}
        if types is not None:
            body["task_runs"] = {"state": {"type": {"any_": list(types)}}}
        return await self._read(int, "POST", "/task_runs/count", json=body, **options)

    async def create_flow(self, name: str, tags: Sequence[str] = ()) -> UUID:
        """Register a flow, unless the server knows it, and return its id."""
        return (await self._read(models.Flow, "POST", "/flows/", json={"name": name, "tags": list(tags)})).id

    async def read_flow(self, flow_id: UUID, **options: Unpack[Options]) -> models.Flow:
        return await self._read(models.Flow, "GET", _path("flows", flow_id), **options)

    async def read_deployment(self, deployment_id: UUID, **options: Unpack[Options]) -> models.Deployment:
        return await self._read(models.Deployment, "GET", _path("deployments", deployment_id), **options)

    async def read_deployment_by_name(self, name: str) -> models.Deployment:
        """Read the deployment called "flow/deployment"."""
        flow, _, deployment = name.partition("/")
        return await self._read(models.Deployment, "GET", _path("deployments", "name", flow, deployment))

    async def read_block_document_by_name(
        self, name: str, block_type_slug: str, include_secrets: bool = True
    ) -> models.BlockDocument:
        path = _path("block_types", "slug", block_type_slug, "block_documents", "name", name)
        params = {"include_secrets": str(include_secrets).lower()}
        return await self._read(models.BlockDocument, "GET", path, params=params)

    async def read_block_document(self, id: UUID | str, include_secrets: bool = True) -> models.BlockDocument:
        params = {"include_secrets": str(include_secrets).lower()}
        return await self._read(models.BlockDocument, "GET", _path("block_documents", id), params=params)

    async def read_variable_by_name(self, name: str) -> models.Variable | None:
        try:
            return await self._read(models.Variable, "GET", _path("variables", "name", name))
        except ObjectNotFound:
            return None

    async def api_version(self) -> str | None:
        """Tell the server's Prefect version; None if it keeps that to itself, as Cloud does."""
        try:
            return await self._read(str, "GET", "/admin/version")
        except Rejected:
            return None

    async def api_healthcheck(self) -> Exception | None:
        """Ask once whether the server is up, and return what went wrong."""
        try:
            await self.http.request("GET", "/health", retries=0)
        except ApiError as error:
            return error
        return None

    async def create_logs(self, records: Sequence[JSON], **options: Unpack[Options]) -> None:
        await self.http.request("POST", "/logs/", json=records, **options)

    async def create_events(self, events: Sequence[JSON], **options: Unpack[Options]) -> None:
        """Send events; a server that takes none over HTTP (2.20) is found out once."""
        await self._try("events", {403, 404, 405}, "POST", "/events", json=events, **options)


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _path(*parts: object) -> str:
    return "".join("/" + quote(str(part), safe="") for part in parts)


def _given(**fields: Any) -> JSON:
    return {name: value for name, value in fields.items() if value is not None}


def _uuid(body: bytes) -> UUID:
    return UUID(body.decode().strip(' \n"'))
