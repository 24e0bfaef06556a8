"""Look for cancels as long as there is something to cancel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sized

import anyio

from procworker.loops import Loop, Moved

CANCEL_POLL_SECONDS = 5.0


class CancelWatch:
    """One question every few seconds about all runs at hand, and none while there are none."""

    def __init__(self, check: Callable[[], Awaitable[object]], runs: Sized, moved: Moved) -> None:
        self.watching = False
        self._loop = Loop("Looking for cancelled runs", check, lambda: CANCEL_POLL_SECONDS)
        self._runs = runs
        self._moved = moved

    async def watch(self) -> None:
        """Look until the last run is gone."""
        try:
            while self._runs:
                with anyio.move_on_after(max(self._loop.pause(), self._loop.asked_to_wait)):
                    await self._moved.until(lambda: not self._runs)
                if self._runs:
                    await self._loop.turn()
        finally:
            self.watching = False
