"""A proxy in front of a real server that spoils chosen requests on their way, and remembers every one.

`Proxy.choose` is asked once per request which of FAULTS shall strike it; what none strikes is passed on as it is.
"""

from __future__ import annotations

import json
import re
import socket
import socketserver
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler
from threading import Lock, Thread, Timer
from typing import Any
from urllib.parse import urlsplit

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
NAME = re.compile(r"(?<=/work_pools/)[^/]+|(?<=/name/)[^/]+")
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "content-type"}
REFUSED_SECONDS, LATE_SECONDS, RETRY_AFTER_SECONDS = 0.3, 0.3, 1
FLOOD = 100 * 1024 * 1024
LONGEST = 120.0
"""How long (seconds) the proxy waits for anybody."""


@dataclass
class Exchange:
    """One request; times are monotonic, `status` is the server's answer, None when it was not asked."""

    endpoint: str
    fault: str | None
    begun: float
    status: int | None = None
    ended: float | None = None
    sent: int = 0
    """How much of a flood the client took."""


@dataclass
class Answer:
    """What the server said."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    type: str = "application/json"


class Link(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = LONGEST
    server: _Server
    exchange: Exchange

    def handle_one(self) -> None:
        proxy = self.server.proxy
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.exchange = proxy.begin(self.command, self.path)
        try:
            FAULTS[self.exchange.fault](self) if self.exchange.fault else self.send(self.forward())
        finally:
            self.exchange.ended = time.monotonic()

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = handle_one

    def forward(self) -> Answer:
        """Have the server do what is asked."""
        if own := self.server.proxy.own_answer(self.exchange.endpoint):
            return own
        upstream = HTTPConnection(self.server.proxy.upstream, timeout=LONGEST)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            upstream.request(self.command, self.path, self.body or None, headers)
            response = upstream.getresponse()
            body, given = response.read(), response.getheaders()
        finally:
            upstream.close()
        self.exchange.status = response.status
        kept = [(name, value) for name, value in given if name.lower() not in HOP_BY_HOP]
        return Answer(response.status, kept, body, response.getheader("Content-Type", ""))

    def send(self, answer: Answer, length: int | None = None) -> None:
        """Answer; with a `length` that is not true, if it is given."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        if answer.type:
            self.send_header("Content-Type", answer.type)
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body) if length is None else length))
        self.end_headers()
        self.wfile.write(answer.body)

    def reset(self) -> None:
        """End the connection so that the client sees a reset."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RD)  # wakes whoever waits for the client; the end comes by closing

    def wait_for_hangup(self) -> None:
        """Say nothing until the client has had enough."""
        self.close_connection = True
        self.rfile.read(1)

    def setup(self) -> None:
        super().setup()
        self.server.links.add(self)

    def finish(self) -> None:
        self.server.links.discard(self)
        super().finish()

    def log_message(self, *ignored: Any) -> None:
        pass


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    request_queue_size = 128

    def __init__(self, proxy: Proxy, port: int) -> None:
        super().__init__(("127.0.0.1", port), Link)
        self.proxy = proxy
        self.links: set[Link] = set()

    def shutdown_request(self, request: Any) -> None:
        self.close_request(request)  # without the orderly end that comes before it elsewhere

    def handle_error(self, *ignored: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            self.proxy.errors.append(error)


class Proxy:
    """Listens on a port of its own, the same before and after an outage."""

    def __init__(self, url: str, csrf: bool = False) -> None:
        """With `csrf` it wants, in the server's place, a new token for every change."""
        parts = urlsplit(url)
        self.upstream, self.base = parts.netloc, parts.path
        self.choose: Callable[[str], str | None] = lambda endpoint: None
        self.exchanges: list[Exchange] = []
        self.errors: list[BaseException] = []
        self._csrf = csrf
        self._lock = Lock()
        self._server: _Server | None = None
        self._address = socket.socket()
        self._address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._address.bind(("127.0.0.1", 0))  # it never listens, but keeps the port ours

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._address.getsockname()[1]}{self.base}"

    @property
    def injected(self) -> Counter[tuple[str, str]]:
        """How often which fault struck which endpoint."""
        return Counter((each.endpoint, each.fault) for each in self.exchanges if each.fault)

    def good(self, endpoint: str, since: float = 0.0) -> list[Exchange]:
        """The requests to this endpoint, begun since then, that came through."""
        found = [each for each in self.exchanges if each.endpoint == endpoint and each.begun >= since]
        return [each for each in found if each.ended and not each.fault and each.status and each.status < 300]

    def up(self) -> None:
        with self._lock:
            if self._server is None and self._address.fileno() >= 0:
                self._server = _Server(self, self._address.getsockname()[1])
                Thread(target=self._server.serve_forever, args=[0.02], daemon=True).start()

    def down(self) -> None:
        """Reset every connection and refuse new ones until `up`."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for link in list(server.links):
                link.reset()

    def begin(self, method: str, path: str) -> Exchange:
        route = urlsplit(path).path.removeprefix(self.base)
        endpoint = f"{method} {NAME.sub('{name}', UUID.sub('{id}', route))}"
        with self._lock:
            exchange = Exchange(endpoint, self.choose(endpoint), time.monotonic())
            self.exchanges.append(exchange)
        return exchange

    def own_answer(self, endpoint: str) -> Answer | None:
        if self._csrf and endpoint == "GET /csrf-token":
            now = datetime.now(timezone.utc).isoformat()
            token = {"client": "whoever asks", "token": str(time.monotonic_ns()), "expiration": now}
            return Answer(200, [], json.dumps(token).encode())
        return None


@contextmanager
def proxied(url: str, csrf: bool = False) -> Iterator[Proxy]:
    """A proxy for the length of the block; a bug of its own is raised at the end."""
    proxy = Proxy(url, csrf)
    proxy.up()
    try:
        yield proxy
    finally:
        proxy.down()
        proxy._address.close()
    if proxy.errors:
        raise proxy.errors[0]


# What can go wrong


def refuse(link: Link) -> None:
    """Nobody listens for a moment."""
    proxy = link.server.proxy
    link.reset()
    proxy.down()
    Timer(REFUSED_SECONDS, proxy.up).start()


def lose(link: Link) -> None:
    """What is asked is done, but the answer gets lost."""
    link.forward()
    link.reset()


def do_late(link: Link) -> None:
    """An error is the answer, but what is asked is done all the same, a little later."""
    Say(500, {"Connection": "close"})(link)
    time.sleep(LATE_SECONDS)
    link.forward()


def die_silently(link: Link) -> None:
    """What is asked is done, and then the other end is gone without a word."""
    link.forward()
    link.wait_for_hangup()


def truncate(link: Link) -> None:
    """What is asked is done, but only the first half of the answer is there."""
    answer = link.forward()
    status, body = (answer.status, answer.body) if answer.body else (200, b'{"detail": "none"}')
    link.send(Answer(status, answer.headers, body[: len(body) // 2]))


def cut_off(link: Link) -> None:
    """What is asked is done, but the connection ends in the midst of the answer."""
    answer = link.forward()
    link.close_connection = True
    link.send(Answer(200, answer.headers, answer.body[: len(answer.body) // 2]), length=len(answer.body) + 1)


def flood(link: Link) -> None:
    """100 MB of nothing, which no header announces."""
    link.close_connection = True
    link.send_response_only(200)
    link.send_header("Content-Type", "application/json")
    link.send_header("Transfer-Encoding", "chunked")
    link.end_headers()
    chunk = b" " * 65536
    while link.exchange.sent < FLOOD:
        link.wfile.write(b"10000\r\n" + chunk + b"\r\n")
        link.exchange.sent += len(chunk)
    link.wfile.write(b"4\r\nnull\r\n0\r\n\r\n")


@dataclass(frozen=True)
class Say:
    """The server is not asked; this is the answer."""

    status: int
    headers: Mapping[str, Callable[[], str] | str] = field(default_factory=dict)
    body: bytes = b'{"detail": "injected"}'
    type: str = "application/json"

    def __call__(self, link: Link) -> None:
        headers = [(name, value if isinstance(value, str) else value()) for name, value in self.headers.items()]
        link.send(Answer(self.status, headers, self.body, self.type))


def soon() -> str:
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=RETRY_AFTER_SECONDS + 1), usegmt=True)


PAGE = b"<!DOCTYPE html><html><head><title>Welcome</title></head><body>Please log in.</body></html>"
HTML = "text/html; charset=utf-8"
FAULTS: dict[str, Callable[[Link], None]] = {
    "refused": refuse,
    "reset": Link.reset,
    "answer lost": lose,
    "done late": do_late,
    "timeout": Link.wait_for_hangup,
    "half-open": die_silently,
    "401": Say(401, {"WWW-Authenticate": "Basic"}),
    "408": Say(408),
    "429 seconds": Say(429, {"Retry-After": str(RETRY_AFTER_SECONDS)}),
    "429 date": Say(429, {"Retry-After": soon}),
    "429 junk": Say(429, {"Retry-After": "when the cows come home"}),
    "500": Say(500, body=b"Internal Server Error", type="text/plain"),
    "502": Say(502, body=PAGE, type=HTML),
    "503": Say(503),
    "maintenance": Say(503, {"Prefect-Maintenance": "true", "Retry-After": str(RETRY_AFTER_SECONDS)}),
    "HTML": Say(200, body=PAGE, type=HTML),
    "truncated JSON": truncate,
    "cut off": cut_off,
    "100 MB": flood,
}
"""By name. What asks in vain has been done all the same: answer lost, done late, half-open, truncated JSON, cut off."""
