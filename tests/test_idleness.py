"""Why nothing happens is said once when it begins, and once when it is over."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import anyio
import pytest
from workers import ScriptWorker, settings_for

from procworker import idleness
from procworker.testing.api import PrefectApi

BEGINS, ENDS = "Why nothing may be started: ", "No longer so: "


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], list[str]]:
    caplog.set_level(logging.INFO)

    def said(prefix: str) -> list[str]:
        return [text.removeprefix(prefix) for text in caplog.messages if text.startswith(prefix)]

    return said


def make(server: PrefectApi, *queues: str, **options: Any) -> ScriptWorker:
    return ScriptWorker("pool", list(queues), settings=settings_for(server), **options)


async def turns(worker: ScriptWorker, count: int = 3) -> None:
    for _ in range(count):
        await worker.sync_with_backend()
        await worker.get_and_submit_flow_runs()


def late(server: PrefectApi, queue: str = "") -> Any:
    """A flow run that nobody has started in time."""
    id = server.schedule(due_in=-60, queue=queue)
    server.set_state(id, "SCHEDULED", "Late", state_details={"scheduled_time": "2026-01-01T00:00:00Z"})
    return id


async def test_when_all_is_well_nothing_is_said(server: PrefectApi, said: Callable[[str], list[str]]) -> None:
    server.add_pool()
    async with make(server, "default") as worker:
        await turns(worker)
        assert worker._idleness.reasons == []
    assert said(BEGINS) == said(ENDS) == []


async def test_a_paused_pool_is_told_once_and_its_end_too(server: PrefectApi, said: Callable[[str], list[str]]) -> None:
    pool = server.add_pool()
    async with make(server) as worker:
        pool.is_paused = True
        await turns(worker)
        assert worker._idleness.reasons == ["work pool 'pool' is paused, resume it"]
        pool.is_paused = False
        await turns(worker)
        assert worker._idleness.reasons == []
    assert said(BEGINS) == said(ENDS) == ["work pool 'pool' is paused, resume it"]


async def test_a_queue_that_does_not_exist_is_told_once(server: PrefectApi, said: Callable[[str], list[str]]) -> None:
    server.add_pool()
    async with make(server, "gpu") as worker:
        await turns(worker)
        (reason,) = said(BEGINS)
        assert reason.startswith("the pool or a queue does not exist: ")
        server.add_queue("pool", "gpu")
        await turns(worker)
    assert said(ENDS) == [reason]


@pytest.mark.parametrize("queues", [[], ["default"]])
async def test_paused_queues_are_told(server: PrefectApi, queues: list[str], said: Callable[[str], list[str]]) -> None:
    server.add_pool()
    queue = server.queue_in("pool")
    queue.is_paused = True
    async with make(server, *queues) as worker:
        await turns(worker)
        queue.is_paused = False
        await turns(worker)
    assert said(BEGINS) == said(ENDS) == ["all work queues that it polls are paused, resume them: 'default'"]


async def test_late_runs_in_a_queue_that_nobody_polls_are_told(
    server: PrefectApi, said: Callable[[str], list[str]]
) -> None:
    server.add_pool(queues=["default", "gpu"])
    ids = [late(server, "gpu") for _ in range(2)]
    async with make(server, "default") as worker:
        await turns(worker)
        assert said(BEGINS) == ["late runs wait in 'gpu' (2), but this worker polls 'default'"]
        for id in ids:
            server.delete_run(id)
        await turns(worker)
    assert len(said(ENDS)) == 1


async def test_late_runs_that_the_pools_limit_holds_back_are_told(
    server: PrefectApi, said: Callable[[str], list[str]]
) -> None:
    pool = server.add_pool(concurrency_limit=1)
    running = server.schedule()
    server.set_state(running, "PENDING")
    server.set_state(running, "RUNNING")
    late(server)
    async with make(server) as worker:
        await turns(worker)
    text = "late runs that the server does not hand out, look at the pool's concurrency limit: 1"
    assert said(BEGINS) == [text]
    assert pool.concurrency_limit == 1


async def test_a_limit_that_holds_back_more_for_long_is_told(
    server: PrefectApi, said: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = anyio.Event()

    async def wait(*job: Any) -> int:
        await go_on.wait()
        return 0

    for _ in range(2):
        server.schedule(server.add_deployment())
    async with make(server, script=wait, limit=1) as worker:
        await worker.get_and_submit_flow_runs()
        await server.wait_for(lambda: worker.started)
        await turns(worker)
        assert said(BEGINS) == [], "it may be over in a moment"
        monkeypatch.setattr(idleness, "LIMIT_SECONDS", 0.0)
        await turns(worker)
        assert said(BEGINS) == ["the limit is reached, 1 of 1 flow runs, and more are due"]
        go_on.set()
        await worker._moved.until(lambda: not worker.runs)
        await turns(worker)
        await server.wait_for(lambda: len(worker.started) == 2)
    assert len(said(ENDS)) == 1


@pytest.mark.parametrize(("offset", "direction"), [(420, "behind"), (-420, "ahead of")])
async def test_a_clock_that_is_wrong_is_told(
    server: PrefectApi, offset: float, direction: str, said: Callable[[str], list[str]]
) -> None:
    server.add_pool()
    date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=offset), usegmt=True)
    wrong = server.fault(path="/get_scheduled_flow_runs", headers={"Date": date}, times=3)
    async with make(server) as worker:
        await turns(worker)
        assert wrong.count == 3
        await turns(worker)
    assert said(BEGINS) == said(ENDS) == [f"this machine's clock is 7 min {direction} the server's, set it right"]


async def test_a_slow_api_is_told(
    server: PrefectApi, said: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idleness, "SLOW_SECONDS", 1.0)
    server.add_pool()
    server.fault(path="/get_scheduled_flow_runs", delay=1.2, times=1)
    async with make(server) as worker:
        await turns(worker)
    assert said(BEGINS) == said(ENDS) == ["the API is slow, a poll took 1 s"]


async def test_what_cannot_be_asked_spoils_no_heartbeat(server: PrefectApi, said: Callable[[str], list[str]]) -> None:
    server.add_pool()
    server.fault("POST", "/queues/filter", status=500)
    async with make(server, "default") as worker:
        await turns(worker)
        assert worker._poll_loop.failures == 0
    assert said(BEGINS) == []
