"""Answer HTTP on a loopback socket or within the process, remember every request, and break in scripted ways."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import anyio
import httpx
from anyio.abc import SocketStream, TaskGroup, TaskStatus

from procworker.testing.messages import Fault, Reply, Request
from procworker.testing.wire import GONE, Connection

T = TypeVar("T")
Server = TypeVar("Server", bound="ScriptedServer")


class ScriptedServer:
    """A server in the running event loop; a subclass says what the answers are."""

    base = ""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[Exception] = []
        self._changed = anyio.Event()
        self._is_down = False
        self._address: socket.socket | None = None
        self._stopped: anyio.Event | None = None

    def answer(self, request: Request) -> Reply:
        """Apply a request and say what to reply; called once per request that gets that far."""
        raise NotImplementedError

    async def converse(self, request: Request, connection: Connection) -> None:
        """Go on with a WebSocket that `answer` has accepted with the status 101."""

    def dump(self) -> str:
        """What a person wants to see when a wait was in vain."""
        return "\n".join(f"  {r.method} {r.path} -> {r.status}" for r in self.requests[-25:])

    @property
    def port(self) -> int:
        """The port, the same before and after an outage; 0 without a socket."""
        return int(self._address.getsockname()[1]) if self._address else 0

    @property
    def url(self) -> str:
        """Where clients find this server."""
        return f"http://127.0.0.1:{self.port}{self.base}"

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        """Reach this server from its own event loop without a socket: httpx.AsyncClient(transport=...)."""
        return _Transport(self)

    @classmethod
    @asynccontextmanager
    async def running(cls: type[Server], *args: Any, **options: Any) -> AsyncIterator[Server]:
        """Serve for the length of the block; a bug met inside an answer is raised at its end."""
        server = cls(*args, **options)
        server._address = _reserve()
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
        self._is_down = False
        if self._address is not None and self._stopped is None:
            self._stopped = anyio.Event()
            self._serving = await self._tasks.start(self._serve, self._stopped)

    async def down(self) -> None:
        """Drop every connection and refuse new ones until `up`."""
        self._is_down = True
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
        """Wait until the predicate holds and return what it said; raises AssertionError after so many seconds."""
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
                    await listener.serve(self._attend)
        finally:
            stopped.set()

    async def _attend(self, stream: SocketStream) -> None:
        connection = Connection(stream, self.base)
        with suppress(*GONE):
            async with stream:
                while request := await connection.receive():
                    reply = await self._reply(request, connection.until_gone)
                    if reply is None:
                        await connection.reset()
                        return
                    if not await connection.send(reply):
                        return
                    if reply.status == 101:
                        await self._converse(request, connection)
                        return

    async def _converse(self, request: Request, connection: Connection) -> None:
        try:
            await self.converse(request, connection)
        except GONE:
            raise
        except Exception as error:
            self.errors.append(error)

    async def _reply(self, request: Request, until_gone: Callable[[], Awaitable[None]]) -> Reply | None:
        """Answer or spoil; None when the connection is to break."""
        fault = next((fault for fault in self.faults if fault.strikes(request)), None)
        if fault:
            fault.count += 1
        self.requests.append(request)
        reply = self._apply(request) if fault is None or fault.commit else None
        self.changed()
        if fault:
            await anyio.sleep(fault.delay)
            if (fault.hang and not await _released(fault, until_gone)) or fault.drops:
                return None
            reply = fault.spoil(reply if reply or fault.replaces else self._apply(request))
        assert reply is not None
        request.status = reply.status
        self.changed()
        return reply

    def _apply(self, request: Request) -> Reply:
        try:
            return self.answer(request)
        except Exception as error:
            self.errors.append(error)
            return Reply(500, f"bug in the fake: {error!r}".encode())


class _Transport(httpx.AsyncBaseTransport):
    """Hand requests over without a socket; what breaks a connection there is the same exception here."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body, time = await request.aread(), anyio.current_time()
        if self._server._is_down:
            raise httpx.ConnectError("the server is down", request=request)
        path = request.url.path.removeprefix(self._server.base)
        query = dict(request.url.params.multi_items())
        headers = {name.lower(): value for name, value in request.headers.items()}
        reply = await self._server._reply(
            Request(request.method, path, query, headers, body, time), anyio.sleep_forever
        )
        if reply is None:
            raise httpx.ReadError("the connection was reset", request=request)
        if reply.cut is not None:
            raise httpx.RemoteProtocolError("the connection ended within the body", request=request)
        headers = {"content-type": "application/json", **reply.headers}
        return httpx.Response(reply.status, headers=headers, content=reply.body, request=request)


async def _released(fault: Fault, until_gone: Callable[[], Awaitable[None]]) -> bool:
    """Wait for the release; False when the client went away first."""

    async def leave() -> None:
        await until_gone()
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(leave)
        await fault.released.wait()
        tasks.cancel_scope.cancel()
    return fault.released.is_set()


def _reserve() -> socket.socket:
    """A bound socket that never listens: it keeps the port ours while the server is down."""
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved
