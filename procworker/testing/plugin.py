"""Fixtures for pytest: `prefect_api` and `process_worker`; `pytest_plugins = ["procworker.testing"]` brings them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from procworker.testing.beside import Beside, serving
from procworker.testing.worker import WorkerBeside

FOREIGN = ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH")


@pytest.fixture
def prefect_api(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """An empty Prefect API in memory, which PREFECT_API_URL names; methods are those of PrefectApi.

    Neither credentials nor profiles nor state of the user take part. A Prefect that this process has imported before
    keeps the settings that it has read.
    """
    home = tmp_path_factory.mktemp("prefect")
    with serving() as api:
        for name in FOREIGN:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PREFECT_API_URL", api.url)
        for name in ("PREFECT_HOME", "PROCWORKER_HOME"):
            monkeypatch.setenv(name, str(home))
        yield api


@pytest.fixture
def process_worker(prefect_api: Beside) -> WorkerBeside:
    """A process worker of the work pool "pool" on `prefect_api`: `run_due()`, `await run_due_async()`, `working()`."""
    return WorkerBeside(prefect_api)
