"""A host that sleeps and wakes, a clock that is set, many late runs at once: no storm, nothing lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import pytest
from commands import FAST, TEMPLATE, Command
from workers import ScriptWorker, settings_for, working

from procworker import intake as intake_module
from procworker.testing import Beside, serving
from procworker.testing.api import PrefectApi

pytestmark = pytest.mark.slow

SLEPT = 3.0


@pytest.fixture
def beside() -> Iterator[Beside]:
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        yield server


def until(fact: Any, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def test_a_worker_that_slept_goes_on_without_a_storm(beside: Beside, tmp_path: Path) -> None:
    """SIGSTOP is what a suspended host, a frozen container or a debugger is to a process."""
    interval = {"PREFECT_WORKER_QUERY_SECONDS": "0.2", "PREFECT_WORKER_HEARTBEAT_SECONDS": "0.2"}
    with Command(
        tmp_path / "worker", "start", "-p", "pool", **{**FAST, **interval, "PREFECT_API_URL": beside.url}
    ) as worker:
        run = beside.schedule(beside.add_deployment(), parameters={"do": "complete", "seconds": 1})
        beside.wait_state(run, "RUNNING")
        worker.send(signal.SIGSTOP)
        beside.wait_state(run, "COMPLETED")  # the flow went on
        time.sleep(SLEPT)
        late = [beside.schedule(beside.add_deployment(f"late-{i}")) for i in range(3)]
        before = len(beside.requests)
        worker.send(signal.SIGCONT)
        for one in late:
            beside.wait_state(one, "COMPLETED")
        polls = [request for request in beside.requests[before:] if "get_scheduled" in request.path]
        beats = [request for request in beside.requests[before:] if "heartbeat" in request.path]
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    # What was due while it slept is made up for once, not once for every interval (that would be 15 at once).
    began = polls[0].time
    assert len([poll for poll in polls if poll.time - began < 0.1]) <= 3
    assert len([beat for beat in beats if beat.time - began < 0.1]) <= 2


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_clock_that_is_set_shortens_no_timer_and_lengthens_none(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    real, offset = time.time, 0.0

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(real() + offset, tz or timezone.utc)

    monkeypatch.setattr(time, "time", lambda: real() + offset)
    monkeypatch.setattr(intake_module, "datetime", Clock)
    began = anyio.Event()

    async def script(*_: Any) -> int:
        began.set()
        await anyio.sleep(0.3)
        return 0

    server.add_pool()
    first = server.schedule(server.add_deployment())
    async with working(ScriptWorker("pool", settings=settings_for(server), script=script)) as worker:
        await began.wait()
        offset = jump
        count = len(server.seen("POST", "get_scheduled"))
        await anyio.sleep(0.5)
        more = len(server.seen("POST", "get_scheduled")) - count
        assert 2 <= more <= 20, "one poll in 0.05 s, whatever the clock says"
        assert str(first) in worker.started
        assert worker.is_worker_still_polling(0.1)


async def test_many_late_runs_are_started_a_few_at_a_time(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    server.add_pool()
    deployment = server.add_deployment()
    runs = [server.schedule(deployment, due_in=-3600) for _ in range(40)]
    live = most = 0

    async def script(*_: Any) -> int:
        nonlocal live, most
        live += 1
        most = max(most, live)
        await anyio.sleep(0.01)
        live -= 1
        return 0

    starting = 0
    async with working(ScriptWorker("pool", settings=settings_for(server), limit=5, script=script)) as worker:
        with anyio.fail_after(60):
            while worker.outcomes.total() + len(worker.runs) < len(runs) or worker.runs:
                starting = max(starting, sum(run.starting for run in worker.runs.values()))
                await anyio.sleep(0.001)
    assert 1 <= starting <= 2
    assert 1 <= most <= 5
    assert sorted(worker.started) == sorted(map(str, runs)), "each once"
