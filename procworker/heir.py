"""End one run of a worker that is dead, in its place."""

from __future__ import annotations

from contextlib import suppress
from uuid import UUID

import anyio

from procworker.errors import ApiError
from procworker.process import ProcessWorker
from procworker.run import ASK_SECONDS, CANCEL_GRACE_SECONDS
from procworker.server.models import State, new_state
from procworker.settings import Settings
from procworker.shift import LAST_REPORT_SECONDS


async def end_run_of_dead(
    settings: Settings, flow_run_id: str, owner: str, grace: float | None
) -> tuple[State | None, int] | None:
    """Take one run over, cancel it and report that; None when its worker lives, or somebody else was faster.

    Returns the final state and how many processes could not be killed. What cannot be reported in time stays on disk
    for the next start of a worker.
    """
    async with ProcessWorker(None, name="procworker stop", settings=settings) as worker:
        page = worker._journal.take_over_run(flow_run_id, owner)
        if page is None:
            return None
        data = page.data
        if data.get("phase") != "ended":
            # Before anybody goes on with it, so that it is not started first.
            facts, job = data.get("facts") or {}, data.get("job") or {}
            page.write(
                facts={**facts, "reason": facts.get("reason") or "cancelled"},
                job=job if grace is None else {**job, "grace_seconds": grace},
            )
            with anyio.move_on_after(ASK_SECONDS), suppress(ApiError):
                await worker.client.set_flow_run_state(UUID(flow_run_id), new_state("CANCELLING"), retries=0)
        worker._resume([page])
        run = worker.runs.get(UUID(flow_run_id))
        if run is not None:
            seconds = CANCEL_GRACE_SECONDS if grace is None else grace
            run.reporting.deadline = anyio.current_time() + seconds + LAST_REPORT_SECONDS
            await worker._moved.until(lambda: not worker.runs)
        return run.final_state if run is not None else None, worker.unkilled
