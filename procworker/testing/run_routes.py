"""Flow runs, their states, logs, artifacts and events, as clients read and write them."""

from __future__ import annotations

from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

from procworker.testing.messages import Request
from procworker.testing.model import Model
from procworker.testing.routing import Answer, Refused, body, checked, find, fits, limit_of, route
from procworker.testing.rows import TYPES, Row, Run, State, new_state, now, parse_time

NEW_RUN = (
    "name state parameters context tags empirical_policy idempotency_key parent_task_run_id infrastructure_document_id"
)
DETAILS = "transition_id scheduled_time pause_timeout pause_reschedule deployment_concurrency_lease_id"


class RunRoutes(Model):
    """What runs, and what it says."""

    # Flow runs

    @route("POST", "/flow_runs")
    def _create_flow_run(self, request: Request) -> Answer:
        newer = "" if self.old else "job_variables work_pool_name work_queue_name"
        given, state = self._new_run(request, f"deployment_id flow_version {newer}", "flow_id")
        given["flow_id"] = find(self.flows, given["flow_id"], "Flow").id
        pool, queue = given.pop("work_pool_name", None), given.pop("work_queue_name", None)
        place = self.queue_in(find(self.pools, pool, "Work pool").name, queue or "") if pool else None
        return 201, self.create_run(None, state or new_state("PENDING"), given, place).row()

    @route("POST", "/deployments/{id}/create_flow_run")
    def _create_deployment_run(self, request: Request, id: str) -> Answer:
        deployment = find(self.deployments, id, "Deployment")
        given, state = self._new_run(request, "job_variables enforce_parameter_schema work_queue_name")
        queue = given.pop("work_queue_name", None)
        pool = deployment.work_pool_name
        place = self.queue_in(pool, queue) if pool and queue else None
        return 201, self.create_run(deployment, state or new_state("SCHEDULED"), given, place).row()

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
        return 200, found[given.get("offset") or 0 :][: limit_of(given)]

    @route("GET", "/flow_run_states")
    def _read_states(self, request: Request) -> Answer:
        asked = request.query.get("flow_run_id")
        return 200, [vars(s) for run in self.runs.values() if str(run.id) == asked for s in run.states]

    # Logs, artifacts and events

    @route("POST", "/logs")
    def _create_logs(self, request: Request) -> Answer:
        if not isinstance(request.json, list):
            raise Refused(422, "Input should be a valid list")
        allowed = "flow_run_id task_run_id worker_id" if self.cloud else "flow_run_id task_run_id"
        self.logs += [checked(record, allowed, "name level message timestamp") for record in request.json]
        return 201, None

    @route("POST", "/logs/filter")
    def _filter_logs(self, request: Request) -> Answer:
        given = body(request, "logs sort limit offset")
        only = checked(given.get("logs") or {}, "flow_run_id task_run_id timestamp level")
        period = checked(only.get("timestamp") or {}, "after_ before_")
        rows = [{"id": uuid5(NAMESPACE_OID, str(place)), **row} for place, row in enumerate(self.logs)]
        rows = [row for row in rows if fits(row.get("flow_run_id"), only.get("flow_run_id"))]
        if after := period.get("after_"):
            rows = [row for row in rows if parse_time(row["timestamp"]) >= parse_time(after)]
        rows.sort(key=lambda row: parse_time(row["timestamp"]), reverse=given.get("sort") == "TIMESTAMP_DESC")
        return 200, rows[given.get("offset") or 0 :][: limit_of(given)]

    @route("POST", "/artifacts")
    def _create_artifact(self, request: Request) -> Answer:
        artifact: Row = {"id": uuid4(), "created": now(), **request.json}
        self.artifacts.append(artifact)
        return 201, {**artifact, "updated": artifact["created"]}

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


def _selected(run: Run, filters: Row) -> bool:
    """Whether a run passes every filter given."""
    mine = filters.get("flow_runs") or {}
    state = mine.get("state") or {}
    facts = [
        (run.id, mine.get("id")),
        (run.name, mine.get("name")),
        (run.state.type, state.get("type")),
        (run.state.name, state.get("name")),
        (run.parent_task_run_id, mine.get("parent_task_run_id")),
        (run.flow_id, (filters.get("flows") or {}).get("id")),
        (run.deployment_id, (filters.get("deployments") or {}).get("id")),
        (run.work_pool_name, (filters.get("work_pools") or {}).get("name")),
        (run.work_queue_name, (filters.get("work_pool_queues") or {}).get("name")),
    ]
    return all(fits(fact, rule) for fact, rule in facts)
