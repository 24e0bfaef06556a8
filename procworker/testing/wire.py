"""HTTP/1.1 and WebSocket as bytes on one connection, as far as clients of the Prefect API speak them."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
from contextlib import suppress
from urllib.parse import parse_qsl, unquote, urlsplit

import anyio
from anyio.abc import SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from procworker.testing.messages import Reply, Request

HEAD_LIMIT = 64 * 1024
GONE = (
    *(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError),
    *(anyio.IncompleteRead, anyio.DelimiterNotFound),
)
"""What reading from or writing to a client raises that has left, or that does not speak HTTP."""
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
KEY = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Connection:
    """One client's connection."""

    def __init__(self, stream: SocketStream, base: str) -> None:
        self._stream = stream
        self._buffer = BufferedByteReceiveStream(stream)
        self._base = base
        self._closes = False

    async def receive(self) -> Request | None:
        """The next request; None when there is none to come, or none that can be understood."""
        if self._closes:
            return None
        try:
            head = (await self._buffer.receive_until(b"\r\n\r\n", HEAD_LIMIT)).decode("latin-1")
            first, *lines = head.split("\r\n")
            method, location, version = first.split(" ")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
            }
            self._closes = version == "HTTP/1.0" or headers.get("connection", "").lower() == "close"
            if headers.get("expect", "").lower() == "100-continue":
                await self._stream.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await self._body(headers)
        except ValueError:
            return None
        target = urlsplit(location)
        path = unquote(target.path).removeprefix(self._base)
        return Request(method, path, dict(parse_qsl(target.query)), headers, body, anyio.current_time())

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            length = int(headers.get("content-length") or 0)
            return await self._buffer.receive_exactly(length) if length else b""
        body = b""
        while size := int((await self._buffer.receive_until(b"\r\n", HEAD_LIMIT)).split(b";")[0], 16):
            body += await self._buffer.receive_exactly(size)
            await self._buffer.receive_exactly(2)
        while await self._buffer.receive_until(b"\r\n", HEAD_LIMIT):
            pass  # trailers
        return body

    async def send(self, reply: Reply) -> bool:
        """Send it; whether another request may follow."""
        headers = {"content-type": "application/json", **{k.lower(): v for k, v in reply.headers.items()}}
        if reply.status not in (101, 204):
            headers.setdefault("content-length", str(len(reply.body)))
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"HTTP/1.1 {reply.status} \r\n{fields}\r\n".encode("latin-1")
        await self._stream.send(head + reply.body[: reply.cut])
        return reply.cut is None and not self._closes

    async def reset(self) -> None:
        """Close so that the peer sees a reset rather than an orderly end."""
        raw = self._stream.extra(SocketAttribute.raw_socket)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await anyio.aclose_forcefully(self._stream)

    async def until_gone(self) -> None:
        """Wait until the client hangs up."""
        with suppress(*GONE):
            while True:
                await self._stream.receive()

    # WebSocket: what follows the reply 101

    async def send_text(self, text: str) -> None:
        """Send one message."""
        await self._send_frame(TEXT, text.encode())

    async def receive_text(self) -> str | None:
        """The next message; None when the client closes the conversation."""
        message = b""
        while True:
            first, second = await self._buffer.receive_exactly(2)
            length = second & 127
            if length > 125:
                size = 2 if length == 126 else 8
                length = int.from_bytes(await self._buffer.receive_exactly(size), "big")
            mask = await self._buffer.receive_exactly(4) if second & 128 else bytes(4)
            data = await self._buffer.receive_exactly(length) if length else b""
            data = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data))
            kind = first & 15
            if kind == CLOSE:
                await self._send_frame(CLOSE, data[:2])
                return None
            if kind == PING:
                await self._send_frame(PONG, data)
            elif kind != PONG:
                message += data
                if first & 128:
                    return message.decode()

    async def _send_frame(self, kind: int, data: bytes) -> None:
        size = len(data)
        if size < 126:
            length = bytes([size])
        else:
            length = bytes([126]) + size.to_bytes(2, "big") if size < 65536 else bytes([127]) + size.to_bytes(8, "big")
        await self._stream.send(bytes([128 | kind]) + length + data)


def switching(request: Request) -> Reply:
    """The reply that turns an HTTP connection into a WebSocket."""
    key = request.headers.get("sec-websocket-key", "").encode()
    accept = base64.b64encode(hashlib.sha1(key + KEY, usedforsecurity=False).digest()).decode()
    headers = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": accept}
    if protocol := request.headers.get("sec-websocket-protocol"):
        headers["sec-websocket-protocol"] = protocol.split(",")[0].strip()
    return Reply(101, headers=headers)
