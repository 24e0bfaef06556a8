"""Repeat a piece of work, with jitter, and with back-off while it fails."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from procworker.errors import Unauthorized, Unreachable

logger = logging.getLogger(__name__)

JITTER = 0.3
"""Prefect draws its loop intervals in about +-30 % too, so that fleets do not march in step."""


def jittered(seconds: float) -> float:
    """Draw from [0.7, 1.3] times seconds."""
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)


class Moved:
    """Tell waiters that something has changed, so that they look again."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def notify(self) -> None:
        event, self._event = self._event, anyio.Event()
        event.set()

    def mark(self) -> anyio.Event:
        """Return what will be set by the next change, for waiting on it later."""
        return self._event

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._event.wait()


class Loop:
    """Repeat `work` for ever; a failed turn never ends it, and is tried again after 1, 2, 4 ... seconds.

    `interval` is asked before each pause (seconds), and is the longest. `wake` ends the pause early.
    """

    def __init__(self, what: str, work: Callable[[], Awaitable[object]], interval: Callable[[], float]) -> None:
        self._what = what
        self._work = work
        self._interval = interval
        self._woken = anyio.Event()
        self.failures = 0
        self.last_success: float | None = None
        self.asked_to_wait = 0.0

    def wake(self) -> None:
        self._woken.set()

    async def turn(self) -> None:
        """Do the work once; a failure is logged and counted."""
        self.asked_to_wait = 0.0
        try:
            await self._work()
        except Exception as error:
            self.failures += 1
            self.asked_to_wait = getattr(error, "retry_after", None) or 0.0
            level = logging.ERROR if isinstance(error, Unauthorized) else logging.WARNING
            if self.failures & (self.failures - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: a long outage fills no disk
                text = f"{type(error).__name__}: {error}"
                logger.log(level, "%s failed %d times in a row, going on: %s", self._what, self.failures, text)
        else:
            if self.failures:
                logger.info("%s works again after %d failures", self._what, self.failures)
            self.failures = 0
            self.last_success = anyio.current_time()

    def pause(self) -> float:
        """How long to wait until the next turn, in seconds: after a failure soon, then ever less often."""
        pause = self._interval()
        return jittered(min(pause, 2.0 ** min(self.failures - 1, 10)) if self.failures else pause)

    async def run(self) -> None:
        while True:
            self._woken = anyio.Event()
            await self.turn()
            with anyio.move_on_after(self.asked_to_wait):
                await anyio.sleep_forever()  # whoever wakes us, the server wants to be left alone
            with anyio.move_on_after(self.pause()):
                await self._woken.wait()


T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]], pause: float = 1.0, longest: float = 10.0) -> T:
    """Repeat a call until the server answers it; any other failure is raised. Bound it with a cancel scope.

    Refused credentials were good at the start: they are waited for, too.
    """
    while True:
        try:
            return await call()
        except (Unreachable, Unauthorized) as error:
            level = logging.ERROR if isinstance(error, Unauthorized) else logging.DEBUG
            logger.log(level, "Waiting for the server: %s", error)
            asked = error.retry_after or 0.0
        await anyio.sleep(max(jittered(pause), asked))
        pause = min(pause * 2, longest)
