"""Real engines of five generations run on the API in memory, without a server and without a complaint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import VERSIONS, a_python
from harness import Place

from procworker.testing import WorkerBeside, serving

pytestmark = pytest.mark.real

FLOWS = """
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact

attempts = []


@task(retries=2)
def third_time_lucky(name):
    attempts.append(name)
    if len(attempts) < 3:
        raise ValueError("bad luck")
    return name


@flow
def inner(name):
    return third_time_lucky(name)


@flow(log_prints=True)
def outer(name):
    print("inner said", inner(name))
    create_markdown_artifact("# Hello", key="hello")


@flow(retries=1)
def never():
    raise ValueError("no luck")
"""
SERVERS = {"38": "3.8.8", "3627": "3.6.27", "34": "3.4.25", "30": "3.0.11", "220": "2.20.26"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_flow_runs_on_the_api_in_memory(version: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks that are retried, a subflow, an artifact, logs; and a flow that fails and is retried."""
    python = a_python(f"PROCWORKER_TEST_PREFECT{version}")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    here = place.path / "cwd"
    (here / "flows.py").write_text(FLOWS)
    with serving(SERVERS[version]) as api:
        worker = WorkerBeside(api, python=python)
        outer = schedule(api, here, "outer", {"name": "ann"})
        (run,) = worker.run_due()
        never = schedule(api, here, "never", {})
        (lost,) = worker.run_due()

        assert (run.id, run.state.type) == (outer, "COMPLETED"), worker.output
        assert (lost.id, lost.state.type) == (never, "FAILED"), worker.output
        assert "no luck" in (lost.state.message or "")
        assert [state.name for state in lost.states][-3:] == ["AwaitingRetry", "Running", "Failed"]
        (subflow,) = (other for other in api.runs.values() if other.parent_task_run_id)
        assert subflow.state.type == "COMPLETED"
        (artifact,) = api.artifacts
        assert (artifact["key"], artifact["flow_run_id"]) == ("hello", str(outer))
        assert "inner said ann" in [record["message"] for record in api.logs]
        retried = [line for line in worker.output if "Retry" in line and "third_time_lucky" in line]
        assert len(retried) >= 2, worker.output
        # What the API lacks, engines complain of in their log.
        asked = [f"{request.method} {request.path}" for request in api.requests if request.status in (404, 405, 500)]
        known = ("PATCH /flow_runs", "POST /events") if version == "220" else ()
        assert not [line for line in asked if not line.startswith(known)]


def schedule(api: Any, place: Path, flow: str, parameters: dict[str, Any]) -> Any:
    deployment = api.add_deployment(flow, flow=flow, entrypoint=f"flows.py:{flow}", path=str(place))
    return api.schedule(deployment, parameters=parameters)
