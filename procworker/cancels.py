"""Look for cancels as long as there is something to cancel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from uuid import UUID

import anyio

from procworker.loops import Loop, Moved
from procworker.record import Journal
from procworker.run import Run

CANCEL_POLL_SECONDS = 5.0
WISH_SECONDS = 1.0
"""From one look for wishes of people on this host to the next; each costs one stat."""


class CancelWatch:
    """One question every few seconds to the server about all runs at hand, and none while there are none.

    What is wished on this host is done whether the server answers or not.
    """

    def __init__(
        self, check: Callable[[], Awaitable[object]], runs: Mapping[UUID, Run], moved: Moved, journal: Journal
    ) -> None:
        self.watching = False
        self._loop = Loop("Looking for cancelled runs", check, lambda: CANCEL_POLL_SECONDS)
        self._runs = runs
        self._moved = moved
        self._journal = journal
        self._due = 0.0

    async def watch(self) -> None:
        """Look until the last run is gone."""
        try:
            async with anyio.create_task_group() as tasks:
                self._rest()
                while self._runs:
                    now = anyio.current_time()
                    with anyio.move_on_after(max(0.0, min(WISH_SECONDS, self._due - now))):
                        await self._moved.until(lambda: not self._runs)
                    for id, wish in self._journal.wishes():
                        if (run := self._runs.get(id)) is not None:
                            tasks.start_soon(run.cancel, wish["grace"])
                    if self._runs and anyio.current_time() >= self._due:
                        self._due = float("inf")
                        tasks.start_soon(self._ask)
                # At once: the next run starts a watch of its own.
                self.watching = False
                tasks.cancel_scope.cancel()
        except BaseException:
            self.watching = False
            raise

    async def _ask(self) -> None:
        """Ask the server, however long that takes."""
        await self._loop.turn()
        self._rest()

    def _rest(self) -> None:
        self._due = anyio.current_time() + max(self._loop.pause(), self._loop.asked_to_wait)
