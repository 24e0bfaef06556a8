"""`procworker.testing`: the API without a socket and in a thread of its own, and the worker on it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio
import httpx
import psutil
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from commands import TEMPLATE, fake_prefect

from procworker.errors import ConfigurationError
from procworker.server.client import Client
from procworker.settings import Settings
from procworker.testing import Beside, PrefectApi, WorkerBeside, serving

# Without a socket


async def test_a_client_reaches_the_api_without_a_socket() -> None:
    api = PrefectApi(auth_string="me:secret")
    id = api.schedule(name="lazy run")
    settings = Settings.load({"PREFECT_API_URL": api.url, "PREFECT_API_AUTH_STRING": "me:secret"})
    async with Client(settings, transport=api.transport) as client:
        assert (await client.read_flow_run(id)).name == "lazy run"
        found = await client.get_scheduled_flow_runs_for_work_pool("pool", [], None, 10)
    assert [row.flow_run.id for row in found] == [id]
    assert [request.status for request in api.seen("*", f"{id}|get_scheduled")] == [200, 200]


@pytest.mark.parametrize(
    ("how", "error", "applied"),
    [
        ({"reset": True}, httpx.ReadError, False),
        ({"commit": True}, httpx.ReadError, True),
        ({"truncate": 3}, httpx.RemoteProtocolError, True),
        ({"delay": 0.01, "reset": True}, httpx.ReadError, False),
    ],
)
async def test_faults_are_the_same_without_a_socket(how: dict[str, Any], error: type[Exception], applied: bool) -> None:
    api = PrefectApi()
    id, body = api.schedule(), {"state": {"type": "PENDING"}}
    async with httpx.AsyncClient(transport=api.transport, base_url=api.url) as client:
        api.fault("POST", "set_state", **how)
        with pytest.raises(error):
            await client.post(f"/flow_runs/{id}/set_state", json=body)
        assert api.run(id).state.type == ("PENDING" if applied else "SCHEDULED")
        async with api.outage():
            with pytest.raises(httpx.ConnectError):
                await client.get("/health")
        api.fault(path="/health", status=503, headers={"Retry-After": "1"})
        assert (await client.get("/health")).headers["retry-after"] == "1"
        assert (await client.get("/health", params={"a": "b c"})).json() is True
    assert api.seen("GET", "/health")[-1].query == {"a": "b c"}


async def test_a_request_that_hangs_goes_on_when_it_is_released() -> None:
    api = PrefectApi()
    fault = api.fault("GET", "/health", hang=True)
    async with (
        httpx.AsyncClient(transport=api.transport, base_url=api.url) as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(client.get, "/health")
        await api.wait_request("GET", "/health")
        assert api.requests[0].status is None
        fault.release()
    assert api.requests[0].status == 200


async def test_bodies_may_come_in_chunks_and_after_a_question(server: PrefectApi) -> None:
    async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:

        async def ask(text: str, until: bytes) -> bytes:
            await stream.send(text.replace("\n", "\r\n").encode())
            answer = b""
            while until not in answer:
                answer += await stream.receive()
            return answer

        head = "POST /api/flows/ HTTP/1.1\nHost: x\nContent-Type: application/json\n"
        chunks = '5\n{"nam\n8;x=y\ne": "a"}\n0\nTrailer: 1\n\n'
        assert b" 201 " in await ask(f"{head}Transfer-Encoding: chunked\n\n{chunks}", b"}")
        assert b" 100 " in await ask(f"{head}Expect: 100-continue\nContent-Length: 13\n\n", b"\r\n\r\n")
        assert b" 201 " in await ask('{"name": "b"}', b"}")
        await stream.send(b"GET /api/health HTTP/1.0\r\n\r\n")
        assert (await stream.receive()).endswith(b"true")
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
    assert [flow.name for flow in server.flows.values()] == ["a", "b"]


NONSENSE = [b"hello\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: many\r\n\r\n", b"x" * 70_000]


@pytest.mark.parametrize("nonsense", NONSENSE, ids=["no request", "no length", "no end"])
async def test_who_speaks_no_http_is_hung_up_on(server: PrefectApi, nonsense: bytes) -> None:
    async with await anyio.connect_tcp("127.0.0.1", server.port) as stream:
        with suppress(anyio.BrokenResourceError):
            await stream.send(nonsense)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stream.receive()
    assert not server.requests


# Events over a WebSocket

KEY, ACCEPT = "dGhlIHNhbXBsZSBub25jZQ==", b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The example of RFC 6455, 1.3."""


def frame(kind: int, data: bytes, final: bool = True) -> bytes:
    """As a client sends it: masked."""
    size, mask = len(data), b"\x01\x02\x03\x04"
    if size < 126:
        length = bytes([128 | size])
    else:
        length = bytes([254]) + size.to_bytes(2, "big") if size < 65536 else bytes([255]) + size.to_bytes(8, "big")
    masked = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
    return bytes([kind | (128 if final else 0)]) + length + mask + masked


@pytest.mark.parametrize(("token", "is_let_in"), [("me:secret", True), ("me:wrong", False), (None, False)])
async def test_events_come_over_a_socket_from_who_may_send_them(token: str | None, is_let_in: bool) -> None:
    handshake = ["GET /api/events/in HTTP/1.1", "Host: x", "Upgrade: websocket", "Connection: Upgrade"]
    handshake += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Protocol: prefect, other", "", ""]
    large, larger = ({"event": "large", "payload": "x" * size} for size in (1_000, 70_000))
    async with (
        PrefectApi.running(auth_string="me:secret") as api,
        await anyio.connect_tcp("127.0.0.1", api.port) as raw,
    ):
        stream = BufferedByteReceiveStream(raw)
        await raw.send("\r\n".join(handshake).encode())
        head = await stream.receive_until(b"\r\n\r\n", 4096)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"sec-websocket-accept: " + ACCEPT in head
        assert b"sec-websocket-protocol: prefect" in head.split(b"\r\n")
        await raw.send(frame(1, json.dumps({"type": "auth", "token": token}).encode()))
        if not is_let_in:
            with pytest.raises(anyio.IncompleteRead):
                await stream.receive_exactly(2)
            assert not api.events
            return
        success = json.dumps({"type": "auth_success"}).encode()
        assert await stream.receive_exactly(2 + len(success)) == bytes([129, len(success)]) + success
        await raw.send(frame(9, b"are you there?"))
        assert await stream.receive_exactly(16) == bytes([138, 14]) + b"are you there?"
        await raw.send(frame(10, b"unasked") + frame(1, b'{"event": ', final=False) + frame(0, b'"in parts"}'))
        for event in (large, larger):
            await raw.send(frame(1, json.dumps(event).encode()))
        await api.wait_for(lambda: len(api.events) == 3)
        await raw.send(frame(8, (1000).to_bytes(2, "big")))
        assert await stream.receive_exactly(4) == bytes([136, 2]) + (1000).to_bytes(2, "big")
        assert api.events == [{"event": "in parts"}, large, larger]


async def test_an_api_of_2_20_has_no_socket() -> None:
    async with PrefectApi.running("2.20.26") as api, httpx.AsyncClient(base_url=api.url) as client:
        assert (await client.get("/events/in", headers={"Upgrade": "websocket"})).status_code == 404


# A worker on it


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Beside]:
    monkeypatch.setenv("PYTHONPATH", str(fake_prefect(tmp_path / "prefect")))
    with serving() as api:
        api.add_pool(base_job_template=TEMPLATE)
        yield api


def test_what_is_due_is_seen_out_and_nothing_else(api: Beside) -> None:
    worker = WorkerBeside(api, limit=1)
    ids = [api.schedule(parameters={"do": do, "print": [do]}) for do in ("complete", "fail")]
    later, elsewhere = api.schedule(due_in=5), api.schedule(pool="other")

    first = worker.run_due()
    second = worker.run_due()

    assert [(run.id, run.state.type) for run in first] == [(ids[0], "COMPLETED")], "the limit is the worker's"
    assert [(run.id, run.state.type) for run in second] == [(ids[1], "FAILED")]
    assert worker.output == ["run-1 | complete", "run-2 | fail"]
    assert [api.run(id).state.type for id in (later, elsewhere)] == ["SCHEDULED"] * 2
    worker.pool = "other"
    assert [run.id for run in worker.run_due()] == [elsewhere]
    assert worker.run_due() == []


def test_what_takes_too_long_is_ended(api: Beside, no_survivors: Callable[[str], None]) -> None:
    id = api.schedule(parameters={"do": "sleep", "term": "ignore"})
    no_survivors(str(id))
    with pytest.raises(TimeoutError):
        WorkerBeside(api).run_due(timeout=2)
    assert api.wait_state(id, "CRASHED").message


def wait_gone(api: Beside, id: UUID) -> None:
    """Wait until the run's process was there and has ended."""
    deadline = time.monotonic() + 20
    while not (pid := api.run(id).infrastructure_pid) or psutil.pid_exists(int(pid.rpartition(":")[2])):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_works_for_the_length_of_a_block(api: Beside, no_survivors: Callable[[str], None]) -> None:
    worker = WorkerBeside(api)
    with worker.working():
        quick, slow = api.schedule(), api.schedule(parameters={"do": "sleep"})
        no_survivors(str(slow))
        api.wait_state(quick, "COMPLETED")
        api.wait_state(slow, "RUNNING")
        with api.outage():
            time.sleep(0.2)
        late = api.schedule()
        api.wait_state(late, "COMPLETED")
        wait_gone(api, late)  # else it would be ended with the worker, amid its last words
    assert api.run(slow).state.type == "CRASHED"
    assert [api.run(id).state.type for id in (quick, late)] == ["COMPLETED"] * 2


def test_a_worker_that_cannot_start_says_why(api: Beside) -> None:
    api.add_pool("docker", type="docker")
    with pytest.raises(ConfigurationError, match="'docker'"), WorkerBeside(api, "docker").working():
        pass


async def test_a_loop_of_ones_own_goes_on(api: Beside) -> None:
    ids: list[UUID] = [api.schedule(parameters={"seconds": 0.5})]
    ticks = 0
    async with anyio.create_task_group() as tasks:

        async def tick() -> None:
            nonlocal ticks
            while True:
                await anyio.sleep(0.05)
                ticks += 1

        tasks.start_soon(tick)
        done = await WorkerBeside(api).run_due_async()
        tasks.cancel_scope.cancel()
    assert [run.id for run in done] == ids
    assert ticks >= 5
    assert not [name for name in os.listdir(os.environ["TMPDIR"]) if name.startswith("procworker-")]
