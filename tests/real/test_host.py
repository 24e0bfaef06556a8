"""`procworker status`, `logs` and `stop` beside a worker on a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any
from uuid import uuid4

import pytest
from harness import HERE, Api, Place, Prefect, eventually, working

from procworker.process import ProcessWorker

pytestmark = pytest.mark.real


def command(place: Place, api: Api, *argv: str, code: int = 0) -> str:
    """What the command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "procworker", *argv],
        cwd=place.path / "cwd",
        env=place.environment(api),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_run_is_shown_read_and_ended(prefect38: Prefect, place: Place) -> None:
    """Its engine is told of the cancel, so its hooks run; its log is on the server then."""
    api, name = prefect38.api, f"seen-{uuid4().hex[:6]}"
    pool = api.pool(f"host-{uuid4().hex[:6]}", ProcessWorker.get_default_base_job_template())
    flow = f"{HERE / 'cancel_flows.py'}:python_loop"
    run = api.flow_run(api.deployment(pool, flow, "seen", env={"A_TOKEN": "canary-77"}), name)

    with working(place, api, "--pool", pool, "--python", prefect38.python) as worker:
        eventually(lambda: "ready" in place.marked(run), what="it runs")
        (shown,) = json.loads(command(place, api, "status", "--json"))["workers"]
        row: dict[str, Any] = shown["runs"][0]
        assert (shown["pool"], row["id"], row["name"], row["phase"]) == (pool, run, name, "running")
        assert row["memory_bytes"] > 20_000_000
        assert name in command(place, api, "logs", row["short_id"])

        assert command(place, api, "stop", name).startswith(f"Cancelled: flow run {name!r}")

        assert place.marked(run)["hooks"].split() == ["on_cancellation"]
        log = command(place, api, "logs", name, "-f", "-n", "50")
        assert "prefect.flow_runs.worker - Ending flow run" in log
        assert "prefect.flow_runs - " in log, "what the engine has sent"
        assert command(place, api, "status").strip().endswith("idle")
        assert worker.stop() == 0
