"""A process worker for tests: it takes what is due on the scripted API, in a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.to_thread
from anyio.from_thread import start_blocking_portal

from procworker.errors import single
from procworker.process import ProcessWorker
from procworker.settings import Settings
from procworker.testing.beside import Beside
from procworker.testing.rows import Run

HASTE = {
    "PREFECT_WORKER_QUERY_SECONDS": "0.1",
    "PREFECT_WORKER_PREFETCH_SECONDS": "0",
    "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2",
}
"""A test waits for nobody; what the environment says otherwise wins."""
STOP_SECONDS = 60.0


class WorkerBeside:
    """A process worker of one pool. `options` are ProcessWorker's, and may be changed between two calls."""

    def __init__(self, api: Beside, pool: str = "pool", **options: Any) -> None:
        self.api = api
        self.pool = pool
        self.options = options
        self.output: list[str] = []
        """The lines that flow runs have printed, each after the name of its run."""

    def run_due(self, timeout: float = 120.0) -> list[Run]:
        """See out all flow runs that are due now, and return them; their `state` says how they ended.

        Raises TimeoutError after so many seconds; what still runs then is ended.
        """

        async def work() -> None:
            with anyio.fail_after(timeout):
                await _start(worker, run_once=True)

        worker = self._worker()
        with start_blocking_portal() as portal:
            portal.call(work)
        return [self.api.run(id) for id in worker._taken if id in self.api.runs]

    async def run_due_async(self, timeout: float = 120.0) -> list[Run]:
        """The same for a test with an event loop of its own, which goes on meanwhile."""
        return await anyio.to_thread.run_sync(self.run_due, timeout)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Have the worker poll for the length of the block; what still runs at its end is ended."""
        worker = self._worker()
        with start_blocking_portal() as portal:
            working = portal.start_task_soon(_start, worker)
            try:
                yield
            finally:
                for _ in range(2):  # take no more, then end what runs
                    portal.call(worker.stop)
                working.result(STOP_SECONDS)

    def _worker(self) -> ProcessWorker:
        settings = Settings.load({**HASTE, **os.environ, "PREFECT_API_URL": self.api.url})
        return ProcessWorker(self.pool, settings=settings, orphans="kill", sink=self._take, **self.options)

    def _take(self, stream: str, line: str) -> None:
        self.output.append(line)
        print(line)  # pytest shows it with a failure


async def _start(worker: ProcessWorker, run_once: bool = False) -> None:
    try:
        await worker.start(run_once, printer=lambda *line: None)
    except BaseException as error:
        # Task groups wrap even a single exception; who reads a failed test looks for the one that was raised.
        if (inner := single(error)) is error:
            raise
        raise inner from inner.__cause__
