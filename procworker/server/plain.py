"""HTTP/1.1 over plain TCP: asking this way takes a worker a small part of the time that httpx needs.

What it knows of the protocol is what RFC 9112 asks of a client that sends whole bodies: persistent connections, the
three ways to end a body, interim responses. It follows no redirects and asks for no encoding; who wants those asks
httpx.
"""

from __future__ import annotations

import re
import select
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NoReturn

import anyio
import httpx
from anyio.abc import SocketAttribute, SocketStream

from procworker.server.answer import Answer

HEAD_LIMIT = 64 * 1024
"""Bytes that the lines before a body may take, and that one line about a chunk may."""
TRAILERS_LIMIT = 100
AT_ONCE = 256 * 1024
"""Bytes that asyncio reads at most; were less taken of them, the rest would lie where `is_quiet` does not look."""
BODILESS = frozenset({"GET", "HEAD", "DELETE"})
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_BROKEN = (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError)
_HEAD_END, _LINE_END = re.compile(rb"\r?\n\r?\n"), re.compile(rb"\r?\n")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_STATUS = re.compile(rb"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: ([^\r\0]*))?")
_NAME = re.compile(TOKEN)
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;.*)?")


class PlainHttp:
    """Connections to one origin, used again while it keeps them open.

    At most `most` answers are under way at once, who waits is served in turn; `most_idle` connections wait for the next
    request, each for `expiry` seconds. What every request carries is given once.
    """

    def __init__(self, url: httpx.URL, headers: Mapping[str, str], most: int, most_idle: int, expiry: float) -> None:
        self._host, self._port = url.raw_host.decode(), url.port or 80
        self._headers = {"host": url.netloc.decode("ascii"), **headers}
        self._places = anyio.Semaphore(most)
        self._most_idle = most_idle
        self._expiry = expiry
        self._idle: list[_Connection] = []
        self._is_closed = False

    async def ask(
        self, method: str, target: str, headers: Mapping[str, str], content: bytes | None, seconds: float, most: int
    ) -> Answer:
        """Return the answer; each step may take so many seconds, and all of them twice as long.

        The names of headers are in lower case; those given here take the place of others. Raises OverflowError for a
        body of more than `most` bytes, TimeoutError, and httpx's errors for all else that is no answer.
        """
        message = _message(method, target, {**self._headers, **headers}, content)
        with anyio.CancelScope() as scope:
            latest = anyio.current_time() + 2 * seconds

            def step() -> None:
                scope.deadline = min(anyio.current_time() + seconds, latest)

            step()
            try:
                self._places.acquire_nowait()
            except anyio.WouldBlock:
                await self._places.acquire()
                step()
            connection, is_reusable = None, False
            try:
                if (connection := await self._reused()) is None:
                    connection = await self._connected()
                    step()
                answer = await connection.ask(message, most, step)
                is_reusable = connection.is_reusable
                return answer
            finally:
                self._places.release()
                if connection is not None:
                    await self._keep_or_close(connection, is_reusable)
        raise TimeoutError(f"nothing within {seconds:g} s")

    async def _connected(self) -> _Connection:
        try:
            return _Connection(await anyio.connect_tcp(self._host, self._port))
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error

    async def _reused(self) -> _Connection | None:
        """Return the connection that was used last, if it is still good; close those that are not."""
        while self._idle:
            oldest_is_good = self._idle[0].idle_since + self._expiry > time.monotonic()
            connection = self._idle.pop(-1 if oldest_is_good else 0)
            if oldest_is_good and connection.is_quiet():
                return connection
            await connection.close()
        return None

    async def _keep_or_close(self, connection: _Connection, is_reusable: bool) -> None:
        if is_reusable and len(self._idle) < self._most_idle and not self._is_closed:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            await connection.close()

    async def aclose(self) -> None:
        self._is_closed = True
        while self._idle:
            await self._idle.pop().close()


class _Connection:
    """One TCP connection, and what was received over it but not read yet."""

    def __init__(self, stream: SocketStream) -> None:
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

    async def ask(self, message: bytes, most: int, step: Callable[[], None]) -> Answer:
        """Send a request and read its answer; `step` is told whenever something has come."""
        try:
            await self._stream.send(message)
        except _BROKEN as error:
            raise httpx.WriteError(str(error)) from error
        status, reason, headers = await self._head()
        if self.is_done:  # as most are, with the first read
            return Answer(status, reason, headers, self.take())
        step()
        body = bytearray()
        async for piece in self._pieces(step):
            body += piece
            if len(body) + (self._left or 0) > most:
                raise OverflowError(f"the body is larger than {most / 2**20:g} MiB")
        return Answer(status, reason, headers, bytes(body))

    async def _head(self) -> tuple[int, str, dict[str, str]]:
        """Read up to the body; return status, reason and headers. Interim answers are passed over."""
        while True:
            minor, status, reason, headers = _parsed(await self._until(_HEAD_END))
            if status >= 200:
                self._expect(headers, minor, bodiless=status in (204, 304))
                return status, reason, headers
            if status == 101:
                _refuse("the server changes the protocol")

    def _expect(self, headers: Mapping[str, str], minor: int, bodiless: bool) -> None:
        """Find out where the body ends (RFC 9112, 6.3), and whether the connection outlives it (9.3)."""
        wishes = [wish.strip().lower() for wish in headers.get("connection", "").split(",")]
        self._keeps_open = "close" not in wishes and (minor >= 1 or "keep-alive" in wishes)
        encoding, length = headers.get("transfer-encoding"), headers.get("content-length")
        self._is_last, self._left, self._follows_chunk = True, 0, False
        if bodiless:
            return
        if encoding is not None:
            if not encoding.isascii() or encoding.strip().lower() != "chunked":
                _refuse(f"transfer encoding {encoding}")
            self._is_last = False
            # RFC 9112, 6.1 and 6.3: somebody may be smuggling.
            self._keeps_open = self._keeps_open and length is None and minor >= 1
        elif length is not None:
            sizes = {size.strip(" \t") for size in length.split(",")}
            if len(sizes) > 1 or not re.fullmatch("[0-9]{1,18}", size := sizes.pop()):
                _refuse(f"content length {length}")
            self._left = int(size)
        else:
            self._left, self._keeps_open = None, False

    async def _pieces(self, step: Callable[[], None]) -> AsyncIterator[bytes]:
        """Yield the rest of the body as it comes; before each part nothing, for `_left` already tells how much."""
        while True:
            yield b""
            while self._left != 0:
                if not self._received:
                    if not await self._receive():
                        if self._left is not None:
                            _refuse("the server has closed the connection amid the body")
                        self._left = 0
                        break
                    step()
                yield self.take()
            if self._is_last:
                return
            await self._next_chunk()
            step()

    async def _next_chunk(self) -> None:
        if self._follows_chunk and await self._until(_LINE_END):
            _refuse("a chunk is longer than it says")
        self._follows_chunk = True
        line = await self._until(_LINE_END)
        if not (size := _CHUNK.fullmatch(line)):
            _refuse(f"chunk size {_text(line)}")
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
            self._received += await self._stream.receive(AT_ONCE)
        except anyio.EndOfStream:
            return False
        except _BROKEN as error:
            raise httpx.ReadError(str(error)) from error
        return True


def _message(method: str, target: str, headers: Mapping[str, str], content: bytes | None) -> bytes:
    """Lay a request out; raises LocalProtocolError for a header that would be two."""
    lines = [f"{method} {target} HTTP/1.1", *[f"{name}: {value}" for name, value in headers.items()]]
    if content is not None or method not in BODILESS:
        lines.append(f"content-length: {len(content or b'')}")
    head = "\r\n".join(lines)
    if head.count("\n") + head.count("\r") + head.count("\0") != 2 * len(lines) - 2:
        raise httpx.LocalProtocolError("a header has an illegal character")
    return b"%b\r\n\r\n%b" % (head.encode("latin-1"), content or b"")


def _parsed(head: bytes) -> tuple[int, int, str, dict[str, str]]:
    """Take a head apart: the minor version of its protocol, status, reason, headers."""
    first, *lines = _LINE_END.split(_FOLD.sub(b" ", head))
    if not (start := _STATUS.fullmatch(first)):
        _refuse(f"the answer begins with {_text(first)}")
    headers: dict[str, str] = {}
    for line in lines:
        raw, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(raw) or b"\r" in value or b"\0" in value:
            _refuse(f"header {_text(line)}")
        name, text = raw.lower().decode("ascii"), _text(value.strip(b" \t"))
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return int(start[1]), int(start[2]), _text(start[3] or b""), headers


def _text(raw: bytes) -> str:
    """Most say what is not ASCII in UTF-8; Latin-1 is the older rule."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _refuse(what: str) -> NoReturn:
    raise httpx.RemoteProtocolError(f"this is no proper HTTP: {what}")
