"""A worker in the way of Prefect 2: each flow run is one command of this host, with less priority."""

import os
import shlex
import signal
import socket
import subprocess
import sys

import anyio
from prefect.workers.base import BaseJobConfiguration, BaseVariables, BaseWorker, BaseWorkerResult
from pydantic import Field


class NiceConfiguration(BaseJobConfiguration):
    niceness: int = Field(default=0, description="How far to stand back.")
    motto: str = Field(default="", json_schema_extra={"template": "{{ greeting }}, {{ niceness }} times"})

    def prepare_for_flow_run(self, flow_run, deployment=None, flow=None):
        super().prepare_for_flow_run(flow_run, deployment, flow)
        mine = {"MOTTO": self.motto, "BELONGS_TO": f"{flow.name}/{deployment.name}"}
        self.env = {**os.environ, **self.env, **mine}
        self.labels["niceness"] = str(self.niceness)


class NiceVariables(BaseVariables):
    niceness: int = Field(default=5, ge=0, le=19, description="How far to stand back.")
    greeting: str = "After you"


class NiceResult(BaseWorkerResult):
    pass


class NiceWorker(BaseWorker):
    type = "nice"
    job_configuration = NiceConfiguration
    job_configuration_variables = NiceVariables
    _description = "Runs flows with manners."
    _display_name = "Nice"

    async def run(self, flow_run, configuration, task_status=None):
        argv = ["nice", "-n", str(configuration.niceness), *shlex.split(configuration.command)]
        logger = self.get_flow_run_logger(flow_run)
        process = await anyio.open_process(
            argv, env=configuration.env, stdout=subprocess.PIPE, stderr=None, start_new_session=True
        )
        async with process:
            identifier = f"{socket.gethostname()}:{process.pid}"
            if task_status:
                task_status.started(identifier)
            async for chunk in process.stdout:
                logger.info("says %s (%s)", chunk.decode().strip(), configuration.labels["niceness"])
            code = await process.wait()
        return NiceResult(identifier=identifier, status_code=code)

    async def kill_infrastructure(self, infrastructure_pid, configuration, grace_seconds=30):
        _, pid = infrastructure_pid.split(":")
        os.killpg(int(pid), signal.SIGTERM)
        self._logger.info("Asked %s of pool %s to end", pid, self._work_pool.name)


if __name__ == "__main__":
    anyio.run(NiceWorker(sys.argv[1]).start, True)
