"""The README's examples with a real Prefect: the worker, with its import line changed, and the tests of a flow."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import a_python
from harness import Place, Prefect
from test_readme import run_tests_example, worker_example

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


def test_the_example_of_tests_runs_real_flows(place: Place) -> None:
    """On the API in memory: no server takes part."""
    home = str(place.path / "home")
    venv = str(Path(a_python("PROCWORKER_TEST_PREFECT38")).parents[1])
    said = run_tests_example(place.path / "cwd", VIRTUAL_ENV=venv, HOME=home, MARKS=str(place.path / "marks"))

    assert "4 passed" in said
    assert "Finished in state Completed()" in said
    assert not place.clear()
