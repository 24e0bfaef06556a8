"""One place speaks HTTP: what it sends, what it tries again, what it refuses to believe."""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from anyio.abc import ByteStream
from anyio.streams.tls import TLSListener
from hypothesis import given, strategies

from procworker import __version__
from procworker.errors import (
    ApiError,
    ConfigurationError,
    ObjectNotFound,
    Rejected,
    Unauthorized,
    Unreachable,
)
from procworker.redaction import STARS
from procworker.server.connection import _is_direct
from procworker.server.http import Http, _retry_after
from procworker.settings import Settings
from procworker.testing.api import PrefectApi
from procworker.testing.messages import Fault

Handler = Callable[[ByteStream], Awaitable[None]]


def settings(url: str | None, **values: str) -> Settings:
    environ = {f"PREFECT_{name.upper()}": value for name, value in values.items()}
    return Settings.load({**environ, **({"PREFECT_API_URL": url} if url else {})}, cwd=Path("/nowhere"))


@asynccontextmanager
async def talking(url: str, headers: dict[str, str] | None = None, **values: str) -> AsyncIterator[Http]:
    """An Http that does not take its time between attempts."""
    async with Http(settings(url, **values), headers=headers or {}) as http:
        http.first_pause = 0.01
        yield http


@asynccontextmanager
async def raw_server(
    handler: Handler, context: ssl.SSLContext | None = None, *, unread: bool = False
) -> AsyncIterator[str]:
    """Hand every connection, once its first request has come, to the handler; or unread."""

    async def converse(stream: ByteStream) -> None:
        try:
            async with stream:
                if not unread:
                    await stream.receive()
                await handler(stream)
        except (anyio.BrokenResourceError, anyio.EndOfStream, anyio.ClosedResourceError, ssl.SSLError):
            pass

    listener: Any = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    if context:
        listener = TLSListener(listener, context, standard_compatible=False)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, converse)
        yield f"http{'s' if context else ''}://127.0.0.1:{port}/api"
        tasks.cancel_scope.cancel()


def answering(text: str) -> Handler:
    async def answer(stream: ByteStream) -> None:
        await stream.send(text.replace("\n", "\r\n").encode())

    return answer


async def said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until this has been logged."""
    with anyio.fail_after(5):
        while text not in caplog.text:  # noqa: ASYNC110
            await anyio.sleep(0.01)


OK = "HTTP/1.1 200 OK\nContent-Length: 4\nConnection: close\n\ntrue"


# What is sent


async def test_every_request_says_who_asks_and_in_which_version(server: PrefectApi) -> None:
    async with talking(server.url) as http:
        await http.request("POST", "/flows/", json={"name": "é"})
    headers = server.seen("POST")[0].headers
    assert headers["user-agent"] == f"procworker/{__version__}"
    assert headers["x-prefect-api-version"] == "0.8.4"
    assert headers["content-type"] == "application/json"
    assert server.seen("POST")[0].json == {"name": "é"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"api_key": "pnu_1"}, "Bearer pnu_1"),
        ({"api_auth_string": "me:it"}, "Basic bWU6aXQ="),
        ({"api_key": "pnu_1", "api_auth_string": "me:it"}, "Basic bWU6aXQ="),
        ({"api_key": "pnu_1", "client_custom_headers": '{"AUTHORIZATION": "mine"}'}, "mine"),
    ],
)
async def test_custom_headers_win_over_basic_auth_and_basic_auth_over_the_key(
    server: PrefectApi, values: dict[str, str], expected: str | None
) -> None:
    async with talking(server.url, **values) as http:
        await http.request("GET", "/health")
    assert server.requests[0].headers.get("authorization") == expected


@pytest.mark.parametrize("redirected", [False, True])
async def test_no_header_is_sent_twice(redirected: bool) -> None:
    asked: list[str] = []

    async def handle(stream: ByteStream) -> None:
        asked.append((await stream.receive()).decode("latin-1"))
        moved = "307 Moved\r\nLocation: /there" if redirected and len(asked) == 1 else "200 OK"
        await stream.send(f"HTTP/1.1 {moved}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    names = ("Host", "Accept", "Accept-Encoding", "Content-Type", "Content-Length", "Transfer-Encoding", "X-Api-Key")
    custom = json.dumps(dict.fromkeys(names, "mine"))
    options = {"client_custom_headers": custom, "client_csrf_support_enabled": "false"}
    async with raw_server(handle, unread=True) as url, talking(url, **options) as http:
        await http.request("POST", "/flows/", json={"name": "x"})
    for head in (text.partition("\r\n\r\n")[0] for text in asked):
        lines = [line.partition(": ") for line in head.lower().split("\r\n")[1:]]
        fields = {name: value for name, _, value in lines}
        assert len(fields) == len(lines)
        assert (fields["accept"], fields["x-api-key"], fields["content-length"]) == ("mine", "mine", "13")
        assert fields["content-type"] == "application/json"
        assert "transfer-encoding" not in fields
    assert len(asked) == 1 + redirected


async def test_our_name_and_the_csrf_headers_cannot_be_customised(
    server: PrefectApi, caplog: pytest.LogCaptureFixture
) -> None:
    custom = '{"User-Agent": "prefect/3.0.0", "Prefect-Csrf-Token": "x", "X-Team": " data "}'
    async with talking(server.url, client_custom_headers=custom) as http:
        await http.request("GET", "/health")
    headers = server.requests[0].headers
    assert headers["user-agent"].startswith("procworker/")
    assert "prefect-csrf-token" not in headers
    assert headers["x-team"] == "data"
    assert [record.getMessage().split()[1] for record in caplog.records] == [
        "User-Agent",
        "Prefect-Csrf-Token",
    ]


@pytest.mark.parametrize("values", [{"api_key": "se\ncret"}, {"client_custom_headers": '{"X": "se\\u00e9cret"}'}])
async def test_a_value_that_http_forbids_is_a_configuration_error_that_does_not_show_it(
    values: dict[str, str],
) -> None:
    with pytest.raises(ConfigurationError, match=r"header '(authorization|x)'") as caught:
        async with talking("http://127.0.0.1:1/api", **values):
            ...
    assert "cret" not in str(caught.value)


async def test_a_worker_name_that_http_forbids_is_left_out(server: PrefectApi) -> None:
    names = {"X-Prefect-Worker-Name": "Jürgen", "X-Prefect-Worker-Id": " 17\t"}
    async with talking(server.url, headers=names) as http:
        await http.request("GET", "/health")
    headers = server.requests[0].headers
    assert "x-prefect-worker-name" not in headers
    assert headers["x-prefect-worker-id"] == "17"


async def test_text_that_is_no_unicode_does_not_stop_the_rest(server: PrefectApi) -> None:
    async with talking(server.url) as http:
        await http.request("POST", "/flows/", json={"name": "caf\udce9 é"})
    assert server.seen("POST")[0].json == {"name": "caf? é"}


# What an answer means


@pytest.mark.parametrize(
    ("status", "kind", "attempts"),
    [
        (400, Rejected, 1),
        (401, Unauthorized, 1),
        (403, Unauthorized, 1),
        (404, ObjectNotFound, 1),
        (405, Rejected, 1),
        (408, Unreachable, 3),
        (409, Rejected, 1),
        (413, Rejected, 1),
        (418, Rejected, 3),
        (422, Rejected, 1),
        (429, Unreachable, 3),
        (500, Unreachable, 1),
        (502, Unreachable, 3),
        (503, Unreachable, 3),
        (504, Unreachable, 1),
        (302, Unreachable, 1),
    ],
)
async def test_a_status_becomes_what_the_caller_can_do_and_only_passing_ones_are_retried(
    server: PrefectApi, status: int, kind: type[ApiError], attempts: int
) -> None:
    body = '{"detail": "why\\n\\u001b[31mnot"}' if kind in (Rejected, ObjectNotFound) else "why\n\x1b[31mnot"
    fault = server.fault("GET", "/health", status=status, body=body, times=9)
    async with talking(server.url, client_retry_extra_codes="418") as http:
        with pytest.raises(ApiError) as caught:
            await http.request("GET", "/health", retries=2)
    assert type(caught.value) is kind
    assert caught.value.status_code == status
    assert str(caught.value).startswith(f"GET /health: {status}")
    assert "why" in str(caught.value)
    assert "[31mnot" in str(caught.value)
    assert str(caught.value).isprintable()
    assert fault.count == attempts


@pytest.mark.parametrize("status", [400, 404, 405, 409, 410, 422])
@pytest.mark.parametrize("body", ["<html>no such host</html>", "404 page not found"])
async def test_a_refusal_that_is_not_the_apis_says_nothing_about_the_request(
    server: PrefectApi, status: int, body: str
) -> None:
    server.fault("GET", "/health", status=status, body=body)
    async with talking(server.url) as http:
        with pytest.raises(Unreachable):
            await http.request("GET", "/health", retries=0)


@pytest.mark.parametrize("status", [413, 414, 431])
async def test_what_is_too_large_for_somebody_in_between_will_not_get_smaller(server: PrefectApi, status: int) -> None:
    server.fault("GET", "/health", status=status, body="<html>too large</html>")
    async with talking(server.url) as http:
        with pytest.raises(Rejected):
            await http.request("GET", "/health", retries=0)


@pytest.mark.parametrize(
    "body", ["<html>\n<h1>Sign in</h1>", '{"a": ', "[" * 100_000, b"\xff\xfe\x00", "9" * 5000], ids=range(5)
)
async def test_an_answer_that_is_not_json_is_asked_for_once_more_and_then_unreachable(
    server: PrefectApi, body: str | bytes
) -> None:
    fault = server.fault(body=body, times=9)
    async with talking(server.url) as http:
        with pytest.raises(Unreachable, match=r"^GET /health: 200, but the body is no use: ") as caught:
            await http.request("GET", "/health")
    assert fault.count == 2
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


async def test_an_empty_answer_is_none(server: PrefectApi) -> None:
    server.fault(status=204)
    async with talking(server.url) as http:
        assert await http.request("GET", "/health") is None


async def test_no_error_shows_a_secret(server: PrefectApi) -> None:
    echo = "you sent Basic bWU6cGFzc3dvcmQ= which is me:password, and x-secret: hush-hush"
    server.fault(status=400, body=json.dumps({"detail": echo}))
    custom = '{"X-Secret": "hush-hush"}'
    async with talking(server.url, api_auth_string="me:password", client_custom_headers=custom) as http:
        with pytest.raises(Rejected) as caught:
            await http.request("GET", "/health")
    assert "you sent Basic ***" in str(caught.value)
    assert not any(secret in str(caught.value) for secret in ("bWU6", "password", "hush-hush"))


@pytest.mark.parametrize(
    "answer",
    [
        "HTTP/1.1 400 no {0}\nContent-Length: 0",
        "HTTP/1.1 400 Bad\nLocation: /?p={0}\nContent-Length: 0",
        "HTTP/1.1 400 Bad\nContent-Length: 22\n\n{{{0}             ",
        "{0}",
        'HTTP/1.1 200 OK\n"quoted" {0}',
    ],
)
@pytest.mark.parametrize("secret", ["p\u00e4ssw\u00f6rd", "it's secret"])
async def test_a_secret_of_other_letters_is_none_the_less_one(answer: str, secret: str) -> None:
    handler = answering(f"{answer.format(secret)}\nConnection: close\n\n")
    async with raw_server(handler) as url, talking(url, api_auth_string=f"me:{secret}") as http:
        with pytest.raises(ApiError, match=r"\*\*\*") as caught:
            await http.request("GET", "/flows/", retries=0)
    assert not any(part in str(caught.value) for part in (secret[2:], "ssw", "secret"))


@pytest.mark.parametrize("before", ["", " ", "\ufeff", "hush", "["])
async def test_what_the_api_says_in_confidence_is_in_no_error(server: PrefectApi, before: str) -> None:
    server.fault("GET", "/csrf-token", body=f'{before}{{"token": "hush", "expiration": "2026-11-30T00:00:00"}}')
    async with talking(server.url) as http:
        with pytest.raises(Unreachable, match="the body is no use") as caught:
            await http.request("POST", "/flows/", json={"name": "x"}, retries=0)
    assert "hush" not in str(caught.value)


async def test_a_long_route_hides_nothing(server: PrefectApi) -> None:
    pool = "/work_pools/" + "%E6%97%A5" * 100
    server.fault("GET", status=503, body="busy")
    async with talking(server.url) as http:
        with pytest.raises(Unreachable, match="503: busy"):
            await http.request("GET", pool, retries=0)


async def test_no_error_is_longer_than_a_few_lines() -> None:
    answer = f"HTTP/1.1 400 {'x' * 60_000}\nContent-Length: 1000\nConnection: close\n\n{'y' * 1000}"
    async with raw_server(answering(answer)) as url, talking(url) as http:
        with pytest.raises(ApiError) as caught:
            await http.request("GET", "/flows/", retries=0)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("before", range(10))
async def test_nor_does_an_error_show_a_part_of_one(before: int) -> None:
    secret = "abcdefghijklmnopqrstuvwxyz"
    fill = "x" * (30 + before)
    answers = {
        "location": f"HTTP/1.1 400 Bad\nLocation: /{'x' * 150}{fill}{secret}\nContent-Length: 0",
        "status": f"{fill}{secret}\nContent-Length: 0",
        "header": f"HTTP/1.1 200 OK\n{fill} {secret}",
        "length": f"HTTP/1.1 200 OK\nContent-Length: {fill} {secret}",
        "coding": f"HTTP/1.1 200 OK\nTransfer-Encoding: {fill} {secret}",
        "chunk": f"HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n{fill} {secret}",
        "body": f"HTTP/1.1 400 Bad\nContent-Length: 2400\n\n{{{' ' * (1980 + before)}{secret}{' ' * 400}",
    }
    for name, answer in answers.items():
        handler = answering(f"{answer}\nConnection: close\n\n")
        async with raw_server(handler) as url, talking(url, api_key=secret) as http:
            with pytest.raises(ApiError) as caught:
                await http.request("GET", "/flows/", retries=0)
        assert secret[:4] not in str(caught.value), name
        assert (name == "body") == (STARS not in str(caught.value)), name


# What is tried again, and when


@pytest.mark.parametrize(
    "fault",
    [{"reset": True}, {"truncate": 2}, {"hang": True}, {"status": 503}, {"body": "<html>"}],
    ids=lambda fault: next(iter(fault)),
)
async def test_one_mishap_is_not_noticed(server: PrefectApi, fault: dict[str, Any]) -> None:
    server.fault(**fault)
    async with talking(server.url, api_request_timeout="0.3") as http:
        assert await http.request("GET", "/health") is True
    assert len(server.requests) == 2


@pytest.mark.parametrize("fault", [{"reset": True}, {"truncate": 2}, {"hang": True}])
async def test_no_answer_at_all_is_unreachable(server: PrefectApi, fault: dict[str, Any]) -> None:
    server.fault(times=9, **fault)
    async with talking(server.url, api_request_timeout="0.1") as http:
        with pytest.raises(Unreachable, match=r"^GET /health: ") as caught:
            await http.request("GET", "/health", retries=1)
    assert caught.value.status_code is None
    assert len(server.requests) == 2


async def test_where_nothing_ever_answered_a_refused_connection_fails_at_once(server: PrefectApi) -> None:
    await server.down()
    async with talking(server.url) as http:
        http.first_pause = 60
        with anyio.fail_after(5), pytest.raises(Unreachable, match="GET /health: ConnectError"):
            await http.request("GET", "/health")


async def test_a_server_that_answered_before_is_waited_for(server: PrefectApi) -> None:
    async with talking(server.url, client_max_retries="99") as http, anyio.create_task_group() as tasks:
        await http.request("GET", "/health")
        await server.down()
        tasks.start_soon(http.request, "GET", "/ready")
        await anyio.wait_all_tasks_blocked()
        await server.up()
        await server.wait_request("GET", "/ready")


@pytest.mark.parametrize("url", ["http://no-such-host.invalid/api", f"http://{'x' * 64}.test/api"])
async def test_a_host_that_does_not_exist_is_unreachable(url: str) -> None:
    async with talking(url) as http:
        with pytest.raises(Unreachable, match=r"^GET /health: "):
            await http.request("GET", "/health")


async def test_retry_after_is_obeyed(server: PrefectApi) -> None:
    server.fault(status=429, headers={"Retry-After": "0.3"})
    async with talking(server.url) as http:
        await http.request("GET", "/health")
    first, second = server.requests
    assert 0.3 <= second.time - first.time < 0.3 * 1.2 + 0.5


@pytest.mark.parametrize(
    ("value", "pause"),
    [
        ("7", 7),
        (format_datetime(datetime.now(timezone.utc) + timedelta(days=1), usegmt=True), 60),
        ("86400", 60),
        ("soon", 9),
        ("-1", 9),
        ("nan", 9),
        ("1e999", 9),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 9),
        ("", 9),
    ],
)
async def test_retry_after_may_be_seconds_or_a_date_is_capped_and_nonsense_is_ignored(
    server: PrefectApi, caplog: pytest.LogCaptureFixture, value: str, pause: float
) -> None:
    caplog.set_level(logging.DEBUG, "procworker")
    server.fault(status=503, headers={"Retry-After": value}, times=9)
    async with (
        talking(server.url, client_retry_jitter_factor="0") as http,
        anyio.create_task_group() as tasks,
    ):
        http.first_pause = 9
        tasks.start_soon(http.request, "GET", "/health")
        await server.wait_for(lambda: server.requests and server.requests[0].status)
        await said(caplog, "trying again")
        tasks.cancel_scope.cancel()
    assert f"trying again in {pause} s" in caplog.text


@given(strategies.text() | strategies.from_regex(r"[A-Za-z0-9 ,:+-]*"))
def test_no_retry_after_breaks_anything(value: str) -> None:
    pause = _retry_after(value)
    assert pause is None or pause >= 0


async def test_pauses_double_up_to_ten_seconds_with_jitter_that_can_be_switched_off(server: PrefectApi) -> None:
    from procworker.server.http import _Passing

    failure = _Passing(Unreachable("x"))
    async with Http(settings(server.url, client_retry_jitter_factor="0")) as http:
        pauses = [http._pause(failure, attempts) for attempts in (1, 2, 3, 4, 5, 6, 5000)]
    assert pauses == [2, 4, 8, 10, 10, 10, 10]
    async with Http(settings(server.url)) as http:
        drawn = {http._pause(failure, 2) for _ in range(50)}
    assert len(drawn) > 1
    assert all(3.2 <= pause <= 4.8 for pause in drawn)


async def test_maintenance_costs_no_retry_and_is_remembered(server: PrefectApi) -> None:
    maintenance = {"Prefect-Maintenance": "true", "Retry-After": "0"}
    server.fault(status=503, headers=maintenance, times=4)
    async with talking(server.url) as http:
        assert http.maintenance_ends_at is None
        assert await http.request("GET", "/health", retries=1) is True
        assert http.maintenance_ends_at is not None
        assert http.maintenance_ends_at <= anyio.current_time()


async def test_maintenance_ends_a_call_that_allows_no_retry_or_has_a_deadline(server: PrefectApi) -> None:
    fault = server.fault(status=503, headers={"Prefect-Maintenance": "true", "Retry-After": "500"}, times=9)
    async with talking(server.url) as http:
        with anyio.fail_after(5):
            with pytest.raises(Unreachable):
                await http.request("GET", "/health", retries=0)
            with pytest.raises(Unreachable):
                await http.request("GET", "/health", deadline=anyio.current_time() + 100)
        assert http.maintenance_ends_at is not None
        assert http.maintenance_ends_at > anyio.current_time() + 400
    assert fault.count == 2


async def test_no_retry_starts_after_the_deadline_but_an_attempt_under_way_is_finished(
    server: PrefectApi,
) -> None:
    slow = server.fault(delay=0.4)
    async with talking(server.url) as http:
        assert await http.request("GET", "/health", deadline=anyio.current_time() + 0.1) is True
        assert slow.count == 1
        late = server.fault(status=503, delay=0.2, times=9)
        with pytest.raises(Unreachable):
            await http.request("GET", "/health", deadline=anyio.current_time() + 0.1)
        assert late.count == 1


# What is bounded


async def test_an_answer_that_comes_byte_by_byte_does_not_last_forever() -> None:
    async def drip(stream: ByteStream) -> None:
        await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            await stream.send(b" ")
            await anyio.sleep(0.05)

    async with raw_server(drip) as url, talking(url, api_request_timeout="0.2") as http:
        with anyio.fail_after(2), pytest.raises(Unreachable, match=r"no answer within 0\.2 s"):
            await http.request("GET", "/health", retries=0)


async def announced(stream: ByteStream) -> None:
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Length: 67108865\r\n\r\n")
    await anyio.sleep_forever()


async def endless(stream: ByteStream) -> None:
    await stream.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send(b"100000\r\n" + b" " * 0x100000 + b"\r\n")


async def bomb(stream: ByteStream) -> None:
    body = gzip.compress(bytes(70 * 1024 * 1024), 1)
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body))
    await stream.send(body)


async def twice_packed(stream: ByteStream) -> None:
    body = gzip.compress(gzip.compress(bytes(70 * 1024 * 1024), 1), 1)
    await stream.send(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n" % len(body))
    await stream.send(body)


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip,identity"])
@pytest.mark.parametrize("moved", [False, True])
async def test_an_encoding_that_nobody_asked_for_is_refused(encoding: str, moved: bool) -> None:
    async def handle(stream: ByteStream) -> None:
        if moved and b"/there" not in await stream.receive():
            await stream.send(b"HTTP/1.1 307 Moved\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n")
        else:
            head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: 2\r\n\r\n[]"
            await stream.send(head.encode())

    async with raw_server(handle, unread=moved) as url, talking(url) as http:
        with pytest.raises(Unreachable, match=f"nobody asked for content encoding {encoding}"):
            await http.request("GET", "/flows/", retries=0)


async def test_a_length_that_is_no_number_for_python_is_too_much_as_well() -> None:
    async def handle(stream: ByteStream) -> None:
        head = (
            f"HTTP/1.1 303 Other\r\nLocation: /\r\nTransfer-Encoding: chunked\r\nContent-Length: {'9' * 5000}\r\n\r\n"
        )
        await stream.send(f"{head}0\r\n\r\n".encode())

    async with raw_server(handle) as url, talking(url, client_csrf_support_enabled="false") as http:
        with pytest.raises(Unreachable, match="the body is larger than 64 MiB"):
            await http.request("POST", "/flows/", json={}, retries=0)


@pytest.mark.parametrize("way", ["/flows/", "/moved"])
async def test_a_body_that_is_encoded_twice_is_not_unpacked(way: str) -> None:
    async def handle(stream: ByteStream) -> None:
        if b"/moved" in await stream.receive():
            await stream.send(b"HTTP/1.1 307 Moved\r\nLocation: /flows/\r\nContent-Length: 0\r\n\r\n")
        else:
            await twice_packed(stream)

    async with raw_server(handle, unread=True) as url, talking(url) as http:
        with pytest.raises(Unreachable, match="nobody asked for content encoding gzip, gzip"):
            await http.request("GET", way, retries=0)


async def test_all_waits_of_an_attempt_are_bounded_as_one() -> None:
    async def slow(stream: ByteStream) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Slow: %b\r\n\r\n" % (b"x" * 500):
            await stream.send(bytes([byte]))
            await anyio.sleep(0.01)

    async def ask(http: Http) -> None:
        with pytest.raises(Unreachable, match=r"no answer within 0\.5 s"):
            await http.request("POST", "/flows/", json={}, retries=0)

    async with raw_server(slow) as url, talking(url, api_request_timeout="0.5") as http:
        began = anyio.current_time()
        async with anyio.create_task_group() as tasks:  # each waits for the token of the one before
            for _ in range(4):
                tasks.start_soon(ask, http)
        assert anyio.current_time() - began < 2


@pytest.mark.parametrize("handler", [announced, endless, bomb])
async def test_a_body_over_64_mib_is_not_read_and_not_asked_for_again(handler: Handler) -> None:
    calls: list[Handler] = []

    async def counted(stream: ByteStream) -> None:
        calls.append(handler)
        await handler(stream)

    async with raw_server(counted) as url, talking(url) as http:
        with pytest.raises(Unreachable, match="GET /health: OverflowError: the body is larger than 64 MiB"):
            await http.request("GET", "/health")
    assert len(calls) == 1


# Where it goes


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_redirect_to_another_origin_carries_no_credentials(server: PrefectApi, host: str) -> None:
    other = server.url.replace("127.0.0.1", host)
    away = f"HTTP/1.1 307 Moved\nLocation: {other}/health\nContent-Length: 0\nConnection: close\n\n"
    custom = '{"X-Access": "token-1", "Authorization": "mine", "Host": "elsewhere"}'
    async with raw_server(answering(away)) as url, talking(url, client_custom_headers=custom) as http:
        assert await http.request("GET", "/health") is True
    assert not {"authorization", "x-access"} & server.requests[0].headers.keys()
    assert server.requests[0].headers["host"] in other


@pytest.mark.parametrize("encoding", ["gzip", "gzip, gzip", "br"])
async def test_the_body_of_a_redirect_is_not_unpacked(server: PrefectApi, encoding: str) -> None:
    async def handle(stream: ByteStream) -> None:
        head = f"307 Moved\r\nLocation: {server.url}/health\r\nContent-Encoding: {encoding}\r\nContent-Length: 5"
        await stream.send(f"HTTP/1.1 {head}\r\n\r\nplain".encode())

    async with raw_server(handle) as url, talking(url) as http:
        assert await http.request("GET", "/health", retries=0) is True


async def test_a_csrf_token_goes_along_where_all_is_redirected(guarded: PrefectApi) -> None:
    other = guarded.url.replace("127.0.0.1", "localhost").removesuffix("/api")

    async def handle(stream: ByteStream) -> None:
        target = (await stream.receive()).split()[1].decode()
        answer = f"HTTP/1.1 307 Moved\r\nLocation: {other}{target}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        await stream.send(answer.encode())

    async with raw_server(handle, unread=True) as url, talking(url) as http:
        await create(http)
        await create(http)
    assert [request.status for request in guarded.requests] == [200, 201, 200]


@pytest.mark.parametrize("location", ["http://localhost:99999/x", "http://127.0.0.1:99999/x", "http://[::1", "//:9x/"])
async def test_a_redirect_to_nowhere_is_unreachable(location: str) -> None:
    away = f"HTTP/1.1 307 Moved\nLocation: {location}\nContent-Length: 0\nConnection: close\n\n"
    async with raw_server(answering(away)) as url, talking(url) as http:
        with pytest.raises(Unreachable):
            await http.request("GET", "/health", retries=0)


@pytest.mark.parametrize(
    "more",
    ["X-Name: caf\xe9", "Content-Encoding: gzip", "Content-Encoding: nonsense", "Content-Encoding: gzip, gzip"],
)
async def test_what_else_a_redirect_says_does_not_matter(server: PrefectApi, more: str) -> None:
    away = f"HTTP/1.1 307 Moved\r\nLocation: {server.url}/health\r\n{more}\r\nContent-Length: 0\r\n\r\n"

    async def handle(stream: ByteStream) -> None:
        await stream.send(away.encode("latin-1"))

    async with raw_server(handle) as url, talking(url) as http:
        assert await http.request("GET", "/health", retries=0) is True


async def test_a_redirect_on_the_same_origin_keeps_credentials(server: PrefectApi) -> None:
    server.fault(path="/health", status=307, headers={"Location": "/api/ready"})
    async with talking(server.url, api_key="pnu_1") as http:
        assert await http.request("GET", "/health") == {"message": "OK"}
    assert server.seen("GET", "/ready")[0].headers["authorization"] == "Bearer pnu_1"


async def test_a_change_is_never_redirected_into_a_read(server: PrefectApi) -> None:
    server.fault("POST", status=301, headers={"Location": "https://prefect.test/api/flows/"})
    async with talking(server.url) as http:
        with pytest.raises(Unreachable, match=r"301 to https://prefect.test/api/flows/$"):
            await http.request("POST", "/flows/", json={"name": "x"})


async def test_redirects_that_do_not_end_are_unreachable(server: PrefectApi) -> None:
    fault = server.fault(status=307, headers={"Location": "/api/health"}, times=99)
    async with talking(server.url) as http:
        with pytest.raises(Unreachable, match="too many redirects"):
            await http.request("GET", "/health")
    assert fault.count == 5


async def test_a_proxy_from_the_environment_is_used(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url.removesuffix("/api"))
    monkeypatch.setenv("no_proxy", "elsewhere.test")
    async with talking("http://prefect.test/api") as http:
        assert await http.request("GET", "/health") is True
    assert server.requests[0].headers["host"] == "prefect.test"


async def test_no_proxy_leads_to_this_computer(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with talking(server.url) as http:
        assert await http.request("GET", "/health") is True


@pytest.mark.parametrize(
    ("no_proxy", "host", "direct"),
    [
        ("*.corp.test", "api.corp.test", True),
        (".corp.test", "api.corp.test", True),
        ("corp.test", "corp.test", True),
        ("corp.test", "xcorp.test", False),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("corp.test", "10.1.2.3", False),
        ("fd00::/8, 10.0.0.1", "fd00::17", True),
        ("fd00::/8, 10.0.0.1", "10.0.0.1", True),
        ("", "prefect.test", False),
        ("", "localhost", True),
        ("", "::1", True),
    ],
)
def test_no_proxy_knows_domains_and_networks(
    monkeypatch: pytest.MonkeyPatch, no_proxy: str, host: str, direct: bool
) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert _is_direct(host) is direct


async def test_a_proxy_that_cannot_be_used_is_told_where_a_redirect_needs_it(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:password@127.0.0.1")
    server.fault("GET", "/health", status=307, headers={"Location": "https://prefect.test/api/health"})
    async with talking(server.url) as http:
        with pytest.raises(ConfigurationError, match="proxy"):
            await http.request("GET", "/health", retries=0)


async def test_credentials_in_the_url_are_sent(server: PrefectApi) -> None:
    async with talking(server.url.replace("http://", "http://me:pass%40word@")) as http:
        await http.request("GET", "/health")

    assert server.requests[-1].headers["authorization"] == "Basic bWU6cGFzc0B3b3Jk"


@pytest.mark.parametrize("proxy", ["http://me:password@proxy.test:x", "socks5://me:password@127.0.0.1"])
async def test_a_proxy_that_cannot_be_used_is_a_configuration_error(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    with pytest.raises(ConfigurationError, match="proxy"):
        async with talking("http://prefect.test/api"):
            ...


async def test_without_an_api_url_there_is_nothing_to_talk_to() -> None:
    with pytest.raises(ConfigurationError, match="set PREFECT_API_URL"):
        async with Http(settings(None)):
            ...


# TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that is its own authority, and its key, in one file."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    place = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run([*command.split(), *files], cwd=place, check=True, capture_output=True)
    both = place / "both.pem"
    both.write_text((place / "cert.pem").read_text() + (place / "key.pem").read_text())
    return both


@pytest.fixture
async def https(certificate: Path) -> AsyncIterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with raw_server(answering(OK), context) as url:
        yield url


async def test_a_certificate_of_an_unknown_authority_is_refused_with_a_hint(https: str) -> None:
    async with talking(https) as http:
        with pytest.raises(Unreachable, match=r"CERTIFICATE_VERIFY_FAILED.*PREFECT_API_SSL_CERT_FILE"):
            await http.request("GET", "/health")


async def test_the_authority_can_be_named_or_the_check_be_skipped(https: str, certificate: Path) -> None:
    for values in ({"api_ssl_cert_file": str(certificate)}, {"api_tls_insecure_skip_verify": "true"}):
        async with talking(https, **values) as http:
            assert await http.request("GET", "/health") is True


async def test_a_redirect_from_plain_http_is_verified_too(
    https: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = f"HTTP/1.1 307 Moved\nLocation: {https}/health\nContent-Length: 0\nConnection: close\n\n"
    async with raw_server(answering(away)) as url:
        async with talking(url) as http:
            with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
                await http.request("GET", "/health", retries=0)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with talking(url) as http:
            assert await http.request("GET", "/health") is True


async def test_a_missing_ca_file_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match=r"PREFECT_API_SSL_CERT_FILE /nowhere/ca\.pem cannot be used"):
        async with talking("https://127.0.0.1:1/api", api_ssl_cert_file="/nowhere/ca.pem"):
            ...


# CSRF


@pytest.fixture
async def guarded() -> AsyncIterator[PrefectApi]:
    """A server that wants CSRF tokens."""
    async with PrefectApi.running(csrf=True) as server:
        yield server


async def create(http: Http) -> None:
    await http.request("POST", "/flows/", json={"name": "x"})


async def test_one_token_serves_all_changes_even_if_they_start_together(guarded: PrefectApi) -> None:
    async with talking(guarded.url) as http:
        await http.request("GET", "/health")
        assert not guarded.seen("GET", "/csrf-token")
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(create, http)
        await create(http)
    assert len(guarded.seen("GET", "/csrf-token")) == 1
    assert [request.status for request in guarded.seen("POST")] == [201] + 5 * [200]


async def test_a_token_that_the_server_forgot_is_replaced_even_where_no_retry_is_allowed(
    guarded: PrefectApi,
) -> None:
    async with talking(guarded.url) as http:
        await create(http)
        guarded.csrf_tokens.clear()
        await http.request("POST", "/flows/", json={"name": "x"}, retries=0)
    assert [request.status for request in guarded.seen("POST")] == [201, 403, 200]


async def test_of_those_who_are_refused_together_one_fetches_a_new_token(guarded: PrefectApi) -> None:
    async with talking(guarded.url) as http:
        await create(http)
        guarded.csrf_tokens.clear()
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(create, http)
    assert len(guarded.seen("GET", "/csrf-token")) == 2


async def test_an_expired_token_is_not_used(guarded: PrefectApi) -> None:
    past = (datetime.now(timezone.utc) - timedelta(seconds=1)).isoformat()
    guarded.fault("GET", "/csrf-token", body=f'{{"token": "old", "expiration": "{past}"}}')
    async with talking(guarded.url) as http:
        await create(http)
        await create(http)
    assert len(guarded.seen("GET", "/csrf-token")) == 2


async def test_a_token_that_is_never_accepted_is_unreachable(guarded: PrefectApi) -> None:
    guarded.fault("POST", status=403, body='{"detail": "Invalid CSRF token or client identifier."}', times=9)
    async with talking(guarded.url) as http:
        with pytest.raises(Unreachable, match="Invalid CSRF token"):
            await create(http)
    assert len(guarded.seen("POST")) == 2


async def test_a_broken_token_is_asked_for_again(guarded: PrefectApi) -> None:
    guarded.fault("GET", "/csrf-token", body='{"token": 1}')
    async with talking(guarded.url) as http:
        await create(http)
    assert guarded.seen("POST")[0].status == 201


async def test_a_server_that_begins_to_want_tokens_gets_them(server: PrefectApi) -> None:
    async with talking(server.url) as http:
        await create(http)
        server.csrf = True
        await create(http)
    assert [request.status for request in server.seen("POST")] == [201, 403, 200]


@pytest.mark.parametrize("fault", [None, Fault(status=404)])
async def test_a_server_without_csrf_is_asked_once(server: PrefectApi, fault: Fault | None) -> None:
    if fault:
        server.fault("GET", "/csrf-token", status=404)
    async with talking(server.url) as http:
        await create(http)
        await create(http)
    assert len(server.seen("GET", "/csrf-token")) == 1


@pytest.mark.parametrize("values", [{"cloud_api_url": "http"}, {"client_csrf_support_enabled": "false"}])
async def test_cloud_is_never_asked_for_a_token_nor_is_anybody_where_that_is_off(
    server: PrefectApi, values: dict[str, str]
) -> None:
    async with talking(server.url, **values) as http:
        await create(http)
    assert not server.seen("GET", "/csrf-token")


@pytest.mark.parametrize("date", ["Mon, 01 Jan 99999999999 00:00:00 GMT", "?", ""])
async def test_a_date_that_is_none_tells_nothing_of_the_clock(server: PrefectApi, date: str) -> None:
    async with talking(server.url) as http:
        server.fault("GET", status=200, body="true", headers={"Date": date})
        await http.request("GET", "/health")
        assert http.clock_offset is None
        server.fault("GET", status=200, body="true", headers={"Date": format_datetime(datetime.now(timezone.utc))})
        await http.request("GET", "/health")
        assert -2 < (http.clock_offset or -9) < 2


async def test_constructing_does_nothing() -> None:
    Http(settings("http://127.0.0.1:1/api"), httpx.MockTransport(lambda request: httpx.Response(200)))
