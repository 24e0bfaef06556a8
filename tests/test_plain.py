"""Our own HTTP/1.1 beside that of httpx: the same answers from the same bytes, and the same kinds of failure."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import httpx
import pytest

from procworker.server.plain import HEAD_LIMIT, PlainHttp, _parsed

pytestmark = pytest.mark.anyio

LARGEST = 1_000_000
OK = b"HTTP/1.1 200 OK\r\n"
BODY = b'{"id": 1}'
WHOLE = OK + b"Content-Length: 9\r\n\r\n" + BODY
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"

ANSWERS = {
    "with a length": WHOLE,
    "nothing": OK + b"Content-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified, with the length of what is not sent": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
    "without a reason": b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nhi",
    "with an empty reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nhi",
    "bare line ends": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nhi",
    "a folded header": OK + b"X-Long: one\r\n  two\r\nContent-Length: 2\r\n\r\nhi",
    "blanks about a value": OK + b"X-Wide: \t wide \t\r\nContent-Length:2\r\n\r\nhi",
    "a header in UTF-8": OK + "X-Name: caf\u00e9 \u2603\r\nContent-Length: 2\r\n\r\nhi".encode(),
    "a header in Latin-1": OK + "X-Name: caf\u00e9\r\nContent-Length: 2\r\n\r\nhi".encode("latin-1"),
    "two headers of a name": OK + b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\nhi",
    "an interim answer": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + WHOLE,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    "the end of the connection": OK + b"\r\n" + BODY,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "HTTP/1.0 with a length": b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\n" + BODY,
    "one chunk": CHUNKED + b"9\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunks": CHUNKED + b"4\r\n" + BODY[:4] + b"\r\n5;name=value\r\n" + BODY[4:] + b"\r\n000\r\n\r\n",
    "chunks and trailers": CHUNKED + b"9\r\n" + BODY + b"\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
    "no chunk": CHUNKED + b"0\r\n\r\n",
    "a refusal": b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\n{}",
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /there\r\nContent-Length: 0\r\n\r\n",
    "a large body": OK + b"Content-Length: 300000\r\n\r\n" + b"x" * 300_000,
}
BROKEN = {
    "no answer": b"",
    "half a status": b"HTTP/1.1 2",
    "half a head": OK + b"Content-Le",
    "half a body": OK + b"Content-Length: 9\r\n\r\n{",
    "half a chunk": CHUNKED + b"9\r\n{",
    "no last chunk": CHUNKED + b"9\r\n" + BODY + b"\r\n",
    "a chunk of no number": CHUNKED + b"many\r\n",
    "a chunk that is too long": CHUNKED + b"2\r\n" + BODY + b"\r\n0\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "a status of no number": b"HTTP/1.1 OK\r\n\r\n",
    "a header without a colon": OK + b"nonsense\r\n\r\n",
    "a header without a name": OK + b": x\r\n\r\n",
    "two lengths": OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nhi!",
    "a length below zero": OK + b"Content-Length: -1\r\n\r\n",
    "a length with a blank of Unicode's": OK + "Content-Length: \u00a02\r\n\r\nhi".encode(),
    "a transfer encoding with a letter of Unicode's": OK + "Transfer-Encoding: chun\u212aed\r\n\r\n0\r\n\r\n".encode(),
    "a transfer encoding that nobody knows": OK + b"Transfer-Encoding: rot13\r\n\r\nuv",
    "too many trailers": CHUNKED + b"0\r\n" + 200 * b"X-More: 1\r\n" + b"\r\n",
    "another protocol from here on": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + WHOLE,
    "a bare carriage return in a header": OK + b"X: a\rb\r\nContent-Length: 0\r\n\r\n",
    "a NUL in a header": OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
    "a head that is too long": OK + b"X: " + b"x" * 2 * HEAD_LIMIT + b"\r\n\r\n",
    "a head without an end": OK + b"X: " + b"x" * 4 * HEAD_LIMIT,
}

OURS_ALONE = {"another protocol from here on", "too many trailers"}
"""What httpx takes for an answer."""

Talk = Callable[[anyio.abc.SocketStream], Any]


@asynccontextmanager
async def served(talk: Talk) -> AsyncIterator[str]:
    """A server that talks like that over each connection."""

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await talk(stream)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"http://127.0.0.1:{listener.extra(anyio.abc.SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


async def heard(stream: anyio.abc.SocketStream) -> bytes:
    """One request, with a body that is empty or ends in a brace."""
    text = b""
    while b"\r\n\r\n" not in text or (b"POST" in text and not text.endswith(b"}")):
        text += await stream.receive()
    return text


async def say(stream: anyio.abc.SocketStream, answer: bytes, pieces: int) -> None:
    await heard(stream)
    size = max(1, len(answer) // pieces)
    try:
        for start in range(0, len(answer), size):
            await stream.send(answer[start : start + size])
            await anyio.lowlevel.checkpoint()
    except (OSError, anyio.BrokenResourceError):
        pass  # who has seen enough hangs up


class Ours(httpx.AsyncBaseTransport):
    """Ours behind httpx's client, so that both are asked alike."""

    def __init__(self, most: int = 2, most_idle: int = 1, expiry: float = 5.0) -> None:
        self.limits = most, most_idle, expiry
        self.plain: PlainHttp | None = None

    @property
    def free(self) -> int:
        return self.plain._places.value if self.plain else self.limits[0]

    @property
    def idle(self) -> list[Any]:
        return self.plain._idle if self.plain else []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.plain is None:
            self.plain = PlainHttp(request.url, {}, *self.limits)
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        target, content = request.url.raw_path.decode(), await request.aread() or None
        seconds = request.extensions["timeout"]["read"]
        answer = await self.plain.ask(request.method, target, headers, content, seconds, LARGEST)
        reason, stream = {"reason_phrase": answer.reason.encode()}, httpx.ByteStream(answer.body)
        headers = {name.encode(): value.encode() for name, value in answer.headers.items()}
        return httpx.Response(answer.status, headers=headers, stream=stream, extensions=reason)

    async def aclose(self) -> None:
        if self.plain is not None:
            await self.plain.aclose()


async def ask(transport: httpx.AsyncBaseTransport, url: str, method: str = "GET", **options: Any) -> Any:
    """What a client makes of the answer, whatever that is."""
    async with httpx.AsyncClient(transport=transport, timeout=5) as client:
        try:
            answer = await client.request(method, url, **options)
        except httpx.HTTPError as error:
            return type(error)
        return answer.status_code, answer.reason_phrase, dict(answer.headers), answer.content


@pytest.mark.parametrize("pieces", [1, 7, 10**9], ids=["at once", "in pieces", "byte by byte"])
@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_is_what_httpx_takes_it_for(name: str, pieces: int) -> None:
    if len(ANSWERS[name]) > 10_000 and pieces > 7:
        pieces = 100
    async with served(partial(say, answer=ANSWERS[name], pieces=pieces)) as url:
        ours, theirs = await ask(Ours(), url), await ask(httpx.AsyncHTTPTransport(), url)
    assert ours[0] in (200, 204, 304, 307, 503)
    assert ours == theirs


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_answer_is_none_for_either(name: str, pieces: int) -> None:
    async with served(partial(say, answer=BROKEN[name], pieces=pieces)) as url:
        ours, theirs = await ask(Ours(), url), await ask(httpx.AsyncHTTPTransport(), url)
    assert ours in (httpx.RemoteProtocolError, httpx.ReadError)
    if name not in OURS_ALONE:
        assert theirs in (httpx.RemoteProtocolError, httpx.ReadError)


async def test_the_request_is_the_one_that_httpx_sends() -> None:
    seen: list[bytes] = []

    async def listen(stream: anyio.abc.SocketStream) -> None:
        seen.append(await heard(stream))
        await stream.send(WHOLE)

    options: dict[str, Any] = {"params": {"a": "b c"}, "json": {"key": "välue"}, "headers": {"X-Mine": "yes"}}
    async with served(listen) as url:
        for transport in (Ours(), httpx.AsyncHTTPTransport()):
            assert (await ask(transport, f"{url}/päth", "POST", **options))[0] == 200
    ours, theirs = (text.partition(b"\r\n\r\n") for text in seen)
    assert ours[2] == theirs[2]
    assert sorted(ours[0].lower().split(b"\r\n")[1:]) == sorted(theirs[0].lower().split(b"\r\n")[1:])
    assert seen[0].lower().splitlines()[:2] == seen[1].lower().splitlines()[:2]


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
async def test_whether_there_is_a_body_is_said_as_httpx_says_it(method: str) -> None:
    seen: list[bool] = []

    async def listen(stream: anyio.abc.SocketStream) -> None:
        seen.append(b"content-length: 0\r\n" in (await stream.receive()).lower() + b"\r\n")
        await stream.send(WHOLE)

    async with served(listen) as url:
        for transport in (Ours(), httpx.AsyncHTTPTransport()):
            assert (await ask(transport, url, method))[0] == 200
    assert seen[0] == seen[1]


async def test_a_header_that_would_be_two_is_not_sent() -> None:
    async with served(partial(say, answer=WHOLE, pieces=1)) as url:
        for value in ("a\r\nX-Evil: b", "a\nb", "a\0b"):
            assert await ask(Ours(), url, headers={"X-Mine": value}) is httpx.LocalProtocolError


async def test_nobody_there_is_a_connect_error() -> None:
    assert await ask(Ours(), "http://127.0.0.1:1") is httpx.ConnectError
    assert await ask(Ours(), "http://no-such-host.invalid") is httpx.ConnectError


@pytest.mark.parametrize("sent", [b"", OK, OK + b"Content-Length: 9\r\n\r\n{", CHUNKED, CHUNKED + b"9\r\n{"])
async def test_silence_is_a_timeout_wherever_it_begins(sent: bytes) -> None:
    async def hang(stream: anyio.abc.SocketStream) -> None:
        await heard(stream)
        await stream.send(sent)
        await anyio.sleep_forever()

    async with (
        served(hang) as url,
        httpx.AsyncClient(transport=Ours(), timeout=httpx.Timeout(5, read=0.2)) as client,
    ):
        with pytest.raises(TimeoutError):
            await client.get(url)


class Counting:
    """Answers each request over a connection until it is told to close, and counts connections."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = answers
        self.opened = self.closed = 0
        self.let_go = anyio.Event()
        self.gone = anyio.Event()

    async def __call__(self, stream: anyio.abc.SocketStream) -> None:
        self.opened += 1
        try:
            for answer in self.answers:
                await heard(stream)
                await stream.send(answer)
            await self.let_go.wait()
        except (anyio.EndOfStream, anyio.BrokenResourceError, OSError):
            self.closed += 1
        finally:
            self.gone.set()


@pytest.mark.parametrize("name", ["with a length", "no content", "chunks and trailers", "HTTP/1.0 kept open"])
async def test_one_connection_serves_many_requests(name: str) -> None:
    kept = b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n"
    server = Counting(*5 * [ANSWERS.get(name, kept)])
    async with served(server) as url, httpx.AsyncClient(transport=Ours(), timeout=5) as client:
        for _ in range(5):
            await client.get(url)
    assert server.opened == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"Content-Length: 2\r\n\r\nhi and more",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        OK + b"X-Fill: %b\r\nContent-Length: 2\r\n\r\nhi%b" % (b"x" * (65536 - 50), WHOLE),
    ],
)
async def test_a_connection_that_says_or_sends_too_much_is_not_used_again(answer: bytes) -> None:
    server = Counting(answer, answer)
    async with served(server) as url, httpx.AsyncClient(transport=Ours(), timeout=5) as client:
        for _ in range(2):
            assert (await client.get(url)).content == b"hi"
    assert server.opened == 2


async def test_a_connection_that_the_server_has_closed_is_not_used_again() -> None:
    server = Counting(WHOLE)
    server.let_go.set()
    async with served(server) as url, httpx.AsyncClient(transport=Ours(), timeout=5) as client:
        for number in (1, 2, 3):
            assert (await client.get(url)).content == BODY
            await server.gone.wait()
            server.gone = anyio.Event()
            await anyio.sleep(0.01)  # for the kernel to bring the news
            assert server.opened == number


async def test_old_and_surplus_connections_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    server, clock = Counting(WHOLE, WHOLE), [0.0]
    monkeypatch.setattr("procworker.server.plain.time", SimpleNamespace(monotonic=lambda: clock[0]))
    transport = Ours()
    async with served(server) as url, httpx.AsyncClient(transport=transport, timeout=5) as client:
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                tasks.start_soon(client.get, url)
        assert (server.opened, len(transport.idle)) == (2, 1)
        clock[0] = 6.0
        await client.get(url)
        assert (server.opened, len(transport.idle)) == (3, 1)
    assert transport.idle == []


async def test_no_more_connections_than_allowed_and_who_waits_too_long_is_told() -> None:
    async def hold(stream: anyio.abc.SocketStream) -> None:
        await heard(stream)
        await held.wait()
        await stream.send(OK + b"Connection: close\r\nContent-Length: 9\r\n\r\n" + BODY)

    held, got = anyio.Event(), []

    async def get() -> None:
        got.append((await client.get(url)).content)

    transport = Ours()
    async with (
        served(hold) as url,
        httpx.AsyncClient(transport=transport, timeout=5) as client,
        anyio.create_task_group() as tasks,
    ):
        for _ in range(5):
            tasks.start_soon(get)
        await anyio.wait_all_tasks_blocked()
        assert transport.free == 0
        with pytest.raises(TimeoutError):
            await client.get(url, timeout=0.1)
        held.set()
    assert got == 5 * [BODY]
    assert transport.free == 2


async def test_a_request_that_is_cancelled_leaves_no_connection_and_no_place_behind() -> None:
    server = Counting(b"")
    transport = Ours()
    async with served(server) as url, httpx.AsyncClient(transport=transport, timeout=5) as client:
        for _ in range(3):
            with anyio.move_on_after(0.05):
                await client.get(url)
        assert (transport.free, transport.idle) == (2, [])


@pytest.mark.parametrize("size", [b"Content-Length: 3000000", b"Transfer-Encoding: chunked", b"X-To: the end"])
async def test_too_large_a_body_is_not_read_to_its_end(size: bytes) -> None:
    sent, chunk = 0, b"2dc6c0\r\n" if b"chunked" in size else b""

    async def flood(stream: anyio.abc.SocketStream) -> None:
        nonlocal sent
        await heard(stream)
        await stream.send(OK + size + b"\r\n\r\n" + chunk)
        with suppress(OSError, anyio.BrokenResourceError):
            while True:
                await stream.send(b"x" * 10_000)
                sent += 10_000

    transport = Ours()
    async with served(flood) as url, httpx.AsyncClient(transport=transport, timeout=5) as client:
        with pytest.raises(OverflowError):
            await client.get(url)
        assert (transport.free, transport.idle) == (2, [])
        await anyio.wait_all_tasks_blocked()
        assert sent < 100_000_000


async def test_an_answer_in_drops_takes_no_longer_than_twice_the_patience() -> None:
    async def drip(stream: anyio.abc.SocketStream) -> None:
        await heard(stream)
        await stream.send(OK + b"Content-Length: 1000\r\n\r\n")
        with suppress(OSError, anyio.BrokenResourceError):
            while True:
                await stream.send(b"x")
                await anyio.sleep(0.02)

    transport = Ours()
    async with served(drip) as url, httpx.AsyncClient(transport=transport, timeout=0.3) as client:
        began = anyio.current_time()
        with pytest.raises(TimeoutError):
            await client.get(url)
        assert 0.6 <= anyio.current_time() - began < 5
        assert (transport.free, transport.idle) == (2, [])


async def test_who_waits_for_a_place_is_served_in_turn() -> None:
    """Not overtaken by those that ask again and again."""
    server = Counting(*1000 * [WHOLE])
    transport, served_once = Ours(), set[int]()
    async with served(server) as url, httpx.AsyncClient(transport=transport, timeout=5) as client:

        async def ask_on(number: int) -> None:
            while len(served_once) < 8:
                await client.get(url)
                served_once.add(number)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                for number in range(8):
                    tasks.start_soon(ask_on, number)


async def test_a_chunked_body_whose_very_end_is_missing_ends_its_connection() -> None:
    """What comes late would begin the next answer."""
    server = Counting(CHUNKED + b"9\r\n" + BODY + b"\r\n0\r\n")
    transport = Ours()
    timeout = httpx.Timeout(5, read=0.2)
    async with served(server) as url, httpx.AsyncClient(transport=transport, timeout=timeout) as client:
        with pytest.raises(TimeoutError):
            await client.get(url)
        assert (transport.free, transport.idle) == (2, [])


async def test_all_connections_are_closed_also_while_being_cancelled() -> None:
    server, transport = Counting(WHOLE), Ours(most=3, most_idle=3, expiry=5.0)
    async with served(server) as url:
        client = httpx.AsyncClient(transport=transport, timeout=5)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(client.get, url)
        idle = list(transport.idle)
        assert len(idle) == 3
        with anyio.CancelScope() as scope:
            scope.cancel()
            await client.aclose()
        await anyio.wait_all_tasks_blocked()
        assert [connection._socket.fileno() for connection in idle] == [-1] * len(idle)


async def test_after_the_end_no_connection_is_kept() -> None:
    async with served(Counting(WHOLE)) as url:
        plain = PlainHttp(httpx.URL(url), {}, 2, 1, 5.0)
        await plain.aclose()
        await plain.ask("GET", "/", {}, None, 5, LARGEST)
    assert plain._idle == []


def test_a_header_of_many_blanks_takes_no_time() -> None:
    began = time.process_time()
    _parsed(OK + b"X: a" + HEAD_LIMIT * b" " + b"b")
    assert time.process_time() - began < 1


async def test_a_refusal_that_comes_amid_a_large_body_is_heard() -> None:
    async def refuse(stream: anyio.abc.SocketStream) -> None:
        await stream.receive(1000)
        await stream.send(b"HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                await stream.receive()

    async with served(refuse) as url:
        assert (await ask(Ours(), url, "POST", content=b"x" * 10_000_000))[0] == 413
