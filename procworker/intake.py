"""Which due flow runs a worker takes, and how soon it looks again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from uuid import UUID

import anyio

from procworker.run import Run
from procworker.server.client import Client
from procworker.server.models import FlowRun

IDLE_POLL_SECONDS, BUSY_POLL_SECONDS, BUSY_SECONDS, SHORTEST_POLL_SECONDS = 10.0, 1.0, 30.0, 0.05

ROWS_AHEAD, FRESH_SECONDS = 8, 1.0
"""How many runs more than there is room for a poll asks for, and how long these may be taken without another poll: half
as long as an answer is good for a claim."""


class Intake:
    """Take no more than the limit allows, and at most one start per CPU at a time."""

    def __init__(self, runs: Mapping[UUID, Run], limit: int | None, query_seconds: float | None) -> None:
        self.more_due = False
        """Did the last poll show more than there was room for?"""
        self.active_at = float("-inf")
        self.limiter: anyio.CapacityLimiter | None = None
        self.most: int | None = None
        """How many may be taken at all."""
        self.ended = 0
        """How many were."""
        self._runs = runs
        self._limit = limit
        self._query_seconds = query_seconds
        self._refused: dict[UUID, float] = {}
        self._rows: list[FlowRun] = []
        self._is_full = False
        self.answered_at = float("-inf")

    def poll_seconds(self) -> float:
        """How long to wait between two polls: as long as the settings say, or less after there was something to do."""
        if self._query_seconds is not None:
            return max(self._query_seconds, SHORTEST_POLL_SECONDS)
        busy = anyio.current_time() - self.active_at < BUSY_SECONDS
        return BUSY_POLL_SECONDS if busy else IDLE_POLL_SECONDS

    def room(self) -> int:
        """How many runs may be taken now."""
        room = (os.cpu_count() or 1) - sum(run.starting for run in self._runs.values())
        limits = [limit for limit in (self._limit, self.most and self.most - self.ended) if limit is not None]
        return max(0, min([room, *(limit - len(self._runs) for limit in limits)]))

    def wanted(self) -> int:
        """How many rows a poll has to ask for: it shall show whether there are more, and some of these."""
        now = anyio.current_time()
        self._refused = {id: until for id, until in self._refused.items() if until > now}
        return len(self._runs) + len(self._refused) + self.room() + 1 + ROWS_AHEAD

    async def poll(self, client: Client, pool: str, queues: Iterable[str], prefetch_seconds: float) -> None:
        """Ask what is due within so many seconds, in the server's order; ObjectNotFound if pool or queue is unknown."""
        self._rows, self._is_full, asked = [], False, self.wanted()
        horizon = datetime.now(timezone.utc) + timedelta(seconds=int(prefetch_seconds))
        found = await client.get_scheduled_flow_runs_for_work_pool(pool, sorted(queues), horizon, asked, retries=0)
        self._rows, self._is_full = [row.flow_run for row in found], len(found) >= asked
        self.answered_at = anyio.current_time()

    @property
    def knows_more(self) -> bool:
        """Does a fresh answer show a run that was not taken yet?"""
        return bool(self._rows) and anyio.current_time() - self.answered_at < FRESH_SECONDS

    def choose(self) -> Sequence[FlowRun]:
        """Pick those to take of what the last poll has shown."""
        taken = self._runs.keys() | self._refused.keys()
        due = [flow_run for flow_run in self._rows if flow_run.id not in taken]
        room = self.room()
        self.more_due = len(due) > room or self._is_full
        self._rows = due[room:]
        return due[:room]

    @asynccontextmanager
    async def place(self, run: Run) -> AsyncIterator[None]:
        """Hold one of the limited places for a run, from the moment when one is free."""
        limiter = self.limiter
        if limiter is None:
            yield
            return
        if run.is_resumed:  # it runs already, also when the limit is lower than it was
            limiter.total_tokens = max(limiter.total_tokens, limiter.borrowed_tokens + 1)
        await limiter.acquire_on_behalf_of(run.id)
        try:
            yield
        finally:
            limiter.release_on_behalf_of(run.id)
            limiter.total_tokens = max(self._limit or 1, limiter.borrowed_tokens)

    def lose(self, run: Run) -> None:
        """Somebody is quicker, so what the last answer shows is old; who was refused is not asked for again at once."""
        self._rows = []
        if run.claim.refusal is not None:
            self._refused[run.id] = anyio.current_time() + IDLE_POLL_SECONDS
