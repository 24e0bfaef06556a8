"""A small in-memory Prefect server, served over real HTTP.

async with FakeServer.running() as server:
    run_id = server.schedule(parameters={"do": "complete"})
    ...                                          # something talks to server.url
    await server.wait_state(run_id, "COMPLETED")
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar
from uuid import UUID, uuid4

from fake_http import FakeHttp, Reply, Request
from fake_model import TYPES, Model, Row, Run, State, new_state, now, parse_time

T = TypeVar("T")
Answer = tuple[int, Any]
ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
NEW_RUN = (
    "name state parameters context tags empirical_policy idempotency_key parent_task_run_id infrastructure_document_id"
)
DETAILS = "transition_id scheduled_time pause_timeout pause_reschedule deployment_concurrency_lease_id"
NEW_POOL = "description base_job_template is_paused concurrency_limit storage_configuration"


class Refused(Exception):
    """The request gets this status instead of an answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail


def route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Answer this method and path with the decorated function; `{name}` becomes an argument."""
    pattern = re.compile(re.sub(r"{(\w+)}", r"(?P<\1>[^/]+)", path) + "/?")

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, pattern, function))
        return function

    return register


def body(request: Request, allowed: str, required: str = "") -> Row:
    """The JSON object of an action; like Prefect's models it forbids fields it does not know."""
    return checked(request.json, allowed, required)


def checked(given: Any, allowed: str, required: str = "") -> Row:
    """The same for any object inside a body."""
    if not isinstance(given, dict):
        raise Refused(422, "a JSON object is required")
    if extra := given.keys() - set(f"{allowed} {required}".split()):
        raise Refused(422, f"extra fields not permitted: {sorted(extra)}")
    if missing := set(required.split()) - given.keys():
        raise Refused(422, f"field required: {sorted(missing)}")
    return given


def find(table: dict[Any, T], key: Any, what: str) -> T:
    """The row with this key (an id or a name), or 404."""
    try:
        return table[key if key in table else UUID(str(key))]
    except (KeyError, ValueError):
        raise Refused(404, f"{what} {key} not found") from None


def fits(value: Any, rule: Row | None) -> bool:
    """Whether a value passes a filter such as {"any_": [...]}."""
    rule, text = rule or {}, str(value)
    any_, not_any = rule.get("any_"), rule.get("not_any_")
    return (any_ is None or text in map(str, any_)) and (not not_any or text not in map(str, not_any))


class FakeServer(FakeHttp, Model):
    """The server: verbs to arrange and to ask, then the routes that clients use."""

    base = "/api"

    def __init__(
        self,
        version: str = "3.8.8",
        *,
        csrf: bool = False,
        api_key: str | None = None,
        auth_string: str | None = None,
        cloud: bool = False,
    ) -> None:
        FakeHttp.__init__(self)
        Model.__init__(self, version)
        self.csrf, self.cloud = csrf, cloud
        self.api_key, self.auth_string = api_key, auth_string
        self.csrf_tokens: dict[str, str] = {}

    async def wait_state(self, id: UUID, *wanted: str, timeout: float = 20) -> State:
        """Wait until the current state has one of these types or names, and return it."""

        def reached() -> State | None:
            state = self.runs[id].state if id in self.runs else None
            return state if state and {state.type, state.name} & set(wanted) else None

        state = await self.wait_for(reached, timeout, f"flow run {id} in {' or '.join(wanted)}")
        assert state is not None
        return state

    def dump(self) -> str:
        """Every run with its history, then the latest requests."""
        lines = ["flow runs:"]
        for run in self.runs.values():
            history = [f"{s.name} ({s.message})" if s.message else s.name for s in run.states]
            lines.append(f"  {run.id} {run.name}: {', '.join(history)}")
        return "\n".join([*lines, "requests:", super().dump()])

    def answer(self, request: Request) -> Reply:
        try:
            self._admit(request)
            status, result = self._dispatch(request)
        except Refused as refused:
            status, result = refused.status, {"detail": refused.detail}
        text = b"" if status == 204 or result is None else json.dumps(result, default=self._encode).encode()
        return Reply(status, text)

    def _encode(self, value: Any) -> Any:
        if isinstance(value, datetime):
            return value.isoformat() if self.old else value.isoformat().replace("+00:00", "Z")
        return str(value)

    def _admit(self, request: Request) -> None:
        """Refuse for a wrong version header, missing credentials, CSRF token or content type."""
        version = request.headers.get("x-prefect-api-version", "0.8.4")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version) or [*map(int, version.split("."))] < [0, 8, 0]:
            raise Refused(400, f"Unsupported API version {version!r}")
        if request.path in ("/health", "/ready"):
            return
        basic = self.auth_string and "Basic " + base64.b64encode(self.auth_string.encode()).decode()
        expected = basic or (self.api_key and f"Bearer {self.api_key}")
        if expected and request.headers.get("authorization") != expected:
            raise Refused(401, "Unauthorized")
        if self.csrf and request.method != "GET":
            client, token = (request.headers.get(f"prefect-csrf-{name}") for name in ("client", "token"))
            if token is None or client is None:
                raise Refused(403, "Missing CSRF token.")
            if self.csrf_tokens.get(client) != token:
                raise Refused(403, "Invalid CSRF token or client identifier.")
        if request.body and request.headers.get("content-type") != "application/json":
            raise Refused(422, "the body is not application/json")

    def _dispatch(self, request: Request) -> Answer:
        for method, pattern, function in ROUTES:
            if method == request.method and (found := pattern.fullmatch(request.path)):
                return function(self, request, **found.groupdict())
        known = any(pattern.fullmatch(request.path) for _, pattern, _ in ROUTES)
        raise Refused(405 if known else 404, "Method Not Allowed" if known else "Not Found")

    @route("GET", "/health")
    def _health(self, request: Request) -> Answer:
        return 200, True

    @route("GET", "/ready")
    def _ready(self, request: Request) -> Answer:
        return 200, {"message": "OK"}

    @route("GET", "/version")
    def _api_version(self, request: Request) -> Answer:
        return 200, "0.8.4"

    @route("GET", "/admin/version")
    def _admin_version(self, request: Request) -> Answer:
        if self.cloud:
            raise Refused(404, "Not Found")
        return 200, self.version

    @route("GET", "/csrf-token")
    def _csrf_token(self, request: Request) -> Answer:
        if not self.csrf:
            raise Refused(422, "CSRF protection is disabled.")
        client = request.query.get("client", "")
        token = self.csrf_tokens[client] = uuid4().hex
        return 200, {"token": token, "client": client, "expiration": now() + timedelta(hours=1)}

    # Work pools

    @route("POST", "/work_pools")
    def _create_pool(self, request: Request) -> Answer:
        given = body(request, f"type {NEW_POOL}", "name")
        if given["name"].lower().startswith("prefect"):
            raise Refused(403, "Worker pools starting with 'Prefect' are reserved for internal use.")
        if given["name"] in self.pools:
            raise Refused(409, "A work pool with this name already exists.")
        _check_template(given.get("base_job_template") or {})
        return 201, self.add_pool(**{"type": "prefect-agent", **given}).row()

    @route("GET", "/work_pools/{name}")
    def _read_pool(self, request: Request, name: str) -> Answer:
        row = find(self.pools, name, "Work pool").row()
        if self.old:
            del row["storage_configuration"]
        return 200, row

    @route("PATCH", "/work_pools/{name}")
    def _update_pool(self, request: Request, name: str) -> Answer:
        pool = find(self.pools, name, "Work pool")
        given = body(request, NEW_POOL)
        _check_template(given.get("base_job_template") or {})
        vars(pool).update(given)
        return 204, None

    @route("DELETE", "/work_pools/{name}")
    def _delete_pool(self, request: Request, name: str) -> Answer:
        find(self.pools, name, "Work pool")
        self.delete_pool(name)
        return 204, None

    @route("POST", "/work_pools/{name}/workers/heartbeat")
    def _heartbeat(self, request: Request, name: str) -> Answer:
        pool = find(self.pools, name, "Work pool")
        given = body(request, "heartbeat_interval_seconds return_id metadata", "name")
        interval = given.get("heartbeat_interval_seconds")
        if interval is not None and interval != int(interval) and not self.old:
            raise Refused(422, "heartbeat_interval_seconds: Input should be a valid integer")
        worker = self.workers.setdefault((name, given["name"]), {"id": uuid4(), "heartbeats": 0})
        worker.update(heartbeats=worker["heartbeats"] + 1, interval=interval, time=now())
        pool.status = "READY"
        return (200, worker["id"]) if self.cloud and given.get("return_id") else (204, None)

    @route("POST", "/work_pools/{name}/queues/filter")
    def _read_queues(self, request: Request, name: str) -> Answer:
        given = body(request, "work_queues limit offset")
        rule = (given.get("work_queues") or {}).get("name")
        queues = self.queues_of(find(self.pools, name, "Work pool"))
        return 200, [queue.row() for queue in queues if fits(queue.name, rule)]

    @route("POST", "/work_pools/{name}/get_scheduled_flow_runs")
    def _poll(self, request: Request, name: str) -> Answer:
        given = body(request, "work_queue_names scheduled_before scheduled_after limit")
        pool = find(self.pools, name, "Work pool")
        queues = {queue.name: queue for queue in self.queues_of(pool)}
        wanted = [find(queues, queue, "Work queue") for queue in given.get("work_queue_names") or queues]
        before = given.get("scheduled_before") and parse_time(given["scheduled_before"])
        due = self.due(pool, wanted, before)[: _limit(given)]
        return 200, [
            {"work_pool_id": pool.id, "work_queue_id": run.work_queue_id, "flow_run": run.row()} for run in due
        ]

    # Flows and deployments

    @route("POST", "/flows")
    def _create_flow(self, request: Request) -> Answer:
        given = body(request, "tags" if self.old else "tags labels", "name")
        known = any(flow.name == given["name"] for flow in self.flows.values())
        return 200 if known else 201, self.add_flow(given["name"], given.get("tags") or ()).row()

    @route("GET", "/flows/{id}")
    def _read_flow(self, request: Request, id: str) -> Answer:
        return 200, find(self.flows, id, "Flow").row()

    @route("GET", "/deployments/{id}")
    def _read_deployment(self, request: Request, id: str) -> Answer:
        row = find(self.deployments, id, "Deployment").row()
        if self.old:
            row["infra_overrides"] = row.pop("job_variables")
        return 200, row

    @route("GET", "/deployments/name/{flow}/{name}")
    def _read_deployment_by_name(self, request: Request, flow: str, name: str) -> Answer:
        named = {(self.flows[d.flow_id].name, d.name): d for d in self.deployments.values()}
        if (flow, name) not in named:
            raise Refused(404, f"Deployment {flow}/{name} not found")
        return self._read_deployment(request, str(named[flow, name].id))

    @route("POST", "/deployments/{id}/create_flow_run")
    def _create_deployment_run(self, request: Request, id: str) -> Answer:
        deployment = find(self.deployments, id, "Deployment")
        given, state = self._new_run(request, "job_variables enforce_parameter_schema work_queue_name")
        queue = given.pop("work_queue_name", None)
        pool = deployment.work_pool_name
        place = self.queue_in(pool, queue) if pool and queue else None
        return 201, self.create_run(deployment, state or new_state("SCHEDULED"), given, place).row()

    # Flow runs

    @route("POST", "/flow_runs")
    def _create_flow_run(self, request: Request) -> Answer:
        newer = "" if self.old else "job_variables work_pool_name work_queue_name"
        given, state = self._new_run(request, f"deployment_id flow_version {newer}", "flow_id")
        given["flow_id"] = find(self.flows, given["flow_id"], "Flow").id
        pool, queue = given.pop("work_pool_name", None), given.pop("work_queue_name", None)
        place = self.queue_in(find(self.pools, pool, "Work pool").name, queue or "") if pool else None
        return 201, self.create_run(None, state or new_state("PENDING"), given, place).row()

    def _new_run(self, request: Request, optional: str, required: str = "") -> tuple[Row, State | None]:
        given = {**body(request, f"{NEW_RUN} {'' if self.old else 'labels'} {optional}", required)}
        for ignored in ("enforce_parameter_schema", "infrastructure_document_id"):
            given.pop(ignored, None)
        return given, _state(given.pop("state", None))

    @route("GET", "/flow_runs/{id}")
    def _read_run(self, request: Request, id: str) -> Answer:
        return 200, find(self.runs, id, "Flow run").row()

    @route("PATCH", "/flow_runs/{id}")
    def _update_run(self, request: Request, id: str) -> Answer:
        run = find(self.runs, id, "Flow run")
        optional = "name flow_version parameters empirical_policy tags infrastructure_pid job_variables"
        given = body(request, optional)
        if "job_variables" in given and run.state.type != "SCHEDULED":
            raise Refused(400, "job_variables can only be changed while SCHEDULED")
        vars(run).update(given)
        return 204, None

    @route("DELETE", "/flow_runs/{id}")
    def _delete_run(self, request: Request, id: str) -> Answer:
        self.delete_run(find(self.runs, id, "Flow run").id)
        return 204, None

    @route("PATCH", "/flow_runs/{id}/labels")
    def _label_run(self, request: Request, id: str) -> Answer:
        if self.old:
            raise Refused(404, "Not Found")
        find(self.runs, id, "Flow run").labels.update(request.json)
        return 204, None

    @route("POST", "/flow_runs/{id}/set_state")
    def _set_run_state(self, request: Request, id: str) -> Answer:
        run, given = find(self.runs, id, "Flow run"), body(request, "force", "state")
        before, state = len(run.states), _state(given["state"] or {}, "id timestamp" if self.old else "")
        assert state is not None
        verdict = self.propose(run, state, bool(given.get("force")))
        details: Row = {"type": f"{verdict.status.lower()}_details"}
        if verdict.status != "ACCEPT":
            details["reason"] = verdict.reason
        if verdict.status == "WAIT":
            details["delay_seconds"] = verdict.delay
        written = len(run.states) > before
        answer = {"state": vars(run.state), "status": verdict.status, "details": details}
        return 201 if written else 200, answer

    @route("POST", "/flow_runs/filter")
    def _filter_runs(self, request: Request) -> Answer:
        filters = "flows flow_runs task_runs deployments work_pools work_pool_queues"
        given = body(request, f"{filters} sort limit offset")
        found = [run.row() for run in self.runs.values() if _selected(run, given)]
        return 200, found[given.get("offset") or 0 :][: _limit(given)]

    @route("GET", "/flow_run_states")
    def _read_states(self, request: Request) -> Answer:
        asked = request.query.get("flow_run_id")
        return 200, [vars(s) for run in self.runs.values() if str(run.id) == asked for s in run.states]

    # Blocks, variables, logs, events

    @route("GET", "/block_types/slug/{slug}/block_documents/name/{name}")
    def _read_block_by_name(self, request: Request, slug: str, name: str) -> Answer:
        named = {(block["block_type"]["slug"], block["name"]): block for block in self.blocks.values()}
        if (slug, name) not in named:
            raise Refused(404, "Block document not found")
        return self._read_block(request, str(named[slug, name]["id"]))

    @route("GET", "/block_documents/{id}")
    def _read_block(self, request: Request, id: str) -> Answer:
        block = find(self.blocks, id, "Block document")
        shown = request.query.get("include_secrets") == "true"
        return 200, block if shown else {**block, "data": dict.fromkeys(block["data"], "********")}

    @route("GET", "/variables/name/{name}")
    def _read_variable(self, request: Request, name: str) -> Answer:
        return 200, find(self.variables, name, "Variable")

    @route("POST", "/logs")
    def _create_logs(self, request: Request) -> Answer:
        if not isinstance(request.json, list):
            raise Refused(422, "Input should be a valid list")
        allowed = "flow_run_id task_run_id worker_id" if self.cloud else "flow_run_id task_run_id"
        self.logs += [checked(record, allowed, "name level message timestamp") for record in request.json]
        return 201, None

    @route("POST", "/events")
    def _create_events(self, request: Request) -> Answer:
        if self.old:
            raise Refused(404, "Events are not enabled")
        if not isinstance(request.json, list):
            raise Refused(422, "Input should be a valid list")
        optional = "related payload follows received"
        self.events += [checked(event, optional, "occurred event resource id") for event in request.json]
        return 204, None


def _state(given: Any, ignored: str = "") -> State | None:
    """The state in a body; None when there is none."""
    if given is None:
        return None
    given = checked(given, f"name message data state_details {ignored}", "type")
    if given["type"] not in TYPES:
        raise Refused(422, f"unknown state type {given['type']!r}")
    details = {k: v for k, v in (given.get("state_details") or {}).items() if k in DETAILS.split() and v}
    try:
        details |= {k: str(UUID(v)) for k, v in details.items() if k == "transition_id"}
    except ValueError:
        raise Refused(422, "transition_id: Input should be a valid UUID") from None
    state = new_state(given["type"], given.get("name"), given.get("message"), **details)
    state.data = given.get("data")
    return state


def _limit(given: Row) -> int:
    limit = given.get("limit")
    if limit is not None and not 0 <= limit <= 200:
        raise Refused(422, "limit: Input should be less than or equal to 200")
    return 200 if limit is None else limit


def _selected(run: Run, filters: Row) -> bool:
    """Whether a run passes every filter given."""
    mine = filters.get("flow_runs") or {}
    state = mine.get("state") or {}
    facts = [
        (run.id, mine.get("id")),
        (run.name, mine.get("name")),
        (run.state.type, state.get("type")),
        (run.state.name, state.get("name")),
        (run.flow_id, (filters.get("flows") or {}).get("id")),
        (run.deployment_id, (filters.get("deployments") or {}).get("id")),
        (run.work_pool_name, (filters.get("work_pools") or {}).get("name")),
        (run.work_queue_name, (filters.get("work_pool_queues") or {}).get("name")),
    ]
    return all(fits(fact, rule) for fact, rule in facts)


def _check_template(template: Row) -> None:
    """Refuse a base job template that Prefect would refuse."""
    if not template:
        return
    if not (template.get("job_configuration") and template.get("variables")):
        raise Refused(422, "The `base_job_template` must contain both `job_configuration` and `variables`.")
    used = set(re.findall(r"{{\s*([^{}\s]+)\s*}}", json.dumps(template["job_configuration"])))
    if undeclared := used - set(template["variables"].get("properties", {})):
        raise Refused(422, f"undeclared variables in the job configuration: {sorted(undeclared)}")
