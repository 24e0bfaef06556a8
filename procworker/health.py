"""Answer GET /health and GET /ready over HTTP, from within the worker's own loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import anyio
from anyio.abc import Listener, SocketStream

from procworker.errors import ConfigurationError

Check = Callable[[], str | None]
"""Returns None when all is well, else the reason."""

_REQUEST_LIMIT = 8192
_REQUEST_SECONDS = 5
_RETRY_SECONDS = 0.1


@asynccontextmanager
async def health_server(host: str, port: int, checks: dict[str, Check]) -> AsyncIterator[int]:
    """Serve each path of checks: 200 when its check returns None, else 503 with the reason. Yields the port.

    Raises ConfigurationError when the address cannot be bound.
    """
    try:
        listener = await anyio.create_tcp_listener(local_host=host, local_port=port)
    except OSError as error:
        raise ConfigurationError(
            f"the health server cannot listen on {host}:{port} ({error.strerror or error}): choose another address with"
            " PREFECT_WORKER_WEBSERVER_HOST and PREFECT_WORKER_WEBSERVER_PORT (0 takes any free port)"
        ) from error

    async def answer(stream: SocketStream) -> None:
        async with stream:
            with anyio.move_on_after(_REQUEST_SECONDS):
                try:
                    await stream.send(_response(await _request_line(stream), checks))
                except (OSError, anyio.BrokenResourceError, anyio.EndOfStream):
                    return  # the caller hung up

    async def serve(address: Listener[SocketStream]) -> None:
        while True:
            with suppress(OSError):  # too many open files: who asks waits in the backlog
                await address.serve(answer, tasks)
            await anyio.sleep(_RETRY_SECONDS)

    async with listener, anyio.create_task_group() as tasks:
        for address in listener.listeners:
            tasks.start_soon(serve, address)
        yield listener.extra(anyio.abc.SocketAttribute.local_port)
        tasks.cancel_scope.cancel()


async def _request_line(stream: SocketStream) -> str:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < _REQUEST_LIMIT:
        data += await stream.receive(1024)
    return data.split(b"\r\n", 1)[0].decode("latin-1")


def _response(request_line: str, checks: dict[str, Check]) -> bytes:
    method, path, *_ = [*request_line.split(" "), "", ""]
    check = checks.get(path.partition("?")[0])
    if check is None:
        status, message = "404 Not Found", "Not Found"
    elif method not in ("GET", "HEAD"):
        status, message = "405 Method Not Allowed", "Method Not Allowed"
    elif (reason := check()) is None:
        status, message = "200 OK", "OK"
    else:
        status, message = "503 Service Unavailable", reason
    body = json.dumps({"message": message}).encode()
    fields = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
    head = f"HTTP/1.1 {status}\r\n{fields}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
