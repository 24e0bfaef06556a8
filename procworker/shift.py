"""A worker's working day: poll beside heartbeats, stop in three stages, see the runs out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import anyio
from anyio.abc import TaskGroup

from procworker.errors import ApiError, Unreachable
from procworker.intake import Intake
from procworker.loops import Loop, Moved
from procworker.outcome import Reason
from procworker.run import STOP_GRACE_SECONDS, Run

DRAIN_SECONDS, LAST_REPORT_SECONDS = 10.0, 10.0
RETRY_SECONDS = 1.0
SILENCE_SECONDS = 30.0
"""How long a server that answers no more is asked on, when nothing runs."""


@dataclass(frozen=True)
class Drain:
    """When a worker that ends by itself has done enough: when nothing is due and nothing runs any more, or later.

    `wait_seconds` is how long it waits for its first run, `idle_seconds` how long for another one after its last,
    `most` how many it takes.
    """

    wait_seconds: float = 0.0
    idle_seconds: float = 0.0
    most: int | None = None


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

    async def drain(self, take: Callable[[], Awaitable[Any]], intake: Intake, drain: Drain) -> None:
        """Take runs until there are no more (or a stop comes), and finish them."""
        async with anyio.create_task_group() as loops:
            for loop in self._beside:
                loops.start_soon(loop.run)
            empty_since: float | None = anyio.current_time()
            silent_since: float | None = None
            while self._stage == 0 and (self._runs or intake.ended != drain.most):
                before = self._moved.mark()
                try:
                    await take()
                except ApiError as error:
                    # What runs already must not suffer, and a moment's silence ends nothing.
                    silent_since = silent_since or anyio.current_time()
                    lasts = anyio.current_time() - silent_since > SILENCE_SECONDS
                    if not self._runs and (lasts or not isinstance(error, Unreachable)):
                        raise
                    await anyio.sleep(RETRY_SECONDS)
                    continue
                now, patience, silent_since = anyio.current_time(), intake.poll_seconds(), None
                if self._runs:
                    empty_since = None
                else:
                    empty_since = now if empty_since is None else empty_since
                    left = empty_since + (drain.idle_seconds if intake.ended else drain.wait_seconds) - now
                    if left <= 0:
                        break
                    patience = min(patience, left)
                with anyio.move_on_after(patience):
                    await before.wait()
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
