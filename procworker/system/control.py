"""Tell an engine that the SIGTERM which comes next is a cancel (Prefect's attempt control channel, contract 5.5).

An engine of Prefect 3.6.27 or newer connects to the port in its environment once its flow is loaded, and shows its
token. A cancel is one byte that it acknowledges with another; the signal that follows then makes it run on_cancellation
instead of on_crashed. Whoever does not connect, or does not answer, is ended without these manners.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections import deque
from contextlib import AsyncExitStack, suppress
from functools import cached_property
from typing import Any

import anyio
from anyio import CancelScope
from anyio.abc import Listener, SocketAttribute, SocketStream, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream

log = logging.getLogger(__name__)

HELLO_MARK = b"\x00PF"
"""How the hello of an engine of Prefect 3.8.4 or newer starts; two bytes follow: its version, its capabilities."""
VERSION_1 = HELLO_MARK + b"\x01\x00"
"""Our reply: no receipts. An engine that waits for one in vain ends no sooner than a second after it connected."""
CANCEL, ACK = b"c", b"a"

AUTH_SECONDS, LINE_LIMIT, MOST_STRANGERS = 5.0, 64, 64
"""What a connection may take until it has shown a token, and how many such there may be."""
ACCEPT_PAUSE_SECONDS = 0.1


class Session:
    """The line to one engine; `environment` is what its process has to be started with."""

    def __init__(self, port: int | None, expected: set[Session]) -> None:
        token = secrets.token_hex(16)
        self.environment: dict[str, str] = {}
        if port is not None:
            self.environment = {"PREFECT__CONTROL_PORT": str(port), "PREFECT__CONTROL_TOKEN": token}
            expected.add(self)
        self._token = token.encode()
        self._expected = expected
        self._stream: SocketStream | None = None
        self._talk = CancelScope()
        self._asked = self._acked = False

    # Only who is spoken with needs them; there may be hundreds who are not.
    @cached_property
    def _sending(self) -> anyio.Lock:
        return anyio.Lock()

    @cached_property
    def _answered(self) -> anyio.Event:
        return anyio.Event()

    @property
    def connected(self) -> bool:
        """Whether the engine could be told something now."""
        return self._stream is not None

    async def cancel(self, timeout: float = 1.0) -> bool:
        """Announce a cancel; return whether the engine acknowledged it, now or before, within `timeout` seconds."""
        if self._stream is not None:
            with anyio.move_on_after(timeout), suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
                if not self._asked:
                    self._asked = True
                    await self._send(self._stream, CANCEL)
                await self._answered.wait()
        return self._acked

    def close(self) -> None:
        """Forget the token and hang up."""
        self._expected.discard(self)
        self._stream = None
        self._talk.cancel()

    async def _send(self, stream: SocketStream, data: bytes) -> None:
        # These few bytes always fit into the socket's buffer: nobody is held up by what may not be cut off.
        with CancelScope(shield=True):
            async with self._sending:
                await stream.send(data)

    async def _converse(self, stream: SocketStream, received: BufferedByteReceiveStream) -> None:
        """Speak with the engine until it has answered, leaves, or says what it should not."""
        self._stream = stream
        try:
            with self._talk:
                said = await received.receive_exactly(1)
                if said == HELLO_MARK[:1]:
                    rest = await received.receive_exactly(len(VERSION_1) - 1)
                    if not (said + rest).startswith(HELLO_MARK):
                        return
                    await self._send(stream, VERSION_1)
                    said = await received.receive_exactly(1)
                self._acked = self._asked and said == ACK
        finally:
            self._stream = None
            self._answered.set()


class Control:
    """One listener on the loopback interface for the engines of all flow runs; before it is entered there is none.

    Without a loopback interface it warns once, and no engine ever hears of a cancel.
    """

    def __init__(self, auth_seconds: float = AUTH_SECONDS) -> None:
        self._auth_seconds = auth_seconds
        self._port: int | None = None
        self._stack = AsyncExitStack()
        self._expected: set[Session] = set()
        self._strangers: deque[CancelScope] = deque()

    async def __aenter__(self) -> Control:
        try:
            sockets = await anyio.create_tcp_listener(local_host="127.0.0.1")
        except OSError as error:
            log.warning("Cancelled flow runs will not run on_cancellation: cannot listen on 127.0.0.1 (%s)", error)
            return self
        async with AsyncExitStack() as stack:
            (listener,) = (await stack.enter_async_context(sockets)).listeners
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(tasks.cancel_scope.cancel)
            tasks.start_soon(self._accept, listener, tasks)
            self._port = listener.extra(SocketAttribute.local_port)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._port = None
        # What went wrong in the block is not this task group's concern: it would wrap it.
        await self._stack.aclose()

    def session(self) -> Session:
        """Expect one more engine. Needs a running event loop; the session has to be closed."""
        return Session(self._port, self._expected)

    async def _accept(self, listener: Listener[SocketStream], tasks: TaskGroup) -> None:
        while True:
            # Too many open files: engines wait in the backlog until some are closed.
            with suppress(OSError):
                await listener.serve(self._answer, tasks)
            await anyio.sleep(ACCEPT_PAUSE_SECONDS)

    async def _answer(self, stream: SocketStream) -> None:
        async with stream:
            received = BufferedByteReceiveStream(stream)
            with suppress(anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError):
                if session := await self._authenticate(received):
                    await session._converse(stream, received)

    async def _authenticate(self, received: BufferedByteReceiveStream) -> Session | None:
        """Return the session whose token is shown in time; a token is good for once."""
        with anyio.move_on_after(self._auth_seconds) as patience:
            # Engines show theirs at once, so that the oldest of too many is none.
            if len(self._strangers) >= MOST_STRANGERS:
                self._strangers.popleft().cancel()
            self._strangers.append(patience)
            try:
                shown = await received.receive_until(b"\n", LINE_LIMIT)
            finally:
                if patience in self._strangers:
                    self._strangers.remove(patience)
            for session in self._expected:
                if hmac.compare_digest(session._token, shown):
                    self._expected.remove(session)
                    return session
        return None
