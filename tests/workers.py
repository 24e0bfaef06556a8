"""Workers for tests: one that runs a script of the test in place of infrastructure, and one of processes."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from procworker.configuration import BaseJobConfiguration, BaseVariables, BaseWorkerResult
from procworker.process import ProcessWorker
from procworker.settings import Settings
from procworker.testing.api import PrefectApi
from procworker.worker import BaseWorker

ENGINE = Path(__file__).with_name("engine.py")


def settings_for(server: PrefectApi, **environ: str) -> Settings:
    """Settings that know the server and poll it often."""
    fast = {
        "PREFECT_WORKER_QUERY_SECONDS": "0.05",
        "PREFECT_CLIENT_MAX_RETRIES": "1",
        "PREFECT_LOGGING_TO_API_BATCH_INTERVAL": "0.2",
    }
    return Settings.load({"PREFECT_API_URL": server.url, **fast, **environ})


class ScriptResult(BaseWorkerResult):
    """What a script ends with."""


class ScriptWorker(BaseWorker[BaseJobConfiguration, BaseVariables, ScriptResult]):
    """A worker whose infrastructure is a coroutine of the test; `started` holds what it was asked to run."""

    type = "process"
    job_configuration = BaseJobConfiguration

    def __init__(self, *args: Any, script: Callable[..., Awaitable[int]] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.script = script
        self.started: list[str] = []
        self.killed: list[tuple[str, float]] = []

    async def run(self, flow_run: Any, configuration: Any, task_status: Any = None) -> ScriptResult:
        self.started.append(str(flow_run.id))
        task_status.started(f"infra-{flow_run.id}")
        code = await self.script(flow_run, configuration) if self.script else 0
        return ScriptResult(identifier=f"infra-{flow_run.id}", status_code=code)


class LocalWorker(ScriptWorker):
    """One whose infrastructure ends with its `run`, as processes do."""

    ends_with_run = True


# The process worker of the package is the one that its type stands for.
BaseWorker._known["process"] = ProcessWorker


def engine_command() -> str:
    """The command that runs the mini engine in place of Prefect's."""
    return f"{sys.executable} -S -E {ENGINE}"


@asynccontextmanager
async def working(worker: BaseWorker[Any, Any, Any], **options: Any) -> AsyncIterator[Any]:
    """Have the worker work beside the test; afterwards it is told to stop, and must."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: worker.start(printer=lambda *line: None, **options))
        try:
            yield worker
        finally:
            with anyio.CancelScope(shield=True), anyio.fail_after(30):
                worker.stop()
                worker.stop()
                await worker._moved.until(lambda: not worker.runs)
