"""A worker whose pools take what is secret from blocks, and what depends on the place from variables."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import anyio
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from pydantic import Field, SecretStr

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


class VaultJobConfiguration(BaseJobConfiguration):
    """Where and with what a job is started."""

    url: str = Field(json_schema_extra={"template": "https://{{ region }}.example/{{ queue }}"})
    token: SecretStr
    login: dict[str, Any] = Field(json_schema_extra={"template": {"user": "{{ user }}", "tags": ["{{ region }}", "x"]}})

    def prepare_for_flow_run(self, *args: Any, **kwargs: Any) -> None:
        super().prepare_for_flow_run(*args, **kwargs)
        own = {"URL": self.url, "TOKEN": self.token.get_secret_value(), "USER_NAME": self.login["user"]}
        self.env = {**os.environ, **self.env, **own, "TAGS": "+".join(self.login["tags"])}


class VaultVariables(BaseVariables):
    """What a pool offers; most of it comes from the server."""

    region: str = "{{ prefect.variables.region }}"
    token: SecretStr = Field(
        default=SecretStr("unset"), json_schema_extra={"default": "{{ prefect.blocks.secret.queue-token }}"}
    )
    user: str = "{{ prefect.blocks.secret.login.value.user }}"
    queue: str | None = "builds"


class VaultWorkerResult(BaseWorkerResult):
    """How a job ended."""


class VaultWorker(BaseWorker[VaultJobConfiguration, VaultVariables, VaultWorkerResult]):
    """Starts each job in a process that knows the secrets."""

    type = "vault"
    job_configuration = VaultJobConfiguration
    job_configuration_variables = VaultVariables

    async def run(
        self,
        flow_run: FlowRun,
        configuration: VaultJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> VaultWorkerResult:
        async with await anyio.open_process(
            shlex.split(configuration.command or ""), env=configuration.env, stdin=subprocess.DEVNULL, stderr=None
        ) as process:
            if task_status is not None:
                task_status.started(process.pid)
            said = b"".join([chunk async for chunk in process.stdout])
            code = await process.wait()
        for line in said.decode().splitlines():
            self.get_flow_run_logger(flow_run).info(line)
        return VaultWorkerResult(identifier=str(process.pid), status_code=code)

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: VaultJobConfiguration, grace_seconds: int = 30
    ) -> None:
        assert configuration.token.get_secret_value()
        os.kill(int(infrastructure_pid), 15)


if __name__ == "__main__":
    anyio.run(VaultWorker(sys.argv[1]).start, True)
