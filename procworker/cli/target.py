"""Which flow run a word on the command line means, here or on the server, and which server knows it."""

from __future__ import annotations

import re
from uuid import UUID

from procworker.cli.terminal import plain
from procworker.errors import ConfigurationError, ObjectNotFound
from procworker.local.keeper import living
from procworker.server.client import Client
from procworker.server.models import FlowRun
from procworker.settings import Settings
from procworker.system.census import Census, HostRun

BEGINNING = re.compile("[0-9a-f-]{4,36}", re.IGNORECASE)
MOST = 10


def find_here(census: Census, word: str) -> HostRun | None:
    """Return the run of this host with this id, name, or unique prefix of its id; None when there is none.

    Raises ConfigurationError that lists them when the word may mean several.
    """
    runs: dict[str, HostRun] = {}
    for run in census.runs:  # those of living workers first: what a dead one wrote of the same run says less
        runs.setdefault(run.id, run)
    if word.lower() in runs:
        return runs[word.lower()]
    found = [run for run in runs.values() if run.name == word]
    if not found and BEGINNING.fullmatch(word):
        found = [run for run in runs.values() if run.id.startswith(word.lower())]
    if len(found) > 1:
        raise _ambiguous(word, [(run.id, run.name) for run in found])
    return found[0] if found else None


async def find_on_server(client: Client, word: str) -> FlowRun:
    """Return the run that the server knows under this id or name; raises ConfigurationError."""
    try:
        return await client.read_flow_run(UUID(word))
    except ValueError:
        found = await client.read_flow_runs_by_name(word, MOST)
    except ObjectNotFound:
        found = []
    if len(found) > 1:
        raise _ambiguous(word, [(str(run.id), run.name) for run in found])
    if not found:
        raise ConfigurationError(f"{_not_here(word)}, and the server knows none of that id or name")
    return found[0]


def server_of(settings: Settings, api: object) -> Settings | None:
    """Return settings for the API that a record names: ours, or an embedded server that runs; else None."""
    if settings.api_url and settings.api_identity == api:
        return settings
    for _, state in living(settings.state_home):
        if (name := f"embedded {state['version']}") == api:
            return settings.at_server(state["api_url"], state["auth_string"], name)
    return None


def any_server(settings: Settings, word: str) -> Settings:
    """Return settings for the server that may know a run which is not of this host; raises ConfigurationError."""
    if settings.api_url:
        return settings
    servers = living(settings.state_home)
    if len(servers) != 1:
        raise ConfigurationError(f"{_not_here(word)}: set PREFECT_API_URL to ask a server")
    state = servers[0][1]
    return settings.at_server(state["api_url"], state["auth_string"], f"embedded {state['version']}")


def _not_here(word: str) -> str:
    return f"no flow run {word!r} runs here (`procworker status` lists those that do)"


def _ambiguous(word: str, runs: list[tuple[str, str]]) -> ConfigurationError:
    listed = ", ".join(f"{id} {plain(name)!r}" for id, name in runs[:MOST])
    return ConfigurationError(f"{word!r} may mean several flow runs, give more of the id: {listed}")
