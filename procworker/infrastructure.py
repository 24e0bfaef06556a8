"""What a type of worker says of its infrastructure: how one flow run is run, ended, and taken over from the dead."""

from __future__ import annotations

import abc
import builtins
from typing import Any, ClassVar, Generic

from anyio.abc import TaskStatus

from procworker.configuration import C, R, V
from procworker.outcome import ExitUnknown
from procworker.registry import WorkerType
from procworker.run import CANCEL_GRACE_SECONDS
from procworker.server.models import FlowRun
from procworker.settings import Settings


class Infrastructure(WorkerType, abc.ABC, Generic[C, V, R]):
    """The part of a worker that a subclass writes; the rest is BaseWorker's."""

    job_configuration: builtins.type[C]
    job_configuration_variables: builtins.type[V] | None
    extra_variables: ClassVar[frozenset[str]] = frozenset()
    """Job variables that a pool made by Prefect does not know; added to its template when it has none of them."""
    ends_with_run: ClassVar[bool] = False
    """Whether nothing of a flow run is left when `run` returns or raises."""
    kept_fields: ClassVar[frozenset[str]] = frozenset()
    """What of a job configuration is written down, for whoever takes the run over; nothing that may hold a secret."""
    _settings: Settings

    @abc.abstractmethod
    async def run(self, flow_run: FlowRun, configuration: C, task_status: TaskStatus[Any] | None = None) -> R:
        """Run one flow run to its end.

        Call `task_status.started(identifier)` as soon as the infrastructure exists; return how it ended.
        """

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: C, grace_seconds: float = CANCEL_GRACE_SECONDS
    ) -> None:
        """End what `run` started, politely for at most grace_seconds; called again, the grace gets shorter.

        Raises InfrastructureNotFound or InfrastructureNotAvailable. Without an override, `run` itself is cancelled.
        """
        raise NotImplementedError(f"workers of type {self.type!r} cannot end what they start")

    async def _reattach(self, flow_run: FlowRun, configuration: C, task_status: TaskStatus[Any]) -> R:
        """Do for a run that a dead worker started what `run` does after the start, with what its record tells.

        Raises ExitUnknown when it is over, for a child of somebody else tells nobody how it ended.
        """
        raise ExitUnknown(f"Workers of type {self.type!r} cannot go on with a run that another one started.")

    async def _announce_cancel(self, identifier: str) -> None:
        """Tell what runs there that the end which comes next is a cancel."""

    def _inherited_environment(self, configuration: C) -> dict[str, str]:
        """What a job's `env` is laid over."""
        return dict(self._settings.exported)
