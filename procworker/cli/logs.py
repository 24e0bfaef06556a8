"""Show the output of a flow run that runs here, or else its log on the server.

RUN is the id of a flow run, the beginning of one (four characters at least), or a name. Secrets that the run was given
are masked; where nobody can tell them any more, the server's log is shown.

Examples:
  procworker logs resilient-grebe
  procworker logs 0c2f6e0a -f
  procworker logs resilient-grebe --server -n 20
"""

from __future__ import annotations

import argparse

TYPE_CHECKING = False  # see procworker/__init__.py
if TYPE_CHECKING:
    from uuid import UUID

    from procworker.server.client import Client
    from procworker.server.models import Log
    from procworker.settings import Settings

POLL_SECONDS = 1.5
OVERLAP_SECONDS = 10
"""How far lines may come late: an engine and a worker send theirs in batches."""
START_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN", help="id, beginning of an id, or name of a flow run")
    add("-f", "--follow", action="store_true", help="go on until the run has ended")
    add("-n", "--tail", type=int, metavar="N", help="only the last N lines (here: of stdout and of stderr)")
    add("--server", action="store_true", help="show the server's log, also of a run that runs here")


def execute(arguments: argparse.Namespace) -> int:
    from procworker.cli.common import run_loop, set_up_logging
    from procworker.cli.target import any_server, find_here, server_of
    from procworker.errors import ConfigurationError
    from procworker.settings import Settings
    from procworker.system.census import take_census

    if arguments.tail is not None and arguments.tail < 0:
        raise ConfigurationError(f"--tail must be a number of lines, not {arguments.tail}")
    settings = Settings.load(profile=arguments.profile)
    set_up_logging(settings, "WARNING")
    run = find_here(take_census(settings.state_home), arguments.run)
    word, its = arguments.run, None
    if run is not None:
        word, its = run.id, server_of(settings, run.data.get("api"))
        if not arguments.server:
            from procworker.cli.local_logs import show_output

            if (why_not := show_output(run, settings, arguments.tail, arguments.follow)) is None:
                return 0
            _say_why(why_not)
        if its is None:
            raise ConfigurationError(f"the log is on another server: set PREFECT_API_URL to {run.data.get('api')}")
    return run_loop(_from_server, its or any_server(settings, word), word, arguments)


def _say_why(text: str) -> None:
    from procworker.cli.common import say

    say(f"From the server, since {text}:", "stderr")


async def _from_server(settings: Settings, word: str, arguments: argparse.Namespace) -> int:
    """Print a run's log, and go on until it has ended and nothing more comes."""
    from datetime import timedelta

    import anyio

    from procworker.cli.local_logs import printer
    from procworker.cli.target import find_on_server
    from procworker.redaction import Mask
    from procworker.server.client import Client

    show, mask = printer(), Mask(settings.secrets())
    seen: set[UUID] = set()
    newest = None
    async with Client(settings) as client:
        id = (await find_on_server(client, word)).id
        rows = await (_last(client, id, arguments.tail) if arguments.tail is not None else _all(client, id, None))
        was_final = not arguments.follow
        while True:
            for row in rows:
                if row.id not in seen:
                    seen.add(row.id)
                    show(mask(_line(row)))
            if was_final:
                return 0
            newest = max([row.timestamp for row in rows] + ([newest] if newest else []), default=None)
            state = (await client.read_flow_run(id)).state
            was_final = state is not None and state.is_final() and not state.is_cancelling()
            await anyio.sleep(POLL_SECONDS)  # after the end, too: the last lines may be under way
            rows = await _all(client, id, newest and newest - timedelta(seconds=OVERLAP_SECONDS))


async def _all(client: Client, id: UUID, after: object) -> list[Log]:
    rows: list[Log] = []
    while len(page := await client.read_logs(id, 200, len(rows), after)) == 200:  # type: ignore[arg-type]
        rows += page
    return [*rows, *page]


async def _last(client: Client, id: UUID, count: int) -> list[Log]:
    rows: list[Log] = []
    while len(rows) < count and (page := await client.read_logs(id, count - len(rows), len(rows), newest_first=True)):
        rows += page
    return rows[::-1]


def _line(row: Log) -> str:
    import logging

    moment = row.timestamp.astimezone().strftime("%H:%M:%S.%f")[:-3]
    return f"{moment} | {logging.getLevelName(row.level):<7} | {row.name} - {row.message}"
