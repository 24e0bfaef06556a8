"""Loops, logs, health: the small parts around the line."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest
from anyio.abc import SocketAttribute

from procworker import loops
from procworker.errors import ConfigurationError, Unauthorized, Unreachable, single
from procworker.health import health_server
from procworker.logs import RunLogger
from procworker.loops import Loop, Moved, jittered, patiently


def test_intervals_are_jittered_by_at_most_thirty_percent() -> None:
    drawn = [jittered(10) for _ in range(1000)]

    assert 7 <= min(drawn) < 8
    assert 12 < max(drawn) <= 13


async def test_a_loop_outlives_every_failure_and_says_so_less_and_less(caplog: pytest.LogCaptureFixture) -> None:
    turns = 0

    async def work() -> None:
        nonlocal turns
        turns += 1
        if turns <= 9:
            raise Unauthorized("token") if turns == 1 else Unreachable("down")

    loop = Loop("Work", work, lambda: 0)
    for _ in range(10):
        await loop.turn()

    assert loop.failures == 0
    assert loop.last_success is not None
    failures = [record for record in caplog.records if "failed" in record.message]
    assert [record.args[1] for record in failures] == [1, 2, 4, 8]  # type: ignore[index]
    assert failures[0].levelno == logging.ERROR
    assert failures[1].levelno == logging.WARNING


async def test_a_loop_can_be_woken() -> None:
    turned = anyio.Event()
    turns = 0

    async def work() -> None:
        nonlocal turns
        turns += 1
        turned.set()

    loop = Loop("Work", work, lambda: 3600)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(loop.run)
        await turned.wait()
        await anyio.wait_all_tasks_blocked()
        loop.wake()
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()

    assert turns == 2


async def test_patience_ends_with_any_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "jittered", lambda seconds: 0)
    answers: list[Any] = [Unreachable("a"), Unreachable("b"), 42]

    async def call() -> int:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    assert await patiently(call) == 42
    answers[:] = [Unreachable("a"), KeyError("final")]
    with pytest.raises(KeyError):
        await patiently(call)


async def test_waiters_look_again_at_every_change() -> None:
    moved, seen = Moved(), []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(moved.until, lambda: len(seen) >= 2)
        for number in range(2):
            await anyio.wait_all_tasks_blocked()
            seen.append(number)
            moved.notify()


def run_logger(shipped: list[dict[str, Any]], level: int = logging.INFO) -> RunLogger:
    return RunLogger({"flow_run_id": "1", "worker_name": "w"}, shipped.append, level)


def test_a_run_log_goes_to_logging_and_to_the_server(caplog: pytest.LogCaptureFixture) -> None:
    shipped: list[dict[str, Any]] = []
    caplog.set_level(logging.INFO, "prefect.flow_runs.worker")
    log = run_logger(shipped)

    log.info("state %s", "changed", extra={"more": 1})
    log.debug("too low")

    record = caplog.records[0]
    assert record.send_to_api is False  # type: ignore[attr-defined]
    assert (record.flow_run_id, record.more, record.funcName) == (  # type: ignore[attr-defined]
        "1",
        1,
        "test_a_run_log_goes_to_logging_and_to_the_server",
    )
    assert [(entry["message"], entry["level"], entry["name"]) for entry in shipped] == [
        ("state changed", logging.INFO, "prefect.flow_runs.worker")
    ]


def test_what_is_shipped_does_not_depend_on_the_hosts_logging() -> None:
    shipped: list[dict[str, Any]] = []
    logging.getLogger("prefect.flow_runs.worker").setLevel(logging.CRITICAL)
    try:
        run_logger(shipped).info("still shipped")
    finally:
        logging.getLogger("prefect.flow_runs.worker").setLevel(logging.NOTSET)

    assert shipped


def test_tracebacks_are_part_of_the_message() -> None:
    shipped: list[dict[str, Any]] = []
    log = run_logger(shipped)
    try:
        raise ValueError("deep")
    except ValueError as error:
        log.exception("it broke")
        log.error("it broke", exc_info=error)

    assert all("ValueError: deep" in entry["message"] for entry in shipped)


async def speak(port: int, data: bytes) -> bytes:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(data)
        answer = b""
        try:
            while True:
                answer += await stream.receive()
        except anyio.EndOfStream:
            return answer


async def test_the_health_server_answers_with_the_reason() -> None:
    async with health_server("127.0.0.1", 0, {"/health": lambda: None, "/ready": lambda: "not yet"}) as port:
        assert b"200 OK" in await speak(port, b"GET /health?x=1 HTTP/1.1\r\n\r\n")
        assert b'{"message": "not yet"}' in await speak(port, b"GET /ready HTTP/1.1\r\n\r\n")
        head = await speak(port, b"HEAD /health HTTP/1.1\r\n\r\n")
        assert b"200 OK" in head
        assert not head.endswith(b"}")
        assert b"404" in await speak(port, b"rubbish\r\n\r\n")
        assert b"404" in await speak(port, b"x" * 10_000 + b"\r\n\r\n")
        stream = await anyio.connect_tcp("127.0.0.1", port)
        await stream.aclose()  # one that hangs up at once costs nothing
        assert b"200 OK" in await speak(port, b"GET /health HTTP/1.1\r\n\r\n")


async def test_a_taken_port_is_a_configuration_error() -> None:
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as taken:
        port = taken.extra(SocketAttribute.local_port)
        with pytest.raises(ConfigurationError, match=f"127.0.0.1:{port}"):
            async with health_server("127.0.0.1", port, {}):
                pass


def test_groups_of_one_are_unwrapped() -> None:
    class Group(Exception):
        def __init__(self, *exceptions: Exception) -> None:
            self.exceptions = exceptions

    inner = KeyError()
    assert single(Group(Group(inner))) is inner
    pair = Group(inner, inner)
    assert single(pair) is pair
