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
VERSIONS = ("38", "3627", "34", "30", "220")
PYTHONS = {name: os.environ.get(name) for name in (f"PROCWORKER_TEST_PREFECT{version}" for version in VERSIONS)}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place")


def a_python(variable: str) -> str:
    """Skips without an interpreter."""
    given = PYTHONS[variable]
    if not given:
        pytest.skip(f"{variable} names no Python that has this Prefect")
    return locate(given)


@contextmanager
def a_prefect(variable: str, home: Path) -> Iterator[Prefect]:
    """Skips without an interpreter."""
    python = a_python(variable)
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


@pytest.fixture(scope="session")
def prefect30(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefect]:
    """Prefect 3.0, with its server running, for it does not know the password of a newer one's."""
    with a_prefect("PROCWORKER_TEST_PREFECT30", tmp_path_factory.mktemp("prefect30")) as prefect:
        yield prefect


@pytest.fixture(scope="session")
def prefect34(request: pytest.FixtureRequest) -> Prefect:
    """Prefect 3.4, on the server of 3.8."""
    return Prefect(a_python("PROCWORKER_TEST_PREFECT34"), request.getfixturevalue("prefect38").api)


@pytest.fixture(scope="session")
def prefect3627(request: pytest.FixtureRequest) -> Prefect:
    """Prefect 3.6.27, the first that can be told of a cancel, on the server of 3.8."""
    return Prefect(a_python("PROCWORKER_TEST_PREFECT3627"), request.getfixturevalue("prefect38").api)
