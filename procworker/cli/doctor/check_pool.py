"""Checks of a work pool: is there one for us, is it open, does work wait in it?"""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timezone

from procworker.cli.doctor.check_server import Server
from procworker.cli.doctor.findings import Finding, fail, ok, warn
from procworker.configuration import fill_template
from procworker.errors import ObjectNotFound, ProcworkerError, Unauthorized
from procworker.registry import WorkerType
from procworker.server.models import FlowRun, Worker, WorkPool, WorkQueue


def work_pool(server: Server, queue: str | None) -> list[Finding]:
    """Is there a pool for us, and is it open?"""
    name, answer = server.pool, server.answers.get("pool")
    what = f"work pool {name!r}"
    if isinstance(answer, ObjectNotFound):
        return warn(what, "does not exist", f"`procworker start --pool {name}` creates it; is the name right?")
    if isinstance(answer, Unauthorized):
        return []
    if not isinstance(answer, WorkPool):
        return warn(what, f"could not be read: {answer}", "see the findings above")
    pool = answer
    found = _type(what, pool)
    if pool.is_paused:
        found += warn(what, "is paused: nothing runs", f"prefect work-pool resume {name}")
    if pool.concurrency_limit == 0:
        found += warn(
            what, "has a concurrency limit of 0: nothing runs", f"prefect work-pool clear-concurrency-limit {name}"
        )
    if pool.base_job_template:
        try:
            fill_template(pool.base_job_template, {})
        except ProcworkerError as error:
            found += fail(
                what, f"its job template cannot be used: {error}", "`procworker template` prints one that can"
            )
    limit = "no limit" if pool.concurrency_limit is None else f"limit {pool.concurrency_limit}"
    if not found:
        found = ok(what, f"type {pool.type!r}, {limit}, {(pool.status or 'no status').lower().replace('_', ' ')}")
    return found + _queues(pool, server.said("queues") or [], queue)


def _type(what: str, pool: WorkPool) -> list[Finding]:
    if pool.type.endswith((":push", ":managed")) or pool.type == "prefect-agent":
        return fail(what, f"is of type {pool.type!r}, which no worker serves", "choose another --pool")
    known = WorkerType.get_all_available_worker_types()
    if pool.type not in known:
        text = f"is of type {pool.type!r}; here are workers for {', '.join(known)}"
        return fail(what, text, "choose another --pool, or install the package that offers that type")
    return []


def _queues(pool: WorkPool, queues: list[WorkQueue], wanted: str | None) -> list[Finding]:
    what = f"work pool {pool.name!r}"
    names = [queue.name for queue in queues]
    if wanted is not None and queues and wanted not in names:
        return fail(what, f"has no queue {wanted!r}", f"its queues are: {', '.join(names)}")
    mine = [queue for queue in queues if wanted in (None, queue.name)]
    shut = [queue.name for queue in mine if queue.is_paused or queue.concurrency_limit == 0]
    if shut:
        text = f"nothing comes from the queue {', '.join(map(repr, shut))}: paused, or with a limit of 0"
        return warn(what, text, f"prefect work-queue resume {shut[0]} --pool {pool.name}")
    return ok(what, f"queue {', '.join(names)}") if queues else []


def late_runs(server: Server, queue: str | None) -> list[Finding]:
    """Does work wait that nobody takes?"""
    runs: list[FlowRun] | None = server.said("late")
    if runs is None or server.said("pool") is None:
        return []
    if not runs:
        return ok("late runs", "none")
    counts = Counter(run.work_queue_name or "default" for run in runs)
    text = ", ".join(f"{number} in queue {name!r}" for name, number in counts.most_common())
    if queue is not None and queue not in counts:
        return warn(
            "late runs", text, f"queue {queue!r} has none: leave --work-queue out, or start a worker for theirs"
        )
    return warn("late runs", text, f"start a worker: procworker start --pool {server.pool}")


def workers(server: Server) -> list[Finding]:
    """Who else polls the pool?"""
    known: list[Worker] | None = server.said("workers")
    if known is None or server.said("pool") is None:
        return []
    now = datetime.now(timezone.utc)
    online = [worker for worker in known if worker.status == "ONLINE"]
    seen = [
        f"{w.name!r} ({(now - w.last_heartbeat_time).total_seconds():.0f} s ago)"
        for w in online
        if w.last_heartbeat_time
    ]
    return ok(
        "workers", f"{len(online)} online{': ' if seen else ''}{', '.join(seen[:5])}{' ...' if len(seen) > 5 else ''}"
    )
