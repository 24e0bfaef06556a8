"""Poll a work pool and run its flow runs as processes of this host.

Examples:
  procworker start --pool laptop
  procworker start --pool ci --limit 4 --drain --junit runs.xml
  procworker start --pool ci --drain --wait 60
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from typing import Any

    from procworker.cli.junit import Suite
    from procworker.cli.tally import Tally
    from procworker.settings import Settings

LONGEST_PREFETCH = LONGEST_WAIT = 86_400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "-p",
        "--pool",
        required=True,
        metavar="NAME",
        help="the work pool to poll; created if it does not exist",
    )
    add(
        "-q",
        "--work-queue",
        action="append",
        default=[],
        metavar="NAME",
        help="poll only this queue; may be repeated",
    )
    add("-n", "--name", help="name of the worker (default: a unique one)")
    add("-t", "--type", help="worker type (default: that of the pool, else process)")
    add("-l", "--limit", type=int, help="most flow runs at once (default: no limit)")
    add("--prefetch-seconds", type=float, metavar="S", help="take runs up to so many seconds early")
    add(
        "--run-once",
        action="store_true",
        help="take what is due now, finish it, and exit; exit 1 if a run did not complete",
    )
    add(
        "--drain",
        action="store_true",
        help="work until nothing is due and nothing runs, and exit; exit 1 if a run did not complete",
    )
    add(
        "--wait",
        type=_seconds,
        metavar="S",
        help="with --drain: how long to wait for the first run; exit 4 if none came",
    )
    add("--idle-timeout", type=_seconds, metavar="S", help="with --drain: how long to wait for more after the last run")
    add("--max-runs", type=_count, metavar="N", help="with --drain: take at most so many runs")
    add("--junit", metavar="FILE", help="write how the runs ended to this file, as JUnit's XML, when the worker ends")
    add(
        "--with-healthcheck",
        action="store_true",
        help="answer GET /health and /ready (PREFECT_WORKER_WEBSERVER_HOST, _PORT)",
    )
    add("--base-job-template", metavar="FILE", help="JSON job template for a pool that has to be created")
    add(
        "--create-pool-if-not-found",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="create the pool when it does not exist (default: yes)",
    )
    add("--python", metavar="PATH", help="Python that runs the flows: a path, a venv or tox env directory")
    add(
        "--orphans",
        choices=["adopt", "kill"],
        help="what becomes of running flows if the worker is killed hard: the next start goes on with them (adopt), or"
        " a helper ends and reports them at once (kill; default with --run-once, --drain, in CI, inside a flow run)",
    )
    add("--local", action="store_true", help="work on the embedded Prefect server")
    add(
        "--startup-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="with --run-once and --drain: how long to wait for the server (30)",
    )
    add("--install-policy", help=argparse.SUPPRESS)  # Prefect's: nothing to install here


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= LONGEST_WAIT:
        raise ValueError
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


_seconds.__name__, _count.__name__ = f"number of seconds from 0 to {LONGEST_WAIT}", "count"  # argparse names them


def execute(arguments: argparse.Namespace) -> int:
    from procworker.cli.common import run_loop, set_up_logging
    from procworker.cli.junit import Suite, reported
    from procworker.settings import Settings

    _check_options(arguments)
    settings = Settings.load(profile=arguments.profile)
    set_up_logging(settings)
    suite = Suite()
    with reported(arguments.junit, suite):
        return run_loop(_start, settings, arguments, suite)


def _check_options(arguments: argparse.Namespace) -> None:
    """Raises ConfigurationError for what cannot be meant together."""
    from procworker.errors import ConfigurationError

    early = arguments.prefetch_seconds
    if early is not None and not 0 <= early <= LONGEST_PREFETCH:
        raise ConfigurationError(f"--prefetch-seconds must be between 0 and {LONGEST_PREFETCH}, not {early:g}")
    if arguments.run_once and arguments.drain:
        raise ConfigurationError("--run-once takes what is due now, --drain what becomes due as well: choose one")
    for name in ("wait", "idle_timeout", "max_runs"):
        if getattr(arguments, name) is not None and not arguments.drain:
            raise ConfigurationError(
                f"--{name.replace('_', '-')} needs --drain: without it the worker never ends by itself"
            )


async def _start(settings: Settings, arguments: argparse.Namespace, suite: Suite) -> int:
    import os
    from contextlib import AsyncExitStack

    import anyio

    from procworker.cli.ci import detect
    from procworker.cli.common import embedded, say, signals_counted, wait_for_server
    from procworker.cli.errors import FAILED, NOTHING, UNKILLED
    from procworker.cli.tally import Tally
    from procworker.process import ProcessWorker
    from procworker.system.files import raised_file_limit
    from procworker.system.printer import PRINTER, print_line
    from procworker.system.subreaper import adoption, subreaper

    worker: Any = None
    ends = arguments.run_once or arguments.drain
    ci = detect(os.environ if ends else {}, PRINTER.command)
    tally = Tally(suite, ci, print_line, one_at_a_time=arguments.limit == 1)

    def interrupt(number: int) -> None:
        if worker is not None and worker.is_setup:
            worker.stop()
        else:
            starting.cancel()  # there is nothing to finish yet

    with anyio.CancelScope() as starting:
        async with AsyncExitStack() as stack:
            received = await stack.enter_async_context(signals_counted(interrupt))
            await stack.enter_async_context(subreaper())
            stack.enter_context(raised_file_limit())
            if arguments.local:
                settings = await stack.enter_async_context(embedded(settings, arguments.python, keep=True))
            if ends and settings.api_url:
                await wait_for_server(settings, arguments.startup_timeout)
            worker = await _build(settings, arguments, tally, ends)
            if type(worker) is not ProcessWorker:  # what it starts in a session of its own is no orphan
                adoption.give_up()
            await worker.start(arguments.run_once, arguments.with_healthcheck, printer=say)
    if starting.cancelled_caught:
        return 0
    if ends:
        if trouble := tally.close():
            say(trouble, "stderr")
        say(f"{tally.sentence}.")
    if worker.unkilled:
        return UNKILLED
    failed = worker.outcomes.total() - worker.outcomes["COMPLETED"]
    if ends and failed:
        return FAILED
    return NOTHING if arguments.wait is not None and not (worker.outcomes or received) else 0


async def _build(settings: Settings, arguments: argparse.Namespace, tally: Tally, ends: bool) -> Any:
    import os

    from procworker.cli.common import worker_class
    from procworker.errors import ConfigurationError
    from procworker.process import ProcessWorker
    from procworker.shift import Drain
    from procworker.system.interpreter import find_interpreter
    from procworker.system.processes import COOKIE

    drain = Drain(arguments.wait or 0.0, arguments.idle_timeout or 0.0, arguments.max_runs) if arguments.drain else None
    template = _read_template(arguments.base_job_template) if arguments.base_job_template else None
    cls = worker_class(await _discover_type(settings, arguments))
    own: dict[str, Any] = {}
    if issubclass(cls, ProcessWorker):
        own |= {"sink": tally.print_line} if ends else {}
        at_once = ends or os.environ.get("CI") or os.environ.get(COOKIE)
        own["orphans"] = arguments.orphans or ("kill" if at_once else "adopt")
    if arguments.python:
        if not issubclass(cls, ProcessWorker):
            raise ConfigurationError(f"workers of type {cls.type!r} start no Python: leave out --python")
        own["python"] = find_interpreter(arguments.python, os.environ).path
    return cls(
        arguments.pool,
        arguments.work_queue,
        arguments.name,
        arguments.prefetch_seconds,
        arguments.create_pool_if_not_found,
        arguments.limit,
        base_job_template=template,
        settings=settings,
        drain=drain,
        on_end=tally.add if ends or arguments.junit else None,
        **own,
    )


async def _discover_type(settings: Settings, arguments: argparse.Namespace) -> str:
    """Take the type asked for, else the pool's."""
    from procworker.cli.common import say
    from procworker.errors import ConfigurationError, ObjectNotFound, Unreachable
    from procworker.server.client import Client

    if not settings.api_url:
        raise ConfigurationError(
            "PREFECT_API_URL is not set: name your server's API (for example http://127.0.0.1:4200/api),"
            " or use --local for the embedded server"
        )
    async with Client(settings) as client:
        try:
            pool = await client.read_work_pool(arguments.pool, retries=0)
        except ObjectNotFound:
            if not arguments.create_pool_if_not_found:
                raise ConfigurationError(
                    f"work pool {arguments.pool!r} does not exist: create it,"
                    " or leave out --no-create-pool-if-not-found"
                ) from None
            return arguments.type or "process"
        except Unreachable:
            return arguments.type or "process"  # the worker waits for the server
    if pool.type.endswith((":push", ":managed")) or pool.type == "prefect-agent":
        raise ConfigurationError(
            f"work pool {pool.name!r} is of type {pool.type!r}, which no worker serves: choose another --pool"
        )
    if not arguments.type:
        say(f"Discovered type {pool.type!r} for work pool {pool.name!r}.")
    return arguments.type or pool.type


def _read_template(path: str) -> dict[str, Any]:
    import json

    from procworker.errors import ConfigurationError

    try:
        with open(path, encoding="utf-8") as file:
            template = json.load(file)
    except OSError as error:
        raise ConfigurationError(f"--base-job-template {path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"--base-job-template {path!r} is not JSON: {error}") from error
    if not isinstance(template, dict) or not {"job_configuration", "variables"} <= set(template):
        raise ConfigurationError(
            f"--base-job-template {path!r} must hold 'job_configuration' and 'variables':"
            " `procworker template` prints one"
        )
    return template
