"""Whether a worker still polls, and whether that can lead to anything: what a health check wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

from procworker.health import Check
from procworker.loops import Loop
from procworker.server.models import WorkPool

HEALTH_INTERVALS = 30
"""A worker counts as polling while its last poll is at most this many intervals old (as in Prefect)."""


class Vitals:
    """Knows when a worker polled last; a new one has just been born, and is given its time."""

    def __init__(self, polling: Loop, pool: Callable[[], WorkPool | None], back_at: Callable[[], float | None]) -> None:
        """`back_at` tells until when (anyio's clock) the server has announced not to answer."""
        self._polling = polling
        self._pool = pool
        self._back_at = back_at
        self.polled_at = time.monotonic()

    def polls(self) -> None:
        """A poll begins."""
        self.polled_at = time.monotonic()

    def is_polling(self, interval: float) -> bool:
        """Was the last poll at most 30 intervals (seconds) ago? The server's announced maintenance does not count."""
        window, back_at = interval * HEALTH_INTERVALS, self._back_at()
        if back_at is not None and anyio.current_time() <= back_at + window:
            return True
        return time.monotonic() - self.polled_at <= window

    def checks(self, is_polling: Callable[[], bool]) -> dict[str, Check]:
        """Return what GET /health and GET /ready ask."""
        return {
            "/health": lambda: None if is_polling() else "Worker may be unresponsive at this time",
            "/ready": self._why_not_ready,
        }

    def _why_not_ready(self) -> str | None:
        pool = self._pool()
        if pool is None:
            return "The work pool has not been read yet"
        if pool.is_paused:
            return f"Work pool {pool.name!r} is paused"
        if self._polling.failures or self._polling.last_success is None:
            return f"{self._polling.failures} failed polls in a row"
        return None
