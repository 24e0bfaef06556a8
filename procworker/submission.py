"""Start flow runs of one's own choice: a flow object or an entrypoint becomes a run on the server, and a future."""

from __future__ import annotations

import ast
import asyncio
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import anyio

from procworker.errors import ConfigurationError, Rejected
from procworker.server.client import Client
from procworker.server.models import FlowRun, State, new_state

ENTRYPOINT = "PREFECT__FLOW_ENTRYPOINT"


class FlowRunFuture:
    """The end of a submitted flow run; names and meanings are those of Prefect's PrefectFlowRunFuture."""

    def __init__(self, flow_run: FlowRun) -> None:
        self._flow_run = flow_run
        self._final: Future[State | None] = Future()
        self._done = anyio.Event()

    @property
    def flow_run_id(self) -> UUID:
        return self._flow_run.id

    @property
    def state(self) -> State:
        """The final state, once it is known; the first one before."""
        final = self._final.result() if self._final.done() else None
        return final or self._flow_run.state or State(type="PENDING", name="Pending")

    def finish(self, state: State | None) -> None:
        """Called by the worker when the run's outcome is known (None: it could not be found out)."""
        self._final.set_result(state)
        self._done.set()

    def wait(self, timeout: float | None = None) -> None:
        """Wait in a thread of its own for at most timeout seconds; raises TimeoutError."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            try:
                self._final.result(timeout)
            except FutureTimeout:  # another class than the builtin on Python 3.10
                raise TimeoutError from None
        else:
            raise RuntimeError("wait() would block the event loop that runs the flow: use `await future.wait_async()`")

    async def wait_async(self, timeout: float | None = None) -> None:
        """Wait for the end for at most timeout seconds; raises TimeoutError."""
        with anyio.fail_after(timeout):
            await self._done.wait()

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        """Wait, then return what the flow returned; needs Prefect and a persisted result."""
        self.wait(timeout)
        return anyio.run(partial(self.aresult, raise_on_failure=raise_on_failure))

    async def aresult(self, timeout: float | None = None, raise_on_failure: bool = True) -> Any:
        """Wait, then return what the flow returned (or its exception, when not raised).

        Raises ConfigurationError where Prefect cannot be imported: only it can read its results.
        """
        if not self._final.done():
            await self.wait_async(timeout)
        try:
            from prefect import flow  # noqa: F401 - until then State is incomplete in Prefect 3.0
            from prefect.client.schemas import State as PrefectState
        except ImportError as error:
            raise ConfigurationError(
                "reading a flow's result needs Prefect: pip install 'procworker[prefect]'"
            ) from error
        validate = getattr(PrefectState, "model_validate", None) or PrefectState.parse_obj  # Prefect 2.20
        state = validate(self.state.model_dump(mode="json"))
        if hasattr(state, "aresult"):
            return await state.aresult(raise_on_failure=raise_on_failure)
        return await state.result(raise_on_failure=raise_on_failure, fetch=True)  # Prefect 2.20


def entrypoint_of(flow: Any) -> str:
    """Return "file.py:name" or "package.module.name" for a Prefect flow object or an entrypoint.

    Raises ConfigurationError for flows without a file and for entrypoints that lead nowhere.
    """
    if isinstance(flow, str):
        return _check_entrypoint(flow)
    function = getattr(flow, "fn", None)
    if function is None:
        raise ConfigurationError(f"submit takes a Prefect flow or 'file.py:flow', not {type(flow).__name__}")
    file = function.__code__.co_filename
    if not os.path.isfile(file):
        raise ConfigurationError(
            f"flow {flow.name!r} is not in a file (but {file}): write it into one and submit 'file.py:flow'"
        )
    if "." in function.__qualname__:
        raise ConfigurationError(
            f"flow {flow.name!r} is defined inside {function.__qualname__!r}: move it to the top of its file"
        )
    return f"{os.path.abspath(file)}:{function.__name__}"


def _check_entrypoint(entrypoint: str) -> str:
    place, _, name = entrypoint.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigurationError(
            f"entrypoint {entrypoint!r} has no flow: write it as file.py:flow or package.module:flow"
        )
    if not place.endswith(".py") and os.sep not in place:
        return f"{place}.{name}"
    path = Path(place).expanduser().absolute()
    if not path.is_file():
        raise ConfigurationError(f"flow file {place!r} does not exist (looked in {path.parent})")
    functions = list(flow_names(path))
    if name not in functions:
        raise ConfigurationError(f"{place!r} has no flow {name!r}; it has: {', '.join(functions) or 'none'}")
    return f"{path}:{name}"


def flow_names(path: Path) -> dict[str, str]:
    """Return the flow name of each top-level function decorated with `flow`, read without running the file.

    Raises ConfigurationError when it is not valid Python.
    """
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise ConfigurationError(f"{path}{f', line {line}' if line else ''}: {getattr(error, 'msg', error)}") from error
    names = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                call = decorator if isinstance(decorator, ast.Call) else None
                target = call.func if call else decorator
                if (getattr(target, "attr", None) or getattr(target, "id", None)) == "flow":
                    given = {k.arg: k.value for k in call.keywords} if call else {}
                    given_name = given.get("name")
                    own = given_name.value if isinstance(given_name, ast.Constant) else None
                    names[node.name] = str(own or node.name.replace("_", "-"))
        elif isinstance(node, ast.Assign | ast.ImportFrom):
            # A flow may also come from a call or another module: leave it to Prefect to find out.
            targets = node.targets if isinstance(node, ast.Assign) else []
            for bound in [t.id for t in targets if isinstance(t, ast.Name)]:
                names.setdefault(bound, bound.replace("_", "-"))
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    names.setdefault(alias.asname or alias.name, (alias.asname or alias.name).replace("_", "-"))
    return names


async def create_adhoc_run(
    client: Client,
    flow: Any,
    entrypoint: str,
    parameters: Mapping[str, Any] | None,
    job_variables: Mapping[str, Any] | None,
    transition_id: UUID,
    work_pool_name: str | None,
    name: str | None = None,
) -> FlowRun:
    """Register the flow and a run of it in PENDING, which no poller sees; the child finds its code by itself.

    Raises ConfigurationError when a parameter is not JSON.
    """
    parameters = dict(parameters or {})
    for parameter, value in parameters.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"parameter {parameter!r} cannot be sent as JSON: {error}") from error
    pending = new_state("PENDING", transition_id=transition_id)
    flow_id = await client.create_flow(flow_name(flow, entrypoint), sorted(getattr(flow, "tags", ())))
    try:
        flow_run = await client.create_flow_run(
            flow_id, parameters=parameters, state=pending, work_pool_name=work_pool_name, name=name
        )
    except Rejected as error:
        if error.status_code != 422 or work_pool_name is None:
            raise
        # Servers of 2.x keep no pool for runs without a deployment.
        flow_run = await client.create_flow_run(flow_id, parameters=parameters, state=pending, name=name)
    variables = adhoc_variables(flow, entrypoint, job_variables)
    return flow_run.model_copy(update={"job_variables": variables})


def adhoc_variables(flow: Any, entrypoint: str, job_variables: Mapping[str, Any] | None) -> dict[str, Any]:
    """The job variables of a run that finds its code by itself."""
    variables = dict(job_variables or {})
    persist = {} if isinstance(flow, str) else {"PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true"}
    return {**variables, "env": {**persist, **(variables.get("env") or {}), ENTRYPOINT: entrypoint}}


def flow_name(flow: Any, entrypoint: str) -> str:
    """What the flow is called on the server."""
    if not isinstance(flow, str):
        return str(flow.name)
    path, _, name = entrypoint.rpartition(":")
    if path:
        return flow_names(Path(path)).get(name, name)
    return entrypoint.rpartition(".")[2].replace("_", "-")
