"""What a Prefect server remembers: pools, queues, flows, deployments, flow runs and their states."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

FINAL = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}
BUSY = {"PENDING", "RUNNING", "CANCELLING"}
TYPES = {"SCHEDULED", "PAUSED"} | FINAL | BUSY
Row = dict[str, Any]


def now() -> datetime:
    """The time, as the server sees it."""
    return datetime.now(timezone.utc)


def parse_time(text: str) -> datetime:
    """A point in time from any of the spellings clients use."""
    parsed = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)


@dataclass(kw_only=True)
class Item:
    """Whatever has an identity."""

    id: UUID = field(default_factory=uuid4)
    created: datetime = field(default_factory=now)

    def row(self) -> Row:
        """The item as it travels."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "updated": self.created}


@dataclass(kw_only=True)
class Pool(Item):
    name: str
    type: str = "process"
    description: str | None = None
    base_job_template: Row = field(default_factory=dict)
    is_paused: bool = False
    concurrency_limit: int | None = None
    status: str = "NOT_READY"
    default_queue_id: UUID | None = None
    storage_configuration: Row = field(default_factory=dict)


@dataclass(kw_only=True)
class Queue(Item):
    name: str
    work_pool_id: UUID
    work_pool_name: str
    priority: int = 1
    is_paused: bool = False
    concurrency_limit: int | None = None
    description: str | None = None
    status: str = "NOT_READY"


@dataclass(kw_only=True)
class Flow(Item):
    name: str
    tags: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Deployment(Item):
    name: str
    flow_id: UUID
    entrypoint: str | None = None
    path: str | None = None
    parameters: Row = field(default_factory=dict)
    job_variables: Row = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    pull_steps: list[Row] | None = None
    parameter_openapi_schema: Row = field(default_factory=dict)
    enforce_parameter_schema: bool = True
    paused: bool = False
    concurrency_limit: int | None = None
    concurrency_options: Row | None = None
    storage_document_id: UUID | None = None
    work_pool_name: str | None = None
    work_queue_name: str | None = None
    work_queue_id: UUID | None = None
    version: str | None = None


@dataclass(kw_only=True)
class State:
    """One state of one run; immutable once entered."""

    type: str
    name: str
    message: str | None = None
    data: Any = None
    state_details: Row = field(default_factory=dict)
    timestamp: datetime = field(default_factory=now)
    id: UUID = field(default_factory=uuid4)

    @property
    def scheduled_time(self) -> datetime | None:
        text = self.state_details.get("scheduled_time")
        return parse_time(text) if text else None


def new_state(type: str, name: str | None = None, message: str | None = None, **details: Any) -> State:
    """A state that nobody has entered yet."""
    if type == "SCHEDULED":
        details["scheduled_time"] = details.get("scheduled_time") or now().isoformat()
    return State(type=type, name=name or type.title(), message=message, state_details=details)


@dataclass(kw_only=True)
class Run(Item):
    """A flow run and everything it went through."""

    name: str
    flow_id: UUID
    deployment_id: UUID | None = None
    parameters: Row = field(default_factory=dict)
    context: Row = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    labels: Row = field(default_factory=dict)
    job_variables: Row | None = None
    empirical_policy: Row = field(default_factory=dict)
    idempotency_key: str | None = None
    parent_task_run_id: UUID | None = None
    infrastructure_pid: str | None = None
    work_pool_id: UUID | None = None
    work_pool_name: str | None = None
    work_queue_id: UUID | None = None
    work_queue_name: str | None = None
    flow_version: str | None = None
    run_count: int = 0
    expected_start_time: datetime | None = None
    next_scheduled_start_time: datetime | None = None
    start_time: datetime | None = None
    end_time: datetime | None = None
    states: list[State] = field(default_factory=list)

    @property
    def state(self) -> State:
        """The current state."""
        return self.states[-1]

    def enter(self, state: State) -> State:
        """Make this the current state; no rule is asked."""
        state.state_details["flow_run_id"] = str(self.id)
        if self.states:
            state.timestamp = max(now(), self.state.timestamp + timedelta(microseconds=1))
        self.next_scheduled_start_time = state.scheduled_time if state.type == "SCHEDULED" else None
        self.expected_start_time = self.expected_start_time or state.scheduled_time or state.timestamp
        self.end_time = state.timestamp if state.type in FINAL else None
        self.run_count += state.type == "RUNNING"
        if state.type == "RUNNING" or state.type in FINAL:
            self.start_time = self.start_time or state.timestamp
        self.states.append(state)
        return state

    def is_due(self, before: datetime | None) -> bool:
        """Whether a poll that looks this far ahead returns it."""
        due = self.next_scheduled_start_time
        retrying = self.empirical_policy.get("retry_type") == "in_process"
        return due is not None and not retrying and (before is None or due <= before)

    def row(self) -> Row:
        row = super().row()
        del row["states"]
        state = self.states[-1] if self.states else None
        return {
            **row,
            "state": state and vars(state),
            "state_id": state and state.id,
            "state_type": state and state.type,
            "state_name": state and state.name,
            "total_run_time": 0.0,
        }
