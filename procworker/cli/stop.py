"""End flow runs of this host, as Ctrl-C in `procworker run` does.

RUN is the id of a flow run, the beginning of one (four characters at least), or a name. The worker that runs it is
asked to cancel it, which works without the server, too. A run that is not of this host is cancelled on the server.

Examples:
  procworker stop resilient-grebe
  procworker stop 0c2f6e0a --grace 5
  procworker stop --all
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from procworker.settings import Settings
    from procworker.system.census import HostRun, HostWorker

LOOK_SECONDS = 0.1
EXTRA_SECONDS = 15.0
"""What may come on top of the grace: the worker's next look, the server's answer, SIGKILL, the report."""
ANSWER_SECONDS = 3.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="*", metavar="RUN", help="id, beginning of an id, or name of a flow run")
    parser.add_argument("--all", action="store_true", help="end all flow runs of this host")
    parser.add_argument(
        "--grace",
        type=float,
        metavar="SECONDS",
        help="time between SIGTERM and SIGKILL (default: the job's grace_seconds, or 30)",
    )


def execute(arguments: argparse.Namespace) -> int:
    import os

    from procworker.cli.common import run_loop, set_up_logging
    from procworker.errors import ConfigurationError
    from procworker.settings import Settings

    if os.name == "nt":
        raise ConfigurationError("`procworker stop` needs Linux or macOS: stop the worker, or cancel on the server")
    if bool(arguments.run) == arguments.all:
        raise ConfigurationError("name the flow runs to end, or say --all")
    if arguments.grace is not None and not 0 <= arguments.grace < float("inf"):
        raise ConfigurationError(f"--grace must be a number of seconds, not {arguments.grace:g}")
    settings = Settings.load(profile=arguments.profile)
    set_up_logging(settings, "CRITICAL")  # how each run has ended is said anyway
    return run_loop(_stop, settings, arguments)


async def _stop(settings: Settings, arguments: argparse.Namespace) -> int:
    """End them all side by side; the exit code is that of the worst."""
    import anyio

    from procworker.cli.common import say
    from procworker.cli.target import find_here
    from procworker.system.census import ELSEWHERE, take_census

    census = take_census(settings.state_home)
    here: dict[str, tuple[HostWorker, HostRun]] = {}
    elsewhere: list[str] = []
    runs = [find_here(census, word) for word in arguments.run] if arguments.run else census.runs
    for word, run in zip(arguments.run or [""] * len(runs), runs, strict=True):
        worker = census.worker_of(run) if run else None
        if run and worker and worker.standing != ELSEWHERE:
            here.setdefault(run.id, (worker, run))
        elif word:
            elsewhere.append(run.id if run else word)
    if arguments.all and not here:
        say("Nothing runs here.")
    codes = [await _cancel_on_server(settings, word) for word in elsewhere]

    async def end(worker: HostWorker, run: HostRun) -> None:
        codes.append(await _end(settings, worker, run, arguments.grace))

    async with anyio.create_task_group() as tasks:
        for worker, run in here.values():
            tasks.start_soon(end, worker, run)
    return max(codes, default=0)


async def _end(settings: Settings, worker: HostWorker, run: HostRun, grace: float | None) -> int:
    """End one run of this host, and say how it ended."""
    import time

    from procworker.cli.common import say
    from procworker.cli.errors import FAILED
    from procworker.cli.terminal import plain
    from procworker.system.census import DEAD
    from procworker.system.wishes import ask_to_stop

    what = f"flow run {plain(run.name)!r} ({run.id})"
    pool = worker.fact("pool")
    start = f"`procworker start{f' --pool {pool}' if pool else ''}`"
    if run.phase == "ended":
        later = f"the next {start} reports it" if worker.standing == DEAD else "its worker waits for the server"
        say(f"Ended before: {what}; {later}.")
        return 0
    began = time.monotonic()
    if worker.standing == DEAD:
        code = await _end_in_its_place(settings, worker, run, grace, what, start)
        if code is not None:
            return code
    else:
        try:
            ask_to_stop(run.path, settings.state_home / "workers" / worker.owner, grace)
        except FileNotFoundError:
            pass  # it has just ended
        except OSError as error:
            say(f"Cannot be ended from here: {what}: {error.strerror or error}", "stderr")
            return FAILED
    if not await _gone(run, _longest(run, grace)):
        whom = "its worker does not obey; is it of an older procworker, or stopped?"
        say(f"Still running: {what} after {time.monotonic() - began:.0f} s: {whom}", "stderr")
        return FAILED
    state = await _state(settings, run)
    seconds = time.monotonic() - began
    known = state or "Ended, and the server does not answer"
    say(f"{known}: {what} after {seconds:.1f} s")
    return 0


def _longest(run: HostRun, grace: float | None) -> float:
    from procworker.run import CANCEL_GRACE_SECONDS

    job = run.data.get("job")
    own = job.get("grace_seconds") if isinstance(job, dict) else None
    seconds = grace if grace is not None else own if isinstance(own, int | float) else CANCEL_GRACE_SECONDS
    return seconds + EXTRA_SECONDS


async def _gone(run: HostRun, seconds: float) -> bool:
    """Wait until the record is gone, or until nothing but the report is left of the run."""
    import anyio

    from procworker.system.records import read_record

    deadline, ended = anyio.current_time() + seconds, float("inf")
    while anyio.current_time() < min(deadline, ended):
        try:
            if read_record(run.path).get("phase") == "ended":
                ended = min(ended, anyio.current_time() + ANSWER_SECONDS)
        except (OSError, ValueError):
            return True
        await anyio.sleep(LOOK_SECONDS)
    return ended < float("inf")


async def _state(settings: Settings, run: HostRun) -> str | None:
    """Ask the run's server how it ended; None when it cannot say, or does not know yet."""
    from contextlib import suppress
    from uuid import UUID

    import anyio

    from procworker.cli.target import server_of
    from procworker.errors import ApiError
    from procworker.server.client import Client

    its = server_of(settings, run.data.get("api"))
    if its is None:
        return None
    with anyio.move_on_after(ANSWER_SECONDS), suppress(ApiError):
        async with Client(its) as client:
            state = (await client.read_flow_run(UUID(run.id), retries=0)).state
            return (state.name or state.type) if state and state.is_final() and not state.is_cancelling() else None
    return None


async def _end_in_its_place(
    settings: Settings, worker: HostWorker, run: HostRun, grace: float | None, what: str, start: str
) -> int | None:
    """End a run whose worker is dead; None when somebody else is at it."""
    from procworker.cli.common import say
    from procworker.cli.errors import FAILED, UNKILLED
    from procworker.cli.target import server_of
    from procworker.heir import end_run_of_dead

    its = server_of(settings, run.data.get("api"))
    if its is None:
        advice = f"set PREFECT_API_URL to {run.data.get('api')} and try again, or let {start} go on with it"
        say(f"Not ended: {what}: its worker is dead, and it belongs to another server: {advice}", "stderr")
        return FAILED
    ended = await end_run_of_dead(its, run.id, worker.owner, grace)
    if ended is None:
        return None
    state, unkilled = ended
    said = f"the next {start} reports it" if state is None else "its worker is dead, so it was ended in its place"
    say(f"{(state.name or state.type) if state else 'Ended'}: {what}; {said}")
    return UNKILLED if unkilled else 0


async def _cancel_on_server(settings: Settings, word: str) -> int:
    from procworker.cli.common import say
    from procworker.cli.target import any_server, find_on_server
    from procworker.cli.terminal import plain
    from procworker.server.client import Client
    from procworker.server.models import new_state

    async with Client(any_server(settings, word)) as client:
        run = await find_on_server(client, word)
        what = f"flow run {plain(run.name)!r} ({run.id})"
        if run.state and run.state.is_final() and not run.state.is_cancelling():
            say(f"{run.state.name}: {what} had ended before.")
            return 0
        answer = await client.set_flow_run_state(run.id, new_state("CANCELLING"))
        name = answer.state.name if answer.state else run.state_name
        if answer.state and answer.state.is_final() and not answer.state.is_cancelling():
            say(f"{name}: {what}")
        else:
            say(f"{name}: {what} does not run on this host: the server was asked, its worker has to obey.")
        return 0
