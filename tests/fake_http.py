"""Speak HTTP/1.1 on a loopback socket, remember every request, and break in scripted ways."""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio
import h11
from anyio.abc import SocketAttribute, SocketStream, TaskGroup, TaskStatus

T = TypeVar("T")
Http = TypeVar("Http", bound="FakeHttp")
GONE = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, h11.RemoteProtocolError)


@dataclass
class Request:
    """One request as it arrived; `path` is decoded and without the base, `status` is None until answered."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    time: float
    status: int | None = None

    @property
    def json(self) -> Any:
        """The parsed body, or None when it is absent or not JSON."""
        with suppress(ValueError):
            return json.loads(self.body)
        return None

    def matches(self, method: str, path: str) -> bool:
        """Whether the method is this one (or "*") and the regex `path` is found in the path."""
        return method in ("*", self.method) and re.search(path, self.path) is not None


@dataclass
class Reply:
    """What goes back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """One scripted misfortune; `count` says how often it struck, `times = 0` ends it."""

    method: str = "*"
    path: str = ""
    times: float = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | str | None = None
    delay: float = 0
    reset: bool = False
    hang: bool = False
    truncate: int | None = None
    commit: bool = False
    when: Callable[[Request], Any] = lambda request: True
    count: int = 0
    released: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self.replaces = self.status is not None or self.body is not None
        keeps = self.replaces or self.hang or self.truncate is not None
        self.drops = self.reset or (self.commit and not keeps)

    def strikes(self, request: Request) -> bool:
        """Whether this request is one to spoil."""
        fits = self.count < self.times and request.matches(self.method, self.path)
        return fits and bool(self.when(request))

    def release(self) -> None:
        """Let requests held by `hang` go on: they are answered as if nothing had happened."""
        self.released.set()

    def spoil(self, reply: Reply | None) -> Reply:
        """The reply to send instead of the true one."""
        status, body = (200, b"") if reply is None else (reply.status, reply.body)
        if self.replaces:
            text = self.body or b""
            status, body = self.status or status, text.encode() if isinstance(text, str) else text
        return Reply(status, body, {**(reply.headers if reply and not self.replaces else {}), **self.headers})


class FakeHttp:
    """A server in the running event loop; a subclass says what the answers are."""

    base = ""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[Exception] = []
        self._changed = anyio.Event()
        self._address = _reserve()
        self._stopped: anyio.Event | None = None

    def answer(self, request: Request) -> Reply:
        """Apply a request and say what to reply; called once per request that gets that far."""
        raise NotImplementedError

    def dump(self) -> str:
        """What a person wants to see when a wait was in vain."""
        return "\n".join(f"  {r.method} {r.path} -> {r.status}" for r in self.requests[-25:])

    @property
    def port(self) -> int:
        """The port, the same before and after an outage."""
        return int(self._address.getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients find this server."""
        return f"http://127.0.0.1:{self.port}{self.base}"

    @classmethod
    @asynccontextmanager
    async def running(cls: type[Http], *args: Any, **options: Any) -> AsyncIterator[Http]:
        """Serve for the length of the block; a bug met inside an answer is raised at its end."""
        server = cls(*args, **options)
        # Entered by hand, so that a failed assert in the block is not wrapped in an exception group.
        server._tasks = tasks = await anyio.create_task_group().__aenter__()
        try:
            await server.up()
            yield server
        finally:
            tasks.cancel_scope.cancel()
            await tasks.__aexit__(None, None, None)
            server._address.close()
        if server.errors:
            raise server.errors[0]

    _tasks: TaskGroup
    _serving: anyio.CancelScope

    async def up(self) -> None:
        """Accept connections."""
        if self._stopped is None:
            self._stopped = anyio.Event()
            self._serving = await self._tasks.start(self._serve, self._stopped)

    async def down(self) -> None:
        """Drop every connection and refuse new ones until `up`."""
        if self._stopped is not None:
            self._serving.cancel()
            await self._stopped.wait()
            self._stopped = None

    @asynccontextmanager
    async def outage(self) -> AsyncIterator[None]:
        """Be down for the length of the block."""
        await self.down()
        try:
            yield
        finally:
            await self.up()

    def fault(self, method: str = "*", path: str = "", **how: Any) -> Fault:
        """Spoil the next `times` matching requests; the first fault that strikes wins. Fields as in Fault.

        `delay`, `hang`, `truncate` and `headers` alone leave the true reply in place; `status` and `body`
        replace it and `reset` drops it, both without telling the model, unless `commit` is given. `commit`
        alone applies the request and drops the reply.
        """
        fault = Fault(method, path, **how)
        self.faults.append(fault)
        return fault

    def seen(self, method: str = "*", path: str = "") -> list[Request]:
        """The matching requests so far, oldest first."""
        return [request for request in self.requests if request.matches(method, path)]

    def changed(self) -> None:
        """Let every waiter look again."""
        self._changed.set()
        self._changed = anyio.Event()

    async def wait_for(self, predicate: Callable[[], T], timeout: float = 20, what: str = "") -> T:
        """Wait until the predicate holds and return what it said."""
        with anyio.move_on_after(timeout):
            while not (value := predicate()):
                await self._changed.wait()
            return value
        raise AssertionError(f"not seen within {timeout} s: {what or predicate}\n{self.dump()}")

    async def wait_request(
        self, method: str = "*", path: str = "", count: int = 1, timeout: float = 20
    ) -> list[Request]:
        """Wait until `count` matching requests have arrived (answered or not) and return them all."""
        await self.wait_for(lambda: len(self.seen(method, path)) >= count, timeout, f"{count} x {method} {path}")
        return self.seen(method, path)

    async def _serve(self, stopped: anyio.Event, *, task_status: TaskStatus[anyio.CancelScope]) -> None:
        try:
            with anyio.CancelScope() as scope:
                listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=self.port)
                async with listener:
                    task_status.started(scope)
                    await listener.serve(self._converse)
        finally:
            stopped.set()

    async def _converse(self, stream: SocketStream) -> None:
        wire = h11.Connection(h11.SERVER)
        with suppress(*GONE):
            async with stream:
                while request := await self._receive(stream, wire):
                    if not await self._respond(request, stream, wire):
                        return
                    wire.start_next_cycle()

    async def _receive(self, stream: SocketStream, wire: h11.Connection) -> Request | None:
        head, body = None, b""
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await stream.receive())
            elif isinstance(event, h11.Request):
                head = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage) and head:
                target = urlsplit(head.target.decode())
                return Request(
                    head.method.decode(),
                    unquote(target.path).removeprefix(self.base),
                    dict(parse_qsl(target.query)),
                    {name.decode(): value.decode() for name, value in head.headers},
                    body,
                    anyio.current_time(),
                )
            else:
                return None

    async def _respond(self, request: Request, stream: SocketStream, wire: h11.Connection) -> bool:
        """Answer or spoil; whether the connection can be used again."""
        fault = next((fault for fault in self.faults if fault.strikes(request)), None)
        if fault:
            fault.count += 1
        self.requests.append(request)
        reply = self._apply(request) if fault is None or fault.commit else None
        self.changed()
        if fault:
            await anyio.sleep(fault.delay)
            if fault.hang and not await _released(fault, stream):
                return False
            if fault.drops:
                await _reset(stream)
                return False
            reply = fault.spoil(reply if reply or fault.replaces else self._apply(request))
        assert reply is not None
        request.status = reply.status
        self.changed()
        return await _send(reply, stream, wire, fault.truncate if fault else None)

    def _apply(self, request: Request) -> Reply:
        try:
            return self.answer(request)
        except Exception as error:
            self.errors.append(error)
            return Reply(500, f"bug in the fake: {error!r}".encode())


async def _send(reply: Reply, stream: SocketStream, wire: h11.Connection, truncate: int | None) -> bool:
    headers = {"content-type": "application/json", **{k.lower(): v for k, v in reply.headers.items()}}
    if reply.status != 204:
        headers.setdefault("content-length", str(len(reply.body)))
    out = wire.send(h11.Response(status_code=reply.status, headers=list(headers.items())))
    if truncate is not None:
        await stream.send(out + wire.send(h11.Data(data=reply.body[:truncate])))
        return False
    await stream.send(out + wire.send(h11.Data(data=reply.body)) + wire.send(h11.EndOfMessage()))
    return wire.our_state is h11.DONE and wire.their_state is h11.DONE


async def _released(fault: Fault, stream: SocketStream) -> bool:
    """Wait for the release; False when the client went away first."""

    async def leave() -> None:
        with suppress(*GONE):
            while True:
                await stream.receive()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        await fault.released.wait()
        tasks.cancel_scope.cancel()
    return fault.released.is_set()


async def _reset(stream: SocketStream) -> None:
    """Close so that the peer sees a reset rather than an orderly end."""
    raw = stream.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await anyio.aclose_forcefully(stream)


def _reserve() -> socket.socket:
    """A bound socket that never listens: it keeps the port ours while the server is down."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
