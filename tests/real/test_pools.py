"""Work pools of every origin: procworker serves Prefect's, Prefect serves procworker's, and `<< >>` works for real."""

from __future__ import annotations

import copy
import json
import subprocess
from typing import Any
from uuid import uuid4

import pytest
from harness import Api, Place, Prefect, eventually, working

from procworker.process import ProcessWorker

pytestmark = pytest.mark.real

TEMPLATE_OF_PREFECT = """
import json
from prefect.workers.process import ProcessWorker
print(json.dumps(ProcessWorker.get_default_base_job_template()))
"""


def a_name() -> str:
    return f"pool {uuid4().hex[:8]}"


def template_of(prefect: Prefect, place: Place) -> dict[str, Any]:
    """The job template that Prefect itself gives a new process pool."""
    command = [prefect.python, "-c", TEMPLATE_OF_PREFECT]
    done = subprocess.run(command, capture_output=True, env=place.environment(prefect.api), check=True, cwd=place.path)
    template: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return template


def state_of(run: dict[str, Any]) -> str:
    return f"{run['state_type']} {run['state_name']}: {run['state']['message']}"


def test_procworker_serves_a_pool_of_prefect(prefect38: Prefect, place: Place) -> None:
    """With its own job variables too, which the pool's template does not know; and it leaves the template alone."""
    api, template = prefect38.api, template_of(prefect38, place)
    pool = api.pool(a_name(), template)
    plain = api.flow_run(api.deployment(pool, "look_around", "plain", env={"GIVEN": "given"}))
    timed = api.flow_run(api.deployment(pool, "sleep", "timed", timeout_seconds=1))
    lost = api.flow_run(api.deployment(pool, "answer", "lost", python="/no/python"))
    with working(place, api, "--pool", pool, "--python", prefect38.python) as worker:
        ended = api.until_final(plain, timed, lost)
        assert worker.stop() == 0
    assert [run["state_name"] for run in ended] == ["Completed", "TimedOut", "Crashed"], [*map(state_of, ended)]
    assert "'/no/python' does not exist" in ended[2]["state"]["message"]
    assert place.marked(plain)["given"] == "given"
    assert api("GET", f"/work_pools/{pool}")["base_job_template"] == template


def test_prefect_serves_a_pool_of_procworker(prefect38: Prefect, place: Place) -> None:
    """Created by procworker's worker, and served by it first."""
    api, pool = prefect38.api, a_name()
    with working(place, api, "--pool", pool, "--python", prefect38.python) as worker:
        wait_for_pool(api, pool)
        deployment = api.deployment(pool, "look_around", "either", env={"GIVEN": "given"}, python=prefect38.python)
        by_procworker = api.flow_run(deployment)
        api.until_final(by_procworker)
        assert worker.stop() == 0
    created = api("GET", f"/work_pools/{pool}")
    assert created["type"] == "process"
    assert created["base_job_template"] == ProcessWorker.get_default_base_job_template()

    by_prefect = api.flow_run(deployment)
    command = [prefect38.python, "-m", "prefect", "worker", "start", "--type", "process", "--pool", pool, "--run-once"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=place.environment(api),
            cwd=place.path,
            timeout=120,
        )
    finally:
        place.clear()
    ended = api.until_final(by_procworker, by_prefect, seconds=5)
    assert [run["state_name"] for run in ended] == ["Completed", "Completed"], done.stdout + done.stderr
    assert place.marked(by_prefect)["given"] == "given"


def test_a_pool_may_spell_placeholders_with_angle_brackets(prefect38: Prefect, place: Place) -> None:
    """Defaults, values of a run, types, and the worker's environment; what nobody knows stays as it is."""
    api, template = prefect38.api, copy.deepcopy(ProcessWorker.get_default_base_job_template())
    job, properties = template["job_configuration"], template["variables"]["properties"]
    job.update({name: value.replace("{{", "<<").replace("}}", ">>") for name, value in job.items()})
    job["env"] = {"GIVEN": "<< greeting >>, << who >> of << $PLACE >> <<EOF >>"}
    properties.update(greeting={"type": "string", "default": "hello"}, who={"type": "string"})
    pool = api.pool(a_name(), template)
    deployment = api.deployment(pool, "look_around", "angled", who="ann", timeout_seconds=100)
    run = api.flow_run(deployment)
    with working(place, api, "--pool", pool, "--python", prefect38.python, PLACE="here") as worker:
        (ended,) = api.until_final(run)
        assert worker.stop() == 0
    assert ended["state_type"] == "COMPLETED", state_of(ended)
    assert place.marked(run)["given"] == "hello, ann of here <<EOF >>"


def test_procworker_serves_a_pool_of_prefect_2_20(prefect220: Prefect, place: Place) -> None:
    api = prefect220.api
    pool = api.pool(a_name(), template_of(prefect220, place))
    plain = api.flow_run(api.deployment(pool, "look_around", "plain", env={"GIVEN": "given"}))
    timed = api.flow_run(api.deployment(pool, "sleep", "timed", timeout_seconds=1))
    with working(place, api, "--pool", pool, "--python", prefect220.python) as worker:
        ended = api.until_final(plain, timed)
        assert worker.stop() == 0
    assert [run["state_name"] for run in ended] == ["Completed", "TimedOut"], [*map(state_of, ended)]
    assert place.marked(plain)["given"] == "given"


def wait_for_pool(api: Api, pool: str) -> None:
    eventually(lambda: api("POST", "/work_pools/filter", {"work_pools": {"name": {"any_": [pool]}}}), what="the pool")
