"""What `procworker run` was asked to run: looked up on the server, made into a flow run, and started."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from procworker.cli.run.parameters import check_deployment
from procworker.configuration import merge_job_variables
from procworker.errors import ConfigurationError, ObjectNotFound
from procworker.process import ProcessWorker
from procworker.server.client import Client
from procworker.server.models import Deployment, FlowRun, WorkPool, new_state
from procworker.settings import Settings
from procworker.submission import FlowRunFuture, create_adhoc_run, entrypoint_of


class Order(NamedTuple):
    """What the command line asks for, checked as far as no server is needed for it."""

    target: str
    kind: str
    parameters: dict[str, Any]
    job_variables: dict[str, Any]
    """Those that the server may know."""
    own_variables: dict[str, Any]
    """Those that do not leave this host: what --env gives may be secret."""
    name: str | None


async def template_of(settings: Settings, order: Order) -> dict[str, Any] | None:
    """The job template of the pool that the deployment or run belongs to, if that is a pool of processes.

    Raises ConfigurationError when there is no such thing, or when the deployment cannot take these parameters.
    """
    target = order.target
    if order.kind == "entrypoint":
        return None
    async with Client(settings) as client:
        found: Deployment | FlowRun
        try:
            if order.kind == "deployment":
                found = deployment = await client.read_deployment_by_name(target)
                check_deployment(target, deployment, order.parameters)
            else:
                found = await client.read_flow_run(UUID(target))
        except ObjectNotFound:
            raise ConfigurationError(f"the server has no {order.kind} {target!r}") from None
        if not found.work_pool_name:
            return None
        pool = await client.read_work_pool(found.work_pool_name)
        return pool_template(pool)


def pool_template(pool: WorkPool) -> dict[str, Any] | None:
    """The job template of a pool, if it is one of processes."""
    return pool.base_job_template if pool.type == "process" else None


def in_current_directory(job_variables: dict[str, Any]) -> dict[str, Any]:
    """A file or module runs where we are, unless it is told otherwise."""
    return {"working_dir": os.getcwd(), **job_variables}


async def submit(worker: ProcessWorker, order: Order) -> FlowRunFuture:
    """Make the flow run, unless it exists, and start it."""
    client, transition_id = worker.client, uuid4()
    if order.kind == "entrypoint":
        variables = merge_job_variables(in_current_directory(order.job_variables), order.own_variables)
        entrypoint = entrypoint_of(order.target)
        flow_run = await create_adhoc_run(
            client, order.target, entrypoint, order.parameters, variables, transition_id, None, order.name
        )
        return await worker.execute(flow_run, transition_id)
    if order.kind == "deployment":
        deployment = await client.read_deployment_by_name(order.target)
        pending = new_state("PENDING", transition_id=transition_id)
        given: Any = {"job_variables": order.job_variables} if order.job_variables else {}
        if order.name:
            given["name"] = order.name
        flow_run = await client.create_flow_run_from_deployment(
            deployment.id, parameters=order.parameters, state=pending, **given
        )
        return await worker.execute(_with(flow_run, order), transition_id)
    existing = await client.read_flow_run(UUID(order.target))
    if existing.state_type != "SCHEDULED":
        raise ConfigurationError(
            f"flow run {existing.name!r} is {existing.state_name}: only a scheduled one can be run"
        )
    return await worker.execute(_with(existing, order))


def _with(flow_run: FlowRun, order: Order) -> FlowRun:
    """Lay what stays on this host over what the server knows of the job."""
    variables = merge_job_variables(flow_run.job_variables, order.own_variables)
    return flow_run.model_copy(update={"job_variables": variables})
