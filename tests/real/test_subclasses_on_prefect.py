"""The workers of tests/subclasses are what they say: unchanged, they run on Prefect."""

from __future__ import annotations

import subprocess

import pytest
from harness import Api, Place, Prefect
from test_subclasses import CASES, HERE, Case
from workers import engine_command

pytestmark = pytest.mark.real


def secret(api: Api, name: str, value: object) -> None:
    type_id = api("GET", "/block_types/slug/secret")["id"]
    schemas = api("POST", "/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [type_id]}}})
    body = {"name": name, "data": {"value": value}, "block_type_id": type_id, "block_schema_id": schemas[0]["id"]}
    api("POST", "/block_documents/", body)


@pytest.fixture(scope="session")
def api(prefect38: Prefect) -> Api:
    """A server that has what the workers ask for."""
    prefect38.api("POST", "/variables/", {"name": "region", "value": "eu"})
    secret(prefect38.api, "queue-token", "s3cret")
    secret(prefect38.api, "login", {"user": "ada"})
    return prefect38.api


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)
def test_it_runs_on_prefect_as_it_is(case: Case, prefect38: Prefect, api: Api, place: Place) -> None:
    pool = f"{case.type}-pool"
    api("POST", "/work_pools/", {"name": pool, "type": case.type})
    arguments = [prefect38.python, str(HERE / "subclasses" / case.file), pool]
    environ = place.environment(api, PYTHONPATH="")

    def run_it() -> str:
        done = subprocess.run(arguments, env=environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_it()  # gives the pool its template
    deployment = api.deployment(pool, "etl", "nightly", command=engine_command())
    run = api.flow_run(deployment, env=sorted(case.sees))
    said = run_it()

    (read,) = api.until_final(run)
    assert read["state_type"] == "COMPLETED"
    assert read["infrastructure_pid"].startswith(case.identifier)
    told = said + "\n".join(log["message"] for log in api.logs(run))
    for name, value in case.sees.items():
        assert f"{name}={value}" in told
