"""Task runs: those of 2.x engines and those that stand for subflows; the others of 3.x come as events only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from procworker.testing.messages import Request
from procworker.testing.model import Model
from procworker.testing.routing import Answer, body, find, fits, route
from procworker.testing.rows import Item, Row, State, new_state


@dataclass(kw_only=True)
class TaskRun(Item):
    """A task run and everything it went through."""

    name: str
    task_key: str
    dynamic_key: str
    flow_run_id: UUID | None
    given: Row = field(default_factory=dict)
    run_count: int = 0
    states: list[State] = field(default_factory=list)

    @property
    def state(self) -> State:
        """The current state."""
        return self.states[-1]

    def enter(self, state: State) -> None:
        state.state_details |= {"task_run_id": str(self.id), "flow_run_id": self.flow_run_id and str(self.flow_run_id)}
        self.run_count += state.type == "RUNNING"
        self.states.append(state)

    def row(self) -> Row:
        row = {**self.given, **super().row(), "state": vars(self.state), "state_id": self.state.id}
        del row["states"], row["given"]
        return {**row, "state_type": self.state.type, "state_name": self.state.name}


class TaskRoutes(Model):
    """What engines tell of their tasks; every state is accepted, but a failure with retries left."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.task_runs: dict[UUID, TaskRun] = {}

    @route("POST", "/task_runs")
    def _create_task_run(self, request: Request) -> Answer:
        given = dict(request.json)
        parent = given.get("flow_run_id") and UUID(given["flow_run_id"])
        identity = (parent, given["task_key"], given["dynamic_key"])
        known = (t for t in self.task_runs.values() if (t.flow_run_id, t.task_key, t.dynamic_key) == identity)
        if (task := next(known, None)) is not None:
            return 200, task.row()
        state = _state_of(given.pop("state", None) or {"type": "PENDING"})
        task = TaskRun(
            name=given.get("name") or f"{given['task_key']}-{given['dynamic_key']}",
            task_key=given["task_key"],
            dynamic_key=given["dynamic_key"],
            flow_run_id=parent,
            given={name: value for name, value in given.items() if value is not None},
        )
        if given.get("id"):
            task.id = UUID(given["id"])
        task.enter(state)
        self.task_runs[task.id] = task
        self.changed()
        return 201, task.row()

    @route("POST", "/task_runs/count")
    def _count_task_runs(self, request: Request) -> Answer:
        given = body(request, "flows flow_runs task_runs deployments")
        runs = (given.get("flow_runs") or {}).get("id")
        types = ((given.get("task_runs") or {}).get("state") or {}).get("type")
        found = (t for t in self.task_runs.values() if fits(str(t.flow_run_id), runs) and fits(t.state.type, types))
        return 200, sum(1 for _ in found)

    @route("GET", "/task_runs/{id}")
    def _read_task_run(self, request: Request, id: str) -> Answer:
        return 200, find(self.task_runs, id, "Task run").row()

    @route("POST", "/task_runs/{id}/set_state")
    def _set_task_state(self, request: Request, id: str) -> Answer:
        task, state = find(self.task_runs, id, "Task run"), _state_of(request.json["state"])
        retries = (task.given.get("empirical_policy") or {}).get("retries") or 0
        status = "ACCEPT"
        if state.type == "FAILED" and task.run_count <= retries:
            status, state = "REJECT", new_state("SCHEDULED", "AwaitingRetry", state.message)
        task.enter(state)
        self.changed()
        return 201, {"state": vars(state), "status": status, "details": {"type": f"{status.lower()}_details"}}


def _state_of(given: Row) -> State:
    details = {name: value for name, value in (given.get("state_details") or {}).items() if value is not None}
    state = new_state(given["type"], given.get("name"), given.get("message"), **details)
    state.data = given.get("data")
    return state
