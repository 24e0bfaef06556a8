"""One worker for every generation of Prefect: what works on the server of one, with flows that run on another.

PROCWORKER_TEST_TABLE names a file for the table of what was seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import PYTHONS, a_prefect, a_python
from generations import EVENTS, NO_PASSWORD, OTHER_MAJOR, Pair, open_server, own_prefect
from generations_table import table
from harness import Place, Prefect

from procworker.system.interpreter import probe

pytestmark = [pytest.mark.real, pytest.mark.long]

GENERATIONS = ("220", "30", "34", "3627", "38")
WITHOUT_PASSWORD = ("220", "30")
"""Prefect knows it from 3.1.10 on; flows that run on an older one need a server that asks for none."""
NEED_OPEN = {"34-open": ("220", "30"), "3627-open": ("220", "30", "34"), "38-open": ("220", "30", "34")}
"""Servers without password, and the engines that see more of them than of the same with one."""
SERVERS = ("220", "30", "34-open", "34", "3627-open", "3627", "38-open", "38")
FULL = bool(os.environ.get("PROCWORKER_TEST_FULL"))
"""Every pair; else each with itself, and all on the newest server."""
TABLE = os.environ.get("PROCWORKER_TEST_TABLE")

GOOD = {
    "complete": "COMPLETED Completed",
    "fail": "FAILED Failed",
    "sleep": "CANCELLED Cancelled",
    "gone": "gone",
    "finals": "1 1 1",
    "hooks": "on_cancellation",
    "pid": "engine's",
    "labels": "all",
    "logs": "flow's",
    "task runs": "COMPLETED",
    "events": " ".join(sorted(EVENTS)),
    "run": "0 1",
    "submit": "COMPLETED Completed",
}
REFUSED = {
    **dict.fromkeys(("complete", "fail", "sleep", "submit"), "CRASHED Crashed"),
    "hooks": "",
    "run": "1 1",
    "task runs": "none",
}


def expected(server: str, engine: str) -> dict[str, str]:
    """What a user sees of a pair. Whatever is not as good as it can be has its reason here."""
    things, generation = dict(GOOD), server.removesuffix("-open")
    if generation in ("220", "30"):
        things["labels"] = "none"  # no such route before 3.1.7
    if generation == "220":
        things["events"] = "no such route"  # they were an experiment then
    # From 3.6.14 on, engines log in before they send events, such as those about task runs. Plain Prefect has the same.
    if engine in ("3627", "38") and generation in ("30", "34"):
        things["task runs"] = "none"  # an older server takes the log-in for a bad event, with or without password
    if engine == "34" and server in ("3627", "38"):
        things["task runs"] = "none"  # and one with a password takes no events without
    if engine in ("30", "34"):
        things["hooks"] = ""  # these know no cancel, and SIGTERM ends them before they can say anything
    if server == engine:
        things["embedded"] = "0 healthy"
    if generation == "220" and engine != "220":
        things |= REFUSED | {"logs": OTHER_MAJOR}  # Prefect 3 asks its server for the version
    elif engine in WITHOUT_PASSWORD and server not in WITHOUT_PASSWORD and server == generation:
        things |= REFUSED | {"logs": NO_PASSWORD, "pid": "known"}  # it does not get as far as the flow
    return things


def pairs() -> Iterator[tuple[str, str]]:
    for server in SERVERS:
        for engine in GENERATIONS:
            is_needed = engine in NEED_OPEN.get(server, ())
            can_log_in = server in WITHOUT_PASSWORD or engine not in WITHOUT_PASSWORD
            is_worth_it = is_needed if "open" in server else can_log_in
            if is_worth_it and (FULL or server == engine or server.startswith("38")):
                yield server, engine


def given(server: str, engine: str) -> Any:
    """A pair, which is skipped before its server is started when one of its Pythons is not given."""
    variables = [f"PROCWORKER_TEST_PREFECT{name.removesuffix('-open')}" for name in (server, engine)]
    missing = [variable for variable in variables if not PYTHONS[variable]]
    return pytest.param(server, engine, marks=pytest.mark.skipif(bool(missing), reason=f"not given: {missing}"))


@dataclass
class Notebook:
    """What was seen, and of which versions."""

    seen: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    if TABLE:
        names = {name: notebook.versions[name] for name in GENERATIONS if name in notebook.versions}
        Path(TABLE).write_text(table(notebook.seen, names), encoding="utf-8")


Servers = Callable[[str], tuple[Prefect, Path]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Gives the server of a name and its home: the embedded one, or one that asks for no password. One at a time."""
    running: dict[str, tuple[Prefect, Path]] = {}
    with ExitStack() as stack:

        def server(name: str) -> tuple[Prefect, Path]:
            if name not in running:
                stack.close()
                running.clear()
                variable = f"PROCWORKER_TEST_PREFECT{name.removesuffix('-open')}"
                home = tmp_path_factory.mktemp("server")
                manager = open_server(a_python(variable), home) if "open" in name else a_prefect(variable, home)
                running[name] = stack.enter_context(manager), home
            return running[name]

        yield server


def serve(servers: Servers, server: str, engine: str, place: Place, notebook: Notebook) -> None:
    prefect, home = servers(server)
    python = a_python(f"PROCWORKER_TEST_PREFECT{engine}")
    seen = Pair(prefect, home, python, place).watch()
    notebook.seen[server, engine] = seen
    notebook.versions[engine] = str(probe(python))
    wanted = expected(server, engine)
    if own_prefect() == probe(python) and wanted["complete"] == GOOD["complete"]:
        wanted["submit"] += " 42"  # its result, which only its own Prefect can read
    assert seen == wanted


@pytest.mark.parametrize(("server", "engine"), [given(*pair) for pair in pairs()])
def test_one_worker_serves_every_engine_on_every_server(
    server: str, engine: str, place: Place, servers: Servers, notebook: Notebook
) -> None:
    serve(servers, server, engine, place, notebook)


@pytest.mark.parametrize(("server", "engine"), [given("38", "220"), given("38", "30")])
def test_an_engine_that_knows_no_password_fails_and_says_why(
    server: str, engine: str, place: Place, servers: Servers
) -> None:
    """The run becomes Crashed, and its log holds the server's refusal."""
    serve(servers, server, engine, place, Notebook())
