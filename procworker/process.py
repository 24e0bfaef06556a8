"""Run each flow run as one process tree on this host."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import anyio
from anyio.abc import TaskStatus
from pydantic import Field, PrivateAttr

from procworker.configuration import BaseJobConfiguration, BaseVariables, BaseWorkerResult
from procworker.errors import InfrastructureNotAvailable, InfrastructureNotFound
from procworker.run import CANCEL_GRACE_SECONDS
from procworker.server.models import FlowRun
from procworker.settings import secrets_in
from procworker.system.child import Child, explain_exit, join_command, parse_command, spawn
from procworker.system.interpreter import Interpreter, find_interpreter, inherited, locate
from procworker.system.output import Follower, Mask, RunDirectory, Sink, print_line
from procworker.system.tree import COOKIE, Family, describe
from procworker.worker import BaseWorker

SETTLE_SECONDS, LEFTOVER_GRACE_SECONDS = 0.5, 5.0
"""How long what a flow leaves behind may take to end by itself, and then after SIGTERM."""
TAIL_WIDTH = 2000


class ProcessJobConfiguration(BaseJobConfiguration):
    """What one flow run process is started with."""

    stream_output: bool = True
    working_dir: Path | None = None
    python: str | None = None
    timeout_seconds: float | None = Field(default=None, gt=0)
    grace_seconds: float | None = Field(default=None, ge=0)
    leftovers: Literal["kill", "allow"] = "kill"

    _interpreter: Interpreter | None = PrivateAttr(default=None)

    def _base_flow_run_command(self) -> str:  # type: ignore[override]
        python = self._interpreter.path if self._interpreter else "python"
        return join_command([python, "-m", "prefect.engine"])


class ProcessVariables(BaseVariables):
    """The job variables of process pools: Prefect's six and procworker's own."""

    stream_output: bool = Field(default=True, description="Print the output of flow runs where the worker prints.")
    working_dir: Path | None = Field(
        default=None,
        title="Working Directory",
        description="Directory that flow runs start in; by default a new temporary one, removed afterwards.",
    )
    python: str | None = Field(
        default=None,
        title="Python",
        description="The Python that runs the flow: a path, a virtual environment or a tox environment directory.",
    )
    timeout_seconds: float | None = Field(
        default=None,
        title="Timeout",
        description="Seconds after which a flow run is ended and reported as TimedOut.",
    )
    grace_seconds: float | None = Field(
        default=None,
        title="Grace",
        description="Seconds between SIGTERM and SIGKILL on cancel and timeout (30).",
    )
    leftovers: Literal["kill", "allow"] = Field(
        default="kill", description="What to do with processes that a flow leaves behind when it ends."
    )


class ProcessWorkerResult(BaseWorkerResult):
    """How a flow run process ended; the status code is minus the signal's number when a signal ended it."""


class ProcessWorker(BaseWorker[ProcessJobConfiguration, ProcessVariables, ProcessWorkerResult]):
    """A worker that starts flow runs as processes of its own host."""

    type = "process"
    job_configuration = ProcessJobConfiguration
    job_configuration_variables = ProcessVariables
    extra_variables = frozenset({"python", "timeout_seconds", "grace_seconds", "leftovers"})
    ends_with_run = True

    _description = "Runs each flow run as one process on this host, and leaves nothing behind."
    _display_name = "Process"
    _documentation_url = "https://docs.prefect.io/latest/"

    def __init__(self, *args: Any, python: str | None = None, sink: Sink = print_line, **options: Any) -> None:
        """As BaseWorker; `python` runs flows whose job names no other, `sink` takes their output line by line."""
        super().__init__(*args, **options)
        self._python = python
        self._sink = sink
        self._families: dict[str, Family] = {}

    def _inherited_environment(self, configuration: ProcessJobConfiguration) -> dict[str, str]:
        """Our own environment and the settings; a configured command chooses its own Python."""
        python: str | None = None
        if configuration.command is None:
            configuration._interpreter = find_interpreter(configuration.python or self._python, os.environ)
            python = configuration._interpreter.path
        elif configuration.python:
            python = locate(configuration.python)
        return {"PYTHONUNBUFFERED": "1", **inherited(os.environ, python), **self._settings.exported}

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: TaskStatus[Any] | None = None,
    ) -> ProcessWorkerResult:
        """Start the process, follow its output, wait for it and for everything it started.

        Raises SpawnError when it cannot be started.
        """
        cookie = f"{flow_run.id}.{uuid4().hex}"
        directory = RunDirectory.create(self._settings.state_home, cookie)
        try:
            with _working_directory(configuration.working_dir) as cwd:
                child = await spawn(
                    parse_command(configuration.command or configuration._base_flow_run_command()),
                    cwd=cwd,
                    env={**{k: v for k, v in configuration.env.items() if v is not None}, COOKIE: cookie},
                    stdout=directory.stdout,
                    stderr=directory.stderr,
                )
                return await self._watch(
                    flow_run, configuration, child, Family(child.identity, cookie), directory, task_status
                )
        finally:
            directory.remove()

    async def _watch(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        child: Child,
        family: Family,
        directory: RunDirectory,
        task_status: TaskStatus[Any] | None,
    ) -> ProcessWorkerResult:
        """Follow the output until the last process has gone; say how it ended."""
        mask = Mask(self._settings.secrets() | secrets_in(configuration.env))
        sink = partial(self._print, flow_run.name, mask) if configuration.stream_output else None
        follower = Follower(directory, sink)
        self._families[str(child.pid)] = family
        try:
            if task_status is not None:
                task_status.started(child.pid)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follower.follow)
                code = await child.wait()
                before = set(family.ended)
                if configuration.leftovers == "kill":
                    await family.end(LEFTOVER_GRACE_SECONDS, SETTLE_SECONDS, hurry=False)
                follower.end()
        except BaseException:
            # The worker is being torn down: what it started goes with it. KILL_SECONDS bounds this.
            with anyio.CancelScope(shield=True):
                await family.end(0.0)
                if child.identity not in family.survivors:
                    await child.wait()  # no zombie is left to a loop that closes next
            raise
        finally:
            del self._families[str(child.pid)]
        if left := family.ended - before:
            self.get_flow_run_logger(flow_run).warning(
                "Processes left behind by the flow run were ended: %d", len(left)
            )
        meaning = explain_exit(code)
        explanation = f"{meaning.text} {meaning.hint}" if code else ""
        remarks = []
        if family.survivors:
            remarks.append(f"Could not be killed: {', '.join(map(describe, family.survivors))}.")
        tail = [mask(line)[:TAIL_WIDTH] for line in follower.tail]
        return ProcessWorkerResult(
            identifier=str(child.pid), status_code=code, explanation=explanation, remarks=remarks, tail=tail
        )

    def _print(self, name: str, mask: Mask, stream: str, line: str) -> None:
        self._sink(stream, f"{name} | {mask(line)}")

    async def kill_infrastructure(
        self,
        infrastructure_pid: str,
        configuration: ProcessJobConfiguration,
        grace_seconds: float = CANCEL_GRACE_SECONDS,
    ) -> None:
        """End the whole tree of a run that this worker started: SIGTERM, the grace (seconds), SIGKILL.

        Raises InfrastructureNotFound when no such run lives here, InfrastructureNotAvailable for another host's.
        """
        host, _, pid = infrastructure_pid.rpartition(":")
        if host and host != socket.gethostname():
            raise InfrastructureNotAvailable(f"Process {pid} runs on host {host!r}, not on {socket.gethostname()!r}.")
        family = self._families.get(pid)
        if family is None:
            raise InfrastructureNotFound(f"Process {pid} was not started by this worker, or has ended.")
        await family.end(grace_seconds)


@contextmanager
def _working_directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        yield Path(os.path.expanduser(given))
        return
    with tempfile.TemporaryDirectory(prefix="procworker-", ignore_cleanup_errors=True) as path:
        yield Path(path)
