"""A worker for a container engine whose client is synchronous; the engine is a stand-in of a few lines."""

from __future__ import annotations

import shlex
import subprocess
import sys
import uuid
from typing import Any

import anyio
import anyio.to_thread
from prefect.exceptions import InfrastructureNotFound
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from pydantic import Field


class Engine:
    """Keeps containers by an id that is no number."""

    def __init__(self) -> None:
        self.boxes: dict[str, subprocess.Popen[bytes]] = {}

    def create(self, image: str, command: list[str], env: dict[str, str], labels: dict[str, str]) -> str:
        id = uuid.uuid4().hex
        self.boxes[id] = subprocess.Popen(command, env={**env, "IMAGE": image, "LABEL": ",".join(sorted(labels))})
        return id

    def wait(self, id: str) -> int:
        return self.boxes[id].wait()

    def stop(self, id: str, timeout: int) -> None:
        if not isinstance(timeout, int):
            raise TypeError(f"timeout: an integer is required, not {timeout!r}")
        self.boxes[id].terminate()
        self.boxes[id].wait(timeout)

    def remove(self, id: str) -> None:
        del self.boxes[id]


class BoxConfiguration(BaseJobConfiguration):
    """How a container is made."""

    image: str
    memory: str = Field(default="512m", json_schema_extra={"template": "{{ memory_mb }}m"})
    mounts: list[str] = Field(default_factory=list)

    def prepare_for_flow_run(
        self,
        flow_run: Any,
        deployment: Any = None,
        flow: Any = None,
        work_pool: Any = None,
        worker_name: Any = None,
        **more: Any,
    ) -> None:
        super().prepare_for_flow_run(flow_run, deployment, flow, work_pool, worker_name, **more)
        self.labels = {name.replace("/", "."): value for name, value in self.labels.items()}
        self.name = "".join(c if c.isalnum() else "-" for c in str(self.name))

    def _base_environment(self) -> dict[str, str]:
        return {**super()._base_environment(), "IN_A_BOX": "yes"}

    @staticmethod
    def _base_flow_labels(flow: Any) -> dict[str, str]:
        return {"app": flow.name if flow else "none"}


class BoxVariables(BaseVariables):
    """What a deployment may set."""

    image: str = Field(default="python:3", description="The image of the container.")
    memory_mb: int = 512
    mounts: list[str] = Field(default_factory=list)


class BoxResult(BaseWorkerResult):
    """How a container ended."""


class BoxWorker(BaseWorker[BoxConfiguration, BoxVariables, BoxResult]):
    """One container for each flow run."""

    type: str = "boxes"
    job_configuration = BoxConfiguration
    job_configuration_variables = BoxVariables
    _logo_url = "https://example.com/box.png"

    def __init__(self, *args: Any, engine: Engine | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine = engine or Engine()
        self.asked: list[tuple[str, Any]] = []

    async def setup(self) -> None:
        await super().setup()
        self._logger.info("Boxes for pool %r are ready", self._work_pool_name)

    async def run(
        self, flow_run: Any, configuration: BoxConfiguration, task_status: anyio.abc.TaskStatus[str] | None = None
    ) -> BoxResult:
        command = shlex.split(str(configuration.command))
        env = {name: value for name, value in configuration.env.items() if value is not None}
        id = await anyio.to_thread.run_sync(self.engine.create, configuration.image, command, env, configuration.labels)
        if task_status is not None:
            task_status.started(f"box:{id}")
        code = await anyio.to_thread.run_sync(self.engine.wait, id)
        self.get_flow_run_logger(flow_run).info("%s of %s ended", configuration.name, configuration.memory)
        self.engine.remove(id)
        return BoxResult(identifier=f"box:{id}", status_code=code)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: BoxConfiguration, grace_seconds: int = 30
    ) -> None:
        self.asked.append((infrastructure_pid, grace_seconds))
        id = infrastructure_pid.partition(":")[2]
        if id not in self.engine.boxes:
            raise InfrastructureNotFound(f"Box {id} not found")
        await anyio.to_thread.run_sync(self.engine.stop, id, grace_seconds)


if __name__ == "__main__":
    anyio.run(BoxWorker(sys.argv[1]).start, True)
