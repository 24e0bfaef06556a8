"""The job of a process pool: what a deployment may set, and what a flow run's process is started with."""

from __future__ import annotations

import os
from pathlib import Path
from sys import intern
from typing import Literal

from pydantic import Field, PrivateAttr

from procworker.configuration import BaseJobConfiguration, BaseVariables
from procworker.settings import Settings
from procworker.system.child import join_command
from procworker.system.interpreter import Interpreter, find_interpreter, inherited, locate


class ProcessJobConfiguration(BaseJobConfiguration):
    """What one flow run process is started with."""

    stream_output: bool = True
    working_dir: Path | None = None
    python: str | None = None
    start_method: Literal["spawn", "fork"] = "spawn"
    timeout_seconds: float | None = Field(default=None, gt=0)
    grace_seconds: float | None = Field(default=None, ge=0)
    leftovers: Literal["kill", "allow"] = "kill"

    _interpreter: Interpreter | None = PrivateAttr(default=None)
    _age: float = PrivateAttr(default=0.0)
    """How many seconds ago the process of an adopted run was started."""

    def _base_environment(self) -> dict[str, str]:
        """Who prepares a job without a worker gets what a worker without options would hand down."""
        return self._inherit(None, Settings.load()) if self._inherited is None else self._inherited

    def _inherit(self, python: str | None, settings: Settings) -> dict[str, str]:
        """Our own environment and the settings; a configured command chooses its own Python."""
        chosen: str | None = None
        if self.command is None:
            self._interpreter = find_interpreter(self.python or python, os.environ)
            chosen = self._interpreter.path
        elif self.python:
            chosen = locate(self.python)
        env = {"PYTHONUNBUFFERED": "1", **inherited(os.environ, chosen), **settings.exported}
        return {intern(name): intern(value) for name, value in env.items()}  # hundreds of runs share them

    def _base_flow_run_command(self) -> str:  # type: ignore[override]
        python = self._interpreter.path if self._interpreter else "python"
        return join_command([python, "-m", "prefect.engine"])

    @property
    def _is_forkable(self) -> bool:
        wanted = self.start_method == "fork" and self._interpreter is not None
        return wanted and self.command == self._base_flow_run_command()


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
    start_method: Literal["spawn", "fork"] = Field(
        default="spawn",
        title="Start Method",
        description="How the engine is started: by a new Python, or by forking one that has imported it already.",
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
