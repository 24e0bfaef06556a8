"""Submitting flows of one's own: entrypoints, runs, futures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.to_thread
import pytest
from workers import ScriptWorker, settings_for

from procworker.errors import ConfigurationError
from procworker.server.models import FlowRun
from procworker.submission import FlowRunFuture, entrypoint_of, flow_names
from procworker.testing.api import PrefectApi

FLOWS = """
from prefect import flow, task
import prefect
from elsewhere import borrowed as taken, other

@flow
def plain_one(): ...

@flow(name="Nice name", retries=2)
def named(): ...

@prefect.flow(log_prints=True)
async def attribute(): ...

@task
def no_flow(): ...

made = flow(lambda: None)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "flows.py"
    path.write_text(FLOWS)
    return path


def test_flows_are_found_without_running_their_file(file: Path) -> None:
    names = flow_names(file)

    assert names["plain_one"] == "plain-one"
    assert names["named"] == "Nice name"
    assert names["attribute"] == "attribute"
    assert {"made", "taken", "other"} <= set(names)
    assert "no_flow" not in names


def test_an_entrypoint_is_a_file_or_a_module_and_a_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)

    assert entrypoint_of("flows.py:named") == f"{file}:named"
    assert entrypoint_of("package.module:flow") == "package.module.flow"


@pytest.mark.parametrize(
    ("entrypoint", "fault"),
    [
        ("flows.py", "has no flow"),
        ("flows.py:", "has no flow"),
        ("flows.py:not-a-name", "has no flow"),
        ("flows.py:no_flow", "it has: .*plain_one"),
        ("missing.py:flow", "does not exist"),
    ],
)
def test_an_entrypoint_that_leads_nowhere_says_what_there_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, entrypoint: str, fault: str
) -> None:
    monkeypatch.chdir(file.parent)

    with pytest.raises(ConfigurationError, match=fault):
        entrypoint_of(entrypoint)


def test_a_flow_file_that_is_no_python_names_the_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ndef broken(:\n")

    with pytest.raises(ConfigurationError, match=r"broken\.py, line 2"):
        entrypoint_of(f"{broken}:flow")


def flow_object(function: Any, name: str = "a-flow") -> Any:
    return SimpleNamespace(fn=function, name=name, tags={"t"})


def top_level() -> None:
    """Stands for the function of a Prefect flow."""


def test_a_flow_object_is_known_by_its_file() -> None:
    def nested() -> None: ...

    assert entrypoint_of(flow_object(top_level)) == f"{__file__}:top_level"
    with pytest.raises(ConfigurationError, match="defined inside"):
        entrypoint_of(flow_object(nested))
    namespace: dict[str, Any] = {}
    exec("def typed_in(): ...", namespace)
    with pytest.raises(ConfigurationError, match="not in a file"):
        entrypoint_of(flow_object(namespace["typed_in"]))
    with pytest.raises(ConfigurationError, match="not int"):
        entrypoint_of(1)


def completing(server: PrefectApi, seen: dict[str, Any]) -> Any:
    async def script(flow_run: FlowRun, configuration: Any) -> int:
        seen["env"] = configuration.env
        seen["states"] = [state.type for state in server.run(flow_run.id).states]
        server.set_state(flow_run.id, "RUNNING")
        server.set_state(flow_run.id, "COMPLETED")
        return 0

    return script


async def test_a_submitted_flow_is_created_in_pending_and_runs_at_once(server: PrefectApi) -> None:
    seen: dict[str, Any] = {}
    worker = ScriptWorker(None, settings=settings_for(server), script=completing(server, seen))
    async with worker:
        future = await worker.submit(flow_object(top_level), {"x": 1}, {"env": {"A": "1"}})
        assert future.state.type == "PENDING"
        await future.wait_async(10)

    assert future.state.type == "COMPLETED"
    run = server.run(future.flow_run_id)
    assert run.parameters == {"x": 1}
    assert seen["states"] == ["PENDING"]
    assert seen["env"]["PREFECT__FLOW_ENTRYPOINT"] == f"{__file__}:top_level"
    assert seen["env"]["PREFECT_RESULTS_PERSIST_BY_DEFAULT"] == "true"
    assert seen["env"]["A"] == "1"
    assert [flow.name for flow in server.flows.values()] == ["a-flow"]


async def test_a_file_gives_its_flow_the_name_that_its_decorator_says(server: PrefectApi, file: Path) -> None:
    worker = ScriptWorker(None, settings=settings_for(server), script=completing(server, {}))
    async with worker:
        for entrypoint in (f"{file}:named", "package.module:my_flow"):
            await (await worker.submit(entrypoint)).wait_async(10)

    assert {flow.name for flow in server.flows.values()} == {"Nice name", "my-flow"}


async def test_parameters_that_are_not_json_are_refused_by_name(server: PrefectApi) -> None:
    async with ScriptWorker(None, settings=settings_for(server)) as worker:
        for value in (object(), float("nan")):
            with pytest.raises(ConfigurationError, match="'x'"):
                await worker.submit(flow_object(top_level), {"x": value})

    assert not server.runs


async def test_submissions_wait_for_the_limit(server: PrefectApi) -> None:
    release = anyio.Event()

    async def script(flow_run: FlowRun, configuration: Any) -> int:
        await release.wait()
        server.set_state(flow_run.id, "COMPLETED")
        return 0

    worker = ScriptWorker(None, settings=settings_for(server), script=script, limit=1)
    async with worker, anyio.create_task_group() as tasks:
        first = await worker.submit(flow_object(top_level))
        tasks.start_soon(worker.submit, flow_object(top_level))
        await server.wait_for(lambda: len(server.runs) == 2)
        await worker._moved.until(lambda: len(worker.started) == 1)
        release.set()
        await first.wait_async(10)

    assert len(worker.started) == 2


async def test_waiting_in_the_event_loop_is_refused_and_in_a_thread_it_works(server: PrefectApi) -> None:
    worker = ScriptWorker(None, settings=settings_for(server), script=completing(server, {}))
    async with worker:
        future = await worker.submit(flow_object(top_level))
        with pytest.raises(RuntimeError, match="wait_async"):
            future.wait()
        await anyio.to_thread.run_sync(future.wait, 10)

    assert future.state.type == "COMPLETED"


async def test_a_wait_may_time_out() -> None:
    future = FlowRunFuture(FlowRun.model_validate({"id": "00000000-0000-0000-0000-000000000001"}))

    with pytest.raises(TimeoutError):
        await future.wait_async(0.01)
    with pytest.raises(TimeoutError):
        await anyio.to_thread.run_sync(future.wait, 0.01)


async def test_a_result_needs_prefect_and_says_so(server: PrefectApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prefect", None)
    monkeypatch.setitem(sys.modules, "prefect.client.schemas", None)
    worker = ScriptWorker(None, settings=settings_for(server), script=completing(server, {}))
    async with worker:
        future = await worker.submit(flow_object(top_level))
        with pytest.raises(ConfigurationError, match=r"procworker\[prefect\]"):
            await future.aresult(10)
    with pytest.raises(ConfigurationError, match=r"procworker\[prefect\]"):
        await anyio.to_thread.run_sync(future.result)
