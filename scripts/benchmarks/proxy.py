"""A proxy before the server that notes each request, for those who are told of its port."""

import re
import socket
import time
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

import httpx

REQUEST = re.compile(rb"^((?:GET|POST|PUT|PATCH|DELETE) [^ ?]+).* HTTP/1")


class Request(NamedTuple):
    """When it came by (as time.time() has it), and its first line."""

    at: float
    line: str


class Proxy:
    """Listens as long as its context is open."""

    def __init__(self, server: httpx.URL) -> None:
        self.requests: list[Request] = []
        self._server = server.host, server.port or 80
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/api"

    def __enter__(self) -> "Proxy":
        Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits there
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self._listener.accept()[0], socket.create_connection(self._server)
                for end in (near, far):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, notes: bool) -> None:
        try:
            while data := source.recv(65536):
                now = time.time()
                if notes:  # each request begins a piece of its own
                    self.requests += [Request(now, found.decode()) for found in REQUEST.findall(data)]
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one end has reset the connection: the other must not wait for more
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
