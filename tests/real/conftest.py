"""Real Prefect servers, each started once, when the first test needs it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal
from harness import Api, Place, Prefect

from procworker.local.server import local_server
from procworker.system.interpreter import locate

# Read now: the fixture `clean_environment` takes them away later.
PYTHONS = {name: os.environ.get(name) for name in ("PROCWORKER_TEST_PREFECT38", "PROCWORKER_TEST_PREFECT220")}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place")


@contextmanager
def a_prefect(variable: str, home: Path) -> Iterator[Prefect]:
    """Skips without an interpreter."""
    given = PYTHONS[variable]
    if not given:
        pytest.skip(f"{variable} names no Python that has this Prefect")
    python = locate(given)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(local_server(python, home, keep_seconds=0, say=print)) as server,
    ):
        api = Api(server.api_url, server.auth_string)
        yield Prefect(python, api)
        api.close()


@pytest.fixture(scope="session")
def prefect38(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """Prefect 3.8, with its server running."""
    with a_prefect("PROCWORKER_TEST_PREFECT38", tmp_path_factory.mktemp("prefect38")) as prefect:
        yield prefect


@pytest.fixture(scope="session")
def prefect220(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """Prefect 2.20, with its server running."""
    with a_prefect("PROCWORKER_TEST_PREFECT220", tmp_path_factory.mktemp("prefect220")) as prefect:
        yield prefect
