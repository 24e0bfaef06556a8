"""Run one flow now, follow it, and exit with its outcome.

TARGET is file.py:flow, package.module:flow, flow/deployment or the id of a
flow run. Without PREFECT_API_URL an embedded Prefect server is started, and
kept for ten minutes after its last use.

Examples:
  procworker run flows.py:hello -p name=World -p count=3
  procworker run etl/nightly -p day=2026-01-01 --timeout 600
  procworker run flows.py:load --env-file .env.test --env DB_PASSWORD
  procworker run flows.py:hello --python .venv --junit report.xml

On a terminal the last line tells how the run is doing. Ctrl-C cancels it, a
second Ctrl-C kills it at once.
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from procworker.cli.junit import Suite
    from procworker.cli.run.order import Order
    from procworker.process import ProcessWorker
    from procworker.run import Run
    from procworker.settings import Settings


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
    add(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="an environment variable of the flow; NAME alone takes it from here, which keeps its value out of the list"
        " of processes; may be repeated",
    )
    add(
        "--env-file",
        action="append",
        default=[],
        metavar="FILE",
        help="environment variables from a file in .env syntax; --env wins; may be repeated",
    )
    add("--timeout", type=float, metavar="S", help="end the run after so many seconds, as TimedOut (exit code 1)")
    add("--name", metavar="NAME", help="name of the flow run (default: the server makes one up)")
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
    suite = Suite(case)
    with reported(arguments.junit, suite):
        return run_loop(_run, settings, arguments, suite)


async def _run(settings: Settings, arguments: argparse.Namespace, suite: Suite) -> int:
    """Run the target on a worker of its own, which has no pool, and print how it went."""
    import os
    import socket
    import time
    from contextlib import AsyncExitStack

    import anyio

    from procworker.cli.ci import detect
    from procworker.cli.common import embedded, say, signals_counted, wait_for_server
    from procworker.cli.errors import FAILED, UNKILLED
    from procworker.cli.run.live import Live
    from procworker.cli.run.meter import Meter
    from procworker.cli.run.order import submit, template_of
    from procworker.cli.run.places import check_places
    from procworker.cli.run.receipt import children_cpu_seconds, receipt
    from procworker.cli.tally import Tally
    from procworker.cli.terminal import Terminal
    from procworker.process import ProcessWorker
    from procworker.system.printer import PRINTER, print_line
    from procworker.system.subreaper import subreaper

    order = _order(arguments)
    check_places(settings.state_home)
    passing = os.environ.get("CI") or os.environ.get("TOX_ENV_DIR")  # nobody comes back soon
    keep = not passing if arguments.keep is None else arguments.keep
    worker: ProcessWorker | None = None
    code = 1
    terminal, meter = Terminal(), Meter()
    tally = Tally(suite, detect(os.environ, PRINTER.command), print_line, one_at_a_time=True)
    live = Live(terminal, meter, os.environ, tally.print_line)

    def interrupt(number: int) -> None:
        if worker is None or not worker.runs:
            preparing.cancel()  # there is nothing to end yet
            return
        at_once = len(received) > 1
        live.ask("Killing" if at_once else "Cancelling")
        for run in worker.runs.values():
            say(_how_it_ends(run, at_once), "stderr")
        worker.cancel_all(0.0 if at_once else None)

    received: list[int] = []
    with anyio.CancelScope() as preparing:
        async with signals_counted(interrupt) as received, AsyncExitStack() as stack:
            await stack.enter_async_context(subreaper())
            if settings.api_url:
                await wait_for_server(settings, arguments.startup_timeout)
            else:
                settings = await stack.enter_async_context(embedded(settings, arguments.python, keep))
            template = await template_of(settings, order)
            options: dict[str, Any] = {"python": arguments.python, "settings": settings, "base_job_template": template}
            options["name"] = f"run-{socket.gethostname()}-{os.getpid()}"
            options |= {"sink": live.take, "on_start": lambda _, family: meter.watch(family)}
            worker = ProcessWorker(None, **options, orphans="kill")
            await stack.enter_async_context(worker)
            began, cpu = time.monotonic(), children_cpu_seconds()
            future = await submit(worker, order)
            run = worker.runs[future.flow_run_id]
            async with anyio.create_task_group() as beside:
                beside.start_soon(meter.run)
                beside.start_soon(live.show, run, worker.client)
                await future.wait_async()
                beside.cancel_scope.cancel()
            seconds = time.monotonic() - began
            used = None if cpu is None else (children_cpu_seconds() or 0.0) - cpu
            (case,) = suite.cases
            case.ended(run, seconds)
            tally.add(run, case)
            say(receipt(run, seconds, used, meter, terminal))
            if trouble := tally.close():
                say(trouble, "stderr")
            code = 0 if run.final_state is not None and run.final_state.type == "COMPLETED" else FAILED
    if worker is not None and worker.unkilled:
        return UNKILLED
    return 128 + received[0] if received else code


def _how_it_ends(run: Run, at_once: bool) -> str:
    """Say what a signal has set going, and what another one would do."""
    from procworker.run import CANCEL_GRACE_SECONDS

    name = run.flow_run.name
    if at_once:
        return f"Killing flow run {name!r} at once"
    own = getattr(run.configuration, "grace_seconds", None)
    grace = CANCEL_GRACE_SECONDS if own is None else own
    return f"Cancelling flow run {name!r}, which may take {grace:g} s; a second Ctrl-C kills it at once"


def _order(arguments: argparse.Namespace) -> Order:
    """Read and check the command line; raises ConfigurationError."""
    import os

    from procworker.cli.run.environment import given_environment
    from procworker.cli.run.order import Order
    from procworker.errors import ConfigurationError
    from procworker.submission import entrypoint_of
    from procworker.system.interpreter import find_interpreter
    from procworker.template import fill_environment

    target: str = arguments.target
    parameters = parse_pairs(arguments.param, "parameter")
    job_variables = fill_environment(parse_pairs(arguments.job_variable, "job variable"), os.environ)
    if not isinstance(job_variables.get("env", {}), dict):
        raise ConfigurationError("the job variable 'env' must be an object: write env.NAME=VALUE")
    own_variables: dict[str, Any] = {}
    if arguments.timeout is not None:
        if not 0 < arguments.timeout < float("inf"):
            raise ConfigurationError(f"--timeout must be a number of seconds above 0, not {arguments.timeout:g}")
        own_variables["timeout_seconds"] = arguments.timeout
    if env := given_environment(arguments.env_file, arguments.env, os.environ):
        own_variables["env"] = env
    kind = kind_of(target)
    if kind == "entrypoint":
        entrypoint_of(target)  # a typing error shows before a server is started for it
    if kind == "entrypoint" or arguments.python:
        # And a Python without Prefect before a flow run is made.
        interpreter = find_interpreter(arguments.python, os.environ)
        if kind == "entrypoint" and not job_variables.keys() & {"working_dir", "command"}:
            from procworker.cli.run.parameters import check_entrypoint

            path = env.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
            check_entrypoint(target, parameters, path, interpreter.prefect_version)
    if kind == "flow run" and (given := _given_of(arguments)):
        raise ConfigurationError(
            f"an existing flow run has its parameters and job variables already: leave out {given}"
        )
    return Order(target, kind, parameters, job_variables, own_variables, arguments.name)


def _given_of(arguments: argparse.Namespace) -> str:
    """Name an option that makes no sense for a flow run that exists already."""
    given = {"--param": arguments.param, "--job-variable": arguments.job_variable, "--name": arguments.name}
    return next((option for option, value in given.items() if value), "")


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
