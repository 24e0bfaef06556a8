"""Workers written against Prefect's classes work with their import lines changed, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import pytest
from workers import engine_command, working

from procworker.testing import PrefectApi

HERE = Path(__file__).parent
ROOT = HERE.parent
OURS = {"prefect.workers.base": "procworker", "prefect.exceptions": "procworker.errors"}


def imports_changed(file: Path) -> str:
    """The source of a worker with the lines changed that import Prefect's classes, and nothing else."""
    lines = file.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines):
        words = line.split()
        if words[:1] == ["from"] and words[1] in OURS:
            lines[number] = line.replace(words[1], OURS[words[1]], 1)
    return "".join(lines)


class Case(NamedTuple):
    """One such worker: its class, the environment that its children must have, and how its identifiers begin."""

    file: str
    name: str
    sees: dict[str, str]
    identifier: str

    @property
    def type(self) -> str:
        return self.file.removesuffix(".py")

    def arrange(self, server: PrefectApi, **parameters: Any) -> Any:
        """A due run of a deployment in a pool that the worker itself has still to fill."""
        server.add_pool(f"{self.type}-pool", type=self.type)
        server.add_variable("region", "eu")
        server.add_block("queue-token", "secret", {"value": "s3cret"})
        server.add_block("login", "secret", {"value": {"user": "ada"}})
        variables = {"command": engine_command()}
        deployment = server.add_deployment("nightly", flow="etl", pool=f"{self.type}-pool", job_variables=variables)
        return server.schedule(deployment, parameters={"env": sorted(self.sees), **parameters})

    def load(self, folder: Path) -> ModuleType:
        """The module, changed as its author would change it."""
        path = folder / self.file
        path.write_text(imports_changed(HERE / "subclasses" / self.file))
        spec = importlib.util.spec_from_file_location(f"changed_{self.type}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # annotations are looked up there
        spec.loader.exec_module(module)
        return module

    def worker(self, folder: Path) -> Any:
        return getattr(self.load(folder), self.name)(f"{self.type}-pool")


CASES = [
    Case(
        "nice.py", "NiceWorker", {"MOTTO": "After you, 5 times", "BELONGS_TO": "etl/nightly"}, f"{os.uname().nodename}:"
    ),
    Case(
        "boxes.py",
        "BoxWorker",
        {"IN_A_BOX": "yes", "IMAGE": "python:3", "LABEL": "app,prefect.io.deployment-id"},
        "box:",
    ),
    Case(
        "vault.py",
        "VaultWorker",
        {"URL": "https://eu.example/builds", "TOKEN": "s3cret", "USER_NAME": "ada", "TAGS": "eu+x"},
        "",
    ),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.type)


@pytest.fixture(autouse=True)
def the_servers_address(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such workers know nothing of settings objects: everything comes from the environment."""
    monkeypatch.setenv("PREFECT_API_URL", server.url)
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "0.05")
    monkeypatch.setenv("PREFECT_LOGGING_TO_API_BATCH_INTERVAL", "0.2")


@every
async def test_it_runs_what_is_due(
    case: Case, server: PrefectApi, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    id = case.arrange(server)
    async with working(case.worker(tmp_path)) as worker:
        await server.wait_state(id, "COMPLETED")
        await worker._moved.until(lambda: not worker.runs)
        pid = await server.wait_for(lambda: server.run(id).infrastructure_pid)

    assert pid.startswith(case.identifier)
    assert [state.type for state in server.run(id).states] == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]
    said = capfd.readouterr().out + "\n".join(log["message"] for log in server.logs)
    for name, value in case.sees.items():
        assert f"{name}={value}" in said
    executed = [event for event in server.events if event["event"] == "prefect.worker.executed-flow-run"]
    of_run = next(thing for thing in executed[0]["related"] if thing["prefect.resource.role"] == "flow-run")
    assert of_run["prefect.infrastructure.identifier"] == pid


@every
async def test_a_failure_of_its_infrastructure_is_reported(case: Case, server: PrefectApi, tmp_path: Path) -> None:
    id = case.arrange(server, do="nothing", code=7)
    async with working(case.worker(tmp_path)):
        state = await server.wait_state(id, "CRASHED")

    assert "status code 7" in str(state.message)


@every
async def test_a_cancel_ends_its_infrastructure(
    case: Case, server: PrefectApi, tmp_path: Path, no_survivors: Callable[[str], None]
) -> None:
    id = case.arrange(server, do="sleep", term="die")
    no_survivors(str(id))
    async with working(case.worker(tmp_path)) as worker:
        await server.wait_state(id, "RUNNING")
        server.request_cancel(id)
        await worker.check_for_cancelled_flow_runs()
        await server.wait_state(id, "CANCELLED")
        await worker._moved.until(lambda: not worker.runs)

    assert [state.type for state in server.run(id).states][-2:] == ["CANCELLING", "CANCELLED"]
    assert worker.outcomes == {"CANCELLED": 1}
    if case.type == "boxes":
        assert worker.asked == [(server.run(id).infrastructure_pid, 30)]
        assert not worker.engine.boxes


@every
async def test_stopping_the_worker_ends_its_infrastructure(
    case: Case, server: PrefectApi, tmp_path: Path, no_survivors: Callable[[str], None]
) -> None:
    id = case.arrange(server, do="sleep", term="die")
    no_survivors(str(id))
    async with working(case.worker(tmp_path)) as worker:
        await server.wait_state(id, "RUNNING")

    assert not worker.runs
    assert server.run(id).state.type == "CRASHED"


@every
async def test_its_pool_gets_its_template(case: Case, server: PrefectApi, tmp_path: Path) -> None:
    case.arrange(server)
    async with case.worker(tmp_path) as worker:
        template = server.pools[f"{case.type}-pool"].base_job_template
        assert template == worker.get_default_base_job_template() == worker.work_pool.base_job_template

    assert set(template["job_configuration"]) == set(worker.job_configuration.model_fields)


@every
async def test_it_runs_as_a_program(case: Case, server: PrefectApi, tmp_path: Path) -> None:
    id = case.arrange(server)
    (tmp_path / case.file).write_text(imports_changed(HERE / "subclasses" / case.file))
    done = await anyio.to_thread.run_sync(
        lambda: subprocess.run(
            [sys.executable, case.file, f"{case.type}-pool"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    )

    assert done.returncode == 0, done.stderr
    assert server.run(id).state.type == "COMPLETED"


async def test_a_container_that_is_gone_already_is_no_trouble(server: PrefectApi, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.type == "boxes")
    module = case.load(tmp_path)
    worker = module.BoxWorker("boxes-pool")

    with pytest.raises(module.InfrastructureNotFound, match="not found"):
        await worker.kill_infrastructure("box:gone", None, 30)


async def test_no_more_than_import_lines_are_changed() -> None:
    for case in CASES:
        theirs = (HERE / "subclasses" / case.file).read_text().splitlines()
        ours = imports_changed(HERE / "subclasses" / case.file).splitlines()
        changed = [new for old, new in zip(theirs, ours, strict=True) if old != new]
        assert all(line.startswith("from procworker") for line in changed)
        assert 1 <= len(changed) <= 2
