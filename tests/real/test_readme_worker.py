"""The README's example of a worker, with its import line changed, runs on Prefect."""

from __future__ import annotations

import subprocess

import pytest
from harness import Place, Prefect
from test_readme import worker_example

pytestmark = pytest.mark.real

PREFECTS = "from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult"


def test_the_example_runs_on_prefect_too(prefect38: Prefect, place: Place) -> None:
    api = prefect38.api
    ours = next(line for line in worker_example().splitlines() if line.startswith("from procworker"))
    (place.path / "echo.py").write_text(worker_example().replace(ours, PREFECTS))
    api("POST", "/work_pools/", {"name": "echoes", "type": "echo"})
    arguments = [prefect38.python, str(place.path / "echo.py"), "echoes"]
    environ = place.environment(api, PYTHONPATH="")

    def run_it() -> str:
        done = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_it()  # gives the pool its template
    run = api.flow_run(api.deployment("echoes", "succeed", "echo", word="Goodbye"))

    assert f"Goodbye, world! ({run})" in run_it()
