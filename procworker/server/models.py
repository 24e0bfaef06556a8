"""The shapes that travel between server and worker; what is unknown in them is kept, never an error."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from pydantic import BaseModel, Field, model_validator


class Shape(BaseModel, extra="allow"):
    """What the server sent; a null where a value belongs means the default."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: data[key] for key in data if data[key] is not None or key not in cls.model_fields}
        return data


class Named(Shape):
    """What has an identity and a name."""

    id: UUID
    name: str = ""


class State(Shape):
    """Where a flow run stands."""

    id: UUID = Field(default_factory=uuid4)
    type: str
    name: str | None = None
    message: str | None = None
    timestamp: datetime | None = None
    state_details: dict[str, Any] = {}
    data: Any = None

    def is_final(self) -> bool:
        """Say whether a run ends in this state."""
        return self.type in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")

    def is_cancelling(self) -> bool:
        """Say whether somebody asked for an end that has not come yet."""
        return self.type == "CANCELLING" or (self.type, self.name) == ("CANCELLED", "Cancelling")


class FlowRun(Named):
    """One execution of a flow."""

    flow_id: UUID | None = None
    deployment_id: UUID | None = None
    parent_task_run_id: UUID | None = None
    state: State | None = None
    state_id: UUID | None = None
    state_type: str | None = None
    state_name: str | None = None
    run_count: int = 0
    parameters: dict[str, Any] = {}
    job_variables: dict[str, Any] | None = None
    tags: list[str] = []
    labels: dict[str, Any] = {}
    infrastructure_pid: str | None = None
    work_queue_name: str | None = None
    work_pool_name: str | None = None
    expected_start_time: datetime | None = None
    next_scheduled_start_time: datetime | None = None
    start_time: datetime | None = None
    total_run_time: float = 0


class Flow(Named):
    """A flow as the server knows it."""

    tags: list[str] = []


class Deployment(Named):
    """How and where a flow is to run."""

    flow_id: UUID | None = None
    job_variables: dict[str, Any] = {}
    tags: list[str] = []
    updated: datetime | None = None
    entrypoint: str | None = None
    path: str | None = None
    work_pool_name: str | None = None
    work_queue_name: str | None = None
    parameter_openapi_schema: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _under_their_old_name(cls, data: Any) -> Any:
        # Where a deployment was made over REST, 2.20 has this name only.
        if isinstance(data, dict) and not data.get("job_variables"):
            return {**data, "job_variables": data.get("infra_overrides") or {}}
        return data


DeploymentResponse = Deployment


class WorkPool(Named):
    """Where runs wait for workers, and the template of their jobs."""

    type: str = ""
    base_job_template: dict[str, Any] = {}
    is_paused: bool = False
    concurrency_limit: int | None = None
    status: str | None = None


class WorkQueue(Named):
    """One lane of a work pool."""

    is_paused: bool = False
    concurrency_limit: int | None = None


class Worker(Named):
    """Somebody who polls a work pool."""

    status: str | None = None
    last_heartbeat_time: datetime | None = None


class WorkerFlowRunResponse(Shape):
    """One row of a poll."""

    work_pool_id: UUID | None = None
    work_queue_id: UUID | None = None
    flow_run: FlowRun


class BlockDocument(Named):
    """A saved block and its values."""

    data: dict[str, Any] = {}


class Variable(Shape):
    """A named value: text on 2.20, any JSON later."""

    name: str
    value: Any = None


class Log(Shape):
    """One line of a run's log."""

    id: UUID
    name: str = ""
    level: int = 20
    message: str = ""
    timestamp: datetime


class OrchestrationResult(Shape):
    """What the server made of a proposed state: ACCEPT, REJECT, ABORT or WAIT."""

    state: State | None = None
    status: str
    details: dict[str, Any] = {}


def new_state(
    type: str,
    name: str | None = None,
    message: str | None = None,
    transition_id: UUID | None = None,
    state_details: dict[str, Any] | None = None,
    data: Any = None,
) -> dict[str, Any]:
    """Build a proposal; its transition_id makes it harmless to send it twice."""
    details = {**(state_details or {}), "transition_id": str(transition_id or uuid4())}
    name = name or type.title()
    return {"type": type, "name": name, "message": message, "state_details": details, "data": data}
