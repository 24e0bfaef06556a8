"""Say in one line why no flow run is started: when a reason appears, when it changes, and when it is gone."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import anyio

from procworker.errors import ApiError
from procworker.server.client import Client
from procworker.server.models import WorkPool

JSON = dict[str, Any]

LIMIT_SECONDS = 10.0
"""How long more must be due than the limit allows before that is worth a line: under load it comes and goes."""
CLOCK_SECONDS, SLOW_SECONDS = 10.0, 5.0
"""Of difference to the server's clock, and for one poll: from here on it is worth a line."""


class Idleness:
    """The reasons that hold now, each with its sentence."""

    def __init__(self, logger: logging.Logger, tell: Callable[[JSON], None]) -> None:
        """`tell` is given all of them, as "why", whenever they change."""
        self._logger = logger
        self._tell = tell
        self._reasons: dict[str, str] = {}
        self._looked = False
        self._full_since: float | None = None

    @property
    def reasons(self) -> list[str]:
        return list(self._reasons.values())

    def polled(self, seconds: float, clock_offset: float | None, refusal: str | None) -> None:
        """A poll has taken so long; the server's clock is ahead by the offset (seconds), or it refused the poll."""
        self._set("refused", refusal)
        off = clock_offset is not None and abs(clock_offset) > CLOCK_SECONDS
        direction = "behind" if (clock_offset or 0) > 0 else "ahead of"
        text = f"this machine's clock is {_duration(abs(clock_offset or 0))} {direction} the server's, set it right"
        self._set("clock", text if off else None, changes=False)
        slow = seconds > (SLOW_SECONDS / 2 if "slow" in self._reasons else SLOW_SECONDS)
        self._set("slow", f"the API is slow, a poll took {seconds:.0f} s" if slow else None, changes=False)

    def filled(self, limit: int | None, running: int, more_due: bool) -> None:
        """Is more due while the limit is reached?"""
        full = more_due and limit is not None and running >= limit
        now = anyio.current_time()
        self._full_since = (self._full_since or now) if full else None
        if not more_due:
            self._set("limit", None)
        elif self._full_since is not None and now - self._full_since >= LIMIT_SECONDS:
            self._set("limit", f"the limit is reached, {running} of {limit} flow runs, and more are due")

    async def look(self, client: Client, pool: WorkPool, queues: Collection[str], is_busy: bool) -> None:
        """Ask for what only the server knows, where there may be something to say; what goes wrong says nothing."""
        self._set("paused", f"work pool {pool.name!r} is paused, resume it" if pool.is_paused else None)
        is_worth_it = queues or pool.concurrency_limit is not None or not self._looked or "queues" in self._reasons
        if is_busy or not is_worth_it:
            for kind in ("queues", "elsewhere", "held"):
                self._set(kind, None)
            return
        self._looked = True
        try:
            lanes = {queue.name: queue for queue in await client.read_work_queues(pool.name, retries=0)}
            overdue = await client.read_late_flow_runs(pool.name, retries=0) if queues or pool.concurrency_limit else []
        except ApiError:
            return
        late = Counter(run.work_queue_name for run in overdue)
        polled = [lanes[name] for name in queues or lanes if name in lanes]
        paused = [queue.name for queue in polled if queue.is_paused]
        is_all = len(paused) == len(polled)
        text = (
            f"{'all work queues' if is_all else 'work queues'} that it polls are paused, resume them: {_names(paused)}"
        )
        self._set("queues", text if paused and (queues or is_all) else None)
        other = {name: count for name, count in late.items() if name not in queues} if queues else {}
        text = f"late runs wait in {_counts(other)}, but this worker polls {_names(queues)}"
        self._set("elsewhere", text if other else None)
        held = sum(late.values()) - sum(other.values()) if not (pool.is_paused or paused) else 0
        text = f"late runs that the server does not hand out, look at the pool's concurrency limit: {held}"
        self._set("held", text if held and pool.concurrency_limit is not None else None)

    def _set(self, kind: str, text: str | None, changes: bool = True) -> None:
        """A reason holds or does not; a figure in it that only changes (`changes` false) is no news."""
        before = self._reasons.get(kind)
        if text == before or (text and before and not changes):
            return
        if text:
            self._reasons[kind] = text
            self._logger.warning("Why nothing may be started: %s", text)
        else:
            del self._reasons[kind]
            self._logger.info("No longer so: %s", before)
        self._tell({"why": "; ".join(self.reasons) or None})


def _names(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _counts(counts: dict[str | None, int]) -> str:
    return ", ".join(f"{name!r} ({count})" for name, count in sorted(counts.items(), key=str))


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
