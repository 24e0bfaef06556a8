"""Show the exact job that a target would be run as, and where each value comes from.

Nothing runs, and nothing is created on the server. Secrets are masked. The job is the one of `procworker run`; with
--pool it is the one of a worker of that pool.

Examples:
  procworker preview flows.py:hello -jv timeout_seconds=60
  procworker preview etl/nightly
  procworker preview etl/nightly --pool laptop --all
  procworker preview 0c2f6e0a-6c55-4b5b-b4e5-1f7a3c0d8a11 --json
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from procworker.cli.preview.job_view import Value, View
    from procworker.process import ProcessWorker
    from procworker.server.client import Client
    from procworker.server.models import Deployment, Flow, FlowRun
    from procworker.settings import Settings

REQUEST_SECONDS = 10.0
BY_ITSELF = (("working_dir",), ("env", "PREFECT__FLOW_ENTRYPOINT"))
"""What the command itself adds to the job variables of a file or module."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="TARGET", help="file.py:flow, package.module:flow, flow/deployment or a flow run id")
    add(
        "-p",
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter, as of `procworker run`; may be repeated",
    )
    add(
        "-jv",
        "--job-variable",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a job variable, as of `procworker run`; may be repeated",
    )
    add("--pool", metavar="NAME", help="show the job as a worker of this work pool would start it")
    add("--python", metavar="PATH", help="Python that runs the flow: a path, a venv or tox env directory")
    add("--all", action="store_true", help="show the variables that are inherited unchanged, too")
    add("--json", action="store_true", help="print JSON, for a machine to read")


def execute(arguments: argparse.Namespace) -> int:
    import json

    from procworker.cli.common import run_loop, say
    from procworker.cli.layout import warnings_heard
    from procworker.settings import Settings

    with warnings_heard() as heard:
        view = run_loop(_look, Settings.load(profile=arguments.profile), arguments)
    view.notes += [text for text in heard if text not in view.notes]
    say(json.dumps(view.row(arguments.all), indent=2, default=str) if arguments.json else _text(view, arguments.all))
    return 0


async def _look(settings: Settings, arguments: argparse.Namespace) -> View:
    """Read what a run would read, compute what it would compute, and stop there."""
    import os
    from contextlib import AsyncExitStack

    from procworker.cli.run import kind_of, parse_pairs
    from procworker.errors import ConfigurationError
    from procworker.process import ProcessWorker
    from procworker.server.client import Client
    from procworker.template import fill_environment

    parameters = parse_pairs(arguments.param, "parameter")
    variables = fill_environment(parse_pairs(arguments.job_variable, "job variable"), os.environ)
    kind = kind_of(arguments.target)
    if not settings.api_url and (kind != "entrypoint" or arguments.pool):
        what = f"work pool {arguments.pool!r}" if kind == "entrypoint" else f"{kind} {arguments.target!r}"
        raise ConfigurationError(f"PREFECT_API_URL is not set: only a server knows the {what}")
    async with AsyncExitStack() as stack:
        client: Client | None = None
        if settings.api_url:
            seconds = min(settings.api_request_timeout, REQUEST_SECONDS)
            patience = {"api_request_timeout": seconds, "client_max_retries": min(settings.client_max_retries, 1)}
            client = await stack.enter_async_context(Client(settings.model_copy(update=patience)))
        else:
            settings = _at_embedded_server(settings, arguments.python)
        worker = ProcessWorker(None, name="<new>", python=arguments.python, settings=settings)
        read = await _read(client, kind, arguments.target, parameters, variables)
        if parameters:  # without any, the job alone is asked for
            _check(arguments, kind, parameters, read[1])
        await _choose_template(worker, client, arguments.pool, *read[:2])
        return await _view(worker, client, arguments, variables, *read)


def _check(arguments: argparse.Namespace, kind: str, parameters: dict[str, Any], deployment: Deployment | None) -> None:
    """Refuse what `run` would refuse; raises ConfigurationError."""
    import os

    from procworker.cli.run.parameters import check_deployment, check_entrypoint
    from procworker.system.interpreter import find_interpreter

    if kind == "entrypoint":
        version = find_interpreter(arguments.python, os.environ).prefect_version
        check_entrypoint(arguments.target, parameters, os.environ.get("PYTHONPATH", ""), version)
    elif kind == "deployment" and deployment is not None:
        check_deployment(arguments.target, deployment, parameters)


def _at_embedded_server(settings: Settings, python: str | None) -> Settings:
    """What a run would get from the embedded server, which is not started for a preview."""
    import os

    from procworker.cli.preview.job_view import EMBEDDED
    from procworker.local.server import knows_passwords
    from procworker.system.interpreter import find_interpreter

    version = find_interpreter(python, os.environ).prefect_version
    return settings.at_server("http://127.0.0.1/api", "a:new-one" if knows_passwords(version) else None, EMBEDDED)


async def _read(
    client: Client | None, kind: str, target: str, parameters: dict[str, Any], variables: dict[str, Any]
) -> tuple[FlowRun, Deployment | None, Flow | None]:
    """The flow run that there is or would be, and what it belongs to."""
    from uuid import UUID

    from procworker.cli.preview.job_view import NEW, NEW_ID
    from procworker.cli.run.order import in_current_directory
    from procworker.errors import ConfigurationError, ObjectNotFound
    from procworker.server.models import Flow, FlowRun
    from procworker.submission import adhoc_variables, entrypoint_of, flow_name

    new = UUID(NEW_ID)
    if kind == "entrypoint":
        entrypoint = entrypoint_of(target)
        given = adhoc_variables(target, entrypoint, in_current_directory(variables))
        flow_run = FlowRun(id=new, name=NEW, flow_id=new, parameters=parameters, job_variables=given)
        return flow_run, None, Flow(id=new, name=flow_name(target, entrypoint))
    assert client is not None
    try:
        if kind == "deployment":
            deployment: Deployment | None = await client.read_deployment_by_name(target)
            assert deployment is not None
            flow_run = FlowRun(
                id=new,
                name=NEW,
                flow_id=deployment.flow_id,
                deployment_id=deployment.id,
                work_pool_name=deployment.work_pool_name,
                work_queue_name=deployment.work_queue_name,
                parameters={**(getattr(deployment, "parameters", None) or {}), **parameters},
                job_variables=variables or None,
            )
        else:
            if parameters or variables:
                text = "an existing flow run has its parameters and job variables already: leave out"
                raise ConfigurationError(f"{text} {'--param' if parameters else '--job-variable'}")
            flow_run = await client.read_flow_run(UUID(target))
            deployment = await client.read_deployment(flow_run.deployment_id) if flow_run.deployment_id else None
    except ObjectNotFound as error:
        if "deployments/" in str(error) and kind == "flow run":
            raise ConfigurationError(f"the deployment of flow run {target} is gone: it would be cancelled") from None
        raise ConfigurationError(f"the server has no {kind} {target!r}") from None
    return flow_run, deployment, await client.read_flow(flow_run.flow_id) if flow_run.flow_id else None


async def _choose_template(
    worker: ProcessWorker, client: Client | None, asked: str | None, flow_run: FlowRun, deployment: Deployment | None
) -> None:
    """Give the worker the pool that is asked for, or the template of the one that the run belongs to."""
    import logging

    from procworker.cli.run.order import pool_template
    from procworker.errors import ConfigurationError, ObjectNotFound
    from procworker.pool import check_type

    name = asked or flow_run.work_pool_name
    if client is None or not name:
        return
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        raise ConfigurationError(f"the server has no work pool {name!r}") from None
    if asked:
        check_type(pool, None, worker.type, logging.getLogger(__name__))
        worker._work_pool_name, worker._work_pool = name, pool
    else:
        worker._base_job_template = pool_template(pool)


async def _view(
    worker: ProcessWorker,
    client: Client | None,
    arguments: argparse.Namespace,
    variables: dict[str, Any],
    flow_run: FlowRun,
    deployment: Deployment | None,
    flow: Flow | None,
) -> View:
    """Compute the job as a run does, and trace it."""
    import os

    from pydantic import ValidationError

    from procworker.cli.preview import job_view
    from procworker.cli.preview.origins import Inputs, complaints, leftovers, traced, without_server
    from procworker.cli.preview.reader import Reader
    from procworker.errors import ConfigurationError
    from procworker.job import fill_job, prepare_job, template_of
    from procworker.outcome import one_line

    missing: list[str] = []
    if client is None:
        flow_run = flow_run.model_copy(update={"job_variables": without_server(flow_run.job_variables, missing)})
    reader = Reader(client) if client else None
    settings, environ = worker._settings, dict(os.environ)
    try:
        configuration = await fill_job(worker, worker._work_pool, flow_run, deployment, reader)
        of_job, own_command = dict(configuration.env), configuration.command is not None
        await prepare_job(worker, worker._work_pool, configuration, flow_run, deployment, flow)
    except ValidationError as error:  # without its values, which may be secrets
        raise ConfigurationError(one_line(error)) from None

    inputs = Inputs(
        template_of(worker, worker._work_pool),
        deployment.job_variables if deployment else {},
        flow_run.job_variables or {},
    )
    names = _names(worker, flow_run, deployment)
    speaker = job_view.Speaker(
        traced(inputs),
        inputs.template["job_configuration"],
        names,
        _own_variables(worker, inputs.defaults),
        {path for path in BY_ITSELF if path[0] not in variables} if flow_run.name == job_view.NEW else (),
    )
    of_blocks = reader.secrets if reader else set()
    secrets = job_view.secrets_of(settings, environ, of_job, configuration.env)
    secrecy = job_view.Secrecy(secrets | of_blocks, of_blocks)
    view = job_view.View(arguments.target)
    view.notes += [*complaints(inputs, speaker.trace, environ), *(reader.notes if reader else ())]
    view.notes += [f"{name} is read from the server, and there is none yet" for name in dict.fromkeys(missing)]
    left = leftovers({"command": configuration.command, "env": of_job})
    view.notes += [text for text in left if not any(name in text for name in missing)]
    python = job_view.python_of(configuration, arguments.python, speaker, environ)
    job_view.settings_into(view, configuration, own_command, python, speaker, secrecy)
    if flow_run.parameters:
        is_new = flow_run.name == job_view.NEW
        origins = [names["run"]] * bool(arguments.param or not is_new) + [names["deployment"]] * bool(
            deployment and is_new
        )
        view.settings["parameters"] = job_view.Value(secrecy.shown("", flow_run.parameters), ", ".join(origins))
    job_view.environment_into(view, configuration.env, of_job, settings, speaker, secrecy, environ)
    return view


def _names(worker: ProcessWorker, flow_run: FlowRun, deployment: Deployment | None) -> dict[str, str]:
    """What the layers of the job are called."""
    from procworker.cli.preview.job_view import NEW

    has_template = worker._work_pool or worker._base_job_template
    pool = f"work pool {worker._work_pool_name or flow_run.work_pool_name!r}" if has_template else "default"
    return {
        "template": f"{pool}, template" if has_template else "default",
        "defaults": pool,
        "deployment": f"deployment {deployment.name!r}" if deployment else "deployment",
        "run": "command line" if flow_run.name == NEW else f"flow run {flow_run.name!r}",
    }


def _own_variables(worker: ProcessWorker, defaults: dict[str, Any]) -> set[str]:
    """Variables whose defaults are not the pool's."""
    template = (worker._work_pool and worker._work_pool.base_job_template) or worker._base_job_template
    return set(defaults) - set(template["variables"].get("properties") or {}) if template else set(defaults)


def _text(view: View, everything: bool) -> str:
    """The view for people."""
    import json

    from procworker.cli.layout import lines_of, visible
    from procworker.cli.terminal import Terminal

    terminal = Terminal()
    lines: list[str] = []

    def add(label: str, style: str, value: Value, indent: int) -> None:
        given = value.value
        if given is None or isinstance(given, str):
            shown = "none" if given is None else visible(given)
        else:
            shown = f"{given:g}" if isinstance(given, float) else json.dumps(given)
        lines.extend(lines_of(terminal, [(label, style), (f"{shown}  ", ""), (f"({value.origin})", "dim")], indent))

    for name, value in view.settings.items():
        add(f"{name:17}", "bold", value, 17)
    lines += ["", f"environment: that of this command ({len(view.inherited)} variables), and"]
    for name, value in view.added.items():
        add(f"+ {visible(name)}=", "green", value, 4)
    for name, value in view.changed.items():
        add(f"~ {visible(name)}=", "yellow", value, 4)
    for name, value in view.removed.items():
        lines.extend(lines_of(terminal, [(f"- {visible(name)}  ", "red"), (f"({value.origin})", "dim")], 4))
    for name, value in view.inherited.items() if everything else ():
        add(f"  {visible(name)}=", "", value, 4)
    lines += [""] * bool(view.notes)
    for note in view.notes:
        lines.extend(lines_of(terminal, [("note: ", "yellow"), (visible(note), "")], 6))
    return "\n".join(lines)
