"""A worker's working day: poll beside heartbeats, stop in three stages, see the runs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

import anyio
from anyio.abc import TaskGroup

from procworker.errors import Unreachable
from procworker.loops import Loop, Moved
from procworker.outcome import Reason
from procworker.run import STOP_GRACE_SECONDS, Run

DRAIN_SECONDS, LAST_REPORT_SECONDS = 10.0, 10.0
RETRY_SECONDS = 1.0


class Shift:
    """Keeps a worker's loops going until it is told to stop, then ends what runs, politely and in bounded time."""

    def __init__(self, polling: Loop, beside: Sequence[Loop], runs: Mapping[UUID, Run], moved: Moved) -> None:
        self.drain_seconds = DRAIN_SECONDS
        self._polling = polling
        self._beside = beside
        self._runs = runs
        self._moved = moved
        self._stage = 0

    def stop(self) -> None:
        """Take no more runs and let the running ones finish; called again, end them; again, kill them."""
        self._stage += 1
        self._moved.notify()

    async def work(self) -> None:
        """Work until stopped; then drain for `drain_seconds`, and end what still runs."""
        async with anyio.create_task_group() as loops:
            for loop in self._beside:
                loops.start_soon(loop.run)
            async with anyio.create_task_group() as polling:
                polling.start_soon(self._polling.run)
                await self._moved.until(lambda: self._stage > 0)
                polling.cancel_scope.cancel()
            await self._drain()
            loops.cancel_scope.cancel()

    async def once(self, take: Callable[[], Awaitable[Any]], is_enough: Callable[[], bool]) -> None:
        """Take runs until that is enough (or a stop comes), and finish them."""
        async with anyio.create_task_group() as loops:
            for loop in self._beside:
                loops.start_soon(loop.run)
            while self._stage == 0:
                before = self._moved.mark()
                try:
                    await take()
                except Unreachable:
                    if not self._runs:
                        raise
                    await anyio.sleep(RETRY_SECONDS)  # what runs already must not suffer
                    continue
                if is_enough():
                    break
                await before.wait()
            await self._moved.until(lambda: not self._runs or self._stage > 0)
            await self._drain()
            loops.cancel_scope.cancel()

    async def _drain(self) -> None:
        """Let what runs finish for a while, then end it."""
        with anyio.move_on_after(self.drain_seconds):
            await self._moved.until(lambda: not self._runs or self._stage > 1)
        await self._end_runs()

    async def _end_runs(self) -> None:
        async with anyio.create_task_group() as ending:
            self._end_all(ending, STOP_GRACE_SECONDS)
            await self._moved.until(lambda: not self._runs or self._stage > 2)
            self._end_all(ending, 0.0)
            await self._moved.until(lambda: not self._runs)

    def _end_all(self, ending: TaskGroup, grace: float) -> None:
        for run in self._runs.values():
            run.reporting.deadline = anyio.current_time() + grace + LAST_REPORT_SECONDS
            ending.start_soon(run.stop, Reason.STOPPED, run.stopped_text, grace)
