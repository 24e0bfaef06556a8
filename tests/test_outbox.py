"""Logs and events reach the server in batches, in the background, and never hurt whoever wrote them."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from threading import Thread
from typing import Any
from uuid import uuid4

import anyio
import pytest
from test_http import said, settings

from procworker.server import outbox as module
from procworker.server.client import Client
from procworker.server.outbox import Outbox, _fitted, _size
from procworker.testing.api import PrefectApi

RUN = str(uuid4())
SOON = "0.05"


def record(message: str, **more: Any) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat()
    return {"name": "n", "level": 20, "message": message, "timestamp": now, "flow_run_id": RUN, **more}


@asynccontextmanager
async def outbox_to(server: PrefectApi, interval: str = SOON, **values: str) -> AsyncIterator[Outbox]:
    chosen = settings(server.url, logging_to_api_batch_interval=interval, **values)
    async with Client(chosen) as client:
        client.http.first_pause = 0.01
        async with Outbox(client, chosen) as outbox:
            yield outbox


def messages(server: PrefectApi) -> list[str]:
    return [row["message"] for row in server.logs]


async def test_logs_of_one_interval_travel_together_and_in_order(server: PrefectApi) -> None:
    async with outbox_to(server) as outbox:
        for number in range(5):
            outbox.log(record(str(number)))
        await server.wait_request("POST", "/logs")
        assert messages(server) == ["0", "1", "2", "3", "4"]
    assert len(server.seen("POST", "/logs")) == 1


async def test_what_is_left_is_delivered_at_the_end(server: PrefectApi) -> None:
    async with outbox_to(server, interval="60") as outbox:
        outbox.log(record("last words"))
        outbox.event({"id": "1", "occurred": "now", "event": "e", "resource": {}})
    assert messages(server) == ["last words"]
    assert [event["event"] for event in server.events] == ["e"]


async def test_what_is_left_is_delivered_even_when_cancelled(server: PrefectApi) -> None:
    with anyio.CancelScope() as scope:
        async with outbox_to(server, interval="60") as outbox:
            outbox.log(record("last words"))
            scope.cancel()
            await anyio.sleep(1)
    assert messages(server) == ["last words"]


async def test_the_end_does_not_wait_for_a_server_that_hangs(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "DRAIN_SECONDS", 0.2)
    server.fault("POST", "/logs", hang=True, times=9)
    with anyio.fail_after(3):
        async with outbox_to(server) as outbox:
            outbox.log(record("x"))
    assert "1 logs could not be delivered" in caplog.text


async def test_batches_are_cut_by_size(server: PrefectApi) -> None:
    async with outbox_to(server, logging_to_api_batch_size="1000", logging_to_api_max_log_size="500") as outbox:
        for number in range(6):
            outbox.log(record(str(number) * 50))
    sizes = [len(request.body) for request in server.seen("POST", "/logs")]
    assert len(sizes) == 3
    assert all(size <= 502 + 2 for size in sizes)
    assert [message[0] for message in messages(server)] == list("012345")


async def test_an_outage_delays_logs_and_loses_none(server: PrefectApi, caplog: pytest.LogCaptureFixture) -> None:
    async with outbox_to(server) as outbox:
        outbox.log(record("1"))
        await server.wait_request("POST", "/logs")
        async with server.outage():
            outbox.log(record("2"))
            await said(caplog, "have to wait")
            outbox.log(record("3"))
        await server.wait_request("POST", "/logs", 2)
    # The outage may swallow the answer to the first, and then it is sent again.
    assert list(dict.fromkeys(messages(server))) == ["1", "2", "3"]
    assert caplog.text.count("have to wait") == 1


async def test_wrong_credentials_delay_logs_until_they_are_right() -> None:
    async with PrefectApi.running(api_key="new") as server:
        server.fault("POST", "/logs", status=401)
        async with outbox_to(server, api_key="new") as outbox:
            outbox.log(record("x"))
            await server.wait_request("POST", "/logs", 2)
        assert messages(server) == ["x"]


async def test_a_batch_that_the_server_refuses_is_lost_but_not_the_next(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    server.fault("POST", "/logs", status=422)
    async with outbox_to(server) as outbox:
        outbox.log(record("bad"))
        await server.wait_request("POST", "/logs")
        outbox.log(record("good"))
    assert messages(server) == ["good"]
    assert "logs are lost" in caplog.text


async def test_an_event_that_is_no_json_is_lost_but_not_the_next(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"id": "1", "occurred": "now", "event": "e", "resource": {}}
    async with outbox_to(server) as outbox:
        outbox.event({"id": object()})
        await said(caplog, "events are lost")
        outbox.event(good)
    assert server.events == [good]


async def test_without_room_the_oldest_go_with_one_warning(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "ROOM", 5 * _size(record("0000")))
    async with outbox_to(server, interval="60") as outbox:
        for number in range(1000, 1020):
            outbox.log(record(str(number)))
    assert messages(server) == ["1015", "1016", "1017", "1018", "1019"]
    assert caplog.text.count("the oldest are dropped") == 1


async def test_a_server_without_events_is_left_in_peace(caplog: pytest.LogCaptureFixture) -> None:
    async with PrefectApi.running("2.20.26") as server:
        async with outbox_to(server) as outbox:
            outbox.event({"id": "1"})
            await server.wait_request("POST", "/events")
            outbox.event({"id": "2"})
        assert len(server.seen("POST", "/events")) == 1
    assert not caplog.records


async def test_an_event_that_is_too_large_is_not_sent(server: PrefectApi) -> None:
    async with outbox_to(server) as outbox:
        outbox.event({"payload": "x" * 1_500_000})
    assert not server.seen("POST", "/events")


async def test_logs_come_from_any_thread(server: PrefectApi) -> None:
    async with outbox_to(server) as outbox:

        def write() -> None:
            for _ in range(200):
                outbox.log(record("x"))

        threads = [Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
    assert len(server.logs) == 800


# What becomes of a record


async def test_a_server_of_ones_own_gets_no_worker_id_and_only_logs_of_runs(server: PrefectApi) -> None:
    async with outbox_to(server) as outbox:
        outbox.log(record("of a run", worker_id="w"))
        outbox.log(record("of the worker", flow_run_id=None, worker_id="w"))
    assert messages(server) == ["of a run"]
    assert "worker_id" not in server.logs[0]


async def test_cloud_also_gets_the_logs_of_a_worker_that_has_an_id() -> None:
    async with PrefectApi.running(cloud=True) as server:
        async with outbox_to(server, cloud_api_url="http") as outbox:
            outbox.log(record("of a run", worker_id=None))
            outbox.log(record("of the worker", flow_run_id=None, worker_id="w"))
            outbox.log(record("of nobody", flow_run_id=None, worker_id=None))
            outbox.log(record("x" * 30_000))
        assert [row.get("worker_id", "none") for row in server.logs] == ["none", "w", "none"]
        assert server.logs[2]["message"].endswith("x... [truncated]")
        assert len(json.dumps(server.logs[2])) <= 25_000


async def test_logging_to_the_api_can_be_switched_off(server: PrefectApi) -> None:
    async with outbox_to(server, logging_to_api_enabled="false") as outbox:
        outbox.log(record("x"))
    assert not server.seen("POST", "/logs")


async def test_nuls_secrets_and_what_is_no_unicode_do_not_reach_the_server(server: PrefectApi) -> None:
    async with outbox_to(server, api_key="pnu_hush") as outbox:
        outbox.log(record("a\0b pnu_hush caf\udce9"))
    assert messages(server) == ["ab *** caf?"]


@pytest.mark.parametrize("text", ["x" * 5000, "é" * 5000, "\n" * 5000, "x" * 100 + "☃" * 5000, "x", "x" * 880])
@pytest.mark.parametrize("largest", [1000, 50])
def test_a_message_is_cut_to_fit_as_closely_as_it_can(text: str, largest: int) -> None:
    fitted, size = _fitted(record(text), largest)
    assert size == _size(fitted)
    if _size(record(text)) <= largest:
        assert fitted["message"] == text
    elif largest > 200:
        assert fitted["message"].endswith("... [truncated]")
        assert largest - 4 < _size(fitted) <= largest
        assert text.startswith(fitted["message"].removesuffix("... [truncated]"))
    else:
        assert fitted["message"] == "... [truncated]"


async def test_nothing_is_logged_about_what_goes_well(server: PrefectApi, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "procworker")
    async with outbox_to(server) as outbox:
        outbox.log(record("x"))
    assert not caplog.records
