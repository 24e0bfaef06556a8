"""HTTP/1.1 over plain TCP, as a transport for httpx: it takes a worker a fraction of the time of httpx's own.

What it knows of the protocol is what RFC 9112 asks of a client that sends whole bodies: persistent connections, the
three ways to end a body, interim responses. It follows no redirects and decodes nothing; that is httpx's part.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import NoReturn

import anyio
import httpx
from anyio.abc import SocketAttribute, SocketStream

HEAD_LIMIT = 64 * 1024
"""Bytes that the lines before a body may take, and that one line about a chunk may."""
TRAILERS_LIMIT = 100
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_BROKEN = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)
_HEAD_END, _LINE_END = re.compile(rb"\r?\n\r?\n"), re.compile(rb"\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_STATUS = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: (.*))?")
_NAME = re.compile(TOKEN)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")


class PlainTransport(httpx.AsyncBaseTransport):
    """Connections to one origin, used again while it keeps them open; raises httpx's own exceptions.

    At most `most` answers are under way at once, who waits is served in turn; `most_idle` connections wait for the next
    request, each for `expiry` seconds.
    """

    def __init__(self, most: int, most_idle: int, expiry: float) -> None:
        self._places = anyio.Semaphore(most)
        self._most_idle = most_idle
        self._expiry = expiry
        self._idle: list[_Connection] = []
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request whose body is known, and read its answer up to the body."""
        message, seconds = _message(request, await request.aread()), request.extensions.get("timeout", {})
        try:
            self._places.acquire_nowait()
        except anyio.WouldBlock:
            with _bounded(seconds.get("pool"), httpx.PoolTimeout):
                await self._places.acquire()
        connection = None
        try:
            connection = await self._reused() or await _connected(request.url, seconds.get("connect"))
            connection.seconds = seconds.get("read")
            with _bounded(seconds.get("write"), httpx.WriteTimeout):
                await connection.send(message)
            with _bounded(connection.seconds, httpx.ReadTimeout):
                status, reason, headers = await connection.answer(request.method)
        except BaseException:
            await self._release(connection, reusable=False)
            raise
        body: httpx.AsyncByteStream = _Body(self, connection)
        if connection.is_done:  # as most are, with the first read
            body = httpx.ByteStream(connection.take())
            await self._release(connection, connection.is_reusable)
        return httpx.Response(status, headers=headers, stream=body, extensions={"reason_phrase": reason})

    async def _reused(self) -> _Connection | None:
        """Return the connection that was used last, if it is still good; close those that are not."""
        while self._idle:
            oldest_is_good = self._idle[0].idle_since + self._expiry > time.monotonic()
            connection = self._idle.pop(-1 if oldest_is_good else 0)
            if oldest_is_good and connection.is_quiet():
                return connection
            await connection.close()
        return None

    async def _release(self, connection: _Connection | None, reusable: bool) -> None:
        self._places.release()
        if connection is None:
            return
        if reusable and len(self._idle) < self._most_idle and not self._is_closed:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            await connection.close()

    async def aclose(self) -> None:
        self._is_closed = True
        while self._idle:
            await self._idle.pop().close()


class _Body(httpx.AsyncByteStream):
    """A body that is still to come."""

    def __init__(self, transport: PlainTransport, connection: _Connection) -> None:
        self._transport = transport
        self._connection: _Connection | None = connection

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if self._connection is not None:
            async for piece in self._connection.pieces():
                yield piece
        await self.aclose()

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._transport._release(connection, connection.is_done and connection.is_reusable)


class _Connection:
    """One TCP connection, and what was received over it but not read yet."""

    def __init__(self, stream: SocketStream) -> None:
        self.seconds: float | None = None
        self.idle_since = 0.0
        self._stream = stream
        self._socket = stream.extra(SocketAttribute.raw_socket)
        self._received = bytearray()
        self._keeps_open = False
        self._left: int | None = 0  # of the body, or of its chunk; None: it ends with the connection
        self._is_last = True  # no chunk follows
        self._follows_chunk = False

    async def close(self) -> None:
        with anyio.CancelScope(shield=True):  # takes no time, and whoever closes several must get to the last
            await anyio.aclose_forcefully(self._stream)

    def is_quiet(self) -> bool:
        """Has the server neither closed it nor sent what nobody asked for?"""
        if not hasattr(select, "poll"):
            return not select.select([self._socket.fileno()], [], [], 0)[0]
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN)
        return not poll.poll(0)

    @property
    def is_done(self) -> bool:
        """Is the whole body here?"""
        return self._is_last and self._left is not None and self._left <= len(self._received)

    @property
    def is_reusable(self) -> bool:
        return self._keeps_open and not self._left and not self._received

    def take(self) -> bytes:
        """What is here of the body, or of its chunk."""
        size = len(self._received) if self._left is None else min(self._left, len(self._received))
        piece = bytes(self._received[:size])
        del self._received[:size]
        if self._left is not None:
            self._left -= size
        return piece

    async def send(self, message: bytes) -> None:
        try:
            await self._stream.send(message)
        except _BROKEN as error:
            raise httpx.WriteError(str(error)) from error

    async def answer(self, method: str) -> tuple[int, bytes, httpx.Headers]:
        """Read up to the body; return status, reason and headers. Interim answers are passed over."""
        while True:
            minor, status, reason, headers = _parsed(await self._until(_HEAD_END))
            if status >= 200:
                self._expect(headers, minor, bodiless=method == "HEAD" or status in (204, 304))
                return status, reason, headers
            if status == 101:
                _refuse("the server changes the protocol")

    def _expect(self, headers: httpx.Headers, minor: int, bodiless: bool) -> None:
        """Find out where the body ends (RFC 9112, 6.3), and whether the connection outlives it (9.3)."""
        wishes = [wish.strip().lower() for wish in headers.get("Connection", "").split(",")]
        self._keeps_open = "close" not in wishes and (minor >= 1 or "keep-alive" in wishes)
        encoding, lengths = headers.get("Transfer-Encoding"), headers.get_list("Content-Length", split_commas=True)
        self._is_last, self._left, self._follows_chunk = True, 0, False
        if bodiless:
            return
        if encoding is not None:
            if encoding.strip().lower() != "chunked":
                _refuse(f"transfer encoding {encoding[:50]!r}")
            self._is_last = False
            self._keeps_open = self._keeps_open and not lengths  # RFC 9112, 6.3: somebody may be smuggling
        elif lengths:
            if len(set(lengths)) > 1 or not re.fullmatch("[0-9]{1,18}", lengths[0]):
                _refuse(f"content length {', '.join(lengths)[:50]!r}")
            self._left = int(lengths[0])
        else:
            self._left, self._keeps_open = None, False

    async def pieces(self) -> AsyncIterator[bytes]:
        """Yield the rest of the body as it comes."""
        while True:
            while self._left != 0:
                if not self._received:
                    with _bounded(self.seconds, httpx.ReadTimeout):
                        more = await self._receive()
                    if not more:
                        if self._left is not None:
                            _refuse("the server has closed the connection amid the body")
                        self._left = 0
                        break
                yield self.take()
            if self._is_last:
                return
            with _bounded(self.seconds, httpx.ReadTimeout):
                await self._next_chunk()

    async def _next_chunk(self) -> None:
        if self._follows_chunk and await self._until(_LINE_END):
            _refuse("a chunk is longer than it says")
        self._follows_chunk = True
        line = await self._until(_LINE_END)
        if not (size := _CHUNK.fullmatch(line)):
            _refuse(f"chunk size {line[:50]!r}")
        self._left = int(size[1], 16)
        if self._left == 0:
            for _ in range(TRAILERS_LIMIT):
                if not await self._until(_LINE_END):
                    self._is_last = True
                    return
            _refuse("too many trailers")

    async def _until(self, end: re.Pattern[bytes]) -> bytes:
        """Return what comes before the next such end, without it."""
        while not (found := end.search(self._received)):
            if len(self._received) > HEAD_LIMIT:
                _refuse("too long a head")
            if not await self._receive():
                _refuse("the server has closed the connection without an answer")
        if found.start() > HEAD_LIMIT:
            _refuse("too long a head")
        text = bytes(self._received[: found.start()])
        del self._received[: found.end()]
        return text

    async def _receive(self) -> bool:
        """Wait for more; return whether there was any before the end."""
        try:
            self._received += await self._stream.receive()
        except anyio.EndOfStream:
            return False
        except _BROKEN as error:
            raise httpx.ReadError(str(error)) from error
        return True


async def _connected(url: httpx.URL, seconds: float | None) -> _Connection:
    try:
        with _bounded(seconds, httpx.ConnectTimeout):
            stream = await anyio.connect_tcp(url.raw_host.decode(), url.port or 80)
    except OSError as error:
        raise httpx.ConnectError(str(error)) from error
    return _Connection(stream)


def _message(request: httpx.Request, body: bytes) -> bytes:
    """Lay a request out; raises LocalProtocolError for a header that would be two."""
    lines = [b"%b %b HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [b"%b: %b" % field for field in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") + head.count(b"\r") + head.count(b"\0") != 2 * len(lines) - 2:
        raise httpx.LocalProtocolError("a header has an illegal character")
    return b"%b\r\n\r\n%b" % (head, body)


def _parsed(head: bytes) -> tuple[int, int, bytes, httpx.Headers]:
    """Take a head apart: the minor version of its protocol, status, reason, headers."""
    first, *lines = _LINE_END.split(_FOLD.sub(b" ", head))
    if not (start := _STATUS.fullmatch(first)):
        _refuse(f"the answer begins with {first[:50]!r}")
    fields = []
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name) or b"\r" in value or b"\0" in value:
            _refuse(f"header {line[:50]!r}")
        fields.append((name, value.strip(b" \t")))
    return int(start[1]), int(start[2]), start[3] or b"", httpx.Headers(fields)


def _refuse(what: str) -> NoReturn:
    raise httpx.RemoteProtocolError(f"this is no proper HTTP: {what}")


@contextmanager
def _bounded(seconds: float | None, error: type[httpx.TimeoutException]) -> Iterator[None]:
    try:
        with anyio.fail_after(seconds):
            yield
    except TimeoutError as caught:
        raise error(str(caught)) from caught
