"""A worker in an environment without Prefect runs flows of two generations of Prefect, and lends them nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from conftest import a_python
from harness import Api, Place, Worker, working

from procworker.testing import serving

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.package]

ROOT = Path(__file__).parents[2]
FLOWS = '''
import json
import os
import sys
import time
from pathlib import Path

import helper
import prefect


@prefect.flow
def meet(me: str, other: str) -> None:
    """Tells what it sees, and ends when both run."""
    saw = {"version": prefect.__version__, "prefix": sys.prefix, "path": sys.path, "environ": dict(os.environ)}
    saw |= {"helper": os.path.abspath(helper.__file__)}
    saw |= {"modules": [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]}
    here = Path(os.environ["MARKS"])
    (here / f".{me}").write_text(json.dumps(saw))
    (here / f".{me}").rename(here / me)
    deadline = time.monotonic() + 120
    while not (here / other).exists():
        assert time.monotonic() < deadline, f"{other} does not run"
        time.sleep(0.05)
'''


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with procworker and what it requires, and nothing else."""
    place = tmp_path_factory.mktemp("bare")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, place / "source", ignore=unwanted)
    venv.create(place / "venv", with_pip=True, symlinks=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    pip = [str(place / "venv" / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run([*pip, "install", str(place / "source")], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "venv"


@pytest.fixture
def bare_worker(bare: Path) -> type[Worker]:
    class BareWorker(Worker):
        program = (str(bare / "bin" / "procworker"),)

    return BareWorker


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def test_two_generations_run_at_once_and_see_nothing_of_the_workers_environment(
    place: Place, bare: Path, bare_worker: type[Worker]
) -> None:
    """Started in the activated environment, with a PYTHONPATH that is the user's and one entry that is not.

    The API is the one in memory: no real server of one generation is meant for the engines of both.
    """
    pythons = {"new": a_python("PROCWORKER_TEST_PREFECT38"), "old": a_python("PROCWORKER_TEST_PREFECT220")}
    assert not list(site_packages(bare).glob("prefect*"))
    project = place.path / "cwd"
    (project / "flows.py").write_text(FLOWS)
    (project / "helper.py").touch()
    activated = {
        "VIRTUAL_ENV": str(bare),
        "PATH": f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f".{os.pathsep}{site_packages(bare)}",
    }
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(project)}}
    with serving() as api:

        def flow_run(name: str, other: str) -> UUID:
            variables = {"python": str(Path(pythons[name]).parents[1]), "working_dir": str(project)}
            how = {"entrypoint": "flows.py:meet", "path": str(project), "pull_steps": [step]}
            deployment = api.add_deployment(name, flow="meet", job_variables=variables, **how)
            id: UUID = api.schedule(deployment, name=name, parameters={"me": name, "other": other})
            return id

        ids = [flow_run("new", "old"), flow_run("old", "new")]
        at = Api(api.url, None)
        with working(place, at, "-p", "pool", "-t", "process", kind=bare_worker, **activated) as worker:
            for id in ids:
                api.wait_state(id, "COMPLETED", timeout=120)
            assert worker.stop() == 0
        at.close()

    assert not place.processes()
    for name, version in (("new", "3.8."), ("old", "2.20.")):
        saw: dict[str, Any] = json.loads((place.path / "marks" / name).read_text())
        assert saw["version"].startswith(version)
        assert saw["prefix"] == str(Path(pythons[name]).parents[1])
        assert saw["helper"] == str(project / "helper.py")
        assert saw["environ"]["PYTHONPATH"] == "."
        lent = [text for text in (*saw["path"], *saw["modules"], *saw["environ"].values()) if str(bare) in text]
        assert not lent, lent
