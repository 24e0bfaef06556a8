"""What every test gets: asyncio, a clean environment of its own, a fake server, and a look for survivors."""

from __future__ import annotations

import inspect
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from misbehave import survivors

from procworker.testing.api import PrefectApi


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(obj: object) -> None:
    """Give coroutines to anyio's plugin; before 4.12 it had no `anyio_mode` that would take them by itself."""
    function = getattr(getattr(obj, "hypothesis", None), "inner_test", obj)
    if inspect.iscoroutinefunction(function):
        pytest.mark.anyio(obj)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the machine reaches a test, and nothing a test writes reaches the machine."""
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "PROCWORKER_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "PREFECT_HOME", "PROCWORKER_HOME", "TMPDIR"):
        place = tmp_path / "clean" / name.lower()
        place.mkdir(parents=True)
        monkeypatch.setenv(name, str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
async def server() -> AsyncIterator[PrefectApi]:
    """An empty Prefect server of the current generation."""
    async with PrefectApi.running() as server:
        yield server


@pytest.fixture
def no_survivors() -> Iterator[Callable[[str], None]]:
    """Name a string that the environment of all that is started holds; at the end nothing may hold it."""
    watched: list[str] = []
    yield watched.append
    found = {pid: command for cookie in watched for pid, command in survivors(cookie).items()}
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not found, f"still running: {found}"
