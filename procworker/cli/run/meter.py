"""Measure what the processes of a flow run use, while they live."""

from __future__ import annotations

import time
from contextlib import suppress

import anyio
import psutil

from procworker.system.processes import Process
from procworker.system.tree import Family

FIRST_SECONDS, LOOK_SECONDS = 0.03, 1.0
COST = 10
"""A look is followed by a pause of so many times what it took, on a host with very many processes."""


class Meter:
    """CPU and memory of a whole tree, looked at more and more seldom in its first second, then once a second."""

    def __init__(self) -> None:
        self.family: Family | None = None
        self.memory = 0
        """Resident bytes of all processes at the last look, 0 where the system does not tell."""
        self.peak = 0
        self.percent: float | None = None
        """Of one CPU, between the last two looks."""
        self._used: dict[Process, float] = {}
        self._looked = 0.0
        self._started = anyio.Event()

    def watch(self, family: Family) -> None:
        """The processes are there."""
        self.family = family
        self._started.set()

    @property
    def seconds(self) -> float:
        """CPU seconds of all processes that were seen, as far as they were seen."""
        return sum(self._used.values())

    @property
    def seen(self) -> int:
        """How many processes were seen, here or when they were ended."""
        return len(self._used.keys() | (self.family.ended if self.family else set()))

    async def run(self) -> None:
        """Look until cancelled."""
        await self._started.wait()
        pause, took = FIRST_SECONDS, 0.0
        while True:
            await anyio.sleep(max(pause, COST * took))
            began = time.monotonic()
            self.look()
            took = time.monotonic() - began
            pause = min(pause * 1.6, LOOK_SECONDS)

    def look(self) -> None:
        """Add up what the processes of this moment use."""
        if self.family is None:
            return
        before, looked, memory = self.seconds, self._looked, 0
        with suppress(OSError):  # too many open files: the next look may see
            for process in self.family.members():
                self._used.setdefault(process, 0.0)
                with suppress(psutil.Error, OSError):  # it has just ended, or is not ours to look at
                    seen = psutil.Process(process.pid)
                    with seen.oneshot():
                        memory += seen.memory_info().rss
                        times = seen.cpu_times()
                    self._used[process] = times.user + times.system
        self._looked = now = time.monotonic()
        self.memory, self.peak = memory, max(self.peak, memory)
        if looked and now - looked > 0.2:
            self.percent = 100 * (self.seconds - before) / (now - looked)


def size(count: int) -> str:
    """Write a number of bytes for people."""
    if count < 1_000_000_000:
        return f"{max(count / 1_000_000, 1):.0f} MB"
    return f"{count / 1_000_000_000:.1f} GB"
