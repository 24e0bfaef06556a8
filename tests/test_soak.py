"""Many trivial runs through one worker: what it needs stays what it was."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import FAST, ROOT
from misbehave import survivors

from procworker.testing import serving

pytestmark = [pytest.mark.slow, pytest.mark.long]

RUNS = int(os.environ.get("PROCWORKER_TEST_SOAK", "800"))
WARM_UP, CACHES = 0.2, 60
"""The part of the runs, and the least number of them, after which bounded caches and free lists are full."""
EVERY = 5
"""Runs between two looks."""
SLOPE = 1024.0
"""Bytes of resident memory that a run may cost for good."""
CONNECTIONS, THREADS = 8, 4
"""How many connections and threads more or less it may have, as four runs at once need more or fewer of them."""
SOAKED = Path(__file__).with_name("test_soak.py")
TEMPLATE = {
    "job_configuration": {"command": "{{ command }}", "stream_output": "{{ stream_output }}"},
    "variables": {"properties": {"command": {"default": "true"}, "stream_output": {"default": False}}},
}
"""Runs of a command of one's own that exits with 0: they are left Pending, and nothing but the worker is at work."""


def soak(report: str, runs: int, leak: int) -> None:
    """Be the worker, and write down every few runs: how many have ended, our memory, descriptors, threads, zombies.

    The first line is from before the loop, the last from after it.
    """
    import anyio

    from procworker.process import ProcessWorker

    kept: list[bytes] = []

    class Measured(ProcessWorker):
        async def _walk(self, run: Any) -> None:
            await super()._walk(run)
            kept.append(os.urandom(leak))
            if (ended := sum(self.outcomes.values())) % EVERY == 0:
                measure(ended)

    me = psutil.Process()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda room: None)  # what is free only looks like a leak
    with Path(report).open("w") as file:

        def measure(ended: int) -> None:
            gc.collect()
            trim(0)
            zombies = sum(child.status() == psutil.STATUS_ZOMBIE for child in me.children())
            facts = {"runs": ended, "rss": me.memory_info().rss, "fds": me.num_fds(), "threads": me.num_threads()}
            print(json.dumps({**facts, "zombies": zombies}), file=file, flush=True)

        async def main() -> None:
            worker = Measured("pool", limit=4, name="soaked", create_pool_if_not_found=False)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: worker.start(printer=lambda *line: None))
                while not worker.is_setup:  # noqa: ASYNC110 - it tells nobody
                    await anyio.sleep(0.01)
                await worker._moved.until(lambda: sum(worker.outcomes.values()) >= runs and not worker.runs)
                worker.stop()

        measure(0)
        anyio.run(main)
        measure(runs)


def measured(place: Path, count: int = RUNS, leak: int = 0) -> list[dict[str, int]]:
    """Soak a worker in a process of its own; what it measured."""
    with serving() as server:
        server.add_pool(base_job_template=TEMPLATE)
        source = server.add_deployment()
        for _ in range(count):
            server.schedule(source)
        path = os.pathsep.join([str(ROOT), str(SOAKED.parent)])
        environ = {**os.environ, **FAST, "PREFECT_API_URL": server.url, "PYTHONPATH": path}
        environ["PREFECT_LOGGING_TO_API_BATCH_INTERVAL"] = "0.2"  # else what waits to be sent looks like a leak
        argv = [sys.executable, str(SOAKED), str(place / "report"), str(count), str(leak)]
        with (place / "log").open("wb") as log:
            worker = subprocess.Popen(argv, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = worker.wait(60 + count)
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        assert code == 0, (place / "log").read_text()[-4000:]
        states = [[state.type for state in run.states] for run in server.runs.values()]
    assert states == [["SCHEDULED", "PENDING"]] * count
    return [json.loads(line) for line in (place / "report").read_text().splitlines()]


def slope(points: list[tuple[float, float]]) -> float:
    """The least-squares slope of y over x."""
    xs, ys = zip(*points, strict=True)
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x in xs)


def growth(rows: list[dict[str, int]]) -> float:
    """Bytes of resident memory per run, after the warm-up."""
    warm = max(WARM_UP * rows[-1]["runs"], CACHES)
    return slope([(row["runs"], row["rss"]) for row in rows if row["runs"] > warm])


def test_a_worker_needs_no_more_after_many_runs_than_after_a_few(tmp_path: Path) -> None:
    begin = time.monotonic()
    rows = measured(tmp_path)
    seconds, grown = time.monotonic() - begin, growth(rows)
    print(f"{RUNS} runs in {seconds:.1f} s, {grown:.0f} bytes a run, {rows[0]} .. {rows[-2]}, {rows[-1]}")

    assert grown < SLOPE
    first, warm, *_, last, after = [rows[0], *(row for row in rows[1:] if row["runs"] > WARM_UP * RUNS)]
    assert (after["fds"], after["threads"]) == (first["fds"], first["threads"])
    assert last["threads"] <= warm["threads"] + THREADS
    assert last["fds"] <= warm["fds"] + CONNECTIONS
    assert rows[-1]["zombies"] == 0
    assert survivors(f"PROCWORKER_HOME={os.environ['PROCWORKER_HOME']}") == {}
    assert [*Path(os.environ["PROCWORKER_HOME"]).glob("*/*")] == []
    assert [*Path(os.environ["TMPDIR"]).iterdir()] == []


def test_a_leak_of_a_few_kilobytes_a_run_would_be_found(tmp_path: Path) -> None:
    """The negative control."""
    assert growth(measured(tmp_path, count=120, leak=8192)) > 4 * SLOPE


if __name__ == "__main__":
    soak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
