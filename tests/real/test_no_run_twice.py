"""Two workers that poll one pool over each other start every flow run exactly once.

A server whose database is SQLite takes the claim of the second worker as late as it gets its lock: when the run may
have ended already, and then it accepts (contract 0). Such a claim must neither start the run again nor hide its end.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest
from harness import Place, Prefect, eventually, working

from procworker.process import ProcessWorker

pytestmark = pytest.mark.real

RUNS = int(os.environ.get("PROCWORKER_TEST_RUNS", "60"))
# Every start appends a line, in one write, and ends in a way that the worker must report.
SCRIPT = """
echo "$PREFECT__FLOW_RUN_ID $PREFECT__WORKER_NAME" >> "$MARKS/starts"
exit 7
"""


@pytest.mark.parametrize("prefect", ["prefect38", "prefect220"])
def test_every_run_is_started_once(prefect: str, place: Place, request: pytest.FixtureRequest) -> None:
    installed: Prefect = request.getfixturevalue(prefect)
    api = installed.api
    script = place.path / "start.sh"
    script.write_text(SCRIPT)
    pool = api.pool(f"twice {uuid4().hex[:8]}", ProcessWorker.get_default_base_job_template())
    deployment = api.deployment(pool, "answer", "short", command=f"sh {script}")
    runs = [api.flow_run(deployment, f"run {number}") for number in range(RUNS)]
    with (
        working(place, api, "--pool", pool, "--name", "one") as one,
        working(place, api, "--pool", pool, "--name", "two") as two,
    ):
        api.until_final(*runs, seconds=60 + RUNS)
        eventually(lambda: not any((place.path / "state" / "runs").iterdir()), what="no run has a directory")
        assert (one.stop(), two.stop()) == (0, 0)
    starts = [line.split() for line in Path(place.path / "marks" / "starts").read_text().splitlines()]
    assert Counter(run for run, _ in starts) == Counter(runs)
    assert {worker for _, worker in starts} == {"one", "two"}
    for run in api.read_all(runs):
        history = [(state["timestamp"], state["type"], state["message"]) for state in api.states(run["id"])]
        assert run["state_type"] == "CRASHED", history
        assert "status code 7" in history[-1][2], history
