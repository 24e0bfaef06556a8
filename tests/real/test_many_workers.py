"""Fifty workers that are started at once on a server without a work pool."""

from __future__ import annotations

import re
import signal
import time
from contextlib import ExitStack
from uuid import uuid4

import pytest
from harness import Place, Prefect, Worker, eventually, working

pytestmark = [pytest.mark.real, pytest.mark.long]

WORKERS = 50
TROUBLE = re.compile(r"\| (ERROR|CRITICAL)|Traceback")


def test_fifty_workers_at_once_make_one_pool_and_all_run(
    prefect38: Prefect, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    api, pool = prefect38.api, f"new {uuid4().hex[:8]}"
    names = {f"worker {number}" for number in range(WORKERS)}
    heard: set[str] = set()
    as_by_default = {"PREFECT_WORKER_QUERY_SECONDS": "10"}
    begun = time.monotonic()

    def started() -> bool:
        assert all(worker.alive for worker in workers), "\n".join(worker.log for worker in workers if not worker.alive)
        return all("started!" in worker.log for worker in workers)

    def online() -> bool:
        assert started(), "a worker that has started works on"
        time.sleep(2)  # the server has enough to do
        rows = api("POST", f"/work_pools/{pool}/workers/filter", {"limit": 200})
        heard.update(row["name"] for row in rows if row["status"] == "ONLINE")
        return heard == names

    with ExitStack() as stack:
        workers: list[Worker] = []
        for name in names:
            options = ("-p", pool, "-n", name, "-t", "process")
            workers.append(stack.enter_context(working(place, api, *options, **as_by_default)))
        spawned = time.monotonic() - begun
        eventually(started, 120, "all workers have started")
        running = time.monotonic() - begun
        eventually(online, 400, "the server has a heartbeat of all workers")
        known = time.monotonic() - begun
        (found,) = (row for row in api("POST", "/work_pools/filter", {"limit": 200}) if row["name"] == pool)
        assert found["type"] == "process"
        assert found["base_job_template"]["job_configuration"]["python"] == "{{ python }}", "one of them gave it ours"
        told = time.monotonic()
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        codes = [worker.process.wait(60) for worker in workers]
        stopped = time.monotonic() - told
        assert codes == [0] * WORKERS
        assert not place.processes()
    for worker in workers:
        assert not TROUBLE.search(worker.log), worker.log
        assert worker.log.rstrip().endswith("stopped!"), worker.log
    assert not list((place.path / "state").rglob("run.json"))
    times = f"spawned in {spawned:.1f} s, started after {running:.1f} s, online after {known:.1f} s"
    with capsys.disabled():
        print(f"\n{WORKERS} workers: {times}, gone {stopped:.1f} s after SIGTERM")
