"""Run one flow now, follow it, and exit with its outcome.

TARGET is file.py:flow, package.module:flow, flow/deployment or the id of a flow run. Without PREFECT_API_URL an
embedded Prefect server is started, and kept for ten minutes after its last use.

Examples:
  procworker run flows.py:hello -p name=World
  procworker run etl/nightly -p day='"2026-01-01"'
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from procworker.cli.junit import Case
    from procworker.process import ProcessWorker
    from procworker.server.models import FlowRun, WorkPool
    from procworker.settings import Settings
    from procworker.submission import FlowRunFuture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="TARGET", help="file.py:flow, package.module:flow, flow/deployment or a flow run id")
    add(
        "-p",
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter; VALUE is JSON, or else a text; may be repeated",
    )
    add(
        "-jv",
        "--job-variable",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a job variable, such as env.NAME=<< $NAME >>; VALUE as above; may be repeated",
    )
    add("--python", metavar="PATH", help="Python that runs the flow: a path, a venv or tox env directory")
    add(
        "--startup-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="how long to wait for the server (30)",
    )
    add(
        "--keep",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep the embedded server for ten minutes after its last use (default: yes, but not in tox and CI)",
    )
    add("--junit", metavar="FILE", help="write how the run ended to this file, as JUnit's XML")


def execute(arguments: argparse.Namespace) -> int:
    from procworker.cli.common import run_loop, set_up_logging
    from procworker.cli.junit import Case, Suite, reported
    from procworker.settings import Settings

    settings = Settings.load(profile=arguments.profile)
    set_up_logging(settings, "WARNING" if settings.logging_level == "INFO" else None)
    case = Case.of_target(arguments.target)
    with reported(arguments.junit, Suite(case)):
        return run_loop(_run, settings, arguments, case)


async def _run(settings: Settings, arguments: argparse.Namespace, case: Case) -> int:
    """Run the target on a worker of its own, which has no pool, and print how it went."""
    import os
    import time
    from contextlib import AsyncExitStack

    import anyio

    from procworker.cli.common import embedded, say, signals_counted, wait_for_server
    from procworker.cli.errors import FAILED, UNKILLED
    from procworker.cli.receipt import children_cpu_seconds, receipt
    from procworker.process import ProcessWorker
    from procworker.submission import entrypoint_of
    from procworker.system.interpreter import find_interpreter
    from procworker.system.subreaper import subreaper
    from procworker.template import fill_environment

    parameters = parse_pairs(arguments.param, "parameter")
    job_variables = fill_environment(parse_pairs(arguments.job_variable, "job variable"), os.environ)
    kind = kind_of(arguments.target)
    if kind == "entrypoint":
        entrypoint_of(arguments.target)  # a typing error shows before a server is started for it
    if kind == "entrypoint" or arguments.python:
        find_interpreter(arguments.python, os.environ)  # and a Python without Prefect before a flow run is made
    passing = os.environ.get("CI") or os.environ.get("TOX_ENV_DIR")  # nobody comes back soon
    keep = not passing if arguments.keep is None else arguments.keep
    worker: ProcessWorker | None = None
    code = 1

    def interrupt(number: int) -> None:
        if worker is not None and worker.runs:
            worker.cancel_all(None if len(received) < 2 else 0.0)
        else:
            preparing.cancel()  # there is nothing to end yet

    received: list[int] = []
    with anyio.CancelScope() as preparing:
        async with signals_counted(interrupt) as received, AsyncExitStack() as stack:
            await stack.enter_async_context(subreaper())
            if settings.api_url:
                await wait_for_server(settings, arguments.startup_timeout)
            else:
                settings = await stack.enter_async_context(embedded(settings, arguments.python, keep))
            template = await _template(settings, kind, arguments.target)
            options = {"python": arguments.python, "settings": settings, "base_job_template": template}
            worker = ProcessWorker(None, **options, orphans="kill")
            await stack.enter_async_context(worker)
            began, cpu = time.monotonic(), children_cpu_seconds()
            future = await _submit(worker, kind, arguments.target, parameters, job_variables)
            run = worker.runs[future.flow_run_id]
            await future.wait_async()
            seconds = time.monotonic() - began
            say(receipt(run, seconds, children_cpu_seconds() - cpu))
            case.ended(run, seconds)
            code = 0 if run.final_state is not None and run.final_state.type == "COMPLETED" else FAILED
    if worker is not None and worker.unkilled:
        return UNKILLED
    return 128 + received[0] if received else code


def kind_of(target: str) -> str:
    """Tell an entrypoint, a deployment and a flow run id apart; raises ConfigurationError for anything else."""
    from uuid import UUID

    from procworker.errors import ConfigurationError

    try:
        UUID(target)
    except ValueError:
        pass
    else:
        return "flow run"
    if ":" in target:
        return "entrypoint"
    if target.endswith(".py"):
        raise ConfigurationError(f"{target!r} names no flow: write {target}:FLOW")
    if target.count("/") == 1:
        return "deployment"
    raise ConfigurationError(
        f"{target!r} is no file.py:flow, no package.module:flow, no flow/deployment and no flow run id"
    )


def parse_pairs(pairs: list[str], what: str) -> dict[str, Any]:
    """Read KEY=VALUE pairs; what is not JSON is a text."""
    import json

    from procworker.errors import ConfigurationError

    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"{what} {pair!r} must be written KEY=VALUE")
        try:
            found[key] = json.loads(value, parse_constant=str)  # NaN and Infinity are not JSON
        except (ValueError, RecursionError):
            found[key] = value
    return found


def in_current_directory(job_variables: dict[str, Any]) -> dict[str, Any]:
    """A file or module runs where we are, unless it is told otherwise."""
    import os

    return {"working_dir": os.getcwd(), **job_variables}


def template_of(pool: WorkPool) -> dict[str, Any] | None:
    """The job template of a pool, if it is one of processes."""
    return pool.base_job_template if pool.type == "process" else None


async def _template(settings: Settings, kind: str, target: str) -> dict[str, Any] | None:
    """The job template of the pool that the deployment or run belongs to, if that is a pool of processes."""
    from uuid import UUID

    from procworker.errors import ConfigurationError, ObjectNotFound
    from procworker.server.client import Client

    if kind == "entrypoint":
        return None
    async with Client(settings) as client:
        try:
            found = await (
                client.read_deployment_by_name(target) if kind == "deployment" else client.read_flow_run(UUID(target))
            )
        except ObjectNotFound:
            raise ConfigurationError(f"the server has no {kind} {target!r}") from None
        if not found.work_pool_name:
            return None
        pool = await client.read_work_pool(found.work_pool_name)
        return template_of(pool)


async def _submit(
    worker: ProcessWorker, kind: str, target: str, parameters: dict[str, Any], job_variables: dict[str, Any]
) -> FlowRunFuture:
    from uuid import UUID, uuid4

    from procworker.errors import ConfigurationError
    from procworker.server.models import new_state

    if kind == "entrypoint":
        return await worker.submit(target, parameters, in_current_directory(job_variables))
    if kind == "deployment":
        transition_id = uuid4()
        deployment = await worker.client.read_deployment_by_name(target)
        pending = new_state("PENDING", transition_id=transition_id)
        given: Any = {"job_variables": job_variables} if job_variables else {}
        flow_run: FlowRun = await worker.client.create_flow_run_from_deployment(
            deployment.id, parameters=parameters, state=pending, **given
        )
        return await worker.execute(flow_run, transition_id)
    if parameters or job_variables:
        text = "an existing flow run has its parameters and job variables already: leave out"
        raise ConfigurationError(f"{text} {'--param' if parameters else '--job-variable'}")
    existing = await worker.client.read_flow_run(UUID(target))
    if existing.state_type != "SCHEDULED":
        raise ConfigurationError(
            f"flow run {existing.name!r} is {existing.state_name}: only a scheduled one can be run"
        )
    return await worker.execute(existing)
