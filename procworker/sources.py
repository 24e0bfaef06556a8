"""What flow runs belong to: their deployments and flows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import anyio

from procworker.loops import patiently

T = TypeVar("T")

FRESH_SECONDS = 2.0
"""How long nothing need be read again: no longer than a poll's answer may be used for a claim."""


class Sources:
    """What runs of about the same time belong to, read once each."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._locks: defaultdict[UUID, anyio.Lock] = defaultdict(anyio.Lock)
        self._found: dict[UUID, Any] = {}

    async def read(self, id: UUID | None, read: Callable[[UUID], Awaitable[T]]) -> T | None:
        if id is None:
            return None
        async with self._locks[id]:
            if id not in self._found:
                self._found[id] = await patiently(partial(read, id))
            found: T = self._found[id]
            return found

    def renewed(self) -> Sources:
        """Return these, as long as they may be used."""
        return self if time.monotonic() - self._since < FRESH_SECONDS else Sources()
