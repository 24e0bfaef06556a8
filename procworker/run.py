"""One flow run on this worker, from poll to report."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from logging import Logger
from typing import Any, ClassVar, Protocol
from uuid import UUID, uuid4

import anyio
from anyio.abc import TaskGroup, TaskStatus
from pydantic import ValidationError

from procworker.claim import Claim, without_deployment
from procworker.configuration import BaseJobConfiguration, BaseWorkerResult
from procworker.errors import (
    InfrastructureNotFound,
    ObjectNotFound,
    ProcworkerError,
    Rejected,
    single,
)
from procworker.job import JobHost, fill_job, prepare_job
from procworker.logs import RunLogger
from procworker.loops import patiently
from procworker.outcome import DeploymentGone, ExitUnknown, Facts, Reason, one_line
from procworker.record import ForgottenPage, Journal, Page, Record
from procworker.redaction import mask_of
from procworker.report import Report
from procworker.server.client import Client
from procworker.server.models import Deployment, Flow, FlowRun, State, WorkPool, new_state
from procworker.server.outbox import Outbox
from procworker.sources import Sources
from procworker.submission import FlowRunFuture

CANCEL_GRACE_SECONDS, STOP_GRACE_SECONDS, ASK_SECONDS = 30.0, 10.0, 2.0


class Host(JobHost, Protocol):
    """What a run asks of the worker that walks it."""

    type: str
    ends_with_run: ClassVar[bool]
    kept_fields: ClassVar[frozenset[str]]
    _journal: Journal
    _outbox: Outbox | None
    _work_pool: WorkPool | None
    _known_secrets: frozenset[str]

    @property
    def client(self) -> Client: ...
    async def run(self, flow_run: FlowRun, configuration: Any, task_status: TaskStatus[Any] | None = None) -> Any: ...
    async def kill_infrastructure(self, infrastructure_pid: str, configuration: Any, grace_seconds: float) -> None: ...
    async def _reattach(self, flow_run: FlowRun, configuration: Any, task_status: TaskStatus[Any]) -> Any: ...
    async def _announce_cancel(self, identifier: str) -> None: ...
    def _signature(self) -> dict[str, Any]: ...
    def _in_background(self, work: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None: ...
    def _run_moved(self) -> None: ...
    def _emit(self, event: str, run: Any, follows: Mapping[str, Any] | None = None) -> dict[str, Any] | None: ...


class Started(TaskStatus[Any]):
    """The `task_status` that a worker's `run` reports its identifier to; any value is taken, once."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take: Callable[[str], None] | None = take

    def started(self, value: Any = None) -> None:
        take, self._take = self._take, None
        if take is not None and value is not None:
            take(str(value))


class Run:
    """One flow run. The task that walks it owns it; to end it, others write down a reason and end its processes."""

    def __init__(
        self,
        host: Host,
        flow_run: FlowRun,
        log: RunLogger,
        sources: Sources,
        answered_at: float,
        transition_id: UUID | None = None,
    ) -> None:
        """With a transition id the run is claimed already."""
        self.flow_run = flow_run
        self.id = flow_run.id
        self.log = log
        self.mask = log.mask
        self.answered_at = answered_at
        self.claim = Claim(flow_run, log, transition_id)
        self.deployment: Deployment | None = None
        self.flow: Flow | None = None
        self.configuration: BaseJobConfiguration | None = None
        self.identifier: str | None = None
        self.reason: Reason | None = None
        self.reason_text = ""
        self.result: BaseWorkerResult | None = None
        self.error: BaseException | None = None
        self.final_state: State | None = None
        self.future: FlowRunFuture | None = None
        self.reporting = anyio.CancelScope(shield=True)
        self.ending = False
        self.page: Page = ForgottenPage({})
        self._resumed: Record | None = None
        self._known: Facts | None = None  # when it was over already, and only to be reported
        self._announced = False
        self._preparing = anyio.CancelScope()
        self._running = anyio.CancelScope()
        self._entered = False
        self._named = anyio.Event()
        self._configured_command = False
        self._host = host
        self._sources = sources

    @property
    def starting(self) -> bool:
        """Is it still being prepared, so that its start is to come?"""
        return not self._entered and self.error is None

    @property
    def is_resumed(self) -> bool:
        """Did a worker that has died take it?"""
        return self._resumed is not None

    @property
    def stopped_text(self) -> str:
        return f"The worker {self._host.name!r} was stopped, and the flow run with it."

    @property
    def facts(self) -> Facts:
        """What is to be reported, as far as it is known now."""
        if self._known is not None:
            return self._known
        ends_with_run = self._host.ends_with_run
        return Facts(
            reason=self.reason,
            reason_text=self.reason_text,
            result=self.result,
            failure=self.mask(one_line(self.error)) if self.error else None,
            deployment_gone=isinstance(self.error, DeploymentGone),
            unseen=isinstance(self.error, ExitUnknown),
            tail=getattr(self.error if self.result is None else self.result, "tail", []),
            may_live_on=self.identifier is not None and self.result is None and not ends_with_run,
            must_report=ends_with_run and not self._configured_command,
        )

    async def walk(self) -> None:
        """Claim, configure, run, report; whatever goes wrong in a run stays in it."""
        try:
            with self._preparing:
                self._open_page()
                if not self.claim.held:
                    await self._claim()
                if self.claim.held and self.reason is None and self.page.data.get("phase") == "claiming":
                    await self._configure()
            if self.configuration is not None:
                await self._execute(self.configuration)
        except Exception as caught:
            self.error = error = single(caught)
            known = isinstance(error, ProcworkerError | ValidationError)
            text = one_line(error)
            self.log.error("Flow run %r failed: %s", self.flow_run.name, text, exc_info=None if known else error)
        finally:
            self._named.set()
            if self.claim.held:
                await self._report()
            else:
                self.page.remove()

    def resume(self, page: Page, record: Record, text: str) -> None:
        """Go on where a dead worker left off, or, if it wanted that, end the run and give `text` as the reason."""
        self.page, self._resumed = page, record
        facts = record.facts
        self.reason, self.reason_text, self.result = facts.reason, facts.reason_text, facts.result
        self._configured_command = not facts.must_report
        self._known = facts if record.phase == "ended" else None
        if record.phase in ("starting", "running"):
            self.configuration = self._host.job_configuration(**record.job)
        # Without a pool nobody here knows what to start.
        lost = record.phase == "claiming" and record.pool is None
        if (record.orphans == "kill" or lost) and self.reason is None:
            self.reason, self.reason_text = Reason.STOPPED, text
        self.claim.held = record.phase != "claiming" or self.reason is not None

    def _open_page(self) -> None:
        """Write down what we are about to do; raises OSError when it cannot even be remembered."""
        if self._resumed is None:
            record = Record(
                flow_run_id=self.id,
                flow_run_name=self.flow_run.name,
                transition_id=self.claim.transition_id,
                **self._host._signature(),
            )
            self.page = self._host._journal.page(self.id, **record.model_dump(mode="json", exclude={"flow_run_id"}))

    def _note(self, **changes: Any) -> None:
        self.page.write(facts=self.facts.model_dump(mode="json"), **changes)

    async def _claim(self) -> None:
        client = self._host.client
        if self._resumed is None:
            read_deployment = partial(self._sources.read, self.flow_run.deployment_id, client.read_deployment)
            await self.claim.take(client, self.answered_at, read_deployment)
        else:  # a dead worker's claim is as good as ours, if it still stands
            self.claim.held = True  # whoever breaks us off here has to report the run
            self.flow_run = await patiently(partial(client.read_flow_run, self.id))
            await self.claim.renew(client, self.flow_run)
            self._resumed = None  # from here on it is a run like any other
        if self.claim.cancelled:
            self.reason = Reason.CANCELLED

    async def _configure(self) -> None:
        """Read what the run belongs to, then compute its configuration."""
        # A pool that changes meanwhile changes the next run.
        host, flow_run, pool = self._host, self.flow_run, self._host._work_pool
        try:
            self.deployment = await self._sources.read(flow_run.deployment_id, host.client.read_deployment)
        except ObjectNotFound as error:
            raise DeploymentGone(without_deployment(flow_run)) from error
        self.flow = await self._sources.read(flow_run.flow_id, host.client.read_flow)
        configuration = await patiently(partial(fill_job, host, pool, flow_run, self.deployment, host.client))
        self._configured_command = configuration.command is not None
        await prepare_job(host, pool, configuration, flow_run, self.deployment, self.flow)
        self.configuration = configuration
        self.mask = self.log.mask = mask_of(host._known_secrets | configuration.secrets)

    async def _execute(self, configuration: BaseJobConfiguration) -> None:
        """Run it to its end, whoever ends it."""
        if self.reason is not None and self._resumed is None:
            return
        host, self._entered = self._host, True
        submitted = None
        run = host._reattach
        if self._resumed is None:
            self.log.info("Worker %r submitting flow run %r", host.name, str(self.id))
            submitted = host._emit("prefect.worker.submitted-flow-run", self)
            job = configuration.model_dump(mode="json", include=set(host.kept_fields))
            self._note(phase="starting", job=job, flow_name=self.flow.name if self.flow else "")
            run = host.run
        async with anyio.create_task_group() as beside:
            started = Started(partial(self._started, beside))
            with self._running:
                self.result = await run(flow_run=self.flow_run, configuration=configuration, task_status=started)
                if not isinstance(self.result, BaseWorkerResult):
                    self.result = None
                    name = type(host).__name__
                    raise ProcworkerError(f"{name}.run() returned nothing of use: a BaseWorkerResult is expected")
                host._emit("prefect.worker.executed-flow-run", self, submitted)
            beside.cancel_scope.cancel()

    def _started(self, beside: TaskGroup, identifier: str) -> None:
        """The infrastructure exists: what follows from that happens beside the line."""
        self.identifier = identifier
        self._named.set()
        self.log.info("Flow run %r started as %s", self.flow_run.name, identifier)
        self._host._in_background(self._tell)
        seconds = getattr(self.configuration, "timeout_seconds", None)
        if seconds:
            beside.start_soon(self._stop_after, seconds)
        if self.reason is not None:
            polite = STOP_GRACE_SECONDS if self.reason is Reason.STOPPED else self._grace
            self._host._in_background(self._end, polite if self._resumed else 0.0)
        self._host._run_moved()

    async def _tell(self) -> None:
        """Record pid and labels on the server: useful, never worth a run."""
        host, pool = self._host, self._host._work_pool
        labels = {"prefect.worker.name": host.name, "prefect.worker.type": host.type}
        if pool:
            labels |= {"prefect.work-pool.name": pool.name, "prefect.work-pool.id": str(pool.id)}
        if host._outbox is not None:
            host._outbox.label(self.id, labels)
        try:
            await host.client.update_flow_run(self.id, infrastructure_pid=str(self.identifier))
        except Exception as error:
            self.log.warning("The process id could not be recorded: %s", error)

    async def _stop_after(self, seconds: float) -> None:
        await anyio.sleep(seconds - getattr(self.configuration, "_age", 0.0))
        text = f"The flow run exceeded its timeout of {seconds:g} s and was ended."
        self._host._in_background(self.stop, Reason.TIMED_OUT, text)

    async def cancel(self, grace: float | None = None) -> None:
        """Cancel it on our own account; where the server can be asked, its history says so first."""
        with anyio.move_on_after(ASK_SECONDS), suppress(Exception):
            await self._host.client.set_flow_run_state(self.id, new_state("CANCELLING"), retries=0)
        await self.stop(Reason.CANCELLED, "", grace)

    async def stop(self, reason: Reason, text: str = "", grace: float | None = None) -> None:
        """Write down why, then end its processes; asking again can only shorten the grace.

        Without a grace (seconds) the job's own `grace_seconds` counts, or CANCEL_GRACE_SECONDS.
        """
        if self.reason is None and self.result is None and self.error is None and self._known is None:
            self.reason, self.reason_text = reason, text
            self._note()
            self.log.info("Ending flow run %r: %s", self.flow_run.name, text or reason.value)
        await self._end(self._grace if grace is None else grace)

    @property
    def _grace(self) -> float:
        own = getattr(self.configuration, "grace_seconds", None)
        return CANCEL_GRACE_SECONDS if own is None else float(own)

    async def _end(self, grace: float) -> None:
        self.ending = True
        if self.identifier is None:
            self._preparing.cancel()
            if self._entered:  # give it time to name what there is to end
                with anyio.move_on_after(grace):
                    await self._named.wait()
                if self.identifier is None:
                    self._running.cancel()
            return
        try:
            if self.reason is Reason.CANCELLED and grace and not self._announced:
                self._announced = True
                await self._host._announce_cancel(self.identifier)
            # By name and in whole seconds, as Prefect does: what subclasses talk to may take no 30.0.
            seconds = int(grace) if float(grace).is_integer() else grace
            await self._host.kill_infrastructure(
                infrastructure_pid=self.identifier, configuration=self.configuration, grace_seconds=seconds
            )
        except InfrastructureNotFound:
            pass  # it has just ended by itself
        except NotImplementedError:
            self._running.cancel()
        except Exception as error:
            self.ending = False  # whoever wanted the end will ask again
            self.log.warning("Flow run %r could not be ended: %s", self.flow_run.name, one_line(error))

    async def _report(self) -> None:
        """Put the final state on the server; wait for the server as long as the worker lives."""
        over = self.result is not None or self.error is not None or self._known is not None
        if not over and self.reason is None:  # our own task is being cancelled
            self.reason, self.reason_text = Reason.STOPPED, self.stopped_text
            self.reporting.deadline = min(self.reporting.deadline, anyio.current_time() + 10)
        if self.result is not None:
            self.log.info("Flow run %r exited with status code %d", self.flow_run.name, self.result.status_code)
        self._note(phase="ended")
        report = Report(self.id, self.flow_run.name, self.claim.transition_id, self.facts, uuid4())
        text = "The end of flow run %r could not be reported%s: %s"
        with self.reporting:
            try:
                self.final_state = await patiently(partial(report.deliver, self._host.client, self.log))
            except Rejected as error:
                self.log.error(text, self.flow_run.name, "", one_line(error))
            except Exception as error:
                self.log.error(text, self.flow_run.name, "", one_line(error), exc_info=error)
            self.page.remove()
            if self.final_state and self.reason is Reason.CANCELLED and self.result is not None:
                self._host._emit("prefect.worker.cancelled-flow-run", self)
        if self.reporting.cancelled_caught:
            later = " and is kept for the next start of a worker here" if self.page.kept else ""
            self.log.error(text, self.flow_run.name, later, "the server did not answer in time")


def resumed(
    host: Host, pages: Sequence[Page], logger_of: Callable[[FlowRun], RunLogger], logger: Logger
) -> Iterator[Run]:
    """Yield the runs that dead workers wrote down on these pages; what cannot be read is left alone."""
    for page in pages:
        try:
            record = Record.model_validate(page.data)
            flow_run = FlowRun(id=record.flow_run_id, name=record.flow_run_name)
            log = logger_of(flow_run)
            run = Run(host, flow_run, log, Sources(), anyio.current_time(), record.transition_id)
            run.resume(page, record, f"The worker {record.worker!r} died, and the flow run was ended for that.")
        except ValidationError as error:
            logger.warning("A record of a dead worker cannot be read and is left alone: %s", one_line(error))
            continue
        log.info("Going on with flow run %r of the worker %r, which has died", flow_run.name, record.worker)
        yield run
