"""`procworker start` that kills itself with SIGKILL at a named point of its first run's line.

    python doomed.py POINT POOL [adopt | kill]

The world around it is told by the environment, as for the command.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import anyio

from procworker.process import ProcessWorker
from procworker.settings import Settings
from procworker.system.journal import Journal, Page
from procworker.system.subreaper import subreaper

POINTS = (
    "before claim",
    "after claim",
    "between spawn and journal",
    "after spawn",
    "after pid patch",
    "running",
    "during cancel",
    "after exit",
    "before report",
    "during report",
)
"""`running` is left to the test, which knows when the flow runs."""


def die(point: str) -> None:
    if point == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)


class DeadlyPage(Page):
    def write(self, **changes: Any) -> None:
        points = {"running": ("between spawn and journal", "after spawn"), "ended": ("after exit", "before report")}
        before, after = points.get(changes.get("phase", ""), ("", ""))
        die(before)
        super().write(**changes)
        die(after)


class DeadlyJournal(Journal):
    def page(self, *args: Any, **facts: Any) -> Page:
        page = super().page(*args, **facts)
        page.__class__ = DeadlyPage
        return page


class DeadlyClient:
    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def set_flow_run_state(self, id: Any, state: Any, **options: Any) -> Any:
        if claims := state["type"] == "PENDING":
            die("before claim")
        answer = await self._client.set_flow_run_state(id, state, **options)
        die("after claim" if claims else "during report")
        return answer

    async def update_flow_run(self, *args: Any, **options: Any) -> None:
        await self._client.update_flow_run(*args, **options)
        die("after pid patch")


class DoomedWorker(ProcessWorker):
    type = "doomed"

    async def setup(self) -> None:
        await super().setup()
        self._client = DeadlyClient(self._client)  # type: ignore[assignment]

    async def kill_infrastructure(self, *args: Any, **options: Any) -> None:
        async def die_soon() -> None:
            await anyio.sleep(0.3)
            die("during cancel")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(die_soon)
            await super().kill_infrastructure(*args, **options)


async def main() -> None:
    settings = Settings.load()
    DoomedWorker.type = "process"
    worker = DoomedWorker(sys.argv[2], settings=settings, name="doomed", orphans=sys.argv[3])  # type: ignore[arg-type]
    worker._journal = DeadlyJournal(settings.state_home)
    async with subreaper():
        await worker.start()


if __name__ == "__main__":
    anyio.run(main)
