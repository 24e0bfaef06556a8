"""What travels to and from the scripted API, and what may go wrong on the way."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import anyio


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
    """What goes back; with `cut` only so many bytes of the body, and then the end of the connection."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


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
        kept = reply.headers if reply and not self.replaces else {}
        return Reply(status, body, {**kept, **self.headers}, self.truncate)
