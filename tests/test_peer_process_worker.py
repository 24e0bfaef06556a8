"""The process worker used as a library: a configuration resolved for a flow run, then `run` with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import pytest
from workers import engine_command, settings_for

from procworker.errors import SpawnError
from procworker.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult
from procworker.server.models import FlowRun
from procworker.system.child import join_command
from procworker.testing import PrefectApi


@pytest.fixture(autouse=True)
def its_server_stands_in_the_environment(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """What resolves a configuration by itself knows the settings of the process only."""
    monkeypatch.setenv("PREFECT_API_URL", server.url)


def printing(*names: str) -> dict[str, list[str]]:
    """Parameters that make the mini engine print these variables ("cwd" and "argv" among them)."""
    return {"env": list(names)}


class Library:
    """A process worker in its context, and what its runs print."""

    def __init__(self, server: PrefectApi, **options: Any) -> None:
        self.server = server
        self.lines: list[str] = []
        self.worker = ProcessWorker(
            "pool", settings=settings_for(server), sink=lambda stream, line: self.lines.append(line), **options
        )
        self.pids: list[Any] = []

    def started(self, value: Any = None) -> None:
        """What `task_status` calls."""
        self.pids.append(value)

    async def resolve(self, id: UUID) -> tuple[FlowRun, ProcessJobConfiguration]:
        worker = self.worker
        flow_run = await worker.client.read_flow_run(id)
        configuration = await worker.job_configuration.resolve_for_flow_run(
            flow_run,
            client=worker.client,
            work_pool=worker.work_pool,
            worker_name=worker.name,
            worker_id=worker.backend_id,
        )
        return flow_run, configuration

    async def run(self, id: UUID) -> tuple[ProcessJobConfiguration, ProcessWorkerResult]:
        flow_run, configuration = await self.resolve(id)
        with anyio.fail_after(20):
            result = await self.worker.run(flow_run=flow_run, configuration=configuration, task_status=self)  # type: ignore[arg-type]
        return configuration, result

    def said(self, name: str) -> str | None:
        """The value that the mini engine printed."""
        found = [line.partition(f"| {name}=")[2] for line in self.lines if f"| {name}=" in line]
        return found[0] if found else None


def pool(server: PrefectApi, **defaults: Any) -> None:
    """A process pool whose variables have these defaults; the command is the mini engine."""
    template = ProcessWorker.get_default_base_job_template()
    for name, value in {"command": engine_command(), **defaults}.items():
        template["variables"]["properties"][name]["default"] = value
    server.add_pool(type="process", base_job_template=template)


async def test_a_resolved_configuration_can_be_run(server: PrefectApi) -> None:
    pool(server)
    id = server.schedule(server.add_deployment())
    library = Library(server)
    async with library.worker:
        _, result = await library.run(id)

    assert isinstance(result, ProcessWorkerResult)
    assert (result.status_code, result.identifier) == (0, str(library.pids[0]))
    assert type(library.pids[0]) is int
    assert len(library.pids) == 1
    assert server.run(id).state.type == "COMPLETED"


async def test_a_flow_that_fails_by_its_own_word_is_a_success_of_its_process(server: PrefectApi) -> None:
    pool(server)
    id = server.schedule(server.add_deployment(), parameters={"do": "fail", "code": 0})
    library = Library(server)
    async with library.worker:
        _, result = await library.run(id)

    assert bool(result)
    assert server.run(id).state.type == "FAILED"


async def test_the_environment_is_ours_then_the_pools_then_the_deployments(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_OUTSIDE", "outside")
    monkeypatch.setenv("FROM_BOTH", "outside")
    pool(server, env={"FROM_POOL": "pool", "FROM_BOTH": "pool", "FROM_ALL": "pool"})
    deployment = server.add_deployment(
        job_variables={"env": {"FROM_DEPLOYMENT": "deployment", "FROM_ALL": "deployment"}}
    )
    names = ["FROM_OUTSIDE", "FROM_POOL", "FROM_BOTH", "FROM_DEPLOYMENT", "FROM_ALL"]
    id = server.schedule(deployment, parameters=printing(*names), job_variables={"env": {"FROM_ALL": "run"}})
    library = Library(server)
    async with library.worker:
        configuration, _ = await library.run(id)

    expected = ["outside", "pool", "pool", "deployment", "run"]
    assert [library.said(name) for name in names] == expected
    assert [configuration.env[name] for name in names] == expected


@pytest.mark.parametrize("how", ["spawned", "through the worker"])
async def test_what_tells_of_the_flow_run_around_the_worker_stays_outside(
    server: PrefectApi, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A worker inside a flow run: with the outer entrypoint an engine would run the outer flow again."""
    outer = ["PREFECT__FLOW_ENTRYPOINT", "PREFECT__DEPLOYMENT_NAME", "PREFECT__DEPLOYMENT_ID", "PREFECT__WORKER_ID"]
    outer += ["PREFECT__STORAGE_BASE_PATH", "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS"]
    for name in outer:
        monkeypatch.setenv(name, "the outer run's")
    pool(server)
    id = server.schedule(parameters=printing(*outer, "PREFECT__FLOW_RUN_ID"))
    library = Library(server)
    if how == "spawned":
        async with library.worker:
            await library.run(id)
    else:
        await library.worker.start(run_once=True, printer=lambda *line: None)

    assert library.said("PREFECT__FLOW_RUN_ID") == str(id)
    assert not [line for line in library.lines if "the outer run's" in line]


async def test_a_variable_of_the_run_wins_and_the_others_of_the_deployment_stay(
    server: PrefectApi, tmp_path: Path
) -> None:
    pool(server)
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    deployment = server.add_deployment(job_variables={"working_dir": str(theirs), "stream_output": False})
    plain, own = server.schedule(deployment), server.schedule(deployment, job_variables={"working_dir": str(mine)})
    library = Library(server)
    async with library.worker:
        _, of_deployment = await library.resolve(plain)
        _, of_run = await library.resolve(own)

    assert (of_deployment.working_dir, of_deployment.stream_output) == (theirs, False)
    assert (of_run.working_dir, of_run.stream_output) == (mine, False)


@pytest.mark.parametrize("given", [True, False], ids=["given", "temporary"])
async def test_it_runs_where_the_deployment_says_or_in_a_directory_of_its_own(
    server: PrefectApi, tmp_path: Path, given: bool
) -> None:
    pool(server)
    variables = {"working_dir": str(tmp_path)} if given else {}
    id = server.schedule(server.add_deployment(job_variables=variables), parameters=printing("cwd"))
    library = Library(server)
    async with library.worker:
        configuration, _ = await library.run(id)

    cwd = Path(str(library.said("cwd")))
    if given:
        assert cwd == configuration.working_dir == tmp_path
    else:
        assert configuration.working_dir is None
        assert cwd.is_relative_to(os.environ["TMPDIR"])
        assert not cwd.exists()


@pytest.mark.parametrize("shown", [True, False])
async def test_output_is_shown_unless_the_deployment_says_no(server: PrefectApi, shown: bool) -> None:
    pool(server)
    deployment = server.add_deployment(job_variables={} if shown else {"stream_output": False})
    id = server.schedule(deployment, parameters={"print": ["a line"]})
    library = Library(server)
    async with library.worker:
        configuration, result = await library.run(id)

    assert configuration.stream_output is shown
    assert bool([line for line in library.lines if line.endswith("| a line")]) is shown
    assert result.tail[-1:] == ["a line"]


async def test_a_command_of_the_deployments_own_is_run_as_it_was_written(server: PrefectApi, tmp_path: Path) -> None:
    pool(server)
    script = tmp_path / "a script.py"
    script.write_text("import sys; print(sys.argv[1:]); sys.exit(4)")
    command = join_command([sys.executable, "-S", "-E", str(script), "two words", "$HOME", "a;b"])
    id = server.schedule(server.add_deployment(job_variables={"command": command}))
    library = Library(server)
    async with library.worker:
        configuration, result = await library.run(id)

    assert configuration.command == command
    assert result.status_code == 4
    assert library.lines[0].endswith("| ['two words', '$HOME', 'a;b']")


async def test_null_takes_a_variable_from_the_child(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROM_OUTSIDE", "outside")
    pool(server)
    deployment = server.add_deployment(job_variables={"env": {"FROM_OUTSIDE": None, "KEPT": "kept"}})
    id = server.schedule(deployment, parameters=printing("FROM_OUTSIDE", "KEPT"))
    library = Library(server)
    async with library.worker:
        await library.run(id)

    assert library.said("FROM_OUTSIDE") == "None"
    assert library.said("KEPT") == "kept"


async def test_a_command_that_cannot_start_crashes_its_run_and_says_which(server: PrefectApi) -> None:
    pool(server)
    id = server.schedule(server.add_deployment(job_variables={"command": "no-such-command --at-all"}))
    library = Library(server)
    async with library.worker:
        with pytest.raises(SpawnError, match="'no-such-command' was not found"):
            await library.run(id)
    assert library.pids == []
    await library.worker.start(run_once=True, printer=lambda *line: None)

    assert server.run(id).state.type == "CRASHED"
    assert "'no-such-command' was not found" in str(server.run(id).state.message)


@pytest.mark.parametrize("polite", [True, False])
async def test_a_run_is_ended_by_its_pid_politely_or_at_once(
    server: PrefectApi, no_survivors: Callable[[str], None], polite: bool
) -> None:
    pool(server)
    parameters = {"do": "sleep", "seconds": 60, "term": "die" if polite else "ignore"}
    id = server.schedule(server.add_deployment(), parameters=parameters)
    no_survivors(str(id))
    library = Library(server)
    results: list[ProcessWorkerResult] = []

    async def run() -> None:
        results.append((await library.run(id))[1])

    async with library.worker, anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await server.wait_state(id, "RUNNING")
        await library.worker.kill_infrastructure(
            infrastructure_pid=str(library.pids[0]), configuration=ProcessJobConfiguration(), grace_seconds=30 * polite
        )

    assert results[0].status_code == -(signal.SIGTERM if polite else signal.SIGKILL)


async def test_several_runs_at_once_are_kept_apart(server: PrefectApi) -> None:
    pool(server)
    deployment = server.add_deployment()
    ids = [server.schedule(deployment, parameters={"code": code}) for code in (0, 3, 5)]
    library = Library(server)
    codes: dict[UUID, int] = {}

    async def run(id: UUID) -> None:
        codes[id] = (await library.run(id))[1].status_code

    async with library.worker, anyio.create_task_group() as tasks:
        for id in ids:
            tasks.start_soon(run, id)

    assert [codes[id] for id in ids] == [0, 3, 5]
    assert len(set(library.pids)) == 3


async def test_a_run_that_somebody_made_is_executed_under_its_own_id(server: PrefectApi) -> None:
    pool(server)
    id = server.schedule(server.add_deployment())
    library = Library(server)
    async with library.worker:
        flow_run = await library.worker.client.read_flow_run(id)
        future = await library.worker.execute(flow_run)
        await future.wait_async(20)

    assert (future.flow_run_id, future.state.type) == (id, "COMPLETED")
    assert [state.type for state in server.run(id).states] == ["SCHEDULED", "PENDING", "RUNNING", "COMPLETED"]
    assert len(server.runs) == 1


async def test_a_submitted_file_makes_a_run_of_its_own_and_tells_the_engine_what_to_run(
    server: PrefectApi, tmp_path: Path
) -> None:
    pool(server)
    flows = tmp_path / "flows.py"
    flows.write_text("from prefect import flow\n@flow\ndef hello(): ...\n")
    library = Library(server, name="w1")
    async with library.worker:
        library.worker.backend_id = uuid4()
        names = ["PREFECT__FLOW_ENTRYPOINT", "PREFECT__WORKER_NAME", "PREFECT__WORKER_ID"]
        future = await library.worker.submit(f"{flows}:hello", printing(*names))
        await future.wait_async(20)

    assert future.state.type == "COMPLETED"
    assert list(server.runs) == [future.flow_run_id]
    assert [library.said(name) for name in names] == [f"{flows}:hello", "w1", str(library.worker.backend_id)]
