"""Which due flow runs a worker takes, and how soon it looks again."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

import anyio

from procworker.run import Run
from procworker.server.models import FlowRun

IDLE_POLL_SECONDS, BUSY_POLL_SECONDS, BUSY_SECONDS, SHORTEST_POLL_SECONDS = 10.0, 1.0, 30.0, 0.05


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
        """How many rows a poll has to ask for, so that it shows whether there are more."""
        now = anyio.current_time()
        self._refused = {id: until for id, until in self._refused.items() if until > now}
        return len(self._runs) + len(self._refused) + self.room() + 1

    def choose(self, rows: Sequence[FlowRun]) -> Sequence[FlowRun]:
        """Pick those to take, in the server's order."""
        due = [flow_run for flow_run in rows if flow_run.id not in self._runs.keys() | self._refused.keys()]
        room = self.room()
        self.more_due = len(due) > room
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

    def refuse(self, flow_run_id: UUID) -> None:
        """Do not take this one again at once."""
        self._refused[flow_run_id] = anyio.current_time() + IDLE_POLL_SECONDS
