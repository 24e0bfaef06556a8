"""From what was read of a flow run to its job: the same steps for a run and for a preview of one."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol
from uuid import UUID

import anyio.to_thread

from procworker.configuration import merge_job_variables, with_extra_variables
from procworker.server.models import Deployment, Flow, FlowRun, WorkPool
from procworker.template import Resolver


class JobHost(Protocol):
    """What of a worker has a say in its jobs."""

    name: str
    backend_id: UUID | None
    job_configuration: Any
    extra_variables: ClassVar[frozenset[str]]
    _base_job_template: dict[str, Any] | None

    @classmethod
    def get_default_base_job_template(cls) -> dict[str, Any]: ...
    def _inherited_environment(self, configuration: Any) -> dict[str, str]: ...


def template_of(host: JobHost, pool: WorkPool | None) -> dict[str, Any]:
    """The job template that counts: the pool's, or what the worker was given in its place, with our own variables."""
    own = host.get_default_base_job_template()
    template = (pool and pool.base_job_template) or host._base_job_template or own
    return with_extra_variables(template, own, host.extra_variables)


async def fill_job(
    host: JobHost, pool: WorkPool | None, flow_run: FlowRun, deployment: Deployment | None, resolver: Resolver | None
) -> Any:
    """Compute the job of a run from template and job variables, and from what they refer to on the server."""
    variables = merge_job_variables(deployment.job_variables if deployment else {}, flow_run.job_variables)
    return await host.job_configuration.from_template_and_values(template_of(host, pool), variables, resolver)


async def prepare_job(
    host: JobHost,
    pool: WorkPool | None,
    configuration: Any,
    flow_run: FlowRun,
    deployment: Deployment | None,
    flow: Flow | None,
) -> None:
    """Add what depends on host, worker and run: nothing is missing afterwards."""
    # In a thread: it may ask an interpreter which Prefect it has.
    configuration._inherited = await anyio.to_thread.run_sync(host._inherited_environment, configuration)
    configuration.prepare(flow_run, deployment, flow, pool, host.name, host.backend_id)
    configuration._inherited = None
